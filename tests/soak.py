"""Kill a training run again and again, at random; it has to end as if nothing had happened.

    python tests/soak.py --seeds 50        (make soak)

A run of some forty steps is started with 1, 2 or 4 processes under torchrun. After a random time,
or in the middle of a save, one of them or all are killed with SIGKILL. The same command goes on
with another number of processes, and so on, until the run is done. Then every number in
metrics.jsonl and the weights must be those of a run that nobody touched. tests/test_faults.py does
the same with a few seeds, and processes that it starts itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from forked import start_forked

ROOT = Path(__file__).parent.parent
PATIENCE = 900  # seconds
TOO_LATE = "it was done before the blow"


@dataclass
class Job:
    """A training run under way."""

    workers: Callable[[], list[int]]  # the processes' ids
    status: Callable[[], int | None]  # None while it runs
    kill_all: Callable[[], None]
    agent: int | None = None  # torchrun's own, if there is one


def under_torchrun(world_size: int, words: list[str], log: Path) -> Job:
    """As a user starts it."""
    return start_agent(["--standalone", f"--nproc-per-node={world_size}"], words, log)


TORCHRUN = ("-m", "torch.distributed.run")


def start_agent(
    options: list[str],
    words: list[str],
    log: Path,
    torchrun: tuple[str, ...] = TORCHRUN,
    inside: tuple[str, ...] = (),
) -> Job:
    """torchrun with these options: what a machine runs, and the processes that it starts.

    `inside` is a command that becomes the one behind it, such as `env NAME=VALUE`.
    """
    with log.open("a") as file:
        agent = subprocess.Popen(
            [*inside, sys.executable, *torchrun, *options, *words],
            cwd=ROOT,
            stdout=file,
            stderr=file,
        )

    def kill_all() -> None:
        """The agent first, which would start others; the workers don't end with it."""
        workers = children_of(agent.pid)
        agent.kill()
        agent.wait()
        for worker in workers:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)

    return Job(lambda: children_of(agent.pid), agent.poll, kill_all, agent.pid)


def children_of(parent: int) -> list[int]:
    """The processes that a process has started, as Linux tells."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(after_name[1]) == parent:
            found.append(int(path.parent.name))
    return found


def without_torchrun(world_size: int, words: list[str], log: Path) -> Job:
    """As torchrun would start them, but at once: from a server that has imported torch already."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    processes = []
    log.touch()
    for rank in range(world_size):
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
        told["LOCAL_WORLD_SIZE"] = world_size
        environment = {**os.environ, **place, **{key: str(value) for key, value in told.items()}}
        files = [Path(os.devnull), log, log]
        processes.append(start_forked(words, ROOT, environment, files))

    def status() -> int | None:
        codes = [process.exitcode for process in processes]
        if any(code not in (None, 0) for code in codes):  # torchrun ends the others, too
            kill_all()
            codes = [process.exitcode for process in processes]
        return None if None in codes else max(map(abs, codes))

    def kill_all() -> None:
        for process in processes:
            process.kill()
            process.join()

    return Job(lambda: [p.pid for p in processes if p.exitcode is None], status, kill_all)


def until(condition: Callable[[], bool], job: Job) -> None:
    """Wait for a condition or for the job's end."""
    deadline = time.monotonic() + PATIENCE
    while job.status() is None and not condition():
        if time.monotonic() > deadline:
            job.kill_all()
            raise TimeoutError(f"nothing has happened for {PATIENCE} s")
        time.sleep(0.002)


def steps_told(out: Path) -> int:
    """How many training steps metrics.jsonl tells of."""
    path = out / "metrics.jsonl"
    return path.read_text().count('"train"') if path.exists() else 0


def partial_saves(out: Path) -> set[int]:
    """The inodes of saves that are under way, or were cut short."""
    found = set()
    for path in out.glob("checkpoints/.*.partial"):
        with suppress(FileNotFoundError):
            found.add(path.stat().st_ino)
    return found


def strike(job: Job, out: Path, draw: random.Random) -> str:
    """Kill a job, or a process of it, when its time has come; returns what was done."""
    when = draw.choice(["while it starts", "after a step", "in a save"])
    victim = draw.choice(["one process", "all"])
    if when == "while it starts":
        until(lambda: len(job.workers()) > 0, job)
        time.sleep(draw.uniform(0, 2))
    elif when == "after a step":
        steps = steps_told(out) + draw.randrange(1, 20)
        until(lambda: steps_told(out) >= steps, job)
        time.sleep(draw.uniform(0, 0.05))
    else:
        before = partial_saves(out)  # a kill before this one may have left something
        until(lambda: partial_saves(out) - before, job)
    if job.status() is not None:
        return TOO_LATE
    if victim == "all":
        job.kill_all()
    else:
        for pid in draw.sample(job.workers(), k=min(1, len(job.workers()))):
            os.kill(pid, signal.SIGKILL)
        until(lambda: False, job)
    return f"{victim} {when}"


def survive(start: Callable, words: list[str], out: Path, seed: int, kills: int) -> list[str]:
    """Run `words` to its end through so many kills; returns what happened."""
    draw, told = random.Random(seed), []
    while True:
        world_size = draw.choice([1, 2, 4])
        log = out.with_suffix(".log")
        job = start(world_size, words, log)
        if len(told) < kills:
            told.append(f"{world_size}: {strike(job, out, draw)}")
        else:
            until(lambda: False, job)
            if job.status() != 0:
                raise RuntimeError(f"after {told} it failed: {log.read_text()[-3000:]}")
        if job.status() == 0:
            if kills and all(TOO_LATE in blow for blow in told):
                raise RuntimeError(f"nothing was ever killed: {told}")
            return [*told, f"{world_size}: to the end"]


def left_behind(out: Path) -> tuple[str, str]:
    """(what metrics.jsonl tells, without speed and memory; the weights' hash)."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("tokens_per_second", None)
        line.pop("peak_memory", None)
    last = max((out / "checkpoints").glob("step_*")) / "model.safetensors"
    return json.dumps(lines), hashlib.sha256(last.read_bytes()).hexdigest()


def main() -> int:
    """Soak, and print a table; the exit status is 1 if one run ended otherwise."""
    parser = argparse.ArgumentParser(description="Kill training runs and see them end alike.")
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--kills", type=int, default=3, help="per seed (3)")
    parser.add_argument("--quick", action="store_true", help="without torchrun")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    start = without_torchrun if arguments.quick else under_torchrun
    with tempfile.TemporaryDirectory(prefix="soak_") as name:
        folder = Path(name)
        prepare = [sys.executable, "prepare_fineweb.py", "--source", "*.md", "--val-tokens", "2000"]
        prepare += ["--tokenizer", "bpe:300", "--out", str(folder / "data"), "--workers", "1"]
        subprocess.run(prepare, cwd=ROOT, check=True)
        settings = {"data.dir": folder / "data", "train.reduction": "canonical"}
        settings |= {"train.max_steps": 40, "train.checkpoint_every": 5, "log.eval_every": 20}
        settings |= {"model.dropout": 0.1, "log.sample_every": 0}
        words = ["train.py", "configs/demo.toml"]
        words += [text for key, value in settings.items() for text in (f"--{key}", str(value))]
        words += ["--train.micro_batch_size", "1", "--train.out"]
        survive(start, [*words, str(folder / "alone")], folder / "alone", seed=0, kills=0)
        expected, failures = left_behind(folder / "alone"), 0
        for seed in range(1, arguments.seeds + 1):
            out = folder / f"seed_{seed}"
            told = survive(start, [*words, str(out)], out, seed, arguments.kills)
            same = left_behind(out) == expected
            failures += not same
            print(f"{seed:4}  {'same' if same else 'OTHER'}  {', '.join(told)}", flush=True)
    print(f"{arguments.seeds - failures} of {arguments.seeds} runs ended like the untouched one")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())

"""What a run survives: kills, signals, bad numbers, other numbers of processes. Real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, machines, ranks, run
from safetensors.torch import load_file
from soak import (
    TORCHRUN,
    Job,
    start_agent,
    steps_told,
    survive,
    under_torchrun,
    until,
    without_torchrun,
)
from test_checkpoint import rewrite_meta
from torch.testing import assert_close

from training.guard import STORE_IS_GONE

# And with an average of the weights, which changes places with them to be evaluated or saved.
CANONICAL = ("--train.reduction", "canonical", "--optim.average_share", "0.1")


def lines_of(folder: Path, *kinds: str) -> list[dict]:
    """The lines of metrics.jsonl of these kinds, without what depends on the machine."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("tokens_per_second", None)
        line.pop("peak_memory", None)
    return [line for line in lines if line["kind"] in kinds or not kinds]


def weights_of(folder: Path, step: int = 40) -> bytes:
    return (folder / "checkpoints" / f"step_{step:06d}" / "model.safetensors").read_bytes()


def losses_of(folder: Path) -> dict[str, tuple]:
    """What each checkpoint tells of validations, by its name."""
    found = {}
    for path in (folder / "checkpoints").iterdir():
        meta = json.loads((path / "meta.json").read_text())
        found[path.name] = meta["val_loss"], meta["best_val_loss"]
    return found


@pytest.fixture
def train(tiny, shards, monkeypatch):
    """train(out, world_size, *settings, fault=…, at=…): a run of `tiny`, perhaps with a fault."""

    def start(out: Path, world_size: int, *settings: object, fault: str = "", **where: object):
        script = "train.py"
        if fault:
            script = "tests/faulty_train.py"
            monkeypatch.setenv("FAULT", fault)
            monkeypatch.setenv("AT", str(where["at"]))
            monkeypatch.setenv("FAULTY_RANK", str(where.get("rank", 0)))
        arguments = (tiny, "--data.dir", shards, "--train.out", out, *settings)
        if world_size == 1:
            return run(script, *arguments)
        return ranks(world_size, *arguments, script=script)

    return start


@pytest.fixture
def faulty(tiny, shards, tmp_path, monkeypatch):
    """faulty(fault, at): the words that start a run in tmp_path / "run", with that fault or none.

    Under torchrun the script's folder is the only one that is looked into: so PYTHONPATH.
    """

    def words(fault: str = "none", at: int = 0, *settings: object, rank: int = 0) -> list[str]:
        changes = {"FAULT": fault, "AT": at, "FAULTY_RANK": rank, "PYTHONPATH": ROOT}
        for name, value in changes.items():
            monkeypatch.setenv(name, str(value))
        arguments = (tiny, "--data.dir", shards, "--train.out", tmp_path / "run", *settings)
        return ["tests/faulty_train.py", *map(str, arguments)]

    return words


@contextmanager
def in_hand(job: Job) -> Iterator[Job]:
    """A run that a test interferes with: inside to its end, or it is killed."""
    try:
        yield job
        until(lambda: False, job)
    finally:
        if job.status() is None:
            job.kill_all()


@pytest.fixture(scope="module")
def alone(tiny, shards, tmp_path_factory) -> Path:
    """An uninterrupted canonical run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    result = run("train.py", tiny, "--data.dir", shards, "--train.out", out, *CANONICAL)
    assert result.status == 0, result.err
    return out


# Any number of processes


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_canonical_run_is_the_same_to_the_bit_for_any_number_of_processes(
    train, alone, tmp_path, world_size
):
    """With dropout on, whose draws are keyed by step and micro-batch."""
    result = train(tmp_path / "run", world_size, *CANONICAL)
    assert result.status == 0, result.err
    assert lines_of(tmp_path / "run") == lines_of(alone)
    assert weights_of(tmp_path / "run") == weights_of(alone)


def test_muon_shares_its_matrices_out_and_steps_to_the_same_bit(train, short_documents, tmp_path):
    """And so do documents that are read each by itself."""
    settings = (*CANONICAL, "--optim.name", "muon", "--train.max_steps", 6)
    settings += ("--data.dir", short_documents, "--data.document_mask", "true")
    settings += ("--train.dtype", "bfloat16")
    for world_size in (1, 2, 4):
        assert train(tmp_path / str(world_size), world_size, *settings).status == 0
        assert lines_of(tmp_path / str(world_size)) == lines_of(tmp_path / "1")
        assert weights_of(tmp_path / str(world_size), 6) == weights_of(tmp_path / "1", 6)
    assert train(tmp_path / "1", 1, *settings, "--train.max_steps", 10).status == 0
    shutil.rmtree(tmp_path / "2")
    assert train(tmp_path / "2", 2, *settings, "--train.max_steps", 10).status == 0
    error = train(tmp_path / "1", 1, *settings, "--optim.name", "adamw").error()
    assert 'was trained with optim.name = "muon", now it is "adamw"' in error


def test_compiled_processes_under_ddp_learn_with_muon_what_one_that_is_not_compiled_does(
    train, tmp_path
):
    settings = ("--optim.name", "muon", "--optim.average_share", 0.5, "--train.max_steps", 4)
    settings += ("--log.eval_every", 2, "--model.dropout", 0)
    assert train(tmp_path / "1", 1, *settings).status == 0
    assert train(tmp_path / "2", 2, *settings, "--train.compile", "true").status == 0
    for ours, theirs in zip(lines_of(tmp_path / "2"), lines_of(tmp_path / "1"), strict=True):
        assert (ours["kind"], ours["step"]) == (theirs["kind"], theirs["step"])
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_a_canonical_run_goes_on_with_another_number_of_processes(train, alone, tmp_path):
    shutil.copytree(alone, tmp_path / "run", ignore=shutil.ignore_patterns("step_000040"))
    assert train(tmp_path / "run", 2, *CANONICAL).status == 0
    assert lines_of(tmp_path / "run") == lines_of(alone)
    assert weights_of(tmp_path / "run") == weights_of(alone)


def test_canonical_gradients_are_ddps_but_for_rounding(train, alone, tmp_path):
    """For twenty steps: rounding grows."""
    assert train(tmp_path / "run", 1, "--train.checkpoint_every", 10).status == 0
    for ours, theirs in zip(lines_of(alone, "train")[:20], lines_of(tmp_path / "run", "train")):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    assert lines_of(alone) != lines_of(tmp_path / "run")  # it is another order


def test_what_cannot_be_canonical_is_one_line(train, alone, tmp_path):
    settings = (*CANONICAL, "--train.tokens_per_step", 384)
    assert "3 micro-batches per process are no power of two" in (
        train(tmp_path / "o", 2, *settings).error()
    )
    shutil.copytree(alone, tmp_path / "run", ignore=shutil.ignore_patterns("step_000040"))
    error = train(tmp_path / "run", 1, *CANONICAL, "--train.micro_batch_size", 4).error()
    assert "was trained with train.micro_batch_size = 2, now it is 4" in error


# Kills


@pytest.mark.parametrize("seed", range(4))
def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(
    tiny, shards, alone, tmp_path, seed
):
    """`make soak` does it with more seeds, and under torchrun."""
    out = tmp_path / "run"
    words = ["train.py", tiny, "--data.dir", shards, "--train.out", out, *CANONICAL]
    words += ["--train.checkpoint_every", 4]
    survive(without_torchrun, [str(word) for word in words], out, seed, kills=3)
    assert lines_of(out) == lines_of(alone)
    assert weights_of(out) == weights_of(alone)


# Being asked to stop


@pytest.mark.parametrize(("world_size", "name"), [(1, "SIGINT"), (2, "SIGTERM")])
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint_and_nothing_is_lost(
    train, alone, tmp_path, world_size, name
):
    out = tmp_path / "run"
    fault = {"fault": name, "at": 6, "rank": world_size - 1}  # in a step: told with the next
    result = train(out, world_size, *CANONICAL, **fault)
    took = time.time() - (out / "signalled").stat().st_mtime
    assert took < 30  # seconds until all had saved and gone
    assert result.status == {"SIGINT": 130, "SIGTERM": 143}[name]
    assert "stopped after step 7; the same command goes on from there" in result.err
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_000007"]
    assert train(out, world_size, *CANONICAL).status == 0
    assert lines_of(out) == lines_of(alone)
    assert weights_of(out) == weights_of(alone)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_to_torchrun_and_its_workers_together_stops_with_a_checkpoint(
    faulty, alone, tmp_path, name
):
    """SLURM and systemd do that, and a terminal; each worker gets it from torchrun once more."""
    out, log = tmp_path / "run", tmp_path / "log"
    with in_hand(under_torchrun(2, faulty("slow", 40, *CANONICAL), log)) as job:
        until(lambda: steps_told(out) >= 3, job)
        for pid in (*job.workers(), job.agent):
            os.kill(pid, getattr(signal, name))
    (saved,) = (out / "checkpoints").iterdir()
    assert saved.name == f"step_{len(lines_of(out, 'train')):06d}"
    assert f"{name}: stopping after this step" in log.read_text()
    assert run(*faulty("none", 0, *CANONICAL)).status == 0
    assert lines_of(out) == lines_of(alone)
    assert weights_of(out) == weights_of(alone)


@pytest.mark.parametrize("whom", ["torchrun", "one process"])
def test_a_signal_in_an_evaluation_breaks_it_off_and_the_resumed_run_makes_up_for_it(
    faulty, alone, tmp_path, whom
):
    """torchrun gives its processes 30 s; an evaluation may take hours."""
    out, log = tmp_path / "run", tmp_path / "log"
    start = under_torchrun if whom == "torchrun" else without_torchrun
    with in_hand(start(2, faulty("slow evaluation", 1, *CANONICAL), log)) as job:
        until(lambda: all((out / f"evaluated by {rank}").exists() for rank in range(2)), job)
        os.kill(job.agent or job.workers()[1], signal.SIGTERM)
        asked = time.monotonic()
        while job.workers() and time.monotonic() - asked < 15:
            time.sleep(0.05)
        assert not job.workers()
    assert log.read_text().count("stopped after step 20; the same command goes on from there") == 2
    batches = [len((out / f"evaluated by {rank}").read_text()) for rank in range(2)]
    assert max(batches) < 4  # of the eight
    assert lines_of(out) == lines_of(alone, "train")[:20]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_000020"]
    assert run(*faulty("none", 0, *CANONICAL)).status == 0
    assert lines_of(out) == lines_of(alone)
    assert losses_of(out) == losses_of(alone)
    assert weights_of(out) == weights_of(alone)


@pytest.mark.parametrize(("then", "slow", "status"), [("SIGINT", 40, 130), ("nothing", 8, 0)])
def test_a_run_whose_reader_has_gone_goes_on_and_stops_only_as_asked(
    faulty, alone, tmp_path, then, slow, status
):
    """`train.py … 2>&1 | tee log`: Ctrl-C ends tee as well. `head` goes by itself."""
    out, pipe = tmp_path / "run", tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", pipe], stdout=subprocess.DEVNULL) as reader:
        try:
            with in_hand(without_torchrun(1, faulty("slow", slow, *CANONICAL), pipe)) as job:
                until(lambda: steps_told(out) >= 3, job)
                reader.send_signal(signal.SIGINT)
                reader.wait()
                if then == "SIGINT":
                    os.kill(job.workers()[0], signal.SIGINT)
        finally:
            reader.kill()
    assert job.status() == status
    if then == "SIGINT":
        (saved,) = (out / "checkpoints").iterdir()
        assert saved.name == f"step_{len(lines_of(out, 'train')):06d}"
        assert run(*faulty("none", 0, *CANONICAL)).status == 0
    assert lines_of(out) == lines_of(alone)
    assert weights_of(out) == weights_of(alone)


# Bad numbers


@pytest.mark.parametrize("way", [(), ("--optim.name", "muon", "--optim.average_share", 0.5)])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(train, tmp_path, way):
    """The weights after it, and their average, are as if the optimizer had rested in that step."""
    fault = {"fault": "nan", "at": 5, "rank": 1}
    settings = ("--train.max_steps", 6, "--train.checkpoint_every", 1, "--log.eval_every", 0, *way)
    result = train(tmp_path / "run", 2, *settings, "--train.keep_checkpoints", 6, **fault)
    assert result.status == 0, result.err
    assert "step 5: loss nan, gradient norm nan: skipped" in result.err
    (skipped,) = lines_of(tmp_path / "run", "skip")
    assert (skipped["step"], len(skipped["windows"])) == (5, 16)
    assert [line["step"] for line in lines_of(tmp_path / "run", "train")] == [1, 2, 3, 4, 6]
    weights = [weights_of(tmp_path / "run", step) for step in (4, 5, 6)]
    assert weights[0] == weights[1] != weights[2]
    states = [load_file(optimizer_of(tmp_path / "run", step)) for step in (4, 5)]
    assert_close(*states, rtol=0, atol=0)


def optimizer_of(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step_{step:06d}" / "optimizer.safetensors"


def test_too_many_bad_steps_in_a_row_stop_the_run_with_its_last_good_checkpoint(train, tmp_path):
    fault = {"fault": "nan", "at": "4,7,8,9", "rank": 1}
    settings = ("--train.max_skipped_steps", 2, "--train.checkpoint_every", 3)
    result = train(tmp_path / "run", 2, *settings, "--log.eval_every", 0, **fault)
    assert "step 9: loss nan, gradient norm nan: skipped, 3 in a row" in result.error()
    assert "it saw windows [" in result.err
    assert len(weights_of(tmp_path / "run", 6)) > 100_000
    settings = ("--train.max_steps", 12, "--log.eval_every", 0)  # the fault is gone
    assert train(tmp_path / "run", 2, *settings).status == 0


def test_a_spike_is_skipped_once_there_is_something_to_compare_with(train, tmp_path):
    settings = ("--train.skip_spikes", 6, "--train.max_steps", 140, "--log.eval_every", 0)
    settings += ("--train.tokens_per_step", 64)
    fault = {"fault": "spike", "at": "20,135"}
    result = train(tmp_path / "run", 1, *settings, **fault)
    assert result.status == 0, result.err
    assert [line["step"] for line in lines_of(tmp_path / "run", "skip")] == [135]
    assert "step 135: loss" in result.err


# Data


@pytest.mark.parametrize(
    ("name", "told"),  # by rank 0, of its own shard and of the other process's
    [
        ("train_000000.bin", "train_000000.bin has been damaged or changed"),
        ("train_000001.bin", "1 of 2 ranks failed: see what they said"),
    ],
)
def test_shards_are_checked_by_one_process_or_the_other(train, shards, tmp_path, name, told):
    data = shutil.copytree(shards, tmp_path / "data")
    content = bytearray((data / name).read_bytes())
    content[-1] ^= 1
    (data / name).write_bytes(content)
    assert told in train(tmp_path / "run", 2, "--data.dir", data).error()
    assert not (tmp_path / "run").exists()


# Machines that are not alike, or stand still


@pytest.mark.parametrize(
    ("fault", "steps"), [("stall", 6), ("stall in the rehearsal", 0), ("stall at the start", 0)]
)
def test_a_rank_that_stands_still_is_named_with_its_machine(faulty, tmp_path, fault, steps):
    settings = ("--train.timeout_seconds", 10, "--train.tokens_per_step", 128)  # a micro-batch each
    words = faulty(fault, 7, *settings, rank=1)
    with in_hand(without_torchrun(2, words, tmp_path / "log")):
        pass
    lines = (tmp_path / "log").read_text().splitlines()
    error = next(line for line in lines if line.startswith("error: [rank 0 "))
    host = socket.gethostname()
    assert error.startswith(f"error: [rank 0 on {host}] rank 1 on {host} kept the others waiting")
    assert steps_told(tmp_path / "run") == steps


@pytest.mark.parametrize(
    ("fault", "status", "last"), [("error", 2, "too hot here"), ("bug", 1, "ZeroDivisionError")]
)
@pytest.mark.parametrize("rank", [0, 1])
def test_when_one_rank_cannot_go_on_the_other_says_so_in_one_line(
    tiny, shards, tmp_path, monkeypatch, fault, status, last, rank
):
    for name, value in {"FAULT": fault, "AT": "7", "FAULTY_RANK": str(rank)}.items():
        monkeypatch.setenv(name, value)
    arguments = (tiny, "--data.dir", shards, "--train.out", tmp_path / "run")
    results = machines(arguments, arguments, script="tests/faulty_train.py")
    assert (results[rank].status, last in results[rank].err) == (status, True)
    host, error = socket.gethostname(), results[1 - rank].error()
    reasons = [f"rank {rank} on {host} has failed: see what it said"]
    reasons += [STORE_IS_GONE] * (rank == 0)  # store and all
    assert error in [f"error: [rank {1 - rank} on {host}] {reason}" for reason in reasons]


@pytest.fixture
def two_machines(tiny, shards, alone, tmp_path):
    """Two ranks with a disk each: two_machines(settings of rank 0, of rank 1). "run" is there."""
    shutil.copytree(alone, tmp_path / "run")

    def start(*settings: tuple[object, ...]):
        common = (tiny, "--data.dir", shards, "--train.max_steps", 60, *CANONICAL)
        results = machines(*((*common, *own) for own in settings))
        assert [result.status for result in results] == [2, 2]
        return [result.error() for result in results]

    return start


@pytest.mark.parametrize(
    ("folders", "complaint"),
    [
        (("run", "empty"), "rank 0 goes on after step 40, and this machine has no "),
        (("empty", "run"), "holds checkpoints on this machine and none on that of rank 0"),
    ],
)
def test_a_machine_without_the_checkpoint_does_not_begin_at_step_0(
    two_machines, tmp_path, folders, complaint
):
    errors = two_machines(*(("--train.out", tmp_path / folder) for folder in folders))
    assert "1 of 2 ranks failed: see what they said" in errors[0]
    assert complaint in errors[1]
    assert not (tmp_path / "empty").exists()


def test_a_machine_with_another_or_a_damaged_checkpoint_is_told(two_machines, tmp_path):
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    weights = tmp_path / "other" / "checkpoints" / "step_000040" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    out = [("--train.out", tmp_path / "run"), ("--train.out", tmp_path / "other")]
    assert f"{weights} is damaged" in two_machines(*out)[1]
    weights.write_bytes(content)
    rewrite_meta(weights.parent, lambda meta: meta.update(best_val_loss=1.0))
    assert "the checkpoint here is not that of rank 0" in two_machines(*out)[1]


def test_machines_with_other_data_settings_or_weights_are_told(two_machines, shards, tmp_path):
    out = ("--train.out", tmp_path / "empty")
    shutil.copytree(shards, tmp_path / "data")
    (tmp_path / "data" / "manifest.json").unlink()
    errors = two_machines(out, (*out, "--data.dir", tmp_path / "data"))
    assert "the data here is not that of rank 0" in errors[1]
    errors = two_machines(out, (*out, "--optim.learning_rate", 0.01))
    assert "a setting here is not that of rank 0" in errors[1]
    errors = two_machines(out, (*out, "--train.init_from", tmp_path / "run"))
    assert "a setting here is not that of rank 0" in errors[1]
    shutil.copytree(tmp_path / "run", tmp_path / "base")
    checkpoint = tmp_path / "base" / "checkpoints" / "step_000040"
    rewrite_meta(checkpoint, lambda meta: meta.update(best_val_loss=1.0))
    bases = (("--train.init_from", tmp_path / name) for name in ("run", "base"))
    errors = two_machines(*((*out, *base) for base in bases))
    assert "the checkpoint to begin with here is not that of rank 0" in errors[1]


JOIN = """
import socket, sys, time
from torch.distributed.run import main
host, port = sys.argv.pop(1).split(":")
while socket.socket().connect_ex((host, int(port))):
    time.sleep(0.1)
main()
"""


@dataclass(frozen=True)
class Host:
    """What two torchrun agents take for two machines: how to run a command on one, and options."""

    inside: tuple[str, ...]
    options: tuple[str, ...]


def on_loopback() -> list[Host]:
    """Two of them in one network; the first to come listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    return [Host((), (f"--rdzv-endpoint={endpoint}",))] * 2


@contextmanager
def in_namespaces() -> Iterator[list[Host]]:
    """A network namespace for each, and a cable between them. Skips the test if it may not."""
    names = [f"gpt2-{os.getpid()}-{number}" for number in (1, 2)]

    def ip(*words: str) -> bool:
        return subprocess.run(["ip", *words], capture_output=True).returncode == 0

    if not shutil.which("ip") or not ip("netns", "add", names[0]):
        pytest.skip("network namespaces need iproute2 and the rights of root")
    try:
        ends = ["netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1]]
        assert ip("netns", "add", names[1])
        assert ip("link", "add", "cable", *ends)
        for number, name in enumerate(names, 1):
            assert ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "cable")
            assert ip("-n", name, "link", "set", "cable", "up")
            assert ip("-n", name, "link", "set", "lo", "up")
        yield [
            Host(
                ("ip", "netns", "exec", name, "env", "GLOO_SOCKET_IFNAME=cable"),
                ("--rdzv-endpoint=10.77.0.1:29400", f"--local-addr=10.77.0.{number}"),
            )
            for number, name in enumerate(names, 1)
        ]
    finally:
        for name in names:
            ip("netns", "delete", name)


def test_both_sides_of_a_cut_cable_end_and_say_why(tiny, shards, tmp_path, monkeypatch):
    """Nobody tells rank 1 that its connections lead nowhere: no answer has to be one, too."""
    for name, value in {"FAULT": "slow", "AT": "40", "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    out, logs = tmp_path / "run", [tmp_path / "first", tmp_path / "second"]
    words = ["tests/faulty_train.py", tiny, "--data.dir", shards, "--train.out", out]
    words = [str(word) for word in (*words, "--train.timeout_seconds", 5)]
    place = ("MASTER_ADDR=10.77.0.1", "MASTER_PORT=29401", "WORLD_SIZE=2", "LOCAL_RANK=0")
    with in_namespaces() as hosts:
        jobs = [
            start_agent([], words, log, (), (*host.inside, *place, f"RANK={rank}"))
            for rank, (host, log) in enumerate(zip(hosts, logs))
        ]
        try:
            until(lambda: steps_told(out) >= 3, jobs[0])
            cut = [*hosts[1].inside[:4], "ip", "link", "set", "cable", "down"]
            subprocess.run(cut, check=True)
            then = time.monotonic()
            while None in [job.status() for job in jobs] and time.monotonic() - then < 60:
                time.sleep(0.1)
            assert [job.status() for job in jobs] == [1, 1]
        finally:
            for job in jobs:
                job.kill_all()
    host = socket.gethostname()
    assert f"error: [rank 0 on {host}] rank 1 on {host} kept the others" in logs[0].read_text()
    assert f"error: [rank 1 on {host}] {STORE_IS_GONE}\n" in logs[1].read_text()


def two_agents(words: list[str], out: Path, hosts: list[Host]) -> tuple[int, list[str]]:
    """Two torchrun agents train together: the second's process is killed, then the second itself.

    The first listens, so it isn't the one to lose; the second is ready to join it at once.
    Returns the first's exit status, and what both told.
    """
    common = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d"]
    common += ["--rdzv-id=two"]
    logs = [out.with_suffix(f".{name}") for name in ("first", "second")]
    endpoint = hosts[0].options[0].partition("=")[2]
    jobs = []
    for host, log, torchrun in zip(hosts, logs, (TORCHRUN, ("-c", JOIN, endpoint))):
        listens = int(torchrun == TORCHRUN)
        options = [*common, *host.options, f"--rdzv-conf=last_call_timeout=10,is_host={listens}"]
        jobs.append(start_agent(options, words, log, torchrun, host.inside))
    first, second = jobs
    try:
        until(lambda: second.workers() and steps_told(out) >= 9, first)
        os.kill(second.workers()[0], signal.SIGKILL)
        until(lambda: "resuming after step 8" in logs[0].read_text(), first)
        until(lambda: steps_told(out) >= 13, first)
        second.kill_all()
        until(lambda: False, first)
        return first.status(), [log.read_text() for log in logs]
    finally:
        for job in jobs:
            if job.status() is None:
                job.kill_all()


def test_a_killed_process_is_started_again_and_a_lost_machine_is_done_without(
    tiny, shards, alone, tmp_path, monkeypatch
):
    """Where a machine stands still for a minute torchrun's own meeting may fail: then once more."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("FAULT", "slow")  # or it would be done before anything can happen to it
    monkeypatch.setenv("AT", "24")
    for attempt in range(3):
        out = tmp_path / f"run{attempt}"
        words = ["tests/faulty_train.py", tiny, "--data.dir", shards, "--train.out", out]
        words += [*CANONICAL, "--train.checkpoint_every", 4]
        words = [str(word) for word in words]
        with ExitStack() as stack:
            try:
                hosts = stack.enter_context(in_namespaces())
            except pytest.skip.Exception:
                hosts = on_loopback()
            status, told = two_agents(words, out, hosts)
        if status == 0 or "torch/distributed/elastic/rendezvous" not in told[0]:
            break
    assert status == 0, told
    worlds = [line.split()[1] for line in told[0].splitlines() if line.startswith("device ")]
    assert worlds == ["2", "2", "1"], told
    assert "failed to connect" not in told[0] + told[1]  # no address of the dead was tried
    assert lines_of(out) == lines_of(alone)
    assert weights_of(out) == weights_of(alone)


# Checkpoints that can't be used, or can't be written


def test_a_damaged_checkpoint_is_skipped_by_all_ranks(train, alone, tmp_path):
    shutil.copytree(alone, tmp_path / "run")
    damaged = tmp_path / "run" / "checkpoints" / "step_000040" / "optimizer.safetensors"
    os.truncate(damaged, damaged.stat().st_size - 1)
    result = train(tmp_path / "run", 2, *CANONICAL)
    assert result.status == 0
    assert f"skipped: {damaged} is damaged" in result.err
    assert "resuming after step 20" in result.err
    assert weights_of(tmp_path / "run") == weights_of(alone)
    assert lines_of(tmp_path / "run") == lines_of(alone)


def test_a_damaged_checkpoint_costs_no_other_its_place(train, alone, tmp_path):
    """One that was saved between the rest, and is passed: it goes, and the one before it stays."""
    shutil.copytree(alone, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step_000040").rename(folder / "step_000035")
    (folder / "step_000035" / "model.safetensors").write_bytes(b"")
    result = train(tmp_path / "run", 1, *CANONICAL, "--train.keep_checkpoints", 2)
    assert result.status == 0 and "skipped: " in result.err
    assert sorted(path.name for path in folder.iterdir()) == ["step_000020", "step_000040"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint(train, alone, tmp_path, world_size):
    """Files of this process can't grow beyond 100 kB from step 15 on: the system's own refusal."""
    settings = (*CANONICAL, "--train.checkpoint_every", 10)
    result = train(tmp_path / "run", world_size, *settings, fault="full disk", at=15)
    assert "can't save " in result.error()
    assert "step_000020: " in result.err
    names = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert names == ["step_000010"]
    assert train(tmp_path / "run", 1, *CANONICAL).status == 0
    assert weights_of(tmp_path / "run") == weights_of(alone)

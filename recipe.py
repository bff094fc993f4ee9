"""Which way of training learns most from the same text? Many small trainings, side by side.

    make recipe TEXTS=texts JOBS=2         prepares the Parquet files in texts/, and then does
    python recipe.py --jobs 2              this, on what lies in data/recipe

All of them train the model of configs/recipe.toml. A candidate is a set of changes to it. Four
learning rates are tried for each with the first seed; the best is then trained with two more seeds,
which decide the weights and the order of the text, alike for all candidates. Each training is an
ordinary run of train.py. What it found goes into out/recipe/found.json at once, so that the same
command goes on where it was stopped. results/recipe.json is such a file.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from common.errors import Parser, folder_name, positive, run_script

ROOT = Path(__file__).parent
FOUND = "found.json"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description="Compare ways of training, by many small trainings.")
    add = parser.add_argument
    add("--config", type=Path, default=ROOT / "configs" / "recipe.toml", help="model and batches")
    add(
        "--out",
        type=folder_name,
        help=f"folder for the runs and {FOUND} (out/<name of the config>)",
    )
    add("--jobs", type=positive, default=1, help="trainings at a time, sharing the cores (1)")
    add("--only", nargs="+", metavar="NAME", help="some of the candidates (all)")
    parsed = parser.parse_args(arguments)
    parsed.out = parsed.out or ROOT / "out" / parsed.config.stem
    return parsed


if __name__ == "__main__":  # before the slow imports: --help and a typo answer at once
    ARGUMENTS = parse_arguments()

import shlex
import shutil
import statistics
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace

import torch

from benchmarks.trials import (
    BASELINE,
    SEEDS,
    Candidate,
    Found,
    Run,
    Settings,
    load_found,
    print_rows,
)
from common.device import choose_device, device_name
from common.errors import UserError
from common.files import check_can_write, disk_errors
from common.reports import circumstances, commit, hardware
from config import make_config, read_toml
from data import BatchShape
from distributed import Ranks
from shards import TokenStream
from step import make_stepper
from training.metrics import read_losses

ADAMW = Candidate(
    "AdamW as nanoGPT has it, cosine to a tenth",
    # Its config/train_shakespeare_char.py, without dropout and with the biases of GPT-2.
    {"optim.beta2": 0.99, "optim.warmup_steps": 100},
    "optim.learning_rate",
    (2.5e-4, 5e-4, 1e-3, 2e-3),
    floor=0.1,
)
MUON = Candidate(
    "Muon, cosine to a tenth",
    {"optim.name": "muon"},
    "optim.matrix_learning_rate",
    (0.005, 0.01, 0.02, 0.04),
    floor=0.1,
)


def changed(base: Candidate, meaning: str, settings: Settings, **others: object) -> Candidate:
    """Another candidate, with more settings."""
    return replace(base, meaning=meaning, settings=base.settings | settings, **others)


LINEAR = {"optim.schedule": "linear"}
LEVEL = {"optim.decay_steps": 160}  # of 400
MUON_LINEAR = changed(MUON, "Muon, linear to 0", LINEAR, floor=0.0)
CANDIDATES = {
    BASELINE: ADAMW,
    "adamw_linear": changed(ADAMW, "AdamW, linear to 0", LINEAR, floor=0.0),
    "muon": MUON,
    "muon_linear": MUON_LINEAR,
    "muon_wsd": changed(MUON_LINEAR, "Muon, level, then linear to 0 for 40 %", LEVEL),
    "muon_ema": changed(
        MUON,
        "Muon, level, weights averaged over the last tenth",
        {"optim.average_share": 0.1},
        floor=1.0,
    ),
    "documents": changed(
        MUON_LINEAR, "Muon, linear to 0, each document by itself", {"data.document_mask": True}
    ),
}


def found_so_far(path: Path, config: dict[str, Settings], names: list[str]) -> Found:
    """What a file has of these candidates. Raises UserError if it is about something else."""
    now = measured_here()
    folder = Path(make_config(config).data.dir)
    data = " ".join(TokenStream(folder, split).fingerprint for split in ("train", "val"))
    found = load_found(path) if path.exists() else Found(*now, config, data, {}, 0.0, {}, ())
    way_out = "choose another --out, or remove this one"
    if found.config != config:
        raise UserError(f"{path} tells of another config: {way_out}")
    if found.data != data:
        raise UserError(f"{path} tells of other text than {folder} has: {way_out}")
    for name in names:
        new = CANDIDATES[name]
        old = found.candidates.setdefault(name, new)
        if replace(old, meaning=new.meaning, rates=new.rates) != new:
            raise UserError(f"{path} tells of another {name}: {way_out}")
        found.candidates[name] = new
    return found


def measured_here() -> tuple[str, str, str, dict[str, str]]:
    """The first four of a Found's: command, date, hardware, versions."""
    told = circumstances(shlex.join(["python", "recipe.py", *sys.argv[1:]]))
    return told["command"], told["date"], machine(), told["versions"]


def machine() -> str:
    """What the trainings run on."""
    device = choose_device("auto")
    return hardware() if device.type == "cpu" else f"{device_name(device)}, {hardware()}"


def train(name: str, rate: float, seed: int, arguments: argparse.Namespace) -> Run:
    """One training. Raises UserError if it failed."""
    folder = arguments.out / f"{name}_{rate:g}_{seed}"
    config = make_config(CANDIDATES[name].values(arguments.config, rate, seed))
    with disk_errors(f"can't write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.toml").write_text(config.to_toml(), encoding="utf-8")
        log = (folder / "log.txt").open("a")
    command = [sys.executable, ROOT / "train.py", folder / "recipe.toml", "--train.out", folder]
    threads = max(1, os.cpu_count() // arguments.jobs)
    with log:
        status = subprocess.run(
            command,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdout=log,
            stderr=log,
            check=False,
        ).returncode
    if status:
        raise UserError(f"a training failed; {folder / 'log.txt'} says why")
    told = [(line["step"], line["loss"]) for line in read_losses(folder) if line["kind"] == "val"]
    with disk_errors(f"can't remove {folder / 'checkpoints'}"):
        shutil.rmtree(folder / "checkpoints")
    return Run(name, rate, seed, *zip(*told), machine(), torch.__version__, commit(ROOT))


def measure_steps(
    names: list[str], config: Path, rounds: int = 5, steps: int = 4
) -> dict[str, list[float]]:
    """Seconds of a step, by candidate: of several rounds, in which all take turns."""
    ranks = Ranks(choose_device("auto"))
    steppers = {}
    for name in names:
        candidate = CANDIDATES[name]
        values = make_config(candidate.values(config, candidate.rates[0], SEEDS[0]))
        stream = TokenStream(Path(values.data.dir), "train")
        steppers[name] = make_stepper(values, ranks, BatchShape.of(values, 1), stream)
        steppers[name].take(0)  # compiles
    turns: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, stepper in steppers.items():
            began = time.perf_counter()
            results = [stepper.take(step) for step in range(steps)]
            _ = results[-1].loss  # waits for the device
            turns[name].append((time.perf_counter() - began) / steps)
    return turns


def main(arguments: argparse.Namespace) -> None:
    """Train whatever hasn't been, time the steps, print a table."""
    names, path = list(dict.fromkeys(arguments.only or CANDIDATES)), arguments.out / FOUND
    for name in names:
        if name not in CANDIDATES:
            raise UserError(f"--only {name}: expected some of {', '.join(CANDIDATES)}")
    config = read_toml(arguments.config)
    if not make_config(config).log.eval_every:
        raise UserError(
            f"{arguments.config} has log.eval_every = 0: the losses are what is compared"
        )
    found = found_so_far(path, config, names)
    with disk_errors(f"can't write {arguments.out}"):
        arguments.out.mkdir(parents=True, exist_ok=True)
        check_can_write(path)
        found.save(path)  # a training that is broken off is to go on with the same settings only
    do(
        found,
        [(name, rate, SEEDS[0]) for name in names for rate in CANDIDATES[name].rates],
        arguments,
    )
    do(found, [(name, found.best_rate(name), seed) for seed in SEEDS for name in names], arguments)
    timed = dict.fromkeys([BASELINE, *names, *found.candidates])  # anew, on one machine
    turns = measure_steps([name for name in timed if name in CANDIDATES], arguments.config)
    found.command, found.date, found.hardware, found.versions = measured_here()
    found.timed_commit = commit(ROOT)
    found.step_seconds, found.step_ratios = statistics.median(turns[BASELINE]), {}
    for name, seconds in turns.items():
        ratios = (ours / theirs for ours, theirs in zip(seconds, turns[BASELINE]))
        found.step_ratios[name] = statistics.median(ratios)
    found.save(path)
    print_rows(found)


def do(
    found: Found, trainings: list[tuple[str, float, int]], arguments: argparse.Namespace
) -> None:
    """Those trainings that haven't been done, several at a time. Each is kept when it is done."""
    lock, failed = threading.Lock(), threading.Event()

    def do_one(training: tuple[str, float, int]) -> None:
        if failed.is_set():  # one that went wrong, or Ctrl-C, is the end: no other begins
            return
        try:
            run = train(*training, arguments)
            with lock:
                found.runs += (run,)
                found.save(arguments.out / FOUND)
        except UserError:
            failed.set()
            raise
        told = f"{run.candidate}, rate {run.rate:g}, seed {run.seed}: {run.last:.4f}"
        with lock:  # or lines might run together
            print(told, file=sys.stderr, flush=True)

    missing = [training for training in trainings if not found.run(*training)]
    pool = ThreadPoolExecutor(arguments.jobs)
    try:
        for future in as_completed([pool.submit(do_one, training) for training in missing]):
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    sys.exit(run_script(main, ARGUMENTS))

"""Which way of training learns most from the same text? Many small trainings, side by side.

    make recipe TEXTS=texts JOBS=2         prepares the Parquet files in texts/, and then does
    python recipe.py --jobs 2              this, on what lies in data/recipe

All of them train the model of configs/recipe.toml. A candidate is a set of changes to it. Three
learning rates are tried for each with the first seed; the best is then trained with two more seeds,
which decide the weights and the order of the text, alike for all candidates. Each training is an
ordinary run of train.py. What it found goes into results/recipe.json at once, so that the same
command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from errors import Parser, positive, run_script

ROOT = Path(__file__).parent


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description="Compare ways of training, by many small trainings.")
    add = parser.add_argument
    add("--config", type=Path, default=ROOT / "configs" / "recipe.toml", help="model and batches")
    add("--results", type=Path, default=ROOT / "results" / "recipe.json", help="what was found")
    add("--out", type=Path, default=ROOT / "out" / "recipe", help="folder for the runs")
    add("--jobs", type=positive, default=1, help="trainings at a time, sharing the cores (1)")
    add("--only", nargs="+", metavar="NAME", help="some of the candidates (all)")
    return parser.parse_args(arguments)


if __name__ == "__main__":  # before the slow imports: --help and a typo answer at once
    ARGUMENTS = parse_arguments()

import json
import math
import shutil
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace

from bench import hardware, print_table, versions
from config import make_config, read_toml
from distributed import Ranks, choose_device
from errors import UserError
from train import Trainer
from writing import write_atomically

SEEDS = (1, 2, 3)
Settings = dict[str, object]  # "section.key" -> value


@dataclass(frozen=True)
class Candidate:
    """A way of training."""

    meaning: str
    settings: Settings
    tuned: str  # the learning rate that is tried out
    rates: tuple[float, ...]
    floor: float = 0.0  # the last step's learning rate, as a share of the peak

    def values(self, config: Path, rate: float, seed: int) -> dict[str, dict]:
        """The settings of one training, section by section."""
        values = read_toml(config)
        changes = {**self.settings, self.tuned: rate, "train.seed": seed}
        for name, value in changes.items():
            section, key = name.split(".")
            values.setdefault(section, {})[key] = value
        peak = values["optim"]["learning_rate"]
        values["optim"]["min_learning_rate"] = self.floor * peak
        return values


ADAMW = Candidate(
    "AdamW as nanoGPT has it for small models, cosine to a tenth",
    {"optim.beta2": 0.99, "optim.warmup_steps": 100},  # its config/train_shakespeare_char.py
    "optim.learning_rate",
    (5e-4, 1e-3, 2e-3),
    floor=0.1,
)
MUON = Candidate(
    "Muon, cosine to a tenth",
    {"optim.name": "muon"},
    "optim.matrix_learning_rate",
    (0.01, 0.02, 0.04),
    floor=0.1,
)


def changed(base: Candidate, meaning: str, settings: Settings, **others: object) -> Candidate:
    """Another candidate, with more settings."""
    return replace(base, meaning=meaning, settings=base.settings | settings, **others)


LINEAR = {"optim.schedule": "linear"}
MUON_LINEAR = changed(MUON, "Muon, linear to 0", LINEAR, floor=0.0)
BASELINE = "nanogpt"
CANDIDATES = {
    BASELINE: ADAMW,
    "adamw_linear": changed(ADAMW, "AdamW, linear to 0", LINEAR, floor=0.0),
    "muon": MUON,
    "muon_linear": MUON_LINEAR,
}


class Found:
    """What was found so far, in a file."""

    def __init__(self, path: Path) -> None:
        """Raises UserError if there is a file that can't be read."""
        self.path = path
        self.content: dict = {"candidates": {}, "step_seconds": {}, "runs": []}
        try:
            if path.exists():
                self.content |= json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"can't read {path}: {error}") from error

    def run(self, name: str, rate: float, seed: int) -> dict | None:
        """What a training found; None if it hasn't been done."""
        asked = {"candidate": name, "rate": rate, "seed": seed}
        return next((run for run in self.content["runs"] if asked.items() <= run.items()), None)

    def add(self, run: dict) -> None:
        """Keep what a training found."""
        name = run["candidate"]
        self.content["runs"].append(run)
        self.content["candidates"][name] = asdict(CANDIDATES[name])
        self.save()

    def save(self) -> None:
        """Write the file: a line for each run."""
        runs = ",\n  ".join(map(json.dumps, self.content["runs"]))
        rest = {key: value for key, value in self.content.items() if key != "runs"}
        text = json.dumps(rest, indent=1).removesuffix("\n}")
        write_atomically(self.path, f'{text},\n "runs": [\n  {runs}\n ]\n}}\n')


def best_rate(found: Found, name: str) -> float:
    """The learning rate with which a candidate's first seed ended lowest."""
    rates = CANDIDATES[name].rates
    return min(rates, key=lambda rate: found.run(name, rate, SEEDS[0])["losses"][-1])


def train(name: str, rate: float, seed: int, arguments: argparse.Namespace) -> dict:
    """One training; returns what it found. Raises UserError if it failed."""
    folder = arguments.out / f"{name}_{rate:g}_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    config = make_config(CANDIDATES[name].values(arguments.config, rate, seed))
    (folder / "recipe.toml").write_text(config.to_toml(), encoding="utf-8")
    command = [sys.executable, ROOT / "train.py", folder / "recipe.toml", "--train.out", folder]
    threads = max(1, os.cpu_count() // arguments.jobs)
    with (folder / "log.txt").open("a") as log:
        status = subprocess.run(
            command,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdout=log,
            stderr=log,
            check=False,
        ).returncode
    if status:
        raise UserError(f"a training failed; {folder / 'log.txt'} says why")
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    told = [(line["step"], line["loss"]) for line in lines if line["kind"] == "val"]
    shutil.rmtree(folder / "checkpoints")
    steps, losses = zip(*told)
    return {"candidate": name, "rate": rate, "seed": seed, "steps": steps, "losses": losses}


def measure_steps(names: list[str], config: Path, rounds: int = 5, steps: int = 4) -> dict:
    """Seconds of a step, by candidate: the median of several rounds, in which all take turns."""
    ranks = Ranks(rank=0, local_rank=0, world_size=1, device=choose_device("auto"))
    steppers = {}
    with tempfile.TemporaryDirectory(prefix="recipe_") as folder:
        for name in names:
            candidate = CANDIDATES[name]
            values = candidate.values(config, candidate.rates[0], SEEDS[0])
            values["train"]["out"] = folder
            steppers[name] = Trainer(make_config(values), ranks).stepper
            steppers[name].take(0)  # compiles
    turns: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, stepper in steppers.items():
            began = time.perf_counter()
            results = [stepper.take(step) for step in range(steps)]
            if math.isfinite(results[-1].loss):  # waits for the device
                turns[name].append((time.perf_counter() - began) / steps)
    return {name: statistics.median(seconds) for name, seconds in turns.items()}


# What it comes to


@dataclass(frozen=True)
class Row:
    """What is told of a candidate that was trained with every seed."""

    name: str
    meaning: str
    rate: float
    steps: list[int]
    losses: list[list[float]]  # by seed, and by step

    @property
    def last(self) -> list[float]:
        """The last loss, by seed."""
        return [losses[-1] for losses in self.losses]

    @property
    def loss(self) -> float:
        """The last loss, the mean over the seeds."""
        return statistics.mean(self.last)

    @property
    def curve(self) -> list[tuple[int, float]]:
        """(step, the mean over the seeds)."""
        return list(zip(self.steps, map(statistics.mean, zip(*self.losses))))


def rows_of(content: dict) -> list[Row]:
    """A row for each candidate, in the order of the file."""
    rows = []
    for name, candidate in content["candidates"].items():
        runs = [run for run in content["runs"] if run["candidate"] == name]
        for rate in {run["rate"]: None for run in runs}:
            some = [run for run in runs if run["rate"] == rate]
            if len(some) == len(SEEDS):
                losses = [run["losses"] for run in some]
                rows.append(Row(name, candidate["meaning"], rate, some[0]["steps"], losses))
    return rows


def steps_to(curve: list[tuple[int, float]], loss: float) -> float | None:
    """After how many steps a curve is down to a loss, between its points on a line; None: never."""
    for (before, high), (after, low) in zip(curve, curve[1:]):
        if low <= loss < high:
            return before + (after - before) * (high - loss) / (high - low)
    return None


def shares(row: Row, baseline: Row, seconds: dict[str, float]) -> tuple[float, float] | None:
    """Of the baseline's tokens and of its time, what a candidate needs to reach its loss."""
    steps = steps_to(row.curve, baseline.loss)
    if steps is None:
        return None
    tokens = steps / baseline.steps[-1]
    return tokens, tokens * seconds.get(row.name, math.nan) / seconds[baseline.name]


def main(arguments: argparse.Namespace) -> None:
    """Train whatever hasn't been, time the steps, print a table."""
    unknown = set(arguments.only or ()) - set(CANDIDATES)
    if unknown:
        raise UserError(f"--only {min(unknown)}: expected some of {', '.join(CANDIDATES)}")
    found, names = Found(arguments.results), arguments.only or list(CANDIDATES)

    def do(trainings: list[tuple[str, float, int]]) -> None:
        missing = [training for training in trainings if not found.run(*training)]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            futures = [pool.submit(train, *training, arguments) for training in missing]
            for future in as_completed(futures):
                found.add(future.result())
                run = found.content["runs"][-1]
                told = f"{run['candidate']}, rate {run['rate']:g}, seed {run['seed']}"
                print(f"{told}: {run['losses'][-1]:.4f}", file=sys.stderr, flush=True)

    do([(name, rate, SEEDS[0]) for name in names for rate in CANDIDATES[name].rates])
    do([(name, best_rate(found, name), seed) for seed in SEEDS for name in names])
    found.content["step_seconds"] |= measure_steps(names, arguments.config)
    found.content |= {"config": read_toml(arguments.config)}
    found.content |= {"hardware": hardware(), "versions": versions()}
    found.save()
    print_rows(found.content)


def print_rows(content: dict) -> None:
    """The table."""
    rows = rows_of(content)
    baseline = next((row for row in rows if row.name == BASELINE), None)
    lines = []
    for row in rows:
        reached = baseline and shares(row, baseline, content["step_seconds"])
        spread = f"{min(row.last):.3f} … {max(row.last):.3f}"
        told = [f"{share:.0%}" for share in reached] if reached else ["", ""]
        lines.append([row.meaning, f"{row.rate:g}", f"{row.loss:.3f}", spread, *told])
    print_table(["", "rate", "loss", "by seed", "tokens", "time"], lines)


if __name__ == "__main__":
    sys.exit(run_script(main, ARGUMENTS))

"""Ways of training that recipe.py tries: what was found, its file, and what it comes to."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.turns import print_table
from common.errors import UserError
from common.files import disk_errors, write_atomically
from common.records import as_record, read_json
from config import OptimSettings, TrainSettings, read_toml

SEEDS = (1, 2, 3)
BASELINE = "nanogpt"  # the candidate that all others are compared with
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
        optim = values.setdefault("optim", {})
        peak = optim.get("learning_rate", OptimSettings().learning_rate)
        optim["min_learning_rate"] = self.floor * peak
        # A rate that ruins the weights has lost; that is no reason to end the comparison.
        train = values["train"]
        train["max_skipped_steps"] = train.get("max_steps", TrainSettings().max_steps)
        return values


@dataclass(frozen=True)
class Run:
    """What one training found."""

    candidate: str
    rate: float
    seed: int
    steps: tuple[int, ...]
    losses: tuple[float | None, ...]  # of the validations after those steps; None: not finite
    hardware: str
    torch: str  # its version
    commit: str | None  # of the code, if it is a repository's

    @property
    def last(self) -> float:
        """The loss in the end."""
        return math.inf if self.losses[-1] is None else self.losses[-1]


@dataclass
class Found:
    """All that was found so far, and under which circumstances."""

    command: str
    date: str
    hardware: str  # on which the steps were timed
    versions: dict[str, str]
    config: dict[str, Settings]  # what all candidates have in common
    data: str  # its fingerprint
    candidates: dict[str, Candidate]
    step_seconds: float  # the baseline's; 0 before it was measured
    step_ratios: dict[str, float]  # how many times as long a candidate's step takes
    runs: tuple[Run, ...]
    timed_commit: str | None = None  # of the code whose steps were timed

    def run(self, name: str, rate: float, seed: int) -> Run | None:
        """That training; None if it hasn't been done."""
        wanted = (name, rate, seed)
        return next((r for r in self.runs if (r.candidate, r.rate, r.seed) == wanted), None)

    def best_rate(self, name: str) -> float:
        """The learning rate with which a candidate's first seed ended lowest."""
        tried = (run for run in self.runs if (run.candidate, run.seed) == (name, SEEDS[0]))
        return min(tried, key=lambda run: run.last).rate

    def save(self, path: Path) -> None:
        """Write the file: a line for each run. Raises UserError if it can't be written."""
        content = asdict(self)
        runs = ",\n  ".join(map(json.dumps, content.pop("runs")))
        text = json.dumps(content, indent=1).removesuffix("\n}")
        way_out = "; free some space or fix the disk, then the same command trains what is missing"
        with disk_errors(f"can't write {path}", way_out):
            write_atomically(path, f'{text},\n "runs": [\n  {runs}\n ]\n}}\n')


def load_found(path: Path) -> Found:
    """Read what `Found.save` wrote. Raises UserError if it is anything else."""
    try:
        return as_record(Found, read_json(path))
    except (OSError, ValueError) as error:
        raise UserError(f"can't read {path}: {error}") from error


# What it comes to


@dataclass(frozen=True)
class Row:
    """What is told of a candidate."""

    name: str
    candidate: Candidate
    rate: float  # the best of those tried
    runs: list[Run]  # with that rate, by seed

    @property
    def last(self) -> list[float]:
        """The last loss, by seed."""
        return [run.last for run in self.runs]

    @property
    def loss(self) -> float:
        """The last loss, the mean over the seeds."""
        return statistics.mean(self.last)

    @property
    def curve(self) -> list[tuple[int, float]]:
        """(step, the mean over the seeds)."""
        losses = zip(*(run.losses for run in self.runs))
        means = [math.inf if None in some else statistics.mean(some) for some in losses]
        return list(zip(self.runs[0].steps, means))


def rows_of(found: Found) -> dict[str, Row]:
    """A row for each candidate that has been trained."""
    rows = {}
    for name, candidate in found.candidates.items():
        runs = [run for run in found.runs if run.candidate == name]
        if runs:
            rate = found.best_rate(name)
            chosen = sorted((run for run in runs if run.rate == rate), key=lambda run: run.seed)
            rows[name] = Row(name, candidate, rate, chosen)
    return rows


def steps_to(curve: list[tuple[int, float]], loss: float) -> float | None:
    """After how many steps a curve is down to a loss, between its points on a line; None: never."""
    curve = [(step, value) for step, value in curve if math.isfinite(value)]
    if curve and curve[0][1] <= loss:
        return curve[0][0]
    for (before, high), (after, low) in zip(curve, curve[1:]):
        if low <= loss:
            return before + (after - before) * (high - loss) / (high - low)
    return None


def shares(row: Row, baseline: Row, step_ratio: float) -> tuple[float, float] | None:
    """Of the baseline's tokens and of its time, what a candidate needs to reach its loss.

    Both with the seeds that both were trained with. None: it doesn't.
    """
    seeds = {run.seed for run in row.runs} & {run.seed for run in baseline.runs}
    row, baseline = (
        replace(one, runs=[run for run in one.runs if run.seed in seeds]) for one in (row, baseline)
    )
    steps = steps_to(row.curve, baseline.loss) if seeds and math.isfinite(baseline.loss) else None
    if steps is None:
        return None
    tokens = steps / baseline.curve[-1][0]
    return tokens, tokens * step_ratio


def print_rows(found: Found) -> None:
    """The table."""
    rows, lines = rows_of(found), []
    for name, row in rows.items():
        spread = f"{min(row.last):.3f} … {max(row.last):.3f}"
        told = [f"{row.rate:g}", f"{row.loss:.3f}", spread, str(len(row.runs)), "", ""]
        if BASELINE in rows and name in found.step_ratios:
            reached = shares(row, rows[BASELINE], found.step_ratios[name])
            told[-2:] = [f"{share:.0%}" for share in reached] if reached else ["", ""]
        lines.append([row.candidate.meaning, *told])
    print_table(["", "rate", "loss", "from … to", "seeds", "tokens", "time"], lines)

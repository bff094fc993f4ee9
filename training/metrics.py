"""What a run tells of itself: `metrics.jsonl`, its speed, and a line now and then."""

from __future__ import annotations

import json
import math
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from common.device import Moment, peak_flops
from common.errors import UserError, one_line
from common.files import disk_errors, write_atomically
from common.records import strict
from config import Config
from distributed import Ranks

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS, WANDB_ID = "metrics.jsonl", "wandb_id"
Viewer = tuple[Callable[..., None], Callable[[], None]]  # log(numbers, step=…), close()


def say(text: str) -> None:
    """Tell the user something, above the progress bar."""
    tqdm.write(text, file=sys.stderr)


def _lines_of(path: Path) -> list[str]:
    """A file's lines, none if there is no file. Raises UserError if it can't be read."""
    try:
        return path.read_text("utf-8", errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}; move it away or fix it") from error


def _step_of(line: str) -> float:
    """The step of a line in metrics.jsonl; infinity for one that a crash cut short."""
    try:
        step = json.loads(line)["step"] if line.endswith("\n") else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if isinstance(step, int) else math.inf


def kinds_told(folder: Path, step: int) -> set[str]:
    """The kinds of lines ("train", "val", a task) that a run wrote after a step.

    Raises UserError if metrics.jsonl can't be read.
    """
    lines = _lines_of(folder / METRICS)
    return {str(json.loads(line).get("kind")) for line in lines if _step_of(line) == step}


def read_losses(folder: Path) -> list[dict[str, object]]:
    """What a run told of its loss, in order: `{"kind": "train"|"val", "step": …, "loss": …}`.

    A loss that isn't finite is None; a line that a crash cut short is left out. Raises UserError if
    there are no metrics, or they can't be read.
    """
    if not (folder / METRICS).exists():
        raise UserError(f"{folder} has no {METRICS}: expected the folder of a training run")
    whole = (json.loads(line) for line in _lines_of(folder / METRICS) if _step_of(line) < math.inf)
    keys = ("kind", "step", "loss")
    return [{key: line[key] for key in keys} for line in whole if line.keys() >= {*keys}]


def writing(path: Path) -> AbstractContextManager[None]:
    """Turn an error of the disk into a UserError that tells how to go on."""
    way_out = "; free some space or fix the disk, then give the same command again"
    return disk_errors(f"can't write {path}", f"{way_out} to go on from the newest checkpoint")


class Metrics:
    """What a run measured: `metrics.jsonl`, and TensorBoard and Weights & Biases if asked for."""

    def __init__(self, config: Config, start: int) -> None:
        """Go on after step `start`: what the file tells of later steps will be done again, and at
        0 all of it.

        Raises UserError if an asked-for package is not installed or can't begin, the disk is full,
        or the file that is there can't be read.
        """
        folder = Path(config.train.out)
        self.path = folder / METRICS
        kept = [line for line in _lines_of(self.path) if start and _step_of(line) <= start]
        with writing(self.path):
            write_atomically(self.path, "".join(kept))
            self.file = self.path.open("a", encoding="utf-8")  # this one, wherever it may be moved
            if start == 0:  # or another run would go on there
                (folder / WANDB_ID).unlink(missing_ok=True)
        first = start + 1 if start else 0  # the first step that is told from here on
        self.viewers: dict[str, Viewer] = {}
        if config.log.tensorboard:
            with self._opening("log.tensorboard"):
                from torch.utils.tensorboard import SummaryWriter

                board = SummaryWriter(folder / "tensorboard", purge_step=first)
                self.viewers["log.tensorboard"] = partial(_to_tensorboard, board), board.close
        if config.log.wandb:
            identity = self._wandb_id(folder / WANDB_ID)
            with self._opening("log.wandb"):
                from wandb import init

                run = init(
                    project=config.log.wandb,
                    id=identity,
                    name=folder.name,
                    config=asdict(config),
                    resume="allow",
                )
                self.viewers["log.wandb"] = run.log, run.finish

    @contextmanager
    def _opening(self, setting: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever kinds these packages have
            if isinstance(error, ImportError) and error.name:
                raise UserError(
                    f"{error.name} is not installed: pip install {error.name}"
                ) from error
            raise UserError(f"{setting}: {one_line(error)}") from error

    def _wandb_id(self, path: Path) -> str:
        """The run's id at Weights & Biases, the same when it is resumed."""
        with writing(path):
            if not path.exists():
                write_atomically(path, uuid.uuid4().hex)
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"can't read {path}: {one_line(error)}") from error

    def write(self, kind: str, step: int, values: dict[str, object]) -> None:
        """Record values of `kind` ("train", "val", "skip", a task) after `step` finished steps.

        A number that isn't finite is null in the file. Raises UserError if the disk is full.
        """
        values = strict(values)
        with writing(self.path):
            self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self.file.flush()
        known = ((key, value) for key, value in values.items() if isinstance(value, (int, float)))
        numbers = {f"{kind}/{key}": value for key, value in known}
        self._tell_viewers(lambda log, close: log(numbers, step=step))

    def close(self) -> None:
        """Close the file and the viewers."""
        self.file.close()
        self._tell_viewers(lambda log, close: close())

    def _tell_viewers(self, tell: Callable[..., None]) -> None:
        """One that fails gets nothing any more. The run goes on: metrics.jsonl has all of it."""
        for setting, viewer in list(self.viewers.items()):
            try:
                tell(*viewer)
            except Exception as error:  # whatever kinds these packages have
                del self.viewers[setting]
                say(f"{setting} gets no more numbers: {one_line(error)}")


def _to_tensorboard(board: SummaryWriter, numbers: dict[str, float], step: int) -> None:
    for key, value in numbers.items():
        board.add_scalar(key, value, step)
    board.flush()  # a run that fails doesn't close it


class Speed:
    """Tokens per second and model FLOP/s utilisation (MFU) since the last measurement.

    By the device's clock: when the CPU hears of a step's end says little of how long it took.
    """

    def __init__(self, tokens: int, flops_per_token: int, ranks: Ranks) -> None:
        """Start the clock when `tokens` tokens have been trained on."""
        self.device, self.flops_per_token = ranks.device, flops_per_token
        self.tokens, self.since, self.pauses = tokens, Moment(self.device), 0.0
        peak = peak_flops(self.device)
        self.peak = peak and peak * ranks.world_size

    def measure(self, tokens: int, end: Moment) -> tuple[float, float | None]:
        """(tokens per second over all ranks, their share of the datasheet's FLOP/s if known).

        `end` is that of the step after which `tokens` tokens have been trained on.
        """
        rate = (tokens - self.tokens) / (end.seconds_after(self.since) - self.pauses)
        self.tokens, self.since, self.pauses = tokens, end, 0.0
        return rate, self.peak and rate * self.flops_per_token / self.peak

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not training and isn't counted."""
        before = Moment(self.device)
        yield
        self.pauses += Moment(self.device).seconds_after(before)

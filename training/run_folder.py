"""The folder of a training run: who may write there, its settings, and the checkpoints that stay.

    out/NAME/config.toml, metrics.jsonl, checkpoints/, lock; tokenizer.tiktoken if the data has one;
             tensorboard/ and wandb_id if they are asked for

Explained in README, "Checkpoints".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from checkpoint import (
    Checkpoint,
    Meta,
    add_losses,
    check_can_save,
    checkpoints_in,
    remove_old,
    save_checkpoint,
    step_name,
    step_of,
)
from common.errors import UserError
from common.files import disk_errors, file_sha256, locked, sync, write_atomically
from config import Config
from distributed import Ranks
from model import GPT
from optim import last_at_peak
from shards import VOCABULARY, TokenizerRecord
from training.metrics import METRICS, Metrics, writing
from training.resume import agree_on_checkpoint


class RunFolder:
    """A run's folder. Rank 0 alone writes there, while the others wait."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        """See what is there, before anything is written."""
        self.config, self.ranks = config, ranks
        self.path = Path(config.train.out)
        self.checkpoints = self.path / "checkpoints"
        with ranks.together():
            self.at_start = checkpoints_in(self.checkpoints)
        self.damaged: set[Path] = set()
        self.is_ours: Callable[[], bool] = lambda: True  # from `owned` on: `locked` tells

    def newest(self) -> Checkpoint | None:
        """The checkpoint to go on from, the same on all machines; None if there is none.

        Those after it are damaged. Raises UserError if all are, or if a machine has another.
        """
        checkpoint = agree_on_checkpoint(self.checkpoints, self.ranks)
        step = checkpoint.meta.step if checkpoint else 0
        # The run would go on from these if they were whole.
        self.damaged = {path for path in self.at_start if step_of(path) > step}
        return checkpoint

    def newest_before(self, step: int) -> Path | None:
        """The last checkpoint of an earlier step that isn't known to be damaged, if any."""
        whole = [path for path in checkpoints_in(self.checkpoints) if path not in self.damaged]
        return next((path for path in reversed(whole) if step_of(path) < step), None)

    @property
    def last_peak_step(self) -> int:
        """The last step before the learning rate falls, from which another, longer run can go on;
        0 if there is no such step, because it falls from the peak on.
        """
        optim = self.config.optim
        return last_at_peak(optim, self.config.train.max_steps) + 1 if optim.decay_steps else 0

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Make the folder and keep other runs out of it.

        Raises UserError if one is there, or has been since this one chose its checkpoint.
        """
        with ExitStack() as stack:
            with self.ranks.together():
                if self.ranks.is_first:
                    with disk_errors(f"can't write to the run folder {self.path}"):
                        self.path.mkdir(parents=True, exist_ok=True)
                    self.is_ours = stack.enter_context(locked(self.path))
                    self._check_still_newest()
            yield

    def _check_still_newest(self) -> None:
        """Raises UserError if there are other checkpoints than when this run chose its own."""
        if checkpoints_in(self.checkpoints) != self.at_start:
            raise UserError(
                f"another run has saved into {self.path} since this one looked: give the same "
                "command again to go on from there"
            )

    def prepare(self, tokenizer: TokenizerRecord, step: int) -> Metrics | None:
        """Put settings and vocabulary there. Returns rank 0's metrics, which go on after `step`.

        Raises UserError if there is no writing there, nor saving checkpoints.
        """
        with self.ranks.together():
            return self._prepare_here(tokenizer, step) if self.ranks.is_first else None

    def _prepare_here(self, tokenizer: TokenizerRecord, step: int) -> Metrics:
        check_can_save(self.checkpoints)
        with disk_errors(f"can't write to the run folder {self.path}"):
            write_atomically(self.path / "config.toml", self.config.to_toml())
            vocabulary = Path(self.config.data.dir) / VOCABULARY
            ours = self.path / VOCABULARY
            if vocabulary.exists():
                write_atomically(ours, vocabulary.read_bytes())
            elif ours.exists() and file_sha256(ours) != tokenizer.sha256:
                ours.unlink()  # of an earlier run: nothing could be read with it
        return Metrics(self.config, step)

    def save(self, meta: Meta, model: GPT, optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint, after what metrics.jsonl tells of the steps up to it.

        Raises UserError if that fails.
        """
        with self.ranks.together():
            if self.ranks.is_first:
                self._check_ours()
                with writing(self.path / METRICS):
                    sync(self.path / METRICS)
                path = save_checkpoint(self.checkpoints, meta, model, optimizer)
                self.damaged.discard(path)
                self._remove_old(path)

    def _check_ours(self) -> None:
        """Raises UserError if the folder is gone, or another run has begun there."""
        if not self.is_ours():
            raise UserError(
                f"{self.path} isn't this run's folder any more: it was moved or removed; the same "
                "command goes on from what is there now"
            )

    def add_losses(self, step: int, losses: dict[str, float | None]) -> None:
        """Tell the checkpoint of a step of a validation that came after it was saved.

        Raises UserError if that fails.
        """
        with self.ranks.together():
            if self.ranks.is_first:
                self._check_ours()
                path = self.checkpoints / step_name(step)
                add_losses(path, **losses)
                self._remove_old(path)

    def _remove_old(self, newest: Path) -> None:
        """Remove the checkpoints that the settings don't ask to keep."""
        remove_old(newest, self.config.train.keep_checkpoints, self.last_peak_step, self.damaged)

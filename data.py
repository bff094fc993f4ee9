"""Which tokens a training step sees: windows of the shards, in an order that never depends on luck.

That is a pure function of (seed, step): the shards of a split form one long stream, window i is its
tokens [i·T, i·T + T], and a seeded shuffle orders the windows of each epoch. The number of
processes, the micro-batch size and restarts don't enter into it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from common.errors import UserError
from config import Config
from shards import TokenStream


def load_windows(
    stream: TokenStream, windows: Iterable[int], block_size: int
) -> tuple[Tensor, Tensor]:
    """Windows as (inputs, targets), each int64 (B, T): the targets are one token ahead.

    Both are contiguous, so that copies from pinned memory can be asynchronous. Raises UserError if
    a token isn't in the vocabulary: then a shard is damaged.
    """
    starts = [int(at) * block_size for at in windows]
    rows = np.stack([stream.read(start, block_size + 1) for start in starts])
    if rows.max() >= stream.vocab_size:
        row, column = divmod(int(rows.argmax()), block_size + 1)
        raise UserError(
            f"{stream.file_at(starts[row] + column)} has a token {rows.max()}, its vocabulary only "
            f"{stream.vocab_size:,}: it is damaged, prepare or download it again"
        )
    inputs, targets = (part.astype(np.int64) for part in (rows[:, :-1], rows[:, 1:]))  # 2 × (B, T)
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def within_documents(
    ids: Tensor, end_of_text: int, in_blocks: bool = False
) -> tuple[Tensor | BlockMask, Tensor]:
    """What makes a model read each document of whole windows ids (B, T) as if it stood alone.

    A mask, bool (B, 1, T, T): row t, column s says whether t sees s, which it does from the
    beginning of its document, or of the window, up to itself. And positions, int64 (B, T), which
    count from there. A document begins with its `end_of_text`. A mask `in_blocks` is for
    FlexAttention (Dong et al. 2024), which skips blocks in which no token sees another.
    """
    B, T = ids.shape
    places = torch.arange(T, device=ids.device)  # (T)
    begin = torch.where(ids == end_of_text, places, 0).cummax(dim=1).values  # (B, T)

    def sees(b: Tensor, head: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (begin[b, t] <= s) & (s <= t)

    if in_blocks:
        mask = create_block_mask(sees, B, None, T, T, device=ids.device)
    else:
        rows = torch.arange(B, device=ids.device)[:, None, None, None]
        mask = sees(rows, None, places[:, None], places)  # (B, 1, T, T)
    return mask, places - begin


@lru_cache(maxsize=2)
def epoch_order(num_windows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch's windows: a permutation of range(num_windows), int64.

    RandomState, because NumPy promises never to change its numbers (NEP 19).
    """
    return np.random.RandomState([seed, epoch]).permutation(num_windows)


def step_windows(step: int, per_step: int, num_windows: int, seed: int) -> np.ndarray:
    """The windows of one step, counted from 0: int64 array of shape (per_step,).

    The epochs' orders follow one another without a gap, and step s takes the places
    [s·per_step, (s + 1)·per_step) of that endless row, so that no window is dropped.
    """
    places = np.arange(step * per_step, (step + 1) * per_step)
    epochs, within = np.divmod(places, num_windows)
    windows = np.empty_like(places)
    for epoch in np.unique(epochs):
        now = epochs == epoch
        windows[now] = epoch_order(num_windows, seed, int(epoch))[within[now]]
    return windows


def largest_micro_batch(windows: int, limit: int) -> int:
    """The most windows at once, up to `limit`, that a rank's share of a step divides into."""
    return next(size for size in range(min(windows, limit), 0, -1) if windows % size == 0)


@dataclass(frozen=True)
class BatchShape:
    """How the tokens of one optimizer step are cut into micro-batches and spread over ranks."""

    tokens_per_step: int
    block_size: int
    micro_batch_size: int  # windows
    world_size: int

    @classmethod
    def of(cls, config: Config, world_size: int) -> BatchShape:
        """As the settings have it, for so many processes."""
        train = config.train
        block_size = config.model.block_size
        return cls(train.tokens_per_step, block_size, train.micro_batch_size, world_size)

    def __post_init__(self) -> None:
        """Raises UserError if the numbers don't divide, naming the nearest that do."""
        unit = self.block_size * self.micro_batch_size * self.world_size
        if self.tokens_per_step % unit:
            below = self.tokens_per_step // unit * unit
            nearest = " or ".join(f"{value:,}" for value in (below, below + unit) if value)
            windows, rest = divmod(self.tokens_per_step, self.block_size * self.world_size)
            if not rest:
                fits = largest_micro_batch(windows, self.micro_batch_size)
                nearest += f"; or lower --train.micro_batch_size to {fits:,}"
            raise UserError(
                f"train.tokens_per_step = {self.tokens_per_step:,} can't be shared out: expected a "
                f"multiple of {unit:,} (block_size {self.block_size:,} × micro_batch_size "
                f"{self.micro_batch_size} × {self.world_size} processes); nearest: {nearest}"
            )

    @property
    def windows_per_step(self) -> int:
        """Windows in a step, over all ranks."""
        return self.tokens_per_step // self.block_size

    @property
    def accumulation(self) -> int:
        """Micro-batches that each rank runs in a step."""
        return self.windows_per_step // (self.micro_batch_size * self.world_size)

    def __str__(self) -> str:
        return (
            f"{self.tokens_per_step:,} tokens per step = processes {self.world_size} "
            f"× micro-batches {self.accumulation} × windows {self.micro_batch_size} "
            f"× tokens {self.block_size:,}"
        )


class StepLoader:
    """One rank's micro-batches, step by step; a thread prepares a step ahead of its use."""

    def __init__(
        self, stream: TokenStream, shape: BatchShape, seed: int, rank: int, device: torch.device
    ) -> None:
        """Batches for a GPU are put into pinned memory.

        A new thread would use the machine's first GPU, and pinning must take no memory there.
        """
        self.stream, self.shape, self.seed, self.rank = stream, shape, seed, rank
        self.pin_memory = device.type == "cuda"
        begin = partial(torch.cuda.set_device, device) if self.pin_memory else None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="loader", initializer=begin)
        self.ahead: tuple[int, Future] | None = None  # the step being prepared

    def load(self, step: int) -> list[tuple[int, Tensor, Tensor]]:
        """The (number, inputs (B, T), targets (B, T)) of a step; the next is begun at once.

        Raises UserError if a token isn't in the vocabulary.
        """
        if self.ahead is None or self.ahead[0] != step:
            self.ahead = (step, self.thread.submit(self._prepare, step))
        batches = self.ahead[1].result()
        self.ahead = (step + 1, self.thread.submit(self._prepare, step + 1))
        return batches

    def _prepare(self, step: int) -> list[tuple[int, Tensor, Tensor]]:
        batches = micro_batches(self.stream, self.shape, self.seed, step, self.rank)
        if not self.pin_memory:
            return list(batches)
        return [
            (number, inputs.pin_memory(), targets.pin_memory())
            for number, inputs, targets in batches
        ]


def micro_batches(
    stream: TokenStream, shape: BatchShape, seed: int, step: int, rank: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """One rank's share of a step: (number, inputs (B, T), targets (B, T)) per micro-batch.

    `number` counts the micro-batches of the whole step, over all ranks; each rank takes a
    contiguous block of them.
    """
    windows = step_windows(
        step, shape.windows_per_step, stream.num_windows(shape.block_size), seed
    ).reshape(-1, shape.micro_batch_size)
    first = rank * shape.accumulation
    for number in range(first, first + shape.accumulation):
        yield number, *load_windows(stream, windows[number], shape.block_size)

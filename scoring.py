"""How surprised a model is: by a whole split, or by a few tokens after others.

Everything that evaluate.py tells comes down to -log p(token), in nats and in float32. The work is
shared out over the ranks in a way that doesn't change what is computed, so that the sums are the
same for any number of them, but for rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import tiktoken
import torch
from torch import Tensor
from tqdm import tqdm

from common.errors import UserError
from data import load_windows, within_documents
from distributed import Ranks
from model import GPT, dtype_of_products
from shards import TokenStream
from tokenizer import encode_long

Job = TypeVar("Job")
ROWS = 2048  # positions whose logits are in memory at once: 0.4 GB in float32


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout and gradients inside, training again after."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


class BrokenOff(Exception):
    """Somebody asked for the end before an evaluation had come to its own: there is no result."""


def never() -> bool:
    """Nobody asks an evaluation to stop."""
    return False


def unless_asked_to_stop(
    jobs: Iterable[Job], ranks: Ranks, asked: Callable[[], bool]
) -> Iterator[Job]:
    """This rank's jobs, one after another, until `asked()` says that it is to stop.

    Raises BrokenOff at the end, on all ranks alike, if one of them has left a job out.
    """
    left_out = False
    for job in jobs:
        if left_out := asked():
            break
        yield job
    if ranks.anywhere(left_out):
        raise BrokenOff


@dataclass(frozen=True)
class Estimate:
    """A mean over items, and how far chance may have moved it."""

    value: float
    error: float | None  # standard error; None for a single item

    @classmethod
    def of(cls, sums: Sequence[float], counts: Sequence[float] | None = None) -> Estimate:
        """The mean of `sums`, one per item; with `counts`, sum of the sums / sum of the counts.

        The error of such a ratio: Cochran 1977, "Sampling Techniques", section 6.4, equation 6.13.
        """
        y = np.asarray(sums, dtype=np.float64)
        x = np.ones_like(y) if counts is None else np.asarray(counts, dtype=np.float64)
        value, n = y.sum() / x.sum(), len(y)
        if n == 1:
            return cls(float(value), None)
        variance = ((y - value * x) ** 2).sum() / (n - 1)
        return cls(float(value), float(math.sqrt(n * variance) / x.sum()))

    def __str__(self) -> str:
        """As many digits as the error leaves meaning to: its first two, or all before the point."""
        if not self.error or not math.isfinite(self.error):
            return in_digits(self.value, 4)
        if self.error >= 1e6:
            return f"{self.value:.3g} ± {self.error:.3g}"
        digits = max(0, 1 - math.floor(math.log10(self.error)))
        return f"{self.value:.{digits}f} ± {self.error:.{digits}f}"

    def scaled(self, factor: float) -> Estimate:
        """The same in another unit."""
        return Estimate(self.value * factor, self.error and self.error * factor)

    def exponential(self) -> Estimate:
        """e to that power: a loss becomes a perplexity. The error to first order."""
        value = math.inf if self.value >= 700 else math.exp(self.value)  # e^710 is no float
        return Estimate(value, self.error and self.error * value)


def in_digits(value: float, digits: int) -> str:
    """A number with so many digits behind the point; from a million on, with three in all."""
    return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"


def check_numbers(nats: np.ndarray | float, model: GPT) -> None:
    """Raises FloatingPointError if a surprise is no number. An infinite one is: p is 0 there."""
    if np.isnan(nats).any():
        kind = str(dtype_of_products(model.wte.weight)).removeprefix("torch.")
        raise FloatingPointError(
            f"probabilities aren't numbers: the weights are damaged, or overflow in {kind}"
        )


# A whole split


@dataclass(frozen=True)
class Validation:
    """What a model makes of a text."""

    estimate: Estimate  # nats per token
    bits_per_byte: Estimate | None  # of UTF-8; None if the vocabulary is not at hand
    tokens: int
    text_bytes: int | None

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.estimate.value


def validate(
    loss_of: Callable[[Tensor, Tensor], Tensor],
    stream: TokenStream,
    block_size: int,
    batch_size: int,
    max_tokens: int,
    ranks: Ranks,
    byte_lengths: np.ndarray | None,
    asked_to_stop: Callable[[], bool] = never,
) -> Validation:
    """The mean loss on the stream's first windows, up to `max_tokens`, shared out over the ranks.

    `loss_of(inputs, targets)`, each (B, T), gives the mean loss of each window (B,), or one for all
    of them (), and then the estimate's error means nothing. `byte_lengths` (V,) says how many bytes
    each id stands for. Raises BrokenOff on all ranks if one was asked to stop.
    """
    count = min(stream.num_windows(block_size), max(1, max_tokens // block_size))
    batches = [range(at, min(at + batch_size, count)) for at in range(0, count, batch_size)]
    table = torch.zeros(count, 3, dtype=torch.float64)  # nats, tokens, bytes of each window
    mine = range(ranks.rank, len(batches), ranks.world_size)
    bar = tqdm(mine, desc="val", leave=False, disable=not ranks.is_first)
    for number in unless_asked_to_stop(bar, ranks, asked_to_stop):
        inputs, targets = load_windows(stream, batches[number], block_size)
        rows = table[batches[number].start : batches[number].stop]  # (B, 3)
        losses = loss_of(inputs.to(ranks.device), targets.to(ranks.device))
        rows[:, 0] = losses.cpu().double() * block_size
        rows[:, 1] = block_size
        if byte_lengths is not None:
            rows[:, 2] = torch.from_numpy(byte_lengths[targets.numpy()].sum(axis=1))
    nats, tokens, text_bytes = ranks.merge(table).unbind(dim=1)
    estimate, bits_per_byte = Estimate.of(nats.tolist(), tokens.tolist()), None
    if text_bytes.any():
        nats_per_byte = Estimate.of(nats.tolist(), text_bytes.tolist())
        bits_per_byte = nats_per_byte.scaled(1 / math.log(2))
    return Validation(estimate, bits_per_byte, int(tokens.sum()), int(text_bytes.sum()) or None)


def window_losses(model: GPT, document_mask: bool, inputs: Tensor, targets: Tensor) -> Tensor:
    """The mean loss of each window, in nats, (B,) of inputs and targets (B, T)."""
    end_of_text = model.config.vocab_size - 1
    documents = within_documents(inputs, end_of_text) if document_mask else None
    hidden = model.hidden_states(inputs, documents=documents).flatten(0, 1)  # (B·T, C)
    logs, _ = log_probabilities(model, hidden, targets.flatten())
    return -logs.view_as(targets).mean(dim=1)


def log_probabilities(model: GPT, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log p(target) in nats, float32 (N), and whether none was likelier, bool (N).

    hidden (N, C), targets (N).
    """
    logs, hits = [], []
    with torch.autocast(hidden.device.type, enabled=False):  # in bfloat16 the likeliest would tie
        for rows, wanted in zip(hidden.split(ROWS), targets.split(ROWS)):
            logits = model.logits(rows.to(model.wte.weight.dtype)).float()  # (≤ ROWS, V)
            hits.append(logits.argmax(dim=-1) == wanted)
            logs.append(logits.log_softmax(dim=-1).gather(1, wanted[:, None]).squeeze(1))
    return torch.cat(logs), torch.cat(hits)


# A few tokens after others


@dataclass(frozen=True)
class Request:
    """Tokens of which the last `guessed` are to be guessed, each from all before it."""

    ids: list[int]
    guessed: int


@dataclass(frozen=True)
class Scorer:
    """A model with what it takes to ask it about texts."""

    model: GPT
    encoding: tiktoken.Encoding
    ranks: Ranks
    batch_tokens: int = 16_384  # in one forward pass, padding included
    asked_to_stop: Callable[[], bool] = never

    def request(self, context: str, ending: str) -> Request:
        """Guess `ending` after `context`, encoded as one text.

        Blanks at the context's end belong to the ending's first token.
        """
        kept = context.rstrip()
        before = encode_long(self.encoding, kept)
        whole = encode_long(self.encoding, context + ending)
        return self.cut(before, whole[len(before) :])

    def cut(self, before: list[int], ending: list[int]) -> Request:
        """Guess `ending` after as much of `before` as the context holds.

        Where nothing comes before, <|endoftext|> does. Raises UserError if there is no room for the
        ending.
        """
        before = before or [self.encoding.eot_token]
        room = self.model.config.block_size + 1
        if not 0 < len(ending) < room:
            raise UserError(
                f"{self.encoding.decode(ending)[:60]!r} has {len(ending)} tokens to be guessed at "
                f"once, this model can guess 1 to {room - 1}: take a model with a longer context"
            )
        return Request((before + ending)[-room:], len(ending))

    def score(self, requests: list[Request], title: str) -> tuple[np.ndarray, np.ndarray]:
        """For each request the log-probability of what was to be guessed, in nats, float64 (n,),
        and whether each of its tokens was the likeliest, bool (n,).

        Requests of like length go through the model together, the shorter ones padded at their end,
        which no earlier token sees. Raises BrokenOff on all ranks if one was asked to stop, and
        FloatingPointError if a log-probability is no number.
        """
        table = torch.zeros(len(requests), 2, dtype=torch.float64)
        mine = self.batches(requests)[self.ranks.rank :: self.ranks.world_size]
        bar = tqdm(mine, desc=title, leave=False, disable=not self.ranks.is_first)
        for batch in unless_asked_to_stop(bar, self.ranks, self.asked_to_stop):
            table[batch] = self._score_batch([requests[number] for number in batch])
        log_probability, likeliest = self.ranks.merge(table).numpy().T
        check_numbers(log_probability, self.model)
        return log_probability, likeliest > 0

    def batches(self, requests: list[Request]) -> list[list[int]]:
        """The requests' numbers, the longest first, in batches of up to `batch_tokens`."""
        lengths = [len(request.ids) - 1 for request in requests]
        batches: list[list[int]] = []
        for number in sorted(range(len(requests)), key=lambda number: -lengths[number]):
            longest = lengths[batches[-1][0]] if batches else 0
            if not batches or (len(batches[-1]) + 1) * longest > self.batch_tokens:
                batches.append([])
            batches[-1].append(number)
        return batches

    def _score_batch(self, batch: list[Request]) -> Tensor:
        """(n, 2), float64: the log-probability, and whether all guesses were right."""
        device = self.ranks.device
        ids = torch.zeros(len(batch), len(batch[0].ids) - 1, dtype=torch.long)  # (n, T)
        for row, request in enumerate(batch):
            ids[row, : len(request.ids) - 1] = torch.tensor(request.ids[:-1])
        counts = torch.tensor([request.guessed for request in batch])
        owners = torch.arange(len(batch)).repeat_interleave(counts)  # (N): all guesses, in a row
        places = [range(len(r.ids) - 1 - r.guessed, len(r.ids) - 1) for r in batch]
        columns = torch.tensor([place for some in places for place in some])  # (N)
        targets = torch.tensor([id for r in batch for id in r.ids[-r.guessed :]])  # (N)
        hidden = self.model.hidden_states(ids.to(device))  # (n, T, C)
        chosen = hidden[owners.to(device), columns.to(device)]  # (N, C)
        logs, hits = log_probabilities(self.model, chosen, targets.to(device))
        sums, missed = torch.zeros(2, len(batch), dtype=torch.float64)
        sums.index_add_(0, owners, logs.cpu().double())
        missed.index_add_(0, owners, (~hits).cpu().double())
        return torch.stack((sums, (missed == 0).double()), dim=1)

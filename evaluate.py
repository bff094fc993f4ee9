"""How good is a model? Its loss on text that it has never seen.

    python evaluate.py --checkpoint out/demo --data data/demo

The loss is the mean of -log p(token), in nats. It depends on the vocabulary: longer tokens are
harder to guess but fewer. Bits per byte doesn't, so that it compares models of any vocabulary, and
even with programs that compress files: both say how many bits the text takes when every guess is
paid for (README, "How good is it?"). For a text of up to a million bytes the table also tells what
`xz -9e` makes of it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from errors import Parser, positive, run_script


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description="Measure a checkpoint's loss on validation shards.")
    parser.add_argument("--checkpoint", required=True, help="a run folder or a checkpoint folder")
    parser.add_argument("--data", type=Path, help="shard folder (the one it was trained on)")
    parser.add_argument(
        "--tokens", type=positive, default=10_485_760, help="how many, from the start (10,485,760)"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    return parser.parse_args(arguments)


if __name__ == "__main__":  # before the slow imports: --help and a typo answer at once
    ARGUMENTS = parse_arguments()

import lzma
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import tiktoken
import torch
from torch import Tensor

from checkpoint import find_checkpoint
from data import load_windows
from distributed import Ranks, choose_device
from model import GPT
from shards import TokenStream
from tokenizer import token_byte_lengths

XZ_LIMIT = 1 << 20  # bytes; xz -9e takes about a second for so many


@dataclass(frozen=True)
class Validation:
    """What a model makes of a text."""

    loss: float  # nats per token
    tokens: int
    text_bytes: int | None  # None if the vocabulary is not at hand

    @property
    def perplexity(self) -> float:
        """e^loss: the model hesitates as if between so many equally likely tokens."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits that the text takes, per byte of UTF-8, if the vocabulary is at hand."""
        if not self.text_bytes:
            return None
        return self.loss * self.tokens / math.log(2) / self.text_bytes


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


def validate(
    loss_of: Callable[[Tensor, Tensor], Tensor],
    stream: TokenStream,
    block_size: int,
    batch_size: int,
    max_tokens: int,
    ranks: Ranks,
    byte_lengths: np.ndarray | None,
) -> Validation:
    """The mean loss on the stream's first windows, up to `max_tokens`, shared out over the ranks.

    `loss_of(inputs, targets)`, each (B, T), gives a mean loss; `byte_lengths` (V,) says how many
    bytes each id stands for.
    """
    count = min(stream.num_windows(block_size), max(1, max_tokens // block_size))
    sums = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
    for first in range(ranks.rank * batch_size, count, ranks.world_size * batch_size):
        windows = range(first, min(first + batch_size, count))
        inputs, targets = load_windows(stream, windows, block_size)
        if byte_lengths is not None:
            sums[2] += int(byte_lengths[targets.numpy()].sum())
        loss = loss_of(inputs.to(ranks.device), targets.to(ranks.device))
        sums[0] += loss.item() * targets.numel()
        sums[1] += targets.numel()
    if ranks.world_size > 1:
        sums = ranks.sum(sums.to(ranks.device)).cpu()
    nats, tokens, text_bytes = sums.tolist()
    return Validation(nats / tokens, int(tokens), int(text_bytes) or None)


def xz_bits_per_byte(stream: TokenStream, encoding: tiktoken.Encoding, tokens: int) -> float | None:
    """What `xz -9e` makes of the text of the first tokens; None if that is over a million bytes."""
    ids = stream.read(1, tokens).astype(np.int64)  # the first token is never guessed
    text = encoding.decode_bytes(ids[ids != encoding.eot_token].tolist())
    if len(text) > XZ_LIMIT:
        return None
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


def main(arguments: argparse.Namespace) -> None:
    """Measure, and print a small table."""
    checkpoint = find_checkpoint(arguments.checkpoint)
    folder = arguments.data or Path(checkpoint.meta.config["data"]["dir"])
    stream = TokenStream(folder, "val")
    checkpoint.check_vocabulary(folder)
    encoding = checkpoint.encoding()
    device = choose_device(arguments.device)
    model = GPT(checkpoint.meta.model)
    checkpoint.load_model(model)
    model.to(device)
    alone = Ranks(rank=0, local_rank=0, world_size=1, device=device)
    block_size = checkpoint.meta.model.block_size
    with evaluating(model):
        result = validate(
            model, stream, block_size, 16, arguments.tokens, alone, token_byte_lengths(encoding)
        )
    print(f"checkpoint      {checkpoint.path.name} of {arguments.checkpoint}")
    print(f"validation      {result.tokens:,} tokens, {result.text_bytes or 0:,} bytes of {folder}")
    print(f"loss            {result.loss:.4f} nats per token")
    print(f"perplexity      {result.perplexity:.2f}")
    if result.bits_per_byte is None:  # nothing but <|endoftext|>
        return
    print(f"bits per byte   {result.bits_per_byte:.3f}")
    xz = xz_bits_per_byte(stream, encoding, result.tokens)
    if xz is not None:
        print(f"xz -9e          {xz:.3f} bits per byte on the same text")


if __name__ == "__main__":
    sys.exit(run_script(main, ARGUMENTS))

"""One sentence on its way through a trained GPT, with every number on the way.

    python -m visuals.story
    python -m visuals.story --text "Return the name of a" --next " file"

In README's order: characters, tokens, vectors, attention, logits, loss, gradient. The model is the
one in visuals/model, whose numbers README shows, or another (--checkpoint out/demo).
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from common.errors import Parser, UserError, run_script
from visuals import KEPT

TEXT, NEXT = "Return a list of the", " same"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description="Follow one sentence through a trained GPT.")
    parser.add_argument("--checkpoint", default=KEPT, help="a run folder (visuals/model)")
    parser.add_argument("--text", default=TEXT, help=f'a beginning of a sentence ("{TEXT}")')
    parser.add_argument(
        "--next",
        default=NEXT,
        help=f'what follows, with its space; its first token is to be guessed ("{NEXT}")',
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":  # before the slow imports: --help and a typo answer at once
    ARGUMENTS = parse_arguments()

import tiktoken
import torch
from torch import Tensor

from huggingface import find_model
from model import GPT
from tokenizer import well_formed

LAYER, HEAD = 1, 2  # the head whose attention is shown, counted from 0, if there are so many
LEARNING_RATE = 0.001  # of the one plain gradient step at the end


@dataclass(frozen=True)
class Story:
    """A sentence, its next token, and the model that is to guess it."""

    model: GPT
    encoding: tiktoken.Encoding
    text: str
    ids: Tensor  # (T,)
    target: int

    @property
    def tokens(self) -> list[str]:
        """The sentence's tokens as text."""
        return [self.encoding.decode([token]) for token in self.ids.tolist()]

    def logits(self) -> Tensor:
        """What the model says of the token after the last: (V,)."""
        return self.model(self.ids[None])[0, -1]

    def loss(self) -> Tensor:
        """-log p of the target, in nats: a scalar."""
        return -self.logits().log_softmax(dim=-1)[self.target]


def load_story(checkpoint: str | Path = KEPT, text: str = TEXT, following: str = NEXT) -> Story:
    """The story of a text, whose next token is the first of `following`.

    Raises UserError if the text doesn't fit.
    """
    found = find_model(str(checkpoint))
    encoding, text = found.encoding(), well_formed(text)
    model = found.make_model()
    ids, target = encoding.encode_ordinary(text), encoding.encode_ordinary(following)
    if not 1 <= len(ids) <= found.meta.model.block_size:
        raise UserError(
            f"--text has {len(ids)} tokens, expected 1 to {found.meta.model.block_size}"
        )
    if not target:
        raise UserError("--next is empty: expected the text that follows")
    return Story(model, encoding, text, torch.tensor(ids), target[0])


@torch.no_grad()
def attention_rows(model: GPT, ids: Tensor) -> Tensor:
    """How much each position takes from each, in every head: ids (T,) -> (n_layer, nh, T, T).

    The fused kernel never makes these numbers, so they are computed here once more.
    """
    T, C, nh = len(ids), model.config.n_embd, model.config.n_head
    x = model.wte(ids) + model.wpe.weight[:T]  # (T, C)
    causal_mask = torch.ones(T, T, dtype=torch.bool).tril()  # (T, T)
    rows = []
    for block in model.h:
        q, k, _ = block.attn.c_attn(block.ln_1(x)).split(C, dim=-1)  # 3 × (T, C)
        q, k = (part.view(T, nh, C // nh).transpose(0, 1) for part in (q, k))  # 2 × (nh, T, hs)
        scores = q @ k.transpose(-2, -1) / math.sqrt(C // nh)  # (nh, T, T)
        rows.append(scores.masked_fill(~causal_mask, -math.inf).softmax(dim=-1))
        x = block(x[None])[0]  # (T, C)
    return torch.stack(rows)


def likeliest(story: Story, count: int) -> list[tuple[str, float, float]]:
    """The `count` likeliest next tokens as (text, logit, probability)."""
    with torch.no_grad():
        logits = story.logits()
    probabilities = logits.softmax(dim=-1)
    return [
        (story.encoding.decode([token]), logits[token].item(), probabilities[token].item())
        for token in logits.topk(count).indices.tolist()
    ]


def few(vector: Tensor, count: int = 5) -> str:
    """The first numbers of a vector."""
    return " ".join(f"{number:+.3f}" for number in vector[:count].tolist()) + " …"


def tell_tokens(story: Story) -> list[str]:
    """From characters to ids."""
    shown = " ".join(str(byte) for byte in story.text.encode()[:12])
    lines = [
        f"characters  {story.text!r}: {len(story.text)} of them",
        f"bytes       {shown} …",
        "tokens      " + " ".join(f"{token!r}" for token in story.tokens),
        "ids         " + " ".join(map(str, story.ids.tolist())),
    ]
    return lines


@torch.no_grad()
def tell_vectors(story: Story) -> list[str]:
    """From ids to vectors."""
    model, last = story.model, len(story.ids) - 1
    token = int(story.ids[-1])
    x = model.wte.weight[token] + model.wpe.weight[last]
    hidden = model.hidden_states(story.ids[None])[0, -1]
    return [
        f"the vector of {story.tokens[-1]!r}, {model.config.n_embd} numbers:",
        f"token {token:<6}{few(model.wte.weight[token])}",
        f"position {last:<3}{few(model.wpe.weight[last])}",
        f"sum         {few(x)}",
        f"at the top  {few(hidden)}",
    ]


def tell_attention(story: Story) -> list[str]:
    """The last token's row of one head."""
    rows = attention_rows(story.model, story.ids)
    layer, head = min(LAYER, rows.size(0) - 1), min(HEAD, rows.size(1) - 1)
    row = rows[layer, head, -1].tolist()
    shares = ", ".join(f"{token!r} {share:.2f}" for token, share in zip(story.tokens, row))
    return [f"block {layer + 1}, head {head + 1}: {story.tokens[-1]!r} takes from", f"  {shares}"]


def tell_logits(story: Story) -> list[str]:
    """The likeliest next tokens."""
    lines = [f"next token   logit   probability   (of {story.model.config.vocab_size:,})"]
    for token, logit, probability in likeliest(story, 5):
        lines.append(f"{token!r:<12} {logit:5.2f}   {probability:.3f}")
    return lines


def tell_loss(story: Story) -> list[str]:
    """What the target costs."""
    loss = story.loss().item()
    following = story.encoding.decode([story.target])
    untrained = math.log(story.model.config.vocab_size)
    return [
        f"target      {following!r}, to which the model gave {math.exp(-loss):.3g}",
        f"loss        -ln {math.exp(-loss):.3g} = {loss:.3f} nats",
        f"untrained   ln {story.model.config.vocab_size:,} = {untrained:.3f} nats",
    ]


def tell_gradient(story: Story) -> list[str]:
    """The loss's gradient, and what one step against it does."""
    model = story.model
    model.zero_grad(set_to_none=True)
    logits = story.logits()
    logits.retain_grad()
    before = -logits.log_softmax(dim=-1)[story.target]
    before.backward()
    parameters = list(model.parameters())
    norm = torch.stack([p.grad.norm() for p in parameters]).norm().item()
    best = int(logits.argmax())
    weights = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p in parameters:
            p -= LEARNING_RATE * p.grad
        after = story.loss().item()
        for p, weight in zip(parameters, weights):
            p.copy_(weight)
    shown = {token: story.encoding.decode([token]) for token in (best, story.target)}
    return [
        *(
            f"d loss / d logit of {text!r:<10} {logits.grad[token]:+.4f}"
            for token, text in shown.items()
        ),
        f"d loss / d all {model.num_parameters():,} weights: a vector of length {norm:.2f}",
        f"one step of {LEARNING_RATE} × it: loss {before.item():.3f} -> {after:.3f}, "
        f"probability {math.exp(-before.item()):.3g} -> {math.exp(-after):.3g}",
    ]


def chapters(story: Story) -> list[str]:
    """The whole story, a text for each stage."""
    tellers = (tell_tokens, tell_vectors, tell_attention, tell_logits, tell_loss, tell_gradient)
    return ["\n".join(tell(story)) for tell in tellers]


def main(arguments: argparse.Namespace) -> None:
    """Print the story."""
    story = load_story(arguments.checkpoint, arguments.text, arguments.next)
    print("\n\n".join(chapters(story)))


if __name__ == "__main__":
    sys.exit(run_script(main, ARGUMENTS))

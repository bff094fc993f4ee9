"""Figures of mechanisms: merges, the causal mask, the architecture, a DDP step, the KV cache.

Merges, masks and shapes are computed by the project's own code.
"""

from __future__ import annotations

import math
from collections import Counter

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from config import load_config
from data import BatchShape
from model import attention_written_out
from tokenizer import GPT2_VOCAB_SIZE, merge, train_bpe, word_pattern
from visuals import CONFIG, ROOT
from visuals.canvas import (
    BLUE,
    GREY,
    INK,
    LIGHT_BLUE,
    LIGHT_GREEN,
    LIGHT_ORANGE,
    PALE,
    PAPER,
    arrow,
    box,
    diagram,
    sheet,
    visible,
)

BPE_TEXT = "low lower lowest slow slower slowest"

# The attention example in README that can be checked by hand: what each of four tokens looks for,
# and what it is, in a head of size 4.
HAND_TOKENS = ["A", "cat", "purrs", "it"]
HAND_QUERIES = [[0, 0, 0, 0], [2, 0, 0, 0], [0, 2, 0, 0], [0, 2, 0, 0]]
HAND_KEYS = [[2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 2]]


def merge_steps(text: str, count: int) -> list[tuple[bytes, int, list[list[bytes]]]]:
    """The first merges that BPE learns from a text: (new token, how often, the words after it)."""
    words = [[bytes([byte]) for byte in word.encode()] for word in word_pattern().findall(text)]
    learned = [token for token in train_bpe([text], 257 + count) if len(token) > 1]
    steps = []
    for new in learned:
        pairs = Counter(left + right for word in words for left, right in zip(word, word[1:]))
        words = [merge(word, new) for word in words]
        steps.append((new, pairs[new], words))
    return steps


def bpe_merges() -> Figure:
    """BPE on six words, merge by merge."""
    steps = merge_steps(BPE_TEXT, 6)
    start = [[bytes([byte]) for byte in word.encode()] for word in word_pattern().findall(BPE_TEXT)]
    rows = [("bytes", b"", start)]
    rows += [
        (f"{visible(new.decode())}  ({count} times)", new, words) for new, count, words in steps
    ]
    figure, axes = diagram(9.2, 0.42 * len(rows) + 0.25)
    for number, (label, new, words) in enumerate(rows):
        y = 4.2 * (len(rows) - number) - 3
        axes.text(1, y + 1.5, label, va="center", fontsize=10)
        x = 19.0
        for word in words:
            for token in word:
                width = 1.85 * len(token)
                colour = LIGHT_ORANGE if token == new else PALE
                box(axes, x, y, width, 3, visible(token.decode()), colour, fontsize=10)
                x += width
            x += 0.8
    return figure


def causal_mask() -> Figure:
    """Scores, the mask, and the weights that softmax makes of what is left."""
    q, k = (torch.tensor(rows, dtype=torch.float)[None, None] for rows in (HAND_QUERIES, HAND_KEYS))
    scores = (q @ k.transpose(-2, -1) / math.sqrt(q.size(-1)))[0, 0]  # (T, T)
    weights = attention_written_out(q, k, torch.eye(4)[None, None])[0, 0]  # (T, T)
    seen = torch.ones(4, 4, dtype=torch.bool).tril()
    figure, panels = sheet(10.5, 3.7, 1, 3)
    for axes, title, numbers, masked in (
        (panels[0], "q · k / √hs: what fits what", scores, False),
        (panels[1], "the future is masked", scores, True),
        (panels[2], "softmax: each row sums to 1", weights, True),
    ):
        colours = torch.where(seen | torch.tensor(not masked), numbers, torch.nan)
        axes.imshow(colours, cmap="Blues", vmin=0, vmax=5 if numbers is scores else 2.5)
        axes.set_facecolor(PALE)
        axes.set_title(title, fontsize=11)
        axes.set_xticks(range(4), HAND_TOKENS)
        axes.set_yticks(range(4), HAND_TOKENS)
        axes.tick_params(length=0)
        for row in range(4):
            for column in range(4):
                shown = f"{numbers[row, column]:{'.2f' if numbers is weights else '.0f'}}"
                hidden = masked and not seen[row, column]
                text = "−∞" if hidden and numbers is scores else "0" if hidden else shown
                axes.text(column, row, text, ha="center", va="center")
    return figure


def architecture() -> Figure:
    """GPT-2 124M from ids to logits, with the shape of what goes from box to box."""
    model = load_config([str(ROOT / CONFIG)]).model
    C, T, V = model.n_embd, model.block_size, GPT2_VOCAB_SIZE
    stream = f"(B, {T}, {C})"
    figure, axes = diagram(7.6, 8.6)
    middle = 22

    def layer(y: float, text: str, colour: str) -> None:
        box(axes, middle - 18, y, 36, 4, text, colour)

    def shape(y: float, text: str) -> None:
        axes.text(middle + 1, y, text, va="center", fontsize=9, color=BLUE)

    layer(2, "token ids", PALE)
    shape(7.5, f"(B, {T})")
    layer(9, f"wte: {V:,} × {C}   +   wpe: {T:,} × {C}", LIGHT_BLUE)
    shape(14.7, stream)
    axes.add_patch(Rectangle((3, 17), 65, 47, fill=False, ec=GREY, lw=1, ls="--"))
    axes.text(66.5, 61.5, f"block, {model.n_layer} times", ha="right", va="center", weight="bold")
    heads, size = model.n_head, C // model.n_head
    attention = f"attention, {heads} heads of {size}\n(B, {heads}, {T}, {size})"
    mlp = f"MLP: {C} → {4 * C:,} → {C}, GELU\n(B, {T}, {4 * C})"
    _sublayer(axes, middle, 19, "ln_1", attention, LIGHT_GREEN)
    _sublayer(axes, middle, 41, "ln_2", mlp, LIGHT_ORANGE)
    shape(65.8, stream)
    layer(67.5, "ln_f", PALE)
    shape(73, stream)
    layer(74.7, f"wte again, transposed: {C} → {V:,}", LIGHT_BLUE)
    shape(80.2, f"(B, {T}, {V})")
    axes.text(middle, 83.8, "logits of the next token", ha="center", va="center")
    for start, end in ((6, 9), (13, 19), (64, 67.5), (71.5, 74.7), (78.7, 82)):
        arrow(axes, (middle, start), (middle, end))
    arrow(axes, (middle, 19), (middle, 64), arrowstyle="-", lw=2.4, color=BLUE)
    axes.text(middle - 1.5, 40, "residual stream", rotation=90, ha="right", va="center", color=BLUE)
    return figure


def _sublayer(axes: Axes, x: float, y: float, norm: str, text: str, colour: str) -> None:
    """A branch to the right of the residual stream at x: norm, sublayer, and back by a plus."""
    axes.plot([x, 50], [y + 1.5, y + 1.5], color=INK, lw=1.1)
    arrow(axes, (50, y + 1.5), (50, y + 4))
    box(axes, 40, y + 4, 20, 3.4, norm, PALE)
    arrow(axes, (50, y + 7.4), (50, y + 9.5))
    box(axes, 36, y + 9.5, 28, 6, text, colour, fontsize=10)
    axes.plot([50, 50], [y + 15.5, y + 18.5], color=INK, lw=1.1)
    arrow(axes, (50, y + 18.5), (x + 1.1, y + 18.5))
    axes.text(
        x,
        y + 18.5,
        "+",
        ha="center",
        va="center",
        zorder=5,  # above the stream
        bbox={"boxstyle": "circle,pad=0.15", "fc": PAPER, "ec": BLUE},
    )


def ddp_step() -> Figure:
    """One optimizer step on several GPUs."""
    config = load_config([str(ROOT / CONFIG)])
    batch = BatchShape(
        config.train.tokens_per_step, config.model.block_size, config.train.micro_batch_size, 4
    )
    gradients = (1, 2, 3, 6)
    figure, axes = diagram(9.4, 4.9)
    for rank, gradient in enumerate(gradients):
        x = 2 + 23 * rank
        box(axes, x, 40.5, 21, 5.5, f"GPU {rank}\nthe same weights", LIGHT_BLUE, fontsize=10)
        text = f"{batch.accumulation} micro-batches of\n{batch.micro_batch_size} windows of its own"
        box(axes, x, 31, 21, 6.5, text, PALE, fontsize=10)
        box(axes, x, 23.5, 21, 4.5, f"its gradient: {gradient}", LIGHT_ORANGE, fontsize=10)
        mean = sum(gradients) / len(gradients)
        box(axes, x, 9, 21, 4.5, f"the mean: {mean:g}", LIGHT_ORANGE, fontsize=10)
        box(axes, x, 1.5, 21, 4.5, "the same update", LIGHT_BLUE, fontsize=10)
        for start, end in ((40.5, 37.5), (31, 28), (23.5, 20.8), (16.2, 13.5), (9, 6)):
            arrow(axes, (x + 10.5, start), (x + 10.5, end))
    box(axes, 2, 16.2, 90, 4.6, "all-reduce: everybody gets the mean of all gradients", LIGHT_GREEN)
    return figure


def kv_cache(tokens: int = 6) -> Figure:
    """Whose keys and values each step computes, without a cache and with one."""
    figure, axes = diagram(9, 3.9)
    counts = (tokens * (tokens + 1) // 2, tokens)
    for panel, (title, count) in enumerate(zip(("without a cache", "with a cache"), counts)):
        left = 8 + 44 * panel
        axes.text(left, 36, f"{title}: {count} computed", weight="bold", va="center")
        for step in range(tokens):
            y = 30 - 4.4 * step
            axes.text(left - 1, y + 1.9, f"step {step + 1}", ha="right", va="center", fontsize=9)
            for token in range(step + 1):
                fresh = panel == 0 or token == step
                colour = LIGHT_ORANGE if fresh else LIGHT_BLUE
                box(axes, left + 5.2 * token, y, 4.9, 3.8, f"k v {token + 1}", colour, fontsize=9)
    box(axes, 20, 1, 3, 2.6, "", LIGHT_ORANGE)
    axes.text(24, 2.3, "computed in this step", va="center", fontsize=10)
    box(axes, 50, 1, 3, 2.6, "", LIGHT_BLUE)
    axes.text(54, 2.3, "kept from earlier steps", va="center", fontsize=10)
    return figure

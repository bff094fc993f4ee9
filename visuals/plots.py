"""Figures of numbers: what a trained model says, and how its training went.

Those of a model take its run folder, such as out/demo.
"""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter
from PIL import Image

from benchmarks.trials import load_found, rows_of
from checkpoint import find_checkpoint
from common.errors import UserError
from config import load_config
from model import choose_next, next_probabilities
from optim import learning_rate_at
from training.metrics import read_losses
from visuals import CONFIG, ROOT
from visuals.canvas import BLUE, GREEN, GREY, INK, ORANGE, PALE, RED, sheet, visible
from visuals.story import Story, attention_rows, likeliest, load_story

LABEL_PLACES = (  # offset in points, and which side of the label is there
    ((3, 2), {}),
    ((-3, 2), {"ha": "right"}),
    ((3, -2), {"va": "top"}),
    ((-3, -2), {"ha": "right", "va": "top"}),
    ((0, 5), {"ha": "center"}),
    ((0, -5), {"ha": "center", "va": "top"}),
    ((5, 0), {"va": "center"}),
    ((-5, 0), {"ha": "right", "va": "center"}),
    ((0, 9), {"ha": "center"}),
    ((0, -11), {"ha": "center", "va": "top"}),
    ((8, -8), {"va": "top"}),
    ((-8, -8), {"ha": "right", "va": "top"}),
    ((8, 8), {}),
    ((-8, 8), {"ha": "right"}),
)
FRAMES = 24  # of the animation, a token each
SEED, KNOBS = 20, {"temperature": 0.6, "top_k": 20}  # of the tokens that it draws


def next_token(run: Path) -> Figure:
    """The likeliest next tokens of the travelling sentence."""
    story = load_story(run)
    rows = likeliest(story, 8)[::-1]
    figure, axes = sheet(7.5, 3.4)
    true = story.encoding.decode([story.target])
    colours = [ORANGE if token == true else BLUE for token, _, _ in rows]
    bars = axes.barh([visible(token) for token, _, _ in rows], [p for *_, p in rows], color=colours)
    axes.bar_label(bars, fmt=lambda p: f" {p:.1%}")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("probability of being next")
    axes.set_title(f"“{story.text} …”", loc="left")
    return figure


def counting() -> Figure:
    """How contexts thin out as they grow longer."""
    rows = json.loads((ROOT / "results" / "counting.json").read_text("utf-8"))["contexts"]
    context = [row["context"] for row in rows]
    figure, axes = sheet(7.5, 3.6)
    for name, label, colour in (
        ("seen", "… the context occurs in the training text", BLUE),
        ("right", "… its most frequent follower there is right", ORANGE),
    ):
        shares = [row[name] for row in rows]
        axes.plot(context, shares, marker="o", color=colour, label=label)
        for x, share in zip(context, shares):
            below = name == "right"
            axes.annotate(
                f"{share:.0%}",
                (x, share),
                (0, -16 if below else 8),
                textcoords="offset points",
                ha="center",
            )
    axes.set(xlabel="tokens of context", ylim=(-0.06, 1.12), xticks=context)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(loc="upper right")
    axes.set_title("share of places in new text where …", loc="left")
    return figure


def embedding_map(run: Path) -> Figure:
    """The first word-like tokens that BPE learned, by the two main directions of their vectors."""
    story = load_story(run)
    vectors = story.model.wte.weight.detach()
    words = [
        token
        for token in range(256, story.model.config.vocab_size - 1)
        if (text := story.encoding.decode([token])).startswith(" ")
        and text[1:].isalpha()
        and len(text) > 2
    ]
    if len(words) < 2:
        raise UserError(f"{run}: its vocabulary has no words for embedding_map to place")
    words = words[:90]  # ids are in the order of learning
    chosen = torch.nn.functional.normalize(vectors[words], dim=-1)
    chosen = chosen - chosen.mean(dim=0)
    _, _, directions = torch.linalg.svd(chosen, full_matrices=False)
    places = chosen @ directions[:2].T  # (words, 2)
    farthest = places.gather(0, places.abs().argmax(dim=0, keepdim=True))  # (1, 2)
    places = (places * farthest.sign()).numpy()  # which end is positive is left open by the SVD
    figure, axes = sheet(10, 8)
    axes.scatter(*places.T, s=9, color=GREY)
    axes.margins(0.06, 0.08)
    axes.set(xticks=[], yticks=[], xlabel="first main direction", ylabel="second main direction")
    figure.draw_without_rendering()  # lays everything out, so that labels know where they are
    dots = axes.transData.transform(places)
    texts = [story.encoding.decode([token]).strip() for token in words]
    write_labels(axes, texts, places, np.hstack((dots - 3, dots + 3)))
    return figure


def write_labels(axes: Axes, texts: list[str], places: np.ndarray, dots: np.ndarray) -> None:
    """Write each label where it covers least of the other labels and of the `dots`, (n, 4) each."""
    labels = [
        [
            axes.annotate(text, place, offset, textcoords="offset points", fontsize=9, **align)
            for offset, align in LABEL_PLACES
        ]
        for text, place in zip(texts, places)
    ]
    boxes = np.array(
        [[label.get_window_extent().extents for label in possible] for possible in labels]
    )  # (labels, places, 4): left, bottom, right, top
    chosen: dict[int, int] = {}
    for number in [*range(len(texts))] * 3:  # later rounds know where all others are
        others = [boxes[other, at] for other, at in chosen.items() if other != number]
        chosen[number] = int(covered(boxes[number], np.vstack((dots, *others))).argmin())
    for number, possible in enumerate(labels):
        for at, label in enumerate(possible):
            if at != chosen[number]:
                label.remove()


def covered(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The area that each box (n, 4) shares with the others (m, 4): (n,)."""
    low = np.maximum(boxes[:, None, :2], others[:, :2])  # (n, m, 2)
    high = np.minimum(boxes[:, None, 2:], others[:, 2:])  # (n, m, 2)
    return (high - low).clip(min=0).prod(axis=-1).sum(axis=-1)


def positions(run: Path) -> Figure:
    """How alike the vectors of any two positions are."""
    vectors = torch.nn.functional.normalize(load_story(run).model.wpe.weight.detach(), dim=-1)
    figure, axes = sheet(5.2, 4.4)
    image = axes.imshow((vectors @ vectors.T).numpy(), cmap="RdBu", vmin=-1, vmax=1)
    axes.set(xlabel="position", ylabel="position")
    figure.colorbar(image, label="cosine of the angle between their vectors", shrink=0.9)
    return figure


def attention_heads(run: Path) -> Figure:
    """Every head's attention on the travelling sentence."""
    story = load_story(run)
    rows = attention_rows(story.model, story.ids).numpy()
    layers, heads, T, _ = rows.shape
    figure, axes = sheet(2.2 * heads + 0.6, 2.1 * layers + 0.5, layers, heads)
    labels = [visible(token) for token in story.tokens]
    axes = np.reshape(axes, (layers, heads))
    for layer in range(layers):
        for head in range(heads):
            at = axes[layer, head]
            at.imshow(rows[layer, head], cmap="Blues", vmin=0, vmax=1)
            at.set_title(f"block {layer + 1}, head {head + 1}", fontsize=10)
            at.set_xticks(range(T), labels if layer == layers - 1 else [""] * T, rotation=90)
            at.set_yticks(range(T), labels if head == 0 else [""] * T)
            at.tick_params(length=0, labelsize=9)
            for row, column in zip(*np.tril_indices(T)):
                share = rows[layer, head, row, column]
                colour = "white" if share > 0.5 else INK
                number = f"{100 * share:.0f}"
                at.text(column, row, number, color=colour, fontsize=7, ha="center", va="center")
    figure.supylabel("this token …", fontsize=11)
    figure.supxlabel("… takes so many percent from this one", fontsize=11)
    return figure


def sampling(run: Path) -> Figure:
    """The same logits under temperature, top-k and top-p."""
    story = load_story(run)
    with torch.no_grad():
        logits = story.logits()[None]
    best = logits[0].topk(12).indices
    labels = [visible(story.encoding.decode([token])) for token in best.tolist()]
    panels = [
        ("temperature 1: as learned", {"temperature": 1}, INK),
        ("temperature 0.5: tamer", {"temperature": 0.5}, BLUE),
        ("temperature 1.5: wilder", {"temperature": 1.5}, ORANGE),
        ("top-k 4", {"temperature": 1, "top_k": 4}, GREEN),
        ("top-p 0.7", {"temperature": 1, "top_p": 0.7}, RED),
        ("demo: 0.6 and top-k 20", KNOBS, GREY),
    ]
    figure, axes = sheet(9, 6.2, 2, 3)
    bars = [next_probabilities(logits, **knobs)[0] for _, knobs, _ in panels]  # 6 × (V,)
    bars = [weights / weights.sum() for weights in bars]
    highest = max(float(probabilities.max()) for probabilities in bars)
    for at, (title, _, colour), probabilities in zip(axes.flat, panels, bars):
        at.barh(labels[::-1], probabilities[best].tolist()[::-1], color=colour)
        at.set(xlim=(0, 1.05 * highest))
        at.set_title(title, loc="left")
        at.set_xlabel(f"{int(probabilities.count_nonzero()):,} tokens possible")
        at.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure


def learning_rate() -> Figure:
    """The learning rate over the steps of configs/gpt2_124m.toml."""
    config = load_config([str(ROOT / CONFIG)])
    optim, steps = config.optim, config.train.max_steps
    figure, axes = sheet(7.5, 3)
    axes.plot([learning_rate_at(step, optim, steps) for step in range(steps)], color=BLUE)
    axes.axvline(optim.warmup_steps, color=GREY, lw=0.8, ls=":")
    axes.annotate(
        f"warm-up, {optim.warmup_steps} steps",
        (optim.warmup_steps, optim.min_learning_rate / 2),
        (6, 0),
        textcoords="offset points",
    )
    axes.annotate(
        f"{optim.min_learning_rate:.5f}",
        (steps, optim.min_learning_rate),
        (0, 8),
        textcoords="offset points",
        ha="right",
    )
    axes.annotate(
        f"{optim.learning_rate:.4f}",
        (optim.warmup_steps, optim.learning_rate),
        (10, 3),
        textcoords="offset points",
    )
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set(xlabel="optimizer step", ylabel="learning rate", ylim=(0, 1.1 * optim.learning_rate))
    return figure


def _losses(lines: list[dict], kind: str) -> np.ndarray:
    """Steps and losses in a run's metrics, (2, lines of that kind); NaN if not finite."""
    points = [(line["step"], line["loss"]) for line in lines if line["kind"] == kind]
    return np.array(points, dtype=float).reshape(-1, 2).T  # null is NaN


def training_curve(run: Path) -> Figure:
    """The loss of a run, step by step."""
    lines = read_losses(run)
    vocab_size = find_checkpoint(str(run)).meta.model.vocab_size
    steps, losses = _losses(lines, "train")
    if not steps.size:
        raise UserError(f"{run} has told of no training step that training_curve could show")
    val = _losses(lines, "val")
    width = min(25, len(steps))
    means = np.convolve(losses, np.ones(width) / width, mode="valid")
    middles = np.convolve(steps, np.ones(width) / width, mode="valid")
    untrained = math.log(vocab_size)
    figure, axes = sheet(7.5, 3.8)
    axes.plot(steps, losses, color=BLUE, alpha=0.35, lw=0.7, label="training, every step")
    axes.plot(middles, means, color=BLUE, label=f"training, mean of {width} steps")
    if val.size:
        axes.plot(*val, color=ORANGE, marker="o", ls="none", label="validation")
    axes.axhline(untrained, color=GREY, lw=0.8, ls=":")
    axes.annotate(
        f"knowing nothing: ln {vocab_size:,} = {untrained:.2f}",
        (steps[-1], untrained),
        (0, 4),
        textcoords="offset points",
        ha="right",
    )
    axes.set(xlabel="optimizer step", ylabel="loss, nats per token")
    axes.legend()
    return figure


def recipe() -> Figure:
    """The validation loss of ways of training, against tokens and against time."""
    found = load_found(ROOT / "results" / "recipe.json")
    rows, tokens = rows_of(found), found.config["train"]["tokens_per_step"]
    figure, panels = sheet(9, 3.8, columns=2)
    lines = {
        "nanogpt": ("AdamW, cosine", GREY, "-"),
        "muon": ("Muon, cosine", BLUE, "--"),
        "muon_ema": ("Muon, weights averaged", ORANGE, "-"),
    }
    for name, (label, colour, style) in lines.items():
        row = rows[name]
        losses = [run.losses for run in row.runs]
        low, high = np.min(losses, axis=0), np.max(losses, axis=0)
        minutes = found.step_seconds * found.step_ratios[name] / 60
        for axes, unit in zip(panels, (tokens / 1e6, minutes)):
            steps, means = np.array(row.curve).T
            axes.fill_between(steps * unit, low, high, color=colour, alpha=0.25, lw=0)
            axes.plot(steps * unit, means, color=colour, ls=style, label=label)
    for axes, unit in zip(panels, ("million tokens", "minutes of training")):
        axes.axhline(rows["nanogpt"].loss, color=GREY, lw=0.8, ls=":")
        axes.set(xlabel=unit, ylabel="validation loss, nats per token")
    panels[0].legend()
    return figure


def growing_text(run: Path, path: Path) -> None:
    """An animation: text grows token by token, beside the probabilities it is drawn from."""
    story = load_story(run)
    generator = torch.Generator().manual_seed(SEED)
    ids, frames = story.ids, []
    for number in range(FRAMES + 1):
        with torch.no_grad():
            logits = story.model(ids[None, -story.model.config.block_size :])[:, -1]
        drawn = choose_next(logits, **KNOBS, generator=generator)
        weights = next_probabilities(logits, **KNOBS)[0]
        shown = int(drawn) if number < FRAMES else None
        frames.append(_frame(story, ids, weights / weights.sum(), shown))
        ids = torch.cat((ids, drawn))
    palette = frames[0].quantize(32)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    frames[0].save(
        path,
        save_all=True,
        append_images=frames[1:],
        duration=[900] * FRAMES + [4000],
        loop=0,
        optimize=True,
    )


def _frame(
    story: Story, ids: torch.Tensor, probabilities: torch.Tensor, drawn: int | None
) -> Image.Image:
    """One picture of the animation; in the last nothing is drawn any more."""
    figure, (top, bottom) = sheet(7.6, 3.4, 2, 1)
    top.get_gridspec().set_height_ratios((1, 2))
    top.axis("off")
    text = story.encoding.decode(ids.tolist())
    top.text(0, 1, f"{_wrapped(text)} ▁", va="top", family="monospace", fontsize=11)
    best = probabilities.topk(7).indices.tolist()
    if drawn is not None and drawn not in best:
        best[-1] = drawn
    labels = [visible(story.encoding.decode([token])) for token in best]
    colours = [ORANGE if token == drawn else BLUE for token in best]
    bottom.bar(labels, probabilities[best].tolist(), color=colours)
    bottom.set(xlim=(-0.6, 6.6), xticks=range(len(best)), ylim=(0, 1), facecolor=PALE)
    bottom.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    knobs = f"temperature {KNOBS['temperature']}, the {KNOBS['top_k']} likeliest"
    bottom.set_title(f"what may come next ({knobs}); orange was drawn", loc="left", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=90, format="png")
    pyplot.close(figure)
    return Image.open(buffer).convert("RGB")


def _wrapped(text: str, width: int = 62) -> str:
    """Text cut into lines of at most `width` characters, at spaces."""
    lines = [""]
    for word in text.replace("\n", " ⏎ ").split(" "):
        if len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)

"""What all figures share: paper, ink, colours, and boxes with text in them.

The paper is opaque, so that a figure looks the same on a light and on a dark page.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into files, needs no screen

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

PAPER, INK, GREY, PALE = "#fcfbf8", "#22252b", "#8b9098", "#e6e4de"
BLUE, ORANGE, GREEN, RED = "#2f6db5", "#d07a1f", "#3a8f5c", "#b8433a"
LIGHT_BLUE, LIGHT_ORANGE, LIGHT_GREEN = "#d5e3f3", "#f8e2c8", "#d6ebdd"

STYLE = {
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 11,
    "legend.frameon": False,
    "text.parse_math": False,  # a "$" in a token is a "$"
}


def sheet(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, object]:
    """An empty figure of so many inches, with its axes as `pyplot.subplots` gives them."""
    pyplot.rcParams.update(STYLE)
    return pyplot.subplots(rows, columns, figsize=(width, height), layout="constrained")


def diagram(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure without axes to be seen, whose unit is a tenth of an inch."""
    pyplot.rcParams.update(STYLE)
    figure = pyplot.figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 10 * width), ylim=(0, 10 * height))
    axes.axis("off")
    return figure, axes


def box(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    text: str,
    colour: str = PALE,
    **style: object,
) -> None:
    """A box with its lower left corner at (x, y) and a text in its middle."""
    outline = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.6", fc=colour, ec=GREY, lw=0.8
    )
    axes.add_patch(outline)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", **style)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], **style: object
) -> None:
    """An arrow from `start` to `end`."""
    look = {"arrowstyle": "-|>", "color": INK, "lw": 1.1, "shrinkA": 0, "shrinkB": 0, **style}
    axes.annotate("", xy=end, xytext=start, arrowprops=look)


def visible(token: str) -> str:
    """A token's text with its white space to be seen."""
    return token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, 150 dots per inch, without anything that changes from day to day."""
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)

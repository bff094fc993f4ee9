"""What the turns of bench.py's contestants come to: medians, ratios, tables.

A turn is what a contestant measured at once. A ratio is of seconds, the other's to ours, round by
round: what slows the machine for a while slows both.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from common.errors import UserError, one_line
from common.records import read_json

PARTS = ("data", "forward", "backward", "optimizer")
Turn = dict[str, float]  # what a contestant measured in one turn


# Turns


def median(turns: list[Turn], key: str) -> float | None:
    """The median of a number over the rounds; None where it wasn't measured, or can't be."""
    values = [turn[key] for turn in turns if turn.get(key) is not None]
    return statistics.median(values) if values else None


def ratios(turns: dict[str, list[Turn]], name: str, key: str) -> list[float]:
    """How many times as long another takes as we do, round by round."""
    return [theirs[key] / ours[key] for ours, theirs in zip(turns["ours"], turns[name])]


def ratio(turns: dict[str, list[Turn]], name: str, key: str) -> float:
    """The median of `ratios`."""
    return statistics.median(ratios(turns, name, key))


def training_results(turns: dict[str, list[Turn]], machine: dict, tokens: int) -> dict[str, dict]:
    """What the turns of a step of so many `tokens` come to, by contestant.

    `memory_ratio` is how many times the other's memory we take.
    """
    ceiling, peak = median(turns["ours"], "matrix_product_flops"), machine["peak_flops"]
    results = {}
    for name in turns:
        seconds = {part: median(turns[name], f"{part}_seconds") for part in PARTS}
        step, memory = (median(turns[name], key) for key in ("step_seconds", "peak_memory"))
        flops = tokens / step * machine["flops_per_token"]
        results[name] = {
            "tokens_per_second": tokens / step,
            "of_matrix_product": flops / ceiling,
            "mfu": peak and flops / peak,
            "peak_memory": memory,
            "seconds": seconds,
            "data_share": None if seconds["data"] is None else seconds["data"] / step,
            "times_as_fast": ratio(turns, name, "step_seconds"),
            "memory_ratio": memory and median(turns["ours"], "peak_memory") / memory,
        }
    return results


def generation_results(turns: dict[str, list[Turn]], B: int, T: int) -> dict[str, dict]:
    """What the turns of B prompts of T tokens come to, by contestant."""
    kinds = {"prefill": ("prefill_seconds", B * T), "decode": ("token_seconds", B)}
    kinds["undisturbed"] = ("undisturbed_token_seconds", B)
    results: dict[str, dict] = {name: {} for name in turns}
    for kind, (key, tokens) in kinds.items():
        if key not in turns["ours"][0]:
            continue
        for name, result in results.items():
            result[f"{kind}_tokens_per_second"] = tokens / median(turns[name], key)
            result[f"{kind}_times_as_fast"] = ratio(turns, name, key)
    return results


# Tables


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Columns as wide as they need to be, the first to the left."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    for row in (head, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row, widths)]
        print("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())


def times(name: str, value: float | None, what: str = "as fast") -> str:
    """A ratio for the table; we don't compare with ourselves."""
    return "" if name == "ours" or value is None else f"{value:.2f} × {what}"


def percent(value: float | None, digits: int) -> str:
    """A share for the table."""
    return "n/a" if value is None else f"{value:.{digits}%}"


def scaled(value: float | None, factor: float) -> str:
    """A number for the table, in another unit."""
    return "n/a" if value is None else f"{value * factor:,.1f}"


def milliseconds(seconds: float | None) -> str:
    """Seconds for the table."""
    return scaled(seconds, 1e3)


# By task: the speed that is told of a result, and the seconds of a turn that a ratio compares.
TOLD = {
    "train": ("tokens_per_second", "step_seconds"),
    "generate": ("decode_tokens_per_second", "token_seconds"),
    "tokenize": ("tokens_per_second", "seconds_per_token"),
}


def table(folder: Path) -> None:
    """Print what the files in a folder tell of ours beside others.

    Raises UserError if there is no such file, or one is something else.
    """
    rows = []
    for path in sorted(folder.glob("bench_*.json")):
        try:
            rows += beside_others(path.stem.removeprefix("bench_"), read_json(path))
        except (OSError, ArithmeticError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no report of bench.py: {one_line(error)}") from error
    if not rows:
        raise UserError(f"{folder}: expected a folder with bench_*.json that tell of others")
    print_table(["tokens/s", "ours", "", "theirs", "ours is", "lowest", "highest"], rows)


def beside_others(name: str, report: dict) -> list[list[str]]:
    """A report's lines of that table, one for each contestant beside ours."""
    task, rows = report["settings"]["task"], []
    if task not in TOLD:
        return []
    (rate, key), results = TOLD[task], report["results"]
    for other in report["turns"]:
        if other == "ours":
            continue
        found = ratios(report["turns"], other, key)
        spread = [f"{value:.2f} ×" for value in (statistics.median(found), min(found), max(found))]
        speeds = [f"{results[who][rate]:,.1f}" for who in ("ours", other)]
        rows.append([name, speeds[0], other, speeds[1], *spread])
    return rows

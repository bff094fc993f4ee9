"""Keep a trained model small enough for a git repository, so that README can show its numbers.

    python -m visuals.keep out/demo             into visuals/model/

What is kept is a checkpoint like any other, but its matrices are rounded to 8 bits: each row is
whole numbers from -127 to 127 and one scale, in all a quarter of the size in float32.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from common.errors import Parser, UserError, reason_of, run_script
from visuals import KEPT


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description="Keep a small copy of a trained model.")
    parser.add_argument("run", type=Path, help="its run folder, such as out/demo")
    parser.add_argument("--out", type=Path, default=KEPT, help="where (visuals/model)")
    return parser.parse_args(arguments)


if __name__ == "__main__":  # before the slow imports: --help and a typo answer at once
    ARGUMENTS = parse_arguments()

import torch
from safetensors import SafetensorError
from torch import Tensor

from checkpoint import MODEL, find_checkpoint, save_tensors, write_meta
from shards import VOCABULARY
from training.metrics import METRICS, read_losses


def rounded(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Float (rows, columns) -> int8 (rows, columns) and float (rows, 1), whose product is near."""
    scale = weights.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127  # (rows, 1)
    return (weights / scale).round().to(torch.int8), scale


def keep(run: Path, folder: Path) -> None:
    """Put the newest checkpoint of a run, rounded, into `folder`, with its vocabulary and losses.

    Raises UserError if the run has no checkpoint, no vocabulary of its own or no metrics.
    """
    found = find_checkpoint(str(run))
    if not (run / VOCABULARY).exists():
        raise UserError(f"{run} has no {VOCABULARY}: GPT-2's own vocabulary is too large to keep")
    if folder.resolve() == run.resolve():
        raise UserError(f"--out {folder} is the run itself: choose another folder")
    text = "".join(f"{json.dumps(line)}\n" for line in read_losses(run))
    model = found.make_model()
    tensors: dict[str, Tensor] = {}
    for name, weights in model.state_dict().items():
        if weights.dim() == 2:
            tensors[name], tensors[f"{name}/scale"] = rounded(weights)
        else:
            tensors[name] = weights
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(tensors, folder / MODEL)
        write_meta(folder, found.meta, files=(MODEL,))
        shutil.copyfile(run / VOCABULARY, folder / VOCABULARY)
        (folder / METRICS).write_text(text, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise UserError(f"can't write {folder}: {reason_of(error)}") from error


def main(arguments: argparse.Namespace) -> None:
    """Keep it, and say how large it is."""
    keep(arguments.run, arguments.out)
    size = sum(path.stat().st_size for path in arguments.out.iterdir())
    print(f"{arguments.out}: {size:,} bytes")


if __name__ == "__main__":
    sys.exit(run_script(main, ARGUMENTS))

"""Draw README's figures from this repository's own code and the trained model that it keeps.

    python -m visuals.draw                      all of them, into visuals/ (make figures)
    python -m visuals.draw positions            one
    python -m visuals.draw --run out/demo       those of a model, of yours, into out/demo/figures/

`visuals/figures.json` records how README's figures were made.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

from common.errors import Parser, UserError, run_script

FOLDER = Path(__file__).parent
RECORD = FOLDER / "figures.json"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description="Draw figures.")
    parser.add_argument("names", nargs="*", help="which (all)")
    parser.add_argument("--run", type=Path, help="the run folder of a model of yours")
    return parser.parse_args(arguments)


if __name__ == "__main__":  # before the slow imports: --help and a typo answer at once
    ARGUMENTS = parse_arguments()

import matplotlib
import torch

from checkpoint import MODEL, find_checkpoint, read_checkpoint
from common.files import disk_errors
from visuals import CONFIG, KEPT, ROOT, diagrams, plots
from visuals.canvas import save

# The figures, each with what it shows of this repository; those of a model show any model.
OF_THE_CODE = {
    plots.counting: "results/counting.json",
    diagrams.bpe_merges: "tokenizer.py",
    diagrams.causal_mask: "model.py",
    diagrams.architecture: CONFIG,
    plots.learning_rate: CONFIG,
    plots.recipe: "results/recipe.json",
    diagrams.ddp_step: CONFIG,
    diagrams.kv_cache: "model.py",
}
OF_A_MODEL = (
    plots.next_token,
    plots.embedding_map,
    plots.positions,
    plots.attention_heads,
    plots.training_curve,
    plots.sampling,
    plots.growing_text,
)
FIGURES = {figure.__name__: figure for figure in (*OF_THE_CODE, *OF_A_MODEL)}


def draw(name: str, folder: Path, run: Path = KEPT) -> Path:
    """Draw the figure of that name, of the model in `run`, into a folder; returns its path."""
    figure = FIGURES[name]
    if figure is plots.growing_text:
        path = folder / f"{name}.gif"
        figure(run, path)
    else:
        path = folder / f"{name}.png"
        save(figure(run) if figure in OF_A_MODEL else figure(), path)
    return path


def record(name: str) -> dict[str, object]:
    """How a figure of README is made."""
    figure = FIGURES[name]
    made: dict[str, object] = {
        "what": figure.__doc__.splitlines()[0],
        "command": f"python -m visuals.draw {name}",
    }
    if figure in OF_A_MODEL:
        meta, weights = read_checkpoint(KEPT, files=(MODEL,)).meta, (KEPT / MODEL).read_bytes()
        made["config"] = "configs/demo.toml"
        made["checkpoint"] = f"visuals/model/{MODEL}, step {meta.step}"
        made["sha256"] = hashlib.sha256(weights).hexdigest()
        made["seeds"] = {"training": meta.config["train"]["seed"]}
        if figure is plots.growing_text:
            made["seeds"]["drawing"] = plots.SEED
            made["sampling"] = plots.KNOBS
    else:
        shows = OF_THE_CODE[figure]
        made |= {"shows": shows, "config": shows if shows == CONFIG else None}
        made |= {"checkpoint": None, "seeds": None}  # it is of the code alone
    versions = {"torch": torch.__version__, "matplotlib": matplotlib.__version__}
    return made | {"versions": versions}


def main(arguments: argparse.Namespace) -> None:
    """Draw what was asked for, and say where it is."""
    possible = [figure.__name__ for figure in OF_A_MODEL] if arguments.run else [*FIGURES]
    names = arguments.names or possible
    unknown = sorted(set(names) - set(possible))
    if unknown:
        raise UserError(f"no figure {unknown[0]}: expected some of {', '.join(possible)}")
    if arguments.run:
        find_checkpoint(str(arguments.run))  # is there a model?
        with disk_errors(f"can't write {arguments.run / 'figures'}"):
            (arguments.run / "figures").mkdir(exist_ok=True)
    records = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {}
    for name in names:
        if arguments.run:
            try:
                print(draw(name, arguments.run / "figures", arguments.run))
            except UserError as error:  # this model has nothing to show there
                if arguments.names:
                    raise
                print(f"left out: {error}", file=sys.stderr)
        else:
            path = draw(name, FOLDER)
            print(path.relative_to(ROOT))
            records[path.name] = record(name)
            RECORD.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_script(main, ARGUMENTS))

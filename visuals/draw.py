"""Draw README's figures from this repository's own code, and more from a model that you trained.

    python -m visuals.draw                      README's, into visuals/ (make figures)
    python -m visuals.draw positions            of the model in out/demo, into out/demo/figures/
    python -m visuals.draw --run out/mine       all that can be drawn of another

`visuals/figures.json` records how README's figures were made.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from errors import Parser, UserError, run_script

FOLDER = Path(__file__).parent
RECORD = FOLDER / "figures.json"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description="Draw figures.")
    parser.add_argument("names", nargs="*", help="which (README's; with --run all of a model)")
    parser.add_argument("--run", type=Path, help="the run folder of a model (out/demo)")
    return parser.parse_args(arguments)


if __name__ == "__main__":  # before the slow imports: --help and a typo answer at once
    ARGUMENTS = parse_arguments()

import matplotlib
import torch

from visuals import diagrams, plots
from visuals.canvas import save
from visuals.story import RUN

CONFIG = "configs/gpt2_124m.toml"

# README's figures, each with what it shows of this repository.
OF_README = {
    plots.counting: "results/counting.json",
    diagrams.bpe_merges: "tokenizer.py",
    diagrams.causal_mask: "model.py",
    diagrams.architecture: CONFIG,
    plots.learning_rate: CONFIG,
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


def draw_for_readme(figure: object, folder: Path) -> Path:
    """Draw one of OF_README into a folder; returns the file's path."""
    path = folder / f"{figure.__name__}.png"
    save(figure(), path)
    return path


def draw_of_model(figure: object, run: Path, folder: Path) -> Path:
    """Draw one of OF_A_MODEL into a folder; returns the file's path."""
    if figure is plots.growing_text:
        figure(run, folder / "growing_text.gif")
        return folder / "growing_text.gif"
    path = folder / f"{figure.__name__}.png"
    save(figure(run), path)
    return path


def record(figure: object) -> dict[str, object]:
    """How a figure of README was made."""
    return {
        "what": figure.__doc__.splitlines()[0],
        "command": f"python -m visuals.draw {figure.__name__}",
        "shows": OF_README[figure],
        "versions": {"torch": torch.__version__, "matplotlib": matplotlib.__version__},
    }


def main(arguments: argparse.Namespace) -> None:
    """Draw what was asked for, and say where it is."""
    figures = {figure.__name__: figure for figure in (*OF_README, *OF_A_MODEL)}
    names = arguments.names or [f.__name__ for f in (OF_A_MODEL if arguments.run else OF_README)]
    unknown = set(names) - set(figures)
    if unknown:
        raise UserError(f"no figure {min(unknown)}: expected some of {', '.join(figures)}")
    records = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {}
    run = arguments.run or RUN
    for name in names:
        if figures[name] in OF_README:
            path = draw_for_readme(figures[name], FOLDER)
            records[path.name] = record(figures[name])
            RECORD.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        else:
            plots.load_story(run)  # is there a model?
            (run / "figures").mkdir(exist_ok=True)
            path = draw_of_model(figures[name], run, run / "figures")
        print(path)


if __name__ == "__main__":
    sys.exit(run_script(main, ARGUMENTS))

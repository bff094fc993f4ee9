"""recipe.py: real small trainings, and what is told of them."""

from __future__ import annotations

import json

import pytest
from conftest import ROOT

import recipe
from config import make_config
from errors import UserError


def run_of(name: str, seed: int, losses: list[float]) -> dict:
    """A training of 30 steps, as results/recipe.json tells it."""
    return {
        "candidate": name,
        "rate": 0.1,
        "seed": seed,
        "steps": [10, 20, 30],
        "losses": losses,
    }


CONTENT = {
    "candidates": {"nanogpt": {"meaning": "the old way"}, "muon": {"meaning": "the new way"}},
    "step_seconds": {"nanogpt": 2.0, "muon": 3.0},
    "runs": [
        *(run_of("nanogpt", seed, [8.0, 6.0, 3.9 + seed / 20]) for seed in (1, 2, 3)),
        *(run_of("muon", seed, [6.0, 3.0, 2.0]) for seed in (1, 2, 3)),
        run_of("muon", 1, [9.0, 9.0, 9.0]) | {"rate": 0.2},  # tried, and not chosen
    ],
}


def test_the_table_tells_loss_spread_and_how_soon_the_baselines_loss_is_reached(capsys):
    """Muon's mean falls from 6 to 3 between steps 10 and 20, so it has 4 after 16⅔ of 30 steps."""
    recipe.print_rows(CONTENT)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == "the old way 0.1 4.000 3.950 … 4.050 100% 100%".split()
    assert lines[2].split() == "the new way 0.1 2.000 2.000 … 2.000 56% 83%".split()
    assert len(lines) == 3


def test_a_loss_that_is_never_reached_takes_no_steps():
    assert recipe.steps_to([(10, 5.0), (20, 4.0)], 3.9) is None
    assert recipe.steps_to([(10, 5.0), (20, 4.0)], 4.0) == 20


@pytest.mark.parametrize("name", recipe.CANDIDATES)
def test_every_candidate_is_a_valid_config_with_its_own_schedule(name):
    candidate = recipe.CANDIDATES[name]
    values = candidate.values(ROOT / "configs" / "recipe.toml", candidate.rates[1], seed=2)
    config = make_config(values)
    section, key = candidate.tuned.split(".")
    assert getattr(getattr(config, section), key) == candidate.rates[1]
    assert config.optim.min_learning_rate == candidate.floor * config.optim.learning_rate
    assert config.train.seed == 2


def test_trainings_are_done_once_and_kept(tiny, shards, tmp_path, monkeypatch, capsys):
    path = tmp_path / "tiny.toml"
    path.write_text(f'{tiny.read_text()}\n[data]\ndir = "{shards}"\n')
    monkeypatch.setattr(recipe, "SEEDS", (1, 2))
    quick = recipe.changed(recipe.ADAMW, "quick", {}, rates=(0.001,))
    monkeypatch.setattr(recipe, "CANDIDATES", {"nanogpt": quick})
    words = ["--config", path, "--results", tmp_path / "found.json", "--out", tmp_path / "out"]
    arguments = recipe.parse_arguments([str(word) for word in (*words, "--jobs", 2)])
    recipe.main(arguments)
    content = json.loads((tmp_path / "found.json").read_text())
    assert sorted(run["seed"] for run in content["runs"]) == [1, 2]
    assert all(run["losses"][-1] < run["losses"][0] for run in content["runs"])
    assert content["step_seconds"]["nanogpt"] > 0
    assert "100%" in capsys.readouterr().out
    monkeypatch.setattr(recipe, "train", lambda *_: pytest.fail("it has been done"))
    recipe.main(arguments)


def test_an_unknown_candidate_and_a_damaged_file_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="--only sgd: expected some of nanogpt, "):
        recipe.main(recipe.parse_arguments(["--only", "sgd"]))
    (tmp_path / "found.json").write_text("{")
    with pytest.raises(UserError, match="can't read .*found.json"):
        recipe.Found(tmp_path / "found.json")

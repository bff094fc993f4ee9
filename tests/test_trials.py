"""What trainings come to: means over seeds, spread, and how soon a loss is reached."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from benchmarks.trials import Candidate, Found, Run, print_rows, rows_of, shares, steps_to

STEPS, ON = (10, 20, 30), ("a CPU", "2.13.0", "0123abc")


def candidate(meaning: str) -> Candidate:
    return Candidate(meaning, {}, "optim.learning_rate", (0.1, 0.2))


def found(runs: list[Run]) -> Found:
    """As results/recipe.json tells it."""
    names = {"nanogpt": candidate("the old way"), "muon": candidate("the new way")}
    ratios = {"nanogpt": 1.0, "muon": 1.5}
    return Found("…", "2026-11-26", ON[0], {}, {}, "", names, 2.0, ratios, tuple(runs))


ALL = [
    *(Run("nanogpt", 0.1, seed, STEPS, (8.0, 6.0, 3.9 + seed / 20), *ON) for seed in (1, 2, 3)),
    Run("muon", 0.1, 1, STEPS, (1.0, 9.0, 9.0), *ON),  # tried, and not chosen
    *(Run("muon", 0.2, seed, STEPS, (6.0, 3.0, 2.0), *ON) for seed in (3, 1, 2)),
]


def printed(capsys) -> list[list[str]]:
    return [line.split() for line in capsys.readouterr().out.splitlines()[1:]]


def test_the_table_tells_loss_spread_and_how_soon_the_baselines_loss_is_reached(capsys):
    """Muon's mean falls from 6 to 3 between steps 10 and 20, so it has 4 after 16⅔ of 30 steps."""
    print_rows(found(ALL))
    assert printed(capsys) == [
        "the old way 0.1 4.000 3.950 … 4.050 3 100% 100%".split(),
        "the new way 0.2 2.000 2.000 … 2.000 3 56% 83%".split(),
    ]


def test_a_candidate_that_was_tried_with_one_seed_has_its_row_too(capsys):
    print_rows(found([*ALL[:3], Run("muon", 0.1, 1, STEPS, (9.5, 9.1, 9.0), *ON)]))
    assert printed(capsys)[1] == "the new way 0.1 9.000 9.000 … 9.000 1".split()
    print_rows(replace(found(ALL[:3]), step_ratios={}))
    assert printed(capsys) == ["the old way 0.1 4.000 3.950 … 4.050 3".split()]


def test_shares_are_of_the_baselines_steps_whatever_a_candidates_are():
    rows = rows_of(found(ALL))
    shorter = [replace(run, steps=(5, 10, 15)) for run in rows["muon"].runs]
    tokens, seconds = shares(replace(rows["muon"], runs=shorter), rows["nanogpt"], 1.5)
    assert tokens == pytest.approx(25 / 3 / 30) and seconds == pytest.approx(1.5 * tokens)


def test_shares_are_of_a_baseline_with_the_same_seeds():
    """Seed 3 of the baseline ends at 4.05, and muon's comes there after 16.5 steps."""
    rows = rows_of(found(ALL))
    third = replace(rows["muon"], runs=[run for run in rows["muon"].runs if run.seed == 3])
    assert shares(third, rows["nanogpt"], 1.0)[0] == pytest.approx(16.5 / 30)


def test_a_loss_that_is_never_reached_takes_no_steps():
    assert steps_to([(10, 5.0), (20, 4.0)], 3.9) is None
    assert steps_to([(10, 5.0), (20, 4.0)], 4.0) == 20


def test_a_loss_that_the_first_validation_has_already_took_no_longer_than_that():
    assert steps_to([(10, 5.0), (20, 4.0)], 5.5) == 10
    assert steps_to([(10, math.inf), (20, 4.0), (30, 2.0)], 3.0) == 25
    assert steps_to([(10, math.inf), (20, 4.0)], 4.5) == 20


def test_the_rate_that_ends_lowest_with_the_first_seed_is_chosen():
    """Not the one that begins lowest, nor one that is lower with another seed, nor none at all."""
    runs = [*ALL, Run("muon", 0.3, 2, STEPS, (1.0, 1.0, 1.0), *ON)]
    assert found(runs).best_rate("muon") == 0.2
    runs = [Run("muon", 0.1, 1, STEPS, (1.0, None, None), *ON), *ALL[4:]]
    assert found(runs).best_rate("muon") == 0.2

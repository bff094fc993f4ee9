"""recipe.py: real small trainings, and what is told of them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import as_completed
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pytest
import torch
from conftest import ROOT
from forked import run_forked

import recipe
from benchmarks.trials import Run
from common.errors import UserError
from common.reports import commit
from config import Config, make_config, read_toml

ON = ("a CPU", "2.13.0", "0123abc")


@pytest.mark.parametrize("name", recipe.CANDIDATES)
def test_every_candidate_is_a_valid_config_with_its_own_schedule(name):
    candidate = recipe.CANDIDATES[name]
    values = candidate.values(ROOT / "configs" / "recipe.toml", candidate.rates[1], seed=2)
    config = make_config(values)
    section, key = candidate.tuned.split(".")
    assert getattr(getattr(config, section), key) == candidate.rates[1]
    assert config.optim.min_learning_rate == candidate.floor * config.optim.learning_rate
    assert config.train.seed == 2


def test_the_candidates_are_what_they_are_called():
    told = {}
    for name, way in recipe.CANDIDATES.items():
        config = make_config(way.values(ROOT / "configs" / "recipe.toml", 0.01, seed=1))
        optim = config.optim
        floor = optim.min_learning_rate / optim.learning_rate
        told[name] = (optim.name, optim.schedule, floor, optim.warmup_steps, optim.beta2)
        told[name] += (optim.decay_steps,) if optim.decay_steps else ()
        told[name] += (optim.average_share,) if optim.average_share else ()
        told[name] += ("mask",) if config.data.document_mask else ()
    assert told == {
        "nanogpt": ("adamw", "cosine", 0.1, 100, 0.99),
        "adamw_linear": ("adamw", "linear", 0.0, 100, 0.99),
        "muon": ("muon", "cosine", 0.1, 20, 0.95),
        "muon_linear": ("muon", "linear", 0.0, 20, 0.95),
        "muon_wsd": ("muon", "linear", 0.0, 20, 0.95, 160),
        "muon_ema": ("muon", "cosine", 1.0, 20, 0.95, 0.1),
        "documents": ("muon", "linear", 0.0, 20, 0.95, "mask"),
    }


def run_soon(
    command: list, env: dict, stdout: IO, stderr: IO, check: bool
) -> subprocess.CompletedProcess:
    """As subprocess.run runs a training, but forked, with as many threads as all tests have."""
    assert command[0] == sys.executable and stderr is stdout and not check
    files = [Path(os.devnull), Path(stdout.name), Path(stdout.name)]
    status = run_forked([str(word) for word in command[1:]], ROOT, env, files, timeout=900)
    return subprocess.CompletedProcess(command, status)


@pytest.fixture
def begin(tiny, shards, tmp_path, monkeypatch):
    """begin(...): what recipe.main takes, for tiny trainings with two seeds, of one candidate."""
    path = tmp_path / "tiny.toml"
    path.write_text(f'{tiny.read_text()}\n[data]\ndir = "{shards}"\n')
    monkeypatch.setattr(recipe, "SEEDS", (1, 2))
    quick = replace(recipe.ADAMW, meaning="quick", rates=(0.001,))
    monkeypatch.setattr(recipe, "CANDIDATES", {"nanogpt": quick})
    monkeypatch.setattr(recipe, "subprocess", SimpleNamespace(run=run_soon))

    def make(*more: object):
        jobs = os.cpu_count() or 1  # a thread for each, so that waiting ones take no core
        words = ["--config", path, "--out", tmp_path / "out", "--jobs", jobs]
        return recipe.parse_arguments([str(word) for word in (*words, *more)])

    return make


def set_steps(config: Path, steps: int) -> None:
    """Let a training have so many steps."""
    config.write_text(config.read_text().replace("max_steps = 40", f"max_steps = {steps}"))


@pytest.fixture
def untrained(monkeypatch) -> None:
    """No training takes place, and each has found something."""

    def train(name: str, rate: float, seed: int, arguments: object) -> Run:
        return Run(name, rate, seed, (20, 40), (5.0, 4.0), *ON)

    monkeypatch.setattr(recipe, "train", train)


def test_trainings_are_done_once_and_kept(begin, tmp_path, monkeypatch, capsys):
    recipe.main(begin())
    kept = recipe.load_found(tmp_path / "out" / "found.json")
    assert sorted(run.seed for run in kept.runs) == [1, 2]
    assert all(run.steps == (20, 40) and run.losses[1] < run.losses[0] for run in kept.runs)
    assert kept.step_seconds > 0 and kept.step_ratios == {"nanogpt": 1.0}
    assert kept.timed_commit == commit(ROOT)
    assert (kept.runs[0].torch, kept.runs[0].commit) == (torch.__version__, commit(ROOT))
    for run in kept.runs:  # by train.py, from its own settings
        config = read_toml(tmp_path / "out" / f"nanogpt_0.001_{run.seed}" / "config.toml")
        optim = config["optim"]
        assert (optim["learning_rate"], optim["beta2"], optim["warmup_steps"]) == (0.001, 0.99, 100)
        assert config["train"]["seed"] == run.seed
    assert kept.runs[0].losses != kept.runs[1].losses
    assert "100%" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("*/checkpoints"))
    monkeypatch.setattr(recipe, "train", lambda *_: pytest.fail("it has been done"))
    recipe.main(begin())
    assert recipe.load_found(tmp_path / "out" / "found.json").runs == kept.runs


@pytest.mark.parametrize(("kind", "told"), [("cpu", "2 × EPYC"), ("cuda", "H200, 2 × EPYC")])
def test_a_run_tells_the_gpu_that_it_ran_on_if_there_was_one(monkeypatch, kind, told):
    monkeypatch.setattr(recipe, "choose_device", lambda _: torch.device(kind))
    monkeypatch.setattr(recipe, "device_name", lambda _: "H200")
    monkeypatch.setattr(recipe, "hardware", lambda: "2 × EPYC")
    assert recipe.machine() == told


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("changes", [{"settings": {"optim.beta2": 0.5}}, {"floor": 0.5}])
def test_a_candidate_of_the_same_name_is_not_mixed_in(begin, tmp_path, monkeypatch, changes):
    recipe.main(begin())
    other = replace(recipe.CANDIDATES["nanogpt"], **changes)
    monkeypatch.setitem(recipe.CANDIDATES, "nanogpt", other)
    with pytest.raises(UserError, match="found.json tells of another nanogpt: choose another"):
        recipe.main(begin())


@pytest.mark.usefixtures("untrained")
def test_another_config_is_not_mixed_in(begin, tmp_path):
    recipe.main(begin())
    set_steps(begin().config, 60)
    with pytest.raises(UserError, match="found.json tells of another config: choose another"):
        recipe.main(begin())


def test_a_training_that_was_broken_off_does_not_go_on_with_another_config(begin, monkeypatch):
    def train(*_: object) -> Run:
        raise UserError("broken off")

    monkeypatch.setattr(recipe, "train", train)
    with pytest.raises(UserError, match="broken off"):
        recipe.main(begin())
    set_steps(begin().config, 60)
    with pytest.raises(UserError, match="found.json tells of another config: choose another"):
        recipe.main(begin())


@pytest.mark.usefixtures("untrained")
def test_another_text_is_not_mixed_in(begin, shards, tmp_path):
    """Under the same name."""
    shutil.copytree(shards, tmp_path / "data")
    config = begin().config
    config.write_text(config.read_text().replace(str(shards), str(tmp_path / "data")))
    recipe.main(begin())
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    manifest["shards"].pop()
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="found.json tells of other text than .*/data has: choose"):
        recipe.main(begin())


def test_steps_are_timed_against_the_baselines_of_the_same_round(begin, tmp_path, monkeypatch):
    """All that the file has are timed anew, on one machine."""
    quick = recipe.CANDIDATES["nanogpt"]
    monkeypatch.setattr(recipe, "train", lambda *training: Run(*training[:3], (40,), (4.0,), *ON))
    turns = {"nanogpt": [1.0, 2.0, 4.0], "slow": [2.0, 6.0, 8.0]}  # 2, 3 and 2 times as long
    monkeypatch.setattr(recipe, "measure_steps", lambda names, _: {n: turns[n] for n in names})
    monkeypatch.setitem(recipe.CANDIDATES, "slow", replace(quick, meaning="slow"))
    recipe.main(begin())
    kept = recipe.load_found(tmp_path / "out" / "found.json")
    assert (kept.step_seconds, kept.step_ratios) == (2.0, {"nanogpt": 1.0, "slow": 2.0})
    turns["slow"] = [7.0, 14.0, 28.0]
    recipe.main(begin("--only", "nanogpt"))
    assert recipe.load_found(tmp_path / "out" / "found.json").step_ratios["slow"] == 7.0


def test_the_steps_that_are_timed_are_each_candidates_and_have_been_done(begin, monkeypatch):
    """Their numbers are asked for before the clock is: a GPU may still be at work."""
    now, told = [0.0], []

    class Slow:
        """Instead of a Stepper: a step takes its candidate's rate in seconds, once waited for."""

        def __init__(self, config: Config, *_: object) -> None:
            self.rate = config.optim.learning_rate
            self.compiling = 100.0  # seconds, in the first step
            told.append((config.optim.beta2, self.rate))

        def take(self, step: int) -> Slow:
            now[0] += self.compiling
            self.compiling = 0.0
            return self

        @property
        def loss(self) -> float:
            now[0] += 4 * self.rate
            return 5.0

    monkeypatch.setattr(recipe, "make_stepper", Slow)
    monkeypatch.setattr(recipe.time, "perf_counter", lambda: now[0])
    quick = recipe.CANDIDATES["nanogpt"]
    slow = recipe.changed(quick, "slow", {"optim.beta2": 0.5}, rates=(2.0,))
    monkeypatch.setitem(recipe.CANDIDATES, "slow", slow)
    turns = recipe.measure_steps(["nanogpt", "slow"], begin().config, rounds=2, steps=4)
    assert told == [(0.99, 0.001), (0.5, 2.0)]
    assert turns == {"nanogpt": pytest.approx([0.001] * 2), "slow": pytest.approx([2.0] * 2)}


def test_a_training_that_fails_costs_no_other(begin, tmp_path, monkeypatch):
    """What is done is kept, and what hasn't begun doesn't begin."""
    begun = []

    def train(name: str, rate: float, seed: int, arguments: object) -> Run:
        begun.append(rate)
        time.sleep(0.1 * len(begun))
        if rate == 2.0:
            raise UserError("a training failed")
        return Run(name, rate, seed, (20, 40), (5.0, 4.0), *ON)

    monkeypatch.setattr(recipe, "train", train)
    rates = tuple(float(rate) for rate in range(1, 12))
    monkeypatch.setitem(
        recipe.CANDIDATES, "nanogpt", replace(recipe.CANDIDATES["nanogpt"], rates=rates)
    )
    with pytest.raises(UserError, match="a training failed"):
        recipe.main(begin("--jobs", 2))
    kept = recipe.load_found(tmp_path / "out" / "found.json")
    assert [run.rate for run in kept.runs] == [rate for rate in begun if rate != 2.0]
    assert len(begun) <= 4


def test_a_rate_that_ruins_the_weights_is_a_finding_and_ends_nothing(begin, tmp_path, monkeypatch):
    quick = replace(recipe.CANDIDATES["nanogpt"], rates=(1e30, 0.001))
    monkeypatch.setitem(recipe.CANDIDATES, "nanogpt", quick)
    monkeypatch.setattr(recipe, "SEEDS", (1,))
    arguments = begin()
    set_steps(arguments.config, 4)
    recipe.main(arguments)
    kept = recipe.load_found(tmp_path / "out" / "found.json")
    assert kept.run("nanogpt", 1e30, 1).losses[-1] is None
    assert kept.best_rate("nanogpt") == 0.001


def test_trainings_at_a_time_share_the_cores(begin, monkeypatch):
    asked = []

    def run(command: list, env: dict[str, str], **_: object) -> subprocess.CompletedProcess:
        asked.append(env["OMP_NUM_THREADS"])
        return subprocess.CompletedProcess(command, returncode=1)

    monkeypatch.setattr(recipe.subprocess, "run", run)
    monkeypatch.setattr(recipe.os, "cpu_count", lambda: 8)
    for jobs in (1, 3, 20):
        with pytest.raises(UserError, match="a training failed"):
            recipe.train("nanogpt", 1e-3, 1, begin("--jobs", jobs))
    assert asked == ["8", "2", "1"]


def test_a_log_that_cannot_be_written_is_one_line(begin, tmp_path):
    arguments = begin()
    (arguments.out / "nanogpt_0.001_1" / "log.txt").mkdir(parents=True)
    with pytest.raises(UserError, match="can't write .*nanogpt_0.001_1: Is a directory"):
        recipe.train("nanogpt", 1e-3, 1, arguments)


def test_checkpoints_that_cannot_be_removed_are_one_line(begin, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    arguments = begin()
    set_steps(arguments.config, 1)
    monkeypatch.setattr(recipe, "shutil", SimpleNamespace(rmtree=refuse))
    with pytest.raises(UserError, match="can't remove .*checkpoints: Input/output error"):
        recipe.train("nanogpt", 1e-3, 1, arguments)


@pytest.mark.parametrize("disk_is_full", [False, True])
def test_after_a_training_that_fails_no_other_begins(begin, monkeypatch, disk_is_full):
    """Not even by the thread that is free for it before the main one has heard."""
    begun = []

    def train(name: str, rate: float, seed: int, arguments: object) -> Run:
        begun.append(rate)
        if disk_is_full:
            return Run(name, rate, seed, (20, 40), (5.0, 4.0), *ON)
        raise UserError("a training failed")

    def refuse(*_: object) -> None:
        if begun:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def hear_late(futures: list) -> Iterator:
        time.sleep(0.5)
        return as_completed(futures)

    monkeypatch.setattr(recipe, "train", train)
    monkeypatch.setattr(recipe, "as_completed", hear_late)
    rates = tuple(float(rate) for rate in range(1, 12))
    quick = replace(recipe.CANDIDATES["nanogpt"], rates=rates)
    monkeypatch.setitem(recipe.CANDIDATES, "nanogpt", quick)
    if disk_is_full:
        monkeypatch.setattr("benchmarks.trials.write_atomically", refuse)
    full = "can't write .*found.json: No space left on device; free some space"
    with pytest.raises(UserError, match=full if disk_is_full else "a training failed"):
        recipe.main(begin("--jobs", 1))
    assert begun == [1.0]


def test_ctrl_c_ends_it_at_once_with_a_checkpoint_to_go_on_from(begin, tmp_path):
    """As a terminal sends it: to the trainings as well."""
    arguments = begin()
    set_steps(arguments.config, 100_000)
    words = ["--config", arguments.config, "--out", arguments.out]
    process = subprocess.Popen(
        [sys.executable, ROOT / "recipe.py", *words, "--only", "nanogpt"],
        env={**os.environ, "OMP_THREAD_LIMIT": "1"},  # recipe.py gives a single training all
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    metrics = arguments.out / "nanogpt_0.00025_1" / "metrics.jsonl"
    try:
        while not (metrics.exists() and metrics.stat().st_size):
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(30) == 130
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    names = {path.name for path in arguments.out.iterdir()}
    assert names == {"found.json", "nanogpt_0.00025_1"}
    assert list((arguments.out / "nanogpt_0.00025_1" / "checkpoints").iterdir())


def damaged(text: str):
    def put(arguments: object) -> None:
        arguments.out.mkdir()
        (arguments.out / "found.json").write_text(text)

    return put


@pytest.mark.parametrize(
    ("words", "prepare", "complaint"),
    [
        (["--only", "sgd"], None, "--only sgd: expected some of nanogpt"),
        ([], damaged("{"), "can't read .*found.json"),
        ([], damaged("[1]"), "can't read .*found.json: expected an object"),
        ([], damaged('{"runs": 3}'), "can't read .*found.json: found lacks command"),
        ([], lambda arguments: arguments.out.write_text(""), "can't write .*out: File exists"),
        (["--out", "README.md/x"], None, "can't .*README.md/x.*: Not a directory"),
        (
            [],
            lambda arguments: arguments.config.write_text("[log]\neval_every = 0\n"),
            "log.eval_every = 0",
        ),
    ],
)
def test_wrong_input_is_one_line(begin, monkeypatch, words, prepare, complaint):
    monkeypatch.chdir(ROOT)
    arguments = begin(*words)
    if prepare:
        prepare(arguments)
    with pytest.raises(UserError, match=complaint):
        recipe.main(arguments)


def test_the_file_that_is_kept_is_one_that_can_be_read():
    kept = recipe.load_found(ROOT / "results" / "recipe.json")
    tried = {(run.candidate, run.rate) for run in kept.runs if run.seed == 1}
    assert tried == {(name, rate) for name, way in kept.candidates.items() for rate in way.rates}
    for name in set(kept.candidates) & set(recipe.CANDIDATES):
        assert kept.candidates[name] == recipe.CANDIDATES[name]

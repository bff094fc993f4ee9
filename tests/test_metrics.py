"""metrics.jsonl, TensorBoard, Weights & Biases, and the speed that they tell."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import metrics_of

import train
from common.device import Moment
from common.errors import UserError
from distributed import Ranks
from step import Stepper
from training.metrics import Metrics, Speed, read_losses

ALONE = Ranks(torch.device("cpu"))


def test_metrics_tell_every_step_once_and_the_model_learns(trained):
    lines = metrics_of(trained)
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert [line["tokens"] for line in lines] == [512 * step for step in range(1, 41)]
    assert abs(lines[0]["loss"] - math.log(300)) < 0.5
    assert lines[-1]["loss"] < lines[0]["loss"] - 1
    keys = ["kind", "step", "loss", "learning_rate", "grad_norm", "tokens"]
    assert list(lines[0])[:6] == keys
    assert lines[0]["mfu"] is None  # nobody knows this CPU's peak
    assert 1e8 < lines[0]["peak_memory"] <= lines[-1]["peak_memory"] < 1e10


def test_the_speed_that_is_told_is_that_of_the_step_it_is_told_for(configure, monkeypatch):
    config = configure("--train.max_steps", 4, "--log.log_every", 1, "--log.eval_every", 2)
    trainer = train.Trainer(config, ALONE)
    step = trainer.train_step

    def slow_step():
        time.sleep(0.1)
        return step()

    monkeypatch.setattr(trainer, "train_step", slow_step)
    with trainer.folder.owned():
        trainer.run()
    speeds = [line["tokens_per_second"] for line in metrics_of(trainer.folder.path)]
    assert len(speeds) == 4
    assert max(speeds) < config.train.tokens_per_step / 0.1


def test_speed_is_that_of_steps_whenever_they_are_looked_at_and_whatever_comes_between(
    configure, monkeypatch
):
    """By a clock of our own: a step takes a second, to look at it 0.3, what is due after it 100.

    A CPU begins with a step when it has looked at the last.
    """
    now = 0.0

    def passes(seconds: float, function: Callable) -> Callable:
        def call(*arguments: object, **options: object) -> object:
            nonlocal now
            now += seconds
            return function(*arguments, **options)

        return call

    monkeypatch.setattr("common.device.time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(Stepper, "update", passes(1, Stepper.update))
    monkeypatch.setattr(train.Trainer, "count_skipped", passes(0.3, train.Trainer.count_skipped))
    monkeypatch.setattr(train.Trainer, "validate", passes(100, train.Trainer.validate))
    monkeypatch.setattr(train.Trainer, "save", passes(100, train.Trainer.save))
    config = configure("--train.max_steps", 6, "--log.eval_every", 2, "--train.checkpoint_every", 3)
    train.train(config)
    rates = [line["tokens_per_second"] for line in metrics_of(Path(config.train.out))]
    assert rates == pytest.approx([512] + [512 / 1.3] * 5)


def test_tensorboard_shows_the_metrics(call, tiny, shards, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "run"
    arguments = ("--train.max_steps", 3, "--log.tensorboard", "true")
    call("train", tiny, "--data.dir", shards, "--train.out", out, *arguments)
    reader = events.EventAccumulator(str(out / "tensorboard"))
    reader.Reload()
    told = [event.value for event in reader.Scalars("train/loss")]
    assert told == pytest.approx([line["loss"] for line in metrics_of(out)])


def test_tensorboard_has_each_line_when_it_is_told(configure, tmp_path, monkeypatch):
    """It writes in a thread of its own, which ends with the process, however that ends."""
    board = mock.Mock()
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", lambda *_, **__: board)
    (tmp_path / "run").mkdir()
    Metrics(configure("--log.tensorboard", "true"), 0).write("train", 1, {"loss": 2.5})
    assert board.mock_calls == [mock.call.add_scalar("train/loss", 2.5, 1), mock.call.flush()]


def test_the_losses_that_a_run_told_are_read_back(tmp_path):
    lines = ['{"kind": "train", "step": 1, "loss": 5.0, "tokens": 512}']
    lines += ['{"kind": "skip", "step": 1}', '{"kind": "lambada", "step": 2, "acc": 0.5}', "[]"]
    lines += ['{"kind": "val", "step": 2, "loss": null}', '{"kind": "train", "st']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    first, second = ("train", 1, 5.0), ("val", 2, None)
    assert [tuple(line.values()) for line in read_losses(tmp_path)] == [first, second]
    with pytest.raises(UserError, match="nowhere has no metrics.jsonl: expected the folder of a"):
        read_losses(tmp_path / "nowhere")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is full")
def test_metrics_that_find_no_room_are_one_line(configure):
    trainer = train.Trainer(configure("--train.max_steps", 2), ALONE)
    with trainer.folder.owned():
        metrics = trainer.folder.prepare(trainer.tokenizer, trainer.step)
        metrics.path = Path("/dev/full")
        metrics.file = metrics.path.open("a")
        with pytest.raises(train.UserError, match="can't write /dev/full: No space left on device"):
            metrics.write("train", 1, {"loss": 1.0})


def test_metrics_that_a_crash_left_odd_are_mended(call, tiny, shards, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    lines = tmp_path / "run" / "metrics.jsonl"
    lines.write_bytes(b'{"step": "a"}\n\xff\x00\n' + lines.read_bytes() + b'{"kind": "tra')
    arguments = ("--data.dir", shards, "--train.out", tmp_path / "run", "--train.max_steps", 41)
    assert call("train", tiny, *arguments).status == 0
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == list(range(1, 42))


def test_a_package_that_was_asked_for_and_is_missing_is_named(call, tiny, shards, tmp_path):
    pytest.importorskip("torch")
    try:
        import wandb  # noqa: F401
    except ImportError:
        arguments = ("--data.dir", shards, "--train.out", tmp_path / "run", "--log.wandb", "x")
        assert (
            "wandb is not installed: pip install wandb" in call("train", tiny, *arguments).error()
        )
    else:
        pytest.skip("wandb is installed")


def test_each_start_from_nothing_is_a_run_of_its_own_at_weights_and_biases(
    configure, monkeypatch, tmp_path
):
    """And one that goes on is the same run there."""
    begun = []

    def init(**settings: object) -> SimpleNamespace:
        begun.append(settings)
        return SimpleNamespace(log=lambda numbers, step: None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    config = configure("--log.wandb", "project", "--train.max_steps", 1)
    train.train(config)
    train.train(replace(config, train=replace(config.train, max_steps=2)))
    shutil.rmtree(tmp_path / "run")
    train.train(config)
    first, on, anew = (settings.pop("id") for settings in begun)
    assert first == on != anew
    assert {(s["project"], s["name"], s["resume"]) for s in begun} == {("project", "run", "allow")}
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    train.train(configure("--train.max_steps", 1))  # without, and from now on with
    train.train(replace(config, train=replace(config.train, max_steps=2)))
    shutil.rmtree(tmp_path / "run")
    train.train(configure("--train.max_steps", 1))
    train.train(replace(config, train=replace(config.train, max_steps=2)))
    assert len({first, anew, *(settings.pop("id") for settings in begun[3:])}) == 4


def test_tensorboard_has_each_step_once_however_the_run_went_on(configure, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def steps() -> list[int]:
        board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
        board.Reload()
        return [event.step for event in board.Scalars("train/loss")]

    settings = ("--log.tensorboard", "true", "--train.checkpoint_every", 2, "--log.eval_every", 0)
    train.train(configure(*settings, "--train.max_steps", 5))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000005")
    train.train(configure(*settings, "--train.max_steps", 6))
    assert steps() == [1, 2, 3, 4, 5, 6]
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    train.train(configure(*settings, "--train.max_steps", 2))
    assert steps() == [1, 2]


def no_library() -> None:
    raise ImportError("libfoo.so is missing")


@pytest.mark.parametrize(
    ("package", "told"),
    [
        (ModuleType("wandb"), "wandb is not installed"),  # the folder `wandb` that a run has left
        (SimpleNamespace(init=lambda **_: 1 / 0), "log.wandb: division by zero"),
        (SimpleNamespace(init=lambda **_: no_library()), "log.wandb: libfoo.so is missing"),
    ],
)
def test_weights_and_biases_that_cannot_begin_are_one_line(configure, monkeypatch, package, told):
    monkeypatch.setitem(sys.modules, "wandb", package)
    with pytest.raises(UserError, match=told):
        train.train(configure("--log.wandb", "project"))


@pytest.mark.parametrize("content", [None, b"\xff"])
def test_an_id_at_weights_and_biases_that_cannot_be_read_is_named(configure, monkeypatch, content):
    """A folder, for one; the run has been begun by then."""
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=None))
    train.train(configure("--train.max_steps", 1))
    config = configure("--log.wandb", "project")
    path = Path(config.train.out) / "wandb_id"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=f"can't read {path}: "):
        train.train(config)


def test_a_viewer_that_fails_costs_the_run_nothing(configure, monkeypatch, tmp_path, capsys):
    steps = []

    def log(numbers: dict[str, float], step: int) -> None:
        steps.append(step)
        if step == 2:
            raise OSError("the line\nis dead")

    run = SimpleNamespace(log=log, finish=lambda: steps.append("finished"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run))
    train.train(configure("--log.wandb", "project", "--train.max_steps", 4))
    assert steps == [1, 2]
    assert capsys.readouterr().err.count("log.wandb gets no more numbers: the line is dead") == 1
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_viewer_that_cannot_be_closed_costs_the_run_nothing(configure, monkeypatch, capsys):
    run = SimpleNamespace(log=lambda numbers, step: None, finish=lambda: 1 / 0)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run))
    train.train(configure("--log.wandb", "project", "--train.max_steps", 1))
    told = capsys.readouterr().err
    assert "log.wandb gets no more numbers: division by zero" in told and "\ndone: " in told


def test_the_share_of_the_peak_is_that_of_all_gpus(monkeypatch):
    monkeypatch.setattr("training.metrics.peak_flops", lambda device: 1e12)
    speed = Speed(0, 10**9, replace(ALONE, world_size=2))
    rate, mfu = speed.measure(1000, Moment(ALONE.device))
    assert mfu == pytest.approx(rate * 1e9 / 2e12)

"""What a run keeps, who may write in its folder, and what if it can't be written."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import files_of, metrics_of

import train
from config import load_config
from distributed import Ranks
from shards import VOCABULARY
from tokenizer import gpt2_encoding, save_vocabulary

ALONE = Ranks(torch.device("cpu"))


def test_a_run_leaves_its_settings_vocabulary_metrics_and_checkpoints(trained, shards):
    names = sorted(path.name for path in trained.iterdir())
    assert names == ["checkpoints", "config.toml", "lock", "metrics.jsonl", "tokenizer.tiktoken"]
    steps = sorted(path.name for path in (trained / "checkpoints").iterdir())
    assert steps == ["step_000020", "step_000040"]
    vocabulary = (shards / "tokenizer.tiktoken").read_bytes()
    assert (trained / "tokenizer.tiktoken").read_bytes() == vocabulary
    again = load_config([str(trained / "config.toml"), "--train.out", str(trained)])
    assert again.to_toml() == (trained / "config.toml").read_text()


def test_metrics_are_on_the_disk_before_the_checkpoint_after_them_is(configure, monkeypatch):
    """If the power failed in between, steps that aren't done again would be missing in them."""
    trainer = train.Trainer(configure("--train.max_steps", 4, "--train.checkpoint_every", 2), ALONE)
    path, synced, found = trainer.folder.path / "metrics.jsonl", {}, []
    fsync, rename = os.fsync, Path.rename

    def note_fsync(descriptor: int) -> None:
        fsync(descriptor)
        synced[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size

    def note_rename(self: Path, target: Path) -> Path:
        found.append((path.stat().st_size, synced[path.stat().st_ino]))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    with trainer.folder.owned():
        trainer.run()
    assert len(found) == 2
    assert all(there == on_disk > 0 for there, on_disk in found)


def test_metrics_that_do_not_reach_the_disk_are_one_line(configure, monkeypatch):
    trainer = train.Trainer(configure("--train.max_steps", 2), ALONE)

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with trainer.folder.owned():
        trainer.folder.prepare(trainer.tokenizer, trainer.step)
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(train.UserError, match="can't write .*metrics.jsonl: Input/output"):
            trainer.save(None)
    assert not list((trainer.folder.path / "checkpoints").iterdir())


def test_a_run_that_chose_its_checkpoint_before_another_saved_one_does_not_begin(configure):
    """It would go on from an old checkpoint, or from none, and cut the other's metrics off."""
    config = configure("--train.max_steps", 2, "--train.checkpoint_every", 1)
    first, second = (train.Trainer(config, ALONE) for _ in range(2))
    with first.folder.owned():
        first.run()
    before = files_of(first.folder.path)
    with pytest.raises(train.UserError, match="another run has saved .*: give the same command"):
        with second.folder.owned():
            second.run()
    assert files_of(first.folder.path) == before
    again = train.Trainer(config, ALONE)
    assert again.step == 2
    with again.folder.owned():
        again.run()


def test_two_runs_in_one_folder_do_not_meet(configure):
    first, second = (train.Trainer(configure(), ALONE) for _ in range(2))
    with first.folder.owned():
        with pytest.raises(train.UserError, match=r"process \d+ on .* is writing to"):
            with second.folder.owned():
                pass
    with second.folder.owned():
        pass


@pytest.mark.parametrize("begun_anew", [False, True])
def test_a_run_whose_folder_is_taken_away_ends_without_saving_elsewhere(
    configure, monkeypatch, begun_anew
):
    first = train.Trainer(configure("--train.max_steps", 2), ALONE)
    path = first.folder.path
    with first.folder.owned():
        metrics = first.folder.prepare(first.tokenizer, first.step)
        first.save(None)
        path.rename(path.with_name("moved"))
        with ExitStack() as stack:
            if begun_anew:
                monkeypatch.setattr(os, "getpid", lambda: 1)
                other = train.Trainer(configure("--train.max_steps", 2), ALONE)
                stack.enter_context(other.folder.owned())
                other.folder.prepare(other.tokenizer, other.step)
            for write in (partial(first.save, None), partial(first.folder.add_losses, 0, {})):
                with pytest.raises(train.UserError, match="isn't this run's folder any more"):
                    write()
            metrics.write("train", 1, {"loss": 7.0})
    assert not [*path.glob("checkpoints/step*")]
    assert metrics_of(path.with_name("moved")) == [{"kind": "train", "step": 1, "loss": 7.0}]
    assert not begun_anew or metrics_of(path) == []


def test_a_run_whose_lock_is_removed_saves_all_the_same(configure):
    trainer = train.Trainer(configure("--train.max_steps", 2), ALONE)
    with trainer.folder.owned():
        (trainer.folder.path / "lock").unlink()
        trainer.run()
    assert [*trainer.folder.path.glob("checkpoints/step_000002")]


def test_an_unwritable_run_folder_is_one_line(call, tiny, shards, tmp_path):
    (tmp_path / "file").touch()
    result = call("train", tiny, "--data.dir", shards, "--train.out", tmp_path / "file" / "run")
    assert "can't write to the run folder" in result.error()


def test_an_unwritable_folder_of_checkpoints_is_one_line_before_the_first_step(
    call, tiny, shards, tmp_path
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").touch()
    result = call("train", tiny, "--data.dir", shards, "--train.out", tmp_path / "run")
    assert f"can't save checkpoints in {tmp_path / 'run' / 'checkpoints'}: Not a" in result.error()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_vocabulary_of_an_earlier_run_does_not_stay_beside_other_weights(
    configure, shards, tmp_path
):
    """Shards without a vocabulary of their own have GPT-2's, and nothing is written of it."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for split in ("train", "val"):
        shutil.copy(shards / f"{split}_000000.bin", bare)
    ours = tmp_path / "run" / VOCABULARY
    train.train(configure("--train.max_steps", 1, "--log.eval_every", 0))
    assert ours.exists()
    changes = ("--data.dir", bare, "--log.eval_every", 0, "--train.max_steps")
    for right in (False, True):
        shutil.rmtree(tmp_path / "run" / "checkpoints")
        if right:
            save_vocabulary(gpt2_encoding(), ours)
        train.train(configure(*changes, 1))
        assert ours.exists() == right

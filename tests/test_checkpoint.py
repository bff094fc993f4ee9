"""Checkpoints: what is saved comes back, what is damaged is named, what is old goes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import as_nobody
from test_step import ALONE

import checkpoint
from checkpoint import (
    META,
    MODEL,
    OPTIMIZER,
    Meta,
    ScalerMemory,
    add_losses,
    check_can_save,
    checkpoints_in,
    find_checkpoint,
    newest_checkpoint,
    read_checkpoint,
    remove_old,
    save_checkpoint,
)
from common.errors import UserError
from config import OptimSettings
from model import GPT, GPTConfig
from optim import make_optimizer
from shards import TokenizerRecord

SMALL = GPTConfig(vocab_size=50, block_size=8, n_layer=2, n_head=2, n_embd=16)
META_1 = Meta(1, SMALL, TokenizerRecord("gpt2", 50_257, "0" * 64), {}, None, None, None, "data")


def trained(seed: int = 0, name: str = "adamw") -> tuple[GPT, torch.optim.Optimizer]:
    """A model and an optimizer that has something to remember."""
    torch.manual_seed(seed)
    model = GPT(SMALL)
    optimizer = make_optimizer(model, OptimSettings(name=name), ALONE)
    take_step(model, optimizer)
    return model, optimizer


def take_step(model: GPT, optimizer: torch.optim.Optimizer) -> None:
    ids = torch.arange(16).view(2, 8)
    model(ids, ids + 1).backward()
    optimizer.step()
    optimizer.zero_grad()


def save(
    folder: Path, step: int = 1, val_loss: float | None = None, keep: int = 9, **kept: object
) -> Path:
    """As a run does it: the checkpoint, then old ones go."""
    path = save_checkpoint(folder, replace(META_1, step=step, val_loss=val_loss), *trained())
    remove_old(path, keep, **kept)
    return path


def rewrite_meta(path: Path, change: Callable[[dict], None]) -> None:
    """Change meta.json as somebody could who knows its checksum."""
    meta = json.loads((path / META).read_bytes())
    del meta["checksum"]
    change(meta)
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
    (path / META).write_text(json.dumps({**meta, "checksum": digest}))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_resumed_model_and_optimizer_go_on_bit_for_bit(tmp_path, name):
    model, optimizer = trained(0, name)
    path = save_checkpoint(tmp_path, META_1, model, optimizer)
    again, optimizer_again = trained(1, name)
    read_checkpoint(path).load_model(again)
    checkpoint = read_checkpoint(path)
    checkpoint.load_optimizer(again, optimizer_again)
    maps = Path("/proc/self/maps")  # a file that is mapped keeps its room after it was removed
    assert not maps.exists() or str(path) not in maps.read_text()
    for _ in range(3):
        take_step(model, optimizer)
        take_step(again, optimizer_again)
    for (name, ours), theirs in zip(model.named_parameters(), again.parameters()):
        assert torch.equal(ours, theirs), name


def test_what_an_optimizer_remembers_goes_where_its_model_is_and_nowhere_else(tmp_path):
    """On a machine of eight GPUs the host has no room for eight copies."""
    path = save_checkpoint(tmp_path, META_1, *trained())
    model = GPT(SMALL).to("meta")
    optimizer, given = make_optimizer(model, OptimSettings(), ALONE), []
    optimizer.load_state_dict = given.append
    read_checkpoint(path).load_optimizer(model, optimizer)
    tensors = [tensor for kept in given[0]["state"].values() for tensor in kept.values()]
    assert len(tensors) == 3 * len([*model.parameters()])
    assert all(tensor.is_meta for tensor in tensors)


def test_a_model_is_made_without_drawing_weights(tmp_path):
    model, optimizer = trained()
    path = save_checkpoint(tmp_path, META_1, model, optimizer)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    made = read_checkpoint(path).make_model()
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(made.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_meta_comes_back_as_it_was_saved(tmp_path):
    scaler = ScalerMemory(2.0, 2.0, 0.5, 2000, 7)
    meta = replace(META_1, config={"train": {"seed": 3}}, val_loss=1 / 3, scaler=scaler)
    path = save_checkpoint(tmp_path, meta, *trained())
    assert read_checkpoint(path).meta == meta


def test_equal_states_make_equal_bytes(tmp_path):
    first, second = save(tmp_path / "a"), save(tmp_path / "b")
    for name in (MODEL, OPTIMIZER, META):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_the_newest_is_found_and_an_unfinished_save_is_not(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for step in (9, 100, 1_000_000, 20, 999_999):
        save(tmp_path, step)
    shutil.copytree(tmp_path / "step_000009", tmp_path / ".step_2000000.partial")
    assert newest_checkpoint(tmp_path).meta.step == 1_000_000


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, META])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    tmp_path, capsys, name, damage
):
    save(tmp_path, 1)
    victim = save(tmp_path, 2) / name
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    if damage == "remove":
        victim.unlink()
    assert newest_checkpoint(tmp_path).meta.step == 1
    assert str(victim) in capsys.readouterr().err


def test_a_changed_number_in_meta_is_damage_too(tmp_path):
    path = save(tmp_path, step=1, val_loss=2.5)
    text = (path / META).read_text()
    assert text.count('"val_loss": 2.5') == 1
    (path / META).write_text(text.replace('"val_loss": 2.5', '"val_loss": 1.5'))
    with pytest.raises(UserError, match="meta.json is damaged"):
        read_checkpoint(path)


def test_a_checkpoint_under_another_ones_name_is_skipped(tmp_path, capsys):
    save(tmp_path, 1)
    save(tmp_path, 2).rename(tmp_path / "step_000003")
    assert newest_checkpoint(tmp_path).meta.step == 1
    assert "meta.json is of step 2" in capsys.readouterr().err


def test_what_a_damaged_checkpoint_says_is_shown_and_not_obeyed(tmp_path, capsys):
    save(tmp_path, 1)
    settings = {"\x1b[31m\nerror": 3}
    rewrite_meta(save(tmp_path, 2), lambda meta: meta.update(config=settings))
    assert newest_checkpoint(tmp_path).meta.step == 1
    err = capsys.readouterr().err
    assert "\x1b" not in err and err.count("\n") == 1


def test_a_model_and_a_vocabulary_of_different_sizes_are_refused(tmp_path):
    path = save(tmp_path)
    rewrite_meta(path, lambda meta: meta["tokenizer"].update(vocab_size=60_000))
    with pytest.raises(UserError, match="vocabulary of 60,000 tokens for a model of "):
        read_checkpoint(path).encoding()


def test_a_vocabulary_is_gpt2s_by_its_content_and_not_by_its_name(tmp_path):
    path, vocab_size = save(tmp_path), SMALL.vocab_size
    tokenizer = {"name": "gpt2", "vocab_size": vocab_size, "sha256": "0" * 64}
    rewrite_meta(path, lambda meta: meta.update(tokenizer=tokenizer))
    with pytest.raises(UserError, match="lacks its vocabulary"):
        read_checkpoint(path).encoding()


def test_weights_that_are_removed_before_they_are_read_are_one_line(tmp_path):
    """As the run does that is still saving."""
    found = read_checkpoint(save(tmp_path))
    shutil.rmtree(found.path)
    with pytest.raises(UserError, match="can't read .*model.safetensors: No such file"):
        found.make_model()
    with pytest.raises(UserError, match="can't read .*meta.json: No such file"):
        found.description()


def test_if_all_are_damaged_nothing_starts_from_zero(tmp_path):
    (save(tmp_path) / MODEL).write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint in .* is undamaged"):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_weights_are_for_whoever_may_read_a_new_file(tmp_path, mask):
    """safetensors by itself keeps them to the user."""
    before = os.umask(mask)
    try:
        path = save(tmp_path)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o666 & ~mask}


def test_a_folder_that_cannot_be_read_is_not_taken_for_an_empty_one():
    """A run would start over there, and cut its metrics off."""
    with tempfile.TemporaryDirectory() as name:  # tmp_path is in a folder for root alone
        folder = Path(name, "checkpoints")
        save(folder, 1)
        Path(name).chmod(0o755)
        folder.chmod(0)
        with as_nobody():
            for look in (newest_checkpoint, checkpoints_in):
                with pytest.raises(UserError, match="can't read .*checkpoints: Permission denied"):
                    look(folder)
        folder.chmod(0o700)
        assert newest_checkpoint(folder).meta.step == 1
        assert newest_checkpoint(Path(name, "nothing")) is None


def test_the_newest_and_the_best_are_kept(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 2.5}
    for step, loss in losses.items():
        save(tmp_path, step, loss, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_000002",
        "step_000004",
        "step_000005",
    ]


def test_the_last_checkpoint_before_the_learning_rate_falls_is_kept(tmp_path):
    for step in range(1, 8):
        save(tmp_path, step, keep=2, keep_until=4)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step_000004", "step_000006", "step_000007"]


def test_damaged_checkpoints_of_later_steps_do_not_push_the_newest_out(tmp_path):
    save(tmp_path, 10)
    for step in (30, 40):
        (save(tmp_path, step) / MODEL).write_bytes(b"")
    assert newest_checkpoint(tmp_path).meta.step == 10
    save(tmp_path, 20, keep=1)
    assert newest_checkpoint(tmp_path).meta.step == 20
    assert not (tmp_path / "step_000010").exists()


def test_a_damaged_checkpoint_is_neither_the_best_nor_one_of_the_newest(tmp_path):
    """Nor is it the last one before the learning rate falls."""
    save(tmp_path, 5)
    save(tmp_path, 10, val_loss=2.0)
    damaged = save(tmp_path, 15, val_loss=1.0)
    for step, loss in ((20, 3.0), (30, 4.0)):
        save(tmp_path, step, loss, keep=1, keep_until=15, damaged={damaged})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step_000010", "step_000030"]


def test_without_validation_only_the_newest_are_kept(tmp_path):
    for step in range(1, 5):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000003", "step_000004"]


# A fault at every operation of a save


class Disk:
    """What checkpoint.py does to the disk, operation by operation; `fault` comes at one of them.

    Writes are seen as whole files, and a fault in one finds half of it written. What was written
    and not yet forced to the disk is remembered.
    """

    def __init__(self, patch: pytest.MonkeyPatch, at: int, fault: Callable[[Disk], None]) -> None:
        self.at, self.fault, self.count = at, fault, 0
        self.volatile: set[int] = set()  # inodes
        for name in ("fsync", "rename", "unlink", "rmdir", "mkdir"):
            patch.setattr(os, name, self.counted(getattr(os, name), name))
        patch.setattr(checkpoint, "save_file", self.counted(checkpoint.save_file, "write"))
        patch.setattr(Path, "write_text", self.counted(Path.write_text, "write"))

    def counted(self, operation: Callable, kind: str) -> Callable:
        def do(*arguments: object, **options: object) -> object:
            self.count += 1
            now = self.count == self.at
            if now and kind != "write":
                self.fault(self)
            result = operation(*arguments, **options)
            if kind == "write":
                path = next(argument for argument in arguments if isinstance(argument, Path))
                self.volatile.add(path.stat().st_ino)
                if now:
                    os.truncate(path, path.stat().st_size // 2)
                    self.fault(self)
            if kind == "fsync":
                self.volatile.discard(os.fstat(arguments[0]).st_ino)
            return result

        return do


@pytest.fixture
def three_saves(tmp_path):
    """A run with two checkpoints, and a save of the third that removes one: (folder, save it)."""
    save(tmp_path, 1, val_loss=1.0)
    save(tmp_path, 2)
    (tmp_path / ".step_000003.partial").mkdir()  # and a save that was cut short
    (tmp_path / ".step_000003.partial" / MODEL).touch()
    return tmp_path, lambda: save(tmp_path, 3, val_loss=2.0, keep=1)


def is_as_it_should_be(folder: Path) -> bool:
    """Whether a new process finds the newest complete checkpoint, and it is not older than 2."""
    step = newest_checkpoint(folder).meta.step
    return step == (3 if (folder / "step_000003").exists() else 2)


@pytest.mark.parametrize("power_fails", [False, True])
def test_a_process_that_dies_at_any_operation_of_a_save_leaves_the_newest_complete_one(
    three_saves, monkeypatch, power_fails
):
    """A forked process for each. If the power fails, what wasn't forced to the disk is lost."""
    folder, save_third = three_saves

    def die(disk: Disk) -> None:
        for path in folder.rglob("*") if power_fails else ():
            if path.is_file() and path.stat().st_ino in disk.volatile:
                os.truncate(path, 0)
        os._exit(9)

    deaths = 0
    while True:
        again = folder.parent / f"{folder.name}_{deaths}"
        shutil.copytree(folder, again)
        child = os.fork()
        if child == 0:
            Disk(monkeypatch, deaths + 1, die)
            try:
                save_third()
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        assert is_as_it_should_be(folder), f"operation {deaths + 1}"
        shutil.rmtree(folder)
        again.rename(folder)
        if status == 0:
            break
        deaths += 1
    assert deaths >= 15  # 4 to clear up and make room, 3 writes, 5 fsyncs, a rename, 4 removals
    assert sorted(path.name for path in save_third().parent.iterdir()) == [
        "step_000001",
        "step_000003",
    ]


def test_an_error_at_any_operation_of_a_save_is_told_and_harms_nothing(three_saves, capsys):
    folder, save_third = three_saves
    before = shutil.copytree(folder, folder.parent / f"{folder.name}_before")

    def refuse(disk: Disk) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    outcomes = []
    while True:
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, len(outcomes) + 1, refuse)
            try:
                save_third()
                outcomes.append("saved")
            except UserError as error:
                assert "No space left on device" in str(error)
                outcomes.append("not saved")
        assert is_as_it_should_be(folder), f"operation {len(outcomes)}"
        told = capsys.readouterr().err
        if disk.count < disk.at:
            break
        assert ("can't remove the old" in told) == (outcomes[-1] == "saved")
        assert not (folder / ".step_000003.partial").exists()
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
    assert outcomes.count("not saved") >= 12
    assert outcomes.count("saved") == 5  # 4 removals of an old one, and nothing refused


@pytest.mark.parametrize("operation", ["unlink", "fsync", "replace"])
def test_an_error_while_a_checkpoint_is_told_its_loss_is_told_and_harms_nothing(
    tmp_path, monkeypatch, operation
):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = save(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, operation, refuse)
        with pytest.raises(UserError, match="can't write .*meta.json: No space left on device"):
            add_losses(path, 2.0, 1.0)
    assert read_checkpoint(path).meta.val_loss is None
    add_losses(path, 2.0, 1.0)
    assert read_checkpoint(path).meta == replace(META_1, val_loss=2.0, best_val_loss=1.0)


def test_a_checkpoint_that_was_damaged_meanwhile_is_not_told_its_loss(tmp_path):
    path = save(tmp_path)
    (path / "meta.json").write_text("rubbish")
    with pytest.raises(UserError, match="meta.json is damaged"):
        add_losses(path, 2.0, 1.0)


def test_what_is_tried_before_the_first_step_leaves_an_empty_folder(tmp_path):
    for _ in range(2):
        check_can_save(tmp_path / "checkpoints")
        assert not list((tmp_path / "checkpoints").iterdir())


def test_a_copy_that_a_user_made_of_a_checkpoint_is_let_be(tmp_path):
    shutil.copytree(save(tmp_path, 1), tmp_path / "step_000001.bak")
    (tmp_path / "step_000009").touch()
    assert newest_checkpoint(tmp_path).meta.step == 1
    save(tmp_path, 2, keep=1)
    assert (tmp_path / "step_000001.bak").is_dir()


def test_a_save_that_was_cut_short_is_replaced(tmp_path):
    for name in (".step_000001.partial", ".step_000007.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "left over").touch()
    assert newest_checkpoint(tmp_path) is None
    assert sorted(path.name for path in save(tmp_path).iterdir()) == sorted(
        (MODEL, OPTIMIZER, META)
    )
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


def test_a_run_folder_and_a_checkpoint_folder_both_name_a_checkpoint(tmp_path):
    path = save(tmp_path / "run" / "checkpoints", 7)
    assert find_checkpoint(str(tmp_path / "run")).path == path
    assert find_checkpoint(str(path)).meta.step == 7
    (path / OPTIMIZER).unlink()  # not needed to use the model
    assert find_checkpoint(str(path)).meta.step == 7


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nothing", "nothing is there; expected a run's folder"),
        ("notes", "expected a run's folder"),
        ("begun", "its run hasn't saved one yet"),
        ("run/checkpoints", "name the run's folder .*/run, or one of the folders in it"),
        ("copies", "name one of the folders in it"),
        ("theirs", "a folder for transformers, it seems; convert.py from-hf"),
    ],
)
def test_what_is_no_checkpoint_is_refused_with_what_it_is(tmp_path, name, told):
    for folder in ("notes", "begun/checkpoints", "theirs"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "theirs" / "config.json").touch()
    save(tmp_path / "run" / "checkpoints")
    save(tmp_path / "copies")
    with pytest.raises(UserError, match=f"{tmp_path / name} is no checkpoint: {told}"):
        find_checkpoint(str(tmp_path / name))


def test_a_pickle_is_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path(tmp_path / "exploded").touch, ())

    path = save(tmp_path)
    content = pickle.dumps(Bomb())
    (path / MODEL).write_bytes(content)
    fingerprint = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    rewrite_meta(path, lambda meta: meta["files"].update({MODEL: fingerprint}))
    with pytest.raises(UserError, match="is no safetensors file"):
        read_checkpoint(path).load_model(GPT(SMALL))
    assert not (tmp_path / "exploded").exists()


def test_files_that_are_no_table_are_refused(tmp_path):
    path = save(tmp_path)
    rewrite_meta(path, lambda meta: meta.update(files=[MODEL, OPTIMIZER]))
    with pytest.raises(UserError, match="meta.json is damaged or not a checkpoint's: files"):
        read_checkpoint(path)


def test_another_format_version_is_refused(tmp_path):
    path = save(tmp_path)
    rewrite_meta(path, lambda meta: meta.update(format_version=99))
    with pytest.raises(UserError, match="has format 99, this code reads 1"):
        read_checkpoint(path)


def test_a_file_is_no_checkpoint(tmp_path):
    (tmp_path / "weights.bin").touch()
    with pytest.raises(UserError, match="weights.bin is no checkpoint: expected a run's folder"):
        find_checkpoint(str(tmp_path / "weights.bin"))


def test_a_file_too_small_for_its_layers_is_refused_before_they_take_memory(tmp_path):
    path = save(tmp_path)
    rewrite_meta(path, lambda meta: meta["model"].update(n_layer=100))
    with pytest.raises(UserError, match="a model of [0-9,]+ numbers in"):
        read_checkpoint(path).make_model()

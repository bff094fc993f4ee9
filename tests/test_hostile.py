"""Files that somebody made to do harm: one error, nothing run, nothing read outside the folder.

By hand what is known to be tried, by hypothesis what nobody thinks of: whatever a reader is given,
it returns or raises UserError.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import run
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_checkpoint import META_1, rewrite_meta, save, take_step, trained

from checkpoint import (
    META,
    MODEL,
    OPTIMIZER,
    find_checkpoint,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from common.errors import UserError
from common.records import as_record
from config import make_config, read_toml
from model import GPT
from optim import OTHER, update_average
from preparation.writing import read_progress
from shards import MANIFEST, PROGRESS, VOCABULARY, Shard, TokenStream, encoding_of
from tokenizer import load_vocabulary
from training.metrics import Metrics

SECRET = "the neighbour's diary"


@pytest.fixture
def data(shards, tmp_path) -> Path:
    """A copy of the small shards, to be spoilt."""
    return Path(shutil.copytree(shards, tmp_path / "data"))


@pytest.fixture
def secret(tmp_path) -> Path:
    """A file outside of every folder that is read here."""
    path = tmp_path / "outside"
    path.write_text(SECRET)
    return path


def vouch_for(path: Path, name: str) -> None:
    """Give a checkpoint's file the hash that meta.json wants, as somebody could who made both."""
    content = (path / name).read_bytes()
    told = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    rewrite_meta(path, lambda meta: meta["files"].update({name: told}))


# Links and paths out of the folder


def test_a_shard_that_is_a_link_out_of_its_folder_is_refused(data, tmp_path):
    outside = shutil.move(data / "train_000000.bin", tmp_path / "train_000000.bin")
    (data / "train_000000.bin").symlink_to(outside)
    with pytest.raises(UserError, match="train_000000.bin is a link out of its folder"):
        TokenStream(data, "train")


def test_a_folder_may_itself_be_a_link(data, tmp_path):
    (tmp_path / "link").symlink_to(data)
    assert len(TokenStream(tmp_path / "link", "train")) == len(TokenStream(data, "train"))


def test_a_vocabulary_that_is_a_link_out_of_its_folder_is_refused(data, secret):
    (data / VOCABULARY).unlink()
    (data / VOCABULARY).symlink_to(secret)
    with pytest.raises(UserError, match="is a link out of its folder") as error:
        encoding_of(data)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, META])
def test_a_checkpoints_file_that_is_a_link_out_of_its_folder_is_refused(tmp_path, name):
    path = save(tmp_path / "run")
    (path / name).replace(tmp_path / "outside")
    (path / name).symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match=f"{name} is a link out of its folder"):
        read_checkpoint(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_a_named_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(data, tmp_path):
    path = save(tmp_path / "run")
    for file in (path / META, path / MODEL, data / MANIFEST, data / VOCABULARY):
        file.unlink()
        os.mkfifo(file)
    for look in (lambda: read_checkpoint(path), lambda: encoding_of(data)):
        with pytest.raises(UserError, match="is not a regular file"):
            look()


def test_an_error_is_one_line_whatever_a_file_puts_into_it(tmp_path):
    (tmp_path / "odd.toml").write_text(
        '[optim]\n"x\\nerror: forged \\u001b[31m' + "y" * 100_000 + '" = 1\n'
    )
    told = run("train.py", tmp_path / "odd.toml").error()
    assert told.startswith("error: unknown setting optim.x\\nerror: forged \\x1b[31myyy")
    assert len(told) < 3000


def test_a_checkpoint_that_is_a_link_out_of_its_run_is_skipped(tmp_path, capsys):
    outside = save(tmp_path / "other", 3, val_loss=0.1)
    folder = save(tmp_path / "run" / "checkpoints", 1, val_loss=1.0).parent
    (folder / outside.name).symlink_to(outside)
    found = find_checkpoint(str(tmp_path / "run"))
    assert found.meta.step == 1
    assert f"{folder / outside.name} is a link out of its folder" in capsys.readouterr().err
    for step in (4, 5):
        save(folder, step, keep=1)
    assert sorted(path.name for path in folder.iterdir()) == ["step_000001", "step_000005"]
    assert read_checkpoint(outside).meta.step == 3  # whole, and not taken for this run's best
    (folder / "step_000006").symlink_to(outside)
    assert not save(folder, 6).is_symlink()
    assert read_checkpoint(outside).meta.step == 3


@pytest.mark.parametrize("kind", ["file", "link", "link to nothing"])
def test_what_lies_where_a_checkpoint_is_to_be_written_is_removed_and_no_link_followed(
    tmp_path, kind
):
    outside = save(tmp_path / "other")
    for name in (".step_000001.partial", ".step_000007.partial", "step_000001"):
        (tmp_path / "run").mkdir(exist_ok=True)
        if kind == "file":
            (tmp_path / "run" / name).touch()
        else:
            (tmp_path / "run" / name).symlink_to(outside if kind == "link" else "nothing")
    assert read_checkpoint(save(tmp_path / "run")).meta.step == 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step_000001"]
    assert len(list(outside.iterdir())) == 3


def test_a_checkpoint_of_an_impossible_name_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for name in (tmp_path / "loop", tmp_path / "loop" / "x", "\ud800"):
        with pytest.raises(UserError, match="can't (find|look)|is no checkpoint"):
            find_checkpoint(str(name))


def test_a_checkpoint_that_was_trained_on_data_of_an_impossible_name_is_one_line(
    tmp_path, trained, call
):
    (path,) = shutil.copytree(trained, tmp_path / "run").glob("checkpoints/step_000040")
    for name in (3, ["a"], None, "a\0b", "\ud800", ""):
        rewrite_meta(path, lambda meta, name=name: meta["config"]["data"].update(dir=name))
        error = call("evaluate", "--checkpoint", tmp_path / "run").error()
        assert "give --data, a shard folder" in error or "can't look for" in error


def test_a_shard_that_is_a_link_to_itself_is_refused(data):
    (data / "train_000000.bin").unlink()
    (data / "train_000000.bin").symlink_to("train_000000.bin")
    # Python 3.13 finds it, and can't read it.
    with pytest.raises(UserError, match="can't (find|read) .*train_000000.bin"):
        TokenStream(data, "train")


def test_a_name_that_no_file_can_have_is_refused(data):
    manifest = json.loads((data / MANIFEST).read_text())
    for name in ("\ud800.bin", "a" * 5000, "", ".", "..", "a\0b"):
        manifest["shards"][1]["file"] = name
        (data / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(UserError) as error:
            TokenStream(data, "train")
        assert str(data) in str(error.value)
        assert str(error.value).encode()  # it can be printed


@pytest.mark.parametrize("content", ["", json.dumps(SECRET)])
def test_what_a_link_out_of_the_folder_leads_to_is_not_told(data, secret, tmp_path, content):
    secret.write_text(content or secret.read_text())
    checkpoint = save(tmp_path / "run")
    for path in (data / MANIFEST, checkpoint / META):
        path.unlink()
        path.symlink_to(secret)
    told = []
    for read in (
        lambda: TokenStream(data, "train"),
        lambda: read_checkpoint(checkpoint),
        lambda: find_checkpoint(str(checkpoint)),
    ):
        with pytest.raises(UserError, match="json is a link out of its folder") as error:
            read()
        told.append(str(error.value))
    assert SECRET[:8] not in " ".join(told)


def test_a_manifest_that_is_a_link_to_nothing_is_not_taken_for_none(data):
    (data / MANIFEST).unlink()
    (data / MANIFEST).symlink_to("nothing")
    with pytest.raises(UserError, match="can't read .*manifest.json: No such file"):
        TokenStream(data, "train")


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "meta.json", "other"])
def test_a_checkpoint_that_vouches_for_another_file_is_refused(tmp_path, secret, name):
    path = save(tmp_path / "run")
    rewrite_meta(path, lambda meta: meta["files"].update({name: {"bytes": 1, "sha256": ""}}))
    with pytest.raises(UserError, match="meta.json is damaged or not a checkpoint's: files lists"):
        read_checkpoint(path)


# Content


def test_a_safetensors_header_of_ten_gigabytes_is_refused(tmp_path):
    path = save(tmp_path)
    (path / MODEL).write_bytes(struct.pack("<Q", 10 * 2**30) + b"{}")
    vouch_for(path, MODEL)
    with pytest.raises(UserError, match="model.safetensors is no safetensors file"):
        read_checkpoint(path).load_model(trained()[0])


def test_a_shard_header_that_promises_ten_gigabytes_is_refused(tmp_path):
    path = tmp_path / "train_000000.bin"
    path.write_bytes(struct.pack("<256i", 20240520, 1, 2**31 - 1, *[0] * 253) + b"ab")
    with pytest.raises(UserError, match="is damaged: its header says 2147483647 tokens"):
        Shard(path)


@pytest.mark.parametrize("change", ["more", "fewer", "other"])
def test_tensors_that_do_not_fit_the_model_are_refused(tmp_path, change):
    model, optimizer = trained()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if change == "fewer":
        del tensors["ln_f.weight"]
    else:
        tensors["x" if change == "more" else "ln_f.weight"] = tensors["wte.weight"].clone()
    path = save(tmp_path)
    save_file(tensors, path / MODEL)
    vouch_for(path, MODEL)
    with pytest.raises(UserError, match="model.safetensors doesn't fit meta.json"):
        read_checkpoint(path).load_model(GPT(model.config))
    save_file({f"{name}/exp_avg": tensor for name, tensor in tensors.items()}, path / OPTIMIZER)
    vouch_for(path, OPTIMIZER)
    with pytest.raises(UserError, match="optimizer.safetensors doesn't"):
        read_checkpoint(path).load_optimizer(model, optimizer)


def rewrite_tensors(path: Path, name: str, change: Callable[[dict], object]) -> None:
    """Change a checkpoint's tensors as somebody could who knows its hashes."""
    tensors = load_file(path / name)
    change(tensors)
    save_file(tensors, path / name)
    vouch_for(path, name)


@pytest.mark.parametrize(
    ("name", "shape"), [("x", 3), ("wte.weight", 7), ("wte.weight", (1, 1)), ("ln_f.weight", 1)]
)
def test_a_scale_that_does_not_fit_is_refused(tmp_path, name, shape):
    path = save(tmp_path)
    scale = {f"{name}/scale": torch.ones(shape)}
    rewrite_tensors(path, MODEL, lambda tensors: tensors.update(scale))
    with pytest.raises(UserError, match="model.safetensors doesn't fit meta.json"):
        read_checkpoint(path).make_model()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.int8, torch.int64])
@pytest.mark.parametrize("scale", [None, torch.float32, torch.complex64])
def test_weights_that_are_no_floating_point_numbers_are_refused_by_name(tmp_path, dtype, scale):
    """torch casts them, and drops an imaginary part; only int8 with a scale is meant so."""
    path = save(tmp_path)

    def change(tensors: dict) -> None:
        tensors["wpe.weight"] = tensors["wpe.weight"].to(dtype)
        if scale:
            tensors["wpe.weight/scale"] = torch.ones(len(tensors["wpe.weight"]), 1, dtype=scale)

    rewrite_tensors(path, MODEL, change)
    if (dtype, scale) == (torch.int8, torch.float32):
        read_checkpoint(path).make_model()
        return
    with pytest.raises(UserError, match="model.safetensors doesn't fit meta.json: wpe.weight"):
        read_checkpoint(path).make_model()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", ["step", "exp_avg", "exp_avg_sq", "momentum", OTHER])
@pytest.mark.parametrize("change", ["without", "renamed", "a number", "another type"])
def test_optimizer_state_of_another_kind_is_refused(tmp_path, optimizer, kind, change):
    model, state = trained(name=optimizer)
    update_average(state, 0.9, step=1, skipped=torch.tensor(0.0))
    path = save_checkpoint(tmp_path, META_1, model, state)
    keys = [key for key in load_file(path / OPTIMIZER) if key.endswith(f"/{kind}")]
    assert keys or (kind, optimizer) == ("momentum", "adamw")
    if kind == OTHER:  # without all of them it is a run that keeps no average
        keys = keys[:1]

    def spoil(tensors: dict) -> None:
        for key in keys:
            tensor = tensors.pop(key)
            if change == "renamed":
                tensors[f"{key}x"] = tensor
            elif change == "a number":
                tensors[key] = tensor.sum() if kind != "step" else tensor.expand(3).clone()
            elif change == "another type":
                tensors[key] = tensor.long()

    rewrite_tensors(path, OPTIMIZER, spoil)
    if not keys:  # AdamW has no momentum
        read_checkpoint(path).load_optimizer(*trained(name=optimizer))
        return
    with pytest.raises(UserError, match="optimizer.safetensors doesn't"):
        read_checkpoint(path).load_optimizer(*trained(name=optimizer))


SCALER = {"scale": 2.0, "growth_factor": 2.0, "backoff_factor": 0.5}
SCALER |= {"growth_interval": 2000, "_growth_tracker": 0}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"val_loss": 10**400}, "meta.val_loss is 1000.*, expected a finite number"),
        ({"step": 10**30}, "step is 10+, expected"),
        ({"step": -1}, "step is -1, expected"),
        ({"skipped": 10**30}, "skipped is 10+, expected"),
        ({"spikes": {"norms": [1.0] * 128, "count": 3}}, "spikes counts 3 .* after 2 steps"),
        ({"spikes": {"norms": [1e300] * 128, "count": 1}}, "spikes has a norm of 1e"),
        ({"spikes": {"norms": [-1.0] * 128, "count": 1}}, "spikes has a norm of -1"),
        ({"scaler": {"a": 1.0}}, "meta.scaler has an unknown field 'a'"),
        ({"scaler": {"scale": 1.0}}, "meta.scaler lacks growth_factor"),
        ({"scaler": SCALER | {"scale": 1e300}}, "scaler"),
        ({"scaler": SCALER | {"growth_interval": 2**40}}, "scaler"),
        ({"scaler": SCALER | {"_growth_tracker": -1}}, "scaler"),
        ({"model": {"dropout": 7.0}}, "dropout is 7.0, expected"),
        ({"model": {"dropout": -0.1}}, "dropout is -0.1, expected"),
        ({"model": {"n_embd": 10**25}}, "a size is above"),
        ({"model": {"n_embd": 2**40}}, "a size is above"),
    ],
)
def test_a_number_out_of_range_is_refused_and_the_checkpoint_before_it_used(
    tmp_path, capsys, change, complaint
):
    save(tmp_path, 1)
    path = shutil.copytree(tmp_path / "step_000001", tmp_path / "step_000002")
    change, shape = {"step": 2, **change}, change.get("model", {})
    change.pop("model", None)
    rewrite_meta(path, lambda meta: meta.update(change) or meta["model"].update(shape))
    with pytest.raises(UserError, match=complaint):
        read_checkpoint(path)
    assert newest_checkpoint(tmp_path).meta.step == 1
    assert f"skipped: {path / META}" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["n_embd", "n_layer", "block_size", "vocab_size"])
def test_a_model_that_is_larger_than_its_file_is_never_made(tmp_path, size):
    path = save(tmp_path)
    rewrite_meta(path, lambda meta: meta["model"].update({size: 2**30}))
    with pytest.raises(UserError, match="model.safetensors doesn't fit meta.json: .* numbers"):
        read_checkpoint(path).make_model()


SHAPES = [f"({2**62},)", f"({10**25},)", "(True,)", "(-9,)", "('a',)", "9", "(9"]
SHAPES += ["'''", "9\\0{", 3000 * "("]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_numpy_shard_of_an_odd_shape_is_refused(tmp_path, shape):
    path = tmp_path / "a_train_0.npy"
    header = f"{{'descr': '<u2', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(18))
    with pytest.raises(UserError, match=f"{path} is damaged or no NumPy array"):
        Shard(path)


def test_a_config_with_code_in_it_is_one_line_and_is_not_run(tmp_path):
    path = tmp_path / "evil.toml"
    path.write_text(f"n_layer = 3\nopen({str(tmp_path / 'exploded')!r}, 'w')\n")
    error = run("train.py", path).error()
    assert f"{path} is not TOML" in error
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["evil.toml"]


def test_a_vocabulary_with_broken_base64_is_one_line(data, tiny, tmp_path):
    lines = (data / VOCABULARY).read_bytes().splitlines()
    lines[7] = b"!!!! 7"
    (data / VOCABULARY).write_bytes(b"\n".join(lines))
    told = json.loads((data / MANIFEST).read_text())
    told["tokenizer"]["sha256"] = hashlib.sha256((data / VOCABULARY).read_bytes()).hexdigest()
    (data / MANIFEST).write_text(json.dumps(told))
    out = tmp_path / "run"
    error = run("train.py", tiny, "--data.dir", data, "--train.out", out).error()
    assert "line 8: expected a token in base64, a space and its id" in error
    assert not out.exists()


# Anything at all

NUMBERS = st.integers() | st.integers(-5, 70_000) | st.floats() | st.sampled_from([10**400, 1e308])
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def changed(draw: st.DrawFn, whole: object) -> object:
    """A JSON value with something in it replaced, removed or added."""
    if not isinstance(whole, (dict, list)) or not whole or draw(st.integers(0, 5)) == 0:
        return draw(VALUES)
    whole = copy.copy(whole)
    key = draw(st.sampled_from([*whole] if isinstance(whole, dict) else [*range(len(whole))]))
    what = draw(st.sampled_from(["change", "change", "change", "remove", "add"]))
    if what == "remove":
        del whole[key]
    elif what == "add" and isinstance(whole, dict):
        whole[draw(st.text(max_size=5))] = draw(VALUES)
    else:
        whole[key] = draw(changed(whole[key]))
    return whole


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with some of them cut off, changed, or said twice."""
    start = draw(st.integers(0, len(content)))
    stop = draw(st.integers(start, min(len(content), start + 40)))
    middle = draw(st.binary(max_size=8) | st.just(2 * content[start:stop]))
    return content[:start] + middle + (b"" if draw(st.booleans()) else content[stop:])


DEEP = b'{"version": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@settings(max_examples=150)
@given(st.data())
def test_any_manifest_is_read_or_refused(shards, tmp_path_factory, data):
    folder = Path(shutil.copytree(shards, tmp_path_factory.mktemp("fuzz") / "data"))
    original = (shards / MANIFEST).read_bytes()
    other = data.draw(changed(json.loads(original)).map(lambda told: json.dumps(told).encode()))
    content = data.draw(damaged(original) | st.just(other) | st.just(DEEP) | st.binary())
    (folder / MANIFEST).write_bytes(content)
    with suppress(UserError):
        stream = TokenStream(folder, "train")
        assert stream.read(0, len(stream)).size == len(stream)
        encoding_of(folder)


@pytest.mark.parametrize("name", ["batch", "skip"])
def test_progress_of_less_than_nothing_is_refused(tmp_path, name):
    tokenizer = {"name": "gpt2", "vocab_size": 50_257, "sha256": "0"}
    content = {"settings": {}, "tokenizer": tokenizer, name: -1}
    (tmp_path / PROGRESS).write_text(json.dumps(content))
    with pytest.raises(UserError, match="progress.json is damaged: delete the folder and start"):
        read_progress(tmp_path)


@settings(max_examples=100)
@given(st.data())
def test_any_progress_is_read_or_refused(tmp_path_factory, data):
    record = {"file": "a.bin", "split": "train", "tokens": 3, "sha256": "0"}
    tokenizer = {"name": "gpt2", "vocab_size": 50_257, "sha256": "0"}
    whole = {"settings": {"source": "x"}, "tokenizer": tokenizer, "shards": [record], "batch": 1}
    folder = tmp_path_factory.mktemp("fuzz")
    content = json.dumps(data.draw(changed(whole))).encode()
    (folder / PROGRESS).write_bytes(data.draw(damaged(content) | st.just(content)))
    with suppress(UserError):
        assert read_progress(folder).batch >= 0


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("saved"))


@settings(max_examples=300)
@given(st.data())
def test_any_meta_of_a_checkpoint_is_read_or_refused(saved, tmp_path_factory, data):
    path = Path(shutil.copytree(saved, tmp_path_factory.mktemp("fuzz") / saved.name))
    meta = json.loads((path / META).read_bytes())
    del meta["checksum"]
    meta = data.draw(changed(meta))
    if isinstance(meta, dict):
        digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
        meta["checksum"] = digest
    content = json.dumps(meta).encode()
    (path / META).write_bytes(data.draw(st.just(content) | damaged(content)))
    with suppress(UserError):
        found = newest_checkpoint(path.parent)
        assert found.meta.step == 1
        found.load_optimizer(*trained())
    with suppress(UserError):
        find_checkpoint(str(path)).make_model()


TENSORS = st.builds(
    lambda shape, dtype: torch.ones(shape, dtype=dtype),
    st.lists(st.sampled_from([0, 1, 3, 16, 50]), max_size=3),
    st.sampled_from([torch.float32, torch.int8, torch.int64, torch.bool, torch.complex64]),
)


@settings(max_examples=200)
@given(st.data())
def test_any_tensors_of_a_checkpoint_are_used_or_refused(saved, tmp_path_factory, data):
    path = Path(shutil.copytree(saved, tmp_path_factory.mktemp("fuzz") / saved.name))
    name = data.draw(st.sampled_from([MODEL, OPTIMIZER]))
    if data.draw(st.booleans()):
        (path / name).write_bytes(data.draw(damaged((path / name).read_bytes())))
        vouch_for(path, name)
    else:
        keys = st.sampled_from([*load_file(path / name)])
        odd = keys | keys.map(lambda key: f"{key}/scale") | st.text(max_size=5)
        more = data.draw(st.dictionaries(odd, TENSORS, max_size=3))
        fewer = data.draw(st.sets(keys, max_size=2))

        def change(tensors: dict) -> None:
            tensors.update(more)
            for key in fewer:
                tensors.pop(key, None)

        rewrite_tensors(path, name, change)
    with suppress(UserError):
        read_checkpoint(path).make_model()
    with suppress(UserError):
        model, optimizer = trained()
        read_checkpoint(path).load_optimizer(model, optimizer)
        take_step(model, optimizer)


@settings(max_examples=200)
@given(st.data())
def test_any_shard_is_read_or_refused(shards, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / f"train_0.{data.draw(st.sampled_from(['bin', 'npy']))}"
    original = (shards / "train_000000.bin").read_bytes()[:1100]
    path.write_bytes(data.draw(damaged(original) | damaged(NPY) | st.binary()))
    with suppress(UserError):
        assert Shard(path).largest_token() >= 0


NPY = b"\x93NUMPY\x01\x00v\x00{'descr': '<u2', 'fortran_order': False, 'shape': (9,), }"
NPY = NPY.ljust(127) + b"\n" + bytes(18)

NPY_SHAPES = (st.integers() | st.booleans() | st.sampled_from([10**25, 2**62, 9])).map(
    lambda size: NPY.replace(b"(9,), }", f"({size},), }}".encode())
)


@settings(max_examples=200)
@given(st.data())
def test_any_vocabulary_is_read_or_refused(shards, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / VOCABULARY
    path.write_bytes(data.draw(damaged((shards / VOCABULARY).read_bytes()) | st.binary()))
    with suppress(UserError):
        assert load_vocabulary(path).n_vocab > 256


TOML = (
    b'[model]\nn_layer = 2\ndropout = 0.1\n[train]\nout = "x"\ncompile = true\n[log]\nwandb = ""\n'
)


@settings(max_examples=300)
@example(b"[model]\ndropout = 1" + b"0" * 400)
@example(b"[model]\nn_layer = " + b"[" * 20_000)
@example(b"train = 3")
@given(damaged(TOML) | st.binary() | st.text().map(str.encode))
def test_any_config_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("fuzz") / "a.toml"
    path.write_bytes(content)
    with suppress(UserError):
        make_config(read_toml(path))


@dataclass(frozen=True)
class Everything:
    """A field of each kind that a record may have."""

    text: str
    whole: int
    number: float
    yes: bool
    maybe: float | None
    inner: dict[str, dict[str, object]]
    row: tuple[int, ...] = ()


GOOD = {"text": "", "whole": 1, "number": 0.5, "yes": True, "maybe": None, "inner": {}, "row": [1]}


@given(st.data())
def test_a_record_has_the_types_that_it_says(data):
    with suppress(ValueError):
        got = as_record(Everything, data.draw(changed(GOOD)))
        assert [type(value) for value in (got.text, got.whole, got.yes)] == [str, int, bool]
        assert all(type(number) in (int, float) for number in (got.number, got.maybe or 0))
        assert all(isinstance(value, dict) for value in got.inner.values())
        assert all(type(number) is int for number in got.row)


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("text", 3, "everything.text is 3, expected text"),
        ("whole", True, "everything.whole is True, expected a whole number"),
        ("whole", 1.0, "everything.whole is 1.0, expected a whole number"),
        ("number", float("nan"), "everything.number is nan, expected a finite number"),
        ("maybe", "x", "everything.maybe is 'x', expected a finite number"),
        ("inner", {"a": 3}, "everything.inner.a is 3, expected an object"),
        ("row", [1, None], r"everything.row\[1\] is None, expected a whole number"),
        ("row", "12", "everything.row is '12', expected a list"),
        ("other", 1, "everything has an unknown field 'other'"),
    ],
)
def test_a_field_that_does_not_fit_is_named(field, value, complaint):
    with pytest.raises(ValueError, match=complaint):
        as_record(Everything, GOOD | {field: value})
    with pytest.raises(ValueError, match="everything lacks text"):
        as_record(Everything, {})


# What can't be looked at


@pytest.fixture
def shut(monkeypatch):
    """Take the permission to look into a folder away, from root as well: shut(folder)."""
    stat, scan = Path.stat, os.scandir

    def shut_one(folder: Path) -> None:
        def refuse_list(path: Path) -> object:
            if folder in (path, *Path(path).parents):
                raise PermissionError(13, "Permission denied", str(path))
            return scan(path)

        def refuse(path: Path, **options: bool) -> object:
            if folder in path.parents:
                raise PermissionError(13, "Permission denied", str(path))
            return stat(path, **options)

        monkeypatch.setattr(Path, "stat", refuse)
        monkeypatch.setattr(os, "scandir", refuse_list)

    return shut_one


def test_a_data_folder_that_cannot_be_looked_into_is_refused(data, shut):
    shut(data)
    for read in (TokenStream, read_progress, encoding_of):
        with pytest.raises(UserError, match=f"can't look for {data}/.*: Permission denied"):
            read(data, "train") if read is TokenStream else read(data)


def test_a_data_folder_in_one_that_cannot_be_looked_into_is_refused(data, shut):
    shut(data.parent)
    with pytest.raises(UserError, match=f"can't look for {data}/.*: Permission denied"):
        TokenStream(data, "train")


@pytest.mark.parametrize("where", ["the run", "its checkpoints", "a checkpoint"])
def test_a_run_folder_that_cannot_be_looked_into_is_refused(tmp_path, shut, where):
    path = save(tmp_path / "run" / "checkpoints")
    shut({"the run": tmp_path / "run", "its checkpoints": path.parent}.get(where, path))
    name = path if where == "a checkpoint" else tmp_path / "run"
    with pytest.raises(UserError, match="can't (look|read) .*: Permission denied"):
        find_checkpoint(str(name))
    if where != "a checkpoint":
        with pytest.raises(UserError, match="can't (look|read) .*: Permission denied"):
            newest_checkpoint(path.parent)


@pytest.mark.parametrize("line", ["[" * 100_000, '{"step": ' + "9" * 5000 + "}", "3", "null"])
def test_a_line_of_metrics_that_is_none_is_left_out(configure, line):
    config = configure()
    path = Path(config.train.out) / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    Metrics(config, 2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_what_is_no_finite_number_is_null_in_the_metrics(configure):
    config = configure()
    Path(config.train.out).mkdir()
    metrics = Metrics(config, 0)
    metrics.write("lambada", 1, {"perplexity": math.inf, "acc": 0.5, "windows": [math.nan]})
    line = metrics.path.read_text()
    told = {"kind": "lambada", "step": 1, "perplexity": None, "acc": 0.5, "windows": [None]}
    assert line == json.dumps(told) + "\n"


def test_metrics_that_are_a_folder_are_one_line(configure):
    config = configure()
    path = Path(config.train.out) / "metrics.jsonl"
    path.mkdir(parents=True)
    with pytest.raises(UserError, match=f"can't read {path}: Is a directory"):
        Metrics(config, 0)

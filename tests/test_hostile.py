"""Files that somebody made to do harm: one error, nothing run, nothing read outside the folder.

By hand what is known to be tried, by hypothesis what nobody thinks of: whatever a reader is given,
it returns or raises UserError.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import run
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_checkpoint import rewrite_meta, save, trained

from checkpoint import META, MODEL, OPTIMIZER, find_checkpoint, newest_checkpoint, read_checkpoint
from config import make_config, read_toml
from errors import UserError
from model import GPT
from records import as_record
from shards import MANIFEST, PROGRESS, VOCABULARY, TokenStream, encoding_of, open_shard
from tokenizer import load_vocabulary
from writing import read_progress

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


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER])
def test_a_checkpoints_file_that_is_a_link_out_of_its_folder_is_refused(tmp_path, name):
    path = save(tmp_path / "run")
    (path / name).replace(tmp_path / "outside")
    (path / name).symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match=f"{name} is a link out of its folder"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "meta.json", "other"])
def test_a_checkpoint_that_vouches_for_another_file_is_refused(tmp_path, secret, name):
    path = save(tmp_path / "run")
    rewrite_meta(path, lambda meta: meta["files"].update({name: {"bytes": 1, "sha256": ""}}))
    with pytest.raises(UserError, match="meta.json is damaged or not a checkpoint's: it vouches"):
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
        open_shard(path)


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
    with suppress(UserError):
        find_checkpoint(str(path))


@settings(max_examples=200)
@given(st.data())
def test_any_shard_is_read_or_refused(shards, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / f"train_0.{data.draw(st.sampled_from(['bin', 'npy']))}"
    original = (shards / "train_000000.bin").read_bytes()[:1100]
    path.write_bytes(data.draw(damaged(original) | damaged(NPY) | st.binary()))
    with suppress(UserError):
        assert int(open_shard(path).astype(int).sum()) >= 0


NPY = b"\x93NUMPY\x01\x00v\x00{'descr': '<u2', 'fortran_order': False, 'shape': (9,), }"
NPY = NPY.ljust(127) + b"\n" + bytes(18)


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

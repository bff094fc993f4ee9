"""Published shards from the Hub: how many, checked, and taken up again where it broke off."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from conftest import run
from fake_hub import FakeHub

from common.errors import UserError
from preparation import pretokenized
from preparation.pretokenized import Published, choose, download
from preparation.writing import Progress
from shards import GPT2, MANIFEST, PROGRESS, TokenStream, read_manifest, shard_header

COMMIT, NEWER = "a" * 40, "b" * 40
TOKENS = np.arange(1000, dtype="<u2")


def shard(tokens: np.ndarray) -> bytes:
    return shard_header(len(tokens)) + tokens.tobytes()


def published() -> FakeHub:
    """llm.c's FineWeb in small: 100 tokens to validate on, 3 × 300 to train on."""
    files = {f"fineweb_train_00000{n}.bin": shard(TOKENS[n * 300 - 200 :][:300]) for n in (1, 2, 3)}
    files |= {"fineweb_val_000000.bin": shard(TOKENS[:100]), "README.md": b"about", "x.bin": b"no"}
    return FakeHub("kjj0/fineweb10B-gpt2", {COMMIT: files})


@pytest.fixture
def hub() -> FakeHub:
    return published()


@pytest.fixture
def fetch(on_hub, hub, tmp_path):
    """prepare_fineweb.py --pretokenized with more options."""
    words = ("prepare_fineweb.py", "--out", tmp_path / "data", "--pretokenized")
    return lambda *options: on_hub(hub, *words, *options)


def test_as_many_shards_as_hold_the_tokens_are_fetched(fetch, hub, tmp_path):
    folder = tmp_path / "data"
    result = fetch("--max-tokens", 500)
    assert result.status == 0, result.err
    assert "600 tokens to train on, 100 to validate on, in 3 shards" in result.err
    train, val = (TokenStream(folder, split) for split in ("train", "val"))
    assert train.read(0, len(train)).tolist() == TOKENS[100:700].tolist()
    assert val.read(0, len(val)).tolist() == TOKENS[:100].tolist()
    manifest = read_manifest(folder)
    assert manifest.settings["revision"] == COMMIT
    assert manifest.tokenizer.name == "gpt2"
    assert not (folder / PROGRESS).exists()
    hub.asked.clear()
    assert fetch("--max-tokens", 500).status == 0
    assert hub.asked == []  # what is there is checked, and nothing fetched
    (folder / "fineweb_val_000000.bin").write_bytes(shard(TOKENS[1:101]))
    assert "has been damaged or changed" in fetch("--max-tokens", 500).error()
    assert "was begun with another max_tokens" in fetch().error()


def test_a_download_that_broke_off_goes_on_with_the_same_commit(fetch, hub, tmp_path):
    folder, lost = tmp_path / "data", "fineweb_train_000002.bin"
    files = dict(hub.commits[COMMIT])
    hub.missing = {lost}
    assert f"{lost} of kjj0/fineweb10B-gpt2 can't be had" in fetch().error()
    with pytest.raises(UserError, match="is not finished"):
        TokenStream(folder, "train")
    hub.missing, hub.commits[NEWER] = set(), {"fineweb_train_000001.bin": b"other"}
    hub.asked.clear()
    assert fetch().status == 0
    fetched = [line for line in hub.asked if line.startswith("GET") and "/resolve/" in line]
    assert {line.rsplit("/", 1)[1] for line in fetched} == {lost, "fineweb_train_000003.bin"}
    assert (folder / lost).read_bytes() == files[lost]
    assert json.loads((folder / MANIFEST).read_text())["settings"]["revision"] == COMMIT


def test_a_download_that_broke_off_is_not_taken_over_by_another_source(fetch, hub, tmp_path):
    hub.missing = {"fineweb_train_000002.bin"}
    fetch().error()
    (tmp_path / "a.txt").write_text("some text " * 50)
    words = ("--source", tmp_path / "a.txt", "--tokenizer", "bpe:257", "--val-tokens", 9)
    out = ("--out", tmp_path / "data", "--workers", 1)
    error = run("prepare_fineweb.py", *words, *out).error()
    assert f"{tmp_path / 'data'} holds shards of another origin" in error
    hub.missing.clear()
    assert fetch().status == 0


def test_a_kill_after_the_manifest_leaves_nothing_in_the_way(fetch, tmp_path):
    folder = tmp_path / "data"
    fetch()
    settings, tokenizer = (getattr(read_manifest(folder), key) for key in ("settings", "tokenizer"))
    Progress(settings, tokenizer).save(folder)  # which is removed last
    assert fetch().status == 0
    assert len(TokenStream(folder, "train")) == 900


def test_a_progress_without_its_revision_begins_with_the_newest(fetch, hub, tmp_path):
    (tmp_path / "data").mkdir()
    settings = {"pretokenized": "kjj0/fineweb10B-gpt2", "max_tokens": 500}
    Progress(settings, GPT2).save(tmp_path / "data")
    assert fetch("--max-tokens", 500).status == 0


def test_what_is_no_shard_is_one_line(fetch, hub, tmp_path):
    hub.commits[COMMIT]["fineweb_train_000001.bin"] = b"\0" * 1624
    assert "fineweb_train_000001.bin is no token shard" in fetch().error()
    assert not (tmp_path / "data" / MANIFEST).exists()


def test_what_cannot_be_is_one_line(fetch, hub):
    assert "the validation shard alone has 100" in fetch("--max-tokens", 100).error()
    assert "leave --tokenizer out" in fetch("--tokenizer", "bpe:300").error()
    options = ("--source", "fineweb", "--val-tokens", 9, "--shard-tokens", 9, "--workers", 99)
    for name, value in zip(options[::2], options[1::2]):
        assert f"of GPT-2's vocabulary: leave {name} out" in fetch(name, value).error()
    assert "leave --source, --shard-tokens, --val-tokens, --workers out" in fetch(*options).error()
    assert "nobody/nothing can't be had from the Hub" in fetch("nobody/nothing").error()
    hub.commits[COMMIT].pop("fineweb_val_000000.bin")
    assert "holds no shards in llm.c's layout" in fetch().error()


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_dataset_is_said_to_be_gated(fetch, hub, status):
    hub.gated = status
    error = fetch().error()
    assert "kjj0/fineweb10B-gpt2 is gated: accept its terms on the Hub" in error
    assert "same command" not in error


def test_a_token_that_is_not_gpt2s_is_one_line(fetch, hub, tmp_path):
    lost = "fineweb_train_000002.bin"
    hub.commits[COMMIT][lost] = shard(np.array([1, 50_257], dtype="<u2"))
    error = fetch().error()
    assert f"{lost} of kjj0/fineweb10B-gpt2 has a token 50,257, GPT-2's vocabulary only" in error
    assert not (tmp_path / "data" / MANIFEST).exists()
    hub.commits[COMMIT][lost] = shard(np.array([1, 50_256], dtype="<u2"))  # its last
    assert fetch("--out", tmp_path / "other").status == 0


def test_a_shard_that_is_not_what_the_hub_says_is_one_line(tmp_path, monkeypatch):
    """The client checks sizes only."""
    file, told, came = tmp_path / "f_val_0.bin", shard(TOKENS[:100]), shard(TOKENS[1:101])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: file.write_bytes(came))
    published = Published(file.name, 100, hashlib.sha256(told).hexdigest())
    with pytest.raises(UserError, match="f_val_0.bin was not what the Hub says it is"):
        download("some/data", COMMIT, published, tmp_path)
    assert not file.exists()
    published = Published(file.name, 100, hashlib.sha256(came).hexdigest())
    assert download("some/data", COMMIT, published, tmp_path).sha256 == published.sha256


def test_a_disk_without_room_is_found_before_anything_is_fetched(tmp_path, monkeypatch):
    """What is there already needs no more room."""
    splits = ("val_0", "train_1", "train_2")
    shards = [Published(f"f_{split}.bin", 10 * n, None) for n, split in enumerate(splits, 1)]
    monkeypatch.setattr(pretokenized, "look_up", lambda *_: (COMMIT, shards))

    def full(folder: Path, tokens: int) -> None:
        raise UserError(f"{tokens} tokens have no room")

    monkeypatch.setattr(pretokenized, "check_disk", full)
    for tokens, there in ((60, "f_train_2.bin"), (30, "f_val_0.bin"), (20, "f_train_1.bin")):
        with pytest.raises(UserError, match=f"^{tokens} tokens have no room"):
            pretokenized.fetch("some/data", tmp_path / "data", None)
        (tmp_path / "data" / there).touch()


def test_a_closed_port_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    result = run("prepare_fineweb.py", "--pretokenized", "--out", tmp_path / "data")
    assert "kjj0/fineweb10B-gpt2 can't be had from the Hub" in result.error()


def test_a_hub_that_dies_within_a_shard_is_one_line(fetch, hub):
    hub.dies, hub.cut_after = True, 700
    assert "give the same command again to go on" in fetch().error()


def test_shards_are_taken_in_the_order_of_their_names():
    shards = [
        Published(f"f_{split}_{n}.bin", 10, None) for n in (2, 1, 3) for split in ("train", "val")
    ]
    names = [shard.file for shard in choose(shards, 41)]
    assert names == ["f_val_1.bin", "f_val_2.bin", "f_val_3.bin", "f_train_1.bin", "f_train_2.bin"]

"""Shards on disk, the manifest beside them, and the stream that they form."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data import load_windows
from preparation.writing import ShardWriter
from shards import (
    ENDS,
    MANIFEST,
    PROGRESS,
    VOCABULARY,
    Manifest,
    Shard,
    ShardRecord,
    TokenizerRecord,
    TokenStream,
    check_contents,
    encoding_of,
    find_encoding,
    read_manifest,
    shard_header,
    tokenizer_of,
)
from tokenizer import GPT2_SHA256

RECORD = TokenizerRecord("gpt2", 50_257, GPT2_SHA256)


def write_shard(path: Path, tokens) -> None:
    """A shard as llm.c's documentation describes it, written without our own code."""
    header = struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253)
    path.write_bytes(header + struct.pack(f"<{len(tokens)}H", *tokens))


def write_manifest(folder: Path, *shards: ShardRecord) -> None:
    (folder / MANIFEST).write_text(Manifest({"source": "test"}, RECORD, shards).to_json())


# Shard files


def test_a_header_is_256_little_endian_int32_magic_version_and_count():
    header = shard_header(0x01020304)
    assert len(header) == 1024
    assert header[:12] == bytes.fromhex("88d83401 01000000 04030201")
    assert header[12:] == bytes(1012)


def test_a_shard_that_llmc_could_have_written_reads_as_its_tokens(tmp_path):
    write_shard(tmp_path / "a.bin", [50256, 0, 1, 258, 65535])
    tokens = Shard(tmp_path / "a.bin").read(0, 9)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [50256, 0, 1, 258, 65535]


def test_an_empty_shard_reads_as_no_tokens(tmp_path):
    write_shard(tmp_path / "a.bin", [])
    shard = Shard(tmp_path / "a.bin")
    assert (len(shard), shard.read(0, 9).tolist()) == (0, [])


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b"", "has 0 bytes, a shard's header alone has 1024"),
        (bytes(1023), "has 1023 bytes"),
        (struct.pack("<256i", 20240521, 1, *[0] * 254), "is no token shard"),
        (struct.pack("<256i", 20240520, 2, *[0] * 254), "is no token shard"),
        (struct.pack(">256i", 20240520, 1, *[0] * 254), "is no token shard"),
        (struct.pack("<256i", 20240520, 1, -1, *[0] * 253), "says -1 tokens"),
        (struct.pack("<256i", 20240520, 1, 3, *[0] * 253) + b"aabb", "says 3 tokens, so 1030"),
        (struct.pack("<256i", 20240520, 1, 3, *[0] * 253) + b"aabbc", "but it has 1029"),
        (struct.pack("<256i", 20240520, 1, 1, *[0] * 253) + b"aabb", "says 1 tokens"),
    ],
)
def test_a_damaged_shard_is_refused_by_name(tmp_path, content, complaint):
    path = tmp_path / "train_000000.bin"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        Shard(path)
    assert str(path) in str(error.value)
    assert complaint in str(error.value)


@pytest.mark.parametrize("name", ["none.bin", "none.npy"])
def test_a_missing_shard_is_refused_by_name(tmp_path, name):
    with pytest.raises(UserError, match=f"can't read the shard {tmp_path / name}: No such file"):
        Shard(tmp_path / name)


OPENED = """
import resource, sys
from pathlib import Path
from common.errors import UserError
from shards import TokenStream

resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(sys.argv[2])))
try:
    print(TokenStream(Path(sys.argv[1]), "train").read(98, 2).tolist())
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize(("hard", "told"), [(4096, "[98, 99]"), (64, "Too many open files")])
def test_more_shards_than_files_may_be_open_at_first(tmp_path, hard, told):
    for number in range(100):
        content = shard_header(1) + struct.pack("<H", number)
        (tmp_path / f"train_{number:06d}.bin").write_bytes(content)
    assert told in run("-c", OPENED, tmp_path, hard).out


def test_a_folder_in_a_shards_place_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=f"can't read the shard {tmp_path}: Is a directory"):
        Shard(tmp_path)


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b"", "is damaged or no NumPy array"),
        (b"no numpy", "is damaged or no NumPy array"),
        (np.arange(3, dtype=np.int64), "holds int64 of shape"),
        (np.zeros((2, 2), np.uint16), r"holds uint16 of shape \(2, 2\)"),
        (np.array([None]), "is damaged or no NumPy array"),
    ],
)
def test_a_damaged_npy_shard_is_refused_by_name(tmp_path, content, complaint):
    path = tmp_path / "edufineweb_train_000001.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(UserError, match=f"{path} {complaint}"):
        Shard(path)


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (TokenizerRecord("bpe-300", 301, "{sha256}"), "has 300 tokens, 301 were expected"),
        (TokenizerRecord("bpe-300", 300, "0" * 64), "it is not the one that these tokens were"),
    ],
)
def test_a_vocabulary_that_is_not_the_recorded_one_is_refused(shards, record, told):
    own = tokenizer_of(shards).sha256
    with pytest.raises(UserError, match=told):
        find_encoding(shards, replace(record, sha256=record.sha256.format(sha256=own)))


@pytest.mark.parametrize("name", ["bpe\x1b[31m", "a\nerror: b"])
def test_a_tokenizers_name_is_plain_text(name):
    with pytest.raises(ValueError, match="expected plain text"):
        TokenizerRecord(name, 300, "0" * 64)


def test_a_truncated_npy_shard_is_refused_by_name(tmp_path):
    path = tmp_path / "a_train_0.npy"
    np.save(path, np.arange(1000, dtype=np.uint16))
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=f"{path} is damaged"):
        Shard(path)


# Folders


def test_build_nanogpts_npy_shards_are_read_without_a_manifest(tmp_path):
    np.save(tmp_path / "edufineweb_train_000002.npy", np.array([3, 4], np.uint16))
    np.save(tmp_path / "edufineweb_train_000001.npy", np.array([1, 2], np.uint16))
    np.save(tmp_path / "edufineweb_val_000000.npy", np.array([9], np.uint16))
    assert TokenStream(tmp_path, "train").read(0, 4).tolist() == [1, 2, 3, 4]
    assert TokenStream(tmp_path, "val").read(0, 1).tolist() == [9]
    assert tokenizer_of(tmp_path) == RECORD


def test_llmcs_published_shards_are_read_without_a_manifest(tmp_path):
    write_shard(tmp_path / "constrained_val_000000.bin", [7])  # no "train"
    for number in (10, 2, 1):
        write_shard(tmp_path / f"fineweb_train_{number:06d}.bin", [number])
    assert TokenStream(tmp_path, "train").read(0, 3).tolist() == [1, 2, 10]
    assert TokenStream(tmp_path, "val").read(0, 1).tolist() == [7]
    assert encoding_of(tmp_path).name == "gpt2"


@pytest.mark.parametrize("at", [0, ENDS - 1, -1])
def test_other_tokens_of_the_same_length_are_other_data_without_a_manifest_too(tmp_path, at):
    tokens, found = np.zeros(5 * ENDS, np.uint16), []
    for token in (0, 0, 1):
        tokens[at] = token
        write_shard(tmp_path / "fineweb_train_000001.bin", tokens)
        found.append(TokenStream(tmp_path, "train").fingerprint)
    assert found[0] == found[1] != found[2]


def test_a_folder_that_is_missing_or_empty_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=f"the data folder {tmp_path / 'none'} doesn't exist"):
        TokenStream(tmp_path / "none", "train")
    (tmp_path / "notes").touch()
    with pytest.raises(UserError, match=f"the data folder {tmp_path / 'notes'} is a file"):
        TokenStream(tmp_path / "notes", "train")
    with pytest.raises(UserError, match=f"{tmp_path} holds no val shard"):
        TokenStream(tmp_path, "val")


def test_a_folder_that_is_still_being_prepared_is_refused(tmp_path):
    write_shard(tmp_path / "train_000000.bin", [1, 2, 3])
    (tmp_path / PROGRESS).write_text("{}")
    with pytest.raises(UserError, match=f"{tmp_path} is not finished: give the same prepare_"):
        TokenStream(tmp_path, "train")


def test_a_manifest_comes_back_as_it_was_written(tmp_path):
    shards = (ShardRecord("val_000000.bin", "val", 3, "ab"), ShardRecord("t.bin", "train", 5, "cd"))
    manifest = Manifest({"source": "x", "max_tokens": None}, RECORD, shards)
    (tmp_path / MANIFEST).write_text(manifest.to_json())
    assert read_manifest(tmp_path) == manifest
    assert json.loads(manifest.to_json())["totals"] == {"train": 5, "val": 3}
    assert (manifest.total("train"), manifest.total("val")) == (5, 3)


def test_the_manifest_decides_which_shards_belong_to_a_split_and_in_which_order(tmp_path):
    for name, token in (("z.bin", 1), ("a.bin", 2), ("train_000009.bin", 3)):
        write_shard(tmp_path / name, [token])
    write_manifest(
        tmp_path, ShardRecord("z.bin", "train", 1, ""), ShardRecord("a.bin", "train", 1, "")
    )
    assert TokenStream(tmp_path, "train").read(0, 2).tolist() == [1, 2]
    with pytest.raises(UserError, match="lists no val shard"):
        TokenStream(tmp_path, "val")


def broken_manifest(**changes) -> str:
    content = {"version": 1, "settings": {}, "tokenizer": asdict(RECORD), "shards": []}
    return json.dumps({**content, **changes})


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", "is not a manifest"),
        ("not JSON", "is not a manifest"),
        ("[]", "is not a manifest"),
        ("\udc80", "is not a manifest"),
        ("{}", "is not a manifest: it has version None, this code reads 1"),
        (broken_manifest(version=2), "has version 2, this code reads 1"),
        (broken_manifest(shards=None), "is not a manifest"),
        (broken_manifest(shards=[{"file": "x"}]), "is not a manifest"),
        (broken_manifest(tokenizer="gpt2"), "is not a manifest"),
    ],
)
def test_a_broken_manifest_is_refused_by_name(tmp_path, text, complaint):
    (tmp_path / MANIFEST).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError) as error:
        TokenStream(tmp_path, "train")
    assert str(tmp_path / MANIFEST) in str(error.value)
    assert complaint in str(error.value)


@pytest.mark.parametrize("name", ["../train_000000.bin", "/etc/passwd", "sub/train_000000.bin"])
def test_a_manifest_that_points_out_of_its_folder_is_refused(tmp_path, name):
    write_shard(tmp_path / "train_000000.bin", [1])
    folder = tmp_path / "data"
    folder.mkdir()
    write_manifest(folder, ShardRecord(name, "train", 1, ""))
    with pytest.raises(UserError, match=f"is said to hold '{name}': expected a plain name"):
        TokenStream(folder, "train")


def test_a_shard_with_other_tokens_than_the_manifest_says_is_refused_by_name(tmp_path):
    write_shard(tmp_path / "train_000000.bin", [1, 2])
    write_manifest(tmp_path, ShardRecord("train_000000.bin", "train", 3, ""))
    with pytest.raises(
        UserError, match=f"{tmp_path}/train_000000.bin has 2 tokens, the manifest says 3"
    ):
        TokenStream(tmp_path, "train")


def test_checking_contents_finds_a_changed_byte_and_a_missing_shard(tmp_path):
    writer = ShardWriter(tmp_path, 10, 10)
    writer.write(np.arange(5, dtype="<u2"))
    writer.finish()
    writer.close()
    check_contents(tmp_path, writer.records, 2**16)
    path = tmp_path / "val_000000.bin"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path} has been damaged or changed"):
        check_contents(tmp_path, writer.records, 2**16)
    path.unlink()
    with pytest.raises(UserError, match=f"can't read the shard {path}"):
        check_contents(tmp_path, writer.records, 2**16)


def test_the_encoding_of_a_folder_is_the_vocabulary_file_beside_the_shards(shards):
    encoding = encoding_of(shards)
    assert (encoding.name, encoding.n_vocab) == ("bpe-300", 300)
    assert tokenizer_of(shards).vocab_size == 300
    tokens = TokenStream(shards, "val").read(0, 600)
    assert tokens[0] == encoding.eot_token
    assert encoding.decode(tokens[1:].tolist()).startswith("The quick brown fox")


def test_a_folder_whose_vocabulary_is_missing_or_another_is_refused(tmp_path):
    write_manifest(tmp_path)
    assert encoding_of(tmp_path).name == "gpt2"  # GPT-2's is to be had elsewhere
    (tmp_path / VOCABULARY).write_text("IQ== 0\n")
    with pytest.raises(UserError, match=f"{tmp_path / VOCABULARY} has SHA-256"):
        encoding_of(tmp_path)
    manifest = Manifest({}, TokenizerRecord("bpe-300", 300, "ab"), ())
    (tmp_path / MANIFEST).write_text(manifest.to_json())
    (tmp_path / VOCABULARY).unlink()
    with pytest.raises(UserError, match=f"can't read the vocabulary {tmp_path / VOCABULARY}"):
        encoding_of(tmp_path)


def test_reading_shards_needs_no_torch():
    code = "import sys, shards; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# The stream


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 25), min_size=1, max_size=8), st.data())
def test_reading_across_shard_borders_gives_the_shards_put_together(tmp_path_factory, sizes, data):
    folder = tmp_path_factory.mktemp("stream")
    total = sum(sizes)
    whole = np.random.default_rng(0).integers(0, 50_257, total).astype(np.uint16)
    for number, part in enumerate(np.split(whole, np.cumsum(sizes)[:-1])):
        write_shard(folder / f"train_{number:06d}.bin", part.tolist())
    stream = TokenStream(folder, "train")
    assert len(stream) == total
    if total:
        start = data.draw(st.integers(0, total - 1))
        count = data.draw(st.integers(1, total - start))
        part = stream.read(start, count)
        assert part.dtype == np.uint16
        assert part.tolist() == whole[start : start + count].tolist()
    block_size = data.draw(st.integers(1, 12))
    if total <= block_size:
        with pytest.raises(UserError, match=f"one window takes {block_size + 1}: prepare more"):
            stream.num_windows(block_size)
    else:
        windows = stream.num_windows(block_size)
        assert windows == (total - 1) // block_size
        inputs, targets = load_windows(stream, range(windows), block_size)
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.shape == targets.shape == (windows, block_size)
        used = windows * block_size
        assert inputs.flatten().tolist() == whole[:used].tolist()
        assert targets.flatten().tolist() == whole[1 : used + 1].tolist()


@pytest.mark.parametrize("kind", ["bin", "npy"])
@pytest.mark.parametrize("has_pread", [True, False])
def test_a_shard_that_is_cut_short_while_it_is_open_is_named(
    tmp_path, monkeypatch, kind, has_pread
):
    """Mapped into memory, it would end the process. Windows has no pread."""
    if not has_pread:
        monkeypatch.delattr(os, "pread")
    path = tmp_path / f"train_000000.{kind}"
    tokens = np.arange(5000, dtype=np.uint16)
    write_shard(path, tokens) if kind == "bin" else np.save(path, tokens)
    stream = TokenStream(tmp_path, "train")
    assert stream.read(3000, 1000).tolist() == tokens[3000:4000].tolist()
    os.truncate(path, 7000)
    with pytest.raises(UserError, match=f"{path} has been cut short"):
        stream.read(3000, 1000)
    assert stream.read(0, 1000).tolist() == tokens[:1000].tolist()


def test_a_disk_that_fails_while_a_shard_is_read_is_one_line(tmp_path, monkeypatch):
    def fail(*_: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    write_shard(tmp_path / "train_000000.bin", range(10))
    stream = TokenStream(tmp_path, "train")
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(UserError, match="can't read the shard .*train_000000.bin: Input/output"):
        stream.read(0, 3)


def test_what_the_system_gives_in_small_pieces_is_put_together(tmp_path, monkeypatch):
    """As Linux does where the next page can't be read, which only the next call tells."""
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, count, at: pread(file, min(count, 7), at))
    write_shard(tmp_path / "train_000000.bin", range(10))
    stream = TokenStream(tmp_path, "train")
    assert stream.read(1, 8).tolist() == [*range(1, 9)]
    assert stream.shards[0].largest_token() == 9
    monkeypatch.undo()
    assert stream.fingerprint == TokenStream(tmp_path, "train").fingerprint


def test_every_stretch_of_a_stream_is_what_it_is_in_the_whole(tmp_path):
    for number, tokens in enumerate(([1, 2, 3], [], [4, 5], [6, 7, 8, 9])):
        write_shard(tmp_path / f"train_{number}.bin", tokens)
    stream = TokenStream(tmp_path, "train")
    for start in range(9):
        for count in range(1, 10 - start):
            expected = list(range(start + 1, start + count + 1))
            assert stream.read(start, count).tolist() == expected


@pytest.mark.parametrize("dtype", [">u2", "<i2", "<f2"])
def test_an_npy_shard_of_other_numbers_of_two_bytes_is_refused(tmp_path, dtype):
    np.save(tmp_path / "train_0.npy", np.arange(9).astype(dtype))
    with pytest.raises(UserError, match="expected uint16"):
        Shard(tmp_path / "train_0.npy")


def fingerprint_of(path: Path, tokens: np.ndarray) -> str:
    path.mkdir()
    content = shard_header(len(tokens)) + tokens.astype("<u2").tobytes()
    (path / "train_0.bin").write_bytes(content)
    return TokenStream(path, "train").fingerprint


def test_without_a_manifest_a_longer_shard_with_the_same_ends_is_other_data(tmp_path, monkeypatch):
    monkeypatch.setattr("shards.ENDS", 4)
    first, second = (fingerprint_of(tmp_path / str(n), np.zeros(n)) for n in (20, 21))
    assert first != second


@pytest.mark.parametrize("at", [30_000, 40_000])
def test_a_shard_is_known_by_32768_tokens_at_each_end(tmp_path, at):
    tokens = np.zeros(70_000)
    before = fingerprint_of(tmp_path / "a", tokens)
    tokens[at] = 1
    assert fingerprint_of(tmp_path / "b", tokens) != before


@pytest.mark.parametrize("size", [0, -1, 2**16 + 1])
def test_a_vocabulary_has_1_to_65536_tokens(size):
    for possible in (1, 2**16):
        TokenizerRecord("x", possible, "")
    with pytest.raises(ValueError, match="16 bits"):
        TokenizerRecord("x", size, "")

"""Shards as they are written: what went in comes out, under the names that are told."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from preparation.writing import ShardWriter, check_disk, check_same
from shards import Shard, check_contents, shard_header


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 65535), max_size=60),
    st.integers(1, 20),
    st.integers(1, 30),
    st.integers(1, 7),
)
def test_what_a_writer_wrote_is_read_back(tmp_path_factory, tokens, shard_tokens, val, at_once):
    folder = tmp_path_factory.mktemp("written")
    writer = ShardWriter(folder, shard_tokens, val)
    rest = np.array(tokens, dtype="<u2")
    while len(rest):
        part, rest = np.split(rest, [min(writer.room, at_once)])
        writer.write(part)
        if writer.room == 0:
            writer.finish()
    if writer.pending:
        writer.finish()
    writer.close()
    written = [Shard(folder / record.file) for record in writer.records]
    assert [token for shard in written for token in shard.read(0, len(shard))] == tokens
    assert sum(r.tokens for r in writer.records if r.split == "val") == min(val, len(tokens))
    assert all(len(shard) <= shard_tokens for shard in written)
    assert {path.name for path in folder.iterdir()} == {record.file for record in writer.records}
    for split in ("val", "train"):
        names = [record.file for record in writer.records if record.split == split]
        assert names == [f"{split}_{index:06d}.bin" for index in range(len(names))]
    check_contents(folder, writer.records, 2**16)


def test_a_shard_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """If the power failed in between, a file of zeros would be taken for what its run had done."""
    synced, named = {}, []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(descriptor: int) -> None:
        fsync(descriptor)
        synced[os.fstat(descriptor).st_ino] = writer.partial.read_bytes()

    def note_replace(self: Path, target: Path) -> Path:
        named.append((target.name, synced.get(self.stat().st_ino)))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    writer = ShardWriter(tmp_path, 10, 0)
    tokens = np.arange(10, dtype="<u2")
    writer.write(tokens)
    writer.finish()
    writer.close()
    assert named == [("train_000000.bin", shard_header(10) + tokens.tobytes())]


def test_a_planted_link_does_not_lead_a_shard_out_of_its_folder(tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    victim.write_text("precious")
    folder.mkdir()
    (folder / "shard.partial").symlink_to(victim)
    ShardWriter(folder, 10, 0).close()
    assert victim.read_text() == "precious"


def test_where_two_long_settings_differ_is_shown():
    long = "a/rather/long/path/" * 10
    with pytest.raises(UserError, match=f"'{long[-20:]}old' then, '{long[-20:]}new' now; choose"):
        check_same({"source": long + "old"}, {"source": long + "new"}, "the folder was begun")


def test_a_token_takes_two_bytes_of_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=15_000_000))
    check_disk(tmp_path, 7_500_000)
    with pytest.raises(UserError, match="7,500,001 tokens need about 15 MB, .* has 15 MB free"):
        check_disk(tmp_path, 7_500_001)

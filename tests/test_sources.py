"""Every kind of file gives its documents, in order; whatever is broken is refused by name."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import as_nobody, run
from fake_hub import FakeHub

from common.errors import UserError
from preparation import sources
from preparation.sources import batches, estimated_tokens, find_source
from shards import MANIFEST, PROGRESS, TokenStream, encoding_of, read_manifest

TEXTS = ["The first.\n", "zweiter Text, größer — 日本語 🙂", "", "fourth\r\nwith\tall  kinds \n\n"]


def documents(name: object) -> list[str]:
    """All texts of a source, pieces put together."""
    source = find_source(str(name))
    return ["".join(pieces) for batch in batches(source) for pieces in batch()]


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


WRITERS = {
    "a.jsonl": lambda path, texts: path.write_bytes(json_lines(texts)),
    "a.jsonl.gz": lambda path, texts: path.write_bytes(gzip.compress(json_lines(texts))),
    "a.jsonl.zst": lambda path, texts: path.write_bytes(zstd(json_lines(texts))),
    "a.parquet": lambda path, texts: pq.write_table(
        pa.table({"id": range(len(texts)), "text": texts}), path, row_group_size=2
    ),
}


# What is read


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_of_each_kind_gives_its_texts_in_order(tmp_path, name):
    WRITERS[name](tmp_path / name, TEXTS)
    assert documents(tmp_path / name) == TEXTS


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_of_many_batches_gives_its_texts_in_order(tmp_path, name, monkeypatch):
    monkeypatch.setattr(sources, "BATCH_BYTES", 1000)
    texts = [f"text {number} " * (number % 7) for number in range(400)]
    WRITERS[name](tmp_path / name, texts)
    assert len(list(batches(find_source(str(tmp_path / name))))) > 10
    assert documents(tmp_path / name) == texts


@pytest.mark.parametrize("suffix", [".txt", ".md", ".rst"])
def test_a_text_file_is_one_document_with_its_line_ends_as_they_are(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes("größer\r\nnew\rold\n\n".encode())
    assert documents(path) == ["größer\r\nnew\rold\n\n"]


def test_a_text_in_several_gzip_members_is_read_to_the_end(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(json_lines(TEXTS[:2])) + gzip.compress(json_lines(TEXTS[2:])))
    assert documents(path) == TEXTS


def test_empty_lines_are_skipped_and_the_last_needs_no_end(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"text": "a"}\r\n  \n{"text": "b"}')
    assert documents(path) == ["a", "b"]


def test_half_a_surrogate_pair_in_json_becomes_the_replacement_character(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(rb'{"text": "a \ud83d b \ud83d\ude42"}')
    assert documents(path) == ["a \ufffd b 🙂"]


def test_a_parquet_file_whose_column_has_no_name_is_one_line(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS}), path, store_schema=False)
    before, _, after = path.read_bytes().rpartition(b"text")  # where a column's size is told
    path.write_bytes(before + b"te\xfft" + after)
    with pytest.raises(UserError, match=f"can't read {path}: 'utf-8' codec can't decode"):
        estimated_tokens(find_source(str(path)), 1000)


def test_long_texts_come_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_CHARACTERS", 10)
    (tmp_path / "a.jsonl").write_bytes(json_lines(["é" * 25]))
    (tmp_path / "b.txt").write_text("é" * 25, encoding="utf-8")
    found = [*batches(find_source(f"{tmp_path}/*"))]
    assert len(found) == 2
    for batch in found:
        assert [[len(piece) for piece in pieces] for pieces in batch()] == [[10, 10, 5]]


def tree(folder: Path) -> None:
    """Files whose sorted order differs from the order of their making and of their depth."""
    for name in ("b/2.txt", "a.txt", "b/10.md", "c.text", "b/c/1.rst", ".git/x.txt", "b/.y.txt"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(name)
    (folder / "d.txt").mkdir()


def test_a_folder_gives_its_files_in_sorted_order_without_hidden_ones(tmp_path):
    tree(tmp_path)
    assert documents(tmp_path) == ["a.txt", "b/10.md", "b/2.txt", "b/c/1.rst"]


def test_folders_behind_links_are_read_too_and_each_once(tmp_path):
    tree(tmp_path / "elsewhere")
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "e.txt").write_text("e.txt")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "linked again").symlink_to(tmp_path / "elsewhere")
    (folder / "round").symlink_to(folder)
    assert documents(folder) == ["e.txt", "a.txt", "b/10.md", "b/2.txt", "b/c/1.rst"]


def test_a_pattern_gives_each_file_once_however_it_comes_to_it(tmp_path):
    """By its shortest name: by two ways, and around a link."""
    tree(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "round").symlink_to(tmp_path)
    names = ["a.txt", "b/2.txt"]
    assert documents(f"{tmp_path}/**/*.txt") == documents(f"{tmp_path}/**/**/*.txt") == names
    assert find_source(f"{tmp_path}/**/2.txt").files == (f"{tmp_path}/b/2.txt",)


@pytest.mark.parametrize("name", WRITERS)
def test_names_in_capitals_are_as_good(tmp_path, name):
    path = tmp_path / name.upper()
    WRITERS[name](path, TEXTS)
    (tmp_path / "B.TXT").write_text("b")
    (tmp_path / "c.Md").write_text("c")
    assert documents(tmp_path) == documents(path) == TEXTS
    assert documents(f"{tmp_path}/[Bc].*") == ["b", "c"]


def test_a_link_that_leads_nowhere_is_named_and_a_pipe_is_no_file(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    os.mkfifo(tmp_path / "b.txt")
    for other in (".hidden.txt", "latest.log"):
        (tmp_path / other).symlink_to("nowhere")
    assert documents(tmp_path) == ["a"]
    (tmp_path / "c.txt").symlink_to("nowhere")
    with pytest.raises(UserError, match="can't read .*c.txt: No such file"):
        find_source(str(tmp_path))


def test_a_folder_in_a_source_that_cannot_be_read_is_named():
    with tempfile.TemporaryDirectory() as name:  # tmp_path is in a folder for root alone
        folder = Path(name, "texts")
        (folder / "closed").mkdir(parents=True)
        (folder / "a.txt").write_text("a")
        Path(name).chmod(0o755)
        (folder / "closed").chmod(0)
        with as_nobody(), pytest.raises(UserError, match="can't read .*closed: Permission denied"):
            find_source(str(folder))
        (folder / "closed").chmod(0o700)
        assert documents(folder) == ["a"]


def test_a_mark_of_the_byte_order_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfText")
    assert documents(tmp_path) == ["Text"]


def test_a_link_of_a_glob_that_leads_nowhere_is_named(tmp_path):
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=f"can't read {tmp_path}/b.txt: No such file"):
        find_source(f"{tmp_path}/*.txt")


def test_a_glob_gives_its_files_in_sorted_order(tmp_path):
    tree(tmp_path)
    assert documents(tmp_path / "b/*.*") == ["b/10.md", "b/2.txt"]
    assert documents(tmp_path / "**/*.txt") == ["a.txt", "b/2.txt"]


def test_empty_files_are_empty_documents_and_no_lines_are_none(tmp_path):
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.jsonl").touch()
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "c.parquet")
    assert documents(tmp_path / "*") == [""]


def test_a_readme_beside_a_folders_parquet_files_is_no_document(tmp_path, capsys):
    (tmp_path / "README.md").write_text("What these files are.")
    (tmp_path / "notes.jsonl").write_text('{"text": "line"}\n')
    assert documents(tmp_path) == ["line"]
    pq.write_table(pa.table({"text": ["row"]}), tmp_path / "c.parquet")
    assert documents(tmp_path) == ["row"]
    told = "files like c.parquet are read (1), others like notes.jsonl aren't (2)"
    assert told in capsys.readouterr().err
    assert len(documents(tmp_path / "*")) == 3


def test_a_text_column_of_any_arrow_string_type_is_read(tmp_path):
    for number, kind in enumerate(
        (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()))
    ):
        table = pa.table({"text": pa.array(TEXTS).cast(kind)})
        pq.write_table(table, tmp_path / f"{number}.parquet")
        assert documents(tmp_path / f"{number}.parquet") == TEXTS


# What is refused


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("none.txt", "there is nothing of this name"),
        ("*.jsonl", "there is nothing of this name"),
        ("empty folder", "there is no text in it"),
        ("unknown suffix", "a file of another kind"),
    ],
)
def test_a_source_that_is_not_there_is_refused_by_name(tmp_path, kind, told):
    (tmp_path / "empty folder").mkdir()
    (tmp_path / "unknown suffix").write_text("text")
    with pytest.raises(UserError) as error:
        find_source(str(tmp_path / kind))
    assert str(error.value).startswith(f"--source {tmp_path / kind}: {told}; expected fineweb-edu")


def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(monkeypatch):
    monkeypatch.setattr(sources, "hub_source", None)
    with pytest.raises(UserError, match="^--source texts/none.txt: there is nothing of this name"):
        find_source("texts/none.txt")


def refusal(name: object) -> str:
    with pytest.raises(UserError) as error:
        documents(name)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "a"',
        b'{"txt": "a"}',
        b"[]",
        b'"text"',
        b"17",
        b'{"text": "\xff"}',
        b"[" * 100_000,
    ],
)
def test_a_broken_json_line_is_refused_by_file_and_line(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
    told = refusal(path)
    assert told.startswith(f'{path}, line 3: expected an object such as {{"text"')
    assert told.endswith(")") and "Error: " in told  # the reason


def test_a_broken_json_line_far_down_is_refused_by_its_number(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BATCH_BYTES", 100)
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(["text"] * 1233) + b"broken\n")
    assert refusal(path).startswith(f"{path}, line 1234:")


@pytest.mark.parametrize(
    "value, found", [("null", "empty (null)"), ("3", "of type int"), ('["a"]', "of type list")]
)
def test_a_text_that_is_no_text_is_refused_by_file_and_line(tmp_path, value, found):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "a"}}\n{{"text": {value}}}\n')
    assert refusal(path) == f"{path}, line 2: the document is {found}, expected text: leave it out"


def test_a_null_in_parquet_is_refused_by_file_and_row(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"] * 70 + [None]}), path, row_group_size=40)
    assert refusal(path) == (
        f"{path}, row 31 of row group 2: the document is empty (null), expected text: leave it out"
    )


def test_parquet_without_text_is_refused_with_the_columns_it_has(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1], "content": ["a"]}), path)
    assert refusal(path) == f"{path} has the columns id, content; expected 'text'"


def test_parquet_whose_text_is_a_structure_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [{"text": "a"}]}), path)
    found = "the document is of type dict, expected text: leave it out"
    assert refusal(path) == f"{path}, row 1 of row group 1: {found}"


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_a_damaged_compressed_file_is_refused_by_name(tmp_path, name, damage):
    path = tmp_path / name
    WRITERS[name](path, [os.urandom(50).hex() for _ in range(2000)])
    content = path.read_bytes()
    path.write_bytes(
        {"cut": content[: len(content) // 2], "garbage": b"no such format" * 9, "empty": b""}[
            damage
        ]
    )
    assert refusal(path).startswith(f"can't read {path}: ")


def test_parquet_with_damaged_pages_is_refused_by_name(tmp_path):
    """Always the same bytes: Parquet has no checksums, and some damage still unpacks to text."""
    path, draw = tmp_path / "a.parquet", random.Random(0)
    texts = [draw.randbytes(50).hex() for _ in range(2000)]
    pq.write_table(pa.table({"text": texts}), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[2000:4000] = bytes(2000)
    path.write_bytes(content)
    assert refusal(path).startswith(f"can't read {path}: ")


def test_a_text_that_is_not_utf8_is_refused_by_name(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("Größe".encode("latin-1"))
    assert refusal(path) == (
        f"can't read {path}: it has a byte 0xf6 that is no UTF-8; convert it, or leave it out of "
        "--source"
    )


# Revisions and estimates


def test_changing_adding_or_touching_a_file_changes_the_revision(tmp_path):
    def revision() -> str:
        return find_source(str(tmp_path)).revision

    path = tmp_path / "a.txt"
    path.write_text("one")
    seen = [revision()]
    assert revision() == seen[0]
    os.utime(path, ns=(0, 0))
    seen.append(revision())
    path.write_text("other")
    os.utime(path, ns=(0, 0))
    seen.append(revision())
    (tmp_path / "b.txt").touch()
    seen.append(revision())
    (tmp_path / "b.txt").rename(tmp_path / "c.txt")
    seen.append(revision())
    assert len(set(seen)) == 5


@pytest.mark.parametrize("name", [*WRITERS, "a.txt"])
def test_the_estimate_of_tokens_is_of_the_right_size(tmp_path, name):
    text = (Path(sources.__file__).read_text(encoding="utf-8") + "\n") * 3
    write = WRITERS.get(name, lambda path, texts: path.write_text(texts[0], encoding="utf-8"))
    write(tmp_path / name, [text])
    source = find_source(str(tmp_path / name))
    estimate = estimated_tokens(source, 10**9)
    assert estimated_tokens(source, 100) == 100
    if name.endswith((".gz", ".zst")):  # a guess: how well it compresses is not known beforehand
        assert estimate == int(4 * (tmp_path / name).stat().st_size / 3.5) > 1000
    else:
        assert estimate == pytest.approx(len(text.encode()) / 3.5, rel=0.1)


def test_the_estimate_opens_no_more_files_than_its_limit_needs(tmp_path):
    """A dataset on the Hub may have thousands, each a request away."""
    pq.write_table(pa.table({"text": ["abcdefg" * 1000]}), tmp_path / "a.parquet")
    first, missing = str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")
    source = sources.Source("s", (first, missing), "r")
    assert estimated_tokens(source, 1900) == 1900
    with pytest.raises(UserError, match="b.parquet"):
        estimated_tokens(source, 2100)


# The Hub: the real clients against a Hub on the loopback interface

CARD = b"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
- config_name: held-out
  data_files:
  - split: test
    path: sample/10BT/*
- config_name: lines
  data_files:
  - split: train
    path: lines/*
---
# FineWeb-Edu, much abridged
"""
OLD, NEW = "0123456789" * 4, "9876543210" * 4


def parquet(texts: list[str]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), sink, row_group_size=2)
    return sink.getvalue()


@pytest.fixture
def hub() -> FakeHub:
    """FineWeb-Edu at two commits, of which the newer says other things."""
    commits = {
        commit: {
            "README.md": CARD,
            "data/CC-MAIN-2024-10/000_00000.parquet": parquet([f"{word} crawl"]),
            "sample/10BT/001_00000.parquet": parquet([f"{word} six", f"{word} seven"]),
            "sample/10BT/000_00000.parquet": parquet([f"{word} {n}" for n in range(5)]),
            "lines/a.jsonl": b'{"text": "a"}\n',
        }
        for commit, word in ((OLD, "old"), (NEW, "new"))
    }
    return FakeHub("HuggingFaceFW/fineweb-edu", commits)


def test_fineweb_edu_is_streamed_from_the_hub_and_its_commit_recorded(hub, on_hub, tmp_path):
    long = [os.urandom(150_000).hex() for _ in range(6)]
    hub.commits[NEW]["sample/10BT/002_00000.parquet"] = parquet(long)
    hub.failures = 1  # the Hub is busy once in a while
    out = tmp_path / "out"
    command = ["prepare_fineweb.py", "--source", "fineweb-edu", "--out", out]
    command += ["--val-tokens", 10, "--workers", 2]
    assert on_hub(hub, *command, fresh=True).status == 0
    manifest = read_manifest(out)
    assert manifest.settings["revision"] == NEW
    stream = [TokenStream(out, split) for split in ("val", "train")]
    tokens = [token for part in stream for token in part.read(0, len(part)).tolist()]
    texts = [*(f"new {number}" for number in range(5)), "new six", "new seven", *long]
    assert encoding_of(out).decode(tokens) == "".join(f"<|endoftext|>{text}" for text in texts)
    assert hub.bytes_sent < 1.3 * sum(map(len, hub.commits[NEW].values()))
    assert not [path for path in (tmp_path / "hf").rglob("*") if path.suffix == ".parquet"]


def test_a_run_that_goes_on_reads_the_commit_it_began_with(hub, on_hub, tmp_path):
    del hub.commits[NEW]
    out = tmp_path / "out"
    command = ["prepare_fineweb.py", "--source", "fineweb-edu", "--out", out]
    command += ["--val-tokens", 10, "--workers", 1]
    assert on_hub(hub, *command).status == 0
    finished = {path.name: path.read_bytes() for path in out.iterdir()}
    content = json.loads((out / MANIFEST).read_text())
    for path in (MANIFEST, "train_000000.bin"):  # as if it had been killed after the first shard
        (out / path).unlink()
    unfinished = {"shards": content["shards"][:1], "batch": 1, "skip": 4}  # 6 + 4 = val_tokens
    unfinished |= {key: content[key] for key in ("settings", "tokenizer")}
    (out / PROGRESS).write_text(json.dumps(unfinished))
    hub.commits[NEW] = {"README.md": CARD, "sample/10BT/000_00000.parquet": parquet(["x"])}
    assert on_hub(hub, *command).status == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == finished


def test_another_source_for_a_folder_is_told_whatever_the_first_was(hub, on_hub, tmp_path):
    """Not that the Hub knows no commit of a local file's name."""
    (tmp_path / "a.txt").write_text("text " * 100)
    command = ["prepare_fineweb.py", "--val-tokens", 10, "--workers", 1]
    command += ["--out", tmp_path / "out", "--source"]
    assert on_hub(hub, *command, tmp_path / "a.txt").status == 0
    assert "holds finished shards with another source" in on_hub(hub, *command, hub.name).error()


def test_what_the_hub_does_not_have_is_refused_in_one_line(hub, on_hub):
    names = {
        "fineweb-edu": "ok",
        f"HuggingFaceFW/fineweb-edu@{OLD}": "ok",
        "HuggingFaceFW/fineweb-edu:sample-11BT": "sample-10BT",
        "HuggingFaceFW/fineweb-edu:held-out": "has no train split, only",
        "HuggingFaceFW/fineweb-edu:lines": "its files are not Parquet",
        "HuggingFaceFW/fineweb-edu@none": "none",
        "nobody/nothing": "nobody/nothing",
        "fineweb": "HuggingFaceFW/fineweb",
    }
    code = (
        "from preparation.sources import *\n"
        f"for name in {list(names)!r}:\n"
        "    try:\n"
        "        source = find_source(name)\n"
        "        print('ok', source.revision, len(source.files))\n"
        "    except UserError as error:\n"
        "        print(error)\n"
    )
    result = on_hub(hub, "-c", code)
    assert result.status == 0, result.err
    lines = result.out.splitlines()
    assert len(lines) == len(names), result.out
    assert lines[0] == f"ok {NEW} {sum('10BT' in name for name in hub.commits[NEW])}"
    assert lines[1].startswith(f"ok {OLD} ")
    for (name, complaint), line in list(zip(names.items(), lines))[2:]:
        assert line.startswith(f"--source {name}")
        assert complaint in line.removeprefix(f"--source {name}")


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"data.py": b"x = 1"}, "found data.py: its files are not Parquet; download them"),
        ({"README.md": b"---\nconfigs: [unclosed\n---\n"}, "it can't be had from the Hub: while"),
    ],
)
def test_a_dataset_of_a_script_or_with_a_broken_card_is_one_line(
    hub, on_hub, tmp_path, files, told
):
    hub.name, hub.commits = "some/data", {NEW: files | {"a.txt": b"a"}}
    error = on_hub(hub, "prepare_fineweb.py", "--source", hub.name, "--out", tmp_path / "o").error()
    assert "--source some/data: " in error and told in error


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("card", [True, False])  # looked at first, if there is one
def test_a_gated_dataset_is_said_to_be_gated(hub, on_hub, tmp_path, status, card):
    hub.name, hub.gated = "some/data", status
    hub.commits = {NEW: {"data/train.parquet": parquet(["a"])}}
    if card:
        hub.commits[NEW]["README.md"] = b"---\n---\n"
    error = on_hub(hub, "prepare_fineweb.py", "--source", hub.name, "--out", tmp_path / "o").error()
    assert "some/data" in error
    assert "is gated: accept its terms on the Hub" in error
    assert "no such file" not in error


def test_a_hub_that_cannot_be_reached_is_refused_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    result = run("prepare_fineweb.py", "--source", "fineweb-edu", "--out", tmp_path / "out")
    assert "--source fineweb-edu: there is no such file, and it can't be had" in result.error()
    assert not (tmp_path / "out").exists()


def test_a_hub_that_dies_while_it_is_read_is_one_line(hub, on_hub, tmp_path):
    hub.commits[NEW]["sample/10BT/002_00000.parquet"] = parquet([os.urandom(150_000).hex()])
    hub.dies, hub.cut_after = True, 10_000  # within the large file
    code = (
        "import sys, time\n"
        "time.sleep = lambda seconds: None  # between tries: 20 s in all\n"
        "from common.errors import run_script\n"
        "from prepare_fineweb import main, parse_arguments\n"
        f"sys.exit(run_script(main, parse_arguments(['--out', '{tmp_path / 'out'}'])))\n"
    )
    error = on_hub(hub, "-c", code).error()
    assert "can't read hf://datasets/HuggingFaceFW/fineweb-edu" in error


# Python's documentation


def test_python_docs_are_over_a_megabyte_of_paragraphs_that_never_repeat():
    first = documents("python-docs")
    assert sum(map(len, first)) > 1_000_000
    paragraphs = [part.strip("\n") for text in first for part in text.split("\n\n")]
    assert len(paragraphs) > 10_000
    assert len(set(paragraphs)) == len(paragraphs)
    assert any("Return a list" in text for text in first)
    assert documents("python-docs") == first


def test_python_docs_walk_meets_the_definitions_that_ast_walk_meets():
    import ast

    code = (
        "if a:\n def f(): 'f'\nelse:\n class C:\n  'C'\n  async def g(self):\n   'g'\n"
        "try:\n def h(): 'h'\nexcept E:\n def i(): 'i'\nelse:\n def j(): 'j'\n"
        "finally:\n def k(): 'k'\nmatch x:\n case 1:\n  def m(): 'm'\n"
        "for y in z:\n while w:\n  with v:\n   def n(): 'n'\nq = lambda: [1 for _ in ()]\n"
    )
    tree = ast.parse(code)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    expected = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    assert len(expected) == 10
    assert list(sources._definitions(tree)) == expected


def test_a_file_that_was_moved_is_another_source(tmp_path):
    """The documents' order may be another: a run can't go on there."""
    paths = [tmp_path / folder / "x.txt" for folder in "ab"]
    for path in paths:
        path.parent.mkdir()
        path.write_text("text")
        os.utime(path, (1, 1))
    assert sources.local_revision(paths[:1]) != sources.local_revision(paths[1:])

"""Preparing is a pure function of its source, whoever is killed when; and refuses in one line."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, TEXT, run
from test_tokenizer import AWKWARD

import prepare_fineweb
from common.errors import UserError
from common.files import locked
from preparation.sources import batches, estimated_tokens, find_source
from prepare_fineweb import encode_batch, interrupts_put_off, training_texts
from shards import MANIFEST, PROGRESS, VOCABULARY, TokenStream, encoding_of, read_manifest
from tokenizer import (
    gpt2_encoding,
    make_encoding,
    save_vocabulary,
    train_bpe,
    vocabulary_of,
    well_formed,
)

SCRIPT = "prepare_fineweb.py"


def fingerprint(folder: Path) -> dict[str, str]:
    """Every file of a folder, hidden ones too, with its content's hash."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def stream_of(folder: Path) -> list[int]:
    """All tokens, validation first: the order of the source."""
    return [
        token
        for split in ("val", "train")
        for stream in [TokenStream(folder, split)]
        for token in stream.read(0, len(stream)).tolist()
    ]


def in_this_process(source, vocabulary, workers, first):
    """What prepare_fineweb.encoded promises, without workers: the many small tests use it."""
    from tokenizer import load_vocabulary

    encoding = load_vocabulary(vocabulary)
    for number, batch in enumerate(batches(source)):
        if number >= first:
            for tokens in encode_batch(encoding, batch):
                yield number, tokens


@pytest.fixture
def quick(monkeypatch):
    """Encode here instead of in workers, which take half a second each to start."""
    monkeypatch.setattr(prepare_fineweb, "encoded", in_this_process)


@pytest.fixture
def texts(tmp_path) -> Path:
    """A folder of a dozen small text files."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:02d}.txt").write_text(TEXT * (number + 1), encoding="utf-8")
    return folder


@pytest.fixture
def prepare(call, quick, texts, tmp_path):
    """Prepare the small texts into tmp_path/out: prepare("--max-tokens", 1000)."""

    def prepare_texts(*options: object, source: object = texts, out: object = tmp_path / "out"):
        defaults = ["--tokenizer", vocabulary, "--val-tokens", 500, "--shard-tokens", 700]
        return call("prepare_fineweb", "--source", source, "--out", out, *defaults, *options)

    vocabulary = tmp_path / "vocabulary"
    save_vocabulary(make_encoding(train_bpe([TEXT], 300)), vocabulary)
    return prepare_texts


# The whole corpus, with real workers and real kills


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> tuple[list[object], Path]:
    """The command line for the whole corpus, and the folder that one worker makes of it."""
    folder = tmp_path_factory.mktemp("whole")
    command = [SCRIPT, "--source", corpus / "corpus-*.parquet", "--val-tokens", 300_000]
    command += ["--shard-tokens", 1_000_000]
    result = run(*command, "--out", folder / "one", "--workers", 1)
    assert result.status == 0, result.err
    return command, folder / "one"


def test_the_corpus_becomes_end_of_text_and_tiktokens_tokens_document_by_document(whole, corpus):
    _, folder = whole
    encoding = gpt2_encoding()
    streams = [TokenStream(folder, split) for split in ("val", "train")]
    tokens = np.concatenate([stream.read(0, len(stream)) for stream in streams])
    at = 0
    for file in sorted(corpus.glob("*.parquet")):
        for text in pq.read_table(file, columns=["text"]).column(0).to_pylist():
            expected = [encoding.eot_token, *encoding.encode_ordinary(text)]
            assert np.array_equal(tokens[at : at + len(expected)], expected)
            at += len(expected)
    assert at == len(tokens) > 10_000_000
    assert len(streams[0]) == 300_000
    assert encoding_of(folder).name == "gpt2"
    assert [len(shard) for shard in streams[1].shards[:-1]] == [1_000_000] * 10


def test_three_workers_give_the_same_bytes_as_one(whole, tmp_path):
    command, one = whole
    result = run(*command, "--out", tmp_path / "three", "--workers", 3)
    assert result.status == 0, result.err
    assert fingerprint(tmp_path / "three") == fingerprint(one)


def start(*arguments: object) -> subprocess.Popen:
    """Start preparing in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, arguments)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # What a shell runs in the background is told to ignore Ctrl-C, and hands that on.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
    )


def wait_for(condition, what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.005)


def shards_finished(folder: Path) -> int:
    """How many shards the progress file records."""
    try:
        return len(json.loads((folder / PROGRESS).read_text())["shards"])
    except FileNotFoundError:
        return 0


def workers_of(process: subprocess.Popen) -> list[int]:
    """The worker processes, without multiprocessing's resource tracker."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
    return [int(pid) for pid, command in commands.items() if b"spawn_main" in command]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")


def struck(
    out: Path, shards: int, blow: Callable[[subprocess.Popen], None], *arguments: object
) -> tuple[int, str]:
    """Prepare until so many shards are there, and strike; the exit status and standard error.

    On a machine that let the run come to its end meanwhile, it is done once more from where it was.
    """
    before = out.with_name("before")
    shutil.rmtree(before, ignore_errors=True)
    shutil.copytree(out, before)

    def far_enough(process: subprocess.Popen) -> bool:
        return shards_finished(out) >= shards or process.poll() is not None

    for _ in range(10):
        process = start(*arguments, "--out", out)
        wait_for(partial(far_enough, process), f"{shards} shards")
        blow(process)
        _, err = process.communicate(timeout=60)
        if process.returncode != 0:
            return process.returncode, err
        shutil.rmtree(out)
        shutil.copytree(before, out)
    raise AssertionError("ten times it was done before it was struck")


@needs_proc
def test_killed_and_interrupted_again_and_again_it_ends_with_the_same_bytes(whole, tmp_path):
    command, one = whole
    out = tmp_path / "out"
    out.mkdir()
    arguments = command[1:]
    workers: list[int] = []

    def kill_the_parent(process: subprocess.Popen) -> None:
        """The workers notice, and end as well."""
        workers[:] = workers_of(process) if process.poll() is None else []
        process.kill()

    status, _ = struck(out, 1, kill_the_parent, *arguments, "--workers", 2)
    assert status == -signal.SIGKILL
    assert len(workers) == 2
    wait_for(lambda: not any(map(is_alive, workers)), "the workers' end")
    with pytest.raises(UserError, match="is not finished"):
        TokenStream(out, "train")

    def interrupt(process: subprocess.Popen) -> None:
        """As Ctrl-C does it: the terminal signals the whole group, workers leave it to the parent.

        A signal to the workers alone, a little earlier, is ignored too.
        """
        if process.poll() is None:
            for worker in workers_of(process):
                with suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGINT)
            os.killpg(process.pid, signal.SIGINT)

    status, err = struck(out, 4, interrupt, *arguments, "--workers", 1)
    assert status == 130
    assert err.splitlines()[-1] == (
        "interrupted; the same command goes on after the last whole shard, if there is one"
    )
    assert "Traceback" not in err

    def kill_them_all(process: subprocess.Popen) -> None:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)

    status, _ = struck(out, 7, kill_them_all, *arguments, "--workers", 1)
    assert status == -signal.SIGKILL
    assert not (out / MANIFEST).exists()

    assert run(SCRIPT, *arguments, "--out", out, "--workers", 3).status == 0
    assert fingerprint(out) == fingerprint(one)


def test_ctrl_c_while_workers_start_is_heard_when_all_have_and_not_by_them():
    """A worker that heard of it would end with a traceback; lost, the run would go on."""
    code = "import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, []), flush=True)"
    started, done = [], threading.Event()
    other = threading.Thread(target=done.wait)  # it takes the signal, which it doesn't block
    other.start()
    with pytest.raises(KeyboardInterrupt):
        with interrupts_put_off():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            started.append(subprocess.check_output([sys.executable, "-c", code], text=True))
    done.set()
    assert "SIGINT" in started[0]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


WORKER = """
import multiprocessing, sys
from pathlib import Path
from prepare_fineweb import encoded, find_source

stream = encoded(find_source(sys.argv[1]), Path(sys.argv[2]), 1, 0)
next(stream)
(worker,) = multiprocessing.active_children()
print(Path(f"/proc/{worker.pid}/status").read_text())
"""


@needs_proc
def test_a_worker_does_not_hear_of_ctrl_c(texts, tmp_path):
    """In a fresh process: the first start of multiprocessing's is another than the later ones."""
    save_vocabulary(make_encoding(train_bpe([TEXT], 300)), tmp_path / "vocabulary")
    told = run("-c", WORKER, texts, tmp_path / "vocabulary")
    blocked = int(re.search(r"SigBlk:\s*(\w+)", told.out)[1], 16)
    assert blocked >> (signal.SIGINT - 1) & 1, told


def test_more_workers_than_the_system_allows_are_one_line(tmp_path, texts):
    code = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))"
    code += f"; sys.argv[0] = {SCRIPT!r}; runpy.run_path({SCRIPT!r}, run_name='__main__')"
    words = ("--source", texts, "--out", tmp_path / "out", "--tokenizer", "bpe:260")
    result = run("-c", code, *words, "--val-tokens", 500, "--workers", 30)
    assert "can't start 30 worker processes: Too many open files: use fewer" in result.error()


@needs_proc
def test_a_worker_that_is_killed_ends_the_run_with_one_line(corpus, tmp_path):
    command = ["--source", corpus / "corpus-*.parquet", "--out", tmp_path / "out"]
    process = start(*command, "--val-tokens", 100_000, "--workers", 2, "--max-tokens", 5_000_000)
    wait_for(lambda: shards_finished(tmp_path / "out") >= 1, "a shard")
    os.kill(workers_of(process)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "a worker process died (exit status -9" in errors[0]
    assert "Traceback" not in err
    assert process.returncode == 2


def test_what_a_worker_refuses_ends_the_run_with_its_line(call, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    result = call(
        *["prepare_fineweb", "--source", tmp_path / "a.jsonl", "--out", tmp_path / "out"],
        *["--tokenizer", "gpt2", "--val-tokens", 1, "--workers", 2],
    )
    assert f"{tmp_path / 'a.jsonl'}, line 2: the document is empty (null)" in result.error()
    with pytest.raises(UserError, match="is not finished"):
        TokenStream(tmp_path / "out", "train")


@needs_proc
def test_memory_stays_bounded_however_large_a_row_group_is(tmp_path):
    """One row group of 400 MB: read whole, it would be in memory twice."""
    text = TEXT * 60
    rows = 400_000_000 // len(text.encode())
    pq.write_table(
        pa.table({"text": pa.array([text]).take(pa.array(np.zeros(rows, np.int32)))}),
        tmp_path / "a.parquet",
        row_group_size=rows,
        compression="none",
        use_dictionary=False,
    )
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups == 1
    assert (tmp_path / "a.parquet").stat().st_size > 350e6
    process = start(
        *["--source", tmp_path / "a.parquet", "--out", tmp_path / "out", "--workers", 2],
        *["--val-tokens", 1000, "--max-tokens", 6_000_000],
    )
    peak: dict[int, int] = {}
    while process.poll() is None:
        try:
            for pid in [process.pid, *workers_of(process)]:
                status = Path(f"/proc/{pid}/status").read_text()
                peak[pid] = int(status.partition("VmHWM:")[2].split()[0]) * 1024
        except (FileNotFoundError, ProcessLookupError, IndexError):
            pass  # it has just ended
        time.sleep(0.02)
    assert process.returncode == 0, process.stderr.read()
    assert len(peak) == 3
    assert sum(peak.values()) < 600e6


# Documents to tokens


@pytest.mark.parametrize("text", [" " * 3_000_000 + "x", "\n" * 2_500_000, "a" * 2_500_000])
def test_millions_of_characters_without_a_place_to_cut_keep_their_text(prepare, tmp_path, text):
    """tiktoken itself panics on a million blanks; here they only cost the cuts' exactness."""
    (tmp_path / "a.txt").write_text(text + " end")
    assert prepare("--shard-tokens", 10_000_000, source=tmp_path / "a.txt").status == 0
    tokens = stream_of(tmp_path / "out")
    assert encoding_of(tmp_path / "out").decode(tokens[1:]) == text + " end"


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_a_batch_of_awkward_documents_becomes_their_tokens(block, monkeypatch):
    monkeypatch.setattr(prepare_fineweb, "BLOCK_TOKENS", block)
    encoding = gpt2_encoding()
    texts = [well_formed(text) for text in AWKWARD]
    blocks = list(encode_batch(encoding, lambda: iter([text] if text else [] for text in texts)))
    assert all(block.dtype == np.uint16 for block in blocks)
    assert np.concatenate(blocks).tolist() == [
        token for text in texts for token in [50256, *encoding.encode_ordinary(text)]
    ]


def test_texts_and_json_lines_are_prepared_in_sorted_order_by_any_number_of_workers(
    texts, tmp_path, call
):
    (texts / "05.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    results = []
    for workers in (1, 4):
        options = "--tokenizer gpt2 --val-tokens 100 --shard-tokens 999".split()
        out = tmp_path / f"out{workers}"
        assert (
            call(
                *("prepare_fineweb", "--source", texts / "*", "--out", out),
                *(*options, "--workers", workers),
            ).status
            == 0
        )
        results.append(fingerprint(out))
    assert results[0] == results[1]
    documents = [TEXT * (number + 1) for number in range(12)]
    documents[5:5] = ["one", "two"]
    assert gpt2_encoding().decode(stream_of(tmp_path / "out4")) == "".join(
        f"<|endoftext|>{text}" for text in documents
    )


# Stopping and going on


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_at_any_rename_is_mended_by_the_same_command(prepare, tmp_path, monkeypatch, when):
    assert prepare("--max-tokens", 3000).status == 0
    expected = fingerprint(tmp_path / "out")
    assert PROGRESS not in expected
    rename = Path.replace
    for crash_at in range(1, 100):
        left = crash_at

        def crashing(path, target):
            nonlocal left
            left -= 1
            if left == 0 and when == "before":
                raise KeyboardInterrupt
            rename(path, target)
            if left == 0:
                raise KeyboardInterrupt

        out = tmp_path / f"crash{crash_at}"
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", crashing)
            status = prepare("--max-tokens", 3000, out=out).status
        if status == 0:
            break
        assert status == 130
        (out / "shard.partial").write_bytes(b"what a kill -9 would leave")
        if not (out / MANIFEST).exists():
            with pytest.raises(UserError):
                TokenStream(out, "train")
        assert prepare("--max-tokens", 3000, out=out).status == 0
        (out / "shard.partial").unlink(missing_ok=True)  # stays if there was nothing left to write
        assert fingerprint(out) == expected
    assert crash_at > 12  # vocabulary, progress, five shards with their progress, manifest


def written(folder: Path) -> dict[Path, tuple[int, int, int]]:
    """Which files there are, and when each was last written."""
    stats = {path: path.stat() for path in folder.iterdir() if path.name != "lock"}
    return {path: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def test_giving_a_finished_command_again_changes_nothing(prepare, tmp_path, monkeypatch):
    assert prepare().status == 0
    before = written(tmp_path / "out")
    for name in ("encoded", "train_bpe", "save_vocabulary"):
        monkeypatch.setattr(prepare_fineweb, name, None)
    result = prepare()
    assert result.status == 0
    assert "tokens to train on" in result.err
    assert written(tmp_path / "out") == before


def test_a_finished_folder_whose_shard_was_damaged_is_refused(prepare, tmp_path):
    assert prepare().status == 0
    path = tmp_path / "out" / "train_000001.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert f"{path} has been damaged or changed" in prepare().error()


def test_a_finished_folder_whose_vocabulary_is_gone_is_refused(prepare, tmp_path):
    assert prepare().status == 0
    (tmp_path / "out" / VOCABULARY).unlink()
    assert f"can't read the vocabulary {tmp_path / 'out' / VOCABULARY}" in prepare().error()


def interrupted(prepare, out: Path, monkeypatch) -> None:
    """An unfinished run with three shards."""
    with monkeypatch.context() as patch:
        finish = prepare_fineweb.ShardWriter.finish

        def stop(writer):
            if len(writer.records) == 3:
                raise KeyboardInterrupt
            finish(writer)

        patch.setattr(prepare_fineweb.ShardWriter, "finish", stop)
        assert prepare(out=out).status == 130
    assert shards_finished(out) == 3


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    "options, what",
    [
        (["--val-tokens", 501], "another val_tokens: '500' then, '501' now"),
        (["--shard-tokens", 701], "another shard_tokens: '700' then, '701' now"),
        (["--max-tokens", 9000], "another max_tokens: 'None' then, '9000' now"),
        (["--tokenizer", "bpe:280"], "another tokenizer: 'SHA-256 "),
        (["--tokenizer", "gpt2"], "another tokenizer: 'SHA-256 "),
    ],
)
def test_other_settings_into_the_same_folder_are_refused_and_leave_it_alone(
    prepare, tmp_path, monkeypatch, options, what, finished
):
    out = tmp_path / "out"
    if finished:
        assert prepare().status == 0
    else:
        interrupted(prepare, out, monkeypatch)
    before = fingerprint(out)
    error = prepare(*options).error()
    assert f"{out} holds {'finished shards' if finished else 'an unfinished run'} with" in error
    assert what in error
    assert fingerprint(out) == before


def test_a_source_that_changed_in_between_is_refused(prepare, texts, tmp_path, monkeypatch):
    interrupted(prepare, tmp_path / "out", monkeypatch)
    (texts / "11.txt").write_text("changed")
    assert "holds an unfinished run with another revision: 'files " in prepare().error()


@pytest.mark.parametrize("shard", [1, 5])
def test_a_source_that_changes_while_it_is_read_is_refused(
    prepare, texts, tmp_path, monkeypatch, shard
):
    """Of its files one may have been read, and another not yet. What was kept before is sound."""
    finish = prepare_fineweb.ShardWriter.finish

    def change(writer):
        if len(writer.records) == shard:
            (texts / "11.txt").write_text("changed")
        finish(writer)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_fineweb.ShardWriter, "finish", change)
        assert f"--source {texts}: its files were changed while they" in prepare().error()
    assert shards_finished(tmp_path / "out") == shard
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_source_that_changes_at_the_very_end_is_refused(prepare, texts, tmp_path, monkeypatch):
    def write(*arguments):
        records = write_shards(*arguments)
        (texts / "11.txt").unlink()
        return records

    write_shards = prepare_fineweb.write_shards
    monkeypatch.setattr(prepare_fineweb, "write_shards", write)
    assert f"can't read {texts}: " in prepare().error()
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_another_vocabulary_file_of_the_same_name_is_refused(prepare, tmp_path, monkeypatch):
    interrupted(prepare, tmp_path / "out", monkeypatch)
    save_vocabulary(make_encoding(train_bpe([TEXT], 290)), tmp_path / "vocabulary")
    assert "with another tokenizer: 'SHA-256" in prepare().error()


def test_a_run_without_a_finished_shard_may_start_over_with_other_settings(
    prepare, tmp_path, monkeypatch
):
    monkeypatch.setattr(prepare_fineweb, "encoded", None)
    with pytest.raises(TypeError):
        prepare()
    monkeypatch.setattr(prepare_fineweb, "encoded", in_this_process)
    assert prepare("--val-tokens", 100).status == 0
    assert prepare("--val-tokens", 100, out=tmp_path / "fresh").status == 0
    assert fingerprint(tmp_path / "out") == fingerprint(tmp_path / "fresh")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"settings": 1}', "\udcff"])
def test_a_damaged_progress_file_is_refused_by_name(prepare, tmp_path, monkeypatch, text):
    interrupted(prepare, tmp_path / "out", monkeypatch)
    (tmp_path / "out" / PROGRESS).write_bytes(text.encode(errors="surrogateescape"))
    assert f"{tmp_path / 'out' / PROGRESS} is damaged: delete the folder" in prepare().error()


@pytest.mark.parametrize("name", ["val_000000.bin", "train_000001.bin", VOCABULARY])
@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_going_on_is_refused_if_what_was_there_is_not_what_it_was(
    prepare, tmp_path, monkeypatch, name, damage
):
    interrupted(prepare, tmp_path / "out", monkeypatch)
    path = tmp_path / "out" / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert str(path) in prepare().error()


def test_two_runs_into_the_same_folder_do_not_meet(prepare, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with locked(out):
        error = prepare().error()
    assert re.search(rf"process {os.getpid()} on .* is writing to {re.escape(str(out))}", error)
    assert [path.name for path in out.iterdir()] == ["lock"]
    assert prepare().status == 0


@pytest.mark.parametrize("name", ["train_000000.bin", "edufineweb_train_000001.npy"])
def test_a_folder_with_somebody_elses_shards_is_left_alone(prepare, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    assert f"{tmp_path / 'out'} holds shards of another origin" in prepare().error()
    assert fingerprint(tmp_path / "out").keys() == {name, "lock"}


# Amounts


def test_max_tokens_is_kept_to_the_token(prepare, tmp_path):
    assert prepare("--max-tokens", 2345).status == 0
    assert prepare(out=tmp_path / "all").status == 0
    tokens = stream_of(tmp_path / "out")
    assert len(tokens) == 2345
    assert tokens == stream_of(tmp_path / "all")[:2345]
    shards = read_manifest(tmp_path / "out").shards
    assert [shard.tokens for shard in shards] == [500, 700, 700, 445]


def test_validation_text_may_fill_several_shards(prepare, tmp_path):
    assert prepare("--val-tokens", 1500).status == 0
    shards = read_manifest(tmp_path / "out").shards
    assert [s.tokens for s in shards if s.split == "val"] == [700, 700, 100]


def test_validation_that_leaves_nothing_to_train_on_is_refused_and_can_be_mended(prepare, tmp_path):
    error = prepare("--val-tokens", 1_000_000, "--shard-tokens", 1000).error()
    assert "--val-tokens 1,000,000 leaves none to train on: give a smaller one" in error
    assert not list((tmp_path / "out").glob("*.bin"))
    with pytest.raises(UserError, match="is not finished"):
        TokenStream(tmp_path / "out", "val")
    assert prepare().status == 0
    assert prepare(out=tmp_path / "fresh").status == 0
    assert fingerprint(tmp_path / "out") == fingerprint(tmp_path / "fresh")


def test_a_source_without_text_is_refused(prepare, tmp_path):
    (tmp_path / "none.jsonl").touch()
    error = prepare(source=tmp_path / "none.jsonl").error()
    assert f"--source {tmp_path / 'none.jsonl'} has no text in it" in error


def test_max_tokens_that_leave_nothing_to_train_on_are_refused(prepare, tmp_path):
    assert "--max-tokens 500 leaves none to train on" in prepare("--max-tokens", 500).error()
    assert not (tmp_path / "out").exists()


def test_a_shard_of_more_tokens_than_its_header_can_tell_is_refused(prepare, tmp_path):
    error = prepare("--shard-tokens", 2**31).error()
    assert "--shard-tokens 2,147,483,648: a shard holds less than 2^31" in error
    assert not (tmp_path / "out").exists()


def test_too_little_disk_is_refused_before_anything_is_written(prepare, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(100, 90, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    error = prepare().error()
    assert f"{tmp_path / 'out'} has 0 MB free: free some space, or prepare less with" in error
    assert not list((tmp_path / "out").glob("*.bin"))


def test_a_disk_that_fills_up_on_the_way_is_refused_and_can_be_mended(
    prepare, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:

        def full(writer, tokens):
            raise OSError(28, "No space left on device")

        patch.setattr(prepare_fineweb.ShardWriter, "write", full)
        assert f"can't write to {tmp_path / 'out'}: No space left" in prepare().error()
    assert prepare().status == 0


# The vocabulary


def test_a_learned_vocabulary_is_the_same_each_time_and_lies_beside_the_shards(prepare, tmp_path):
    for name in ("a", "b"):
        assert prepare("--tokenizer", "bpe:290", out=tmp_path / name).status == 0
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    encoding = encoding_of(tmp_path / "a")
    assert (encoding.name, encoding.n_vocab) == ("bpe-290", 290)
    assert read_manifest(tmp_path / "a").settings["tokenizer"] == "bpe:290"


def test_a_run_that_goes_on_keeps_the_vocabulary_it_began_with(prepare, tmp_path, monkeypatch):
    interrupted(lambda **to: prepare("--tokenizer", "bpe:290", **to), tmp_path / "out", monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_fineweb, "train_bpe", None)
        assert prepare("--tokenizer", "bpe:290").status == 0
    assert prepare("--tokenizer", "bpe:290", out=tmp_path / "fresh").status == 0
    assert fingerprint(tmp_path / "out") == fingerprint(tmp_path / "fresh")


def test_a_vocabulary_is_learned_from_text_behind_the_validation_part(corpus):
    """Even with GPT-2's vocabulary, whose tokens are as long as any."""
    source = find_source(str(corpus / "corpus-00000.parquet"))
    val_tokens = 100_000
    learned = next(iter(training_texts(source, val_tokens)))
    read, passed = "", 0
    for batch in batches(source):
        for pieces in batch():
            read += "".join(pieces)
            passed += 1
            if learned in read:
                before = read[: read.index(learned)]
                assert len(gpt2_encoding().encode_ordinary(before)) + passed > val_tokens
                return


@pytest.mark.parametrize(("val_tokens", "begin"), [(100, 600), (1, 6), (20_000, 120_000)])
def test_one_long_text_is_learned_from_behind_its_validation_part(tmp_path, val_tokens, begin):
    text = "".join(random.Random(1).choices("abc \n", k=300_000))  # two pieces
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    learned = training_texts(find_source(str(tmp_path / "long.txt")), val_tokens)
    assert "".join(learned) == text[begin:]


def test_a_document_that_begins_close_before_is_learned_from_as_a_whole(tmp_path):
    for name, length in (("a", 505), ("b", 200), ("c", 50)):
        (tmp_path / f"{name}.txt").write_text(length * name, encoding="utf-8")
    learned = list(training_texts(find_source(str(tmp_path)), 100))
    assert learned == [200 * "b", 50 * "c"]
    learned = list(training_texts(find_source(str(tmp_path)), 110))  # "b" begins before 550
    assert learned == [45 * "b", 50 * "c"]


def test_at_most_twenty_million_characters_are_learned_from(prepare, texts, monkeypatch):
    monkeypatch.setattr(prepare_fineweb, "BPE_TRAINING_CHARACTERS", 2000)
    learned = list(training_texts(find_source(str(texts)), 1))
    assert 2000 <= sum(map(len, learned)) <= 2000 + len(TEXT) * 12


def test_a_source_too_small_to_learn_a_vocabulary_from_is_refused(prepare):
    error = prepare("--tokenizer", "bpe:290", "--val-tokens", 100_000).error()
    assert "the first 600,000 (6 × --val-tokens) are skipped: give a smaller --val" in error
    assert "the text yields only" in prepare("--tokenizer", "bpe:9000").error()


def test_gpt2s_own_vocabulary_as_a_file_gives_gpt2s_tokens(prepare, tmp_path):
    save_vocabulary(gpt2_encoding(), tmp_path / "file")
    assert prepare("--tokenizer", tmp_path / "file", out=tmp_path / "a").status == 0
    assert prepare("--tokenizer", "gpt2", out=tmp_path / "b").status == 0
    assert stream_of(tmp_path / "a") == stream_of(tmp_path / "b")
    assert vocabulary_of(encoding_of(tmp_path / "a")) == vocabulary_of(gpt2_encoding())


@pytest.mark.parametrize(
    "name, complaint",
    [
        ("bpe:many", "--tokenizer bpe:many: expected a number, as in bpe:4096"),
        ("bpe:", "--tokenizer bpe:: expected a number"),
        ("bpe:" + 5000 * "9", "expected a number"),
        ("bpe:100", "a vocabulary of 100 tokens: expected 257"),
        ("bpe:70000", "a vocabulary of 70000 tokens: expected 257"),
        ("none.tiktoken", "can't read the vocabulary none.tiktoken: No such file"),
    ],
)
def test_a_tokenizer_that_is_not_to_be_had_is_refused(prepare, name, complaint):
    assert complaint in prepare("--tokenizer", name).error()


# Refusals


@pytest.mark.parametrize(
    "options, complaint",
    [
        ([], "the following arguments are required: --out"),
        (["--out", ""], "--out: expected the name of a folder, got nothing"),
        (["--out", "x", "--pretokenized", ""], "--pretokenized is empty: leave its name out"),
        (["--out", "x", "--workers", "0"], "'0': expected a whole number above 0"),
        (["--out", "x", "--val-tokens", "-1"], "'-1': expected a whole number above 0"),
        (["--out", "x", "--max-tokens", "many"], "'many': expected a whole number above 0"),
        (["--out", "x", "--sauce", "x"], "unrecognized arguments: --sauce x"),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line(call, options, complaint):
    assert complaint in call("prepare_fineweb", *options).error()


def test_a_source_that_is_not_there_is_refused_and_leaves_nothing_behind(prepare, tmp_path):
    error = prepare(source=tmp_path / "none.parquet").error()
    assert f"--source {tmp_path / 'none.parquet'}: there is nothing of this name; expected" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["file", "file/sub", "/proc/none", "/dev/null"])
def test_a_folder_that_cannot_be_written_is_refused_by_name(prepare, tmp_path, out):
    (tmp_path / "file").touch()
    assert f"can't write to {tmp_path / out}: " in prepare(out=tmp_path / out).error()


def test_help_and_a_typo_answer_without_the_slow_imports():
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{SCRIPT!r}, *sys.argv[1:]]\n"
        "try:\n"
        f"    runpy.run_path({SCRIPT!r}, run_name='__main__')\n"
        "finally:\n"
        "    slow = {'torch', 'numpy', 'pyarrow', 'tiktoken', 'tqdm', 'datasets'}\n"
        "    print('slow:', *sorted(slow & set(sys.modules)))"
    )
    result = run("-c", code, "--help")
    assert result.status == 0
    assert "--shard-tokens" in result.out
    assert "slow:" in result.out.splitlines()
    result = run("-c", code, "--out", "x", "--workers", "none")
    assert "expected a whole number above 0" in result.error()
    assert "slow:" in result.out.splitlines()


def test_preparing_needs_no_torch():
    """It would cost every worker a second and 200 MB."""
    assert run("-c", "import sys, prepare_fineweb; sys.exit('torch' in sys.modules)").status == 0


def test_whoever_reads_along_may_leave(texts, tmp_path):
    """`prepare_fineweb.py … 2>&1 | head`"""
    words = ["--source", texts, "--out", tmp_path / "out", "--tokenizer", "bpe:300"]
    words += ["--val-tokens", 100, "--workers", 1]
    with start(*words) as process:
        process.stderr.close()
        assert process.wait() == 0
    assert read_manifest(tmp_path / "out")


def test_a_run_that_goes_on_needs_room_for_the_rest_only(prepare, tmp_path, texts, monkeypatch):
    interrupted(prepare, tmp_path / "out", monkeypatch)  # 500 + 700 + 700 tokens are there
    free = 2 * (estimated_tokens(find_source(str(texts)), sys.maxsize) - 1900)
    usage = SimpleNamespace(total=10**9, used=10**9 - free, free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    assert prepare().status == 0

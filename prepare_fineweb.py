"""Turn text into token shards: FineWeb, any Parquet dataset of the Hub, your own files.

    python prepare_fineweb.py --source fineweb-edu --out data/fineweb_edu
    python prepare_fineweb.py --source "notes/**/*.md" --out data/notes --val-tokens 20000

Every document becomes <|endoftext|> followed by its tokens, and the documents follow one another in
the source's order: the first `--val-tokens` tokens are for validation, the rest for training.

Work is dealt out like cards: the source is a row of batches (a Parquet row group, a run of lines, a
file), worker w encodes the batches w, w + workers, w + 2·workers, …, and this process collects them
in that same turn. So the result doesn't depend on the number of workers. After every shard
`progress.json` records how far the source was read; a run that was stopped or killed goes on from
there, when the same command is given again, and ends with the same bytes.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from common.errors import (
    Expendable,
    Parser,
    Stopped,
    UserError,
    folder_name,
    positive,
    reason_of,
    run_script,
)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        description="Turn text into token shards for train.py.",
        epilog="A run that was interrupted goes on where it stopped: give the same command again.",
    )
    add_what(parser)
    add_how_much(parser)
    workers = min(8, os.cpu_count() or 1)  # about 140 MB each
    parser.add_argument(
        "--workers", type=positive, default=workers, help="processes (one per core, at most 8)"
    )
    return parser.parse_args(arguments)


def add_what(parser: argparse.ArgumentParser) -> None:
    """The options that name what is read and written."""
    add = parser.add_argument
    add(
        "--source",
        default="fineweb-edu",
        help="fineweb-edu (the default) or fineweb, each the 10-billion-token sample; "
        "owner/dataset[:config][@revision] on the Hugging Face Hub; a file, folder or glob of "
        ".parquet, .jsonl, .jsonl.gz, .jsonl.zst, .txt, .md or .rst; or python-docs, the "
        "documentation inside this Python",
    )
    add("--out", required=True, type=folder_name, help="the folder for the shards")
    add(
        "--tokenizer",
        default="gpt2",
        help="gpt2 (the default), a vocabulary FILE, or bpe:N to learn one of N tokens here",
    )
    add(
        "--pretokenized",
        nargs="?",
        const="kjj0/fineweb10B-gpt2",
        metavar="OWNER/DATASET",
        help="fetch shards that are GPT-2's tokens already, as many as hold --max-tokens "
        "(kjj0/fineweb10B-gpt2, from FineWeb)",
    )


def add_how_much(parser: argparse.ArgumentParser) -> None:
    """The options that count tokens."""
    add, hundred_million = parser.add_argument, 100_000_000
    add(
        "--shard-tokens",
        type=positive,
        default=hundred_million,
        help="tokens per shard (100,000,000)",
    )
    add(
        "--val-tokens",
        type=positive,
        default=hundred_million,
        help="tokens for validation, from the source's beginning (100,000,000)",
    )
    add("--max-tokens", type=positive, help="stop after so many tokens (all)")


if __name__ == "__main__":  # before the slow imports: --help and a typo answer at once
    ARGUMENTS = parse_arguments()

import itertools
import multiprocessing
import queue
import re
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, redirect_stderr, suppress
from dataclasses import replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import TypeVar

import numpy as np
import tiktoken
from tqdm import tqdm

from common.files import disk_errors, locked, write_atomically
from preparation import pretokenized
from preparation.sources import (
    Batch,
    Source,
    batches,
    check_unchanged,
    estimated_tokens,
    find_source,
)
from preparation.writing import (
    Progress,
    ShardWriter,
    check_disk,
    check_same,
    read_progress,
)
from shards import (
    MANIFEST,
    VOCABULARY,
    Manifest,
    ShardRecord,
    TokenizerRecord,
    check_contents,
    find_encoding,
    holds_shards,
    read_manifest,
)
from tokenizer import (
    gpt2_encoding,
    load_vocabulary,
    make_encoding,
    safe_pieces,
    save_vocabulary,
    train_bpe,
    vocabulary_sha256,
)

BLOCK_TOKENS = 1 << 20  # what a worker sends at once
BLOCKS_AHEAD = 8  # blocks that wait in memory for each worker
BPE_TRAINING_CHARACTERS = 20_000_000

Item = TypeVar("Item")


# Encoding, in worker processes


def encode_batch(encoding: tiktoken.Encoding, batch: Batch) -> Iterator[np.ndarray]:
    """A batch's tokens in blocks of about BLOCK_TOKENS, uint16: <|endoftext|>, document, …"""
    block: list[np.ndarray] = []
    size = 0
    start = np.array([encoding.eot_token], dtype="<u2")
    for pieces in batch():
        block.append(start)
        for piece in safe_pieces(pieces):
            # This is encode_ordinary without the detour over a list of Python numbers.
            block.append(encoding.encode_to_numpy(piece, disallowed_special=()).astype("<u2"))
            size += 1 + len(block[-1])
            if size >= BLOCK_TOKENS:
                yield np.concatenate(block)
                block, size = [], 0
    if block:
        yield np.concatenate(block)


# What a worker says, as the first byte of a message.
TOKENS, END_OF_BATCH, END_OF_SOURCE, FAILED = b"T", b"B", b"S", b"F"


def work(source: Source, vocabulary: Path, first: int, stride: int, pipe: Connection) -> None:
    """A worker process: encode the batches first, first + stride, … and send their tokens.

    A parent that is gone breaks the pipe, and so ends the worker too.
    """
    with suppress(BrokenPipeError):
        try:
            encoding = load_vocabulary(vocabulary)
            for batch in itertools.islice(batches(source), first, None, stride):
                for tokens in encode_batch(encoding, batch):
                    pipe.send_bytes(TOKENS + tokens.tobytes())
                pipe.send_bytes(END_OF_BATCH)
            pipe.send_bytes(END_OF_SOURCE)
        except UserError as error:
            pipe.send_bytes(FAILED + str(error).encode(errors="backslashreplace"))


def messages(pipe: Connection, process: multiprocessing.Process) -> Iterator[bytes]:
    """A worker's messages to the last. Raises UserError if it failed or died."""
    while True:
        try:
            message = pipe.recv_bytes()
        except (EOFError, OSError):  # OSError: in the middle of a message
            process.join()
            raise UserError(
                f"a worker process died (exit status {process.exitcode}; -9 usually means that "
                "memory ran out): use fewer --workers and give the same command again"
            ) from None
        if message[:1] == FAILED:
            raise UserError(message[1:].decode())
        yield message
        if message == END_OF_SOURCE:
            return


def encoded(
    source: Source, vocabulary: Path, workers: int, first: int
) -> Iterator[tuple[int, np.ndarray]]:
    """The source's tokens in order, from batch `first` on: (batch's number, uint16 array)."""
    context = multiprocessing.get_context("spawn")
    processes, streams = [], []

    def start(worker: int) -> None:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=work, args=(source, vocabulary, first + worker, workers, theirs), daemon=True
        )
        process.start()
        theirs.close()  # so that a dead worker is the end of the pipe
        processes.append(process)
        streams.append(prefetch(messages(ours, process), BLOCKS_AHEAD))

    try:
        told, way_out = f"can't start {workers} worker processes", ": use fewer --workers"
        with interrupts_put_off(), disk_errors(told, way_out):
            for worker in range(workers):
                start(worker)
        for number, stream in enumerate(itertools.cycle(streams), first):
            for message in stream:
                if message == END_OF_SOURCE:
                    return
                if message == END_OF_BATCH:
                    break
                yield number, np.frombuffer(message, dtype="<u2", offset=1)
    finally:
        for process in processes:
            process.terminate()
            process.join()


@contextmanager
def interrupts_put_off() -> Iterator[None]:
    """Ctrl-C is for this process, which then ends its workers: those that are started inside never
    hear of it, and this one hears of it at the end.
    """
    heard: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    if handler != signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    blocks = hasattr(signal, "pthread_sigmask")  # Windows has no such thing
    if blocks:  # for this thread, and so for what it starts
        resource_tracker.ensure_running()  # multiprocessing's; starting it would end the blocking
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if blocks:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if heard:
        raise KeyboardInterrupt


def prefetch(items: Iterable[Item], depth: int) -> Iterator[Item]:
    """Yield `items`, drawing up to `depth` of them ahead in a thread. Exceptions come through."""
    ready: queue.Queue = queue.Queue(maxsize=depth)
    end = object()

    def draw() -> None:
        try:
            for item in items:
                ready.put((item, None))
            ready.put((end, None))
        except BaseException as error:  # whatever it is, it belongs to the thread that reads
            ready.put((end, error))

    threading.Thread(target=draw, daemon=True).start()
    while True:
        item, error = ready.get()
        if error is not None:
            raise error
        if item is end:
            return
        yield item


# The command


def asked_tokenizer(name: str) -> str:
    """What --tokenizer asks for: gpt2, bpe:N, or a vocabulary file, told by its SHA-256."""
    if name == "gpt2":
        return name
    if not name.startswith("bpe:"):
        return "SHA-256 " + vocabulary_sha256(load_vocabulary(Path(name)))
    if not re.fullmatch("[0-9]{1,9}", name[4:]):
        raise UserError(f"--tokenizer {name:.40}: expected a number, as in bpe:4096")
    return f"bpe:{int(name[4:])}"


def choose_encoding(name: str, source: Source, val_tokens: int) -> tiktoken.Encoding:
    """`gpt2`, a vocabulary file, or `bpe:N`: a vocabulary learned from the source."""
    if name == "gpt2":
        return gpt2_encoding()
    if not name.startswith("bpe:"):
        return load_vocabulary(Path(name))
    return make_encoding(train_bpe(training_texts(source, val_tokens), int(name[4:])))


def training_texts(source: Source, val_tokens: int) -> Iterator[str]:
    """Up to 20 million characters to learn a vocabulary from.

    They begin well behind the validation text, which nothing should have seen: after six characters
    for each of its tokens, or five where that leaves a document whole. In prose even GPT-2's
    vocabulary makes less of a token. Raises UserError if nothing is there.
    """
    skipped = 6 * val_tokens
    read = 0
    for batch in batches(source):
        for pieces in batch():
            for piece in pieces:
                begin, read = read, read + len(piece)
                if read > skipped:
                    yield piece if begin >= 5 * val_tokens else piece[skipped - begin :]
                if read > skipped + BPE_TRAINING_CHARACTERS:
                    return
    if read <= skipped:
        raise UserError(
            f"the source has only {read:,} characters; to learn a vocabulary, the first "
            f"{skipped:,} (6 × --val-tokens) are skipped: give a smaller --val-tokens"
        )


def write_shards(
    source: Source, progress: Progress, arguments: argparse.Namespace, total: int
) -> list[ShardRecord]:
    """Encode and write until the source or --max-tokens is used up; returns all shards."""
    folder = arguments.out
    limit = arguments.max_tokens or sys.maxsize
    writer = ShardWriter(
        folder, arguments.shard_tokens, arguments.val_tokens, list(progress.shards)
    )
    stream = encoded(source, folder / VOCABULARY, arguments.workers, progress.batch)
    bar = tqdm(total=total, initial=writer.written, unit="tok", unit_scale=True, desc="tokens")
    batch, used = progress.batch, 0  # tokens of the present batch that have been dealt with
    with closing(writer), closing(stream), bar:
        for number, tokens in stream:
            if number != batch:
                batch, used = number, 0
            if number == progress.batch and used < progress.skip:
                skipped = min(progress.skip - used, len(tokens))
                tokens, used = tokens[skipped:], used + skipped
            while len(tokens) and writer.written + writer.pending < limit:
                part = tokens[: min(writer.room, limit - writer.written - writer.pending)]
                writer.write(part)
                bar.update(len(part))
                tokens, used = tokens[len(part) :], used + len(part)
                if writer.room == 0:
                    writer.finish()
                    check_unchanged(source)
                    done = replace(progress, shards=tuple(writer.records), batch=batch, skip=used)
                    done.save(folder)
            if writer.written + writer.pending >= limit:
                break
        if writer.pending:
            writer.finish()
    return writer.records


def prepare(arguments: argparse.Namespace) -> Manifest:
    """Do what the command line says, going on where an earlier run stopped."""
    folder = arguments.out
    earlier = read_manifest(folder) or read_progress(folder)
    then = earlier.settings if earlier else {}
    same = then.get("source") == arguments.source
    source = find_source(arguments.source, then.get("revision") if same else None)
    settings = {
        "source": source.name,
        "revision": source.revision,
        "tokenizer": asked_tokenizer(arguments.tokenizer),
        "shard_tokens": arguments.shard_tokens,
        "val_tokens": arguments.val_tokens,
        "max_tokens": arguments.max_tokens,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        manifest = read_manifest(folder)
        if manifest:
            check_same(manifest.settings, settings, f"{folder} holds finished shards")
            check_contents(folder, manifest.shards, manifest.tokenizer.vocab_size)
            find_encoding(folder, manifest.tokenizer)  # is it still there?
        else:
            progress = continued(folder, settings) or begun(source, settings, arguments)
            manifest = finish(source, progress, arguments)
        Progress.remove(folder)
    return manifest


def continued(folder: Path, settings: dict[str, object]) -> Progress | None:
    """The progress of an interrupted run that finished a shard, or None if there is nothing yet.

    Raises UserError if it was another run, or if its shards aren't what they were.
    """
    progress = read_progress(folder)
    if progress is None or not progress.shards:
        return None
    check_same(progress.settings, settings, f"{folder} holds an unfinished run")
    check_contents(folder, progress.shards, progress.tokenizer.vocab_size)
    return progress


def begun(source: Source, settings: dict[str, object], arguments: argparse.Namespace) -> Progress:
    """A fresh run's progress. From here on the folder is marked as unfinished."""
    folder, before = arguments.out, read_progress(arguments.out)
    if holds_shards(folder) and not (before and "source" in before.settings):
        raise UserError(f"{folder} holds shards of another origin: choose another --out")
    encoding = choose_encoding(arguments.tokenizer, source, arguments.val_tokens)
    sha256 = save_vocabulary(encoding, folder / VOCABULARY)
    progress = Progress(settings, TokenizerRecord(encoding.name, encoding.n_vocab, sha256))
    progress.save(folder)
    return progress


def finish(source: Source, progress: Progress, arguments: argparse.Namespace) -> Manifest:
    """Write the shards that are missing, then the manifest.

    Raises UserError if the disk is too small, or if the source has no text left to train on.
    """
    folder = arguments.out
    load_vocabulary(folder / VOCABULARY, progress.tokenizer.sha256)  # is it still the same?
    expected = estimated_tokens(source, arguments.max_tokens or sys.maxsize)
    check_disk(folder, expected - sum(shard.tokens for shard in progress.shards))
    shards = write_shards(source, progress, arguments, expected)
    check_unchanged(source)
    if not any(shard.split == "train" for shard in shards):
        replace(progress, shards=(), batch=0, skip=0).save(folder)
        for shard in shards:
            (folder / shard.file).unlink()
        if not shards:
            raise UserError(f"--source {source.name} has no text in it")
        raise UserError(
            f"the source has only {sum(shard.tokens for shard in shards):,} tokens, and "
            f"--val-tokens {arguments.val_tokens:,} leaves none to train on: give a smaller one"
        )
    manifest = Manifest(progress.settings, progress.tokenizer, tuple(shards))
    write_atomically(folder / MANIFEST, manifest.to_json())
    return manifest


def fetch(arguments: argparse.Namespace) -> Manifest:
    """Fetch shards that are tokens already. Raises UserError for what asks to make some."""
    usual = parse_arguments(["--out", "."])
    names = ("source", "tokenizer", "shard_tokens", "val_tokens", "workers")
    given = [name for name in names if getattr(arguments, name) != getattr(usual, name)]
    if given:
        options = ", ".join("--" + name.replace("_", "-") for name in given)
        raise UserError(
            f"--pretokenized fetches shards as they are, of GPT-2's vocabulary: leave {options} out"
        )
    return pretokenized.fetch(arguments.pretokenized, arguments.out, arguments.max_tokens)


def main(arguments: argparse.Namespace) -> None:
    """Prepare, and say what came of it. Whoever reads along may leave."""
    with redirect_stderr(Expendable(sys.stderr)):
        try:
            _prepare_and_tell(arguments)
        except KeyboardInterrupt:
            told = "the same command goes on after the last whole shard, if there is one"
            raise Stopped(f"interrupted; {told}", signal.SIGINT) from None


def _prepare_and_tell(arguments: argparse.Namespace) -> None:
    is_fetched = arguments.pretokenized is not None
    if is_fetched and not arguments.pretokenized:
        raise UserError("--pretokenized is empty: leave its name out, or give an owner/dataset")
    taken = 0 if is_fetched else arguments.val_tokens
    if arguments.max_tokens and arguments.max_tokens <= taken:
        raise UserError(
            f"--max-tokens {arguments.max_tokens:,} leaves none to train on, because the first "
            f"{arguments.val_tokens:,} are --val-tokens: give fewer of those"
        )
    if arguments.shard_tokens >= 2**31:
        raise UserError(f"--shard-tokens {arguments.shard_tokens:,}: a shard holds less than 2^31")
    try:
        manifest = (fetch if is_fetched else prepare)(arguments)
    except OSError as error:
        raise UserError(f"can't write to {arguments.out}: {reason_of(error)}") from error
    print(
        f"{arguments.out}: {manifest.total('train'):,} tokens to train on, "
        f"{manifest.total('val'):,} to validate on, in {len(manifest.shards)} shards; "
        f"vocabulary {manifest.tokenizer.name} of {manifest.tokenizer.vocab_size:,}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    sys.exit(run_script(main, ARGUMENTS))

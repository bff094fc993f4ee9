"""Token shards: the files that hold a text's tokens, how they are checked and read.

A shard is a flat file of tokens in the layout of llm.c and modded-nanogpt: a header of 256
little-endian int32 (magic number, version, token count, zeros), then the tokens as little-endian
uint16. A folder of shards has a `manifest.json`, written last, that says what the shards hold.
Folders without one are read too: shards that somebody else tokenised for GPT-2, and the `.npy`
shards of build-nanogpt.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tokenize import TokenError

import numpy as np
import tiktoken

from common.errors import UserError
from common.files import disk_errors, file_sha256, is_there, own_file
from common.records import as_record, read_json
from tokenizer import GPT2_SHA256, GPT2_VOCAB_SIZE, gpt2_encoding, load_vocabulary

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
PROGRESS = "progress.json"  # in the place of a manifest while prepare_fineweb.py is at work
VOCABULARY = "tokenizer.tiktoken"
SPLITS = ("train", "val")
PIECE_TOKENS = 1 << 20  # in memory, of a shard that is read as a whole
ENDS = 1 << 15  # tokens at each end of a shard that it is known by where no manifest has its hash
# What NumPy raises for a header that isn't one: it evaluates it as a Python literal, and if that
# fails takes it for Python 2 and reads it with `tokenize`.
NPY_ERRORS = (ValueError, TypeError, OverflowError, IndexError, SyntaxError, RecursionError)
NPY_ERRORS += (MemoryError, TokenError)

# Shard files


def shard_header(tokens: int) -> bytes:
    """The 1,024 bytes before a shard's tokens."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, tokens
    return header.tobytes()


def _no_shard(path: Path, error: OSError) -> UserError:
    told = f"can't read the shard {path}: {error.strerror}"
    if error.errno == errno.EMFILE:
        told += " (ulimit -n): allow more, or make larger shards"
    return UserError(told)


def _find_tokens(path: Path) -> tuple[int, int]:
    """(where the tokens begin, in bytes; how many there are) in a shard as this repository and
    llm.c write it.
    """
    with path.open("rb") as file:
        header = np.frombuffer(file.read(HEADER_BYTES), dtype=np.uint8)
    size = path.stat().st_size
    if len(header) < HEADER_BYTES:
        raise UserError(f"{path} has {size} bytes, a shard's header alone has {HEADER_BYTES}")
    magic, version, tokens = (int(number) for number in header.view("<i4")[:3])
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
        raise UserError(
            f"{path} is no token shard: it begins with {magic}, {version}, "
            f"expected {SHARD_MAGIC}, {SHARD_VERSION}"
        )
    if size != HEADER_BYTES + 2 * tokens:
        raise UserError(
            f"{path} is damaged: its header says {tokens} tokens, so {HEADER_BYTES + 2 * tokens} "
            f"bytes, but it has {size}; prepare or download it again"
        )
    return HEADER_BYTES, tokens


def _find_tokens_npy(path: Path) -> tuple[int, int]:
    """The same in build-nanogpt's shards: a one-dimensional uint16 array in NumPy's own format."""
    try:
        tokens = np.lib.format.open_memmap(path, mode="r")
    except NPY_ERRORS as error:
        raise UserError(f"{path} is damaged or no NumPy array: {error}") from error
    if tokens.dtype != np.uint16 or tokens.ndim != 1:
        raise UserError(
            f"{path} holds {tokens.dtype} of shape {tokens.shape}, expected uint16 in one dimension"
        )
    return tokens.offset, len(tokens)


class Shard:
    """A shard to read here and there. It stays on the disk.

    Its file doesn't stay mapped into memory: where one that is mapped has been cut short, or a disk
    fails, the system ends the process (SIGBUS), and nobody is told why.
    """

    def __init__(self, path: Path) -> None:
        """Raises UserError, naming the file, for a wrong header or a length that doesn't fit it."""
        self.path = path
        find = _find_tokens_npy if path.suffix == ".npy" else _find_tokens
        try:
            self.offset, self.tokens = find(path)
            self.file = path.open("rb", buffering=0)
        except OSError as error:
            raise _no_shard(path, error) from error

    def __len__(self) -> int:
        return self.tokens

    def read(self, start: int, count: int) -> np.ndarray:
        """The tokens from `start` on, uint16: `count` of them or, near the end, or if the system
        gives no more at once, fewer; none only where there are none.

        Raises UserError if the file isn't what it was, or can't be read.
        """
        wanted = 2 * min(count, self.tokens - start)
        try:
            content = self._content(self.offset + 2 * start, wanted)
        except OSError as error:
            raise _no_shard(self.path, error) from error
        if len(content) < min(2, wanted):
            raise UserError(f"{self.path} has been cut short: prepare or download it again")
        return np.frombuffer(content, dtype="<u2", count=len(content) // 2)

    def largest_token(self) -> int:
        """Of all, read piece by piece; 0 if there are none."""
        largest, at = 0, 0
        while at < len(self):
            piece = self.read(at, PIECE_TOKENS)
            largest, at = max(largest, int(piece.max())), at + len(piece)
        return largest

    def _content(self, at: int, count: int) -> bytes:
        """So many bytes of the file, or as many as are left: without a place that threads share."""
        if hasattr(os, "pread"):
            return os.pread(self.file.fileno(), count, at)
        with self.path.open("rb", buffering=0) as file:  # Windows
            file.seek(at)
            return file.read(count)


def holds_shards(folder: Path) -> bool:
    """Whether there are files in a folder that could be shards."""
    return any(path.suffix in (".bin", ".npy") for path in folder.glob("*"))


# The manifest


@dataclass(frozen=True)
class ShardRecord:
    """What the manifest says of one shard."""

    file: str
    split: str  # "train" or "val"
    tokens: int
    sha256: str  # of the whole file, in hexadecimal


@dataclass(frozen=True)
class TokenizerRecord:
    """Which vocabulary made the tokens. The vocabulary itself lies beside, as `VOCABULARY`."""

    name: str
    vocab_size: int
    sha256: str  # of the vocabulary file

    def __post_init__(self) -> None:
        if not 0 < self.vocab_size <= 2**16:
            raise ValueError(f"vocab_size is {self.vocab_size}, a token has 16 bits")
        if not self.name.isprintable():  # it is shown
            raise ValueError(f"the tokenizer's name is {self.name!r:.40}, expected plain text")


GPT2 = TokenizerRecord("gpt2", GPT2_VOCAB_SIZE, GPT2_SHA256)


@dataclass(frozen=True)
class Manifest:
    """A shard folder's table of contents."""

    settings: dict[str, object]  # what prepare_fineweb.py was asked for, and its source's revision
    tokenizer: TokenizerRecord
    shards: tuple[ShardRecord, ...]

    def total(self, split: str) -> int:
        """How many tokens a split has."""
        return sum(shard.tokens for shard in self.shards if shard.split == split)

    def to_json(self) -> str:
        """The text of `manifest.json`; equal manifests give equal bytes."""
        totals = {split: self.total(split) for split in SPLITS}
        return json.dumps({"version": MANIFEST_VERSION, **asdict(self), "totals": totals}, indent=1)


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest, or None where it has none. Raises UserError if it is not one."""
    path = folder / MANIFEST
    if not is_there(path):
        return None
    try:
        content = read_json(own_file(folder, MANIFEST))
        version = content.pop("version", None)
        if version != MANIFEST_VERSION:
            raise ValueError(f"it has version {version!r:.40}, this code reads {MANIFEST_VERSION}")
        content.pop("totals", None)  # for people: they follow from the rest
        return as_record(Manifest, content)
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(
            f"{path} is not a manifest: {error}; prepare the data again in another folder"
        ) from error


def check_contents(folder: Path, shards: Iterable[ShardRecord], vocab_size: int) -> None:
    """Raises UserError, naming the file, if a shard isn't there or isn't what was written.

    And if it has a token that isn't in the vocabulary: whoever wrote that gave it the right hash.
    """
    for record in shards:
        with disk_errors(f"can't read the shard {folder / record.file}"):
            sha256 = file_sha256(own_file(folder, record.file))
        if sha256 != record.sha256:
            raise UserError(
                f"{folder / record.file} has been damaged or changed since it was written (its "
                "SHA-256 is another): delete the folder and prepare it again"
            )
        largest = Shard(folder / record.file).largest_token()
        if largest >= vocab_size:
            raise UserError(
                f"{folder / record.file} has a token {largest}, its vocabulary only "
                f"{vocab_size:,}: delete the folder and prepare it again"
            )


def tokenizer_of(folder: Path) -> TokenizerRecord:
    """Which vocabulary the folder's tokens are of; without a manifest, GPT-2's is assumed."""
    manifest = read_manifest(folder)
    return manifest.tokenizer if manifest else GPT2


def encoding_of(folder: Path) -> tiktoken.Encoding:
    """The encoding that made the folder's tokens, from the vocabulary file beside them.

    Without such a file it must be GPT-2's. Raises UserError if the vocabulary can't be had.
    """
    return find_encoding(folder, tokenizer_of(folder))


def find_encoding(folder: Path, record: TokenizerRecord) -> tiktoken.Encoding:
    """The encoding of `record`, from the vocabulary file in `folder` or, for GPT-2's, tiktoken."""
    path = folder / VOCABULARY
    if not is_there(path) and record.sha256 == GPT2_SHA256:
        return gpt2_encoding()
    encoding = load_vocabulary(own_file(folder, VOCABULARY), record.sha256)
    if encoding.n_vocab != record.vocab_size:
        raise UserError(
            f"{path} has {encoding.n_vocab:,} tokens, {record.vocab_size:,} were expected: "
            "prepare the data again"
        )
    return encoding


# Reading


class TokenStream:
    """All shards of one split, end to end, as one stream of tokens."""

    def __init__(self, folder: Path, split: str) -> None:
        """Open the split's shards. Raises UserError if there are none or one doesn't fit."""
        if is_there(folder / PROGRESS):
            raise UserError(
                f"{folder} is not finished: give the same prepare_fineweb.py command again, it "
                "goes on where it stopped"
            )
        if not folder.is_dir():
            why = "is a file" if folder.exists() else "doesn't exist"
            raise UserError(
                f"the data folder {folder} {why}: make it with prepare_fineweb.py, or name another"
            )
        self.folder = folder
        self.split = split
        _let_many_files_be_open()  # each shard's is
        manifest = read_manifest(folder)
        if manifest:
            self.records = [record for record in manifest.shards if record.split == split]
            self.shards = _listed_shards(folder, split, self.records)
        else:
            self.records, self.shards = [], _found_shards(folder, split)
        self.starts = np.cumsum([0] + [len(shard) for shard in self.shards])
        self.tokenizer = manifest.tokenizer if manifest else GPT2
        self.vocab_size = self.tokenizer.vocab_size
        self.fingerprint = self._fingerprint()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _fingerprint(self) -> str:
        """Other data have another one. Without a manifest, those that differ in the lengths of
        their shards or in what is near their ends.
        """
        hashes = [record.sha256 for record in self.records]
        content = repr(([len(shard) for shard in self.shards], hashes)).encode()
        known_by = hashlib.sha256(content)
        if not hashes:
            for begin, end in zip(self.starts.tolist(), self.starts[1:].tolist()):
                if count := min(ENDS, end - begin):
                    known_by.update(self.read(begin, count))
                    known_by.update(self.read(end - count, count))
        return known_by.hexdigest()

    def num_windows(self, block_size: int) -> int:
        """How many windows of `block_size` tokens, each with the token after it, there are.

        Raises UserError if there is not one.
        """
        if len(self) <= block_size:
            more = "prepare more text"
            if self.split == "val":
                more = "prepare the text again with a larger --val-tokens"
            raise UserError(
                f"the {self.split} split of {self.folder} has {len(self):,} tokens, one window "
                f"takes {block_size + 1:,}: {more}, or train with a smaller --model.block_size"
            )
        return (len(self) - 1) // block_size

    def _shard_at(self, token: int) -> int:
        return int(np.searchsorted(self.starts, token, side="right")) - 1

    def file_at(self, token: int) -> Path:
        """The file that a token of the stream lies in."""
        return self.shards[self._shard_at(token)].path

    def read(self, start: int, count: int) -> np.ndarray:
        """The tokens [start, start + count) as uint16 array, across shard borders.

        Raises UserError as `Shard.read`.
        """
        parts = []
        while count > 0:
            shard = self._shard_at(start)
            part = self.shards[shard].read(start - int(self.starts[shard]), count)
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _let_many_files_be_open() -> None:
    """Raise this process's own limit, often 1,024, towards the one that the system sets.

    To 65,536, that is: room for 6,000 billion tokens in shards of 100 million.
    """
    if os.name != "posix":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2**16 if hard == resource.RLIM_INFINITY else min(hard, 2**16)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):  # macOS has another limit, which it doesn't tell
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _listed_shards(folder: Path, split: str, records: list[ShardRecord]) -> list[Shard]:
    """The split's shards in the manifest's order, each checked against its record there."""
    if not records:
        raise UserError(f"{folder / MANIFEST} lists no {split} shard")
    shards = []
    for record in records:
        shard = Shard(own_file(folder, record.file))
        if len(shard) != record.tokens:
            raise UserError(
                f"{folder / record.file} has {len(shard)} tokens, the manifest says {record.tokens}"
            )
        shards.append(shard)
    return shards


def _found_shards(folder: Path, split: str) -> list[Shard]:
    """The split's shards in a folder without a manifest, in the order of their names."""
    for suffix in ("bin", "npy"):
        paths = sorted(path for path in folder.glob(f"*.{suffix}") if split in path.stem.split("_"))
        if paths:
            return [Shard(path) for path in paths]
    raise UserError(
        f"{folder} holds no {split} shard: expected {split}_000000.bin or the like; "
        "make shards with prepare_fineweb.py"
    )

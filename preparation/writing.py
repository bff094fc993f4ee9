"""A folder of shards that is being filled, so that a kill at any moment leaves it usable.

A shard gets its name when it is complete and on the disk, `progress.json` says after each one where
to go on, and the manifest, written last, takes its place.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import file_sha256, is_there, write_atomically
from common.records import as_record, read_json
from shards import PROGRESS, ShardRecord, TokenizerRecord, shard_header


@dataclass
class ShardWriter:
    """Fills shards one after another: the split "val" up to `val_tokens`, then "train"."""

    folder: Path
    shard_tokens: int
    val_tokens: int
    records: list[ShardRecord] = field(default_factory=list)
    pending: int = 0  # tokens in the shard that is being filled

    def __post_init__(self) -> None:
        self.partial = self.folder / "shard.partial"
        self._begin()

    def _begin(self) -> None:
        self.partial.unlink(missing_ok=True)
        self.file = self.partial.open("xb")
        self.file.write(shard_header(0))
        self.pending = 0

    @property
    def written(self) -> int:
        """Tokens in finished shards."""
        return sum(record.tokens for record in self.records)

    @property
    def split(self) -> str:
        """The split that is being filled."""
        return "val" if self.written < self.val_tokens else "train"

    @property
    def room(self) -> int:
        """Tokens that the present shard still takes."""
        left = self.val_tokens - self.written if self.split == "val" else self.shard_tokens
        return min(left, self.shard_tokens) - self.pending

    def write(self, tokens: np.ndarray) -> None:
        """Append at most `room` tokens to the present shard."""
        self.file.write(tokens.tobytes())
        self.pending += len(tokens)

    def finish(self) -> None:
        """Complete the present shard and begin the next."""
        split = self.split
        index = sum(record.split == split for record in self.records)
        path = self.folder / f"{split}_{index:06d}.bin"
        self.file.seek(0)
        self.file.write(shard_header(self.pending))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        sha256 = file_sha256(self.partial)
        self.partial.replace(path)
        self.records.append(ShardRecord(path.name, split, self.pending, sha256))
        self._begin()

    def close(self) -> None:
        """Throw the unfinished shard away."""
        self.file.close()
        self.partial.unlink(missing_ok=True)


# Progress


@dataclass(frozen=True)
class Progress:
    """How far a run has come: after the last finished shard, where to go on in the source."""

    settings: dict[str, object]
    tokenizer: TokenizerRecord
    shards: tuple[ShardRecord, ...] = ()
    batch: int = 0  # the first batch whose tokens are not all in finished shards
    skip: int = 0  # the tokens of that batch which are

    def __post_init__(self) -> None:
        if min(self.batch, self.skip) < 0:
            raise ValueError(f"batch {self.batch}, skip {self.skip}: expected 0 or more")

    def save(self, folder: Path) -> None:
        """Write it into the shards' folder."""
        write_atomically(folder / PROGRESS, json.dumps(asdict(self), indent=1))

    @staticmethod
    def remove(folder: Path) -> None:
        """The folder is finished."""
        (folder / PROGRESS).unlink(missing_ok=True)


def check_disk(folder: Path, tokens: int) -> None:
    """Raises UserError if `tokens` more tokens, two bytes each, don't fit on the disk."""
    free = shutil.disk_usage(folder).free
    if 2 * tokens > free:
        raise UserError(
            f"{tokens:,} tokens need about {2 * tokens / 1e6:,.0f} MB, {folder} has "
            f"{free / 1e6:,.0f} MB free: free some space, or prepare less with --max-tokens"
        )


def read_progress(folder: Path) -> Progress | None:
    """What an interrupted run left, or None. Raises UserError if it is damaged."""
    path = folder / PROGRESS
    if not is_there(path):
        return None
    try:
        return as_record(Progress, read_json(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: delete the folder and start again") from error


def check_same(then: dict[str, object], now: dict[str, object], what: str) -> None:
    """Raises UserError if a folder was begun with other settings or another source."""
    for key, value in now.items():
        if then.get(key) != value:
            before, after = str(then.get(key)), str(value)
            same = len(os.path.commonprefix((before, after)))
            begin = same - 20 if same > 40 else 0  # where a reader sees the difference
            raise UserError(
                f"{what} with another {key}: {before[begin : begin + 60]!r} then, "
                f"{after[begin : begin + 60]!r} now; choose another --out or delete that folder"
            )

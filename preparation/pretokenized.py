"""Shards that somebody else has tokenised with GPT-2's vocabulary and published on the Hub.

Ten billion tokens are 20 GB to fetch, less than their text, and nothing is left to tokenise. What
is fetched gets a manifest, so that it is checked like shards made here.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.files import file_sha256, locked, write_atomically
from common.hub import hub_errors
from preparation.writing import Progress, check_disk, check_same, read_progress
from shards import (
    GPT2,
    HEADER_BYTES,
    MANIFEST,
    Manifest,
    Shard,
    ShardRecord,
    check_contents,
    holds_shards,
    read_manifest,
)
from tokenizer import GPT2_VOCAB_SIZE

SHARD_NAME = re.compile(r"\w*(train|val)_\d+\.bin")


@dataclass(frozen=True)
class Published:
    """A shard on the Hub."""

    file: str
    tokens: int  # by its size
    sha256: str | None  # as the Hub tells it

    @property
    def split(self) -> str:
        """ "train" or "val"."""
        return SHARD_NAME.fullmatch(self.file)[1]


def fetch(repository: str, folder: Path, max_tokens: int | None) -> Manifest:
    """Fetch as many shards of a dataset as hold `max_tokens`; a download that broke off goes on.

    Raises UserError if shards can't be had, are no shards, have no room on the disk, or are of
    another command than this folder's.
    """
    earlier = read_manifest(folder) or read_progress(folder)
    settings = {"pretokenized": repository, "max_tokens": max_tokens}
    if earlier:
        check_same(earlier.settings, settings, f"{folder} was begun")
    elif holds_shards(folder):
        raise UserError(f"{folder} holds shards of another origin: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        manifest = read_manifest(folder)
        if manifest:
            check_contents(folder, manifest.shards, manifest.tokenizer.vocab_size)
            Progress.remove(folder)
            return manifest
        commit, published = look_up(repository, earlier and earlier.settings.get("revision"))
        chosen = choose(published, max_tokens or sys.maxsize)
        progress = Progress({**settings, "revision": commit}, GPT2)
        progress.save(folder)
        missing = [shard for shard in chosen if not (folder / shard.file).exists()]
        check_disk(folder, sum(shard.tokens for shard in missing))
        records = tuple(download(repository, commit, shard, folder) for shard in chosen)
        manifest = Manifest(progress.settings, progress.tokenizer, records)
        write_atomically(folder / MANIFEST, manifest.to_json())
        Progress.remove(folder)
    return manifest


def look_up(repository: str, commit: str | None) -> tuple[str, list[Published]]:
    """(commit, shards) of a dataset as it is now, or as an earlier run saw it.

    Raises UserError if it can't be had or holds no shards.
    """
    from huggingface_hub import HfApi

    with hub_errors(repository, f"{repository} can't be had from the Hub"):
        commit = commit or HfApi().dataset_info(repository).sha
        entries = [*HfApi().list_repo_tree(repository, repo_type="dataset", revision=commit)]
    shards = [
        Published(entry.path, (entry.size - HEADER_BYTES) // 2, entry.lfs and entry.lfs.sha256)
        for entry in entries
        if SHARD_NAME.fullmatch(entry.path)
    ]
    if {shard.split for shard in shards} != {"train", "val"}:
        raise UserError(
            f"{repository} holds no shards in llm.c's layout: expected files such as "
            "fineweb_train_000001.bin and fineweb_val_000000.bin"
        )
    return commit, shards


def choose(shards: list[Published], max_tokens: int) -> list[Published]:
    """The validation shards, and as many to train on as it takes to have so many tokens in all.

    Raises UserError if the validation shards alone have as many.
    """
    chosen = sorted((s for s in shards if s.split == "val"), key=lambda shard: shard.file)
    have = sum(shard.tokens for shard in chosen)
    if have >= max_tokens:
        raise UserError(
            f"--max-tokens {max_tokens:,} leaves none to train on: the validation shard alone has "
            f"{have:,}"
        )
    for shard in sorted((s for s in shards if s.split == "train"), key=lambda shard: shard.file):
        if have >= max_tokens:
            break
        chosen.append(shard)
        have += shard.tokens
    return chosen


def download(repository: str, commit: str, shard: Published, folder: Path) -> ShardRecord:
    """Fetch a shard, unless it is there, and check it. Raises UserError if it is no good."""
    from huggingface_hub import hf_hub_download

    path = folder / shard.file
    told = f"{shard.file} of {repository} can't be had from the Hub"
    with hub_errors(repository, told, "; give the same command again to go on"):
        hf_hub_download(
            repository, shard.file, repo_type="dataset", revision=commit, local_dir=folder
        )
    found, sha256 = Shard(path), file_sha256(path)
    if shard.sha256 not in (None, sha256):
        path.unlink()
        raise UserError(f"{path} was not what the Hub says it is: give the same command again")
    largest = found.largest_token()
    if largest >= GPT2_VOCAB_SIZE:
        raise UserError(
            f"{shard.file} of {repository} has a token {largest:,}, GPT-2's vocabulary only "
            f"{GPT2_VOCAB_SIZE:,}: choose another dataset, and another --out"
        )
    return ShardRecord(shard.file, shard.split, len(found), sha256)

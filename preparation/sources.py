"""Where text comes from: files on this disk, a dataset of the Hugging Face Hub, Python's own docs.

A source is a row of files in a fixed order, and each file a row of batches: a Parquet row group, a
run of lines, a whole text file. Its documents are read only when it is called, so that worker
processes can walk over the same row and each do its own batches only. (Of a file of lines, each has
to read all, to find where the runs begin.)
"""

from __future__ import annotations

import ast
import glob
import hashlib
import io
import itertools
import json
import os
import re
import stat
import sys
import sysconfig
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import UserError, one_line
from common.hub import hub_errors
from tokenizer import PIECE_CHARACTERS, well_formed

HUB_NAMES = {
    "fineweb-edu": "HuggingFaceFW/fineweb-edu:sample-10BT",
    "fineweb": "HuggingFaceFW/fineweb:sample-10BT",
}
HUB_PREFIX = "hf://"
PYTHON_DOCS = "python-docs"
LOCAL = "files "  # how the revision of files on this disk begins
TEXT_SUFFIXES = (".txt", ".md", ".rst")
LINE_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
KINDS = ((".parquet",), LINE_SUFFIXES, TEXT_SUFFIXES)
SUFFIXES = tuple(suffix for kind in KINDS for suffix in kind)
BATCH_BYTES = 4 << 20  # of a JSON-lines file, per batch
PARQUET_BUFFER = 8 << 20  # bytes of a column that are in memory at once, however long it is
PARQUET_ROWS = 32

Document = Iterable[str]  # a text, in one or several pieces
Batch = Callable[[], Iterator[Document]]


@dataclass(frozen=True)
class Source:
    """What to read: files in a fixed order, on this disk or on the Hub."""

    name: str
    files: tuple[str, ...]
    revision: str  # another one means another content: a commit, a Python version, a hash

    def open(self, file: str) -> pa.NativeFile:
        """A file for pyarrow to read; .gz and .zst are decompressed on the way."""
        if file.startswith(HUB_PREFIX):
            from huggingface_hub import HfFileSystem

            # Uncached: reading ahead would fetch what other workers read, so nearly all twice.
            return pa.PythonFile(HfFileSystem().open(file, "rb", cache_type="none"), mode="r")
        if not is_compressed(file):
            return pa.OSFile(file)
        if not os.path.getsize(file):  # to pyarrow that is no text; to gzip and zstd, half a file
            raise UserError(f"can't read {file}: it is empty, not even compressed")
        return pa.input_stream(
            file, compression="gzip" if kind_of(file).endswith(".gz") else "zstd"
        )


def kind_of(file: str) -> str:
    """How a file's name ends, of SUFFIXES; "" for another kind."""
    return next((suffix for suffix in SUFFIXES if file.lower().endswith(suffix)), "")


def is_compressed(file: str) -> bool:
    """Whether a file is packed by gzip or zstd, as its name says."""
    return kind_of(file).endswith((".gz", ".zst"))


def find_source(name: str, revision: str | None = None) -> Source:
    """Look a source up. Raises UserError if it is nowhere to be found.

    `revision` is the one that an earlier run read: a dataset on the Hub is read at the same again.
    """
    if not name:
        raise UserError("--source is empty: expected a file, a folder or a dataset's name")
    if name == PYTHON_DOCS:
        version = ".".join(map(str, sys.version_info[:3]))
        return Source(name, files=(PYTHON_DOCS,), revision=f"Python {version}")
    if name in HUB_NAMES:
        return hub_source(name, HUB_NAMES[name], revision)
    try:
        files = local_files(name)
        revision = local_revision(files) if files else revision
    except OSError as error:
        where = error.filename or name
        raise UserError(f"--source {name}: can't read {where}: {error.strerror}") from error
    if files:
        return Source(name, tuple(map(str, files)), revision)
    is_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?(@[\w./-]+)?", name)
    if is_hub_name and not kind_of(name) and not Path(name).exists():
        return hub_source(name, name, revision)
    found = "there is nothing of this name"
    if Path(name).exists():
        found = "there is no text in it" if Path(name).is_dir() else "a file of another kind"
    raise UserError(
        f"--source {name}: {found}; expected fineweb-edu, fineweb, {PYTHON_DOCS}, a dataset on the "
        f"Hub (owner/name), or files ending in {' '.join(SUFFIXES)}"
    )


def local_revision(files: Iterable[Path | str]) -> str:
    """A hash of the files' names, sizes and times. Raises OSError for one that can't be found."""
    stats = [(str(file), os.stat(file)) for file in files]
    state = [(file, one.st_size, one.st_mtime_ns) for file, one in stats]
    return LOCAL + hashlib.sha256(repr(state).encode()).hexdigest()[:16]


def check_unchanged(source: Source) -> None:
    """Raises UserError if local files aren't those any more that were found at the beginning."""
    if not source.revision.startswith(LOCAL):
        return
    with named_errors(source.name):
        if local_revision(source.files) != source.revision:
            raise UserError(
                f"--source {source.name}: its files were changed while they were read; choose "
                "another --out, or delete that folder, and start again"
            )


def local_files(name: str) -> list[Path]:
    """The files that a file name, a folder or a glob stands for, sorted.

    Of a folder, what lies in hidden folders such as .git or .venv is left out, as a glob does it,
    and only files of one kind are taken: beside Parquet or JSON lines, a README.md is no document.
    What is there of other kinds is told on standard error. Raises OSError for what can't be read.
    """
    path = Path(name)
    if not path.is_dir():
        found = [path] if path.is_file() else map(Path, glob.glob(name, recursive=True))
        known = (file for file in found if kind_of(file.name))
        files = [file for file in known if stat.S_ISREG(file.stat().st_mode)]
        files.sort(key=lambda file: (len(file.parts), file), reverse=True)
        # A pattern may come to a file by several ways, even around a link: the shortest counts.
        return sorted({(os.path.realpath(file.parent), file.name): file for file in files}.values())
    found = sorted(_files_under(path))
    kinds = ([file for file in found if kind_of(file.name) in kind] for kind in KINDS)
    chosen, *others = [*filter(None, kinds)] or [[]]
    if others:
        other, rest = others[0][0].name, sum(map(len, others))
        print(
            f"--source {name}: files like {chosen[0].name} are read ({len(chosen):,}), others like "
            f"{other} aren't ({rest:,}); for those, give a pattern such as "
            f"'{glob.escape(name)}/**/*{other[-len(kind_of(other)) :]}'",
            file=sys.stderr,
        )
    return chosen


def _files_under(folder: Path) -> Iterator[Path]:
    """All files of known kinds that aren't hidden, also behind links, each folder once.

    Raises OSError for a folder that can't be read and for such a file's link that leads nowhere:
    text would be missing.
    """

    def fail(error: OSError) -> None:
        raise error

    seen: set[str] = set()
    for at, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        if (real := os.path.realpath(at)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(one for one in folders if not one.startswith("."))
        for one in names:
            if one.startswith(".") or not kind_of(one):
                continue
            path = Path(at, one)
            if stat.S_ISREG(path.stat().st_mode):
                yield path


def hub_source(name: str, address: str, commit: str | None) -> Source:
    """The Parquet files of `owner/dataset[:config][@revision]`'s train split.

    Without a `commit` that an earlier run settled on, the revision, or else the newest state, is
    resolved to a commit here, once, so that every file comes from the same one.
    """
    from datasets import load_dataset_builder
    from yaml import YAMLError

    address, _, revision = address.partition("@")
    repository, _, config = address.partition(":")
    told = f"--source {name}: there is no such file, and it can't be had from the Hub"
    not_parquet = (
        "its files are not Parquet; download them and give --source the folder, or use the Hub's "
        "own conversion, @refs/convert/parquet"
    )
    with hub_errors(repository, told, also=(YAMLError,)):
        try:
            builder = load_dataset_builder(
                repository, config or None, revision=commit or revision or None
            )
        except RuntimeError as error:
            if "scripts" not in str(error):  # which would have to be run
                raise
            raise UserError(f"--source {name}: {one_line(error)}: {not_parquet}") from error
        splits = builder.config.data_files or {}
    if "train" not in splits:
        found = f"only {', '.join(splits)}" if splits else "and no other"
        raise UserError(
            f"--source {name} has no train split, {found}: download the files that you want and "
            "give --source their folder"
        )
    files = tuple(splits["train"])
    if not all(file.endswith(".parquet") for file in files):
        raise UserError(f"--source {name}: {not_parquet}")
    found = re.search(r"@([0-9a-f]{40})/", files[0])
    return Source(name, files, revision=found.group(1) if found else revision)


def batches(source: Source) -> Iterator[Batch]:
    """The source as a row of batches. What takes time is done when one is called."""
    for file in source.files:
        if file == PYTHON_DOCS:
            yield python_docs
        elif kind_of(file) in TEXT_SUFFIXES:
            yield partial(text_documents, file)
        elif kind_of(file) == ".parquet":
            with named_errors(file):
                groups = pq.ParquetFile(source.open(file)).num_row_groups
            for group in range(groups):
                yield partial(parquet_documents, source, file, group)
        else:
            yield from line_batches(source, file)


def named_errors(file: str) -> AbstractContextManager[None]:
    """Turn an error of reading `file` into a UserError that names it."""
    return hub_errors(file, f"can't read {file}", also=(pa.ArrowException,))


def text_documents(file: str) -> Iterator[Document]:
    """A text file is one document, read piece by piece."""

    def pieces() -> Iterator[str]:
        with named_errors(file), open(file, encoding="utf-8-sig", newline="") as text:
            try:
                while piece := text.read(PIECE_CHARACTERS):
                    yield piece
            except UnicodeDecodeError as error:
                raise UserError(
                    f"can't read {file}: it has a byte 0x{error.object[error.start]:02x} that is "
                    "no UTF-8; convert it, or leave it out of --source"
                ) from error

    yield pieces()


def parquet_documents(source: Source, file: str, group: int) -> Iterator[Document]:
    """One row group's `text` column, a document per row."""
    with named_errors(file):
        table = pq.ParquetFile(source.open(file), pre_buffer=False, buffer_size=PARQUET_BUFFER)
        if "text" not in table.schema_arrow.names:
            raise UserError(
                f"{file} has the columns {', '.join(table.schema_arrow.names)}; expected 'text'"
            )
        rows = table.iter_batches(PARQUET_ROWS, row_groups=[group], columns=["text"])
        texts = itertools.chain.from_iterable(some.column(0) for some in rows)
        for row, text in enumerate(texts, 1):
            yield document(text.as_py(), f"{file}, row {row} of row group {group + 1}")


def line_batches(source: Source, file: str) -> Iterator[Batch]:
    """Runs of lines of a JSON-lines file, about 4 MiB each; parsing is left to the batch."""
    with named_errors(file), io.BufferedReader(source.open(file)) as lines:
        first = 1
        while run := lines.readlines(BATCH_BYTES):
            yield partial(line_documents, file, first, run)
            first += len(run)


def line_documents(file: str, first: int, lines: list[bytes]) -> Iterator[Document]:
    """The `text` of each line's object. Empty lines are skipped."""
    for number, line in enumerate(lines, first):
        if line.strip():
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(
                    f'{file}, line {number}: expected an object such as {{"text": "…"}} '
                    f"({type(error).__name__}: {one_line(error):.100})"
                ) from error
            yield document(text, f"{file}, line {number}")


def document(text: object, where: str) -> Document:
    """One document's text in pieces. Raises UserError if it is no text."""
    if not isinstance(text, str):
        found = "empty (null)" if text is None else f"of type {type(text).__name__}"
        raise UserError(f"{where}: the document is {found}, expected text: leave it out")
    starts = range(0, len(text), PIECE_CHARACTERS)
    return (well_formed(text[start : start + PIECE_CHARACTERS]) for start in starts)


def python_docs() -> Iterator[Document]:
    """The documentation inside every Python: the topics of help() and the library's docstrings.

    A document per topic and per module, in an order that their hashes decide, so that validation
    text is a fair sample. Paragraphs that occur twice are kept once: otherwise a model could do
    well on validation text by remembering it from training.
    """
    from pydoc_data.topics import topics

    texts = sorted(
        itertools.chain(topics.values(), _library_docstrings()),
        key=lambda text: hashlib.sha256(text.encode()).digest(),
    )
    seen: set[str] = set()
    for text in texts:
        paragraphs = []
        for paragraph in re.split(r"\n\n+", text.strip("\n")):
            if paragraph.strip() and paragraph not in seen:
                seen.add(paragraph)
                paragraphs.append(paragraph)
        if paragraphs:
            yield document("\n\n".join(paragraphs) + "\n", PYTHON_DOCS)


def _library_docstrings() -> Iterator[str]:
    """The docstrings of each module, read without importing it."""
    library = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    for path in sorted(library.rglob("*.py")):
        if left_out.isdisjoint(path.relative_to(library).parts):
            definitions = _definitions(ast.parse(path.read_bytes()))
            docstrings = [text for text in map(ast.get_docstring, definitions) if text]
            if docstrings:
                yield "\n\n".join(docstrings)


def _definitions(tree: ast.Module) -> Iterator[ast.AST]:
    """The module and its classes and functions, in the order of ast.walk.

    ast.walk also visits every expression, where no definition can be: that takes a second longer.
    """
    nodes: deque[ast.AST] = deque([tree])
    while nodes:
        node = nodes.popleft()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
        for block in ("body", "handlers", "orelse", "finalbody", "cases"):
            nodes.extend(getattr(node, block, ()))


def estimated_tokens(source: Source, limit: int) -> int:
    """About how many tokens a source makes, up to `limit`: one for 3.5 bytes of text."""
    text_bytes = 0
    for file in source.files:
        if text_bytes >= 3.5 * limit:  # a dataset may have thousands of files
            return limit
        text_bytes += _text_bytes(source, file)
    return min(int(text_bytes / 3.5), limit)


def _text_bytes(source: Source, file: str) -> int:
    """About how much text a file holds: .gz and .zst are counted fourfold, a Parquet file tells it.

    Raises UserError if it can't be read.
    """
    if file == PYTHON_DOCS:
        return 0  # nobody knows
    with named_errors(file):
        if kind_of(file) != ".parquet":
            return os.path.getsize(file) * (4 if is_compressed(file) else 1)
        metadata = pq.ParquetFile(source.open(file)).metadata
        groups = map(metadata.row_group, range(metadata.num_row_groups))
        columns = (group.column(number) for group in groups for number in range(group.num_columns))
        return sum(c.total_uncompressed_size for c in columns if c.path_in_schema == "text")

"""The benchmarks that people quote: HellaSwag, LAMBADA, WikiText.

Each has its questions in a dataset of the Hugging Face Hub; a local copy, Parquet or JSON lines
with the same columns, does as well. They are asked as EleutherAI's lm-evaluation-harness asks them,
and HellaSwag as llm.c does it, too, since both kinds of numbers are quoted. What they ask for:
README, "How good is it?".
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from common.errors import UserError, reason_of
from common.hub import hub_errors
from common.records import NAMES
from scoring import Estimate, Request, Scorer
from tokenizer import encode_long

Rows = list[dict[str, object]]


@dataclass(frozen=True)
class Task:
    """A task: where its questions are, and how they are asked."""

    repository: str  # on the Hub
    config: str | None
    split: str
    columns: dict[str, type]  # what a row must have
    measure: Callable[[Rows, Scorer, int], dict[str, Estimate]]
    check: Callable[[dict[str, object], str], None]
    check_lengths: Callable[[Rows, Scorer], object] = lambda rows, scorer: None


@dataclass(frozen=True)
class Questions:
    """A task's rows, and where they are from."""

    name: str
    rows: Rows
    data: str  # the dataset, or the file
    revision: str  # of the dataset: a commit; of a file: its SHA-256

    @property
    def told(self) -> str:
        """What the terminal says of the origin: the dataset and its commit, or the file."""
        of_hub = self.data == TASKS[self.name].repository
        return f"{self.data}@{self.revision[:7]}" if of_hub else self.data

    def check_lengths(self, scorer: Scorer) -> None:
        """Raises UserError, naming the row, if an ending is too long for the model."""
        TASKS[self.name].check_lengths(self.rows, scorer)

    def ask(self, scorer: Scorer, stride: int) -> dict[str, Estimate]:
        """What the model makes of them: estimates by name, in the order in which to tell them."""
        return TASKS[self.name].measure(self.rows, scorer, stride)


@contextmanager
def naming(task: str, number: int) -> Iterator[None]:
    """Begin a UserError from inside with the task and the row."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{task}, row {number}: {error}") from error


# HellaSwag: which of four endings is the sensible one?


def hellaswag(rows: Rows, scorer: Scorer, _: int) -> dict[str, Estimate]:
    """The share of right choices (Zellers et al. 2019), by four ways to choose."""
    labels = np.array([int(row["label"]) for row in rows])
    choices = hellaswag_choices(rows, scorer)
    return {name: Estimate.of(chosen == labels) for name, chosen in choices.items()}


def hellaswag_choices(rows: Rows, scorer: Scorer) -> dict[str, np.ndarray]:
    """The number of the ending that is chosen for each row, (rows,), by each way to choose.

    `acc` takes the likeliest ending and `acc_norm` the likeliest per character, both of texts that
    were tidied and told their subject, as the harness does it (its `hellaswag` task). `llmc_acc`
    and `llmc_acc_norm`, per token, take texts as they are (llm.c and build-nanogpt,
    `hellaswag.py`).
    """
    harness, plain = hellaswag_requests(rows, scorer)
    characters = [len(tidy(ending)) for row in rows for ending in row["endings"]]
    tokens = np.array([request.guessed for request in plain])
    theirs, _ = scorer.score(harness, "hellaswag")
    llmc, _ = scorer.score(plain, "hellaswag, as llm.c")
    scores = {
        "acc": theirs,
        "acc_norm": theirs / np.maximum(characters, 1),
        "llmc_acc": llmc,
        "llmc_acc_norm": llmc / tokens,
    }
    return {name: score.reshape(-1, 4).argmax(axis=1) for name, score in scores.items()}


def hellaswag_requests(rows: Rows, scorer: Scorer) -> tuple[list[Request], list[Request]]:
    """What is asked, as the harness and as llm.c do it: four requests a row in each list."""
    harness, plain = [], []
    encode = partial(encode_long, scorer.encoding)
    for number, row in enumerate(rows, 1):
        start = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        before = encode(row["ctx"])
        with naming("hellaswag", number):
            for ending in row["endings"]:
                harness.append(scorer.request(tidy(start), " " + tidy(ending)))
                plain.append(scorer.cut(before, encode(" " + ending)))
    return harness, plain


def check_endings(row: dict[str, object], where: str) -> None:
    """Raises UserError unless there are four endings, and the label tells one of them."""
    endings, label = row["endings"], row.get("label")
    if len(endings) != 4 or not all(isinstance(ending, str) for ending in endings):
        raise UserError(f"{where}: expected four endings, found {endings!r:.60}")
    for ending in endings:
        check_text(ending, f"{where}: an ending")
    if str(label) not in ("0", "1", "2", "3"):
        raise UserError(
            f"{where}: the label is {label!r:.40}, expected 0 to 3 (the test split has none)"
        )


def tidy(text: str) -> str:
    """HellaSwag's text without WikiHow's marks, such as [header] and [title]."""
    text = text.strip().replace(" [title]", ". ")
    text = re.sub(r"\[[^]\n]*(]?)", lambda found: "" if found[1] else found[0], text)
    return text.replace("  ", " ")


# LAMBADA: the last word of a story, which takes all of it to guess


def lambada(rows: Rows, scorer: Scorer, _: int) -> dict[str, Estimate]:
    """Accuracy, when each token of the word must be the likeliest, and perplexity per word.

    Paperno et al. 2016, in the form that OpenAI published, the harness's `lambada_openai`.
    """
    requests = lambada_requests(rows, scorer)
    log_probability, likeliest = scorer.score(requests, "lambada")
    return {
        "acc": Estimate.of(likeliest),
        "perplexity": Estimate.of(-log_probability).exponential(),
    }


def check_word(row: dict[str, object], where: str) -> None:
    """Raises UserError for a text without anything to guess."""
    if not row["text"]:
        raise UserError(f"{where}: the text is empty, expected one that ends with a word")


def lambada_requests(rows: Rows, scorer: Scorer) -> list[Request]:
    """A request per row, for its last word and the blank before it."""
    requests = []
    for number, row in enumerate(rows, 1):
        before, blank, word = str(row["text"]).rpartition(" ")
        with naming("lambada", number):
            requests.append(scorer.request(before, blank + word))
    return requests


# WikiText: long texts, window by window


def wikitext(rows: Rows, scorer: Scorer, stride: int) -> dict[str, Estimate]:
    """Perplexity per token and per word, and bits per byte (Merity et al. 2016).

    The texts were cut into words long ago; `joined` undoes most of that. Words and bytes are those
    of the text as published, so that models with different vocabularies can be compared.
    """
    pages = [str(row["page"]) for row in rows]
    requests, owners = [], []
    for number, page in enumerate(pages):
        ids = encode_long(scorer.encoding, joined(page))
        some = windows(ids, scorer.encoding.eot_token, scorer.model.config.block_size, stride)
        requests += some
        owners += [number] * len(some)
    log_probability, _ = scorer.score(requests, "wikitext")
    nats = np.bincount(owners, -log_probability)
    tokens = np.bincount(owners, [request.guessed for request in requests])
    words = [len(re.split(r"\s+", page)) for page in pages]
    text_bytes = [len(page.encode()) for page in pages]
    return {
        "perplexity": Estimate.of(nats, tokens).exponential(),
        "word_perplexity": Estimate.of(nats, words).exponential(),
        "bits_per_byte": Estimate.of(nats, text_bytes).scaled(1 / np.log(2)),
    }


def check_page(row: dict[str, object], where: str) -> None:
    """Raises UserError for a page without anything to guess: of no tokens there is no mean."""
    if not row["page"]:
        raise UserError(f"{where}: the page is empty, expected a text")


def windows(ids: list[int], start: int, block_size: int, stride: int) -> list[Request]:
    """Guess every token of a text once: a window goes on by `stride` tokens and guesses the new.

    `start` comes before the first token. With a small stride each token is guessed from more of
    what is before it, and there is more to compute. With the whole context as stride, only the
    last window overlaps with the one before.
    """
    text = [start, *ids]
    requests, done = [], 1
    while done < len(text):
        end = min(len(text), done + (block_size if done == 1 else stride))
        requests.append(Request(text[max(0, end - block_size - 1) : end], end - done))
        done = end
    return requests


# What is put right, in this order, after Radford et al. 2019, section 3.1, who speak of
# "de-tokenizers" and don't give them; the rules are those of the harness, so that numbers compare.
SPACED_MARKS = [("s '", "s'"), *((f" @{mark}@ ", mark) for mark in "-,.")]
SPACED_MARKS += [(f" {mark} ", f"{mark} ") for mark in ":;.!?,"]
PAIRS = ["()", "[]", "{}", '""', "''"]
SPACED_REST = [(" ".join("=" * count), "=" * count) for count in (4, 3, 2)]
SPACED_REST += [(" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")]


def joined(text: str) -> str:
    """WikiText's words as they stood on the page: "( 1 @,@ 000 )" becomes "(1,000)"."""
    for spaced, right in SPACED_MARKS:
        text = text.replace(spaced, right)
    for left, right in PAIRS:
        inside = rf"{re.escape(left)}([^{re.escape(right)}]*){re.escape(right)}"
        end = text.rfind(right) + 1  # nothing is closed after it
        tight = re.sub(
            inside, lambda found, pair=(left, right): found[1].strip().join(pair), text[:end]
        )
        text = tight + text[end:]
    for spaced, right in SPACED_REST:
        text = text.replace(spaced, right)
    return text


SWAG = {name: str for name in ("activity_label", "ctx_a", "ctx_b", "ctx")} | {"endings": list}
WIKI = "EleutherAI/wikitext_document_level"
TASKS = {
    "hellaswag": Task(
        "Rowan/hellaswag",
        None,
        "validation",
        SWAG,
        hellaswag,
        check_endings,
        check_lengths=hellaswag_requests,
    ),
    "lambada": Task(
        "EleutherAI/lambada_openai",
        "default",
        "test",
        {"text": str},
        lambada,
        check_word,
        check_lengths=lambada_requests,
    ),
    "wikitext2": Task(WIKI, "wikitext-2-raw-v1", "test", {"page": str}, wikitext, check_page),
    "wikitext103": Task(WIKI, "wikitext-103-raw-v1", "test", {"page": str}, wikitext, check_page),
}


# Where the questions come from


def load_questions(name: str, file: Path | None = None) -> Questions:
    """A task's questions, from the Hub or from a file, checked.

    Raises UserError if they can't be had, or if a row isn't as it should be.
    """
    task = TASKS[name]
    rows, data, revision = read_file(file, [*task.columns, "label"]) if file else read_hub(task)
    if not rows:
        raise UserError(f"{data} has no rows: expected the questions of {name}")
    for number, row in enumerate(rows, 1):
        where = f"{data}, row {number}"
        for column, kind in task.columns.items():
            value = row.get(column)
            if not isinstance(value, kind):
                raise UserError(f"{where}: {column!r} is {value!r:.60}, expected {NAMES[kind]}")
            if kind is str:
                check_text(value, f"{where}: {column!r}")
        task.check(row, where)
    return Questions(name, rows, data, revision)


def check_text(text: str, what: str) -> None:
    """Raises UserError for a text that JSON can spell and UTF-8 can't: it has no bytes to count."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise UserError(f"{what} holds {half!r}, half of a character (a lone surrogate)") from error


def read_file(path: Path, columns: list[str]) -> tuple[Rows, str, str]:
    """(rows, name, SHA-256) of a Parquet or JSON-lines file; of Parquet, these columns.

    Raises UserError if it is none.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".parquet":
            from pyarrow import BufferReader, parquet

            # In this thread: one of pyarrow's that still begins as the process ends aborts it.
            table = parquet.ParquetFile(BufferReader(content))
            rows = table.read(columns, use_threads=False).to_pylist()
        else:
            rows = [json.loads(line) for line in content.splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError, NotImplementedError) as error:  # pyarrow's, too
        told = "" if isinstance(error, OSError) else "; expected Parquet (.parquet) or JSON lines"
        raise UserError(f"can't read {path}: {reason_of(error)}{told}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected an object in each line")
    return rows, str(path), hashlib.sha256(content).hexdigest()


def read_hub(task: Task) -> tuple[Rows, str, str]:
    """(rows, name, commit) from the Hub, or from the cache that an earlier run has filled.

    Raises UserError if it can't be had.
    """
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetsError

    told = f"{task.repository} can't be had from the Hub"
    way_out = "; evaluate.py --file takes a local copy"
    with hub_errors(task.repository, told, way_out, also=(DatasetsError, KeyError)):
        builder = load_dataset_builder(task.repository, task.config)
        builder.download_and_prepare()
        rows = builder.as_dataset(task.split).to_list()
    return rows, task.repository, builder.hash

"""How good is a model? Its loss on text that it has never seen, and its scores in tasks.

    python evaluate.py --checkpoint out/demo
    python evaluate.py --checkpoint gpt2 --tasks hellaswag,lambada,wikitext2
    torchrun --standalone --nproc-per-node=8 evaluate.py --checkpoint gpt2-xl --tasks hellaswag

The loss is the mean of -log p(token), in nats. It depends on the vocabulary: longer tokens are
harder to guess but fewer. Bits per byte doesn't, so that it compares models of any vocabulary, and
even with programs that compress files: both say how many bits the text takes when every guess is
paid for (README, "How good is it?"). For a text of up to a million bytes the table also tells what
`xz -9e` makes of it.

A run with data.document_mask is validated as it was trained, on each document by itself. A model
from Hugging Face's format, which doesn't tell of it, reads on from one document to the next.

After ± stands the standard error: what another sample of such questions may well change. A
perplexity too large for a float is "inf" on the terminal, and null in --output's JSON, which knows
no infinity.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common.errors import Parser, UserError, positive, run_script
from common.files import check_can_write, output_file
from config import TASK_NAMES, LogSettings, make_config, task_names

TOKENS = LogSettings.eval_tokens  # as training has it by default


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description="Measure how good a model is.")
    add = parser.add_argument
    add("--checkpoint", required=True, help="run or checkpoint folder; on the Hub gpt2, owner/name")
    add(
        "--tasks",
        default="val",
        help=f"some of val (the default: loss on validation shards), {', '.join(TASK_NAMES)}",
    )
    add("--data", type=Path, help="val: shard folder (the one it was trained on)")
    add(
        "--tokens",
        type=positive,
        default=TOKENS,
        help=f"val: how many, from the start ({TOKENS:,})",
    )
    add("--file", type=Path, help="questions of the one task asked for (the Hub's dataset)")
    add("--limit", type=positive, help="tasks: how many questions, the first of each (all)")
    add("--stride", type=positive, help="wikitext: tokens between windows (the whole context)")
    add("--output", type=Path, metavar="FILE.json", help="write what was found")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    parsed = parser.parse_args(arguments)
    try:
        parsed.names = task_names(parsed.tasks, known=("val", *TASK_NAMES))
        check_arguments(parsed)
    except UserError as error:
        parser.error(str(error))
    return parsed


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises UserError for what doesn't go together, and for an --output that can't be a file."""
    names = arguments.names
    if not names:
        raise UserError("--tasks is empty: no task is named")
    if arguments.file and (len(names) != 1 or names == ["val"]):
        raise UserError(f"--file holds one task's questions, --tasks is {arguments.tasks}")
    if arguments.stride and not any(name.startswith("wikitext") for name in names):
        raise UserError(f"--stride is wikitext's, --tasks is {arguments.tasks}")
    for option, given in (("data", arguments.data), ("tokens", arguments.tokens != TOKENS)):
        if given and "val" not in names:
            raise UserError(f"--{option} is val's, --tasks is {arguments.tasks}")
    if arguments.limit and names == ["val"]:
        raise UserError(f"--limit is for tasks other than val, --tasks is {arguments.tasks}")
    if arguments.output:
        output_file(arguments.output)


if __name__ == "__main__":  # before the slow imports: --help and a typo answer at once
    ARGUMENTS = parse_arguments()

import lzma
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial

import numpy as np
import tiktoken
import torch

from checkpoint import Checkpoint
from common.device import device_name, memory_errors
from common.reports import write_report
from distributed import Ranks, process_group
from huggingface import find_model
from scoring import (
    Estimate,
    Scorer,
    check_numbers,
    evaluating,
    in_digits,
    validate,
    window_losses,
)
from shards import TokenStream
from tasks import Questions, load_questions
from tokenizer import token_byte_lengths

XZ_LIMIT = 1 << 20  # bytes; xz -9e takes about a second for so many
TIMEOUT = 7200  # seconds that ranks wait for one another: one may be downloading a model
JOINING = 600  # and until they have found one another
Told = tuple[list[str], dict[str, object]]  # lines for the terminal, a record for --output


def xz_bits_per_byte(stream: TokenStream, encoding: tiktoken.Encoding, tokens: int) -> float | None:
    """What `xz -9e` makes of the text of the first tokens; None if that is over a million bytes."""
    ids = stream.read(1, tokens).astype(np.int64)  # the first token is never guessed
    text = encoding.decode_bytes(ids[ids != encoding.eot_token].tolist())
    if len(text) > XZ_LIMIT:
        return None
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


def validation_stream(arguments: argparse.Namespace, checkpoint: Checkpoint) -> TokenStream:
    """The shards to validate on. Raises UserError if they aren't there or don't fit the model."""
    trained_on = checkpoint.meta.config.get("data", {}).get("dir")
    folder = arguments.data or (isinstance(trained_on, str) and trained_on and Path(trained_on))
    if not folder:
        raise UserError(f"{arguments.checkpoint} wasn't trained here: give --data, a shard folder")
    stream = TokenStream(folder, "val")
    checkpoint.check_vocabulary(folder)
    return stream


def reads_by_document(checkpoint: Checkpoint) -> bool:
    """Whether it was trained with data.document_mask. Raises UserError if that can't be told."""
    told = checkpoint.meta.config.get("data", {}).get("document_mask", False)
    try:
        return make_config({"data": {"document_mask": told}}).data.document_mask
    except UserError as error:
        raise UserError(f"{checkpoint.path}: {error}") from error


def measure_loss(stream: TokenStream, max_tokens: int, scorer: Scorer, document_mask: bool) -> Told:
    """The loss on validation shards, which are read as in training."""
    model, encoding = scorer.model, scorer.encoding
    result = validate(
        partial(window_losses, model, document_mask),
        stream,
        model.config.block_size,
        batch_size=16,
        max_tokens=max_tokens,
        ranks=scorer.ranks,
        byte_lengths=token_byte_lengths(encoding),
    )
    check_numbers(result.loss, model)
    perplexity, bits = result.estimate.exponential(), result.bits_per_byte
    metrics = {"loss": result.estimate, "perplexity": perplexity}
    text_bytes = f"{result.text_bytes or 0:,} bytes"
    told = ", each document by itself" if document_mask else ""
    lines = [
        f"validation      {result.tokens:,} tokens, {text_bytes} of {stream.folder}",
        f"loss            {result.loss:.4f} nats per token{told}",
        f"perplexity      {in_digits(perplexity.value, 2)}",
    ]
    if bits:  # there is more than <|endoftext|>
        metrics["bits_per_byte"] = bits
        lines.append(f"bits per byte   {bits.value:.3f}")
        xz = xz_bits_per_byte(stream, encoding, result.tokens)
        lines += [f"xz -9e          {xz:.3f} bits per byte on the same text"] if xz else []
    found = record("val", str(stream.folder), stream.fingerprint, result.tokens, metrics)
    return lines, found | {"document_mask": document_mask}


def run_task(questions: Questions, limit: int | None, stride: int, scorer: Scorer) -> Told:
    """The model's scores in a task, or in its first `limit` questions."""
    asked = replace(questions, rows=questions.rows[:limit])
    metrics, count = asked.ask(scorer, stride), len(asked.rows)
    some = f"the first {count:,} of {len(questions.rows):,}" if limit else f"{count:,}"
    lines = [f"{questions.name:<16}{some} of {questions.told}"]
    lines += [f"{name:<16}{estimate}" for name, estimate in metrics.items()]
    found = record(questions.name, questions.data, questions.revision, count, metrics)
    return lines, found | ({"limit": limit} if limit else {})


def record(
    task: str, data: str, revision: str, count: int, metrics: dict[str, Estimate]
) -> dict[str, object]:
    """What --output keeps of a task."""
    values = {name: asdict(estimate) for name, estimate in metrics.items()}
    return {"task": task, "data": data, "revision": revision, "count": count, "metrics": values}


def look_up(
    name: str, arguments: argparse.Namespace, checkpoint: Checkpoint, scorer: Scorer
) -> Callable[[], Told]:
    """Have a task's data ready and checked; what is returned measures the model on it.

    Raises UserError if it can't be had or doesn't fit the model.
    """
    if name == "val":
        stream = validation_stream(arguments, checkpoint)
        stream.num_windows(scorer.model.config.block_size)  # too short? not after other tasks
        document_mask = reads_by_document(checkpoint)
        return partial(measure_loss, stream, arguments.tokens, scorer, document_mask)
    stride = choose_stride(arguments, scorer.model.config.block_size)
    questions = scorer.ranks.in_turn(lambda: load_questions(name, arguments.file))
    replace(questions, rows=questions.rows[: arguments.limit]).check_lengths(scorer)
    return partial(run_task, questions, arguments.limit, stride, scorer)


def choose_stride(arguments: argparse.Namespace, block_size: int) -> int:
    """--stride, or the whole context. Raises UserError for more: windows would leave tokens out."""
    stride = arguments.stride or block_size
    if stride > block_size:
        raise UserError(
            f"--stride {stride:,}: this model's context has {block_size:,} tokens, expected 1 to "
            f"{block_size:,}"
        )
    return stride


def report_of(
    name: str, checkpoint: Checkpoint, sha256: str, ranks: Ranks, results: list[dict[str, object]]
) -> dict[str, object]:
    """What --output keeps: the `results`, and what they are of; `sha256` is the weights'."""
    return {
        "checkpoint": name,
        "step": checkpoint.meta.step,
        "sha256": sha256,
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{ranks.world_size} × {device_name(ranks.device)}",
        "torch": torch.__version__,
        "results": results,
    }


def evaluate(arguments: argparse.Namespace, ranks: Ranks) -> None:
    """Have all data ready, then measure task by task, and tell what was found."""
    with ranks.together():
        if arguments.output and ranks.is_first:
            check_can_write(output_file(arguments.output))
    checkpoint = ranks.in_turn(lambda: find_model(arguments.checkpoint))
    model, sha256 = checkpoint.make_model(), checkpoint.model_sha256()  # a run may remove it soon
    scorer = Scorer(model.to(ranks.device), checkpoint.encoding(), ranks)
    tasks = [look_up(name, arguments, checkpoint, scorer) for name in arguments.names]
    tell = print if ranks.is_first else (lambda line: None)
    tell(f"checkpoint      {checkpoint.path.name} of {arguments.checkpoint}")
    results = []
    with evaluating(model):
        for measure in tasks:
            try:
                lines, result = measure()
            except FloatingPointError as error:
                raise UserError(f"{arguments.checkpoint}: {error}") from error
            tell("\n".join(lines))
            results.append(result)
    if arguments.output and ranks.is_first:
        report = report_of(arguments.checkpoint, checkpoint, sha256, ranks, results)
        write_report(arguments.output, report)


@memory_errors("take a smaller model, or --device cpu if that has more memory")
def main(arguments: argparse.Namespace) -> None:
    """Evaluate, alone or with the other processes that torchrun started."""
    with process_group(arguments.device, TIMEOUT, JOINING) as ranks:
        evaluate(arguments, ranks)


if __name__ == "__main__":
    sys.exit(run_script(main, ARGUMENTS))

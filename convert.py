"""Weights in Hugging Face's format become a checkpoint, and a checkpoint becomes a folder for them.

    python convert.py from-hf gpt2 --out out/gpt2           OpenAI's weights, from the Hub
    python convert.py from-hf DIR --out out/theirs          a folder that transformers saved
    python convert.py to-hf out/demo --out exported         AutoModelForCausalLM loads it

What lies between the two formats: huggingface.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common.errors import Parser, UserError, folder_name, run_script


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description="Convert weights from Hugging Face's format and to it.")
    ways = parser.add_subparsers(dest="way", metavar="WAY", required=True)
    theirs = ways.add_parser("from-hf", help="make a checkpoint")
    theirs.add_argument(
        "source", help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, owner/name[@revision], or a folder"
    )
    ours = ways.add_parser("to-hf", help="make a folder for transformers")
    ours.add_argument("source", help="a checkpoint or run folder, such as out/demo")
    for way in (theirs, ours):
        way.add_argument("--out", type=folder_name, required=True, help="folder to write")
    return parser.parse_args(arguments)


if __name__ == "__main__":  # before the slow imports: --help and a typo answer at once
    ARGUMENTS = parse_arguments()

import json
import os
import shlex

from checkpoint import META, MODEL, checkpoints_in, save_tensors
from common.device import memory_errors
from common.files import is_there
from huggingface import (
    CONFIG,
    EXPECTED,
    MERGES,
    NAMES,
    PREFIX,
    TRANSPOSED,
    VOCAB,
    byte_characters,
    download,
    find_model,
    from_hf,
    is_hub_name,
    spelled_merges,
    whole,
)
from tokenizer import END_OF_TEXT, vocabulary_of


def to_hf(checkpoint: str, out: Path) -> None:
    """Write a folder that transformers' AutoModelForCausalLM and AutoTokenizer load."""
    found = find_model(checkpoint)
    config, encoding = found.meta.model, found.encoding()
    model = found.make_model()
    tensors = {
        PREFIX + name: (tensor.T if name.endswith(TRANSPOSED) else tensor).contiguous()
        for name, tensor in model.state_dict().items()
    }
    end = {"bos_token_id": encoding.eot_token, "eos_token_id": encoding.eot_token}
    described = {key: allowed[0] for key, allowed in EXPECTED.items()} | end
    described |= {
        "architectures": ["GPT2LMHeadModel"],
        "dtype": "float32",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        **{f"{place}_pdrop": config.dropout for place in ("embd", "attn", "resid")},
    }
    with whole(out) as new:
        save_tensors(tensors, new / MODEL, metadata={"format": "pt"})
        write_json(new / CONFIG, described)
        write_json(new / "generation_config.json", end)
        write_tokenizer(vocabulary_of(encoding), config.block_size, new)


def write_tokenizer(ranks: dict[bytes, int], block_size: int, out: Path) -> None:
    """Write vocab.json, merges.txt and tokenizer_config.json."""
    characters = byte_characters()
    ids = {"".join(characters[byte] for byte in token): ranks[token] for token in ranks}
    write_json(out / VOCAB, {**ids, END_OF_TEXT: len(ranks)})
    lines = ["#version: 0.2", *spelled_merges(ranks)]
    (out / MERGES).write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {f"{kind}_token": END_OF_TEXT for kind in ("bos", "eos", "unk")}
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": block_size, **special}
    write_json(out / "tokenizer_config.json", settings)


def write_json(path: Path, content: dict[str, object]) -> None:
    """Write an object, readable by people."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@memory_errors("the model doesn't fit; take a smaller one")
def main(arguments: argparse.Namespace) -> None:
    """Convert, and say what to do with it."""
    source, out = arguments.source, arguments.out
    try:
        is_taken = is_there(out) and (not out.is_dir() or any(out.iterdir()))
    except OSError as error:
        raise UserError(f"--out: can't read {out}: {error.strerror}") from error
    if is_taken:
        raise UserError(f"--out {out} is there already: choose another folder, or remove it")
    if arguments.way == "to-hf":
        to_hf(source, out)
        print(f"{out}: transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})")
        return
    here = os.path.isdir(source)  # for a name that no path can have, pathlib's raises
    if not here and not is_hub_name(source):
        raise UserError(f"{source!r}: expected {', '.join(NAMES)}, owner/name, or a folder")
    if is_there(Path(source, META)) or checkpoints_in(Path(source, "checkpoints")):
        raise UserError(f"{source} is a checkpoint already: to-hf goes the other way")
    from_hf(Path(source) if here else download(source), out)
    print(f"{out}: python sample.py --checkpoint {shlex.quote(out.as_posix())}")


if __name__ == "__main__":
    sys.exit(run_script(main, ARGUMENTS))

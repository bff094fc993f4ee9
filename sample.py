"""Generate text from a checkpoint.

    python sample.py --checkpoint out/demo --prompt "The list"
    python sample.py --checkpoint out/demo --interactive

Text goes to standard output as it comes, everything else to standard error.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common.errors import Parser, UserError, positive, run_script


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description="Generate text from a checkpoint.")
    add = parser.add_argument
    add("--checkpoint", required=True, help="run or checkpoint folder; on the Hub gpt2, owner/name")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="text to continue (none: the model begins a document)")
    source.add_argument("--prompt-file", help="a file with the text, or - for standard input")
    source.add_argument("--interactive", action="store_true", help="ask for prompts, one by one")
    add("--max-new-tokens", type=positive, default=200, help="tokens per sample (200)")
    add("--num-samples", type=positive, default=1, help="samples, all in one batch (1)")
    add("--temperature", type=_temperature, default=0.8, help="0 = always the likeliest (0.8)")
    add("--top-k", type=positive, help="draw from the k likeliest tokens only")
    add("--top-p", type=_probability, help="draw from the likeliest that reach probability p")
    add("--stop", action="append", default=[], metavar="TEXT", help="stop before it; repeatable")
    add("--seed", type=_seed, help="the same seed gives the same text (random)")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"))
    add("--compile", action="store_true", help="on an NVIDIA GPU: slower start, faster tokens")
    add("--jsonl", action="store_true", help="one JSON object per sample, nothing else")
    return parser.parse_args(arguments)


def _temperature(text: str) -> float:
    """An argparse type: 0 or more."""
    if not 0 <= _number(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number, 0 or more")
    return float(text)


def _probability(text: str) -> float:
    """An argparse type: above 0, up to 1."""
    if not 0 < _number(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0, up to 1")
    return float(text)


def _seed(text: str) -> int:
    """An argparse type: what a generator takes."""
    if not text.isdecimal() or int(text) >= 2**64:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 0 to 2^64 - 1")
    return int(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


if __name__ == "__main__":  # before the slow imports: --help and a typo answer at once
    ARGUMENTS = parse_arguments()

import codecs
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import tiktoken
import torch

from common.device import choose_device, choose_dtype, memory_errors
from decoding import compile_decoding, most_fused, pack_weights
from huggingface import find_model
from model import GPT
from tokenizer import encode_end


@dataclass
class Completion:
    """One sample as it grows, token by token.

    A token can end within a character of several bytes, and within a stop text. What could still
    become either is held back until it is known.
    """

    encoding: tiktoken.Encoding
    stops: list[str]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None  # "length", "stop" or "end_of_text" once it is over
    shown: int = 0  # characters that `fresh` has given out

    def __post_init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> None:
        """Take one more token; sets `finish_reason` if the text ends with it."""
        if token == self.encoding.eot_token:
            self.finish("end_of_text")
            return
        self.tokens.append(token)
        self.text += self.decoder.decode(self.encoding.decode_single_token_bytes(token))
        found = [at for at in map(self.text.find, self.stops) if at >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.finish_reason = "stop"
            while self.tokens and self._text_of(self.tokens[:-1]).startswith(self.text):
                self.tokens.pop()  # a token that only made the stop text is no part of the text

    def _text_of(self, tokens: list[int]) -> str:
        return self.encoding.decode_bytes(tokens).decode(errors="replace")

    def finish(self, reason: str) -> None:
        """End the text here; half a character that is left becomes U+FFFD."""
        self.text += self.decoder.decode(b"", final=True)
        self.finish_reason = reason

    def fresh(self) -> str:
        """The text since the last call that no later token can take back."""
        end = len(self.text)
        if self.finish_reason is None:
            longest = max(map(len, self.stops), default=1) - 1
            tails = range(max(self.shown, end - longest), end)
            end = next((at for at in tails if self._may_become_stop(self.text[at:])), end)
        text, self.shown = self.text[self.shown : end], max(end, self.shown)
        return text

    def _may_become_stop(self, tail: str) -> bool:
        return any(stop.startswith(tail) for stop in self.stops)


def complete(
    model: GPT,
    encoding: tiktoken.Encoding,
    ids: list[int],
    arguments: argparse.Namespace,
    generator: torch.Generator,
    show: Callable[[str], None],
) -> list[Completion]:
    """Continue `ids` in `num_samples` ways at once; `show` gets the first one as it comes."""
    device = model.wte.weight.device
    prompts = torch.tensor([ids], device=device).repeat(arguments.num_samples, 1)  # (B, T)
    samples = [Completion(encoding, arguments.stop) for _ in range(arguments.num_samples)]
    for next_ids in model.generate(
        prompts,
        arguments.max_new_tokens,
        arguments.temperature,
        arguments.top_k,
        arguments.top_p,
        generator,
    ):
        for sample, token in zip(samples, next_ids.tolist()):
            if sample.finish_reason is None:
                sample.add(token)
        show(samples[0].fresh())
        if all(sample.finish_reason for sample in samples):
            break
    for sample in samples:
        if sample.finish_reason is None:
            sample.finish("length")
    show(samples[0].fresh())
    return samples


def read_prompt(arguments: argparse.Namespace) -> str | None:
    """The prompt of the command line or of a file; None means none was asked for.

    Raises UserError for an empty prompt or an unreadable file.
    """
    prompt = arguments.prompt
    if arguments.prompt_file == "":
        raise UserError("--prompt-file is empty: name a file, or - for standard input")
    try:
        if arguments.prompt_file == "-":
            prompt = sys.stdin.buffer.read().decode("utf-8-sig")
        elif arguments.prompt_file:
            prompt = Path(arguments.prompt_file).read_bytes().decode("utf-8-sig")
        elif prompt:
            prompt.encode()
    except (OSError, UnicodeError) as error:
        name = arguments.prompt_file or "on the command line"
        told = "expected text in UTF-8" if isinstance(error, UnicodeError) else error.strerror
        raise UserError(f"can't read the prompt {name}: {told}") from error
    if prompt == "":
        raise UserError("the prompt is empty: give some text, or no prompt to begin a document")
    return prompt


def typed_prompts() -> Iterator[str]:
    """Lines that the user types, until the end of the input (Ctrl-D)."""
    print("Type a beginning; Ctrl-C stops a text, Ctrl-D ends.", file=sys.stderr)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline().decode(errors="replace")
        if not line:
            print(file=sys.stderr)
            return
        if line.strip():
            yield line.rstrip("\r\n")


def answer(
    model: GPT,
    encoding: tiktoken.Encoding,
    prompt: str | None,
    arguments: argparse.Namespace,
    generator: torch.Generator,
) -> None:
    """Continue one prompt and print the samples."""
    context = model.config.block_size
    ids = [encoding.eot_token]
    if prompt is not None:
        ids = encode_end(encoding, prompt, 2 * context)
    if len(ids) > context:
        print(
            f"the prompt is longer than the context: only its last {context:,} tokens are used",
            file=sys.stderr,
        )
    if arguments.jsonl:
        samples = complete(model, encoding, ids, arguments, generator, show=lambda text: None)
        print_objects(samples, prompt or "")
        return
    print(prompt or "", end="", flush=True)
    show = partial(print, end="", flush=True)
    _, *others = complete(model, encoding, ids, arguments, generator, show)
    print()
    for sample in others:
        print(f"---------------\n{prompt or ''}{sample.text}")


def print_objects(samples: list[Completion], prompt: str) -> None:
    """One JSON object per sample and line, for programs to read."""
    for number, sample in enumerate(samples):
        result = {
            "sample": number,
            "prompt": prompt,
            "completion": sample.text,
            "tokens": sample.tokens,
            "finish_reason": sample.finish_reason,
        }
        print(json.dumps(result, ensure_ascii=False), flush=True)


@memory_errors("take a smaller model, or --device cpu if that has more memory")
def main(arguments: argparse.Namespace) -> None:
    """Load the checkpoint and continue the prompts."""
    if any(not stop for stop in arguments.stop):
        raise UserError("--stop is empty: give the text to stop before")
    checkpoint = find_model(arguments.checkpoint)
    encoding = checkpoint.encoding()
    prompts = typed_prompts() if arguments.interactive else [read_prompt(arguments)]
    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype, device)
    model = checkpoint.make_model()
    model.to(device=device, dtype=dtype)
    pack_weights(model)
    if arguments.compile:
        most = most_fused(model.config.n_embd)
        if arguments.num_samples > most:
            raise UserError(f"--compile: for up to {most} samples of this model at once")
        compile_decoding(model)
    generator = torch.Generator(device)
    seed = generator.seed() if arguments.seed is None else arguments.seed
    print(
        f"{checkpoint.path.name} of {arguments.checkpoint}, "
        f"{str(dtype).removeprefix('torch.')} on {device}, seed {seed}",
        file=sys.stderr,
    )
    generator.manual_seed(seed)
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    for prompt in prompts:
        try:
            with memory_errors("lower --num-samples"):
                answer(model, encoding, prompt, arguments, generator)
        except (FloatingPointError, UserError) as error:
            if not arguments.jsonl:
                print()
            raise UserError(f"{arguments.checkpoint}: {error}") from error
        except KeyboardInterrupt:
            if not arguments.interactive:
                raise
            print(file=sys.stderr if arguments.jsonl else sys.stdout)


if __name__ == "__main__":
    sys.exit(run_script(main, ARGUMENTS))

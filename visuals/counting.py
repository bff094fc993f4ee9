"""How far counting gets: guess the next token by what followed the same tokens before.

    python -m visuals.counting --data data/demo --output results/counting.json

For contexts of 0, 1, 2, … tokens it tells how often validation text has a context that the training
text has too, and how often the most frequent follower there is the right guess. And it tells two
numbers to be compared with a GPT's: the loss of a smoothed bigram model, and what a compressor
makes of the validation text when it has the training text before it.
"""

from __future__ import annotations

import argparse
import lzma
import math
import sys
from collections import Counter, defaultdict
from pathlib import Path

from common.errors import Parser, UserError, run_script


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description="Guess the next token by counting.")
    parser.add_argument("--data", type=Path, default=Path("data/demo"), help="shards (data/demo)")
    parser.add_argument("--output", type=Path, help="a JSON file for the numbers")
    return parser.parse_args(arguments)


if __name__ == "__main__":  # before the slow imports: --help and a typo answer at once
    ARGUMENTS = parse_arguments()

from common.files import check_can_write, output_file
from common.reports import circumstances, write_report
from shards import TokenStream, encoding_of, tokenizer_of

LONGEST = 5  # tokens of context

Followers = dict[tuple[int, ...], Counter]


def count_followers(tokens: list[int], context: int) -> Followers:
    """What followed each run of `context` tokens, and how often."""
    followers: Followers = defaultdict(Counter)
    for at in range(context, len(tokens)):
        followers[tuple(tokens[at - context : at])][tokens[at]] += 1
    return followers


def guess_by_counting(followers: Followers, tokens: list[int], context: int) -> tuple[float, float]:
    """(share of places whose context was seen before, share where the best guess was right)."""
    best = {key: counts.most_common(1)[0][0] for key, counts in followers.items()}
    places = range(context, len(tokens))
    guesses = [(best.get(tuple(tokens[at - context : at])), tokens[at]) for at in places]
    seen = sum(guess is not None for guess, _ in guesses)
    right = sum(guess == token for guess, token in guesses)
    return seen / len(guesses), right / len(guesses)


def bigram_loss(train: list[int], tokens: list[int], vocab_size: int) -> float:
    """Nats per token of a bigram model, its counts mixed with those of single tokens.

    p(b | a) = (count(a b) + k · p(b)) / (count(a) + k), with the k of 1, 2, 4, … 1024 that suits
    `tokens` best: better than any that could be chosen without looking at them. p(b) is the token's
    own share, each counted once more than it was seen.
    """
    pairs, singles = count_followers(train, 1), Counter(train)
    totals = {key: sum(counts.values()) for key, counts in pairs.items()}
    share = {b: (singles[b] + 1) / (len(train) + vocab_size) for b in range(vocab_size)}
    followed = list(zip(tokens, tokens[1:]))

    def loss(k: int) -> float:
        nats = 0.0
        for a, b in followed:
            count = pairs[(a,)][b] if (a,) in pairs else 0
            nats -= math.log((count + k * share[b]) / (totals.get((a,), 0) + k))
        return nats / len(followed)

    return min(loss(2**power) for power in range(11))


def xz_after(before: bytes, text: bytes) -> float:
    """Bits per byte of `text` that `xz -9e` needs beyond what it needs for the text before it."""

    def packed(content: bytes) -> int:
        return len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))

    return 8 * (packed(before + text) - packed(before)) / len(text)


def measure(data: Path) -> dict[str, object]:
    """All numbers, for the shards in a folder."""
    vocab_size = tokenizer_of(data).vocab_size
    streams = {split: TokenStream(data, split) for split in ("train", "val")}
    train, val = (stream.read(0, len(stream)).tolist() for stream in streams.values())
    if len(val) <= LONGEST:
        raise UserError(f"{data} has {len(val)} tokens to guess, expected more than {LONGEST}")
    encoding = encoding_of(data)
    texts = [
        encoding.decode_bytes([token for token in tokens if token != encoding.eot_token])
        for tokens in (train, val)
    ]
    rows = []
    for context in range(LONGEST + 1):
        followers = count_followers(train, context)
        seen, right = guess_by_counting(followers, val, context)
        rows.append(
            {
                "context": context,
                "different_contexts": len(followers),
                "possible_contexts": vocab_size**context,
                "seen": round(seen, 4),
                "right": round(right, 4),
            }
        )
    return {
        "data": streams["train"].fingerprint,
        "training_tokens": len(train),
        "validation_tokens": len(val),
        "vocab_size": vocab_size,
        "contexts": rows,
        "bigram_loss": round(bigram_loss(train, val, vocab_size), 4),
        "xz_bits_per_byte_after_training_text": round(xz_after(*texts), 3),
    }


def main(arguments: argparse.Namespace) -> None:
    """Print the table."""
    if arguments.output:
        check_can_write(output_file(arguments.output))
    result = measure(arguments.data)
    print("tokens of context   in the training text   seen there before   guessed right")
    for row in result["contexts"]:
        print(
            f"{row['context']:17}   {row['different_contexts']:20,}   {row['seen']:17.1%}   "
            f"{row['right']:13.1%}"
        )
    print(f"a bigram model's loss: {result['bigram_loss']:.3f} nats per token")
    xz = result["xz_bits_per_byte_after_training_text"]
    print(f"xz -9e, after the training text: {xz:.3f} bits per byte")
    if arguments.output:
        record = {
            "what": "guessing validation tokens by counting what followed in the training text",
            **circumstances(f"python -m visuals.counting --data {arguments.data}"),
            **result,
        }
        write_report(arguments.output, record)


if __name__ == "__main__":
    sys.exit(run_script(main, ARGUMENTS))

"""From text to token ids and back: GPT-2's byte-pair encoding (BPE).

Two implementations live here. `train_bpe` and `encode_from_scratch` are BPE in a page of plain
Python, to be read. For work at speed `make_encoding` hands the same vocabulary to tiktoken, and the
tests check that the two agree on any text. (Up to characters so young that the two have different
editions of Unicode's table of letters.)

BPE starts from the 256 byte values, so that any text in any language can be written, and then
repeatedly gives the most frequent pair of neighbouring tokens a token of its own: README,
"Tokenization". Source: GPT-2 paper, section 2.2, and openai/gpt-2 `src/encoder.py`.
"""

from __future__ import annotations

import base64
import hashlib
import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import regex  # the standard library's re has no \p{L}; tiktoken brings this package with it
import tiktoken

from common.errors import UserError
from common.files import write_atomically

END_OF_TEXT = "<|endoftext|>"

# GPT-2 first cuts a text into words, and no token ever crosses a cut: contractions, letters,
# numbers and other signs, each with the space before it, then what white space is left. Without the
# cuts, BPE would spend tokens on "dog.", "dog!" and "dog?" (GPT-2 paper, section 2.2).
WORD_PATTERN = r"'(?:[sdmt]|ll|re|ve)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

GPT2_VOCAB_SIZE = 50_257  # 256 bytes + 50,000 merges + <|endoftext|>
# Our file of GPT-2's vocabulary is, to the byte, OpenAI's r50k_base.tiktoken; tiktoken has its hash
# in tiktoken_ext/openai_public.py.
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
MAX_VOCAB_SIZE = 65_536  # ids are stored as uint16
# Longer texts are encoded in pieces, so that memory stays bounded. It also keeps tiktoken alive:
# its regular expressions give up on a run of a million blanks.
PIECE_CHARACTERS = 1 << 18
WORD_CHARACTERS = 1000  # of a word that is learned from at once
MAX_TRAINING_BYTES = 2_000_000  # of different words, to learn from: keeps train_bpe within 1 GB


@cache
def word_pattern() -> regex.Pattern:
    """WORD_PATTERN compiled once."""
    return regex.compile(WORD_PATTERN)


def train_bpe(texts: Iterable[str], vocab_size: int) -> dict[bytes, int]:
    """Learn a vocabulary: `{token's bytes: id}`, with ids in the order in which tokens were made.

    The result holds `vocab_size - 1` tokens, because <|endoftext|> takes the last id. Of equally
    frequent pairs the first in byte order wins, so the same texts always give the same vocabulary.
    Raises UserError if `vocab_size` is out of range or the texts have too few pairs to merge.
    """
    if not 257 <= vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(
            f"a vocabulary of {vocab_size} tokens: expected 257 (every byte and {END_OF_TEXT}) "
            f"to {MAX_VOCAB_SIZE} (what fits into two bytes)"
        )
    pairs = Pairs(*_words_to_learn_from(texts))
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < vocab_size - 1:
        best = pairs.pop_most_frequent()
        if best is None:
            raise UserError(
                f"the text yields only {len(ranks)} tokens, {vocab_size - 1} were asked for: "
                "give more text or ask for a smaller vocabulary"
            )
        ranks[best] = len(ranks)
        pairs.merge_everywhere(best)
    return ranks


class Pairs:
    """The tokens that could be made next: how often each would occur, and in which words.

    So that a merge goes through the words that have the pair, and no others.
    """

    def __init__(self, words: list[list[bytes]], counts: list[int]) -> None:
        """`words` differ, each is its tokens; `counts` says how often each occurs."""
        self.words, self.word_counts = words, counts
        self.counts: Counter[bytes] = Counter()
        self.words_with: defaultdict[bytes, set[int]] = defaultdict(set)
        for index, word in enumerate(words):
            for left, right in zip(word, word[1:]):
                self.counts[left + right] += counts[index]
                self.words_with[left + right].add(index)
        self.heap = [(-count, pair) for pair, count in self.counts.items()]
        heapq.heapify(self.heap)

    def pop_most_frequent(self) -> bytes | None:
        """The most frequent pair, or None when none is left; entries of old counts are dropped."""
        while self.heap:
            negative_count, pair = heapq.heappop(self.heap)
            if negative_count and self.counts.get(pair) == -negative_count:
                return pair
        return None

    def merge_everywhere(self, pair: bytes) -> None:
        """Make it one token in all words that have it, and see what pairs are there then."""
        changed = set()
        for index in self.words_with.pop(pair):
            before, after = self.words[index], merge(self.words[index], pair)
            self.words[index] = after
            for left, right in zip(before, before[1:]):
                self.counts[left + right] -= self.word_counts[index]
                changed.add(left + right)
            for left, right in zip(after, after[1:]):
                self.counts[left + right] += self.word_counts[index]
                self.words_with[left + right].add(index)
                changed.add(left + right)
        del self.counts[pair]
        for other in changed - {pair}:
            heapq.heappush(self.heap, (-self.counts[other], other))


def _words_to_learn_from(texts: Iterable[str]) -> tuple[list[list[bytes]], list[int]]:
    """The different words, in bytes, and how often each occurs.

    Beyond 2 MB of them (some 20 MB of English) the rarest ones are left out. Words of more than a
    thousand characters (DNA, say) come in pieces: a merge goes through all of a word.
    """
    word_counts = Counter(
        word for text in texts for word in word_pattern().findall(well_formed(text))
    )
    words: list[list[bytes]] = []
    counts: list[int] = []
    size = 0
    for word, count in word_counts.most_common():
        for at in range(0, len(word), WORD_CHARACTERS):
            piece = word[at : at + WORD_CHARACTERS].encode()
            words.append([bytes([byte]) for byte in piece])
            counts.append(count)
            size += len(piece)
        if size > MAX_TRAINING_BYTES:
            break
    return words, counts


def merge(tokens: list[bytes], pair: bytes) -> list[bytes]:
    """Join neighbours that together spell `pair`: [b"l", b"o", b"o"], b"lo" -> [b"lo", b"o"]."""
    merged: list[bytes] = []
    for token in tokens:
        if merged and merged[-1] + token == pair:
            merged[-1] = pair
        else:
            merged.append(token)
    return merged


def encode_from_scratch(text: str, ranks: dict[bytes, int]) -> list[int]:
    """The ids of `text`: in each word, merge the pair that was learned first, until none is left.

    Equal to tiktoken's `encode_ordinary` with the same vocabulary, and about 20 times slower.
    """
    ids = []
    for word in word_pattern().findall(well_formed(text)):
        tokens = [bytes([byte]) for byte in word.encode()]
        while len(tokens) > 1:
            pairs = [left + right for left, right in zip(tokens, tokens[1:])]
            first_learned = min(pairs, key=lambda pair: ranks.get(pair, MAX_VOCAB_SIZE))
            if first_learned not in ranks:
                break
            tokens = merge(tokens, first_learned)
        ids.extend(ranks[token] for token in tokens)
    return ids


def well_formed(text: str) -> str:
    """`text` with every lone half of a surrogate pair made U+FFFD, as tiktoken does it.

    Such halves are no characters and have no UTF-8, but JSON can spell them.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def make_encoding(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """A tiktoken encoding of the vocabulary `ranks`, with <|endoftext|> as its last id.

    Its name tells the vocabulary: "gpt2" for GPT-2's own, "bpe-2048" for another of that size.
    """
    is_gpt2 = len(ranks) == GPT2_VOCAB_SIZE - 1 and _sha256(_to_bytes(ranks)) == GPT2_SHA256
    return tiktoken.Encoding(
        name="gpt2" if is_gpt2 else f"bpe-{len(ranks) + 1}",
        pat_str=WORD_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: len(ranks)},
    )


def safe_pieces(pieces: Iterable[str]) -> Iterator[str]:
    """Cut a long text so that encoding its pieces one by one gives the tokens of the whole.

    The cut is before a blank or a line end that follows something else: there a word of
    tokenizer.WORD_PATTERN always ends, whatever comes before and after. Only where PIECE_CHARACTERS
    have no such place, a cut may divide a word, which costs a token or two: memory stays bounded.
    """
    rest = ""
    for piece in pieces:
        rest += piece
        if len(rest) >= PIECE_CHARACTERS:
            places = range(len(rest) - 1, 0, -1)
            safe = (at for at in places if rest[at] in " \n" and not rest[at - 1].isspace())
            cut = next(safe, len(rest))
            yield rest[:cut]
            rest = rest[cut:]
    yield rest


def encode_long(encoding: tiktoken.Encoding, text: str) -> list[int]:
    """The ids of a text of any length, in pieces: tiktoken gives up on a million blanks."""
    pieces = (text[at : at + PIECE_CHARACTERS] for at in range(0, len(text), PIECE_CHARACTERS))
    return [token for piece in safe_pieces(pieces) for token in encoding.encode_ordinary(piece)]


def encode_end(encoding: tiktoken.Encoding, text: str, count: int) -> list[int]:
    """The ids of as much of a text's end as gives `count` or more, if the whole does.

    The first few may be others than in the whole text, where that end begins within a word; of a
    word longer than that end, all.
    """
    size = 4 * count
    while len(ids := encode_long(encoding, text[-size:])) < count and size < len(text):
        size *= 2
    return ids


def gpt2_encoding() -> tiktoken.Encoding:
    """GPT-2's encoding of 50,257 tokens. tiktoken downloads it once and checks its SHA-256.

    Raises UserError if it is neither in tiktoken's cache nor to be had from the network.
    """
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # no network; something else that answers in its place
        raise UserError(
            f"GPT-2's vocabulary is not in tiktoken's cache and can't be downloaded "
            f"({type(error).__name__}): connect once, or point TIKTOKEN_CACHE_DIR at a folder that "
            "holds it"
        ) from error


def vocabulary_of(encoding: tiktoken.Encoding) -> dict[bytes, int]:
    """`{token's bytes: id}` of an encoding, without <|endoftext|>."""
    ids = range(encoding.eot_token)
    return {encoding.decode_single_token_bytes(token): token for token in ids}


def token_byte_lengths(encoding: tiktoken.Encoding) -> np.ndarray:
    """How many bytes of text each id stands for: int64 array of shape (V,), 0 for <|endoftext|>."""
    lengths = np.zeros(encoding.n_vocab, dtype=np.int64)
    lengths[: encoding.eot_token] = [len(token) for token in vocabulary_of(encoding)]
    return lengths


# The vocabulary file is tiktoken's own format: a line per token, its bytes in base64 and its id.


def save_vocabulary(encoding: tiktoken.Encoding, path: Path) -> str:
    """Write the vocabulary to `path`, whole or not at all; returns the file's SHA-256."""
    content = _to_bytes(vocabulary_of(encoding))
    write_atomically(path, content)
    return _sha256(content)


def vocabulary_sha256(encoding: tiktoken.Encoding) -> str:
    """The SHA-256, in hexadecimal, that the encoding's vocabulary file has or would have."""
    return _sha256(_to_bytes(vocabulary_of(encoding)))


def load_vocabulary(path: Path, sha256: str | None = None) -> tiktoken.Encoding:
    """Read a vocabulary file; with `sha256`, only if its content has that hash.

    Raises UserError for a missing file, another hash, or a line that is no token.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"can't read the vocabulary {path}: {error.strerror}") from error
    if sha256 is not None and _sha256(content) != sha256:
        raise UserError(
            f"the vocabulary {path} has SHA-256 {_sha256(content)[:12]}…, expected {sha256[:12]}…: "
            "it is not the one that these tokens were made with"
        )
    return make_encoding(_from_bytes(content, path))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _to_bytes(ranks: dict[bytes, int]) -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items())


def _from_bytes(content: bytes, path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines()):
        try:
            token, rank = line.split(b" ")
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise UserError(
                f"{path}, line {number + 1}: expected a token in base64, a space and its id"
            ) from error
        if int(rank) != number or len(ranks) != number + 1 or b"" in ranks:
            raise UserError(
                f"{path}, line {number + 1}: expected a new token with the id {number}, "
                f"got {line!r:.80}"
            )
    if len(ranks) >= MAX_VOCAB_SIZE or not all(bytes([byte]) in ranks for byte in range(256)):
        raise UserError(
            f"{path}: a vocabulary holds all 256 bytes and fewer than {MAX_VOCAB_SIZE} tokens, "
            f"this one has {len(ranks)} tokens"
        )
    return ranks

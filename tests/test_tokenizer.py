"""The tokenizer against tiktoken, against a naive trainer, and against damaged files."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from conftest import TEXT
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizer
from common.errors import UserError
from tokenizer import (
    END_OF_TEXT,
    GPT2_SHA256,
    encode_end,
    encode_from_scratch,
    encode_long,
    gpt2_encoding,
    load_vocabulary,
    make_encoding,
    safe_pieces,
    save_vocabulary,
    token_byte_lengths,
    train_bpe,
    vocabulary_of,
    vocabulary_sha256,
    word_pattern,
)

AWKWARD = [
    "",
    " ",
    "\n",
    "   leading and trailing   ",
    "a" + " " * 50 + "b" + "\t" * 7 + "\n" * 9 + "c",
    "a \n b\n \nc  \n\n  d",
    "I'll say we've got it, they're here, I'm sure, he'd go, it's 'til don't 'S 'LL o'clock''s",
    "''' '' 's's 'ss '",
    "🙂🙃 👩‍👩‍👧‍👦 🇩🇪 e\u0301 é ﬁ ß İ",
    "日本語も少し。中文 한국어 ไทย العربية עברית हिन्दी",
    "one\r\ntwo\r\n\r\nthree\rfour",
    "no\u00a0break\u00a0\u00a0space \u2003em\u3000wide\u200bzero\ufeffbom",
    "0 12 345 6789 1,234.56 ½ ² Ⅷ ٣ 一二三 x1y2 1a",
    "\x00\x01\x1c \x1d\x1f\x7f\x85 \u2028\u2029",
    "<|endoftext|> is a text like any other<|endoftext|>",
    "def f(x):\n    return {\n        'a': x ** 2,  # !?\n    }\n\n\n",
    "-" * 300 + "=" * 77 + "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" * 3,
    "half a pair: \ud83d, the other \ude42, both \ud83d\ude42",
]
# Characters that Python's own Unicode table knows are known to tiktoken and to regex as well.
CHARACTERS = st.characters(exclude_categories=("Cn",))
TEXTS = (
    st.text(CHARACTERS) | st.text(st.sampled_from("ab 'sl\n\t1.é日 ")) | st.sampled_from(AWKWARD)
)


@pytest.fixture(scope="module")
def gpt2() -> tiktoken.Encoding:
    return gpt2_encoding()


@pytest.fixture(scope="module")
def gpt2_ranks(gpt2) -> dict[bytes, int]:
    return vocabulary_of(gpt2)


@pytest.fixture(scope="module")
def trained() -> dict[bytes, int]:
    return train_bpe([*AWKWARD, "the cat sat on the mat, that is what the cat did " * 3], 400)


# Encoding


@settings(max_examples=500, deadline=None)
@given(TEXTS)
def test_bpe_from_scratch_with_gpt2s_merges_gives_tiktokens_ids_on_any_text(gpt2, gpt2_ranks, text):
    assert encode_from_scratch(text, gpt2_ranks) == gpt2.encode_ordinary(text)


@pytest.mark.parametrize("text", AWKWARD)
def test_bpe_from_scratch_gives_tiktokens_ids_on_awkward_text(gpt2, gpt2_ranks, text):
    assert encode_from_scratch(text, gpt2_ranks) == gpt2.encode_ordinary(text)


def test_bpe_from_scratch_gives_tiktokens_ids_on_real_text(gpt2, gpt2_ranks):
    text = Path(tokenizer.__file__).read_text(encoding="utf-8")
    assert encode_from_scratch(text, gpt2_ranks) == gpt2.encode_ordinary(text)


@pytest.fixture(scope="module")
def ours(gpt2_ranks) -> tiktoken.Encoding:
    return make_encoding(gpt2_ranks)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_our_encoding_of_gpt2s_vocabulary_is_tiktokens_on_any_text(gpt2, ours, text):
    assert ours.encode_ordinary(text) == gpt2.encode_ordinary(text)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_a_trained_vocabulary_encodes_alike_from_scratch_and_through_tiktoken(trained, text):
    assert encode_from_scratch(text, trained) == make_encoding(trained).encode_ordinary(text)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_decoding_gives_the_text_back(trained, text):
    encoding = make_encoding(trained)
    decoded = encoding.decode_bytes(encode_from_scratch(text, trained))
    assert decoded == tokenizer.well_formed(text).encode()


def test_the_words_of_a_text_put_together_are_the_text():
    for text in AWKWARD:
        assert "".join(word_pattern().findall(text)) == text


def test_the_byte_lengths_of_a_texts_tokens_add_up_to_its_utf8_length(gpt2, trained):
    for encoding in (gpt2, make_encoding(trained)):
        lengths = token_byte_lengths(encoding)
        assert lengths.shape == (encoding.n_vocab,)
        assert lengths[encoding.eot_token] == 0
        for text in AWKWARD:
            ids = encoding.encode_ordinary(text)
            assert lengths[ids].sum() == len(tokenizer.well_formed(text).encode())


# Training


def train_naively(texts: list[str], vocab_size: int) -> dict[bytes, int]:
    """BPE as one would explain it: count every pair anew for each token."""
    words = [
        [bytes([byte]) for byte in word.encode()]
        for text in texts
        for word in word_pattern().findall(text)
    ]
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < vocab_size - 1:
        counts = Counter(left + right for word in words for left, right in zip(word, word[1:]))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        ranks[best] = len(ranks)
        for word in words:
            at = 0
            while at + 1 < len(word):
                if word[at] + word[at + 1] == best:
                    word[at : at + 2] = [best]
                at += 1
    return ranks


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.sampled_from("ab c'é1\n"), max_size=60), max_size=5), st.data())
def test_training_gives_what_counting_anew_for_each_token_gives(texts, data):
    possible = 257
    while possible < 300:  # how large a vocabulary do these texts allow?
        try:
            train_bpe(texts, possible + 1)
        except UserError:
            break
        possible += 1
    size = data.draw(st.integers(257, possible))
    ranks = train_bpe(texts, size)
    assert list(ranks.items()) == list(train_naively(texts, size).items())


def test_training_on_prose_gives_what_counting_anew_for_each_token_gives():
    text = Path(tokenizer.__file__).read_text(encoding="utf-8")[:4000]
    assert list(train_bpe([text], 330).items()) == list(train_naively([text], 330).items())


def test_the_order_of_the_texts_does_not_change_the_vocabulary():
    texts = ["low lower lowest", "new newer newest", "wide wider widest"]
    assert list(train_bpe(texts, 270).items()) == list(train_bpe(texts[::-1], 270).items())


def test_training_keeps_to_the_commonest_words_when_there_are_too_many(monkeypatch):
    text = "common common common rare"
    assert b" ra" in train_bpe([text], 265)
    monkeypatch.setattr(tokenizer, "MAX_TRAINING_BYTES", 8)
    assert len(train_bpe([text], 263)) == 262  # every part of " common"
    with pytest.raises(UserError, match="the text yields only 262 tokens"):
        train_bpe([text], 265)


@pytest.mark.parametrize("size", [-1, 0, 256, 65_537])
def test_a_vocabulary_size_out_of_range_is_refused(size):
    with pytest.raises(UserError, match=rf"a vocabulary of {size} tokens: expected 257 .* 65536"):
        train_bpe(["some text"], size)


def test_a_text_with_too_few_pairs_is_refused():
    with pytest.raises(UserError, match="the text yields only 257 tokens, 259 were asked for"):
        train_bpe(["ab"], 260)
    with pytest.raises(UserError, match="the text yields only 256 tokens"):
        train_bpe([], 300)


def test_the_smallest_vocabulary_is_the_bytes_and_the_end_of_text():
    encoding = make_encoding(train_bpe([], 257))
    assert encoding.n_vocab == 257
    assert encoding.encode("é" + END_OF_TEXT, allowed_special="all") == [0xC3, 0xA9, 256]


# The vocabulary file


def test_our_file_of_gpt2s_vocabulary_is_openais_to_the_byte(gpt2, tmp_path):
    path = tmp_path / "v"
    assert save_vocabulary(gpt2, path) == GPT2_SHA256 == vocabulary_sha256(gpt2)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == GPT2_SHA256
    loaded = load_vocabulary(path, GPT2_SHA256)
    assert (loaded.name, loaded.n_vocab, loaded.eot_token) == ("gpt2", 50_257, 50_256)
    assert list(tmp_path.iterdir()) == [path]


def test_a_vocabulary_comes_back_from_its_file_as_it_was(trained, tmp_path):
    encoding = make_encoding(trained)
    sha256 = save_vocabulary(encoding, tmp_path / "v")
    loaded = load_vocabulary(tmp_path / "v", sha256)
    assert list(vocabulary_of(loaded).items()) == list(trained.items())
    assert (loaded.name, loaded.n_vocab) == ("bpe-400", 400)
    assert loaded.decode([loaded.eot_token]) == END_OF_TEXT


def test_saving_replaces_the_old_file_at_once_or_not_at_all(trained, tmp_path, monkeypatch):
    path = tmp_path / "v"
    path.write_text("old")

    def crash(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save_vocabulary(make_encoding(trained), path)
    assert path.read_text() == "old"


def damage(lines: list[bytes], kind: str) -> list[bytes]:
    match kind:
        case "broken base64":
            lines[3] = b"A$w== 3"  # without the $ it is right
        case "not a number":
            lines[3] = lines[3].split()[0] + b" three"
        case "a line without a number":
            lines[3] = b"AAA="
        case "an empty line":
            lines.insert(3, b"")
        case "wrong order":
            lines[3], lines[4] = lines[4], lines[3]
        case "a token twice":
            lines[299] = lines[298].split()[0] + b" 299"
        case "an empty token":
            lines.append(b" %d" % len(lines))
        case "a byte missing":
            lines[65] = b"QUFB 65"
        case "cut in the middle":
            del lines[100:]
        case "empty":
            lines.clear()
        case "too many tokens":
            lines += [
                b"%s %d" % (tokenizer.base64.b64encode(b"x%d" % n), n) for n in range(399, 65_537)
            ]
    return lines


@pytest.mark.parametrize(
    "kind, complaint",
    [
        ("broken base64", "line 4: expected a token in base64"),
        ("not a number", "line 4: expected a token in base64"),
        ("a line without a number", "line 4: expected a token in base64"),
        ("an empty line", "line 4: expected a token in base64"),
        ("wrong order", "line 4: expected a new token with the id 3, got b'"),
        ("a token twice", "line 300: expected a new token with the id 299"),
        ("an empty token", "line 400: expected a new token with the id 399"),
        ("a byte missing", "holds all 256 bytes"),
        ("cut in the middle", "holds all 256 bytes"),
        ("empty", "holds all 256 bytes"),
        ("too many tokens", "fewer than 65536 tokens"),
    ],
)
def test_a_damaged_vocabulary_file_is_refused_by_name(trained, tmp_path, kind, complaint):
    path = tmp_path / "some.tiktoken"
    save_vocabulary(make_encoding(trained), path)
    path.write_bytes(b"\n".join(damage(path.read_bytes().splitlines(), kind)))
    with pytest.raises(UserError) as error:
        load_vocabulary(path)
    assert str(path) in str(error.value)
    assert complaint in str(error.value)


def test_a_vocabulary_with_another_hash_is_refused_by_name(trained, tmp_path):
    path = tmp_path / "v"
    save_vocabulary(make_encoding(trained), path)
    with pytest.raises(UserError, match=f"{path} has SHA-256 .* expected {GPT2_SHA256[:12]}"):
        load_vocabulary(path, GPT2_SHA256)


def test_a_merge_does_not_go_through_all_of_a_word_without_an_end(monkeypatch):
    """DNA: the later merges are found in some pieces of it only."""
    dna, letters = "".join(random.Random(0).choices("ACGT", k=8_000)), []
    merge = tokenizer.merge

    def counted(tokens: list[bytes], pair: bytes) -> list[bytes]:
        letters.append(len(tokens))
        return merge(tokens, pair)

    monkeypatch.setattr(tokenizer, "merge", counted)
    assert len(train_bpe([dna], 500)) == 499
    assert sum(letters) < 550_000  # 509,201; with the whole word each time 706,421


def test_a_missing_vocabulary_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=f"can't read the vocabulary {tmp_path / 'none'}: No such"):
        load_vocabulary(tmp_path / "none")
    with pytest.raises(UserError, match=f"can't read the vocabulary {tmp_path}: Is a directory"):
        load_vocabulary(tmp_path)


@pytest.mark.parametrize("kind", [ConnectionError, ValueError])  # of a hotel's login page: no hash
def test_gpt2_without_cache_and_network_is_an_error_that_says_what_to_do(monkeypatch, kind):
    def refuse(name):
        raise kind

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        gpt2_encoding()


def test_encoding_into_numpy_is_encode_ordinary(gpt2, trained):
    for encoding in (gpt2, make_encoding(trained)):
        for text in map(tokenizer.well_formed, AWKWARD):
            array = encoding.encode_to_numpy(text, disallowed_special=())
            assert array.dtype == np.uint32
            assert array.tolist() == encoding.encode_ordinary(text)


# In pieces


@pytest.mark.parametrize("limit", [1, 3, 10])
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_encoding_a_text_in_pieces_gives_the_tokens_of_the_whole(limit, data):
    """Of texts that have a place to cut at least every few characters."""
    words = data.draw(st.lists(st.text("ab'sé1.-\t\x1c\u3000", max_size=6), max_size=12))
    text = "".join(
        word + data.draw(st.sampled_from(["x ", "x\n", ". ", "'\n", "x    ", ".\n\n \n"]))
        for word in words
    )
    encoding = make_encoding(train_bpe(["an ab ba's sa. -- a    b  x\n\n \n"], 266))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "PIECE_CHARACTERS", 20 * limit)
        safe = list(safe_pieces(pieces))
    assert "".join(safe) == text
    ids = [token for piece in safe for token in encoding.encode_ordinary(piece)]
    assert ids == encoding.encode_ordinary(text)


@pytest.mark.parametrize("text", ["word and  word\n\nis 'tis. " * 40_000, TEXT * 9_000])
def test_a_long_text_is_cut_and_still_gives_the_tokens_of_the_whole(text):
    encoding = gpt2_encoding()
    pieces = list(
        safe_pieces([text[start : start + 100_000] for start in range(0, len(text), 100_000)])
    )
    assert len(pieces) > 2
    assert max(map(len, pieces)) < 400_000
    ids = [token for piece in pieces for token in encoding.encode_ordinary(piece)]
    assert ids == encoding.encode_ordinary(text)


@pytest.mark.parametrize("text", ["", "a b", TEXT * 9_000])
def test_a_text_of_any_length_is_encoded(text):
    encoding = gpt2_encoding()
    assert encode_long(encoding, text) == encoding.encode_ordinary(text)


@given(st.integers(1, 300), st.integers(0, 300))
def test_of_a_long_text_only_the_end_is_encoded(count, length):
    encoding, text = gpt2_encoding(), TEXT * length
    ids, whole = encode_end(encoding, text, count), encode_long(encoding, text)
    assert len(ids) >= min(count, len(whole))
    assert len(ids) <= count + 16 * len(TEXT) or len(ids) <= 4 * count  # not all of it
    assert ids[len(ids) // 2 :] == whole[len(whole) - len(ids) + len(ids) // 2 :]


def test_an_end_holds_as_many_tokens_as_are_asked_for_however_long_they_are():
    """GPT-2's longest token has 128 characters, a vocabulary of one's own may have longer ones."""
    encoding = make_encoding(train_bpe(["-" * 1000 + "\n"] * 50, 270))
    assert max(map(len, vocabulary_of(encoding))) > 256
    ids = encode_end(encoding, "-" * 100_000, 64)
    assert 64 <= len(ids) <= 128


def test_millions_of_blanks_are_encoded():
    """tiktoken itself panics."""
    text, encoding = "a" + " " * 1_200_000 + "b\n", gpt2_encoding()
    assert encoding.decode(encode_long(encoding, text)) == text


def test_the_rarest_words_are_left_out_wherever_they_stand(monkeypatch):
    monkeypatch.setattr(tokenizer, "MAX_TRAINING_BYTES", 6)
    assert b" common" in train_bpe(["rare odd common common common common"], 263)


BYTES = [bytes([byte]) for byte in range(256)]
MANY = [*BYTES, *(first + second for first in BYTES for second in BYTES)]


def test_a_file_of_65536_tokens_has_no_room_for_the_end_of_text(tmp_path):
    ranks = {token: rank for rank, token in enumerate(MANY[: 2**16])}
    (tmp_path / "v").write_bytes(tokenizer._to_bytes(ranks))
    with pytest.raises(UserError, match="fewer than 65536"):
        load_vocabulary(tmp_path / "v")


def test_a_vocabulary_as_large_as_gpt2s_has_another_name():
    ranks = {token: rank for rank, token in enumerate(MANY[:50_256])}
    assert make_encoding(ranks).name == "bpe-50257"

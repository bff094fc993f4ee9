"""Log-probabilities in batches are those one by one; a mean's error is what chance makes of it."""

from __future__ import annotations

import copy
import math
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from data import load_windows
from distributed import Ranks
from model import GPT, GPTConfig
from scoring import (
    BrokenOff,
    Estimate,
    Request,
    Scorer,
    check_numbers,
    evaluating,
    log_probabilities,
    never,
    unless_asked_to_stop,
    validate,
)
from shards import TokenStream
from tokenizer import make_encoding

ALONE = Ranks(torch.device("cpu"))
BYTES = make_encoding({bytes([byte]): byte for byte in range(256)})


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=257, block_size=24, n_layer=2, n_head=2, n_embd=16)).eval()


def test_logits_are_compared_in_float32_whatever_the_model_computes_in(model):
    """In bfloat16, of numbers around 8 every other is lost, and the likeliest two are often one."""
    hidden = 30 * torch.randn(500, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        best, second = model.logits(hidden.float()).topk(2).indices.unbind(dim=1)
        for targets, is_right in ((best, True), (second, False)):
            with torch.autocast("cpu", torch.bfloat16):
                logs, hits = log_probabilities(model, hidden, targets)
            assert (hits == is_right).all()
            expected = model.logits(hidden.float()).log_softmax(dim=-1)
            torch.testing.assert_close(logs, expected.gather(1, targets[:, None])[:, 0])


def requests_of_all_lengths() -> list[Request]:
    draw = np.random.default_rng(0)
    lengths = [(length, guessed) for length in (2, 3, 9, 17, 25) for guessed in (1, 2, length - 1)]
    return [Request(draw.integers(257, size=n).tolist(), g) for n, g in lengths if g < n]


def one_by_one(model: GPT, request: Request) -> tuple[float, bool]:
    """What `Scorer.score` is to find, written out in float64."""
    model, ids = model.double(), torch.tensor([request.ids])
    with torch.no_grad():
        guesses = model(ids[:, :-1])[0, -request.guessed :].log_softmax(dim=-1)
    model.float()
    targets = ids[0, -request.guessed :]
    total = sum(row[target].item() for row, target in zip(guesses, targets))
    return total, bool((guesses.argmax(dim=-1) == targets).all())


# Requests


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_batched_scores_are_those_one_by_one(model, batch_tokens):
    requests = requests_of_all_lengths()
    likely = [
        [*r.ids[:-1], model(torch.tensor([r.ids[:-1]]))[0, -1].argmax().item()] for r in requests
    ]
    requests += [Request(ids, 1) for ids in likely]  # the likeliest token is guessed
    with torch.no_grad():
        found, right = Scorer(model, BYTES, ALONE, batch_tokens).score(requests, "test")
    expected = [one_by_one(model, request) for request in requests]
    np.testing.assert_allclose(found, [total for total, _ in expected], rtol=1e-5)
    assert right.tolist() == [hit for _, hit in expected]
    assert 0 < right.sum() < len(right)


def test_logits_are_compared_in_float32(model):
    """bfloat16 has two or three digits: near-ties would be decided by rounding."""
    requests = [request for request in requests_of_all_lengths() if request.guessed == 1]
    with torch.no_grad():
        found, _ = Scorer(copy.deepcopy(model).bfloat16(), BYTES, ALONE).score(requests, "test")
    assert not np.array_equal(found, torch.from_numpy(found).bfloat16().double().numpy())


@given(
    lengths=st.lists(st.integers(2, 25), min_size=1, max_size=40), batch_tokens=st.integers(1, 100)
)
def test_every_request_is_in_one_batch_that_is_not_too_large(lengths, batch_tokens):
    requests = [Request([0] * length, 1) for length in lengths]
    batches = Scorer(None, BYTES, ALONE, batch_tokens).batches(requests)
    assert sorted(number for batch in batches for number in batch) == [*range(len(requests))]
    for batch in batches:
        longest = lengths[batch[0]] - 1
        assert longest == max(lengths[number] - 1 for number in batch)
        assert len(batch) == 1 or len(batch) * longest <= batch_tokens
    assert [lengths[n] for b in batches for n in b] == sorted(lengths, reverse=True)


def test_a_request_is_the_context_and_its_ending(model):
    scorer = Scorer(model, BYTES, ALONE)
    assert scorer.request("ab", " c") == Request([*b"ab c"], 2)
    assert scorer.request("ab  ", "c") == Request([*b"ab  c"], 3)  # blanks are the ending's
    assert scorer.request("", "c") == scorer.cut([], [*b"c"]) == Request([256, *b"c"], 1)
    long = scorer.request("x" * 100, "y" * 24)
    assert long == Request([*b"x", *b"y" * 24], 24)
    for ending in ("y" * 25, ""):
        with pytest.raises(UserError, match="this model can guess 1 to 24"):
            scorer.request("x", ending)


def test_who_has_done_its_part_breaks_off_with_the_others():
    """Else it would wait for them, to put the results together, for ever."""
    elsewhere = SimpleNamespace(anywhere=lambda left_out: True)
    done = []
    with pytest.raises(BrokenOff):
        for job in unless_asked_to_stop([1, 2], elsewhere, never):
            done.append(job)
    assert done == [1, 2]


def test_a_nan_names_the_precision_of_the_products(model):
    with torch.autocast("cpu", torch.float16), pytest.raises(FloatingPointError, match="float16"):
        check_numbers(math.nan, model)


# Estimates


def test_the_error_of_a_mean_is_the_textbooks():
    values = [3.0, 1.0, 4.0, 1.0, 5.0]
    for counts in (None, [2] * 5):
        estimate = Estimate.of(values, counts)
        scale = 1 if counts is None else 2
        assert estimate.value == pytest.approx(statistics.mean(values) / scale)
        assert estimate.error == pytest.approx(statistics.stdev(values) / math.sqrt(5) / scale)
    assert Estimate.of([1.0]) == Estimate(1.0, None)


def test_the_error_of_a_ratio_is_what_drawing_again_gives():
    draw = np.random.default_rng(0)
    counts = draw.integers(5, 50, size=400)
    sums = counts * 3.0 + draw.normal(size=400) * counts
    again = []
    for _ in range(2000):
        chosen = draw.integers(400, size=400)
        again.append(sums[chosen].sum() / counts[chosen].sum())
    assert Estimate.of(sums, counts).error == pytest.approx(np.std(again), rel=0.1)


def test_the_error_of_bits_per_byte_knows_that_windows_differ_in_bytes(shards):
    """Left out in turn (the jackknife), the windows tell it without a formula."""
    stream, draw = TokenStream(shards, "train"), np.random.default_rng(0)
    byte_lengths = draw.integers(1, 30, size=stream.vocab_size)
    losses = torch.from_numpy(draw.normal(3.0, 0.1, size=64))
    count = iter(losses)
    loss_of = lambda inputs, targets: torch.stack([next(count) for _ in inputs])  # noqa: E731
    found = validate(loss_of, stream, 16, 4, 64 * 16, ALONE, byte_lengths)
    _, targets = load_windows(stream, range(64), 16)
    sizes = byte_lengths[targets.numpy()].sum(axis=1)
    nats = 16 * losses.numpy() / math.log(2)
    assert found.bits_per_byte.value == pytest.approx(nats.sum() / sizes.sum())
    left = (nats.sum() - nats) / (sizes.sum() - sizes)
    jackknife = math.sqrt(63 / 64 * ((left - left.mean()) ** 2).sum())
    assert found.bits_per_byte.error == pytest.approx(jackknife, rel=0.05)


def test_estimates_are_told_with_the_digits_that_mean_something():
    told = [str(e) for e in (Estimate(0.28593, 0.0045), Estimate(29.417, 0.62), Estimate(3, 31))]
    assert told == ["0.2859 ± 0.0045", "29.42 ± 0.62", "3 ± 31"]
    told = [str(e) for e in (Estimate(4050, 6173), Estimate(9.0426e135, 6.307e137))]
    assert told == ["4050 ± 6173", "9.04e+135 ± 6.31e+137"]
    assert str(Estimate(1234567, 12)) == "1234567 ± 12"
    assert str(Estimate(5.4683e32, None)) == "5.47e+32"
    assert str(Estimate(0.5, None)) == str(Estimate(0.5, 0.0)) == "0.5000"
    assert Estimate(2.0, 0.5).scaled(3) == Estimate(6.0, 1.5)
    perplexity = Estimate(math.log(10), 0.1).exponential()
    assert Estimate(1000.0, 0.1).exponential() == Estimate(math.inf, math.inf)
    assert Estimate(1000.0, None).exponential() == Estimate(math.inf, None)
    assert str(Estimate(math.inf, math.inf)) == "inf"
    assert str(Estimate(math.nan, math.nan).exponential()) == "nan"
    assert (perplexity.value, perplexity.error) == (pytest.approx(10), pytest.approx(1))


def test_a_model_is_evaluated_without_dropout_and_gradients_and_then_trains_again():
    model = GPT(
        GPTConfig(vocab_size=257, block_size=24, n_layer=2, n_head=2, n_embd=16, dropout=0.5)
    )
    ids = torch.arange(24)[None]
    with pytest.raises(KeyError), evaluating(model):
        assert torch.equal(model(ids), model(ids))
        assert not model(ids).requires_grad
        raise KeyError
    assert all(module.training for module in model.modules())
    with evaluating(model.eval()):
        pass
    assert not model.training


def test_a_token_without_a_probability_is_a_score_and_no_damage(model):
    check_numbers(np.array([1.0, math.inf]), model)
    with pytest.raises(FloatingPointError, match="float32"):
        check_numbers(np.array([1.0, math.nan]), model)


def ones(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(inputs))


def test_fewer_tokens_than_a_window_are_a_window(shards):
    found = validate(ones, TokenStream(shards, "val"), 32, 4, 1, ALONE, None)
    assert (found.tokens, found.loss, found.estimate.error) == (32, 1.0, None)


def test_large_perplexities_are_told():
    assert Estimate(300.0, None).exponential().value == pytest.approx(math.exp(300))


def test_a_text_of_nothing_but_ends_has_no_bits_per_byte(shards):
    stream = TokenStream(shards, "val")
    none = np.zeros(stream.vocab_size, dtype=np.int64)
    found = validate(ones, stream, 32, 4, 64, ALONE, none)
    assert found.bits_per_byte is None and found.text_bytes is None


def test_who_is_asked_before_the_first_job_does_none_and_after_the_last_is_done():
    with pytest.raises(BrokenOff):
        for _ in unless_asked_to_stop([1], ALONE, lambda: True):
            pytest.fail("it was asked to stop")
    done = []
    for job in unless_asked_to_stop([1, 2], ALONE, lambda: len(done) == 2):
        done.append(job)
    assert done == [1, 2]

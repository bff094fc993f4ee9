"""Faster decoding gives what plain decoding gives."""

from __future__ import annotations

import copy
import sys
from argparse import Namespace
from collections.abc import Iterator
from importlib.util import find_spec
from subprocess import CalledProcessError

import pytest
import torch
from test_model import SMALL, greedy_without_cache, make_model, random_ids

import decoding
import model as model_module
from common.errors import UserError
from decoding import Kept, PackedLinear, compile_decoding, one_ahead, pack_weights
from model import GPT, GPTConfig, KVCache


@pytest.mark.parametrize("batch", [1, 3, 20])
@pytest.mark.parametrize("length", [1, 7])
def test_packed_weights_give_the_same_logits(batch, length):
    model = make_model(scale=3.0)
    packed = copy.deepcopy(model)
    pack_weights(packed)
    assert isinstance(packed.h[2].mlp.c_proj, PackedLinear)
    assert isinstance(packed.logits.__self__, PackedLinear)
    ids = random_ids(SMALL, batch, length)
    with torch.no_grad():
        torch.testing.assert_close(packed(ids), model(ids), rtol=1e-5, atol=1e-5)
        packed.h[0].attn.c_attn.bias.add_(1)  # the biases count
        assert not torch.allclose(packed(ids), model(ids), atol=1e-2)


def test_packed_weights_write_the_same_text():
    model, ids = make_model(scale=3.0), random_ids(SMALL, 4, 5)
    with torch.no_grad():
        model.wpe.weight.mul_(20)  # so that each position asks for another token
        expected = greedy_without_cache(model, ids, count=40)
    pack_weights(model)
    assert torch.equal(torch.stack(list(model.generate(ids, 40, temperature=0))), expected)


def test_packed_bfloat16_is_as_near_to_float32_as_bfloat16_is():
    exact = make_model(scale=3.0)
    plain = copy.deepcopy(exact).bfloat16()
    packed = copy.deepcopy(plain)
    pack_weights(packed)
    ids = random_ids(SMALL, 4, 16)
    with torch.no_grad():
        logits = exact(ids)
        errors = [(model(ids).float() - logits).abs().mean() for model in (packed, plain)]
    assert errors[0] <= 1.1 * errors[1]
    assert logits.abs().mean() > 10 * errors[1]


def test_a_bfloat16_model_reads_its_cache_in_float32_and_writes_what_it_would_without(monkeypatch):
    model, ids = make_model(scale=3.0), random_ids(SMALL, 4, 5)
    with torch.no_grad():
        model.wpe.weight.mul_(20)
        model.bfloat16()
        expected = greedy_without_cache(model, ids, count=11)
    dtypes = []
    monkeypatch.setattr(model_module, "KVCache", lambda *a: dtypes.append(a[-1]) or KVCache(*a))
    got = torch.stack(list(model.generate(ids, 11, temperature=0)))
    assert dtypes == [torch.float32]
    assert (got == expected).float().mean() > 0.9  # near-ties may go either way in eight bits


@pytest.mark.parametrize("reason", ["float64", "no oneDNN"])
def test_what_cannot_be_packed_stays_as_it_is(reason, monkeypatch):
    model = make_model().double() if reason == "float64" else make_model()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: reason == "float64")
    before = copy.deepcopy(model)
    pack_weights(model)
    ids = random_ids(SMALL, 2, 7)
    with torch.no_grad():
        assert torch.equal(model(ids), before(ids))


def test_decoding_is_compiled_for_gpus_alone():
    with pytest.raises(UserError, match="compiled decoding is for NVIDIA GPUs, this is cpu"):
        compile_decoding(make_model())


class OnGPU:
    """As much of a model on a GPU as `compile_decoding` needs."""

    wte = Namespace(weight=Namespace(device=torch.device("cuda"), is_cuda=False))
    fused_step, config = None, SMALL

    def __init__(self, error: Exception) -> None:
        self.error = error

    def new_cache(self, batch_size: int, tokens: int) -> None:
        assert self.fused_step.__name__ == "FusedStep"
        raise self.error


def test_a_compiled_model_that_has_left_the_gpu_decodes_like_any_other():
    model = make_model(SMALL)
    model.fused_step = lambda *_: pytest.fail("that is for GPUs")
    ids = random_ids(SMALL, 1, 5)
    with torch.no_grad():
        expected = greedy_without_cache(model, ids, 3)
    assert torch.equal(torch.stack(list(model.generate(ids, 3, temperature=0))), expected)


def test_without_triton_decoding_cannot_be_compiled(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setitem(sys.modules, "triton.errors", None)
    with pytest.raises(UserError, match="compiled decoding needs Triton: "):
        compile_decoding(OnGPU(AssertionError()))


@pytest.mark.skipif(not find_spec("triton"), reason="needs Triton")
@pytest.mark.parametrize("kind", ["RuntimeError", "CalledProcessError", "TritonError"])
def test_why_decoding_cannot_be_compiled_is_told(kind):
    from triton.errors import TritonError

    errors = (
        RuntimeError("Failed to find\na C compiler"),
        CalledProcessError(1, "cc"),
        TritonError(),
    )
    error = {type(error).__name__: error for error in errors}[kind]
    model, told = OnGPU(error), " ".join(str(error).split()) or kind
    with pytest.raises(UserError, match=f"compiled decoding failed in Triton: {told}"):
        compile_decoding(model)
    assert model.fused_step is None


@pytest.mark.skipif(not find_spec("triton"), reason="needs Triton")
def test_memory_that_runs_out_while_decoding_is_compiled_is_told_as_such():
    with pytest.raises(torch.OutOfMemoryError):
        compile_decoding(OnGPU(torch.OutOfMemoryError("CUDA out of memory")))


def test_what_was_made_last_serves_whoever_needs_the_same_and_one_at_a_time():
    kept, made = Kept(), []

    def make() -> int:
        assert kept.thing is None  # its memory may be needed
        made.append(len(made))
        return made[-1]

    def use(key: str, expected: int) -> None:
        with kept.ready(key, make) as thing:
            assert thing == expected

    use("a", 0)
    use("a", 0)
    use("b", 1)
    use("a", 2)
    with kept.ready("a", make) as first, kept.ready("a", make) as second:
        assert (first, second) == (2, 3)
    use("a", 2)  # whichever was left last
    with pytest.raises(KeyboardInterrupt), kept.ready("a", make):
        raise KeyboardInterrupt
    use("a", 2)
    assert made == [0, 1, 2, 3]
    assert copy.deepcopy(kept).thing is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_decoding_with_recorded_graphs_equals_decoding_without_them_in_bfloat16(monkeypatch):
    """150 tokens: past the first 512 slots, whose graph serves no longer, and past the context."""
    config = GPTConfig(vocab_size=97, block_size=560, n_layer=3, n_head=4, n_embd=32)
    model, ids = make_model(config, scale=3.0).cuda().bfloat16(), random_ids(config, 4, 480).cuda()
    got = torch.stack(list(model.generate(ids, 150, temperature=0)))
    monkeypatch.setattr(decoding, "RecordedDecoding", lambda model, _: model.next_logits)
    assert torch.equal(got, torch.stack(list(model.generate(ids, 150, temperature=0))))


class TokenOfAGPU:
    """As much of a tensor on a GPU as `one_ahead` looks at."""

    is_cuda, device = True, torch.device("cuda")

    def __init__(self, number: int, happened: list[str]) -> None:
        self.number, self.happened = number, happened

    def to(self, device: str, non_blocking: bool) -> int:
        """Begin to copy it."""
        self.happened.append(f"copy {self.number}")
        assert (device, non_blocking) == ("cpu", True)
        return self.number


def test_a_gpu_is_given_the_next_token_before_the_last_is_looked_at(monkeypatch):
    happened = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            pass

        def record(self, stream: str) -> None:
            assert stream == "the GPU's"
            happened.append("record")

        def synchronize(self) -> None:
            happened.append("wait")

    def generate(count: int) -> Iterator[TokenOfAGPU]:
        for number in range(count):
            happened.append(f"compute {number}")
            yield TokenOfAGPU(number, happened)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the GPU's")
    for number in one_ahead(generate)(3):
        happened.append(f"look at {number}")
    begun = [[f"compute {number}", f"copy {number}", "record"] for number in range(3)]
    looked_at = [["wait", f"look at {number}"] for number in range(3)]
    order = [begun[0], begun[1], looked_at[0], begun[2], looked_at[1], looked_at[2]]
    assert happened == sum(order, [])
    assert list(one_ahead(generate)(0)) == []
    assert GPT.generate.__code__ is one_ahead(generate).__code__  # it is what generates text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_decoding_with_recorded_graphs_equals_decoding_without_a_cache():
    config = GPTConfig(vocab_size=97, block_size=560, n_layer=3, n_head=4, n_embd=32)
    model = make_model(config, scale=3.0).cuda()
    ids = random_ids(config, 4, 480).cuda()
    with torch.no_grad():
        model.wpe.weight.mul_(20)
        expected = greedy_without_cache(model, ids, count=150)
    got = torch.stack(list(model.generate(ids, 150, temperature=0)))
    assert got.device.type == "cpu"
    assert torch.equal(got, expected.cpu())


@pytest.mark.parametrize("reason", ["float64", "no oneDNN"])
def test_what_cannot_be_packed_is_not(reason, monkeypatch):
    model = make_model().double() if reason == "float64" else make_model()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: reason == "float64")
    pack_weights(model)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())

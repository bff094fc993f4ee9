"""Kernels of our own compute what the plain code does.

Triton comes with PyTorch for NVIDIA GPUs. Without one it can interpret its kernels, slowly.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch
from conftest import run
from test_model import greedy_without_cache, make_model, random_ids

import decoding
from decoding import RecordedDecoding, compile_decoding, most_fused
from model import GPT, GPTConfig, KVCache, logits_to_gradient

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
ODD = GPTConfig(vocab_size=97, block_size=300, n_layer=2, n_head=3, n_embd=24)
SHAPES = {
    "heads of 8": ODD,
    "heads of 64": GPTConfig(vocab_size=97, block_size=300, n_layer=2, n_head=2, n_embd=128),
    "one head": GPTConfig(vocab_size=97, block_size=300, n_layer=1, n_head=1, n_embd=768),
    "GPT-2 XL's": GPTConfig(vocab_size=97, block_size=300, n_layer=1, n_head=25, n_embd=1600),
}


def check_step(
    config: GPTConfig,
    dtype: torch.dtype,
    batch: int,
    length: int,
    device: str,
    sharpness: float = 1.0,
) -> None:
    """Three steps after so many tokens: as near to float64 as the plain ones, and stored alike.

    Compared are medians: where two keys fit about equally well, errors are ten times as large.
    """
    from gpu_kernels import FusedStep

    model = make_model(config, scale=3.0).to(device, dtype)
    with torch.no_grad():
        for block in model.h:
            block.attn.c_attn.weight.mul_(sharpness)  # scores grow with its square
        for parameter in model.parameters():
            if parameter.dim() < 2:  # gains and biases count
                parameter.add_(torch.randn_like(parameter) / 10)
    exact = copy.deepcopy(model).double()
    ids = random_ids(config, batch, length + 3).to(device)
    caches = [KVCache(config, batch, 300, ids.device, dtype) for _ in range(2)]
    with torch.inference_mode():
        for cache in caches:
            model.next_logits(ids[:, :length], cache)
        fused = FusedStep(model, caches[0])
        for tensor in vars(fused).values():  # nothing may be read before it is written
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                tensor.fill_(torch.nan)
        errors = []  # of both, one row for each text and step
        for count in range(length, length + 3):
            exact_logits = exact(ids[:, : count + 1])[:, -1]
            found = [
                step(ids[:, count : count + 1], cache).double()
                for step, cache in zip((fused, model.next_logits), caches)
            ]
            errors.append(torch.stack([(one - exact_logits).abs().mean(dim=1) for one in found]))
    error, allowed = torch.cat(errors, dim=1).median(dim=1).values
    assert error <= 2 * allowed
    assert exact_logits.abs().mean() > 20 * error
    ours, plain = caches
    assert ours.length == plain.length == ours.position.item() == length + 3
    for layer, expected in zip(ours.layers, plain.layers):
        for found, stored in ((layer.keys, expected.keys), (layer.values, expected.values)):
            written = stored[:, :, : length + 3].double()
            assert (found[:, :, : length + 3] - written).norm() < 0.02 * written.norm()
            assert (found[:, :, length + 3 :] == 0).all()


def check_loss(N: int, V: int, dtype: torch.dtype, device: str) -> None:
    """Log-totals and gradients, padding included."""
    import gpu_kernels

    torch.manual_seed(0)
    logits = torch.randn(N, V + -V % 64) * 5 + torch.linspace(-300, 300, N)[:, None]
    logits, targets = logits.to(device, dtype), torch.randint(V, (N,), device=device)
    targets[:2] = torch.tensor([0, V - 1])
    gradient, expected = logits.clone(), logits.clone()
    log_total = gpu_kernels.logits_to_gradient(gradient, targets, V)
    torch.testing.assert_close(log_total, logits_to_gradient(expected, targets, V))
    error = max(torch.finfo(dtype).eps, 1e-4)  # a logit of 300 has no more digits behind the point
    torch.testing.assert_close(gradient, expected, rtol=error, atol=error)
    assert (gradient[:, V:] == 0).all()


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 126), (8, 250)])
def test_a_fused_step_on_a_gpu_is_as_near_to_float64_as_the_plain_one(shape, dtype, batch, length):
    check_step(SHAPES[shape], dtype, batch, length, "cuda")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_loss_on_a_gpu_equals_the_plain_one(dtype):
    check_loss(300, 50_257, dtype, "cuda")


class Unrecorded:
    """What stands in for RecordedDecoding on a CPU."""

    def __init__(self, model: GPT, cache: KVCache, step: Callable | None = None) -> None:
        self.step = step or model.next_logits

    def __call__(self, ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
        return self.step(ids, cache)


class LikeOnGPU(torch.nn.Parameter):
    """Weights on a CPU that are taken for a GPU's."""

    is_cuda = True


@contextmanager
def compiled(device: str, block_size: int = 560) -> Iterator[tuple[GPT, list[int]]]:
    """A model that decodes with our own kernels, and a list that grows with recordings.

    A number there is 3 if the step recorded is our own, else 2.
    """
    from gpu_kernels import FusedStep

    config = GPTConfig(vocab_size=97, block_size=block_size, n_layer=2, n_head=4, n_embd=32)
    model, recorded = make_model(config, scale=3.0).to(device), []
    with torch.no_grad():
        model.wpe.weight.mul_(20)  # so that each position asks for another token
    if device == "cuda":
        compile_decoding(model)
    else:
        model.wte.weight.__class__, model.fused_step = LikeOnGPU, FusedStep
    real = RecordedDecoding if device == "cuda" else Unrecorded
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            decoding,
            "RecordedDecoding",
            lambda *told: recorded.append(len(told)) or real(*told),
        )
        yield model, recorded


def check_text(model: GPT, batch: int, prompt: int, count: int, seed: int = 0) -> None:
    ids = random_ids(model.config, batch, prompt, seed).to(model.wte.weight.device)
    with torch.no_grad():
        expected = greedy_without_cache(model, ids, count).cpu()
    assert torch.equal(torch.stack(list(model.generate(ids, count, temperature=0))), expected)


def check_texts(device: str, prompt: int, count: int, block_size: int) -> None:
    """The same as without a cache, past the context's end; the second with what was kept."""
    with compiled(device, block_size) as (model, recorded):
        for seed in range(2):
            check_text(model, 2, prompt, count, seed)
        assert recorded == [3]


def check_kept(device: str) -> None:
    """It serves the same weights, wherever their values go, and as many texts."""
    with compiled(device, 64) as (model, recorded):
        layer = model.h[1].mlp.c_fc
        check_text(model, 2, 20, 3)
        with torch.no_grad():
            layer.weight.mul_(-1)
        check_text(model, 2, 20, 3)
        for _ in zip(model.generate(random_ids(model.config, 2, 9).to(device), 4), range(2)):
            pass  # stopped early
        check_text(model, 2, 50, 3)
        assert recorded == [3]
        layer.weight = torch.nn.Parameter(-layer.weight)
        check_text(model, 2, 20, 3)
        assert recorded == [3, 3]
        check_text(model, 1, 20, 3)
        assert recorded == [3, 3, 3]
        check_text(model, most_fused(32) + 1, 2, 3)
        assert recorded == [3, 3, 3, 2]


def check_spoilt(device: str) -> None:
    """What spoilt weights left in a kept cache doesn't come up again, not even in one token."""
    with compiled(device, 64) as (model, recorded):
        bias, good = model.h[0].attn.c_attn.bias, model.h[0].attn.c_attn.bias.detach().clone()
        with torch.no_grad():
            bias.fill_(torch.nan)
            with pytest.raises(FloatingPointError):
                list(model.generate(random_ids(model.config, 2, 40).to(device), 9))
            bias.copy_(good)
        check_text(model, 2, 1, 3)
        assert recorded == [3]


def check_interleaved(device: str) -> None:
    """Two texts at once don't share what is kept."""
    with compiled(device, 64) as (model, recorded):
        check_text(model, 2, 20, 2)  # what it leaves is for one of them
        prompts = [random_ids(model.config, 2, 20, seed).to(device) for seed in range(2)]
        both = zip(*(model.generate(ids, 3, temperature=0) for ids in prompts))
        for ids, tokens in zip(prompts, zip(*both)):
            with torch.no_grad():
                expected = greedy_without_cache(model, ids, 3).cpu()
            assert torch.equal(torch.stack(tokens), expected)
        assert recorded == [3, 3]


def check_let_go(device: str) -> None:
    """A copy begins with nothing kept, and who is deleted leaves nothing behind."""
    with compiled(device, 64) as (model, _):
        check_text(model, 2, 20, 3)
        assert model.kept_decoding.thing
        other = copy.deepcopy(model)
        assert other.kept_decoding.thing is None
        check_text(other, 2, 20, 3)
        weight = weakref.ref(other.h[0].mlp.c_fc.weight)
        gc.disable()
        try:
            del other
            assert weight() is None
        finally:
            gc.enable()


def check_capacity(device: str) -> None:
    from gpu_kernels import FusedStep

    model, cache = make_model(ODD), KVCache(ODD, 1, 128, torch.device(device), torch.float32)
    cache.go_back(128)
    with pytest.raises(ValueError, match="129 tokens, the cache holds 128"):
        FusedStep(model, cache)(torch.zeros(1, 1, dtype=torch.long), cache)


CHECKS = (check_kept, check_spoilt, check_interleaved, check_let_go, check_capacity)


INTERPRETED = """
import gpu_kernels
from tests.test_gpu_kernels import *

check_step(ODD, torch.float32, 1, 1, "cpu")
for gpu_kernels.NUMBERS in (512, 8192):  # keys and values in pieces, and not
    check_step(ODD, torch.float32, 2, 30, "cpu")
    check_step(ODD, torch.bfloat16, 1, 130, "cpu")
check_step(ODD, torch.float32, 1, 130, "cpu", sharpness=20.0)
for gpu_kernels.COLUMNS in (128, 2048):  # a row in pieces, and not
    for dtype in (torch.float32, torch.bfloat16):
        check_loss(5, 257, dtype, "cpu")
check_texts("cpu", prompt=26, count=8, block_size=30)
for check in CHECKS:
    check("cpu")
"""


def test_kernels_that_are_interpreted_on_a_cpu_compute_what_the_plain_code_does():
    """In one process, for its imports take longer than most of this."""
    if not find_spec("triton"):
        pytest.skip("needs Triton, which comes with PyTorch for NVIDIA GPUs")
    interpreted = {"TRITON_INTERPRET": "1", "PYTHONPATH": "tests:."}
    result = run("-c", INTERPRETED, environment=interpreted)
    assert result.status == 0, result.err


@pytest.mark.gpu
@on_gpu
def test_texts_on_a_gpu_are_those_without_a_cache():
    check_texts("cuda", prompt=480, count=150, block_size=560)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("check", CHECKS)
def test_what_is_kept_on_a_gpu_for_the_next_text(check):
    check("cuda")

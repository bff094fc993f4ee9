"""Kernels of our own compute what the plain code does.

Triton comes with PyTorch for NVIDIA GPUs. Without one it can interpret its kernels, slowly.
"""

from __future__ import annotations

import copy
from importlib.util import find_spec

import pytest
import torch
from conftest import run
from test_model import greedy_without_cache, make_model, random_ids

import model as model_module
from decoding import MOST_FUSED
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


def interpreted(code: str) -> None:
    """Run code that takes from here and from gpu_kernels what it needs, on a CPU."""
    if not find_spec("triton"):
        pytest.skip("needs Triton, which comes with PyTorch for NVIDIA GPUs")
    head = "import torch, gpu_kernels; from tests.test_gpu_kernels import *\n"
    result = run("-c", head + code, environment={"TRITON_INTERPRET": "1", "PYTHONPATH": "tests:."})
    assert result.status == 0, result.err


@pytest.mark.parametrize("numbers", [64, 8192])  # keys and values in pieces, or not
def test_a_fused_step_interpreted_on_a_cpu_is_as_near_to_float64_as_the_plain_one(numbers):
    interpreted(
        f"gpu_kernels.NUMBERS = {numbers}\n"
        "for batch, length in ((1, 1), (2, 7), (1, 140)):\n"
        "    check_step(ODD, torch.float32, batch, length, 'cpu')\n"
        "check_step(ODD, torch.bfloat16, 1, 130, 'cpu')\n"
        "check_step(ODD, torch.float32, 1, 130, 'cpu', sharpness=20.0)"
    )


@pytest.mark.parametrize("columns", [128, 4096])
def test_the_loss_interpreted_on_a_cpu_equals_the_plain_one(columns):
    interpreted(
        f"gpu_kernels.COLUMNS = {columns}\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    check_loss(5, 257, dtype, 'cpu')"
    )


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


def make_compiled(monkeypatch: pytest.MonkeyPatch) -> tuple[GPT, list[int]]:
    """A model on a GPU with a decoding step of our own, and a list that grows with recordings."""
    config = GPTConfig(vocab_size=97, block_size=560, n_layer=3, n_head=4, n_embd=32)
    model, recorded, real = make_model(config, scale=3.0).cuda(), [], model_module.RecordedDecoding
    with torch.no_grad():
        model.wpe.weight.mul_(20)
    model.compile_decoding()
    monkeypatch.setattr(
        model_module, "RecordedDecoding", lambda *told: recorded.append(len(told)) or real(*told)
    )
    return model, recorded


def text(model: GPT, ids: torch.Tensor, count: int) -> torch.Tensor:
    return torch.stack(list(model.generate(ids, count, temperature=0)))


@pytest.mark.gpu
@on_gpu
def test_compiled_decoding_writes_the_same_text_past_the_end_of_the_context(monkeypatch):
    model, recorded = make_compiled(monkeypatch)
    for seed in range(2):  # the second with what was kept of the first
        ids = random_ids(model.config, 4, 480, seed).cuda()
        assert torch.equal(text(model, ids, 150), greedy_without_cache(model, ids, 150).cpu())
    assert recorded == [3]  # model, cache and a step of our own


@pytest.mark.gpu
@on_gpu
def test_what_is_kept_for_the_next_text_serves_only_as_many_texts_and_the_same_weights(monkeypatch):
    model, recorded = make_compiled(monkeypatch)
    ids = random_ids(model.config, 2, 20).cuda()

    def check(expected: int) -> None:
        assert torch.equal(text(model, ids, 30), greedy_without_cache(model, ids, 30).cpu())
        assert len(recorded) == expected

    check(1)
    with torch.no_grad():
        model.h[1].mlp.c_fc.weight.mul_(-1)
    check(1)
    for _ in zip(model.generate(ids, 30), range(5)):  # stopped early
        pass
    check(1)
    model.h[1].mlp.c_fc.weight = torch.nn.Parameter(-model.h[1].mlp.c_fc.weight)
    check(2)
    ids = ids[:1]
    check(3)
    ids = random_ids(model.config, 1, 120).cuda()
    check(3)
    ids = random_ids(model.config, MOST_FUSED // 32 + 1, 20).cuda()
    check(4)
    assert recorded == [3, 3, 3, 2]  # the last without a step of our own


@pytest.mark.gpu
@on_gpu
def test_two_texts_at_once_do_not_share_what_is_kept(monkeypatch):
    model, recorded = make_compiled(monkeypatch)
    prompts = [random_ids(model.config, 1, 20, seed).cuda() for seed in range(2)]
    text(model, prompts[0], 3)
    both = zip(*(model.generate(ids, 30, temperature=0) for ids in prompts))
    for ids, tokens in zip(prompts, zip(*both)):
        assert torch.equal(torch.stack(tokens), greedy_without_cache(model, ids, 30).cpu())
    assert len(recorded) == 2

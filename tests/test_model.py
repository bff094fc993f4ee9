"""The model against Hugging Face's, against written-out attention, and against itself."""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, without_key_biases
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_data import windows_of_blocks
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from data import within_documents
from model import (
    GPT,
    CausalSelfAttention,
    GPTConfig,
    HeadLoss,
    KVCache,
    attention_written_out,
    choose_next,
    logits_to_gradient,
    next_probabilities,
)

SMALL = GPTConfig(vocab_size=97, block_size=16, n_layer=3, n_head=4, n_embd=32)
BLOCKS = GPTConfig(vocab_size=97, block_size=300, n_layer=2, n_head=2, n_embd=32)


def make_model(config: GPTConfig = SMALL, seed: int = 0, scale: float = 1.0) -> GPT:
    """A model in eval mode; a larger `scale` of its weights makes its choices less alike."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def random_ids(config: GPTConfig, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length), generator=generator)


def test_gpt2_small_has_124439808_parameters_and_needs_860_megaflop_per_token():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert model.num_parameters() == 124_439_808
    assert model.flops_per_token() == 6 * 124_439_808 + 12 * 12 * 768 * 1024


@pytest.mark.parametrize(
    ("n_layer", "n_head", "n_embd", "parameters"),
    [(24, 16, 1024, 354_823_168), (36, 20, 1280, 774_030_080), (48, 25, 1600, 1_557_611_200)],
)
def test_the_larger_sizes_have_the_published_parameter_counts(n_layer, n_head, n_embd, parameters):
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    assert model.num_parameters() == parameters


def test_logits_loss_and_gradients_equal_hugging_faces_gpt2():
    transformers = pytest.importorskip("transformers")
    reference = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    )
    ours = make_model(GPTConfig())
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # theirs are (in, out)
    theirs = dict(reference.transformer.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            # Biases and layer norms start at 0 and 1: give them something to say.
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            theirs[name].copy_(parameter.T if name.endswith(transposed) else parameter)
    assert set(theirs) == {name for name, _ in ours.named_parameters()}

    ids, targets = random_ids(GPTConfig(), 2, 65)[:, :-1], random_ids(GPTConfig(), 2, 65)[:, 1:]
    logits, loss = ours(ids), ours(ids, targets)
    their_logits = reference(ids).logits
    their_loss = F.cross_entropy(their_logits.flatten(0, 1), targets.flatten())
    assert (logits - their_logits).abs().max() < 1e-4
    assert abs(loss.item() - their_loss.item()) < 1e-5 * their_loss.item()

    loss.backward()
    their_loss.backward()
    for name, parameter in ours.named_parameters():
        theirs_grad = theirs[name].grad.T if name.endswith(transposed) else theirs[name].grad
        difference = (parameter.grad - theirs_grad).norm() / theirs_grad.norm()
        assert difference < 1e-4, (name, difference)


def test_fused_attention_equals_written_out_attention():
    q, k, v = torch.randn(3, 2, 4, 33, 8, dtype=torch.float64)
    fused = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(fused, attention_written_out(q, k, v))


def test_the_attention_layer_equals_written_out_attention():
    torch.manual_seed(0)
    layer = CausalSelfAttention(SMALL).double()
    x = torch.randn(2, 9, SMALL.n_embd, dtype=torch.float64)
    q, k, v = (
        part.unflatten(-1, (SMALL.n_head, -1)).transpose(1, 2)
        for part in layer.c_attn(x).chunk(3, dim=-1)
    )
    expected = layer.c_proj(attention_written_out(q, k, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("recompute", [False, True])
def test_documents_in_a_window_can_be_read_as_if_each_stood_alone(recompute):
    """Logits, loss and gradients are those of each document by itself."""
    model = make_model(replace(SMALL, recompute=recompute), scale=3.0).double()
    ids, targets = random_ids(SMALL, 1, 16), random_ids(SMALL, 1, 16, seed=1)
    ids[0, [0, 5, 6, 13]] = 96
    documents = [slice(0, 5), slice(5, 6), slice(6, 13), slice(13, 16)]
    apart = within_documents(ids, 96)

    alone = torch.cat([model(ids[:, some]) for some in documents], dim=1)
    torch.testing.assert_close(model(ids, documents=apart), alone)
    assert not torch.allclose(model(ids), alone)

    loss = F.cross_entropy(alone.flatten(0, 1), targets.flatten())
    expected = torch.autograd.grad(loss, [*model.parameters()])
    ours = model(ids, targets, apart)
    assert ours.item() == pytest.approx(loss.item(), rel=1e-6)  # summed in float32
    gradients = torch.autograd.grad(ours, [*model.parameters()])
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)


def test_a_mask_in_blocks_is_the_same_and_compiled_once_for_all_batches(monkeypatch):
    """FlexAttention refuses to learn on a CPU, where its kernel is missing; what comes before it is
    what it is on a GPU.
    """
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    model, twin = make_model(scale=3.0), make_model(scale=3.0)
    backend = CompileCounterWithBackend("aot_eager")
    for block in twin.h:
        block.compile(backend=backend, fullgraph=True, dynamic=False)
    for seed in range(10):
        ids, targets = random_ids(SMALL, 2, 16, seed), random_ids(SMALL, 2, 16, seed + 1)
        ids[:, seed] = 96
        loss = model(ids, targets, within_documents(ids, 96))
        other = twin(ids, targets, within_documents(ids, 96, in_blocks=True))
        gradients, others = (
            torch.autograd.grad(one, [*some.parameters()])
            for one, some in ((loss, model), (other, twin))
        )
        torch.testing.assert_close(other, loss)
        torch.testing.assert_close(others, gradients, rtol=1e-4, atol=1e-6)
    assert backend.frame_count == 1


@pytest.mark.skipif(
    torch.__version__ < (2, 12), reason="PyTorch 2.11's refuses q, k and v out of one product"
)
@pytest.mark.skipif(
    sys.platform == "darwin"
    or not torch.cpu._is_avx2_supported()
    or os.environ.get("ATEN_CPU_CAPABILITY") == "default",
    reason="PyTorch has this kernel for CPUs with AVX2, and not on macOS",
)
def test_a_mask_in_blocks_is_the_same_for_the_kernel_that_skips_blocks():
    """A CPU with AVX2 has that kernel for the way forward; a GPU for both."""
    model, twin = (make_model(BLOCKS, scale=3.0) for _ in range(2))
    twin.compile_parts()
    ids = windows_of_blocks()
    with torch.no_grad():
        expected = model(ids, documents=within_documents(ids, 96))
        found = twin(ids, documents=within_documents(ids, 96, in_blocks=True))
        other = within_documents(ids[:1].expand(4, -1), 96, in_blocks=True)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(twin(ids, documents=other), expected, rtol=0.1, atol=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_a_mask_in_blocks_gives_the_same_loss_and_gradients():
    model, twin = (make_model(BLOCKS, scale=3.0).cuda() for _ in range(2))
    twin.compile_parts()
    ids = windows_of_blocks().cuda()
    targets = ids.roll(-1, dims=1)
    results = []
    for one, in_blocks in ((model, False), (twin, True)):
        loss = one(ids, targets, within_documents(ids, 96, in_blocks))
        results.append((loss.item(), torch.autograd.grad(loss, [*one.parameters()])))
    (expected, gradients), (found, others) = results
    assert found == pytest.approx(expected, rel=1e-3)
    for gradient, other in zip(gradients, others):
        assert (other - gradient).norm() <= 0.01 * gradient.norm() + 1e-5


def test_changing_a_future_token_leaves_earlier_logits_unchanged():
    model = make_model(scale=3.0)
    ids = random_ids(SMALL, 1, 16)
    before = model(ids)
    for position in range(16):
        changed = ids.clone()
        changed[0, position] = (ids[0, position] + 1) % SMALL.vocab_size
        after = model(changed)
        assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.equal(after[:, position], before[:, position])


def test_an_untrained_model_guesses_evenly():
    config = GPTConfig(block_size=64, n_layer=2, n_head=2, n_embd=64)
    ids = random_ids(config, 4, 65)
    loss = make_model(config)(ids[:, :-1], ids[:, 1:]).item()
    assert abs(loss - math.log(50_257)) < 0.5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_text_ends_with_an_error_where_the_logits_are_no_numbers(temperature):
    model = make_model()
    model.wpe.weight.data[5] = math.nan
    tokens = model.generate(random_ids(SMALL, 2, 3), 9, temperature)
    assert len([next(tokens) for _ in range(3)]) == 3  # the last of them comes to stand there
    with pytest.raises(FloatingPointError, match="or overflow in float32"):
        next(tokens)


def test_one_batch_can_be_learned_by_heart():
    torch.manual_seed(0)
    model = GPT(SMALL)
    ids = random_ids(SMALL, 4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(200):
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05


def test_weights_start_as_gpt2s():
    model = GPT(GPTConfig(n_layer=4, block_size=1024))
    standard_deviations = {
        "wte.weight": 0.02,
        "wpe.weight": 0.01,
        "h.0.attn.c_attn.weight": 0.02,
        "h.3.mlp.c_fc.weight": 0.02,
        "h.1.attn.c_proj.weight": 0.02 / math.sqrt(8),
        "h.2.mlp.c_proj.weight": 0.02 / math.sqrt(8),
    }
    parameters = dict(model.named_parameters())
    for name, expected in standard_deviations.items():
        assert parameters[name].std().item() == pytest.approx(expected, rel=0.01), name
        assert abs(parameters[name].mean().item()) < 0.01 * expected + 1e-4, name
    for name, parameter in parameters.items():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif ".ln_" in name or name.startswith("ln_f"):
            assert (parameter == 1).all(), name


def test_the_loss_is_the_mean_of_minus_log_probability():
    model = make_model(scale=3.0)
    ids, targets = random_ids(SMALL, 2, 8), random_ids(SMALL, 2, 8, seed=1)
    probabilities = model(ids).double().softmax(dim=-1)
    expected = -probabilities.gather(-1, targets[..., None]).log().mean()
    assert model(ids, targets).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("rows", [1, 5, 16, 100])
def test_the_sliced_loss_and_its_gradients_equal_those_of_all_logits_at_once(monkeypatch, rows):
    monkeypatch.setattr(HeadLoss, "SLICE", rows)
    ids, targets = random_ids(SMALL, 2, 8), random_ids(SMALL, 2, 8, seed=1)
    sliced, whole = make_model(scale=3.0), make_model(scale=3.0).double()
    loss = sliced(ids, targets)
    expected = F.cross_entropy(whole(ids).flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (loss / 7).backward()  # as in accumulation: the gradient that comes in isn't 1
    (expected / 7).backward()
    for (name, got), want in zip(sliced.named_parameters(), whole.parameters()):
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_loss_and_its_gradients_lose_no_more_than_that_precision(dtype):
    """4,096 rows: had the mean's factor gone in before the products, float16 would lose digits."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(4096, 32), torch.randn(97, 32) * 0.1
    targets = torch.randint(97, (4096,))
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    expected = F.cross_entropy(F.linear(*exact), targets)
    expected.backward()
    reduced = [hidden.requires_grad_(), weight.requires_grad_()]
    with torch.autocast("cpu", dtype):
        loss = HeadLoss.apply(*reduced, targets, logits_to_gradient, True)
    assert loss.dtype == torch.float32
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=torch.finfo(dtype).eps)
    for got, want in zip(reduced, exact):
        error = (got.grad - want.grad).norm() / want.grad.norm()
        assert error < torch.finfo(dtype).eps


def test_a_frequent_token_does_not_overflow_the_gradient_in_float16():
    """Each of 8,192 rows pulls the same way; the loss's scale comes later and couldn't help."""
    hidden = torch.full((8192, 8), 20.0)
    weight = torch.zeros(100, 8, requires_grad=True)
    targets = torch.full((8192,), 7)
    with torch.autocast("cpu", torch.float16):
        HeadLoss.apply(hidden, weight, targets, logits_to_gradient, True).backward()
    expected = torch.full((100, 1), 0.01) - torch.eye(100)[:, 7:8]
    torch.testing.assert_close(weight.grad, (20 * expected).expand(100, 8), rtol=1e-2, atol=0)


@pytest.mark.parametrize("offset", [0, -100, 300])
def test_a_small_loss_keeps_its_digits_wherever_the_logits_lie(offset):
    """A hidden state of 1 and a weight for each target: eight thousand rows of little loss."""
    torch.manual_seed(0)
    targets = torch.randint(97, (8192,))
    hidden = torch.cat((F.one_hot(targets, 97) * 7.0, torch.ones(8192, 1)), dim=1)
    weight = torch.cat((torch.eye(97), torch.full((97, 1), float(offset))), dim=1)
    expected = F.cross_entropy(hidden.double() @ weight.double().T, targets)
    loss = HeadLoss.apply(hidden, weight, targets, logits_to_gradient, False)
    assert 0.05 < expected < 0.1
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6 if offset == 0 else 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_of_reduced_logits_is_computed_in_float32(dtype):
    torch.manual_seed(0)
    logits, targets = torch.randn(64, 128).to(dtype), torch.randint(97, (64,))
    expected = torch.logsumexp(logits[:, :97].double(), dim=-1, keepdim=True)
    log_total = logits_to_gradient(logits, targets, 97)
    assert log_total.dtype == torch.float32
    torch.testing.assert_close(log_total.double(), expected, rtol=1e-6, atol=1e-6)
    assert (logits[:, 97:] == 0).all()


@pytest.mark.parametrize(
    ("dtype", "stream"),
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),  # which ends at 65,504
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_the_residual_stream_is_in_bfloat16_when_the_products_are(dtype, stream):
    model, seen = make_model(), []
    for block in model.h:
        block.register_forward_hook(lambda _, inputs, x: seen.extend((inputs[0].dtype, x.dtype)))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        model(random_ids(SMALL, 2, 8), random_ids(SMALL, 2, 8)).backward()
    assert seen == [stream] * 2 * len(model.h)
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_in_bfloat16_loss_and_gradients_are_float64s_but_for_rounding():
    """Each rounding errs by 2⁻⁹ at most; those of three blocks add up."""
    losses, gradients = [], []
    ids, targets = random_ids(SMALL, 4, 16), random_ids(SMALL, 4, 16, seed=1)
    for dtype in (torch.float64, torch.bfloat16):
        model = make_model(scale=3.0)
        model = model.double() if dtype == torch.float64 else model
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            loss = model(ids, targets)
        loss.backward()
        losses.append(loss.item())
        found = {name: p.grad.double() for name, p in model.named_parameters()}
        gradients.append(without_key_biases(found))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    for name, exact in gradients[0].items():
        assert (gradients[1][name] - exact).norm() < 0.04 * exact.norm(), name


def test_no_tensor_as_large_as_all_logits_is_ever_made(monkeypatch):
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self.numbers = max(self.numbers, tensor.numel())
            return result

    config = GPTConfig(vocab_size=5000, block_size=16, n_layer=1, n_head=1, n_embd=8)
    monkeypatch.setattr(HeadLoss, "SLICE", 8)
    ids = random_ids(config, 4, 16)
    with Largest() as largest:
        make_model(config)(ids, ids).backward()
    assert largest.numbers == 8 * 5056  # eight rows of the padded vocabulary, of sixty-four


def test_recomputing_changes_neither_loss_nor_gradients_but_what_is_kept():
    ids, targets = random_ids(SMALL, 2, 8), random_ids(SMALL, 2, 8, seed=1)
    kept, gradients = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = GPT(GPTConfig(**{**vars(SMALL), "dropout": 0.3, "recompute": recompute}))
        numbers = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal numbers
            numbers += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(ids, targets)
        loss.backward()
        kept.append(numbers)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize(
    ("dtype", "recompute", "rows", "graphs", "error"),
    [
        (torch.float32, False, 8192, 2, 1e-5),
        (torch.float32, True, 8192, 2, 1e-5),
        (torch.bfloat16, False, 8192, 2, 0.02),
        (torch.float32, False, 6, 3, 1e-5),  # 16 rows are slices of 6, 6 and 4
    ],
)
def test_compiled_parts_compute_the_same_in_one_graph_each_without_breaks_or_recompiles(
    monkeypatch, dtype, recompute, rows, graphs, error
):
    """A block's graph serves all three, forward and backward.

    The others are the loss of a slice: one for each shape that slices have.
    """
    monkeypatch.setattr(HeadLoss, "SLICE", rows)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = GPTConfig(**{**vars(SMALL), "recompute": recompute})
    compiled, plain = (make_model(config, scale=3.0).train() for _ in range(2))
    compiled.compile_parts()
    for seed in range(3):
        ids, targets = random_ids(SMALL, 2, 8, seed), random_ids(SMALL, 2, 8, seed + 10)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss, expected = compiled(ids, targets), plain(ids, targets)
        assert loss.item() == pytest.approx(expected.item(), rel=error)
        loss.backward()
        expected.backward()
    for got, want in zip(compiled.parameters(), plain.parameters()):
        assert (got.grad - want.grad).norm() <= error * want.grad.norm() + 1e-6
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    assert list(compiled.state_dict()) == list(plain.state_dict())


def test_how_much_slower_pytorchs_own_loss_is_was_measured():
    found = json.loads((ROOT / "results" / "linear_cross_entropy.json").read_text("utf-8"))
    ours, plain, chunked = map(statistics.median, found["seconds"].values())
    told = (
        f"takes {plain / ours:.1f} times as long on a CPU, and {chunked / ours:.0f} times in chunks"
    )
    assert told in " ".join(HeadLoss.__doc__.split())


def test_attention_drops_pairs_in_training_with_a_mask_and_without():
    layer = CausalSelfAttention(replace(SMALL, dropout=0.5))
    layer.resid_dropout = torch.nn.Identity()  # which drops too
    x, mask = torch.randn(1, 9, SMALL.n_embd), torch.zeros(1, 1, 9, 9)
    for seen in (None, mask):
        assert not torch.equal(layer.train()(x, mask=seen), layer(x, mask=seen))
        assert torch.equal(layer.eval()(x, mask=seen), layer(x, mask=seen))


def test_all_layers_share_one_mask():
    """Made of truth values by each, a copy would be kept until the backward pass."""
    model, ids = make_model(), random_ids(SMALL, 2, 16)
    kept = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-2:] == (16, 16):
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(ids, ids, within_documents(ids, 96))
    assert len(kept) == 1
    loss.backward()


def test_dropout_acts_in_training_only():
    model = GPT(GPTConfig(**{**vars(SMALL), "dropout": 0.5}))
    ids = random_ids(SMALL, 1, 8)
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_a_head_count_that_does_not_divide_the_channels_is_an_error():
    with pytest.raises(ValueError, match="n_embd 768 is not a multiple of n_head 7"):
        GPTConfig(n_head=7)


# The cache and generation


def greedy_without_cache(model: GPT, ids: torch.Tensor, count: int) -> torch.Tensor:
    """The definition that `generate` must meet, computing everything anew for every token."""
    block_size = model.config.block_size
    window, new = ids[:, -block_size:], []
    for _ in range(count):
        if window.size(1) > block_size:
            window = window[:, -(block_size // 2) :]
        next_ids = model(window)[:, -1].argmax(dim=-1)
        new.append(next_ids)
        window = torch.cat((window, next_ids[:, None]), dim=1)
    return torch.stack(new)


def test_a_context_of_a_single_token_generates_too():
    model = make_model(GPTConfig(vocab_size=9, block_size=1, n_layer=1, n_head=1, n_embd=8))
    assert len(list(model.generate(torch.tensor([[3]]), 4, temperature=0))) == 4


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("prompt_length", [1, 5, 15, 16, 17, 40])
def test_greedy_with_the_cache_equals_greedy_without_to_and_past_the_end_of_the_context(
    batch, prompt_length
):
    model = make_model(scale=3.0)
    ids = random_ids(SMALL, batch, prompt_length)
    with torch.no_grad():
        model.wpe.weight.mul_(20)  # so that each position asks for another token
        expected = greedy_without_cache(model, ids, count=40)
    got = torch.stack(list(model.generate(ids, 40, temperature=0)))
    assert torch.equal(got, expected)
    assert len(set(expected.flatten().tolist())) > 5  # the choices do differ


def test_cached_hidden_states_equal_those_computed_at_once():
    model = make_model(scale=3.0).double()
    ids = random_ids(SMALL, 2, 16)
    cache = KVCache(SMALL, 2, 16, torch.device("cpu"), torch.float64)
    with torch.no_grad():
        parts = [model.hidden_states(ids[:, :7], cache)]
        parts += [model.hidden_states(ids[:, at : at + 1], cache) for at in range(7, 16)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model.hidden_states(ids))


def test_unwritten_slots_of_the_cache_are_never_looked_at():
    model = make_model(scale=3.0)
    ids = random_ids(SMALL, 1, 5)
    cache = KVCache(SMALL, 1, 16, torch.device("cpu"), torch.float32)
    for layer in cache.layers:
        layer.keys.fill_(1e6)
        layer.values.fill_(1e6)
    with torch.no_grad():
        model.hidden_states(ids[:, :4], cache)
        last = model.hidden_states(ids[:, 4:], cache)[:, 0]
        torch.testing.assert_close(last, model.hidden_states(ids)[:, 4])


def test_the_cache_reaches_further_every_128_tokens_and_never_past_the_context():
    config = GPTConfig(vocab_size=97, block_size=300, n_layer=2, n_head=2, n_embd=16)
    model = make_model(config, scale=3.0)
    ids = random_ids(config, 2, 300)
    cache = KVCache(config, 2, 300, torch.device("cpu"), torch.float32)
    reaches, hidden = [], []
    with torch.no_grad():
        for position in range(300):
            reaches.append(cache.reach)
            hidden.append(model.hidden_states(ids[:, position : position + 1], cache))
        torch.testing.assert_close(torch.cat(hidden, dim=1), model.hidden_states(ids))
    assert reaches == [128] * 128 + [256] * 128 + [300] * 44


@pytest.mark.parametrize(("tokens", "slots"), [(1, 128), (128, 128), (129, 256), (257, 300)])
def test_the_cache_has_room_for_what_is_to_come_and_no_more(tokens, slots):
    config = GPTConfig(vocab_size=97, block_size=300, n_layer=1, n_head=2, n_embd=16)
    cache = KVCache(config, 2, tokens, torch.device("cpu"), torch.float32)
    assert cache.layers[0].keys.shape == cache.layers[0].values.shape == (2, 2, slots, 8)
    with pytest.raises(ValueError, match=f"301 tokens, the cache holds {slots}"):
        cache.begin(301)


def test_tokens_past_the_context_or_many_after_cached_ones_are_errors():
    model = make_model()
    with pytest.raises(ValueError, match="17 tokens, the context holds 16"):
        model(random_ids(SMALL, 1, 17))
    cache = KVCache(SMALL, 1, 16, torch.device("cpu"), torch.float32)
    model.hidden_states(random_ids(SMALL, 1, 3), cache)
    with pytest.raises(ValueError, match="2 tokens at once after 3 cached"):
        model.hidden_states(random_ids(SMALL, 1, 2), cache)


def test_the_same_seed_generates_the_same_tokens_and_another_seed_others():
    model, ids = make_model(), random_ids(SMALL, 2, 3)

    def draw(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [ids.tolist() for ids in model.generate(ids, 20, generator=generator)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_temperature_zero_takes_the_likeliest():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 4.0, 4.9]])
    assert choose_next(logits, temperature=0).tolist() == [1, 0]


def test_a_top_p_of_1_leaves_every_token_in():
    logits = 4 * torch.randn(1, 50_257, generator=torch.Generator().manual_seed(0))
    assert torch.equal(next_probabilities(logits, 1.0, top_p=1.0), next_probabilities(logits, 1.0))


@pytest.mark.parametrize("options", [{"temperature": 1e-40}, {"top_p": 1e-50}])
def test_the_smallest_temperature_and_top_p_take_the_likeliest(options):
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 4.0, 4.9]])
    assert choose_next(logits, **options).tolist() == [1, 0]


@given(
    logits=st.lists(st.floats(-5, 5), min_size=2, max_size=12),
    temperature=st.floats(0.1, 3),
    top_k=st.none() | st.integers(1, 20),
    top_p=st.none() | st.floats(0.01, 1),
    seed=st.integers(0, 2**32),
)
@example(logits=[0, 0, 0, 2, 1, 6e-8], temperature=1, top_k=3, top_p=None, seed=0)  # nearly a tie
@settings(max_examples=300, deadline=None)
def test_only_tokens_that_top_k_and_top_p_allow_are_drawn(logits, temperature, top_k, top_p, seed):
    generator = torch.Generator().manual_seed(seed)
    row = torch.tensor([logits])
    chosen = choose_next(row, temperature, top_k, top_p, generator).item()
    probabilities = (row[0] / temperature).softmax(0)
    if top_k is not None:
        kth = row[0].sort(descending=True).values[:top_k][-1]
        assert row[0, chosen] >= kth
        probabilities = torch.where(row[0] >= kth, probabilities, 0.0)
        probabilities = probabilities / probabilities.sum()
    if top_p is not None:
        likelier = probabilities[probabilities > probabilities[chosen] + 1e-6].sum()
        assert likelier < top_p + 1e-5


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    expected = (logits / 0.7).softmax(0)
    drawn = choose_next(logits.expand(200_000, -1), 0.7, generator=torch.Generator().manual_seed(0))
    frequency = drawn.bincount(minlength=4) / len(drawn)
    # Five standard errors of a frequency over 200,000 draws are at most 0.0056.
    assert (frequency - expected).abs().max() < 0.0056


def test_top_k_is_so_many_also_where_logits_are_equal():
    """In bfloat16, with its few digits, they often are."""
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 2.0]]).bfloat16()
    for top_k in range(1, 6):
        weights = next_probabilities(logits, 1.0, top_k=top_k)
        assert weights.count_nonzero() == top_k
        assert weights[0].argmax() in (1, 2, 3)
    assert next_probabilities(logits, 1.0, top_k=9).count_nonzero() == 5


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_layer_norms_in_bfloat16_are_sums_over_all_tokens(compiled):
    """Of 8,192 rows PyTorch's own kernel for CPUs loses a third."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=97, block_size=128, n_layer=1, n_head=2, n_embd=64))
    ids, targets = torch.randint(97, (2, 64, 128))
    model(ids, targets).backward()
    exact = {name: p.grad.clone() for name, p in model.named_parameters() if "ln" in name}
    model.zero_grad()
    if compiled:
        model.compile_parts()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, targets)
    loss.backward()
    for name, parameter in model.named_parameters():
        if "ln" in name:
            error = (parameter.grad - exact[name]).norm() / exact[name].norm()
            assert error < 0.05, name


def test_a_text_may_be_longer_than_the_first_block_of_the_cache():
    """It is made of blocks of 128 slots."""
    config = GPTConfig(vocab_size=97, block_size=300, n_layer=2, n_head=2, n_embd=16)
    model, ids = make_model(config, scale=3.0), random_ids(config, 2, 5)
    with torch.no_grad():
        model.wpe.weight.mul_(20)
        expected = greedy_without_cache(model, ids, count=140)
    assert torch.equal(torch.stack(list(model.generate(ids, 140, temperature=0))), expected)


def test_generate_computes_no_token_after_the_last():
    model, calls = make_model(), []
    plain = model.next_logits
    model.next_logits = lambda ids, cache: calls.append(ids.size(1)) or plain(ids, cache)
    assert len(list(model.generate(random_ids(SMALL, 1, 3), 4, temperature=0))) == 4
    assert calls == [3, 1, 1, 1]


def test_recomputing_is_for_gradients_alone(monkeypatch):
    model = make_model(replace(SMALL, recompute=True)).train()
    monkeypatch.setattr("model.checkpoint", lambda *_, **__: pytest.fail("without need"))
    with torch.no_grad():
        model(random_ids(SMALL, 1, 8))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"dropout": 1.0}, "dropout is"),
        ({"n_layer": 0}, "below 1"),
        ({"vocab_size": 2**31}, "above 2,147"),
    ],
)
def test_a_shape_at_the_edge_of_what_can_be_is_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        GPTConfig(**wrong)


def test_dropout_is_after_the_embeddings_and_after_each_sublayer():
    model, seen = GPT(replace(SMALL, n_layer=2, dropout=0.5)), []
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    model(random_ids(SMALL, 1, 8))
    blocks = [(f"h.{at}.attn.resid_dropout", f"h.{at}.mlp.dropout") for at in range(2)]
    assert seen == ["drop", *blocks[0], *blocks[1]]


def test_top_p_keeps_no_more_than_reach_it():
    assert next_probabilities(torch.zeros(1, 4), 1.0, top_p=0.5).tolist() == [[0.25, 0.25, 0, 0]]


def test_a_temperature_that_float32_takes_for_0_takes_the_likeliest():
    assert choose_next(torch.tensor([[0.0, 3.0, 1.0]]), temperature=1e-50).tolist() == [1]

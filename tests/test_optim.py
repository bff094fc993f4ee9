"""Who decays, and how the learning rate goes."""

from __future__ import annotations

import math

import pytest
import torch
from test_step import ALONE
from torch.torch_version import TorchVersion

from common.errors import UserError
from config import OptimSettings
from distributed import Ranks
from model import GPT, GPTConfig
from optim import (
    FALLS,
    OTHER,
    drop_average,
    last_at_peak,
    learning_rate_at,
    make_optimizer,
    parameter_groups,
    swap_average,
    update_average,
)

SMALL = GPTConfig(vocab_size=50, block_size=8, n_layer=2, n_head=2, n_embd=16)


def test_matrices_and_embeddings_decay_biases_and_norms_do_not():
    model = GPT(SMALL)
    decayed, undecayed = parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.1, 0.0)
    for parameter in undecayed["params"]:
        name = names[id(parameter)]
        assert name.endswith("bias") or ".ln_" in name or name.startswith("ln_f")
    assert {names[id(p)] for p in decayed["params"]} >= {"wte.weight", "wpe.weight"}
    together = [*decayed["params"], *undecayed["params"]]
    assert sorted(map(id, together)) == sorted(names)


def test_an_apple_gpu_needs_a_pytorch_that_can_leave_updates_out(monkeypatch):
    ranks, model = Ranks(torch.device("mps")), GPT(GPTConfig(vocab_size=300, n_layer=1, n_embd=12))
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.12.1"))
    with pytest.raises(UserError, match="device mps: PyTorch 2.12.1 is too old for it; use 2.13"):
        make_optimizer(model, OptimSettings(), ranks)


def test_a_step_equals_adamw_as_written_in_its_paper():
    """Loshchilov and Hutter 2019, algorithm 2, in float64 for one matrix."""
    settings = OptimSettings(learning_rate=0.01, weight_decay=0.1)
    model = GPT(SMALL).double()
    optimizer = make_optimizer(model, settings, ALONE)
    weight = model.h[0].mlp.c_fc.weight
    expected, m, v = weight.detach().clone(), 0.0, 0.0
    for step in range(1, 4):
        optimizer.zero_grad()
        weight.grad = gradient = torch.randn(weight.shape, dtype=torch.float64)
        optimizer.step()
        m = 0.9 * m + 0.1 * gradient
        v = 0.95 * v + 0.05 * gradient**2
        update = (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        expected = expected - 0.01 * (update + 0.1 * expected)
    torch.testing.assert_close(weight.detach(), expected)


def test_the_learning_rate_warms_up_linearly_peaks_and_falls_by_a_cosine():
    settings = OptimSettings(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=9)
    rates = [learning_rate_at(step, settings, max_steps=110) for step in range(110)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert max(rates) == rates[9] == 1.0
    assert rates[59] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert rates[-1] == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in zip(rates[9:], rates[10:]))


@pytest.mark.parametrize(("schedule", "quarter"), [("cosine", 0.8536), ("linear", 0.75)])
def test_the_learning_rate_stays_at_its_peak_until_the_last_steps(schedule, quarter):
    settings = OptimSettings(
        learning_rate=1.0,
        min_learning_rate=0.0,
        warmup_steps=9,
        schedule=schedule,
        decay_steps=20,
    )
    rates = [learning_rate_at(step, settings, max_steps=100) for step in range(100)]
    assert rates[9:80] == [1.0] * 71
    assert all(later < earlier for earlier, later in zip(rates[79:], rates[80:]))
    assert rates[84] == pytest.approx(quarter, abs=1e-4)
    assert rates[89] == pytest.approx(0.5)
    assert rates[-1] == 0.0


def test_before_the_fall_nothing_depends_on_the_length_of_the_run():
    settings = OptimSettings(schedule="linear", decay_steps=20, warmup_steps=9)
    short, long = (
        [learning_rate_at(step, settings, max_steps) for step in range(80)]
        for max_steps in (100, 1000)
    )
    assert short == long


@pytest.mark.parametrize("decay_steps", [0, 1, 3, 50])
@pytest.mark.parametrize("schedule", FALLS)
@pytest.mark.parametrize("warmup_steps", [0, 1, 5, 50])
def test_the_learning_rate_is_never_zero_nor_above_its_peak(warmup_steps, schedule, decay_steps):
    settings = OptimSettings(
        learning_rate=1.0,
        min_learning_rate=0.1,
        warmup_steps=warmup_steps,
        schedule=schedule,
        decay_steps=decay_steps,
    )
    for max_steps in (1, 2, 5, 20):
        rates = [learning_rate_at(step, settings, max_steps) for step in range(max_steps)]
        assert all(0 < rate <= 1.0 for rate in rates)
        if last_at_peak(settings, max_steps) < max_steps - 1:
            assert rates[-1] == pytest.approx(0.1)  # the fall ends where it should


@pytest.mark.parametrize("steps", [100, 3_000])
def test_an_average_is_over_the_same_share_of_a_short_run_and_of_a_long_one(steps):
    """A weight is 0, and 1 in the last tenth: of that, 1 - 1/e and a bit come into the average."""
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    told = optimizer.state[weight]
    went, skipped = torch.tensor(0.0), torch.tensor(1.0)
    expected = 0.0
    for step in range(1, steps + 1):
        with torch.no_grad():
            weight.fill_(step > 0.9 * steps)
        update_average(optimizer, 0.1, step, went)
        update_average(optimizer, 0.1, step, skipped)
        expected += (weight[0].item() - expected) * 10 / (step + 9)
        assert told[OTHER].tolist() == pytest.approx([expected] * 2)
    assert 0.63 < expected < 0.66
    swap_average(optimizer)
    assert weight.tolist() == pytest.approx([expected] * 2) and told[OTHER].tolist() == [1.0, 1.0]
    drop_average(optimizer)
    swap_average(optimizer)
    assert weight.tolist() == pytest.approx([expected] * 2) and OTHER not in told


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_optimizer_has_the_betas_of_the_settings(name):
    settings = OptimSettings(name=name, beta1=0.8, beta2=0.99)
    model = GPT(GPTConfig(vocab_size=300, block_size=32, n_layer=1, n_head=1, n_embd=8))
    for group in make_optimizer(model, settings, Ranks(torch.device("cpu"))).param_groups:
        assert group["betas"] == (0.8, 0.99)


def test_an_apple_gpu_may_have_pytorch_213(monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.13.0"))
    model = GPT(GPTConfig(vocab_size=300, block_size=32, n_layer=1, n_head=1, n_embd=8))
    make_optimizer(model, OptimSettings(), Ranks(torch.device("mps")))

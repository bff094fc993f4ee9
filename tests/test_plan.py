"""What is told before the first step, and the estimate of memory."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import ROOT

import train
from distributed import Ranks
from model import GPT, GPTConfig, HeadLoss
from optim import learning_rate_at
from training.plan import estimated_memory, plan

ALONE = Ranks(torch.device("cpu"))


def test_the_plan_comes_before_the_first_step(call, tiny, shards, tmp_path):
    arguments = ("--data.dir", shards, "--train.out", tmp_path / "run", "--train.max_steps", 3)
    told = call("train", tiny, *arguments).err
    plan = told[: told.index("/3 [")]
    assert "512 tokens per step = processes 1 × micro-batches 8 × windows 2 × tokens 32" in plan
    assert "36,096 parameters, vocabulary bpe-300 of 300" in plan
    assert "3 steps take 1,536" in plan
    assert "GB per process" in plan


@pytest.mark.parametrize(
    ("fall", "steps", "told"),
    [
        (6, 11, None),
        (6, 10, "schedule    4 steps of warm-up and 6 of fall are too many for 10: lower"),
        (0, 6, None),
        (0, 5, "schedule    4 steps of warm-up are too many for 5: lower --optim.warmup_steps"),
    ],
)
def test_a_learning_rate_that_has_no_time_to_rise_or_fall_is_told(configure, fall, steps, told):
    changes = ("--optim.warmup_steps", 4, "--optim.decay_steps", fall, "--train.max_steps", steps)
    trainer = train.Trainer(configure(*changes), ALONE)
    shown, optim = plan(trainer.stepper, trainer.tokenizer), trainer.config.optim
    assert told in shown if told else "schedule" not in shown
    before_fall, last = (learning_rate_at(s, optim, steps) for s in (steps - 1 - fall, steps - 1))
    falls_in_time = last == optim.min_learning_rate and (
        before_fall == optim.learning_rate or not fall
    )
    assert falls_in_time == (told is None)


def test_much_memory_is_told_in_plain_digits(configure, monkeypatch):
    monkeypatch.setattr("training.plan.estimated_memory", lambda *some, **named: 123e9)
    trainer = train.Trainer(configure(), ALONE)
    assert "memory      about 120 GB" in plan(trainer.stepper, trainer.tokenizer)


def test_the_plan_counts_the_averages(configure, monkeypatch):
    monkeypatch.setattr(
        "training.plan.estimated_memory", lambda *some, **named: 4e9 + 1e9 * some[-1]
    )
    for share, told in ((0.0, "about 4 GB"), (0.1, "about 5 GB")):
        trainer = train.Trainer(configure("--optim.average_share", share), ALONE)
        assert told in plan(trainer.stepper, trainer.tokenizer)


def test_the_plan_counts_the_copies_of_sums_in_a_fixed_order(configure, monkeypatch):
    """8 micro-batches: 4 copies of the gradient at most. 3.9 of them were seen in 38 M numbers."""
    monkeypatch.setattr("training.plan.estimated_memory", lambda *some, **named: 4e9)
    monkeypatch.setattr(GPT, "num_parameters", lambda _: 250_000_000)
    for reduction, told in (("ddp", "about 4 GB"), ("canonical", "about 8 GB")):
        trainer = train.Trainer(configure("--train.reduction", reduction), ALONE)
        assert told in plan(trainer.stepper, trainer.tokenizer)


def bytes_kept(model: GPT, ids: torch.Tensor, dtype: torch.dtype) -> int:
    """What autograd keeps of the blocks for the backward pass, weights aside."""
    kept = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() % ids.numel() == 0:  # so many tokens that no weight has such a size
            kept[tensor.untyped_storage().data_ptr()] = (tensor, tensor.untyped_storage().nbytes())
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        model.hidden_states(ids)
    return sum(size for _, size in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_estimate_of_memory_is_near_what_autograd_keeps(dtype, recompute):
    """Per block: the difference between ten of them and two, so that the rest falls out."""
    ids = torch.zeros(7, 96, dtype=torch.long)
    kept, estimated = [], []
    for n_layer in (10, 2):
        shape = {"vocab_size": 11, "block_size": 96, "n_head": 1, "n_embd": 64}
        model = GPT(GPTConfig(n_layer=n_layer, recompute=recompute, **shape))
        kept.append(bytes_kept(model, ids, dtype))
        parameters = 16 * model.num_parameters()
        averaged = estimated_memory(model, ids.numel(), dtype, False, averaged=True)
        assert averaged - estimated_memory(model, ids.numel(), dtype, False) == parameters / 4
        estimated.append(estimated_memory(model, ids.numel(), dtype, False) - parameters)
    assert estimated[0] - estimated[1] == pytest.approx(kept[0] - kept[1], rel=0.15)


def test_the_estimate_of_memory_is_near_what_was_measured():
    """Steps of GPT-2 124M at four micro-batches, less what a process takes without a model."""
    measured = json.loads((ROOT / "results" / "memory.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        model = GPT(GPTConfig())
    for windows, peak in measured["peak_bytes"].items():
        estimated = estimated_memory(model, int(windows) * 1024, torch.bfloat16, compiled=True)
        assert estimated == pytest.approx(peak - measured["bytes_without_a_model"], rel=0.2)


def shown(configure, *changes: object) -> tuple[str, train.Trainer]:
    trainer = train.Trainer(configure(*changes), ALONE)
    return plan(trainer.stepper, trainer.tokenizer), trainer


def test_the_plan_tells_the_arithmetic(configure):
    told, trainer = shown(configure, "--train.max_steps", 1000)
    there, flops = len(trainer.stepper.stream), trainer.model.flops_per_token()
    assert f"{512 * flops:.3g} FLOP per step, {512_000 * flops:.3g} in all" in told
    assert f"1,000 steps take 512,000: {512_000 / there:.2f} epochs" in told


def test_the_plan_asks_for_the_memory_of_a_micro_batch(configure, monkeypatch):
    seen = []
    monkeypatch.setattr("training.plan.estimated_memory", lambda *some: seen.append(some[1:]) or 1)
    for compiled in ("true", "false"):
        shown(configure, "--train.compile", compiled)
    assert seen == [(64, torch.float32, True, False), (64, torch.float32, False, False)]


def test_the_plan_counts_what_ranks_exchange_in_a_fixed_order(configure, monkeypatch):
    monkeypatch.setattr("training.plan.estimated_memory", lambda *some: 4e9)
    monkeypatch.setattr(GPT, "num_parameters", lambda _: 250_000_000)
    changes = ("--train.reduction", "canonical", "--train.micro_batch_size", 16)
    trainer = train.Trainer(configure(*changes), ALONE)
    for size, told in ((1, "about 5 GB"), (2, "about 7 GB")):
        trainer.stepper.ranks = Ranks(torch.device("cpu"), world_size=size)
        assert told in plan(trainer.stepper, trainer.tokenizer)


@pytest.mark.parametrize(("compiled", "bytes_per_logit"), [(True, 2), (False, 18)])
def test_the_estimate_counts_the_logits_of_a_slice(compiled, bytes_per_logit):
    """More rows than a slice has are computed one slice after the other."""
    sizes = {"block_size": 1, "n_layer": 1, "n_head": 1, "n_embd": 1}
    (few, many, more), (others_few, others_many, others_more) = (
        [
            estimated_memory(model, tokens, torch.bfloat16, compiled) - 16 * model.num_parameters()
            for tokens in (64, HeadLoss.SLICE, 2 * HeadLoss.SLICE)
        ]
        for model in (GPT(GPTConfig(vocab_size=size, **sizes)) for size in (1000, 11))
    )
    logit = 989 * bytes_per_logit  # of the words that the other vocabulary lacks
    assert few - others_few == 64 * logit
    assert many - others_many == more - others_more == HeadLoss.SLICE * logit

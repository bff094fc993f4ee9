"""How AdamW and Muon are made, how weights are averaged, and how fast they go at each step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from common.errors import UserError
from config import OptimSettings
from distributed import Ranks
from model import GPT
from muon import Muon


def parameter_groups(model: GPT, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices and embeddings, which decay; biases and layer norms, which don't.

    A bias or a gain has no reason to be near 0, and there are few of them (GPT-3 paper, appendix B,
    gives the weight decay of 0.1; GPT-1 spared biases and gains, and this division is nanoGPT's).
    """
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def muon_groups(model: GPT, settings: OptimSettings) -> list[dict[str, object]]:
    """Four groups: of hidden matrices, for Muon, and of the rest, for AdamW, as above.

    Queries, keys and values come out of one parameter: three matrices.
    """
    qkv = [block.attn.c_attn.weight for block in model.h]
    others = [
        layer.weight
        for block in model.h
        for layer in (block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
    ]
    hidden = {*qkv, *others}
    groups = parameter_groups(model, settings.weight_decay)
    for group in groups:
        group["params"] = [p for p in group["params"] if p not in hidden]
    rate = settings.matrix_learning_rate / settings.learning_rate
    common = {"weight_decay": settings.weight_decay, "learning_rate_scale": rate}
    return [
        *groups,
        {"params": qkv, "matrices": 3, **common},
        {"params": others, "matrices": 1, **common},
    ]


def make_optimizer(model: GPT, settings: OptimSettings, ranks: Ranks) -> torch.optim.Optimizer:
    """AdamW or Muon, as `settings.name` says. eps is 1e-8 (GPT-3 paper).

    Fused: one pass over each parameter instead of a dozen. Raises UserError on Apple's GPUs before
    PyTorch 2.13, where that pass doesn't know which updates to leave out
    (https://github.com/pytorch/pytorch/pull/186360).
    """
    if ranks.device.type == "mps" and torch.__version__ < (2, 13):
        raise UserError(
            f"device mps: PyTorch {torch.__version__} is too old for it; use 2.13 or cpu"
        )
    common = {
        "lr": settings.learning_rate,
        "betas": (settings.beta1, settings.beta2),
        "eps": 1e-8,
        "fused": True,
    }
    if settings.name == "muon":
        return Muon(muon_groups(model, settings), ranks, **common)
    return torch.optim.AdamW(parameter_groups(model, settings.weight_decay), **common)


# The key in a parameter's state of its average or, while the two are swapped, of the parameter.
OTHER = "other"


@torch.no_grad()
def update_average(
    optimizer: torch.optim.Optimizer, share: float, step: int, skipped: Tensor
) -> None:
    """Move each parameter's average towards it, after step `step`, counted from 1.

    It is over about the last `share` of the steps: a moving average whose memory grows with the
    run, so that the first weights, which have learned nothing, are soon forgotten (Shamir and Zhang
    2013, polynomial-decay averaging, https://arxiv.org/abs/1212.1824; their η + 1 is 1 / share).
    Where `skipped`, a scalar on the device, is 1, it stays as it is.
    """
    pull = (1 - skipped) / (1 + share * (step - 1))
    for parameter, state in optimizer.state.items():
        if OTHER not in state:
            state[OTHER] = parameter.clone()
        state[OTHER].lerp_(parameter, pull)


@torch.no_grad()
def swap_average(optimizer: torch.optim.Optimizer) -> None:
    """Swap each parameter with its average, if it has one; a second call undoes it."""
    for parameter, state in optimizer.state.items():
        if OTHER in state:
            kept = parameter.clone()
            parameter.copy_(state[OTHER])
            state[OTHER].copy_(kept)


def drop_average(optimizer: torch.optim.Optimizer) -> None:
    """Keep no averages of parameters any more."""
    for state in optimizer.state.values():
        state.pop(OTHER, None)


# The decay's progress, 0 … 1 -> what is left to decay, 1 … 0.
FALLS: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
}


def last_at_peak(settings: OptimSettings, max_steps: int) -> int:
    """The step, counted from 0, after which the learning rate falls."""
    level = max_steps - 1 - settings.decay_steps if settings.decay_steps else 0
    return max(settings.warmup_steps, level)


def learning_rate_at(step: int, settings: OptimSettings, max_steps: int) -> float:
    """The learning rate of a step, counted from 0: a linear warm-up, the peak, its fall.

    Step 0 already learns (with a rate of 0 it would be wasted), step `warmup_steps` has the peak,
    and the last step has `min_learning_rate`. With `decay_steps` the peak lasts until the fall
    ("warmup-stable-decay": Hu et al. 2024, https://arxiv.org/abs/2404.06395; studied by Hägele et
    al. 2024, https://arxiv.org/abs/2405.18392), and up to there nothing depends on how long the run
    will be.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / (settings.warmup_steps + 1)
    peak = last_at_peak(settings, max_steps)
    progress = (step - peak) / max(1, max_steps - 1 - peak)
    fall, span = FALLS[settings.schedule], settings.learning_rate - settings.min_learning_rate
    return settings.min_learning_rate + span * fall(min(1.0, max(0.0, progress)))

"""Muon against torch.optim.Muon, against the singular value decomposition, and under faults."""

from __future__ import annotations

import copy
import math
import weakref

import pytest
import torch
from test_step import ALONE
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from config import OptimSettings
from distributed import Ranks
from model import GPT, GPTConfig
from muon import orthogonalise
from optim import make_optimizer

SMALL = GPTConfig(vocab_size=50, block_size=8, n_layer=2, n_head=2, n_embd=32)
SETTINGS = OptimSettings(
    name="muon", learning_rate=0.01, matrix_learning_rate=0.02, weight_decay=0.1
)


def loss_of(model: GPT, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(SMALL.vocab_size, (4, 9), generator=generator)
    return model(ids[:, :-1], ids[:, 1:])


@pytest.fixture
def arithmetic(monkeypatch):
    """arithmetic(dtype): what this machine's products are said to be quick in."""
    return lambda dtype: monkeypatch.setattr("muon.choose_dtype", lambda *_: dtype)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 16, 64), (2, 64, 16)])
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-4), (torch.float16, 1e-4), (torch.bfloat16, 0.03)]
)
def test_orthogonal_matrices_keep_their_directions_and_lose_their_lengths(
    arithmetic, dtype, error, shape
):
    arithmetic(dtype)
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    U, S, Vh = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonalise(matrices)
    assert found.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    found = found.float()
    core = U.mT @ found @ Vh.mT  # diagonal, if the directions are the same
    lengths = core.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(core, torch.diag_embed(lengths), atol=error, rtol=0)
    large = S > 0.05 * S.amax(dim=-1, keepdim=True)  # five iterations can't lift the tiniest
    assert 0.6 < lengths[large].min() < lengths.max() < 1.3
    assert not torch.equal(matrices, orthogonalise(matrices))


@pytest.mark.parametrize("shape", [(4, 384, 384), (4, 384, 1536), (4, 1536, 384)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_becomes_of_a_matrix_does_not_depend_on_how_many_are_beside_it(
    arithmetic, dtype, shape
):
    """Or the bits would depend on the number of ranks that share them."""
    arithmetic(dtype)
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    together = orthogonalise(matrices)
    for size in (1, 2):
        assert torch.equal(together, torch.cat([orthogonalise(x) for x in matrices.split(size)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_how_large_a_matrix_is_does_not_matter(arithmetic, dtype):
    """Clipped gradients are small. By powers of two, so that nothing is rounded otherwise."""
    arithmetic(dtype)
    torch.manual_seed(0)
    matrices = torch.randn(2, 16, 64)
    for factor in (2.0**-20, 2.0**20):
        assert torch.equal(orthogonalise(matrices * factor), orthogonalise(matrices))


def test_a_matrix_of_zeros_stays_one():
    assert torch.equal(orthogonalise(torch.zeros(1, 4, 8)), torch.zeros(1, 4, 8))


def test_matrices_step_as_with_torchs_muon_and_the_rest_as_with_adamw():
    torch.manual_seed(0)
    ours = GPT(SMALL)
    theirs = copy.deepcopy(ours)
    optimizer = make_optimizer(ours, SETTINGS, ALONE)
    for group in optimizer.param_groups:
        group["lr"] = SETTINGS.learning_rate * group.get("learning_rate_scale", 1.0)
    matrices = {name for name, p in theirs.named_parameters() if ".c_" in name and p.dim() == 2}
    named = dict(theirs.named_parameters())
    decayed = [p for name, p in named.items() if name not in matrices and p.dim() == 2]
    others = [p for p in named.values() if p.dim() == 1]
    muon = torch.optim.Muon([named[name] for name in matrices], lr=0.02, weight_decay=0.1)
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=0.01,
        betas=(0.9, 0.95),
    )
    before = copy.deepcopy(ours)
    for _ in range(3):
        for p, q in zip(ours.parameters(), theirs.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for one in (optimizer, muon, adamw):
            one.step()
    for (name, p), q, old in zip(ours.named_parameters(), theirs.parameters(), before.parameters()):
        moved = (p - old).norm()
        assert moved > 0
        if "c_attn.weight" in name:  # three matrices here, one there
            assert (p - q).norm() > 0.2 * moved, name
        elif "c_attn" not in name:  # torch's iteration is in bfloat16
            assert (p - q).norm() < 0.05 * moved, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_keys_and_values_are_matrices_of_their_own(arithmetic, dtype):
    arithmetic(dtype)
    torch.manual_seed(0)
    model = GPT(SMALL)
    optimizer = make_optimizer(model, SETTINGS, ALONE)
    loss_of(model, 0).backward()
    weight = model.h[1].attn.c_attn.weight
    before, gradient = weight.detach().clone(), weight.grad.clone()
    rate = next(g["lr"] for g in optimizer.param_groups if g.get("matrices") == 3)
    optimizer.step()
    momentum = gradient.lerp(torch.zeros_like(gradient).lerp(gradient, 0.05), 0.95)
    step = torch.cat([*orthogonalise(momentum.view(3, 32, 32))]).float()
    expected = before * (1 - rate * 0.1) - rate * step
    torch.testing.assert_close(weight.detach(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rank", range(4))
def test_a_rank_of_four_orthogonalises_a_fourth_of_the_matrices(monkeypatch, rank):
    """Of six queries, keys and values two; of two of another shape one, or none: zeros."""

    class Apart(Ranks):
        def gather(self, part: torch.Tensor) -> torch.Tensor:
            """As if the others' were the same."""
            return part.repeat(self.world_size, 1, 1)

    model, seen = GPT(SMALL), []
    ranks = Apart(rank=rank, local_rank=rank, world_size=4, device=torch.device("cpu"))
    optimizer = make_optimizer(model, SETTINGS, ranks)
    loss_of(model, 0).backward()
    monkeypatch.setattr("muon.orthogonalise", lambda some: seen.append(some) or some)
    optimizer.step()
    assert [len(some) for some in seen] == [2, 1, 1, 1]
    worked = [bool(some.any()) for some in seen]
    assert worked == [rank < 3, rank < 2, rank < 2, rank < 2]


class Memory(TorchDispatchMode):
    """Counts the bytes that are taken inside, until they are given back: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        given, made = (
            {
                id(one.untyped_storage()): one.untyped_storage()
                for one in tree_leaves(some)
                if isinstance(one, torch.Tensor)
            }
            for some in ((arguments, named), result)
        )
        for storage in (made[key] for key in made.keys() - given.keys()):
            self._add(storage.nbytes())
            weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, count: int) -> None:
        self.now += count
        self.most = max(self.most, self.now)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_takes_no_more_room_than_the_average_that_is_not_kept(arithmetic, dtype):
    """In bfloat16: 4 bytes for each number of the matrices, as plan.estimated_memory has it."""
    arithmetic(dtype)
    model = GPT(GPTConfig(vocab_size=50, block_size=8, n_layer=4, n_head=4, n_embd=128))
    optimizer = make_optimizer(model, SETTINGS, ALONE)
    loss_of(model, 0).backward()
    optimizer.step()
    with Memory() as memory:
        optimizer.step()
    count = sum(parameter.numel() for parameter in model.h.parameters() if parameter.dim() == 2)
    assert memory.now == 0
    assert 1.5 * dtype.itemsize < memory.most / count < 2.1 * dtype.itemsize


def test_matrices_and_embeddings_decay_and_vectors_do_not():
    """By rate × weight decay, where the gradient is 0 and nothing else happens."""
    model = GPT(SMALL)
    before = copy.deepcopy(model)
    optimizer = make_optimizer(model, SETTINGS, ALONE)
    for group in optimizer.param_groups:
        group["lr"] = SETTINGS.learning_rate * group.get("learning_rate_scale", 1.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for (name, after), old in zip(model.named_parameters(), before.parameters()):
        rate = 0.0 if old.dim() == 1 else 0.02 if ".c_" in name else 0.01
        torch.testing.assert_close(after, old * (1 - rate * 0.1), rtol=1e-6, atol=0, msg=name)


def test_a_step_that_is_skipped_changes_nothing():
    torch.manual_seed(0)
    model = GPT(SMALL)
    optimizer = make_optimizer(model, SETTINGS, ALONE)
    loss_of(model, 0).backward()
    optimizer.step()
    then = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    for parameter in model.parameters():
        parameter.grad.fill_(math.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    torch.testing.assert_close(
        [model.state_dict(), optimizer.state_dict()["state"]],
        [then[0], then[1]["state"]],
        rtol=0,
        atol=0,
    )


def test_it_learns_faster_than_adamw_at_the_same_small_task():
    def train(name: str) -> float:
        torch.manual_seed(0)
        model = GPT(SMALL)
        settings = OptimSettings(name=name, learning_rate=3e-3, weight_decay=0.0)
        optimizer = make_optimizer(model, settings, ALONE)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * group.get("learning_rate_scale", 1.0)
        for _ in range(20):
            optimizer.zero_grad()
            loss = loss_of(model, 0)
            loss.backward()
            optimizer.step()
        return loss.item()

    assert train("muon") < train("adamw")

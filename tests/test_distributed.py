"""Sums in a fixed order, and processes that meet in a store full of old words."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore, Store

from distributed import TreeSum, name_attempt
from errors import UserError


@given(st.integers(1, 40), st.integers(0, 4), st.integers(0, 1000))
def test_a_tree_adds_up_to_the_same_bits_in_blocks_as_at_once(blocks, power, seed):
    size = 2**power
    generator = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(3, generator=generator) for _ in range(blocks * size)]
    whole, upper = TreeSum(), TreeSum()
    for leaf in leaves:
        whole.add(leaf.clone())
    for start in range(0, len(leaves), size):
        lower = TreeSum()
        for leaf in leaves[start : start + size]:
            lower.add(leaf.clone())
        upper.add(lower.result())
    total = whole.result()
    assert torch.equal(total, upper.result())
    torch.testing.assert_close(total, torch.stack(leaves).sum(dim=0))


# The name of an attempt


@pytest.fixture
def store() -> Store:
    """What outlives the processes."""
    store = HashStore()
    store.set_timeout(timedelta(seconds=20))
    return store


def attempt(store: Store, world_size: int, late: dict[int, float]) -> list[str]:
    """The names that the ranks come to, each of which starts so many seconds late."""

    def come(rank: int) -> str:
        time.sleep(late.get(rank, 0))
        return name_attempt(store, rank, world_size, timeout_seconds=20)

    with ThreadPoolExecutor(world_size) as threads:
        return list(threads.map(come, range(world_size)))


@pytest.mark.parametrize("late", [{}, {0: 0.3}, {1: 0.3}, {1: 0.3, 2: 0.3}])
def test_every_attempt_has_a_name_of_its_own_whoever_comes_last(store, late):
    names = [attempt(store, world_size, late) for world_size in (3, 3, 2, 3, 1)]
    assert all(len(set(each)) == 1 for each in names)
    assert len({each[0] for each in names}) == 5


def test_who_died_before_the_others_came_is_not_taken_for_the_one_that_comes(store):
    store.set_timeout(timedelta(seconds=0.1))
    with pytest.raises(UserError, match="rank 0 hasn't come within 0.1 s"):
        name_attempt(store, 1, 2, timeout_seconds=0.1)
    with pytest.raises(UserError, match="rank 1, 2 hasn't come within 0.1 s"):
        name_attempt(store, 0, 3, timeout_seconds=0.1)
    store.set_timeout(timedelta(seconds=20))
    assert len(set(attempt(store, 3, {1: 0.3}))) == 1

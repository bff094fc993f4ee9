"""Sums in a fixed order, and processes that meet in a store full of old words."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore, Store

import distributed
from common.errors import Stopped, UserError
from distributed import TreeSum, name_attempt, process_group
from training.guard import RollCall


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


def test_a_process_whose_peers_never_start_says_so(monkeypatch):
    """Started by hand: under torchrun, an agent keeps the store that all of them find."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", **address}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "GRACE", 0)
    with pytest.raises(UserError, match="can't meet the other processes: .*[Tt]imed out"):
        with process_group("cpu", timeout_seconds=1):
            pass


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2", "RANK": "0"},
        {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"},
    ],
)
def test_an_environment_that_names_peers_and_not_where_they_are_is_one_line(monkeypatch, variables):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="can't meet the other processes: "):
        with process_group("cpu", timeout_seconds=1):
            pass


@pytest.mark.parametrize(
    ("name", "value"),
    [("WORLD_SIZE", "x"), ("WORLD_SIZE", "0"), ("RANK", "2"), ("RANK", "-1"), ("LOCAL_RANK", "")],
)
def test_a_number_of_torchruns_that_cannot_be_is_one_line(monkeypatch, name, value):
    for key, text in {"WORLD_SIZE": "2", "RANK": "0", name: value}.items():
        monkeypatch.setenv(key, text)
    with pytest.raises(UserError, match=f"^{name} is '{value}', expected a number from "):
        with process_group("cpu", timeout_seconds=1):
            pass


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        (
            {"WORLD_SIZE": "2", "LOCAL_RANK": "x"},
            "LOCAL_RANK is 'x', expected a number from 0 to 1",
        ),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "device cuda:1: this machine shows 1 GPUs"),
        ({"LOCAL_RANK": "1", "RANK": "1"}, None),  # a world of one
    ],
)
def test_each_process_of_a_machine_has_a_gpu(monkeypatch, variables, told):
    chosen = []
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if told:
        with pytest.raises(UserError, match=told), process_group("cuda", timeout_seconds=1):
            pass
    else:
        with process_group("cuda", timeout_seconds=1) as ranks:
            assert (ranks.device, *chosen) == (torch.device("cuda", 0),) * 2


def test_a_number_too_long_to_be_read_is_one_line(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", 5000 * "9")
    with pytest.raises(UserError, match="^WORLD_SIZE is '9999999"):
        with process_group("cpu", timeout_seconds=1):
            pass


def test_processes_do_not_share_apples_gpu(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="device mps: several processes can't share it"):
        with process_group("mps", timeout_seconds=1):
            pass


def test_a_rank_without_a_world_is_alone(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with process_group("cpu", timeout_seconds=1) as ranks:
        assert (ranks.rank, ranks.world_size) == (0, 1)


def test_who_died_before_the_others_came_is_not_taken_for_the_one_that_comes(store):
    store.set_timeout(timedelta(seconds=0.1))
    with pytest.raises(UserError, match="rank 0 hasn't come within 0.1 s"):
        name_attempt(store, 1, 2, timeout_seconds=0.1)
    with pytest.raises(UserError, match="rank 1, 2 hasn't come within 0.1 s"):
        name_attempt(store, 0, 3, timeout_seconds=0.1)
    store.set_timeout(timedelta(seconds=20))
    assert len(set(attempt(store, 3, {1: 0.3}))) == 1


def test_whoever_waits_for_long_later_need_not_wait_for_long_at_the_start(monkeypatch, store):
    """As evaluate.py, whose first rank may be downloading a model."""
    waited = {}

    def name(store: Store, rank: int, world_size: int, seconds: float) -> str:
        waited["name"] = seconds
        return "attempt"

    def begin(**options: object) -> None:
        waited["collectives"] = options["timeout"].total_seconds()
        raise UserError("far enough")

    def meet(*_: object, timeout: timedelta) -> Iterator:
        waited["meet"] = timeout.total_seconds()
        yield (store,)

    for key, value in {"WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(distributed, "name_attempt", name)
    monkeypatch.setattr(distributed.dist, "rendezvous", meet)
    monkeypatch.setattr(distributed.dist, "init_process_group", begin)
    monkeypatch.setattr(distributed, "GRACE", 1)
    with pytest.raises(UserError, match="far enough"), process_group("cpu", 100, 10):
        pass
    assert waited == {"meet": 11, "name": 11, "collectives": 101}


# Leaving


@pytest.mark.parametrize(
    ("ending", "leaves"),
    [
        (None, True),
        (None, "fails"),
        (Stopped("stopped", 15), True),
        (UserError("bad"), False),
        (MemoryError(), False),
    ],
)
def test_a_rank_that_fails_does_not_wait_for_the_others_to_leave(monkeypatch, ending, leaves):
    """As NCCL's destroy would. All of them finish, or are stopped, together.

    And the group that was left isn't freed: gloo's may wait for ever then.
    """
    store, done, group = HashStore(), [], object()
    monkeypatch.setattr(distributed, "LEFT", [])
    monkeypatch.setattr(distributed.dist, "group", SimpleNamespace(WORLD=group))
    for name, value in {"WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    roll_call = RollCall(store, 0, 2, timeout_seconds=60)
    monkeypatch.setattr(distributed.dist, "rendezvous", lambda *_, **__: iter([(store,)]))
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda **_: None)

    def leave() -> None:
        done.append("left")
        assert not roll_call.closed.is_set()  # it may have to wait for one that fails yet
        if leaves == "fails":
            raise RuntimeError("can't leave")

    monkeypatch.setattr(distributed.dist, "destroy_process_group", leave)
    monkeypatch.setattr(distributed, "name_attempt", lambda *_: "attempt")
    monkeypatch.setattr(distributed, "_begin_roll_call", lambda *_: roll_call)
    failure = RuntimeError if leaves == "fails" else type(ending)
    with pytest.raises(failure) if ending or leaves == "fails" else nullcontext():
        with process_group("cpu", timeout_seconds=60):
            if ending:
                raise ending
    assert done == ["left"] * bool(leaves)
    assert distributed.LEFT == [group] * bool(leaves)
    assert roll_call.closed.is_set()
    assert store.check(["failed"]) == (not leaves)

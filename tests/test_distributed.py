"""Sums in a fixed order, a device's moments, processes that meet in a store full of old words."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore, Store

from distributed import Moment, Ranks, TreeSum, name_attempt
from errors import UserError
from metrics import Speed
from step import StepResult


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


PAGE_FAULTS = """
import resource, sys
import torch
from distributed import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(20):  # until the heap has its shape
    torch.ones(25_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(25_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs the GNU C library")
def test_memory_that_is_freed_is_used_again_without_asking_the_system():
    def page_faults(mode: str) -> int:
        command = [sys.executable, "-c", PAGE_FAULTS, mode]
        return int(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)

    assert page_faults("let go") > 1000  # pages of 4 KB: some 24,000 for each of the ten
    assert page_faults("keep") < 100


@pytest.fixture(params=["cpu", "cuda"])
def clock(request, monkeypatch) -> SimpleNamespace:
    """A device's clock: `now`, and how far the CPU has gone on by itself, `cpu`."""
    clock = SimpleNamespace(now=100.0, cpu=100.0, device=torch.device(request.param))

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: torch.device) -> None:
            assert stream == clock.device
            self.time = clock.now

        def synchronize(self) -> None:
            clock.cpu = max(clock.cpu, self.time)

        def elapsed_time(self, later: Event) -> float:
            return 1000 * (later.time - self.time)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    on_cpu = request.param == "cpu"
    reading = SimpleNamespace(perf_counter=lambda: clock.now if on_cpu else clock.cpu)
    monkeypatch.setattr("distributed.time", reading)
    monkeypatch.setattr("metrics.peak_flops", lambda device: 1000.0)
    return clock


def test_speed_is_told_by_when_steps_end_not_by_when_they_are_looked_at(clock):
    speed = Speed(0, 2, Ranks(rank=0, local_rank=0, world_size=1, device=clock.device))
    ends = []
    for clock.now in (101.0, 103.0):
        ends.append(Moment(clock.device))
    assert speed.measure(400, ends[0]) == (400.0, 0.8)
    assert speed.measure(1200, ends[1]) == (400.0, 0.8)
    for clock.now in (104.0, 110.0):
        with speed.paused():
            clock.now += 5
    clock.now = 117.0
    assert speed.measure(2800, Moment(clock.device)) == (400.0, 0.8)  # 14 s, ten of them paused
    clock.now = 118.0
    assert speed.measure(3200, Moment(clock.device)) == (400.0, 0.8)
    assert clock.cpu == (100.0 if clock.device.type == "cpu" else 118.0)


def test_what_a_step_tells_is_read_when_it_has_arrived(clock):
    """On a GPU the copy is begun, then its moment is noted, and that is waited for."""
    copied = []

    class Numbers:
        device, is_cuda = clock.device, clock.device.type == "cuda"

        def to(self, device: str, non_blocking: bool) -> torch.Tensor:
            assert (device, non_blocking) == ("cpu", self.is_cuda)
            clock.now += 5  # until the copy is there
            copied.append(clock.now)
            return torch.tensor([2.5, 1.0, 0.0, 0.0])

    result = StepResult(1, 0.1, Numbers())
    assert result.is_queued == Numbers.is_cuda
    assert clock.cpu == 100.0
    assert result.loss == 2.5
    assert clock.cpu == (copied[0] if Numbers.is_cuda else 100.0)

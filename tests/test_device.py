"""What a device is chosen for, how it is waited for, and what its clock says."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from common.device import Moment, choose_device, memory_errors, peak_memory
from common.errors import UserError
from distributed import Ranks
from step import StepResult
from training.metrics import Speed


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
        RuntimeError("CUDA error: out of memory"),  # of pinned memory, a graph, NCCL
        MemoryError(),
        RuntimeError("unable to mmap 9 bytes from file <a>: Cannot allocate memory (12)"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("Storage size calculation overflowed with sizes=[4611686018427387904, 2]"),
    ],
)
def test_memory_that_ran_out_is_told_with_advice(error):
    with pytest.raises(UserError, match="^out of memory: take less$"):
        with memory_errors("take less"):
            raise error


def test_other_errors_are_no_lack_of_memory():
    with pytest.raises(RuntimeError, match="shapes"):
        with memory_errors("take less"):
            raise RuntimeError("shapes don't fit")


@pytest.mark.parametrize(
    ("count", "advice"),
    [
        (0, "device cuda: no NVIDIA GPU can be seen by this PyTorch"),
        (1, "device cuda:1: this machine shows 1 GPUs; start no more processes than that"),
    ],
)
def test_a_gpu_that_is_not_there_is_told_with_advice(monkeypatch, count, advice):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(UserError, match=advice):
        choose_device("cuda", local_rank=1)


def test_apples_gpu_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="device mps: this machine has none; use cpu"):
        choose_device("mps")


PAGE_FAULTS = """
import resource, sys
import torch
from common.device import keep_freed_memory

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


PEAK_MEMORY = """
import torch
from common.device import peak_memory

print(peak_memory(torch.device("cpu")))
torch.ones(100_000_000)
print(peak_memory(torch.device("cpu")))
"""
# A parent that was large: on Linux, getrusage would tell the child of that.
PARENT = """
import subprocess, sys

bytes(1_000_000_000).find(1)
subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)
"""


@pytest.mark.parametrize("parent", [(), (PARENT,)])
def test_the_most_memory_that_was_held_is_told_after_it_was_freed(parent):
    command = [sys.executable, "-c", *parent, PEAK_MEMORY]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    before, after = map(int, told.split())
    assert before < 0.9e9
    assert before + 0.39e9 < after < before + 0.45e9


def test_a_system_that_does_not_tell_the_most_memory_there_is_asked_elsewhere(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self: "Name:\tpython\n")  # as gVisor
    assert peak_memory(torch.device("cpu")) > 1e8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpus_memory_is_that_of_tensors():
    device = torch.device("cuda")
    before = peak_memory(device)
    torch.ones(before // 4 + 25_000_000, device=device)
    assert before + 1e8 <= peak_memory(device) < before + 1.1e8 + torch.cuda.memory_allocated()


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
    monkeypatch.setattr("common.device.time", reading)
    monkeypatch.setattr("training.metrics.peak_flops", lambda device: 1000.0)
    return clock


def test_speed_is_told_by_when_steps_end_not_by_when_they_are_looked_at(clock):
    speed = Speed(0, 2, Ranks(clock.device))
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
    four = Speed(0, 2, Ranks(clock.device, world_size=4))  # whose tokens are those of all
    clock.now = 119.0
    assert four.measure(400, Moment(clock.device)) == (400.0, 0.2)


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

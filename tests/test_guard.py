"""A spike is told from what was normal; a second signal ends the process."""

from __future__ import annotations

import math
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from distributed import TreeSum
from guard import WINDOW, SpikeFilter


def normal_norms(count: int) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    return (1 + 0.1 * torch.randn(count, generator=generator)).tolist()


def feed(spikes: SpikeFilter, norms: list[float]) -> list[bool]:
    return [bool(spikes.is_spike(torch.tensor(norm))) for norm in norms]


def test_a_spike_stands_out_by_its_z_score_and_leaves_no_trace():
    spikes = SpikeFilter(5.0, torch.device("cpu"))
    norms = normal_norms(3 * WINDOW)
    assert not any(feed(spikes, norms))
    last = torch.tensor(norms[-WINDOW:])
    mean, deviation = last.mean().item(), last.std().item()
    before = spikes.norms.clone()
    assert feed(spikes, [mean + 5.1 * deviation, math.inf, math.nan]) == [True, True, False]
    assert torch.equal(spikes.norms, before)
    assert feed(spikes, [mean + 4.9 * deviation]) == [False]


def test_before_the_window_is_full_and_without_a_limit_nothing_is_a_spike():
    assert not any(feed(SpikeFilter(5.0, torch.device("cpu")), [1.0] * (WINDOW - 1) + [1000.0]))
    assert not any(feed(SpikeFilter(0.0, torch.device("cpu")), [1.0] * 2 * WINDOW + [1000.0]))


@pytest.mark.parametrize("at", [10, WINDOW, WINDOW + 50])
def test_a_filter_goes_on_from_its_memory(at):
    norms = [*normal_norms(200), 9.0, 1.0]
    whole, parts = (SpikeFilter(5.0, torch.device("cpu")) for _ in range(2))
    expected = feed(whole, norms)
    feed(parts, norms[:at])
    again = SpikeFilter(5.0, torch.device("cpu"))
    again.remember(parts.memory())
    assert feed(again, norms[at:]) == expected[at:]
    assert torch.equal(again.norms, whole.norms)


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


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_the_same_signal_twice_ends_the_process_at_once(name):
    number = getattr(signal, name)
    code = (
        "import time, guard\n"
        "with guard.StopRequest() as stop:\n"
        "    print('ready', flush=True)\n"
        "    while not stop.number: time.sleep(0.01)\n"
        "    print(stop.number, flush=True)\n"
        "    time.sleep(600)\n"
    )
    words = [sys.executable, "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, cwd=ROOT, **pipes) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(number)
            assert process.stdout.readline() == f"{number.value}\n"
            process.send_signal(number)
            assert process.wait(timeout=60) == -number
            assert f"{name}: stopping after this step" in process.stderr.read()
        finally:
            process.kill()

"""A spike is told from what was normal; a second signal ends the process; who is late is named."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from conftest import ROOT
from torch.distributed import DistNetworkError, HashStore

from common.errors import Stopped, UserError
from training.guard import (
    ECHO_SECONDS,
    STORE_IS_GONE,
    WINDOW,
    RollCall,
    SpikeFilter,
    SpikeMemory,
    StopRequest,
)


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


@pytest.mark.parametrize(
    ("norms", "count"), [(WINDOW - 1, 0), (WINDOW + 1, 0), (WINDOW, -1), (WINDOW, 2**62)]
)
def test_a_memory_of_another_length_or_count_is_none(norms, count):
    SpikeMemory((1.0,) * WINDOW, 2**62 - 1)
    with pytest.raises(ValueError, match=f"has {norms} norms and the count {count}"):
        SpikeMemory((1.0,) * norms, count)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_that_comes_again_is_the_same_request_at_once_and_later_ends_the_process(name):
    """At once: torchrun hands on what its workers have got already."""
    number = getattr(signal, name)
    code = (
        "import hashlib, time\nfrom training import guard\n"
        "with guard.StopRequest() as stop:\n"
        "    print('ready', flush=True)\n"
        "    while not stop.number: time.sleep(0.01)\n"
        "    print(stop.number, flush=True)\n"
        "    print(input(), flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)\n"  # no handler of Python's runs in it
    )
    words = [sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    heard = partial(signal.signal, number, signal.SIG_DFL)  # nohup has SIGHUP ignored
    with subprocess.Popen(words, cwd=ROOT, text=True, preexec_fn=heard, **pipes) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(number)
            assert process.stdout.readline() == f"{number.value}\n"
            for _ in range(3):
                process.send_signal(number)
                time.sleep(0.1)
            time.sleep(ECHO_SECONDS)
            assert process.poll() is None
            process.stdin.write("busy\n")
            process.stdin.flush()
            assert process.stdout.readline() == "busy\n"
            time.sleep(0.5)
            process.send_signal(number)
            assert process.wait(timeout=60) == 128 + number
            told = process.stderr.read()
            assert told.count(f"{name}: stopping after this step") == 1
        finally:
            process.kill()


def test_a_signal_is_what_it_was_when_nobody_listens_any_more():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_run_under_nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.2)
            assert not stop.number
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# Who keeps the others waiting


def roll_calls(store, timeout_seconds: float = 0.05) -> list[RollCall]:
    """Those of two ranks."""
    return [RollCall(store, rank, 2, timeout_seconds) for rank in range(2)]


def test_who_has_come_less_often_is_named_when_the_time_is_over():
    first, second = roll_calls(HashStore())
    first.arrive()
    assert first.complaint() is None  # not yet
    time.sleep(0.1)
    assert f"rank 1 on {socket.gethostname()} kept the others waiting" in first.complaint()
    assert second.complaint() is None  # the one that is late blames nobody
    second.arrive()
    assert first.complaint() is None


def test_a_rank_that_comes_on_while_it_asks_for_the_others_blames_nobody():
    """It worked by itself for long, and so did the others; they are only asked one by one."""

    class SlowStore(HashStore):
        def get(self, key: str) -> bytes:
            if key == "1":
                first.arrive()
            return super().get(key)

    first, _ = roll_calls(SlowStore())
    time.sleep(0.1)
    assert first.complaint() is None


def test_a_store_that_is_gone_is_told():
    class LostStore(HashStore):
        def get(self, key: str) -> bytes:
            raise DistNetworkError("Connection reset by peer")

    first, _ = roll_calls(LostStore())
    time.sleep(0.1)
    assert first.complaint() == STORE_IS_GONE
    assert STORE_IS_GONE.startswith("torchrun or rank 0 has ended")  # rank 0 may be who says it


def test_a_store_that_does_not_answer_is_told_too(monkeypatch):
    """As one beyond a cable that was cut: the connection stands, and nothing comes."""

    class MuteStore(HashStore):
        def get(self, key: str) -> bytes:
            time.sleep(20)
            return super().get(key)

    monkeypatch.setattr("training.guard.ANSWER_SECONDS", 0.1)
    first, _ = roll_calls(MuteStore())
    time.sleep(0.1)
    asked = time.monotonic()
    assert first.complaint() == STORE_IS_GONE
    assert time.monotonic() - asked < 10


# Who was asked to stop, and who has failed


def test_what_one_rank_was_asked_for_the_others_get_to_know():
    first, second = roll_calls(HashStore())
    assert not first.stop_asked(False)
    assert second.stop_asked(True)
    assert first.stop_asked(False)


@pytest.mark.parametrize("error", [UserError, ZeroDivisionError, RuntimeError, KeyboardInterrupt])
def test_a_rank_that_cannot_reach_another_names_the_one_that_failed(error):
    first, second = roll_calls(HashStore())
    with pytest.raises(error, match="^its own$"), second.telling_failures():
        raise error("its own")
    with pytest.raises(UserError, match=f"^rank 1 on {socket.gethostname()} has failed: see"):
        with first.telling_failures():
            raise RuntimeError("Connection closed by peer")


WAITING = """
import time
from torch.distributed import HashStore
from training import guard

guard.FAILURE_SECONDS = 0.5
first, second = (guard.RollCall(HashStore(), rank, 2, timeout_seconds=60) for rank in range(2))
second.store = first.store
first.watch()
try:
    with second.telling_failures():
        raise ZeroDivisionError
except ZeroDivisionError:
    print("failed", flush=True)
time.sleep(60)  # as in a kernel that waits for the other GPU
"""


def test_a_rank_that_waits_for_one_that_failed_does_not_wait_for_long():
    began = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", WAITING], cwd=ROOT, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (1, "failed\n")
    here = socket.gethostname()
    told = f"rank 1 on {here} has failed: see what it said"
    assert result.stderr == f"\nerror: [rank 0 on {here}] {told}\n"
    assert time.monotonic() - began < 40


LATE = """
import os, time
from torch.distributed import HashStore
from training import guard

first, _ = (guard.RollCall(store, rank, 2, 0.5) for store in [HashStore()] for rank in range(2))
guard.os._exit = lambda status: (print(first.store.check(["failed"]), flush=True), os.abort())
first.arrive()
first.watch()
time.sleep(60)
"""


def test_who_ends_because_another_is_late_has_said_so_where_that_one_sees_it():
    result = subprocess.run([sys.executable, "-c", LATE], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "True\n"
    assert "kept the others waiting" in result.stderr


HOST = """
import time
from torch.distributed import TCPStore
from training.guard import RollCall

store = TCPStore("127.0.0.1", 0, is_master=True)
call = RollCall(store, 0, 2, timeout_seconds=60)
print(store.port, flush=True)
store.wait(["1"])  # the other is there
store.set("failed", "rank 0 on its machine")
time.sleep(2)
"""
GUEST = """
import sys, time
from torch.distributed import TCPStore
from training import guard

guard.FAILURE_SECONDS = 4
store = TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False)
guard.RollCall(store, 1, 2, timeout_seconds=60).watch()
time.sleep(60)
"""


def test_who_has_failed_is_remembered_when_the_store_goes_with_it():
    """As rank 0's machine does."""
    python = [sys.executable, "-c"]
    with subprocess.Popen([*python, HOST], cwd=ROOT, stdout=subprocess.PIPE, text=True) as host:
        port = host.stdout.readline().strip()
        guest = subprocess.run([*python, GUEST, port], cwd=ROOT, capture_output=True, text=True)
    assert guest.returncode == 1
    assert "rank 0 on its machine has failed: see what it said" in guest.stderr


def test_a_rank_that_fails_by_itself_says_so_though_another_has_failed():
    first, second = roll_calls(HashStore())
    for rank in (second, first):
        with pytest.raises(UserError, match="^its own$"), rank.telling_failures():
            raise UserError("its own")


def test_a_rank_that_cannot_reach_the_store_says_so_or_what_failed_before():
    class LostStore(HashStore):
        def check(self, keys: list[str]) -> bool:
            raise DistNetworkError("Connection reset by peer")

        def set(self, key: str, value: str) -> None:
            if key == "failed":
                raise DistNetworkError("Broken pipe")
            super().set(key, value)

    first, second = roll_calls(LostStore())
    with pytest.raises(UserError, match=f"^{STORE_IS_GONE}$"), first.telling_failures():
        raise RuntimeError("Connection closed by peer")
    with pytest.raises(UserError, match="^its own$"), second.telling_failures():
        raise UserError("its own")


def test_a_rank_that_stops_as_asked_has_not_failed():
    first, second = roll_calls(HashStore())
    with pytest.raises(Stopped), second.telling_failures():
        raise Stopped("stopped", signal.SIGTERM)
    with pytest.raises(RuntimeError, match="^its own$"), first.telling_failures():
        raise RuntimeError("its own")


def test_an_answer_that_is_out_of_date_blames_nobody():
    """Rank 1 was behind when it was asked for, and has come since."""

    class SlowStore(HashStore):
        def get(self, key: str) -> bytes:
            told = super().get(key)
            if key == "1":
                second.arrive()
                first.arrive()
            return told

    first, second = roll_calls(SlowStore())
    first.arrive()
    time.sleep(0.1)
    assert first.complaint() is None

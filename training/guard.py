"""What makes a run stop early or skip a step: signals, numbers that are not finite, a spike.

Signals and bad numbers go through the step's all-reduce, so that all ranks do the same at the same
step, and nobody waits for it. And a rank that stands still is noticed by the others, and named.
"""

from __future__ import annotations

import math
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed import Store

from common.errors import Stopped, UserError

Answer = TypeVar("Answer")

# A repeat that comes sooner is the same request: systemd, and often SLURM, signal torchrun and its
# workers together, and torchrun then hands the signal on to its workers.
ECHO_SECONDS = 2

# The store is torchrun's, or else rank 0's, and on that machine.
STORE_IS_GONE = "torchrun or rank 0 has ended, or its machine can't be reached"
ANSWER_SECONDS = 10  # that the store has for an answer; fewer than distributed.GRACE

# After a failure elsewhere, gloo tells who waits for that rank, at once; NCCL lets them wait.
FAILURE_SECONDS = 5

WINDOW = 128  # steps whose gradient norms a spike is told from


class StopRequest:
    """Whether this process was asked to end: SIGTERM, as schedulers send it, Ctrl-C, or SIGHUP, as
    a closing terminal sends it.

    The first request is granted after a step, with a checkpoint. The same signal once more, later
    than `ECHO_SECONDS`, is the end at once. Signals are taken by a thread: the main one may be deep
    in torch, or wait for others, and would learn of the two together.
    """

    def __init__(self) -> None:
        self.number = 0  # of the signal that came

    def __enter__(self) -> StopRequest:
        self.before = {number: signal.signal(number, _nothing) for number in _requests()}
        ear, self.mouth = socket.socketpair()
        self.mouth.setblocking(False)
        self.fd_before = signal.set_wakeup_fd(self.mouth.fileno())
        threading.Thread(target=self._listen, args=(ear,), daemon=True, name="signals").start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self.fd_before)
        self.mouth.close()  # which ends the thread
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _listen(self, ear: socket.socket) -> None:
        """Take note of signals as they come, a byte each, until nobody can send any."""
        came: dict[int, float] = {}
        with ear:
            while told := ear.recv(1):
                number, now = told[0], time.monotonic()
                if number in self.before and now - came.setdefault(number, now) > ECHO_SECONDS:
                    os._exit(128 + number)
                if number in self.before and not self.number:
                    self.number = number
                    print(
                        f"\n{signal.Signals(number).name}: stopping after this step; once more, "
                        f"{ECHO_SECONDS} s from now, to stop at once",
                        file=sys.stderr,
                        flush=True,
                    )


def _requests() -> list[signal.Signals]:
    """The signals that ask for the end. nohup sees to it that SIGHUP is ignored: it stays so."""
    hang_up = getattr(signal, "SIGHUP", None)  # Windows has none
    heard = hang_up and signal.getsignal(hang_up) != signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([hang_up] if heard else [])]


def _nothing(number: int, frame: FrameType | None) -> None:
    """What the main thread does about a signal that another one listens to."""


@dataclass(frozen=True)
class SpikeMemory:
    """What a checkpoint keeps of a SpikeFilter."""

    norms: tuple[float, ...]
    count: int

    def __post_init__(self) -> None:
        if len(self.norms) != WINDOW or not 0 <= self.count < 2**62:
            raise ValueError(f"spikes has {len(self.norms)} norms and the count {self.count}")
        for norm in self.norms:
            if not 0 <= norm <= torch.finfo(torch.float32).max:
                raise ValueError(f"spikes has a norm of {norm}, which is none in float32")


class SpikeFilter:
    """Tells a gradient norm that is far above those of the last steps, by its z-score.

    It begins to judge when it has seen `WINDOW` norms. What is not finite or itself a spike is not
    remembered: it would make all that follows look small.
    """

    def __init__(self, limit: float, device: torch.device) -> None:
        """`limit`: in standard deviations above the mean; 0 lets everything pass."""
        self.limit = limit
        self.norms = torch.zeros(WINDOW, device=device)
        self.places = torch.arange(WINDOW, device=device)
        self.count = torch.zeros((), dtype=torch.long, device=device)  # remembered so far

    def is_spike(self, norm: Tensor) -> Tensor:
        """Whether the norm, a scalar, is a spike, as a boolean scalar; remembers it if it isn't."""
        if not self.limit:
            return torch.zeros_like(norm, dtype=torch.bool)
        far = norm - self.norms.mean() > self.limit * self.norms.std()
        spike = far & (self.count >= WINDOW)
        keep = norm.isfinite() & ~spike
        here = self.places == self.count % WINDOW  # an index would make the CPU wait for the GPU
        self.norms = torch.where(here & keep, norm, self.norms)
        self.count += keep
        return spike

    def memory(self) -> SpikeMemory:
        """What a checkpoint is to keep."""
        return SpikeMemory(tuple(self.norms.tolist()), int(self.count))

    def remember(self, memory: SpikeMemory) -> None:
        """Go on with what `memory` gave."""
        self.norms.copy_(torch.tensor(memory.norms))
        self.count.fill_(memory.count)


class RollCall:
    """Names a rank that has failed or keeps the others waiting, and ends the process that waits.

    Every rank counts how often it came to where ranks meet, and tells it a store that all of them
    reach. Who has waited for longer than the timeout looks up there who has come less often.
    """

    def __init__(self, store: Store, rank: int, world_size: int, timeout_seconds: float) -> None:
        """Every rank makes one; whoever calls then waits for all."""
        self.store, self.rank, self.world_size = store, rank, world_size
        self.timeout_seconds = timeout_seconds
        self.arrived = (0, time.monotonic())  # how often, and when the last time
        self._tell()
        self.closed = threading.Event()

    def arrive(self) -> None:
        """This rank has come to where it meets the others."""
        self.arrived = (self.arrived[0] + 1, time.monotonic())
        self._tell()

    def stop_asked(self, here: bool) -> bool:
        """Whether a rank was asked to stop: this one (`here`), or another that has said so here."""
        if here:
            self.store.set("stop", "")
        return here or self.store.check(["stop"])

    @contextmanager
    def telling_failures(self) -> Iterator[None]:
        """Let the others know of a failure inside. Where one of theirs is known, it is the reason.

        Who waits for a rank that has left gets an error from deep in torch (RuntimeError): instead
        of that, a UserError names the rank, whose own message says what went wrong.
        """
        try:
            yield
        except Stopped:  # as all have
            raise
        except BaseException as error:  # whatever it is, the others are told, and it goes on
            if isinstance(error, RuntimeError):
                try:
                    failed = self._failed()
                except RuntimeError:
                    failed = STORE_IS_GONE
                if failed:
                    raise UserError(failed) from error
            with suppress(RuntimeError):
                self._tell_failure()
            raise

    def _tell_failure(self) -> None:
        self.store.set("failed", f"rank {self.rank} on {socket.gethostname()}")

    def _failed(self) -> str | None:
        """Who has failed, if somebody has said so. Raises RuntimeError if the store is gone."""
        if not self.store.check(["failed"]):
            return None
        return f"{self.store.get('failed').decode()} has failed: see what it said"

    def _tell(self) -> None:
        self.store.set(str(self.rank), f"{self.arrived[0]} {socket.gethostname()}")

    def watch(self) -> None:
        """Look at the clock now and then, in a thread, until `close`."""
        threading.Thread(target=self._watch, daemon=True, name="roll call").start()

    def close(self) -> None:
        """Stop watching."""
        self.closed.set()

    def complaint(self) -> str | None:
        """Who keeps this rank waiting, if somebody has for too long."""
        arrived = count, since = self.arrived
        waited = time.monotonic() - since
        if waited <= self.timeout_seconds:
            return None
        told = self._answer(self._told)
        if told is None:
            return STORE_IS_GONE
        missing = [
            f"rank {rank} on {host}"
            for rank, (theirs, host) in enumerate(told)
            if int(theirs) < count
        ]
        if not missing or self.arrived is not arrived:  # the others were late, but have come
            return None
        return (
            f"{', '.join(missing)} kept the others waiting for {waited:.0f} s (in training, "
            "train.timeout_seconds): look into it, then give the same command again"
        )

    def _told(self) -> list[list[str]]:
        """What each rank has told last: [how often it came, host]."""
        return [self.store.get(str(rank)).decode().split() for rank in range(self.world_size)]

    def _answer(self, question: Callable[[], Answer]) -> Answer | None:
        """The store's answer to a question; None if none comes.

        The store's own timeout doesn't help: after it, a request waits for the store to confirm
        that it has been called off. So it is made by a thread that can be left to wait.
        """
        answers: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answers.put(question())
            except RuntimeError:
                answers.put(None)

        threading.Thread(target=ask, daemon=True, name="question").start()
        try:
            return answers.get(timeout=ANSWER_SECONDS)
        except queue.Empty:
            return None

    def _watch(self) -> None:
        failed, heard_at = None, math.inf
        while not self.closed.wait(min(1.0, self.timeout_seconds / 4)):
            if not failed and (failed := self._answer(self._failed)):
                heard_at = time.monotonic()  # the store may go with whoever failed
            is_over = time.monotonic() - heard_at > FAILURE_SECONDS
            if complaint := failed if is_over else self.complaint():
                here = f"[rank {self.rank} on {socket.gethostname()}]"
                if not failed and complaint != STORE_IS_GONE:  # who comes late is to see it here
                    self._answer(self._tell_failure)
                print(f"\nerror: {here} {complaint}", file=sys.stderr, flush=True)
                os._exit(1)

"""What makes a run stop early or pass over a step: a signal, numbers that are not finite, a spike.

All of it is decided on the device and from numbers that every rank has, so that all ranks do the
same at the same step, and nobody waits for it.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from types import FrameType

import torch
from torch import Tensor

WINDOW = 128  # steps whose gradient norms a spike is told from


class StopRequest:
    """Whether this process was asked to end: SIGTERM, as schedulers send it, or Ctrl-C.

    The first request is granted after a step, with a checkpoint. The same signal once more has its
    usual effect, which is the end, at once.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.number = 0  # of the signal that came

    def __enter__(self) -> StopRequest:
        self.before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        if not self.number:
            self.number = number
            name = signal.Signals(number).name
            told = f"\n{name}: stopping after this step; once more to stop at once\n"
            os.write(sys.stderr.fileno(), told.encode())  # print isn't safe in here


@dataclass(frozen=True)
class SpikeMemory:
    """What a checkpoint keeps of a SpikeFilter."""

    norms: tuple[float, ...]
    count: int

    def __post_init__(self) -> None:
        if len(self.norms) != WINDOW or self.count < 0:
            raise ValueError(f"spikes has {len(self.norms)} norms and the count {self.count}")


class SpikeFilter:
    """Tells a gradient norm that is far above those of the last steps, by its z-score.

    It begins to judge when it has seen `WINDOW` norms. What is not finite or itself a spike is not
    remembered: it would make all that follows look small.
    """

    def __init__(self, limit: float, device: torch.device) -> None:
        """`limit`: in standard deviations above the mean; 0 lets everything pass."""
        self.limit = limit
        self.norms = torch.zeros(WINDOW, device=device)
        self.count = torch.zeros((), dtype=torch.long, device=device)  # remembered so far

    def is_spike(self, norm: Tensor) -> Tensor:
        """Whether the norm, a scalar, is a spike, as a boolean scalar; remembers it if it isn't."""
        if not self.limit:
            return torch.zeros_like(norm, dtype=torch.bool)
        far = norm - self.norms.mean() > self.limit * self.norms.std()
        spike = far & (self.count >= WINDOW)
        keep = norm.isfinite() & ~spike
        place = self.count % WINDOW
        self.norms[place] = torch.where(keep, norm, self.norms[place])
        self.count += keep
        return spike

    def memory(self) -> SpikeMemory:
        """What a checkpoint is to keep."""
        return SpikeMemory(tuple(self.norms.tolist()), int(self.count))

    def remember(self, memory: SpikeMemory) -> None:
        """Go on with what `memory` gave."""
        self.norms.copy_(torch.tensor(memory.norms))
        self.count.fill_(memory.count)

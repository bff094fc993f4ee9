"""train.py with faults, for test_faults.py: FAULT names one, RANK and the step decide where.

The faults are put in from outside: the product knows nothing of them.
"""

from __future__ import annotations

import math
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch

import step
import train
from common.errors import UserError, run_script
from config import load_config
from step import Stepper, StepResult

FAULT, AT = os.environ["FAULT"], [int(step) for step in os.environ["AT"].split(",")]
FAILURES = {"error": UserError("it is too hot here"), "bug": ZeroDivisionError("a bug")}
HERE = os.environ.get("RANK", "0") == os.environ.get("FAULTY_RANK", "0")


class FaultyStepper(Stepper):
    """Does what FAULT says at the steps AT, counted from 1, on the rank FAULTY_RANK."""

    factor = 1.0  # of the loss
    stalls = False

    def _wrap(self) -> torch.nn.Module:
        if HERE and FAULT == "stall at the start":
            time.sleep(1000)
        return super()._wrap()

    def rehearse(self, step: int) -> None:
        self.stalls = HERE and FAULT == "stall in the rehearsal"
        super().rehearse(step)

    def take(self, step: int, asked_to_stop: bool = False) -> StepResult:
        if FAULT == "slow" and step < AT[-1]:
            time.sleep(0.5)
        if HERE and step + 1 in AT:
            self.stalls = FAULT == "stall"
            self.factor = {"nan": math.nan, "spike": 1000.0}.get(FAULT, 1.0)
            if FAULT.startswith("SIG"):
                Path(self.config.train.out, "signalled").touch()
                os.kill(os.getpid(), getattr(signal, FAULT))
            if FAULT in FAILURES:
                raise FAILURES[FAULT]
            if FAULT == "full disk":
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        result = super().take(step, asked_to_stop)
        self.factor = 1.0
        return result

    def loss_of(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self.stalls:
            time.sleep(1000)
        if FAULT == "slow evaluation" and not self.model.training:
            told = Path(self.config.train.out, f"evaluated by {os.environ.get('RANK', '0')}")
            told.open("a").write(".")  # one for each batch
            time.sleep(2)
        return super().loss_of(inputs, targets) * self.factor


if __name__ == "__main__":
    step.Stepper = FaultyStepper
    sys.exit(run_script(train.train, load_config()))

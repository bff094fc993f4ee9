"""train.py with faults, for test_faults.py: FAULT names one, RANK and the step decide where.

The faults are put in from outside: the product knows nothing of them.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time

import torch

import train
from config import load_config
from errors import run_script

FAULT, AT = os.environ["FAULT"], [int(step) for step in os.environ["AT"].split(",")]
HERE = os.environ.get("RANK", "0") == os.environ.get("FAULTY_RANK", "0")


class Trainer(train.Trainer):
    """Does what FAULT says at the steps AT, counted from 1, on the rank FAULTY_RANK."""

    def loss_of(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = super().loss_of(inputs, targets)
        if not (HERE and torch.is_grad_enabled() and self.step + 1 in AT):
            return loss
        return loss * {"nan": math.nan, "spike": 1000.0}.get(FAULT, 1.0)

    def train_step(self) -> train.StepResult:
        if HERE and self.step + 1 in AT:
            if FAULT.startswith("SIG"):
                os.kill(os.getpid(), getattr(signal, FAULT))
            if FAULT == "stall":
                time.sleep(1000)
        return super().train_step()


if __name__ == "__main__":
    train.Trainer = Trainer
    sys.exit(run_script(train.train, load_config()))

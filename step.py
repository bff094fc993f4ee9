"""One optimizer step: the gradient over all micro-batches and all ranks, and the update.

train.py takes one after another. Explained in README, "Implementation: training the model".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from checkpoint import Checkpoint, ScalerMemory
from common.device import Moment, choose_dtype, keep_freed_memory
from common.errors import UserError
from config import Config
from data import BatchShape, StepLoader, micro_batches, within_documents
from distributed import Ranks, TreeSum
from model import GPT, Documents, GPTConfig
from optim import drop_average, learning_rate_at, make_optimizer, swap_average, update_average
from shards import TokenStream
from training.guard import SpikeFilter, SpikeMemory

DROPOUT, SAMPLE = 0, 1  # what a random draw is for
LOSS, GRAD_NORM, SKIPPED, STOP = range(4)  # the places of a step's numbers in their tensor


def draw_seed(purpose: int, seed: int, step: int, micro_batch: int) -> int:
    """A generator's seed for one use of random numbers in a run.

    Every random draw has such a key, so that no generator's state has to be saved: a resumed run,
    or one with another number of processes, draws the same numbers.
    """
    key = np.random.SeedSequence((purpose, seed, step, micro_batch))
    return int(key.generate_state(1, np.uint64)[0])


class StepResult:
    """One optimizer step's numbers. On a GPU they arrive later: its work is only queued here.

    Whoever reads `loss` or `grad_norm` waits for them, so they are read a step late, when the GPU
    has been given the next step to do.
    """

    def __init__(self, step: int, learning_rate: float, numbers: Tensor) -> None:
        """`step` is counted from 1; `numbers` (4,) are on the device, at LOSS and so on."""
        self.step, self.learning_rate = step, learning_rate
        self.numbers = numbers.to("cpu", non_blocking=numbers.is_cuda)  # mps couldn't be waited for
        self.end = Moment(numbers.device)

    @property
    def is_queued(self) -> bool:
        """Whether the step may still be running; a CPU has finished when `take` returns."""
        return self.end.on_gpu

    def _read(self, index: int) -> float:
        self.end.wait()
        return self.numbers[index].item()

    @property
    def loss(self) -> float:
        """Nats per token, the mean over the whole step and all ranks."""
        return self._read(LOSS)

    @property
    def grad_norm(self) -> float:
        """The gradient's norm before clipping."""
        return self._read(GRAD_NORM)

    @property
    def was_skipped(self) -> bool:
        """Whether the weights were left as they are."""
        return self._read(SKIPPED) > 0

    @property
    def stop_asked(self) -> bool:
        """Whether a process was asked to stop before this step's end."""
        return self._read(STOP) > 0


class Stepper:
    """Makes the optimizer steps of a run, each from nothing but the weights and its number."""

    def __init__(
        self, config: Config, ranks: Ranks, model: GPT, shape: BatchShape, stream: TokenStream
    ) -> None:
        """`model` is on its device already; what is trained shares its weights with it.

        Raises UserError if the settings don't go together.
        """
        self.config, self.ranks, self.model = config, ranks, model
        self.shape, self.stream = shape, stream
        self.dtype = choose_dtype(config.train.dtype, ranks.device)
        if self.is_canonical and ranks.world_size > 1 and shape.accumulation.bit_count() > 1:
            raise UserError(
                f"train.reduction = canonical: {shape.accumulation} micro-batches per process "
                "are no power of two; change train.tokens_per_step or the number of processes"
            )
        self.loader = StepLoader(stream, shape, config.train.seed, ranks.rank, ranks.device)
        self.optimizer = make_optimizer(model, config.optim, ranks)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=self.dtype == torch.float16)
        self.spikes = SpikeFilter(config.train.skip_spikes, ranks.device)
        self.wrapped = self._wrap()
        if ranks.device.type == "cpu" and config.train.compile:
            keep_freed_memory()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from what a checkpoint holds. Raises UserError if it doesn't fit the model."""
        checkpoint.load_model(self.model)
        checkpoint.load_optimizer(self.model, self.optimizer)
        swap_average(self.optimizer)  # a checkpoint's model is the average, if there is one
        if checkpoint.meta.scaler:
            self.scaler.load_state_dict(asdict(checkpoint.meta.scaler))
        if checkpoint.meta.spikes:
            self.spikes.remember(checkpoint.meta.spikes)

    def memory(self) -> dict[str, ScalerMemory | SpikeMemory | None]:
        """What a checkpoint's Meta keeps of gradient scaler and spike filter, for `restore`."""
        scaler = self.scaler.state_dict()
        return {
            "scaler": ScalerMemory(**scaler) if scaler else None,
            "spikes": self.spikes.memory() if self.spikes.limit else None,
        }

    def _wrap(self) -> nn.Module:
        """The model as it is trained: compiled if asked for, and under DDP if there are others.

        It shares its weights with `self.model`, which is the one to save and to sample from. That
        one's blocks are what is compiled, too: who calls it for another shape asks for plain code.
        """
        if self.config.train.compile:
            torch._dynamo.config.optimize_ddp = False  # which would cut blocks in two again
            self.model.compile_parts()
        if self.ranks.world_size == 1 or self.is_canonical:
            return self.model
        on_gpu = self.ranks.device.type == "cuda"
        self.ranks.arrive()  # DDP sends everybody the weights of rank 0
        return DistributedDataParallel(
            self.model,
            device_ids=[self.ranks.local_rank] if on_gpu else None,
            gradient_as_bucket_view=True,  # one copy of the gradients, not two
        )

    @property
    def is_canonical(self) -> bool:
        """Whether gradients are summed in an order that the number of processes doesn't change."""
        return self.config.train.reduction == "canonical"

    def autocast(self) -> AbstractContextManager:
        """Matrix products inside are done in `train.dtype`."""
        device, dtype = self.ranks.device.type, self.dtype
        return torch.autocast(device, dtype, enabled=dtype != torch.float32)

    def loss_of(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of a batch, inputs and targets (B, T)."""
        with self.autocast():
            return self.wrapped(inputs, targets, self.documents_of(inputs))

    def documents_of(self, inputs: Tensor) -> Documents:
        """Mask and positions that separate the documents of a batch (B, T), if that is asked for.

        In blocks where FlexAttention is quick: compiled, on a GPU. It knows no dropout.
        """
        if not self.config.data.document_mask:
            return None
        in_blocks = inputs.is_cuda and self.config.train.compile and not self.config.model.dropout
        return within_documents(inputs, self.model.config.vocab_size - 1, in_blocks)

    def gradient_sync(self, last: bool) -> AbstractContextManager:
        """DDP averages gradients in every backward pass; let it, only in the last of a step."""
        if last or self.wrapped is self.model:
            return nullcontext()
        return self.wrapped.no_sync()

    def rehearse(self, step: int) -> None:
        """Make an update that changes nothing, then run a micro-batch of a step; under DDP, twice.

        It lets torch.compile compile all that a step needs, and memory run out, before the first
        (but for the copies that canonical sums take). And DDP, in its second forward pass, orders
        its buckets anew by the order in which gradients came in the first backward pass; had that
        happened in a real step, a resumed run would round differently from one that was never
        stopped.
        """
        seed, rank, device = self.config.train.seed, self.ranks.rank, self.ranks.device
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.found_inf = torch.ones((), device=device)  # as if they weren't finite
        self.optimizer.step()  # makes the optimizer's state
        if share := self.config.optim.average_share:
            update_average(self.optimizer, share, step + 1, skipped=self.optimizer.found_inf)
        under_ddp = self.wrapped is not self.model
        _, inputs, targets = next(micro_batches(self.stream, self.shape, seed, step, rank))
        try:
            for _ in range(1 + under_ddp):
                # Else they stay: all micro-batches but a step's first run with them in memory.
                if under_ddp or self.shape.accumulation == 1:
                    self.optimizer.zero_grad(set_to_none=True)
                loss = self.loss_of(inputs.to(device), targets.to(device))
                if under_ddp:
                    self.ranks.arrive()  # DDP's backward pass waits for all the others
                loss.backward()
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"torch.compile failed ({reason}): give --train.compile false to do without"
            ) from error
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        """Clear them before the next step. Those in DDP's buckets stay there as zeros.

        Without them, the micro-batches before the last would add up in a second copy.
        """
        alone = self.wrapped is self.model
        self.optimizer.zero_grad(set_to_none=alone or self.shape.accumulation == 1)

    def _micro_batches(self, step: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """This rank's micro-batches of a step, on the device."""
        device = self.ranks.device
        for number, inputs, targets in self.loader.load(step):
            inputs = inputs.to(device, non_blocking=True)
            yield number, inputs, targets.to(device, non_blocking=True)

    def take(self, step: int, asked_to_stop: bool = False) -> StepResult:
        """One optimizer step, counted from 0: all micro-batches' gradient, clipped, and the update.

        All ranks are told if one of them was asked to stop. Nothing here waits for the device.
        """
        learning_rate = learning_rate_at(step, self.config.optim, self.config.train.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("learning_rate_scale", 1.0)
        asked = torch.full((), float(asked_to_stop), device=self.ranks.device)
        accumulate = self.canonical_gradients if self.is_canonical else self.gradients
        numbers = self.update(accumulate(step, asked))
        if share := self.config.optim.average_share:
            update_average(self.optimizer, share, step + 1, skipped=numbers[SKIPPED])
        else:
            # A run that was resumed without averaging drops its average only now: evaluations that
            # were caught up with before its first step still used it.
            drop_average(self.optimizer)
        return StepResult(step + 1, learning_rate, numbers)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model's weights are their average, if one is kept."""
        swap_average(self.optimizer)
        try:
            yield
        finally:
            swap_average(self.optimizer)

    def gradients(self, step: int, asked: Tensor) -> Tensor:
        """Accumulate the gradients of all micro-batches; DDP averages them over the ranks.

        Returns (2,), the means over the ranks: of the loss, and of `asked`, a scalar.
        """
        accumulation = self.shape.accumulation
        loss_sum = torch.zeros((), device=self.ranks.device)
        for done, (number, inputs, targets) in enumerate(self._micro_batches(step), 1):
            torch.manual_seed(draw_seed(DROPOUT, self.config.train.seed, step, number))
            last = done == accumulation
            with self.gradient_sync(last):
                # Each micro-batch has the same number of tokens, so the mean of their means is the
                # mean over all tokens of the step. DDP takes the mean over the ranks.
                loss = self.loss_of(inputs, targets) / accumulation
                if last:
                    self.ranks.arrive()  # this backward pass waits for all the others
                self.scaler.scale(loss).backward()
            loss_sum += loss.detach()
        return self.ranks.sum(torch.stack((loss_sum, asked))) / self.ranks.world_size

    def canonical_gradients(self, step: int, asked: Tensor) -> Tensor:
        """As `gradients`, but summed in an order that the number of ranks doesn't change.

        The micro-batches are the leaves of a tree (`TreeSum`). Each rank has a contiguous block of
        them, as many as a power of two, which is a branch of its own. So losses and weights are
        the same to the bit for 1, 2, 4 … ranks. It needs a copy of the gradient for every level of
        the tree, and nothing is sent before the last micro-batch is done.
        """
        parameters, tree = [*self.model.parameters()], TreeSum()
        for number, inputs, targets in self._micro_batches(step):
            torch.manual_seed(draw_seed(DROPOUT, self.config.train.seed, step, number))
            loss = self.loss_of(inputs, targets)
            self.scaler.scale(loss).backward()
            told = torch.stack((loss.detach(), asked))
            tree.add(torch.cat([*(p.grad.flatten() for p in parameters), told]))
            self.optimizer.zero_grad(set_to_none=True)
        mean = self.ranks.tree_sum(tree.result())
        mean /= self.shape.accumulation * self.ranks.world_size
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, part in zip(parameters, mean[:-2].split(sizes)):
            parameter.grad = part.view_as(parameter)
        return mean[-2:]

    def update(self, loss_and_stop: Tensor) -> Tensor:
        """Clip the gradients and let the optimizer use them; returns a StepResult's numbers (4,).

        If loss or gradient are not finite, or the gradient is a spike, the optimizer leaves the
        weights as they are: decided on the device, for the CPU to find out later. `loss_and_stop`
        is what `gradients` returned.
        """
        self.scaler.unscale_(self.optimizer)
        limit = self.config.optim.grad_clip or math.inf
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        loss, asked = loss_and_stop.unbind()
        skip = ~(loss.isfinite() & grad_norm.isfinite()) | self.spikes.is_spike(grad_norm)
        self.optimizer.found_inf = skip.float()  # where it is 1, AdamW and Muon change nothing
        self.optimizer.step()  # the scaler's own `step` would look at nothing but the gradients
        self.scaler.update()
        self._forget_gradients()
        return torch.stack((loss, grad_norm, skip.float(), asked))


def make_stepper(config: Config, ranks: Ranks, shape: BatchShape, stream: TokenStream) -> Stepper:
    """A run's model, with the weights that `train.seed` draws, and what trains it.

    Raises UserError if the settings don't go together.
    """
    torch.manual_seed(config.train.seed)
    model = GPT(GPTConfig(vocab_size=stream.vocab_size, **asdict(config.model)))
    return Stepper(config, ranks, model.to(ranks.device), shape, stream)

"""Train a GPT: one process, or any number of them under torchrun.

    python train.py configs/demo.toml
    torchrun --standalone --nproc-per-node=8 train.py configs/gpt2_124m.toml

The loop is in `Trainer._loop`, a step in `Trainer.train_step`. A run that was stopped goes on from
its newest checkpoint when the same command is given again, and computes what it would have computed
anyway. Explained in README, "Implementation: training the model".
"""

from __future__ import annotations

import sys

from config import Config, load_config, task_names
from errors import Stopped, UserError, run_script

if __name__ == "__main__":  # before the slow imports: --help and a typo answer at once
    CONFIG = load_config()

import math
import shutil
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import tiktoken
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from checkpoint import Checkpoint, Meta, find_checkpoint, newest_checkpoint, save_checkpoint
from data import BatchShape, StepLoader, step_windows
from distributed import Ranks, TreeSum, choose_dtype, device_name, memory_errors, process_group
from guard import SpikeFilter, StopRequest
from metrics import Metrics, Speed, estimated_memory
from model import GPT, GPTConfig
from optim import learning_rate_at, make_optimizer
from scoring import Scorer, Validation, evaluating, validate
from shards import VOCABULARY, TokenStream, encoding_of, tokenizer_of
from tasks import load_questions
from tokenizer import token_byte_lengths
from writing import locked

SAMPLE_TOKENS = 100  # length of the samples that a run prints now and then
DROPOUT, SAMPLE = 0, 1  # what a random draw is for
FREE = ("dropout", "recompute")  # [model] settings that the weights don't depend on


def say(text: str) -> None:
    """Tell the user something, above the progress bar."""
    tqdm.write(text, file=sys.stderr)


def draw_seed(purpose: int, seed: int, step: int, micro_batch: int) -> int:
    """A generator's seed for one use of random numbers in a run.

    Every random draw has such a key, so that no generator's state has to be saved: a resumed run,
    or one with another number of processes, draws the same numbers.
    """
    return int(
        np.random.SeedSequence((purpose, seed, step, micro_batch)).generate_state(1, np.uint64)[0]
    )


class StepResult:
    """What one optimizer step tells, once the device has come to its end.

    On a GPU, work is only queued by the code here. Whoever reads `loss` or `grad_norm` waits for
    it, so they are read a step late, when the GPU has been given the next step to do.
    """

    def __init__(self, step: int, learning_rate: float, numbers: Tensor) -> None:
        """`step` is counted from 1; `numbers` (4,), on the device, are what the properties tell."""
        self.step, self.learning_rate = step, learning_rate
        self.numbers = numbers.to("cpu", non_blocking=True)
        self.arrived = torch.cuda.Event() if numbers.is_cuda else None
        if self.arrived:
            self.arrived.record()

    @property
    def is_queued(self) -> bool:
        """Whether the numbers may have to be waited for. A CPU has done its work on return."""
        return self.arrived is not None

    def _read(self, index: int) -> float:
        if self.arrived:
            self.arrived.synchronize()
        return self.numbers[index].item()

    @property
    def loss(self) -> float:
        """Nats per token, the mean over the whole step and all ranks."""
        return self._read(0)

    @property
    def grad_norm(self) -> float:
        """The gradient's norm before clipping."""
        return self._read(1)

    @property
    def was_skipped(self) -> bool:
        """Whether the weights were left as they are."""
        return self._read(2) > 0

    @property
    def stop_asked(self) -> bool:
        """Whether a process was asked to stop before this step's end."""
        return self._read(3) > 0


class Trainer:
    """A training run: model, optimizer, data, and the loop that brings them together."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        """Set everything up as it was after the newest checkpoint, or at the beginning.

        Raises UserError if settings, data and checkpoint don't fit together.
        """
        self.config, self.ranks = config, ranks
        self.out = Path(config.train.out)
        folder = Path(config.data.dir)
        self.train_stream, self.val_stream = TokenStream(folder, "train"), None
        if config.log.eval_every:
            self.val_stream = TokenStream(folder, "val")
            self.val_stream.num_windows(config.model.block_size)  # too short? say so now, not later
        self.tokenizer = tokenizer_of(folder)
        self.shape = BatchShape(
            config.train.tokens_per_step,
            config.model.block_size,
            config.train.micro_batch_size,
            ranks.world_size,
        )
        self.dtype = choose_dtype(config.train.dtype, ranks.device)
        if config.train.skip_spikes and self.dtype == torch.float16:
            raise UserError("train.skip_spikes doesn't go with float16: choose another train.dtype")
        if self.is_canonical and ranks.world_size > 1 and self.shape.accumulation.bit_count() > 1:
            raise UserError(
                f"train.reduction = canonical: {self.shape.accumulation} micro-batches per process "
                "are no power of two; change train.tokens_per_step or the number of processes"
            )
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=self.dtype == torch.float16)
        torch.manual_seed(config.train.seed)
        self.model = GPT(GPTConfig(vocab_size=self.tokenizer.vocab_size, **asdict(config.model)))
        self.model.to(ranks.device)
        self.optimizer = make_optimizer(self.model, config.optim)
        self.loader = StepLoader(
            self.train_stream,
            self.shape,
            config.train.seed,
            ranks.rank,
            pin_memory=ranks.device.type == "cuda",
        )
        self.stop = StopRequest()
        self.spikes = SpikeFilter(config.train.skip_spikes, ranks.device)
        self.step, self.skipped, self.best_val_loss = 0, 0, math.inf
        self._resume(folder)
        if self.step == 0 and config.train.init_from:
            self._begin_with(config.train.init_from, folder)
        self.wrapped = self._wrap()
        self.encoding = self._find_encoding(folder)
        self.byte_lengths = token_byte_lengths(self.encoding) if self.encoding else None
        self.examinations = [
            ranks.in_turn(lambda name=name: load_questions(name))
            for name in task_names(config.log.eval_tasks)
        ]
        if self.examinations and not self.encoding:
            raise UserError("log.eval_tasks needs GPT-2's vocabulary, which can't be had here")

    def _find_encoding(self, data: Path) -> tiktoken.Encoding | None:
        """The data's encoding. Downloaded shards come without their vocabulary, which is GPT-2's;
        on a machine that can't get it, training goes on without what needs text.
        """
        try:
            return encoding_of(data)
        except UserError as error:
            if (data / VOCABULARY).exists():
                raise
            if self.ranks.is_first:
                say(f"no bits per byte and no samples: {error}")
            return None

    def _resume(self, data: Path) -> None:
        """Go on from the newest complete checkpoint, if there is one. Rank 0 chooses it."""
        folder = self.out / "checkpoints"
        newest = newest_checkpoint(folder) if self.ranks.is_first else None
        step = self.ranks.agree(newest.meta.step if newest else 0)
        if step == 0:
            return
        checkpoint = Checkpoint.at(folder, step)
        if not self.config.train.resume:
            raise UserError(
                f"{self.out} holds {checkpoint.path.name} and train.resume = false: "
                "choose another --train.out or remove that folder"
            )
        checkpoint.check_vocabulary(data)
        check_same_run(checkpoint.meta.config, self.config, checkpoint.path)
        if checkpoint.meta.data != self.train_stream.fingerprint:
            raise UserError(
                f"{checkpoint.path} was trained on other data than {data} holds now: a run goes on "
                "with the same shards, or starts anew with another --train.out"
            )
        checkpoint.load_model(self.model)
        checkpoint.load_optimizer(self.model, self.optimizer)
        if checkpoint.meta.scaler:
            self.scaler.load_state_dict(checkpoint.meta.scaler)
        self.step, self.skipped = checkpoint.meta.step, checkpoint.meta.skipped
        if checkpoint.meta.spikes:
            self.spikes.load_state(checkpoint.meta.spikes)
        if checkpoint.meta.best_val_loss is not None:
            self.best_val_loss = checkpoint.meta.best_val_loss
        if self.ranks.is_first:
            say(f"going on after step {self.step:,} from {checkpoint.path}")

    def _begin_with(self, name: str, data: Path) -> None:
        """Take the weights of another run's checkpoint, to train them further on other text."""
        checkpoint = self.ranks.in_turn(lambda: find_checkpoint(name))
        checkpoint.check_vocabulary(data)
        theirs = asdict(checkpoint.meta.model)
        for key, ours in asdict(self.config.model).items():
            if key not in FREE and ours != theirs[key]:
                raise UserError(
                    f"{checkpoint.path} has model.{key} = {theirs[key]}, this run {ours}: to begin "
                    "with its weights, set it to theirs"
                )
        checkpoint.load_model(self.model)
        if self.ranks.is_first:
            say(f"beginning with the weights of {checkpoint.path}")

    def _wrap(self) -> nn.Module:
        """The model as it is trained: compiled if asked for, and under DDP if there are others.

        It shares its weights with `self.model`, which is the one to save and to sample from.
        """
        if self.config.train.compile:
            self.model.compile_parts()
        if self.ranks.world_size == 1 or self.is_canonical:
            return self.model
        on_gpu = self.ranks.device.type == "cuda"
        return DistributedDataParallel(
            self.model,
            device_ids=[self.ranks.local_rank] if on_gpu else None,
            gradient_as_bucket_view=True,  # one copy of the gradients, not two
        )

    @property
    def is_canonical(self) -> bool:
        """Whether gradients are summed in an order that the number of processes doesn't change."""
        return self.config.train.reduction == "canonical"

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.step * self.shape.tokens_per_step

    # One step

    def in_its_arithmetic(self) -> AbstractContextManager:
        """Matrix products inside are done in `train.dtype`."""
        device, dtype = self.ranks.device.type, self.dtype
        return torch.autocast(device, dtype, enabled=dtype != torch.float32)

    def loss_of(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of a batch, inputs and targets (B, T)."""
        with self.in_its_arithmetic():
            return self.wrapped(inputs, targets)

    def syncing(self, last: bool) -> AbstractContextManager:
        """DDP averages gradients in every backward pass; let it, only in the last of a step."""
        if last or self.wrapped is self.model:
            return nullcontext()
        return self.wrapped.no_sync()

    def rehearse(self) -> None:
        """Run one micro-batch, forward and backward, and forget its gradients.

        It lets torch.compile compile, and memory run out, before the first step rather than in it.
        And DDP, after its first backward pass, orders its buckets anew by the order in which
        gradients came; had that happened in a real step, a resumed run would round differently from
        one that was never stopped.
        """
        _, inputs, targets = next(self._micro_batches())
        try:
            self.loss_of(inputs, targets).backward()
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"torch.compile failed ({reason}): give --train.compile false to do without"
            ) from error
        self.optimizer.zero_grad(set_to_none=True)

    def _micro_batches(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """This rank's micro-batches of the present step, on the device."""
        device = self.ranks.device
        for number, inputs, targets in self.loader.load(self.step):
            inputs = inputs.to(device, non_blocking=True)
            yield number, inputs, targets.to(device, non_blocking=True)

    def train_step(self) -> StepResult:
        """One optimizer step: the gradient of all micro-batches, clipped, and the update.

        Nothing here waits for the device.
        """
        optim, max_steps = self.config.optim, self.config.train.max_steps
        learning_rate = learning_rate_at(self.step, optim, max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        told = self.canonical_gradients() if self.is_canonical else self.gradients()
        return self.update(told, learning_rate)

    def gradients(self) -> Tensor:
        """Accumulate the gradients of all micro-batches; DDP averages them over the ranks.

        Returns (2,), the same on every rank: the mean loss, and above 0 if one was asked to stop.
        """
        accumulation = self.shape.accumulation
        loss_sum = torch.zeros((), device=self.ranks.device)
        for done, (number, inputs, targets) in enumerate(self._micro_batches(), 1):
            torch.manual_seed(draw_seed(DROPOUT, self.config.train.seed, self.step, number))
            with self.syncing(last=done == accumulation):
                # Each micro-batch has the same number of tokens, so the mean of their means is the
                # mean over all tokens of the step. DDP takes the mean over the ranks.
                loss = self.loss_of(inputs, targets) / accumulation
                self.scaler.scale(loss).backward()
            loss_sum += loss.detach()
        return self.ranks.sum(torch.stack((loss_sum, self.asked()))) / self.ranks.world_size

    def canonical_gradients(self) -> Tensor:
        """As `gradients`, but summed in an order that the number of ranks doesn't change.

        The micro-batches are the leaves of a tree (`TreeSum`). Each rank has a contiguous block of
        them, as many as a power of two, which is a branch of its own. So losses and weights are
        the same to the bit for 1, 2, 4 … ranks. It needs a copy of the gradient for every level of
        the tree, and nothing is sent before the last micro-batch is done.
        """
        parameters, tree = [*self.model.parameters()], TreeSum()
        for number, inputs, targets in self._micro_batches():
            torch.manual_seed(draw_seed(DROPOUT, self.config.train.seed, self.step, number))
            loss = self.loss_of(inputs, targets)
            self.scaler.scale(loss).backward()
            told = torch.stack((loss.detach(), self.asked()))
            tree.add(torch.cat([*(p.grad.flatten() for p in parameters), told]))
            self.optimizer.zero_grad(set_to_none=True)
        mean = self.ranks.tree_sum(tree.result())
        mean /= self.shape.accumulation * self.ranks.world_size
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, part in zip(parameters, mean[:-2].split(sizes)):
            parameter.grad = part.view_as(parameter)
        return mean[-2:]

    def asked(self) -> Tensor:
        """1 if this process was asked to stop, else 0."""
        return torch.full((), float(self.stop.number > 0), device=self.ranks.device)

    def update(self, told: Tensor, learning_rate: float) -> StepResult:
        """Clip the gradients and let the optimizer use them. `told`: see `gradients`.

        If loss or gradient are not finite, or the gradient is a spike, the optimizer leaves the
        weights as they are, on the device's own decision: `check` is to find out.
        """
        self.scaler.unscale_(self.optimizer)
        limit = self.config.optim.grad_clip or math.inf
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        loss, asked = told.unbind()
        skip = ~(loss.isfinite() & grad_norm.isfinite()) | self.spikes.is_spike(grad_norm)
        # AdamW skips its update where this is 1; the gradient scaler sets the same for float16.
        self.optimizer.found_inf = skip.float()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        numbers = torch.stack((loss, grad_norm, skip.float(), asked))
        return StepResult(self.step, learning_rate, numbers)

    def check(self, result: StepResult, metrics: Metrics | None) -> bool:
        """Count and tell a step that was passed over, and return whether this one was.

        Every rank sees the same numbers, so all of them do the same.
        Raises UserError if there were too many in a row. In float16 an overflowing gradient is
        normal: the scaler then lowers its factor.
        """
        overflow = self.scaler.is_enabled() and math.isfinite(result.loss)
        if not result.was_skipped or overflow:
            self.skipped = 0
            return False
        self.skipped += 1
        numbers = {"loss": result.loss, "grad_norm": result.grad_norm}
        if metrics:
            finite = {key: n if math.isfinite(n) else None for key, n in numbers.items()}
            metrics.write("skip", result.step, finite | {"windows": self._windows(result.step)})
        told = f"step {result.step:,}: loss {result.loss}, gradient norm {result.grad_norm}"
        if self.skipped > self.config.train.max_skipped_steps:
            raise UserError(
                f"{told}: passed over, the {self.skipped}. in a row, which is one too many "
                f"(train.max_skipped_steps); it saw windows {self._windows(result.step)[:4]} … of "
                f"{self.config.data.dir}. Go on from the last checkpoint in {self.out} with a "
                "lower --optim.learning_rate or more --optim.warmup_steps"
            )
        if self.ranks.is_first:
            say(f"{told}: passed over, the weights stay as they are")
        return True

    def _windows(self, step: int) -> list[int]:
        """The windows of the training text that a step, counted from 1, saw."""
        per_step, count = self.shape.windows_per_step, self.config.model.block_size
        num_windows = self.train_stream.num_windows(count)
        return step_windows(step - 1, per_step, num_windows, self.config.train.seed).tolist()

    # Now and then

    def validate(self) -> Validation:
        """The loss on the validation split, shared out over the ranks."""
        with evaluating(self.wrapped):
            return validate(
                self.loss_of,
                self.val_stream,
                self.config.model.block_size,
                self.config.train.micro_batch_size,
                self.config.log.eval_tokens,
                self.ranks,
                self.byte_lengths,
            )

    def examine(self, metrics: Metrics | None) -> None:
        """Put the model to the examinations, shared out over the ranks, and tell what it got."""
        block_size = self.config.model.block_size
        batch_tokens = self.config.train.micro_batch_size * block_size
        scorer = Scorer(self.model, self.encoding, self.ranks, batch_tokens)
        for questions in self.examinations:
            with (
                evaluating(self.model),
                torch.compiler.set_stance("force_eager"),
                self.in_its_arithmetic(),
            ):
                found = questions.ask(scorer, stride=block_size)
            if metrics:
                values = {name: estimate.value for name, estimate in found.items()}
                metrics.write(questions.name, self.step, values)
                told = ", ".join(f"{name} {estimate}" for name, estimate in found.items())
                say(f"step {self.step:,}: {questions.name} {told}")

    def sample(self) -> str:
        """A text from nothing but <|endoftext|>, as the model writes it now."""
        generator = torch.Generator(self.ranks.device)
        generator.manual_seed(draw_seed(SAMPLE, self.config.train.seed, self.step, 0))
        start = torch.tensor([[self.encoding.eot_token]], device=self.ranks.device)
        with evaluating(self.model), torch.compiler.set_stance("force_eager"):
            ids = [
                int(token)
                for token in self.model.generate(
                    start, SAMPLE_TOKENS, temperature=0.8, top_k=50, generator=generator
                )
            ]
        return self.encoding.decode(ids)

    def save(self, val_loss: float | None) -> None:
        """Write a checkpoint (rank 0) while the others wait."""
        if self.ranks.is_first:
            meta = Meta(
                step=self.step,
                model=self.model.config,
                tokenizer=self.tokenizer,
                config=asdict(self.config),
                val_loss=val_loss,
                best_val_loss=self.best_val_loss if math.isfinite(self.best_val_loss) else None,
                scaler=self.scaler.state_dict() or None,
                data=self.train_stream.fingerprint,
                skipped=self.skipped,
                spikes=self.spikes.state() if self.spikes.limit else None,
            )
            keep = self.config.train.keep_checkpoints
            save_checkpoint(self.out / "checkpoints", meta, self.model, self.optimizer, keep)
        self.ranks.wait_for_all()

    # The whole run

    @contextmanager
    def own_folder(self) -> Iterator[None]:
        """Make the run folder and keep other runs out of it. Raises UserError if one is there."""
        if not self.ranks.is_first:
            yield
            return
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"can't write to the run folder {self.out}: {error.strerror}"
            ) from error
        with locked(self.out):
            yield

    def prepare_folder(self) -> Metrics | None:
        """Rank 0 puts settings and vocabulary into the run folder. Returns its metrics."""
        if not self.ranks.is_first:
            return None
        try:
            (self.out / "config.toml").write_text(self.config.to_toml(), encoding="utf-8")
            vocabulary = Path(self.config.data.dir) / VOCABULARY
            if vocabulary.exists():
                shutil.copyfile(vocabulary, self.out / VOCABULARY)
        except OSError as error:
            raise UserError(
                f"can't write to the run folder {self.out}: {error.strerror}"
            ) from error
        return Metrics(self.config, self.step)

    def plan(self) -> str:
        """What is about to happen, in numbers."""
        train, shape, model = self.config.train, self.shape, self.model
        asked, there = train.max_steps * shape.tokens_per_step, len(self.train_stream)
        micro_batch = train.micro_batch_size * self.config.model.block_size
        memory = estimated_memory(model, micro_batch, self.dtype)
        device, precision = device_name(self.ranks.device), str(self.dtype).removeprefix("torch.")
        return "\n".join(
            [
                f"model       {model.num_parameters():,} parameters, vocabulary "
                f"{self.tokenizer.name} of {self.tokenizer.vocab_size:,}",
                f"batch       {shape}",
                f"compute     {model.flops_per_token() * shape.tokens_per_step:.3g} FLOP per step, "
                f"{model.flops_per_token() * asked:.3g} in all",
                f"device      {self.ranks.world_size} × {device}, {precision}",
                f"memory      about {memory / 1e9:.2g} GB per process (estimate)",
                f"data        {there:,} tokens to train on; {train.max_steps:,} steps take "
                f"{asked:,}: {asked / there:.2f} epochs",
            ]
        )

    def run(self) -> None:
        """From the present step to the last, unless there is nothing left to do."""
        config, first = self.config, self.ranks.is_first
        if self.step >= config.train.max_steps:
            if first:
                say(f"already finished: {self.step:,} steps are done (train.max_steps)")
            return
        metrics = self.prepare_folder()
        if first:
            say(self.plan())
        self.rehearse()
        with (
            tqdm(
                total=config.train.max_steps,
                initial=self.step,
                unit="step",
                disable=not first,
                dynamic_ncols=True,
            ) as bar,
            self.stop,
        ):
            stopped = self._loop(metrics, bar)
        if first:
            metrics.close()
        if stopped:
            number = self.stop.number or signal.SIGTERM
            told = f"stopped after step {self.step:,}; the same command goes on from there"
            raise Stopped(told, number)
        if first:
            say(f"done: python sample.py --checkpoint {self.out}")

    def _loop(self, metrics: Metrics | None, bar: tqdm) -> bool:
        """Step after step, and what is due after some of them; returns whether it was stopped.

        A step that a GPU does is looked at when the next one is under way, or when something is to
        be done with the model as it is after it.
        """
        speed = Speed(self.tokens, self.model.flops_per_token(), self.ranks)
        before, stop = None, False
        while self.step < self.config.train.max_steps:
            result = self.train_step()
            if before:
                stop = self._finish(before, metrics, speed, bar)
            before, due = result, self._anything_due()
            if due or stop or not result.is_queued:
                stop |= self._finish(result, metrics, speed, bar)
                before = None
            if due:
                with speed.paused():
                    self._do_what_is_due(metrics)
            if stop and self.step < self.config.train.max_steps:
                if not self._is_due(self.config.train.checkpoint_every):
                    self.save(val_loss=None)
                return True
        return False

    def _is_due(self, every: int) -> bool:
        """Whether what happens every so many steps (0 = never) and after the last is due now."""
        last = self.step == self.config.train.max_steps
        return every > 0 and (self.step % every == 0 or last)

    def _anything_due(self) -> bool:
        log, train = self.config.log, self.config.train
        rhythms = (log.eval_every, train.checkpoint_every, log.sample_every)
        return any(map(self._is_due, rhythms)) or self._examination_is_due()

    def _examination_is_due(self) -> bool:
        return bool(self.examinations) and self._is_due(self.config.log.eval_tasks_every)

    def _do_what_is_due(self, metrics: Metrics | None) -> None:
        """Validate, save, write a sample."""
        config, val_loss = self.config, None
        if self._is_due(config.log.eval_every):
            val_loss = self._report_validation(metrics)
        if self._examination_is_due():
            self.examine(metrics)
        if self._is_due(config.train.checkpoint_every):
            self.save(val_loss)
        if self.ranks.is_first and self.encoding and self._is_due(config.log.sample_every):
            say(f"step {self.step:,} writes:\n{self.sample()}\n")

    def _finish(self, result: StepResult, metrics: Metrics | None, speed: Speed, bar: tqdm) -> bool:
        """Wait for a step, see that it went well, and report it if it is one to report.

        Returns whether the run is to stop.
        """
        passed_over = self.check(result, metrics)
        bar.update()
        due = result.step % self.config.log.log_every == 0
        due |= result.step == self.config.train.max_steps
        if self.ranks.is_first and due and not passed_over:
            self._report(result, metrics, speed, bar)
        return result.stop_asked

    def _report(self, result: StepResult, metrics: Metrics, speed: Speed, bar: tqdm) -> None:
        """One line into the metrics, and the newest numbers beside the bar."""
        tokens = result.step * self.shape.tokens_per_step
        tokens_per_second, mfu = speed.measure(tokens)
        metrics.write(
            "train",
            result.step,
            {
                "loss": result.loss,
                "learning_rate": result.learning_rate,
                "grad_norm": result.grad_norm if math.isfinite(result.grad_norm) else None,
                "tokens": tokens,
                "tokens_per_second": tokens_per_second,
                "mfu": mfu,
            },
        )
        bar.set_postfix_str(
            f"loss {result.loss:.3f}, lr {result.learning_rate:.1e}, "
            f"norm {result.grad_norm:.2f}, {tokens_per_second:,.0f} tok/s, "
            f"MFU {'n/a' if mfu is None else f'{mfu:.0%}'}"
        )

    def _report_validation(self, metrics: Metrics | None) -> float:
        """Validate, tell, and remember the best; returns the loss. For all ranks to call."""
        result = self.validate()
        self.best_val_loss = min(self.best_val_loss, result.loss)
        if metrics:
            bits = result.bits_per_byte and result.bits_per_byte.value
            metrics.write("val", self.step, {"loss": result.loss, "bits_per_byte": bits})
            per_byte = "" if bits is None else f", {bits:.3f} bits per byte"
            say(f"step {self.step:,}: validation loss {result.loss:.4f}{per_byte}")
        return result.loss


def check_same_run(then: dict[str, dict], config: Config, path: Path) -> None:
    """Raises UserError if a checkpoint is of another model, or would go on with other batches."""
    now = asdict(config)
    names = [("model", key) for key in now["model"] if key not in FREE]
    names += [("train", "seed"), ("train", "tokens_per_step")]
    if config.train.reduction == "canonical":
        names += [("train", "reduction"), ("train", "micro_batch_size"), ("train", "dtype")]
    for section, key in names:
        before = then[section].get(key)
        if before != now[section][key]:
            raise UserError(
                f"{path} was trained with {section}.{key} = {before}, now it is "
                f"{now[section][key]}: set it back, or choose another --train.out"
            )


def train(config: Config) -> None:
    """Train as `config` says, together with the other processes if torchrun started several."""
    with process_group(config.train.device, config.train.timeout_seconds) as ranks:
        if config.train.reduction == "canonical":
            torch.set_num_threads(1)  # of a CPU; more of them add up in another order
        with memory_errors("the model and its optimizer don't fit; make the model smaller"):
            trainer = Trainer(config, ranks)
        advice = (
            f"micro-batches of {config.train.micro_batch_size} windows are too large; lower "
            "--train.micro_batch_size (the batch of a step stays the same: more of them make it up)"
        )
        with memory_errors(advice), trainer.own_folder():
            trainer.run()


if __name__ == "__main__":
    sys.exit(run_script(train, CONFIG))

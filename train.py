"""Train a GPT: one process, or any number of them under torchrun.

    python train.py configs/demo.toml
    torchrun --standalone --nproc-per-node=8 train.py configs/gpt2_124m.toml

The loop is in `Trainer._loop`, a step in step.py. A run that was stopped goes on from its newest
checkpoint when the same command is given again, and computes what it would have computed anyway.
Explained in README, "Implementation: training the model".
"""

from __future__ import annotations

import sys

from config import Config, load_config, task_names
from errors import Expendable, Stopped, UserError, run_script

if __name__ == "__main__":  # before the slow imports: --help and a typo answer at once
    CONFIG = load_config()

import itertools
import math
import shlex
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path

import tiktoken
import torch
from tqdm import tqdm

from checkpoint import (
    Checkpoint,
    Meta,
    ScalerMemory,
    add_losses,
    check_can_save,
    checkpoints_in,
    save_checkpoint,
    step_name,
    step_of,
)
from data import BatchShape, step_windows
from device import device_name, memory_errors
from distributed import Ranks, process_group
from guard import StopRequest
from huggingface import find_model
from metrics import METRICS, Metrics, Speed, estimated_memory, kinds_told
from model import GPT, GPTConfig
from optim import last_at_peak, swap_average
from records import strict
from resume import agree_on_checkpoint, check_can_begin_with, check_can_go_on
from scoring import BrokenOff, Scorer, Validation, evaluating, validate
from shards import (
    VOCABULARY,
    TokenStream,
    check_contents,
    encoding_of,
    file_sha256,
    tokenizer_of,
)
from step import SAMPLE, Stepper, StepResult, draw_seed
from tasks import load_questions
from tokenizer import token_byte_lengths
from writing import locked, sync, write_atomically

SAMPLE_TOKENS = 100  # length of the samples that a run prints now and then


def say(text: str) -> None:
    """Tell the user something, above the progress bar."""
    tqdm.write(text, file=sys.stderr)


class Trainer:
    """A training run: model, optimizer, data, and the loop that brings them together."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        """Set everything up as it was after the newest checkpoint, or at the beginning.

        Raises UserError if settings, data and checkpoint don't fit together.
        """
        self.config, self.ranks = config, ranks
        self.out = Path(config.train.out)
        folder = Path(config.data.dir)
        ranks.check_same("a setting", repr(shared_settings(config)))
        self.shape = BatchShape(
            config.train.tokens_per_step,
            config.model.block_size,
            config.train.micro_batch_size,
            ranks.world_size,
        )
        with ranks.together():
            self._open_data(folder)
        ranks.check_same("the data", self.data)
        torch.manual_seed(config.train.seed)
        self.model = GPT(GPTConfig(vocab_size=self.tokenizer.vocab_size, **asdict(config.model)))
        self.model.to(ranks.device)
        self.stepper = Stepper(config, ranks, self.model, self.shape, self.train_stream)
        self.stop = StopRequest()
        self.step, self.skipped, self.best_val_loss = 0, 0, math.inf
        self._resume()
        self.encoding = self._find_encoding(folder)
        self.byte_lengths = token_byte_lengths(self.encoding) if self.encoding else None
        self.tasks = [
            ranks.in_turn(lambda name=name: load_questions(name))
            for name in task_names(config.log.eval_tasks)
        ]
        if self.tasks and not self.encoding:
            raise UserError("log.eval_tasks needs GPT-2's vocabulary, which can't be had here")
        for questions in self.tasks:  # now, rather than at the first of them
            questions.check_lengths(self._scorer())

    def _open_data(self, folder: Path) -> None:
        """Open the splits; see that the shards are what the manifest says, before a step uses them.

        The processes of a machine share that work. Raises UserError for a shard that isn't.
        """
        self.train_stream, self.val_stream = TokenStream(folder, "train"), None
        records = self.train_stream.records
        if self.config.log.eval_every:
            self.val_stream = TokenStream(folder, "val")
            self.val_stream.num_windows(self.config.model.block_size)  # too short? not later
            records = records + self.val_stream.records
        self.tokenizer = tokenizer_of(folder)
        mine = records[self.ranks.local_rank :: self.ranks.local_world_size]
        check_contents(folder, mine, self.tokenizer.vocab_size)

    def _find_encoding(self, data: Path) -> tiktoken.Encoding | None:
        """The data's encoding. Downloaded shards come without their vocabulary, which is GPT-2's;
        if a machine can't get it, training goes on without what needs text.
        """
        encoding = None
        with self.ranks.together():
            try:
                encoding = encoding_of(data)
            except UserError as error:
                if (data / VOCABULARY).exists():
                    raise
                if self.ranks.local_rank == 0:
                    say(f"no bits per byte and no samples: {error}")
        return None if self.ranks.anywhere(not encoding) else encoding

    def _resume(self) -> None:
        """Go on from the newest complete checkpoint, or begin with what train.init_from names."""
        folder = self.out / "checkpoints"
        with self.ranks.together():
            self.checkpoints_at_start = checkpoints_in(folder) if self.ranks.is_first else []
        checkpoint = agree_on_checkpoint(folder, self.ranks)
        if checkpoint:
            with self.ranks.together():
                check_can_go_on(checkpoint, self.config, self.data)
                self._go_on_from(checkpoint)
        elif self.config.train.init_from:
            self._begin_with(self.config.train.init_from)
        # The run would go on from these if they were whole.
        self.damaged = {path for path in self.checkpoints_at_start if step_of(path) > self.step}

    def _go_on_from(self, checkpoint: Checkpoint) -> None:
        """Set everything as it was when the checkpoint was saved."""
        checkpoint.load_model(self.model)
        checkpoint.load_optimizer(self.model, self.stepper.optimizer)
        swap_average(self.stepper.optimizer)  # a checkpoint's model is the average, if there is one
        if checkpoint.meta.scaler:
            self.stepper.scaler.load_state_dict(asdict(checkpoint.meta.scaler))
        self.step, self.skipped = checkpoint.meta.step, checkpoint.meta.skipped
        if checkpoint.meta.spikes:
            self.stepper.spikes.remember(checkpoint.meta.spikes)
        if checkpoint.meta.best_val_loss is not None:
            self.best_val_loss = checkpoint.meta.best_val_loss
        if self.ranks.is_first:
            say(f"going on after step {self.step:,} from {checkpoint.path}")

    def _begin_with(self, name: str) -> None:
        """Take the weights of another run's checkpoint, to train them further on other text."""
        checkpoint = self.ranks.in_turn(lambda: find_model(name))
        self.ranks.check_same("the checkpoint to begin with", checkpoint.description())
        with self.ranks.together():
            check_can_begin_with(checkpoint, self.config)
            checkpoint.load_model(self.model)
        if self.ranks.is_first:
            say(f"beginning with the weights of {checkpoint.path}")

    @property
    def data(self) -> str:
        """The fingerprint of the training data and, if it is used, that of the validation data."""
        streams = filter(None, (self.train_stream, self.val_stream))
        return " ".join(stream.fingerprint for stream in streams)

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.step * self.shape.tokens_per_step

    # One step

    def train_step(self) -> StepResult:
        """The next optimizer step."""
        result = self.stepper.take(self.step, asked_to_stop=self.stop.number > 0)
        self.step = result.step
        return result

    def check(self, result: StepResult, metrics: Metrics | None) -> bool:
        """Count and tell a skipped step, and return whether this one was.

        Every rank sees the same numbers, so all of them do the same.
        Raises UserError if there were too many in a row. In float16 an overflowing gradient is
        normal, as long as the scaler has a factor to lower.
        """
        scaler = self.stepper.scaler
        lowers = result.was_skipped and scaler.is_enabled() and scaler.get_scale() >= 1
        if not result.was_skipped or (lowers and math.isfinite(result.loss)):
            self.skipped = 0
            return False
        self.skipped += 1
        if metrics:
            numbers = {"loss": result.loss, "grad_norm": result.grad_norm}
            metrics.write("skip", result.step, numbers | {"windows": self._windows(result.step)})
        told = f"step {result.step:,}: loss {result.loss}, gradient norm {result.grad_norm}"
        if self.skipped > self.config.train.max_skipped_steps:
            raise UserError(
                f"{told}: skipped, {self.skipped} in a row, which is one too many "
                f"(train.max_skipped_steps); it saw windows {self._windows(result.step)[:4]} … of "
                f"{self.config.data.dir}. {self._way_out(result)}"
            )
        if self.ranks.is_first:
            say(f"{told}: skipped, the weights stay as they are")
        return True

    def _way_out(self, result: StepResult) -> str:
        """What to do after too many bad steps, of which `result` is the last."""
        if math.isfinite(result.loss) and math.isfinite(result.grad_norm):
            return (
                "Its gradient is no longer an exception: raise --train.skip_spikes, or leave it out"
            )
        # The last good step had a finite loss. Its update may be what spoiled the weights, though.
        before, good = result.step - self.skipped - 1, "the beginning"
        for path in checkpoints_in(self.out / "checkpoints"):
            if step_of(path) <= before:
                good = f"{path}: remove those after it, and go on"
        return f"Go back to {good} with a lower --optim.learning_rate or more --optim.warmup_steps"

    def _check_weights(self) -> None:
        """Raises UserError if the run has ended with weights that aren't finite."""
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise UserError(
                f"the weights after step {self.step:,} aren't finite: go back to an earlier "
                f"checkpoint of {self.out} with a lower --optim.learning_rate"
            )

    def _windows(self, step: int) -> list[int]:
        """The windows of the training text that a step, counted from 1, saw."""
        per_step, count = self.shape.windows_per_step, self.config.model.block_size
        num_windows = self.train_stream.num_windows(count)
        return step_windows(step - 1, per_step, num_windows, self.config.train.seed).tolist()

    # Now and then

    def validate(self) -> Validation:
        """The loss on the validation split, shared out over the ranks; the best is remembered."""
        with self.stepper.averaged(), evaluating(self.stepper.wrapped):
            result = validate(
                self.stepper.loss_of,
                self.val_stream,
                self.config.model.block_size,
                self.config.train.micro_batch_size,
                self.config.log.eval_tokens,
                self.ranks,
                self.byte_lengths,
                self._asked_to_stop,
            )
        self.best_val_loss = min(self.best_val_loss, result.loss)
        return result

    def run_tasks(self, names: list[str], metrics: Metrics | None) -> None:
        """Have the model do those tasks, shared out over the ranks, and tell what it got."""
        scorer = self._scorer()
        for questions in self.tasks:
            if questions.name not in names:
                continue
            with self._plain_model(), self.stepper.in_its_arithmetic():
                found = questions.ask(scorer, stride=self.config.model.block_size)
            if metrics:
                values = {name: estimate.value for name, estimate in found.items()}
                metrics.write(questions.name, self.step, values)
                told = ", ".join(f"{name} {estimate}" for name, estimate in found.items())
                say(f"step {self.step:,}: {questions.name} {told}")

    @contextmanager
    def _plain_model(self) -> Iterator[GPT]:
        """The averaged weights, without dropout, gradients or compiled code."""
        eager = torch.compiler.set_stance("force_eager")
        with self.stepper.averaged(), evaluating(self.model), eager:
            yield self.model

    def _scorer(self) -> Scorer:
        batch_tokens = self.config.train.micro_batch_size * self.config.model.block_size
        return Scorer(self.model, self.encoding, self.ranks, batch_tokens, self._asked_to_stop)

    def _asked_to_stop(self) -> bool:
        return self.ranks.stop_asked(self.stop.number > 0)

    def sample(self) -> str:
        """A text from nothing but <|endoftext|> to the next, as the model writes it now."""
        generator = torch.Generator(self.ranks.device)
        generator.manual_seed(draw_seed(SAMPLE, self.config.train.seed, self.step, 0))
        start = torch.tensor([[self.encoding.eot_token]], device=self.ranks.device)
        with self._plain_model() as model:
            tokens = model.generate(
                start, SAMPLE_TOKENS, temperature=0.8, top_k=50, generator=generator
            )
            end = self.encoding.eot_token
            return self.encoding.decode([*itertools.takewhile(end.__ne__, map(int, tokens))])

    def save(self, val_loss: float | None) -> None:
        """Write a checkpoint (rank 0) while the others wait."""
        with self.ranks.together():
            if self.ranks.is_first:
                self._save_here(val_loss)

    def _save_here(self, val_loss: float | None) -> None:
        """Write a checkpoint, after what metrics.jsonl tells of the steps up to it."""
        try:
            sync(self.out / METRICS)
        except OSError as error:
            raise UserError(
                f"can't write {self.out / METRICS}: {error.strerror}; mend the disk, then give the "
                "same command again to go on from the newest checkpoint"
            ) from error
        optimizer, spikes = self.stepper.optimizer, self.stepper.spikes
        scaler = self.stepper.scaler.state_dict()
        meta = Meta(
            step=self.step,
            model=self.model.config,
            tokenizer=self.tokenizer,
            config=asdict(self.config),
            **self._losses(val_loss),
            scaler=ScalerMemory(**scaler) if scaler else None,
            data=self.data,
            skipped=self.skipped,
            spikes=spikes.memory() if spikes.limit else None,
        )
        folder = self.out / "checkpoints"
        self.damaged.discard(folder / step_name(self.step))
        with self.stepper.averaged():
            save_checkpoint(folder, meta, self.model, optimizer, **self._kept())

    def _losses(self, val_loss: float | None) -> dict[str, float | None]:
        """What a checkpoint tells of validations; what is not finite is none."""
        return strict({"val_loss": val_loss, "best_val_loss": self.best_val_loss})

    def _kept(self) -> dict[str, object]:
        """Which checkpoints stay, as `save_checkpoint` takes it."""
        train, optim = self.config.train, self.config.optim
        # From the last checkpoint before the rate falls, another, longer run can go on.
        level = last_at_peak(optim, train.max_steps) + 1 if optim.decay_steps else 0
        return {
            "keep": train.keep_checkpoints,
            "keep_until": level,
            "damaged": self.damaged,
        }

    def _add_to_checkpoint(self, val_loss: float) -> None:
        """Tell the checkpoint of the present step (rank 0) what it was saved without."""
        with self.ranks.together():
            if self.ranks.is_first:
                path = self.out / "checkpoints" / step_name(self.step)
                add_losses(path, **self._losses(val_loss), **self._kept())

    # The whole run

    @contextmanager
    def own_folder(self) -> Iterator[None]:
        """Make the run folder and keep other runs out of it.

        Raises UserError if one is there, or has been since this one chose its checkpoint.
        """
        with ExitStack() as stack:
            with self.ranks.together():
                if self.ranks.is_first:
                    try:
                        self.out.mkdir(parents=True, exist_ok=True)
                    except OSError as error:
                        raise UserError(
                            f"can't write to the run folder {self.out}: {error.strerror}"
                        ) from error
                    stack.enter_context(locked(self.out))
                    self._check_still_newest()
            yield

    def _check_still_newest(self) -> None:
        """Raises UserError if there are other checkpoints than when this run chose its own."""
        if checkpoints_in(self.out / "checkpoints") != self.checkpoints_at_start:
            raise UserError(
                f"another run has saved into {self.out} since this one looked: give the same "
                "command again to go on from there"
            )

    def prepare_folder(self) -> Metrics | None:
        """Rank 0 puts settings and vocabulary into the run folder. Returns its metrics.

        Raises UserError if there is no writing there, nor saving checkpoints.
        """
        if not self.ranks.is_first:
            return None
        check_can_save(self.out / "checkpoints")
        try:
            write_atomically(self.out / "config.toml", self.config.to_toml())
            vocabulary = Path(self.config.data.dir) / VOCABULARY
            ours = self.out / VOCABULARY
            if vocabulary.exists():
                write_atomically(ours, vocabulary.read_text(encoding="utf-8"))
            elif ours.exists() and file_sha256(ours) != self.tokenizer.sha256:
                ours.unlink()  # of an earlier run: nothing could be read with it
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
        device, dtype = device_name(self.ranks.device), self.stepper.dtype
        precision = str(dtype).removeprefix("torch.")
        averaged = self.config.optim.average_share > 0
        memory = estimated_memory(model, micro_batch, dtype, train.compile, averaged)
        lines = [
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
        rise, fall = self.config.optim.warmup_steps, self.config.optim.decay_steps
        if rise + max(1, fall) >= train.max_steps:
            and_fall, or_fall = f" and {fall:,} of fall", " or --optim.decay_steps"
            lines.append(
                f"schedule    {rise:,} steps of warm-up{and_fall if fall else ''} are too many for "
                f"{train.max_steps:,}: lower --optim.warmup_steps{or_fall if fall else ''}"
            )
        return "\n".join(lines)

    def run(self) -> None:
        """From the present step to the last, unless there is nothing left to do."""
        config, first, missing = self.config, self.ranks.is_first, self._missing_evaluations()
        if self.step >= config.train.max_steps and not missing:
            if first:
                say(f"already finished: {self.step:,} steps are done (train.max_steps)")
            return
        with self.ranks.together():
            metrics = self.prepare_folder()
        if first:
            say(self.plan())
        self.stepper.rehearse(self.step)
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
            stopped = self._catch_up(missing, metrics) or self._loop(metrics, bar)
        if first:
            metrics.close()
        if stopped:
            number = self.stop.number or signal.SIGTERM
            told = "stopped before the first step; the same command begins again"
            if self.step:
                told = f"stopped after step {self.step:,}; the same command goes on from there"
            raise Stopped(told, number)
        self._check_weights()
        if first:
            say(f"done: python sample.py --checkpoint {shlex.quote(self.out.as_posix())}")

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
            stop &= self.step < self.config.train.max_steps
            if due or stop:
                with speed.paused():
                    stop = self._do_what_is_due(metrics, stop)
            if stop:
                return True
        return False

    def _is_due(self, every: int) -> bool:
        """Whether what happens every so many steps (0 = never) and after the last is due now."""
        last = self.step == self.config.train.max_steps
        return every > 0 and (self.step % every == 0 or last)

    def _anything_due(self) -> bool:
        rhythms = (self.config.train.checkpoint_every, self.config.log.sample_every)
        return any(map(self._is_due, rhythms)) or bool(self._evaluations_due())

    def _evaluations_due(self) -> list[str]:
        """The kinds of evaluation that are due now, by their names in metrics.jsonl."""
        kinds = ["val"] if self._is_due(self.config.log.eval_every) else []
        if self._is_due(self.config.log.eval_tasks_every):
            kinds += [questions.name for questions in self.tasks]
        return kinds

    def _do_what_is_due(self, metrics: Metrics | None, stop: bool) -> bool:
        """Validate, save, run tasks, write a sample: a save doesn't wait for what it doesn't tell.

        Returns whether the run is to stop. Then it saves, and leaves evaluations to `_catch_up`:
        they may take longer than whoever asked for the end will wait.
        """
        due, val_loss, saved = self._evaluations_due(), None, False
        try:
            if "val" in due and not stop:
                result = self.validate()
                val_loss = result.loss
                self._report_validation(result, metrics)
            is_best = self.config.train.save_best and val_loss == self.best_val_loss
            if is_best or self._is_due(self.config.train.checkpoint_every):
                self.save(val_loss)
                saved = True
            if not stop:
                self.run_tasks(due, metrics)
        except BrokenOff:
            stop = True
        if stop and not saved:
            self.save(val_loss)
        samples = self.encoding and not stop and self._is_due(self.config.log.sample_every)
        if self.ranks.is_first and samples:
            say(f"step {self.step:,} writes:\n{self.sample()}\n")
        return stop

    def _missing_evaluations(self) -> list[str]:
        """What is due after the present step and hasn't been told: the run was stopped before or
        during it, or begins with another run's weights.
        """
        has_learned = self.step > 0 or self.config.train.init_from
        due, told = self._evaluations_due() if has_learned else [], set()
        with self.ranks.together():
            if self.ranks.is_first and due and self.step:
                told = kinds_told(self.out, self.step)
        return [kind for kind in due if self.ranks.agree(int(kind not in told))]

    def _catch_up(self, missing: list[str], metrics: Metrics | None) -> bool:
        """Evaluate before the first step, so that a run tells what it would have told undisturbed.

        Returns whether it was asked to stop again. There is nothing to save then.
        """
        try:
            if "val" in missing:
                result = self.validate()
                if self.step:  # first: by its line it is known to be done
                    self._add_to_checkpoint(result.loss)
                self._report_validation(result, metrics)
            self.run_tasks(missing, metrics)
        except BrokenOff:
            return True
        return False

    def _finish(self, result: StepResult, metrics: Metrics | None, speed: Speed, bar: tqdm) -> bool:
        """Wait for a step, see that it went well, and report it if it is one to report.

        Returns whether the run is to stop.
        """
        was_skipped = self.check(result, metrics)
        bar.update()
        due = result.step % self.config.log.log_every == 0
        due |= result.step == self.config.train.max_steps
        if self.ranks.is_first and due and not was_skipped:
            self._report(result, metrics, speed, bar)
        return result.stop_asked

    def _report(self, result: StepResult, metrics: Metrics, speed: Speed, bar: tqdm) -> None:
        """One line into the metrics, and the newest numbers beside the bar."""
        tokens = result.step * self.shape.tokens_per_step
        tokens_per_second, mfu = speed.measure(tokens, result.end)
        metrics.write(
            "train",
            result.step,
            {
                "loss": result.loss,
                "learning_rate": result.learning_rate,
                "grad_norm": result.grad_norm,
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

    def _report_validation(self, result: Validation, metrics: Metrics | None) -> None:
        """One line into the metrics, and one for the user."""
        if metrics:
            bits = result.bits_per_byte and result.bits_per_byte.value
            metrics.write("val", self.step, {"loss": result.loss, "bits_per_byte": bits})
            per_byte = "" if bits is None else f", {bits:.3f} bits per byte"
            say(f"step {self.step:,}: validation loss {result.loss:.4f}{per_byte}")


def shared_settings(config: Config) -> dict[str, dict]:
    """The settings that all machines of a run must have alike: all but their own paths."""
    settings = asdict(config)
    del settings["data"]["dir"], settings["train"]["out"]
    settings["train"]["init_from"] = bool(config.train.init_from)
    return settings


def train(config: Config) -> None:
    """Train as `config` says, together with the other processes if torchrun started several."""
    with (
        redirect_stdout(Expendable(sys.stdout)),
        redirect_stderr(Expendable(sys.stderr)),
        process_group(config.train.device, config.train.timeout_seconds) as ranks,
    ):
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

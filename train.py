"""Train a GPT: one process, or any number of them under torchrun.

    python train.py configs/demo.toml
    torchrun --standalone --nproc-per-node=8 train.py configs/gpt2_124m.toml

The loop is in `Trainer._loop`, a step in step.py. A run that was stopped goes on from its newest
checkpoint when the same command is given again, and computes what it would have computed anyway.
Explained in README, "Implementation: training the model".
"""

from __future__ import annotations

import sys

from common.errors import Expendable, Stopped, UserError, run_script
from config import Config, load_config

if __name__ == "__main__":  # before the slow imports: --help and a typo answer at once
    CONFIG = load_config()

import math
import shlex
import signal
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path

import tiktoken
import torch
from tqdm import tqdm

from checkpoint import Meta
from common.device import memory_errors, peak_memory
from common.files import disk_errors, file_sha256, is_there
from common.records import strict
from data import BatchShape, step_windows
from distributed import Ranks, process_group
from huggingface import find_model
from scoring import BrokenOff, Validation
from shards import GPT2, VOCABULARY, TokenStream, check_contents, find_encoding
from step import StepResult, make_stepper
from training.examiner import Examiner
from training.guard import StopRequest
from training.metrics import Metrics, Speed, kinds_told, say
from training.plan import plan
from training.resume import check_can_begin_with, check_can_go_on, check_schedule, origin_of
from training.run_folder import RunFolder


class Trainer:
    """A training run: model, optimizer, data, and the loop that brings them together."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        """Set everything up as it was after the newest checkpoint, or at the beginning.

        Raises UserError if settings, data and checkpoint don't fit together.
        """
        self.config, self.ranks = config, ranks
        ranks.check_same("a setting", repr(shared_settings(config)))
        shape = BatchShape.of(config, ranks.world_size)
        data = Path(config.data.dir)
        with ranks.together():
            self._open_data(data)
        ranks.check_same("the data", self.fingerprint)
        with ranks.together():
            encoding = self._find_encoding(data)
        self.stepper = make_stepper(config, ranks, shape, self.train_stream)
        self.model, self.shape = self.stepper.model, shape
        self.step, self.skipped, self.best_val_loss = 0, 0, math.inf
        self.origin = config.train.init_from  # what the run began with, whoever goes on with it
        self.folder = RunFolder(config, ranks)
        self._resume()
        self.stop = StopRequest()
        self.examiner = Examiner(
            config, self.stepper, self.val_stream, encoding, self._asked_to_stop
        )
        self.metrics: Metrics | None = None  # rank 0's, from `run` on

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
        self.tokenizer = self.train_stream.tokenizer
        mine = records[self.ranks.local_rank :: self.ranks.local_world_size]
        check_contents(folder, mine, self.tokenizer.vocab_size)

    def _find_encoding(self, folder: Path) -> tiktoken.Encoding | None:
        """The data's encoding, from beside the shards or from the run folder.

        Downloaded shards come without their vocabulary, which is GPT-2's: if it can't be had here,
        training goes on without what needs text. Without another, nobody could read what the model
        writes: UserError.
        """
        ours = Path(self.config.train.out, VOCABULARY)
        if not is_there(folder / VOCABULARY) and is_there(ours):
            with disk_errors(f"can't read {ours}"):
                is_it = file_sha256(ours) == self.tokenizer.sha256  # and not an earlier run's
            folder = ours.parent if is_it else folder
        try:
            return find_encoding(folder, self.tokenizer)
        except UserError as error:
            if self.tokenizer != GPT2 or is_there(folder / VOCABULARY):
                raise
            if self.ranks.local_rank == 0:
                say(f"no bits per byte and no samples: {error}")
            return None

    def _resume(self) -> None:
        """Go on from the newest complete checkpoint, or begin with what train.init_from names."""
        checkpoint = self.folder.newest()
        if checkpoint:
            with self.ranks.together():
                check_can_go_on(checkpoint, self.config, self.fingerprint)
                rise = check_schedule(checkpoint, self.config)
                self.stepper.restore(checkpoint)
            self.step, self.skipped = checkpoint.meta.step, checkpoint.meta.skipped
            self.origin = origin_of(checkpoint)
            if checkpoint.meta.best_val_loss is not None:
                self.best_val_loss = checkpoint.meta.best_val_loss
            if self.ranks.is_first:
                say(f"resuming after step {self.step:,} from {checkpoint.path}")
                if rise:
                    say(rise)
        elif self.config.train.init_from:
            self._begin_with(self.config.train.init_from)

    def _begin_with(self, name: str) -> None:
        """Take the weights of another run's checkpoint, to train them further on other text."""
        checkpoint = self.ranks.in_turn(lambda: find_model(name))
        with self.ranks.together():
            told = checkpoint.description()
        self.ranks.check_same("the checkpoint to begin with", told)
        with self.ranks.together():
            check_can_begin_with(checkpoint, self.config)
            checkpoint.load_model(self.model)
        if self.ranks.is_first:
            say(f"beginning with the weights of {checkpoint.path}")

    @property
    def fingerprint(self) -> str:
        """That of the training data and, if it is used, that of the validation data."""
        streams = filter(None, (self.train_stream, self.val_stream))
        return " ".join(stream.fingerprint for stream in streams)

    # One step

    def train_step(self) -> StepResult:
        """The next optimizer step."""
        result = self.stepper.take(self.step, asked_to_stop=self.stop.number > 0)
        self.step = result.step
        return result

    def count_skipped(self, result: StepResult) -> bool:
        """Count and tell a skipped step, and return whether this one was.

        Every rank sees the same numbers, so all of them do the same.
        Raises UserError if there were too many in a row. In float16 an overflowing gradient is
        normal, as long as the scaler has a factor to lower.
        """
        scaler = self.stepper.scaler
        lowers = result.was_skipped and scaler.is_enabled() and scaler.get_scale() >= 1
        overflow = math.isfinite(result.loss) and not math.isfinite(result.grad_norm)
        if not result.was_skipped or (lowers and overflow):
            self.skipped = 0
            return False
        self.skipped += 1
        if self.metrics:
            numbers = {"loss": result.loss, "grad_norm": result.grad_norm}
            windows = {"windows": self._windows(result.step)}
            self.metrics.write("skip", result.step, numbers | windows)
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
        sound = self.folder.newest_before(result.step - self.skipped)
        good = f"{sound}: remove those after it, and go on" if sound else "the beginning"
        return f"Go back to {good} with a lower --optim.learning_rate or more --optim.warmup_steps"

    def _check_weights(self) -> None:
        """Raises UserError if the run has ended with weights that aren't finite."""
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise UserError(
                f"the weights after step {self.step:,} aren't finite: go back to an earlier "
                f"checkpoint of {self.folder.path} with a lower --optim.learning_rate"
            )

    def _windows(self, step: int) -> list[int]:
        """The windows of the training text that a step, counted from 1, saw."""
        shape, seed = self.shape, self.config.train.seed
        count = self.train_stream.num_windows(shape.block_size)
        return step_windows(step - 1, shape.windows_per_step, count, seed).tolist()

    # Now and then

    def validate(self) -> Validation:
        """The loss on the validation split, shared out over the ranks; the best is remembered."""
        result = self.examiner.validate()
        self.best_val_loss = min(self.best_val_loss, result.loss)
        return result

    def run_tasks(self, names: list[str]) -> None:
        """Have the model do those tasks, shared out over the ranks, and tell what it got."""
        for name in names:
            try:
                found = self.examiner.ask(name)
            except FloatingPointError as error:  # a step that finds out tells what to do
                if self.ranks.is_first:
                    say(f"step {self.step:,}: no score in {name}: {error}")
                continue
            if self.metrics:
                values = {key: estimate.value for key, estimate in found.items()}
                self.metrics.write(name, self.step, values)
                told = ", ".join(f"{key} {estimate}" for key, estimate in found.items())
                say(f"step {self.step:,}: {name} {told}")

    def _asked_to_stop(self) -> bool:
        return self.ranks.stop_asked(self.stop.number > 0)

    def save(self, val_loss: float | None) -> None:
        """Write a checkpoint (rank 0) while the others wait."""
        settings = replace(self.config, train=replace(self.config.train, init_from=self.origin))
        meta = Meta(
            step=self.step,
            model=self.model.config,
            tokenizer=self.tokenizer,
            config=asdict(settings),
            data=self.fingerprint,
            skipped=self.skipped,
            **self._losses(val_loss),
            **self.stepper.memory(),
        )
        with self.stepper.averaged():
            self.folder.save(meta, self.model, self.stepper.optimizer)

    def _losses(self, val_loss: float | None) -> dict[str, float | None]:
        """What a checkpoint tells of validations; what is not finite is none."""
        return strict({"val_loss": val_loss, "best_val_loss": self.best_val_loss})

    # The whole run

    def run(self) -> None:
        """From the present step to the last, unless there is nothing left to do."""
        config, first = self.config, self.ranks.is_first
        missing = self._missing_evaluations()
        if self.step >= config.train.max_steps and not missing:
            self._check_weights()
            if first:
                more = "" if config.optim.decay_steps else "raise that to go on, or "
                say(
                    f"already finished: {self.step:,} steps are done (train.max_steps); {more}"
                    "choose another --train.out to start over"
                )
            return
        self.metrics = self.folder.prepare(self.tokenizer, self.step)
        if first:
            say(plan(self.stepper, self.tokenizer))
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
            stopped = self._catch_up(missing) or self._loop(bar)
        if first:
            self.metrics.close()
        if stopped:
            number = self.stop.number or signal.SIGTERM
            told = "stopped before the first step; the same command begins again"
            if self.step:
                told = f"stopped after step {self.step:,}; the same command goes on from there"
            raise Stopped(told, number)
        self._check_weights()
        if first:
            say(f"done: python sample.py --checkpoint {shlex.quote(self.folder.path.as_posix())}")

    def _loop(self, bar: tqdm) -> bool:
        """Step after step, and what is due after some of them; returns whether it was stopped.

        A step that a GPU does is looked at when the next one is under way, or when something is to
        be done with the model as it is after it.
        """
        tokens = self.step * self.shape.tokens_per_step
        speed = Speed(tokens, self.model.flops_per_token(), self.ranks)
        before, stop = None, False
        while self.step < self.config.train.max_steps:
            result = self.train_step()
            if before:
                stop = self._finish(before, speed, bar)
            before, due = result, self._anything_due()
            if due or stop or not result.is_queued:
                stop |= self._finish(result, speed, bar)
                before = None
            stop &= self.step < self.config.train.max_steps
            if due or stop:
                with speed.paused():
                    stop = self._do_what_is_due(stop)
            if stop:
                return True
        return False

    def _is_due(self, every: int) -> bool:
        """Whether what happens every so many steps (0 = never) and after the last is due now."""
        last = self.step == self.config.train.max_steps
        return every > 0 and (self.step % every == 0 or last)

    def _anything_due(self) -> bool:
        sample = self._is_due(self.config.log.sample_every)
        return sample or self._checkpoint_is_due() or bool(self._evaluations_due())

    def _checkpoint_is_due(self) -> bool:
        is_due = self._is_due(self.config.train.checkpoint_every)
        return is_due or self.step == self.folder.last_peak_step

    def _evaluations_due(self) -> list[str]:
        """The kinds of evaluation that are due now, by their names in metrics.jsonl."""
        kinds = ["val"] if self._is_due(self.config.log.eval_every) else []
        if self._is_due(self.config.log.eval_tasks_every):
            kinds += self.examiner.tasks
        return kinds

    def _do_what_is_due(self, stop: bool) -> bool:
        """Validate, save, run tasks, write a sample: in this order, for a checkpoint tells of the
        validation and waits for nothing else.

        Returns whether the run is to stop. Then it saves, and leaves evaluations to `_catch_up`:
        they may take longer than whoever asked for the end will wait.
        """
        due, val_loss, saved = self._evaluations_due(), None, False
        try:
            if "val" in due and not stop:
                result = self.validate()
                val_loss = result.loss
                self._report_validation(result)
            is_best = self.config.train.save_best and val_loss == self.best_val_loss
            if is_best or self._checkpoint_is_due():
                self.save(val_loss)
                saved = True
            if not stop:
                self.run_tasks([kind for kind in due if kind != "val"])
        except BrokenOff:
            stop = True
        if stop and not saved:
            self.save(val_loss)
        samples = self.examiner.encoding and not stop and self._is_due(self.config.log.sample_every)
        if self.ranks.is_first and samples:
            say(f"step {self.step:,} writes:\n{self.examiner.sample(self.step)}\n")
        return stop

    def _missing_evaluations(self) -> list[str]:
        """What is due after the present step and hasn't been told: the run was stopped before or
        during it, or begins with another run's weights.
        """
        has_learned = self.step > 0 or self.config.train.init_from
        due = self._evaluations_due() if has_learned else []
        told: set[str] = set()
        with self.ranks.together():
            if self.ranks.is_first and due and self.step:
                told = kinds_told(self.folder.path, self.step)
        return [kind for kind in due if self.ranks.agree(int(kind not in told))]

    def _catch_up(self, missing: list[str]) -> bool:
        """Evaluate before the first step, so that a run tells what it would have told undisturbed.

        Returns whether it was asked to stop again. There is nothing to save then.
        """
        try:
            if "val" in missing:
                result = self.validate()
                if self.step:  # first: by its line it is known to be done
                    self.folder.add_losses(self.step, self._losses(result.loss))
                self._report_validation(result)
            self.run_tasks([kind for kind in missing if kind != "val"])
        except BrokenOff:
            return True
        return False

    def _finish(self, result: StepResult, speed: Speed, bar: tqdm) -> bool:
        """Wait for a step, see that it went well, and report it if it is one to report.

        Returns whether the run is to stop.
        """
        was_skipped = self.count_skipped(result)
        bar.update()
        due = result.step % self.config.log.log_every == 0
        due |= result.step == self.config.train.max_steps
        if self.ranks.is_first and due and not was_skipped:
            self._report(result, speed, bar)
        return result.stop_asked

    def _report(self, result: StepResult, speed: Speed, bar: tqdm) -> None:
        """One line into the metrics, and the newest numbers beside the bar."""
        tokens = result.step * self.shape.tokens_per_step
        tokens_per_second, mfu = speed.measure(tokens, result.end)
        memory = peak_memory(self.ranks.device)
        self.metrics.write(
            "train",
            result.step,
            {
                "loss": result.loss,
                "learning_rate": result.learning_rate,
                "grad_norm": result.grad_norm,
                "tokens": tokens,
                "tokens_per_second": tokens_per_second,
                "mfu": mfu,
                "peak_memory": memory,  # bytes
            },
        )
        on_gpu = self.ranks.device.type == "cuda"
        held = f", {memory / 1e9:.1f} GB" if on_gpu else ""  # a CPU's has PyTorch in it, too
        bar.set_postfix_str(
            f"loss {result.loss:.3f}, lr {result.learning_rate:.1e}, "
            f"norm {result.grad_norm:.2f}, {tokens_per_second:,.0f} tok/s, "
            f"MFU {'n/a' if mfu is None else f'{mfu:.0%}'}{held}"
        )

    def _report_validation(self, result: Validation) -> None:
        """One line into the metrics, and one for the user."""
        if self.metrics:
            bits = result.bits_per_byte and result.bits_per_byte.value
            self.metrics.write("val", self.step, {"loss": result.loss, "bits_per_byte": bits})
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
        with memory_errors(advice), trainer.folder.owned():
            trainer.run()


if __name__ == "__main__":
    sys.exit(run_script(train, CONFIG))

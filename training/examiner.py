"""What a run asks of its model now and then: a validation, a task's questions, a text.

All of it is asked of the averaged weights, if there are any, and leaves the training as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import tiktoken
import torch

from common.errors import UserError
from config import Config, task_names
from model import GPT
from scoring import Estimate, Scorer, Validation, evaluating, validate
from shards import TokenStream
from step import SAMPLE, Stepper, draw_seed
from tasks import load_questions
from tokenizer import token_byte_lengths

SAMPLE_TOKENS = 100  # length of a sample


class Examiner:
    """Asks the model of a run. Every rank has one: they share the work."""

    def __init__(
        self,
        config: Config,
        stepper: Stepper,
        val_stream: TokenStream | None,
        encoding: tiktoken.Encoding | None,
        asked_to_stop: Callable[[], bool],
    ) -> None:
        """Fetch all that will be asked, rather than at the first time.

        A machine without the `encoding` keeps all others from what needs text. Raises UserError if
        questions can't be had, or don't fit into the model's context.
        """
        self.config, self.stepper, self.ranks = config, stepper, stepper.ranks
        self.val_stream, self.asked_to_stop = val_stream, asked_to_stop
        self.encoding = None if self.ranks.anywhere(encoding is None) else encoding
        self.byte_lengths = token_byte_lengths(self.encoding) if self.encoding else None
        self.tasks = {
            name: self.ranks.in_turn(partial(load_questions, name))
            for name in task_names(config.log.eval_tasks)
        }
        if self.tasks and not self.encoding:
            raise UserError("log.eval_tasks needs GPT-2's vocabulary, which can't be had here")
        for questions in self.tasks.values():
            questions.check_lengths(self._scorer())

    def _scorer(self) -> Scorer:
        train, model = self.config.train, self.stepper.model
        batch_tokens = train.micro_batch_size * model.config.block_size
        return Scorer(model, self.encoding, self.ranks, batch_tokens, self.asked_to_stop)

    @contextmanager
    def _plain_model(self) -> Iterator[GPT]:
        """The averaged weights, without dropout, gradients or compiled code."""
        eager = torch.compiler.set_stance("force_eager")
        with self.stepper.averaged(), evaluating(self.stepper.model), eager:
            yield self.stepper.model

    def validate(self) -> Validation:
        """The loss on the validation split. Raises BrokenOff if a rank was asked to stop."""
        with self.stepper.averaged(), evaluating(self.stepper.wrapped):
            return validate(
                self.stepper.loss_of,
                self.val_stream,
                self.config.model.block_size,
                self.config.train.micro_batch_size,
                self.config.log.eval_tokens,
                self.ranks,
                self.byte_lengths,
                self.asked_to_stop,
            )

    def ask(self, name: str) -> dict[str, Estimate]:
        """The scores in a task.

        Raises BrokenOff if a rank was asked to stop, FloatingPointError if the weights are damaged.
        """
        with self._plain_model(), self.stepper.autocast():
            return self.tasks[name].ask(self._scorer(), stride=self.config.model.block_size)

    def sample(self, step: int) -> str:
        """A text from <|endoftext|> to the next, as the model writes it after `step`.

        If its weights are damaged, a word on that: a step that finds out tells what to do.
        """
        generator = torch.Generator(self.ranks.device)
        generator.manual_seed(draw_seed(SAMPLE, self.config.train.seed, step, 0))
        end = self.encoding.eot_token
        start = torch.tensor([[end]], device=self.ranks.device)
        with self._plain_model() as model:
            tokens = model.generate(
                start, SAMPLE_TOKENS, temperature=0.8, top_k=50, generator=generator
            )
            try:
                written = itertools.takewhile(lambda token: token != end, map(int, tokens))
                return self.encoding.decode(list(written))
            except FloatingPointError as error:
                return f"nothing: {error}"

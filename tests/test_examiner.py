"""What a run asks of its model now and then."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import metrics_of

import train
from checkpoint import read_checkpoint
from config import load_config
from data import load_windows
from distributed import Ranks
from model import GPT, dtype_of_products
from optim import drop_average, swap_average
from scoring import Scorer
from shards import VOCABULARY, TokenStream, encoding_of, shard_header
from tokenizer import gpt2_encoding, save_vocabulary

ALONE = Ranks(torch.device("cpu"))


def test_validation_loss_and_bits_per_byte_are_what_the_model_says(trained, shards):
    checkpoint = read_checkpoint(trained / "checkpoints" / "step_000040")
    model = GPT(checkpoint.meta.model).eval()
    checkpoint.load_model(model)
    stream, encoding = TokenStream(shards, "val"), encoding_of(shards)
    nats, text = 0.0, b""
    for window in range(512 // 32):
        inputs, targets = load_windows(stream, [window], 32)
        with torch.no_grad():
            nats += model(inputs, targets).item() * 32
        text += encoding.decode_bytes([int(i) for i in targets.flatten() if i < 299])
    line = metrics_of(trained, "val")[-1]
    assert line["step"] == 40
    assert line["loss"] == pytest.approx(nats / 512, rel=1e-6)
    assert line["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text), rel=1e-6)
    assert checkpoint.meta.val_loss == line["loss"]
    assert checkpoint.meta.best_val_loss == min(m["loss"] for m in metrics_of(trained, "val"))


def test_samples_are_printed_now_and_then(call, tiny, shards, tmp_path):
    arguments = ("--train.max_steps", 4, "--log.sample_every", 2, "--log.eval_every", 0)
    result = call("train", tiny, "--data.dir", shards, "--train.out", tmp_path / "run", *arguments)
    assert "step 2 writes:\n" in result.err
    assert "step 4 writes:\n" in result.err
    assert result.out == ""


def test_a_sample_ends_where_its_text_does(configure, monkeypatch):
    trainer = train.Trainer(configure(), ALONE)
    tokens = [torch.tensor([id]) for id in (65, 66, 299, 67)]
    monkeypatch.setattr(GPT, "generate", lambda *_, **__: iter(tokens))
    assert trainer.examiner.sample(trainer.step) == trainer.examiner.encoding.decode([65, 66])


def test_a_sample_is_drawn_anew_for_every_step_and_the_same_when_it_is_repeated(configure):
    trainer = train.Trainer(configure(), ALONE)
    texts = [trainer.examiner.sample(step) for step in (3, 4, 3)]
    assert texts[0] == texts[2] != texts[1]


def test_weights_that_write_nothing_are_told_of_instead_of_a_sample(configure, capfd):
    """Finite, but too large to compute with: the run goes on to the steps that tell what to do."""
    wild = ("--optim.learning_rate", 1e30, "--optim.warmup_steps", 0, "--log.eval_every", 0)
    with pytest.raises(train.UserError, match="3 in a row, which is one too many"):
        train.train(configure(*wild, "--log.sample_every", 1, "--train.max_skipped_steps", 2))
    assert "step 1 writes:\nnothing: logits aren't finite" in capfd.readouterr().err


def test_a_task_that_spoilt_weights_cannot_do_is_told_of_and_the_run_goes_on(configure, capfd):
    trainer = train.Trainer(configure(), ALONE)
    trainer.model.ln_f.weight.data[0] = math.nan

    def ask(scorer: Scorer, stride: int) -> dict:
        return scorer.score([scorer.cut([], [1])], "a task")

    trainer.examiner.tasks = {"lambada": SimpleNamespace(ask=ask)}
    trainer.run_tasks(["lambada"])
    told = "step 0: no score in lambada: probabilities aren't numbers: the weights are damaged"
    assert told in capfd.readouterr().err


def test_samples_and_tasks_are_the_averages(configure, monkeypatch):
    config = configure("--optim.average_share", 0.1, "--optim.warmup_steps", 0)
    trainer = train.Trainer(config, ALONE)
    for _ in range(4):
        trainer.train_step()
    seen = []
    asked = SimpleNamespace(
        ask=lambda *_, **__: seen.append(trainer.model.wte.weight.clone()) or {}
    )
    trainer.examiner.tasks = {"lambada": asked}
    told = trainer.examiner.sample(trainer.step)
    trainer.run_tasks(["lambada"])
    swap_average(trainer.stepper.optimizer)
    drop_average(trainer.stepper.optimizer)  # so the model is the average for good
    assert trainer.examiner.sample(trainer.step) == told
    assert torch.equal(trainer.model.wte.weight, seen[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tasks_are_asked_in_the_arithmetic_of_the_run(configure, dtype):
    trainer, seen = train.Trainer(configure("--train.dtype", dtype), ALONE), []

    def ask(_: Scorer, stride: int) -> dict:
        assert stride == 32  # the whole context
        seen.append(dtype_of_products(trainer.model.wte.weight))
        return {}

    trainer.examiner.tasks = {"lambada": SimpleNamespace(ask=ask)}
    trainer.run_tasks(["lambada"])
    assert seen == [getattr(torch, dtype)]


def test_downloaded_shards_train_where_gpt2s_vocabulary_cannot_be_had(
    call, tiny, tmp_path, monkeypatch
):
    """llm.c's shards come without a manifest. The network is away, and the cache empty."""
    tokens = np.random.RandomState(0).randint(0, 50_257, 5000).astype("<u2")
    for name in ("fineweb_train_000001.bin", "fineweb_val_000000.bin"):
        (tmp_path / name).write_bytes(shard_header(5000) + tokens.tobytes())

    def unplugged(name: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("tiktoken.get_encoding", unplugged)
    arguments = ("--data.dir", tmp_path, "--train.out", tmp_path / "o", "--train.max_steps", 2)
    result = call("train", tiny, *arguments, "--log.sample_every", 1)
    assert result.status == 0
    assert "no bits per byte and no samples: GPT-2's vocabulary is not in" in result.err
    assert metrics_of(tmp_path / "o", "val")[-1]["bits_per_byte"] is None
    questions = SimpleNamespace(check_lengths=lambda scorer: None)
    monkeypatch.setattr("training.examiner.load_questions", lambda name: questions)
    tasks = ("--log.eval_tasks", "hellaswag", "--train.max_steps", 3)
    error = call("train", tiny, *arguments, *tasks).error()
    assert "log.eval_tasks needs GPT-2's vocabulary, which can't be had here" in error

    (tmp_path / VOCABULARY).write_text("rubbish")
    error = call("train", tiny, *arguments, "--train.max_steps", 3).error()
    assert f"the vocabulary {tmp_path / VOCABULARY} has SHA-256" in error


@pytest.mark.parametrize("is_ours", [True, False])
def test_gpt2s_vocabulary_is_found_in_the_run_folder_if_it_is_there(
    tiny, tmp_path, monkeypatch, is_ours
):
    """An earlier run may have left another there."""
    tokens = np.arange(5000).astype("<u2")
    for name in ("fineweb_train_000001.bin", "fineweb_val_000000.bin"):
        (tmp_path / name).write_bytes(shard_header(5000) + tokens.tobytes())
    (tmp_path / "o").mkdir()
    vocabulary = tmp_path / "o" / VOCABULARY
    if is_ours:
        save_vocabulary(gpt2_encoding(), vocabulary)
    else:
        vocabulary.write_text("rubbish")

    def unplugged(name: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("tiktoken.get_encoding", unplugged)
    words = [str(tiny), "--data.dir", str(tmp_path), "--train.out", str(tmp_path / "o")]
    trainer = train.Trainer(load_config(words), ALONE)
    assert (trainer.examiner.encoding is not None) == is_ours


def test_a_machine_without_the_vocabulary_keeps_all_from_what_needs_text(configure, monkeypatch):
    monkeypatch.setattr(Ranks, "anywhere", lambda ranks, here: True)
    examiner = train.Trainer(configure(), ALONE).examiner
    assert examiner.encoding is None and examiner.byte_lengths is None


def test_a_validation_is_of_the_averages(configure):
    config = configure("--optim.average_share", 0.1, "--optim.warmup_steps", 0)
    trainer = train.Trainer(config, ALONE)
    for _ in range(4):
        trainer.train_step()
    loss = trainer.examiner.validate().loss
    swap_average(trainer.stepper.optimizer)
    drop_average(trainer.stepper.optimizer)  # so the model is the average for good
    assert trainer.examiner.validate().loss == loss

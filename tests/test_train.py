"""The training loop in one process: what a step computes, what a run writes, what it refuses."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, Result, exchange_shard, files_of, metrics_of
from safetensors.torch import load_file
from test_checkpoint import rewrite_meta

import train
from checkpoint import MODEL, newest_checkpoint, read_checkpoint
from common.errors import Stopped
from data import step_windows
from distributed import Ranks
from scoring import Estimate, Scorer, Validation
from shards import MANIFEST, Manifest, ShardRecord, TokenizerRecord, read_manifest, shard_header
from step import Stepper, StepResult
from tasks import load_questions
from training import examiner
from training.guard import WINDOW, SpikeMemory
from training.metrics import Metrics

ALONE = Ranks(torch.device("cpu"))


# A run


def test_a_compiled_model_computes_the_same_and_is_not_the_one_that_is_saved(configure, call):
    config = configure("--train.compile", "true", "--train.max_steps", 2, "--model.dropout", 0)
    compiled = train.Trainer(config, ALONE)
    plain = train.Trainer(configure("--train.max_steps", 2, "--model.dropout", 0), ALONE)
    for _ in range(2):
        expected = plain.train_step()
        assert compiled.train_step().loss == pytest.approx(expected.loss, rel=1e-5)
    assert compiled.validate().loss == pytest.approx(plain.validate().loss, rel=1e-4)
    with compiled.folder.owned():
        compiled.folder.prepare(compiled.tokenizer, compiled.step)
        compiled.save(None)
    result = call("sample", "--checkpoint", config.train.out, "--max-new-tokens", 3, "--seed", 1)
    assert result.status == 0


def test_evaluate_prints_what_training_told(call, trained, shards):
    result = call("evaluate", "--checkpoint", trained, "--tokens", 512)
    line = metrics_of(trained, "val")[-1]
    assert f"loss            {line['loss']:.4f} nats" in result.out
    assert f"bits per byte   {line['bits_per_byte']:.3f}\n" in result.out
    assert "xz -9e" in result.out


def test_a_run_that_reads_each_document_by_itself_is_evaluated_as_it_was_trained(
    configure, call, short_documents, tmp_path
):
    settings = ("--data.dir", short_documents, "--data.document_mask", "true")
    train.train(configure(*settings, "--train.max_steps", 5))
    (told,) = metrics_of(tmp_path / "run", "val")
    checkpoint, output = (
        newest_checkpoint(tmp_path / "run" / "checkpoints"),
        tmp_path / "found.json",
    )

    def evaluated(masked: bool) -> float:
        change = {"document_mask": masked}
        rewrite_meta(checkpoint.path, lambda meta: meta["config"]["data"].update(change))
        arguments = ("--checkpoint", tmp_path / "run", "--tokens", 512, "--output", output)
        result = call("evaluate", *arguments)
        assert (" nats per token, each document by itself\n" in result.out) == masked
        (found,) = json.loads(output.read_text())["results"]
        assert found["document_mask"] == masked
        return found["metrics"]["loss"]["value"]

    assert evaluated(True) == pytest.approx(told["loss"], rel=1e-6)
    assert abs(evaluated(False) - told["loss"]) > 1e-3


def test_a_run_that_is_to_stop_writes_no_sample_first(configure, capfd):
    """Whoever asked may not wait for long."""
    trainer = train.Trainer(configure("--log.sample_every", 1), ALONE)
    trainer.stop.number = signal.SIGTERM
    with trainer.folder.owned(), pytest.raises(train.Stopped, match="stopped after step 1;"):
        trainer.run()
    assert newest_checkpoint(trainer.folder.path / "checkpoints").meta.step == 1
    assert "step 1 writes:" not in capfd.readouterr().err


@pytest.mark.parametrize("step", [2, 4])
def test_a_task_that_is_broken_off_is_made_up_for(configure, tmp_path, monkeypatch, step):
    """After a step that isn't saved otherwise, and after the last, which has been by then."""
    settings = ("--train.max_steps", 4, "--log.eval_every", 2, "--log.eval_tasks_every", 2)
    settings += ("--train.checkpoint_every", 4)

    def start(name: str) -> train.Trainer:
        trainer = train.Trainer(configure(*settings, "--train.out", tmp_path / name), ALONE)
        questions = load_questions("lambada", ROOT / "tests/items/lambada.jsonl")
        trainer.examiner.tasks = {"lambada": questions}
        return trainer

    def finish(trainer: train.Trainer) -> list[dict]:
        with trainer.folder.owned():
            trainer.run()
        lines = map(json.loads, (trainer.folder.path / "metrics.jsonl").read_text().splitlines())
        return [{**line, "tokens_per_second": 0, "peak_memory": 0} for line in lines]

    trainer, score = start("run"), Scorer._score_batch
    saved_before = set()

    def stop_and_score(scorer: Scorer, batch: list) -> torch.Tensor:
        saved_before.update((trainer.folder.path / "checkpoints").glob("step_*"))
        trainer.stop.number = signal.SIGTERM * (trainer.step == step)
        return score(scorer, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "_score_batch", stop_and_score)
        with pytest.raises(train.Stopped, match=f"stopped after step {step};"):
            finish(trainer)
    told = [line["step"] for line in metrics_of(trainer.folder.path, "lambada")]
    assert told == [2][: step // 2 - 1]
    saved = newest_checkpoint(trainer.folder.path / "checkpoints")
    assert (saved.path in saved_before) == (step == 4)  # it doesn't wait for the task
    assert saved.meta.val_loss == metrics_of(trainer.folder.path, "val")[-1]["loss"]
    before = saved.path.stat().st_mtime_ns, files_of(saved.path)
    assert finish(start("run")) == finish(start("undisturbed"))
    assert (saved.path.stat().st_mtime_ns, files_of(saved.path)) == before  # not saved once more


def test_a_run_that_is_to_stop_in_its_last_step_is_done(configure, capfd):
    trainer = train.Trainer(configure("--train.max_steps", 1, "--log.eval_every", 0), ALONE)
    trainer.stop.number = signal.SIGTERM
    with trainer.folder.owned():
        trainer.run()
    assert newest_checkpoint(trainer.folder.path / "checkpoints").meta.step == 1
    assert "done: python sample.py" in capfd.readouterr().err


@pytest.mark.parametrize("last", [3, 4, 10])
def test_a_step_that_is_looked_at_late_is_told_and_ends_the_run_all_the_same(
    configure, tmp_path, monkeypatch, last
):
    """As on a GPU, where the next step is under way by then: who asks is heard one step later."""
    take, told = Stepper.take, []
    for late in (False, True):
        asked_at = last - late

        def asked(
            stepper: Stepper, step: int, asked_to_stop: bool, at: int = asked_at
        ) -> StepResult:
            return take(stepper, step, asked_to_stop or step + 1 == at)

        settings = ("--train.max_steps", 10, "--log.eval_every", 4, "--train.checkpoint_every", 5)
        trainer = train.Trainer(configure(*settings, "--train.out", tmp_path / f"{late}"), ALONE)
        with monkeypatch.context() as patch, trainer.folder.owned():
            patch.setattr(Stepper, "take", asked)
            if late:
                patch.setattr(StepResult, "is_queued", True)
            end = "ended"
            try:
                trainer.run()
            except Stopped as stopped:
                end = str(stopped)
        lines = [
            {key: line[key] for key in line.keys() - {"tokens_per_second", "peak_memory"}}
            for line in metrics_of(trainer.folder.path) + metrics_of(trainer.folder.path, "val")
        ]
        told.append((end, lines, newest_checkpoint(trainer.folder.checkpoints).meta.step))
    assert told[0] == told[1]
    assert told[0][2] == last


def checkpoints_of(run: Path) -> dict[str, tuple]:
    """What a run has kept: (losses, the weights) by name."""
    kept = {path.name: read_checkpoint(path) for path in (run / "checkpoints").iterdir()}
    return {
        name: (saved.meta.val_loss, saved.meta.best_val_loss, saved.model_sha256())
        for name, saved in kept.items()
    }


@pytest.mark.parametrize(
    ("stopped", "killed", "step", "best"),
    [
        ("before", "", 4, 4),
        ("before", "", 4, 2),
        ("in", "", 4, 4),
        ("in", "", 6, 6),
        ("in", "before the line", 6, 6),
        ("in", "after the line", 6, 6),
    ],
)
def test_a_checkpoint_is_told_the_validation_that_was_made_up_for(
    configure, tmp_path, monkeypatch, stopped, killed, step, best
):
    """Or the best would be taken for one without a loss, and removed in time.

    The run is stopped before or in the validation after `step`, and perhaps killed when it makes
    up for it, before or after its line in metrics.jsonl.
    """
    settings = ("--train.max_steps", 6, "--log.eval_every", 2, "--train.checkpoint_every", 2)
    settings += ("--train.keep_checkpoints", 1)
    real_take, real_validate, real_write = Stepper.take, examiner.validate, Metrics.write
    fault = ""

    def take(stepper: Stepper, number: int, asked_to_stop: bool) -> StepResult:
        asked_to_stop |= (number + 1, "before") == (step, fault)
        return real_take(stepper, number, asked_to_stop)

    def validate(*arguments: object) -> Validation:
        """The real thing, but for its result: it gets better until step `best`, then worse."""
        if (trainer.step, "in") == (step, fault):
            trainer.stop.number = signal.SIGTERM
        found = real_validate(*arguments)
        return replace(found, estimate=Estimate(1.5 + abs(best - trainer.step), None))

    def write(metrics: Metrics, kind: str, number: int, values: dict) -> None:
        if (kind, "before the line") == ("val", fault):
            raise KeyboardInterrupt
        real_write(metrics, kind, number, values)
        if (kind, "after the line") == ("val", fault):
            raise KeyboardInterrupt

    def start(out: str) -> train.Trainer:
        return train.Trainer(configure(*settings, "--train.out", tmp_path / out), ALONE)

    def finish() -> None:
        with trainer.folder.owned():
            trainer.run()

    monkeypatch.setattr(Stepper, "take", take)
    monkeypatch.setattr(examiner, "validate", validate)
    monkeypatch.setattr(Metrics, "write", write)
    trainer = start("undisturbed")
    finish()
    trainer, fault = start("run"), stopped
    with pytest.raises(train.Stopped, match=f"stopped after step {step};"):
        finish()
    assert checkpoints_of(trainer.folder.path)[f"step_{step:06d}"][0] is None
    if killed:
        trainer, fault = start("run"), killed
        with pytest.raises(KeyboardInterrupt):
            finish()
    trainer, fault = start("run"), ""
    finish()
    kept = checkpoints_of(trainer.folder.path)
    assert kept == checkpoints_of(tmp_path / "undisturbed")
    assert kept[f"step_{best:06d}"][:2] == (1.5, 1.5)
    assert kept["step_000006"][1] == 1.5
    lines = [metrics_of(tmp_path / out, "val") for out in ("run", "undisturbed")]
    assert lines[0] == lines[1]


def test_a_finished_run_says_so_and_changes_nothing(call, tiny, shards, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    result = call("train", tiny, "--data.dir", shards, "--train.out", tmp_path / "run")
    assert result.status == 0
    assert "already finished: 40 steps are done" in result.err
    assert all(path.read_bytes() == content for path, content in before.items())


# What is refused


def test_an_unknown_setting_is_one_line(call, tiny):
    assert "did you mean --model.n_layer?" in call("train", tiny, "--model.n_layr", 3).error()


def test_a_missing_data_folder_is_one_line(call, tiny, tmp_path):
    result = call("train", tiny, "--data.dir", tmp_path / "nowhere", "--train.out", tmp_path / "o")
    assert "nowhere doesn't exist: make it with prepare_fineweb.py" in result.error()
    assert not (tmp_path / "o").exists()


def test_a_truncated_shard_is_one_line(call, tiny, shards, tmp_path):
    shutil.copytree(shards, tmp_path / "data")
    shard = tmp_path / "data" / "train_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    result = call("train", tiny, "--data.dir", tmp_path / "data", "--train.out", tmp_path / "o")
    assert "train_000000.bin is damaged: its header says 4000 tokens" in result.error()


def test_a_step_that_cannot_be_shared_out_is_one_line(call, tiny, shards, tmp_path):
    """Before the data is read, which may take minutes."""
    shutil.copytree(shards, tmp_path / "data")
    (tmp_path / "data" / "train_000000.bin").write_bytes(b"damaged")
    arguments = ("--data.dir", tmp_path / "data", "--train.out", tmp_path / "o")
    result = call("train", tiny, *arguments, "--train.tokens_per_step", 500)
    assert "nearest: 448 or 512" in result.error()


def test_the_gradient_scaler_of_float16_is_resumed(configure):
    config = configure("--train.dtype", "float16", "--train.max_steps", 3)
    trainer = train.Trainer(config, ALONE)
    trainer.train_step()
    trainer.stepper.scaler.update(new_scale=1024.0)
    with trainer.folder.owned():
        trainer.folder.prepare(trainer.tokenizer, trainer.step)
        trainer.save(None)
    assert train.Trainer(config, ALONE).stepper.scaler.state_dict()["scale"] == 1024.0


def test_the_norms_that_a_spike_is_told_from_are_resumed(configure):
    config = configure("--train.skip_spikes", 6)
    trainer = train.Trainer(config, ALONE)
    norms = [trainer.train_step().grad_norm for _ in range(3)]
    with trainer.folder.owned():
        trainer.folder.prepare(trainer.tokenizer, trainer.step)
        trainer.save(None)
    memory = train.Trainer(config, ALONE).stepper.spikes.memory()
    assert (memory.norms[:4], memory.count) == ((*norms, 0), 3)


def test_how_many_steps_in_a_row_were_skipped_is_resumed(configure):
    trainer = train.Trainer(configure(), ALONE)
    trainer.train_step()
    trainer.skipped = 2
    with trainer.folder.owned():
        trainer.folder.prepare(trainer.tokenizer, trainer.step)
        trainer.save(None)
    resumed = train.Trainer(configure(), ALONE)
    assert (resumed.step, resumed.skipped) == (1, 2)


def weights_of(folder: Path) -> list[torch.Tensor]:
    return list(load_file(folder / MODEL).values())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_average_of_weights_is_evaluated_and_saved_and_changes_nothing_that_is_learned(
    configure, call, tmp_path, name
):
    """Against all weights of a run without one, averaged in float64."""
    often = ("--train.checkpoint_every", 1, "--train.keep_checkpoints", 9, "--log.eval_every", 6)
    changes = ("--optim.name", name, "--train.max_steps", 6, *often)
    train.train(configure(*changes))
    averaged = (*changes, "--optim.average_share", 0.25, "--train.out", tmp_path / "averaged")
    train.train(configure(*averaged))
    plain, other = (tmp_path / run / "checkpoints" for run in ("run", "averaged"))
    told = [[line["loss"] for line in metrics_of(path.parent)] for path in (plain, other)]
    assert told[0] == told[1]
    expected = None
    for step in range(1, 7):
        weights = [weight.double() for weight in weights_of(plain / f"step_{step:06}")]
        pull = 4 / (step + 3)  # 1 in the first step
        expected = [m + pull * (w - m) for m, w in zip(expected or weights, weights)]
        for mean, weight in zip(weights_of(other / f"step_{step:06}"), expected):
            torch.testing.assert_close(mean.double(), weight, rtol=1e-5, atol=1e-7)
    (validation,) = metrics_of(other.parent, "val")
    assert validation != metrics_of(plain.parent, "val")[0]
    result = call("evaluate", "--checkpoint", other.parent, "--tokens", 512)
    assert f"loss            {validation['loss']:.4f} nats" in result.out


@pytest.mark.parametrize(("then", "now"), [(0.1, 0.1), (0.1, 0.0), (0.0, 0.1)])
def test_a_run_with_an_average_of_weights_goes_on_to_the_same_bits(configure, then, now):
    """Also one that begins with it, or does without, on its way."""
    config = configure("--optim.average_share", then, "--train.max_steps", 6)
    straight = train.Trainer(config, ALONE)
    for _ in range(3):
        straight.train_step()
    before = [weight.clone() for weight in straight.model.parameters()]
    with straight.folder.owned():
        straight.folder.prepare(straight.tokenizer, straight.step)
        straight.save(None)
    assert all(map(torch.equal, straight.model.parameters(), before))
    again = train.Trainer(replace(config, optim=replace(config.optim, average_share=now)), ALONE)
    for trainer in (straight, again):
        trainer.stepper.config = again.config
        for _ in range(2):
            trainer.train_step()
    assert all(map(torch.equal, again.model.parameters(), straight.model.parameters()))
    for trainer in (straight, again):
        with trainer.stepper.averaged():
            trainer.kept = [weight.clone() for weight in trainer.model.parameters()]
    is_averaged = not all(map(torch.equal, again.kept, again.model.parameters()))
    assert is_averaged == (now > 0)
    assert now == 0 or all(map(torch.equal, again.kept, straight.kept))


def test_an_evaluation_that_is_made_up_for_is_of_the_model_that_was_saved(configure):
    """Also if the run goes on without its average."""
    changes = ("--train.max_steps", 3, "--log.eval_every", 3)
    trainer = train.Trainer(configure(*changes, "--optim.average_share", 0.1), ALONE)
    for _ in range(3):
        trainer.train_step()
    with trainer.folder.owned():
        trainer.folder.prepare(trainer.tokenizer, trainer.step)
        trainer.save(None)
    expected = trainer.validate().loss
    train.train(configure(*changes))
    found = newest_checkpoint(trainer.folder.path / "checkpoints")
    assert (found.meta.step, found.meta.val_loss) == (3, expected)


def test_an_update_that_spoils_the_weights_costs_no_checkpoint_from_before_it(configure, tmp_path):
    often = ("--train.checkpoint_every", 1, "--train.keep_checkpoints", 2, "--log.eval_every", 0)
    train.train(configure(*often, "--train.max_steps", 4))
    wild = ("--optim.learning_rate", 1e30, "--train.max_skipped_steps", 3)
    with pytest.raises(train.UserError, match="Go back to .*step_000004: remove those after it"):
        train.train(configure(*often, *wild))
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir())[:2] == ["step_000004", "step_000005"]
    for path in sorted(folder.iterdir())[1:]:
        shutil.rmtree(path)
    train.train(configure(*often, "--train.max_steps", 6))


def test_the_way_out_is_the_same_when_the_next_step_is_under_way_already(configure):
    """As on a GPU, where a step is looked at late."""
    often = ("--train.checkpoint_every", 1, "--train.keep_checkpoints", 9, "--log.eval_every", 0)
    train.train(configure(*often, "--train.max_steps", 5))
    trainer = train.Trainer(configure(*often), ALONE)
    result = StepResult(8, 0.001, torch.tensor([math.nan, math.nan, 1.0, 0.0]))
    trainer.skipped = 3  # steps 6 to 8, after an update that may be what spoiled the weights
    for trainer.step in (8, 9):
        assert "Go back to" in trainer._way_out(result)
        assert "step_000004: remove those after it" in trainer._way_out(result)
    trainer.folder.damaged.add(trainer.folder.checkpoints / "step_000004")
    assert "step_000003: remove those after it" in trainer._way_out(result)


def test_a_run_whose_last_update_spoils_the_weights_is_not_called_done(configure, capsys):
    wild = ("--optim.learning_rate", 1e39, "--log.eval_every", 0, "--train.max_steps", 1)
    for _ in range(2):  # nor finished, when the command is given again
        with pytest.raises(train.UserError, match="the weights after step 1 aren't finite"):
            train.train(configure(*wild))
    told = capsys.readouterr().err
    assert "done:" not in told and "finished" not in told


def test_norms_that_stay_high_are_told_from_a_learning_rate_that_is_too_high(configure):
    few = ("--train.skip_spikes", 1e-3, "--train.max_skipped_steps", 1, "--train.max_steps", 200)
    with pytest.raises(train.UserError, match="raise --train.skip_spikes, or leave it out"):
        train.train(configure(*few, "--train.tokens_per_step", 64, "--log.eval_every", 0))


def test_canonical_sums_are_made_by_one_thread(configure):
    """On a CPU: several add up in another order. OMP_NUM_THREADS may say anything."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        train.train(configure("--train.max_steps", 1, "--train.reduction", "canonical"))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


def test_a_token_that_is_not_in_the_vocabulary_is_one_line(call, tiny, shards, tmp_path):
    shutil.copytree(shards, tmp_path / "data")
    shard = tmp_path / "data" / "train_000000.bin"
    shard.write_bytes(shard.read_bytes()[:1024] + b"\xff" * 8000)
    arguments = ("--data.dir", tmp_path / "data", "--train.out", tmp_path / "o")
    assert f"{shard} has been damaged or changed" in call("train", tiny, *arguments).error()
    assert not (tmp_path / "o").exists()
    for name in ("manifest.json", "tokenizer.tiktoken"):  # now it is unknown, and GPT-2's
        (tmp_path / "data" / name).unlink()
    result = call("train", tiny, *arguments)
    assert f"{shard} has a token 65535, its vocabulary only 50,257" in result.error()


@pytest.mark.parametrize("name", ["train_000001.bin", "val_000000.bin"])
def test_a_shard_with_a_token_that_is_not_in_its_vocabulary_is_named_at_once(
    call, tiny, shards, tmp_path, name
):
    shutil.copytree(shards, tmp_path / "data")
    exchange_shard(tmp_path / "data", name, lambda tokens: tokens[:-2] + b"\x2c\x01")  # 300
    arguments = ("--data.dir", tmp_path / "data", "--train.out", tmp_path / "o")
    error = call("train", tiny, *arguments).error()
    assert f"{tmp_path / 'data' / name} has a token 300, its vocabulary only 300" in error
    assert not (tmp_path / "o").exists()


def test_without_validation_no_validation_split_is_needed(call, tiny, shards, tmp_path):
    shutil.copytree(shards, tmp_path / "data")
    for path in (tmp_path / "data").glob("val_*"):
        path.unlink()
    arguments = ("--data.dir", tmp_path / "data", "--train.out", tmp_path / "o")
    short = ("--train.max_steps", 2, "--log.eval_every", 0)
    assert call("train", tiny, *arguments, *short).status == 0
    assert "can't read the shard" in call("train", tiny, *arguments).error()


def test_compiling_without_a_compiler_names_the_setting(tiny, shards, tmp_path):
    """In an interpreter of its own: the server that others come from read CXX when it started."""
    settings = {"data.dir": shards, "train.out": tmp_path / "o", "train.compile": "true"}
    settings |= {"model.n_embd": 24, "model.n_layer": 1}
    words = [sys.executable, "train.py", str(tiny)]
    words += [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    without = {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, **without}, capture_output=True)
    error = Result(done.returncode, "", done.stderr.decode()).error()
    assert "--train.compile false" in error


def test_too_little_data_is_one_line(call, tiny, shards, tmp_path):
    arguments = ("--data.dir", shards, "--train.out", tmp_path / "o", "--model.block_size", 65536)
    result = call("train", tiny, *arguments, "--train.tokens_per_step", 131072)
    assert "one window takes 65,537" in result.error()


def test_another_vocabulary_file_beside_the_shards_is_one_line(call, tiny, shards, tmp_path):
    shutil.copytree(shards, tmp_path / "data")
    vocabulary = tmp_path / "data" / "tokenizer.tiktoken"
    vocabulary.write_bytes(vocabulary.read_bytes()[:-10])
    result = call("train", tiny, "--data.dir", tmp_path / "data", "--train.out", tmp_path / "o")
    assert "has SHA-256" in result.error()


def test_a_vocabulary_that_is_gone_is_one_line_before_the_first_step(call, tiny, tmp_path):
    """Nobody could read what the model writes."""
    data = tmp_path / "data"
    record = ShardRecord("train_000000.bin", "train", 3000, "")
    shard = shard_header(3000) + bytes(6000)
    record = replace(record, sha256=hashlib.sha256(shard).hexdigest())
    data.mkdir()
    (data / record.file).write_bytes(shard)
    tokenizer = TokenizerRecord("bpe-300", 300, 64 * "0")
    (data / MANIFEST).write_text(Manifest({}, tokenizer, (record,)).to_json())
    options = ("--data.dir", data, "--train.out", tmp_path / "run", "--log.eval_every", 0)
    assert f"can't read the vocabulary {data}/tokenizer" in call("train", tiny, *options).error()
    assert not (tmp_path / "run").exists()


def test_losses_that_stay_not_finite_stop_the_run_and_never_reach_the_weights(configure):
    trainer = train.Trainer(configure("--train.max_skipped_steps", 1), ALONE)
    with torch.no_grad():
        trainer.model.ln_f.weight[0] = math.nan
    before = trainer.model.wte.weight.clone()
    result = trainer.train_step()
    assert torch.equal(trainer.model.wte.weight, before)
    assert not any(state["step"] for state in trainer.stepper.optimizer.state.values())
    assert trainer.count_skipped(result)
    with trainer.folder.owned(), pytest.raises(train.UserError, match="step 2: loss nan") as error:
        trainer.run()
    assert "2 in a row, which is one too many" in str(error.value)
    windows = step_windows(1, 16, trainer.train_stream.num_windows(32), seed=1337).tolist()
    assert f"it saw windows {windows[:4]}" in str(error.value)
    (line,) = metrics_of(trainer.folder.path, "skip")
    assert line == {"kind": "skip", "step": 2, "loss": None, "grad_norm": None, "windows": windows}


def test_a_spike_in_float16_is_told_and_is_no_overflow(configure):
    settings = ("--train.dtype", "float16", "--train.skip_spikes", 6)
    trainer = train.Trainer(configure(*settings), ALONE)
    trainer.stepper.spikes.remember(SpikeMemory((0.01,) * WINDOW, WINDOW))
    before = trainer.model.wte.weight.clone()
    result = trainer.train_step()
    assert trainer.count_skipped(result)
    assert torch.equal(trainer.model.wte.weight, before)


def test_gradients_in_float16_that_are_never_finite_stop_the_run(configure):
    """An overflow lowers the scaler's factor, until there is nothing left to lower."""
    settings = ("--train.dtype", "float16", "--train.max_skipped_steps", 2)
    trainer = train.Trainer(configure(*settings), ALONE)
    trainer.model.ln_f.weight.register_hook(lambda gradient: gradient * math.nan)
    with trainer.folder.owned(), pytest.raises(train.UserError, match="skipped, 3 in a row"):
        trainer.run()
    assert 16 < trainer.step < 25  # 65,536 is 2 to the 16th


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_running_out_of_memory_names_the_knob(call, tiny, shards, tmp_path, monkeypatch, device):
    def refuse(*_: object) -> None:
        if device == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        torch.empty(1 << 60)  # the real thing

    monkeypatch.setattr(Stepper, "rehearse", refuse)
    result = call("train", tiny, "--data.dir", shards, "--train.out", tmp_path / "run")
    assert "lower --train.micro_batch_size" in result.error()


def test_the_best_is_saved_when_it_is_found_if_asked_for(configure, tmp_path):
    rarely = ("--train.max_steps", 6, "--train.checkpoint_every", 100, "--log.eval_every", 2)
    wild = ("--optim.learning_rate", 0.3, "--optim.min_learning_rate", 0.3)  # soon gets worse
    changes = (*rarely, *wild, "--train.keep_checkpoints", 1)
    train.train(configure(*changes, "--train.save_best", "true"))
    losses = {line["step"]: line["loss"] for line in metrics_of(tmp_path / "run", "val")}
    best = min(losses, key=losses.get)
    assert best < 6
    kept = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert sorted(kept) == [f"step_{best:06}", "step_000006"]
    train.train(configure(*changes, "--train.out", tmp_path / "plain"))
    assert [path.name for path in (tmp_path / "plain" / "checkpoints").iterdir()] == ["step_000006"]


def test_each_machine_checks_all_of_its_shards(configure, monkeypatch):
    """Its disk is its own, whatever the ranks of its processes among all."""
    checked, config = [], configure()
    monkeypatch.setattr(
        train, "check_contents", lambda folder, mine, size: checked.extend(r.file for r in mine)
    )
    for rank in (2, 3):  # the second of two machines
        ranks = Ranks(torch.device("cpu"), rank, rank - 2, 4, 2)
        some = SimpleNamespace(config=config, ranks=ranks)
        train.Trainer._open_data(some, Path(config.data.dir))
    shards = read_manifest(Path(config.data.dir)).shards
    assert sorted(checked) == sorted(record.file for record in shards)

"""What a run goes on from, and that it is refused what doesn't fit."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import exchange_shard, metrics_of
from safetensors.torch import load_file

import train
from checkpoint import MODEL, OPTIMIZER, newest_checkpoint, read_checkpoint
from common.errors import Stopped, UserError
from config import Config
from distributed import Ranks
from shards import MANIFEST, VOCABULARY
from training.resume import _copy_here, check_can_go_on, check_same_run, check_schedule

ALONE = Ranks(torch.device("cpu"))


def test_data_of_another_vocabulary_is_one_line(call, tiny, trained, tmp_path):
    import prepare_fineweb

    (tmp_path / "text.txt").write_text("Some other text, and then some more of it. " * 200)
    prepare = f"--source {tmp_path}/text.txt --out {tmp_path}/data --tokenizer bpe:270"
    prepare_fineweb.main(
        prepare_fineweb.parse_arguments([*prepare.split(), "--val-tokens", "100", "--workers", "1"])
    )
    shutil.copytree(trained, tmp_path / "run")
    arguments = ("--data.dir", tmp_path / "data", "--train.max_steps", 50)
    result = call("train", tiny, *arguments, "--train.out", tmp_path / "run")
    assert "has the vocabulary bpe-270 of 270 tokens" in result.error()
    result = call("evaluate", "--checkpoint", trained, "--data", tmp_path / "data")
    assert "has the vocabulary bpe-270 of 270 tokens" in result.error()


def test_without_a_manifest_a_run_knows_its_shards_by_their_lengths_and_ends(
    call, tiny, shards, tmp_path
):
    data = shutil.copytree(shards, tmp_path / "data")
    for name in (MANIFEST, VOCABULARY):
        (data / name).unlink()
    options = ("--data.dir", data, "--train.out", tmp_path / "run", "--train.checkpoint_every", 1)
    assert call("train", tiny, *options, "--train.max_steps", 1).status == 0
    assert "resuming after step 1" in call("train", tiny, *options, "--train.max_steps", 2).err
    shard = data / "train_000000.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-2] + bytes(2))
    told = call("train", tiny, *options, "--train.max_steps", 3).error()
    assert f"was trained on other data than {data} holds now" in told


def test_a_run_goes_on_with_its_own_vocabulary_if_need_be(call, tiny, trained, shards, tmp_path):
    data, run = (shutil.copytree(a, tmp_path / a.name) for a in (shards, trained))
    (data / VOCABULARY).unlink()
    options = ("--data.dir", data, "--train.out", run, "--train.max_steps", 41)
    assert "resuming after step 40" in call("train", tiny, *options).err
    assert (run / VOCABULARY).read_bytes() == (shards / VOCABULARY).read_bytes()
    bits = [line["bits_per_byte"] for line in metrics_of(run, "val")]
    assert len(bits) == 3 and bits[2] == pytest.approx(bits[1], rel=0.1)


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("model.n_layer", 3),
        ("model.n_embd", 64),
        ("train.seed", 5),
        ("train.tokens_per_step", 1024),
        ("data.document_mask", "true"),
    ],
)
def test_a_run_cannot_go_on_as_another_run(call, tiny, shards, trained, change, value):
    arguments = ("--data.dir", shards, "--train.out", trained, "--train.max_steps", 50)
    message = call("train", tiny, *arguments, f"--{change}", value).error()
    assert f"was trained with {change} = " in message
    assert f"now it is {value}" in message


def test_a_setting_of_another_type_is_another_setting(configure):
    config = configure("--data.document_mask", "true")
    then = asdict(config) | {"data": {"document_mask": 1}}
    with pytest.raises(UserError, match="data.document_mask = 1, now it is true"):
        check_same_run(then, config, Path("step_000001"))


def test_a_checkpoint_that_tells_no_settings_is_taken_to_have_the_defaults(configure):
    config = configure()
    with pytest.raises(UserError, match="was trained with model.n_layer = 12, now it is 2"):
        check_same_run({}, config, Path("step_000001"))


def test_a_used_run_folder_is_not_overwritten_when_resuming_is_off(call, tiny, shards, trained):
    arguments = ("--data.dir", shards, "--train.out", trained, "--train.resume", "false")
    assert "holds step_000040 and train.resume = false" in call("train", tiny, *arguments).error()


def test_a_run_does_not_go_on_with_other_data(call, tiny, shards, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    shutil.copytree(shards, tmp_path / "data")
    arguments = ("--data.dir", tmp_path / "data", "--train.out", tmp_path / "run")
    assert call("train", tiny, *arguments, "--train.max_steps", 41).status == 0  # the same, moved
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    manifest["shards"].pop()
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    message = call("train", tiny, *arguments, "--train.max_steps", 42).error()
    assert "was trained on other data" in message


def test_fine_tuning_begins_with_the_weights_of_another_run(call, tiny, shards, trained, tmp_path):
    arguments = ("--data.dir", shards, "--train.out", tmp_path / "o", "--train.init_from", trained)
    still = ("--optim.learning_rate", 0, "--optim.min_learning_rate", 0, "--train.max_steps", 1)
    result = call("train", tiny, *arguments, *still, "--model.dropout", 0.2)
    assert "beginning with the weights of" in result.err
    ours, theirs = (newest_checkpoint(run / "checkpoints") for run in (tmp_path / "o", trained))
    assert (ours.path / MODEL).read_bytes() == (theirs.path / MODEL).read_bytes()
    state = load_file(ours.path / OPTIMIZER)
    assert {state[name].item() for name in state if name.endswith("/step")} == {1}


def test_fine_tuning_may_take_a_shorter_context(configure, trained):
    shorter = ("--model.block_size", 16, "--train.micro_batch_size", 4)
    trainer = train.Trainer(configure("--train.init_from", trained, *shorter), ALONE)
    theirs = load_file(newest_checkpoint(trained / "checkpoints").path / MODEL)
    ours = trainer.model.state_dict()
    assert torch.equal(ours.pop("wpe.weight"), theirs.pop("wpe.weight")[:16])
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    trainer.train_step()


def test_validations_over_another_text_are_another_run(configure):
    """Their losses can't be compared, and so there would be no best."""
    train.train(configure("--train.max_steps", 2))
    more = ("--train.max_steps", 3, "--log.eval_tokens", 256)
    with pytest.raises(UserError, match="trained with log.eval_tokens = 512, now it is 256"):
        train.Trainer(configure(*more), ALONE)
    assert train.Trainer(configure(*more, "--log.eval_every", 0), ALONE).step == 2


def test_a_fine_tuning_that_goes_on_keeps_what_it_has_learned(
    call, tiny, shards, trained, tmp_path
):
    shutil.copytree(trained, tmp_path / "source")
    begin = ("--train.init_from", tmp_path / "source")
    arguments = (tiny, "--data.dir", shards, "--train.out", tmp_path / "o", *begin)
    assert call("train", *arguments, "--train.max_steps", 2).status == 0
    shutil.rmtree(tmp_path / "source")  # it isn't needed any more
    result = call("train", *arguments, "--train.max_steps", 3)
    assert "resuming after step 2" in result.err
    assert [line["step"] for line in metrics_of(tmp_path / "o")] == [1, 2, 3]
    assert metrics_of(tmp_path / "o")[0]["loss"] < 0.8 * metrics_of(trained)[0]["loss"]


def test_a_fine_tuning_tells_the_loss_that_it_begins_with(configure, trained, tmp_path, capsys):
    config = configure("--train.init_from", trained, "--train.max_steps", 1, "--log.eval_every", 20)
    train.train(config)
    before, after = metrics_of(tmp_path / "run", "val")
    assert (before["step"], after["step"]) == (0, 1)
    assert before["loss"] == metrics_of(trained, "val")[-1]["loss"]
    assert f"step 0: validation loss {before['loss']:.4f}" in capsys.readouterr().err
    train.train(replace(config, train=replace(config.train, max_steps=2)))  # goes on, not anew
    assert [line["step"] for line in metrics_of(tmp_path / "run", "val")] == [0, 1, 2]


def test_a_fine_tuning_that_fails_before_its_first_checkpoint_begins_anew(
    configure, trained, tmp_path, monkeypatch
):
    """With the loss that it begins with as the best so far, and perhaps with other weights."""
    wild = ("--optim.learning_rate", 0.3, "--optim.warmup_steps", 0, "--train.save_best", "true")
    config = configure("--train.init_from", trained, "--train.max_steps", 4, *wild)
    config = replace(config, log=replace(config.log, eval_every=1))
    train.train(replace(config, train=replace(config.train, out=str(tmp_path / "whole"))))
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "train_step", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.train(config)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"kind": "val", "step": 0, "loss": 9.0}\n')
    train.train(config)
    whole, run = (metrics_of(tmp_path / name, "val") for name in ("whole", "run"))
    assert run == whole and [line["step"] for line in run] == [0, 1, 2, 3, 4]
    found = [
        [(path.name, read_checkpoint(path).meta.best_val_loss) for path in sorted(folder.iterdir())]
        for folder in (tmp_path / name / "checkpoints" for name in ("whole", "run"))
    ]
    assert found[0] == found[1] == [("step_000004", run[0]["loss"])]


def test_a_fine_tuning_that_is_stopped_before_its_first_step_begins_anew(
    configure, trained, tmp_path, monkeypatch
):
    config = configure("--train.init_from", trained, "--train.max_steps", 1, "--log.eval_every", 20)
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "_asked_to_stop", lambda _: True)
        with pytest.raises(Stopped, match="stopped before the first step"):
            train.train(config)
    train.train(config)
    assert [line["step"] for line in metrics_of(tmp_path / "run", "val")] == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--train.init_from", "nowhere"], "nowhere is no checkpoint"),
        (["--model.n_layer", 1], "another shape than this run: to begin with its weights, give"),
        (
            ["--model.block_size", 64, "--model.n_layer", 1],
            "give --model.n_layer 2 --model.block_size 32",
        ),
    ],
)
def test_weights_that_do_not_fit_are_one_line(
    call, tiny, shards, trained, tmp_path, arguments, complaint
):
    begin = ("--train.init_from", trained, *arguments)
    result = call("train", tiny, "--data.dir", shards, "--train.out", tmp_path / "o", *begin)
    assert complaint in result.error()
    assert not (tmp_path / "o" / "checkpoints").exists()


@pytest.mark.parametrize("first", [False, True])
def test_a_run_does_not_go_on_as_if_it_had_begun_with_other_weights(
    configure, trained, tmp_path, first
):
    """One that did may be asked for it in any of its starts."""
    begin = ("--train.init_from", trained) if first else ()
    train.train(configure(*begin, "--train.max_steps", 1))
    shutil.copytree(trained, tmp_path / "another")
    train.train(configure("--train.max_steps", 2))
    again = ("--train.init_from", tmp_path / "another", "--train.max_steps", 3)
    if first:  # it may lie elsewhere by now
        train.train(configure(*again))
    else:
        with pytest.raises(UserError, match="step_000002 is of a run that didn't begin with other"):
            train.train(configure(*again))


def test_there_is_a_checkpoint_from_before_the_learning_rate_falls(configure, tmp_path):
    """Whatever the rhythm of the others."""
    fall = ("--optim.decay_steps", 6, "--optim.warmup_steps", 2, "--train.max_steps", 12)
    rhythm = ("--train.checkpoint_every", 5, "--train.keep_checkpoints", 1)
    train.train(configure(*fall, *rhythm, "--log.eval_every", 0))
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step_000006", "step_000012"]


def test_a_longer_run_goes_on_from_before_the_learning_rate_fell(configure, tmp_path):
    """With the same losses as if it had been planned so long from the beginning."""
    fall = ("--optim.schedule", "linear", "--optim.decay_steps", 6, "--log.eval_every", 0)
    often = ("--train.checkpoint_every", 1, "--train.keep_checkpoints", 1)
    changes = (*fall, *often, "--optim.warmup_steps", 2)
    train.train(configure(*changes, "--train.max_steps", 12))
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step_000006", "step_000012"]
    planned = (*changes, "--train.max_steps", 18, "--train.out", tmp_path / "planned")
    train.train(configure(*planned))
    (tmp_path / "longer" / "checkpoints").mkdir(parents=True)
    before = Path("checkpoints", "step_000006")
    shutil.copytree(tmp_path / "run" / before, tmp_path / "longer" / before)
    train.train(configure(*planned, "--train.out", tmp_path / "longer"))
    losses = [
        [(line["step"], line["loss"]) for line in metrics_of(tmp_path / name)]
        for name in ("planned", "longer")
    ]
    assert losses[1] == losses[0][6:]
    with pytest.raises(UserError, match="copy a checkpoint up to step 6 into"):
        train.train(configure(*changes, "--train.max_steps", 18))
    train.train(configure(*changes, "--train.max_steps", 12))  # it may end as it was planned


def saved_at(step: int, config: Config) -> SimpleNamespace:
    """What `check_schedule` looks at."""
    meta = SimpleNamespace(step=step, config=json.loads(json.dumps(asdict(config))))
    return SimpleNamespace(path=Path("run/step"), meta=meta)


LEVEL = ("--optim.schedule", "linear", "--optim.decay_steps", 10, "--optim.warmup_steps", 2)


@pytest.mark.parametrize(
    ("step", "changes", "is_refused"),
    [
        (30, ["--train.max_steps", 80], False),  # the rate is about to fall
        (31, ["--train.max_steps", 80], True),
        (31, [], False),
        (31, ["--optim.learning_rate", 1e-3], False),  # another peak, but the same way down
        (31, ["--optim.learning_rate", 6e-3, "--optim.min_learning_rate", 6e-4], False),
        (36, ["--optim.learning_rate", 1.5e-3], False),
        (40, ["--train.max_steps", 60, "--optim.decay_steps", 30], True),
        (40, ["--train.max_steps", 400, "--optim.decay_steps", 370], True),
        (40, ["--train.max_steps", 400, "--optim.decay_steps", 0], True),
        (35, ["--optim.warmup_steps", 50], True),
    ],
)
def test_a_learning_rate_that_falls_does_not_rise_again(configure, step, changes, is_refused):
    then, now = configure(*LEVEL), configure(*LEVEL, *changes)
    if is_refused:
        with pytest.raises(UserError, match="now it would rise again. .* up to step 30 into"):
            check_schedule(saved_at(step, then), now)
    else:
        assert check_schedule(saved_at(step, then), now) == ""


@pytest.mark.parametrize(
    ("step", "changes", "told"),
    [
        (40, [], ""),
        (40, ["--train.max_steps", 20], ""),
        (
            40,
            ["--train.max_steps", 80],
            "from 0.0003 to 0.00176: until now the run was planned for 4",
        ),
        (
            30,
            ["--optim.schedule", "linear"],
            "from 0.000836 to 0.00101: until now the run was plan",
        ),
        (30, ["--optim.learning_rate", 1.5e-3], ""),  # a larger share of it, but a lower rate
        (30, ["--optim.learning_rate", 3e-2], ""),  # a higher rate, but the same way down
        (40, ["--optim.min_learning_rate", 2e-3], ""),  # there is no step left
        (6, ["--train.max_steps", 80], ""),  # at the peak
        (3, ["--train.max_steps", 80], ""),  # before it
    ],
)
def test_a_cosine_may_be_made_longer_and_tells_that_it_rises(configure, step, changes, told):
    found = check_schedule(saved_at(step, configure()), configure(*changes))
    assert (told in found) if told else (found == "")


def test_a_run_whose_learning_rate_rises_again_says_so(call, tiny, shards, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "o")
    words = (tiny, "--data.dir", shards, "--train.out", tmp_path / "o", "--train.max_steps", 60)
    lines = call("train", *words).err.splitlines()
    at = next(at for at, line in enumerate(lines) if line.startswith("resuming after step 40"))
    assert lines[at + 1].startswith("the learning rate rises again, from 0.0003 to 0.00")
    assert "rises again" not in call("train", *words).err  # it has ended as it was planned


def test_settings_that_are_unknown_now_are_skipped(configure):
    checkpoint = saved_at(40, configure())
    checkpoint.meta.config["optim"]["momentum"] = 1
    check_schedule(checkpoint, configure("--train.max_steps", 80))
    checkpoint.meta.config["optim"]["decay_steps"] = "x"
    with pytest.raises(UserError, match="run/step/meta.json: optim.decay_steps = 'x'"):
        check_schedule(checkpoint, configure())


@pytest.mark.parametrize("name", ["train_000000.bin", "val_000000.bin"])
def test_data_that_is_not_what_the_run_began_with_is_one_line(
    call, tiny, shards, trained, tmp_path, name
):
    """The shards are whole, and so is their manifest; but they are others."""
    shutil.copytree(trained, tmp_path / "o")
    shutil.copytree(shards, tmp_path / "data")
    exchange_shard(tmp_path / "data", name, lambda tokens: tokens[2:] + tokens[:2])
    arguments = ("--data.dir", tmp_path / "data", "--train.out", tmp_path / "o")
    result = call("train", tiny, *arguments, "--train.max_steps", 60)
    assert "was trained on other data than" in result.error()


def test_a_run_may_go_on_without_the_validation_that_it_had(call, tiny, shards, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "o")
    arguments = ("--data.dir", shards, "--train.out", tmp_path / "o")
    for steps, every in ((41, 0), (42, 20)):
        result = call(
            "train", tiny, *arguments, "--train.max_steps", steps, "--log.eval_every", every
        )
        assert f"resuming after step {steps - 1}" in result.err


def test_one_process_of_each_machine_looks_for_damage(trained, tmp_path):
    shutil.copytree(trained / "checkpoints", tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "checkpoints" / "step_000040" / MODEL).write_bytes(b"damaged")
    here = [tmp_path / "run" / "checkpoints", 40]
    assert _copy_here(*here, Ranks(ALONE.device, rank=3, local_rank=1)).meta.step == 40
    with pytest.raises(UserError, match=MODEL):
        _copy_here(*here, Ranks(ALONE.device, rank=2, local_rank=0))


def test_a_checkpoint_that_does_not_tell_its_data_is_not_gone_on_from(configure, trained):
    checkpoint, config = newest_checkpoint(trained / "checkpoints"), configure()
    untold = replace(checkpoint, meta=replace(checkpoint.meta, data=""))
    check_can_go_on(checkpoint, config, checkpoint.meta.data)
    with pytest.raises(UserError, match="was trained on other data"):
        check_can_go_on(untold, config, checkpoint.meta.data)

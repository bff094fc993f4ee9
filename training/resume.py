"""What a training run goes on from: its newest checkpoint, or the weights of another run.

And whether that fits the settings and the data of today. Explained in README, "Checkpoints".
"""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path

from checkpoint import (
    META,
    MODEL,
    OPTIMIZER,
    Checkpoint,
    checkpoints_in,
    newest_checkpoint,
    read_checkpoint,
    step_name,
)
from common.errors import UserError
from config import Config, OptimSettings, make_config, toml_value
from distributed import Ranks
from optim import last_at_peak, learning_rate_at

FREE = ("dropout", "recompute")  # [model] settings that the weights don't depend on


def agree_on_checkpoint(folder: Path, ranks: Ranks) -> Checkpoint | None:
    """The newest complete checkpoint in `folder`, the same on all machines; None if there is none.

    Rank 0 chooses it. Raises UserError if a machine doesn't have it, or has another.
    """
    checkpoint = None
    with ranks.together():
        if ranks.is_first:
            checkpoint = newest_checkpoint(folder)
    step = ranks.agree(checkpoint.meta.step if checkpoint else 0)
    with ranks.together():
        if not ranks.is_first:
            checkpoint = _copy_here(folder, step, ranks)
    ranks.check_same("the checkpoint", checkpoint.description() if checkpoint else "")
    return checkpoint


def _copy_here(folder: Path, step: int, ranks: Ranks) -> Checkpoint | None:
    """What this machine has of the checkpoint that rank 0 chose; step 0 stands for none.

    Raises UserError if there is none or it is damaged. One process of a machine looks for damage.
    """
    path = folder / step_name(step)
    if step == 0 and checkpoints_in(folder):
        raise UserError(
            f"{folder} holds checkpoints on this machine and none on that of rank 0: start "
            "where it has them, or put train.out on a disk that all machines share"
        )
    if step and not path.is_dir():
        raise UserError(
            f"rank 0 goes on after step {step:,}, and this machine has no {path}: put "
            "train.out on a disk that all machines share, or copy that folder here"
        )
    files = (MODEL, OPTIMIZER) if ranks.local_rank == 0 else ()
    return read_checkpoint(path, files) if step else None


def origin_of(checkpoint: Checkpoint) -> str:
    """What train.init_from named when a checkpoint's run began; "" if it began with no weights."""
    return str(checkpoint.meta.config.get("train", {}).get("init_from", ""))


def check_can_go_on(checkpoint: Checkpoint, config: Config, data: str) -> None:
    """Raises UserError if the run that a checkpoint is of was another than this one.

    `data` is the fingerprint of the shards, of those to train on and of those to validate on.
    """
    if not config.train.resume:
        raise UserError(
            f"{config.train.out} holds {checkpoint.path.name} and train.resume = false: "
            "choose another --train.out or remove that folder"
        )
    if config.train.init_from and not origin_of(checkpoint):
        raise UserError(
            f"{checkpoint.path} is of a run that didn't begin with other weights: leave out "
            f"train.init_from to go on, or choose another --train.out to begin with "
            f"{config.train.init_from}"
        )
    checkpoint.check_vocabulary(Path(config.data.dir))
    check_same_run(checkpoint.meta.config, config, checkpoint.path)
    then, now = checkpoint.meta.data.split(), data.split()
    if not then or any(a != b for a, b in zip(then, now)):  # validation may come or go
        raise UserError(
            f"{checkpoint.path} was trained on other data than {config.data.dir} holds now: a run "
            "goes on with the same shards, or starts anew with another --train.out"
        )


def check_can_begin_with(checkpoint: Checkpoint, config: Config) -> None:
    """Raises UserError if a checkpoint has another shape of model, or another vocabulary."""
    checkpoint.check_vocabulary(Path(config.data.dir))
    theirs = asdict(checkpoint.meta.model)
    ours = {key: value for key, value in asdict(config.model).items() if key not in FREE}
    theirs["block_size"] = min(theirs["block_size"], ours["block_size"])  # a shorter context fits
    if others := [key for key in ours if ours[key] != theirs[key]]:
        told = " ".join(f"--model.{key} {theirs[key]}" for key in others)
        raise UserError(
            f"{checkpoint.path} has another shape than this run: to begin with its weights, "
            f"give {told}"
        )


def check_same_run(then: dict[str, dict], config: Config, path: Path) -> None:
    """Raises UserError if a checkpoint is of another model, or would go on with other batches, or
    with validations over another text, which can't be compared.
    """
    now = asdict(config)
    names = [("model", key) for key in now["model"] if key not in FREE]
    names += [("train", "seed"), ("train", "tokens_per_step")]
    names += [("data", "document_mask"), ("optim", "name")]
    if config.train.reduction == "canonical":
        names += [("train", "reduction"), ("train", "micro_batch_size"), ("train", "dtype")]
    if config.log.eval_every and then.get("log", {}).get("eval_every"):
        names += [("log", "eval_tokens")]
    for section, key in names:
        before = then.get(section, {}).get(key, getattr(getattr(Config(), section), key))
        if toml_value(before) != toml_value(now[section][key]):  # true isn't 1
            raise UserError(
                f"{path} was trained with {section}.{key} = {toml_value(before)}, now it is "
                f"{toml_value(now[section][key])}: set it back, or choose another --train.out"
            )


def check_schedule(checkpoint: Checkpoint, config: Config) -> str:
    """What to tell of a learning rate that fell and now rises again; "" if it doesn't.

    Raises UserError if it had been kept up before: the checkpoint from before the fall is there to
    go on from, for a longer run.
    """
    before, step = settings_of(checkpoint), checkpoint.meta.step
    level = last_at_peak(before.optim, before.train.max_steps) + 1
    then, now = learning_rate_of(step - 1, before), learning_rate_of(step, config)
    share_then = then / (before.optim.learning_rate or 1.0)  # of the peak
    share_now = now / (config.optim.learning_rate or 1.0)
    # Who sets another peak means it: a higher one raises the rate, a lower one its share, not both.
    rises = now > then and share_now > share_then and step < config.train.max_steps
    if step <= level or not rises:
        return ""
    if before.optim.decay_steps:
        raise UserError(
            f"{checkpoint.path} was saved while the learning rate fell, and now it would rise "
            f"again. To train longer, copy a checkpoint up to step {level:,} into the folder "
            "checkpoints of another run, and name that run's with --train.out"
        )
    return (
        f"the learning rate rises again, from {then:.3g} to {now:.3g}: until now the run was "
        f"planned for {before.train.max_steps:,} steps"
    )


def settings_of(checkpoint: Checkpoint) -> Config:
    """What decided the learning rate when it was saved. Raises UserError for impossible values."""
    then, known = checkpoint.meta.config, {item.name for item in fields(OptimSettings)}
    optim = {key: value for key, value in then.get("optim", {}).items() if key in known}
    steps = {key: value for key, value in then.get("train", {}).items() if key == "max_steps"}
    try:
        return make_config({"optim": optim, "train": steps})
    except UserError as error:
        raise UserError(f"{checkpoint.path / META}: {error}") from error


def learning_rate_of(step: int, config: Config) -> float:
    """The learning rate of a step, counted from 0."""
    return learning_rate_at(step, config.optim, config.train.max_steps)

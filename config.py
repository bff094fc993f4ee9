"""The settings of a training run: frozen dataclasses, a TOML file, the command line.

Each setting stands here once, with its default, its limits and its meaning; `--help` prints them. A
TOML file changes some, `--section.key VALUE` changes more, and the result is checked as a whole.
"""

from __future__ import annotations

import argparse
import json
import math
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from common.errors import Parser, UserError, did_you_mean
from common.records import NAMES

TASK_NAMES = ("hellaswag", "lambada", "wikitext2", "wikitext103")  # tasks.py asks them


def setting(
    default: Any,
    meaning: str,
    minimum: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A dataclass field with its meaning (and unit) and its limits: minimum ≤ value < below."""
    metadata = {"meaning": meaning, "minimum": minimum, "below": below, "choices": choices}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelSettings:
    """[model]: the shape of the GPT. The vocabulary's size comes with the data."""

    n_layer: int = setting(12, "blocks", minimum=1)
    n_head: int = setting(12, "attention heads per block; must divide n_embd", minimum=1)
    n_embd: int = setting(768, "channels: numbers per position", minimum=1)
    block_size: int = setting(1024, "context in tokens", minimum=1)
    dropout: float = setting(0.0, "probability of dropping an activation", minimum=0, below=1)
    recompute: bool = setting(False, "activation checkpointing: keep only each block's input")


@dataclass(frozen=True)
class DataSettings:
    """[data]: what to train on."""

    dir: str = setting("data/fineweb_edu", "folder of token shards, from prepare_fineweb.py")
    document_mask: bool = setting(
        False, "read each document by itself: attention and positions restart with it"
    )


@dataclass(frozen=True)
class OptimSettings:
    """[optim]: AdamW or Muon, and the learning rate's schedule: up, perhaps level, and down."""

    name: str = setting(
        "adamw",
        "adamw, or muon: hidden matrices by Muon, the rest by AdamW",
        choices=("adamw", "muon"),
    )
    learning_rate: float = setting(6e-4, "peak learning rate", minimum=0)
    min_learning_rate: float = setting(6e-5, "learning rate at the last step", minimum=0)
    matrix_learning_rate: float = setting(
        0.02, "Muon's peak learning rate for hidden matrices; same schedule", minimum=0
    )
    warmup_steps: int = setting(715, "steps of linear warm-up", minimum=0)
    schedule: str = setting(
        "cosine", "how the learning rate decays: cosine or linear", choices=("cosine", "linear")
    )
    decay_steps: int = setting(
        0, "steps of decay at the end; 0 = it begins right after warm-up", minimum=0
    )
    average_share: float = setting(
        0.0,
        "average the weights over about this share of the steps so far; 0 = off",
        minimum=0,
        below=1,
    )
    weight_decay: float = setting(
        0.1, "of matrices and embeddings, multiplied by the learning rate", minimum=0
    )
    beta1: float = setting(0.9, "decay rate of AdamW's average of the gradient", minimum=0, below=1)
    beta2: float = setting(0.95, "decay rate of AdamW's average of its square", minimum=0, below=1)
    grad_clip: float = setting(1.0, "clip the gradient's norm to this; 0 = no clipping", minimum=0)


@dataclass(frozen=True)
class TrainSettings:
    """[train]: the run."""

    out: str = setting("", "run folder; empty = out/<name of the config file>")
    init_from: str = setting("", "checkpoint to begin with, to fine-tune it; empty = from scratch")
    resume: bool = setting(
        True, "go on from the newest complete checkpoint in out; false = refuse an out that has one"
    )
    tokens_per_step: int = setting(524_288, "tokens per optimizer step, over all GPUs", minimum=1)
    micro_batch_size: int = setting(16, "windows that one GPU takes at once", minimum=1)
    max_steps: int = setting(19_073, "optimizer steps in the whole run", minimum=1)
    seed: int = setting(1337, "decides weights, data order and dropout", minimum=0, below=2**32)
    device: str = setting("auto", "auto, cuda, mps or cpu", choices=("auto", "cuda", "mps", "cpu"))
    dtype: str = setting(
        "auto",
        "of matrix products: auto, bfloat16, float16, float32; weights stay float32",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    compile: bool = setting(True, "torch.compile: a slow start, then faster steps")
    reduction: str = setting(
        "ddp",
        "how gradients are summed: ddp, or canonical: on CPUs the same bits, however many ranks",
        choices=("ddp", "canonical"),
    )
    checkpoint_every: int = setting(1000, "steps between checkpoints, and at the end", minimum=1)
    save_best: bool = setting(False, "also save whenever the validation loss is the lowest so far")
    keep_checkpoints: int = setting(2, "newest checkpoints to keep, beside the best", minimum=1)
    timeout_seconds: int = setting(600, "how long ranks wait for one another", minimum=1)
    max_skipped_steps: int = setting(
        10, "steps in a row that may be skipped (not finite, or a spike)", minimum=0
    )
    skip_spikes: float = setting(
        0.0, "standard deviations of the gradient norm that make a spike; 0 = off", minimum=0
    )


@dataclass(frozen=True)
class LogSettings:
    """[log]: what a run tells of itself."""

    log_every: int = setting(1, "steps between lines in metrics.jsonl", minimum=1)
    eval_every: int = setting(250, "steps between validations; 0 = never", minimum=0)
    eval_tokens: int = setting(  # 20 of llm.c's batches of 524,288
        10_485_760, "validation tokens, from the split's start", minimum=1
    )
    eval_tasks: str = setting("", f"benchmarks: some of {','.join(TASK_NAMES)}; empty = none")
    eval_tasks_every: int = setting(1000, "steps between benchmarks", minimum=1)
    sample_every: int = setting(1000, "steps between printed samples; 0 = never", minimum=0)
    tensorboard: bool = setting(False, "write TensorBoard events into the run folder")
    wandb: str = setting("", "Weights & Biases project; empty = off")


@dataclass(frozen=True)
class Config:
    """All settings of a run, section by section."""

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    optim: OptimSettings = OptimSettings()
    train: TrainSettings = TrainSettings()
    log: LogSettings = LogSettings()

    def __post_init__(self) -> None:
        """Raises UserError for values that are fine alone but not together, and for no data."""
        if not self.data.dir:  # as an unset variable leaves it; it would mean the present folder
            raise UserError("data.dir is empty: name a folder of token shards")
        if self.model.n_embd % self.model.n_head:
            raise UserError(
                f"model.n_embd = {self.model.n_embd} is not a multiple of "
                f"model.n_head = {self.model.n_head}: choose a number of heads that divides it"
            )
        if self.optim.min_learning_rate > self.optim.learning_rate:
            raise UserError(
                f"optim.min_learning_rate = {self.optim.min_learning_rate} is above "
                f"optim.learning_rate = {self.optim.learning_rate}: lower it"
            )
        if self.optim.name == "muon" and self.optim.learning_rate < 1e-30:
            raise UserError(
                f"optim.learning_rate = {self.optim.learning_rate}: optim.matrix_learning_rate "
                "rises and falls in proportion to it; set it to at least 1e-30"
            )
        if self.train.save_best and not self.log.eval_every:
            raise UserError("train.save_best = true needs validations: set log.eval_every")
        task_names(self.log.eval_tasks)

    def to_toml(self) -> str:
        """The text of a config file that gives these settings."""
        lines = []
        for section, values in asdict(self).items():
            lines.append(f"[{section}]")
            lines += [f"{key} = {toml_value(value)}" for key, value in values.items()]
            lines.append("")
        return "\n".join(lines)


def toml_value(value: object) -> str:
    """A setting's value as TOML writes it.

    JSON's strings, numbers and booleans are TOML's too, but for one character to be escaped.
    """
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


SECTIONS = get_type_hints(Config)  # {"model": ModelSettings, …}


def load_config(arguments: list[str] | None = None) -> Config:
    """Read `CONFIG.toml [--section.key VALUE …]`, by default from the command line.

    Prints one line and exits with status 2 if anything about them is wrong.
    """
    parser = make_parser()
    parsed, unknown = parser.parse_known_args(arguments)
    try:
        if unknown:
            raise UserError(_unknown_option(unknown[0]))
        values = read_toml(parsed.config)
        given = {key: text for key, text in vars(parsed).items() if "." in key}
        for name, text in given.items():
            section, key = name.split(".")
            values.setdefault(section, {})[key] = _from_text(name, _type(section, key), text)
        train = values.setdefault("train", {})
        if train.get("out", "") == "":
            train["out"] = f"out/{parsed.config.stem}"
        return make_config(values)
    except UserError as error:
        parser.error(str(error))


def task_names(text: str, known: tuple[str, ...] = TASK_NAMES) -> list[str]:
    """The names in "hellaswag,lambada", each once. Raises UserError for an unknown one."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UserError(f"no task {name!r}{_nearest(name, known)}")
    return list(dict.fromkeys(names))


def make_parser() -> Parser:
    """The command line: the config file, and an option for each setting."""
    parser = Parser(
        usage="%(prog)s CONFIG.toml [--section.key VALUE …]",
        description="Train a GPT. Settings come from the config file; options change them.",
        allow_abbrev=False,
    )
    parser.add_argument("config", type=Path, help="a TOML file, such as configs/gpt2_124m.toml")
    for section, cls in SECTIONS.items():
        group = parser.add_argument_group(f"[{section}]")
        for item in fields(cls):
            default = toml_value(item.default)
            group.add_argument(
                f"--{section}.{item.name}",
                metavar=_type(section, item.name).__name__.upper(),
                default=argparse.SUPPRESS,
                help=f"{item.metadata['meaning'].replace('%', '%%')} [{default}]",
            )
    return parser


def read_toml(path: Path) -> dict[str, dict[str, Any]]:
    """A config file's sections. Raises UserError if it is missing or not TOML."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"can't read the config {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not TOML: {error}") from error
    for key, value in values.items():
        if not isinstance(value, dict):
            raise UserError(f"{path}: {key} = {value!r} stands outside of a section")
    return values


def make_config(values: dict[str, dict[str, Any]]) -> Config:
    """Settings from nested dictionaries; what they leave out keeps its default.

    Raises UserError for an unknown section or key, a wrong type or a value out of range.
    """
    sections = {}
    for section, content in values.items():
        if section not in SECTIONS:
            raise UserError(f"unknown section [{section}]{_nearest(section, SECTIONS)}")
        names = [item.name for item in fields(SECTIONS[section])]
        for key in content:
            if key not in names:
                told = did_you_mean(key, SETTINGS) or f"; known are {', '.join(names)}"
                raise UserError(f"unknown setting {section}.{key}{told}")
        checked = {key: _checked(section, key, value) for key, value in content.items()}
        sections[section] = SECTIONS[section](**checked)
    return Config(**sections)


def _type(section: str, key: str) -> type:
    return get_type_hints(SECTIONS[section])[key]


# What others call our settings: nanoGPT, transformers, and many a command line.
ELSEWHERE = {
    "batch_size": "train.micro_batch_size",
    "dataset": "data.dir",
    "eval_interval": "log.eval_every",
    "eval_iters": "log.eval_tokens",
    "gradient_accumulation_steps": "train.tokens_per_step",
    "log_interval": "log.log_every",
    "lr": "optim.learning_rate",
    "max_iters": "train.max_steps",
    "min_lr": "optim.min_learning_rate",
    "out_dir": "train.out",
    "output_dir": "train.out",
    "wandb_project": "log.wandb",
    "warmup_iters": "optim.warmup_steps",
}


# Every setting as section.key, by its key, which no other section has, and by others' names for it.
SETTINGS = {
    item.name: f"{name}.{item.name}" for name, cls in SECTIONS.items() for item in fields(cls)
} | ELSEWHERE


def _nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean …?" for a near miss, or else all that is known."""
    told = did_you_mean(name, dict(zip(known, known)))
    return told or f"; known are {', '.join(known)}"


def _unknown_option(option: str) -> str:
    if not option.startswith("--"):
        return f"{option!r}: expected one config file, then --section.key VALUE"
    name = option.split("=")[0]
    key = name.removeprefix("--").split(".")[-1].replace("-", "_")
    options = {known: f"--{setting}" for known, setting in SETTINGS.items()}
    return f"unknown option {name}{did_you_mean(key, options)}"


def _from_text(name: str, kind: type, text: str) -> Any:
    """A value from the command line. Raises UserError if the text is not of its type."""
    try:
        if kind is bool:
            return {"true": True, "false": False}[text]
        return kind(text)
    except (ValueError, KeyError) as error:
        raise UserError(f"{name} = {text!r}: expected {NAMES[kind]}") from error


def _checked(section: str, key: str, value: Any) -> Any:
    """The value in its setting's type. Raises UserError if it doesn't fit."""
    kind, name = _type(section, key), f"{section}.{key}"
    limits = SECTIONS[section].__dataclass_fields__[key].metadata
    if kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise UserError(f"{name} = {value!r}: expected {NAMES[kind]}")
    if kind is str and not _is_plain(value):
        raise UserError(f"{name} = {value!r}: expected text in UTF-8 without zero bytes")
    if limits["choices"] and value not in limits["choices"]:
        raise UserError(f"{name} = {value!r}: expected one of {', '.join(limits['choices'])}")
    if limits["minimum"] is not None and not value >= limits["minimum"]:
        raise UserError(f"{name} = {value}: expected {limits['minimum']} or more")
    below = limits["below"] or (2**31 if kind is int else None)
    if below is not None and not value < below:
        raise UserError(f"{name} = {value}: expected less than {below}")
    return value


def _is_plain(text: str) -> bool:
    """Whether a config.toml, or a file's name, can hold it."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False

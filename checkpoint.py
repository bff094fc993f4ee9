"""Checkpoints that are whole or absent, and that anyone may open: safetensors and JSON, no pickle.

    out/NAME/checkpoints/step_000250/
        model.safetensors       the weights, float32, by their names in model.GPT
        optimizer.safetensors   the optimizer's averages of gradients, as <parameter>/<state>; and
                                the weights themselves, if the model is an average of them
        meta.json               step, settings, losses, size and SHA-256 of the two, a checksum

A checkpoint is written into a folder with another name, forced to the disk, and then renamed:
whatever has the final name is complete. What got damaged later is told by its hash.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tiktoken
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from common.errors import UserError, printable
from common.files import disk_errors, file_sha256, is_there, own_file, sync, write_atomically
from common.records import as_record, read_json
from model import GPT, GPTConfig
from optim import OTHER
from shards import VOCABULARY, TokenizerRecord, find_encoding, tokenizer_of
from tokenizer import GPT2_SHA256, gpt2_encoding
from training.guard import SpikeMemory

FORMAT_VERSION = 1
MODEL, OPTIMIZER, META = "model.safetensors", "optimizer.safetensors", "meta.json"


@dataclass(frozen=True)
class ScalerMemory:
    """What torch.amp.GradScaler.state_dict() tells."""

    scale: float
    growth_factor: float
    backoff_factor: float
    growth_interval: int  # steps
    _growth_tracker: int  # steps since the last that was not finite

    def __post_init__(self) -> None:
        factors = (self.scale, self.growth_factor, self.backoff_factor)
        steps = (self.growth_interval, self._growth_tracker)
        largest = torch.finfo(torch.float32).max
        if not all(0 <= n <= largest for n in factors) or not all(0 <= n < 2**31 for n in steps):
            raise ValueError(f"scaler has a number out of its range: {self}")


@dataclass(frozen=True)
class Meta:
    """What a checkpoint says of itself in meta.json, beside its files' sizes and hashes."""

    step: int  # finished optimizer steps
    model: GPTConfig
    tokenizer: TokenizerRecord
    config: dict[str, dict[str, object]]  # the run's settings
    val_loss: float | None  # nats per token, if this step was evaluated
    best_val_loss: float | None  # the lowest so far
    scaler: ScalerMemory | None  # the gradient scaler's state, for float16
    data: str  # TokenStream.fingerprint of the training data and, if used, of the validation data
    skipped: int = 0  # steps in a row that were skipped, this one the last
    spikes: SpikeMemory | None = None  # if guard.SpikeFilter is in use

    def __post_init__(self) -> None:
        for name, number in (("step", self.step), ("skipped", self.skipped)):
            if not 0 <= number < 2**31:
                raise ValueError(f"{name} is {number}, expected 0 or more and less than {2**31}")
        if self.spikes and self.spikes.count > self.step:
            raise ValueError(f"spikes counts {self.spikes.count} norms after {self.step} steps")


class WithoutDrawing(TorchFunctionMode):
    """Inside, no parameter is drawn at random: for 124 million numbers that takes a second.

    So does the first use of PyTorch's meta device, which would be the other way.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ANN001
        """Call `func`, unless it fills a parameter; those of torch.nn.init get and return one."""
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    meta: Meta

    def make_model(self) -> GPT:
        """The model, on the CPU, and without dropout until it is told to train."""
        self._check_size()
        with WithoutDrawing():
            model = GPT(self.meta.model)
        self.load_model(model)
        return model.eval()

    def load_model(self, model: GPT) -> None:
        """Copy the weights into `model`, on any device; its context may be shorter than theirs.

        What visuals/keep.py rounded to 8 bits, (rows, columns) of int8, has a "/scale" beside it, a
        number for each row.
        """
        tensors = _read_tensors(self.path / MODEL)
        try:
            weights, context = _unrounded(tensors), model.config.block_size
            if context < self.meta.model.block_size:
                weights["wpe.weight"] = weights["wpe.weight"][:context]
            model.load_state_dict(weights)
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.path / MODEL} doesn't fit {META}: {reason}") from error

    def _check_size(self) -> None:
        """Raises UserError if the file has less than a byte for each number of the matrices.

        So no memory is asked for that a file of a few bytes only speaks of.
        """
        with disk_errors(f"can't read {self.path / MODEL}"):  # a run may have removed it by now
            size = (self.path / MODEL).stat().st_size
        shape = self.meta.model
        blocks = 12 * shape.n_layer * shape.n_embd**2
        numbers = blocks + (shape.vocab_size + shape.block_size) * shape.n_embd
        if numbers > size:
            raise UserError(
                f"{self.path / MODEL} doesn't fit {META}: a model of {numbers:,} numbers in "
                f"{size:,} bytes"
            )

    def description(self) -> str:
        """What meta.json says, its files' hashes among it: of equal checkpoints the same."""
        with disk_errors(f"can't read {self.path / META}"):
            return (self.path / META).read_text(encoding="utf-8")

    def model_sha256(self) -> str:
        """Which weights these are."""
        return _fingerprint(self.path / MODEL)["sha256"]

    def load_optimizer(self, model: GPT, optimizer: torch.optim.Optimizer) -> None:
        """Give `optimizer` the state that it had, parameter by parameter, by name."""
        parameters = dict(model.named_parameters())
        in_order = [p for group in optimizer.param_groups for p in group["params"]]
        place = {id(parameter): number for number, parameter in enumerate(in_order)}
        state: dict[int, dict[str, Tensor]] = {number: {} for number in range(len(in_order))}
        for key, tensor in _read_tensors(self.path / OPTIMIZER).items():
            name, _, kind = key.rpartition("/")
            parameter = parameters.get(name)
            shape = () if kind == "step" or parameter is None else parameter.shape
            if parameter is None or (tensor.shape, tensor.dtype) != (shape, torch.float32):
                raise UserError(f"{self.path / OPTIMIZER} doesn't fit the model: {key}")
            # A copy, where it belongs: no view of a file that may go.
            state[place[id(parameter)]][kind] = tensor.to(parameter.device, copy=True)
        is_averaged = any(OTHER in kept for kept in state.values())
        for group in optimizer.state_dict()["param_groups"]:
            kinds = {"momentum"} if "matrices" in group else {"step", "exp_avg", "exp_avg_sq"}
            kinds |= {OTHER} if is_averaged else set()
            if any(state[number].keys() != kinds for number in group["params"]):
                expected = ", ".join(sorted(kinds))
                raise UserError(
                    f"{self.path / OPTIMIZER} doesn't hold exactly {expected} for every parameter"
                )
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})

    def encoding(self) -> tiktoken.Encoding:
        """The encoding that the model was trained with, from the run folder.

        A checkpoint that was moved out of it may have the vocabulary beside its weights. Raises
        UserError if there is none, or one of another size than the model's.
        """
        theirs, ours = self.meta.tokenizer, self.meta.model.vocab_size
        if theirs.vocab_size != ours:
            raise UserError(
                f"{self.path / META} is damaged or not a checkpoint's: a vocabulary of "
                f"{theirs.vocab_size:,} tokens for a model of {ours:,}"
            )
        for folder in (self.path, self.path.parent.parent):
            if is_there(folder / VOCABULARY):
                return find_encoding(folder, theirs)
        if theirs.sha256 == GPT2_SHA256:
            return gpt2_encoding()
        raise UserError(
            f"{self.path} lacks its vocabulary: copy {VOCABULARY} from the run folder into it"
        )

    def check_vocabulary(self, folder: Path) -> None:
        """Raises UserError if the shards in `folder` were made with another vocabulary."""
        ours, theirs = self.meta.tokenizer, tokenizer_of(folder)
        if ours.sha256 != theirs.sha256:
            raise UserError(
                f"{folder} has the vocabulary {theirs.name} of {theirs.vocab_size:,} tokens, "
                f"{self.path} was trained on {ours.name} of {ours.vocab_size:,}: choose other "
                f"data, or prepare it with --tokenizer and that run's {VOCABULARY}"
            )


def save_checkpoint(folder: Path, meta: Meta, model: GPT, optimizer: torch.optim.Optimizer) -> Path:
    """Write a checkpoint into `folder`, whole or not at all. Raises UserError if that fails."""
    final = folder / step_name(meta.step)
    temporary = folder / f".{final.name}.partial"
    try:
        _begin(temporary)
        _write(temporary, meta, model, optimizer)
        if is_there(final):  # a damaged one, or this step would not have been run again
            _remove(final)
        temporary.rename(final)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"can't save {final}: {error}; free some space or fix the disk, then give the same "
            "command again to go on from the checkpoint before it"
        ) from error
    return final


def add_losses(path: Path, val_loss: float | None, best_val_loss: float | None) -> None:
    """Tell a checkpoint of a validation that came after it was saved.

    A crash leaves the old meta.json or the new one. Raises UserError if it can't be written.
    """
    way_out = "; free some space or fix the disk, then give the same command again"
    with disk_errors(f"can't write {path / META}", way_out):
        try:
            content = _read_meta(path)
        except ValueError as error:
            raise UserError(f"{path / META} is damaged: {error}") from error
        del content["checksum"]
        content |= {"val_loss": val_loss, "best_val_loss": best_val_loss}
        write_atomically(path / META, _with_checksum(content))


def check_can_save(folder: Path) -> None:
    """Make the folder of a run's checkpoints, and see that a save can begin there.

    Raises UserError if it can't: before the first step, rather than hours later.
    """
    with disk_errors(f"can't save checkpoints in {folder}"):
        temporary = folder / ".step_0.partial"
        _begin(temporary)
        temporary.rmdir()


def _begin(temporary: Path) -> None:
    """Make a folder to write a checkpoint into. Removes what saves that were cut short left."""
    for partial in temporary.parent.glob(".step_*.partial"):
        _remove(partial)
    temporary.mkdir(parents=True)


def _remove(path: Path) -> None:
    """Remove a folder, or what stands in its place: a link, and not what it leads to."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def step_name(step: int) -> str:
    """The name of a step's checkpoint folder."""
    return f"step_{step:06d}"


def _write(temporary: Path, meta: Meta, model: GPT, optimizer: torch.optim.Optimizer) -> None:
    """Write a checkpoint's three files and see them onto the disk."""
    save_tensors(_contiguous(model.state_dict()), temporary / MODEL)
    save_tensors(_optimizer_tensors(model, optimizer), temporary / OPTIMIZER)
    write_meta(temporary, meta, files=(MODEL, OPTIMIZER))
    for path in (temporary / MODEL, temporary / OPTIMIZER, temporary / META, temporary):
        sync(path)


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file, to be read by whoever may read a new file of this user's.

    safetensors itself keeps it to the user. Raises OSError or SafetensorError.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    with suppress(OSError):  # of a file system without modes
        path.chmod(mode)


def write_meta(folder: Path, meta: Meta, files: tuple[str, ...]) -> None:
    """Write meta.json beside a checkpoint's other files, which it is to vouch for."""
    content = asdict(meta) | {
        "format_version": FORMAT_VERSION,
        "files": {name: _fingerprint(folder / name) for name in files},
    }
    (folder / META).write_text(_with_checksum(content), encoding="utf-8")


def _with_checksum(content: dict[str, object]) -> str:
    """The text of a meta.json."""
    return json.dumps(content | {"checksum": _checksum(content)}, indent=1)


def newest_checkpoint(
    folder: Path, files: tuple[str, ...] = (MODEL, OPTIMIZER)
) -> Checkpoint | None:
    """The newest checkpoint in `folder` whose `files` are undamaged, or None if there is none.

    A damaged one is named on standard error and skipped. Raises UserError if all are damaged.
    """
    complaints = []
    for path in reversed(checkpoints_in(folder)):
        try:
            found = read_checkpoint(path, files)
            if path.name != step_name(found.meta.step):
                raise UserError(f"{path / META} is of step {found.meta.step}")
            return found
        except UserError as error:
            complaints.append(str(error))
            print(f"skipped: {printable(str(error))}", file=sys.stderr)
    if complaints:
        raise UserError(
            f"no checkpoint in {folder} is undamaged: {complaints[0]}; remove them to start over"
        )
    return None


def find_checkpoint(name: str) -> Checkpoint:
    """A folder's checkpoint, to use its model: the folder is one, or a run's, of its newest.

    Raises UserError if there is none. `huggingface.find_model` knows the Hub's names, too.
    """
    try:
        path = Path(name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, an impossible name
        raise UserError(f"can't find the checkpoint {name!r:.200}: {error}") from error
    if is_there(path / META):
        return read_checkpoint(path, files=(MODEL,))
    found = newest_checkpoint(path / "checkpoints", files=(MODEL,))
    if found is None:
        raise UserError(f"{name or repr(name)} is no checkpoint: {_what_else(path)}")
    return found


def _what_else(path: Path) -> str:
    """What a path that was taken for a checkpoint is, and what to do."""
    if checkpoints_in(path):
        run = f"the run's folder {path.parent}, or " if path.name == "checkpoints" else ""
        return f"name {run}one of the folders in it"
    if (path / "checkpoints").is_dir():
        return "its run hasn't saved one yet; train.checkpoint_every says after how many steps"
    if is_there(path / "config.json"):
        return "a folder for transformers, it seems; convert.py from-hf makes one of it"
    expected = f"expected a run's folder such as out/demo, or one with {META} and {MODEL} in it"
    return expected if is_there(path) else f"nothing is there; {expected}"


def read_checkpoint(path: Path, files: tuple[str, ...] = (MODEL, OPTIMIZER)) -> Checkpoint:
    """Open a checkpoint after checking the size and hash of `files`.

    Raises UserError, naming the file that doesn't fit.
    """
    try:
        content = _read_meta(path)
        if content.pop("checksum", None) != _checksum(content):
            raise UserError(f"{path / META} is damaged: its checksum is not as saved")
        version, fingerprints = content.pop("format_version", None), content.pop("files", None)
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path / META} has format {version!r:.40}, this code reads {FORMAT_VERSION}"
            )
        meta = as_record(Meta, content)
        if not isinstance(fingerprints, dict):
            raise ValueError("files is no object")
        if not set(files) <= set(fingerprints) <= {MODEL, OPTIMIZER}:
            raise ValueError(f"files lists {sorted(fingerprints)!r:.80}, expected {list(files)}")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path / META} is damaged or not a checkpoint's: {error}") from error
    for name in files:
        if _fingerprint(own_file(path, name)) != fingerprints[name]:
            raise UserError(f"{path / name} is damaged: its size or hash is not as saved")
    return Checkpoint(path, meta)


def _read_meta(path: Path) -> dict[str, Any]:
    """What meta.json says. Raises UserError if a link leads out of the run, else as `read_json`."""
    return read_json(own_file(own_file(path.parent, path.name), META))


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first. Raises UserError if `folder` can't be read.

    `Path.glob` would give nothing then, and a run would start over.
    """
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"can't read {folder}: {error.strerror}") from error
    steps = {name: name.removeprefix("step_") for name in names if name.startswith("step_")}
    return sorted((folder / name for name, step in steps.items() if step.isdecimal()), key=step_of)


def step_of(path: Path) -> int:
    """The step that a checkpoint folder is named after."""
    return int(path.name.removeprefix("step_"))


def remove_old(
    newest: Path, keep: int, keep_until: int = 0, damaged: Collection[Path] = ()
) -> None:
    """Remove a run's checkpoints up to `newest`, but for those that are worth their room.

    The `keep` newest are, and as many that weren't saved after a skipped step, and the best, and
    the newest that is not after step `keep_until`. Those that are known to be `damaged` count for
    nothing. Later ones are damaged, too, or the run would have gone on from them. One that can't be
    removed is no reason to stop a run; it is named on standard error.
    """
    paths = checkpoints_in(newest.parent)
    paths = paths[: paths.index(newest) + 1]
    whole = [path for path in paths if path not in damaged]
    told = {path: _loss_and_skipped(path) for path in whole}
    best = min((path for path in whole if told[path][0] < math.inf), key=told.get, default=newest)
    sound = [path for path in whole if not told[path][1]][-keep:]
    early = [path for path in whole if step_of(path) <= keep_until][-1:]
    kept = {*whole[-keep:], *sound, *early, best}
    for path in paths:
        if path not in kept:
            try:
                _remove(path)
            except OSError as error:
                print(f"can't remove the old {path}: {error.strerror}", file=sys.stderr)


def _loss_and_skipped(path: Path) -> tuple[float, bool]:
    """A checkpoint's validation loss, infinity if it has none or its meta.json can't be read, and
    whether the step before it was skipped.
    """
    try:
        meta = _read_meta(path)
        loss, skipped = meta["val_loss"], meta.get("skipped", 0)
    except (OSError, ValueError, KeyError, UserError):
        return math.inf, False
    return loss if type(loss) is float else math.inf, skipped != 0


def _optimizer_tensors(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as one flat dictionary: "h.0.mlp.c_fc.weight/exp_avg" -> tensor."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return _contiguous(
        {
            f"{names[id(parameter)]}/{kind}": tensor
            for parameter, state in optimizer.state.items()
            for kind, tensor in state.items()
        }
    )


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _unrounded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights, those with a "/scale" multiplied by it. Raises ValueError if one doesn't fit.

    Or if its numbers are of a kind that is none of a weight's: torch would only cast them.
    """
    scales = {name: tensors[name] for name in tensors if name.endswith("/scale")}
    whole = {name: tensor for name, tensor in tensors.items() if name not in scales}
    for name, scale in scales.items():
        rounded = name.removesuffix("/scale")
        fits = rounded in whole and scale.shape == (*whole[rounded].shape[:1], 1)
        if not fits or whole[rounded].dtype != torch.int8:
            raise ValueError(f"{name} has no rows of int8 to scale")
        whole[rounded] = whole[rounded] * scale
    for name, tensor in whole.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}, expected floating-point numbers")
    return whole


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no safetensors file: {error}") from error


def _fingerprint(path: Path) -> dict[str, object]:
    """A file's size in bytes and its SHA-256. Raises UserError if it can't be read."""
    with disk_errors(f"can't read {path}"):
        return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _checksum(content: dict[str, object]) -> str:
    """The SHA-256 of meta.json's own content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

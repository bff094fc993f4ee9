"""The others that bench.py can measure: nanoGPT, build-nanogpt, Hugging Face's transformers.

They are checkouts or packages that the user already has. Each is run as its own scripts run it: its
model, with the padded vocabulary if it takes one, its optimizer, its generation. But products in
float32 are as exact as ours: without TF32.
"""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from common.errors import UserError

PADDED_VOCABULARY = 50_304  # what nanoGPT and build-nanogpt train with, for the sake of speed

# (compiled model, inputs (B, T), targets (B, T)) -> the loss
LossOf = Callable[[nn.Module, Tensor, Tensor], Tensor]


def load_definitions(path: Path) -> ModuleType:
    """The classes and functions of a Python file, without running what else is in it.

    build-nanogpt's train_gpt2.py is one script from top to bottom. What is imported from
    neighbouring files is left out too.
    """

    class Definitions(importlib.machinery.SourceFileLoader):
        def source_to_code(self, data, where, *, _optimize=-1):  # noqa: ANN001
            """Compile the definitions and imports alone."""
            tree = ast.parse(data)
            tree.body = [node for node in tree.body if self.is_definition(node)]
            return compile(tree, where, "exec", dont_inherit=True, optimize=_optimize)

        def is_definition(self, node: ast.stmt) -> bool:
            """Whether a statement does nothing but define names."""
            if isinstance(node, ast.ImportFrom):
                return not (path.parent / f"{node.module}.py").exists()
            return isinstance(node, (ast.Import, ast.ClassDef, ast.FunctionDef))

    name = f"peer_{path.stem}"
    spec = importlib.util.spec_from_loader(name, Definitions(name, str(path)))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up there
    sys.dont_write_bytecode = True
    spec.loader.exec_module(module)
    return module


def shape_of(settings: dict) -> dict[str, int]:
    """What nanoGPT and build-nanogpt call by the names that we use."""
    return {key: settings["model"][key] for key in ("n_layer", "n_head", "n_embd", "block_size")}


def make_nanogpt(settings: dict) -> nn.Module:
    """nanoGPT's model."""
    module = load_definitions(Path(settings["path"]) / "model.py")
    shape = {"vocab_size": PADDED_VOCABULARY, **shape_of(settings)}
    return module.GPT(module.GPTConfig(bias=True, dropout=0.0, **shape))


def make_transformers(settings: dict) -> nn.Module:
    """Hugging Face's GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = shape_of(settings)
    shape["n_positions"] = shape.pop("block_size")
    dropout = {f"{where}_pdrop": 0.0 for where in ("resid", "embd", "attn")}
    no_end = {"bos_token_id": None, "eos_token_id": None}  # generation must not stop early
    return GPT2LMHeadModel(GPT2Config(**shape, **dropout, **no_end))


# Training: (settings, device) -> (model, optimizer, its loss)


def train_nanogpt(
    settings: dict, device: torch.device
) -> tuple[nn.Module, torch.optim.Optimizer, LossOf]:
    """As nanoGPT's train.py."""
    model = make_nanogpt(settings).to(device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
    return model, optimizer, lambda compiled, inputs, targets: compiled(inputs, targets)[1]


def train_build_nanogpt(
    settings: dict, device: torch.device
) -> tuple[nn.Module, torch.optim.Optimizer, LossOf]:
    """As build-nanogpt's train_gpt2.py."""
    module = load_definitions(Path(settings["path"]) / "train_gpt2.py")
    module.master_process = False  # a global that configure_optimizers reads
    shape = {"vocab_size": PADDED_VOCABULARY, **shape_of(settings)}
    model = module.GPT(module.GPTConfig(**shape)).to(device)
    optimizer = model.configure_optimizers(0.1, 6e-4, device.type)
    return model, optimizer, lambda compiled, inputs, targets: compiled(inputs, targets)[1]


def train_transformers(
    settings: dict, device: torch.device
) -> tuple[nn.Module, torch.optim.Optimizer, LossOf]:
    """Hugging Face's model, which shifts the labels itself, with PyTorch's fused AdamW."""
    model = make_transformers(settings).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, weight_decay=0.1, fused=True)
    return model, optimizer, lambda compiled, inputs, _: compiled(inputs, labels=inputs).loss


# Generation, greedy: (settings, device, dtype, tick) -> a function of ids (B, T) and a count of
# tokens, which calls `tick` for each


def generate_nanogpt(
    settings: dict, device: torch.device, dtype: torch.dtype, tick: Callable[[], None]
) -> Callable[[Tensor, int], None]:
    """As nanoGPT's sample.py, under autocast; top_k=1 makes it greedy."""
    model = make_nanogpt(settings).to(device).eval()
    model.register_forward_hook(lambda *_: tick())

    def generate(ids: Tensor, count: int) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            model.generate(ids, count, top_k=1)

    return generate


def generate_transformers(
    settings: dict, device: torch.device, dtype: torch.dtype, tick: Callable[[], None]
) -> Callable[[Tensor, int], None]:
    """Hugging Face's generate, with its cache."""
    model = make_transformers(settings).to(device=device, dtype=dtype).eval()
    model.register_forward_hook(lambda *_: tick())

    def generate(ids: Tensor, count: int) -> None:
        mask = torch.ones_like(ids)
        model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False)

    return generate


# Preparing: settings -> a function that tells tokens per second


BARE_TIKTOKEN = """
import sys, time
import pyarrow.parquet, tiktoken
encoding = tiktoken.get_encoding("gpt2")
texts = [t for path in sys.argv[1:] for t in pyarrow.parquet.read_table(path)["text"].to_pylist()]
began = time.perf_counter()
tokens = sum(1 + len(encoding.encode_ordinary(text)) for text in texts)
print(tokens, time.perf_counter() - began)
"""
BUILD_NANOGPT = """
import os, runpy, sys
import datasets
script, workers, *files = sys.argv[1:]
os.cpu_count = lambda: 2 * int(workers)  # the script takes half of them
load = datasets.load_dataset
datasets.load_dataset = lambda *_, **__: load("parquet", data_files=files, split="train")
runpy.run_path(script, run_name="__main__")
"""


def prepare_with_bare_tiktoken(settings: dict) -> Callable[[], float]:
    """So many processes that do nothing but tiktoken's encode_ordinary: their rates together.

    A turn raises UserError if one of them fails.
    """
    files, workers = settings["files"], settings["workers"]

    def measure() -> float:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", BARE_TIKTOKEN, *files[worker::workers]],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for worker in range(workers)
        ]
        answers = [process.communicate() for process in processes]
        for process, (_, complaint) in zip(processes, answers):
            if process.returncode:
                last = complaint.strip().rpartition("\n")[2]
                raise UserError(f"bare tiktoken ended with status {process.returncode}: {last}")
        pairs = (answer.split() for answer, _ in answers)
        return sum(int(tokens) / float(seconds) for tokens, seconds in pairs)

    return measure


def prepare_with_build_nanogpt(settings: dict) -> Callable[[], float]:
    """build-nanogpt's fineweb.py, start to end, on our files instead of the Hub's.

    It writes beside itself, so that a copy of it is run. A turn raises UserError if that fails.
    """

    def measure() -> float:
        with tempfile.TemporaryDirectory(prefix="bench_") as folder:
            script = Path(folder) / "fineweb.py"
            shutil.copyfile(Path(settings["path"]) / "fineweb.py", script)
            environment = {**os.environ, "HF_DATASETS_CACHE": f"{folder}/cache"}
            words = [sys.executable, "-c", BUILD_NANOGPT, str(script), str(settings["workers"])]
            began = time.perf_counter()
            done = subprocess.run([*words, *settings["files"]], env=environment, check=False)
            if done.returncode:
                raise UserError("fineweb.py failed; what it said stands above")
            seconds = time.perf_counter() - began
            shards = Path(folder).glob("edu_fineweb10B/*.npy")
            return sum(len(np.load(shard, mmap_mode="r")) for shard in shards) / seconds

    return measure


TRAINING = {
    "nanogpt": train_nanogpt,
    "build-nanogpt": train_build_nanogpt,
    "transformers": train_transformers,
}
GENERATION = {"nanogpt": generate_nanogpt, "transformers": generate_transformers}
PREPARING = {
    "bare tiktoken": prepare_with_bare_tiktoken,
    "build-nanogpt": prepare_with_build_nanogpt,
}

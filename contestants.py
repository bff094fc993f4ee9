"""What bench.py measures: a training step and generation, by this repository and by others.

Each contestant runs in a process of its own, started by bench.py as `python contestants.py`. It
reads one line of JSON (its name, its task and the settings), gets ready, answers with a line, and
then measures once for every further line that it reads. So bench.py can let them take turns.

The others are checkouts or packages that the user already has. They are run as their own training
scripts run them: their model, their optimizer, their compile setting.
"""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from config import Config, DataSettings, LogSettings, ModelSettings, TrainSettings
from distributed import Ranks, choose_device, choose_dtype, device_name, peak_flops
from model import GPT, GPTConfig
from shards import shard_header
from train import Trainer

PADDED_VOCABULARY = 50_304  # what nanoGPT and build-nanogpt train with, for the sake of speed


Generate = Callable[[Tensor, int], None]


class Stopwatch:
    """Seconds between marks, by the device's own clock where it has one, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[str, object]] = []
        self.mark("start")

    def mark(self, name: str) -> None:
        """Whatever was done since the last mark is `name`."""
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.perf_counter()))

    def timed(self, name: str, function: Callable, before: str) -> Callable:
        """`function`, marked as `name`; what was done since the last mark is `before`."""

        def call(*arguments: object) -> object:
            self.mark(before)
            result = function(*arguments)
            self.mark(name)
            return result

        return call

    def read(self) -> dict[str, float]:
        """Seconds by name; marks of the same name add up."""
        if self.on_gpu:
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for (_, before), (name, now) in zip(self.marks, self.marks[1:]):
            passed = before.elapsed_time(now) / 1000 if self.on_gpu else now - before
            seconds[name] = seconds.get(name, 0.0) + passed
        return seconds


Step = Callable[[Stopwatch], None]


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: on a GPU by torch, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def flops_per_token(model: dict) -> int:
    """Floating-point operations of training on one token, for every contestant alike."""
    with torch.device("meta"):
        return GPT(GPTConfig(**model)).flops_per_token()


def matrix_product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product of random numbers: the ceiling of what a step can reach."""
    M, K, N = (8192, 8192, 8192) if device.type == "cuda" else (2048, 768, 3072)
    a, b = (torch.randn(size, device=device, dtype=dtype) for size in ((M, K), (K, N)))
    out = torch.empty(M, N, device=device, dtype=dtype)
    torch.mm(a, b, out=out)
    count = 10
    watch = Stopwatch(device)
    for _ in range(count):
        torch.mm(a, b, out=out)
    watch.mark("products")
    return count * 2 * M * K * N / watch.read()["products"]


# Training


def measure_training(settings: dict) -> Callable[[], dict[str, float]]:
    """Ready to train: each call makes some steps and tells how long one took, part by part."""
    device = choose_device(settings["device"])
    dtype = choose_dtype(settings["dtype"], device)
    make = our_training if settings["name"] == "ours" else their_training
    step = make(settings, device, dtype)
    for _ in range(2):
        step(Stopwatch(device))  # compiles, and sets libraries up

    def measure() -> dict[str, float]:
        count = settings["steps"]
        watch = Stopwatch(device)
        began = time.perf_counter()
        for _ in range(count):
            step(watch)
        parts = watch.read()
        numbers = {f"{name}_seconds": value / count for name, value in parts.items()}
        numbers["step_seconds"] = (time.perf_counter() - began) / count
        numbers["peak_memory"] = peak_memory(device)
        if settings["name"] == "ours":
            numbers["matrix_product_flops"] = matrix_product_rate(device, dtype)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # leave the room to the next contestant
        return numbers

    return measure


def our_training(settings: dict, device: torch.device, dtype: torch.dtype) -> Step:
    """A step of train.py's Trainer, on a shard of random tokens."""
    folder = Path(tempfile.mkdtemp(prefix="bench_"))
    B, T = settings["micro_batch_size"], settings["model"]["block_size"]
    tokens = np.random.default_rng(0).integers(50_257, size=64 * B * T + 1, dtype="<u2")
    (folder / "train_000000.bin").write_bytes(shard_header(len(tokens)) + tokens.tobytes())
    config = Config(
        model=ModelSettings(**settings["model"]),
        data=DataSettings(dir=str(folder)),
        train=TrainSettings(
            out=str(folder / "run"),
            tokens_per_step=B * T,
            micro_batch_size=B,
            dtype=str(dtype).removeprefix("torch."),
            compile=settings["compile"],
        ),
        log=LogSettings(eval_every=0, sample_every=0),
    )
    trainer = Trainer(config, Ranks(rank=0, local_rank=0, world_size=1, device=device))
    shutil.rmtree(folder)  # what is open stays readable
    parts = {"data": trainer.loader.load, "forward": trainer.loss_of, "optimizer": trainer.update}

    def step(watch: Stopwatch) -> None:
        trainer.loader.load = watch.timed("data", parts["data"], before="data")
        trainer.loss_of = watch.timed("forward", parts["forward"], before="data")
        trainer.update = watch.timed("optimizer", parts["optimizer"], before="backward")
        trainer.train_step()

    return step


def their_training(settings: dict, device: torch.device, dtype: torch.dtype) -> Step:
    """A step as the other's own training script makes it, on a batch that is there already."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model, optimizer, loss_of = THEIR_TRAINING[settings["name"]](settings, device)
    compiled = torch.compile(model) if settings["compile"] else model
    size = (settings["micro_batch_size"], settings["model"]["block_size"] + 1)
    tokens = torch.randint(50_257, size, device=device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step(watch: Stopwatch) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of(compiled, inputs, targets)
        watch.mark("forward")
        loss.backward()
        watch.mark("backward")
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        watch.mark("optimizer")

    return step


def load_definitions(path: Path) -> ModuleType:
    """The classes and functions of a Python file, without running what else is in it.

    build-nanogpt's train_gpt2.py is one script from top to bottom. Its imports of neighbouring
    files are left out too.
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

    name = f"peer_{path.parent.name.replace('-', '_')}_{path.stem}"
    spec = importlib.util.spec_from_loader(name, Definitions(name, str(path)))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.dont_write_bytecode = True
    spec.loader.exec_module(module)
    return module


def make_nanogpt(settings: dict) -> nn.Module:
    """nanoGPT's model with the vocabulary that its train.py takes."""
    module = load_definitions(Path(settings["path"]) / "model.py")
    shape = {key: settings["model"][key] for key in ("n_layer", "n_head", "n_embd", "block_size")}
    config = module.GPTConfig(vocab_size=PADDED_VOCABULARY, bias=True, dropout=0.0, **shape)
    return module.GPT(config)


def nanogpt_training(settings: dict, device: torch.device) -> tuple:
    """Model, optimizer and loss of nanoGPT's train.py."""
    model = make_nanogpt(settings).to(device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
    return model, optimizer, lambda compiled, inputs, targets: compiled(inputs, targets)[1]


def build_nanogpt_training(settings: dict, device: torch.device) -> tuple:
    """Model, optimizer and loss of build-nanogpt's train_gpt2.py."""
    module = load_definitions(Path(settings["path"]) / "train_gpt2.py")
    module.master_process = False  # a global that configure_optimizers reads
    shape = {key: settings["model"][key] for key in ("n_layer", "n_head", "n_embd", "block_size")}
    model = module.GPT(module.GPTConfig(vocab_size=PADDED_VOCABULARY, **shape)).to(device)
    optimizer = model.configure_optimizers(0.1, 6e-4, device.type)
    return model, optimizer, lambda compiled, inputs, targets: compiled(inputs, targets)[1]


def make_transformers(settings: dict) -> nn.Module:
    """Hugging Face's GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = settings["model"]
    config = GPT2Config(
        n_layer=shape["n_layer"],
        n_head=shape["n_head"],
        n_embd=shape["n_embd"],
        n_positions=shape["block_size"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,  # so that generation doesn't stop early
    )
    return GPT2LMHeadModel(config)


def transformers_training(settings: dict, device: torch.device) -> tuple:
    """Hugging Face's GPT-2 with PyTorch's fused AdamW."""
    model = make_transformers(settings).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, weight_decay=0.1, fused=True)
    return model, optimizer, lambda compiled, inputs, targets: compiled(inputs, labels=inputs).loss


THEIR_TRAINING = {
    "nanogpt": nanogpt_training,
    "build-nanogpt": build_nanogpt_training,
    "transformers": transformers_training,
}


# Generation


def measure_generation(settings: dict) -> Callable[[], dict[str, float]]:
    """Ready to generate: each call tells the seconds of a prompt and of each token after it."""
    device = choose_device(settings["device"])
    dtype = choose_dtype(settings["dtype"], device)
    torch.manual_seed(0)
    generate = GENERATION[settings["name"]](settings, device, dtype)
    prompt_tokens, new_tokens = settings["prompt_tokens"], settings["new_tokens"]
    ids = torch.randint(50_257, (settings["batch_size"], prompt_tokens), device=device)

    def seconds(count: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.inference_mode():
            generate(ids, count)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    seconds(new_tokens)  # sets libraries up

    def measure() -> dict[str, float]:
        prefill = seconds(1)
        decode = (seconds(new_tokens) - prefill) / (new_tokens - 1)
        return {"prefill_seconds": prefill, "token_seconds": decode}

    return measure


def our_generation(settings: dict, device: torch.device, dtype: torch.dtype) -> Generate:
    """GPT.generate, greedy, token by token as sample.py takes them."""
    model = GPT(GPTConfig(**settings["model"])).to(device=device, dtype=dtype).eval()

    def generate(ids: Tensor, count: int) -> None:
        for next_ids in model.generate(ids, count, temperature=0):
            next_ids.tolist()

    return generate


def nanogpt_generation(settings: dict, device: torch.device, dtype: torch.dtype) -> Generate:
    """nanoGPT's generate, with its sample.py's autocast; top_k=1 is greedy."""
    model = make_nanogpt(settings).to(device).eval()

    def generate(ids: Tensor, count: int) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            model.generate(ids, count, top_k=1)

    return generate


def transformers_generation(settings: dict, device: torch.device, dtype: torch.dtype) -> Generate:
    """Hugging Face's generate with its cache, greedy."""
    model = make_transformers(settings).to(device=device, dtype=dtype).eval()

    def generate(ids: Tensor, count: int) -> None:
        mask = torch.ones_like(ids)
        model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False)

    return generate


GENERATION = {
    "ours": our_generation,
    "nanogpt": nanogpt_generation,
    "transformers": transformers_generation,
}


def main() -> None:
    """Answer bench.py: a line when ready, then one for every measurement it asks for."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a contestant prints goes where it can't be taken for an answer
    settings = json.loads(sys.stdin.readline())
    task = {"train": measure_training, "generate": measure_generation}[settings["task"]]
    measure = task(settings)
    device = choose_device(settings["device"])
    dtype = choose_dtype(settings["dtype"], device)
    ready = {
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "peak_flops": peak_flops(device),
        "flops_per_token": flops_per_token(settings["model"]),
        "torch": torch.__version__,
    }
    print(json.dumps(ready), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(measure()), file=answers, flush=True)


if __name__ == "__main__":
    main()

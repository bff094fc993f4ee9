"""What bench.py measures: a training step, generation, the loader, preparing, starting.

Each contestant runs in a process of its own, started by bench.py. It reads one line of JSON (its
name, its task and the settings), gets ready, answers with a line about the machine, and then
measures once for every further line that it reads. So bench.py can let contestants take turns.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends slow imports without a traceback

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import peers
from checkpoint import Meta, save_checkpoint
from common.device import (
    Moment,
    choose_device,
    choose_dtype,
    device_name,
    memory_errors,
    peak_flops,
    peak_memory,
)
from common.errors import UserError, run_script
from common.files import file_sha256
from config import make_config
from data import BatchShape, micro_batches
from decoding import compile_decoding, pack_weights
from distributed import Ranks
from model import GPT, GPTConfig
from shards import GPT2, TokenStream, shard_header
from step import make_stepper

ROOT = Path(__file__).parent.parent
Measure = Callable[[], dict[str, float]]  # a turn: the numbers by name


def wait_for(device: torch.device) -> None:
    """Return when an accelerator has done what it was given; it works on by itself."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


class Stopwatch:
    """Seconds between marks: by CUDA's own clock, without waiting for it; else by ours."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[str, Moment]] = []
        self.mark("start")

    def mark(self, name: str) -> None:
        """Whatever was done since the last mark is `name`."""
        if self.device.type != "cuda":
            wait_for(self.device)
        self.marks.append((name, Moment(self.device)))

    def timed(self, name: str, function: Callable, before: str) -> Callable:
        """`function`, marked as `name`; what was done since the last mark is `before`."""

        def call(*arguments: object) -> object:
            self.mark(before)
            result = function(*arguments)
            self.mark(name)
            return result

        return call

    def read(self) -> dict[str, float]:
        """Seconds by name, when all is done; marks of the same name add up."""
        wait_for(self.device)
        seconds: dict[str, float] = {}
        for (_, before), (name, now) in zip(self.marks, self.marks[1:]):
            seconds[name] = seconds.get(name, 0.0) + now.seconds_after(before)
        return seconds


def matrix_product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product of random numbers: the ceiling of what a step can reach."""
    M, K, N = (8192, 8192, 8192) if device.type == "cuda" else (2048, 768, 3072)
    a, b = (torch.randn(size, device=device, dtype=dtype) for size in ((M, K), (K, N)))
    out = torch.empty(M, N, device=device, dtype=dtype)
    torch.mm(a, b, out=out)
    watch, count = Stopwatch(device), 10
    for _ in range(count):
        torch.mm(a, b, out=out)
    watch.mark("products")
    return count * 2 * M * K * N / watch.read()["products"]


def leave_room(device: torch.device) -> None:
    """Hand a GPU's unused memory back, for the next contestant."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


# A training step


def measure_training(settings: dict, device: torch.device, dtype: torch.dtype) -> Measure:
    """A turn makes some steps: the seconds of one, part by part, and the memory."""
    ours = settings["name"] in ("ours", "document mask")
    step = (our_step if ours else their_step)(settings, device, dtype)
    for _ in range(2):
        step(Stopwatch(device))  # compiles, and sets libraries up
    leave_room(device)

    def measure() -> dict[str, float]:
        count = settings["steps"]
        if device.type == "cuda":  # whose memory was handed back
            untimed = Stopwatch(device)
            step(untimed)
            untimed.read()
        began, watch = time.perf_counter(), Stopwatch(device)
        for _ in range(count):
            step(watch)
        parts = watch.read()
        numbers = {"step_seconds": (time.perf_counter() - began) / count}
        numbers |= {f"{name}_seconds": value / count for name, value in parts.items()}
        numbers["peak_memory"] = peak_memory(device)
        if ours:
            numbers["matrix_product_flops"] = matrix_product_rate(device, dtype)
        leave_room(device)
        return numbers

    return measure


def random_shard(count: int) -> Path:
    """A new folder with a shard of so many random tokens, in documents of about a thousand."""
    folder, generator = Path(tempfile.mkdtemp(prefix="bench_")), np.random.default_rng(0)
    tokens = generator.integers(50_256, size=count, dtype=np.uint16)
    tokens[generator.random(count) < 1 / 1000] = 50_256  # <|endoftext|>
    (folder / "train_000000.bin").write_bytes(shard_header(count) + tokens.tobytes())
    return folder


def our_step(
    settings: dict, device: torch.device, dtype: torch.dtype
) -> Callable[[Stopwatch], None]:
    """A step of train.py, on a shard of random tokens."""
    B, T = settings["micro_batch_size"], settings["model"]["block_size"]
    folder = random_shard(64 * B * T + 1)
    config = make_config(
        {
            "model": settings["model"],
            "optim": settings["optim"],
            "data": {"document_mask": settings["name"] == "document mask"},
            "train": {
                "tokens_per_step": B * T,
                "micro_batch_size": B,
                "dtype": str(dtype).removeprefix("torch."),
                "compile": settings["compile"],
            },
        }
    )
    ranks = Ranks(device)
    stepper = make_stepper(config, ranks, BatchShape.of(config, 1), TokenStream(folder, "train"))
    shutil.rmtree(folder)  # what is open stays readable
    load, forward, update = stepper.loader.load, stepper.loss_of, stepper.update
    numbers = itertools.count()

    def step(watch: Stopwatch) -> None:
        stepper.loader.load = watch.timed("data", load, before="data")
        stepper.loss_of = watch.timed("forward", forward, before="data")
        stepper.update = watch.timed("optimizer", update, before="backward")
        stepper.take(next(numbers))

    return step


def their_step(
    settings: dict, device: torch.device, dtype: torch.dtype
) -> Callable[[Stopwatch], None]:
    """A step of a peer, on a batch that is there already."""
    torch.manual_seed(0)
    model, optimizer, loss_of = peers.TRAINING[settings["name"]](settings, device)
    compiled = torch.compile(model) if settings["compile"] else model
    size = (settings["micro_batch_size"], settings["model"]["block_size"] + 1)
    tokens = torch.randint(50_257, size, device=device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def step(watch: Stopwatch) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of(compiled, inputs, targets)
        watch.mark("forward")
        scaler.scale(loss).backward()
        watch.mark("backward")
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        watch.mark("optimizer")

    return step


# Generation


def measure_generation(settings: dict, device: torch.device, dtype: torch.dtype) -> Measure:
    """A turn tells the seconds of a prompt with its first token, and of each token after it.

    A CPU does one thing after another, so that the tokens can be timed one by one. It also tells
    the 10th percentile of their times: how fast it is while nothing else takes the machine away.
    """
    torch.manual_seed(0)
    make, ticks = {"ours": our_generation, **peers.GENERATION}[settings["name"]], []
    generate = make(settings, device, dtype, lambda: ticks.append(time.perf_counter()))
    size = (settings["batch_size"], settings["prompt_tokens"])
    ids, new_tokens = torch.randint(50_257, size, device=device), settings["new_tokens"]

    def seconds(count: int) -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            generate(ids, count)
        wait_for(device)
        return time.perf_counter() - began

    seconds(new_tokens)  # sets libraries up

    def measure() -> dict[str, float]:
        prefill = seconds(1)
        ticks.clear()
        whole = seconds(new_tokens)
        if device.type == "cpu":
            times = np.diff(ticks)
            return {
                "prefill_seconds": prefill,
                "token_seconds": float(times.mean()),
                "undisturbed_token_seconds": float(np.quantile(times, 0.1)),
            }
        return {"prefill_seconds": prefill, "token_seconds": (whole - prefill) / (new_tokens - 1)}

    return measure


def our_generation(
    settings: dict, device: torch.device, dtype: torch.dtype, tick: Callable[[], None]
) -> Callable[[Tensor, int], None]:
    """GPT.generate, greedy, made ready and taken token by token as sample.py does it."""
    model = GPT(GPTConfig(**settings["model"])).to(device=device, dtype=dtype).eval()
    pack_weights(model)
    if settings["compile"]:
        compile_decoding(model)

    def generate(ids: Tensor, count: int) -> None:
        for next_ids in model.generate(ids, count, temperature=0):
            next_ids.tolist()
            tick()

    return generate


# The loader, and preparing


def measure_loader(settings: dict, *_: object) -> Measure:
    """A turn draws some ten million tokens, shuffled, from the page cache.

    And it takes the hash of the whole shard, as is done before a run's first step.
    """
    T, B = settings["model"]["block_size"], settings["micro_batch_size"]
    folder = random_shard(20_000_000)  # just written, it is in the page cache
    stream = TokenStream(folder, "train")
    atexit.register(shutil.rmtree, folder)
    shape = BatchShape(B * T, T, B, world_size=1)
    steps = iter(range(1 << 40))
    count = max(1, 10_000_000 // (B * T))

    def measure() -> dict[str, float]:
        began = time.perf_counter()
        for _ in range(count):
            for _ in micro_batches(stream, shape, seed=0, step=next(steps), rank=0):
                pass
        drawn = time.perf_counter()
        file_sha256(folder / "train_000000.bin")
        return {
            "seconds_per_token": (drawn - began) / (count * B * T),
            "hash_seconds_per_token": (time.perf_counter() - drawn) / len(stream),
        }

    return measure


def measure_preparing(settings: dict, *_: object) -> Measure:
    """A turn prepares the files from start to end."""
    make = {"ours": our_preparing, **peers.PREPARING}[settings["name"]]
    tokens_per_second = make(settings)
    return lambda: {"seconds_per_token": 1 / tokens_per_second()}


def run(command: list[object], **options: object) -> None:
    """Run a script to its end. Raises UserError if it fails."""
    if subprocess.run(command, check=False, **options).returncode:
        raise UserError(f"{Path(command[1]).name} failed; what it said stands above")


def our_preparing(settings: dict) -> Callable[[], float]:
    """prepare_fineweb.py, with so many workers, on the folder of the files."""
    script = ROOT / "prepare_fineweb.py"

    def measure() -> float:
        with tempfile.TemporaryDirectory(prefix="bench_") as out:
            options = ["--out", out, "--val-tokens", "1000", "--workers", str(settings["workers"])]
            source = Path(settings["files"][0]).parent
            began = time.perf_counter()
            run([sys.executable, script, "--source", source, *options])
            seconds = time.perf_counter() - began
            tokens = sum((path.stat().st_size - 1024) // 2 for path in Path(out).glob("*.bin"))
            return tokens / seconds

    return measure


# Starting


HELPFUL = ("prepare_fineweb.py", "train.py", "sample.py", "evaluate.py", "convert.py", "bench.py")
HELPFUL += ("recipe.py",)


def measure_start(settings: dict, *_: object) -> Measure:
    """A turn starts every script for its --help, and sample.py for a token of a random model.

    With --dtype auto, as a user does.
    """
    folder = Path(tempfile.mkdtemp(prefix="bench_"))
    atexit.register(shutil.rmtree, folder)
    model = GPT(GPTConfig(**settings["model"]))
    meta = Meta(0, model.config, GPT2, {}, None, None, None, data="")
    save_checkpoint(folder / "checkpoints", meta, model, torch.optim.SGD(model.parameters()))

    def seconds(*words: object) -> float:
        began = time.perf_counter()
        command = [sys.executable, *map(str, words)]
        run(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        return time.perf_counter() - began

    one_token = ("--checkpoint", folder, "--max-new-tokens", 1, "--jsonl", "--device", "cpu")
    return lambda: {
        "help_seconds": max(seconds(script, "--help") for script in HELPFUL),
        "first_token_seconds": seconds("sample.py", *one_token),
    }


TASKS = {
    "train": measure_training,
    "generate": measure_generation,
    "data": measure_loader,
    "tokenize": measure_preparing,
    "start": measure_start,
}


def main() -> None:
    """Answer bench.py: a line when ready, then one for every turn it asks for."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a contestant prints goes where it can't be taken for an answer
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    line = sys.stdin.readline()
    if not line:  # another has failed first
        return
    settings = json.loads(line)
    device = choose_device(settings.get("device", "cpu"))
    dtype = choose_dtype(settings.get("dtype", "auto"), device)
    with torch.device("meta"):
        flops_per_token = GPT(GPTConfig(**settings["model"])).flops_per_token()
    machine = {
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "peak_flops": peak_flops(device) if dtype.itemsize == 2 else None,  # of bfloat16
        "flops_per_token": flops_per_token,  # one count for every contestant
    }
    with memory_errors("lower --micro-batch-size or --batch-size"):
        measure = TASKS[settings["task"]](settings, device, dtype)
        print(json.dumps(machine), file=answers, flush=True)
        for _ in sys.stdin:
            print(json.dumps(measure()), file=answers, flush=True)


if __name__ == "__main__":
    sys.exit(run_script(main))

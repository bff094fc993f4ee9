"""How fast is it? A training step, generation, the loader, the tokenizer; others beside them.

    python bench.py train --peer nanogpt=../nanoGPT
    python bench.py generate --peer transformers
    python bench.py data --data data/fineweb_edu
    python bench.py tokenize --source texts.parquet --peer build-nanogpt=../build-nanogpt

A peer is a checkout or a package that you have already. It runs beside this repository in the same
run, in a process of its own, and the two take turns: what else happens on the machine then slows
both. Ratios are medians of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from errors import Parser, UserError, positive, run_script

PEERS = {
    "train": ("nanogpt", "build-nanogpt", "transformers"),
    "generate": ("nanogpt", "transformers"),
    "data": (),
    "tokenize": ("build-nanogpt",),
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description="Measure speed, beside others if asked.")
    tasks = parser.add_subparsers(dest="task", required=True, metavar="|".join(PEERS))
    for task, help_text in {
        "train": "a training step: tokens/s, MFU, memory, and where the time goes",
        "generate": "generation: the prompt, then token by token",
        "data": "the loader alone",
        "tokenize": "prepare_fineweb.py against bare tiktoken",
    }.items():
        add = tasks.add_parser(task, help=help_text, description=help_text).add_argument
        if PEERS[task]:
            choices = ", ".join(PEERS[task])
            add("--peer", action="append", default=[], metavar="NAME[=PATH]", help=choices)
        add("--rounds", type=positive, default=5, help="turns that each one takes (5)")
        add("--output", type=Path, metavar="FILE.json", help="write all that was measured")
        if task in ("train", "generate", "data"):
            add("--config", type=Path, default=Path("configs/gpt2_124m.toml"), help="the model")
        if task in ("train", "generate"):
            add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
            add("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"))
        if task in ("train", "data"):
            add("--micro-batch-size", type=positive, help="windows (the config's)")
        if task == "train":
            add("--steps", type=positive, default=5, help="steps per turn (5)")
            add("--no-compile", action="store_true", help="do without torch.compile, all alike")
        if task == "generate":
            add("--batch-size", type=positive, default=1, help="texts side by side (1)")
            add("--prompt-tokens", type=positive, default=16, help="length of the prompt (16)")
            add("--new-tokens", type=positive, default=32, help="tokens to generate, over 1 (32)")
        if task == "data":
            add("--data", type=Path, required=True, help="a folder of shards")
        if task == "tokenize":
            add("--source", required=True, type=Path, help="a folder of Parquet files")
            add("--copies", type=positive, default=4, help="times that it is read in a run (4)")
            add("--workers", type=positive, default=os.cpu_count(), help="processes (all cores)")
    return parser.parse_args(arguments)


if __name__ == "__main__":  # before the slow imports: --help and a typo answer at once
    ARGUMENTS = parse_arguments()

import json
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime

import numpy as np

from config import load_config

HERE = Path(__file__).parent
PARTS = ("data", "forward", "backward", "optimizer")
Round = dict[str, float]  # what one turn measured


class Contestant:
    """A process of contestants.py that measures when it is asked to."""

    def __init__(self, settings: dict) -> None:
        """Start it and wait until it is ready. Raises UserError if it can't be."""
        self.name = settings["name"]
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "contestants.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.about = self.ask(json.dumps(settings))

    def ask(self, line: str = "") -> Round:
        """Send a line, wait for the answer."""
        try:
            print(line, file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise UserError(f"{self.name} failed; what it said stands above")
        return json.loads(answer)

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()


def parse_peers(arguments: argparse.Namespace) -> dict[str, str]:
    """Name -> path of --peer NAME=PATH; "" for a package. Raises UserError for an unknown one."""
    peers = {}
    for text in arguments.peer:
        name, _, path = text.partition("=")
        known = PEERS[arguments.task]
        if name not in known:
            raise UserError(f"--peer {name}: expected one of {', '.join(known)}")
        if name != "transformers" and not Path(path or "?").is_dir():
            raise UserError(f"--peer {text}: expected {name}=PATH, the folder of its checkout")
        peers[name] = path
    return peers


def take_turns(arguments: argparse.Namespace, settings: dict) -> tuple[dict, dict[str, list]]:
    """(what ours says of the machine, every contestant's rounds)."""
    with ExitStack() as stack:
        contestants = []
        for name, path in {"ours": "", **parse_peers(arguments)}.items():
            print(f"{name} is getting ready …", file=sys.stderr)
            contestants.append(
                stack.enter_context(Contestant({**settings, "name": name, "path": path}))
            )
        rounds: dict[str, list[Round]] = {one.name: [] for one in contestants}
        for number in range(1, arguments.rounds + 1):
            print(f"round {number} of {arguments.rounds}", file=sys.stderr)
            for one in contestants:
                rounds[one.name].append(one.ask())
        return contestants[0].about, rounds


def median(rounds: list[Round], key: str) -> float | None:
    """The median of a number over the rounds; None where it wasn't measured."""
    values = [measured[key] for measured in rounds if key in measured]
    return statistics.median(values) if values else None


def ratio(ours: list[Round], theirs: list[Round], key: str) -> float:
    """How many times their seconds ours fit into: the median over the rounds."""
    return statistics.median(other[key] / one[key] for one, other in zip(ours, theirs))


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Columns as wide as they need to be, the first to the left."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    for row in [head, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row, widths)]
        print("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())


def number(value: float | None, digits: int = 0) -> str:
    """A number for the table."""
    return "n/a" if value is None else f"{value:,.{digits}f}"


def model_of(config_file: Path) -> tuple[dict, int]:
    """The [model] settings and the micro-batch size of a config file."""
    config = load_config([str(config_file)])
    return asdict(config.model), config.train.micro_batch_size


def measure_training(arguments: argparse.Namespace) -> dict:
    """A training step, ours and theirs."""
    model, micro_batch_size = model_of(arguments.config)
    micro_batch_size = arguments.micro_batch_size or micro_batch_size
    settings = {
        "task": "train",
        "model": model,
        "micro_batch_size": micro_batch_size,
        "device": arguments.device,
        "dtype": arguments.dtype,
        "compile": not arguments.no_compile,
        "steps": arguments.steps,
    }
    machine, rounds = take_turns(arguments, settings)
    ceiling = median(rounds["ours"], "matrix_product_flops")
    tokens = micro_batch_size * model["block_size"]
    results = {}
    for name, measured in rounds.items():
        rate = tokens / median(measured, "step_seconds")
        flops = rate * machine["flops_per_token"]
        results[name] = {
            "tokens_per_second": rate,
            "of_matrix_product": flops / ceiling,
            "mfu": machine["peak_flops"] and flops / machine["peak_flops"],
            "peak_memory": median(measured, "peak_memory"),
            "seconds": {part: median(measured, f"{part}_seconds") for part in PARTS},
            "ratio": ratio(rounds["ours"], measured, "step_seconds"),
            "memory_ratio": median(rounds["ours"], "peak_memory") / median(measured, "peak_memory"),
        }
    print_table(
        ["", "tokens/s", "of product", "MFU", "GB", *(f"{p} ms" for p in PARTS), "ours is"],
        [
            [
                name,
                number(result["tokens_per_second"]),
                f"{result['of_matrix_product']:.0%}",
                "n/a" if result["mfu"] is None else f"{result['mfu']:.0%}",
                number(result["peak_memory"] / 1e9, 1),
                *(number(part and part * 1e3, 1) for part in result["seconds"].values()),
                "" if name == "ours" else f"{result['ratio']:.2f} × as fast",
            ]
            for name, result in results.items()
        ],
    )
    print(f"matrix product: {ceiling / 1e12:.2f} TFLOP/s in {machine['dtype']}")
    return {
        "settings": settings,
        "machine": machine,
        "matrix_product_flops": ceiling,
        "results": results,
        "rounds": rounds,
    }


def measure_generation(arguments: argparse.Namespace) -> dict:
    """Generation, ours and theirs."""
    if arguments.new_tokens < 2:
        raise UserError("--new-tokens 1: expected at least 2, the first belongs to the prompt")
    model, _ = model_of(arguments.config)
    if arguments.prompt_tokens + arguments.new_tokens > model["block_size"]:
        raise UserError(
            f"--prompt-tokens {arguments.prompt_tokens} and --new-tokens {arguments.new_tokens} "
            f"are more than the context of {model['block_size']:,}: lower one of them"
        )
    settings = {
        "task": "generate",
        "model": model,
        "device": arguments.device,
        "dtype": arguments.dtype,
        "batch_size": arguments.batch_size,
        "prompt_tokens": arguments.prompt_tokens,
        "new_tokens": arguments.new_tokens,
    }
    machine, rounds = take_turns(arguments, settings)
    B, T = arguments.batch_size, arguments.prompt_tokens
    results = {
        name: {
            "prefill_tokens_per_second": B * T / median(measured, "prefill_seconds"),
            "decode_tokens_per_second": B / median(measured, "token_seconds"),
            "prefill_ratio": ratio(rounds["ours"], measured, "prefill_seconds"),
            "decode_ratio": ratio(rounds["ours"], measured, "token_seconds"),
        }
        for name, measured in rounds.items()
    }
    print_table(
        ["", "prefill tokens/s", "decode tokens/s", "ours prefills", "ours decodes"],
        [
            [
                name,
                number(result["prefill_tokens_per_second"]),
                number(result["decode_tokens_per_second"], 1),
                "" if name == "ours" else f"{result['prefill_ratio']:.2f} × as fast",
                "" if name == "ours" else f"{result['decode_ratio']:.2f} × as fast",
            ]
            for name, result in results.items()
        ],
    )
    return {"settings": settings, "machine": machine, "results": results, "rounds": rounds}


def measure_loader(arguments: argparse.Namespace) -> dict:
    """How many tokens a second the loader alone makes ready, from the page cache."""
    from data import BatchShape, micro_batches
    from shards import TokenStream

    model, micro_batch_size = model_of(arguments.config)
    micro_batch_size = arguments.micro_batch_size or micro_batch_size
    stream = TokenStream(arguments.data, "train")
    tokens = micro_batch_size * model["block_size"]
    shape = BatchShape(tokens, model["block_size"], micro_batch_size, world_size=1)
    for first in range(0, len(stream), 1 << 20):  # into the page cache
        stream.read(first, min(1 << 20, len(stream) - first))
    steps, rounds = max(1, 10_000_000 // tokens), []
    for turn in range(arguments.rounds):
        began = time.perf_counter()
        for step in range(turn * steps, (turn + 1) * steps):
            for _ in micro_batches(stream, shape, seed=0, step=step, rank=0):
                pass
        rounds.append({"tokens_per_second": steps * tokens / (time.perf_counter() - began)})
    rate = median(rounds, "tokens_per_second")
    print_table(["", "tokens/s"], [["loader", number(rate)]])
    return {
        "settings": {"tokens": tokens},
        "results": {"tokens_per_second": rate},
        "rounds": rounds,
    }


# Tokenizing


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


def run_for_seconds(*command: object, **options: object) -> float:
    """Run a command to its end; the seconds it took. Raises UserError if it fails."""
    began = time.perf_counter()
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, **options
    )
    if done.returncode:
        raise UserError(f"{command[1]} failed: {done.stderr.strip()[-500:]}")
    return time.perf_counter() - began


def tokenize_ours(folder: Path, files: list[Path], workers: int) -> float:
    """Tokens a second of prepare_fineweb.py, from its start to its end."""
    out = folder / "ours"
    options = [
        "--source",
        files[0].parent,
        "--out",
        out,
        "--val-tokens",
        1000,
        "--workers",
        workers,
    ]
    seconds = run_for_seconds(sys.executable, HERE / "prepare_fineweb.py", *options)
    tokens = sum((path.stat().st_size - 1024) // 2 for path in out.glob("*.bin"))
    shutil.rmtree(out)
    return tokens / seconds


def tokenize_build_nanogpt(folder: Path, files: list[Path], workers: int, checkout: str) -> float:
    """The same of build-nanogpt's fineweb.py, which writes beside itself: a copy of it runs."""
    script = folder / "fineweb.py"
    shutil.copyfile(Path(checkout) / "fineweb.py", script)
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache")}
    command = [sys.executable, "-c", BUILD_NANOGPT, script, workers, *files]
    seconds = run_for_seconds(*command, env=environment)
    out = folder / "edu_fineweb10B"
    tokens = sum(len(np.load(path, mmap_mode="r")) for path in out.glob("*.npy"))
    shutil.rmtree(out)
    shutil.rmtree(folder / "cache")
    return tokens / seconds


def tokenize_bare(files: list[Path], workers: int) -> float:
    """What so many processes reach that do nothing but tiktoken's encode_ordinary."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BARE_TIKTOKEN, *map(str, files[worker::workers])],
            stdout=subprocess.PIPE,
            text=True,
        )
        for worker in range(workers)
    ]
    answers = [process.communicate()[0].split() for process in processes]
    if not all(answers):
        raise UserError("bare tiktoken failed; what it said stands above")
    return sum(int(tokens) / float(seconds) for tokens, seconds in answers)


def measure_tokenizing(arguments: argparse.Namespace) -> dict:
    """prepare_fineweb.py, bare tiktoken and build-nanogpt's script on the same Parquet files."""
    peers = parse_peers(arguments)
    sources = sorted(arguments.source.glob("*.parquet"))
    if not sources:
        raise UserError(f"--source {arguments.source}: expected a folder of .parquet files")
    rounds: dict[str, list[Round]] = {}
    with tempfile.TemporaryDirectory(prefix="bench_") as name:
        folder = Path(name)
        texts = folder / "texts"
        texts.mkdir()
        for copy in range(arguments.copies):
            for source in sources:
                (texts / f"{copy:03}_{source.name}").symlink_to(source.resolve())
        files = sorted(texts.iterdir())
        for turn in range(1, arguments.rounds + 1):
            print(f"round {turn} of {arguments.rounds}", file=sys.stderr)
            rates = {
                "ours": tokenize_ours(folder, files, arguments.workers),
                "bare tiktoken": tokenize_bare(files, arguments.workers),
            }
            if "build-nanogpt" in peers:
                rates["build-nanogpt"] = tokenize_build_nanogpt(
                    folder, files, arguments.workers, peers["build-nanogpt"]
                )
            for one, rate in rates.items():
                rounds.setdefault(one, []).append({"seconds_per_token": 1 / rate})
    results = {
        one: {
            "tokens_per_second": 1 / median(measured, "seconds_per_token"),
            "ratio": ratio(rounds["ours"], measured, "seconds_per_token"),
        }
        for one, measured in rounds.items()
    }
    print_table(
        ["", "tokens/s", "per process", "ours is"],
        [
            [
                one,
                number(result["tokens_per_second"]),
                number(result["tokens_per_second"] / arguments.workers),
                "" if one == "ours" else f"{result['ratio']:.2f} × as fast",
            ]
            for one, result in results.items()
        ],
    )
    settings = {"workers": arguments.workers, "files": len(files)}
    return {"settings": settings, "results": results, "rounds": rounds}


def hardware() -> str:
    """The processor and its cores, as Linux tells; a GPU's name stands under "machine"."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), "CPU")
    return f"{os.cpu_count()} × {name}, {platform.system()} {platform.machine()}"


def versions() -> dict[str, str]:
    """Of Python and of the packages that matter to speed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("torch", "tiktoken", "numpy", "datasets", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main(arguments: argparse.Namespace) -> None:
    """Measure, print a table, write JSON."""
    measure = {
        "train": measure_training,
        "generate": measure_generation,
        "data": measure_loader,
        "tokenize": measure_tokenizing,
    }[arguments.task]
    report = {
        "command": "python bench.py " + " ".join(sys.argv[1:]),
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware(),
        "versions": versions(),
        **measure(arguments),
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_script(main, ARGUMENTS))

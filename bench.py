"""How fast is it? A training step, generation, the loader, preparing, starting; others beside them.

    python bench.py train --peer nanogpt=../nanoGPT
    python bench.py generate --peer transformers
    python bench.py data
    python bench.py tokenize --source texts/ --peer build-nanogpt=../build-nanogpt
    python bench.py start
    python bench.py plan --tokens-per-second 400000
    python bench.py table out/bench        what files like those of --output tell

A peer is a checkout or a package that you have already. It runs beside this repository in the same
run, in a process of its own (benchmarks/contestants.py), and they take turns: what else happens on
the machine then slows all of them. What it comes to: benchmarks/turns.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from common.errors import Parser, UserError, positive, run_script

PEERS = {  # by task: the file that is taken from a checkout; None: a package that is installed
    "train": {"nanogpt": "model.py", "build-nanogpt": "train_gpt2.py", "transformers": None},
    "generate": {"nanogpt": "model.py", "transformers": None},
    "tokenize": {"build-nanogpt": "fineweb.py"},
}
ROOT = Path(__file__).parent
MOST_TOKENS = 10_000_000  # at once; more fit into no machine


def price(text: str) -> float:
    """An argparse type: a number of dollars. Raises ValueError, for argparse to tell."""
    dollars = float(text)
    if not 0 <= dollars < 1e9:
        raise ValueError(text)
    return dollars


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description="Measure speed, beside others if asked.")
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")

    def add_task(name: str, meaning: str) -> Parser:
        task = tasks.add_parser(name, help=meaning, description=meaning)
        add = task.add_argument
        task.set_defaults(config=ROOT / "configs" / "gpt2_124m.toml")
        if name != "tokenize":  # which has no model
            add("--config", type=Path, help="the model, and its optimizer (configs/gpt2_124m.toml)")
        add("--output", type=Path, metavar="FILE.json", help="write all that was found")
        if name != "plan":
            add("--rounds", type=positive, default=5, help="turns that each contestant takes (5)")
        if name in PEERS:
            known = ", ".join(PEERS[name])
            add("--peer", action="append", default=[], metavar="NAME[=PATH]", help=known)
        if name in ("train", "data", "plan"):
            default = "the config's, 2 on a CPU" if name == "train" else "the config's"
            add("--micro-batch-size", type=positive, help=f"windows at once ({default})")
        if name in ("train", "generate"):
            add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
            add("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"))
        return task

    add = add_task("train", "a training step: speed, memory, where the time goes").add_argument
    add("--steps", type=positive, default=5, help="steps in a turn (5)")
    add("--no-compile", action="store_true", help="do without torch.compile, all alike")
    add("--document-mask", action="store_true", help="and once more with data.document_mask")
    add = add_task("generate", "generation: the prompt, then token by token").add_argument
    add("--batch-size", type=positive, default=1, help="texts side by side (1)")
    add("--prompt-tokens", type=positive, default=16, help="length of the prompt (16)")
    add("--new-tokens", type=positive, help="tokens to generate (32, on a GPU 256; fewer to fit)")
    add("--no-compile", action="store_true", help="on a GPU: as sample.py without --compile")
    add("--peer-dtype", choices=("bfloat16", "float16", "float32"), help="of the others (ours)")
    add_task("data", "the loader alone, on random tokens in the page cache")
    add = add_task("tokenize", "prepare_fineweb.py against bare tiktoken").add_argument
    add("--source", required=True, type=Path, help="a folder of Parquet files")
    add("--copies", type=positive, default=8, help="times that it is read in a turn (8)")
    add("--workers", type=positive, default=os.cpu_count(), help="processes (all cores)")
    add_task("start", "every script's --help, and sample.py to its first token")
    add = add_task("plan", "step time, cost and memory for more GPUs, on paper").add_argument
    add("--tokens-per-second", type=positive, required=True, help="what one GPU was measured at")
    add("--gpus", type=positive, nargs="+", default=[1, 8, 64, 512], help="(1 8 64 512)")
    add("--gigabytes-per-second", type=positive, default=50, help="of a GPU's link (50)")
    add("--microseconds", type=positive, default=20, help="latency of a link (20)")
    add("--price", type=price, default=3.0, help="dollars per GPU and hour (3.00)")
    meaning = "ours beside the others, from files that --output wrote"
    show = tasks.add_parser("table", help=meaning, description=meaning)
    show.add_argument("folder", type=Path, help="where bench_*.json are")
    return parser.parse_args(arguments)


if __name__ == "__main__":  # before the slow imports: --help and a typo answer at once
    ARGUMENTS = parse_arguments()

import json
import math
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from importlib.util import find_spec

import torch

from benchmarks.scaling import Cluster, step_time
from benchmarks.turns import (
    PARTS,
    generation_results,
    median,
    milliseconds,
    percent,
    print_table,
    ratio,
    scaled,
    table,
    times,
    training_results,
)
from common.device import choose_device
from common.files import check_can_write, output_file
from common.reports import circumstances, commit, write_report
from config import Config, load_config
from data import BatchShape
from decoding import most_fused
from model import GPT, GPTConfig
from training.plan import estimated_memory

# Taking turns


class Contestant:
    """A process of benchmarks/contestants.py, which measures when it is asked to."""

    def __init__(self, settings: dict) -> None:
        """Start it; its imports run while others start."""
        self.name, self.settings = settings["name"], settings
        words = [sys.executable, "-m", "benchmarks.contestants"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(words, cwd=ROOT, text=True, **pipes)

    def prepare(self) -> dict:
        """Wait until it is ready; returns what it says of the machine. Raises UserError as ask."""
        print(f"{self.name} is getting ready …", file=sys.stderr)
        return self.ask(json.dumps(self.settings))

    def ask(self, line: str = "") -> dict:
        """Send a line, wait for the answer. Raises UserError if there is none."""
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
        """Let it end by itself, so that it tidies up: there is nothing more to read."""
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:  # it is still getting ready
            self.process.terminate()
            self.process.wait()


def take_turns(names: dict[str, str], settings: dict, rounds: int) -> tuple[dict, dict[str, list]]:
    """(what ours says of the machine, the turns of each contestant); `names` have their paths.

    A peer that fails is told and left out, wherever it was. Raises UserError if ours fails.
    """
    with ExitStack() as stack:
        contestants = {
            name: stack.enter_context(Contestant(settings_for(name, path, settings)))
            for name, path in names.items()
        }

        def from_all(question: Callable[[Contestant], dict]) -> dict[str, dict]:
            answers = {}
            for name, one in list(contestants.items()):
                try:
                    answers[name] = question(one)
                except UserError as error:
                    if name == "ours":
                        raise
                    print(f"left out: {error}", file=sys.stderr)
                    del contestants[name]
            return answers

        machine = from_all(Contestant.prepare)["ours"]  # one by one: each compiles alone
        rounds_told = []
        for number in range(1, rounds + 1):
            print(f"round {number} of {rounds}", file=sys.stderr)
            rounds_told.append(from_all(Contestant.ask))
        return machine, {name: [told[name] for told in rounds_told] for name in contestants}


def settings_for(name: str, path: str, settings: dict) -> dict:
    """What a contestant is told: who it is, and the precision of the others where that differs."""
    other = settings.get("peer_dtype") if name != "ours" else None
    return settings | {"name": name, "path": path} | ({"dtype": other} if other else {})


def read_peers(arguments: argparse.Namespace) -> dict[str, str]:
    """Name -> path of each --peer NAME=PATH, absolute. Raises UserError for an unknown one."""
    peers = {}
    for text in arguments.peer:
        name, _, path = text.partition("=")
        known = PEERS[arguments.task]
        if name not in known:
            raise UserError(f"--peer {name}: expected one of {', '.join(known)}")
        if name in peers:
            raise UserError(f"--peer {text}: {name} stands there twice")
        needed = known[name]
        if needed is None:
            if path or find_spec(name) is None:
                raise UserError(f"--peer {text}: expected {name}, installed (pip install {name})")
        elif not (path and Path(path, needed).is_file()):
            raise UserError(
                f"--peer {text}: expected {name}=PATH, the folder of {name}'s checkout, "
                f"with {needed} in it"
            )
        peers[name] = str(Path(path).resolve()) if path else ""
    return peers


def check_fits(option: str, B: int, T: int) -> None:
    """Raises UserError if B rows of T tokens are too many to be tried."""
    if B * T > MOST_TOKENS:
        raise UserError(f"{option} {B:,}: expected no more than {MOST_TOKENS // T:,}")


# The tasks: each measures, prints a table, and returns what is to be kept


def settings_of(arguments: argparse.Namespace, config: Config) -> dict:
    """What every contestant is told."""
    keys = ("device", "dtype", "peer_dtype")
    asked = {key: value for key, value in vars(arguments).items() if key in keys}
    sections = {"model": asdict(config.model), "optim": asdict(config.optim)}
    return {"task": arguments.task, **sections, **asked}


def report_of(names: dict[str, str], settings: dict, turns: dict, results: dict) -> dict:
    """What is kept of a measurement; with the commit of each checkout, and who failed."""
    commits = {name: commit(Path(path)) for name, path in names.items() if path}
    left_out = [name for name in names if name not in turns]
    told = {"settings": settings, "peers": commits, "left_out": left_out}
    return told | {"results": results, "turns": turns}


def train(arguments: argparse.Namespace, config: Config) -> dict:
    """A training step."""
    on_cpu = choose_device(arguments.device).type == "cpu"
    B = arguments.micro_batch_size or (2 if on_cpu else config.train.micro_batch_size)
    check_fits("--micro-batch-size", B, config.model.block_size)
    optim, model = config.optim, config.model
    special = (model.dropout, model.recompute, optim.name != "adamw", optim.average_share)
    if arguments.peer and any(special):
        raise UserError(
            f"--peer: others train with AdamW, without dropout, recompute or average_share, unlike "
            f"{arguments.config}: choose another --config"
        )
    settings = settings_of(arguments, config) | {
        "micro_batch_size": B,
        "compile": not arguments.no_compile,
        "steps": arguments.steps,
    }
    masked = {"document mask": ""} if arguments.document_mask else {}
    names = {"ours": "", **masked, **read_peers(arguments)}
    machine, turns = take_turns(names, settings, arguments.rounds)
    results = training_results(turns, machine, B * config.model.block_size)
    head = ["", "tokens/s", "of product", "MFU", *(f"{part} ms" for part in PARTS), "waiting"]
    print_table(
        [*head, "memory GB", "ours is", "ours takes"],
        [
            [
                name,
                f"{result['tokens_per_second']:,.0f}",
                f"{result['of_matrix_product']:.0%}",
                percent(result["mfu"], 0),
                *map(milliseconds, result["seconds"].values()),
                percent(result["data_share"], 1),
                scaled(result["peak_memory"], 1e-9),
                times(name, result["times_as_fast"]),
                times(name, result["memory_ratio"], "as much"),
            ]
            for name, result in results.items()
        ],
    )
    ceiling = median(turns["ours"], "matrix_product_flops")
    print(f"a large matrix product: {ceiling / 1e12:.2f} TFLOP/s in {machine['dtype']}")
    return report_of(names, settings, turns, results) | {"machine": machine}


def generate(arguments: argparse.Namespace, config: Config) -> dict:
    """Generation."""
    on_gpu = choose_device(arguments.device).type == "cuda"
    B, T, room = arguments.batch_size, arguments.prompt_tokens, config.model.block_size
    new = arguments.new_tokens or min(256 if on_gpu else 32, room - T)
    if arguments.peer_dtype and not arguments.peer:
        raise UserError("--peer-dtype is of the others: name some with --peer")
    if arguments.new_tokens == 1:
        raise UserError("--new-tokens 1: expected at least 2, the first belongs to the prompt")
    if new < 2 or T + new > room:
        raise UserError(
            f"--prompt-tokens {T} and {max(2, new)} new ones are more than the context of "
            f"{room:,}: lower --prompt-tokens or --new-tokens"
        )
    check_fits("--batch-size", B, T + new)
    settings = settings_of(arguments, config)
    settings |= {"batch_size": B, "prompt_tokens": T, "new_tokens": new}
    is_few = B <= most_fused(config.model.n_embd)
    settings["compile"] = on_gpu and is_few and not arguments.no_compile
    names = {"ours": "", **read_peers(arguments)}
    machine, turns = take_turns(names, settings, arguments.rounds)
    results = generation_results(turns, B, T)
    head = ["", "prefill tokens/s", "decode tokens/s", "ours prefills", "ours decodes"]
    rows = [
        [
            name,
            f"{result['prefill_tokens_per_second']:,.0f}",
            f"{result['decode_tokens_per_second']:,.1f}",
            times(name, result["prefill_times_as_fast"]),
            times(name, result["decode_times_as_fast"]),
        ]
        for name, result in results.items()
    ]
    if "undisturbed_tokens_per_second" in results["ours"]:
        head += ["undisturbed", "ours undisturbed"]
        for (name, result), row in zip(results.items(), rows):
            row.append(f"{result['undisturbed_tokens_per_second']:,.1f}")
            row.append(times(name, result["undisturbed_times_as_fast"]))
    print_table(head, rows)
    return report_of(names, settings, turns, results) | {"machine": machine}


def data(arguments: argparse.Namespace, config: Config) -> dict:
    """The loader alone, and the check of a shard."""
    B, T = arguments.micro_batch_size or config.train.micro_batch_size, config.model.block_size
    check_fits("--micro-batch-size", B, T)
    settings = settings_of(arguments, config) | {"micro_batch_size": B}
    _, turns = take_turns({"ours": ""}, settings, arguments.rounds)
    names = {"loader": "seconds_per_token", "SHA-256": "hash_seconds_per_token"}
    rates = {name: 1 / median(turns["ours"], key) for name, key in names.items()}
    print_table(["", "tokens/s"], [[name, f"{rate:,.0f}"] for name, rate in rates.items()])
    return report_of({"ours": ""}, settings, turns, {"tokens_per_second": rates})


@contextmanager
def copied_sources(folder: Path, copies: int) -> Iterator[list[str]]:
    """Links to a folder's Parquet files, several to each: enough text that a start counts little.

    Raises UserError if there are none.
    """
    sources = sorted(folder.glob("*.parquet"))
    if not sources:
        raise UserError(f"--source {folder}: expected a folder of .parquet files")
    with tempfile.TemporaryDirectory(prefix="bench_") as name:
        for copy in range(copies):
            for source in sources:
                Path(name, f"{copy:03}_{source.name}").symlink_to(source.resolve())
        yield sorted(map(str, Path(name).iterdir()))


def tokenize(arguments: argparse.Namespace, config: Config) -> dict:
    """Preparing, from a process's start to its last byte; of bare tiktoken only the encoding."""
    names = {"ours": "", "bare tiktoken": "", **read_peers(arguments)}
    settings = settings_of(arguments, config)
    settings |= {"workers": arguments.workers, "copies": arguments.copies}
    with copied_sources(arguments.source, arguments.copies) as files:
        _, turns = take_turns(names, {**settings, "files": files}, arguments.rounds)
    results = {
        name: {
            "tokens_per_second": 1 / median(turns[name], "seconds_per_token"),
            "times_as_fast": ratio(turns, name, "seconds_per_token"),
        }
        for name in turns
    }
    print_table(
        ["", "tokens/s", "per process", "ours is"],
        [
            [
                name,
                f"{result['tokens_per_second']:,.0f}",
                f"{result['tokens_per_second'] / arguments.workers:,.0f}",
                times(name, result["times_as_fast"]),
            ]
            for name, result in results.items()
        ],
    )
    return report_of(names, settings, turns, results)


def start(arguments: argparse.Namespace, config: Config) -> dict:
    """Starting: whole processes, from the command to its end."""
    settings = settings_of(arguments, config)
    _, turns = take_turns({"ours": ""}, settings, arguments.rounds)
    names = {"help_seconds": "--help, the slowest", "first_token_seconds": "sample.py, one token"}
    results = {key: median(turns["ours"], key) for key in names}
    rows = [[name, f"{results[key]:.2f}"] for key, name in names.items()]
    print_table(["", "seconds"], rows)
    return report_of({"ours": ""}, settings, turns, results)


def plan(arguments: argparse.Namespace, config: Config) -> dict:
    """More GPUs, on paper: time, cost, memory."""
    T, B = config.model.block_size, arguments.micro_batch_size or config.train.micro_batch_size
    shape = BatchShape(config.train.tokens_per_step, T, B, world_size=1)  # else UserError
    windows, steps = shape.windows_per_step, config.train.max_steps
    model = model_on_paper(config)
    parameters = model.num_parameters()
    embeddings = model.wte.weight.numel() + model.wpe.weight.numel()

    def on(gpus: int) -> dict | None:
        cluster = Cluster(gpus, arguments.gigabytes_per_second * 1e9, arguments.microseconds / 1e6)
        rate = arguments.tokens_per_second
        step = step_time(cluster, windows, B, T, rate, parameters, embeddings)
        if step is None:
            return None
        hours = step.total * steps / 3600
        alone = windows * T / arguments.tokens_per_second
        return asdict(step) | {
            "total": step.total,
            "efficiency": alone / gpus / step.total,
            "hours": hours,
            "dollars": hours * gpus * arguments.price,
        }

    results = {gpus: on(gpus) for gpus in arguments.gpus}
    head = ["GPUs", "windows each", "computes ms", "sends ms", "waits ms", "step ms"]
    rows = [plan_row(gpus, step) for gpus, step in results.items()]
    print_table([*head, "efficiency", f"{steps:,} steps"], rows)
    wasted = next((gpus for gpus in divisors(windows) if on(gpus)["efficiency"] < 0.5), None)
    print(
        f"A step has {windows:,} windows, so that GPUs beyond {windows:,} have nothing to do."
        + (f" From {wasted:,} on, most of a step is waiting." if wasted else "")
    )
    print()
    assumed = ("tokens_per_second", "gigabytes_per_second", "microseconds", "price")
    settings = settings_of(arguments, config) | {name: vars(arguments)[name] for name in assumed}
    return {
        "settings": settings | {"micro_batch_size": B, "tokens_per_step": shape.tokens_per_step},
        "results": results,
        "mostly_waiting_from": wasted,
        "memory": print_memory(config),
    }


def divisors(number: int) -> list[int]:
    """All that divide it, the smallest first."""
    small = [one for one in range(1, math.isqrt(number) + 1) if number % one == 0]
    return sorted({*small, *(number // one for one in small)})


def plan_row(gpus: int, step: dict | None) -> list[str]:
    """A line of the plan's table."""
    if step is None:
        return [f"{gpus:,}", "can't share it out", *[""] * 6]
    seconds = (step[key] for key in ("computing", "sending", "waiting", "total"))
    return [
        f"{gpus:,}",
        f"{step['accumulation']} × {step['windows']}",
        *map(milliseconds, seconds),
        f"{step['efficiency']:.0%}",
        f"{step['hours']:,.1f} h, ${step['dollars']:,.0f}",
    ]


def model_on_paper(config: Config, **changes: object) -> GPT:
    """The model of a config, its weights nowhere."""
    with torch.device("meta"):
        return GPT(GPTConfig(**asdict(config.model) | changes))


def print_memory(config: Config) -> dict[str, list]:
    """What a GPU must hold in bfloat16, by micro-batch, with and without recomputing: in bytes."""
    sizes, rows = [1, 2, 4, 8, 16, 32, 64], []
    for recompute in (False, True):
        model = model_on_paper(config, recompute=recompute)
        tokens = (size * config.model.block_size for size in sizes)
        keeps = (torch.bfloat16, True, config.optim.average_share > 0)
        rows.append([estimated_memory(model, count, *keeps) for count in tokens])
    print_table(
        ["windows at once", *map(str, sizes)],
        [
            [title, *(f"{size / 1e9:.1f}" for size in row)]
            for title, row in zip(("GB, estimated", "with model.recompute"), rows)
        ],
    )
    return {"windows": sizes, "bytes": rows[0], "bytes_with_recompute": rows[1]}


def main(arguments: argparse.Namespace) -> None:
    """Measure, print a table, write JSON."""
    if arguments.task == "table":
        return table(arguments.folder)
    config = load_config([str(arguments.config)])
    if arguments.output:
        check_can_write(output_file(arguments.output))
    task = {f.__name__: f for f in (train, generate, data, tokenize, start, plan)}[arguments.task]
    command = shlex.join(["python", "bench.py", *sys.argv[1:]])
    report = circumstances(command) | task(arguments, config)
    if arguments.output:
        write_report(arguments.output, report)


if __name__ == "__main__":
    sys.exit(run_script(main, ARGUMENTS))

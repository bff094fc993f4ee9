"""bench.py: real measurements of something tiny, beside peers that these tests write themselves."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import ROOT, TEXT, files_of, run
from hypothesis import given
from hypothesis import strategies as st

import bench
from benchmarks import contestants, peers
from benchmarks.scaling import Cluster, StepTime, step_time
from benchmarks.turns import PARTS, generation_results, ratio, ratios, training_results
from common import reports
from common.errors import UserError
from config import Config, load_config
from data import BatchShape
from distributed import Ranks
from shards import TokenStream

MODEL = """
[model]
n_layer = 1
n_head = 2
n_embd = 16
block_size = 32

[train]
micro_batch_size = 2
"""

# A checkout whose model is so slow that whoever is beside it must be faster, and whose script, when
# run rather than read, fails.
SLOW_PEER = """
import time
from dataclasses import dataclass

import torch
from neighbour import something

SECONDS = 1 / 0


@dataclass
class GPTConfig:
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    bias: bool = True
    dropout: float = 0.0


class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        print("a peer may print what it likes")
        self.config = config
        self.table = torch.nn.Embedding(config.vocab_size, 2)

    def configure_optimizers(self, weight_decay, learning_rate, *others):
        return torch.optim.SGD(self.parameters(), lr=learning_rate)

    def forward(self, inputs, targets=None):
        time.sleep(1.5)
        return None, self.table(inputs).mean()

    def generate(self, ids, count, top_k=None):
        assert top_k == 1
        for _ in range(count):
            self(ids)
"""


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(MODEL)
    return path


@pytest.fixture
def peer(tmp_path) -> Path:
    folder = tmp_path / "peer"
    folder.mkdir()
    for name in ("model.py", "train_gpt2.py"):
        (folder / name).write_text(SLOW_PEER)
    (folder / "neighbour.py").write_text("something = 1 / 0")
    return folder


def test_a_training_step_is_measured_part_by_part_beside_peers(config, peer, tmp_path):
    output = tmp_path / "out.json"
    options = ["--rounds", 1, "--steps", 1, "--no-compile", "--device", "cpu", "--dtype", "float32"]
    peers = [f"--peer=nanogpt={peer}", "--peer=transformers"]
    options += ["--document-mask", *peers, "--output", output]
    result = run("bench.py", "train", "--config", config, *options)
    assert result.status == 0, result.err
    report = json.loads(output.read_text())
    slow = report["results"]["nanogpt"]
    assert slow["seconds"]["forward"] >= 1.5
    assert slow["tokens_per_second"] <= 2 * 32 / 1.5
    assert slow["times_as_fast"] == ratio(report["turns"], "nanogpt", "step_seconds")
    for measured in report["turns"]["ours"]:
        parts = sum(measured[f"{part}_seconds"] for part in PARTS)
        assert parts == pytest.approx(measured["step_seconds"], rel=0.1)
    lines = result.out.splitlines()
    assert lines[0].split()[:3] == ["tokens/s", "of", "product"]
    names = ["ours", "document", "nanogpt", "transformers"]
    assert [line.split()[0] for line in lines[1:5]] == names
    assert f"{slow['times_as_fast']:.2f} × as fast" in lines[3]
    assert lines[3].endswith(f"{slow['memory_ratio']:.2f} × as much")
    ours = report["results"]["ours"]
    share = ours["seconds"]["data"] * ours["tokens_per_second"] / (2 * 32)
    assert ours["data_share"] == pytest.approx(share)
    assert 0 < share < 1
    assert slow["data_share"] is None  # its batch is there already
    assert f"{share:.1%}" in lines[1]
    assert report["command"].startswith("python bench.py train")
    assert {"date", "commit", "hardware", "versions", "settings"} <= set(report)


@pytest.mark.parametrize(("name", "masked"), [("ours", False), ("document mask", True)])
def test_a_document_mask_separates_the_documents_of_the_shard(config, monkeypatch, name, masked):
    def make_stepper(config: Config, ranks: Ranks, shape: BatchShape, stream: TokenStream) -> Mock:
        """What it would train on, and how."""
        begins = (stream.read(0, len(stream)) == 50_256).sum()
        told.append((config.data.document_mask, len(stream) / begins))
        return Mock()

    told = []
    monkeypatch.setattr(contestants, "make_stepper", make_stepper)
    model = asdict(load_config([str(config)]).model) | {"block_size": 1024}
    settings = {"name": name, "model": model, "micro_batch_size": 8, "compile": False, "optim": {}}
    contestants.our_step(settings, torch.device("cpu"), torch.float32)
    ((was_masked, length),) = told
    assert was_masked == masked
    assert 800 < length < 1250  # a thousand tokens each, of half a million


def test_generation_is_measured_beside_peers(config, peer, tmp_path):
    output = tmp_path / "out.json"
    options = ["--rounds", 1, "--new-tokens", 3, "--device", "cpu", "--output", output]
    peers = [f"--peer=nanogpt={peer}", "--peer=transformers"]
    result = run("bench.py", "generate", "--config", config, *options, *peers)
    assert result.status == 0, result.err
    results = json.loads(output.read_text())["results"]
    assert list(results) == ["ours", "nanogpt", "transformers"]
    slow, ours = results["nanogpt"]["decode_tokens_per_second"], results["ours"]
    assert slow <= 2 / 3
    ratio = ours["decode_tokens_per_second"] / slow
    assert results["nanogpt"]["decode_times_as_fast"] == pytest.approx(ratio)
    assert results["nanogpt"]["undisturbed_tokens_per_second"] <= 2 / 3
    assert ours["undisturbed_tokens_per_second"] > 2 / 3


def test_the_loader_is_measured(config, tmp_path):
    config.write_text(MODEL.replace("block_size = 32", "block_size = 1024"))  # fewer windows
    output = tmp_path / "out.json"
    options = ["--rounds", 1, "--output", output]
    assert run("bench.py", "data", "--config", config, *options).status == 0
    rates = json.loads(output.read_text())["results"]["tokens_per_second"]
    assert min(rates["loader"], rates["SHA-256"]) > 1000


def test_starting_is_measured(config, tmp_path):
    output = tmp_path / "out.json"
    folder = tmp_path / "tmp"
    folder.mkdir()
    options = ["--config", config, "--rounds", 1, "--output", output]
    result = run("bench.py", "start", *options, environment={"TMPDIR": str(folder)}, fresh=True)
    assert result.status == 0, result.err
    results = json.loads(output.read_text())["results"]
    assert 0.01 < results["help_seconds"] < results["first_token_seconds"]  # that one loads torch
    assert not list(folder.glob("bench_*"))  # nothing is left behind


FINEWEB = """
import os
import numpy as np
from datasets import load_dataset

folder = os.path.join(os.path.dirname(__file__), "edu_fineweb10B")
os.makedirs(folder)
texts = load_dataset("owner/elsewhere", name="sample", split="train")
workers = os.cpu_count() // 2
np.save(os.path.join(folder, "shard"), np.zeros(1000 * workers * len(texts), dtype=np.uint16))
"""


def test_preparing_is_measured_beside_bare_tiktoken(tmp_path):
    table = pyarrow.table({"text": [TEXT * 20] * 5})
    pyarrow.parquet.write_table(table, tmp_path / "texts.parquet")
    output = tmp_path / "out.json"
    options = ["--copies", 2, "--rounds", 1, "--workers", 2, "--output", output]
    result = run("bench.py", "tokenize", "--source", tmp_path, *options)
    assert result.status == 0, result.err
    results = json.loads(output.read_text())["results"]
    assert list(results) == ["ours", "bare tiktoken"]
    assert results["bare tiktoken"]["times_as_fast"] < 1  # a start takes longer than so little text


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("train --peer nanoGPT=.", "--peer nanoGPT: expected one of nanogpt, build-nanogpt, tr"),
        ("train --peer nanogpt", "expected nanogpt=PATH, the folder of nanogpt's checkout"),
        ("train --peer nanogpt=nowhere", "expected nanogpt=PATH"),
        ("train --peer nanogpt=tests", "nanogpt's checkout, with model.py in it"),
        ("train --peer build-nanogpt=tests", "with train_gpt2.py in it"),
        ("generate --peer nanogpt=tests", "with model.py in it"),
        ("tokenize --source . --peer build-nanogpt=tests", "with fineweb.py in it"),
        ("generate --new-tokens 1", "expected at least 2"),
        ("generate --prompt-tokens 1000 --new-tokens 100", "more than the context of 1,024"),
        ("generate --config nowhere.toml", "nowhere.toml"),
        ("tokenize --source tests", "expected a folder of .parquet files"),
        ("generate --peer-dtype float32", "--peer-dtype is of the others"),
        ("generate --peer transformers=there", "expected transformers, installed"),
        ("train --peer nanogpt=. --peer nanogpt=visuals", "nanogpt stands there twice"),
        ("data --micro-batch-size 1_000_000_000", "expected no more than 9,765"),
        ("train --micro-batch-size 1_000_000_000", "--micro-batch-size 1,000,000,000: expected no"),
        ("generate --batch-size 1_000_000_000", "--batch-size 1,000,000,000: expected no more tha"),
        (
            "plan --tokens-per-second 1 --micro-batch-size 3",
            "tokens_per_step = 524,288 can't be shared out: expected a multiple of",
        ),
        ("data --output nowhere/o.json", "there is no folder"),
        ("data --output tests", "is a folder or a device, expected the name of a file"),
        ("data --output /dev/null", "is a folder or a device, expected the name of a file"),
        ("plan --tokens-per-second 1 --price nan", "--price: invalid price value: 'nan'"),
        ("plan --tokens-per-second 1 --price -1", "--price: invalid price value: '-1'"),
        ("train --rounds 0", "expected a whole number above 0"),
        (f"plan --tokens-per-second 1{'0' * 40}", "a whole number above 0 and below 2**63"),
        ("plan --tokens-per-second 1 --price 1e300", "--price: invalid price value: '1e300'"),
        (
            "generate --prompt-tokens 1023",
            "--prompt-tokens 1023 and 2 new ones are more than",
        ),
        (
            "train --config configs/finetune.toml --peer transformers",
            "--peer: others train with AdamW, without dropout, recompute or average_share, unlike",
        ),
        (
            "train --config configs/gpt2_124m_muon.toml --peer transformers",
            "unlike configs/gpt2_124m_muon.toml: choose another --config",
        ),
        ("table tests", "tests: expected a folder with bench_*.json that tell of others"),
    ],
)
def test_wrong_input_is_one_line(call, words, complaint):
    assert complaint in call("bench", *words.split()).error()


def test_a_report_names_the_commit_and_marks_changes_but_those_of_results(tmp_path, monkeypatch):
    if not shutil.which("git"):
        pytest.skip("needs git")
    inner = tmp_path / "inner"
    (inner / "results").mkdir(parents=True)

    def git(*words: str) -> str:
        name = ("-c", "user.name=me", "-c", "user.email=me@example.org")
        command = ["git", *name, *words]
        return subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    assert reports.commit(tmp_path) is None  # no checkout
    git("init")
    assert reports.commit(tmp_path) is None  # no commit
    (tmp_path / "results").mkdir()
    for name in ("bench.py", "results/found.json"):
        (tmp_path / name).write_text("old")
    git("add", "bench.py", "results")
    git("commit", "-m", "first")
    head = git("rev-parse", "--short", "HEAD").strip()
    (tmp_path / "results" / "found.json").write_text("new")
    assert reports.commit(tmp_path) == head
    (tmp_path / "bench.py").write_text("new")
    assert reports.commit(tmp_path) == head + "+"
    assert reports.commit(inner) is None  # unpacked inside another checkout
    monkeypatch.setenv("PATH", "")
    assert reports.commit(tmp_path) is None  # no git


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_bench_writes_where_it_is_told_and_says_what_it_leaves_out():
    def commands(*words: str) -> str:
        make = ["make", "--dry-run", "--no-print-directory", "bench", *words]
        return subprocess.run(make, cwd=ROOT, check=True, capture_output=True, text=True).stdout

    assert "--output out/bench/bench_train.json" in commands()
    assert "tokenize is left out" in commands()
    assert "results/" not in commands()  # which README quotes
    assert "--micro-batch-size" not in commands()
    elsewhere = commands("RESULTS=out/there", "TEXTS=texts", "MICRO_BATCH=8")
    assert "mkdir -p out/there" in elsewhere
    assert "tokenize --source texts --output out/there/bench_tokenize.json" in elsewhere
    assert elsewhere.count("bench.py train --micro-batch-size 8 --output") == 2
    assert "left out" not in elsewhere
    assert "out/bench" not in elsewhere
    assert elsewhere.splitlines()[-1].endswith("bench.py table out/there")


def test_a_report_that_cannot_be_written_is_told_before_anything_is_measured(call, tmp_path):
    (tmp_path / "o.json.partial").mkdir()  # in the way of root too
    result = call("bench", "plan", "--tokens-per-second", 1, "--output", tmp_path / "o.json")
    assert "can't write" in result.error()
    assert not result.out


def test_a_disk_that_is_full_in_the_end_is_one_line(call, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reports, "write_atomically", full)
    options = ["--tokens-per-second", 1, "--output", tmp_path / "o.json"]
    assert "No space left on device" in call("bench", "plan", *options).error()


def test_a_peer_that_fails_is_left_out_after_what_it_said(tmp_path, config):
    (tmp_path / "model.py").write_text("class GPTConfig:\n    pass\n")
    output = tmp_path / "out.json"
    options = ["--config", config, "--no-compile", "--peer", f"nanogpt={tmp_path}", "--rounds", 1]
    options += ["--steps", 1, "--device", "cpu", "--output", output]
    result = run("bench.py", "train", *options)
    assert result.status == 0
    assert "AttributeError: module 'peer_model' has no attribute 'GPT'" in result.err
    assert "left out: nanogpt failed; what it said stands above" in result.err.splitlines()
    report = json.loads(output.read_text())
    assert (list(report["results"]), report["left_out"]) == (["ours"], ["nanogpt"])
    assert report["peers"] == {"nanogpt": None}  # its commit: it is no checkout
    assert result.out.splitlines()[1].startswith("ours ")


def test_contestants_take_turns_and_one_that_fails_is_left_out_with_all_of_its_own(monkeypatch):
    class Scripted(bench.Contestant):
        def __init__(self, settings: dict) -> None:
            self.name, self.turn = settings["name"], 0

        def __exit__(self, *_: object) -> None:
            pass

        def prepare(self) -> dict:
            return {"machine": self.name}

        def ask(self, line: str = "") -> dict:
            self.turn += 1
            asked.append(self.name)
            if (self.name, self.turn) == (failing, 2):
                raise UserError(f"{self.name} failed")
            return {"turn": self.turn}

    monkeypatch.setattr(bench, "Contestant", Scripted)
    asked: list[str] = []
    failing, names = "nanogpt", dict.fromkeys(("ours", "nanogpt", "transformers"), "")
    machine, turns = bench.take_turns(names, {}, rounds=3)
    assert machine == {"machine": "ours"}
    assert asked == [*names, *names, "ours", "transformers"]
    assert turns == {name: [{"turn": n} for n in (1, 2, 3)] for name in ("ours", "transformers")}
    failing = "ours"
    with pytest.raises(UserError, match="ours failed"):
        bench.take_turns(names, {}, rounds=3)


def test_text_that_cannot_be_prepared_is_told_without_a_traceback(tmp_path, capfd):
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1")
    settings = {"files": [str(tmp_path / "damaged.parquet")], "workers": 1}
    with pytest.raises(UserError, match="prepare_fineweb.py failed; what it said stands above"):
        contestants.our_preparing(settings)()
    (complaint,) = capfd.readouterr().err.splitlines()
    assert complaint.startswith(f"error: can't read {tmp_path / 'damaged.parquet'}: ")


def test_a_bare_tiktoken_that_fails_says_why(tmp_path):
    measure = peers.prepare_with_bare_tiktoken({"files": [f"{tmp_path}/no.parquet"], "workers": 2})
    with pytest.raises(UserError, match=r"tiktoken ended with status 1: FileNotFoundError: .*no\."):
        measure()


def test_a_fineweb_script_that_fails_is_named(tmp_path, capfd):
    (tmp_path / "fineweb.py").write_text("1 / 0")
    settings = {"path": str(tmp_path), "workers": 1, "files": []}
    with pytest.raises(UserError, match=r"fineweb\.py failed"):
        peers.prepare_with_build_nanogpt(settings)()
    assert "ZeroDivisionError" in capfd.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_one_line(call):
    assert "device cuda: no NVIDIA GPU" in call("bench", "generate", "--device", "cuda").error()


# What is measured is the same for all, and told as it was measured


SETTINGS = {
    "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32},
    "micro_batch_size": 2,
    "batch_size": 2,
    "prompt_tokens": 5,
    "new_tokens": 3,
    "compile": False,
}
CPU = torch.device("cpu")


def test_the_others_have_our_shape_but_for_their_padded_vocabulary(peer):
    settings = SETTINGS | {"path": str(peer)}
    for name in ("nanogpt", "build-nanogpt"):
        model, _, _ = peers.TRAINING[name](settings, CPU)
        told = {key: getattr(model.config, key) for key in settings["model"]}
        assert (told, model.config.vocab_size) == (settings["model"], 50_304)
        assert model.config.dropout == 0.0
        assert model.config.bias
    shape = peers.make_transformers(SETTINGS).config
    told = (shape.n_layer, shape.n_head, shape.n_embd, shape.n_positions, shape.vocab_size)
    assert told == (1, 2, 16, 32, 50_257)
    assert shape.resid_pdrop == shape.embd_pdrop == shape.attn_pdrop == 0
    assert shape.eos_token_id is None  # it never ends before the others
    _, optimizer, _ = peers.train_transformers(SETTINGS, CPU)
    assert optimizer.defaults["fused"]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_others_train_on_as_large_a_batch_in_the_same_precision_and_compiled_if_we_are(
    monkeypatch, dtype, compiled
):
    seen, model = [], torch.nn.Linear(1, 1)

    def loss_of(called, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        used = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        seen.append((called is model, inputs.shape, targets.shape, used or torch.float32))
        return called(torch.ones(1)).sum()

    make = Mock(return_value=(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_of))
    monkeypatch.setitem(peers.TRAINING, "nanogpt", make)
    monkeypatch.setattr(torch, "compile", lambda plain: torch.nn.Sequential(plain))
    before = torch.get_float32_matmul_precision()
    settings = SETTINGS | {"name": "nanogpt", "compile": compiled}
    contestants.their_step(settings, CPU, dtype)(contestants.Stopwatch(CPU))
    assert seen == [(not compiled, (2, 32), (2, 32), dtype)]
    assert torch.get_float32_matmul_precision() == before  # products as exact as ours


def ticking(monkeypatch: pytest.MonkeyPatch, by: float = 1.0) -> None:
    """The clock goes on by so many seconds at every look."""
    clock = itertools.count(step=by)
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))


@pytest.mark.parametrize(("kind", "untimed"), [("cpu", 2), ("cuda", 3)])
def test_a_turn_of_training_is_a_steps_share_after_steps_that_are_not_timed(
    monkeypatch, kind, untimed
):
    """Two get ready; a GPU's memory was handed back before each turn, and is taken again."""
    steps, began, device = [], [], torch.device(kind)
    watch = SimpleNamespace(mark=Mock(), read=lambda: {"forward": 6.0})

    def start(_: torch.device) -> SimpleNamespace:
        began.append(len(steps))
        return watch

    monkeypatch.setattr(contestants, "Stopwatch", start)
    monkeypatch.setattr(contestants, "their_step", lambda *_: steps.append)
    monkeypatch.setattr(contestants, "leave_room", lambda device: None)
    monkeypatch.setattr(contestants, "peak_memory", lambda device: 7)
    measure = contestants.measure_training({"name": "nanogpt", "steps": 3}, device, torch.float32)
    ticking(monkeypatch)
    assert measure() == {"step_seconds": 1 / 3, "forward_seconds": 2.0, "peak_memory": 7}
    assert len(steps) == untimed + 3
    assert began[-1] == untimed


def test_a_gpus_turn_takes_as_long_as_the_gpu_does(monkeypatch):
    """It works on by itself: what was given to it before the turn is done before the clock runs."""
    now, done_at = [0.0], [0.0]  # the clock; when the GPU will have nothing more to do

    def work(seconds: float) -> None:
        done_at[0] = max(now[0], done_at[0]) + seconds

    def wait(_: object = None) -> None:
        now[0] = max(now[0], done_at[0])

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            pass

        def record(self, _: object) -> None:
            self.at = max(now[0], done_at[0])

        def synchronize(self) -> None:
            now[0] = max(now[0], self.at)

        def elapsed_time(self, later: Event) -> float:
            return 1000 * (later.at - self.at)

    def step(watch: contestants.Stopwatch) -> None:
        for name, seconds in (("forward", 3.0), ("backward", 6.0), ("optimizer", 1.0)):
            work(seconds)
            watch.mark(name)
        work(0.5)  # as the weights' average

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.accelerator, "synchronize", wait)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr(contestants, "leave_room", wait)
    monkeypatch.setattr(contestants, "peak_memory", lambda device: 7)
    monkeypatch.setattr(contestants, "their_step", lambda *_: step)
    settings, gpu = {"name": "nanogpt", "steps": 4}, torch.device("cuda")
    turn = contestants.measure_training(settings, gpu, torch.bfloat16)()
    assert turn["step_seconds"] == pytest.approx(10.5)
    assert turn["backward_seconds"] == pytest.approx(6.0)
    assert turn["optimizer_seconds"] == pytest.approx(1.0)


def test_the_others_clip_and_make_their_step_part_by_part(monkeypatch):
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 5.0)
    loss_of = lambda called, *_: called(torch.full((1,), 100.0)).sum()  # noqa: E731
    made = (model, torch.optim.SGD(model.parameters(), lr=0.5), loss_of)
    monkeypatch.setitem(peers.TRAINING, "nanogpt", lambda *_: made)
    ticking(monkeypatch)
    watch = contestants.Stopwatch(CPU)
    contestants.their_step(SETTINGS | {"name": "nanogpt"}, CPU, torch.float32)(watch)
    assert model.weight.item() == pytest.approx(4.5)  # the gradient of 100 has become 1
    assert model.weight.grad is None
    assert [name for name, _ in watch.marks] == ["start", "forward", "backward", "optimizer"]


def test_a_turn_of_generation_is_the_prompt_and_then_token_by_token(monkeypatch):
    """Timed one by one on a CPU; where they can't be, what comes after the first is shared out."""
    asked, waits = [], []

    def make(settings: dict, device: torch.device, dtype: torch.dtype, tick: Callable) -> Callable:
        def generate(ids: torch.Tensor, count: int) -> None:
            asked.append(count)
            for _ in range(count):
                tick()

        return generate

    monkeypatch.setitem(peers.GENERATION, "nanogpt", make)
    monkeypatch.setattr(contestants, "wait_for", lambda device: waits.append(len(asked)))
    settings = SETTINGS | {"name": "nanogpt", "new_tokens": 5}
    for device in (CPU, torch.device("meta")):
        measure = contestants.measure_generation(settings, device, torch.float32)
        ticking(monkeypatch)
        turn = measure()
        assert turn["prefill_seconds"] == 2  # from one look to the next but one: a tick between
        assert turn["token_seconds"] == (1 if device is CPU else (6 - 2) / 4)
        assert turn.get("undisturbed_token_seconds") == (1 if device is CPU else None)
    assert asked == 2 * [5, 1, 5]  # the first gets ready
    assert waits == [1, 2, 3, 4, 5, 6]


def test_what_starts_slowest_is_told_of_help(monkeypatch, tmp_path):
    monkeypatch.setattr(contestants, "save_checkpoint", lambda *_: None)
    lasts = {"train.py": 3.0, "sample.py": 2.0}
    now = [0.0]

    def run(command: list[str], **_: object) -> None:
        now[0] += 9.0 if "--jsonl" in command else lasts.get(command[1], 1.0)

    monkeypatch.setattr(contestants, "run", run)
    monkeypatch.setattr(contestants.time, "perf_counter", lambda: now[0])
    found = contestants.measure_start({"model": SETTINGS["model"]})()
    assert found == {"help_seconds": 3.0, "first_token_seconds": 9.0}


def test_ours_decodes_compiled_if_asked_to(monkeypatch):
    told = []
    monkeypatch.setattr(contestants, "compile_decoding", lambda model: told.append(type(model)))
    for compiled in (False, True):
        settings = SETTINGS | {"compile": compiled}
        contestants.our_generation(settings, CPU, torch.float32, lambda: None)
    assert told == [contestants.GPT]


@pytest.mark.parametrize(
    ("device", "options", "compiled"),
    [
        ("cpu", (), False),
        ("cuda", ("--prompt-tokens", 1000), True),
        ("cuda", (), True),
        ("cuda", ("--batch-size", 4), True),
        ("cuda", ("--batch-size", 5), False),
        ("cuda", ("--no-compile",), False),
    ],
)
def test_a_few_texts_on_a_gpu_are_decoded_compiled(call, monkeypatch, device, options, compiled):
    told = []

    def take_turns(names: dict, settings: dict, rounds: int) -> None:
        told.append(settings["compile"])
        raise UserError("enough")

    monkeypatch.setattr("bench.choose_device", lambda name: torch.device(device))
    monkeypatch.setattr("bench.take_turns", take_turns)
    assert "enough" in call("bench", "generate", *options).error()
    assert told == [compiled]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["ours", "nanogpt", "transformers"])
def test_all_generate_as_much_in_the_precision_that_was_asked_for(peer, monkeypatch, dtype, name):
    models, told = [], []
    real, of_peer = contestants.GPT, peers.make_transformers
    monkeypatch.setattr(contestants, "GPT", lambda config: models.append(real(config)) or models[0])
    monkeypatch.setattr(contestants, "pack_weights", lambda model: told.append(model))
    monkeypatch.setattr(
        peers, "make_transformers", lambda settings: models.append(of_peer(settings)) or models[0]
    )
    monkeypatch.setattr("time.sleep", lambda _: None)
    make, ticks = {"ours": contestants.our_generation, **peers.GENERATION}[name], []
    generate = make(SETTINGS | {"path": str(peer)}, CPU, dtype, lambda: ticks.append(1))
    if name == "nanogpt":  # whose weights stay in float32, as its sample.py has it
        forward = sys.modules["peer_model"].GPT.forward
        monkeypatch.setattr(
            "peer_model.GPT.forward",
            lambda self, *ids: (told.append(torch.is_autocast_enabled("cpu")), forward(self, *ids)),
        )
    generate(torch.zeros(2, 5, dtype=torch.long), 3)
    assert len(ticks) == 3
    if name == "nanogpt":
        assert told == [dtype == torch.bfloat16] * 3
    else:
        assert next(models[0].parameters()).dtype == dtype
        assert told == models * (name == "ours")  # ours with its weights packed


def test_another_precision_of_the_others_is_not_ours():
    settings = {"dtype": "bfloat16", "peer_dtype": "float32"}
    assert bench.settings_for("ours", "", settings)["dtype"] == "bfloat16"
    assert bench.settings_for("nanogpt", "", settings)["dtype"] == "float32"
    settings["peer_dtype"] = None
    assert bench.settings_for("nanogpt", "", settings)["dtype"] == "bfloat16"


def test_our_step_is_made_by_the_configs_optimizer(monkeypatch):
    make_stepper = Mock()
    monkeypatch.setattr(contestants, "make_stepper", make_stepper)
    optim = asdict(load_config(["configs/gpt2_124m_muon.toml"]).optim)
    settings = SETTINGS | {"name": "ours", "optim": optim, "compile": False}
    contestants.our_step(settings, CPU, torch.float32)
    assert asdict(make_stepper.call_args.args[0].optim) == optim


def test_the_ceiling_is_the_operations_of_the_products_over_their_seconds(monkeypatch):
    products = Mock(wraps=torch.mm)
    monkeypatch.setattr(torch, "mm", products)
    monkeypatch.setattr(contestants.Stopwatch, "read", lambda _: {"products": 2.0})
    found = contestants.matrix_product_rate(CPU, torch.float32)
    assert products.call_count == 11  # the first isn't timed
    assert found == 10 * (2 * 2048 * 768 * 3072) / 2


def test_a_contestant_whose_bench_has_gone_ends_without_a_word(monkeypatch):
    """As when ours finds no room while others are still being imported."""
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    monkeypatch.setattr(contestants.os, "dup2", lambda *_: None)
    contestants.main()


def test_a_batch_that_finds_no_room_is_told_with_what_to_lower(monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 6 GiB")

    settings = SETTINGS | {"name": "ours", "task": "train"}
    for make in (fail, lambda *_: fail):  # getting ready, and in a turn
        monkeypatch.setitem(contestants.TASKS, "train", make)
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{json.dumps(settings)}\n\n"))
        monkeypatch.setattr(contestants.os, "dup2", lambda *_: None)
        with pytest.raises(UserError, match="out of memory: lower --micro-batch-size"):
            contestants.main()


def test_a_step_is_told_in_tokens_shares_and_times():
    ours = {"step_seconds": 2.0, "data_seconds": 0.5, "forward_seconds": 0.25}
    ours |= {"peak_memory": 30, "matrix_product_flops": 4000.0}
    slower = ours | {"step_seconds": 3.0, "data_seconds": 1.0}
    other = {"step_seconds": 4.0, "forward_seconds": 1.0, "peak_memory": 40}
    turns = {"ours": [ours, slower, ours], "nanogpt": [other] * 3}
    machine = {"peak_flops": 20_000.0, "flops_per_token": 5}
    found = training_results(turns, machine, tokens=800)
    empty = {"backward": None, "optimizer": None}
    assert found == {
        "ours": {
            "tokens_per_second": 400,
            "of_matrix_product": 0.5,
            "mfu": 0.1,
            "peak_memory": 30,
            "seconds": {"data": 0.5, "forward": 0.25, **empty},
            "data_share": 0.25,
            "times_as_fast": 1,
            "memory_ratio": 1,
        },
        "nanogpt": {
            "tokens_per_second": 200,
            "of_matrix_product": 0.25,
            "mfu": 0.05,
            "peak_memory": 40,
            "seconds": {"data": None, "forward": 1.0, **empty},
            "data_share": None,
            "times_as_fast": 2,
            "memory_ratio": 0.75,
        },
    }
    unknown = training_results(turns, machine | {"peak_flops": None}, tokens=800)
    assert unknown["ours"]["mfu"] is None
    for name in turns:  # Windows tells of no peak
        turns[name] = [turn | {"peak_memory": None} for turn in turns[name]]
    unknown = training_results(turns, machine, tokens=800)["nanogpt"]
    assert unknown["peak_memory"] is None and unknown["memory_ratio"] is None


def test_generation_is_told_in_tokens_of_all_texts_together():
    ours = {"prefill_seconds": 2.0, "token_seconds": 0.5}
    turns = {"ours": [ours], "nanogpt": [{"prefill_seconds": 3.0, "token_seconds": 4.0}]}
    found = generation_results(turns, B=16, T=10)
    assert found["ours"] == {
        "prefill_tokens_per_second": 80,
        "prefill_times_as_fast": 1,
        "decode_tokens_per_second": 32,
        "decode_times_as_fast": 1,
    }
    assert found["nanogpt"]["prefill_times_as_fast"] == 1.5
    assert found["nanogpt"]["decode_times_as_fast"] == 8
    turns = {name: [turn[0] | {"undisturbed_token_seconds": 0.25}] for name, turn in turns.items()}
    found = generation_results(turns, B=16, T=10)
    assert found["ours"]["undisturbed_tokens_per_second"] == 64
    assert found["nanogpt"]["undisturbed_times_as_fast"] == 1


def test_the_loaders_seconds_are_per_token_that_was_drawn(monkeypatch):
    """And the hash's per token of the shard."""
    make, draw, drawn = contestants.random_shard, contestants.micro_batches, []

    def counted(*arguments: object, **options: object) -> Iterator[tuple]:
        for number, inputs, targets in draw(*arguments, **options):
            drawn.append(inputs.numel())
            yield number, inputs, targets

    monkeypatch.setattr(contestants, "random_shard", lambda _: make(500_000))
    monkeypatch.setattr(contestants, "micro_batches", counted)
    ticking(monkeypatch)
    model = SETTINGS["model"] | {"block_size": 1024}
    turn = contestants.measure_loader({"model": model, "micro_batch_size": 256})()
    assert turn["seconds_per_token"] == pytest.approx(1 / sum(drawn))
    assert turn["hash_seconds_per_token"] == pytest.approx(1 / 500_000)
    assert sum(drawn) == pytest.approx(10_000_000, rel=0.1)


def test_prepared_tokens_are_those_in_the_shards(monkeypatch, tmp_path):
    def prepare(command: list[object], **_: object) -> None:
        out = Path(command[command.index("--out") + 1])
        for name, tokens in (("train_000000", 900), ("val_000000", 100)):
            (out / f"{name}.bin").write_bytes(bytes(1024 + 2 * tokens))

    monkeypatch.setattr(contestants, "run", prepare)
    ticking(monkeypatch, by=4.0)
    settings = {"files": [str(tmp_path / "a.parquet")], "workers": 1}
    assert contestants.our_preparing(settings)() == 1000 / 4


def test_build_nanogpts_tokens_are_those_in_its_shards_and_its_processes_are_as_many(
    tmp_path, monkeypatch
):
    (tmp_path / "fineweb.py").write_text(FINEWEB)
    table = pyarrow.table({"text": ["a"] * 5})
    pyarrow.parquet.write_table(table, tmp_path / "texts.parquet")
    before = files_of(tmp_path)
    settings = {"path": str(tmp_path), "workers": 3, "files": [str(tmp_path / "texts.parquet")]}
    ticking(monkeypatch, by=4.0)
    assert peers.prepare_with_build_nanogpt(settings)() == 1000 * 3 * 5 / 4
    assert files_of(tmp_path) == before  # nothing is left in a checkout


def test_bare_processes_rates_add_up(monkeypatch):
    monkeypatch.setattr(peers, "BARE_TIKTOKEN", "print(100, 2.0)")
    assert peers.prepare_with_bare_tiktoken({"files": [], "workers": 3})() == 150


def test_ratios_are_medians_of_the_rounds_ratios():
    ours = [{"s": 1.0}, {"s": 10.0}, {"s": 2.0}]
    theirs = [{"s": 2.0}, {"s": 30.0}, {"s": 2.0}]
    turns = {"ours": ours, "other": theirs}
    assert ratio(turns, "other", "s") == 2.0
    assert ratios(turns, "other", "s") == [2.0, 3.0, 1.0]


def test_all_files_of_a_folder_come_into_one_table(call, tmp_path):
    ours, theirs = [{"step_seconds": s} for s in (1.0, 2.0, 4.0)], [{"step_seconds": 4.0}] * 3
    speeds = {"ours": 1234.5, "nanogpt": 99.95}
    report = {
        "settings": {"task": "train"},
        "results": {name: {"tokens_per_second": speed} for name, speed in speeds.items()},
        "turns": {"ours": ours, "nanogpt": theirs},
    }
    (tmp_path / "bench_train.json").write_text(json.dumps(report))
    for task in ("data", "plan"):  # which tell of nobody else
        alone = {"settings": {"task": task}, "results": {}}
        (tmp_path / f"bench_{task}.json").write_text(json.dumps(alone))
    head, *rows = call("bench", "table", tmp_path).out.splitlines()
    assert head.split() == ["tokens/s", "ours", "theirs", "ours", "is", "lowest", "highest"]
    assert [row.split() for row in rows] == [
        ["train", "1,234.5", "nanogpt", "100.0", *"2.00 × 1.00 × 4.00 ×".split()]
    ]
    (tmp_path / "bench_train.json").write_text("[]")
    assert (
        "is no report of bench.py: expected an object" in call("bench", "table", tmp_path).error()
    )


# On paper


def test_a_ring_sends_nearly_twice_the_gradients_and_its_rounds_add_up():
    assert Cluster(1, 1e9, 1e-6).all_reduce_seconds(10**9) == 0
    assert Cluster(2, 1e9, 0).all_reduce_seconds(10**9) == pytest.approx(1.0)
    assert Cluster(1000, 1e9, 0).all_reduce_seconds(10**9) == pytest.approx(2.0, rel=0.01)
    assert Cluster(5, 1e9, 1e-3).all_reduce_seconds(0) == pytest.approx(8e-3)


@given(
    exponent=st.integers(0, 9),
    micro_batch_size=st.integers(1, 64),
    tokens_per_second=st.floats(1e4, 1e7),
    bandwidth=st.floats(1e9, 1e12),
    latency=st.floats(0, 1e-3),
)
def test_more_gpus_are_never_slower_to_compute_nor_more_efficient(
    exponent, micro_batch_size, tokens_per_second, bandwidth, latency
):
    def on(gpus: int) -> StepTime:
        cluster = Cluster(gpus, bandwidth, latency)
        sizes = (124_439_808, 39_383_808)
        return step_time(cluster, 512, micro_batch_size, 1024, tokens_per_second, *sizes)

    step, more = on(2**exponent), on(2 ** (exponent + 1))
    assert step.windows * step.accumulation * 2**exponent == 512
    assert 1 <= step.windows <= micro_batch_size
    assert step.waiting <= step.sending
    if exponent == 0:
        assert step.total == step.computing == 512 * 1024 / tokens_per_second
    if exponent == 9:
        assert more is None  # more GPUs than windows
    else:
        assert more.computing == step.computing / 2
        assert 2 * more.total >= step.total * (1 - 1e-12)


def test_only_the_embeddings_gradients_are_waited_for_if_the_others_are_sent_in_time():
    """100 MiB of others: four buckets, each with its own rounds; a second for 10⁹ bytes."""
    cluster, others, embeddings = Cluster(2, 1e9, 1e-3), 25 * 2**20, 10**6
    step = step_time(cluster, 2, 1, 1000, 1000.0, others + embeddings, embeddings)
    assert step.waiting == pytest.approx(4e6 / 1e9 + 2e-3)
    assert step.sending == pytest.approx(step.waiting + 100 * 2**20 / 1e9 + 4 * 2e-3)
    slow = step_time(cluster, 2, 1, 1000, 100_000.0, others + embeddings, embeddings)
    backward = 1 / 2 * 1000 / 100_000
    assert slow.waiting == pytest.approx(slow.sending - backward)


def test_a_plan_names_the_first_even_share_that_mostly_waits(call, tmp_path):
    """Of 15 windows: 1, 3, 5 or 15 GPUs."""
    config, output = tmp_path / "c.toml", tmp_path / "o.json"
    config.write_text(f"{MODEL}tokens_per_step = 480\n")
    words = ["--config", config, "--micro-batch-size", 1, "--output", output]
    for speed, named in ((1, None), (1_000_000, 3)):
        told = call("bench", "plan", "--tokens-per-second", speed, *words).out
        assert "so that GPUs beyond 15 have nothing to do." in told
        assert (f"From {named} on, most of a step is waiting." in told) == bool(named)
        assert "do. \n" not in told
        assert json.loads(output.read_text())["mostly_waiting_from"] == named


def test_the_plans_memory_has_the_average_of_the_weights_in_it(call, tmp_path):
    config, output, found = tmp_path / "c.toml", tmp_path / "o.json", []
    words = ("--tokens-per-second", 1, "--config", config, "--output", output)
    for more in ("", "[optim]\naverage_share = 0.1\n"):
        config.write_text(f"{MODEL}tokens_per_step = 512\n{more}")
        assert call("bench", "plan", *words).status == 0
        found.append(json.loads(output.read_text())["memory"]["bytes"][0])
    parameters = 50_257 * 16 + 32 * 16 + 12 * 16**2 + 13 * 16 + 2 * 16
    assert found[1] - found[0] == 4 * parameters


def test_the_plan_is_found_from_any_folder(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("bench", "plan", "--tokens-per-second", 1).status == 0


def test_the_plan_names_where_a_step_can_no_longer_be_shared_out(call, tmp_path):
    output = tmp_path / "out.json"
    options = ["--tokens-per-second", 400_000, "--gpus", 8, 1024, "--output", output]
    lines = call("bench", "plan", *options).out.splitlines()
    assert lines[1].split()[:4] == ["8", "1", "×", "64"]
    assert lines[2] == "1,024  can't share it out"
    assert "GPUs beyond 512 have nothing to do" in lines[3]
    report = json.loads(output.read_text())
    assumed = {"gigabytes_per_second": 50, "microseconds": 20, "price": 3, "micro_batch_size": 64}
    assert report["settings"].items() >= {"tokens_per_second": 400_000, **assumed}.items()
    memory = report["memory"]["bytes"]
    assert lines[-2].split() == ["GB,", "estimated", *(f"{size / 1e9:.1f}" for size in memory)]
    step = report["results"]["8"]
    assert step["computing"] == pytest.approx(64 * 1024 / 400_000)
    assert step["hours"] == pytest.approx((step["computing"] + step["waiting"]) * 19_073 / 3600)
    assert step["dollars"] == pytest.approx(step["hours"] * 8 * 3)


def test_a_device_that_works_on_by_itself_is_waited_for_before_the_clock_is_read(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: waits.append("waited"))
    monkeypatch.setattr(contestants.time, "perf_counter", lambda: float(len(waits)))
    contestants.Stopwatch(torch.device("cpu")).mark("forward")
    assert not waits
    watch = contestants.Stopwatch(torch.device("mps"))
    watch.mark("forward")
    assert watch.read() == {"forward": 1.0}


def test_the_stopwatch_tells_parts_of_the_same_name_together(monkeypatch):
    times = iter([0.0, 1.0, 3.0, 6.0])
    monkeypatch.setattr(contestants.time, "perf_counter", lambda: next(times))
    watch = contestants.Stopwatch(torch.device("cpu"))
    watch.mark("data")
    watch.mark("forward")
    watch.mark("data")
    assert watch.read() == {"data": 4.0, "forward": 2.0}

"""Real processes from end to end: 1, 2 and 4 ranks, stopping and going on."""

from __future__ import annotations

import ast
import json
import shutil
import signal
import subprocess
import sys
import time
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SOURCES, Result, ranks, run, torchrun, without_key_biases
from safetensors.torch import load_file

SAME = ("loss", "learning_rate", "grad_norm", "tokens")  # of a metrics line; speed may differ


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def told(folder: Path) -> list[tuple]:
    """What metrics.jsonl tells of each step, without its speed, exactly as written."""
    return [
        (line["kind"], line["step"], *(line.get(key) for key in (*SAME, "bits_per_byte")))
        for line in lines_of(folder)
    ]


def weights_of(folder: Path, step: int) -> bytes:
    return (folder / "checkpoints" / f"step_{step:06d}" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny, shards):
    """Finished runs of 40 steps by world size; each is made once, when first asked for."""
    folder, finished = tmp_path_factory.mktemp("runs"), {}

    def get(world_size: int) -> Path:
        if world_size not in finished:
            out = folder / str(world_size)
            start(world_size, tiny, shards, out)
            finished[world_size] = out
        return finished[world_size]

    return get


def start(world_size: int, tiny: Path, shards: Path, out: Path) -> Result:
    """Train to the end with so many ranks: alone, two under torchrun, more without it."""
    arguments = (tiny, "--data.dir", shards, "--train.out", out)
    if world_size == 1:
        result = run("train.py", *arguments)
    elif world_size == 2:
        result = torchrun(2, *arguments)
    else:
        result = ranks(world_size, *arguments)
    assert result.status == 0, result.err
    return result


@pytest.mark.parametrize("world_size", [2, 4])
def test_several_processes_compute_what_one_computes(runs, world_size):
    """With dropout on, whose draws are keyed by step and micro-batch."""
    one, several = lines_of(runs(1)), lines_of(runs(world_size))
    assert [line["step"] for line in several] == [line["step"] for line in one]
    for ours, theirs in zip(several, one):
        if ours["step"] <= 20:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        if ours["step"] <= 20 and ours["kind"] == "train":
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    path = Path("checkpoints", "step_000020", "model.safetensors")
    ours, theirs = (without_key_biases(load_file(runs(w) / path)) for w in (world_size, 1))
    for name in theirs:
        assert (ours[name] - theirs[name]).abs().max() < 1e-5, name


@pytest.mark.parametrize("world_size", [1, 4])
def test_stopping_after_20_steps_and_going_on_equals_40_steps_at_once(
    runs, tiny, shards, tmp_path, world_size
):
    at_once, resumed = runs(world_size), tmp_path / "resumed"
    # What a run leaves that was stopped in step 31: its metrics go further than its checkpoint.
    shutil.copytree(at_once, resumed, ignore=shutil.ignore_patterns("step_000040"))
    lines = (at_once / "metrics.jsonl").read_text().splitlines(keepends=True)
    (resumed / "metrics.jsonl").write_text("".join(lines[:32]) + '{"kind": "tr')
    result = start(world_size, tiny, shards, resumed)
    assert "resuming after step 20" in result.err
    assert told(resumed) == told(at_once)
    for name in ("model.safetensors", "optimizer.safetensors"):
        path = Path("checkpoints", "step_000040", name)
        assert (resumed / path).read_bytes() == (at_once / path).read_bytes(), name


def test_a_run_that_is_killed_goes_on_as_if_nothing_had_happened(runs, tiny, shards, tmp_path):
    out = tmp_path / "killed"
    command = ["train.py", tiny, "--data.dir", shards, "--train.out", out]
    process = subprocess.Popen(
        [sys.executable, *map(str, command), "--train.checkpoint_every", "3"],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not (out / "checkpoints" / "step_000006").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it had not ended by itself
    start(1, tiny, shards, out)
    assert told(out) == told(runs(1))
    assert weights_of(out, 40) == weights_of(runs(1), 40)


def test_a_run_goes_on_with_another_number_of_processes(runs, tiny, shards, tmp_path):
    out = tmp_path / "wider"
    shutil.copytree(runs(1), out, ignore=shutil.ignore_patterns("step_000040"))
    start(2, tiny, shards, out)
    for ours, theirs in zip(lines_of(out), lines_of(runs(1)), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


def test_wrong_input_under_torchrun_ends_every_process_with_an_error_line(tiny, tmp_path):
    result = torchrun(2, tiny, "--data.dir", tmp_path / "nowhere", "--train.out", tmp_path / "o")
    assert result.status != 0
    assert "error: [rank 0 on " in result.err
    assert "nowhere doesn't exist" in result.err
    assert "UserError" not in result.err  # no traceback of ours


def test_from_text_to_generated_text_through_the_real_commands(tmp_path, tiny):
    """prepare → train → evaluate → sample, as a user types them."""
    (tmp_path / "notes.md").write_text("One two three four five six seven eight nine ten.\n" * 400)
    data, out = tmp_path / "data", tmp_path / "run"
    prepare = ("--tokenizer", "bpe:280", "--val-tokens", 300, "--workers", 2)
    assert (
        run("prepare_fineweb.py", "--source", tmp_path / "notes.md", "--out", data, *prepare).status
        == 0
    )
    arguments = (
        "--data.dir",
        data,
        "--train.out",
        out,
        "--optim.learning_rate",
        1e-2,
        "--train.max_steps",
        80,
    )
    assert run("train.py", tiny, *arguments, "--model.dropout", 0, fresh=True).status == 0
    table = run("evaluate.py", "--checkpoint", out, fresh=True).out
    assert "bits per byte" in table
    result = run(
        *("sample.py", "--checkpoint", out, "--prompt", "One two", "--temperature", 0, "--jsonl"),
        *("--max-new-tokens", 20),
        fresh=True,
    )
    assert result.status == 0
    assert " four five six seven" in json.loads(result.out)["completion"]


def test_no_module_does_anything_when_it_is_imported():
    code = (
        "import torch; before = torch.get_rng_state(), torch.get_num_threads();"
        f"import {', '.join(SOURCES)};"
        "assert torch.equal(torch.get_rng_state(), before[0]);"
        "assert torch.get_num_threads() == before[1];"
        "assert not torch.distributed.is_initialized()"
    )
    result = run("-c", code)
    assert (result.status, result.out, result.err) == (0, "", "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_the_tiny_run_learns_compiled_in_bfloat16(tiny, shards, tmp_path):
    changes = ("--train.device", "cuda", "--train.dtype", "auto", "--train.compile", "true")
    arguments = ("--data.dir", shards, "--train.out", tmp_path / "gpu", *changes)
    result = run("train.py", tiny, *arguments)
    assert result.status == 0, result.err
    losses = [line["loss"] for line in lines_of(tmp_path / "gpu") if line["kind"] == "train"]
    assert losses[-1] < losses[0] - 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_float32_equals_the_cpu(runs, tiny, shards, tmp_path):
    arguments = ("--data.dir", shards, "--train.out", tmp_path / "gpu", "--model.dropout", 0)
    for device in ("cuda", "cpu"):
        result = run(
            "train.py",
            tiny,
            *arguments[:3],
            tmp_path / device,
            *arguments[4:],
            "--train.device",
            device,
        )
        assert result.status == 0, result.err
    for ours, theirs in zip(lines_of(tmp_path / "cuda")[:20], lines_of(tmp_path / "cpu")[:20]):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


# How the files hang together


def imports() -> dict[str, set[str]]:
    """{module: those of ours that it imports anywhere}."""
    found = {}
    for name, path in SOURCES.items():
        nodes = [*ast.walk(ast.parse(path.read_text()))]
        named = {
            alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
        }
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                named |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[name] = named & SOURCES.keys()
    return found


def test_a_module_never_imports_a_script():
    imported = imports()
    scripts = {
        name for name, path in SOURCES.items() if '__name__ == "__main__"' in path.read_text()
    }
    assert {"convert", "evaluate", "train"} <= scripts
    for name in imported.keys() - scripts:
        assert not imported[name] & scripts, name


def test_no_two_files_import_each_other():
    imported = imports()
    imported["model"] -= {"decoding", "gpu_kernels"}  # faster forms of what is written there
    assert len([*TopologicalSorter(imported).static_order()]) == len(imported)

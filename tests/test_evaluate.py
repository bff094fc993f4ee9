"""evaluate.py as a command: its table, its report, its ranks, and what it refuses."""

from __future__ import annotations

import hashlib
import json

import pytest
from conftest import ROOT, ranks

from visuals import KEPT

ITEMS = ROOT / "tests" / "items"


def examine(name: str, *options: object) -> tuple:
    file = ITEMS / ("wikitext.jsonl" if name.startswith("wiki") else f"{name}.jsonl")
    return ("--checkpoint", KEPT, "--tasks", name, "--file", file, *options)


def test_the_report_says_what_was_measured_on_which_weights(call, trained, shards, tmp_path):
    output = tmp_path / "found.json"
    arguments = ("--checkpoint", trained, "--output", output)
    table = call("evaluate", *arguments).out
    report = json.loads(output.read_text())
    weights = (trained / "checkpoints" / "step_000040" / "model.safetensors").read_bytes()
    assert report["sha256"] == hashlib.sha256(weights).hexdigest()
    assert report["step"] == 40
    (found,) = report["results"]
    assert (found["task"], found["data"], found["count"]) == ("val", str(shards), 576)
    assert len(found["revision"]) == 64
    assert found["metrics"].keys() == {"loss", "perplexity", "bits_per_byte"}
    assert f"loss            {found['metrics']['loss']['value']:.4f} nats" in table
    assert 0 < found["metrics"]["loss"]["error"] < 0.5


@pytest.mark.parametrize("name", ["hellaswag", "wikitext103"])
def test_ranks_find_together_what_one_finds_alone(call, name, tmp_path):
    alone, together = (tmp_path / f"{kind}.json" for kind in ("alone", "together"))
    first = call("evaluate", *examine(name, "--output", alone))
    several = ranks(
        2, *examine(name, "--output", together, "--device", "cpu"), script="evaluate.py"
    )
    assert several.status == 0, several.err
    assert several.out == first.out
    alone, together = (json.loads(path.read_text())["results"] for path in (alone, together))
    for ours, theirs in zip(alone[0].pop("metrics").values(), together[0].pop("metrics").values()):
        assert ours == pytest.approx(theirs, rel=1e-12)
    assert alone == together


def test_the_stride_is_how_far_a_window_goes_on(call, tmp_path):
    output = tmp_path / "found.json"
    by_stride = {}
    for stride in (8, 128, None):
        options = ("--stride", stride) if stride else ()
        call("evaluate", *examine("wikitext2", *options, "--output", output))
        (found,) = json.loads(output.read_text())["results"]
        by_stride[stride] = found["metrics"]
    assert by_stride[128] == by_stride[None] != by_stride[8]


def test_a_stride_above_the_context_would_leave_tokens_out(call):
    error = call("evaluate", *examine("wikitext2", "--stride", 129)).error()
    assert "--stride 129: this model's context has 128 tokens, expected 1 to 128" in error
    error = call("evaluate", *examine("lambada", "--stride", 8)).error()
    assert "--stride is wikitext's, --tasks is lambada" in error


def test_wrong_input_is_one_line(call, tmp_path):
    def complaint(*arguments: object) -> str:
        return call("evaluate", *arguments).error()

    kept = ("--checkpoint", KEPT)
    assert "no task 'helaswag'; did you mean hellaswag?" in complaint(*kept, "--tasks", "helaswag")
    assert "no task" in complaint(*kept, "--tasks", "")
    both = complaint(*kept, "--tasks", "lambada,hellaswag", "--file", ITEMS / "lambada.jsonl")
    assert "--file holds one examination's questions" in both
    assert "can't read" in complaint(*kept, "--tasks", "lambada", "--file", tmp_path / "none")
    assert "'text' is None" in complaint(
        *kept, "--tasks", "lambada", "--file", ITEMS / "wikitext.jsonl"
    )
    nowhere = complaint(*examine("lambada", "--output", tmp_path / "no" / "found.json"))
    assert "there is no folder of that name" in nowhere
    assert "is no checkpoint" in complaint("--checkpoint", tmp_path)


def test_a_model_from_elsewhere_has_to_be_told_its_text(call, trained, shards, tmp_path):
    for way, source, out in (("to-hf", trained, "there"), ("from-hf", tmp_path / "there", "back")):
        assert call("convert", way, source, "--out", tmp_path / out).status == 0
    error = call("evaluate", "--checkpoint", tmp_path / "back").error()
    assert "wasn't trained here: give --data, a shard folder" in error
    arguments = ("--checkpoint", tmp_path / "back", "--data", shards, "--tokens", 512)
    ours = call("evaluate", "--checkpoint", trained, "--tokens", 512).out.splitlines()
    assert call("evaluate", *arguments).out.splitlines()[1:] == ours[1:]

"""evaluate.py as a command: its table, its report, its ranks, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import lzma
import math
import os
import shutil
import statistics

import numpy as np
import pytest
import torch
from conftest import ROOT, Result, prepared, ranks, run
from safetensors.torch import load_file, save_file
from test_checkpoint import rewrite_meta

import evaluate
from checkpoint import MODEL, Checkpoint, find_checkpoint, newest_checkpoint
from distributed import Ranks
from scoring import validate
from shards import VOCABULARY, TokenStream, encoding_of, shard_header
from visuals import KEPT

ITEMS = ROOT / "tests" / "items"


def asked(name: str, *options: object) -> tuple:
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
    bits = evaluate.xz_bits_per_byte(TokenStream(shards, "val"), encoding_of(shards), 576)
    assert f"xz -9e          {bits:.3f} bits per byte on the same text" in table


def test_a_compressor_gets_the_text_that_the_model_guesses(short_documents):
    stream, encoding = TokenStream(short_documents, "val"), encoding_of(short_documents)
    guessed = stream.read(1, 500).tolist()
    text = encoding.decode_bytes([token for token in guessed if token != 299])
    bits = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    assert guessed.count(299) > 10
    assert evaluate.xz_bits_per_byte(stream, encoding, 500) == bits


@pytest.mark.parametrize("value", ["true", 1, None])
def test_a_checkpoint_that_cannot_tell_how_it_read_is_one_line(call, trained, tmp_path, value):
    shutil.copytree(trained, tmp_path / "run")
    path = newest_checkpoint(tmp_path / "run" / "checkpoints").path
    rewrite_meta(path, lambda meta: meta["config"]["data"].update({"document_mask": value}))
    error = call("evaluate", "--checkpoint", tmp_path / "run").error()
    assert f"step_000040: data.document_mask = {value!r}: expected true or false" in error


def test_by_default_val_takes_as_many_tokens_as_llm_c_does(tmp_path):
    (tmp_path / "fineweb_val_000000.bin").write_bytes(
        shard_header(11_000_000) + (np.arange(11_000_000) % 50_000).astype("<u2").tobytes()
    )
    (tmp_path / "fineweb_train_000001.bin").write_bytes(shard_header(2) + b"\0" * 4)
    stream, last = TokenStream(tmp_path, "val"), []

    def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        last[:] = targets[-1].tolist()
        return targets.double().mean()

    alone = Ranks(torch.device("cpu"))
    tokens = evaluate.parse_arguments(["--checkpoint", "out/demo"]).tokens
    found = validate(loss_of, stream, 1024, 16, tokens, alone, None)
    assert found.tokens == 10_485_760  # 20 of llm.c's batches of 524,288
    assert last == [number % 50_000 for number in range(10_485_760 - 1023, 10_485_760 + 1)]


def test_a_perplexity_beyond_all_floats_is_inf_here_and_null_in_the_report(call, tmp_path):
    there, back, output = tmp_path / "there", tmp_path / "back", tmp_path / "found.json"
    call("convert", "to-hf", KEPT, "--out", there)
    weights = load_file(there / MODEL)
    weights["transformer.ln_f.weight"] *= 1e4  # so sure of itself that a wrong guess costs 1,000s
    save_file(weights, there / MODEL)
    call("convert", "from-hf", there, "--out", back)
    options = ("--tasks", "lambada", "--file", ITEMS / "lambada.jsonl", "--output", output)
    told = call("evaluate", "--checkpoint", back, *options).out
    assert "perplexity      inf\n" in told

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    (found,) = json.loads(output.read_text(), parse_constant=refuse)["results"]
    assert found["metrics"]["perplexity"] == {"value": None, "error": None}
    assert found["metrics"]["acc"]["value"] is not None


@pytest.mark.parametrize("task", ["val", "hellaswag", "lambada", "wikitext2"])
def test_spoilt_weights_are_one_line(call, trained, monkeypatch, task):
    """Of four endings without a probability the first is chosen, which looks like chance."""
    model = find_checkpoint(str(trained if task == "val" else KEPT)).make_model()
    model.ln_f.weight.data[0] = math.nan
    monkeypatch.setattr(Checkpoint, "make_model", lambda self: model)
    file = ITEMS / f"{task.replace('wikitext2', 'wikitext')}.jsonl"
    words = (trained,) if task == "val" else (KEPT, "--tasks", task, "--file", file)
    error = call("evaluate", "--checkpoint", *words).error()
    told = "probabilities aren't numbers: the weights are damaged, or overflow in float32"
    assert f"{words[0]}: {told}" in error


def test_the_error_of_val_is_that_of_its_windows(call, trained, shards, tmp_path):
    """It was that of batches of 16: too rough, and none where all windows are in one."""
    output, block_size = tmp_path / "found.json", 32
    stream, model = TokenStream(shards, "val"), find_checkpoint(str(trained)).make_model().eval()
    losses = []
    for at in range(0, 576, block_size):
        ids = torch.from_numpy(stream.read(at, block_size + 1).astype(np.int64))[None]
        with torch.no_grad():
            losses.append(model(ids[:, :-1], ids[:, 1:]).item())
    for windows in (2, 16, 18):
        tokens = windows * block_size
        words = ("--checkpoint", trained, "--tokens", tokens + 5, "--output", output)
        assert call("evaluate", *words).status == 0
        (found,) = json.loads(output.read_text())["results"]
        assert found["count"] == tokens
        error = statistics.stdev(losses[:windows]) / math.sqrt(windows)
        assert found["metrics"]["loss"]["error"] == pytest.approx(error, rel=1e-4)
        mean = statistics.mean(losses[:windows])
        assert found["metrics"]["loss"]["value"] == pytest.approx(mean, rel=1e-6)


def test_what_was_found_is_written_if_the_run_has_removed_the_checkpoint(
    call, trained, tmp_path, monkeypatch
):
    """As it may while a task takes hours."""
    run, output, measure = tmp_path / "run", tmp_path / "found.json", evaluate.measure_loss
    shutil.copytree(trained, run)
    sha256 = find_checkpoint(str(run)).model_sha256()

    def measure_late(*arguments: object) -> evaluate.Told:
        shutil.rmtree(run / "checkpoints")
        return measure(*arguments)

    monkeypatch.setattr(evaluate, "measure_loss", measure_late)
    assert call("evaluate", "--checkpoint", run, "--output", output).status == 0
    assert json.loads(output.read_text())["sha256"] == sha256


def test_a_bar_shows_how_far_val_has_come(call, trained):
    assert "val: " in call("evaluate", "--checkpoint", trained).err


def test_of_several_ranks_one_tells_what_is_wrong_with_the_command():
    others = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    words = ("evaluate.py", "--checkpoint", KEPT, "--tasks", "helaswag")
    assert run(*words, environment=others) == Result(2, "", "")
    words = ("train.py", "configs/demo.toml", "--log.eval_tasks", "helaswag")
    assert run(*words, environment=others) == Result(2, "", "")


def test_a_process_that_is_alone_tells_it_whatever_its_rank_is_said_to_be():
    words = ("evaluate.py", "--checkpoint", KEPT, "--tasks", "helaswag")
    assert "did you mean hellaswag?" in run(*words, environment={"RANK": "1"}).error()


@pytest.mark.parametrize("name", ["hellaswag", "wikitext103"])
def test_ranks_find_together_what_one_finds_alone(call, name, tmp_path):
    alone, together = (tmp_path / f"{kind}.json" for kind in ("alone", "together"))
    first = call("evaluate", *asked(name, "--output", alone))
    several = ranks(2, *asked(name, "--output", together, "--device", "cpu"), script="evaluate.py")
    assert several.status == 0, several.err
    assert several.out == first.out
    alone, together = (json.loads(path.read_text())["results"] for path in (alone, together))
    for ours, theirs in zip(alone[0].pop("metrics").values(), together[0].pop("metrics").values()):
        assert ours == pytest.approx(theirs, rel=1e-12)
    assert alone == together


def test_a_limit_asks_the_first_questions_only(call, tmp_path):
    lines = (ITEMS / "lambada.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "two.jsonl").write_text("".join(lines[:2]), encoding="utf-8")
    long = json.dumps({"text": "a b" + "c?" * 500}) + "\n"  # not asked for, so nobody minds
    (tmp_path / "more.jsonl").write_text("".join(lines[:2]) + long, encoding="utf-8")
    limited, of_two = (tmp_path / f"{name}.json" for name in ("limited", "of_two"))
    told = call("evaluate", *asked("lambada", "--limit", 2, "--output", limited)).out
    assert f"lambada         the first 2 of 8 of {ITEMS / 'lambada.jsonl'}\n" in told
    call("evaluate", *asked("lambada", "--file", tmp_path / "two.jsonl", "--output", of_two))
    more = call("evaluate", *asked("lambada", "--file", tmp_path / "more.jsonl", "--limit", 2))
    assert "the first 2 of 3" in more.out
    ours, theirs = (json.loads(path.read_text())["results"][0] for path in (limited, of_two))
    assert (ours["count"], ours["limit"]) == (2, 2) and "limit" not in theirs
    assert ours["metrics"] == theirs["metrics"]
    error = call("evaluate", "--checkpoint", KEPT, "--limit", 2).error()
    assert "--limit is for tasks other than val, --tasks is val" in error


def test_the_stride_is_how_far_a_window_goes_on(call, tmp_path):
    output = tmp_path / "found.json"
    by_stride = {}
    for stride in (8, 128, None):
        options = ("--stride", stride) if stride else ()
        call("evaluate", *asked("wikitext2", *options, "--output", output))
        (found,) = json.loads(output.read_text())["results"]
        by_stride[stride] = found["metrics"]
    assert by_stride[128] == by_stride[None] != by_stride[8]


def test_a_stride_above_the_context_would_leave_tokens_out(call):
    error = call("evaluate", *asked("wikitext2", "--stride", 129)).error()
    assert "--stride 129: this model's context has 128 tokens, expected 1 to 128" in error
    error = call("evaluate", *asked("lambada", "--stride", 8)).error()
    assert "--stride is wikitext's, --tasks is lambada" in error


def test_wrong_input_is_one_line(call, tmp_path):
    def complaint(*arguments: object) -> str:
        return call("evaluate", *arguments).error()

    kept = ("--checkpoint", KEPT)
    assert "no task 'helaswag'; did you mean hellaswag?" in complaint(*kept, "--tasks", "helaswag")
    assert "no task" in complaint(*kept, "--tasks", "")
    both = complaint(*kept, "--tasks", "lambada,hellaswag", "--file", ITEMS / "lambada.jsonl")
    assert "--file holds one task's questions" in both
    assert "can't read" in complaint(*kept, "--tasks", "lambada", "--file", tmp_path / "none")
    for option in (("--data", tmp_path), ("--tokens", 512)):
        error = complaint(*kept, "--tasks", "lambada", *option)
        assert f"{option[0]} is val's, --tasks is lambada" in error
    assert "'text' is None" in complaint(
        *kept, "--tasks", "lambada", "--file", ITEMS / "wikitext.jsonl"
    )
    nowhere = complaint(*asked("lambada", "--output", tmp_path / "no" / "found.json"))
    assert f"there is no folder '{tmp_path / 'no'}'" in nowhere
    assert "is no checkpoint" in complaint("--checkpoint", tmp_path)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("folder", "is a folder or a device"),
        ("/dev/full", "'/dev/full' is a folder or a device, expected the name of a file"),
        ("a\0b", "embedded null"),
        ("a\0b/c", "embedded null"),
        ("device", "is a folder or a device"),
        ("a" * 300, "File name too long"),
    ],
)
def test_a_report_that_cannot_be_a_file_is_one_line_before_a_model_is_looked_for(
    call, tmp_path, name, complaint
):
    (tmp_path / "folder").mkdir()
    (tmp_path / "device").symlink_to("/dev/null")
    error = call("evaluate", "--checkpoint", tmp_path, "--output", tmp_path / name).error()
    assert error.startswith("error: --output ")
    assert complaint in error


def test_a_report_goes_into_the_file_that_a_link_leads_to(call, tmp_path):
    output, link = tmp_path / "found.json", tmp_path / "link.json"
    link.symlink_to(output)
    for _ in range(2):  # at first it leads nowhere
        assert call("evaluate", *asked("lambada", "--output", link)).status == 0
        assert link.is_symlink() and json.loads(output.read_text())["results"]


def test_a_report_that_cannot_be_written_is_one_line_before_anything_is_measured(call, tmp_path):
    output = tmp_path / ("a" * 250)  # a name of 255 bytes is the longest, and .partial comes after
    result = call("evaluate", *asked("lambada", "--output", output))
    assert f"can't write {output}: File name too long" in result.error()
    assert result.out == ""


def test_a_report_takes_the_place_of_an_old_one_when_it_is_whole(call, tmp_path):
    output, old = tmp_path / "found.json", tmp_path / "old.json"
    output.write_text("old")
    os.link(output, old)  # another name of what is there now
    assert call("evaluate", *asked("lambada", "--output", output)).status == 0
    assert json.loads(output.read_text())["results"]
    assert old.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"found.json", "old.json"}


def test_a_model_from_elsewhere_has_to_be_told_its_text(call, trained, shards, tmp_path):
    for way, source, out in (("to-hf", trained, "there"), ("from-hf", tmp_path / "there", "back")):
        assert call("convert", way, source, "--out", tmp_path / out).status == 0
    error = call("evaluate", "--checkpoint", tmp_path / "back").error()
    assert "wasn't trained here: give --data, a shard folder" in error
    arguments = ("--checkpoint", tmp_path / "back", "--data", shards, "--tokens", 512)
    ours = call("evaluate", "--checkpoint", trained, "--tokens", 512).out.splitlines()
    assert call("evaluate", *arguments).out.splitlines()[1:] == ours[1:]


def test_a_validation_text_that_is_too_short_is_told_before_anything_is_measured(
    call, trained, shards, tmp_path
):
    source = tmp_path / "text" / "a.txt"
    source.parent.mkdir()
    source.write_text("The quick brown fox. " * 40)
    short = prepared(source, "--tokenizer", str(shards / VOCABULARY), "--val-tokens", "20")
    result = call("evaluate", "--checkpoint", trained, "--data", short)
    assert "20 tokens" in result.error()
    assert result.out == ""

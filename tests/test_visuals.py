"""The story of a sentence is what the model says, and the figures are the code's own."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, files_of, prepared
from PIL import Image, ImageChops

from checkpoint import MODEL, find_checkpoint, save_tensors, write_meta
from common.errors import UserError
from config import load_config
from model import GPT, GPTConfig
from shards import VOCABULARY, TokenizerRecord, TokenStream
from tokenizer import make_encoding, save_vocabulary
from visuals import KEPT, counting, diagrams, draw, plots
from visuals.canvas import visible
from visuals.keep import keep
from visuals.story import attention_rows, chapters, load_story, tell_gradient

RECORD = json.loads((ROOT / "visuals" / "figures.json").read_text(encoding="utf-8"))
TEXT, NEXT = "The quick brown", "x"


@pytest.fixture(scope="module")
def story(trained):
    return load_story(trained, TEXT, NEXT)


# The story


def test_the_attention_that_is_shown_is_the_attention_that_is_used(story):
    rows = attention_rows(story.model, story.ids)
    T = len(story.ids)
    torch.testing.assert_close(rows.sum(dim=-1), torch.ones(rows.shape[:-1]))
    assert not rows.triu(1).any()
    block, heads = story.model.h[0], story.model.config.n_head
    x = block.ln_1(story.model.wte(story.ids) + story.model.wpe.weight[:T])
    v = block.attn.c_attn(x).chunk(3, dim=-1)[2].view(T, heads, -1).transpose(0, 1)
    mixed = (rows[0] @ v).transpose(0, 1).reshape(T, -1)
    torch.testing.assert_close(block.attn.c_proj(mixed), block.attn(x[None])[0])


def test_the_gradient_of_the_logits_is_probability_less_one_at_the_target(story):
    logits = story.logits().detach().requires_grad_()
    (-logits.log_softmax(dim=-1)[story.target]).backward()
    expected = logits.softmax(dim=-1).detach()
    expected[story.target] -= 1
    torch.testing.assert_close(logits.grad, expected)
    assert f"{logits.grad[story.target]:+.4f}" in "\n".join(tell_gradient(story))


def test_a_step_against_the_gradient_lowers_the_loss_and_is_taken_back(story):
    before = story.loss().item()
    line = tell_gradient(story)[-1]
    first, second = (float(part) for part in line.split("loss ")[1].split(",")[0].split(" -> "))
    assert first == pytest.approx(before, abs=5e-4)
    assert second < first
    assert story.loss().item() == before


def test_the_story_is_told_twice_alike_and_of_other_sentences_too(story, call, trained):
    told = call("visuals.story", "--checkpoint", trained, "--text", TEXT, "--next", NEXT)
    assert told.out == "\n\n".join(chapters(story)) + "\n"
    other = call("visuals.story", "--checkpoint", trained, "--text", "It's 3", "--next", "y")
    assert "'y'" in other.out
    assert other.out != told.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--next", ""], "--next is empty"),
        (["--text", ""], "--text has 0 tokens"),
        (["--text", "word " * 200], "expected 1 to 32"),
        (["--checkpoint", "nowhere"], "nowhere is no checkpoint"),
    ],
)
def test_a_sentence_that_does_not_fit_is_one_line(call, trained, arguments, words):
    assert words in call("visuals.story", "--checkpoint", trained, *arguments).error()


# The model that is kept


def test_a_kept_model_is_a_small_checkpoint_that_says_nearly_the_same(call, trained, tmp_path):
    assert call("visuals.keep", trained, "--out", tmp_path / "kept").status == 0
    story, kept = load_story(trained, TEXT, NEXT), load_story(tmp_path / "kept", TEXT, NEXT)
    for (name, ours), theirs in zip(kept.model.named_parameters(), story.model.parameters()):
        step = theirs.abs().amax(dim=-1, keepdim=True) / 127 if theirs.dim() == 2 else 0.0
        assert ((ours - theirs).abs() <= 0.5001 * step).all(), name
        assert theirs.dim() == 1 or not torch.equal(ours, theirs), name
    assert kept.loss().item() == pytest.approx(story.loss().item(), abs=0.05)
    assert (tmp_path / "kept" / MODEL).stat().st_size < 0.5 * (
        4 * sum(parameter.numel() for parameter in story.model.parameters())
    )


def test_a_kept_model_is_checked_like_any_other(call, trained, tmp_path):
    keep(trained, tmp_path)
    weights = bytearray((tmp_path / MODEL).read_bytes())
    weights[-1] ^= 1
    (tmp_path / MODEL).write_bytes(weights)
    assert "is damaged" in call("visuals.story", "--checkpoint", tmp_path).error()


def test_what_can_not_be_kept_is_one_line(call, trained, tmp_path):
    def complaint(run: Path) -> str:
        return call("visuals.keep", run, "--out", tmp_path / "kept").error()

    assert "is no checkpoint" in complaint(tmp_path)
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / VOCABULARY).unlink()
    assert "GPT-2's own vocabulary is too large" in complaint(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").rename(tmp_path / "run" / "metrics")
    shutil.copy(trained / VOCABULARY, tmp_path / "run")
    assert "has no metrics.jsonl" in complaint(tmp_path / "run")


def test_the_model_that_is_kept_is_that_of_the_demo():
    meta, config = find_checkpoint(str(KEPT)).meta, load_config([str(ROOT / "configs/demo.toml")])
    assert meta.step == config.train.max_steps
    assert meta.config["model"] == asdict(config.model)
    then, now = meta.config["optim"], asdict(config.optim)
    assert then == {key: now[key] for key in then}  # there are more settings now
    assert all(path.stat().st_size < 1_000_000 for path in KEPT.iterdir())


# Counting


def test_counting_on_a_text_small_enough_to_count_by_eye():
    train = [1, 2, 3, 1, 2, 4, 1, 2, 3]
    followers = counting.count_followers(train, 1)
    assert followers[(2,)] == {3: 2, 4: 1}
    assert counting.guess_by_counting(followers, [1, 2, 3, 9, 1], 1) == (3 / 4, 2 / 4)
    assert counting.guess_by_counting(counting.count_followers(train, 2), [1, 2, 3, 9], 2) == (
        1,
        0.5,
    )


def test_the_bigram_model_is_a_probability_and_its_loss_the_mean():
    train, V = [0, 1, 0, 1, 0, 2], 4
    share = [(count + 1) / (len(train) + V) for count in (3, 2, 1, 0)]
    for following in (1, 3):  # often seen, never seen
        losses = []
        for k in (2**power for power in range(11)):
            after_0 = [(count + k * p) / (3 + k) for count, p in zip((0, 2, 1, 0), share)]
            assert sum(after_0) == pytest.approx(1)
            losses.append(-math.log(after_0[following]))
        assert counting.bigram_loss(train, [0, following], V) == pytest.approx(min(losses))


def test_what_a_compressor_has_read_before_costs_it_nothing_again():
    generator = random.Random(0)
    text, other = generator.randbytes(10_000), generator.randbytes(10_000)
    assert counting.xz_after(other, text) == pytest.approx(8, rel=0.01)
    assert counting.xz_after(other + text, text) < 0.5


def test_the_counts_are_measured_on_shards(call, shards, tmp_path):
    output = tmp_path / "counting.json"
    printed = call("visuals.counting", "--data", shards, "--output", output).out
    result = json.loads(output.read_text(encoding="utf-8"))
    train = TokenStream(shards, "train")
    assert result["training_tokens"] == len(train)
    assert result["contexts"][1]["different_contexts"] == len(set(train.read(0, len(train) - 1)))
    assert f"{result['bigram_loss']:.3f}" in printed
    assert f"{result['xz_bits_per_byte_after_training_text']:.3f} bits per byte" in printed


# The figures


def test_every_figure_is_recorded_and_small():
    files = {path.name for path in (ROOT / "visuals").iterdir() if path.suffix in (".png", ".gif")}
    assert files == set(RECORD)
    assert {name.split(".")[0] for name in files} == set(draw.FIGURES)
    for name, made in RECORD.items():
        assert (ROOT / "visuals" / name).stat().st_size < 300_000, name
        assert (ROOT / made.get("shows", "visuals/model")).exists()


@pytest.mark.parametrize("name", sorted(set(draw.FIGURES) - {"growing_text"}))
def test_a_figure_is_drawn_as_it_is_recorded(name, tmp_path):
    path = draw.draw(name, tmp_path)
    made, now = RECORD[path.name], draw.record(name)
    assert {**made, "versions": now["versions"]} == now
    with Image.open(path) as drawn, Image.open(ROOT / "visuals" / path.name) as kept:
        assert drawn.size == kept.size
        if made["versions"]["matplotlib"] == now["versions"]["matplotlib"]:
            assert largest_difference(drawn, kept) < 8  # of 255


def largest_difference(one: Image.Image, other: Image.Image) -> float:
    """The largest mean difference of brightness, of 255, over squares of 16 by 16 pixels."""
    difference = ImageChops.difference(one.convert("L"), other.convert("L"))
    squares = difference.reduce(16)
    return squares.getextrema()[1]


def test_the_animation_grows_by_a_token_a_frame(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "FRAMES", 2)
    path = draw.draw("growing_text", tmp_path)
    made, now = RECORD[path.name], draw.record("growing_text")
    assert {**made, "versions": now["versions"]} == now
    with Image.open(path) as drawn, Image.open(ROOT / "visuals" / path.name) as kept:
        assert (drawn.n_frames, kept.n_frames) == (3, 25)
        first = drawn.convert("L")
        for frame in (0, 1):
            drawn.seek(frame)
            kept.seek(frame)
            assert drawn.size == kept.size
            if made["versions"]["matplotlib"] == now["versions"]["matplotlib"]:
                assert largest_difference(drawn, kept) < 8
        assert largest_difference(first, drawn) > 8


def test_what_can_not_be_drawn_is_one_line(call, tmp_path):
    assert "no figure nothing: expected some of" in call("visuals.draw", "nothing").error()
    complaint = call("visuals.draw", "positions", "--run", tmp_path).error()
    assert "is no checkpoint" in complaint


def test_folders_and_runs_that_cannot_serve_are_one_line(call, trained, tmp_path):
    run, file = tmp_path / "run", tmp_path / "file"
    shutil.copytree(trained, run)
    file.touch()
    before = files_of(run)
    assert "is the run itself" in call("visuals.keep", run, "--out", run).error()
    assert f"can't write {file}" in call("visuals.keep", run, "--out", file).error()
    assert files_of(run) == before
    (run / "metrics.jsonl").write_text("")
    complaint = call("visuals.draw", "training_curve", "--run", run).error()
    assert "has told of no training step that training_curve could show" in complaint
    (run / "figures").rmdir()
    (run / "figures").touch()
    assert "can't write" in call("visuals.draw", "positions", "--run", run).error()


def test_shards_too_short_to_count_in_are_one_line(call, tmp_path):
    out = prepared(Path(shutil.copy(ROOT / "README.md", tmp_path)), "--val-tokens", "4")
    error = call("visuals.counting", "--data", out).error()
    assert "out has 4 tokens to guess, expected more than 5" in error


def test_a_drawing_of_a_model_lies_with_the_model(call, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    path = call("visuals.draw", "positions", "--run", tmp_path / "run").out.strip()
    assert path == str(tmp_path / "run" / "figures" / "positions.png")
    Image.open(path).verify()


def test_every_figure_of_a_model_can_be_drawn_of_a_small_and_troubled_run(call, trained, tmp_path):
    """Its context is shorter than the animation, and one of its losses was not finite."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    line = json.loads(lines[2])
    lines[2] = json.dumps(line | {"loss": None})
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert line["kind"] == "train"
    result = call("visuals.draw", "--run", run)
    assert result.status == 0, result.err
    drawn = {path.stem for path in (run / "figures").iterdir()}
    assert drawn == {figure.__name__ for figure in draw.OF_A_MODEL}


def test_a_figure_that_a_model_has_nothing_for_is_left_out(call, trained, tmp_path, monkeypatch):
    def draw_one(name: str, folder: Path, run: Path) -> Path:
        if name == "embedding_map":
            raise UserError("no words")
        return folder / name

    run = tmp_path / "run"
    shutil.copytree(trained, run)
    monkeypatch.setattr(draw, "draw", draw_one)
    result = call("visuals.draw", "--run", run)
    assert (result.status, result.err) == (0, "left out: no words\n")
    assert len(result.out.splitlines()) == len(draw.OF_A_MODEL) - 1
    assert "no words" in call("visuals.draw", "--run", run, "embedding_map").error()


def test_a_vocabulary_without_words_has_no_map(tmp_path):
    encoding = make_encoding({bytes([byte]): byte for byte in range(256)})
    sha256 = save_vocabulary(encoding, tmp_path / VOCABULARY)
    meta = find_checkpoint(str(KEPT)).meta
    model = GPT(GPTConfig(257, 32, 1, 1, 8))
    tokenizer = TokenizerRecord("bpe-257", 257, sha256)
    save_tensors(model.state_dict(), tmp_path / MODEL)
    write_meta(tmp_path, replace(meta, model=model.config, tokenizer=tokenizer), files=(MODEL,))
    with pytest.raises(UserError, match="has no words for embedding_map to place"):
        plots.embedding_map(tmp_path)


def test_a_model_without_a_run_has_no_training_curve(call, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("metrics.jsonl"))
    assert (
        "has no metrics.jsonl: expected the folder of a training run"
        in call("visuals.draw", "training_curve", "--run", run).error()
    )


def test_a_sentence_of_any_bytes_can_be_told(call, trained):
    result = call("visuals.story", "--checkpoint", trained, "--text", "The \udcff")
    assert result.status == 0, result.err


def test_merge_steps_are_what_bpe_learns():
    steps = diagrams.merge_steps("low lower lowest slow slower slowest", 6)
    assert [(new, count) for new, count, _ in steps][:3] == [(b"lo", 6), (b"low", 6), (b"lowe", 4)]
    assert [b"".join(word) for word in steps[-1][2]] == [
        *(b"low", b" lower", b" lowest", b" slow", b" slower", b" slowest")
    ]


def test_white_space_is_made_visible():
    assert visible(" a\n\t") == "␣a⏎⇥"

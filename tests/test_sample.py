"""Sampling as a user meets it: what is printed, when, and where it stops."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import termios
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TEXT, run
from hypothesis import given
from hypothesis import strategies as st

from checkpoint import Checkpoint, find_checkpoint
from decoding import most_fused
from model import GPT, GPTConfig
from sample import Completion, answer, parse_arguments
from tokenizer import gpt2_encoding, make_encoding
from visuals import KEPT

# A draw could end the text after a few tokens; the likeliest token never does.
ENDLESS = ("--prompt", "The quick", "--temperature", "0", "--max-new-tokens", "1000000")


def feed(tokens: list[int], stops: list[str] = ()) -> tuple[Completion, list[str]]:
    """A completion after these tokens (as many as it takes), and what it showed at each."""
    completion, shown = Completion(gpt2_encoding(), list(stops)), []
    for token in tokens:
        if completion.finish_reason is None:
            completion.add(token)
            shown.append(completion.fresh())
    if completion.finish_reason is None:
        completion.finish("length")
        shown.append(completion.fresh())
    return completion, shown


# One sample as it grows


def test_a_character_of_several_tokens_is_shown_whole_or_not_at_all():
    tokens = gpt2_encoding().encode_ordinary("🙂日")
    assert len(tokens) > 2
    completion, shown = feed(tokens)
    assert completion.text == "".join(shown) == "🙂日"
    assert all("�" not in text for text in shown)


def test_half_a_character_at_the_end_is_marked_as_such():
    tokens = gpt2_encoding().encode_ordinary("🙂")
    completion, _ = feed(tokens[:-1])
    assert completion.text == "�"


@given(st.text(), st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_what_was_shown_is_the_text_up_to_the_first_stop(text, stops):
    completion, shown = feed(gpt2_encoding().encode_ordinary(text), stops)
    assert "".join(shown) == completion.text
    assert not any(stop in completion.text for stop in stops)
    assert text.startswith(completion.text)
    if completion.finish_reason == "length":
        assert completion.text == text
        assert not any(stop in text for stop in stops)
    else:
        assert any(text[len(completion.text) :].startswith(stop) for stop in stops)


@pytest.mark.parametrize("stops", [["e", "h"], ["h", "e"]])
def test_of_two_stop_texts_in_one_token_the_first_ends_the_text(stops):
    completion, shown = feed(gpt2_encoding().encode_ordinary(" the"), stops)
    assert completion.text == "".join(shown) == " t"


def test_a_stop_text_across_tokens_is_never_shown():
    encoding = gpt2_encoding()
    tokens = [encoding.encode_single_token(part) for part in ("Hello", " wor", "ld", "!", " Bye")]
    completion, shown = feed(tokens, stops=["world!"])
    assert completion.finish_reason == "stop"
    assert completion.text == "".join(shown) == "Hello "
    assert completion.tokens == tokens[:2]


@pytest.mark.parametrize(
    ("written", "kept", "text"),
    [
        (b"\xff\xfe\xfd ok stop", 7, "\ufffd\ufffd\ufffd ok "),
        (b"\xe2\x80stop", 1, "\ufffd"),
        ("é — stop".encode(), 7, "é — "),
        (b"stop", 0, ""),
    ],
)
def test_the_tokens_of_a_stop_text_are_not_told_whatever_is_before_it(written, kept, text):
    """Byte by byte."""
    tokens = [gpt2_encoding().encode_single_token(bytes([byte])) for byte in written]
    completion, shown = feed(tokens, stops=["stop"])
    assert (completion.text, "".join(shown)) == (text, text)
    assert completion.tokens == tokens[:kept]


def test_end_of_text_ends_and_is_no_part_of_the_text():
    encoding = gpt2_encoding()
    completion, _ = feed([*encoding.encode_ordinary("One"), encoding.eot_token, 11])
    assert (completion.text, completion.finish_reason) == ("One", "end_of_text")
    assert completion.tokens == encoding.encode_ordinary("One")


# The script


def test_jsonl_prints_one_object_per_sample_and_nothing_else(call, trained):
    result = call(
        *("sample", "--checkpoint", trained, "--prompt", "The quick", "--num-samples", 3),
        *("--max-new-tokens", 8, "--seed", 1, "--jsonl"),
    )
    assert result.status == 0
    samples = [json.loads(line) for line in result.out.splitlines()]
    encoding = find_checkpoint(str(trained)).encoding()
    assert [sample["sample"] for sample in samples] == [0, 1, 2]
    for sample in samples:
        assert list(sample) == ["sample", "prompt", "completion", "tokens", "finish_reason"]
        assert sample["prompt"] == "The quick"
        assert sample["completion"] == encoding.decode(sample["tokens"])
        assert sample["finish_reason"] in ("length", "end_of_text")
        assert (sample["finish_reason"] == "length") == (len(sample["tokens"]) == 8)


def test_greedy_text_is_what_the_model_says_step_by_step(call, trained):
    checkpoint = find_checkpoint(str(trained))
    model = GPT(checkpoint.meta.model).eval()
    checkpoint.load_model(model)
    encoding = checkpoint.encoding()
    prompt = encoding.encode_ordinary("The quick")
    ids = torch.tensor([prompt])
    for _ in range(12):
        ids = torch.cat((ids, model(ids)[:, -1:].argmax(dim=-1)), dim=1)
    arguments = ("--prompt", "The quick", "--max-new-tokens", 12, "--dtype", "float32")
    result = call("sample", "--checkpoint", trained, *arguments, "--temperature", 0)
    assert result.out == encoding.decode(ids[0].tolist()) + "\n"


def test_the_weights_are_packed(call, trained, monkeypatch):
    packed = []
    monkeypatch.setattr("sample.pack_weights", lambda model: packed.append(type(model)))
    assert call("sample", "--checkpoint", trained, "--max-new-tokens", 1).status == 0
    assert packed == [GPT]


def test_decoding_is_compiled_if_asked_for_after_the_weights_are_where_they_stay(
    call, trained, monkeypatch
):
    compiled = []
    monkeypatch.setattr("sample.compile_decoding", lambda model: compiled.append(model.wte.weight))
    options = ("--checkpoint", trained, "--max-new-tokens", 1, "--dtype", "bfloat16")
    assert call("sample", *options).status == 0
    assert not compiled
    assert call("sample", *options, "--compile").status == 0
    assert [weight.dtype for weight in compiled] == [torch.bfloat16]


def test_compiling_for_what_it_does_not_help_is_refused(call, trained):
    options = ("--checkpoint", trained, "--device", "cpu", "--compile", "--num-samples")
    most = most_fused(find_checkpoint(str(trained)).meta.model.n_embd)
    refused = call("sample", *options, most + 1).error()
    assert f"--compile: for up to {most} samples of this model at once" in refused
    refused = call("sample", *options, most).error()
    assert "compiled decoding is for NVIDIA GPUs, this is cpu" in refused


def test_a_seed_gives_the_same_text_again_and_no_seed_gives_another(call, trained):
    arguments = ("sample", "--checkpoint", trained, "--prompt", "T", "--temperature", 1.5)
    first, again = (call(*arguments, "--seed", 3).out for _ in range(2))
    assert first == again
    assert call(*arguments, "--seed", 4).out != first
    unseeded = {call(*arguments).out for _ in range(3)}
    assert len(unseeded) > 1
    assert "seed " in call(*arguments).err  # so that a text that pleases can be had again


def test_several_samples_are_printed_one_under_the_other(call, trained):
    arguments = ("--prompt", "The", "--num-samples", 3, "--max-new-tokens", 5, "--seed", 1)
    result = call("sample", "--checkpoint", trained, *arguments)
    texts = result.out.split("---------------\n")
    assert len(texts) == 3
    assert all(text.startswith("The") for text in texts)


def test_text_streams_as_it_comes(trained):
    process = subprocess.Popen(
        [sys.executable, "sample.py", "--checkpoint", trained, *ENDLESS],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        # A million tokens take minutes: what is here now was printed before the end.
        assert len(process.stdout.read(200)) == 200
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_without_a_prompt_a_document_begins(call, trained):
    arguments = ("--temperature", 0, "--max-new-tokens", 3, "--jsonl")
    result = call("sample", "--checkpoint", trained, *arguments)
    assert json.loads(result.out)["prompt"] == ""


def test_a_stop_text_ends_the_sample(call, trained):
    arguments = ("--prompt", "The quick", "--temperature", 0, "--max-new-tokens", 60, "--jsonl")
    whole = json.loads(call("sample", "--checkpoint", trained, *arguments).out)["completion"]
    stop = whole[5:7]
    result = call("sample", "--checkpoint", trained, *arguments, "--stop", stop)
    stopped = json.loads(result.out)
    assert stopped["finish_reason"] == "stop"
    assert stopped["completion"] == whole[: whole.index(stop)]


def test_of_a_long_prompt_the_tokens_that_are_used_are_those_of_the_whole(monkeypatch):
    """Where as many characters as 32 tokens may have begin, a word is cut in two."""
    learned = [b"he", b" t", b" the", b"..", b"....", b"......"]
    tokens = [bytes([byte]) for byte in range(256)] + learned
    encoding = make_encoding({token: rank for rank, token in enumerate(tokens)})
    prompt, seen = " the" * 100 + "......", []
    assert len(encoding.encode_ordinary(prompt[-4 * 32 :])) == 32
    monkeypatch.setattr(
        "sample.complete", lambda _, __, ids, *some, **named: seen.append(ids) or []
    )
    model = SimpleNamespace(config=GPTConfig(block_size=32))
    answer(model, encoding, prompt, parse_arguments(["--checkpoint", "x", "--jsonl"]), None)
    assert seen[0][-32:] == encoding.encode_ordinary(prompt)[-32:]


def test_a_prompt_longer_than_the_context_is_cropped_with_a_notice(call, trained, tmp_path):
    (tmp_path / "long.txt").write_text(TEXT * 20, encoding="utf-8")
    arguments = ("--prompt-file", tmp_path / "long.txt", "--temperature", 0, "--jsonl")
    result = call("sample", "--checkpoint", trained, *arguments)
    assert "longer than the context: only its last 32 tokens are used" in result.err
    encoding = find_checkpoint(str(trained)).encoding()
    last = encoding.decode(encoding.encode_ordinary(TEXT * 20)[-32:])
    arguments = ("--prompt", last, "--temperature", 0, "--jsonl")
    cropped = call("sample", "--checkpoint", trained, *arguments)
    assert json.loads(result.out)["tokens"] == json.loads(cropped.out)["tokens"]


def test_a_prompt_comes_from_a_file_or_from_standard_input(trained, tmp_path):
    """As it is, but for a mark of the byte order."""
    text = "\ufeffThe lazy\r\ndog"
    (tmp_path / "prompt.txt").write_bytes(text.encode())
    texts = [
        run(
            *("sample.py", "--checkpoint", trained, "--jsonl", "--seed", 1),
            *("--prompt-file", source),
            stdin=text,
        ).out
        for source in ("-", tmp_path / "prompt.txt")
    ]
    assert texts[0] == texts[1]
    assert json.loads(texts[0])["prompt"] == "The lazy\r\ndog"


def test_interactive_mode_answers_line_by_line_until_the_input_ends(trained):
    result = run(
        *("sample.py", "--checkpoint", trained, "--interactive", "--seed", 1),
        stdin="The quick\n\nThe lazy\n",
    )
    assert result.out.startswith("The quick")
    assert "\nThe lazy" in result.out
    assert result.err.count("> ") == 4


def test_a_line_that_ends_as_windows_ends_it_is_the_same_prompt(trained):
    command = ("sample.py", "--checkpoint", trained, "--interactive", "--jsonl", "--seed", 1)
    plain, windows = (run(*command, stdin=f"The quick{end}") for end in ("\n", "\r\n"))
    assert windows.out == plain.out and json.loads(plain.out)["prompt"] == "The quick"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("sample", ("--checkpoint",)),
        ("evaluate", ("--data", "DATA", "--checkpoint")),
        ("convert", ("to-hf", "--out", "OUT")),
    ],
)
def test_a_model_that_finds_no_room_is_one_line(
    call, trained, shards, tmp_path, monkeypatch, script, words
):
    def fail(self: Checkpoint) -> None:
        raise MemoryError("Cannot allocate memory (os error 12)")

    monkeypatch.setattr(Checkpoint, "make_model", fail)
    paths = {"DATA": shards, "OUT": tmp_path / "out"}
    result = call(script, *(paths.get(word, word) for word in words), trained)
    assert "out of memory: " in result.error()


@pytest.mark.parametrize("more", [(), ("--jsonl",)])
def test_ctrl_c_stops_a_text_and_asks_for_the_next_line(trained, more):
    process = subprocess.Popen(
        [
            *(sys.executable, "sample.py", "--checkpoint", trained, "--interactive", *more),
            *ENDLESS[2:],
        ],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
    )
    print("The quick", file=process.stdin, flush=True)
    waiting = bytearray(4)
    while fcntl.ioctl(process.stdin, termios.FIONREAD, waiting) or any(waiting):
        time.sleep(0.05)  # until the line has been read
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate("", timeout=60)
    assert process.returncode == 0 and "Traceback" not in err
    assert err.count("> ") == 2
    assert out == "" if more else out.startswith("The quick") and out.endswith("\n")


def test_a_model_is_decoded_with_the_vocabulary_that_it_was_trained_with(trained):
    checkpoint = find_checkpoint(str(trained))
    assert checkpoint.encoding().n_vocab == checkpoint.meta.model.vocab_size == 300


# What is refused


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt-file", "nowhere.txt"), "can't read the prompt nowhere.txt: No such file"),
        (("--prompt-file", os.devnull), "the prompt is empty"),
        (("--prompt-file", ""), "--prompt-file is empty: name a file, or - for standard input"),
        (("--temperature", "-1"), "'-1': expected a number, 0 or more"),
        (("--temperature", "nan"), "'nan': expected a number, 0 or more"),
        (("--temperature", "hot"), "'hot': expected a number, 0 or more"),
        (("--top-k", "0"), "'0': expected a whole number above 0"),
        (("--temperature", "inf"), "'inf': expected a number, 0 or more"),
        (("--top-p", "1.5"), "'1.5': expected a number above 0, up to 1"),
        (("--top-p", "0"), "'0': expected a number above 0, up to 1"),
        (("--max-new-tokens", "0"), "'0': expected a whole number above 0"),
        (("--num-samples", "1,5"), "'1,5': expected a whole number above 0"),
        (("--num-samples", "9" * 5000), "expected a whole number above 0 and below 2**63"),
        (("--num-samples", "many"), "'many': expected a whole number above 0"),
        (("--stop", ""), "--stop is empty"),
        (("--seed", 2**64), "expected a whole number from 0 to 2^64 - 1"),
        (("--num-samples", 10**11), "out of memory: lower --num-samples"),
        (("--prompt", "caf\udce9"), "the prompt on the command line: expected text in UTF-8"),
        (("--device", "tpu"), "invalid choice: 'tpu'"),
        (("--nonsense",), "unrecognized arguments: --nonsense (see --help)"),
        (("--promt", "x"), "unrecognized arguments: --promt x; did you mean --prompt?"),
    ],
)
def test_wrong_input_is_one_line_that_names_it(call, trained, arguments, expected):
    assert expected in call("sample", "--checkpoint", trained, *arguments).error()


def test_the_largest_and_the_smallest_values_are_taken(call, trained):
    edges = ("--seed", 2**64 - 1, "--top-p", 1, "--top-k", 1, "--max-new-tokens", 1)
    for temperature in (0, 1e-30, 1e30):
        options = (*edges, "--temperature", temperature, "--prompt", "The")
        result = call("sample", "--checkpoint", trained, *options)
        assert result.status == 0, result


def test_a_prompt_that_cannot_be_read_is_told_before_the_model_is_loaded(call, trained):
    result = call("sample", "--checkpoint", trained, "--prompt-file", "nowhere.txt")
    assert "can't read the prompt" in result.error()
    assert len(result.err.splitlines()) == 1


def test_what_is_no_checkpoint_is_refused(call, tmp_path):
    assert "is no checkpoint" in call("sample", "--checkpoint", tmp_path).error()


def test_a_real_process_refuses_with_one_line_too(tmp_path):
    assert "is no checkpoint" in run("sample.py", "--checkpoint", tmp_path).error()


def test_weights_too_large_to_compute_with_are_told_of(call, trained, monkeypatch):
    spoilt = find_checkpoint(trained).make_model()
    spoilt.ln_f.weight.data.fill_(3e38)
    monkeypatch.setattr(Checkpoint, "make_model", lambda self: spoilt)
    error = call("sample", "--checkpoint", trained, "--prompt", "The", "--dtype", "float32").error()
    assert f"{trained}: logits aren't finite: the weights are damaged, or overflow" in error


def test_a_vocabulary_that_is_not_the_models_is_refused(call, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run" / "tokenizer.tiktoken"
    path.write_bytes(path.read_bytes()[:-10])
    assert "has SHA-256" in call("sample", "--checkpoint", tmp_path / "run").error()


def test_a_checkpoint_that_was_moved_asks_for_its_vocabulary(call, trained, tmp_path):
    moved = tmp_path / "a" / "b" / "moved"
    shutil.copytree(trained / "checkpoints" / "step_000040", moved)
    message = call("sample", "--checkpoint", moved).error()
    assert "copy tokenizer.tiktoken from the run folder into it" in message
    shutil.copy(trained / "tokenizer.tiktoken", moved)
    assert call("sample", "--checkpoint", moved, "--max-new-tokens", 2).status == 0


def test_a_prompt_of_a_million_blanks_does_not_break_the_tokenizer(monkeypatch):
    """Of so many at once tiktoken makes nothing but a panic."""
    asked, arguments = [], SimpleNamespace(jsonl=True)
    model = SimpleNamespace(config=SimpleNamespace(block_size=4096))
    monkeypatch.setattr("sample.complete", lambda *those, **_: asked.append(those[2]) or [])
    prompt = " " * 3_000_000 + "x"
    answer(model, gpt2_encoding(), prompt, arguments, generator=None)
    assert len(asked[0]) >= 4096
    assert prompt.endswith(gpt2_encoding().decode(asked[0]))


def test_help_does_not_wait_for_torch():
    result = run("-X", "importtime", "sample.py", "--help")
    assert "argparse" in result.err
    assert "torch" not in result.err


@pytest.mark.parametrize(
    "words",
    [
        ["train.py", "configs/demo.toml"],
        ["sample.py", "--checkpoint", "x"],
        ["evaluate.py", "--checkpoint", "x"],
        ["bench.py", "train"],
    ],
)
def test_an_interrupt_while_a_script_imports_is_no_traceback(tmp_path, words):
    # Python looks for signals between calls: one that comes just before a long sleep waits for it.
    slow = "import time; print('importing', flush=True)\nfor _ in range(600): time.sleep(0.1)"
    (tmp_path / "torch.py").write_text(slow)
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 130


def test_the_output_can_be_cut_short_by_its_reader(trained):
    process = subprocess.Popen(
        [sys.executable, "sample.py", "--checkpoint", trained, *ENDLESS],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.read(10)
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    assert process.wait(timeout=60) == 1


def test_help_tells_that_models_of_the_hub_are_checkpoints_too(call):
    for script in ("sample", "evaluate"):
        assert "on the Hub gpt2, owner/name" in " ".join(call(script, "--help").out.split())


def test_defaults_are_those_that_help_tells():
    arguments = parse_arguments(["--checkpoint", "x"])
    assert (arguments.max_new_tokens, arguments.num_samples, arguments.temperature) == (200, 1, 0.8)


def test_an_error_stands_on_a_line_of_its_own(call, monkeypatch):
    model = find_checkpoint(str(KEPT)).make_model()
    model.ln_f.weight.data[0] = math.nan
    monkeypatch.setattr(Checkpoint, "make_model", lambda self: model)
    result = call("sample", "--checkpoint", KEPT, "--prompt", "The")
    assert (result.status, result.out) == (2, "The\n")

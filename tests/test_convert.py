"""Weights to Hugging Face and back: what transformers makes of them, what is refused, the Hub."""

from __future__ import annotations

import errno
import json
import math
import os
import shlex
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import TEXT, as_nobody, gpt2_files, run
from fake_hub import FakeHub
from safetensors.torch import load_file, save_file

import huggingface
from checkpoint import META, MODEL, find_checkpoint, newest_checkpoint
from common.errors import UserError
from convert import main, parse_arguments
from huggingface import (
    byte_characters,
    is_hub_name,
    merges_of,
    read_vocabulary,
    spelled_merges,
)
from model import GPT
from tokenizer import GPT2_SHA256, gpt2_encoding, vocabulary_of

COMMIT = "c" * 40


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The trained model as a folder for transformers."""
    import convert

    folder = tmp_path_factory.mktemp("exported")
    convert.to_hf(str(trained), folder)
    return folder


@pytest.fixture
def published(exported, tmp_path):
    """`exported` in the form that OpenAI's weights have on the Hub.

    openai-community/gpt2: names without a prefix, float masks, old settings, and a tokenizer.json
    from before its parts told their "type".
    """
    folder = tmp_path / "published"
    shutil.copytree(exported, folder)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    for key in ("dtype", "scale_attn_weights", "tie_word_embeddings", "add_cross_attention"):
        config.pop(key)
    config |= {
        "n_ctx": config["n_positions"],
        "initializer_range": 0.02,
        "summary_activation": None,
    }
    config["task_specific_params"] = {"text-generation": {"do_sample": True, "max_length": 50}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 32}')
    as_tokenizer_json(folder)
    tensors = load_file(folder / MODEL)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    for block in range(config["n_layer"]):
        tensors[f"h.{block}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
    save_file(tensors, folder / MODEL, metadata={"format": "pt"})
    return folder


@pytest.fixture
def changed(exported, tmp_path):
    """A copy of `exported`, with changes to its config: changed(n_inner=7)."""

    def change(**settings: object):
        folder = tmp_path / "changed"
        shutil.copytree(exported, folder, dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | settings))
        return folder

    return change


def model_of(path) -> GPT:
    checkpoint = find_checkpoint(str(path))
    model = GPT(checkpoint.meta.model)
    checkpoint.load_model(model)
    return model.eval()


# Transformers


def test_transformers_loads_the_model_and_its_tokenizer_as_they_are(exported, trained):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    encoding = find_checkpoint(str(trained)).encoding()
    for text in (TEXT, "x  y\n\n\n z", "日本 <|endoftext|> 🙂", " "):
        assert tokenizer(text, split_special_tokens=True)["input_ids"] == (
            encoding.encode_ordinary(text)
        )
    assert tokenizer("a<|endoftext|>")["input_ids"][-1] == encoding.eot_token
    assert tokenizer.decode(encoding.encode_ordinary(TEXT)) == TEXT
    ids = torch.tensor([encoding.encode_ordinary(TEXT)[:32]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model_of(trained)(ids), atol=1e-5, rtol=1e-5)
    assert theirs.generation_config.eos_token_id == encoding.eot_token
    assert theirs.lm_head.weight is theirs.transformer.wte.weight


def test_a_model_that_transformers_saved_is_read(call, exported, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")  # several files, an index
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    shutil.copy(exported / "vocab.json", tmp_path / "theirs")
    result = call("convert", "from-hf", tmp_path / "theirs", "--out", tmp_path / "ours")
    assert result.status == 0, result.err
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            model_of(tmp_path / "ours")(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5
        )


def test_there_and_back_changes_nothing(call, exported, trained, tmp_path):
    assert call("convert", "from-hf", exported, "--out", tmp_path / "ours").status == 0
    before, after = (find_checkpoint(str(path)) for path in (trained, tmp_path / "ours"))
    assert after.meta.tokenizer == before.meta.tokenizer
    ours, theirs = (load_file(found.path / MODEL) for found in (before, after))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    options = ("--prompt", "The quick", "--temperature", 0, "--max-new-tokens", 8)
    written = [call("sample", "--checkpoint", p, *options) for p in (trained, tmp_path / "ours")]
    assert written[0].out == written[1].out
    assert call("convert", "to-hf", tmp_path / "ours", "--out", tmp_path / "again").status == 0
    for path in exported.iterdir():
        if path.name != "config.json":  # an import has no dropout
            assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


# GPT-2's own vocabulary


def test_gpt2s_vocabulary_is_written_as_openai_published_it():
    published = (gpt2_files() / "vocab.bpe").read_text(encoding="utf-8").splitlines()
    ranks, characters = vocabulary_of(gpt2_encoding()), byte_characters()
    spelled = [
        " ".join("".join(characters[byte] for byte in part) for part in pair)
        for pair in merges_of(ranks)
    ]
    assert spelled == [line for line in published if line and not line.startswith("#version")]
    ids = json.loads((gpt2_files() / "encoder.json").read_text(encoding="utf-8"))
    ours = {"".join(characters[byte] for byte in token): ranks[token] for token in ranks}
    assert ids == {**ours, "<|endoftext|>": 50_256}


def test_a_folder_without_vocabulary_is_taken_for_gpt2s(call, tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).save_pretrained(tmp_path / "a")
    assert call("convert", "from-hf", tmp_path / "a", "--out", tmp_path / "b").status == 0
    assert find_checkpoint(str(tmp_path / "b")).meta.tokenizer.sha256 == GPT2_SHA256


def as_tokenizer_json(folder: Path, **changes: object) -> None:
    """Add vocab.json and merges.txt once more as openai-community/gpt2 has them, tokenizer.json."""
    vocabulary = json.loads((folder / "vocab.json").read_text())
    merges = (folder / "merges.txt").read_text().splitlines()[1:]
    end = {"id": len(vocabulary) - 1, "special": True, "content": "<|endoftext|>"}
    by_byte = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**end, "single_word": False, "lstrip": False, "normalized": True}],
        "normalizer": None,
        "pre_tokenizer": {**by_byte, "add_prefix_space": False},
        "post_processor": {**by_byte, "trim_offsets": False},
        "decoder": by_byte,
        "model": {
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
    for key, value in changes.items():
        content[key] = {**content[key], **value} if content[key] and value else value
    (folder / "tokenizer.json").write_text(json.dumps(content))


def in_newer_form(folder: Path) -> None:
    """Add tokenizer.json as transformers 5 writes it: its model's type told, merges as pairs."""
    merges = [line.split(" ") for line in (folder / "merges.txt").read_text().splitlines()[1:]]
    as_tokenizer_json(folder, model={"type": "BPE", "merges": merges, "ignore_merges": False})


@pytest.mark.parametrize("write", [as_tokenizer_json, in_newer_form])
def test_a_vocabulary_is_read_from_tokenizer_json_too(call, changed, trained, tmp_path, write):
    folder, out = changed(), tmp_path / "out"
    write(folder)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    assert call("convert", "from-hf", folder, "--out", out).status == 0
    expected = find_checkpoint(str(trained)).meta.tokenizer
    assert find_checkpoint(str(out)).meta.tokenizer == expected


def test_weights_are_read_as_openai_published_them(call, published, trained, tmp_path):
    result = call("convert", "from-hf", published, "--out", tmp_path / "out")
    assert result.status == 0, result.err
    before, after = (find_checkpoint(str(path)) for path in (trained, tmp_path / "out"))
    assert after.meta.tokenizer == before.meta.tokenizer
    ours, theirs = (load_file(found.path / MODEL) for found in (before, after))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_is_not_taken_for_a_folder_of_transformers(call, trained, tmp_path):
    for ours in (find_checkpoint(str(trained)).path, trained):
        error = call("convert", "from-hf", ours, "--out", tmp_path / "out").error()
        assert f"{ours} is a checkpoint already: to-hf goes the other way" in error


def test_vocabularies_that_do_not_agree_are_one_line(call, changed, tmp_path):
    folder = changed()

    def complaint() -> str:
        return call("convert", "from-hf", folder, "--out", tmp_path / "out").error()

    as_tokenizer_json(folder, model={"vocab": []})
    assert "tokenizer.json holds no vocabulary with merges" in complaint()
    as_tokenizer_json(folder)
    whole = json.loads((folder / "tokenizer.json").read_text())
    for text in (5, None):
        added = {"added_tokens": [{"content": text, "id": 300}]}
        (folder / "tokenizer.json").write_text(json.dumps(whole | added))
        assert "tokenizer.json holds no vocabulary with merges: TypeError" in complaint()
    as_tokenizer_json(folder)
    content = (folder / "vocab.json").read_text()
    vocabulary = json.loads(content)
    vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    assert "vocab.json and tokenizer.json hold different vocabularies" in complaint()
    (folder / "vocab.json").write_text(content)
    version, first, second, *rest = (folder / "merges.txt").read_text().splitlines()
    (folder / "merges.txt").write_text("\n".join((version, second, first, *rest)))
    assert "merges.txt: its merges are not those of the vocabulary" in complaint()


def test_a_named_pipe_is_no_file_and_is_not_waited_for(changed, tmp_path):
    folder = changed()
    (folder / "merges.txt").unlink()
    os.mkfifo(folder / "merges.txt")
    result = run("convert.py", "from-hf", folder, "--out", tmp_path / "out", timeout=100)
    assert f"{folder / 'merges.txt'} is not a regular file" in result.error()


def test_without_a_vocabulary_merges_are_compared_with_gpt2s(tmp_path):
    merges = spelled_merges(vocabulary_of(gpt2_encoding()))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    assert len(read_vocabulary(tmp_path, 50_257)) == 50_256
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *reversed(merges)]))
    with pytest.raises(UserError, match="merges.txt: its merges are not those"):
        read_vocabulary(tmp_path, 50_257)


def test_a_folder_to_write_into_that_cannot_be_read_is_one_line():
    with tempfile.TemporaryDirectory() as name:  # tmp_path is in a folder for root alone
        out = Path(name, "out")
        out.mkdir(mode=0o100)
        Path(name).chmod(0o755)
        with as_nobody(), pytest.raises(UserError, match="can't read .*out: Permission denied"):
            main(parse_arguments(["to-hf", "x", "--out", str(out)]))


@pytest.mark.parametrize(
    ("part", "settings", "complaint"),
    [
        (
            "normalizer",
            {"type": "Lowercase"},
            "has normalizer = {'type': 'Lowercase'}, GPT-2 has None",
        ),
        ("pre_tokenizer", None, "tokenizer.json has no pre_tokenizer"),
        ("pre_tokenizer", {"type": "Whitespace"}, "type = 'Whitespace', GPT-2 has 'ByteLevel'"),
        ("pre_tokenizer", {"add_prefix_space": True}, "add_prefix_space = True, GPT-2 has False"),
        ("pre_tokenizer", {"use_regex": False}, "use_regex = False, GPT-2 has True"),
        ("model", {"type": "Unigram"}, "tokenizer.json: its model has type = 'Unigram'"),
        ("model", {"dropout": 0.1}, "dropout = 0.1, GPT-2 has None"),
        ("model", {"ignore_merges": True}, "ignore_merges = True, GPT-2 has False"),
        ("model", {"continuing_subword_prefix": "##"}, "continuing_subword_prefix = '##'"),
        ("model", {"end_of_word_suffix": "</w>"}, "end_of_word_suffix = '</w>'"),
    ],
)
def test_a_tokenizer_that_works_in_another_way_is_one_line(
    call, changed, tmp_path, part, settings, complaint
):
    folder = changed()
    as_tokenizer_json(folder, **{part: settings})
    assert complaint in call("convert", "from-hf", folder, "--out", tmp_path / "out").error()


def test_a_tokenizer_config_that_adds_a_blank_is_one_line(call, changed, tmp_path):
    folder = changed()
    (folder / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    error = call("convert", "from-hf", folder, "--out", tmp_path / "out").error()
    assert "tokenizer_config.json has add_prefix_space = True, GPT-2 has False" in error


# What is refused


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"model_type": "llama"}, "model_type = 'llama', GPT-2 has 'gpt2'"),
        ({"activation_function": "relu"}, "activation_function = 'relu', GPT-2 has 'gelu_new'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon = 1e-06"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ({"scale_attn_weights": False}, "scale_attn_weights = False, GPT-2 has True"),
        ({"add_cross_attention": True}, "add_cross_attention = True, GPT-2 has False"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        ({"n_inner": 7}, "n_inner = 7, GPT-2 has 128"),
        ({"n_layer": 3}, "has no h.2.attn.c_attn.bias, which GPT-2 needs"),
        ({"n_layer": 1}, "has 'h.1.attn.c_attn.bias', which GPT-2 doesn't know"),
        ({"n_positions": 64}, "wpe.weight has the shape (32, 32) here"),
        ({"vocab_size": 301}, "wte.weight has the shape (300, 32) here"),
        ({"n_embd": "many"}, "n_embd = 'many', expected a whole number"),
        ({"n_head": 5}, "is no configuration of GPT-2"),
        ({"n_head": 2.0}, "n_head = 2.0, expected a whole number from 1 to"),
        ({"n_layer": True}, "n_layer = True, expected a whole number from 1 to"),
        ({"n_layer": 10**9}, "n_layer = 1000000000, expected a whole number from 1 to"),
        ({"n_positions": 10**30}, "expected a whole number from 1 to"),
        ({"n_embd": 0}, "n_embd = 0, expected a whole number from 1 to"),
        ({"model_type": "x" * 5000}, f"model_type = '{'x' * 39}, GPT-2 has 'gpt2'"),
        ({"n_inner": "x" * 5000}, f"n_inner = '{'x' * 39}, GPT-2 has 128"),
    ],
)
def test_a_model_that_is_not_gpt2s_is_one_line(call, changed, tmp_path, settings, complaint):
    result = call("convert", "from-hf", changed(**settings), "--out", tmp_path / "out")
    assert complaint in result.error()
    assert not (tmp_path / "out").exists()


def test_padding_of_the_vocabulary_is_left_out(call, changed, tmp_path):
    """It belongs to no token: what the others get is what they had, in transformers, too."""
    transformers = pytest.importorskip("transformers")
    folder, out = changed(vocab_size=320), tmp_path / "out"
    tensors = load_file(folder / MODEL)
    padding = torch.full((20, tensors["transformer.wte.weight"].size(1)), 3.0)
    tensors["transformer.wte.weight"] = torch.cat((tensors["transformer.wte.weight"], padding))
    save_file(tensors, folder / MODEL, {"format": "pt"})
    result = call("convert", "from-hf", folder, "--out", out)
    assert result.status == 0, result.err
    assert "of 320 tokens the last 20 are in no vocabulary: padding, left out" in result.err
    ids = torch.arange(12)[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        logits = model_of(out)(ids)
        torch.testing.assert_close(logits, theirs(ids).logits[..., :300], rtol=0, atol=1e-4)
    assert find_checkpoint(str(out)).meta.model.vocab_size == 300


def test_a_folder_without_a_vocabulary_has_gpt2s_padded_or_not(tmp_path):
    for size in (50_257, 50_304):  # nanoGPT's
        assert read_vocabulary(tmp_path, size) == vocabulary_of(gpt2_encoding())
    for size in (50_256, 50_400):
        with pytest.raises(UserError, match=f"has no vocab.json, and {size:,} tokens are not"):
            read_vocabulary(tmp_path, size)


def test_tensors_that_do_not_fit_are_one_line(call, changed, tmp_path):
    folder, out = changed(), tmp_path / "out"
    tensors = load_file(folder / MODEL)
    save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1}, folder / MODEL)
    error = call("convert", "from-hf", folder, "--out", out).error()
    assert "lm_head.weight differs from wte.weight" in error
    mask = torch.ones(1, 1, 32, 32, dtype=torch.bool).tril()  # as old files have it
    tied = {"lm_head.weight": tensors["transformer.wte.weight"].clone()}
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(old | tied | {"h.0.attn.bias": mask, "h.1.attn.bias": mask.clone()}, folder / MODEL)
    assert call("convert", "from-hf", folder, "--out", out).status == 0
    assert torch.equal(load_file(out / MODEL)["wte.weight"], tied["lm_head.weight"])
    save_file({**{n: t for n, t in old.items() if n != "wte.weight"}, **tied}, folder / MODEL)
    assert call("convert", "from-hf", folder, "--out", tmp_path / "head").status == 0
    assert torch.equal(
        load_file(tmp_path / "head" / MODEL)["wte.weight"], tied["lm_head.weight"]
    )  # as safetensors.torch.save_model leaves it
    save_file({name: tensor.half() for name, tensor in tensors.items()}, folder / MODEL)
    assert call("convert", "from-hf", folder, "--out", tmp_path / "half").status == 0
    assert load_file(tmp_path / "half" / MODEL)["wte.weight"].dtype == torch.float32


def test_files_that_are_not_there_or_damaged_are_one_line(call, changed, tmp_path):
    folder, out = changed(), tmp_path / "out"
    vocabulary = json.loads((folder / "vocab.json").read_text())

    def complaint() -> str:
        return call("convert", "from-hf", folder, "--out", out).error()

    (folder / "vocab.json").write_text(json.dumps({**vocabulary, "<|endoftext|>": 0}))
    assert "expected the ids 0 to 299, or fewer, <|endoftext|> as the last" in complaint()
    (folder / "vocab.json").unlink()
    assert "has no vocab.json, and 300 tokens are not GPT-2's" in complaint()
    (folder / MODEL).write_bytes(b"no")
    assert "is no safetensors file" in complaint()
    (folder / MODEL).rename(folder / "pytorch_model.bin")
    assert "only safetensors are read" in complaint()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}')
    assert "names the file '../b', expected a plain name" in complaint()
    (folder / "config.json").write_text("{")
    assert "can't read" in complaint()
    assert "expected gpt2, gpt2-medium" in (
        call("convert", "from-hf", tmp_path / "nowhere", "--out", out).error()
    )


def in_two_files(folder: Path, in_both: tuple[str, ...] = ()) -> tuple[str, str]:
    """Turn model.safetensors into two files, as large models are kept, and return their names."""
    tensors = load_file(folder / MODEL)
    (folder / MODEL).unlink()
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    weight_map = {name: files[number % 2] for number, name in enumerate(tensors)}
    for file in files:
        mine = [name for name in tensors if weight_map[name] == file or name in in_both]
        save_file({name: tensors[name] for name in mine}, folder / file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    return files


def test_a_tensor_that_two_files_have_is_one_line(call, changed, tmp_path):
    folder, out = changed(), tmp_path / "out"
    _, second = in_two_files(folder, in_both=("transformer.ln_f.bias",))
    error = call("convert", "from-hf", folder, "--out", out).error()
    assert f"{second!r} has 'transformer.ln_f.bias', which a file before it has" in error


@pytest.mark.parametrize("weight_map", ["absent", None, [], {"a": 1}, {}])
def test_an_index_that_is_none_is_one_line(call, changed, tmp_path, weight_map):
    folder = changed()
    (folder / MODEL).unlink()
    index = {} if weight_map == "absent" else {"weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    error = call("convert", "from-hf", folder, "--out", tmp_path / "out").error()
    assert 'expected a "weight_map" of tensors to files' in error


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("", "names the file '', expected a plain name"),
        ("..", "names the file '..', expected a plain name"),
        ("\ud800", r"has no '\ud800'"),
        ("a\nb", r"has no 'a\nb': model.safetensors.index.json names it"),
        ("a" * 5000, f"has no '{'a' * 79}: model.safetensors.index.json names it"),
    ],
)
def test_a_file_that_an_index_cannot_mean_is_one_line(call, changed, tmp_path, name, complaint):
    folder = changed()
    (folder / MODEL).unlink()
    index = {"weight_map": {"wte.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    error = call("convert", "from-hf", folder, "--out", tmp_path / "out").error()
    assert complaint in error
    assert len(error) < 400


def test_a_folder_in_the_place_of_weights_is_one_line(call, changed, tmp_path):
    folder = changed()
    (folder / MODEL).unlink()
    (folder / MODEL).mkdir()
    error = call("convert", "from-hf", folder, "--out", tmp_path / "out").error()
    assert f"{folder}: 'model.safetensors' is not a file, expected one of weights" in error


DEEP = '{"a": ' + "[" * 100_000


@pytest.mark.parametrize(
    "name",
    ["config.json", "vocab.json", "tokenizer.json", "model.safetensors.index.json"],
)
def test_a_file_that_is_nested_too_deeply_is_one_line(call, changed, tmp_path, name):
    folder = changed()
    if "index" in name:
        (folder / MODEL).unlink()
    (folder / name).write_text(DEEP)
    error = call("convert", "from-hf", folder, "--out", tmp_path / "out").error()
    assert f"can't read {folder / name}: it is nested too deeply" in error


def renamed(vocabulary: dict, old: str, new: str) -> dict:
    return {new if token == old else token: number for token, number in vocabulary.items()}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda ids: ids | {"!": "0"}, "expected the ids 0 to 299"),
        (lambda ids: ids | {"!": float(ids["!"])}, "expected the ids 0 to 299"),
        (lambda ids: ids | {"!": None}, "expected the ids 0 to 299"),
        (lambda ids: renamed(ids, "!", "!!"), "has no token for the byte 33"),
        (lambda ids: renamed(ids, next(t for t in ids if len(t) > 1), ""), "an empty token"),
        (lambda ids: renamed(ids, next(t for t in ids if len(t) > 1), "zqxj"), "'zqxj' is a token"),
    ],
)
def test_a_vocabulary_that_is_none_is_one_line(call, changed, tmp_path, change, complaint):
    folder = changed()
    ids = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(change(ids)))
    assert complaint in call("convert", "from-hf", folder, "--out", tmp_path / "out").error()


@pytest.mark.parametrize(
    ("name", "tensor", "complaint"),
    [
        ("transformer.ln_f.bias", torch.zeros(32, dtype=torch.int64), "is of torch.int64"),
        ("transformer.ln_f.bias", torch.full((32,), math.nan), "'ln_f.bias' holds numbers that"),
        ("transformer.ln_f.bias", torch.full((32,), math.inf), "'ln_f.bias' holds numbers that"),
        ("ln_f.bias", torch.zeros(32), "'ln_f.bias' twice, with and without"),
        ("a\nb", torch.zeros(32), r"has 'a\nb', which GPT-2 doesn't know"),
        ("a\nb", torch.full((32,), math.inf), r"'a\nb' holds numbers that are not finite"),
        ("a\nb", torch.zeros(32, dtype=torch.int64), r"'a\nb' is of torch.int64"),
        ("transformer.h.0.mlp.c_fc.weight", torch.zeros(2, 3, 4), "has the shape (2, 3, 4)"),
    ],
)
def test_a_tensor_that_is_none_is_one_line(call, changed, tmp_path, name, tensor, complaint):
    folder = changed()
    save_file(load_file(folder / MODEL) | {name: tensor}, folder / MODEL)
    assert complaint in call("convert", "from-hf", folder, "--out", tmp_path / "out").error()


@pytest.mark.parametrize("way", ["from-hf", "to-hf"])
def test_what_cannot_be_written_leaves_nothing(call, exported, trained, tmp_path, monkeypatch, way):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    source = exported if way == "from-hf" else trained
    (tmp_path / "file").touch()
    error = call("convert", way, source, "--out", tmp_path / "file" / "out").error()
    assert "can't write" in error
    for last in ("huggingface.write_meta", "convert.write_tokenizer"):
        monkeypatch.setattr(last, full)
    error = call("convert", way, source, "--out", tmp_path / "out").error()
    assert "No space left on device" in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_empty_folder_is_filled_where_it_is(call, exported, trained, tmp_path, monkeypatch):
    """It may be a disk's, or behind a link: no other can take its place."""
    replace = Path.replace

    def disks(path: Path) -> list[Path]:
        return [folder for folder in path.resolve().parents if folder.name.endswith(" disk")]

    def within_a_disk(path: Path, target: Path) -> Path:
        if disks(path) != disks(target):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        moved.append(target.name)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", within_a_disk)
    for way, source, file in (("from-hf", exported, META), ("to-hf", trained, "config.json")):
        moved = []
        (tmp_path / f"{way} disk").mkdir()
        (tmp_path / way).symlink_to(tmp_path / f"{way} disk")
        assert call("convert", way, source, "--out", tmp_path / way).status == 0
        found = [path.name for path in (tmp_path / f"{way} disk").iterdir()]
        assert file in found and MODEL in found
        assert not any(name.startswith(".") for name in found)
        assert moved[-1] == file  # whoever is stopped before leaves no model that looks whole


def test_nothing_is_overwritten(call, exported, trained, tmp_path):
    (tmp_path / "file").touch()
    for way, source in (("from-hf", exported), ("to-hf", trained)):
        result = call("convert", way, source, "--out", tmp_path)
        assert "is there already: choose another folder" in result.error()


# The Hub


@pytest.fixture
def hub(published, tmp_path, monkeypatch):
    """A Hub with the exported model, in the form of openai-community/gpt2."""
    files = {path.name: path.read_bytes() for path in published.iterdir()}
    files |= {"README.md": b"about", "pytorch_model.bin": b"a pickle", "onnx/model.onnx": b"large"}
    hub = FakeHub("openai-community/gpt2", {COMMIT: files}, kind="models")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return hub


def sampled(on_hub, hub, name="gpt2"):
    options = ("--prompt", "The quick", "--temperature", 0, "--max-new-tokens", 8)
    return on_hub(hub, "sample.py", "--checkpoint", name, *options)


def test_a_model_on_the_hub_is_a_checkpoint(call, hub, on_hub, trained):
    options = ("--prompt", "The quick", "--temperature", 0, "--max-new-tokens", 8)
    expected = call("sample", "--checkpoint", trained, *options).out
    assert sampled(on_hub, hub).out == expected
    fetched = [line for line in hub.asked if line.startswith("GET") and "/resolve/" in line]
    assert {line.rsplit("/", 1)[1] for line in fetched} == {
        "config.json",
        "vocab.json",
        "merges.txt",
        "tokenizer.json",
        "tokenizer_config.json",
        MODEL,
    }
    (kept,) = Path(os.environ["XDG_CACHE_HOME"]).rglob(MODEL)
    written = kept.stat().st_mtime_ns
    hub.asked.clear()
    hub.commits["b" * 40] = {"config.json": b"later and worse"}
    assert sampled(on_hub, hub, f"openai-community/gpt2@{COMMIT}").out == expected
    assert kept.stat().st_mtime_ns == written  # converted once
    assert not [line for line in hub.asked if line.startswith("GET") and "/resolve/" in line]


def test_a_model_in_several_files_comes_from_the_hub(call, hub, on_hub, changed, trained):
    folder = changed()
    files = in_two_files(folder)
    hub.commits[COMMIT] = {path.name: path.read_bytes() for path in folder.iterdir()}
    options = ("--prompt", "The quick", "--temperature", 0, "--max-new-tokens", 8)
    assert sampled(on_hub, hub).out == call("sample", "--checkpoint", trained, *options).out
    assert {f"GET /{hub.name}/resolve/{COMMIT}/{file}" for file in files} <= set(hub.asked)


def test_a_model_of_the_hub_is_evaluated(call, hub, on_hub, trained, shards):
    words = ("--data", shards, "--tokens", 512)
    theirs = on_hub(hub, "evaluate.py", "--checkpoint", "gpt2", *words).out.splitlines()
    assert theirs[0] == f"checkpoint      {COMMIT} of gpt2"
    ours = call("evaluate", "--checkpoint", trained, *words).out.splitlines()
    assert theirs[1:] == ours[1:]


def test_a_download_that_breaks_off_is_taken_up_again(hub, on_hub):
    expected = sampled(on_hub, hub, f"openai-community/gpt2@{COMMIT}").out
    shutil.rmtree(os.environ["HF_HOME"])
    shutil.rmtree(os.environ["XDG_CACHE_HOME"])
    hub.cut_after = 60_000
    assert sampled(on_hub, hub).out == expected
    assert hub.cut_after is None


def test_fine_tuning_begins_with_a_model_of_the_hub(hub, on_hub, tiny, shards, tmp_path):
    arguments = ("--data.dir", shards, "--train.out", tmp_path / "o", "--train.max_steps", 1)
    result = on_hub(hub, "train.py", tiny, *arguments, "--train.init_from", "gpt2")
    assert result.status == 0, result.err
    assert f"beginning with the weights of {tmp_path / 'cache'}" in result.err


def test_the_config_for_fine_tuning_trains_a_model_of_the_hub(hub, on_hub, shards, tmp_path):
    """As it stands, but for what a model that is as small as this one needs."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32}
    changes = [word for key, value in shape.items() for word in (f"--model.{key}", value)]
    changes += ["--data.dir", shards, "--train.out", tmp_path / "run", "--train.max_steps", 3]
    changes += ["--train.tokens_per_step", 512, "--train.device", "cpu", "--train.compile", "false"]
    result = on_hub(hub, "train.py", "configs/finetune.toml", *changes)
    assert result.status == 0, result.err
    assert f"beginning with the weights of {tmp_path / 'cache'}" in result.err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 3
    assert max(losses) < math.log(300) - 1  # weights from scratch begin there


def test_what_the_hub_does_not_give_is_one_line(hub, on_hub):
    assert "neither a checkpoint here nor a model on the Hub" in (
        sampled(on_hub, hub, "nobody/nothing").error()
    )
    for status in (401, 403):
        hub.gated = status
        assert "openai-community/gpt2 is gated: accept its terms" in sampled(on_hub, hub).error()


def test_without_a_network_what_was_fetched_before_still_works(hub, on_hub, monkeypatch):
    first = sampled(on_hub, hub)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert sampled(on_hub, hub).out == first.out
    assert "can't be had from the Hub" in sampled(on_hub, hub, "gpt2-medium").error()
    error = sampled(on_hub, hub, "outt/demo").error()  # a typo, most likely
    assert "there is no folder outt/demo here, and outt/demo can't be had from the Hub" in error
    monkeypatch.delenv("HF_HUB_OFFLINE")
    hub.name = "somebody/else"  # reached, but it has nothing
    assert sampled(on_hub, hub, "gpt2-medium").status == 2


def test_a_damaged_conversion_in_the_cache_is_named_with_its_folder(hub, on_hub):
    assert sampled(on_hub, hub).status == 0
    (kept,) = Path(os.environ["XDG_CACHE_HOME"]).rglob(MODEL)
    kept.write_bytes(b"damaged")
    error = sampled(on_hub, hub).error()
    assert f"{MODEL} is damaged" in error
    assert f"delete the folder {kept.parent}: gpt2 is converted again then" in error
    (kept.parent / META).unlink()
    assert f"{kept.parent} lacks its {META}: delete that folder" in sampled(on_hub, hub).error()
    shutil.rmtree(kept.parent)
    assert sampled(on_hub, hub).status == 0


def test_of_two_that_convert_the_same_model_both_have_it(tmp_path, monkeypatch, trained):
    """The other is done while this one is still at it, and already reads what it made."""
    files = tmp_path / "models--owner--name" / "snapshots" / "commit"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface, "download", lambda name: files)
    final = tmp_path / "cache" / "gpt2-from-scratch" / "models--owner--name" / "commit"

    def from_hf(folder: Path, out: Path) -> None:
        for made in (final, out):
            shutil.copytree(newest_checkpoint(trained / "checkpoints").path, made)
        (final / "theirs").touch()

    monkeypatch.setattr(huggingface, "from_hf", from_hf)
    assert huggingface.cached("owner/name") == final
    assert (final / "theirs").exists()
    assert [*final.parent.iterdir()] == [final]


def test_a_cache_that_cannot_be_written_is_one_line(hub, on_hub, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    error = sampled(on_hub, hub).error()
    assert f"can't keep gpt2 in {tmp_path}/file/gpt2-from-scratch: " in error
    assert "XDG_CACHE_HOME may name another folder" in error


def test_a_user_without_a_home_is_told_what_to_set(hub, on_hub):
    """One without a name, as containers have them."""
    nobody = "import os, sys; os.environ.pop('XDG_CACHE_HOME', 0); os.environ.pop('HOME', 0)"
    code = f"{nobody}; os.getuid = lambda: 12345; import huggingface as h; h.download = str"
    code += "\ntry: h.cached('gpt2')\nexcept h.UserError as error: print(error)"
    assert "Name a folder to keep gpt2 in: XDG_CACHE_HOME" in run("-c", code).out


@pytest.mark.parametrize("cut_after", [None, 60_000])  # dead from the start, or within a file
def test_a_hub_that_dies_is_one_line(hub, on_hub, tmp_path, cut_after):
    hub.dies, hub.cut_after = True, cut_after
    words = ("convert.py", "from-hf", "gpt2", "--out", tmp_path / "out")
    assert "openai-community/gpt2 can't be had from the Hub" in on_hub(hub, *words).error()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("gpt2", True),
        ("gpt2-xl", True),
        ("owner/name", True),
        ("owner/name@v1.0", True),
        ("tests/nothing", False),  # the folder is here, so a path is meant
        ("nowhere", False),
        ("a/b/c", False),
    ],
)
def test_a_name_of_the_hub_is_told_from_a_path(name, is_one, monkeypatch, tmp_path):
    (tmp_path / "tests").mkdir()
    monkeypatch.chdir(tmp_path)
    assert is_hub_name(name) is is_one
    (tmp_path / "gpt2").mkdir()
    assert not is_hub_name("gpt2")


LONG = "a" * 300  # a name has 255 bytes at most, a path 4,096


@pytest.mark.parametrize("name", [LONG, f"{LONG}/b", f"owner/{LONG}", "a/" * 3000, "a\0b", "a\0/b"])
def test_a_name_that_nothing_can_have_is_one_line(call, trained, tmp_path, name):
    call("sample", "--checkpoint", name).error()
    call("convert", "from-hf", name, "--out", tmp_path / "out").error()


@pytest.mark.parametrize(
    ("out", "complaint"), [(LONG, "File name too long"), ("a\0b", "embedded null")]
)
def test_a_folder_that_nothing_can_be_is_one_line(call, trained, exported, out, complaint):
    assert complaint in call("convert", "to-hf", trained, "--out", out).error()
    assert complaint in call("convert", "from-hf", exported, "--out", out).error()


def test_an_exported_model_keeps_its_dropout(exported):
    told = json.loads((exported / "config.json").read_text())
    assert [told[f"{place}_pdrop"] for place in ("embd", "attn", "resid")] == [0.1] * 3


def test_the_command_that_is_told_can_be_typed(call, exported, tmp_path):
    told = call("convert", "from-hf", exported, "--out", tmp_path / "my model").out
    assert shlex.split(told.strip())[-1] == str(tmp_path / "my model")

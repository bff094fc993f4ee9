"""Settings: what the file says, what the command line changes, and what is refused."""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict, fields

import pytest
from conftest import ROOT, SOURCES, run
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from config import (
    ELSEWHERE,
    SECTIONS,
    Config,
    LogSettings,
    TrainSettings,
    load_config,
    make_config,
    task_names,
)

CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


@pytest.fixture
def config_file(tmp_path):
    def write(text: str):
        path = tmp_path / "mine.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refused(capsys, *arguments: object) -> str:
    """The one line that load_config prints before it exits with status 2."""
    with pytest.raises(SystemExit) as stopped:
        load_config([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_the_file_changes_defaults_and_the_command_line_changes_both(config_file):
    path = config_file("[model]\nn_layer = 3\nn_head = 2\n[optim]\nlearning_rate = 1\n")
    config = load_config([str(path), "--model.n_head", "4", "--train.compile", "false"])
    assert (config.model.n_layer, config.model.n_head, config.model.n_embd) == (3, 4, 768)
    assert config.optim.learning_rate == 1.0
    assert type(config.optim.learning_rate) is float
    assert config.train.compile is False


def test_the_run_folder_is_named_after_the_config_file(config_file):
    path = config_file("")
    assert load_config([str(path)]).train.out == "out/mine"
    assert load_config([str(path), "--train.out", "x"]).train.out == "x"
    assert load_config([str(path), "--train.out", ""]).train.out == "out/mine"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_in_the_repository_is_valid_and_states_real_settings(path):
    config = load_config([str(path)])
    assert config.train.out == f"out/{path.stem}"
    for section, values in tomllib.loads(path.read_text()).items():
        for key, value in values.items():
            assert getattr(getattr(config, section), key) == value


@given(
    learning_rate=st.floats(1e-3, 10),
    out=st.text(st.characters(exclude_categories=["Cs", "Cc"])),
    compile_it=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_resolved_config_reads_back_exactly(learning_rate, out, compile_it, seed):
    values = {"train": {"out": out, "compile": compile_it, "seed": seed}}
    config = make_config({**values, "optim": {"learning_rate": learning_rate}})
    assert make_config(tomllib.loads(config.to_toml())) == config


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--model.n_layers", "3"],
            "unknown option --model.n_layers; did you mean --model.n_layer?",
        ),
        (["--modl.n_layer=3"], "did you mean --model.n_layer?"),
        (["--train.lr", "1"], "unknown option --train.lr; did you mean --optim.learning_rate?"),
        (["--eval_iters", "1"], "did you mean --log.eval_tokens?"),
        (["--batch-size", "1"], "did you mean --train.micro_batch_size?"),
        (["--compile=False"], "did you mean --train.compile?"),
        (["--train.block_size", "64"], "did you mean --model.block_size?"),
        (["--train.quickly", "1"], "unknown option --train.quickly (see --help)"),
        (["stray"], "'stray': expected one config file"),
        (["--model.n_layer", "three"], "model.n_layer = 'three': expected a whole number"),
        (
            ["--optim.learning_rate", "fast"],
            "optim.learning_rate = 'fast': expected a finite number",
        ),
        (["--optim.learning_rate", "nan"], "optim.learning_rate = nan: expected a finite number"),
        (["--train.compile", "yes"], "train.compile = 'yes': expected true or false"),
        (["--train.dtype", "int8"], "train.dtype = 'int8': expected one of auto, bfloat16"),
        (["--model.dropout", "1"], "model.dropout = 1.0: expected less than 1"),
        (["--model.n_layer", "0"], "model.n_layer = 0: expected 1 or more"),
        (["--optim.learning_rate", "1e999"], "optim.learning_rate = inf: expected a finite number"),
        (["--model.n_embd", "1" + "0" * 20], "expected less than 2147483648"),
        (["--model.n_head", "5"], "n_embd = 768 is not a multiple of model.n_head = 5"),
        (["--optim.min_learning_rate", "1"], "is above optim.learning_rate = 0.0006"),
        (
            "--optim.name muon --optim.learning_rate 1e-310 --optim.min_learning_rate 0".split(),
            "optim.learning_rate = 1e-310: optim.matrix_learning_rate rises and falls in",
        ),
        (["--data.dir", ""], "data.dir is empty: name a folder of token shards"),
        (
            "--train.save_best true --log.eval_every 0".split(),
            "train.save_best = true needs validations: set log.eval_every",
        ),
        (["--model.n_layer"], "expected one argument"),
    ],
)
def test_a_wrong_command_line_is_one_line_that_names_it(config_file, capsys, arguments, expected):
    assert expected in refused(capsys, config_file(""), *arguments)


def test_other_peoples_names_stand_for_settings_that_there_are():
    for name in ELSEWHERE.values():
        section, key = name.split(".")
        assert key in [item.name for item in fields(SECTIONS[section])]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[modle]\n", "unknown section [modle]; did you mean model?"),
        ("[model]\nn_heads = 3\n", "unknown setting model.n_heads; did you mean model.n_head?"),
        ("[optim]\nlr = 1\n", "unknown setting optim.lr; did you mean optim.learning_rate?"),
        ("[train]\nn_layer = 1\n", "did you mean model.n_layer?"),
        ("[data]\nzzz = 3\n", "unknown setting data.zzz; known are dir"),
        ("train = 3\n", "train = 3 stands outside of a section"),
        ("n_layer = 3\n", "n_layer = 3 stands outside of a section"),
        ('[model]\nn_layer = "3"\n', "model.n_layer = '3': expected a whole number"),
        ("[model]\nn_layer = true\n", "model.n_layer = True: expected a whole number"),
        ("[model]\nn_layer = 1.5\n", "model.n_layer = 1.5: expected a whole number"),
        ("[train]\nout = 0\n", "train.out = 0: expected text"),
        ("[model\n", "is not TOML"),
        ("import os\nos.system('echo')\n", "is not TOML"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(config_file, capsys, text, expected):
    assert expected in refused(capsys, config_file(text))


def test_a_missing_file_or_none_at_all_is_one_line(capsys, tmp_path):
    assert "can't read the config" in refused(capsys, tmp_path / "nowhere.toml")
    assert "the following arguments are required: config" in refused(capsys)


def test_help_lists_every_setting_with_its_default_and_meaning():
    text = " ".join(run("train.py", "--help").out.split())
    for section, cls in SECTIONS.items():
        for item in fields(cls):
            assert f"--{section}.{item.name}" in text
            meaning = f"{item.metadata['meaning']} [{json.dumps(item.default)}]"
            assert meaning in text, (section, item.name)


def test_help_and_typos_are_answered_before_torch_is_imported():
    for arguments in (["--help"], ["configs/demo.toml", "--model.n_layers", "3"]):
        result = run("-X", "importtime", "train.py", *arguments)
        assert "argparse" in result.err
        assert "torch" not in result.err


def test_every_setting_is_read_somewhere():
    source = "".join(path.read_text() for name, path in SOURCES.items() if name != "config")
    for cls in SECTIONS.values():
        for item in fields(cls):
            assert f".{item.name}" in source or cls.__name__ == "ModelSettings", item.name


def test_settings_are_frozen():
    with pytest.raises(AttributeError):
        Config().train.seed = 3  # type: ignore[misc]


def test_make_config_leaves_what_is_not_given_at_its_default():
    config = make_config({"log": {"eval_every": 7}})
    assert config.log == LogSettings(eval_every=7)
    assert config.train == TrainSettings()
    assert asdict(config)["model"]["n_embd"] == 768
    with pytest.raises(UserError):
        make_config({"log": {"eval_every": -1}})


def test_a_mark_of_the_byte_order_is_no_part_of_a_config(tmp_path):
    path = tmp_path / "a.toml"
    path.write_bytes(b"\xef\xbb\xbf[train]\nseed = 7\n")
    assert load_config([str(path)]).train.seed == 7


def test_text_that_toml_cannot_hold_as_it_is_comes_back_or_is_refused(tmp_path):
    path = tmp_path / "a.toml"
    odd = make_config({"train": {"out": 'a\x7f"\\\n\té'}})
    path.write_text(odd.to_toml(), encoding="utf-8")
    assert load_config([str(path)]) == odd
    for name in ("a\udcff", "a\0b"):  # nor can a file have the second as its name
        with pytest.raises(
            UserError, match="data.dir = .*: expected text in UTF-8 without zero bytes"
        ):
            make_config({"data": {"dir": name}})


def test_names_of_tasks_may_have_blanks_and_come_once():
    assert task_names(" lambada , hellaswag,lambada,") == ["lambada", "hellaswag"]

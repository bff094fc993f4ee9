"""README: its commands parse, its files and links exist, its numbers are as measured."""

from __future__ import annotations

import importlib
import json
import re
import shlex

import pytest
import torch
from conftest import ROOT

from config import load_config
from model import GPT, GPTConfig

README = (ROOT / "README.md").read_text(encoding="utf-8")
DEMO = json.loads((ROOT / "results" / "demo.json").read_text(encoding="utf-8"))


def commands() -> list[str]:
    """Every line of README's shell blocks that is no comment."""
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("command", commands())
def test_every_command_is_one_that_the_scripts_understand(command):
    words = shlex.split(command)
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
        return
    script = next(word for word in words if word.endswith(".py"))
    assert words[0] == "torchrun" or words.index(script) == 1
    arguments = words[words.index(script) + 1 :]
    module = importlib.import_module(script.removesuffix(".py"))
    if script == "train.py":
        config = load_config([str(ROOT / arguments[0]), *arguments[1:]])
        world_size = processes(words[: words.index(script)])
        unit = config.model.block_size * config.train.micro_batch_size * world_size
        assert config.train.tokens_per_step % unit == 0
    else:
        module.parse_arguments(arguments)


def processes(torchrun: list[str]) -> int:
    """How many processes a torchrun command line starts; checks that torchrun would take it."""
    if torchrun == ["python"]:
        return 1
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args([*torchrun[1:], "train.py"])
    return int(parsed.nnodes.split(":")[-1]) * int(parsed.nproc_per_node)


def test_every_file_that_is_linked_exists():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert "model.py" in links
    for link in links:
        assert (ROOT / link).exists(), link


def test_every_source_file_is_listed_and_every_reference_defined():
    for path in ROOT.glob("*.py"):
        assert f"[`{path.name}`]({path.name})" in README
    for name in re.findall(r"\]\[(\w+)\]", README):
        assert f"\n[{name}]: https://" in README


def test_the_numbers_of_the_demo_are_those_that_were_measured():
    for key in ("bits_per_byte", "xz_bits_per_byte"):
        assert f"{DEMO[key]:.2f}" in README
    assert f"bits per byte   {DEMO['bits_per_byte']:.3f}" in README
    assert f"xz -9e          {DEMO['xz_bits_per_byte']:.3f}" in README
    assert f"{DEMO['parameters']:,} parameters" in README
    assert f"from {DEMO['training_text_mb']} MB of text" in README
    assert f"took {DEMO['total_seconds']} seconds on two cores, {DEMO['training_seconds']} of" in (
        " ".join(README.split())
    )


def test_the_plan_for_more_gpus_is_what_bench_prints(call):
    (command,) = (line for line in commands() if line.startswith("python bench.py plan"))
    assert f"```text\n{call('bench', *command.split()[2:]).out}```" in README


def test_the_closing_line_of_the_tests_is_one_that_was_seen():
    seen = json.loads((ROOT / "results" / "tests.json").read_text(encoding="utf-8"))
    assert f"```text\n{seen['closing_line']}\n```" in README


def test_the_table_of_sizes_is_what_the_configs_build():
    rows = re.findall(r"\| \[`(\w+\.toml)`\].*\| (\d+) · (\d+) · (\d+) \| ([\d,]+) \|", README)
    assert {name for name, *_ in rows} == {path.name for path in ROOT.glob("configs/*.toml")}
    for name, *shape, parameters in rows:
        model = load_config([str(ROOT / "configs" / name)]).model
        assert [model.n_layer, model.n_head, model.n_embd] == [int(number) for number in shape]
        vocabulary = 2048 if name == "demo.toml" else 50_257
        with torch.device("meta"):
            config = GPTConfig(
                vocabulary, model.block_size, model.n_layer, model.n_head, model.n_embd
            )
            assert GPT(config).num_parameters() == int(parameters.replace(",", ""))


def test_nothing_is_left_to_do_and_no_section_is_empty():
    assert not re.search(r"TODO|FIXME|@@|Ã|â€", README)
    sections = re.split(r"^#+ .*$", README, flags=re.MULTILINE)[1:]
    assert all(section.strip() for section in sections)

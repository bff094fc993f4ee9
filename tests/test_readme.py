"""README: its code is the source's, its commands run, its links resolve, its numbers hold."""

from __future__ import annotations

import ast
import importlib
import itertools
import json
import math
import re
import runpy
import shlex
import shutil
import statistics
import sys
import textwrap
from code import InteractiveConsole
from dataclasses import asdict, replace

import pytest
import torch
from conftest import ROOT, SOURCES, Result, run
from test_pretokenized import published
from test_tasks import hellaswag_hub

from benchmarks.trials import Found, Row, load_found, rows_of, shares
from benchmarks.turns import ratios
from config import Config, load_config
from model import GPT, GPTConfig
from tokenizer import gpt2_encoding
from training.plan import estimated_memory
from visuals import KEPT, diagrams
from visuals.story import attention_rows, chapters, load_story

README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXT = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)  # without the code
PROSE = " ".join(TEXT.split())
MEASURED = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
MEASURED_PROSE = " ".join(MEASURED.split())
DEMO = json.loads((ROOT / "results" / "demo.json").read_text(encoding="utf-8"))
KEPT_LOSS = json.loads((ROOT / "results" / "kept_model.json").read_text(encoding="utf-8"))
COUNTS = json.loads((ROOT / "results" / "counting.json").read_text(encoding="utf-8"))
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
EXCERPT = re.compile(r"# ([\w/]+\.py) · ([\w.]+)(, in part)?\n")


# Code


def excerpts() -> list[tuple[str, str, bool, str]]:
    """The (file, name, whether in part, code) of every block that names its source."""
    code = [block for language, block in BLOCKS if language == "python"]
    named = [(EXCERPT.match(block), block) for block in code]
    return [(m[1], m[2], bool(m[3]), block[m.end() :]) for m, block in named if m]


def source_of(path: str, name: str) -> str:
    """A function or class of the source, dedented and without its docstring."""
    text = (ROOT / path).read_text(encoding="utf-8")
    node = ast.parse(text)
    for part in name.split("."):
        (node,) = (child for child in node.body if getattr(child, "name", None) == part)
    lines = text.splitlines(keepends=True)
    keep = [*range(node.lineno - 1, node.end_lineno)]
    if ast.get_docstring(node) is not None:
        docstring = node.body[0]
        keep = [at for at in keep if not docstring.lineno - 1 <= at < docstring.end_lineno]
    return textwrap.dedent("".join(lines[at] for at in keep))


@pytest.mark.parametrize(("path", "name", "in_part", "code"), excerpts())
def test_every_excerpt_is_the_source_that_it_names(path, name, in_part, code):
    source = source_of(path, name)
    if in_part:
        lines = [line.strip() for line in source.splitlines()]
        shown = [line.strip() for line in code.splitlines()]
        assert any(lines[at : at + len(shown)] == shown for at in range(len(lines)))
    else:
        assert code == source


def snippets() -> list[tuple[str, str]]:
    """Every python block that names no source, with the text block behind it."""
    pairs = zip(BLOCKS, [*BLOCKS[1:], ("", "")])
    return [
        (code, shown if kind == "text" else "")
        for (language, code), (kind, shown) in pairs
        if language == "python" and not EXCERPT.match(code)
    ]


@pytest.fixture
def variables(tmp_path):
    """Run a snippet; its variables: variables(code)."""

    def run_snippet(code: str) -> dict[str, object]:
        path = tmp_path / "snippet.py"
        path.write_text(code, encoding="utf-8")
        try:
            return runpy.run_path(str(path))
        finally:
            torch.set_printoptions(profile="default")

    return run_snippet


@pytest.mark.parametrize(("code", "shown"), snippets())
def test_every_snippet_prints_what_is_shown_where_it_is_pasted(code, shown, monkeypatch, capsys):
    """Python reads what is typed line by line: a block ends with an empty one, and not before."""
    monkeypatch.setattr(sys, "displayhook", lambda value: None)  # it tells what they return, too
    console = InteractiveConsole({"__name__": "__main__"})
    try:
        for line in [*code.splitlines(), ""]:
            console.push(line)
    finally:
        torch.set_printoptions(profile="default")
    found = capsys.readouterr()
    assert (found.out, found.err) == (shown, "")


def test_the_words_that_are_counted_are_as_many_as_the_exercise_says(variables):
    (code,) = (code for code, _ in snippets() if "followers" in code)
    assert len(variables(code)["text"]) == 13
    assert "With the thirteen words above" in PROSE


def test_the_picture_of_the_mask_has_the_numbers_of_the_text(variables):
    (code,) = (code for code, _ in snippets() if "attention_written_out" in code)
    numbers = variables(code)
    assert numbers["q"].tolist() == diagrams.HAND_QUERIES
    assert numbers["k"].tolist() == diagrams.HAND_KEYS
    assert f"# {' '.join(diagrams.HAND_TOKENS)}\n" in code


# Commands


def commands() -> list[str]:
    """Every line of README's shell blocks that is no comment."""
    lines = [line for language, block in BLOCKS if language == "sh" for line in block.splitlines()]
    return [line for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("command", commands())
def test_every_command_is_one_that_the_scripts_understand(command):
    words = shlex.split(command)
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
        return
    if words[:3] == ["pip", "install", "-r"]:
        assert (ROOT / words[3]).exists()
        return
    if words[:2] == ["python", "-m"]:
        importlib.import_module(words[2]).parse_arguments(words[3:])
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


def quick() -> list[str]:
    """The commands that need only a model. The interactive one: tests/test_sample.py; the others
    that are left out are tried further down.
    """
    scripts = ("sample.py", "python -m visuals", "evaluate.py")
    more = ("--interactive", "--checkpoint gpt2", "--data ", "out/and_back", "torchrun")
    return [
        command
        for command in commands()
        if any(script in command for script in scripts)
        and not any(word in command for word in more)
    ]


@pytest.mark.parametrize("command", quick())
def test_what_needs_only_a_model_runs(command, call, trained, shards, tmp_path, monkeypatch):
    """With the tests' model in the place of the demo's, and the one that is kept."""
    words = shlex.split(command)
    start = 3 if words[1] == "-m" else 2
    module = words[2] if words[1] == "-m" else words[1].removesuffix(".py")
    shutil.copytree(trained, tmp_path / "out" / "demo")
    shutil.copytree(KEPT, tmp_path / "visuals" / "model")
    shutil.copytree(ROOT / "tests" / "items", tmp_path / "tests" / "items")
    shutil.copy(ROOT / "LICENSE", tmp_path)
    monkeypatch.chdir(tmp_path)
    result = call(module, *words[start:])
    assert result.status == 0, result
    assert result.out


def told(call, command: str) -> Result:
    """What a python command line prints, if it ends well."""
    _, script, *arguments = shlex.split(command)
    result = call(script.removesuffix(".py"), *arguments)
    assert result.status == 0, result.err
    return result


def test_converting_as_the_page_says(call, tmp_path, monkeypatch):
    """But for the validation, whose text takes minutes to prepare: it is the demo's."""
    shutil.copytree(KEPT, tmp_path / "visuals" / "model")
    shutil.copytree(ROOT / "tests" / "items", tmp_path / "tests" / "items")
    monkeypatch.chdir(tmp_path)
    here = [c for c in commands() if "out/for_transformers" in c or "out/and_back" in c]
    printed = [told(call, c).out if "--data data/demo" not in c else "{demo}" for c in here]
    (demo,) = (block for _, block in BLOCKS if block.startswith("step 1,500: validation loss"))
    (table,) = re.findall(r"^validation .*?same text\n", demo, re.DOTALL | re.MULTILINE)
    table = table.replace(str(DEMO["validation_loss"]), str(KEPT_LOSS["validation_loss"]))
    head = "checkpoint      and_back of out/and_back\n"
    assert f"```text\n{''.join(printed).format(demo=head + table)}```" in README


LINES = re.compile("beginning with|step .*: validation loss|done: ")  # of a training


def form(text: str) -> str:
    """The text without its numbers and paths."""
    return re.sub(r"\S*(?:\d|/)\S*", "#", text)


def test_fetching_tokenised_text_as_the_page_says(on_hub, tmp_path):
    (command,) = (c for c in commands() if "--pretokenized" in c)
    words = shlex.split(command)
    folder = words[-1]
    words[-1] = str(tmp_path / "fetched")
    result = on_hub(published(), *words[1:])
    assert result.status == 0, result.err
    (shown,) = (block for _, block in BLOCKS if block.startswith(f"{folder}: "))
    assert result.err.splitlines()[-1].replace(words[-1], folder) == shown.splitlines()[0]


def test_preparing_and_training_as_the_page_says(call, shards, tmp_path, monkeypatch):
    """The commands that are quick: files of one's own, fine-tuning, and a training of one step.

    Numbers aside, as they change with this page.
    """
    own = next(c for c in commands() if c.startswith("python prepare") and '"*.md"' in c)
    tuning = [c for c in commands() if "data/my_notes" in c]
    (one_step,) = (c for c in commands() if "--train.max_steps 1 " in c)
    shutil.copytree(KEPT, tmp_path / "visuals" / "model")
    shutil.copytree(shards, tmp_path / "data" / "demo")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    (ending,) = (block for _, block in BLOCKS if block.startswith("data/fineweb: "))
    assert form(told(call, own).err.splitlines()[-1]) == form(ending.splitlines()[-1])
    (shown,) = (block for _, block in BLOCKS if block.startswith("data/my_notes: "))
    prepared = told(call, tuning[0])
    tuned = told(call, f"{tuning[1]} --train.max_steps 20")  # fewer, to save time
    trained_lines = [line for line in tuned.err.splitlines() if LINES.match(line)]
    printed = [prepared.err.splitlines()[-1], *trained_lines]
    shown_lines = [line for line in shown.splitlines() if line != "[…]"]  # plan, sample
    assert [form(line) for line in printed] == [form(line) for line in shown_lines]
    for text in (shown, "\n".join(printed)):
        was, now = re.findall(r"validation loss ([\d.]+)", text)
        assert float(now) < float(was) - 0.3
    assert call("train", *shlex.split(one_step)[2:]).status == 0
    (metrics,) = (tmp_path / "out" / "one_step").glob("metrics.jsonl")
    first = json.loads(metrics.read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(300), abs=0.1)  # their vocabulary's size


def test_what_is_shown_has_the_form_of_what_is_printed(call, trained, shards, tiny, tmp_path):
    """Numbers and names aside, the plan and the evaluation are those of the scripts."""
    (plan,) = (block for _, block in BLOCKS if block.startswith("model       873,600"))
    arguments = ("--data.dir", shards, "--train.out", tmp_path / "o", "--train.max_steps", 1)
    printed = call("train", tiny, *arguments).err
    assert form(plan) in form(printed)
    (demo,) = (block for _, block in BLOCKS if block.startswith("step 1,500: validation loss"))
    table = call("evaluate", "--checkpoint", trained, "--data", shards).out
    assert form(table) in form(demo)
    last = [line for line in printed.splitlines() if line.startswith(("step ", "done: "))]
    assert form(demo).splitlines()[:2] == [form(line) for line in last[-2:]]
    options = ("--prompt", "Return a list", "--max-new-tokens", 3, "--seed", 2)
    sampled = call("sample", "--checkpoint", trained, *options, "--dtype", "float32")
    assert form(sampled.err.strip()) in form(demo).splitlines()
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in re.findall(r"^\.venv/bin/python (.*(?:\\\n.*)?)$", demo, re.MULTILINE):
        assert f"$(RUN) {command}".replace("\n\t", "\n\t\t") in makefile


def test_the_object_for_programs_is_what_is_shown(call, monkeypatch):
    (command,) = (line for line in commands() if line.endswith("--jsonl"))
    (shown,) = (block for language, block in BLOCKS if block.startswith('{"sample"'))
    monkeypatch.chdir(ROOT)
    assert call("sample", *shlex.split(command)[2:]).out == shown


# The sentence that travels through the text

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def check_shown(told: str) -> None:
    """A block begins with the first line of `told`; it has to end like it, too."""
    first = NUMBER.sub("#", told.splitlines()[0])
    (shown,) = (text for _, text in BLOCKS if NUMBER.sub("#", text.split("\n")[0]) == first)
    assert NUMBER.sub("#", shown) == NUMBER.sub("#", told)
    for ours, theirs in zip(NUMBER.findall(shown), NUMBER.findall(told)):
        last_digit = 10.0 ** -len(ours.partition(".")[2]) if "." in ours else 0
        difference = float(ours.replace(",", "")) - float(theirs.replace(",", ""))
        assert abs(difference) <= 1.01 * last_digit, (ours, theirs)


@pytest.mark.parametrize("chapter", range(6))
def test_the_story_is_what_the_kept_model_says(chapter):
    """Word for word; the last digit of a number may differ, since CPUs add in different orders."""
    check_shown(f"{chapters(load_story())[chapter]}\n")


def test_what_several_processes_find_is_kept_as_shown(tmp_path):
    (command,) = (c for c in commands() if c.startswith("torchrun") and "--output" in c)
    words = shlex.split(command)
    words[-1] = str(tmp_path / "found.json")
    result = run("-m", "torch.distributed.run", *words[1:])
    assert result.status == 0, result.err
    (shown,) = (json.loads(block) for language, block in BLOCKS if language == "json")
    found = json.loads((tmp_path / "found.json").read_text())
    for own in ("date", "torch"):
        assert shown.pop(own)
        del found[own]
    found["hardware"] = shown["hardware"]  # a GPU, if there is one
    (ours,), (theirs,) = shown.pop("results"), found.pop("results")
    assert shown == found
    for name, metric in ours.pop("metrics").items():
        assert metric == pytest.approx(theirs["metrics"][name], rel=1e-4), name
    del theirs["metrics"]
    assert ours == theirs


def test_a_run_tells_of_its_tasks_as_shown(on_hub, shards, tmp_path):
    """Numbers aside: a run of three steps instead of 1,500."""
    (command,) = (c for c in commands() if "--log.eval_tasks " in c)
    few = ("--log.eval_tasks_every", 1, "--train.max_steps", 3, "--train.device", "cpu")
    own = ("--data.dir", shards, "--train.out", tmp_path / "run", *few)
    result = on_hub(hellaswag_hub(), *shlex.split(command)[1:], *own)
    assert result.status == 0, result.err
    told = [line for line in result.err.splitlines() if ": hellaswag acc" in line]
    (shown,) = (block for _, block in BLOCKS if ": hellaswag acc" in block)
    kinds = [re.sub(r"[\d.,]+(?: ± [\d.]+)?,?", "#", line) for line in (*told, *shown.splitlines())]
    assert len(kinds) == 6
    assert len(set(kinds)) == 1


def test_the_tasks_are_shown_as_they_are_told(call, monkeypatch):
    monkeypatch.chdir(ROOT)
    kept = "python evaluate.py --checkpoint visuals/model --tasks"
    asked = [command for command in commands() if command.startswith(kept)]
    check_shown("".join(call("evaluate", *shlex.split(command)[2:]).out for command in asked))


def test_the_heads_do_what_the_text_says_of_them():
    story = load_story()
    rows = attention_rows(story.model, story.ids)
    most = {token: rows[:, :, at].argmax(dim=-1) for at, token in enumerate(story.tokens)}
    assert most[" of"][0].tolist() == [story.tokens.index(" list")] * 4
    for token, article in ((" list", " a"), (" of", " a"), (" the", " the")):
        assert most[token][1, 2] == story.tokens.index(article)


def told_of_the_kept_model() -> list[str]:
    """What the text says of its positions and of its training."""
    vectors = torch.nn.functional.normalize(load_story().model.wpe.weight.detach(), dim=-1)
    near, far = (vectors[10] @ vectors[11]).item(), (vectors[10] @ vectors[30]).item()
    lines = [json.loads(line) for line in (KEPT / "metrics.jsonl").read_text().splitlines()]
    train = [line["loss"] for line in lines if line["kind"] == "train"]
    (*_, val) = (line["loss"] for line in lines if line["kind"] == "val")
    config = load_config([str(ROOT / "configs" / "demo.toml")])
    windows = (DEMO["training_tokens"] - 1) // config.model.block_size
    epoch = windows / (config.train.tokens_per_step // config.model.block_size)  # in steps
    ends = [round(epoch), round(2 * epoch)]
    mean = [statistics.mean(train[at : at + 60]) for at in range(len(train) - 59)]
    falls = {at: mean[at - 60] - mean[at] for at in range(450, len(mean))}
    for end in ends:
        assert falls.pop(end) > 0.14
    assert max(fall for at, fall in falls.items() if min(abs(at - end) for end in ends) > 60) < 0.11
    return [
        f"The mean drops after steps {ends[0]} and {ends[1]:,}, where the text begins anew",
        f"10 is hardly more like 11 ({near:.2f}) than like 30 ({far:.2f})",
        f"it is {val:.2f} against {sum(train[-100:]) / 100:.2f}, the mean of the last",
    ]


def test_the_positions_and_the_curve_are_as_the_text_says():
    for told in told_of_the_kept_model():
        assert told in PROSE, told
    val = json.loads((KEPT / "metrics.jsonl").read_text().splitlines()[-1])
    assert (val["kind"], f"{val['loss']:.4f}") == ("val", str(DEMO["validation_loss"]))


# Links and headings


def headings() -> list[str]:
    """The headings, without the comments in code that look like some."""
    return re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)


def anchors() -> list[str]:
    """The headings as GitHub makes links of them."""
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings()]


def test_every_file_that_is_linked_exists():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert "model.py" in links
    for link in links:
        assert (ROOT / link).exists(), link


def test_every_heading_that_is_linked_exists_once():
    links = re.findall(r"\]\(#([^)]+)\)", README)
    assert len(links) > 30
    assert len(set(anchors())) == len(anchors())
    assert set(links) <= set(anchors())


def test_every_figure_is_shown_with_a_text_in_its_place():
    shown = dict(re.findall(r"!\[([^\]]+)\]\(visuals/([^)]+)\)", README))
    kept = {path.name for path in (ROOT / "visuals").iterdir() if path.suffix in (".png", ".gif")}
    assert set(shown.values()) == kept
    assert all(len(text) > 20 for text in shown)


def test_docstrings_that_name_a_section_name_one_that_exists():
    named = []
    for path in (*SOURCES.values(), *ROOT.glob("visuals/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = " ".join((ast.get_docstring(node) or "").split())
                named += re.findall(r'README, "([^"]+)"', text)
    assert len(named) >= 5
    assert set(named) <= set(headings())


def names_of_the_code() -> set[str]:
    """What the modules define, as `name` and `Class.name`."""
    names = set()
    for path in SOURCES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                names.add(node.name)
            if isinstance(node, ast.ClassDef):
                members = [child for child in node.body if isinstance(child, ast.FunctionDef)]
                names |= {f"{node.name}.{member.name}" for member in members}
    return names


def test_every_name_in_the_text_is_one_of_the_code():
    """Of classes and functions, settings and files; names of PyTorch's have its module before."""
    codes, known = set(re.findall(r"`([^`\n]+)`", TEXT)), names_of_the_code()
    settings = {
        f"{section}.{key}" for section, values in asdict(Config()).items() for key in values
    }
    sections = {setting.split(".")[0] for setting in settings}
    checked = 0
    for code in codes:
        name = code.removeprefix("--").split(" ")[0].rstrip("/")
        if re.fullmatch(r"[\w/]+\.(py|toml|json|md)", name) and "metrics" not in name:
            assert (ROOT / name).exists() or (ROOT / "configs" / name).exists(), code
        elif name.split(".")[0] in sections and "." in name:
            assert name in settings, code
        elif re.fullmatch(r"[A-Z]\w+(\.\w+)?", name) and not name.isupper() and name[1:2].islower():
            assert name in known, code
        else:
            continue
        checked += 1
    assert checked > 30


def test_every_source_file_is_listed_and_every_reference_defined():
    table = README[README.index("\n## What is where\n") : README.index("\n## Speed\n")]
    for path in SOURCES.values():
        name = path.name if path.parent == ROOT else f"{path.parent.name}/"
        assert f"[`{name}`]({name.rstrip('/')})" in table
    names = set(re.findall(r"\]\[(\w+)\]", PROSE))
    assert names == set(re.findall(r"^\[(\w+)\]: https://", README, re.MULTILINE))


# Numbers


def test_the_numbers_of_the_demo_are_those_that_were_measured():
    assert f"bits per byte   {DEMO['bits_per_byte']:.3f}" in README
    assert f"xz -9e          {DEMO['xz_bits_per_byte']:.3f}" in README
    assert f"{DEMO['parameters']:,} parameters" in README
    assert f"from {DEMO['training_text_mb']} MB of text" in README
    assert f"took {DEMO['total_seconds']} seconds on two cores, {DEMO['training_seconds']} of" in (
        " ".join(README.split())
    )


def worked_out() -> list[str]:
    """What the text says of numbers that follow from the code, as it says it."""
    small = GPTConfig()
    with torch.device("meta"):
        model = GPT(small)
    V, T, C = small.vocab_size, small.block_size, small.n_embd
    block = sum(p.numel() for p in model.h[0].parameters())
    scores = 64 * small.n_head * small.n_layer * T * T
    recipe = load_config([str(ROOT / "configs" / "gpt2_124m.toml")])
    optim, windows = recipe.optim, recipe.train.tokens_per_step // T
    bits = (DEMO["bits_per_byte"], DEMO["xz_bits_per_byte"])
    lines = len((ROOT / "model.py").read_text(encoding="utf-8").splitlines())
    torch.manual_seed(0)
    drawn = GPT(GPTConfig(vocab_size=1000, block_size=1000, n_layer=1, n_embd=96, n_head=2))
    tokens, positions = (getattr(drawn, name).weight.std().item() for name in ("wte", "wpe"))
    return [
        f"AdamW, β {optim.beta1} and {optim.beta2}, decay {optim.weight_decay:g}, clip "
        f"{optim.grad_clip:g} |",
        f"| {optim.learning_rate * 1e4:.0f} · 10⁻⁴, as GPT-3 small's |",
        f"| {windows} windows of {T:,} tokens |",
        f"are cut into {small.n_head} *heads* of {C // small.n_head} channels",
        f"about {round(lines, -1)} lines",
        f"costs it {bits[0]:.2f} bits. `xz -9e` needs {bits[1]:.2f} for that text alone, and "
        f"[{COUNTS['xz_bits_per_byte_after_training_text']:.2f}](results/counting.json) after the",
        f"124M, says its model card | {model.num_parameters():,} |",
        f"of standard deviation {tokens:.2f}, positions of {positions:.2f}, biases are 0",
        f"| not said (deviation 0.02) | 0.02 | {tokens:.2f} |",
        f"| not said (0.02) | 0.01 | {positions:.2f} |",
        f"{V * C:,}",
        f"{T * C:,}",
        f"{block:,}",
        f"{12 * block:,}",
        f"{model.num_parameters():,}",
        f"ln {V:,} = {math.log(V):.2f}",
        f"2,048 tokens it is {math.log(2048):.2f}",
        f"{V**2 / 1e9:.1f} billion pairs and {V**3 / 1e12:.0f} trillion triples",
        f"that is {scores / 1e9:.1f} billion numbers: {2 * scores / 1e9:.0f} GB in bfloat16",
        f"the {64 * T * V / 1e9:.1f} billion logits of 64 windows",
        f"about {model.flops_per_token() * 1e10 / 1e18:.1f} · 10¹⁸ floating-point",
        f"would need {model.flops_per_token() * 1e10 / 1e12 / 86_400:.0f} days",
        f"by 1/√{2 * small.n_layer}: {2 * small.n_layer} of them add up",
        f"{math.exp(2):.2f} / {3 + math.exp(2):.2f} = {math.exp(2) / (3 + math.exp(2)):.2f}",
        f"2 × 768 | {2 * C:,} |",
        f"{math.log(2):.2f} if it gave it a half, {math.log(100):.1f} for one in a hundred",
        f"ln 4 = {math.log(4):.2f} nats",
        "the shares become {:.2f}, {:.2f}, {:.2f}, {:.2f}".format(
            *(math.exp(score) / (3 + math.exp(4)) for score in (0, 4, 0, 0))
        ),
        f"0.67 / 0.91 = {0.67 / 0.91:.2f} and {0.24 / 0.91:.2f}",
        f"= {DEMO['validation_loss'] / math.log(2):.3f} bits per token; times 32,640 / 100,271",
        f"−ln 0.67 = {-math.log(math.exp(2) / (math.exp(2) + math.e + 1)):.2f}",
        f"{C:,} × {3 * C:,} + {3 * C:,} and {C} × {C} + {C}",
        f"token 300 is not a little more than token {300 - 1}",
        f"the ids 0 to {256 - 1} (in an order of their own in GPT-2's vocabulary), the merges",
        f"here {263 - 1}, in GPT-2's vocabulary {V - 1:,}. That vocabulary has 256 bytes, "
        f"{V - 257:,} merges and this one",
        f"e⁴ = {math.exp(4):.1f}",
        f"are {math.exp(2):.2f}, {math.e:.2f} and 1, together {math.exp(2) + math.e + 1:.2f};",
        f"{C} × {C} + {C}, MLP {C} × {4 * C:,} + {4 * C:,} and {4 * C:,} × {C} + {C}",
    ]


def test_the_numbers_that_this_repository_can_work_out():
    for number in worked_out():
        assert number in PROSE, number


def numbers_of(text: str) -> set[str]:
    """The numbers in a text that say something: with a point, a comma or three digits."""
    plain = re.sub(r"\]\([^)]*\)|\]\[\w+\]|`[^`]*`", "", text)
    found = re.findall(r"(?<![\w.])\d[\d,.]*\d", plain)
    return {number for number in found if "." in number or len(number) > 2}


def test_every_number_is_worked_out_here_or_says_where_it_is_from():
    """A paragraph with a number from outside has a link; a table's may stand just above it.

    Numbers from inside are those that other tests compute or compare: of the code, of the settings,
    of what is measured, and of what commands print.
    """
    files = [ROOT / name for name in ("model.py", "config.py", "requirements.txt")]
    files += [*ROOT.glob("configs/*.toml"), *ROOT.glob("results/*.json")]
    ours = numbers_of(" ".join(block for _, block in BLOCKS))
    ours |= numbers_of(" ".join(worked_out()))
    ours |= numbers_of(" ".join(path.read_text("utf-8").replace("_", ",") for path in files))
    ours |= numbers_of(" ".join(told_of_the_kept_model()))
    text = re.sub(r"^\[\w+\]: .*$", "", TEXT, flags=re.MULTILINE)
    parts = re.split(r"\n\s*\n(?!\|)", text)
    linked = [part for part in parts if re.search(r"(?<!!)\[[^]]+\][\[(]", part)]
    sourced = numbers_of(" ".join(linked))
    assert len(linked) > 30
    for part in set(parts) - set(linked):
        unknown = numbers_of(part) - ours - sourced
        assert not unknown, (unknown, part)


def test_the_price_of_the_canonical_reduction_is_what_was_measured():
    measured = json.loads((ROOT / "results" / "canonical.json").read_text(encoding="utf-8"))
    rates = measured["tokens_per_second"]
    pairs = zip(rates["canonical"], rates["ddp"])
    factor = f"{statistics.median(ours['median'] / theirs['median'] for ours, theirs in pairs):.2f}"
    assert f"({factor} times as fast as DDP, [measured](results/canonical.json))" in PROSE


def times(ratio: float) -> str:
    return f"{ratio:.2f} ×"


def recorded(name: str) -> dict:
    """All that `python bench.py` wrote into results/bench_<name>.json."""
    return json.loads((ROOT / "results" / f"bench_{name}.json").read_text(encoding="utf-8"))


def measured(name: str) -> dict:
    """What it found."""
    return recorded(name)["results"]


def spread(found: dict, peer: str, key: str) -> str:
    """A ratio, the median of the rounds' ratios, with the lowest and the highest of them."""
    rounds = ratios(found["turns"], peer, key)
    return f"{statistics.median(rounds):.2f} × ({min(rounds):.2f} – {max(rounds):.2f})"


def speed_table(folder: str = "results/", all_rounds: bool = False) -> str:
    """The table of speed, with links into `folder`; with the rounds' range, or in short."""
    rows = ["| on two CPU cores | here | beside it | ratio |", "| --- | --- | --- | --- |"]
    decoding = ("decode_tokens_per_second", "token_seconds", ".1f")
    training, preparing = ("tokens_per_second", "step_seconds", ",.0f"), "seconds_per_token"
    for work, file, peer, (rate, key, form) in (
        ("training, bfloat16", "train", "nanogpt", training),
        ("the same", "train", "build-nanogpt", training),
        ("a token after 16, float32", "generate_float32_1_16", "transformers", decoding),
        ("bfloat16 beside float32", "generate_bfloat16_float32", "transformers", decoding),
        ("a token after 992, float32", "generate_float32_1_992", "transformers", decoding),
        ("the same", "generate_float32_1_992", "nanogpt", decoding),
        ("preparing", "tokenize", "build-nanogpt", ("tokens_per_second", preparing, ",.0f")),
        ("the same", "tokenize", "bare tiktoken", ("tokens_per_second", preparing, ",.0f")),
    ):
        if peer == "bare tiktoken" and not all_rounds:
            continue
        found = recorded(file)
        ours, theirs = (format(found["results"][who][rate], form) for who in ("ours", peer))
        name, link = peer.replace("nanogpt", "nanoGPT"), f"[{work}]({folder}bench_{file}.json)"
        name = name.replace("build-nanoGPT", "build-nanogpt")
        ratio, _, rounds = spread(found, peer, key).partition(" (")
        ratio += f" ({rounds}" if all_rounds else ""
        rows.append(f"| {link} | {ours} | {name} {theirs} | {ratio} |")
    loader = format(measured("data")["tokens_per_second"]["loader"], ",.0f")
    rows.append(f"| [loader]({folder}bench_data.json) | {loader} | | |")
    return "\n".join(rows)


def generation_table() -> str:
    """The table of generation: a row for each batch, length of the prompt and type."""
    lines = ["| texts × prompt | here | transformers | nanoGPT |", "| --- | --- | --- | --- |"]
    for texts, prompt, dtype in itertools.product((1, 16), (16, 992), ("float32", "bfloat16")):
        file = f"generate_{dtype}_{texts}_{prompt}"
        found = measured(file)
        cells = [f"{found['ours']['decode_tokens_per_second']:.1f}"]
        for theirs in (found["transformers"], found.get("nanogpt")):
            cells.append("")
            if theirs:
                ratio = times(theirs["decode_times_as_fast"])
                cells[-1] = f"{theirs['decode_tokens_per_second']:.1f}: {ratio}"
        work = f"[{texts} × {prompt}, {dtype}](bench_{file}.json)"
        lines.append(f"| {work} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_table_of_speed_is_what_was_measured():
    assert speed_table() in README
    assert speed_table("", all_rounds=True) in MEASURED
    assert generation_table() in MEASURED
    started = measured("start")
    first, answer = started["first_token_seconds"], started["help_seconds"]
    soon = f"first token is there after {first:.1f} s, `--help` after {answer:.2f} s"
    assert soon in MEASURED_PROSE
    speed = round(measured("h200_document_mask")["ours"]["tokens_per_second"], -3)
    busy = f"{speed / measured('data')['tokens_per_second']['loader']:.1%}".replace("%", " %")
    trains = f"a GPU that trains {speed:,.0f} tokens per second"
    assert f"{trains} would keep that thread busy {busy} of the time" in MEASURED_PROSE
    hashed = 1e8 / measured("data")["tokens_per_second"]["SHA-256"]
    assert f"which takes {hashed:.2f} s for 100 million tokens" in MEASURED_PROSE
    shares = {name: found["of_matrix_product"] for name, found in measured("train").items()}
    share, limit = f"{shares['ours']:.0%}".replace("%", " %"), times(1 / shares["nanogpt"])
    assert f"{share} of what a matrix product reaches there (attention" in MEASURED_PROSE
    assert f"all of it would be {limit} nanoGPT's speed" in MEASURED_PROSE
    memory = measured("train")["nanogpt"]["memory_ratio"]
    assert f"takes {times(memory)} nanoGPT's memory" in MEASURED_PROSE


def gpu_table() -> str:
    """The table of a training step on a GPU."""
    lines = ["| | tokens per second | of a matrix product | MFU | memory |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    names = {"ours": "[here](bench_h200_train.json)", "nanogpt": "nanoGPT"}
    for name, found in measured("h200_train").items():
        cells = [f"{found['tokens_per_second']:,.0f}", f"{found['of_matrix_product']:.0%}"]
        cells += [f"{found['mfu']:.0%}", f"{found['peak_memory'] / 1e9:.1f} GB"]
        lines.append(f"| {names[name]} | {' | '.join(cells)} |".replace("%", " %"))
    return "\n".join(lines)


def gpu_step_prose() -> list[str]:
    """What results/README.md tells of a training step on a GPU, from the files there."""
    step = json.loads((ROOT / "results" / "h200_step.json").read_text(encoding="utf-8"))
    before, rows, stream, _ = step["step_milliseconds"].values()
    then, now = step["slice_of_the_loss_microseconds"].values()
    _, products, attention, loss, rest = step["kernels_milliseconds"].values()
    _, wide, narrow = step["loss_with_a_residual_stream_in"].values()
    with torch.device("meta"):
        model = GPT(GPTConfig())
    flops = model.flops_per_token() * 64 * 1024 / (stream / 1e3)
    cast = model.num_parameters() * (4 + 2)  # bytes: from float32 to bfloat16
    reached = f"{flops / 1e12 / step['matrix_product_tflops']:.0%}".replace("%", " %")
    tried = step["tried_and_left"]
    compiled, ours = step["a_kernel_of_our_own_for_the_loss"]["step_milliseconds"].values()
    again = measured("h200_document_mask")
    nanogpt = 64 * 1024 / again["nanogpt"]["tokens_per_second"] * 1e3
    return [
        f"[Step by step](h200_step.json): computing the loss on whole rows of logits, padding "
        f"included, lets the kernels read in large pieces, and {before} ms became {rows}. A "
        f"residual stream in bfloat16 leaves less to read and write: {stream} ms, {reached} of a "
        f"matrix product. It costs nothing in loss: AdamW ended at {statistics.mean(narrow):.3f} "
        f"instead of {statistics.mean(wide):.3f}, the mean of three seeds. Finally, the loss of a "
        f"slice of 8,192 rows went from {then:,} to {now} µs, and with a kernel of our own for it "
        f"the step from {compiled:.1f} to {ours:.1f} ms. Beside nanoGPT again, five rounds "
        f"([today's code](bench_h200_document_mask.json)): "
        f"{again['ours']['tokens_per_second']:,.0f} tokens per second, "
        f"{times(again['nanogpt']['times_as_fast'])} nanoGPT. (There the first of a turn's five "
        "steps had to ask the GPU for all memory anew, of which nanoGPT takes more; a turn begins "
        "with a step that isn't counted now, which hasn't been measured.) Two things were not "
        "tried: casting "
        f"the weights once for all micro-batches of a step, which would save "
        f"{cast / step['copy_terabytes_per_second'] / 1e9:.1f} ms for each but the first, and "
        "DDP's static graph.",
        f"A step of {stream} ms was matrix products ({products:.0f} ms), attention in cuDNN's "
        f"kernels ({attention:.0f}), the loss ({loss:.0f}), and norms, GELU and sums "
        f"({rest:.0f}). To be 1.25 times as fast as nanoGPT, it would have to take "
        f"{nanogpt / 1.25:.0f} ms. Compiling the whole model at once made it "
        f"{tried['the whole model compiled at once, in 16 s instead of 3']:.0f}, but takes five "
        "times as long to compile, and no gradients could be sent while others are computed.",
    ]


def gpu_run_prose() -> list[str]:
    """What results/README.md tells of generation, a run, tests and recipes on a GPU."""
    step = json.loads((ROOT / "results" / "h200_step.json").read_text(encoding="utf-8"))
    text, short, many = (
        measured(f"h200_generate_bfloat16_{counts}") for counts in ("1_992", "1_16", "16_16")
    )
    found = json.loads((ROOT / "results" / "h200_decoding.json").read_text(encoding="utf-8"))
    _, plain, heads, pieces, last_one, early = found["124M_one_text"].values()
    other = [*found["on_another_machine"].values()]
    with torch.device("meta"):
        read = 2 * GPT(GPTConfig()).num_parameters() / step["copy_terabytes_per_second"] / 1e6
    written = text["ours"]["decode_tokens_per_second"]
    faster = {name: times(found["decode_times_as_fast"]) for name, found in text.items()}
    run = json.loads((ROOT / "results" / "h200_124m.json").read_text(encoding="utf-8"))
    _, tokens, end, _ = run["validation"]["rows"][-1]
    rate, batch = run["tokens_per_second_of_the_median_step"], 65_536
    adamw = measured("h200_document_mask")["ours"]["tokens_per_second"]
    seconds = batch / rate - batch / adamw  # that Muon takes longer
    slower = f"{1 - rate / adamw:.0%}".replace("%", " %")
    small = f"{seconds * adamw / 524_288:.0%}".replace("%", " %")
    return [
        f"A token after 992 ([five rounds](bench_h200_generate_bfloat16_1_992.json)): "
        f"{written:,.0f} per second, {faster['transformers']} transformers and "
        f"{faster['nanogpt']} nanoGPT. After 16 ([five](bench_h200_generate_bfloat16_1_16.json)): "
        f"{short['ours']['decode_tokens_per_second']:,.0f}, "
        f"{times(short['transformers']['decode_times_as_fast'])} and "
        f"{times(short['nanogpt']['decode_times_as_fast'])}. On another machine of the "
        f"kind, after 992, ours were {other[1][0]:,.0f}, {times(other[2][1])} and "
        f"{times(other[3][1])}. Sixteen texts at once, after 16 "
        "([five](bench_h200_generate_bfloat16_16_16.json)), in PyTorch's kernels: "
        f"{many['ours']['decode_tokens_per_second']:,.0f}, "
        f"{times(many['transformers']['decode_times_as_fast'])} transformers.",
        f"A recorded step alone, for one text ([h200_decoding.json](h200_decoding.json)): "
        f"{plain[1]:.0f} µs in PyTorch's kernels after 1,000 tokens, {heads[1]:.0f} in ours with a "
        f"program for each head. With keys and values in pieces of 128, put together by the next "
        f"kernel, {pieces[1]:.0f}; by the program that ends last, {last_one[1]:.0f}; and when each "
        f"kernel starts early, {early[1]:.0f}. Reading all weights once would take {read:.0f}.",
        f"With Muon the 124M went over ten million tokens "
        f"{tokens / run['training_tokens']:.0f} times in "
        f"[{run['seconds']['of its steps and validations']} seconds](h200_124m.json) of steps and "
        f"validations, and ended with a loss of {end:.2f}. Its steps of {batch:,} tokens made "
        f"{rate:,} tokens per second, {slower} fewer than AdamW's above. If what Muon adds to a "
        f"step is the same however large the step is, it would add {small} to one of 524,288 "
        "tokens.",
        "Of the 52 tests that needed a GPU, 51 passed there, six of them shortly before commit "
        "f60b6b3. The other had compared single errors, which are far from alike. It compares "
        "medians since, and those of what is kept for the next text run on a CPU too, with Triton "
        "interpreted; in this form they have not run there.",
        "Some ways of training the 124M ([recipe_124m.json](recipe_124m.json)): 400 steps of 8,192 "
        "tokens of the same text with GPT-2's vocabulary, three learning rates each. Where the "
        "best rate is the lowest or the highest tried, one beyond it might be better. Twelve were "
        "trained at once, so time is not given: alone, AdamW would take "
        f"{8192 / adamw * 1e3:.1f} ms for so small a step, Muon "
        f"{seconds * 1e3:.1f} more.",
    ]


def test_what_is_told_of_a_gpu_is_what_was_measured():
    """A step before the changes beside nanoGPT, after them alone; generation; a training run."""
    assert gpu_table() in MEASURED
    for paragraph in gpu_step_prose() + gpu_run_prose():
        assert paragraph in MEASURED_PROSE
    ours = 64 * 1024e3 / measured("h200_train")["ours"]["tokens_per_second"]
    step = json.loads((ROOT / "results" / "h200_step.json").read_text(encoding="utf-8"))
    before, _, after, again = step["step_milliseconds"].values()
    assert ours == pytest.approx(before, rel=0.01) and again == pytest.approx(after, rel=0.01)
    assert step["tokens_per_second"] == pytest.approx(64 * 1024e3 / after, rel=1e-3)
    again = measured("h200_document_mask")
    now, nanogpt = (64 * 1024e3 / again[name]["tokens_per_second"] for name in ("ours", "nanogpt"))
    assert (
        f"a step takes [{now:.0f} ms, nanoGPT's {nanogpt:.0f}]"
        f"(results/bench_h200_document_mask.json), in {again['nanogpt']['memory_ratio']:.2f} × its "
        "memory."
    ) in PROSE
    text = measured("h200_generate_bfloat16_1_992")
    faster = {name: f"{found['decode_times_as_fast']:.0f}" for name, found in text.items()}
    token = 1e3 / text["ours"]["decode_tokens_per_second"]
    found = json.loads((ROOT / "results" / "h200_decoding.json").read_text(encoding="utf-8"))
    other = {name: told[-1] for name, told in found["on_another_machine"].items()}
    assert (
        f"takes [{token:.1f} ms](results/bench_h200_generate_bfloat16_1_992.json), "
        f"{faster['transformers']} times as fast as transformers, {faster['nanogpt']} times as "
        f"nanoGPT; on another such machine, {other['transformers']:.0f} and {other['nanogpt']:.0f}."
    ) in PROSE


def aims_table() -> str:
    """What was aimed at, and how far it was reached."""

    def beside(file: str, peer: str, key: str, note: str = "") -> str:
        found = recorded(file)
        rounds = len(found["turns"]["ours"])
        return f"[{spread(found, peer, key)}](bench_{file}.json), {rounds} rounds{note}"

    def share(value: float, file: str, digits: int = 0) -> str:
        return f"[{value * 100:.{digits}f} %]({file}.json)"

    step, token, each = "step_seconds", "token_seconds", "seconds_per_token"
    early, late = ", after 16 tokens", ", after 992 tokens"
    cpu, mixed = "generate_float32_1_16", "generate_bfloat16_float32"
    gpu, hf, file = "h200_generate_bfloat16_1", "transformers", "h200_document_mask"
    h200, started = measured(file), measured("start")
    memory = times(h200["nanogpt"]["memory_ratio"])
    of_product = share(h200["ours"]["of_matrix_product"], f"bench_{file}")
    product, other = (
        statistics.median(turn["matrix_product_flops"] for turn in recorded(file)["turns"][name])
        for name in ("ours", "document mask")
    )
    beside_other = h200["ours"]["of_matrix_product"] * product / other
    of_product += (
        f" of the {product / 1e12:.0f} TFLOP/s measured after its rounds, {beside_other * 100:.0f} "
        f"% of the {other / 1e12:.0f} after those with a mask"
    )
    waiting = share(h200["ours"]["data_share"], f"bench_{file}", 1)
    loader = measured("data")["tokens_per_second"]["loader"] / 1e6
    answer, first = (started[f"{name}_seconds"] for name in ("help", "first_token"))
    found = load_found(ROOT / "results" / "recipe.json")
    rows, longer = rows_of(found), found.step_ratios["muon_ema"]
    tokens, seconds = shares(rows["muon_ema"], rows["nanogpt"], longer)
    without = f"not measured; {beside('train', 'nanogpt', step)}, without AMX"
    return f"""\
| what | aim | reached |
| --- | --- | --- |
| training step, bfloat16, H200 | 1.25 × nanoGPT | {beside(file, "nanogpt", step)} |
| | 60 % of a matrix product | {of_product}; 5 rounds |
| its memory | 0.6 × nanoGPT's | [{memory}](bench_{file}.json), 5 rounds |
| training step, bfloat16, two CPU cores with AMX | 1.5 × nanoGPT | {without} |
| a token after 16, float32, two CPU cores | 1.3 × transformers | {beside(cpu, hf, token)} |
| in bfloat16 | 2.2 × transformers in float32 | {beside(mixed, hf, token)} |
| a token, bfloat16, H200 | 8 × transformers | {beside(f"{gpu}_16", hf, token, early)} |
| | | {beside(f"{gpu}_992", hf, token, late)} |
| | 15 × nanoGPT | {beside(f"{gpu}_992", "nanogpt", token, late)} |
| preparing, two CPU cores | 1.2 × build-nanogpt | {beside("tokenize", "build-nanogpt", each)} |
| | 0.9 × bare tiktoken | {beside("tokenize", "bare tiktoken", each)} |
| loader | 50 million tokens per second | [{loader:.0f}](bench_data.json) |
| share of an H200's step spent waiting for it | less than 1 % | {waiting} |
| `--help` | less than 0.5 s | [{answer:.2f}](bench_start.json) |
| `sample.py` to its first token | less than 4 s | [{first:.1f}](bench_start.json) |
| AdamW's loss, by Muon with averaged weights | 65 % of the tokens | {share(tokens, "recipe")} |
| | 75 % of the time | {share(seconds, "recipe")}, two CPU cores |
"""


def test_the_aims_are_told_with_what_was_reached():
    assert aims_table() in MEASURED


OPTIONS = {
    *("document_mask", "restart", "z_loss", "label_smoothing", "dropout"),
    *("joint_qkv", "small_batches"),
}


def recipe_table(names: tuple[str, ...] = (), file: str = "recipe", with_time: bool = True) -> str:
    """The table of ways of training, all of them or those of these names."""
    found = load_found(ROOT / "results" / f"{file}.json")
    rows = rows_of(found)
    lines = ["| | rate | loss in the end | tokens | time |", "| --- | --- | --- | --- | --- |"]
    for name in names or rows:
        row, reached = rows[name], ["", ""]
        told = shares(row, next(iter(rows.values())), found.step_ratios.get(name, math.nan))
        if told:
            reached = ["" if math.isnan(x) else f"{x:.0%}".replace("%", " %") for x in told]
        loss = f"{row.loss:.3f} ({min(row.last):.3f} – {max(row.last):.3f})"
        loss = loss if len(row.runs) > 1 else f"{row.loss:.3f} (one seed)"
        cells = (row.candidate.meaning, f"{row.rate:g}", loss, *reached)
        lines.append(f"| {' | '.join(cells)} |")
    if not with_time:
        lines = [line.removesuffix("|").rpartition("|")[0] + "|" for line in lines]
    return "\n".join(lines)


def test_the_table_of_ways_of_training_is_what_was_found():
    assert recipe_table(("nanogpt", "muon", "muon_ema")) in README
    assert recipe_table() in MEASURED
    assert recipe_table(file="recipe_124m", with_time=False) in MEASURED
    found = load_found(ROOT / "results" / "recipe_124m.json")
    rows = rows_of(found)
    tokens, _ = shares(rows["muon"], rows["nanogpt"], math.nan)
    share = f"{tokens:.0%}".replace("%", " %")
    trained = rows["nanogpt"].runs[0].steps[-1] * found.config["train"]["tokens_per_step"]
    assert (
        f"[got there](results/recipe_124m.json) with {share} of AdamW's {trained / 1e6:.1f} "
        "million tokens, one seed."
    ) in PROSE
    assert len(rows["muon"].runs) == 1


def test_what_muons_config_tells_of_measurements_is_what_was_found():
    lines = (ROOT / "configs" / "gpt2_124m_muon.toml").read_text(encoding="utf-8").splitlines()
    told = " ".join(" ".join(line.partition("#")[2] for line in lines).split())
    small, large = (load_found(ROOT / "results" / f"{n}.json") for n in ("recipe", "recipe_124m"))

    def last(found: Found, name: str, rate: float) -> float:
        return statistics.mean(
            run.last for run in found.runs if (run.candidate, run.rate) == (name, rate)
        )

    rows = rows_of(small)
    tokens, _ = shares(rows["muon"], rows["nanogpt"], 1.0)
    assert tokens == pytest.approx(0.5, abs=0.05)
    assert "Muon needs half of AdamW's tokens to get as low" in told
    assert last(small, "muon_ema", 0.01) < last(small, "muon_wsd", 0.01) < last(small, "muon", 0.01)
    assert last(small, "muon_ema", 0.02) > last(small, "muon_wsd", 0.02) > last(small, "muon", 0.02)
    assert "a level rate and a late linear fall end lower than a cosine, and averaged" in told
    assert "weights without any fall as low or a little lower" in told
    assert "with this one (one seed) it is the other way round" in told
    level, cosine, linear = (
        f"{last(large, name, 0.02):.2f}" for name in ("muon_wsd", "muon", "muon_linear")
    )
    assert (
        f"{level} with such a fall, {cosine} with a cosine, {linear} with a linear fall all the way"
    ) in told
    adamw = rows_of(large)["nanogpt"].last
    assert f"AdamW's three differ by {max(adamw) - min(adamw):.2f}" in told and len(adamw) == 3
    gains = [
        last(large, "muon_linear", rate) - last(large, "restart", rate)
        for rate in (0.01, 0.02, 0.04)
    ]
    assert f"by {min(gains):.2f} to {max(gains):.2f} at each of three rates" in told


def test_what_more_blocks_do_for_the_demo_is_told_as_it_was_measured():
    runs = json.loads((ROOT / "results" / "blocks.json").read_text(encoding="utf-8"))["runs"]
    by_seed = {n: {r["seed"]: r["loss"] for r in runs if r["n_layer"] == n} for n in (1, 3)}
    assert all(by_seed[1][seed] < loss for seed, loss in by_seed[3].items())
    one, three = (statistics.mean(losses.values()) for losses in by_seed.values())
    assert f"after 1,500 steps one block has {one:.2f}, three {three:.2f};" in PROSE
    assert {run["steps"] for run in runs} == {1500} and len(by_seed[1]) == 3


def test_what_the_options_did_is_told_as_it_was_measured():
    """Each beside Muon with the same code, rate and seeds."""
    found = load_found(ROOT / "results" / "recipe.json")
    rows = rows_of(found)
    then = rows["muon_linear_then"]

    def at(row: Row) -> Row:
        """Muon without the option, at the option's rate."""
        runs = [r for r in found.runs if (r.candidate, r.rate) == (then.name, row.rate)]
        assert {run.seed for run in runs} == {run.seed for run in row.runs} == {1, 2, 3}
        return replace(then, runs=runs)

    higher = {name: rows[name].loss - at(rows[name]).loss for name in rows if name in OPTIONS}
    assert higher.keys() == OPTIONS
    assert f"lost here by {higher['dropout']:.2f}," in MEASURED_PROSE
    spread = max(then.last) - min(then.last)
    for name in ("z_loss", "document_mask", "restart"):
        assert abs(higher[name]) < spread  # "changed less than the seeds differ"
    assert min(higher["label_smoothing"], higher["joint_qkv"]) > 2 * spread
    half = rows["small_batches"]
    with_, without = (shares(row, rows["nanogpt"], 1.0)[0] for row in (half, at(half)))
    lower = then.loss - half.loss
    assert f"took {1 - with_ / without:.0%}".replace("%", " %") + " fewer tokens" in MEASURED_PROSE
    assert f"ended {lower:.3f} lower than without them at its best rate" in MEASURED_PROSE
    assert lower < max(half.last) - min(half.last)
    twice = (("muon_linear", "muon_linear_then"), ("documents_now", "restart"))
    differ = max(
        abs(one.last - other.last)
        for names in twice
        for one, other in zip(*(rows[name].runs for name in names), strict=True)
    )
    assert f"ended within {differ:.3f} of themselves" in MEASURED_PROSE
    muons = [found.step_ratios[name] for name in ("muon", "muon_linear", "muon_wsd")]
    assert f"at {min(muons):.2f} to {max(muons):.2f} of AdamW's" in MEASURED_PROSE
    assert f"differences of {max(muons) / min(muons) - 1:.0%}".replace("%", " %") in MEASURED_PROSE


def test_what_is_won_where_documents_are_short_is_told_as_it_was_measured():
    assert recipe_table(file="recipe_short", with_time=False) in MEASURED
    joined, _, apart = rows_of(load_found(ROOT / "results" / "recipe_short.json")).values()
    told = f"[the loss fell](results/README.md) from {joined.loss:.3f} to {apart.loss:.3f}."
    assert told in PROSE
    ratio = spread(recorded("document_mask"), "document mask", "step_seconds")
    assert f"takes {ratio} as long on two CPU cores" in MEASURED_PROSE
    on_gpu = spread(recorded("h200_document_mask"), "document mask", "step_seconds").split()[0]
    assert (
        f"[{ratio.split()[0]} times](results/bench_document_mask.json) as long, on an H200 with "
        f"FlexAttention [{on_gpu}](results/bench_h200_document_mask.json)."
    ) in PROSE
    assert f"takes [{on_gpu} × as long](bench_h200_document_mask.json), in" in MEASURED_PROSE


def test_memory_is_told_as_it_was_measured():
    found = json.loads((ROOT / "results" / "memory.json").read_text(encoding="utf-8"))
    process = found["bytes_without_a_model"]
    with torch.device("meta"):
        model = GPT(GPTConfig())
    more = [
        (peak - process) / estimated_memory(model, int(windows) * 1024, torch.bfloat16, True) - 1
        for windows, peak in found["peak_bytes"].items()
    ]
    span = f"{100 * min(more):.0f} to {max(more):.0%} more".replace("%", " %")
    assert f"A CPU took [{span}](results/memory.json) memory than estimated" in PROSE
    assert f"is {span} than estimated, besides {process / 1e9:.1f} GB" in MEASURED_PROSE
    ours = measured("h200_train")["ours"]
    more = ours["peak_memory"] / estimated_memory(model, 64 * 1024, torch.bfloat16, True) - 1
    assert f"H200's](bench_h200_train.json) was {100 * more:.0f} % more, before" in MEASURED_PROSE
    assert f"waited [{ours['data_share'] * 100:.1f} %](bench_h200_train.json) of" in MEASURED_PROSE


def test_the_demos_memory_is_what_its_plan_tells():
    config = load_config([str(ROOT / "configs" / "demo.toml")])
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=2048, **asdict(config.model)))
    tokens = config.train.micro_batch_size * config.model.block_size
    memory = estimated_memory(model, tokens, torch.float32, config.train.compile)
    assert f"memory      about {memory / 1e9:.2g} GB per process (estimate)" in README


def test_every_file_of_results_tells_how_and_where_and_when_it_was_measured():
    for path in (ROOT / "results").glob("*.json"):
        told = json.loads(path.read_text(encoding="utf-8"))
        assert {"command", "date", "hardware", "versions"} <= set(told), path.name


def test_every_file_of_results_is_listed_there():
    linked = set(re.findall(r"\]\((\w+\.json)\)", MEASURED))
    assert linked == {path.name for path in (ROOT / "results").glob("*.json")}


def test_the_runs_that_were_killed_ended_the_same():
    soak = json.loads((ROOT / "results" / "soak.json").read_text(encoding="utf-8"))
    same = sum(run["ended"] == "same" for run in soak["runs"])
    assert f"([{same} of {len(soak['runs'])}](results/soak.json) ended the same)" in PROSE


def test_the_numbers_of_counting_are_those_that_were_measured():
    rows = COUNTS["contexts"]
    assert f"only {rows[3]['seen']:.0%} ever occurred".replace("%", " %") in PROSE
    assert f"the runs of five {rows[5]['seen']:.0%}.".replace("%", " %") in PROSE
    assert f"reaches a loss of {COUNTS['bigram_loss']:.2f}](results/counting.json)" in PROSE
    after, before = KEPT_LOSS["validation_loss"], KEPT_LOSS["validation_loss_before"]
    assert f"[its loss](results/kept_model.json): {after} after that, {before} before" in PROSE
    theirs = json.loads((ROOT / "results" / "lm_eval.json").read_text())["results"]["hellaswag"]
    for key in ("same acc choices", "same acc_norm choices"):
        assert theirs[key] == [1.0, 1.0]
    assert f"the same choices in {theirs['questions'][0]} questions" in PROSE
    assert f"the little GPT {DEMO['validation_loss']:.2f}](results/demo.json)" in PROSE


def test_the_length_is_that_of_one_long_sitting():
    not_read = r"^\[\w+\]: .*$|</?\w+>|!\[.*?\]\(.*?\)"  # addresses, tags, pictures
    text = re.sub(not_read, "", TEXT, flags=re.MULTILINE)
    words = [word for word in text.split() if re.search(r"\w", word)]  # a table's bar is none
    assert 5_000 <= len(words) <= 7_000


def test_the_epochs_of_fine_tuning_are_those_that_its_config_tells():
    path = ROOT / "configs" / "finetune.toml"
    told, settings = path.read_text(encoding="utf-8"), load_config([str(path)]).train
    tokens = len(gpt2_encoding().encode_ordinary(README)) - 2000  # --val-tokens
    epochs = settings.max_steps * settings.tokens_per_step / tokens
    assert epochs == pytest.approx(140, rel=0.07) and "# 140 epochs;" in told
    fewer = re.search(r"tokens_per_step (\d+) --train.max_steps (\d+) make four", told)
    assert int(fewer[1]) * int(fewer[2]) / tokens == pytest.approx(4, rel=0.1)


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
        vocabulary = {"demo.toml": 2048, "recipe.toml": 4096}.get(name, 50_257)
        with torch.device("meta"):
            config = GPTConfig(
                vocabulary, model.block_size, model.n_layer, model.n_head, model.n_embd
            )
            assert GPT(config).num_parameters() == int(parameters.replace(",", ""))


def test_nothing_is_left_to_do_and_no_section_is_empty():
    assert not re.search(r"TODO|FIXME|@@|Ã|â€|Â|\ufffd", README)
    sections = re.split(r"^#+ .*$", TEXT, flags=re.MULTILINE)[1:]
    assert len(sections) == len(headings())
    assert all(section.strip() for section in sections)

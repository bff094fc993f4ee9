"""Tasks: what is asked, what counts as right, what is refused, and the Hub's datasets."""

from __future__ import annotations

import hashlib
import io
import json
import math
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, run
from fake_hub import FakeHub
from hypothesis import given
from hypothesis import strategies as st

import tasks
from checkpoint import find_checkpoint
from common.errors import UserError
from config import TASK_NAMES
from distributed import Ranks
from model import GPT
from scoring import Scorer
from visuals import KEPT

ITEMS = ROOT / "tests" / "items"
ALONE = Ranks(torch.device("cpu"))
COMMIT = "d" * 40


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    """The model that comes with README."""
    checkpoint = find_checkpoint(str(KEPT))
    model = GPT(checkpoint.meta.model)
    checkpoint.load_model(model)
    return Scorer(model.eval().requires_grad_(False), checkpoint.encoding(), ALONE)


def rows_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (ITEMS / f"{name}.jsonl").read_text().splitlines()]


def log_probability(scorer: Scorer, before: str, ending: str) -> tuple[float, int]:
    """(the sum of log p over the ending's tokens, how many they are), one text at a time."""
    encode = scorer.encoding.encode_ordinary
    ids, count = [*encode(before), *encode(ending)], len(encode(ending))
    logs = scorer.model(torch.tensor([ids[:-1]]))[0, -count:].log_softmax(dim=-1)
    return sum(row[i].item() for row, i in zip(logs, ids[-count:])), count


def test_the_tasks_are_those_that_settings_know():
    assert tuple(tasks.TASKS) == TASK_NAMES


# What is asked


def test_hellaswag_takes_the_likeliest_ending_by_each_convention(scorer):
    rows, names = rows_of("hellaswag"), ("acc", "acc_norm", "llmc_acc", "llmc_acc_norm")
    words, row = "a the file value returns [step] [title] if no object is".split(), rows[0]
    for seed in range(12):  # endings of a few words, where each token counts
        chosen = random.Random(seed)
        endings = [" ".join(chosen.choices(words, k=chosen.randint(1, 5))) for _ in range(4)]
        rows.append(row | {"endings": [f"{ending}." for ending in endings]})
    expected = {name: [] for name in names}
    for row in rows:
        before = tasks.tidy(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
        endings = [tasks.tidy(ending) for ending in row["endings"]]
        sums = [log_probability(scorer, before, f" {ending}")[0] for ending in endings]
        expected["acc"].append(np.argmax(sums))
        expected["acc_norm"].append(np.argmax([s / len(e) for s, e in zip(sums, endings)]))
        pairs = [log_probability(scorer, row["ctx"], f" {ending}") for ending in row["endings"]]
        expected["llmc_acc"].append(np.argmax([total for total, _ in pairs]))
        expected["llmc_acc_norm"].append(np.argmax([total / count for total, count in pairs]))
    choices = tasks.hellaswag_choices(rows, scorer)
    assert {name: chosen.tolist() for name, chosen in choices.items()} == expected
    labels = [int(row["label"]) for row in rows]
    for name, estimate in tasks.hellaswag(rows, scorer, 0).items():
        assert estimate.value == np.mean(np.array(expected[name]) == labels)
    assert len({tuple(chosen) for chosen in expected.values()}) > 1  # the conventions differ


def test_a_question_without_a_context_begins_a_text(scorer):
    end, encode = scorer.encoding.eot_token, scorer.encoding.encode_ordinary
    _, plain = tasks.hellaswag_requests([swag(ctx="")], scorer)
    assert [request.ids[0] for request in plain] == [end] * 4
    expected = []
    for ending in swag()["endings"]:
        ids = [end, *encode(f" {ending}")]
        logs = scorer.model(torch.tensor([ids[:-1]]))[0].log_softmax(dim=-1)
        expected.append(sum(row[i].item() for row, i in zip(logs, ids[1:])))
    np.testing.assert_allclose(scorer.score(plain, "test")[0], expected, rtol=1e-5)


def test_acc_norm_divides_by_characters_whatever_their_bytes(scorer, monkeypatch):
    """As lm-eval 0.4.13 does it: `completion_len` in lm_eval/api/task.py is Python's len().

    Its `byte_length` is another metric, acc_bytes.
    """
    row = swag(endings=["ééééé", "abcdefghi", "日本語日本語", "x" * 7])
    nats = np.array([-6.0, -9.9, -8.4, -14.0])  # per character −1.2, −1.1, −1.4; per byte −0.6, …
    scores = {"hellaswag": nats, "hellaswag, as llm.c": nats}
    monkeypatch.setattr(Scorer, "score", lambda self, requests, title: (scores[title], None))
    assert tasks.hellaswag_choices([row], scorer)["acc_norm"].tolist() == [1]


def test_the_harness_tells_the_subject_and_tidies_all(scorer):
    marked = swag(activity_label="Tea [title] Green", ctx_a="[header] Boil.", ctx_b="the CUP is")
    harness, plain = tasks.hellaswag_requests([marked | {"endings": ["[step] a  b."] * 4}], scorer)
    assert harness == [scorer.request("Tea. Green: Boil. The cup is", "  a b.")] * 4
    encode = scorer.encoding.encode_ordinary
    assert plain == [scorer.cut(encode(marked["ctx"]), encode(" [step] a  b."))] * 4


def test_an_ending_of_marks_alone_counts_as_one_character(scorer, monkeypatch):
    row = swag(endings=["[step]", "abc", "abc", "abc"])
    scores = {name: np.array([-2.0, -9, -9, -9]) for name in ("hellaswag", "hellaswag, as llm.c")}
    monkeypatch.setattr(Scorer, "score", lambda self, requests, title: (scores[title], None))
    assert tasks.hellaswag_choices([row], scorer)["acc_norm"].tolist() == [0]


def test_lambada_takes_what_follows_the_last_blank_for_the_word(scorer):
    """As the harness does: `text.split(" ")[-1]`."""
    assert tasks.lambada_requests([{"text": "one two "}], scorer) == [
        scorer.request("one two", " ")
    ]


def test_lambada_asks_for_the_last_word(scorer):
    rows = [*rows_of("lambada"), {"text": "Return a list of the number"}, {"text": "word"}]
    found = tasks.lambada(rows, scorer, 0)
    nats = []
    for row in rows[:-1]:
        before, _, last = row["text"].rpartition(" ")
        nats.append(-log_probability(scorer, before, f" {last}")[0])
    start = torch.tensor([[scorer.encoding.eot_token]])
    first, *_ = ids = scorer.encoding.encode_ordinary("word")
    logs = scorer.model(torch.cat((start, torch.tensor([ids[:-1]], dtype=torch.long)), dim=1))
    logs = logs[0].log_softmax(dim=-1)
    nats.append(-sum(row[i].item() for row, i in zip(logs, ids)))
    assert found["perplexity"].value == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)
    right = tasks.lambada([{"text": "Return a list of the number"}], scorer, 0)["acc"]
    wrong = tasks.lambada([{"text": "Return a list of the giraffe"}], scorer, 0)["acc"]
    assert (right.value, wrong.value) == (1, 0)


def test_wikitext_counts_every_token_once_and_the_words_as_published(scorer):
    rows = rows_of("wikitext")
    nats = tokens = 0
    for row in rows:
        ids = [
            scorer.encoding.eot_token,
            *scorer.encoding.encode_ordinary(tasks.joined(row["page"])),
        ]
        tokens += len(ids) - 1
        for at in range(1, len(ids)):  # each token from the 128 before it
            window = torch.tensor([ids[max(0, at - 128) : at]])
            nats -= scorer.model(window)[0, -1].log_softmax(dim=-1)[ids[at]].item()
    found = tasks.wikitext(rows, scorer, stride=1)
    words = sum(len(row["page"].split()) + 2 for row in rows)  # blanks at both ends: two more
    size = sum(len(row["page"].encode()) for row in rows)
    assert found["perplexity"].value == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert found["word_perplexity"].value == pytest.approx(math.exp(nats / words), rel=1e-4)
    assert found["bits_per_byte"].value == pytest.approx(nats / math.log(2) / size, rel=1e-4)


@given(count=st.integers(0, 100), block_size=st.integers(1, 20), data=st.data())
def test_windows_guess_every_token_once_from_as_much_as_the_context_holds(count, block_size, data):
    stride = data.draw(st.integers(1, block_size))
    ids = [*range(count)]
    requests, guessed = tasks.windows(ids, -1, block_size, stride), []
    for request in requests:
        assert len(request.ids) == min(block_size, len(guessed) + request.guessed) + 1
        assert (
            request.ids
            == [-1, *ids][len(guessed) + request.guessed + 1 - len(request.ids) :][
                : len(request.ids)
            ]
        )
        guessed += request.ids[-request.guessed :]
    assert guessed == ids
    assert all(request.guessed == stride for request in requests[1:-1])
    assert tasks.windows(ids, -1, block_size, block_size)[:1] == requests[:1] or not count


@pytest.mark.parametrize(
    ("spaced", "right"),
    [
        ("the dogs ' day", "the dogs' day"),
        ("well @-@ known", "well-known"),
        ("1 @,@ 000", "1,000"),
        ("3 @.@ 14", "3.14"),
        ("a : b", "a: b"),
        ("a ; b", "a; b"),
        ("a . b", "a. b"),
        ("a ! b", "a! b"),
        ("a ? b", "a? b"),
        ("a , b", "a, b"),
        ("( a )", "(a)"),
        ("[ a ]", "[a]"),
        ("{ a }", "{a}"),
        ('" a "', '"a"'),
        ("' a '", "'a'"),
        ("= = = = a", "==== a"),
        ("= = = a", "=== a"),
        ("= = a", "== a"),
        ("20 ° C", "20°C"),
        ("a \nb", "a\nb"),
        ("a\n b", "a\nb"),
        ("a N b", "a 1 b"),
        ("It 's", "It's"),
    ],
)
def test_each_rule_of_joining_puts_one_thing_right(spaced, right):
    assert tasks.joined(spaced) == right


def test_texts_are_put_right():
    assert tasks.joined('1 @,@ 000 well @-@ known ( or so ) " words " .\n') == (
        '1,000 well-known (or so) "words" .\n'
    )
    assert tasks.joined(" = = Title = = \n It 's 20 ° C ; the dogs ' day !  No ? ") == (
        " == Title ==\nIt's 20°C; the dogs' day!  No? "
    )
    assert tasks.tidy(" How to [title] Do it.  Twice [step] Now ") == "How to. Do it. Twice Now"
    assert tasks.tidy("a [b [c] d] e\n[f\ng] [h") == "a  d] e\n[f\ng] [h".replace("  ", " ")
    assert tasks.tidy("[" * 1_000_000) == "[" * 1_000_000


# What is refused


def swag(**changes: object) -> dict:
    return {**rows_of("hellaswag")[0], **changes}


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (swag(endings=["one", "two", "three"]), "row 2: expected four endings"),
        (swag(endings=["one", "two", "three", 4]), "row 2: expected four endings"),
        (swag(endings="four"), "'endings' is 'four'"),
        (swag(label=""), "the label is '', expected 0 to 3"),
        (swag(label="4"), "the label is '4'"),
        (swag(ctx=None), "row 2: 'ctx' is None"),
        ({"text": "x"}, "row 2: 'activity_label' is None"),
        (["no", "object"], "expected an object in each line"),
        (swag(ctx="\ud800"), r"row 2: 'ctx' holds '\\ud800', half of a character"),
        (swag(endings=["a", "b", "c", "\udc00"]), "row 2: an ending holds .* half of a character"),
        (swag(ctx=5), "row 2: 'ctx' is 5, expected text$"),
        (swag(endings=None), "row 2: 'endings' is None, expected a list$"),
        (swag(label="4" * 5000), "the label is '4{39}, expected 0 to 3"),
    ],
)
def test_a_row_that_is_not_as_it_should_be_is_named(row, complaint, tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in (swag(label=2), row)))
    with pytest.raises(UserError, match=complaint) as error:
        tasks.load_questions("hellaswag", path)
    assert "some.jsonl" in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "some.jsonl"
    with pytest.raises(UserError, match="can't read .*some.jsonl"):
        tasks.load_questions("lambada", path)
    for content, complaint in ((b"{", "can't read"), (b"\xff", "can't read"), (b"", "no rows")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=complaint):
            tasks.load_questions("lambada", path)
    (tmp_path / "some.parquet").write_bytes(b"PAR")
    with pytest.raises(UserError, match="can't read .*some.parquet"):
        tasks.load_questions("lambada", tmp_path / "some.parquet")


def test_parquet_that_pyarrow_does_not_know_is_one_line(tmp_path, monkeypatch):
    """A damaged type may be one that is yet to be implemented."""
    import pyarrow as pa
    from pyarrow import parquet

    def unknown(*_: object, **__: object) -> None:
        raise pa.ArrowNotImplementedError("Integers with more than 64 bits not implemented")

    parquet.write_table(pa.table({"text": ["a b"]}), tmp_path / "some.parquet")
    monkeypatch.setattr(parquet.ParquetFile, "read", unknown)
    with pytest.raises(UserError, match="can't read .*some.parquet: Integers with more"):
        tasks.load_questions("lambada", tmp_path / "some.parquet")


@pytest.mark.parametrize(
    ("name", "row", "complaint"),
    [
        ("wikitext2", {"page": ""}, "row 2: the page is empty"),
        ("wikitext2", {"page": "a \ud800"}, "row 2: 'page' holds .*, half of a character"),
        ("lambada", {"text": ""}, "row 2: the text is empty, expected one that ends with a word"),
        ("lambada", {"text": "a \ud800"}, "row 2: 'text' holds .*, half of a character"),
    ],
)
def test_a_text_that_cannot_be_asked_about_is_named(name, row, complaint, tmp_path):
    path, (column,) = tmp_path / "some.jsonl", row
    path.write_text("".join(json.dumps(one) + "\n" for one in ({column: "two words"}, row)))
    with pytest.raises(UserError, match=f"some.jsonl, {complaint}"):
        tasks.load_questions(name, path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"text": ' + "[" * 100_000])
def test_a_file_that_is_nested_too_deeply_is_one_line(tmp_path, text):
    path = tmp_path / "some.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match="can't read .*some.jsonl: "):
        tasks.load_questions("lambada", path)


@pytest.mark.parametrize(("name", "column"), [("lambada", "text"), ("wikitext2", "page")])
def test_a_text_of_a_million_blanks_is_measured(call, tmp_path, name, column):
    """tiktoken's regular expressions give up on them, and others could look for ever."""
    path = tmp_path / "blanks.jsonl"
    path.write_text(json.dumps({column: f"Return ( {' ' * 1_200_000}the end"}) + "\n")
    result = call("evaluate", "--checkpoint", KEPT, "--tasks", name, "--file", path)
    assert result.status == 0, result.err
    assert f"{name:<16}1 of {path}\n" in result.out


def test_a_file_is_told_by_its_hash():
    path = ITEMS / "lambada.jsonl"
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert tasks.load_questions("lambada", path).revision == sha256


def test_parquet_and_json_lines_are_the_same_questions(tmp_path):
    pq.write_table(pa.Table.from_pylist(rows_of("hellaswag")), tmp_path / "a.parquet")
    ours = tasks.load_questions("hellaswag", tmp_path / "a.parquet")
    theirs = tasks.load_questions("hellaswag", ITEMS / "hellaswag.jsonl").rows
    assert {"ctx", "endings", "label"} <= ours.rows[0].keys()
    assert ours.rows == [{name: row[name] for name in ours.rows[0]} for row in theirs]


FAR = {
    "a time": pa.array([2**61], pa.timestamp("ms")),
    "a date": pa.array([2**30 * 86_400_000], pa.date64()),
    "a duration": pa.array([2**62], pa.duration("s")),
    "a time zone": pa.array([0], pa.timestamp("s", tz="Nowhere/There")),
}


@pytest.mark.parametrize("kind", FAR)
def test_columns_that_no_task_asks_for_are_not_read(tmp_path, kind):
    table = pa.table({"text": ["one two"], "when": FAR[kind]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert tasks.load_questions("lambada", tmp_path / "a.parquet").rows == [{"text": "one two"}]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_reading_parquet_begins_no_thread(tmp_path):
    """One that is still beginning when the process ends aborts it, if PyTorch is loaded."""
    pq.write_table(pa.table({"text": ["one two"] * 3}), tmp_path / "a.parquet")
    code = (
        "import os, sys, torch, tasks, pyarrow.parquet\n"
        "threads = lambda: len(os.listdir('/proc/self/task'))\n"
        "before = threads()\n"
        "assert len(tasks.load_questions('lambada', tasks.Path(sys.argv[1])).rows) == 3\n"
        "print(threads() - before)\n"
    )
    result = run("-c", code, tmp_path / "a.parquet")
    assert result.out == "0\n", result.err


# The Hub


def parquet_of(rows: list[dict]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def parquet(name: str) -> bytes:
    return parquet_of(rows_of(name))


VALIDATION, TRAIN = (f"data/{split}-00000-of-00001.parquet" for split in ("validation", "train"))
LONG = [swag(endings=["a", "b", "c", "d"]), swag(endings=["a", "b", "c", "d " * 200])]


def hellaswag_hub() -> FakeHub:
    """HellaSwag's dataset: its files by split, as on the Hub."""
    files = {name: parquet("hellaswag") for name in (VALIDATION, TRAIN)}
    return FakeHub("Rowan/hellaswag", {COMMIT: {**files, "README.md": b"---\n---\n"}})


@pytest.fixture
def hub() -> FakeHub:
    return hellaswag_hub()


WIKITEXT = "wikitext_document_level"
EVALUATE = ("evaluate.py", "--checkpoint", KEPT, "--tasks", "hellaswag")


def test_questions_come_from_the_hub_and_their_commit_is_told(on_hub, hub, call, tmp_path):
    result = on_hub(hub, *EVALUATE, "--output", tmp_path / "found.json")
    assert f"hellaswag       5 of Rowan/hellaswag@{COMMIT[:7]}\n" in result.out, result.err
    local = call("evaluate", *EVALUATE[1:], "--file", ITEMS / "hellaswag.jsonl")
    assert result.out.splitlines()[2:] == local.out.splitlines()[2:]
    (record,) = json.loads((tmp_path / "found.json").read_text())["results"]
    assert (record["data"], record["revision"]) == ("Rowan/hellaswag", COMMIT)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("lambada", "default"),
        ("wikitext2", "wikitext-2-raw-v1"),
        ("wikitext103", "wikitext-103-raw-v1"),
    ],
)
def test_a_dataset_of_several_parts_is_asked_for_the_right_one(on_hub, call, name, config):
    questions = rows_of(name.rstrip("0123456789"))
    files = {
        "right/test.parquet": parquet_of(questions),
        "wrong/test.parquet": parquet_of(questions[:1]),
    }
    card = ["configs:"]
    for folder, called in (("wrong", "another"), ("right", config)):
        card += [f"- config_name: {called}", "  data_files:"]
        card += ["  - split: test", f"    path: {folder}/*"]
    files["README.md"] = "\n".join(["---", *card, "---", ""]).encode()
    repository = "EleutherAI/" + ("lambada_openai" if name == "lambada" else WIKITEXT)
    words = ("evaluate.py", "--checkpoint", KEPT, "--tasks", name)
    result = on_hub(FakeHub(repository, {COMMIT: files}), *words)
    assert f" {len(questions)} of {repository}@{COMMIT[:7]}\n" in result.out, result.err
    file = ITEMS / f"{name.rstrip('0123456789')}.jsonl"
    assert (
        result.out.splitlines()[2:]
        == call("evaluate", *words[1:], "--file", file).out.splitlines()[2:]
    )


def test_questions_that_were_fetched_before_need_no_network(on_hub, hub, monkeypatch):
    first = on_hub(hub, *EVALUATE)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    again = on_hub(hub, *EVALUATE)
    assert again.status == 0, again.err
    assert again.out == first.out  # the commit, too


def test_questions_that_the_hub_does_not_give_are_one_line(on_hub, hub):
    for hub.gated in (401, 403):
        assert "Rowan/hellaswag is gated: accept its terms" in on_hub(hub, *EVALUATE).error()
    hub.name = "somebody/else"
    assert "Rowan/hellaswag can't be had from the Hub" in on_hub(hub, *EVALUATE).error()


def test_a_run_does_its_tasks_now_and_then(on_hub, hub, tiny, shards, tmp_path):
    settings = (
        "--log.eval_tasks",
        "hellaswag",
        "--log.eval_tasks_every",
        2,
        "--train.max_steps",
        3,
    )
    arguments = ("--data.dir", shards, "--train.out", tmp_path / "run", "--model.block_size", 256)
    arguments += ("--train.tokens_per_step", 512)
    result = on_hub(hub, "train.py", tiny, *arguments, *settings)
    assert result.status == 0, result.err
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    told = {line["step"]: line for line in lines if line["kind"] == "hellaswag"}
    assert told.keys() == {2, 3}
    assert "step 3: hellaswag acc 0." in result.err
    file = ITEMS / "hellaswag.jsonl"
    words = ("--checkpoint", tmp_path / "run", "--tasks", "hellaswag", "--file", file)
    output = tmp_path / "found.json"
    assert on_hub(hub, "evaluate.py", *words, "--output", output).status == 0
    (record,) = json.loads(output.read_text())["results"]
    for name, metric in record["metrics"].items():
        assert told[3][name] == metric["value"]


def test_questions_that_cannot_be_had_stop_a_run_before_its_first_step(
    on_hub, hub, tiny, shards, tmp_path
):
    arguments = (
        "--data.dir",
        shards,
        "--train.out",
        tmp_path / "run",
        "--log.eval_tasks",
        "lambada",
    )
    error = on_hub(hub, "train.py", tiny, *arguments).error()
    assert "EleutherAI/lambada_openai can't be had from the Hub" in error
    assert not (tmp_path / "run").exists()


def test_an_ending_longer_than_the_context_stops_a_run_before_its_first_step(
    on_hub, hub, tiny, shards, tmp_path
):
    hub.commits[COMMIT][VALIDATION] = parquet_of(LONG)
    arguments = ("--data.dir", shards, "--train.out", tmp_path / "run")
    error = on_hub(hub, "train.py", tiny, *arguments, "--log.eval_tasks", "hellaswag").error()
    assert "hellaswag, row 2: ' d d d" in error
    assert "take a model with a longer context" in error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_ending_longer_than_the_context_is_found_before_any_task_runs(
    on_hub, hub, trained, tmp_path
):
    hub.commits[COMMIT][VALIDATION] = parquet_of(LONG)
    words = ("--checkpoint", trained, "--tasks", "val,hellaswag")
    result = on_hub(hub, "evaluate.py", *words)
    assert "hellaswag, row 2: ' d d d" in result.error()
    assert result.out == ""


def test_a_split_shorter_than_the_context_is_found_before_any_task_runs(
    on_hub, hub, call, tmp_path
):
    (tmp_path / "a.txt").write_text("Return a list. " * 100)
    words = ("--source", tmp_path / "a.txt", "--out", tmp_path / "short", "--val-tokens", 10)
    words += ("--tokenizer", KEPT / "tokenizer.tiktoken", "--workers", 1)
    assert call("prepare_fineweb", *words).status == 0
    result = on_hub(hub, *EVALUATE[:-1], "hellaswag,val", "--data", tmp_path / "short")
    assert "has 10 tokens" in result.error()
    assert result.out == ""


def test_an_ending_longer_than_the_context_is_told_with_its_row(scorer):
    rows = [*rows_of("lambada"), {"text": "some " + "word" * 200}]
    with pytest.raises(UserError, match=f"^lambada, row {len(rows)}: ' wordword"):
        tasks.lambada(rows, scorer, 0)

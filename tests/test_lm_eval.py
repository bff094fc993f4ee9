"""The same tasks by EleutherAI's lm-evaluation-harness, run on the exported model.

The harness is large, so that requirements-dev.txt doesn't have it: this test runs where
`pip install 'lm-eval[hf]'` was. `python -m tests.test_lm_eval` prints what both sides get.
"""

from __future__ import annotations

import json
import random
import re
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from checkpoint import find_checkpoint
from common.device import choose_device
from common.reports import circumstances
from convert import to_hf
from distributed import Ranks
from model import GPT
from scoring import Scorer, evaluating
from tasks import hellaswag_choices, lambada_requests, load_questions
from visuals import KEPT, ROOT

# Their task, our name for it, and the metrics that both know.
COMPARED = {
    "hellaswag": ("hellaswag", ["acc", "acc_norm"]),
    "lambada_openai": ("lambada", ["acc", "perplexity"]),
    "wikitext": ("wikitext2", ["word_perplexity", "bits_per_byte"]),
}


def write_questions(folder: Path) -> dict[str, Path]:
    """Questions of each kind: those in tests/items, which the model knows the answers of, and more
    made of README's own sentences; some pass the model's context.
    """
    draw = random.Random(0)
    text = re.sub(r"```.*?```|[`|*#\[\]]|\(\S+\)", "", (ROOT / "README.md").read_text(), flags=re.S)
    texts = [" ".join(part.split()) for part in text.split("\n\n")]
    texts = [text for text in texts if 12 < text.count(" ") < 200 and "http" not in text]
    halves = [(text[: text.find(" ", len(text) // 2)], text) for text in texts]
    endings = [" ".join(whole.removeprefix(half).split()[:20]) for half, whole in halves]
    swag = []
    for number, (half, _) in enumerate(halves):
        label = draw.randrange(4)
        four = draw.sample(endings, 4)
        four[label] = endings[number]
        first, _, second = half.rpartition(" ")
        marked = draw.choice(["{}", "[header] {} [title] And so on. [step]", "{}  twice"])
        row = {"activity_label": draw.choice(["Reading", "Writing [title] Slowly"])}
        row |= {"ctx_a": marked.format(first), "ctx_b": second, "ctx": f"{first} {second}"}
        swag.append(row | {"endings": four, "label": str(label)})
    pages = []
    for at in range(0, len(texts), 12):
        page = " \n ".join(texts[at : at + 12]).replace("-", " @-@ ")
        pages.append({"page": f" = Part {at} = \n \n " + re.sub(r"([,.:;()\"])", r" \1 ", page)})
    rows = {"hellaswag": swag, "lambada": [{"text": text} for text in texts], "wikitext2": pages}
    paths = {}
    for name, some in rows.items():
        paths[name] = folder / f"{name}.jsonl"
        kept = ROOT / "tests" / "items" / f"{name.removesuffix('2')}.jsonl"
        known = [json.loads(line) for line in kept.read_text().splitlines()]
        known = [{key: row[key] for key in some[0]} for row in known]
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in known + some))
    return paths


def theirs(folder: Path, questions: dict[str, Path]) -> dict:
    """What the harness finds: its own task files, told to read local questions."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tasks = Path(lm_eval.__file__).parent / "tasks"
    for name, (ours, _) in COMPARED.items():
        (original,) = tasks.rglob(f"{name}.yaml")
        files = {split: str(questions[ours]) for split in ("train", "validation", "test")}
        changed = {"include": str(original), "task": f"local_{name}", "dataset_path": "json"}
        changed |= {"dataset_name": None, "dataset_kwargs": {"data_files": files}}
        (folder / f"{name}.yaml").write_text(json.dumps(changed))  # JSON is YAML
    to_hf(str(KEPT), folder / "model")
    return lm_eval.simple_evaluate(
        HFLM(pretrained=str(folder / "model"), dtype="float32", device="cpu", batch_size=4),
        tasks=[f"local_{name}" for name in COMPARED],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )


def kept_model() -> Scorer:
    checkpoint = find_checkpoint(str(KEPT))
    model = GPT(checkpoint.meta.model)
    checkpoint.load_model(model)
    alone = Ranks(choose_device("cpu"))
    return Scorer(model.eval(), checkpoint.encoding(), alone, batch_tokens=1024)


def compare(folder: Path) -> dict[str, dict[str, tuple[float, float]]]:
    """{task: {metric: (ours, theirs)}}, with the share of equal choices as "same choices"."""
    questions = write_questions(folder)
    found, scorer, table = theirs(folder, questions), kept_model(), {}
    with evaluating(scorer.model):
        for name, (task, metrics) in COMPARED.items():
            asked = load_questions(task, questions[task])
            ours = asked.ask(scorer, stride=scorer.model.config.block_size)
            numbers = found["results"][f"local_{name}"]
            table[task] = {key: (ours[key].value, numbers[f"{key},none"]) for key in metrics}
        rows = load_questions("lambada", questions["lambada"]).rows
        nats, right = scorer.score(lambada_requests(rows, scorer), "lambada")
        samples = found["samples"]["local_hellaswag"]
        choices = hellaswag_choices(
            load_questions("hellaswag", questions["hellaswag"]).rows, scorer
        )
    scores = np.array([[score for score, _ in s["filtered_resps"]] for s in samples])
    lengths = np.array([[len(choice) for choice in s["doc"]["choices"]] for s in samples])
    for key, chosen in (("acc", scores.argmax(1)), ("acc_norm", (scores / lengths).argmax(1))):
        table["hellaswag"][f"same {key} choices"] = ((choices[key] == chosen).mean(), 1.0)
    words = sorted(found["samples"]["local_lambada_openai"], key=lambda sample: sample["doc_id"])
    same = [bool(sample["acc"]) for sample in words] == right.tolist()
    table["lambada"]["same words"] = (float(same), 1.0)
    assert 0 < right.sum() < len(right) == len(words)
    np.testing.assert_allclose(nats, [sample["perplexity"] for sample in words], atol=1e-3)
    table["hellaswag"]["questions"] = (len(choices["acc"]), len(samples))
    return table


def test_the_harness_makes_the_same_choices_and_finds_the_same_numbers(tmp_path):
    for package in ("lm_eval", "accelerate"):
        pytest.importorskip(package, reason="pip install 'lm-eval[hf]' to compare with it")
    for task, metrics in compare(tmp_path).items():
        for name, (ours, harness) in metrics.items():
            assert ours == pytest.approx(harness, rel=1e-4), (task, name)


def main() -> None:
    """Print what results/lm_eval.json keeps."""
    report = {
        **circumstances("python -m tests.test_lm_eval > results/lm_eval.json"),
        "what": "[ours, lm-eval's], on questions made of README, by the model in visuals/model",
        "versions": {name: version(name) for name in ("lm-eval", "torch", "transformers")},
    }
    with tempfile.TemporaryDirectory() as folder:
        json.dump(report | {"results": compare(Path(folder))}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()

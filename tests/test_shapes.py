"""The shape comments in model.py are right: each is checked against the tensors that pass it."""

from __future__ import annotations

import ast
import re
import sys

import pytest
import torch
from conftest import ROOT

import model
from data import within_documents
from model import GPT, GPTConfig

PATH = ROOT / "model.py"
B, T, C, NH, V, BLOCK = 2, 5, 12, 3, 67, 8
FREE = ("T", "N", "n", "k", "V'", "reach", "slots")  # of any size, but the same throughout a call
FIXED = {"B": B, "C": C, "4C": 4 * C, "nh": NH, "hs": C // NH, "V": V, "block": BLOCK, "1": 1}


def commented() -> dict[int, tuple[ast.stmt, int, tuple[str, ...]]]:
    """{first line: (statement, how many tensors, dimensions)} where a shape comment ends it."""
    text = PATH.read_text(encoding="utf-8")
    lines = text.splitlines()
    found = {}
    for node in ast.walk(ast.parse(text)):
        simple = isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return))
        line = lines[node.end_lineno - 1] if simple else ""
        comment = re.search(r"#(?: (\d+) ×)?[^#(]*\(([^)]*)\)", line)
        if comment:
            dimensions = (part.strip() for part in comment[2].split(","))
            shape = tuple(part for part in dimensions if part)
            found[node.lineno] = (node, int(comment[1] or 1), shape)
    return found


def value_of(node: ast.expr, variables: dict) -> object:
    """What a name, an attribute, an element or a tuple of them stands for now."""
    match node:
        case ast.Name():
            return variables[node.id]
        case ast.Attribute():
            return getattr(value_of(node.value, variables), node.attr)
        case ast.Subscript():
            return value_of(node.value, variables)[value_of(node.slice, variables)]
        case ast.Tuple():
            return [value_of(part, variables) for part in node.elts]
    raise TypeError(ast.dump(node))


class ShapeChecker:
    """A tracer that compares tensors with comments as the lines of model.py are run."""

    def __init__(self) -> None:
        self.statements = commented()
        self.met: set[int] = set()

    def __call__(self, frame, event, argument):  # noqa: ANN001
        if frame.f_code.co_filename != str(PATH):
            return None
        pending, free = [], {}  # statements begun in this frame; what T and the like are in it

        def finish(result: object = None) -> None:
            while pending:
                node, count, dimensions = pending.pop()
                if not isinstance(node, ast.Return):
                    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                    result = value_of(target, frame.f_locals)
                tensors = result if isinstance(result, list) else [result]
                assert len(tensors) == count, f"line {node.lineno}: {len(tensors)} tensors"
                for tensor in tensors:
                    self.check(tensor, dimensions, free, node.lineno)

        def trace(frame, event, argument):  # noqa: ANN001
            if event == "line":
                inside = pending and pending[0][0].lineno <= frame.f_lineno
                if not (inside and frame.f_lineno <= pending[0][0].end_lineno):
                    finish()
                    if frame.f_lineno in self.statements:
                        pending.append(self.statements[frame.f_lineno])
            elif event == "exception":  # recomputation stops itself with one, in mid-line
                pending.clear()
            elif event == "return":
                finish(argument)
            return trace

        return trace

    def check(self, result: object, dimensions: tuple[str, ...], free: dict, line: int) -> None:
        assert isinstance(result, torch.Tensor), f"line {line}: {result!r}"
        expected = [name for name in dimensions if name != "…"]
        assert result.dim() == len(expected) or "…" in dimensions, f"line {line}: {result.shape}"
        for size, name in zip(reversed(result.shape), reversed(expected)):
            if name.startswith("≤"):
                continue
            known = 1
            for factor in name.split("·"):
                assert factor in FIXED or factor in FREE, f"line {line}: what is {factor}?"
                known *= FIXED.get(factor) or free.setdefault(factor, size)
            assert size == known, f"line {line}: {name} is {known}, the tensor {result.shape}"
        self.met.add(line)


def pass_all_of_it() -> None:
    """Training, all kinds of sampling, past the end of the context."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(V, BLOCK, n_layer=2, n_head=NH, n_embd=C))
    recomputing = GPT(GPTConfig(V, BLOCK, n_layer=1, n_head=NH, n_embd=C, recompute=True))
    ids = torch.randint(V, (B, T))
    for one in (gpt, recomputing):
        one(ids, ids).backward()
    gpt(ids)
    with torch.no_grad():
        for in_blocks in (False, True):
            gpt(ids, None, within_documents(ids, V - 1, in_blocks))
    list(gpt.generate(ids, BLOCK, top_k=5, top_p=0.5))
    next(gpt.generate(ids, 1, temperature=0))
    q, k, v = torch.randn(3, B, NH, T, C // NH)
    model.attention_written_out(q, k, v)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_every_shape_comment_is_what_the_tensors_are():
    checker, before = ShapeChecker(), sys.gettrace()
    sys.settrace(checker)
    try:
        pass_all_of_it()
    finally:
        sys.settrace(before)
    assert len(checker.statements) > 30
    assert checker.met == set(checker.statements), "commented lines that were not passed"


def test_a_wrong_shape_comment_is_noticed():
    checker = ShapeChecker()
    with pytest.raises(AssertionError, match="line 1"):
        checker.check(torch.zeros(B, T), ("B", "C"), {}, 1)
    with pytest.raises(AssertionError, match="line 1"):
        checker.check(torch.zeros(B, T), ("B", "T", "C"), {}, 1)
    with pytest.raises(AssertionError, match="line 1: what is banana"):
        checker.check(torch.zeros(B, T), ("B", "banana"), {}, 1)
    with pytest.raises(AssertionError, match="line 1"):
        checker.check(torch.zeros(B * T + 1, C), ("B·T", "C"), {"T": T}, 1)

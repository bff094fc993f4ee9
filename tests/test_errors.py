"""How the scripts meet a user whose streams are closed, full, or know only ASCII."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPT = """
import sys
from errors import Parser, run_script

def main(arguments):
    print("told", file=sys.stderr)
    print("± 1", sys.stdin.read().strip())

arguments = Parser(description="… of a script").parse_args()
sys.exit(run_script(main, arguments))
"""


def shell(redirections: str, option: str = "", **variables: str) -> subprocess.CompletedProcess:
    """The script in a shell, which opens and closes its streams."""
    words = ["bash", "-c", f'"$0" -c "$1" {option} {redirections}', sys.executable, SCRIPT]
    environment = {**os.environ, **variables}
    return subprocess.run(
        words, cwd=ROOT, env=environment, input="asked", capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("redirections", "status", "out", "err"),
    [
        ("", 0, "± 1 asked\n", "told\n"),
        ("<&-", 0, "± 1 \n", "told\n"),
        (">&-", 0, "", "told\n"),
        ("2>&-", 0, "± 1 asked\n", ""),
        ("<&- >&- 2>&-", 0, "", ""),
        (">/dev/full", 2, "", "told\nerror: can't write: No space left on device\n"),
    ],
)
def test_a_stream_that_is_closed_or_full_is_no_traceback(redirections, status, out, err):
    done = shell(redirections, PYTHONIOENCODING="utf-8")
    assert (done.returncode, done.stdout, done.stderr) == (status, out, err)


def test_a_stream_that_knows_only_ascii_gets_escapes():
    assert shell("", PYTHONIOENCODING="ascii").stdout == "\\xb1 1 asked\n"
    assert "\\u2026 of a script" in shell("", "--help", PYTHONIOENCODING="ascii").stdout


def test_an_error_of_reading_is_not_taken_for_one_of_writing():
    code = "from errors import run_script; run_script(lambda: open('/nowhere'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "FileNotFoundError" in done.stderr

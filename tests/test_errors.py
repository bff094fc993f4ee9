"""How the scripts meet a user whose streams are closed, full, or know only ASCII."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import pytest
from conftest import ROOT

from common.errors import Parser, printable

SCRIPT = """
import sys
from common.errors import Parser, run_script

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
    environment.pop("PYTHONUNBUFFERED", None)  # the end is when most is written
    options = {"input": "asked", "capture_output": True, "encoding": "utf-8", "check": False}
    return subprocess.run(words, cwd=ROOT, env=environment, **options)


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


@pytest.mark.parametrize("redirections", [">/dev/full", "| true"])
def test_help_that_nobody_reads_is_no_complaint(redirections):
    done = shell(f"{redirections}; exit ${{PIPESTATUS[0]}}", "--help")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("deed", "status", "told"),
    [
        ("raise UserError('bad')", 2, "error: bad\n"),  # and what was printed before is lost
        ("open('/nowhere')", 1, "FileNotFoundError"),
        ("raise OSError(5, 'Input/output error')", 2, "error: can't read or write: Input/output"),
        ("raise OSError(5, 'Input/output error', 'file')", 1, "Traceback"),
        ("raise OSError(28, 'No space left on device')", 2, "error: can't write: No space left"),
    ],
)
def test_what_is_left_to_be_written_to_a_full_disk_changes_no_message(deed, status, told):
    code = "import sys\nfrom common.errors import UserError, run_script\ndef main():\n"
    code += f"    print('before')\n    {deed}\nsys.exit(run_script(main))"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            *([sys.executable, "-c", code],),
            cwd=ROOT,
            env=environment,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    if status == 1:
        assert told in done.stderr
    else:
        assert done.stderr.startswith(told) and done.stderr.count("\n") == 1
        assert done.returncode == status


ENDING = """
import sys, threading, time
from common.errors import Parser, UserError, run_script

def main(arguments):
    threading.Thread(target=time.sleep, args=(60,)).start()  # which the interpreter waits for
    raise UserError("bad")

sys.exit(run_script(main, Parser().parse_args()))
"""


def test_under_torchrun_a_script_ends_without_waiting_for_its_threads():
    words = [sys.executable, "-c", ENDING]
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 50}
    done = subprocess.run(words, env={**os.environ, "RANK": "1"}, **options)
    told = f"error: [rank 1 on {socket.gethostname()}] bad\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", told)


def test_ctrl_c_while_a_script_ends_is_no_traceback():
    heard = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    options = {"cwd": ROOT, "stderr": subprocess.PIPE, "text": True, "preexec_fn": heard}
    with subprocess.Popen([sys.executable, "-c", ENDING], **options) as process:
        assert process.stderr.readline() == "error: bad\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == ""
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--pat"], "unrecognized arguments: --pat; did you mean --path?"),
        (["build", "--otput", "a"], "unrecognized arguments: --otput a; did you mean --output?"),
        (["--quickly"], "unrecognized arguments: --quickly (see --help)"),
        (["build", "more"], "unrecognized arguments: more (see --help)"),
    ],
)
def test_an_option_that_is_nearly_one_is_told_the_right_one(capsys, words, told):
    """Also one that belongs to a subcommand, of which the main parser complains."""
    parser = Parser(allow_abbrev=False)
    parser.add_argument("--path")
    parser.add_subparsers(parser_class=Parser).add_parser("build").add_argument("--output")
    with pytest.raises(SystemExit):
        parser.parse_args(words)
    assert told in capsys.readouterr().err


def test_a_message_that_is_cut_off_says_so():
    assert printable("x" * 3000).endswith("x …")

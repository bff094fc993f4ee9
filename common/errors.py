"""How the scripts meet a user: one line for what the user can fix, and an exit status.

Wrong input is a UserError: scripts print it as `error: …` and exit with status 2. Being asked to
stop is no error: Stopped.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import io
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO


class UserError(Exception):
    """Wrong input. The message names the value, what was expected and what to do."""


class Stopped(Exception):
    """The script was asked to stop by a signal and has put everything in order."""

    def __init__(self, message: str, number: int) -> None:
        """`number` is the signal's; the exit status is 128 more, as shells have it."""
        super().__init__(message)
        self.status = 128 + number


class Expendable:
    """A stream of text for a script that goes on without a reader.

    `tee` ends on the Ctrl-C that was meant for the script, `head` after ten lines, a terminal with
    its connection. What is written from then on is lost, and nothing else.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """As the stream does, as long as somebody is there."""
        with self._let_go():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As `write`."""
        with self._let_go():
            self.stream.flush()

    @contextmanager
    def _let_go(self) -> Iterator[None]:
        try:
            yield
        except OSError:  # a broken pipe, or no terminal
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


def one_line(error: Exception) -> str:
    """An error's message without line ends; its kind, if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def reason_of(error: Exception) -> str:
    """Why something failed, without the path that a message of the system's repeats."""
    return getattr(error, "strerror", None) or one_line(error)


def prepare_streams() -> None:
    """See that there are streams to write to and read from, and that they take any text.

    A shell's `>&-` leaves none, and one that knows only ASCII would refuse a "±": it gets `\\xb1`.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # as their numbers are
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaint is one line."""

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse does, with streams that are fit for all that follows.

        After a process's own command line come a script's slow imports: until `run_script` takes
        over, Ctrl-C ends them without a traceback.
        """
        if args is None:
            prepare_streams()
        parsed = super().parse_known_args(args, namespace)
        if args is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _end_at_once)
        return parsed

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """As argparse does, after --help, say, whose reader may have left."""
        _flush_output()
        super().exit(status, message)

    def error(self, message: str) -> NoReturn:
        """Print the message, exit with status 2. Under torchrun the first rank speaks for all."""
        _, unknown, option = message.partition("unrecognized arguments: --")
        if unknown:
            message += did_you_mean(f"--{option}".split()[0], self._options())
        is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
        if is_alone or os.environ.get("RANK", "0") == "0":
            print(f"error: {printable(message)} (see --help)", file=sys.stderr)
        sys.exit(2)

    def _options(self) -> dict[str, str]:
        """This parser's options, and those of its subcommands, by name."""
        parsers = [self]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
        return {option: option for parser in parsers for option in parser._option_string_actions}


def did_you_mean(name: str, known: Mapping[str, str]) -> str:
    """ "; did you mean …?" with what is known by a name near to this one, or nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f"; did you mean {known[close[0]]}?" if close else ""


def printable(message: str) -> str:
    """A message, whatever a file put into it, as one line that a terminal shows and can't obey."""
    shown = message if len(message) <= 2000 else message[:2000] + " …"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)


def _end_at_once(number: int, frame: FrameType | None) -> None:
    """What a script does on Ctrl-C as long as there is nothing to put in order."""
    os._exit(128 + number)


def positive(text: str) -> int:
    """An argparse type: a whole number above 0. "100_000" and "100,000" are welcome."""
    grouped = re.fullmatch(r"[0-9]+|[0-9]{1,3}([,_][0-9]{3})+", text)
    digits = re.sub("[,_]", "", text)[:100]  # int() refuses thousands of them
    number = int(digits) if grouped else 0
    if not 1 <= number < 2**63:
        limit = "" if number < 1 else " and below 2**63"
        raise argparse.ArgumentTypeError(f"{text!r:.80}: expected a whole number above 0{limit}")
    return number


def folder_name(text: str) -> Path:
    """An argparse type: a folder's name. What an unset variable leaves would be the present one."""
    if not text:
        raise argparse.ArgumentTypeError("expected the name of a folder, got nothing")
    return Path(text)


def run_script(main: Callable[..., None], *arguments: object) -> int:
    """Call `main(*arguments)` and return the exit status: 0, 2 after a UserError, 128 + a signal.

    Under torchrun the line says which rank it comes from, because each rank may see another disk,
    and the process ends here. gloo's threads live on after destroy_process_group; one that lets go
    of a tensor while the interpreter is being taken down aborts the process (seen in one of sixteen
    runs on two busy cores: "terminate called without an active exception").
    """
    rank = os.environ.get("RANK")
    status = _status_of(
        main, arguments, f"[rank {rank} on {socket.gethostname()}] " if rank else ""
    )
    _flush_output()
    if rank:
        sys.stderr.flush()
        os._exit(status)
    return status


def _status_of(main: Callable[..., None], arguments: tuple[object, ...], where: str) -> int:
    try:
        is_ours = signal.getsignal(signal.SIGINT) is _end_at_once
        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            main(*arguments)
            sys.stdout.flush()
        finally:  # from here on there is nothing to put in order
            if is_ours:
                signal.signal(signal.SIGINT, _end_at_once)
    except UserError as error:
        print(f"error: {where}{printable(str(error))}", file=Expendable(sys.stderr))
        return 2
    except Stopped as stopped:
        print(f"{where}{stopped}", file=Expendable(sys.stderr))
        return stopped.status
    except KeyboardInterrupt:
        print(f"{where}interrupted", file=Expendable(sys.stderr))
        return 130
    except BrokenPipeError:  # whoever read our output is gone, as `head` goes after ten lines
        return 1
    except OSError as error:  # of a file that was open: the output, most likely
        deed = {errno.ENOSPC: "write", errno.EIO: "read or write"}.get(error.errno)
        if error.filename is not None or not deed:
            raise
        print(f"error: {where}can't {deed}: {error.strerror}", file=Expendable(sys.stderr))
        return 2
    return 0


def _flush_output() -> None:
    """Write what is left for standard output; if that can't be, it is lost without a complaint."""
    Expendable(sys.stdout).flush()

"""Files: what a name leads to, and how one is written so that a crash leaves the old or the new.

Names and links may have come from elsewhere, with a model or a data set, and lead anywhere.
"""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import UserError, one_line, reason_of

LOCK = "lock"  # a file that names the process at work in its folder

# Looking


def is_there(path: Path) -> bool:
    """Whether a folder has something of this name, a link to nothing included.

    Raises UserError if it can't be known: looking into a folder is a permission of its own.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"can't look for {path}: {error.strerror}") from error
    except ValueError as error:  # a name that no file can have
        raise UserError(f"can't look for {str(path)!r:.200}: {error}") from error
    return True


def is_odd(path: Path) -> bool:
    """Whether something is there that is neither a file nor a folder, such as a named pipe."""
    return path.exists() and not (path.is_file() or path.is_dir())


def own_file(folder: Path, name: str) -> Path:
    """The path of a file in `folder`. Raises UserError if the name, or a link, leads out of it, or
    to no file at all: a named pipe would be waited for until somebody writes into it.
    """
    path = folder / name
    if Path(name).name != name or "\0" in name:
        raise UserError(f"{folder} is said to hold {name!r:.80}: expected a plain name")
    try:
        lies_in = path.resolve().parent
        odd = is_odd(path)
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, an impossible name
        raise UserError(f"can't find {name!r:.80} in {folder}: {error}") from error
    if lies_in != folder.resolve():
        raise UserError(f"{path} is a link out of its folder: put the file itself there")
    if odd:
        raise UserError(f"{path} is not a regular file")
    return path


def output_file(name: Path) -> Path:
    """An --output's file, behind its links, if it has any.

    Raises UserError for a name that no file can have, or that something else has.
    """
    named = f"--output {str(name)!r:.300}"
    try:
        path = name.resolve()
        if not path.parent.is_dir():
            raise UserError(f"{named}: there is no folder {str(path.parent)!r:.300}")
        is_other = not stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        return path
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{named}: {one_line(error)}") from error
    if is_other:
        raise UserError(f"{named} is a folder or a device, expected the name of a file")
    return path


def file_sha256(path: Path) -> str:
    """A file's SHA-256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Writing


@contextmanager
def disk_errors(told: str, way_out: str = "") -> Iterator[None]:
    """Turn an error of the disk into a UserError: "{told}: the error's words{way_out}"."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{told}: {reason_of(error)}{way_out}") from error


def sync(path: Path) -> None:
    """Have a file's content, or a folder's list of names, on the disk before going on."""
    if path.is_dir() and os.name != "posix":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems have nothing to do for a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file's content, so that a crash leaves the old one or the new one."""
    temporary = _partial(path)
    with temporary.open("xb") as file:  # "wb" would follow a planted link
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def check_can_write(path: Path) -> None:
    """See that `write_atomically` can begin, ahead of long work. Raises UserError if it can't."""
    with disk_errors(f"can't write {path}"):
        temporary = _partial(path)
        temporary.touch(exist_ok=False)
        temporary.unlink()


def _partial(path: Path) -> Path:
    """Where a file is written before it gets its name; what an earlier write left there goes."""
    temporary = path.with_name(path.name + ".partial")
    temporary.unlink(missing_ok=True)
    return temporary


def _is_owner(folder: Path, name: bytes) -> bool:
    """Whether the folder is still there, and its lock, unless that alone was removed, says so."""
    try:
        return (folder / LOCK).read_bytes() == name
    except FileNotFoundError:
        return folder.is_dir()  # only the lock was removed
    except OSError:  # a disk that fails: who writes there is told better
        return True


@contextmanager
def locked(folder: Path) -> Iterator[Callable[[], bool]]:
    """Keep other processes that ask for the same lock out of `folder`; its owner is named there.

    What is given out tells whether the folder is still there, and still this process's: it may have
    been moved or removed, and another process may have begun there since.

    The system lifts the lock when the process ends, however it ends. Windows has none of the kind,
    and some network file systems don't either: there it is up to the user. Raises UserError if
    another process holds it, or if the folder can't be written to.
    """
    if os.name != "posix":
        yield lambda: True
        return
    import fcntl

    told = f"can't write to {folder}"
    with disk_errors(told):
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW  # a planted link would lose its target
        file = open(os.open(folder / LOCK, flags, 0o666), "rb+", buffering=0)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().decode(errors="replace") or "another process"
            raise UserError(f"{owner} is writing to {folder}: wait until it is done") from error
        except OSError:
            pass  # a file system without locks
        ours = f"process {os.getpid()} on {socket.gethostname()}".encode()
        with disk_errors(told):  # a file stays behind: removing it could let two others in at once
            file.truncate(0)
            file.write(ours)
        try:
            yield lambda: _is_owner(folder, ours)
        finally:
            with suppress(OSError):  # of a disk that has gone; whoever wrote there has said so
                file.truncate(0)

"""Files as they are written: whole or absent, where they belong, and by one process at a time."""

from __future__ import annotations

import errno
import io
import os
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from common.errors import UserError
from common.files import check_can_write, locked, sync, write_atomically


def test_a_lock_that_finds_no_room_on_the_disk_is_one_line(tmp_path):
    """Files can't grow for a while: the system's own refusal."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(UserError, match=f"can't write to {tmp_path}: File too large"):
            with locked(tmp_path):
                pytest.fail("it got in")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with locked(tmp_path):
        pass


def test_a_crash_while_writing_atomically_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def crash(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_the_new_name_is_on_the_disk_too_when_a_file_was_replaced(tmp_path, monkeypatch):
    """If the power failed, the old one would be there again, after what the new one told of."""
    done, fsync, replace = [], os.fsync, Path.replace

    def note_fsync(descriptor: int) -> None:
        fsync(descriptor)
        done.append(os.fstat(descriptor).st_ino)

    def note_replace(self: Path, target: Path) -> Path:
        done.append("replaced")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    write_atomically(tmp_path / "file", "new")
    assert done == [(tmp_path / "file").stat().st_ino, "replaced", tmp_path.stat().st_ino]


@pytest.mark.parametrize("kind", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_has_nothing_to_do_for_a_folder_is_no_error(tmp_path, monkeypatch, kind):
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) or files_too:
            raise OSError(kind, os.strerror(kind))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    files_too = False
    write_atomically(tmp_path / "file", "new")
    files_too = True
    with pytest.raises(OSError, match=os.strerror(kind)):
        sync(tmp_path / "file")


def test_a_lock_that_cannot_be_given_back_hides_no_error(tmp_path, monkeypatch):
    """The disk has gone: the run's own error says so, and how to go on."""

    class Lost(io.FileIO):
        def truncate(self, size: int | None = None) -> int:
            if gone:
                raise OSError(errno.EIO, "Input/output error")
            return super().truncate(size)

    gone = False
    monkeypatch.setattr(
        "common.files.open", lambda file, *_, **__: Lost(file, "rb+"), raising=False
    )
    with pytest.raises(UserError, match="^the disk has gone$"), locked(tmp_path):
        gone = True
        raise UserError("the disk has gone")


def test_a_lock_keeps_other_processes_out_until_its_owner_is_gone(tmp_path):
    code = (
        "import sys, pathlib\nfrom common import files\n"
        f"with files.locked(pathlib.Path({str(tmp_path)!r})):\n"
        "    print('locked', flush=True); sys.stdin.read()"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert owner.stdout.readline() == b"locked\n"
        told = f"process {owner.pid} on {socket.gethostname()} is writing to {tmp_path}"
        with pytest.raises(UserError, match=re.escape(told)):
            with locked(tmp_path):
                pass
    finally:
        owner.kill()
        owner.communicate()
    with locked(tmp_path):  # a lock whose owner was killed is taken over
        assert f"process {os.getpid()} on" in (tmp_path / "lock").read_text()


def test_a_planted_link_does_not_lead_a_write_out_of_the_folder(tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    victim.write_text("precious")
    folder.mkdir()
    (folder / "file.partial").symlink_to(victim)
    write_atomically(folder / "file", "new")
    assert (folder / "file").read_text() == "new"
    assert not (folder / "file").is_symlink()
    assert victim.read_text() == "precious"


def test_a_lock_that_is_a_link_is_refused(tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    victim.write_text("precious")
    folder.mkdir()
    (folder / "lock").symlink_to(victim)
    with pytest.raises(UserError, match=f"can't write to {folder}: "):
        with locked(folder):
            pass
    assert victim.read_text() == "precious"


def test_that_a_write_can_begin_is_found_out_without_a_trace(tmp_path):
    (tmp_path / "outside").write_text("kept")
    (tmp_path / "a.partial").symlink_to(tmp_path / "outside")  # planted, or left by a crash
    check_can_write(tmp_path / "a")
    assert {path.name for path in tmp_path.iterdir()} == {"outside"}
    assert (tmp_path / "outside").read_text() == "kept"
    for path in (tmp_path / ("a" * 250), tmp_path / "none" / "a", tmp_path / "outside" / "a"):
        with pytest.raises(UserError, match=f"can't write {path}: "):
            check_can_write(path)


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with locked(tmp_path) as is_ours:
        assert is_ours()


def test_a_disk_that_fails_takes_no_folder_away(tmp_path, monkeypatch):
    """Whoever writes there next is told of the disk."""

    def fail(self: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with locked(tmp_path) as is_ours:
        monkeypatch.setattr(Path, "read_bytes", fail)
        assert is_ours()

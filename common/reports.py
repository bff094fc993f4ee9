"""What a file of results/ tells beside its numbers: command, date, hardware, versions."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from common.files import disk_errors, output_file, write_atomically
from common.records import strict


def hardware() -> str:
    """The processor and its cores, as Linux tells; a GPU's name stands under "machine"."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), "CPU")
    return f"{os.cpu_count()} × {name}, {platform.system()} {platform.machine()}"


def versions() -> dict[str, str]:
    """Of Python and of the packages that matter to speed."""
    found = {"python": platform.python_version()}
    for name in ("torch", "tiktoken", "numpy", "datasets", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit(folder: Path) -> str | None:
    """HEAD's short hash, with "+" if a tracked file outside results/ differs; None if unknown."""
    git = ("git", "--git-dir=.git")  # of this folder, not of one that it was unpacked in
    options = {"cwd": folder, "capture_output": True, "text": True, "check": False}
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], **options)
    except OSError:  # there is no git
        return None
    if head.returncode:
        return None
    paths = (".", ":!results")
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *paths], **options).returncode
    return head.stdout.strip() + ("+" if changed else "")


def circumstances(command: str) -> dict[str, object]:
    """What a file of results/ tells of how, when and where its numbers were found."""
    return {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(Path(__file__).parent.parent),
        "hardware": hardware(),
        "versions": versions(),
    }


def write_report(path: Path, report: dict) -> None:
    """Write what --output keeps as JSON; a number that isn't finite is null there.

    Raises UserError if the disk is full, or gone.
    """
    with disk_errors(f"can't write {path}"):
        write_atomically(output_file(path), json.dumps(strict(report), indent=1) + "\n")

"""Scripts as real processes that needn't wait for `import torch`.

A server process imports the large packages once. Each script is then run by a process forked from
it, with its own arguments, environment, files and exit status, and with none of this repository's
modules loaded. A fresh interpreter would give it the same after two seconds (on a busy machine a
minute) of imports, but for its beginning and its end: here all hash texts alike, and none is taken
down. So each script is started by a test as a user does it, too: run(…, fresh=True).
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

LARGE = ["torch", "torch.utils.checkpoint", "torch.distributed", "torch._dynamo", "numpy"]
LARGE += ["torch.distributed.run", "tiktoken", "regex", "safetensors.torch", "tqdm"]
# What `datasets` imports. Itself, it reads HF_ENDPOINT and HF_HOME when it is imported.
LARGE += ["pandas", "pyarrow.dataset", "pyarrow.parquet", "fsspec", "multiprocess", "asyncio"]


def start_forked(
    words: list[str], folder: Path, environment: dict[str, str], files: list[Path]
) -> BaseProcess:
    """As `run_forked`, without waiting for the end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LARGE)
    arguments = (words, str(folder), environment, [str(path) for path in files])
    process = context.Process(target=_become, args=arguments)
    process.start()
    return process


def run_forked(
    words: list[str], folder: Path, environment: dict[str, str], files: list[Path], timeout: float
) -> int | None:
    """Run `words` in `folder`: a script or `-m` and a module, and arguments; returns the status.

    `files` become its standard input, output and error. None if it had to be killed after `timeout`
    seconds; a negative status is a signal's number, as in subprocess.
    """
    process = start_forked(words, folder, environment, files)
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        return None
    return process.exitcode


def _become(words: list[str], folder: str, environment: dict[str, str], files: list[str]) -> None:
    """Be the process of a script."""
    gc.freeze()  # or each of the script's collections would go through all that was imported
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(files):
        handle = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)
    sys.argv = words[words[0] == "-m" :]
    apart = {folder, str(Path(__file__).parent)}  # a script sees the repository, not the tests
    sys.path[:] = [folder, *(path for path in sys.path if os.path.abspath(path) not in apart)]
    if words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")

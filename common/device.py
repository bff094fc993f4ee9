"""Where the work runs: which device, in which arithmetic, and when it is done there."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from common.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names of settings in glibc's malloc.h

# What PyTorch says of a tensor that found no room; the last, if its size has more than 64 bits.
NO_ROOM = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "storage size calculation overflowed",
)

# Dense bf16 matrix products per second, in FLOP/s, by what the device calls itself: the vendor's
# datasheet for each. A device that isn't here has no MFU: better none than a wrong one.
PEAK_FLOPS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A10": 125e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
}


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of this process; "auto" takes CUDA, else Apple's mps, else the CPU.

    On a machine with several GPUs, each of its processes has one. Raises UserError if it isn't
    there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("device mps: this machine has none; use cpu")
    if name != "cuda":
        return torch.device(name)
    count = torch.cuda.device_count()
    if count == 0:
        raise UserError(
            f"device cuda: no NVIDIA GPU can be seen by this PyTorch ({torch.__version__}); see "
            "what nvidia-smi says, or use cpu"
        )
    if local_rank >= count:
        raise UserError(
            f"device cuda:{local_rank}: this machine shows {count} GPUs; start no more processes "
            "than that with --nproc-per-node, or use cpu"
        )
    return torch.device("cuda", local_rank)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The arithmetic of matrix products; "auto" takes bfloat16 where the hardware multiplies in it.

    That is CUDA from compute capability 8.0 on and CPUs with AMX or AVX512-BF16. Older GPUs get
    float16, which needs a gradient scaler, everything else float32.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        is_recent = torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere, 2020
        return torch.bfloat16 if is_recent else torch.float16
    if device.type == "cpu" and _cpu_has_bfloat16():
        return torch.bfloat16
    return torch.float32


def _cpu_has_bfloat16() -> bool:
    if not hasattr(torch.cpu, "get_capabilities"):  # an older torch
        return False
    features = torch.cpu.get_capabilities()
    return bool(features.get("amx_bf16") or features.get("avx512_bf16"))


def device_name(device: torch.device) -> str:
    """What the device calls itself, such as "NVIDIA H100 80GB HBM3", or else its kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory(device: torch.device) -> int | None:
    """The most bytes held at once so far: on a GPU of NVIDIA's by tensors, else by this process.

    None on Windows, where nothing tells.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # Linux; what getrusage tells there may be the parent's
    if status.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    if os.name != "posix":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Moment:
    """A point in a device's queue of work, to wait for or to time. A CPU's has come already.

    A GPU works on by itself, so that its moments may lie ahead.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.event = torch.cuda.Event(enable_timing=True) if self.on_gpu else None
        self.time = time.perf_counter()
        if self.on_gpu:
            self.event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Return when it has come."""
        if self.on_gpu:
            self.event.synchronize()

    def seconds_after(self, earlier: Moment) -> float:
        """How long after another moment of the same device it comes."""
        if not self.on_gpu:
            return self.time - earlier.time
        self.wait()
        return earlier.event.elapsed_time(self.event) / 1000


@contextmanager
def memory_errors(advice: str) -> Iterator[None]:
    """Turn an out-of-memory error into a UserError that gives this advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # often, only its message tells
        told = str(error).lower()
        if isinstance(error, MemoryError) or any(words in told for words in NO_ROOM):
            raise UserError(f"out of memory: {advice}") from error
        raise


def keep_freed_memory() -> None:
    """Have the C library keep what a process frees, to hand it out again: for training on a CPU.

    glibc gives large blocks back to the system at once. The next step asks for them again and gets
    them page by page, each cleared first. The price is a heap with gaps: a tenth more memory was
    seen with compiled models, and up to half more without, whose blocks come in more sizes.
    Without glibc nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        mallopt(M_MMAP_MAX, 0)  # no block has a mapping of its own …
        mallopt(M_TRIM_THRESHOLD, -1)  # … and the heap's end is never given back


def peak_flops(device: torch.device) -> float | None:
    """The datasheet's bf16 FLOP/s of a GPU, or None for one that the table doesn't know."""
    return PEAK_FLOPS.get(device_name(device))

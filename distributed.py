"""Where the work runs: the device, its arithmetic, and the processes that torchrun started.

torchrun starts one process per GPU and tells each its place by environment variables: RANK (which
of all processes), LOCAL_RANK (which on this machine) and WORLD_SIZE (how many there are). Started
by plain `python`, a script is a world of one. On GPUs the processes talk through NCCL, on CPUs
through gloo; the code is the same.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from errors import UserError
from guard import RollCall

all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # torch < 2.13

Result = TypeVar("Result")
GRACE = 30  # seconds that a collective waits longer than RollCall, which can say for whom

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names of settings in glibc's malloc.h

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


def choose_device(name: str) -> torch.device:
    """The device of this process; "auto" takes CUDA, else Apple's mps, else the CPU.

    On a machine with several GPUs, LOCAL_RANK picks one. Raises UserError if it isn't there.
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
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"device cuda:{local_rank}: this machine shows {torch.cuda.device_count()} GPUs; "
            "start fewer processes with --nproc-per-node, or use cpu"
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
        return (
            torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
        )
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


class Moment:
    """When a device is done with what it has been given so far. A CPU is done already.

    A GPU works on by itself, so that its moments may lie ahead: to ask for one is to wait for it.
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
    """Turn the error of a tensor that found no room into a UserError that gives this advice."""
    try:
        yield
    except RuntimeError as error:  # on a CPU, torch tells it by a message only
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
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


class TreeSum:
    """A sum of tensors in a fixed order: neighbours first, then neighbouring pairs, and so on.

    Floating-point sums depend on their order. In this one, as many tensors as a power of two add up
    to the same bits whether they are added here or are one item of a larger TreeSum. No more than
    log2(count) + 1 tensors are kept.
    """

    def __init__(self) -> None:
        self.parts: list[tuple[int, Tensor]] = []  # (how many tensors, their sum), falling counts

    def add(self, tensor: Tensor) -> None:
        """Add the next tensor, which may be changed."""
        count = 1
        while self.parts and self.parts[-1][0] == count:
            count, tensor = 2 * count, self.parts.pop()[1].add_(tensor)
        self.parts.append((count, tensor))

    def result(self) -> Tensor:
        """The sum of all."""
        _, total = self.parts.pop()
        while self.parts:
            total = self.parts.pop()[1].add_(total)
        return total


@dataclass(frozen=True)
class Ranks:
    """This process's place among all, and how it talks to the others."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    local_world_size: int = 1  # processes on this machine
    roll_call: RollCall | None = None  # if there are others

    @property
    def is_first(self) -> bool:
        """Rank 0 writes the files and talks to the user."""
        return self.rank == 0

    def arrive(self) -> None:
        """Come to where all ranks meet, so that those who don't come can be told."""
        if self.roll_call:
            self.roll_call.arrive()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, on every rank; in place."""
        self.arrive()
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def anywhere(self, here: bool) -> bool:
        """Whether it is so on any rank."""
        return self.sum(torch.tensor(float(here), device=self.device)).item() > 0

    def stop_asked(self, here: bool) -> bool:
        """Whether this rank (`here`) or, as far as is known by now, another was asked to stop.

        Nobody waits for others here, so the ranks may see it at different moments.
        """
        return self.roll_call.stop_asked(here) if self.roll_call else here

    def merge(self, table: Tensor) -> Tensor:
        """One table, on every rank's CPU, of the ranks' own, which are 0 where others worked."""
        return self.sum(table.to(self.device)).cpu() if self.world_size > 1 else table

    def tree_sum(self, vector: Tensor) -> Tensor:
        """The sum of the ranks' vectors (N,) by `TreeSum`, in the order of ranks, on every rank.

        Each rank adds up one slice of all vectors: what is sent is as much as in a ring all-reduce.
        """
        W, N = self.world_size, len(vector)
        if W == 1:
            return vector
        self.arrive()
        padded = F.pad(vector, (0, -N % W))
        slices = torch.empty_like(padded)
        dist.all_to_all_single(slices, padded)  # rank r gets everybody's slice r
        total = TreeSum()
        for part in slices.chunk(W):
            total.add(part)
        all_gather(padded, total.result())
        return padded[:N]

    def gather(self, part: Tensor) -> Tensor:
        """The ranks' parts (n, …), of one shape, one after another on every rank: (W · n, …)."""
        if self.world_size == 1:
            return part
        self.arrive()
        whole = part.new_empty(self.world_size * len(part), *part.shape[1:])
        all_gather(whole, part.contiguous())
        return whole

    def in_turn(self, get: Callable[[], Result]) -> Result:
        """Call `get` on one rank of each machine first: what it fetches, the others find there."""
        first = self.local_rank == 0
        with self.together():
            result = get() if first else None
        with self.together():
            return result if first else get()

    def agree(self, number: int) -> int:
        """Rank 0's number, on every rank. So a decision is made once and followed by all."""
        box = torch.tensor(number, device=self.device)
        self.arrive()
        if self.world_size > 1:
            dist.broadcast(box, src=0)
        return int(box)

    def check_same(self, what: str, text: str) -> None:
        """Raises UserError on the ranks where `text` isn't what it is on rank 0."""
        ours = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
        theirs = self.agree(ours)
        with self.together():
            if ours != theirs:
                raise UserError(f"{what} here is not that of rank 0: all machines need the same")

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is done inside succeeds on all ranks, or fails on all: UserError.

        It must not wait for other ranks itself, as one that has failed doesn't come.
        """
        failure = None
        try:
            yield
        except UserError as error:
            failure = error
        failed = self.sum(torch.tensor(float(failure is not None), device=self.device))
        if failure:
            raise failure
        if failed:
            raise UserError(f"{int(failed)} of {self.world_size} processes can't go on, see there")

    def wait_for_all(self) -> None:
        """Return once every rank has come here."""
        self.arrive()
        if self.world_size > 1:
            dist.barrier()


@contextmanager
def process_group(device_name: str, timeout_seconds: int) -> Iterator[Ranks]:
    """Join the processes that torchrun started; leave them whatever happens inside.

    Raises UserError if the device isn't there.
    """
    device = choose_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    ranks = Ranks(
        rank=int(os.environ.get("RANK", "0")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        device=device,
    )
    if ranks.world_size == 1:
        yield ranks
        return
    if device.type == "mps":
        raise UserError("device mps: several processes can't share it; use cpu or one process")
    timeout = timedelta(seconds=timeout_seconds + GRACE)
    store, *_ = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    attempt = name_attempt(store, ranks.rank, ranks.world_size, timeout.total_seconds())
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(attempt, store),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    roll_call = _begin_roll_call(ranks, attempt, timeout_seconds)
    try:
        with roll_call.telling_failures():
            yield replace(ranks, roll_call=roll_call)
    finally:
        roll_call.close()
        dist.destroy_process_group()


def name_attempt(store: dist.Store, rank: int, world_size: int, timeout_seconds: float) -> str:
    """A name that no earlier start of these processes had; the same on every rank.

    torchrun's store outlives the processes. Those that it starts again can't tell what their peers
    say from what the dead have left there, such as the address of a closed port
    (https://github.com/pytorch/pytorch/issues/135712). So they talk under a new name, and agree on
    it by a handshake: a rank says hello with a nonce, and rank 0 answers whoever knows that nonce.

    Raises UserError if somebody doesn't come in time.
    """
    nonce, deadline = uuid.uuid4().hex, time.monotonic() + timeout_seconds
    if rank > 0:
        store.set(f"hello/{rank}", nonce)
        try:
            name = store.get(f"welcome/{nonce}").decode()
        except dist.DistStoreError:
            raise UserError(f"rank 0 hasn't come within {timeout_seconds:g} s") from None
        store.set(f"joined/{name}/{rank}", "")
        return name
    missing = list(range(1, world_size))
    while missing := [r for r in missing if not store.check([f"joined/{nonce}/{r}"])]:
        for r in missing:
            if store.check([f"hello/{r}"]):  # a dead one's, perhaps, until it says its own
                store.set(f"welcome/{store.get(f'hello/{r}').decode()}", nonce)
        if time.monotonic() > deadline:
            told = ", ".join(map(str, missing))
            raise UserError(f"rank {told} hasn't come within {timeout_seconds:g} s")
        time.sleep(0.02)
    return nonce


def _begin_roll_call(ranks: Ranks, attempt: str, timeout_seconds: int) -> RollCall:
    """A RollCall in the store that the ranks found one another by, through a connection of its own.

    A connection is busy while somebody waits for a key.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=timeout_seconds + GRACE)
    store = dist.TCPStore(host, port, is_master=False, timeout=timeout)
    store = dist.PrefixStore(f"{attempt} roll call", store)
    roll_call = RollCall(store, ranks.rank, ranks.world_size, timeout_seconds)
    ranks.wait_for_all()  # so that it finds all of them there
    roll_call.watch()
    return roll_call

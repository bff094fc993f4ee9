"""The processes that torchrun started: how they find one another, talk, and notice who is missing.

torchrun starts one process per GPU and tells each its place by environment variables: RANK (which
of all processes), LOCAL_RANK (which on this machine) and WORLD_SIZE (how many there are). Started
by plain `python`, a script is a world of one. On GPUs the processes talk through NCCL, on CPUs
through gloo; the code is the same.
"""

from __future__ import annotations

import hashlib
import os
import re
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

from common.device import choose_device
from common.errors import Stopped, UserError, one_line
from training.guard import RollCall

all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # torch < 2.13

LEFT: list[dist.ProcessGroup] = []  # by `process_group`, which tells why they are kept
Result = TypeVar("Result")
GRACE = 30  # seconds that a collective waits longer than RollCall, which can say for whom


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
    """This process's place among all, if there are others, and how it talks to them."""

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
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
        """The sum of the ranks' tables, on every rank's CPU; rows that others did are 0 in each.

        A world of one leaves it where it is: a table may be in float64, which mps doesn't know.
        """
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
        ours = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])  # fit into int64
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
            raise UserError(f"{int(failed)} of {self.world_size} ranks failed: see what they said")


def _from_torchrun(name: str, default: int, allowed: range) -> int:
    """A number that torchrun tells in the environment. Raises UserError for one that can't be."""
    text = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,10}", text) or int(text) not in allowed:
        most = allowed[-1]
        raise UserError(f"{name} is {text!r:.40}, expected a number from {allowed[0]} to {most}")
    return int(text)


def _own_place(device_name: str) -> Ranks:
    """This process's device and place, as torchrun tells it; one alone is a world of one.

    Raises UserError if the device isn't there.
    """
    world_size, local_rank = _from_torchrun("WORLD_SIZE", 1, range(1, 2**31)), 0
    if world_size > 1:  # else a rank that somebody has set says nothing
        local_rank = _from_torchrun("LOCAL_RANK", 0, range(world_size))
    device = choose_device(device_name, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1:
        return Ranks(device)
    if device.type == "mps":
        raise UserError("device mps: several processes can't share it; use cpu or one process")
    return Ranks(
        device,
        rank=_from_torchrun("RANK", 0, range(world_size)),
        local_rank=local_rank,
        world_size=world_size,
        local_world_size=_from_torchrun("LOCAL_WORLD_SIZE", 1, range(1, world_size + 1)),
    )


@contextmanager
def process_group(
    device_name: str, timeout_seconds: int, joining_seconds: int | None = None
) -> Iterator[Ranks]:
    """Join the processes that torchrun started, and leave them when all have come to their end.

    They wait for one another for `timeout_seconds`; until they have found one another, for
    `joining_seconds` if given.

    NCCL's leaving waits for all ranks. Where one has failed, the process's end has to do
    (`run_script`). And gloo's group, when it is freed, waits for its thread, which may be waiting
    for Python's lock to free the last tensor that was sent: for ever, since who frees the group
    holds that lock. So what was left isn't freed. Raises UserError if the device isn't there.
    """
    ranks = _own_place(device_name)
    if ranks.world_size == 1:
        yield ranks
        return
    attempt = _join(ranks, (joining_seconds or timeout_seconds) + GRACE, timeout_seconds + GRACE)
    roll_call = _begin_roll_call(ranks, attempt, timeout_seconds)
    all_have_ended = False
    try:
        with roll_call.telling_failures():
            yield replace(ranks, roll_call=roll_call)
        all_have_ended = True
    except Stopped:
        all_have_ended = True
        raise
    finally:
        try:
            if all_have_ended:
                LEFT.append(dist.group.WORLD)
                dist.destroy_process_group()  # may wait for a rank that fails yet: still watched
        finally:
            roll_call.close()


def _join(ranks: Ranks, joining_seconds: int, timeout_seconds: int) -> str:
    """Find the other processes and form a group with them; returns the name of this attempt.

    Raises UserError if somebody doesn't come in time.
    """
    joining, on_gpu = timedelta(seconds=joining_seconds), ranks.device.type == "cuda"
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=joining))
        store.set_timeout(joining)
        attempt = name_attempt(store, ranks.rank, ranks.world_size, joining_seconds)
        dist.init_process_group(
            backend="nccl" if on_gpu else "gloo",
            store=dist.PrefixStore(attempt, store),
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=timedelta(seconds=timeout_seconds),
            device_id=ranks.device if on_gpu else None,
        )
    except (dist.DistError, ValueError) as error:  # the latter: a variable is missing
        raise UserError(f"can't meet the other processes: {one_line(error)}") from error
    return attempt


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
    dist.barrier()  # so that it finds all of them there
    roll_call.watch()
    return roll_call

"""How far does it scale? Step time, efficiency, memory and cost, worked out on paper.

    python bench.py plan --tokens-per-second 400000

Nothing here is measured but the speed of one GPU that is put in. From that follows what W of them
reach when, as in DDP, each computes its share of the step and all then sum their gradients, by a
ring all-reduce that runs while the last backward pass is still going on.
"""

from __future__ import annotations

from dataclasses import dataclass

from data import largest_micro_batch

GRADIENT_BYTES = 4  # float32
BUCKET_BYTES = 25 * 2**20  # DDP sends gradients in buckets; most have at least this size


@dataclass(frozen=True)
class Cluster:
    """GPUs, and what connects them."""

    gpus: int
    bandwidth: float  # bytes per second that a GPU sends and receives at once
    latency: float  # seconds until a neighbour's first byte is there

    def all_reduce_seconds(self, size: float) -> float:
        """The time of a ring all-reduce of `size` bytes.

        In each of 2 (W - 1) rounds every GPU sends a W-th of it to its neighbour (Patarasuk and
        Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations").
        """
        rounds = 2 * (self.gpus - 1)
        return rounds * (size / self.gpus / self.bandwidth + self.latency)


@dataclass(frozen=True)
class StepTime:
    """An optimizer step on a cluster, in seconds."""

    windows: int  # per GPU and micro-batch
    accumulation: int  # micro-batches per GPU
    computing: float
    sending: float  # the whole all-reduce
    waiting: float  # the part of it that no computing hides

    @property
    def total(self) -> float:
        """The step, computing and waiting."""
        return self.computing + self.waiting


def step_time(
    cluster: Cluster,
    windows_per_step: int,
    micro_batch_size: int,
    block_size: int,
    tokens_per_second: float,
    parameters: int,
    last_parameters: int,
) -> StepTime | None:
    """What a step takes on the cluster; None if it can't share the step's windows out evenly.

    `tokens_per_second` is one GPU's, and is taken to be the same for smaller micro-batches, which
    flatters large clusters. Half of a micro-batch's time is its backward pass, as measured
    (results/bench_h200_document_mask.json): HeadLoss makes its gradients in the forward pass. The
    gradients of the embeddings, `last_parameters`, are ready at its very end: nothing hides their
    sending.
    """
    share, rest = divmod(windows_per_step, cluster.gpus)
    if share == 0 or rest:
        return None
    windows = largest_micro_batch(share, micro_batch_size)
    computing = share * block_size / tokens_per_second
    earlier = GRADIENT_BYTES * (parameters - last_parameters)
    buckets = max(1, earlier // BUCKET_BYTES)
    hidden = buckets * cluster.all_reduce_seconds(earlier / buckets)
    last = cluster.all_reduce_seconds(GRADIENT_BYTES * last_parameters)
    backward = computing * windows / share / 2
    waiting = last + max(0.0, hidden - backward)
    return StepTime(windows, share // windows, computing, hidden + last, waiting)

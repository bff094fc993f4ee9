"""Faster generation: the same tokens, but for rounding, from steps that suit the hardware.

Nothing here is needed to understand how text grows (`GPT.generate` in model.py). On a CPU a step is
as fast as the weights can be read, so they are laid out for reading. On a GPU it is as fast as its
200 small kernels can be started, so they are recorded and started as one, and it isn't kept waiting
for whoever looks at the tokens. gpu_kernels.py does with a third as many.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from subprocess import CalledProcessError
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from common.device import Moment
from common.errors import UserError, one_line

if TYPE_CHECKING:
    from model import GPT, KVCache

ROWS = 16  # the batch that weights are laid out for; smaller and larger ones are fast with it too


class PackedLinear(nn.Module):
    """A linear layer of a CPU, its weights in blocks that one core reads one after another.

    They are oneDNN's (https://github.com/uxlfoundation/oneDNN), which PyTorch brings along; it is
    what torch.compile makes of frozen weights. For inference only.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """`weight` (out, in) is copied."""
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """x: (…, in) -> (…, out)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def can_pack(model: GPT) -> bool:
    """Whether PyTorch can multiply with packed weights of this model's type, on its device."""
    weight = model.wte.weight
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


def pack_weights(model: GPT) -> None:
    """Replace all linear layers by packed ones, where that is possible.

    There is no way back, nor to another type or to autocast.
    """
    if not can_pack(model):
        return
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(parent, name, PackedLinear(layer.weight, layer.bias))
    model.logits = PackedLinear(model.wte.weight, None).forward


def most_fused(n_embd: int) -> int:
    """The largest batch with which our own kernels are faster (results/h200_decoding.json)."""
    return 3200 // n_embd


def compile_decoding(model: GPT) -> None:
    """Let Triton make few kernels of a decoding step, for `generate` to use on an NVIDIA GPU.

    For up to `most_fused` texts at once, and without dropout. Done for the first time, it takes
    some five seconds; Triton keeps on disk what it compiled. Raises UserError where it can't be
    done.
    """
    device = model.wte.weight.device
    if device.type != "cuda":
        raise UserError(f"compiled decoding is for NVIDIA GPUs, this is {device.type}")
    try:
        from triton.errors import TritonError

        from gpu_kernels import FusedStep
    except ImportError as error:
        raise UserError(f"compiled decoding needs Triton: {one_line(error)}") from error
    model.fused_step = FusedStep
    try:
        with torch.inference_mode(), prepare_decoding(model, 1, 1) as (cache, decode):
            cache.go_back(0)
            decode(torch.zeros(1, 1, dtype=torch.long, device=device), cache)
    except (TritonError, RuntimeError, OSError, CalledProcessError) as error:
        model.fused_step = None
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(f"compiled decoding failed in Triton: {one_line(error)}") from error


class Kept:
    """What took long to make, kept for the next caller who needs the same."""

    def __init__(self) -> None:
        self.key: Hashable = None
        self.thing: object = None

    def __reduce__(self) -> tuple:
        """A copy is empty: CUDA graphs can't be copied."""
        return Kept, ()

    @contextmanager
    def ready(self, key: Hashable, make: Callable[[], object]) -> Iterator[object]:
        """What was last made, if it was for this key, else what `make` makes.

        While one caller uses it, another gets one of their own.
        """
        found, thing = self.key, self.thing
        self.key = self.thing = None
        if found != key:
            del thing  # its memory may be needed
            thing = make()
        try:
            yield thing
        finally:
            self.key, self.thing = key, thing


def prepare_decoding(
    model: GPT, batch_size: int, tokens: int
) -> AbstractContextManager[tuple[KVCache, Callable]]:
    """A cache for so many tokens, and what computes `next_logits` of one more with it.

    What kernels of our own need is kept for the next texts, as long as they are as many, and the
    weights stay where they are.
    """
    weight, config = model.wte.weight, model.config
    is_fused = model.fused_step is not None and batch_size <= most_fused(config.n_embd)
    if not (is_fused and weight.is_cuda):
        cache = model.new_cache(batch_size, tokens)
        decode = RecordedDecoding(model, cache) if weight.is_cuda else model.next_logits
        return nullcontext((cache, decode))

    def make() -> tuple[KVCache, Callable]:
        cache = model.new_cache(batch_size, config.block_size)  # room for whatever comes next
        return cache, RecordedDecoding(model, cache, model.fused_step(model, cache))

    places = (parameter.data_ptr() for parameter in model.parameters())
    return model.kept_decoding.ready((batch_size, weight.dtype, *places), make)


class RecordedDecoding:
    """A decoding step as a CUDA graph: its many small kernels, recorded once, started as one.

    Starting each of them from Python takes longer than it runs. Of PyTorch's kernels, a graph
    serves as long as the cache's `reach` stays the same; of our own, as long as the cache does.
    """

    def __init__(self, model: GPT, cache: KVCache, step: Callable | None = None) -> None:
        """`step` is what computes `model.next_logits` for one token, if not that itself."""
        self.step, self.by_reach = step or model.next_logits, step is None
        batch_size = len(cache.layers[0].keys)
        self.ids = torch.zeros(batch_size, 1, dtype=torch.long, device=cache.position.device)
        self.recordings: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, ids: Tensor, cache: KVCache) -> Tensor:
        """The logits (B, V) after ids (B, 1); the next call overwrites them."""
        self.ids.copy_(ids)
        reach = cache.reach if self.by_reach else 0
        if reach not in self.recordings:
            self.recordings[reach] = self._record(cache)
        graph, logits = self.recordings[reach]
        graph.replay()  # moves cache.position on as well
        cache.length += 1
        return logits

    def _record(self, cache: KVCache) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        length = cache.length
        self.step(self.ids, cache)  # libraries set themselves up in a first call
        cache.go_back(length)
        graph = torch.cuda.CUDAGraph()
        # What other threads do meanwhile, such as the data loader's, doesn't concern the graph.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits = self.step(self.ids, cache)
        cache.length = length  # nothing has run yet
        return graph, logits


def one_ahead(generate: Callable[..., Iterator[Tensor]]) -> Callable[..., Iterator[Tensor]]:
    """A decorator: while a token is looked at, a GPU computes the next.

    What it gives out are copies on the CPU. To look at a tensor on the GPU is to wait for all that
    it was given to do, the next token included. Whoever stops early has made it compute, and draw,
    one token too many. A CPU's tensors are passed on as they come.
    """

    @wraps(generate)
    def tokens(*arguments: object, **options: object) -> Iterator[Tensor]:
        copied = None
        for ids in generate(*arguments, **options):
            if not ids.is_cuda:
                yield ids
                continue
            before, copied = copied, (ids.to("cpu", non_blocking=True), Moment(ids.device))
            if before:
                yield arrived(*before)
        if copied:
            yield arrived(*copied)

    def arrived(copy: Tensor, moment: Moment) -> Tensor:
        moment.wait()
        return copy

    return tokens

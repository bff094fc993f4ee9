"""GPU kernels of our own, written in Triton: a decoding step, and the loss's.

PyTorch's kernels are made for large tensors. For one token they are some 200, each over almost
before it has begun. Here a block takes five: each reads a matrix once, and does what comes before
and after it on the way. Triton (Tillet et al. 2019) comes with PyTorch for NVIDIA GPUs. What is
computed stands in model.py. It is asked for this way by `compile_decoding` in decoding.py, for the
step, and by `GPT.compile_parts`, for the loss.

A kernel gets each tensor as a pointer to its first number. It runs as many programs at once, and
`tl.program_id` tells each which it is: which part of the result (0) for which text (1). Sums are in
float32, whatever the weights are. Arguments in capitals are known to the compiler; sizes of what a
program holds at once are powers of two, and wider than what is there, which a mask says.

A kernel starts when the one before it has ended. With EARLY it starts when all programs of that
one have started, fetches what doesn't depend on it, and waits only then: NVIDIA's programmatic
dependent launch, from Hopper on (CUDA C++ Programming Guide). So nothing may stand before
`gdc_wait` that reads what another kernel launched early writes. The position, the keys and the
values of earlier tokens may be read there because the first kernel of a step and what comes after
the last are not launched early.
"""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

if TYPE_CHECKING:
    from model import GPT, Block, KVCache, LayerCache

NUMBERS = 8192  # of a matrix, that a program holds at once
COLUMNS = 2048  # of a row of logits, likewise


def tile(channels: int) -> tuple[int, int]:
    """How many rows of a matrix with so many columns a program takes, and how wide: whole rows."""
    width = triton.next_power_of_2(channels)
    return max(1, NUMBERS // width), width


@triton.jit
def embed(ids, wte, wpe, position, x, C, WIDTH: tl.constexpr, EARLY: tl.constexpr):
    """x = wte[ids] + wpe[position]. ids: (B), x: (B, C)."""
    if EARLY:
        gdc_launch_dependents()
    text, at = tl.program_id(0), tl.arange(0, WIDTH)
    is_channel = at < C
    token = tl.load(wte + tl.load(ids + text) * C + at, is_channel, 0.0).to(tl.float32)
    place = tl.load(wpe + tl.load(position) * C + at, is_channel, 0.0)
    tl.store(x + text * C + at, token + place, is_channel)


@triton.jit
def rows_of(weight, count, K, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """A program's rows of a matrix (count, K): their numbers, a mask, and their values."""
    row, at = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    is_row = row < count
    there = is_row[:, None] & (at < K)[None, :]
    return row, is_row, tl.load(weight + row[:, None] * K + at[None, :], there, 0.0)


@triton.jit
def normed_product(
    x,
    gain,
    offset,
    weight,
    bias,
    y,
    count,
    C,
    epsilon,
    GELU: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    EARLY: tl.constexpr,
):
    """y = layer_norm(x) @ weight.T + bias, then GELU if asked. x: (B, C), weight: (count, C)."""
    if EARLY:
        gdc_launch_dependents()
    text, at = tl.program_id(1), tl.arange(0, WIDTH)
    is_channel = at < C
    row, is_row, w = rows_of(weight, count, C, ROWS, WIDTH)
    scale, shift = tl.load(gain + at, is_channel, 0.0), tl.load(offset + at, is_channel, 0.0)
    result = tl.zeros((ROWS,), tl.float32)
    if bias is not None:
        result += tl.load(bias + row, is_row, 0.0)
    if EARLY:
        gdc_wait()
    channels = tl.load(x + text * C + at, is_channel, 0.0)
    centred = tl.where(is_channel, channels - tl.sum(channels) / C, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred) / C + epsilon) * scale + shift
    result += tl.sum(w.to(tl.float32) * normed[None, :], axis=1)
    if GELU:
        bend = 0.7978845608028654 * (result + 0.044715 * result * result * result)  # √(2/π)
        result *= tl.sigmoid(2 * bend)  # (1 + tanh(bend)) / 2
    tl.store(y + text * count + row, result, is_row)


@triton.jit
def put_together(logs, parts, piece, used, at, is_channel, hs):
    """What a head's pieces come to: softmax(logs) @ parts, of those used.

    It is read past the processor's own cache, which doesn't know what others have stored.
    """
    log = tl.load(logs + piece, used, -float("inf"), cache_modifier=".cg")
    there = used[:, None] & is_channel[None, :]
    part = tl.load(parts + piece[:, None] * hs + at[None, :], there, 0.0, cache_modifier=".cg")
    share = tl.exp(log - tl.max(log))
    return tl.sum(share[:, None] * part, axis=0) / tl.sum(share)


@triton.jit
def attend(
    qkv,
    keys,
    values,
    position,
    logs,
    parts,
    ended,
    y,
    slots,
    nh,
    hs,
    root,
    PLACES: tl.constexpr,
    MOST_PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Store a token's key and value, and attend to all up to it: a head (0), a piece of them (1).

    qkv: (B, 3, nh, hs), keys and values: (B, nh, slots, hs), y: (B, nh, hs). A piece's own softmax
    gives `parts`, (B, nh, pieces, hs), and the logarithm of its denominator, `logs`; softmax of
    these says how much each piece counts (Flash-Decoding, Dao et al. 2023). The program that ends
    last, which is counted in `ended`, (B, nh), 0 before and after, puts them together (as in
    threadFenceReduction of NVIDIA's CUDA samples).
    """
    if EARLY:
        gdc_launch_dependents()
    head, piece, text = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    pieces, now = tl.num_programs(1), tl.load(position).to(tl.int32)
    place, at = piece * PLACES + tl.arange(0, PLACES), tl.arange(0, WIDTH)
    is_channel = at < hs
    where = ((text * nh + head) * slots + place[:, None]) * hs + at[None, :]
    stored = (place < now)[:, None] & is_channel[None, :]
    key = tl.load(keys + where, stored, 0.0).to(tl.float32)
    value = tl.load(values + where, stored, 0.0).to(tl.float32)
    if EARLY:
        gdc_wait()
    own = qkv + (text * 3 * nh + head) * hs + at
    q = tl.load(own, is_channel, 0.0) / root
    is_own = (place == now)[:, None] & is_channel[None, :]
    key = tl.where(is_own, tl.load(own + nh * hs, is_channel, 0.0)[None, :], key)
    value = tl.where(is_own, tl.load(own + 2 * nh * hs, is_channel, 0.0)[None, :], value)
    tl.store(keys + where, key, is_own)
    tl.store(values + where, value, is_own)
    scores = tl.where(place <= now, tl.sum(key * q[None, :], axis=1), -float("inf"))
    largest = tl.max(scores)
    share = tl.exp(scores - largest)
    total = tl.sum(share)
    part = tl.sum(share[:, None] * value, axis=0) / total
    first = (text * nh + head) * pieces
    tl.store(logs + first + piece, largest + tl.log(total))
    tl.store(parts + (first + piece) * hs + at, part, is_channel)
    tl.debug_barrier()  # all of this program's threads have stored
    if tl.atomic_add(ended + text * nh + head, 1) == pieces - 1:
        tl.store(ended + text * nh + head, 0)
        every = tl.arange(0, MOST_PIECES)
        used = every <= now // PLACES  # the others are all future, and their numbers none
        summed = put_together(logs + first, parts + first * hs, every, used, at, is_channel, hs)
        tl.store(y + (text * nh + head) * hs + at, summed, is_channel)


@triton.jit
def add_product(
    y,
    weight,
    bias,
    x,
    count,
    K,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    EARLY: tl.constexpr,
):
    """x += y @ weight.T + bias. y: (B, K), weight: (count, K), x: (B, count)."""
    if EARLY:
        gdc_launch_dependents()
    text, at = tl.program_id(1), tl.arange(0, WIDTH)
    is_channel = at < K
    row, is_row, w = rows_of(weight, count, K, ROWS, WIDTH)
    b = tl.load(bias + row, is_row, 0.0)
    if EARLY:
        gdc_wait()
    result = tl.sum(w.to(tl.float32) * tl.load(y + text * K + at, is_channel, 0.0)[None, :], axis=1)
    sums = x + text * count + row
    tl.store(sums, tl.load(sums, is_row, 0.0) + result + b, is_row)


class FusedStep:
    """What `GPT.next_logits` computes for one more token of each text, in 63 kernels, not 200.

    For the 124M; 5 per block. It holds the tensors that they pass on.
    """

    def __init__(self, model: GPT, cache: KVCache) -> None:
        """For texts side by side as in `cache`, and no longer ones."""
        self.model = weakref.proxy(model)  # it keeps this step, which shouldn't keep it
        B, nh, slots, hs = cache.layers[0].keys.shape
        V, C = model.wte.weight.shape
        self.pieces = triton.cdiv(slots, tile(hs)[0])
        device = cache.position.device

        def numbers(*shape: int) -> Tensor:
            return torch.empty(shape, device=device, dtype=torch.float32)

        self.x, self.qkv, self.y = numbers(B, C), numbers(B, 3 * C), numbers(B, C)
        self.wide, self.logits = numbers(B, 4 * C), numbers(B, V)
        self.logs, self.parts = numbers(B, nh, self.pieces), numbers(B, nh, self.pieces, hs)
        self.ended = torch.zeros(B, nh, device=device, dtype=torch.int32)
        # AMD's GPUs have such numbers, too; a CPU, where Triton interprets the kernels, has none.
        on_nvidia = device.type == "cuda" and torch.version.cuda is not None
        self.early = on_nvidia and torch.cuda.get_device_capability(device) >= (9, 0)
        self.options = {"EARLY": True, "launch_pdl": True} if self.early else {"EARLY": False}

    def __call__(self, ids: Tensor, cache: KVCache) -> Tensor:
        """The logits (B, V) in float32 after ids (B, 1); the next call overwrites them.

        Raises ValueError past the capacity.
        """
        if cache.length >= cache.capacity:
            raise ValueError(f"{cache.length + 1} tokens, the cache holds {cache.capacity}")
        with torch.cuda.device_of(self.x):  # Triton's kernels run on the current one
            return self._step(ids, cache)

    def _step(self, ids: Tensor, cache: KVCache) -> Tensor:
        model, (B, C) = self.model, self.x.shape
        wte, wpe, width = model.wte.weight, model.wpe.weight, triton.next_power_of_2(C)
        # Not launched early itself: what came before the step has ended when any kernel begins.
        embed[(B,)](ids.contiguous(), wte, wpe, cache.position, self.x, C, width, self.early)
        for block, layer in zip(model.h, cache.layers):
            self._block(block, layer)
        self._normed_product(model.ln_f, wte, None, self.logits)
        cache.advance(1)
        return self.logits

    def _block(self, block: Block, layer: LayerCache) -> None:
        """Add to x (B, C) what a block does."""
        attn, mlp = block.attn, block.mlp
        (B, nh, slots, hs), (places, width) = layer.keys.shape, tile(layer.keys.size(3))
        self._normed_product(block.ln_1, attn.c_attn.weight, attn.c_attn.bias, self.qkv)
        attend[nh, self.pieces, B](
            self.qkv,
            layer.keys,
            layer.values,
            layer.position,
            self.logs,
            self.parts,
            self.ended,
            self.y,
            slots,
            nh,
            hs,
            math.sqrt(hs),
            places,
            triton.next_power_of_2(self.pieces),
            width,
            **self.options,
        )
        self._add_product(self.y, attn.c_proj)
        self._normed_product(block.ln_2, mlp.c_fc.weight, mlp.c_fc.bias, self.wide, gelu=True)
        self._add_product(self.wide, mlp.c_proj)

    def _normed_product(
        self,
        norm: nn.LayerNorm,
        weight: Tensor,
        bias: Tensor | None,
        y: Tensor,
        gelu: bool = False,
    ) -> None:
        """y = norm(x) @ weight.T + bias, then GELU if asked."""
        (count, C), (rows, width) = weight.shape, tile(weight.size(1))
        programs = triton.cdiv(count, rows), len(y)
        tensors = self.x, norm.weight, norm.bias, weight, bias, y
        normed_product[programs](*tensors, count, C, norm.eps, gelu, rows, width, **self.options)

    def _add_product(self, y: Tensor, layer: nn.Linear) -> None:
        """x += layer(y)."""
        (count, K), (rows, width) = layer.weight.shape, tile(layer.weight.size(1))
        programs = triton.cdiv(count, rows), len(y)
        tensors = y, layer.weight, layer.bias, self.x
        add_product[programs](*tensors, count, K, rows, width, **self.options)


@triton.jit
def softmax_less_one(logits, targets, log_totals, V, width, COLUMNS: tl.constexpr):
    """What `model.logits_to_gradient` does, a row per program; logits: (N, width)."""
    row, at = tl.program_id(0), tl.arange(0, COLUMNS)
    logits += row.to(tl.int64) * width
    largest, total = -float("inf"), tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + at
        value = tl.load(logits + column, column < width, 0.0).to(tl.float32)
        # Not by the load's mask: the odd V would have it read one number after the other.
        value = tl.where(column < V, value, -float("inf"))
        larger = tl.maximum(largest, tl.max(value))
        total = total * tl.exp(largest - larger) + tl.exp(value - larger)
        largest = larger
    log_total, target = largest + tl.log(tl.sum(total)), tl.load(targets + row)
    tl.store(log_totals + row, log_total)
    for start in range(0, width, COLUMNS):
        column = start + at
        value = tl.load(logits + column, column < width, 0.0).to(tl.float32)
        value = tl.where(column < V, value, -float("inf"))
        hit = tl.where(column == target, 1.0, 0.0)
        tl.store(logits + column, tl.exp(value - log_total) - hit, column < width)


def logits_to_gradient(logits: Tensor, targets: Tensor, V: int) -> Tensor:
    """As that of model.py, in a kernel that reads the logits twice, torch.compile's 3 times."""
    N, width = logits.shape
    log_totals = torch.empty(N, 1, device=logits.device)
    with torch.cuda.device_of(logits):
        softmax_less_one[(N,)](logits, targets, log_totals, V, width, COLUMNS)
    return log_totals

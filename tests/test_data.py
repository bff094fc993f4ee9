"""The order in which training reads a stream, and how a step is shared out."""

from __future__ import annotations

import shutil
import threading

import numpy as np
import pytest
import torch
from conftest import exchange_shard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from common.errors import UserError
from data import (
    BatchShape,
    StepLoader,
    epoch_order,
    largest_micro_batch,
    load_windows,
    micro_batches,
    step_windows,
    within_documents,
)
from shards import TokenStream, shard_header


@given(st.lists(st.lists(st.sampled_from([0, 1, 9]), min_size=6, max_size=6), min_size=1))
def test_a_token_sees_its_document_up_to_itself_and_positions_begin_there(rows):
    """9 begins a document, and so does the window."""
    masks, positions = within_documents(torch.tensor(rows), end_of_text=9)
    for row, (mask,), places in zip(rows, masks.tolist(), positions.tolist(), strict=True):
        for t in range(6):
            begin = max([s for s in range(t + 1) if row[s] == 9], default=0)
            assert mask[t] == [begin <= s <= t for s in range(6)]
            assert places[t] == t - begin


def windows_of_blocks() -> torch.Tensor:
    """Ids (4, 300) below 97: three of FlexAttention's blocks of 128. 96 begins a document."""
    ids = torch.randint(96, (4, 300), generator=torch.Generator().manual_seed(0))
    for row, begins in enumerate(([], [0, 127], [128, 129], [5, 128, 255, 256, 299])):
        ids[row, begins] = 96
    return ids


def test_a_mask_in_blocks_is_the_same_and_leaves_out_the_blocks_that_are_empty():
    ids = windows_of_blocks()
    whole, positions = within_documents(ids, 96)
    mask, also = within_documents(ids, 96, in_blocks=True)
    assert torch.equal(also, positions)
    assert torch.equal(create_mask(mask.mask_mod, 4, None, 300, 300, "cpu"), whole)
    padded = torch.nn.functional.pad(whole, (0, 84, 0, 84)).view(4, 1, 3, 128, 3, 128)
    is_seen = padded.any(dim=5).any(dim=3)  # (4, 1, 3, 3)
    assert torch.equal(mask.to_dense().bool(), is_seen)
    assert is_seen.flatten(1).sum(dim=1).tolist() == [6, 6, 4, 3]


@pytest.mark.parametrize("num_windows", [1, 2, 100])
def test_an_epochs_order_is_a_permutation(num_windows):
    assert sorted(epoch_order(num_windows, seed=3, epoch=2)) == list(range(num_windows))


def test_epochs_and_seeds_have_different_orders():
    orders = [tuple(epoch_order(50, s, e)) for s in range(4) for e in range(4)]
    assert len(set(orders)) == 16


def test_the_order_is_the_same_for_ever():
    """Pinned: a changed order would make a resumed run see other data."""
    assert epoch_order(10, seed=1337, epoch=0).tolist() == [3, 4, 5, 9, 7, 1, 6, 0, 8, 2]
    assert epoch_order(10, seed=1337, epoch=1).tolist() == [0, 8, 2, 1, 3, 9, 6, 4, 5, 7]
    assert step_windows(2, per_step=4, num_windows=10, seed=1337).tolist() == [8, 2, 0, 8]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 5), st.integers(1, 30))
def test_every_epoch_has_each_window_once_and_steps_run_over_its_end(
    windows, per_step, seed, steps
):
    row = np.concatenate([step_windows(s, per_step, windows, seed) for s in range(steps)])
    assert len(row) == steps * per_step
    for epoch in range(len(row) // windows):
        assert sorted(row[epoch * windows : (epoch + 1) * windows]) == list(range(windows))
    rest = row[len(row) // windows * windows :]
    assert len(set(rest)) == len(rest)


def test_seeking_to_a_late_step_costs_no_more_than_an_early_one():
    """Step 10**9 of a stream of 10 windows: an order that had to be walked would take hours."""
    assert len(step_windows(10**9, 4, 10, seed=0)) == 4


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(0, 20),
    st.integers(0, 3),
)
def test_all_ranks_together_see_the_steps_windows_in_order(
    small_stream, world_size, micro_batch_size, accumulation, block_size, step, seed
):
    windows_per_step = world_size * micro_batch_size * accumulation
    shape = BatchShape(windows_per_step * block_size, block_size, micro_batch_size, world_size)
    assert (shape.windows_per_step, shape.accumulation) == (windows_per_step, accumulation)
    seen = [
        batch
        for rank in range(world_size)
        for batch in micro_batches(small_stream, shape, seed, step, rank)
    ]
    assert [number for number, _, _ in seen] == list(range(world_size * accumulation))
    assert {inputs.shape for _, inputs, _ in seen} == {(micro_batch_size, block_size)}
    order = step_windows(step, windows_per_step, small_stream.num_windows(block_size), seed)
    inputs, targets = load_windows(small_stream, order, block_size)
    assert torch.equal(torch.cat([batch for _, batch, _ in seen]), inputs)
    assert torch.equal(torch.cat([batch for _, _, batch in seen]), targets)


@pytest.fixture(scope="module")
def small_stream(tmp_path_factory) -> TokenStream:
    folder = tmp_path_factory.mktemp("small")
    for number, tokens in enumerate(np.split(np.arange(200), [13, 90, 91])):
        path = folder / f"train_{number}.bin"
        path.write_bytes(shard_header(len(tokens)) + tokens.astype("<u2").tobytes())
    return TokenStream(folder, "train")


@pytest.mark.parametrize(
    "tokens, nearest",
    [
        (1000, "nearest: 512 or 1,024"),
        (500, "nearest: 512"),
        (768, "nearest: 512 or 1,024; or lower --train.micro_batch_size to 3"),
        (524_289, "nearest: 524,288 or 524,800"),
    ],
)
def test_a_step_that_does_not_divide_is_refused_with_the_nearest_that_do(tokens, nearest):
    with pytest.raises(UserError) as error:
        BatchShape(tokens, block_size=64, micro_batch_size=4, world_size=2)
    assert f"train.tokens_per_step = {tokens:,}" in str(error.value)
    assert "multiple of 512 (block_size 64 × micro_batch_size 4 × 2 processes)" in str(error.value)
    assert str(error.value).endswith(nearest)


@given(st.integers(1, 600), st.integers(1, 100))
def test_the_largest_micro_batch_divides_a_ranks_share(windows, limit):
    size = largest_micro_batch(windows, limit)
    assert windows % size == 0 and size <= limit
    assert all(windows % larger for larger in range(size + 1, min(windows, limit) + 1))


def test_a_batch_shape_prints_the_whole_equation():
    shape = BatchShape(524_288, block_size=1024, micro_batch_size=64, world_size=8)
    assert str(shape) == (
        "524,288 tokens per step = processes 8 × micro-batches 1 × windows 64 × tokens 1,024"
    )


# The loader


def make_loader(shards, rank: int = 0, world_size: int = 2) -> StepLoader:
    shape = BatchShape(256, 32, 2, world_size)
    return StepLoader(TokenStream(shards, "train"), shape, 5, rank, torch.device("cpu"))


def same_batches(got: list, expected: list) -> bool:
    return len(got) == len(expected) and all(
        number == other[0] and torch.equal(inputs, other[1]) and torch.equal(targets, other[2])
        for (number, inputs, targets), other in zip(got, expected)
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_the_loader_gives_each_steps_micro_batches_in_any_order_of_steps(shards, rank):
    loader = make_loader(shards, rank)
    for step in (0, 1, 2, 7, 7, 3, 4):
        expected = list(micro_batches(loader.stream, loader.shape, 5, step, rank))
        assert same_batches(loader.load(step), expected)


def test_batches_are_contiguous_so_that_a_gpu_can_fetch_them_from_pinned_memory(shards):
    stream, shape = TokenStream(shards, "train"), BatchShape(256, 32, 4, world_size=1)
    for _, *tensors in micro_batches(stream, shape, seed=1, step=0, rank=0):
        assert all(tensor.is_contiguous() for tensor in tensors)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_batches_are_pinned(shards):
    stream, shape = TokenStream(shards, "train"), BatchShape(256, 32, 4, world_size=1)
    for _, *tensors in StepLoader(stream, shape, 1, 0, torch.device("cuda", 0)).load(0):
        assert all(tensor.is_pinned() and tensor.is_contiguous() for tensor in tensors)


def test_the_loaders_thread_works_for_its_own_gpu(shards, monkeypatch):
    chosen, pinned = threading.local(), []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: vars(chosen).update(gpu=device))
    pin = lambda tensor: pinned.append(getattr(chosen, "gpu", None)) or tensor  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    stream, shape = TokenStream(shards, "train"), BatchShape(256, 32, 4, world_size=1)
    StepLoader(stream, shape, 1, 0, torch.device("cuda", 3)).load(0)
    assert set(pinned) == {torch.device("cuda", 3)}


def test_the_loader_prepares_the_next_step_while_this_one_is_used(shards, monkeypatch):
    prepared, done = [], threading.Event()
    prepare = StepLoader._prepare

    def spy(self, step: int) -> list:
        prepared.append((step, threading.current_thread() is threading.main_thread()))
        if step == 4:
            done.set()
        return prepare(self, step)

    monkeypatch.setattr(StepLoader, "_prepare", spy)
    make_loader(shards).load(3)
    assert done.wait(60)
    assert prepared == [(3, False), (4, False)]


def test_a_damaged_token_is_told_at_the_step_that_would_have_used_it(shards):
    loader = make_loader(shards)
    loader.load(0)
    loader.ahead[1].result()  # step 1 is ready
    loader.stream.vocab_size = 5
    loader.load(1)  # and begins step 2
    with pytest.raises(UserError, match="train_000000.bin has a token .*: it is damaged"):
        loader.load(2)


def test_the_shard_that_has_a_damaged_token_is_named_wherever_its_window_begins(shards, tmp_path):
    data = shutil.copytree(shards, tmp_path / "data")
    first = len(TokenStream(data, "train").shards[0])
    exchange_shard(
        data, "train_000001.bin", lambda tokens: (300).to_bytes(2, "little") + tokens[2:]
    )
    assert first % 32 == 0  # so that a window of the first shard has it as its last target
    with pytest.raises(UserError, match=r"train_000001.bin has a token 300.*only 300"):
        load_windows(TokenStream(data, "train"), [0, first // 32 - 1], 32)

"""What a run is about to do, in numbers, and the memory that it will take."""

from __future__ import annotations

import torch

from common.device import device_name
from model import GPT, HeadLoss
from shards import TokenizerRecord
from step import Stepper


def plan(stepper: Stepper, tokenizer: TokenizerRecord) -> str:
    """A few lines for people, before the first step."""
    config, shape, model, ranks = stepper.config, stepper.shape, stepper.model, stepper.ranks
    train = config.train
    asked, there = train.max_steps * shape.tokens_per_step, len(stepper.stream)
    micro_batch = train.micro_batch_size * config.model.block_size
    precision = str(stepper.dtype).removeprefix("torch.")
    averaged = config.optim.average_share > 0
    memory = estimated_memory(model, micro_batch, stepper.dtype, train.compile, averaged)
    if stepper.is_canonical:  # copies of the gradient: TreeSum's, later those of Ranks.tree_sum
        copies = max(shape.accumulation.bit_length(), 3 if ranks.world_size > 1 else 1)
        memory += 4 * model.num_parameters() * copies
    gigabytes = float(f"{memory / 1e9:.2g}")
    lines = [
        f"model       {model.num_parameters():,} parameters, vocabulary "
        f"{tokenizer.name} of {tokenizer.vocab_size:,}",
        f"batch       {shape}",
        f"compute     {model.flops_per_token() * shape.tokens_per_step:.3g} FLOP per step, "
        f"{model.flops_per_token() * asked:.3g} in all",
        f"device      {ranks.world_size} × {device_name(ranks.device)}, {precision}",
        f"memory      about {gigabytes:g} GB per process (estimate)",
        f"data        {there:,} tokens to train on; {train.max_steps:,} steps take "
        f"{asked:,}: {asked / there:.2f} epochs",
    ]
    rise, fall = config.optim.warmup_steps, config.optim.decay_steps
    if rise + max(1, fall) >= train.max_steps:
        and_fall, or_fall = f" and {fall:,} of fall", " or --optim.decay_steps"
        lines.append(
            f"schedule    {rise:,} steps of warm-up{and_fall if fall else ''} are too many for "
            f"{train.max_steps:,}: lower --optim.warmup_steps{or_fall if fall else ''}"
        )
    return "\n".join(lines)


def estimated_memory(
    model: GPT, tokens: int, dtype: torch.dtype, compiled: bool, averaged: bool = False
) -> int:
    """About how many bytes training takes with micro-batches of so many tokens.

    Weights, gradients and AdamW's two averages: 16 bytes per parameter, and 4 if the weights are
    averaged too. (Of the blocks' matrices Muon keeps one average, and in bfloat16 takes the other's
    room while it makes steps orthogonal; in float32 twice as much.) Activations kept for the
    backward pass: 17 numbers of C per token and block with fused attention (Korthikanti et al.
    2022, section 4.1, without the score matrix), or a block's input alone if the rest is recomputed
    one block at a time. And a slice of the logits; without torch.compile, also what becomes of them
    on the way to their gradient: four times as many numbers in float32.
    """
    config = model.config
    block = 17 * config.n_embd * dtype.itemsize  # bytes per token
    if config.recompute:
        bytes_in_stream = 2 if dtype == torch.bfloat16 else 4  # as GPT.hidden_states has it
        blocks = config.n_layer * config.n_embd * bytes_in_stream + block
    else:
        blocks = config.n_layer * block
    bytes_per_logit = dtype.itemsize + (0 if compiled else 16)
    logits = min(tokens, HeadLoss.SLICE) * config.vocab_size * bytes_per_logit
    return (16 + 4 * averaged) * model.num_parameters() + tokens * blocks + logits

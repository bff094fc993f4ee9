"""GPT-2 in one file, from the top: attention, MLP, block, model, and how text grows out of it.

Names are OpenAI's (wte, wpe, c_attn, c_proj, …), so that published weights fit by name. Letters in
the shape comments:

    B   batch: sequences side by side
    T   time: positions in a sequence
    C   channels: numbers per position (n_embd)
    nh  heads of attention, hs their size: nh · hs = C
    V   vocabulary: 50,257 for GPT-2

Sources: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (the GPT-2
paper), and OpenAI's released code, openai/gpt-2 `src/model.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT; the defaults are GPT-2 small, 124,439,808 parameters."""

    vocab_size: int = 50_257
    block_size: int = 1024  # the context: how many tokens the model sees at once
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # probability; 0 for pre-training, 0.1 when text is scarce

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")


class KVCache:
    """The keys and values of the tokens so far, so that each is computed once.

    Memory for the whole context is taken at the start: 2 · layers · B · block_size · C numbers.
    """

    def __init__(
        self, config: GPTConfig, batch_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        head_size = config.n_embd // config.n_head
        shape = (config.n_layer, batch_size, config.n_head, config.block_size, head_size)
        self.keys = torch.empty(shape, device=device, dtype=dtype)  # (layers, B, nh, block, hs)
        self.values = torch.empty(shape, device=device, dtype=dtype)  # (layers, B, nh, block, hs)
        self.length = 0  # tokens whose keys and values are stored, in every layer

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new k and v (B, nh, T, hs) after the old; returns all (B, nh, length + T, hs)."""
        end = self.length + k.size(2)
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


def attention_written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention step by step: softmax(q kᵀ / √hs) v, with the future masked out.

    q, k, v: (B, nh, T, hs) -> (B, nh, T, hs). The model calls PyTorch's fused kernel, which
    computes the same without ever storing the (T, T) matrix (FlashAttention, Dao et al. 2022); this
    one is here to be read, and to test the other by.
    """
    T, hs = q.shape[-2:]
    scores = q @ k.transpose(-2, -1) / math.sqrt(hs)  # (B, nh, T, T)
    causal_mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()  # (T, T)
    scores = scores.masked_fill(~causal_mask, -math.inf)  # row t: nothing right of column t
    return scores.softmax(dim=-1) @ v  # (B, nh, T, hs)


class CausalSelfAttention(nn.Module):
    """Each position gathers from itself and the positions before it. (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k and v in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """x: (B, T, C) -> (B, T, C); with a cache, x continues what `layer` of it holds."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=-1)  # 3 × (B, T, C)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.extend(layer, k, v)  # 2 × (B, nh, length + T, hs)
        dropout = self.dropout if self.training else 0.0
        # A single token is the newest and may look at everything, so it needs no mask.
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, T, C): the heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Each position thinks for itself: four times wider, GELU, and back. (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh")  # GPT-2 was trained with the approximation
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C) -> (B, T, C)."""
        x = self.gelu(self.c_fc(x))  # (B, T, 4C)
        return self.dropout(self.c_proj(x))  # (B, T, C)


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream x. (B, T, C) -> (B, T, C).

    The layer norms stand before the sublayers ("pre-norm"): x itself is never normalised on its
    way, so that gradients reach the first layer unhindered (GPT-2 paper, section 2.3).
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """x: (B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x), cache, layer)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """Token ids in, and for every position the logits of the token that comes next.

    The output layer is the token embedding once more ("tied"): no weights of its own.
    """

    def __init__(self, config: GPTConfig) -> None:
        """Weights are drawn from torch's generator: seed it first to have the same ones again.

        As in the paper, the projections into the residual stream start smaller, by 1/√(2·n_layer),
        because that many of them add up. OpenAI's released code starts them at 0.02 like all other
        matrices. Positions start at 0.01, which the paper doesn't tell and the code does.
        """
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))
            elif name == "wpe.weight":
                nn.init.normal_(parameter, std=0.01)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden_states(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Everything but the output layer. ids: (B, T) -> (B, T, C).

        With a cache, `ids` are the tokens after those it holds: all of a prompt when it is empty,
        later one at a time. Raises ValueError past the end of the context.
        """
        start = cache.length if cache is not None else 0
        T = ids.size(1)
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens, the context holds {self.config.block_size}")
        if start > 0 and T > 1:
            raise ValueError(f"{T} tokens at once after {start} cached ones: give one at a time")
        positions = torch.arange(start, start + T, device=ids.device)  # (T)
        x = self.drop(self.wte(ids) + self.wpe(positions))  # (B, T, C)
        for layer, block in enumerate(self.h):
            x = block(x, cache, layer)  # (B, T, C)
        if cache is not None:
            cache.length += T
        return self.ln_f(x)  # (B, T, C)

    def logits(self, hidden: Tensor) -> Tensor:
        """The output layer: (…, C) -> (…, V), how well each token of the vocabulary would fit."""
        return F.linear(hidden, self.wte.weight)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """ids (B, T) -> logits (B, T, V); with targets (B, T), their mean loss in nats instead.

        The loss is cross-entropy, -log p(target), over the V real tokens and in float32.
        """
        logits = self.logits(self.hidden_states(ids))  # (B, T, V)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def num_parameters(self) -> int:
        """All of them, positions included, tied ones once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> int:
        """Floating-point operations to train on one token, forward and backward.

        6 per parameter, and 12 · n_layer · C · T for attention (PaLM paper, appendix B).
        """
        config = self.config
        attention = 12 * config.n_layer * config.n_embd * config.block_size
        return 6 * self.num_parameters() + attention

    @torch.inference_mode()
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Continue the prompts ids (B, T): yields the next token of each, (B,), one by one.

        A prompt longer than the context loses its beginning. When the context is full, the model
        goes on with the later half of it: positions are learned one by one, so that a window that
        slides by one token would have to be computed afresh for every token.
        """
        block_size = self.config.block_size
        window = ids[:, -block_size:]  # (B, ≤ block_size)
        weight = self.wte.weight
        cache = KVCache(self.config, len(ids), weight.device, weight.dtype)
        new = window
        for _ in range(max_new_tokens):
            if window.size(1) > block_size:
                window = new = window[:, -max(1, block_size // 2) :]
                cache.length = 0
            hidden = self.hidden_states(new, cache)  # (B, T, C)
            logits = self.logits(hidden[:, -1])  # (B, V)
            next_ids = choose_next(logits, temperature, top_k, top_p, generator)  # (B)
            yield next_ids
            new = next_ids[:, None]  # (B, 1)
            window = torch.cat((window, new), dim=1)


def choose_next(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token per row. logits: (B, V) -> ids (B,).

    `temperature` 0 takes the likeliest; below 1 sharpens, above 1 flattens. `top_k` keeps the k
    likeliest tokens (Fan et al. 2018), `top_p` the fewest whose probabilities reach p (nucleus
    sampling, Holtzman et al. 2019).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() - logits.float().amax(dim=-1, keepdim=True)  # the likeliest: 0
    logits = logits / max(temperature, torch.finfo(torch.float32).tiny)
    if top_k is not None and top_k < logits.size(-1):
        kth = logits.topk(top_k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)
    probabilities = logits.softmax(dim=-1)  # (B, V)
    if top_p is not None:
        ordered, order = probabilities.sort(descending=True, stable=True)  # 2 × (B, V)
        before = ordered.cumsum(dim=-1) - ordered  # what the likelier ones reach together
        before[:, 0] = -1.0  # the likeliest stays, however small p is
        ordered = ordered.masked_fill(before >= top_p, 0.0)
        probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)

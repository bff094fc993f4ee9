"""GPT-2 in one file: attention, MLP, block, KV cache, loss, model, and how text grows out of it.

Names are OpenAI's (wte, wpe, c_attn, c_proj, …), so that published weights fit by name. Letters in
the shape comments:

    B   batch: sequences side by side
    T   time: positions in a sequence
    C   channels: numbers per position (n_embd)
    nh  heads of attention, hs their size: nh · hs = C
    V   vocabulary: 50,257 for GPT-2; V' with padding
    N   rows of a batch, B · T

Sources: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (the GPT-2
paper), and OpenAI's released code, openai/gpt-2 `src/model.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from decoding import Kept, one_ahead, prepare_decoding

Mask = Tensor | BlockMask | None  # which positions see which; None: itself and all before
Documents = tuple[Mask, Tensor] | None  # mask and positions: data.within_documents


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT; the defaults are GPT-2 small, 124,439,808 parameters."""

    vocab_size: int = 50_257
    block_size: int = 1024  # the context: how many tokens the model sees at once
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # probability; 0 for pre-training, 0.1 when text is scarce
    recompute: bool = False  # keep only each block's input for the backward pass: saves memory

    def __post_init__(self) -> None:
        sizes = (self.vocab_size, self.block_size, self.n_layer, self.n_head, self.n_embd)
        if min(sizes) < 1:
            raise ValueError(f"a size is below 1: {self}")
        if max(sizes) >= 2**31:
            raise ValueError(f"a size is above 2,147,483,647: {self}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, expected 0 or more and less than 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")


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
    """Each position gathers from itself and the positions before it. (B, T, C) -> (B, T, C).

    Explained in README, "Transformers and attention".
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k and v in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: LayerCache | None = None, mask: Mask = None) -> Tensor:
        """x: (B, T, C) -> (B, T, C); with a cache, x continues what it holds.

        `mask` (B, 1, T, T), if given, is added to the scores: 0, or -∞ for what isn't seen. A
        BlockMask says the same to FlexAttention, which knows no dropout.
        """
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=-1)  # 3 × (B, T, C)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        if cache is not None:
            y = cache.attend(q, k, v)  # (B, nh, T, hs)
        elif isinstance(mask, BlockMask):
            y = flex_attention(q, k, v, block_mask=mask)  # (B, nh, T, hs)
        else:
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, T, C): the heads side by side again
        return self.resid_dropout(self.c_proj(y))  # (B, T, C)


class MLP(nn.Module):
    """Each position thinks for itself: four times wider, GELU, and back. (B, T, C) -> (B, T, C).

    Explained in README, "The block".
    """

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


class LayerNorm(nn.LayerNorm):
    """LayerNorm in the precision of its weights, as autocast does it on GPUs. (…, C) -> (…, C).

    PyTorch's CPU kernel would sum the gradients of gain and bias over all tokens in bfloat16, if
    that is what comes in: beyond a thousand or so, most terms would be rounded away.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: (…, C) -> (…, C)."""
        return super().forward(x.to(self.weight.dtype))


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream x. (B, T, C) -> (B, T, C).

    The layer norms stand before the sublayers ("pre-norm"): x itself is never normalised on its
    way (GPT-2 paper, section 2.3), so that gradients reach the first layer unhindered (Xiong et al.
    2020, https://arxiv.org/abs/2002.04745).
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: LayerCache | None = None, mask: Mask = None) -> Tensor:
        """x: (B, T, C) -> (B, T, C); `cache` and `mask` are for attention."""
        x = x + self.attn(self.ln_1(x), cache, mask)
        x = x + self.mlp(self.ln_2(x))
        return x  # (B, T, C)


class LayerCache:
    """The keys and values of one layer for the tokens so far, so that each is computed once."""

    def __init__(self, shape: tuple[int, ...], position: Tensor, dtype: torch.dtype) -> None:
        """`shape` is (B, nh, slots, hs); `position` (1,), the next token's, is all layers'."""
        self.keys = torch.zeros(shape, device=position.device, dtype=dtype)  # (B, nh, slots, hs)
        self.values = torch.zeros_like(self.keys)  # (B, nh, slots, hs)
        self.position = position
        self.mask: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v, and attend to all that is stored. q, k, v and result: (B, nh, T, hs)."""
        T = q.size(2)
        if self.mask is None:  # the prompt, which sees nothing but itself
            self.keys[:, :, :T], self.values[:, :, :T] = k, v
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, nh, T, hs)
        dtype = self.keys.dtype
        self.keys.index_copy_(2, self.position, k.to(dtype))
        self.values.index_copy_(2, self.position, v.to(dtype))
        reach = self.mask.size(-1)
        k, v = self.keys[:, :, :reach], self.values[:, :, :reach]  # 2 × (B, nh, reach, hs)
        return F.scaled_dot_product_attention(q.to(dtype), k, v, attn_mask=self.mask).to(q.dtype)


class KVCache:
    """The keys and values of every layer: a prompt's all at once, then token by token.

    Memory is allocated up front, for as many tokens as will be stored: 2 · layers · B · capacity ·
    C numbers, where capacity is a multiple of 128, or the whole context.

    A new token looks at the first `reach` slots through a mask that hides those still unwritten.
    `reach` grows by `stride`, so that a step runs the same kernels on the same shapes for that many
    tokens, as a CUDA graph requires (`RecordedDecoding`). A CPU loses more by reading unwritten
    slots, so its strides are smaller.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        tokens: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """`tokens` is how many will be stored; never more than the context holds."""
        self.capacity = min(config.block_size, -(-tokens // 128) * 128)
        self.stride = 512 if device.type == "cuda" else 128
        self.length = 0  # tokens stored in every layer
        self.position = torch.zeros(1, dtype=torch.long, device=device)  # the same, on the device
        self.slots = torch.arange(self.capacity, device=device)  # (slots)
        head_size = config.n_embd // config.n_head
        shape = (batch_size, config.n_head, self.capacity, head_size)
        self.layers = [LayerCache(shape, self.position, dtype) for _ in range(config.n_layer)]

    @property
    def reach(self) -> int:
        """How many slots the next token looks at, unwritten ones included."""
        return min(self.capacity, self.length // self.stride * self.stride + self.stride)

    def begin(self, T: int) -> Tensor:
        """Make ready for T more tokens; returns their positions, (T,).

        Raises ValueError past the capacity, and for several tokens after others.
        """
        if self.length + T > self.capacity:
            raise ValueError(f"{self.length + T} tokens, the cache holds {self.capacity}")
        if self.length > 0 and T > 1:
            raise ValueError(f"{T} tokens at once after {self.length} cached ones: give one")
        mask = None
        if self.length > 0:
            unwritten = self.slots[: self.reach] > self.position  # (reach)
            mask = torch.zeros_like(unwritten, dtype=self.layers[0].keys.dtype)  # (reach)
            mask = mask.masked_fill(unwritten, -math.inf)[None]  # (1, reach): a query, many keys
        for layer in self.layers:
            layer.mask = mask
        return self.slots[:T] if mask is None else self.position  # (T)

    def advance(self, T: int) -> None:
        """T more tokens are stored now."""
        self.length += T
        self.position += T

    def go_back(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.length = length
        self.position.fill_(length)


def dtype_of_products(x: Tensor) -> torch.dtype:
    """The precision of matrix products with x: autocast's, or its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def logits_to_gradient(logits: Tensor, targets: Tensor, V: int) -> Tensor:
    """Turn logits into the gradient of their summed cross-entropy, in place.

    logits: (N, V' ≥ V) in any precision, targets: (N,) below V -> the logarithm of Σ exp(logit) of
    each row, (N, 1) in float32. The loss of a row is that, less the target's logit. Its derivative
    with respect to the logits is softmax(logits), less 1 at the target.

    Columns from V on are padding: exp(-∞) is 0, so that they count for nothing and get a gradient
    of 0. Whole rows, padding included, let a GPU read and write in large pieces.
    """
    columns = torch.arange(logits.size(1), device=logits.device, dtype=torch.int32)  # (V')
    real = logits.float().masked_fill(columns >= V, -math.inf)  # (N, V')
    log_total = real.logsumexp(dim=-1, keepdim=True)  # (N, 1)
    is_target = columns == targets[:, None].int()  # (N, V')
    logits.copy_((real - log_total).exp() - is_target.float())
    return log_total  # (N, 1)


class HeadLoss(torch.autograd.Function):
    """The mean loss of the output layer, whose logits are never all there at once.

    The logits of 64 windows of 1,024 tokens would be 3.3 billion numbers, a third of what all the
    blocks keep. But each row's loss is independent of the other rows. So a slice of rows is
    computed, turned into its part of the loss and of both gradients, and forgotten, all in the
    forward pass (as in Liger Kernel, Hsu et al. 2024, section 3.2). What loss and gradient are:
    README, "The head and the loss". PyTorch's own F.linear_cross_entropy (2.13) takes 1.3 times as
    long on a CPU, and 7 times in chunks (results/linear_cross_entropy.json).

    The vocabulary of 50,257 is odd, and matrix units want multiples of 64: the copy of the weights
    in the precision of the products is padded with zero rows.
    """

    SLICE = 8192  # rows: 0.8 GB of logits in bfloat16, and matrices large enough for any GPU

    @staticmethod
    def forward(ctx, hidden, weight, targets, logits_to_gradient, want_gradients):  # noqa: ANN001
        """hidden (N, C), weight (V, C), targets (N,) -> the mean loss, a scalar in float32."""
        (N, _), V, dtype = hidden.shape, len(weight), dtype_of_products(weight)
        hidden = hidden.to(dtype)
        padded_weight = F.pad(weight.to(dtype), (0, 0, 0, -V % 64))  # (V', C)
        loss = torch.zeros((), device=hidden.device)
        if want_gradients:
            grad_hidden = torch.empty_like(hidden)  # (N, C)
            grad_weight = torch.zeros_like(weight)  # (V, C)
        for start in range(0, N, HeadLoss.SLICE):
            rows = slice(start, start + HeadLoss.SLICE)
            logits = hidden[rows] @ padded_weight.T  # (n, V')
            target_logits = logits.gather(1, targets[rows, None]).float()  # (n, 1)
            loss += (logits_to_gradient(logits, targets[rows], V) - target_logits).sum()
            if want_gradients:
                grad_hidden[rows] = logits @ padded_weight  # (n, C)
                # A sum over 8,192 rows may pass 65,504, the end of float16. 2⁻⁵ of it can't, as
                # long as the numbers of a channel have a mean size below 256.
                grad_weight.add_((logits.T @ (hidden[rows] * 2**-5))[:V], alpha=2**5)  # (V, C)
        if want_gradients:
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.count = N
        return loss / N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):  # noqa: ANN001
        """The gradients are there; what is left is the chain rule's factor."""
        grad_hidden, grad_weight = ctx.saved_tensors
        factor = grad_loss / ctx.count
        return grad_hidden * factor, grad_weight.mul_(factor), None, None, None


class GPT(nn.Module):
    """Token ids in, and for every position the logits of the token that comes next.

    The output layer is the token embedding once more ("tied"): no weights of its own.
    """

    def __init__(self, config: GPTConfig) -> None:
        """Weights are drawn from torch's generator: seed it first to have the same ones again.

        As in the paper, the projections into the residual stream start smaller, by 1/√(2·n_layer),
        because that many of them add up. OpenAI's released code starts them at 0.02 like all other
        matrices. Positions start at 0.01, as in that code; the paper doesn't say.
        """
        super().__init__()
        self.config = config
        self.logits_to_gradient: Callable[[Tensor, Tensor, int], Tensor] = logits_to_gradient
        self.fused_step: Callable[[GPT, KVCache], Callable] | None = None  # see decoding.py
        self.kept_decoding = Kept()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))
            elif name == "wpe.weight":
                nn.init.normal_(parameter, std=0.01)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden_states(
        self, ids: Tensor, cache: KVCache | None = None, documents: Documents = None
    ) -> Tensor:
        """Everything but the output layer. ids: (B, T) -> (B, T, C).

        With a cache, `ids` are the tokens after those it holds: all of a prompt when it is empty,
        later one at a time. Without one, `documents` may say who sees whom (B, 1, T, T) and where
        each token stands (B, T). Raises ValueError past the end of the context.
        """
        T = ids.size(1)
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens, the context holds {self.config.block_size}")
        mask = None
        if cache is not None:
            positions = cache.begin(T)  # (T)
        elif documents is not None:
            mask, positions = documents
        else:
            positions = torch.arange(T, device=ids.device)  # (T)
        x = self.drop(self.wte(ids) + self.wpe(positions))  # (B, T, C)
        if dtype_of_products(x) == torch.bfloat16:
            x = x.bfloat16()  # the residual stream: half as much to read; float16 would overflow
        if isinstance(mask, Tensor):  # once for all layers, or each would keep a copy of its own
            seen = torch.zeros_like(mask, dtype=dtype_of_products(x))  # (B, 1, T, T)
            mask = seen.masked_fill(~mask, -math.inf)  # (B, 1, T, T)
        for number, block in enumerate(self.h):
            if cache is not None:
                x = block(x, cache.layers[number])  # (B, T, C)
            elif self.config.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, mask=mask, use_reentrant=False)  # (B, T, C)
            else:
                x = block(x, mask=mask)  # (B, T, C)
        if cache is not None:
            cache.advance(T)
        return self.ln_f(x)  # (B, T, C)

    def logits(self, hidden: Tensor) -> Tensor:
        """The output layer: (…, C) -> (…, V), how well each token of the vocabulary would fit."""
        return F.linear(hidden, self.wte.weight)  # (…, V)

    def forward(
        self, ids: Tensor, targets: Tensor | None = None, documents: Documents = None
    ) -> Tensor:
        """ids (B, T) -> logits (B, T, V); with targets (B, T), their mean loss in nats instead.

        The loss is cross-entropy, -log p(target), over the V real tokens and in float32.
        `documents` is for `hidden_states`.
        """
        hidden = self.hidden_states(ids, documents=documents)  # (B, T, C)
        if targets is None:
            return self.logits(hidden)  # (B, T, V)
        # F.cross_entropy(self.logits(hidden).flatten(0, 1), targets.flatten()), slice by slice:
        return HeadLoss.apply(
            hidden.flatten(0, 1),  # (N, C)
            self.wte.weight,
            targets.flatten(),  # (N)
            self.logits_to_gradient,
            torch.is_grad_enabled(),  # which it can't see by itself
        )

    def compile_parts(self) -> None:
        """Compile the blocks, one graph for all of them, and the loss, with torch.compile.

        Block by block rather than as a whole: twelve times less to compile, and DDP can send a
        block's gradients while those of the earlier blocks are still being computed. On a GPU with
        Triton, the loss has a kernel of our own (gpu_kernels.py).
        """
        for block in self.h:
            block.compile(fullgraph=True, dynamic=False)
        if self.wte.weight.is_cuda and find_spec("triton"):
            from gpu_kernels import logits_to_gradient as compiled
        else:
            compiled = torch.compile(logits_to_gradient, fullgraph=True, dynamic=False)
        self.logits_to_gradient = compiled

    def num_parameters(self) -> int:
        """All of them, positions included, tied ones once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> int:
        """Floating-point operations to train on one token, forward and backward.

        6 per parameter, and 12 · n_layer · C · T for attention (PaLM paper, appendix B). Positions,
        biases and norms, which are in no product, make it 0.6 % too many for the 124M.
        """
        config = self.config
        attention = 12 * config.n_layer * config.n_embd * config.block_size
        return 6 * self.num_parameters() + attention

    @one_ahead
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

        How each is drawn: `choose_next`. From a GPU they come as copies on the CPU, while it is
        already computing the token after them.

        Raises FloatingPointError if logits aren't finite; on a GPU only the first are checked.

        A prompt longer than the context loses its beginning. When the context is full, the model
        goes on with the later half of it: positions are learned one by one, so that a window that
        slides by one token would have to be computed afresh for every token.
        """
        block_size, on_gpu = self.config.block_size, self.wte.weight.is_cuda
        window = ids[:, -block_size:]  # (B, ≤ block_size)
        with prepare_decoding(self, len(ids), window.size(1) + max_new_tokens) as (cache, decode):
            cache.go_back(0)  # it may have served before
            logits = self.next_logits(window, cache)  # (B, V)
            for count in range(max_new_tokens):
                # NaN is the largest of numbers, too. To look each time would keep a GPU waiting.
                if (count == 0 or not on_gpu) and not logits.amax().isfinite():
                    kind = str(self.wte.weight.dtype).removeprefix("torch.")
                    raise FloatingPointError(
                        f"logits aren't finite: the weights are damaged, or overflow in {kind}"
                    )
                next_ids = choose_next(logits, temperature, top_k, top_p, generator)  # (B)
                yield next_ids
                if count == max_new_tokens - 1:
                    return
                window = torch.cat((window, next_ids[:, None]), dim=1)  # (B, T)
                if cache.length < block_size:
                    logits = decode(next_ids[:, None], cache)  # (B, V)
                else:
                    cache.go_back(0)
                    window = window[:, -max(1, block_size // 2) :]
                    logits = self.next_logits(window, cache)  # (B, V)

    def new_cache(self, batch_size: int, tokens: int) -> KVCache:
        """An empty cache for so many tokens of each text."""
        weight = self.wte.weight
        dtype = weight.dtype
        if weight.device.type == "cpu":  # which attends faster in float32, and no worse
            dtype = torch.promote_types(dtype, torch.float32)
        return KVCache(self.config, batch_size, tokens, weight.device, dtype)

    def next_logits(self, ids: Tensor, cache: KVCache) -> Tensor:
        """The logits of the token that comes after ids (B, T), which follow the cached: (B, V)."""
        return self.logits(self.hidden_states(ids, cache)[:, -1])  # (B, V)


def choose_next(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token per row. logits: (B, V) -> ids (B,). Explained in README, "Sampling".

    `temperature` 0 takes the likeliest; the others are those of `next_probabilities`.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)  # (B)
    probabilities = next_probabilities(logits, temperature, top_k, top_p)  # (B, V)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)  # (B)


def next_probabilities(
    logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The distribution to draw from, logits (B, V) -> (B, V); after `top_p`, not scaled to 1.

    A `temperature` below 1 sharpens, above 1 flattens. `top_k` keeps the k likeliest tokens (Fan et
    al. 2018), `top_p` the fewest whose probabilities reach p (nucleus sampling, Holtzman et al.
    2019).
    """
    logits = logits.float()
    if top_k is not None and top_k < logits.size(-1):
        likeliest, ids = logits.topk(top_k)  # 2 × (B, k)
        logits = torch.full_like(logits, -math.inf).scatter(-1, ids, likeliest)  # (B, V)
    logits = logits - logits.amax(dim=-1, keepdim=True)  # the likeliest: 0
    logits = logits / max(temperature, torch.finfo(torch.float32).tiny)
    probabilities = logits.softmax(dim=-1)  # (B, V)
    if top_p is not None and top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)  # 2 × (B, V)
        before = ordered.cumsum(dim=-1) - ordered  # what the likelier ones reach together
        before[:, 0] = -1.0  # the likeliest stays, however small p is
        ordered = ordered.masked_fill(before >= top_p, 0.0)
        probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered)  # (B, V)
    return probabilities

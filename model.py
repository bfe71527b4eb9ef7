"""model.py - a Transformer language model, every layer by hand.

What:       token ids -> logits: RMSNorm, rotary positions, grouped-query attention, SwiGLU; the loss (plain, and one that
            never holds the logits); sampling with a KV cache; Hugging Face checkpoints in and out; what it all costs.
Source:     Vaswani et al. 2017, arXiv:1706.03762; RMSNorm arXiv:1910.07467 (eq. 4); RoPE arXiv:2104.09864 (eq. 34);
            SwiGLU arXiv:2002.05202 (eq. 6); grouped queries arXiv:2305.13245; top-p arXiv:1904.09751 (eq. 2, 3).
Deviations: RMSNorm before each sub-layer and once at the end (the paper of 2017 normalises after); no biases unless asked;
            embeddings N(0, 1), linear weights N(0, 2/(d_in+d_out)), both cut at 3 sigma.
Copy:       this file alone; needs torch (triton only for linear_cross_entropy(backend="triton")). MIT.
Run:        python model.py
"""
import argparse
import functools
import json
import math
import os
import struct
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor, nn

try:                                   # only the fast loss needs it; everything else works without
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# Dims: B batch, T sequence, S keys, D model width, H heads, G kv heads, K head width, F feed-forward width, V vocabulary,
#       L layers, N = B*T rows of the loss


@dataclass(frozen=True)
class ModelConfig:
    """Shape and switches of a TransformerLM. Widths left None are filled in here, so that reading them gives numbers
    (`dataclasses.replace` keeps the filled-in ones: set them to None again to have them follow).

    Raises: ValueError for sizes that do not divide and for unknown switches.
    """
    vocab_size: int = 10_000
    context_length: int = 256          # tokens; the longest sequence the position tables reach
    d_model: int = 512
    num_layers: int = 4
    num_heads: int = 16
    num_kv_heads: int | None = None    # None: num_heads, that is plain multi-head attention
    head_dim: int | None = None        # None: d_model / num_heads
    d_ff: int | None = None            # None: 8/3 d_model to the nearest 64 ("silu": 4 d_model, as many parameters)
    rope_theta: float = 10_000.0
    rope_layout: str = "interleaved"   # pairs (0,1), (2,3), ...; "half": pairs (0, K/2), ... as Hugging Face stores them
    rope_scaling: tuple = ()           # ("linear", factor) or ("llama3", factor, low, high, original context)
    norm_eps: float = 1e-5
    norm: str = "pre"                  # "pre" | "post" | "none"
    positions: str = "rope"            # "rope" | "none"
    ffn: str = "swiglu"                # "swiglu" | "silu"
    qk_norm: bool = False              # RMSNorm of every query and key head (Qwen3)
    qkv_bias: bool = False             # biases on q, k, v (Qwen2)
    tie_embeddings: bool = False       # the LM head is the embedding table

    def __post_init__(self):
        def fill(name, value):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("vocab_size", "context_length", "d_model", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ValueError(f"d_model {self.d_model} does not divide into {self.num_heads} heads; "
                             "change one of them or give head_dim")
        fill("num_kv_heads", self.num_heads)
        fill("head_dim", self.d_model // self.num_heads)
        fill("d_ff", 4 * self.d_model if self.ffn == "silu" else default_d_ff(self.d_model))
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim < 1 or self.d_ff < 1:
            raise ValueError(f"head_dim and d_ff must be at least 1, got {self.head_dim} and {self.d_ff}")
        for name, allowed in (("norm", ("pre", "post", "none")), ("positions", ("rope", "none")),
                              ("ffn", ("swiglu", "silu")), ("rope_layout", ("interleaved", "half"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"RoPE turns pairs, so head_dim must be even, got {self.head_dim}")


def default_d_ff(d_model: int) -> int:
    """8/3 d_model, to the nearest multiple of 64 (at least 64). Example: 512 -> 1344"""
    return max(64, round(8 * d_model / 3 / 64) * 64)


# ---------------------------------------------------------------- layers


class Linear(nn.Module):
    """y = x W^T (+ b). x (..., d_in) -> (..., d_out); weight (d_out, d_in)."""

    def __init__(self, d_in: int, d_out: int, bias: bool = False):
        super().__init__()
        std = math.sqrt(2 / (d_in + d_out))
        self.weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(d_out, d_in), std=std, a=-3 * std, b=3 * std))
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Embedding(nn.Module):
    """token_ids (...) int -> (..., d_model): a row of the table per token."""

    def __init__(self, vocab_size: int, d_model: int):
        super().__init__()
        self.weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(vocab_size, d_model), std=1.0, a=-3.0, b=3.0))

    def forward(self, token_ids: Tensor) -> Tensor:
        return torch.embedding(self.weight, token_ids)   # weight[token_ids], with a backward that adds up in fp32


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; computed in fp32, returned in x's dtype."""

    def __init__(self, d_model: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x if x.dtype == torch.float64 else x.float()        # a square in fp16 overflows at 256
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return (x32 * scale * self.weight).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x)."""
    return x * torch.sigmoid(x)


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x): a feed-forward layer whose hidden units are gated. arXiv:2002.05202, eq. 6."""

    def __init__(self, d_model: int, d_ff: int | None = None):
        super().__init__()
        d_ff = d_ff or default_d_ff(d_model)
        self.w1 = Linear(d_model, d_ff)
        self.w2 = Linear(d_ff, d_model)
        self.w3 = Linear(d_model, d_ff)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(silu(self.w1(x)) * self.w3(x))


class SiLUFeedForward(nn.Module):
    """w2(silu(w1 x)): the same without the gate."""

    def __init__(self, d_model: int, d_ff: int | None = None):
        super().__init__()
        d_ff = d_ff or 4 * d_model
        self.w1 = Linear(d_model, d_ff)
        self.w2 = Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(silu(self.w1(x)))


class RotaryPositionalEmbedding(nn.Module):
    """Turns the i-th pair of x at position p by the angle p * theta^(-2i/d_k), so that the dot product of a query and
    a key depends only on how far apart they are. arXiv:2104.09864, eq. 34.

    x (..., T, d_k); token_positions (..., T) int, any leading dimensions that broadcast with x's, or None for 0..T-1.
    layout: which two entries form a pair, see ModelConfig.rope_layout. Returns x's shape and dtype; computed in fp32.
    Positions must lie below max_seq_len; on a CPU a larger one raises IndexError.
    """

    def __init__(self, theta: float, d_k: int, max_seq_len: int, layout: str = "interleaved", scaling: tuple = ()):
        super().__init__()
        if d_k % 2:
            raise ValueError(f"RoPE turns pairs, so d_k must be even, got {d_k}")
        self.theta, self.d_k, self.max_seq_len, self.layout, self.scaling = theta, d_k, max_seq_len, layout, scaling
        self.fill(torch.get_default_device())

    def fill(self, device) -> None:
        frequencies = self.theta ** (-torch.arange(0, self.d_k, 2, device="cpu").double() / self.d_k)
        angles = torch.arange(self.max_seq_len, device="cpu")[:, None] * scale_frequencies(frequencies, self.scaling)
        self.register_buffer("cos", angles.cos().float().to(device), persistent=False)   # (max_seq_len, d_k/2)
        self.register_buffer("sin", angles.sin().float().to(device), persistent=False)

    def _apply(self, fn, recurse=True):
        device = fn(self.cos[:1]).device   # .to(bfloat16) must not round the tables: cos of position 1001 would be 1000's
        if device != self.cos.device:
            self.fill(device)
        return self

    def forward(self, x: Tensor, token_positions: Tensor | None = None) -> Tensor:
        if token_positions is None:
            T = x.shape[-2]
            cos, sin = self.cos[:T], self.sin[:T]                                        # (T, K/2)
        else:
            cos, sin = self.cos[token_positions], self.sin[token_positions]              # (..., T, K/2)
        if self.layout == "interleaved":
            a, b = x[..., 0::2].to(cos.dtype), x[..., 1::2].to(cos.dtype)                # (..., T, K/2)
            turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
        else:
            a, b = x.to(cos.dtype).chunk(2, dim=-1)
            turned = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
        return turned.to(x.dtype)


def scale_frequencies(frequencies: Tensor, scaling: tuple) -> Tensor:
    """Slower turning for contexts longer than the one trained on. ("linear", factor) divides every frequency;
    ("llama3", factor, low, high, original) leaves waves shorter than original/high, divides those longer than
    original/low, and blends in between (the Llama 3.1 release)."""
    if not scaling:
        return frequencies
    if scaling[0] == "linear":
        return frequencies / scaling[1]
    if scaling[0] != "llama3":
        raise ValueError(f"rope_scaling {scaling[0]!r} is not supported; use 'linear' or 'llama3'")
    _, factor, low, high, original = scaling
    turns = original * frequencies / (2 * math.pi)                    # full turns within the original context
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (blend + (1 - blend) / factor)


def softmax(x: Tensor, dim: int) -> Tensor:
    """exp(x) / sum(exp(x)) along dim; the maximum is taken off first, as exp() overflows fp32 at 88."""
    weights = (x - x.amax(dim, keepdim=True)).exp()
    return weights / weights.sum(dim, keepdim=True)


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(K)) v. arXiv:1706.03762, eq. 1.

    q (..., T, K), k (..., S, K), v (..., S, Kv); mask (..., T, S) bool, True where a query may look at a key.
    Returns (..., T, Kv) in v's dtype; the softmax is in fp32. A query that may look at nothing gets zeros.
    """
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])         # (..., T, S)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if mask is None:
        return softmax(scores, -1).to(v.dtype) @ v
    weights = softmax(scores.masked_fill(~mask, torch.finfo(scores.dtype).min), -1)
    weights = weights.masked_fill(~mask, 0.0)                         # a row with no key at all: not NaN, not a mean
    return weights.to(v.dtype) @ v


def plain_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = True, mask: Tensor | None = None) -> Tensor:
    """Attention with grouped queries: query head h looks at kv head h // (H / G), which nobody copies.

    q (..., H, T, K), k and v (..., G, S, K) -> (..., H, T, K). is_causal: query t sees keys 0..t.
    mask: (..., 1, T, S) bool in its stead.
    """
    *_, H, T, K = q.shape
    G, S = k.shape[-3:-1]
    if is_causal and mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()
    if H == G:
        return scaled_dot_product_attention(q, k, v, mask)
    q = q.unflatten(-3, (G, H // G)).flatten(-3, -2)                   # (..., G, H/G*T, K): a group's queries in one list
    if mask is not None:
        mask = mask.repeat(*[1] * (mask.dim() - 2), H // G, 1)         # (..., H/G*T, S)
    return scaled_dot_product_attention(q, k, v, mask).unflatten(-2, (H // G, T)).flatten(-4, -3)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = True) -> Tensor:
    """The same by torch's own fused kernels. Shapes as plain_attention."""
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=q.shape[-3] != k.shape[-3])


class CausalSelfAttention(nn.Module):
    """Multi-head attention of a sequence to its own past. x (..., T, D) -> (..., T, D).

    rope: turns queries and keys, None for no positions. attention: a function like plain_attention.
    attend: KVCache.attend of this layer, to attend to earlier tokens as well.
    """

    def __init__(self, d_model: int, num_heads: int, *, rope: nn.Module | None = None, num_kv_heads: int | None = None,
                 head_dim: int | None = None, qk_norm: bool = False, qkv_bias: bool = False, norm_eps: float = 1e-5,
                 attention=None):
        super().__init__()
        if head_dim is None and d_model % num_heads:
            raise ValueError(f"d_model {d_model} does not divide into {num_heads} heads")
        kv_heads, self.head_dim = num_kv_heads or num_heads, head_dim or d_model // num_heads
        self.q_proj = Linear(d_model, num_heads * self.head_dim, bias=qkv_bias)
        self.k_proj = Linear(d_model, kv_heads * self.head_dim, bias=qkv_bias)
        self.v_proj = Linear(d_model, kv_heads * self.head_dim, bias=qkv_bias)
        self.output_proj = Linear(num_heads * self.head_dim, d_model)
        self.q_norm = RMSNorm(self.head_dim, norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, norm_eps) if qk_norm else None
        self.rope = rope
        self.attention = attention or plain_attention

    def forward(self, x: Tensor, token_positions: Tensor | None = None, attend=None) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)           # (..., H or G, T, K)
                   for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            positions = None if token_positions is None else token_positions.unsqueeze(-2)   # the same for every head
            q, k = self.rope(q, positions), self.rope(k, positions)
        y = self.attention(q, k, v, is_causal=True) if attend is None else attend(self.attention, q, k, v)
        return self.output_proj(y.transpose(-3, -2).flatten(-2))                       # (..., T, D)


class TransformerBlock(nn.Module):
    """x + attn(ln1(x)), then x + ffn(ln2(x)). With norm="post": ln1(x + attn(x)), ln2(x + ffn(x)); "none": neither."""

    def __init__(self, config: ModelConfig, rope: nn.Module | None = None, attention=None):
        super().__init__()
        self.attn = CausalSelfAttention(
            config.d_model, config.num_heads, rope=rope, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
            qk_norm=config.qk_norm, qkv_bias=config.qkv_bias, norm_eps=config.norm_eps, attention=attention)
        self.ffn = (SwiGLU if config.ffn == "swiglu" else SiLUFeedForward)(config.d_model, config.d_ff)
        self.post = config.norm == "post"
        self.ln1, self.ln2 = (nn.Identity() if config.norm == "none" else RMSNorm(config.d_model, config.norm_eps)
                              for _ in range(2))

    def forward(self, x: Tensor, token_positions: Tensor | None = None, attend=None) -> Tensor:
        if self.post:
            x = self.ln1(x + self.attn(x, token_positions, attend))
            return self.ln2(x + self.ffn(x))
        x = x + self.attn(self.ln1(x), token_positions, attend)
        return x + self.ffn(self.ln2(x))


class TransformerLM(nn.Module):
    """token_ids (B, T) int -> logits (B, T, V): at each position, the scores of the token that comes next.

    attention: how the heads attend: plain_attention (default), sdpa_attention, or any function with the same contract.
    checkpoint_every: k > 0 keeps activations only at every k-th block and computes the others again in the backward pass.
    Example: TransformerLM(ModelConfig(vocab_size=100))(torch.tensor([[1, 2, 3]])).shape -> (1, 3, 100)
    """

    def __init__(self, config: ModelConfig, attention=None, checkpoint_every: int = 0):
        super().__init__()
        self.config, self.checkpoint_every = config, checkpoint_every
        rope = None
        if config.positions == "rope":
            rope = RotaryPositionalEmbedding(config.rope_theta, config.head_dim, config.context_length,
                                             config.rope_layout, config.rope_scaling)
        self.token_embeddings = Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(TransformerBlock(config, rope, attention) for _ in range(config.num_layers))
        # after post-norm blocks the stream is already normalised
        self.ln_final = RMSNorm(config.d_model, config.norm_eps) if config.norm == "pre" else nn.Identity()
        self.lm_head = Linear(config.d_model, config.vocab_size)
        if config.tie_embeddings:
            self.token_embeddings.weight = self.lm_head.weight        # with the head's small init: logits start near 0

    def hidden(self, token_ids: Tensor, token_positions: Tensor | None = None,
               cache: "KVCache | None" = None) -> Tensor:
        """The stream after ln_final, (B, T, D): what lm_head, or linear_cross_entropy, turns into scores.

        Raises: ValueError for more tokens than context_length, and (on a CPU) for ids outside the vocabulary.
        """
        T = token_ids.shape[-1]
        if token_positions is None and T > self.config.context_length:
            raise ValueError(f"{T} tokens do not fit in context_length {self.config.context_length}; cut the sequence")
        if token_ids.device.type == "cpu" and not torch.compiler.is_compiling() and token_ids.numel():
            low, high = token_ids.min().item(), token_ids.max().item()   # not on a GPU: it would wait for the answer
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(f"token id {low if low < 0 else high} is outside the vocabulary "
                                 f"of {self.config.vocab_size}; was the text encoded by another tokenizer?")
        x = self.token_embeddings(token_ids)                          # (B, T, D)
        every = self.checkpoint_every if cache is None and torch.is_grad_enabled() else 0
        if every:
            for i in range(0, len(self.layers), every):
                x = torch.utils.checkpoint.checkpoint(self._run_blocks, i, i + every, x, token_positions, None,
                                                      use_reentrant=False)
        else:
            x = self._run_blocks(0, len(self.layers), x, token_positions, cache)
        return self.ln_final(x)

    def _run_blocks(self, start: int, stop: int, x: Tensor, token_positions, cache) -> Tensor:
        for i in range(start, min(stop, len(self.layers))):
            x = self.layers[i](x, token_positions, functools.partial(cache.attend, i) if cache else None)
        return x

    def forward(self, token_ids: Tensor, token_positions: Tensor | None = None) -> Tensor:
        return self.lm_head(self.hidden(token_ids, token_positions))  # (B, T, V)


# ---------------------------------------------------------------- the loss


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of -log softmax(logits)[target] in nats; the denominator is the number of targets.

    logits (..., V) any float dtype, targets (...) int. Computed in fp32. Raises: ValueError if there is no target.
    Example: cross_entropy(torch.zeros(1, 4), torch.tensor([2])) -> log 4 = 1.3863
    """
    if logits.shape[:-1] != targets.shape or targets.numel() == 0:
        raise ValueError(f"logits {tuple(logits.shape)} need targets of shape {tuple(logits.shape[:-1])} with at least "
                         f"one entry, got {tuple(targets.shape)}")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    shifted = logits - logits.amax(-1, keepdim=True).detach()         # (..., V)
    log_sum = shifted.exp().sum(-1).log()                             # (...)
    return (log_sum - shifted.gather(-1, targets.unsqueeze(-1)).squeeze(-1)).mean()


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, backend: str = "torch",
                         chunk: int | None = None) -> Tensor:
    """cross_entropy(hidden @ weight.T, targets) without ever holding the (N, V) logits.

    `chunk` rows of logits are made at a time, turned into their own gradient (softmax - onehot) where they lie, and
    multiplied into the gradients of hidden and weight at once; the backward pass only scales those. So the loss costs the
    three matrix products it must, and its memory is one chunk plus the two gradients.

    Args: hidden (..., D), weight (V, D), targets (...) int. Under autocast the products are taken in autocast's dtype;
    softmax, loss and the sum of weight's gradient are in fp32 (fp64 for fp64).
    backend: "torch" anywhere; "triton" one kernel for the softmax and gradient of a chunk, CUDA only.
    chunk: rows; None takes what fits 560 MB (32 MB on a CPU, nearer to its cache).
    Returns: mean over the targets, nats, fp32 scalar. Differentiable once. Works inside torch.compile(fullgraph=True).
    Raises: ValueError for shapes that do not fit, no target, or a backend that cannot run here.
    """
    if hidden.shape[:-1] != targets.shape or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1] or not targets.numel():
        raise ValueError(f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and targets {tuple(targets.shape)} "
                         "do not fit: want (..., D), (V, D) and (...) with at least one target")
    if backend not in ("torch", "triton"):
        raise ValueError(f"backend must be 'torch' or 'triton', got {backend!r}")
    if backend == "triton" and (triton is None or not (hidden.is_cuda or triton.knobs.runtime.interpret)):
        raise ValueError("backend='triton' needs triton and CUDA tensors; use backend='torch' here")
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if chunk is None:
        fits = (560_000_000 if hidden.is_cuda else 32_000_000) // (weight.shape[0] * dtype.itemsize)
        pieces = -(-targets.numel() // max(fits, 1))
        chunk = -(-targets.numel() // (pieces * 128)) * 128           # even pieces, whole tiles of 128 rows
    elif chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _linear_cross_entropy(hidden.flatten(0, -2).to(dtype), weight, targets.flatten(), chunk, backend, gradients)[0]


@torch.library.custom_op("twelve::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, backend: str,
                          gradients: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss, and the gradients of the *sum* of losses: dL/dhidden (N, D), dL/dweight (V, D) in fp32."""
    N, D = hidden.shape
    w = weight.to(hidden.dtype)
    accumulate = torch.promote_types(hidden.dtype, torch.float32)     # sums over N rows need more than 8 bits
    loss = hidden.new_zeros((), dtype=accumulate)
    grad_hidden = torch.empty_like(hidden) if gradients else hidden.new_empty(0)
    grad_weight = hidden.new_zeros(weight.shape if gradients else 0, dtype=accumulate)
    softmax_gradient_ = _softmax_gradient_torch_ if backend == "torch" else _softmax_gradient_triton_
    for start in range(0, N, chunk):
        h = hidden[start:start + chunk]                               # (n, D)
        logits = h @ w.T                                              # (n, V)
        loss += softmax_gradient_(logits, targets[start:start + chunk], gradients).sum()
        if gradients:                                                 # logits now hold softmax - onehot
            torch.mm(logits, w, out=grad_hidden[start:start + chunk])
            if logits.dtype == accumulate:
                grad_weight.addmm_(logits.T, h)
            elif logits.is_cuda:
                torch.addmm(grad_weight, logits.T, h, out_dtype=accumulate, out=grad_weight)
            else:
                grad_weight.addmm_(logits.T.to(accumulate), h.to(accumulate))
        del logits                                                    # or two chunks would be alive at once
    return loss / N, grad_hidden, grad_weight


@_linear_cross_entropy.register_fake
def _(hidden, weight, targets, chunk, backend, gradients):
    accumulate = torch.promote_types(hidden.dtype, torch.float32)
    return (hidden.new_empty((), dtype=accumulate), torch.empty_like(hidden) if gradients else hidden.new_empty(0),
            hidden.new_empty(weight.shape if gradients else 0, dtype=accumulate))


def _keep_gradients(ctx, inputs, output):
    hidden, weight, *_ = inputs
    ctx.save_for_backward(*output[1:])
    ctx.rows, ctx.weight_dtype = hidden.shape[0], weight.dtype


def _scale_gradients(ctx, grad_loss, _grad_hidden, _grad_weight):
    grad_hidden, grad_weight = ctx.saved_tensors
    scale = grad_loss / ctx.rows
    return ((grad_hidden * scale).to(grad_hidden.dtype), (grad_weight * scale).to(ctx.weight_dtype), *[None] * 4)


_linear_cross_entropy.register_autograd(_scale_gradients, setup_context=_keep_gradients)


def _softmax_gradient_torch_(logits: Tensor, targets: Tensor, gradients: bool) -> Tensor:
    """Losses (n,) of logits (n, V), which are overwritten with softmax - onehot if gradients are wanted."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))   # the same memory when already wide enough
    index = targets[:, None]
    target_logit = x.gather(1, index)                                 # (n, 1)
    peak = x.amax(1, keepdim=True)
    log_sum = peak + (x - peak).exp_().sum(1, keepdim=True).log()     # (n, 1)
    if gradients:
        x.sub_(log_sum).exp_().scatter_add_(1, index, x.new_full(index.shape, -1.0))
        if x is not logits:
            logits.copy_(x)
    return (log_sum - target_logit).squeeze(1)


def _softmax_gradient_triton_(logits: Tensor, targets: Tensor, gradients: bool) -> Tensor:
    """The same in one kernel, a program per row. The second reading of the row comes from the L2 cache."""
    n, V = logits.shape
    losses = torch.empty(n, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        _softmax_gradient_kernel[(n,)](logits, targets, losses, V, logits.stride(0), GRADIENTS=gradients,
                                       BLOCK=min(8192, triton.next_power_of_2(V)), num_warps=16)
    return losses


if triton is not None:
    @triton.jit
    def _softmax_gradient_kernel(logits, targets, losses, V, row_stride, GRADIENTS: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        logits += row * row_stride
        target = tl.load(targets + row)
        valid = (target >= 0) & (target < V)                          # a bad target makes the loss NaN, not a crash
        target_logit = tl.load(logits + target, mask=valid, other=float("nan")).to(tl.float32)
        columns = tl.arange(0, BLOCK)
        peak = -1.0e38                                                # scalar: one exp an element, and one a block
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            x = tl.load(logits + start + columns, mask=start + columns < V, other=float("-inf")).to(tl.float32)
            new_peak = tl.maximum(peak, tl.max(x, 0))
            total = total * tl.exp(peak - new_peak) + tl.exp(x - new_peak)   # the online softmax, arXiv:1805.02867
            peak = new_peak
        log_sum = peak + tl.log(tl.sum(total, 0))
        tl.store(losses + row, log_sum - target_logit)
        if GRADIENTS:
            for start in range(0, V, BLOCK):
                at = start + columns
                x = tl.load(logits + at, mask=at < V, other=float("-inf")).to(tl.float32)
                gradient = tl.exp(x - log_sum) - tl.where(at == target, 1.0, 0.0)
                tl.store(logits + at, gradient.to(logits.dtype.element_ty), mask=at < V)


# ---------------------------------------------------------------- sampling


class KVCache:
    """Keys and values of all layers, (R, G, S, K) each, so that a new token costs one position and not the whole text.

    Rows may differ in length: `positions` (R,) says where each row's new token goes, and a row sees nothing beyond it.
    """

    def __init__(self, num_layers: int):
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers
        self.positions = self.mask = None

    def attend(self, layer: int, attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.positions is None:                                    # the prompts, padded on the right: causal is enough
            self.keys[layer], self.values[layer] = k, v
            return attention(q, k, v, is_causal=True)
        keys, values = self.keys[layer], self.values[layer]
        rows = torch.arange(len(q), device=q.device)
        keys[rows, :, self.positions], values[rows, :, self.positions] = k[:, :, 0], v[:, :, 0]
        S = self.mask.shape[-1]
        return plain_attention(q, keys[:, :, :S], values[:, :, :S], mask=self.mask)

    def make_room(self, num_samples: int, capacity: int) -> None:
        """num_samples copies of each row, with space for `capacity` positions."""
        for kept in (self.keys, self.values):
            for i, x in enumerate(kept):
                P, G, T, K = x.shape
                room = x.new_zeros(P, num_samples, G, capacity, K)
                room[..., :T, :] = x[:, None]
                kept[i] = room.flatten(0, 1)                          # (R, G, capacity, K)

    def move_to(self, positions: Tensor, visible: int) -> None:
        self.positions = positions                                    # (R,)
        self.mask = (torch.arange(visible, device=positions.device) <= positions[:, None])[:, None, None]   # (R, 1, 1, S)

    def keep_rows(self, rows: Tensor) -> None:
        for kept in (self.keys, self.values):
            for i, x in enumerate(kept):
                kept[i] = x[rows]


@dataclass
class Generation:
    """One sample. prompt_ids: the prompt as used; ids: the new tokens, with the stop id or the tokens of the stop string;
    logprobs: the model's log-probability of each, nats, before temperature, top-k and top-p; text: decode(ids), cut behind
    the stop string."""
    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = "length"                                     # "stop" | "length"
    text: str | None = None


def sample_tokens(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
                  generator: torch.Generator | None = None) -> Tensor:
    """Draw a token a row. logits (R, V) -> ids (R,). temperature 0: the likeliest. top_k: only the k likeliest (0: all);
    top_p: of those, the smallest set of likeliest tokens that holds this much probability (arXiv:1904.09751)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        worst_kept = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < worst_kept, -torch.inf)
    probabilities = softmax(logits, -1)
    if top_p < 1:
        ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
        dropped = ranked.cumsum(-1) - ranked >= top_p                 # what stands before it is enough already
        probabilities = probabilities.masked_fill(dropped.scatter(-1, order, dropped), 0.0)
    # p / Exp(1) is largest at i with probability p_i / sum p: no sum, no search, no waiting for the GPU
    return (probabilities / torch.empty_like(probabilities).exponential_(generator=generator)).argmax(-1)


@torch.no_grad()
def generate(model: TransformerLM, prompts: list[list[int]], *, max_new_tokens: int, min_new_tokens: int = 0,
             temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, num_samples: int = 1, stop_ids=(),
             stop_strings=(), decode=None, seed: int = 0, use_cache: bool = True) -> list[Generation]:
    """num_samples continuations of every prompt, all in one batch; each prompt is computed once.

    A prompt longer than max(context + 1 - max_new_tokens, half the context) loses its front, and a sample ends with
    "length" when the context is full. stop_ids end a sample, stop_strings too (they need decode: list[int] -> str); neither
    counts within the first min_new_tokens. Same seed and batch, same samples (on one kind of device).
    Returns: len(prompts) * num_samples Generations, a prompt's samples side by side.
    Raises: ValueError for an empty prompt and for settings out of range.
    """
    stop_ids, context = set(stop_ids), model.config.context_length
    for wrong, message in ((max_new_tokens < 1, f"max_new_tokens must be at least 1, got {max_new_tokens}"),
                           (num_samples < 1, f"num_samples must be at least 1, got {num_samples}"),
                           (not temperature >= 0, f"temperature must be 0 (greedy) or more, got {temperature}"),
                           (not 0 < top_p <= 1, f"top_p must be above 0 and at most 1, got {top_p}"),
                           (top_k < 0, f"top_k must be 0 (all) or more, got {top_k}"),
                           ("" in stop_strings, "a stop string is empty"),
                           (bool(stop_strings) and decode is None, "stop_strings need decode, the tokenizer's decode"),
                           (not all(len(p) for p in prompts), "a prompt is empty; give it at least one token, "
                                                              "for instance the end-of-text id")):
        if wrong:
            raise ValueError(message)
    if not prompts:
        return []
    device = model.lm_head.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    kept = max(context + 1 - max_new_tokens, (context + 1) // 2)
    prompts = [list(p[-kept:]) for p in prompts for _ in range(num_samples)]
    samples = [Generation(p) for p in prompts]
    limits = [min(max_new_tokens, context + 1 - len(p)) for p in prompts]      # the last token is never read: + 1
    longest = max(map(len, prompts))
    lengths = torch.tensor([len(p) for p in prompts], device=device)           # (R,)
    texts = torch.zeros(len(prompts), longest + max(limits), dtype=torch.long, device=device)
    for row, p in enumerate(prompts):
        texts[row, :len(p)] = torch.tensor(p)
    log_probs = torch.zeros(len(prompts), max(limits), device=device)
    live = torch.arange(len(prompts), device=device)                           # rows still being written
    banned = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
    cache = KVCache(len(model.layers)) if use_cache else None
    check_every, checked, done = (16 if device.type == "cuda" else 1), 0, set()   # asking a GPU means waiting for it
    for step in range(max(limits)):
        last = (lengths + step - 1).clamp(max=context - 1)[live]               # (R,) the position to predict from
        if step == 0 and use_cache:
            hidden = model.hidden(texts[::num_samples, :longest], cache=cache)
            hidden = hidden[torch.arange(len(hidden), device=device), last[::num_samples]].repeat_interleave(num_samples, 0)
            cache.make_room(num_samples, min(context, texts.shape[1]))
        elif use_cache:
            cache.move_to(last, min(longest + step, context))
            hidden = model.hidden(texts[live, last][:, None], last[:, None], cache=cache)[:, 0]
        else:
            hidden = model.hidden(texts[live, :min(longest + step, context)])[torch.arange(len(live), device=device), last]
        logits = model.lm_head(hidden).float()                                 # (R, V)
        allowed = logits.index_fill(-1, banned, -torch.inf) if step < min_new_tokens and stop_ids else logits
        tokens = sample_tokens(allowed, temperature, top_k, top_p, generator)  # (R,)
        texts[live, lengths[live] + step] = tokens
        log_probs[live, step] = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
        if (step + 1) % check_every and step + 1 < max(limits):
            continue
        for row in live.tolist():
            sample, first = samples[row], len(prompts[row])
            if row not in done:
                sample.ids = texts[row, first:first + min(step + 1, limits[row])].tolist()
                if _ends(sample, checked, limits[row], min_new_tokens, stop_ids, stop_strings, decode):
                    sample.logprobs = log_probs[row, :len(sample.ids)].tolist()
                    done.add(row)
        checked = step + 1
        if len(done) == len(samples):
            break
        going = [i for i, row in enumerate(live.tolist()) if row not in done]
        if len(going) <= 0.9 * len(live):                                      # copying the cache for one row is too dear
            going = torch.tensor(going, device=device)
            live = live[going]
            if use_cache:
                cache.keep_rows(going)
    return samples


def _ends(sample: Generation, checked: int, limit: int, min_new_tokens: int, stop_ids, stop_strings, decode) -> bool:
    """Whether one of the tokens from `checked` on ends this sample; if so, cut there and fill in reason and text."""
    ids, text = sample.ids, None
    reach = max((len(s.encode()) for s in stop_strings), default=0)            # every token is at least one byte
    tail = decode(ids[max(0, checked - reach):]) if stop_strings else ""
    strings = [s for s in stop_strings if s in tail]
    for n in range(checked + 1, len(ids) + 1):
        stopped = n > min_new_tokens and ids[n - 1] in stop_ids
        for s in strings if n > min_new_tokens else ():
            back = max(0, n - 1 - reach)
            before = len(decode(ids[back:n - 1]).rstrip("\ufffd"))             # half a character is not text yet
            if decode(ids[back:n]).find(s, max(0, before - len(s) + 1)) >= 0:  # it ends in what token n added
                whole = decode(ids[:n])
                stopped, text = True, min((whole[:whole.rfind(s) + len(s)], text or whole), key=len)
        if stopped or n == limit:
            sample.ids, sample.finish_reason = ids[:n], "stop" if stopped else "length"
            sample.text = decode(sample.ids) if text is None and decode else text
            return True
    return False


# ---------------------------------------------------------------- what it costs


def count_parameters(model: ModelConfig | nn.Module) -> int:
    """Trainable numbers, of a config by formula or of a module by counting; shared ones once."""
    if isinstance(model, nn.Module):
        return sum(p.numel() for p in model.parameters())
    c = model
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    attention = 2 * c.d_model * q + 2 * c.d_model * kv + (q + 2 * kv) * c.qkv_bias + 2 * c.head_dim * c.qk_norm
    ffn = (3 if c.ffn == "swiglu" else 2) * c.d_model * c.d_ff
    norms = 0 if c.norm == "none" else 2 * c.d_model
    tables = (1 if c.tie_embeddings else 2) * c.vocab_size * c.d_model
    return c.num_layers * (attention + ffn + norms) + c.d_model * (c.norm == "pre") + tables


def count_flops(config: ModelConfig, seq_len: int) -> dict[str, int]:
    """FLOPs of the matrix products in one forward pass over one sequence, by component and in "total".

    A product (m, k) x (k, n) is 2mkn. Attention is counted in full, not halved for causality; a training step is three
    times the total. Example: GPT-2 XL with SwiGLU at 1024 tokens -> total 4.51e12
    """
    c, T = config, seq_len
    flops = {"attention projections": 2 * T * c.d_model * 2 * (c.num_heads + c.num_kv_heads) * c.head_dim * c.num_layers,
             "attention scores and sums": 4 * T * T * c.num_heads * c.head_dim * c.num_layers,
             "feed-forward": 2 * T * (3 if c.ffn == "swiglu" else 2) * c.d_model * c.d_ff * c.num_layers,
             "lm head": 2 * T * c.d_model * c.vocab_size}
    return flops | {"total": sum(flops.values())}


# ---------------------------------------------------------------- checkpoints in Hugging Face form

HF_NAMES = {"token_embeddings": "embed_tokens", "ln_final": "norm", "attn.q_proj": "self_attn.q_proj",
            "attn.k_proj": "self_attn.k_proj", "attn.v_proj": "self_attn.v_proj", "attn.output_proj": "self_attn.o_proj",
            "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm", "ln1": "input_layernorm",
            "ln2": "post_attention_layernorm", "ffn.w1": "mlp.gate_proj", "ffn.w2": "mlp.down_proj", "ffn.w3": "mlp.up_proj"}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def _hf_name(name: str) -> str:
    """layers.3.attn.q_proj.weight -> model.layers.3.self_attn.q_proj.weight"""
    *module, leaf = name.split(".")
    if module == ["lm_head"]:
        return name
    at = 2 if module[0] == "layers" else 0
    return ".".join(["model", *module[:at], HF_NAMES[".".join(module[at:])], leaf])


def read_safetensors(path: str) -> dict[str, Tensor]:
    """Tensors by name, mapped from the file and read when touched: 8 bytes of header length, a JSON header, raw numbers.

    Raises: ValueError for a file that is cut off, is not safetensors, or whose header does not fit its data.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        data, tensors, end = torch.from_file(path, size=size, dtype=torch.uint8)[8 + length:], {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (start, stop) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            if start != end or min(shape, default=0) < 0 or stop - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} {shape} does not fit its bytes {start} to {stop}")
            raw, end = data[start:stop], stop
            raw = raw if (8 + length + start) % dtype.itemsize == 0 else raw.clone()
            tensors[name] = raw.view(dtype).view(shape)
        if end != len(data):
            raise ValueError(f"{end} bytes of tensors expected, {len(data)} there")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); fetch or write it again") from None
    return tensors


def write_safetensors(path: str, tensors: dict[str, Tensor]) -> None:
    """The inverse; the header is padded to 8 bytes, so that every number lies where a processor wants it."""
    header, end, names = {"__metadata__": {"format": "pt"}}, 0, {dtype: name for name, dtype in DTYPES.items()}
    for name, x in tensors.items():
        header[name] = {"dtype": names[x.dtype], "shape": list(x.shape), "data_offsets": [end, end + x.nbytes]}
        end += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for x in tensors.values():
            file.write(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _read_json(path: str) -> dict:
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; want a Hugging Face folder with config.json and safetensors") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value


def _config_from_hf(raw: dict, path: str) -> ModelConfig:
    kind = raw.get("model_type")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    for wrong, what in ((kind not in ("llama", "qwen2", "qwen3"), f"model_type {kind!r} (want llama, qwen2 or qwen3)"),
                        (raw.get("hidden_act", "silu") != "silu", f"hidden_act {raw.get('hidden_act')!r}"),
                        (raw.get("attention_bias") or raw.get("mlp_bias"), "biases on the output or feed-forward layers"),
                        (raw.get("use_sliding_window"), "sliding-window attention"),
                        (rope_type not in ("default", "linear", "llama3"), f"rope type {rope_type!r}")):
        if wrong:
            raise ValueError(f"{path}: {what} is not supported here")
    try:
        scaling = () if rope_type == "default" else (rope_type, rope["factor"])
        if rope_type == "llama3":
            scaling += (rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"])
        return ModelConfig(
            vocab_size=raw["vocab_size"], context_length=raw["max_position_embeddings"], d_model=raw["hidden_size"],
            num_layers=raw["num_hidden_layers"], num_heads=raw["num_attention_heads"],
            num_kv_heads=raw.get("num_key_value_heads"), head_dim=raw.get("head_dim"), d_ff=raw["intermediate_size"],
            rope_theta=rope.get("rope_theta", raw.get("rope_theta", 10_000.0)), rope_layout="half", rope_scaling=scaling,
            norm_eps=raw["rms_norm_eps"], qk_norm=kind == "qwen3", qkv_bias=kind == "qwen2",
            tie_embeddings=raw.get("tie_word_embeddings", False))
    except KeyError as error:
        raise ValueError(f"{path} has no {error}") from None
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from None


def _config_to_hf(c: ModelConfig) -> dict:
    kind = "qwen3" if c.qk_norm else "qwen2" if c.qkv_bias else "llama"
    if (c.norm, c.positions, c.ffn) != ("pre", "rope", "swiglu") or (c.qk_norm and c.qkv_bias):
        raise ValueError("Llama, Qwen2 and Qwen3 have pre-norm, RoPE and SwiGLU, and q/k norm or q/k/v bias but not both; "
                         f"this model has norm {c.norm}, positions {c.positions}, ffn {c.ffn}")
    rope = {"rope_type": c.rope_scaling[0], "factor": c.rope_scaling[1]} if c.rope_scaling else {"rope_type": "default"}
    if c.rope_scaling[:1] == ("llama3",):
        names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        rope |= dict(zip(names, c.rope_scaling[2:]))
    return {"model_type": kind, "architectures": [kind.capitalize() + "ForCausalLM"], "vocab_size": c.vocab_size,
            "max_position_embeddings": c.context_length, "hidden_size": c.d_model, "num_hidden_layers": c.num_layers,
            "num_attention_heads": c.num_heads, "num_key_value_heads": c.num_kv_heads, "head_dim": c.head_dim,
            "intermediate_size": c.d_ff, "hidden_act": "silu", "rms_norm_eps": c.norm_eps, "attention_bias": False,
            "tie_word_embeddings": c.tie_embeddings, "rope_theta": c.rope_theta,
            "rope_scaling": rope if c.rope_scaling else None, "rope_parameters": rope | {"rope_theta": c.rope_theta}}


def load_hf(directory, *, device="cpu", dtype: torch.dtype | None = None, attention=None,
            checkpoint_every: int = 0) -> TransformerLM:
    """A Llama, Qwen2, Qwen2.5 or Qwen3 checkpoint in Hugging Face form (config.json, safetensors in one file or shards).

    dtype: of the weights; None keeps the checkpoint's. The rest as in TransformerLM.
    Raises: ValueError naming the file and what is wrong with it.
    """
    directory = os.fspath(directory)
    path = os.path.join(directory, "config.json")
    config = _config_from_hf(_read_json(path), path)
    index, shards = os.path.join(directory, "model.safetensors.index.json"), ["model.safetensors"]
    if not os.path.exists(os.path.join(directory, shards[0])) and os.path.exists(index):
        shards = sorted(set(_read_json(index).get("weight_map", {}).values()))
        if any(os.path.basename(shard) != shard for shard in shards):
            raise ValueError(f"{index} points outside its folder")
    tensors = {}
    for shard in shards:
        tensors |= read_safetensors(os.path.join(directory, shard))
    with torch.device("meta"):                                        # shapes only: no time spent on random weights
        model = TransformerLM(config, attention, checkpoint_every)
    state = {}
    for name, empty in model.state_dict().items():
        theirs = _hf_name("token_embeddings.weight" if config.tie_embeddings and name == "lm_head.weight" else name)
        if theirs not in tensors:
            raise ValueError(f"{directory}: the checkpoint has no {theirs}")
        if tensors[theirs].shape != empty.shape:
            raise ValueError(f"{directory}: {theirs} is {tuple(tensors[theirs].shape)}, config.json says {tuple(empty.shape)}")
        state[name] = state[tied] if (tied := "token_embeddings.weight") in state and name == "lm_head.weight" \
            and config.tie_embeddings else tensors[theirs].to(device, dtype, copy=True)
    known = {_hf_name(name) for name in state} | {"lm_head.weight"}
    if foreign := [name for name in tensors if name not in known and not name.endswith("rotary_emb.inv_freq")]:
        raise ValueError(f"{directory}: the checkpoint has {foreign[0]}, which a {config} has no place for")
    model.load_state_dict(state, assign=True)
    if config.tie_embeddings:
        model.token_embeddings.weight = model.lm_head.weight
    for module in model.modules():
        if isinstance(module, RotaryPositionalEmbedding):
            module.fill(device)
    return model


def save_hf(model: TransformerLM, directory, tokenizer=None, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write a folder that transformers, vLLM and load_hf read. Nothing there is replaced before all of it is written.

    Interleaved RoPE becomes the half-split one by reordering the rows of q and k: the same model in other coordinates.
    tokenizer: written by its .save(path) as tokenizer.json. Raises: ValueError for a model that these formats can't say.
    """
    c, raw = model.config, _config_to_hf(model.config)
    tensors = {}
    for name, x in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_embeddings:
            continue
        if c.rope_layout == "interleaved" and name.split(".")[-2] in ("q_proj", "k_proj", "q_norm", "k_norm"):
            x = x.unflatten(0, (-1, c.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)   # pairs (0,1) become (0,K/2)
        tensors[_hf_name(name)] = x
    shards, room = [{}], max_shard_bytes
    for name, x in tensors.items():
        if x.nbytes > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = x
        room -= x.nbytes
    directory = os.path.abspath(os.fspath(directory))
    os.makedirs(directory, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as temporary:
        files = {}
        for i, shard in enumerate(shards, 1):
            name = f"model-{i:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            write_safetensors(os.path.join(temporary, name), shard)
            files |= {tensor: name for tensor in shard}
        texts = {"config.json": raw | {"torch_dtype": str(x.dtype).removeprefix("torch.")}}
        if len(shards) > 1:
            texts["model.safetensors.index.json"] = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())},
                                                     "weight_map": files}
        if tokenizer is not None:
            tokenizer.save(os.path.join(temporary, "tokenizer.json"))
            end = "<|endoftext|>" if "<|endoftext|>" in tokenizer.special_tokens else None
            texts["config.json"]["eos_token_id"] = tokenizer.special_tokens.get(end)
            texts["tokenizer_config.json"] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end,
                                              "model_max_length": c.context_length}
        for name, value in texts.items():
            with open(os.path.join(temporary, name), "w", encoding="utf-8") as file:
                json.dump(value, file, indent=2)
        for name in os.listdir(directory):                            # an old index would hide the new weights
            if name.startswith("model") and ".safetensors" in name:
                os.remove(os.path.join(directory, name))
        for name in sorted(os.listdir(temporary), reverse=True):
            os.replace(os.path.join(temporary, name), os.path.join(directory, name))

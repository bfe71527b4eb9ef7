"""model.py - a Transformer language model, every layer by hand.

What:       token ids -> logits: RMSNorm, rotary positions, grouped-query attention, SwiGLU; the loss, plain and without
            ever holding the logits; sampling with a KV cache; what it costs; Hugging Face checkpoints in and out.
Source:     Vaswani et al. 2017, arXiv:1706.03762; RMSNorm arXiv:1910.07467 (eq. 4); RoPE arXiv:2104.09864 (eq. 34);
            SwiGLU arXiv:2002.05202 (eq. 6); grouped queries arXiv:2305.13245; top-p arXiv:1904.09751 (eq. 2).
Deviations: normalises before each sub-layer and once at the end (in 2017: after each); no biases unless asked;
            embeddings from N(0, 1), linear weights from N(0, 2/(d_in+d_out)), both cut at 3 sigma.
Copy:       this file alone; needs torch (numpy for checkpoints, triton for backend="triton" and graph=True). MIT.
Run:        python model.py
            RoPE turns (1, 0) at positions 0, 1, 2 into (1.00, 0.00), (0.54, 0.84), (-0.42, 0.91)
            XL      2,127,057,600   4.51   22.3%    7.1%   66.9%    3.6%             244                 92.8
            every two ways to the same numbers agree to 1.3e-06  OK
"""
import argparse
import json
import math
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from torch.utils.checkpoint import checkpoint

try:                                   # only the kernels of the loss and of decoding need it
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# Dims: B batch, T sequence, S keys, D model width, H heads, G kv heads, K head width, F feed-forward width,
#       V vocabulary, L layers, N = B*T rows of the loss, n rows of a chunk of it, R samples being written
@dataclass(frozen=True)
class ModelConfig:
    """Shape and switches of a TransformerLM. Widths left None are filled in, so that reading them gives numbers
    (`dataclasses.replace` keeps them unless given None). Raises: ValueError. Example: ModelConfig().d_ff -> 1344"""
    vocab_size: int = 10_000
    context_length: int = 256          # tokens; the longest sequence the position tables reach
    d_model: int = 512
    num_layers: int = 4
    num_heads: int = 16
    num_kv_heads: int | None = None    # None: num_heads, which is plain multi-head attention
    head_dim: int | None = None        # None: d_model / num_heads
    d_ff: int | None = None            # None: 8/3 d_model to the nearest 64 ("silu": 4 d_model, as many parameters)
    rope_theta: float = 10_000.0
    rope_layout: str = "interleaved"   # pairs (0, 1), (2, 3), ...; "half": pairs (0, K/2), ... as Hugging Face has it
    rope_scaling: tuple = ()           # (factor, low, high, original context) of Llama 3.1's longer contexts
    norm_eps: float = 1e-5
    norm: str = "pre"                  # "pre" | "post" | "none"
    positions: str = "rope"            # "rope" | "none"
    ffn: str = "swiglu"                # "swiglu" | "silu"
    qk_norm: bool = False              # RMSNorm of every query and key head (Qwen3)
    qkv_bias: bool = False             # biases on q, k, v (Qwen2)
    tie_embeddings: bool = False       # the LM head is the embedding table

    def __post_init__(self):
        for name, kind in ModelConfig.__annotations__.items():
            value, wanted = getattr(self, name), "number above 0" if kind is float else "whole number from 1"
            if kind not in (str, bool, tuple) and not (
                    isinstance(value, (kind, int)) and (value is None or 0 < value < math.inf)):
                raise ValueError(f"{name} must be a {wanted}, got {value!r}")
        for name, allowed in (("norm", "pre post none"), ("positions", "rope none"), ("ffn", "swiglu silu"),
                              ("rope_layout", "interleaved half")):
            if getattr(self, name) not in allowed.split():
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ValueError(f"d_model {self.d_model} does not divide into {self.num_heads} heads; or give head_dim")
        d_ff = 4 * self.d_model if self.ffn == "silu" else max(64, round(8 * self.d_model / 3 / 64) * 64)
        vars(self).update(num_kv_heads=self.num_kv_heads or self.num_heads, d_ff=self.d_ff or d_ff,
                          head_dim=self.head_dim or self.d_model // self.num_heads,
                          rope_scaling=tuple(self.rope_scaling))               # JSON makes a list of it
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        fine = [type(x) in (int, float) and 0 < x < math.inf for x in self.rope_scaling]
        if fine and (fine != [True] * 4 or self.rope_scaling[1] >= self.rope_scaling[2]):
            raise ValueError(f"rope_scaling must be factor, low < high, context, all above 0, got {self.rope_scaling}")

# ------------------------------------------------------------------------------------------------------------ layers
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
        return torch.embedding(self.weight, token_ids)   # weight[token_ids], whose backward pass adds up in fp32

class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32; x's dtype. Example: [3, 4] -> [.85, 1.13]"""
    def __init__(self, d_model: int, eps: float = 1e-5):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x)                       # a square in fp16 overflows from 256 on
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)

def at_least_float32(x: Tensor) -> Tensor:
    """x itself, or x in float32 if it is narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x). Example: 1 -> 0.7311"""
    return x * torch.sigmoid(x)

class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x) (eq. 6); gated=False: w2(silu(w1 x)). Example: SwiGLU(8, 64)(torch.ones(2, 8)) is (2, 8)"""
    def __init__(self, d_model: int, d_ff: int, gated: bool = True):
        super().__init__()
        self.w1, self.w2 = Linear(d_model, d_ff), Linear(d_ff, d_model)
        self.w3 = Linear(d_model, d_ff) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        gate = silu(self.w1(x))                                             # (..., F)
        return self.w2(gate if self.w3 is None else gate * self.w3(x))

class RotaryPositionalEmbedding(nn.Module):
    """Turns the i-th pair of x at position p by the angle p * theta^(-2i/d_k), so that the dot product of a query and
    a key depends only on how far apart they stand (eq. 34). layout, scaling: see ModelConfig.
    x (..., T, d_k); token_positions (..., T) int below max_seq_len, any leading dimensions that broadcast with x's, or
    None for 0..T-1. Returns x's shape and dtype; computed in fp32.
    Example: position 1, theta 100, x = [1, 0, 0, 1] -> [cos 1, sin 1, -sin 0.1, cos 0.1]"""
    def __init__(self, theta: float, d_k: int, max_seq_len: int, layout: str = "interleaved", scaling: tuple = ()):
        super().__init__()
        if d_k % 2:
            raise ValueError(f"RoPE turns pairs, so d_k, the width of a head, must be even, got {d_k}")
        frequencies = theta ** (-torch.arange(0, d_k, 2, device="cpu").double() / d_k)      # the same on every device
        if scaling:          # waves shorter than original/high stay, longer than original/low slow down by the factor
            factor, low, high, original = scaling
            blend = ((original * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
            frequencies = frequencies * (blend + (1 - blend) / factor)
        angles = torch.arange(max_seq_len, device="cpu")[:, None] * frequencies
        self.layout, device = layout, torch.get_default_device()
        turns = torch.stack((angles.cos(), angles.sin())).float().to("cpu" if device.type == "meta" else device)
        self.register_buffer("turns", turns, persistent=False)                              # (2, max_seq_len, K/2)

    def _apply(self, fn, recurse=True):      # to another device, but never to bf16: it has no cosine of 1001
        self.turns = self.turns.to(fn(self.turns[:, :1]).device)
        return self

    def forward(self, x: Tensor, token_positions: Tensor | None = None) -> Tensor:
        at = slice(x.shape[-2]) if token_positions is None else token_positions
        (cos, sin), wide = self.turns[:, at], x.to(self.turns.dtype)                        # (..., T, K/2)
        if self.layout == "interleaved":
            # (a, b) cos + (b, a) (-sin, sin): every load and store in order, which a compiler makes one fast kernel
            swapped, signed = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2), torch.stack((-sin, sin), -1).flatten(-2)
            return (wide * cos.repeat_interleave(2, dim=-1) + swapped * signed).to(x.dtype)
        a, b = wide.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)

def softmax(x: Tensor, dim: int) -> Tensor:
    """exp(x) / sum(exp(x)) along dim; less the maximum: exp(89) overflows fp32. Example: [0, log 3] -> [1/4, 3/4]"""
    weights = (x - x.amax(dim, keepdim=True)).exp()
    return weights / weights.sum(dim, keepdim=True)

def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(K)) v (arXiv:1706.03762, eq. 1); the softmax in fp32, the result (..., T, Kv) in v's dtype.
    q (..., T, K), k (..., S, K), v (..., S, Kv); mask (..., T, S) bool, True where a query may look at a key. A query
    that may look at nothing gets zeros. Example: q = 0 -> the mean of the v that it sees."""
    scores = at_least_float32(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]))             # (..., T, S)
    if mask is None:
        return softmax(scores, -1).to(v.dtype) @ v
    weights = softmax(scores.masked_fill(~mask, torch.finfo(scores.dtype).min), -1)
    return weights.masked_fill(~mask, 0.0).to(v.dtype) @ v

def plain_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = True) -> Tensor:
    """Attention with grouped queries: query head h looks at kv head h // (H/G), which nobody copies.
    q (..., H, T, K), k and v (..., G, S, K) -> (..., H, T, K). is_causal: query t sees keys 0..t."""
    (H, T), (G, S) = q.shape[-3:-1], k.shape[-3:-1]
    mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril().repeat(H // G, 1) if is_causal else None
    q = q.unflatten(-3, (G, H // G)).flatten(-3, -2)                # (..., G, H/G*T, K): a group's queries in one list
    return scaled_dot_product_attention(q, k, v, mask).unflatten(-2, (H // G, T)).flatten(-4, -3)

def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = True) -> Tensor:
    """The same by torch's own fused kernels. Shapes as plain_attention."""
    grouped = q.shape[-3] != k.shape[-3]
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=grouped)

class CausalSelfAttention(nn.Module):
    """Multi-head attention of a sequence to its own past. x (..., T, D) -> (..., T, D).
    rope: turns queries and keys; None for no positions. attention: a function like plain_attention. switches:
    num_kv_heads, head_dim, qk_norm, ... of ModelConfig. attend (of a call): KVCache.attend, to see earlier tokens."""
    def __init__(self, d_model: int, num_heads: int, *, rope: nn.Module | None = None, attention=None, **switches):
        super().__init__()
        c = ModelConfig(d_model=d_model, num_heads=num_heads, **switches)
        self.head_dim, self.rope, self.attention = c.head_dim, rope, attention or plain_attention
        self.q_proj = Linear(d_model, num_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj, self.v_proj = (Linear(d_model, c.num_kv_heads * c.head_dim, bias=c.qkv_bias) for _ in range(2))
        self.output_proj = Linear(num_heads * c.head_dim, d_model)
        self.q_norm, self.k_norm = (RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, token_positions: Tensor | None = None, attend=None) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(q), self.k_norm(k)                                              # (..., T, H or G, K)
        if self.rope is not None:                        # before the transpose: gradients then come out in memory order
            at = torch.arange(x.shape[-2], device=x.device) if token_positions is None else token_positions
            q, k = self.rope(q, at[..., None]), self.rope(k, at[..., None])                # the same for every head
        q, k, v = (y.transpose(-3, -2) for y in (q, k, v))                                 # (..., H or G, T, K)
        y = self.attention(q, k, v, is_causal=True) if attend is None else attend(self.attention, q, k, v)
        return self.output_proj(y.transpose(-3, -2).flatten(-2))                           # (..., T, D)

class TransformerBlock(nn.Module):
    """x + attn(ln1(x)), then x + ffn(ln2(x)). norm="post": ln1(x + attn(x)), ln2(x + ffn(x)); "none": no norms."""
    def __init__(self, config: ModelConfig, rope: nn.Module | None = None, attention=None):
        super().__init__()
        c, self.post = config, config.norm == "post"
        self.attn = CausalSelfAttention(rope=rope, attention=attention, **vars(config))
        self.ffn = SwiGLU(c.d_model, c.d_ff, gated=c.ffn == "swiglu")
        self.ln1, self.ln2 = (nn.Identity() if c.norm == "none" else RMSNorm(c.d_model, c.norm_eps) for _ in range(2))

    def forward(self, x: Tensor, token_positions: Tensor | None = None, attend=None) -> Tensor:
        if self.post:
            x = self.ln1(x + self.attn(x, token_positions, attend))
            return self.ln2(x + self.ffn(x))
        x = x + self.attn(self.ln1(x), token_positions, attend)
        return x + self.ffn(self.ln2(x))

class TransformerLM(nn.Module):
    """token_ids (B, T) int -> logits (B, T, V): at each position, the scores of the token that comes next.
    attention: how the heads attend: plain_attention (default), sdpa_attention, or any function with the same contract.
    checkpoint_every: k > 0 drops the activations of every k-th block and makes them again in the backward pass.
    Raises: as hidden. Example: TransformerLM(ModelConfig(vocab_size=100))(torch.ones(1, 3).int()) is (1, 3, 100)"""
    def __init__(self, config: ModelConfig, attention=None, checkpoint_every: int = 0):
        super().__init__()
        self.config, self.checkpoint_every, c = config, checkpoint_every, config
        rope = None if c.positions == "none" else RotaryPositionalEmbedding(
            c.rope_theta, c.head_dim, c.context_length, c.rope_layout, c.rope_scaling)
        self.token_embeddings = Embedding(c.vocab_size, c.d_model)
        self.layers = nn.ModuleList(TransformerBlock(c, rope, attention) for _ in range(c.num_layers))
        self.ln_final = RMSNorm(c.d_model, c.norm_eps) if c.norm == "pre" else nn.Identity()   # "post" has done it
        self.lm_head = Linear(c.d_model, c.vocab_size)
        if c.tie_embeddings:
            self.token_embeddings.weight = self.lm_head.weight   # with the head's small init: logits start near 0

    def hidden(self, token_ids: Tensor, token_positions: Tensor | None = None, cache=None) -> Tensor:
        """The stream after ln_final, (B, T, D): lm_head or linear_cross_entropy make scores of it. cache: a KVCache.
        Raises: ValueError for more tokens than context_length, and (on a CPU) for ids outside the vocabulary."""
        T, longest = token_ids.shape[-1], self.config.context_length
        if token_positions is None and T > longest:
            raise ValueError(f"{T} tokens do not fit in context_length {longest}; cut them or build a longer model")
        _check_ids(token_ids, self.config.vocab_size)
        x = self.token_embeddings(token_ids)                     # (B, T, D)
        every = self.checkpoint_every if torch.is_grad_enabled() else 0
        for i, block in enumerate(self.layers):
            run = partial(checkpoint, block, use_reentrant=False) if every and i % every == 0 else block
            x = run(x, token_positions, None if cache is None else partial(cache.attend, i))
        return self.ln_final(x)

    def forward(self, token_ids: Tensor, token_positions: Tensor | None = None) -> Tensor:
        return self.lm_head(self.hidden(token_ids, token_positions))   # (B, T, V)

def _check_ids(ids: Tensor, vocab_size: int) -> None:
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():   # asking a GPU would stop it
        low, high = ids.min().item(), ids.max().item()
        if low < 0 or high >= vocab_size:
            raise ValueError(f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}; "
                             "was the text encoded by another tokenizer?")

# ---------------------------------------------------------------------------------------------------------- the loss
def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of -log softmax(logits)[target] in nats; the denominator is the number of targets.
    logits (..., V) any float dtype, targets (...) int. Computed in fp32. Raises: ValueError if there is no target.
    Example: cross_entropy(torch.zeros(1, 4), torch.tensor([2])) -> log 4 = 1.3863"""
    if logits.shape[:-1] != targets.shape or targets.numel() == 0:
        raise ValueError(f"logits {tuple(logits.shape)} want as many targets, at least one, got {tuple(targets.shape)}")
    _check_ids(targets, logits.shape[-1])
    shifted = at_least_float32(logits) - logits.amax(-1, keepdim=True).detach()
    return (shifted.exp().sum(-1).log() - shifted.gather(-1, targets.unsqueeze(-1)).squeeze(-1)).mean()

def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, backend: str = "torch",
                         chunk: int | None = None) -> Tensor:
    """cross_entropy(hidden @ weight.T, targets) without ever holding the (N, V) logits. A chunk of rows is turned into
    logits, these into their own gradient (softmax - onehot) where they lie, and that at once into the gradients of
    hidden and weight, which the backward pass only scales. Returns: mean over the targets, nats, fp32.
    hidden (..., D), weight (V, D), targets (...) int. Products are in hidden's dtype, or autocast's; softmax, loss and
    the sum of weight's gradient in fp32. backend: "torch", or "triton" for one kernel per chunk between the products
    (CUDA). chunk: rows; None takes what fits 560 MB (32 MB on a CPU).
    Raises: ValueError for shapes that do not fit, no target, a backend that cannot run. Example: weight 0 -> log V"""
    N, (V, D), kind = targets.numel(), weight.shape, hidden.device.type
    if hidden.shape != (*targets.shape, D) or N == 0 or chunk is not None and chunk < 1:
        raise ValueError(f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}, "
                         f"chunk {chunk} do not fit: want (..., D), (V, D) and (...) with a target, and a chunk from 1")
    _check_ids(targets, V)
    runs = backend == "triton" and triton is not None and (hidden.is_cuda or triton.knobs.runtime.interpret)
    if backend != "torch" and not runs:
        raise ValueError(f"backend {backend!r} cannot run here: 'triton' needs CUDA tensors; use backend='torch'")
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    if chunk is None:
        fits = max(1, (560_000_000 if hidden.is_cuda else 32_000_000) // (V * dtype.itemsize))
        chunk = -(-N // (-(-N // fits) * 128)) * 128             # chunks of one size, in whole tiles of 128 rows
    gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    hidden, targets = hidden.reshape(N, D).to(dtype), targets.flatten()
    return _linear_cross_entropy(hidden, weight, targets, chunk, backend, gradients)[0]

@torch.library.custom_op("twelve::linear_cross_entropy", mutates_args=())    # one node to torch.compile
def _linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, backend: str,
                          gradients: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss, and the gradients of the *sum* of losses: for hidden (N, D), and for weight (V, D) in fp32."""
    loss, grad_hidden, grad_weight = _empty_results(hidden, weight, targets, chunk, backend, gradients)
    softmax_gradient_ = _softmax_gradient_torch_ if backend == "torch" else _softmax_gradient_triton_
    weight, wide = weight.to(hidden.dtype), loss.dtype
    for start in range(0, len(hidden), chunk):
        h = hidden[start:start + chunk]                          # (n, D)
        logits = h @ weight.T                                    # (n, V)
        loss += softmax_gradient_(logits, targets[start:start + chunk], gradients).sum()
        if gradients:                                            # logits now hold softmax - onehot
            torch.mm(logits, weight, out=grad_hidden[start:start + chunk])
            if logits.is_cuda and logits.dtype != wide:          # a product of bf16 added up in fp32
                torch.addmm(grad_weight, logits.T, h, out_dtype=wide, out=grad_weight)
            else:
                grad_weight.addmm_(logits.T.to(wide), h.to(wide))
        del logits                                               # or two chunks would live at once
    return loss / len(hidden), grad_hidden, grad_weight

@_linear_cross_entropy.register_fake
def _empty_results(hidden, weight, targets, chunk, backend, gradients):
    loss = at_least_float32(hidden.new_zeros(()))                # sums over N rows need more than bf16's 8 bits
    hidden, weight = (hidden, weight) if gradients else (loss, loss)
    return loss, torch.empty_like(hidden), torch.zeros_like(weight, dtype=loss.dtype)

def _scale_gradients(ctx, grad_loss, *_):                        # autograd gives them hidden's and weight's dtype
    grad_hidden, grad_weight = ctx.saved_tensors
    return grad_hidden * (grad_loss / len(grad_hidden)), grad_weight * (grad_loss / len(grad_hidden)), *[None] * 4

_linear_cross_entropy.register_autograd(
    _scale_gradients, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*output[1:]))

def _softmax_gradient_torch_(logits: Tensor, targets: Tensor, gradients: bool) -> Tensor:
    """Losses (n,) of logits (n, V), which are overwritten with softmax - onehot if gradients are wanted."""
    x, index = at_least_float32(logits), targets[:, None]        # x is logits itself if that is wide enough
    log_sum, target_logit = x.logsumexp(1, keepdim=True), x.gather(1, index)      # (n, 1)
    if gradients:
        logits.copy_(x.sub_(log_sum).exp_().scatter_add_(1, index, x.new_full(index.shape, -1.0)))
    return (log_sum - target_logit).squeeze(1)

def _softmax_gradient_triton_(logits: Tensor, targets: Tensor, gradients: bool) -> Tensor:
    """The same in one kernel, a program per row, which reads its row a second time out of the L2 cache."""
    (n, V), losses = logits.shape, torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        _softmax_gradient_kernel[(n,)](logits, targets, losses, V, logits.stride(0), gradients,
                                       min(8192, triton.next_power_of_2(V)), num_warps=16)
    return losses

if triton is not None:
    @triton.jit
    def _softmax_gradient_kernel(logits, targets, losses, V, row_stride, GRADIENTS: tl.constexpr, BLOCK: tl.constexpr):
        LOG2_E: tl.constexpr = 1.4426950408889634                # the hardware's exponential is 2^x
        row = tl.program_id(0).to(tl.int64)
        logits += row * row_stride
        target = tl.load(targets + row)
        known = (target >= 0) & (target < V)                     # a bad target makes the loss NaN, not a crash
        target_logit = tl.load(logits + target, mask=known, other=float("nan")).to(tl.float32)
        columns, peak = tl.arange(0, BLOCK), -1.0e38
        total = tl.zeros((BLOCK,), tl.float32)
        for start in tl.range(0, V, BLOCK, num_stages=3):        # the online softmax, arXiv:1805.02867
            x = tl.load(logits + start + columns, mask=start + columns < V, other=float("-inf")).to(tl.float32)
            new_peak = tl.maximum(peak, tl.max(x, 0) * LOG2_E)
            total = total * tl.exp2(peak - new_peak) + tl.exp2(x * LOG2_E - new_peak)
            peak = new_peak
        log_sum = peak + tl.log2(tl.sum(total, 0))               # in units of log2
        tl.store(losses + row, log_sum / LOG2_E - target_logit)
        if GRADIENTS:
            for start in tl.range(0, V, BLOCK, num_stages=3):
                at = start + columns
                x = tl.load(logits + at, mask=at < V, other=float("-inf")).to(tl.float32)
                tl.store(logits + at, tl.exp2(x * LOG2_E - log_sum).to(logits.dtype.element_ty), mask=at < V)
            tl.debug_barrier()                                   # the target's own 1 comes off when all are written
            gradient = tl.exp2(target_logit * LOG2_E - log_sum) - 1
            tl.store(logits + target, gradient.to(logits.dtype.element_ty), mask=known)

# ---------------------------------------------------------------------------------------------------------- sampling
class KVCache:
    """Keys and values of every layer, (R, G, S, K), so that a new token costs one position and not the whole text. The
    first pass, over the prompts, leaves num_samples copies of each, with room for `capacity` positions. After that,
    `positions` (R,) says where each new token goes, and none lies behind `visible` (None: decode_attention looks)."""
    def __init__(self, num_layers: int, num_samples: int, capacity: int):
        self.layers, self.num_samples, self.capacity = [None] * num_layers, num_samples, capacity
        self.positions = self.visible = None

    def attend(self, layer: int, attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of new queries to their own prompt, or to all that is kept of their row."""
        if self.positions is None:                               # prompts are padded on the right: causal is enough
            room = 0, 0, 0, self.capacity - k.shape[2]
            self.layers[layer] = [nn.functional.pad(x, room).repeat_interleave(self.num_samples, 0) for x in (k, v)]
            return attention(q, k, v, is_causal=True)
        (R, G, _, K), (keys, values), S = k.shape, self.layers[layer], self.visible
        at = torch.arange(R, device=q.device), slice(None), self.positions
        keys[at], values[at] = k[:, :, 0], v[:, :, 0]
        if S is None:
            return decode_attention(q, keys, values, self.positions)
        mask = torch.arange(S, device=q.device) <= self.positions[:, None, None, None]                # (R, 1, 1, S)
        q = q.reshape(R, G, -1, K)                                                                    # (R, G, H/G, K)
        return scaled_dot_product_attention(q, keys[:, :, :S], values[:, :, :S], mask).reshape(R, -1, 1, K)

def decode_attention(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """Attention of one new token a row, q (R, H, 1, K), to keys and values (R, G, S, K), in order, up to its position
    (R,); K 16, 32, ... 256. One Triton kernel, a program per row and kv head, which reads what is there and no more."""
    (R, H, _, K), G, q = q.shape, keys.shape[1], q.contiguous()
    out, heads = torch.empty_like(q), max(16, triton.next_power_of_2(H // G))              # tl.dot wants 16 rows
    with torch.cuda.device_of(q):
        _decode_kernel[(R, G)](q, keys, values, out, positions, K ** -0.5, keys.stride(0), keys.stride(1), H // G,
                               heads, K, BLOCK=64 if K <= 128 else 32)
    return out

if triton is not None:
    @triton.jit
    def _decode_kernel(q, keys, values, out, positions, scale, row_stride, group_stride, PER_GROUP: tl.constexpr,
                       HEADS: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
        row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
        head, column, last = tl.arange(0, HEADS)[:, None], tl.arange(0, K), tl.load(positions + row)
        mine = ((row * tl.num_programs(1) + group) * PER_GROUP + head) * K + column
        query = tl.load(q + mine, mask=head < PER_GROUP, other=0.0)                        # (HEADS, K)
        here = row * row_stride + group * group_stride
        total, peak = tl.zeros((HEADS,), tl.float32), tl.full((HEADS,), -1.0e38, tl.float32)
        mixed = tl.zeros((HEADS, K), tl.float32)
        for start in range(0, last + 1, BLOCK):                  # the online softmax, arXiv:1805.02867
            at = start + tl.arange(0, BLOCK)
            there, seen = here + at[:, None] * K + column, at <= last
            key = tl.load(keys + there, mask=seen[:, None], other=0.0)                     # (BLOCK, K)
            value = tl.load(values + there, mask=seen[:, None], other=0.0)
            scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale          # (HEADS, BLOCK)
            scores = tl.where(seen[None], scores, -1.0e38)
            new_peak = tl.maximum(peak, tl.max(scores, 1))
            weights, shrink = tl.exp(scores - new_peak[:, None]), tl.exp(peak - new_peak)
            total, peak = total * shrink + tl.sum(weights, 1), new_peak
            mixed = mixed * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        tl.store(out + mine, (mixed / total[:, None]).to(out.dtype.element_ty), mask=head < PER_GROUP)

@dataclass
class Generation:
    """One sample. prompt_ids: the prompt as used; text: decode(ids), cut behind the stop string."""
    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)             # new tokens, those of the stop id or string included
    logprobs: list[float] = field(default_factory=list)      # the model's own, nats (before temperature, top-k, top-p)
    finish_reason: str | None = None                         # "stop" | "length"; None while it is written
    text: str | None = None

def sample_tokens(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
                  generator: torch.Generator | None = None) -> Tensor:
    """Draw a token a row. logits (R, V) -> ids (R,). temperature 0: the likeliest. top_k: of the k likeliest (0: all);
    top_p: of those, the smallest set of likeliest tokens that holds this much probability (arXiv:1904.09751, eq. 2)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = at_least_float32(logits) / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -torch.inf)
    if top_p < 1:
        ranked, order = softmax(logits, -1).sort(dim=-1, descending=True, stable=True)
        dropped = ranked.cumsum(-1) - ranked >= top_p            # what stands before it is enough
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
    # p_i / Exp(1), here in logs, is the largest with probability p_i / sum p: no second pass, no waiting for the GPU
    noise = torch.empty_like(logits).exponential_(generator=generator).clamp_(min=1e-30)
    return (logits - noise.log_()).argmax(-1)

@torch.no_grad()
def generate(model: TransformerLM, prompts: list[list[int]], *, max_new_tokens: int, min_new_tokens: int = 0,
             temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, num_samples: int = 1, stop_ids=(),
             stop_strings=(), decode=None, seed: int = 0, use_cache: bool = True, graph: bool = False
             ) -> list[Generation]:
    """num_samples continuations of every prompt, side by side, all in one batch; each prompt is computed once.
    A prompt longer than max(context + 1 - max_new_tokens, half the context) loses its front; a sample ends when the
    context is full. stop_ids end it, and stop_strings (found by decode: list[int] -> str), after min_new_tokens.
    graph: record a step once as a CUDA graph and replay it, with decode_attention: a token then costs its arithmetic
    and not the launching of 60 kernels a layer. Same seed and batch, same samples. Raises: ValueError, bad settings."""
    c, device = model.config, model.lm_head.weight.device
    context, K, cuda, stop_ids = c.context_length, c.head_dim, device.type == "cuda", set(stop_ids)
    for name, fine in (("max_new_tokens", max_new_tokens > 0), ("min_new_tokens", min_new_tokens >= 0),
                       ("temperature", 0 <= temperature < math.inf), ("top_p", 0 < top_p <= 1), ("top_k", top_k >= 0),
                       ("num_samples", num_samples > 0), ("stop_ids", all(0 <= i < c.vocab_size for i in stop_ids)),
                       ("stop_strings", "" not in stop_strings), ("prompts", all(len(p) for p in prompts)),
                       ("decode, for stop_strings,", decode is not None or not stop_strings)):
        if not fine:
            raise ValueError(f"{name} is missing, empty or out of range: {locals()[name.split(',')[0]]!r:.80}")
    if graph and not (cuda and triton is not None and use_cache and K in (16, 32, 64, 128, 256)):
        raise ValueError(f"graph=True needs a GPU, Triton, the cache, head_dim 16, 32, ... 256; not {device}, {K}")
    if not prompts:
        return []
    kept = max(context + 1 - max_new_tokens, (context + 1) // 2)
    samples = writing = [Generation(list(p[-kept:])) for p in prompts for _ in range(num_samples)]
    lengths = [len(s.prompt_ids) for s in samples]
    longest, steps = max(lengths), min(max_new_tokens, context + 1 - min(lengths))      # + 1: the last one is not read
    texts = torch.tensor([s.prompt_ids + [0] * (longest + steps - n) for s, n in zip(samples, lengths)], device=device)
    log_probs, ends = torch.zeros(texts.shape, device=device), torch.tensor(lengths, device=device)
    banned = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    cache = KVCache(len(model.layers), num_samples, min(context, longest + steps)) if use_cache else None

    def write_token(step: int) -> None:
        """One more token at the end of every row. Past step 0 it asks the GPU nothing, so that a graph can hold it."""
        rows, last = torch.arange(len(ends), device=device), (ends - 1).clamp(max=context - 1)
        if step and use_cache:
            cache.positions, cache.visible = last, None if graph else min(longest + step, context)
            hidden = model.hidden(texts[rows, last][:, None], last[:, None], cache)[:, 0]                   # (R, D)
        else:                                                    # whole texts; at first every prompt once
            copies = 1 if step else num_samples
            hidden = model.hidden(texts[::copies, :min(longest + step, context)], cache=cache)[rows // copies, last]
        logits = at_least_float32(model.lm_head(hidden))                                # (R, V)
        allowed = logits.index_fill(-1, banned, -torch.inf) if step < min_new_tokens else logits
        tokens = sample_tokens(allowed, temperature, top_k, top_p, generator)
        texts[rows, ends] = tokens
        log_probs[rows, ends] = (logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)).float()
        ends.add_(1)

    recorded, looked = None, 0                                   # looked: steps whose tokens the samples have
    for step in range(steps):
        if graph and recorded is None and step >= max(2, min_new_tokens):      # step 1 has compiled its kernels
            recorded = torch.cuda.CUDAGraph()
            recorded.register_generator_state(generator)
            with torch.cuda.device(device), torch.cuda.graph(recorded, stream=torch.cuda.Stream()):
                write_token(step)
        write_token(step) if recorded is None else recorded.replay()
        if cuda and (step + 1) % 16 and step + 1 < steps:        # to look means to wait
            continue
        new = ends[:, None] + torch.arange(looked - step - 1, 0, device=device)         # the places written since
        for sample, *tokens in zip(writing, texts.gather(1, new).tolist(), log_probs.gather(1, new).tolist()):
            if sample.finish_reason is None:
                limit = min(max_new_tokens, context + 1 - len(sample.prompt_ids))
                _extend(sample, *tokens, limit, min_new_tokens, stop_ids, stop_strings, decode)
        looked, going = step + 1, [i for i, sample in enumerate(writing) if sample.finish_reason is None]
        if not going:
            break
        if len(going) <= (0.5 if graph else 0.9) * len(writing):      # the cache is too dear to copy for one row
            writing, recorded = [writing[i] for i in going], None
            texts, log_probs, ends = (x[going] for x in (texts, log_probs, ends))
            for i, pair in enumerate(cache.layers if use_cache else ()):
                cache.layers[i] = [x[going] for x in pair]
    return samples

def _extend(sample: Generation, ids: list[int], logprobs: list[float], limit: int, min_new_tokens: int, stop_ids,
            stop_strings, decode) -> None:
    """Add new tokens to a sample. If one of them ends it, cut it there and fill in reason and text."""
    known, ids, logprobs = len(sample.ids), (sample.ids + ids)[:limit], sample.logprobs + logprobs
    start, reach = known, max(map(len, stop_strings), default=0)
    while reach and start and len(decode(ids[start:known]).lstrip("\ufffd")) < reach:   # ids may be without text, or
        start = max(0, 2 * start - known - reach)                                       # a part of a character
    near = [s for s in stop_strings if s in decode(ids[start:])]
    passed = len(decode(ids[:min_new_tokens]).rstrip("\ufffd")) if near else 0          # half a character is no text
    sample.finish_reason, end = "length" if len(ids) == limit else None, None
    for n in range(max(known, min_new_tokens) + 1, len(ids) + 1):
        text = decode(ids[:n]) if near else ""
        cuts = [at + len(s) for s in near if (at := text.find(s, max(0, passed - len(s) + 1))) >= 0]
        if cuts or ids[n - 1] in stop_ids:
            ids, sample.finish_reason, end = ids[:n], "stop", min(cuts, default=None)
            break
    sample.ids, sample.logprobs = ids, logprobs[:len(ids)]
    sample.text = decode(ids)[:end] if sample.finish_reason and decode else None

# ----------------------------------------------------------------------------------------------------- what it costs
def count_parameters(model: ModelConfig | nn.Module) -> int:
    """Numbers to be trained, of a module or of a config; shared ones once. Example: ModelConfig() -> 22,696,448"""
    with torch.device("meta"):                                   # shapes without numbers
        module = TransformerLM(model) if isinstance(model, ModelConfig) else model
    return sum(p.numel() for p in module.parameters())

def count_flops(config: ModelConfig, seq_len: int) -> dict[str, int]:
    """FLOPs of the matrix products in one forward pass over one sequence, by component and in "total": 2mkn for
    (m, k) x (k, n), attention not halved for causality; training: three times it. ModelConfig(), 256 -> total 9.53e9"""
    c, T = config, seq_len
    widths = 2 * (c.num_heads + c.num_kv_heads) * c.head_dim     # of q and output, k and v
    flops = {"attention projections": c.num_layers * 2 * T * c.d_model * widths,
             "attention scores and sums": c.num_layers * 4 * T * T * c.num_heads * c.head_dim,
             "feed-forward": c.num_layers * 2 * T * (3 if c.ffn == "swiglu" else 2) * c.d_model * c.d_ff,
             "lm head": 2 * T * c.d_model * c.vocab_size}
    return flops | {"total": sum(flops.values())}

def count_memory(config: ModelConfig, batch_size: int, seq_len: int) -> int:
    """Bytes of a training step with AdamW and plain attention, in fp32: weights, gradients, moments, activations."""
    c, tokens = config, batch_size * seq_len
    block = 8 * c.d_model + 3 * (c.num_heads + c.num_kv_heads) * c.head_dim + 3 * c.num_heads * seq_len + 5 * c.d_ff
    return 16 * count_parameters(c) + 4 * tokens * (c.num_layers * block + 3 * c.d_model + 2 * c.vocab_size)

# --------------------------------------------------------------------------------- checkpoints in Hugging Face form
HF_NAMES = {"token_embeddings": "model.embed_tokens", "layers": "model.layers", "ln_final": "model.norm",
            "output_proj": "o_proj", "attn": "self_attn", "ffn": "mlp", "ln1": "input_layernorm",
            "ln2": "post_attention_layernorm", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
HF_CONFIG = {"vocab_size": "vocab_size", "context_length": "max_position_embeddings", "d_model": "hidden_size",
             "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "d_ff": "intermediate_size",
             "norm_eps": "rms_norm_eps", "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
HF_KNOWN = {"model_type": ("llama", "qwen2", "qwen3"), "rope_type": ("default", "llama3"), "hidden_act": ("silu",),
            "use_sliding_window": (False, None), "attention_bias": (False, None), "mlp_bias": (False, None)}
LLAMA3 = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"     # our rope_scaling
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}

def read_safetensors(path) -> dict[str, Tensor]:
    """Tensors by name, mapped from the file, read when touched: 8 bytes of header length, a JSON header, raw numbers.
    Raises: ValueError (or what JSON and look-ups raise) for a file that is cut off or no safetensors at all."""
    data, tensors, end = torch.from_file(str(path), size=Path(path).stat().st_size, dtype=torch.uint8), {}, 0
    length = int.from_bytes(data[:8].tolist(), "little")
    header, data = json.loads(bytes(data.numpy()[8:8 + length])), data[8 + length:]
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (low, high) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if low != end or high - low != math.prod(shape) * dtype.itemsize or high > len(data):
            raise ValueError(f"{path} is cut off or corrupt: {name} {shape} does not fit bytes {low} to {high}")
        raw, end = data[low:high], high
        tensors[name] = (raw.clone() if raw.data_ptr() % dtype.itemsize else raw).view(dtype).view(shape)
    if end != len(data):
        raise ValueError(f"{path} is corrupt: {len(data) - end} bytes behind the last tensor")
    return tensors

def write_safetensors(path, tensors: dict[str, Tensor]) -> None:
    """The inverse; the header is padded to a multiple of 8 bytes, so that views of the file align. Not over a file
    whose tensors are still in use: they are views of it."""
    header, end, names = {"__metadata__": {"format": "pt"}}, 0, {dtype: name for name, dtype in DTYPES.items()}
    for name, x in tensors.items():
        header[name] = {"dtype": names[x.dtype], "shape": list(x.shape), "data_offsets": [end, end := end + x.nbytes]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for x in tensors.values():
            file.write(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())

def hf_name(name: str) -> str:
    """A parameter's name in Hugging Face's words. 'layers.0.ffn.w1.weight' -> 'model.layers.0.mlp.gate_proj.weight'"""
    return ".".join(HF_NAMES.get(part, part) for part in name.split("."))

def load_hf(directory, *, device="cpu", dtype: torch.dtype | None = None, **options) -> TransformerLM:
    """A Llama, Qwen2, Qwen2.5 or Qwen3 checkpoint in Hugging Face form: config.json and model*.safetensors, any number.
    dtype: of the weights; None keeps the checkpoint's. options: attention and checkpoint_every of TransformerLM.
    Raises: ValueError saying what is wrong with it. Example: load_hf("Qwen2.5-1.5B", dtype=torch.bfloat16)"""
    try:
        config = _config_from_hf(json.loads(Path(directory, "config.json").read_text(encoding="utf-8")))
        with torch.device("meta"):                               # no time is spent on random weights
            model = TransformerLM(config, **options)
        ours = {hf_name(name): name for name in model.state_dict()}
        state = {ours.get(name, name): x.to(device, dtype, copy=True)
                 for shard in sorted(Path(directory).glob("model*.safetensors"))
                 for name, x in read_safetensors(shard).items() if not name.endswith("rotary_emb.inv_freq")}
        state |= {"lm_head.weight": state.get("token_embeddings.weight")} if config.tie_embeddings else {}
        model.load_state_dict(state, assign=True)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{directory} is no whole Llama, Qwen2 or Qwen3 checkpoint in config.json and .safetensors: "
                         f"{type(error).__name__}: {' '.join(str(error).split()):.200}") from None
    if config.tie_embeddings:
        model.lm_head.weight = model.token_embeddings.weight
    return model.to(device)

def _config_from_hf(raw: dict) -> ModelConfig:
    raw = {"num_key_value_heads": None, "head_dim": None, "rope_theta": 10_000.0} | raw       # old ones do not say
    raw |= raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    raw.setdefault("rope_type", raw.get("type", "default"))
    for name, known in HF_KNOWN.items():
        if raw.get(name, known[-1]) not in known:
            raise ValueError(f"{name} {raw[name]!r} is not supported, only {known}")
    kind, llama3 = raw["model_type"], raw["rope_type"] == "llama3"
    return ModelConfig(**{ours: raw[theirs] for ours, theirs in HF_CONFIG.items()}, rope_theta=raw["rope_theta"],
                       rope_layout="half", rope_scaling=tuple(raw[name] for name in LLAMA3) if llama3 else (),
                       qk_norm=kind == "qwen3", qkv_bias=kind == "qwen2",
                       tie_embeddings=bool(raw.get("tie_word_embeddings")))

def save_hf(model: TransformerLM, directory, tokenizer=None) -> None:
    """Write a folder that transformers, vLLM and load_hf read. Nothing there is replaced before all of it is written.
    Interleaved RoPE becomes the half-split one by reordering the rows of q and k: the same model in other coordinates.
    tokenizer: written by its .save(path). Raises: ValueError for a model that Llama, Qwen2 and Qwen3 cannot express."""
    c, tensors, directory = model.config, {}, Path(directory)
    if (c.norm, c.positions, c.ffn) != ("pre", "rope", "swiglu") or (c.qk_norm and c.qkv_bias):
        raise ValueError("Llama, Qwen2 and Qwen3 have pre-norm, RoPE and SwiGLU, and q/k norm or q/k/v bias, not both; "
                         f"this model has norm {c.norm}, positions {c.positions}, ffn {c.ffn}")
    if any(directory.glob("model-*.safetensors")):
        raise ValueError(f"{directory} holds a checkpoint in shards, which would mix with this one; save elsewhere")
    for name, x in model.named_parameters():                     # a shared table comes once
        if c.rope_layout == "interleaved" and name.split(".")[-2] in ("q_proj", "k_proj", "q_norm", "k_norm"):
            x = x.unflatten(0, (-1, c.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)    # pair (0, 1) to (0, K/2)
        tensors[hf_name(name)] = x
    kind = "qwen3" if c.qk_norm else "qwen2" if c.qkv_bias else "llama"
    rope = {"rope_type": "llama3" if c.rope_scaling else "default"} | dict(zip(LLAMA3, c.rope_scaling))
    texts = {"config.json": {theirs: getattr(c, ours) for ours, theirs in HF_CONFIG.items()} | {
        "model_type": kind, "architectures": [kind.capitalize() + "ForCausalLM"], "hidden_act": "silu",
        "attention_bias": False, "tie_word_embeddings": c.tie_embeddings, "torch_dtype": str(x.dtype).split(".")[1],
        "rope_theta": c.rope_theta, "rope_scaling": rope if c.rope_scaling else None,
        "rope_parameters": rope | {"rope_theta": c.rope_theta}}}      # transformers 5 reads this, others the two above
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as temporary:
        if tokenizer is not None:
            end = "<|endoftext|>" if "<|endoftext|>" in tokenizer.special_tokens else None
            texts["config.json"]["eos_token_id"] = tokenizer.special_tokens.get(end)
            texts["tokenizer_config.json"] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
            tokenizer.save(f"{temporary}/tokenizer.json")
        write_safetensors(f"{temporary}/model.safetensors", tensors)
        for name, value in texts.items():
            Path(temporary, name).write_text(json.dumps(value, indent=2), encoding="utf-8")
        for path in Path(temporary).iterdir():
            path.replace(directory / path.name)

# ------------------------------------------------------------------------------------------------------ to see it work
def walk_through() -> None:
    """One small model from ids to loss, then what GPT-2's sizes cost with SwiGLU, RoPE and an untied head."""
    torch.manual_seed(0)
    model, ids = TransformerLM(ModelConfig(50, 16, 32, num_layers=2, num_heads=4)), torch.arange(6)[None]
    turned = RotaryPositionalEmbedding(10_000.0, 2, 3)(torch.tensor([[1.0, 0]] * 3)).tolist()
    print(f"RoPE turns (1, 0) at positions 0, 1, 2 into {', '.join(f'({a:.2f}, {b:.2f})' for a, b in turned)}")
    loss = cross_entropy(model(ids[:, :-1]), ids[:, 1:])
    print(f"ids {tuple(ids.shape)} -> hidden {tuple(model.hidden(ids).shape)} -> logits {tuple(model(ids).shape)}, "
          f"loss {loss:.2f} nats; knowing nothing costs log 50 = {math.log(50):.2f}")
    print("GPT-2      parameters  TFLOP for 1024 tokens: projections, scores, ffn, head  GB with AdamW, batch 8  days")
    for name, *shape in ("small", 768, 12, 12), ("medium", 1024, 24, 16), ("large", 1280, 36, 20), ("XL", 1600, 48, 25):
        c = ModelConfig(50257, 1024, *shape, d_ff=4 * shape[0])
        *parts, total = count_flops(c, 1024).values()
        days = 3 * total * 300e9 / 1024 / (0.5 * 989e12) / 86400      # backward costs twice forward
        print(f"{name:6s} {count_parameters(c):14,} {total / 1e12:6.2f}" + "".join(f"{x / total:8.1%}" for x in parts) +
              f" {count_memory(c, 8, 1024) / 1e9:15.0f} {days:20.1f}")
    print("days: for 300 billion tokens on one H200 at 50% of its 989 TFLOP/s in bf16")

def self_check(seed: int = 0) -> float:
    """Largest difference between each fast or hand-made version and plain or torch's own, and the XL accounting.
    Raises: AssertionError above 1e-4: logits of size 5 carry fp32 errors of 1e-5; wrong pairs in RoPE are off by 1."""
    torch.manual_seed(seed)
    config, ids = ModelConfig(97, 48, 32, 2, 4, num_kv_heads=2), torch.randint(97, (2, 41))
    model, fast = TransformerLM(config), TransformerLM(config, sdpa_attention, checkpoint_every=1)
    fast.load_state_dict(model.state_dict())
    x, y = ids[:, :-1], ids[:, 1:]
    plain, chunked = cross_entropy(model(x), y), linear_cross_entropy(fast.hidden(x), fast.lm_head.weight, y, chunk=7)
    oracle = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
    with tempfile.TemporaryDirectory() as folder:
        save_hf(model, folder)
        pairs = [(model(x), fast(x)), (model(x), load_hf(folder)(x)), (plain, oracle), (plain, chunked)]
    pairs += zip(*(torch.autograd.grad(loss, [*m.parameters()]) for loss, m in ((plain, model), (chunked, fast))))
    worst = max((a - b).abs().max().item() for a, b in pairs)
    assert worst < 1e-4, f"two ways to the same numbers differ by {worst:.1e}"
    assert count_parameters(ModelConfig(50257, 1024, 1600, 48, 25, d_ff=6400)) == 2_127_057_600
    return worst

def bench(device: str) -> None:
    """Milliseconds, and memory on top of the inputs, of the loss and its gradients: full logits and in chunks."""
    cuda, full = device == "cuda", lambda h, w, y: cross_entropy(h @ w.T, y)
    N, V, D, dtype = (65536, 50304, 768, torch.bfloat16) if cuda else (2048, 8192, 256, torch.float32)
    print(f"{N} rows, V {V}, D {D}, {dtype}, {torch.cuda.get_device_name() if cuda else 'CPU'}, {torch.__version__}")
    ways = {"full logits": full, "chunks, torch": linear_cross_entropy} if not cuda else {
        "full logits, compiled": torch.compile(full, dynamic=False),
        "chunks, triton": partial(linear_cross_entropy, backend="triton")}
    h, w = (torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in ((N, D), (V, D)))
    y, run = torch.randint(V, (N,), device=device), lambda loss: torch.autograd.grad(loss(h, w, y), (h, w))
    for name, loss in ways.items():
        run(loss)                                                # warm-up: compiles
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        before, timer = torch.cuda.memory_allocated(), Timer("run(loss)", globals={"run": run, "loss": loss})
        time = timer.blocked_autorange(min_run_time=1.0)
        peak = f", {(torch.cuda.max_memory_allocated() - before) / 1e6:.0f} MB" if cuda else ""
        print(f"{name:22s} {time.median * 1e3:9.2f} ms (iqr {time.iqr * 1e3:.2f}), "
              f"{6 * N * V * D / time.median / 1e12:.2f} TFLOP/s{peak}", flush=True)

def main() -> int:
    """Without flags the walk-through and the self-check, with --bench the losses side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    devices = ["cuda"] * torch.cuda.is_available() + ["cpu"]
    parser.add_argument("--device", default=devices[0], choices=devices, help="of --bench")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bench", action="store_true", help="time the losses side by side")
    args = parser.parse_args()
    if args.bench:
        bench(args.device)
    else:
        walk_through()
        print(f"every two ways to the same numbers agree to {self_check(args.seed):.1e}  OK")
    return 0

if __name__ == "__main__":
    sys.exit(main())

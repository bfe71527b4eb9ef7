"""flash_attn_triton.py - exact attention that never writes the T x T scores to memory.

What:       plain attention; FlashAttention-2 in PyTorch, tile by tile, forward and backward; the same in Triton, tuned
            for NVIDIA Hopper; `flash_attention(q, k, v)` for TransformerLM(config, attention=...).
Source:     Dao 2023, FlashAttention-2, arXiv:2307.08691, Algorithms 1 and 2 (the log-sum-exp L, D = rowsum(dO * O));
            online softmax arXiv:1805.02867; grouped queries arXiv:2305.13245.
Deviations: 1. The Triton backward is two kernels, one for dQ and one for dK and dV, each of which writes what it owns:
            no atomics, so the same tiles give the same bits.  2. Scores are kept in units of log2, since the hardware's
            exponential is 2^x.  3. With T != S the causal mask is aligned top-left, as torch's: query i sees keys 0..i.
Copy:       this file alone; needs torch, and triton 3.6 or newer for the kernels (tested: 3.6, 3.9). MIT.
Run:        python flash_attn_triton.py
            FlashAttentionTriton: O, dQ, dK, dV equal plain attention in float64 to 3.1e-07  OK
            python flash_attn_triton.py --bench   (forward + backward, ms; one H200, torch 2.11, triton 3.6, bfloat16)
              B  H     T   K   ours  SDPA-FA2  SDPA-cuDNN        B  H     T   K   ours  SDPA-FA2  SDPA-cuDNN
              1 16 16384  64   4.71      7.09        4.42        1 16 16384  16   2.96      5.11        4.14
              4 16  4096 128   2.22      3.58        1.88        1 16 16384  32   3.35      4.90        4.19
              1 32 32768 128   64.4      94.5        55.4       16 16  1024  64   0.46      0.75        0.47
            The long ones draw all of the GPU's 700 W and slow its clock: work costs time even where it overlaps, and
            two backward kernels do seven products for five. The short ones wait for Python: 45 us forward, 270 both.
"""
import argparse
import contextlib
import functools
import itertools
import math
import os
import subprocess
import sys
import warnings
from collections import namedtuple
from types import SimpleNamespace

import torch
import torch._functorch.config
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
    jit = triton.jit
except ImportError:                    # no Triton (a Mac): the PyTorch half still works, the kernels are never called
    triton, tl, jit, TensorDescriptor = None, SimpleNamespace(constexpr=None), lambda function: function, object

LOG2_E = math.log2(math.e)

# Dims: B batch, H query heads, G key/value heads (H a multiple of G), T queries, S keys, K head width
#       i over queries (rows), j over keys (columns); BLOCK_M queries and BLOCK_N keys a tile


# ---- Plain attention, and what is wrong with it ---------------------------------------------------------------------

def plain_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
    """softmax(Q K^T / sqrt(K)) V, with the (T, S) scores in memory.

    Args: q (..., H, T, K), k and v (..., G, S, K), any float dtype; H a multiple of G. Returns: (..., H, T, K).
    Example: a single key has weight 1, so the output is its value.
    """
    if q.dim() > 2 and k.shape[-3] != q.shape[-3]:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], dim=-3) for x in (k, v))
    scores = q @ k.mT * q.shape[-1]**-0.5                                           # (..., T, S)
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    return scores.softmax(-1) @ v                                                   # (..., T, K)

def cost(B: int, H: int, T: int, K: int, is_causal: bool = True, element: int = 2) -> tuple[float, int, int]:
    """FLOPs of one forward pass, and bytes to and from memory, plain and tiled. Backward has 2.5 times the FLOPs. Plain
    attention writes and reads the scores, then writes and reads their softmax: 4 T^2 numbers of `element` bytes. The
    tiled versions read Q, K, V and write O, each once: 4 T K numbers."""
    tiled = element * B * H * 4 * T * K
    return 4 * B * H * T * T * K / (2 if is_causal else 1), element * B * H * 4 * T * T + tiled, tiled


# ---- FlashAttention-2 in PyTorch: the algorithm, one line for each line of the paper --------------------------------

class FlashAttentionPyTorch(torch.autograd.Function):
    """FlashAttention-2 with a Python loop over tiles. Slow, and easy to read; the Triton kernels below follow it.

    `.apply(q, k, v, is_causal=False)`: q (..., T, K), k and v (..., S, K) with the same leading dimensions. Returns
    (..., T, K). Saves L (..., T), the natural log of each row's sum of exponentials, which lets the backward pass
    rebuild any tile of the softmax: P = exp(S - L). Any float dtype. Raises: ValueError for shapes that do not fit.
    """
    QUERIES, KEYS = 64, 32             # tile size

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
        """Algorithm 1. Raises: ValueError for shapes that do not belong together."""
        _check(q, k, v)
        T, S, scale = q.shape[-2], k.shape[-2], q.shape[-1]**-0.5
        wide = torch.promote_types(q.dtype, torch.float32)                          # accumulate in at least float32
        o, L = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=wide)
        for i in range(0, T, FlashAttentionPyTorch.QUERIES):                        # Alg. 1 line 3
            rows = slice(i, min(i + FlashAttentionPyTorch.QUERIES, T))
            q_i = q[..., rows, :].to(wide)                                          # line 4
            m = q_i.new_full(q_i.shape[:-1], -torch.inf)                            # line 5: running maximum,
            l = q_i.new_zeros(q_i.shape[:-1])                                       #   running sum,
            acc = torch.zeros_like(q_i)                                             #   unnormalised output
            for cols in _key_tiles(rows, S, is_causal):                             # line 6
                k_j, v_j = k[..., cols, :].to(wide), v[..., cols, :].to(wide)       # line 7
                scores = _mask(q_i @ k_j.mT * scale, rows, cols, is_causal)         # line 8: (..., rows, cols)
                new_m = torch.maximum(m, scores.amax(-1))                           # line 9
                p = (scores - new_m[..., None]).exp()
                rescale = (m - new_m).exp()                                         # what the old sums are worth now
                l = rescale * l + p.sum(-1)
                acc = rescale[..., None] * acc + p @ v_j                            # line 10
                m = new_m
            o[..., rows, :] = (acc / l[..., None]).to(o.dtype)                      # line 12
            L[..., rows] = m + l.log()                                              # line 13
        ctx.save_for_backward(q, k, v, o, L)
        ctx.is_causal = is_causal
        return o

    @staticmethod
    def backward(ctx, do: Tensor):
        """Algorithm 2, the loop over queries outside."""
        q, k, v, o, L = ctx.saved_tensors
        T, S, scale, wide = q.shape[-2], k.shape[-2], q.shape[-1]**-0.5, L.dtype
        D = (do.to(wide) * o.to(wide)).sum(-1)                                      # Alg. 2 line 4: (..., T)
        dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
        for i in range(0, T, FlashAttentionPyTorch.QUERIES):
            rows = slice(i, min(i + FlashAttentionPyTorch.QUERIES, T))
            q_i, do_i = q[..., rows, :].to(wide), do[..., rows, :].to(wide)
            for cols in _key_tiles(rows, S, ctx.is_causal):
                k_j, v_j = k[..., cols, :].to(wide), v[..., cols, :].to(wide)
                scores = _mask(q_i @ k_j.mT * scale, rows, cols, ctx.is_causal)     # line 10
                p = (scores - L[..., rows, None]).exp()                             # line 11: the softmax itself
                dv[..., cols, :] += p.mT @ do_i                                     # line 12
                dp = do_i @ v_j.mT                                                  # line 13
                ds = p * (dp - D[..., rows, None]) * scale                          # line 14
                dq[..., rows, :] += ds @ k_j                                        # line 15
                dk[..., cols, :] += ds.mT @ q_i                                     # line 16
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None

def _key_tiles(rows: slice, S: int, is_causal: bool) -> list[slice]:
    """The tiles of keys that any of these queries may see: those beyond the diagonal are never visited."""
    end = min(S, rows.stop) if is_causal else S
    return [slice(j, min(j + FlashAttentionPyTorch.KEYS, end)) for j in range(0, end, FlashAttentionPyTorch.KEYS)]

def _mask(scores: Tensor, rows: slice, cols: slice, is_causal: bool) -> Tensor:
    """-inf where a key lies in the future; a tile below the diagonal is returned as it is."""
    if not is_causal or cols.stop <= rows.start + 1:
        return scores
    i = torch.arange(rows.start, rows.stop, device=scores.device)[:, None]
    j = torch.arange(cols.start, cols.stop, device=scores.device)
    return scores.masked_fill(j > i, -torch.inf)


# ---- The same in Triton. A program owns one tile of the output and loops over the other side. -----------------------
#
# x: a (B, H, T, K) tensor as (pointer, its first 3 strides), or with TMA as a tensor descriptor, which on Hopper has
# the copy engine fetch a whole tile in one instruction, bounds checks and shared-memory layout included.

@jit
def pointers(x, batch, head, row, length, ROWS: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Addresses of rows [row, row + ROWS) of one head, (ROWS, BLOCK_K), and which of them exist. 64-bit offsets."""
    rows = row + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_K)
    start = x[0] + batch.to(tl.int64) * x[1] + head.to(tl.int64) * x[2]
    inside = (rows < length)[:, None] & (cols < K)[None, :]
    return start + rows.to(tl.int64)[:, None] * x[3] + cols[None, :], inside

@jit
def load_tile(x, batch, head, row, length,
              ROWS: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr):
    """Rows [row, row + ROWS) of one head, (ROWS, BLOCK_K); zeros beyond the last row and beyond K."""
    if TMA:
        return x.load([batch, head, row, 0]).reshape(ROWS, BLOCK_K)
    else:
        at, inside = pointers(x, batch, head, row, length, ROWS, K, BLOCK_K)
        return tl.load(at, mask=inside, other=0.0)

@jit
def store_tile(x, tile, batch, head, row, length,
               ROWS: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr):
    """The counterpart of load_tile: writes what lies inside, leaves the rest alone."""
    if TMA:
        x.store([batch, head, row, 0], tile.to(x.dtype).reshape(1, 1, ROWS, BLOCK_K))
    else:
        at, inside = pointers(x, batch, head, row, length, ROWS, K, BLOCK_K)
        tl.store(at, tile.to(x[0].dtype.element_ty), mask=inside)

@jit
def load_numbers(x, line, row, width, ROWS: tl.constexpr, TMA: tl.constexpr):
    """A number for each of the rows [row, row + ROWS) out of x (lines, width)."""
    if TMA and ROWS <= 64:             # fewer than threads: plain loads would fetch each many times
        return x.load([line, row]).reshape(ROWS)
    else:
        return tl.load(x + line.to(tl.int64) * width + row + tl.arange(0, ROWS))

@jit
def visible(row, col, S, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(BLOCK_M, BLOCK_N) or (1, BLOCK_N): which scores of the tile at (row, col) count."""
    cols = col + tl.arange(0, BLOCK_N)
    keep = (cols < S)[None, :]
    if CAUSAL:
        keep = keep & (cols[None, :] <= (row + tl.arange(0, BLOCK_M))[:, None])
    return keep

@jit
def forward_kernel(q_at, k_at, v_at, o_at, L, scale_log2, one, H, T, S,
                   GROUP: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, TMA: tl.constexpr,
                   PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """O and L (B, H, T) for one tile of queries: Algorithm 1, with the running maximum m in units of log2.

    Programs of one head are neighbours, so that its K and V stay in the L2 cache; they begin with the last rows, which
    have the most work under a causal mask, so that no long one is left for the end.
    """
    tiles = tl.cdiv(T, BLOCK_M)
    row = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    batch, head = tl.program_id(0) // tiles // H, tl.program_id(0) // tiles % H
    q = load_tile(q_at, batch, head, row, T, BLOCK_M, K, BLOCK_K, TMA)
    if q.dtype != tl.float32:          # times 1.0, unknown to the compiler: Q now counts as computed, so it goes to the
        q = (q.to(tl.float32) * one).to(q.dtype)     # tensor cores from registers, and leaves its shared memory to K, V
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    full = (tl.minimum(row, S) if CAUSAL else S) // BLOCK_N * BLOCK_N       # keys [0, full) in tiles without a mask,
    end = tl.minimum(row + BLOCK_M, S) if CAUSAL else S                     # then [full, end) in tiles that need one
    for MASKED in tl.static_range(2):
        for col in tl.range(full if MASKED else 0, end if MASKED else full, BLOCK_N):
            k = load_tile(k_at, batch, head // GROUP, col, S, BLOCK_N, K, BLOCK_K, TMA)
            s = tl.dot(q, k.T, input_precision=PRECISION)                           # line 8
            if MASKED:
                s = tl.where(visible(row, col, S, CAUSAL, BLOCK_M, BLOCK_N), s, float("-inf"))
            new_m = tl.maximum(m, tl.max(s, 1) * scale_log2)                        # line 9; finite, since every query
            p = tl.exp2(s * scale_log2 - new_m[:, None])                            # sees a key in the first tile
            rescale = tl.exp2(m - new_m)
            l = l * rescale + tl.sum(p, 1)
            v = load_tile(v_at, batch, head // GROUP, col, S, BLOCK_N, K, BLOCK_K, TMA)
            acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)     # line 10
            m = new_m
    store_tile(o_at, acc / l[:, None], batch, head, row, T, BLOCK_M, K, BLOCK_K, TMA)  # line 12
    rows = row + tl.arange(0, BLOCK_M)
    tl.store(L + (batch * H + head).to(tl.int64) * T + rows, (m + tl.log2(l)) * 0.6931471805599453, mask=rows < T)

@jit
def dq_kernel(q_at, k_at, v_at, do_at, o_at, dq_at, L, L_log2, D, one, scale, scale_log2, H, T, T_padded, S,
              GROUP: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, TMA: tl.constexpr,
              PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dQ for one tile of queries: Algorithm 2 without dK and dV, in the forward kernel's loop and order.

    It runs first, and leaves each row's L, now in log2, and D (B * H, T_padded) for dkdv_kernel.
    """
    tiles = tl.cdiv(T, BLOCK_M)
    row = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    batch, head = tl.program_id(0) // tiles // H, tl.program_id(0) // tiles % H
    q = load_tile(q_at, batch, head, row, T, BLOCK_M, K, BLOCK_K, TMA)
    if q.dtype != tl.float32:          # into registers, as in forward_kernel: from 0.73 to 0.63 ms at K = 128
        q = (q.to(tl.float32) * one).to(q.dtype)
    do = load_tile(do_at, batch, head, row, T, BLOCK_M, K, BLOCK_K, TMA)
    o = load_tile(o_at, batch, head, row, T, BLOCK_M, K, BLOCK_K, TMA)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)                         # line 4
    line, rows = (batch * H + head).to(tl.int64), row + tl.arange(0, BLOCK_M)
    lse = tl.load(L + line * T + rows, mask=rows < T, other=0.0) * 1.4426950408889634
    tl.store(L_log2 + line * T_padded + rows, lse)
    tl.store(D + line * T_padded + rows, delta)
    dq = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    full = (tl.minimum(row, S) if CAUSAL else S) // BLOCK_N * BLOCK_N
    end = tl.minimum(row + BLOCK_M, S) if CAUSAL else S
    for MASKED in tl.static_range(2):
        for col in tl.range(full if MASKED else 0, end if MASKED else full, BLOCK_N):
            k = load_tile(k_at, batch, head // GROUP, col, S, BLOCK_N, K, BLOCK_K, TMA)
            s = tl.dot(q, k.T, input_precision=PRECISION)                           # line 10
            v = load_tile(v_at, batch, head // GROUP, col, S, BLOCK_N, K, BLOCK_K, TMA)
            dp = tl.dot(do, v.T, input_precision=PRECISION)                         # line 13
            p = tl.exp2(s * scale_log2 - lse[:, None])                              # line 11
            if MASKED:
                p = tl.where(visible(row, col, S, CAUSAL, BLOCK_M, BLOCK_N), p, 0.0)
            ds = p * (dp - delta[:, None])                                          # line 14, scaled once at the end
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)           # line 15
    store_tile(dq_at, dq * scale, batch, head, row, T, BLOCK_M, K, BLOCK_K, TMA)

@jit
def dkdv_kernel(q_at, k_at, v_at, do_at, dk_at, dv_at, L_log2, D, scale, scale_log2, H, T, T_padded, S,
                GROUP: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, TMA: tl.constexpr,
                PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dK and dV for one tile of keys of one key head, summed over the GROUP query heads that share it: Algorithm 2.

    Scores are transposed, so that P^T and dS^T come out of one product in the registers where the next wants them.
    Queries beyond T need no mask: their Q, dO, L and D are zero, and so is what they add. Keys beyond S: never stored.
    """
    tiles = tl.cdiv(S, BLOCK_N)
    col = tl.program_id(0) % tiles * BLOCK_N
    batch = tl.program_id(0) // tiles // (H // GROUP)
    kv_head = tl.program_id(0) // tiles % (H // GROUP)
    k = load_tile(k_at, batch, kv_head, col, S, BLOCK_N, K, BLOCK_K, TMA)
    v = load_tile(v_at, batch, kv_head, col, S, BLOCK_N, K, BLOCK_K, TMA)
    dk = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    first, full = 0, 0                 # queries [first, full) cross the diagonal; those before see none of these keys
    if CAUSAL:
        first = col // BLOCK_M * BLOCK_M
        full = tl.minimum(tl.cdiv(col + BLOCK_N - 1, BLOCK_M), tl.cdiv(T, BLOCK_M)) * BLOCK_M
    for member in range(GROUP):
        head = kv_head * GROUP + member
        for UNMASKED in tl.static_range(0 if CAUSAL else 1, 2):
            for row in tl.range(full if UNMASKED else first, T if UNMASKED else full, BLOCK_M):
                q = load_tile(q_at, batch, head, row, T, BLOCK_M, K, BLOCK_K, TMA)
                lse = load_numbers(L_log2, batch * H + head, row, T_padded, BLOCK_M, TMA)
                sT = tl.dot(k, q.T, input_precision=PRECISION)                      # line 10
                pT = tl.exp2(sT * scale_log2 - lse[None, :])                        # line 11
                if not UNMASKED:
                    keys, queries = col + tl.arange(0, BLOCK_N), row + tl.arange(0, BLOCK_M)
                    pT = tl.where(keys[:, None] <= queries[None, :], pT, 0.0)
                do = load_tile(do_at, batch, head, row, T, BLOCK_M, K, BLOCK_K, TMA)
                dpT = tl.dot(v, do.T, input_precision=PRECISION)                    # line 13
                delta = load_numbers(D, batch * H + head, row, T_padded, BLOCK_M, TMA)
                dv = tl.dot(pT.to(do.dtype), do, dv, input_precision=PRECISION)     # line 12
                dsT = pT * (dpT - delta[None, :])                                   # line 14, scaled once at the end
                dk = tl.dot(dsT.to(q.dtype), q, dk, input_precision=PRECISION)      # line 16
    store_tile(dv_at, dv, batch, kv_head, col, S, BLOCK_N, K, BLOCK_K, TMA)
    store_tile(dk_at, dk * scale, batch, kv_head, col, S, BLOCK_N, K, BLOCK_K, TMA)


# ---- Starting the kernels -------------------------------------------------------------------------------------------
#
# A short sequence takes the GPU less time than careless Python: what can be, is prepared once for each shape.

Tile = namedtuple("Tile", "m n warps stages")             # queries and keys a tile, warps a program, tiles in flight

def _interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter: TRITON_INTERPRET=1 was set when they were defined."""
    return triton is not None and not isinstance(forward_kernel, triton.runtime.JITFunction)

INTERPRETER_TILE = Tile(32, 16, 4, 1)                     # small and not square, so that small tests reach every branch
_fastest: dict[tuple, Tile] = {}
_prepared: dict[tuple, tuple] = {}                        # by kernel, shapes, strides: tile, descriptors, what to call

def _tiles(kernel: str, K: int, dtype: torch.dtype, descriptors: bool) -> list[Tile]:
    """The few tiles worth timing, best guess first: what is left of a sweep of some 180 a kernel on an H200."""
    if dtype == torch.float32 and K <= 64:                # three tf32 products for each one: more registers
        forward, dq, dkdv = ((64, 64, 4, 2), (64, 32, 4, 2)), ((64, 32, 4, 2), (64, 16, 4, 2)), ((32, 32, 4, 2),)
    elif dtype == torch.float32:
        forward = dq = ((64, 32, 4, 2), (64, 16, 4, 2), (16, 16, 4, 1))
        dkdv = ((32, 64, 4, 1), (16, 16, 4, 1))
    elif K > 128:
        forward = dq = ((64, 32, 4, 2), (128, 32, 8, 2), (64, 64, 8, 2))
        dkdv = ((32, 64, 8, 2), (32, 32, 4, 1))
    elif not descriptors:                                 # pointers need registers: smaller tiles
        forward = dq = ((64, 64, 4, 3), (128, 64, 8, 3), (64, 32, 4, 2))
        dkdv = ((64, 64, 4, 3), (64, 64, 4, 2), (32, 64, 4, 2))
    elif K > 64:
        forward = dq = ((64, 64, 4, 3), (128, 128, 8, 3), (64, 32, 4, 4))
        dkdv = ((64, 64, 4, 2), (64, 128, 8, 3), (32, 64, 4, 3))
    else:
        forward = dq = ((64, 64, 4, 3), (64, 128, 4, 3), (64, 32, 4, 3))
        dkdv = ((128, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 3))
    return [Tile(*tile) for tile in {"forward": forward, "dq": dq, "dkdv": dkdv}[kernel]]

class Descriptor(TensorDescriptor):
    """Triton's, less the checks it makes each time: `_descriptors_fit` makes them once for each shape."""

    def __post_init__(self) -> None:
        """Checks nothing."""

def _descriptors_fit(*tensors: Tensor) -> bool:
    """Whether the copy engine can read these: Hopper or newer, starts and strides on 16 bytes, last dimension dense."""
    if tensors[0].is_cuda and torch.cuda.get_device_capability(tensors[0].device) < (9, 0):
        return False
    return all(x.data_ptr() % 16 == 0 and x.stride(-1) == 1
               and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1]) for x in tensors)

def _operands(tensors: list[Tensor], sides: str, tile: Tile, descriptors: bool) -> list:
    """What a kernel gets for each tensor: a descriptor or (pointer, strides). sides: a letter each, "m" for tiles of
    queries, "n" of keys, "l" for what load_numbers reads."""
    wide = triton.next_power_of_2(tensors[0].shape[-1])
    boxes = {"m": [1, 1, tile.m, wide], "n": [1, 1, tile.n, wide], "l": [1, tile.m]}
    return [x if side == "l" and not (descriptors and tile.m <= 64) else
            Descriptor(x, x.shape, x.stride(), boxes[side]) if descriptors else (x, *x.stride()[:3])
            for x, side in zip(tensors, sides)]

def _launch(kernel, key: tuple, tensors: list[Tensor], sides: str, numbers: list, is_causal: bool) -> None:
    """Runs a kernel on (B, heads, length, K) tensors, q and k first; key: all that it may depend on but their contents.

    The first time for a key it also finds the fastest tile. Lengths count for that by the power of two above them:
    triton.autotune would time everything again for every new length.
    """
    if key in _prepared:
        tile, descriptors, run, constants = _prepared[key]
        return run(*_operands(tensors, sides, tile, descriptors), *numbers, *constants)
    (B, H, T, K), (G, S), name = tensors[0].shape, tensors[1].shape[1:3], key[0]
    descriptors = _descriptors_fit(*(x for x, side in zip(tensors, sides) if side != "l"))
    constants = dict(GROUP=H // G, K=K, BLOCK_K=triton.next_power_of_2(K), CAUSAL=is_causal, TMA=descriptors,
                     PRECISION="tf32x3")                  # float32 only: three tf32 products, relative error 4e-7

    def start(tile: Tile):
        programs = triton.cdiv(S, tile.n) * B * G if name == "dkdv" else triton.cdiv(T, tile.m) * B * H
        sizes = dict(BLOCK_M=tile.m, BLOCK_N=tile.n)
        compiled = kernel[(programs,)](*_operands(tensors, sides, tile, descriptors), *numbers, **constants, **sizes,
                                       num_warps=tile.warps, num_stages=tile.stages)
        return tile, descriptors, compiled and compiled[(programs, 1, 1)], (*constants.values(), *sizes.values())

    if _interpreted():
        start(INTERPRETER_TILE)
        return
    tiles = _tiles(name, K, tensors[0].dtype, descriptors)
    rough = name, min(triton.next_power_of_2(T), 16384), min(triton.next_power_of_2(S), 16384)
    rough += K, H // G, tensors[0].dtype, is_causal, descriptors, tensors[0].device
    if rough not in _fastest and len(tiles) > 1:
        if torch.cuda.is_current_stream_capturing():      # a CUDA graph cannot time: warm up first
            start(tiles[0])
            return
        times = {}
        for tile in tiles:
            with contextlib.suppress(triton.runtime.errors.OutOfResources):      # more shared memory than this GPU has
                times[tile] = triton.testing.do_bench(lambda: start(tile), warmup=5, rep=20, return_mode="median")
        if not times:
            raise ValueError(f"head width {K} in {tensors[0].dtype} does not fit this GPU; use a 16-bit dtype")
        _fastest[rough] = min(times, key=times.get)
    if len(_prepared) > 4096:                             # lengths that never come back
        _prepared.clear()
    _prepared[key] = start(_fastest.get(rough, tiles[0]))

def _check(q: Tensor, k: Tensor, v: Tensor, by_triton: bool = False) -> None:
    """One line on what is wrong with the arguments, as ValueError."""
    shapes, instead = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}", "use FlashAttentionPyTorch"
    if q.dim() < 2 or k.dim() != q.dim() or k.shape != v.shape:
        raise ValueError(f"want q (..., T, K), k and v (..., S, K), got {shapes}")
    for wrong, message in [
            (q.shape[-1] != k.shape[-1], f"head widths differ: {shapes}"),
            (q.numel() == 0 or k.numel() == 0, f"nothing to attend to, a dimension is empty: {shapes}"),
            (not q.dtype == k.dtype == v.dtype or not q.is_floating_point(),
             f"q, k, v must have one floating-point dtype, got {q.dtype}, {k.dtype}, {v.dtype}; cast them"),
            (not q.device == k.device == v.device, f"q, k, v are on {q.device}, {k.device}, {v.device}; move them"),
            (not by_triton and q.shape[:-2] != k.shape[:-2], f"leading dimensions differ: {shapes}; repeat k and v for "
             "every query head (repeat_interleave), or use FlashAttentionTriton"),
            (by_triton and triton is None, f"the kernels need triton (pip install triton, on Linux); {instead}"),
            (by_triton and (q.shape[:-3] != k.shape[:-3] or (q.dim() > 2 and q.shape[-3] % max(k.shape[-3], 1) > 0)),
             f"leading dimensions must agree, and query heads be a multiple of the key heads: {shapes}"),
            (by_triton and q.dtype not in (torch.float32, torch.float16, torch.bfloat16),
             f"the kernels take float32, float16 and bfloat16, got {q.dtype}; cast, or {instead}"),
            (by_triton and not 16 <= q.shape[-1] <= 256,
             f"the kernels take head widths 16 to 256, got {q.shape[-1]}; {instead}"),
            (by_triton and not q.is_cuda and not _interpreted(),
             f"the kernels need a CUDA GPU, the tensors are on {q.device}; {instead} or plain attention, or set "
             "TRITON_INTERPRET=1 before Python starts to run them slowly on a CPU"),
            (by_triton and _interpreted() and q.dtype == torch.bfloat16,
             "Triton's interpreter gets bfloat16 products wrong; cast, or unset TRITON_INTERPRET")]:
        if wrong:
            raise ValueError(message)

def _fold(x: Tensor) -> Tensor:
    """(..., H, T, K) as (B, H, T, K) with a dense last dimension; a broadcast (stride 0) tensor is copied."""
    if x.dim() != 4:
        x = x[None] if x.dim() == 3 else x[None, None] if x.dim() == 2 else x.flatten(0, -4)
    strides = x.stride()
    broadcast = 0 in strides and any(stride == 0 and size > 1 for stride, size in zip(strides, x.shape))
    return x.contiguous() if broadcast or strides[-1] != 1 else x

def _like(x: Tensor) -> Tensor:
    """Empty, for a result; `_fold` must not copy it: in x's own order of memory only if that ends in a dense row."""
    keep = x.dim() <= 4 and x.stride(-1) == 1
    return torch.empty_like(x, memory_format=torch.preserve_format if keep else torch.contiguous_format)

def _key(name: str, is_causal: bool, *tensors: Tensor) -> tuple:
    """All that the launch of a kernel on these depends on, but for their contents."""
    return name, is_causal, *[(x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16) for x in tensors]

def _forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    """O like q, and L (..., T) in float32."""
    key = _key("forward", is_causal, q, k, v)
    if key not in _prepared:
        _check(q, k, v, by_triton=True)
    o, L = _like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
    q, k, v, o4 = _fold(q), _fold(k), _fold(v), _fold(o)
    (_, H, T, K), S = q.shape, k.shape[2]
    with torch.cuda.device(q.get_device()):
        _launch(forward_kernel, key, [q, k, v, o4], "mnnm", [L, K**-0.5 * LOG2_E, 1.0, H, T, S], is_causal)
    return o, L

def _gradients(q: Tensor, k: Tensor, v: Tensor, o: Tensor, L: Tensor, do: Tensor,
               is_causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV from what the forward pass saved: one kernel for each side."""
    do = do.to(q.dtype)
    keys = [_key(name, is_causal, q, k, v, o, do) for name in ("dq", "dkdv")]
    dq, dk, dv = _like(q), _like(k), _like(v)
    q, k, v, o, do = _fold(q), _fold(k), _fold(v), _fold(o), _fold(do)
    (B, H, T, K), S, scale = q.shape, k.shape[2], q.shape[-1]**-0.5
    T_padded = triton.cdiv(T, 128) * 128                                            # whole tiles of any size used
    L_log2, D = (q.new_empty if T == T_padded else q.new_zeros)((2, B * H, T_padded), dtype=torch.float32)
    sizes = [scale, scale * LOG2_E, H, T, T_padded, S]
    with torch.cuda.device(q.get_device()):
        _launch(dq_kernel, keys[0], [q, k, v, do, o, _fold(dq)], "mnnmmm", [L, L_log2, D, 1.0, *sizes], is_causal)
        _launch(dkdv_kernel, keys[1], [q, k, v, do, _fold(dk), _fold(dv), L_log2, D], "mnnmnnll", sizes, is_causal)
    return dq, dk, dv

# Operators, which torch.compile calls without looking inside; they cost 50 us, which eager code saves.
flash_forward = torch.library.custom_op("flash_attn_triton::forward", _forward, mutates_args=())
flash_backward = torch.library.custom_op("flash_attn_triton::backward", _gradients, mutates_args=())

flash_forward.register_fake(lambda q, k, v, is_causal: (_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)))
flash_backward.register_fake(lambda q, k, v, *_: (_like(q), _like(k), _like(v)))

def _eager(x: Tensor) -> bool:
    """Whether this runs now, on numbers: torch 2.11 traces a backward pass with is_compiling False."""
    return type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()

def _save(ctx, inputs, output) -> None:
    *tensors, ctx.is_causal = inputs
    ctx.save_for_backward(*tensors, *output)

def _backward(ctx, do: Tensor, _unused=None):
    gradients = _gradients if _eager(do) else flash_backward
    return *gradients(*ctx.saved_tensors, do, ctx.is_causal), None

flash_forward.register_autograd(_backward, setup_context=_save)

class FlashAttentionTriton(torch.autograd.Function):
    """FlashAttention-2 by the Triton kernels, forward and backward.

    `.apply(q, k, v, is_causal=False)`: q (..., H, T, K), k and v (..., G, S, K), or (T, K) and (S, K); H a multiple of
    G. Returns (..., H, T, K). Saves q, k, v, the output, and L (..., H, T) in nats. Dtypes float32, float16, bfloat16;
    K 16 to 256. Raises: ValueError with the remedy for anything else.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
        """Algorithm 1 in one kernel."""
        o, L = (_forward if _eager(q) else flash_forward)(q, k, v, is_causal)
        _save(ctx, (q, k, v, is_causal), (o, L))
        return o

    backward = staticmethod(_backward)

def flash_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = True) -> Tensor:
    """Attention by the Triton kernels, for `TransformerLM(config, attention=flash_attention)`.

    Args: q (..., H, T, K), k and v (..., G, S, K), H a multiple of G. Returns: (..., H, T, K). Differentiable; works
    under torch.compile(fullgraph=True), and in CUDA graphs after one call that times the tiles. Under torch.autocast
    the arguments are cast, as for torch's own attention. Raises: ValueError, see FlashAttentionTriton.
    Example: flash_attention(q, k, v) equals plain_attention(q, k, v, is_causal=True) to rounding.
    """
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    return FlashAttentionTriton.apply(q, k, v, is_causal) if _eager(q) else flash_forward(q, k, v, is_causal)[0]


# ---- Walk-through, check, benchmark ---------------------------------------------------------------------------------

def walk_through() -> None:
    """Why the scores are the problem, and one row of attention tile by tile."""
    print("Plain attention, batch 1, 16 heads, K 64, causal, bfloat16, forward:")
    for T in (1024, 16384):
        flops, plain, tiled = cost(1, 16, T, 64)
        print(f"  T {T:5d}: {flops / 1e9:5.1f} GFLOP; plain moves {plain / 1e6:7.1f} MB, {flops / plain:.0f} FLOP a "
              f"byte; tiled {tiled / 1e6:5.1f} MB, {flops / tiled:.0f} FLOP a byte")
    print("  An H200 does some 190 bfloat16 FLOPs in the time of one byte: the plain version waits for memory.\n\n"
          "One query, four keys in tiles of two; scores in nats, values 1 to 4:")
    m, l, acc = -math.inf, 0.0, 0.0
    for scores, values in (((1.0, 3.0), (1.0, 2.0)), ((2.0, 5.0), (3.0, 4.0))):
        new_m = max(m, *scores)
        rescale, p, m = math.exp(m - new_m), [math.exp(s - new_m) for s in scores], new_m
        l = l * rescale + sum(p)
        acc = acc * rescale + sum(a * b for a, b in zip(p, values))
        print(f"  tile {scores}  max {m:.0f}  old sums x {rescale:.3f}  sum {l:.4f}  output so far {acc / l:.4f}")
    print(f"  L = {m + math.log(l):.4f}, from which the backward pass rebuilds any p = exp(s - L)\n")

def errors(attention, q: Tensor, k: Tensor, v: Tensor, do: Tensor, is_causal: bool) -> dict[str, float]:
    """Relative errors |x - exact| / |exact| of O, dQ, dK, dV, exact being plain attention in float64."""
    def run(function, *tensors):
        *leaves, do = (x.detach().requires_grad_() for x in tensors)
        out = function(*leaves, is_causal)
        return [out.detach(), *torch.autograd.grad(out, leaves, do)]
    ours, exact = run(attention, q, k, v, do), run(plain_attention, *(x.double() for x in (q, k, v, do)))
    return {name: ((a - b).norm() / b.norm()).item() for name, a, b in zip(("O", "dQ", "dK", "dV"), ours, exact)}

def self_check(seed: int = 0) -> dict[str, float]:
    """Largest float32 error of each version, over ragged lengths, grouped heads and odd widths.

    Raises: AssertionError above 5e-6 in float32 (rounding gives up to 5e-7, a wrong mask or scale 1e-2 or more), and
    above 3e-3 in float16, whose numbers have 11 bits: 2^-11 = 5e-4 for each rounding of P, dS and the outputs.
    """
    device, worst = "cuda" if torch.cuda.is_available() else "cpu", {}
    versions = {"PyTorch": FlashAttentionPyTorch.apply}
    if triton is not None and (device == "cuda" or _interpreted()):
        versions["Triton"] = FlashAttentionTriton.apply
    generator = torch.Generator(device).manual_seed(seed)
    cases = [((2, 2), 2, 64, 64, 16, torch.float32), ((1, 4), 2, 45, 70, 16, torch.float32),
             ((3,), 3, 70, 33, 18, torch.float32), ((1,), 1, 9, 40, 24, torch.float32),
             ((1, 2), 1, 40, 40, 32, torch.float16)]
    for name, (lead, G, T, S, K, dtype), is_causal in itertools.product(versions, cases, (False, True)):
        if name == "PyTorch" and lead[-1] != G:
            continue                                      # takes equal numbers of heads only
        keys = (*lead[:-1], G, S, K)
        q, k, v, do = (torch.randn(shape, generator=generator, device=device).to(dtype)
                       for shape in ((*lead, T, K), keys, keys, (*lead, T, K)))
        error = errors(versions[name], q, k, v, do, is_causal)
        limit = 5e-6 if dtype == torch.float32 else 3e-3
        assert all(e < limit for e in error.values()), f"{name}: {error} at {tuple(q.shape)}, {keys}, {dtype}"
        if dtype == torch.float32:
            worst[name] = max(worst.get(name, 0.0), *error.values())
    return worst

def _median_ms(function) -> float:
    """Median milliseconds of a call; on a GPU with its L2 cache emptied before each."""
    if torch.cuda.is_available():
        return triton.testing.do_bench(function, warmup=5, rep=30, return_mode="median")
    return Timer("function()", globals={"function": function}).blocked_autorange(min_run_time=0.3).median * 1e3

def _times(attention, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> list[float] | list[str]:
    """Median milliseconds of forward, backward and both, or why there are none."""
    try:
        out = attention(q, k, v)                          # compiles, times the tiles
        return [_median_ms(lambda: attention(q, k, v)),
                _median_ms(lambda: torch.autograd.grad(out, (q, k, v), do, retain_graph=True)),
                _median_ms(lambda: torch.autograd.grad(attention(q, k, v), (q, k, v), do))]
    except RuntimeError as error:                         # SDPA: "No available kernel" for a dtype or width
        for said, cell in (("allocate", "memory"), ("vailable kernel", "none")):
            if said in str(error):
                return [cell] * 3
        raise

def _sdpa(backend: SDPBackend):
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return attention

def bench(lengths: list[int], widths: list[int], dtypes: list[torch.dtype], heads: int = 16, batch: int = 0) -> None:
    """Median ms of forward, backward and both, causal, beside what one would use instead.

    batch 0: as many sequences as make 16384 tokens; on a CPU one. TFLOP/s count the causal half: 2 matrix products
    forward, 5 back. The ceiling is a large matrix product; for float32 on a GPU a third of its tf32 rate: float32
    accuracy takes three. Raises: ValueError for sizes below 1, and for what flash_attention does not take.
    """
    if min(*lengths, *widths, heads, batch + 1) < 1:
        raise ValueError(f"lengths, widths and heads must be at least 1, batch at least 0, got {lengths}, {widths}, "
                         f"{heads} and {batch}")
    cuda, plain = torch.cuda.is_available(), functools.partial(plain_attention, is_causal=True)
    versions = {"plain": plain, "compiled": torch.compile(plain, dynamic=True), "ours": flash_attention,
                "SDPA-FA2": _sdpa(SDPBackend.FLASH_ATTENTION), "SDPA-cuDNN": _sdpa(SDPBackend.CUDNN_ATTENTION)}
    if not cuda:
        versions = {"plain": plain, "SDPA": _sdpa(SDPBackend.FLASH_ATTENTION),
                    "ours": lambda q, k, v: FlashAttentionPyTorch.apply(q, k, v, True)}
    torch._functorch.config.donated_buffer, torch._dynamo.config.recompile_limit = False, 64     # repeats; shapes
    print(f"{torch.cuda.get_device_name() if cuda else 'CPU (ours: tiled, in PyTorch)'}, torch {torch.__version__}, "
          f"triton {triton and triton.__version__}; causal, {heads} heads; median ms")
    for dtype in dtypes:
        torch.set_float32_matmul_precision("high")        # tf32, for the ceiling only
        a, b = torch.randn(2, *(8192, 8192) if cuda else (1024, 1024), device="cuda" if cuda else "cpu").to(dtype)
        product = _median_ms(lambda: a @ b)
        ceiling = 2 * len(a)**3 / product / 1e9 / (3 if cuda and dtype == torch.float32 else 1)
        torch.set_float32_matmul_precision("highest")
        print(f"\n{str(dtype)[6:]}, ceiling {ceiling:.1f} TFLOP/s\n   K      T    B pass    "
              + "".join(f"{name:>11}" for name in versions) + "   ours TFLOP/s  of ceiling")
        for K, T in itertools.product(widths, lengths):
            B = batch or (max(1, 16384 // T) if cuda else 1)
            q, k, v, do = torch.randn(4, B, heads, T, K, device=a.device, dtype=dtype).requires_grad_().unbind()
            cells = {name: _times(attention, q, k, v, do) for name, attention in versions.items()}
            for i, (part, share) in enumerate((("forward", 1.0), ("backward", 2.5), ("both", 3.5))):
                row = "".join(f"{x[i]:>11}" if isinstance(x[i], str) else f"{x[i]:11.3f}" for x in cells.values())
                ours = cells["ours"][i]
                rate = math.nan if isinstance(ours, str) else share * cost(B, heads, T, K)[0] / ours / 1e9
                print(f"{K:4d} {T:6d} {B:4d} {part:8}{row} {rate:14.1f} {rate / ceiling:11.0%}", flush=True)

def main() -> int:
    """The command line. Returns: the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bench", action="store_true", help="time the versions side by side (whole grid: minutes)")
    cuda = torch.cuda.is_available()
    parser.add_argument("--lengths", type=int, nargs="+", default=[128 * 2**i for i in range(10)] if cuda else [1024])
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64, 128] if cuda else [64])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"] if cuda else ["float32"],
                        choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--batch", type=int, default=0, help="default: as many sequences as make 16384 tokens")
    args = parser.parse_args()
    try:
        if args.bench:
            warnings.simplefilter("ignore", UserWarning)  # why SDPA lacks a kernel; its cell says "none"
            bench(args.lengths, args.widths, [getattr(torch, name) for name in args.dtypes], args.heads, args.batch)
            return 0
        if triton is not None and not cuda and not _interpreted():
            print("No GPU: starting again with TRITON_INTERPRET=1, to run the Triton kernels on the CPU.\n", flush=True)
            return subprocess.call([sys.executable, *sys.argv], env={**os.environ, "TRITON_INTERPRET": "1"})
        walk_through()
        for name, worst in self_check(args.seed).items():
            print(f"FlashAttention{name}: O, dQ, dK, dV equal plain attention in float64 to {worst:.1e}  OK")
        return 0
    except (ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(said in str(error) for said in ("allocate", "verflow")):
            raise                                         # other than for sizes and seeds too large
        print(f"flash_attn_triton.py: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2

if __name__ == "__main__":
    sys.exit(main())

"""model.py against torch.nn.functional, numpy, hand-worked numbers, and checkpoints and answers made by
transformers."""
import copy
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from torch.utils.flop_counter import FlopCounterMode

import model as M
from model import ModelConfig, TransformerLM

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests/fixtures"
ANSWERS = json.loads((FIXTURES / "model_answers.json").read_text())
KINDS = ["llama", "llama31", "qwen2", "qwen3"]
TINY = ModelConfig(vocab_size=37, context_length=24, d_model=24, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=40)
VARIANTS = [{}, {"norm": "post"}, {"norm": "none"}, {"positions": "none"}, {"ffn": "silu", "d_ff": None},
            {"qk_norm": True},
            {"qkv_bias": True}, {"tie_embeddings": True}, {"head_dim": 10}, {"num_kv_heads": 1}, {"num_kv_heads": 4},
            {"rope_layout": "half"}]


def small(seed: int = 0, attention=None, checkpoint_every: int = 0, **changes) -> TransformerLM:
    torch.manual_seed(seed)
    return TransformerLM(replace(TINY, **changes), attention, checkpoint_every)


def rand(*shape, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def token_ids(*shape, seed: int = 0, vocabulary: int = 37) -> torch.Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance):
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a.double() - b.double()).abs().max() <= tolerance, (a.double() - b.double()).abs().max()


# ---------------------------------------------------------------- layers


def test_linear_and_its_initial_weights():
    layer = M.Linear(200, 300, bias=True)
    assert layer.weight.shape == (300, 200)
    std = math.sqrt(2 / 500)
    assert layer.weight.abs().max() <= 3 * std and layer.weight.abs().max() > 2.9 * std     # cut at 3 sigma, not before
    # a normal cut at 3 sigma has 0.9866 of the standard deviation; 60,000 draws measure it to 0.3 %
    assert abs(layer.weight.std() / (0.98658 * std) - 1) < 0.01
    torch.nn.init.normal_(layer.bias)
    x = rand(2, 3, 200)
    close(layer(x), F.linear(x, layer.weight, layer.bias), 1e-5)     # sums of 200 products of size 1, eps 1.2e-7
    assert M.Linear(4, 5).bias is None and list(M.Linear(4, 5).state_dict()) == ["weight"]


def test_embedding_and_its_initial_weights():
    table = M.Embedding(300, 200)
    assert table.weight.abs().max() <= 3 and abs(table.weight.std() - 0.98658) < 0.01
    ids = token_ids(2, 5, vocabulary=300)
    assert torch.equal(table(ids), table.weight[ids])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rmsnorm(dtype):
    norm = M.RMSNorm(64, eps=1e-3).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = rand(3, 5, 64, scale=300).to(dtype)                           # 300 squared is beyond fp16
    oracle = F.rms_norm(x.double(), (64,), norm.weight.double(), 1e-3)
    got = norm(x)
    assert got.dtype == dtype
    # one rounding of a number below 16, to the dtype's precision
    assert (got.double() - oracle).abs().max() <= 16 * max(torch.finfo(dtype).eps, 2e-7)
    small_x = rand(2, 64, seed=1, scale=1e-2).to(dtype)               # where eps matters
    oracle = F.rms_norm(small_x.double(), (64,), norm.weight.double(), 1e-3)
    assert (norm(small_x).double() - oracle).abs().max() <= 2 * max(torch.finfo(dtype).eps, 2e-7)


def test_silu_softmax_swiglu():
    x = rand(4, 6, 10, scale=5)
    close(M.silu(x), F.silu(x), 1e-6)
    for dim in (0, 1, -1):
        close(M.softmax(x, dim), F.softmax(x, dim), 1e-6)
    assert torch.isfinite(M.softmax(torch.tensor([1e4, -1e4, 3e38]), 0)).all()   # unshifted, exp() would be inf
    ffn = M.SwiGLU(10, 14)
    w1, w2, w3 = ffn.w1.weight, ffn.w2.weight, ffn.w3.weight
    assert (w1.shape, w2.shape, w3.shape) == ((14, 10), (10, 14), (14, 10))
    close(ffn(x), F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2), 1e-5)


def test_default_widths():
    assert [M.ModelConfig(d_model=d, num_heads=4).d_ff for d in (512, 768, 1024, 8)] == [1344, 2048, 2752, 64]
    assert ModelConfig(d_model=512, ffn="silu").d_ff == 2048
    assert ModelConfig().head_dim == 32 and ModelConfig().num_kv_heads == 16


def rotate_by_complex_numbers(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """The pair (a, b) as a + ib, times exp(i p theta^(-2j/K)): what RoPE is, in one line."""
    K = x.shape[-1]
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * positions[..., None] * theta ** (-np.arange(0, K, 2) / K))
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def test_rope():
    rope = M.RotaryPositionalEmbedding(10_000.0, 8, 50)
    x = rand(2, 3, 50, 8)
    oracle = rotate_by_complex_numbers(x.double().numpy(), np.arange(50), 10_000.0)
    close(rope(x).double(), torch.tensor(oracle), 2e-6)              # angles up to 50 rad in float64, tables in float32
    close(rope(x[..., :7, :]), rope(x)[..., :7, :], 0)
    positions = torch.tensor([[4, 0, 49], [1, 1, 7]])                 # (2, 3), against (2, 5, 3, 8)
    y = rand(2, 5, 3, 8, seed=3)
    oracle = rotate_by_complex_numbers(y.double().numpy(), positions[:, None].numpy(), 10_000.0)
    close(rope(y, positions[:, None]).double(), torch.tensor(oracle), 2e-6)
    close(rope(y, torch.tensor([3, 2, 1])), rope(y, torch.tensor([[[3, 2, 1]]])), 0)
    # by hand: position 1, theta 100, K 4: the angles are 1 and 0.1
    four = M.RotaryPositionalEmbedding(100.0, 4, 2)(torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 1]]))[1]
    close(four, torch.tensor([math.cos(1), math.sin(1), -math.sin(0.1), math.cos(0.1)]), 1e-7)
    half = M.RotaryPositionalEmbedding(10_000.0, 8, 50, layout="half")
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])                    # where "half" keeps the pairs
    close(half(x[..., order]), rope(x)[..., order], 0)
    with pytest.raises(ValueError, match="even"):
        M.RotaryPositionalEmbedding(1e4, 5, 4)


def test_rope_tables_stay_in_float32_and_out_of_checkpoints():
    model = TransformerLM(replace(TINY, context_length=2000, positions="rope")).to(torch.bfloat16)
    rope = model.layers[0].attn.rope
    cos, sin = rope.turns
    assert cos.dtype == torch.float32
    assert abs(cos[1001, 0].item() - math.cos(1001)) < 1e-6           # bf16 holds 1001 as 1000, and cosines to 1/256
    assert abs(sin[1999, 1].item() - math.sin(1999 * 10_000 ** (-2 / 6))) < 1e-7        # frequencies in fp32: 7e-7
    assert not any("rope" in name for name in model.state_dict())
    assert model(token_ids(1, 4)).dtype == torch.bfloat16


def test_attention():
    q, k, v = rand(2, 3, 5, 8), rand(2, 3, 7, 8, seed=1), rand(2, 3, 7, 6, seed=2)
    close(M.scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v), 1e-6)
    mask = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[0, 1, 2] = False
    mask[..., 0, 0] = True
    got = M.scaled_dot_product_attention(q, k, v, mask)
    assert torch.equal(got[0, 1, 2], torch.zeros(6))                  # looks at nothing: zeros, and nothing spreads
    seen = mask.any(-1)
    close(got[seen], F.scaled_dot_product_attention(q, k, v, mask)[seen], 1e-6)
    q.requires_grad_()
    M.scaled_dot_product_attention(q, k, v, mask).sum().backward()
    assert torch.isfinite(q.grad).all() and (q.grad[0, 1, 2] == 0).all()
    close(M.scaled_dot_product_attention(q[0, 0], k[0, 0], v[0, 0]), F.scaled_dot_product_attention(q, k, v)[0, 0],
          1e-6)
    peaked = M.scaled_dot_product_attention(q * 1e4, k, v, mask)
    assert torch.isfinite(peaked).all()


@pytest.mark.parametrize("H,G", [(6, 6), (6, 3), (6, 2), (6, 1)])
@pytest.mark.parametrize("attention", [M.plain_attention, M.sdpa_attention])
def test_grouped_queries(H, G, attention):
    q, k, v = rand(2, H, 9, 8), rand(2, G, 9, 8, seed=1), rand(2, G, 9, 8, seed=2)
    copies = [x.repeat_interleave(H // G, dim=1) for x in (k, v)]
    close(attention(q, k, v), F.scaled_dot_product_attention(q, *copies, is_causal=True), 1e-6)
    close(attention(q, k, v, is_causal=False), F.scaled_dot_product_attention(q, *copies), 1e-6)


def test_multihead_attention_is_torch_s():
    D, H = 24, 4
    ours, theirs = M.CausalSelfAttention(D, H), torch.nn.MultiheadAttention(D, H, bias=False, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight]))
        theirs.out_proj.weight.copy_(ours.output_proj.weight)
    x = rand(2, 7, D)
    future = torch.ones(7, 7, dtype=torch.bool).triu(1)
    close(ours(x), theirs(x, x, x, attn_mask=future, need_weights=False)[0], 1e-5)
    close(ours(x[0]), ours(x)[0], 1e-6)                               # any leading dimensions
    close(ours(x[None]), ours(x)[None], 1e-6)


def test_attention_sees_only_positions_and_only_the_past():
    rope = M.RotaryPositionalEmbedding(1e4, 6, 40)
    layer = M.CausalSelfAttention(24, 4, rope=rope)
    x = rand(2, 9, 24)
    close(layer(x), layer(x, torch.arange(9)), 0)
    # only distances matter (angles of 29 rad in fp32)
    close(layer(x), layer(x, torch.arange(9).expand(2, 9) + 20), 2e-5)
    y = x.clone()
    y[:, 5:] += 1
    close(layer(x)[:, :5], layer(y)[:, :5], 0)
    assert (layer(x)[:, 5:] - layer(y)[:, 5:]).abs().min() > 0


def test_block_by_hand():
    for norm in ("pre", "post", "none"):
        config = replace(TINY, norm=norm)
        block, x = M.TransformerBlock(config), rand(2, 5, 24)
        a, f, n1, n2 = block.attn, block.ffn, block.ln1, block.ln2
        if norm == "post":
            h = n1(x + a(x))
            want = n2(h + f(h))
        else:
            h = x + a(n1(x))
            want = h + f(n2(h))
        close(block(x), want, 0)
        assert isinstance(n1, torch.nn.Identity) == (norm == "none")


def test_state_dict_names():
    names = set(small().state_dict())
    block = {f"layers.{i}.{n}.weight" for i in range(2) for n in
             ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.output_proj", "ln1", "ln2", "ffn.w1", "ffn.w2",
              "ffn.w3")}
    assert names == block | {"token_embeddings.weight", "ln_final.weight", "lm_head.weight"}
    assert "layers.0.ffn.w3.weight" not in small(ffn="silu").state_dict()


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_variant_runs_counts_and_learns(changes):
    model = small(**changes)
    x = token_ids(2, 12)
    logits = model(x)
    assert logits.shape == (2, 12, 37) and torch.isfinite(logits).all()
    assert M.count_parameters(model.config) == M.count_parameters(model) == sum(p.numel() for p in model.parameters())
    loss = M.cross_entropy(logits, token_ids(2, 12, seed=1))
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    again = TransformerLM(model.config, M.sdpa_attention)
    again.load_state_dict(model.state_dict())
    close(again(x), logits, 5e-5)                                      # without norms the stream reaches 30
    close(model(x, torch.arange(12)), logits, 0)


def test_tied_embeddings_are_one_tensor():
    model = small(tie_embeddings=True)
    assert model.token_embeddings.weight is model.lm_head.weight
    moved = copy.deepcopy(model).double()
    assert moved.token_embeddings.weight is moved.lm_head.weight


@pytest.mark.parametrize("every", [1, 2, 3])
def test_recomputed_activations_change_nothing(every):
    x, y = token_ids(2, 12), token_ids(2, 12, seed=1)
    grads = []
    for k in (0, every):
        model = small(num_layers=3, checkpoint_every=k)
        M.cross_entropy(model(x), y).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        close(a, b, 0)


def test_recomputed_activations_are_not_kept():
    kept = []
    for k in (0, 1):
        model, saved = small(num_layers=4, checkpoint_every=k), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
            model(token_ids(2, 20))
        kept.append(sum(saved))
    assert kept[1] < kept[0] / 3


def test_accounting():
    xl = ModelConfig(50257, 1024, 1600, 48, 25, d_ff=6400)
    assert M.count_parameters(xl) == 2_127_057_600
    flops = M.count_flops(xl, 1024)
    # by hand: projections 8TD^2L, scores and sums 4T^2DL, feed-forward 6TDFL, head 2TDV
    assert flops["attention projections"] == 8 * 1024 * 1600 ** 2 * 48
    assert flops["attention scores and sums"] == 4 * 1024 ** 2 * 1600 * 48
    assert flops["feed-forward"] == 6 * 1024 * 1600 * 6400 * 48
    assert flops["lm head"] == 2 * 1024 * 1600 * 50257
    assert flops["total"] == sum(v for k, v in flops.items() if k != "total")
    assert round(flops["total"] / 1e12, 2) == 4.51
    for changes in VARIANTS:                                           # torch counts the products as they happen
        config = replace(TINY, **changes)
        with FlopCounterMode(display=False) as counter:
            TransformerLM(config)(token_ids(1, 12))
        assert counter.get_total_flops() == M.count_flops(config, 12)["total"]


def test_memory_is_what_autograd_keeps():
    config, kept = ModelConfig(500, 128, 64, 3, 4, d_ff=256), {}
    model, alive = TransformerLM(config), []
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x):
        alive.append(x)                                                # or its address would be given away again
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        M.cross_entropy(model(token_ids(2, 128)), token_ids(2, 128, seed=1))
    measured = sum(size for address, size in kept.items() if address not in weights)
    activations = M.count_memory(config, 2, 128) - 16 * M.count_parameters(config)
    # 0.99 here; the formula leaves out vectors and ids
    assert abs(measured / activations - 1) < 0.1


# ---------------------------------------------------------------- loss


def test_cross_entropy():
    logits, targets = rand(3, 4, 11, scale=5).requires_grad_(), token_ids(3, 4, vocabulary=11)
    close(M.cross_entropy(logits, targets), F.cross_entropy(logits.flatten(0, 1), targets.flatten()), 1e-6)
    close(M.cross_entropy(logits[0, 0], targets[0, 0]), F.cross_entropy(logits[0, 0], targets[0, 0]), 1e-6)
    assert M.cross_entropy(torch.zeros(1, 4), torch.tensor([2])).item() == pytest.approx(math.log(4))
    assert torch.isfinite(M.cross_entropy(logits * 1e30, targets))     # an unshifted exp() overflows at 88
    half = logits.detach().to(torch.bfloat16)
    assert M.cross_entropy(half, targets).dtype == torch.float32
    close(M.cross_entropy(half, targets), M.cross_entropy(half.float(), targets), 0)
    grad, = torch.autograd.grad(M.cross_entropy(logits, targets), logits)
    want, = torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), targets.flatten()), logits)
    close(grad, want, 1e-7)
    for bad in (targets[:2], targets[..., :0]):
        with pytest.raises(ValueError, match="targets"):
            M.cross_entropy(logits, bad)


BACKENDS = ["torch"] + ["triton"] * (M.triton is not None and not torch.cuda.is_available())   # there: interpreted


def loss_and_gradients(f, hidden, weight):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = f(hidden, weight)
    (3 * loss).backward()                                              # the gradient that arrives is not 1
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 2e-3), (torch.bfloat16, 1e-2)])    # tf32 at most; 2^-8 = 4e-3
def test_loss_kernel_on_a_gpu(dtype, limit):
    """The compiled kernel, over several of its blocks and chunks, against float64: relative error of each gradient.

    Logits of size 2: rounded to bf16, those of size 8 (up to 40) alone would move the gradients by 1.2e-2.
    """
    hidden, weight = rand(300, 64, scale=0.25).to("cuda", dtype), rand(20_000, 64, seed=1).to("cuda", dtype)
    targets = token_ids(300, vocabulary=20_000).cuda()
    want = loss_and_gradients(lambda h, w: F.cross_entropy(h @ w.T, targets), hidden.double(), weight.double())
    got = loss_and_gradients(lambda h, w: M.linear_cross_entropy(h, w, targets, backend="triton", chunk=128), hidden,
                             weight)
    assert all((a - b).norm() <= limit * b.norm() for a, b in zip(got, want))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape,V,chunk", [((1,), 5, None), ((2, 7), 37, 5), ((3, 50), 300, 64), ((2, 5), 16, 1),
                                           ((4,), 1000, 100)])
def test_linear_cross_entropy(backend, shape, V, chunk):
    hidden, weight, targets = rand(*shape, 12), rand(V, 12, seed=1, scale=3), token_ids(*shape, vocabulary=V)
    want = loss_and_gradients(lambda h, w: F.cross_entropy((h @ w.T).flatten(0, -2), targets.flatten()),
                              hidden.double(), weight.double())
    got = loss_and_gradients(lambda h, w: M.linear_cross_entropy(h, w, targets, backend=backend, chunk=chunk), hidden,
                             weight)
    for a, b in zip(got, want):
        assert a.dtype == torch.float32
        # fp32: logits of size 30 are good to 4e-6, and so are probabilities and loss; a missing one-hot is off by 0.1
        assert (a - b).abs().max() <= 2e-5 * max(1, b.abs().max())
    with torch.no_grad():
        close(M.linear_cross_entropy(hidden, weight, targets, backend=backend, chunk=chunk), got[0], 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_wider_than_a_block_whose_peak_comes_late(backend):
    hidden, weight = torch.tensor([[1.0], [-1.0]]), torch.linspace(0, 20, 9000)[:, None]
    targets = torch.tensor([8999, 4])
    want = loss_and_gradients(lambda h, w: F.cross_entropy(h @ w.T, targets), hidden.double(), weight.double())
    got = loss_and_gradients(lambda h, w: M.linear_cross_entropy(h, w, targets, backend=backend), hidden, weight)
    for a, b in zip(got, want):
        # 9000 products of size 20 add up to 3e-5 of error; a sum that is not rescaled at the new peak is off by 0.5
        assert (a - b).abs().max() <= 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_cross_entropy_in_half_precision(backend, dtype):
    """As good as full logits in the same dtype: errors against float64 at most 1.5 times theirs."""
    if backend == "triton" and dtype == torch.float16:
        pytest.skip("same kernel as bf16")
    hidden, weight, targets = rand(96, 16).to(dtype), rand(50, 16, seed=1).to(dtype), token_ids(96, vocabulary=50)
    exact = loss_and_gradients(lambda h, w: F.cross_entropy(h @ w.T, targets), hidden.double(), weight.double())
    plain = loss_and_gradients(lambda h, w: M.cross_entropy(h @ w.T, targets), hidden, weight)
    ours = loss_and_gradients(lambda h, w: M.linear_cross_entropy(h, w, targets, backend=backend, chunk=32), hidden,
                              weight)
    assert ours[1].dtype == ours[2].dtype == dtype
    for a, p, e in zip(ours, plain, exact):
        assert (a - e).norm() <= 1.5 * (p - e).norm() + 1e-3 * e.norm()


def test_linear_cross_entropy_needs_no_logits():
    biggest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal biggest
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    biggest = max(biggest, x.numel())
            return out

    hidden, weight = rand(4096, 8).requires_grad_(), rand(3000, 8).requires_grad_()
    targets = token_ids(4096, vocabulary=3000)
    with Watch():
        M.linear_cross_entropy(hidden, weight, targets, chunk=128).backward()
    assert 0 < biggest <= 128 * 3000                                   # full logits: 4096 * 3000


def test_linear_cross_entropy_compiles_with_the_model():
    model, x, y = small(checkpoint_every=1), token_ids(2, 12), token_ids(2, 12, seed=1)
    loss = lambda: M.linear_cross_entropy(model.hidden(x), model.lm_head.weight, y, chunk=8)
    want = loss()
    want.backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")()
    got.backward()
    close(got, want, 1e-6)
    for p, g in zip(model.parameters(), grads):
        close(p.grad, g, 1e-6)


def test_linear_cross_entropy_under_autocast_keeps_the_sum_in_float32():
    hidden, weight = rand(512, 16), rand(30, 16, seed=1)
    targets = token_ids(512, vocabulary=30)
    exact = loss_and_gradients(lambda h, w: F.cross_entropy(h @ w.T, targets), hidden.double(), weight.double())
    with torch.autocast("cpu", torch.bfloat16):
        plain = loss_and_gradients(lambda h, w: M.cross_entropy(h @ w.T, targets), hidden, weight)
        ours = loss_and_gradients(lambda h, w: M.linear_cross_entropy(h, w, targets, chunk=16), hidden, weight)
    assert ours[2].dtype == torch.float32
    for a, p, e in zip(ours, plain, exact):
        assert (a - e).norm() <= 1.2 * (p - e).norm() + 1e-3 * e.norm()


def test_linear_cross_entropy_refuses():
    hidden, weight, targets = rand(4, 8), rand(10, 8), token_ids(4, vocabulary=10)
    for args, kwargs, word in [((hidden, weight, targets[:3]), {}, "fit"),
                               ((hidden, weight[:, :7], targets), {}, "fit"),
                               ((hidden[:0], weight, targets[:0]), {}, "target"),
                               ((hidden, weight, targets), {"backend": "cuda"}, "backend"),
                               ((hidden, weight, targets), {"chunk": 0}, "chunk"),
                               ((hidden, weight, torch.tensor([1, 2, 3, 10])), {}, "vocabulary"),
                               ((hidden, weight, torch.tensor([1, 2, 3, -1])), {}, "vocabulary")]:
        with pytest.raises(ValueError, match=word):
            M.linear_cross_entropy(*args, **kwargs)


@pytest.mark.skipif("triton" not in BACKENDS, reason="no triton")
def test_triton_is_never_replaced_silently():
    code = ("import torch, model\nx = torch.zeros(2, 4)\ntry:\n"
            "    model.linear_cross_entropy(x, x, torch.tensor([0, 1]), backend='triton')\n"
            "except ValueError as error:\n    print(error)")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "backend='torch'" in done.stdout, done.stderr


# ---------------------------------------------------------------- sampling

PROMPTS = [[1, 2, 3], [36], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0], [4, 4]]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_greedy_is_the_same_with_and_without_cache(changes):
    model = small(**changes)
    a = M.generate(model, PROMPTS, max_new_tokens=10, temperature=0)
    b = M.generate(model, PROMPTS, max_new_tokens=10, temperature=0, use_cache=False)
    for prompt, x, y in zip(PROMPTS, a, b):
        assert x.ids == y.ids and len(x.ids) == 10 and x.finish_reason == "length" and x.prompt_ids == prompt
        np.testing.assert_allclose(x.logprobs, y.logprobs, atol=2e-5)
        text = list(prompt)                                            # by hand, one row, no padding, no cache
        for token, logprob in zip(x.ids, x.logprobs):
            scores = model(torch.tensor([text]))[0, -1].log_softmax(-1)
            assert scores.argmax() == token and abs(scores[token] - logprob) < 2e-5
            text.append(token)


@pytest.mark.parametrize("use_cache", [True, False])
def test_samples_with_and_without_cache_and_beside_others(use_cache):
    model = small()
    options = dict(max_new_tokens=9, top_p=0.9, top_k=20, temperature=0.8, seed=3)
    want = M.generate(model, PROMPTS, num_samples=3, **options)
    got = M.generate(model, PROMPTS, num_samples=3, use_cache=use_cache, **options)
    assert [g.ids for g in got] == [g.ids for g in want] and len(got) == 12
    assert [g.prompt_ids for g in got] == [p for p in PROMPTS for _ in range(3)]
    assert len({tuple(g.ids) for g in got[:3]}) == 3
    assert [g.ids for g in M.generate(model, PROMPTS, num_samples=3, **options | {"seed": 4})] != [g.ids for g in want]


def test_a_prompt_is_computed_once():
    model, seen = small(), []
    handle = model.token_embeddings.register_forward_hook(lambda m, args, out: seen.append(tuple(args[0].shape)))
    M.generate(model, [[1, 2, 3, 4]], max_new_tokens=3, num_samples=5)
    handle.remove()
    assert seen == [(1, 4), (5, 1), (5, 1)]


def test_context_is_the_end():
    model = small()                                                    # context 24
    long = list(range(30))
    for use_cache in (True, False):
        got, = M.generate(model, [[1, 2]], max_new_tokens=100, temperature=0, use_cache=use_cache)
        # positions 0..23 were read, the last token was not
        assert len(got.ids) == 23 and got.finish_reason == "length"
        got, = M.generate(model, [long], max_new_tokens=4, temperature=0, use_cache=use_cache)
        assert got.prompt_ids == long[-21:] and len(got.ids) == 4
        got, = M.generate(model, [long], max_new_tokens=100, temperature=0, use_cache=use_cache)
        assert got.prompt_ids == long[-12:] and len(got.ids) == 13
        both = M.generate(model, [long, [1, 2]], max_new_tokens=100, temperature=0, use_cache=use_cache)
        assert both[0].ids == got.ids and len(both[1].ids) == 23


def test_stop_ids_and_min_new_tokens():
    model = small()
    free = M.generate(model, PROMPTS, max_new_tokens=12, num_samples=4, seed=1)
    stops = {free[0].ids[3], free[5].ids[6]}
    got = M.generate(model, PROMPTS, max_new_tokens=12, num_samples=4, seed=1, stop_ids=stops)
    cuts = [next((i for i, t in enumerate(x.ids) if t in stops), 12) for x in free]
    same = min(cuts) + 1                                               # once rows have gone, the others see other draws
    assert [y.ids[:same] for y in got] == [x.ids[:same] for x in free]
    assert [len(y.ids) == same for y in got] == [cut + 1 == same for cut in cuts]
    for y in got:
        assert (y.finish_reason == "stop") == (y.ids[-1] in stops) and not stops & set(y.ids[:-1])
        assert len(y.logprobs) == len(y.ids) and (y.finish_reason == "stop" or len(y.ids) == 12)
    for y in M.generate(model, PROMPTS, max_new_tokens=12, min_new_tokens=5, num_samples=8, stop_ids=range(0, 37, 2)):
        assert len(y.ids) >= 6 and all(t % 2 for t in y.ids[:5])
        scores = model(torch.tensor([y.prompt_ids + y.ids]))[0].log_softmax(-1)   # the model's own, nothing forbidden
        want = [scores[len(y.prompt_ids) - 1 + i, t].item() for i, t in enumerate(y.ids)]
        np.testing.assert_allclose(y.logprobs, want, atol=2e-5)


def test_rows_that_end_leave_the_others_alone():
    model = small()
    stops = [M.generate(model, PROMPTS, max_new_tokens=12, temperature=0)[0].ids[1]]
    alone = [M.generate(model, [p], max_new_tokens=12, temperature=0, stop_ids=stops)[0] for p in PROMPTS]
    together = M.generate(model, PROMPTS, max_new_tokens=12, temperature=0, stop_ids=stops)
    assert [g.ids for g in alone] == [g.ids for g in together] and len(alone[0].ids) == 2


@pytest.mark.skipif(M.triton is None, reason="no triton")
@pytest.mark.parametrize("H, G, K, S", [(12, 2, 128, 150), (4, 4, 16, 65), (2, 1, 32, 64), (40, 2, 16, 70)])
def test_decode_attention_reads_each_row_up_to_its_position(H, G, K, S):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = (rand(3, heads, length, K).to(device) for heads, length in ((H, 1), (G, S), (G, S)))
    positions = torch.tensor([0, S - 1, S // 2], device=device)
    seen = (torch.arange(S, device=device) <= positions[:, None])[:, None, None]
    want = F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)
    for row, at in enumerate(positions.tolist()):
        k[row, :, at + 1:], v[row, :, at + 1:] = math.nan, math.nan    # what lies behind is not there yet
    close(M.decode_attention(q, k, v, positions), want, 1e-5)          # fp32, another order of up to 150 terms


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph")
def test_graph_generates_the_same():
    device = torch.device("cuda", torch.cuda.device_count() - 1)      # not the current one, where there are several
    model = small(num_heads=2, num_kv_heads=1, head_dim=16, context_length=64).to(device)
    for options in (dict(temperature=0), dict(temperature=0, stop_ids=range(0, 37, 3), min_new_tokens=3),
                    dict(seed=5, stop_ids=[1, 2]), dict(temperature=0, max_new_tokens=200)):
        eager, graph = (M.generate(model, PROMPTS * 3, num_samples=4, graph=yes, **{"max_new_tokens": 40} | options)
                        for yes in (False, True))
        # with samples, rows leave the batch at other times
        if options.get("temperature") == 0:
            assert [g.ids for g in eager] == [g.ids for g in graph]
        for x in graph:
            ids = torch.tensor([x.prompt_ids + x.ids[:64 - len(x.prompt_ids)]], device=device)
            scores = model(ids)[0].log_softmax(-1)
            want = [scores[len(x.prompt_ids) - 1 + i, t].item() for i, t in enumerate(x.ids)]
            np.testing.assert_allclose(x.logprobs, want, atol=1e-4)


def test_graph_is_refused_where_it_cannot_run():
    with pytest.raises(ValueError, match="graph=True needs a GPU"):
        M.generate(small(), [[1]], max_new_tokens=2, graph=True)


def test_stop_strings():
    model = small()
    decode = lambda ids: bytes(97 + i for i in ids).decode(errors="replace")
    free = M.generate(model, [[1], [2]], max_new_tokens=15, temperature=0, decode=decode)
    assert [g.text for g in free] == [decode(g.ids) for g in free]
    string = free[0].text[4:7]                                         # three tokens, complete at the seventh
    at = free[0].text.find(string) + 3
    for strings in ([string], ["no such thing", string], [string, free[0].text[at:at + 2]]):
        got = M.generate(model, [[1], [2]], max_new_tokens=15, temperature=0, stop_strings=strings, decode=decode)
        assert got[0].text == free[0].text[:at] and got[0].ids == free[0].ids[:at] and got[0].finish_reason == "stop"
    later = M.generate(model, [[1]], max_new_tokens=15, min_new_tokens=at, temperature=0, stop_strings=[string],
                       decode=decode)
    again = free[0].text.find(string, at - 2)                          # complete within the minimum: passed over
    assert later[0].ids == (free[0].ids if again < 0 else free[0].ids[:again + 3])
    # a token that holds the end of the stop string and more, and characters spread over several tokens
    # (the three bytes of a euro sign, 5, 6, 7), and ids without text (9: beyond the tokenizer's table) between them
    pieces = {0: "wör".encode()[:2], 1: "wör".encode()[2:], 2: b"xxEND!!", 3: b"E", 4: b"ND", 9: b""}
    pieces |= {5: b"\xe2", 6: b"\x82", 7: b"\xac"}
    say = lambda ids: b"".join(pieces[i] for i in ids).decode(errors="replace")
    for ids, strings, text, count in [([0, 1, 2, 0], ["END"], "wörxxEND", 3), ([0, 1, 2], ["ör"], "wör", 2),
                                      ([3, 3, 4, 2], ["END", "EEND"], "EEND", 3), ([0, 1, 0, 1], ["ö"], "wö", 2),
                                      ([2, 3] + [9] * 40 + [4, 0], ["END"], "xxEND", 1),
                                      ([1, 3, 3] + [9] * 40 + [4, 0], ["EEND"], "\ufffdrEEND", 44),
                                      ([0, 9, 9, 9, 9, 9, 1], ["wör"], "wör", 7), ([9] * 9 + [3, 4], ["ND"], "END", 11),
                                      ([3, 5, 6, 9, 9, 9, 7, 3, 4], ["€EN"], "E€EN", 9),
                                      ([0, 1, 3, 5] + [9] * 4 + [6] + [9] * 3 + [7, 3, 4], ["€EN"], "wörE€EN", 15),
                                      ([3] + [9] * 8 + [0, 1], ["Ewö"], "Ewö", 11),
                                      ([2], ["END!", "xE"], "xxE", 1)]:
        for known in range(count):
            sample = M.Generation([0], ids[:known], [-1.0] * known)
            M._extend(sample, ids[known:], [-1.0] * (len(ids) - known), 99, 0, set(), strings, say)
            assert (sample.text, len(sample.ids), sample.finish_reason) == (text, count, "stop")
            assert len(sample.logprobs) == count
    # on a GPU several tokens come at once, some of them behind the end
    for limit, ids, reason in [(2, [0, 1], "length"), (3, [0, 1, 2], "stop"), (9, [0, 1, 2], "stop")]:
        sample = M.Generation([0])
        M._extend(sample, [0, 1, 2, 3], [-1.0, -2.0, -3.0, -4.0], limit, 0, {2}, [], say)
        assert (sample.ids, sample.finish_reason, sample.text) == (ids, reason, say(ids))
        assert sample.logprobs == [-1.0, -2.0, -3.0][:len(ids)]


@pytest.mark.parametrize("case", ANSWERS["filters"]["cases"],
                         ids=lambda c: f"{c['temperature']}-{c['top_k']}-{c['top_p']}")
def test_sampling_filters_keep_what_transformers_keeps(case):
    logits = torch.tensor(ANSWERS["filters"]["logits"])
    want = torch.tensor(case["probabilities"])
    n = 4000
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([M.sample_tokens(logits, case["temperature"], case["top_k"], case["top_p"], generator)
                         for _ in range(n)])                           # (n, 6)
    share = torch.stack([(drawn == v).float().mean(0) for v in range(40)], -1)
    assert (share[want == 0] == 0).all()
    assert (share - want).abs().max() < 5 * 0.5 / n ** 0.5             # five standard errors of a share
    assert torch.equal(M.sample_tokens(logits, 0, case["top_k"], case["top_p"]), logits.argmax(-1))


def test_generate_refuses():
    model = small()
    for prompts, options, word in [([[1], []], {}, "empty"), ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
                                   ([[1]], {"temperature": -1}, "temperature"),
                                   ([[1]], {"temperature": math.nan}, "temperature"),
                                   ([[1]], {"top_p": 0}, "top_p"), ([[1]], {"top_p": 1.1}, "top_p"),
                                   ([[1]], {"top_k": -1}, "top_k"),
                                   ([[1]], {"num_samples": 0}, "num_samples"),
                                   ([[1]], {"stop_strings": ["x"]}, "decode, for stop_strings"),
                                   ([[1]], {"stop_strings": [""], "decode": str}, "empty"), ([[37]], {}, "vocabulary"),
                                   ([[1]], {"stop_ids": [37]}, "stop_ids"),
                                   ([[1]], {"min_new_tokens": -1}, "min_new_tokens")]:
        with pytest.raises(ValueError, match=word):
            M.generate(model, prompts, **{"max_new_tokens": 2} | options)
    assert M.generate(model, [], max_new_tokens=2) == []


# ---------------------------------------------------------------- Hugging Face checkpoints


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_transformers(kind):
    model, answer = M.load_hf(FIXTURES / f"model_{kind}"), ANSWERS[kind]
    logits, want = model(torch.tensor(answer["ids"])), torch.tensor(answer["logits"])
    assert want.std() > 1
    close(logits, want, 1e-4)
    greedy = M.generate(model, ANSWERS["prompts"], max_new_tokens=20, temperature=0)
    assert [g.ids for g in greedy] == answer["greedy"]


@pytest.mark.parametrize("kind", KINDS)
def test_written_as_read(kind, tmp_path):
    source = FIXTURES / f"model_{kind}"
    model = M.load_hf(source)
    M.save_hf(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    theirs = {name: x for shard in source.glob("*.safetensors") for name, x in M.read_safetensors(shard).items()}
    ours = M.read_safetensors(tmp_path / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    again = M.load_hf(tmp_path)
    assert again.config == model.config
    close(again(torch.tensor([[1, 2, 3]])), model(torch.tensor([[1, 2, 3]])), 0)
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (tmp_path, source))
    for name in ("model_type", "architectures", "hidden_size", "rope_parameters", "tie_word_embeddings", "rms_norm_eps",
                 "num_key_value_heads", "intermediate_size", "vocab_size", "max_position_embeddings",
                 "num_hidden_layers"):
        assert ours[name] == theirs[name], name


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "head_dim": 10}, {"qkv_bias": True},
                                     {"tie_embeddings": True}], ids=str)
def test_interleaved_models_travel(changes, tmp_path):
    model = small(**changes)
    for p in model.parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, 1.0, 0.3)
    M.save_hf(model, tmp_path)
    loaded, x = M.load_hf(tmp_path), token_ids(2, 20)
    assert loaded.config.rope_layout == "half"
    close(loaded(x), model(x), 2e-5)                                   # the same numbers added up in another order


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "head_dim": 10},
                                     {"qkv_bias": True, "tie_embeddings": True}], ids=str)
def test_transformers_reads_ours(changes, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, x = small(**changes), token_ids(2, 20)
    M.save_hf(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    close(theirs(x).logits, model(x), 1e-4)


def test_an_old_llama_config(tmp_path):
    """Before transformers 4.31 and 5: rope_theta beside the rest, no kv heads, no head width, inv_freq among the
    weights."""
    model = small(num_kv_heads=4)
    M.save_hf(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("num_key_value_heads", "head_dim", "rope_parameters", "rope_scaling", "attention_bias"):
        del config[name]
    config["rope_theta"] = 10_000                                       # a whole number is a number too
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = M.read_safetensors(tmp_path / "model.safetensors")        # mapped: the file must not be written over
    M.write_safetensors(tmp_path / "new", tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)})
    os.replace(tmp_path / "new", tmp_path / "model.safetensors")
    loaded = M.load_hf(tmp_path)
    close(loaded(token_ids(2, 20)), model(token_ids(2, 20)), 2e-5)


def test_dtypes_and_shared_weights(tmp_path):
    model = M.load_hf(FIXTURES / "model_qwen2", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.token_embeddings.weight
    M.save_hf(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {p.dtype for p in M.load_hf(tmp_path).parameters()} == {torch.bfloat16}
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
    M.load_hf(FIXTURES / "model_qwen2")(torch.tensor([[1, 2]])).sum().backward()


def test_safetensors_by_hand(tmp_path):
    header = (b'{"a":{"dtype":"I16","shape":[2],"data_offsets":[0,4]},'
              b'"b":{"dtype":"F32","shape":[],"data_offsets":[4,8]}}')
    path = tmp_path / "x.safetensors"                                  # the header's length leaves b unaligned
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\x01\x00\xff\xff" + np.float32(2.5).tobytes())
    got = M.read_safetensors(path)
    assert got["a"].tolist() == [1, -1] and got["b"].item() == 2.5 and got["b"].shape == ()
    for dtype in set(M.DTYPES.values()):
        x = torch.tensor([[0, 1, 1]]).to(dtype)
        M.write_safetensors(path, {"x": x, "empty": x[:0], "turned": x.T})
        got = M.read_safetensors(path)
        assert all(torch.equal(got[n], y) and got[n].dtype == dtype
                   for n, y in [("x", x), ("empty", x[:0]), ("turned", x.T)])
    safetensors = pytest.importorskip("safetensors.torch")
    assert safetensors.load_file(path)["x"].tolist() == got["x"].tolist()


def test_tensors_that_share_bytes(tmp_path):
    header = (b'{"a":{"dtype":"I16","shape":[2],"data_offsets":[0,4]},'
              b'"b":{"dtype":"I16","shape":[2],"data_offsets":[0,4]}}')
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + b"abcd")
    with pytest.raises(ValueError, match="does not fit"):
        M.read_safetensors(tmp_path / "x")


def damaged(folder: Path, what: str) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    raw, values = weights.read_bytes(), json.loads(config.read_text())
    length = int.from_bytes(raw[:8], "little")
    change = lambda **new: config.write_text(json.dumps(values | new))
    header = lambda old, new: weights.write_bytes(raw.replace(old, new, 1))
    {"missing weights": lambda: weights.unlink(), "missing config": lambda: config.unlink(),
     "empty": lambda: weights.write_bytes(b""), "seven bytes": lambda: weights.write_bytes(raw[:7]),
     "cut header": lambda: weights.write_bytes(raw[:length // 2]), "cut data": lambda: weights.write_bytes(raw[:-1]),
     "too long": lambda: weights.write_bytes(raw + b"x"), "text": lambda: weights.write_bytes(b"hello, world, " * 50),
     "zip": lambda: weights.write_bytes(b"PK\x03\x04" + raw),
     "huge header": lambda: weights.write_bytes(b"\xff" * 8 + raw[8:]),
     "not a table": lambda: weights.write_bytes((2).to_bytes(8, "little") + b"[]"),
     "nested": lambda: weights.write_bytes((200_000).to_bytes(8, "little") + b"[" * 200_000),
     "dtype": lambda: header(b'"F32"', b'"F99"'), "shape": lambda: header(b"[40,16]", b"[41,16]"),
     "negative": lambda: header(b"[40,16]", b"[-1,16]"),
     "overlap": lambda: header(b'"data_offsets":[0,', b'"data_offsets":[4,'),
     "name": lambda: header(b"model.norm.weight", b"model.morn.weight"),
     "config not json": lambda: config.write_text("{"),
     "config a list": lambda: config.write_text("[]"), "foreign": lambda: change(model_type="gpt2"),
     "no type": lambda: config.write_text("{}"), "other width": lambda: change(hidden_size=20),
     "odd heads": lambda: change(num_key_value_heads=3), "deeper": lambda: change(num_hidden_layers=3),
     "shallower": lambda: change(num_hidden_layers=1), "gelu": lambda: change(hidden_act="gelu"),
     "string": lambda: change(hidden_size="sixteen"), "eps a string": lambda: change(rms_norm_eps="small"),
     "eps null": lambda: change(rms_norm_eps=None), "eps nan": lambda: change(rms_norm_eps=math.nan),
     "eps infinite": lambda: change(rms_norm_eps=math.inf),
     "eps negative": lambda: change(rms_norm_eps=-1e-5),
     "theta 0": lambda: change(rope_parameters={"rope_type": "default", "rope_theta": 0}),
     "yarn": lambda: change(rope_parameters={"rope_type": "yarn", "factor": 2}),
     "biases": lambda: change(attention_bias=True), "no vocabulary": lambda: config.write_text(
         json.dumps({k: v for k, v in values.items() if k != "vocab_size"}))}[what]()


@pytest.mark.parametrize("what", [
    "missing weights", "missing config", "empty", "seven bytes", "cut header", "cut data", "too long", "text", "zip",
    "huge header",
    "not a table", "nested", "dtype", "shape", "negative", "overlap", "name", "config not json", "config a list",
    "foreign", "no type",
    "other width", "odd heads", "deeper", "shallower", "gelu", "string", "yarn", "biases", "no vocabulary",
    "eps a string", "eps null", "eps nan", "eps infinite", "eps negative", "theta 0"])
def test_a_damaged_or_foreign_checkpoint_gets_one_clear_line(what, tmp_path):
    shutil.copytree(FIXTURES / "model_llama", tmp_path / "x")
    damaged(tmp_path / "x", what)
    with pytest.raises(ValueError) as error:
        M.load_hf(tmp_path / "x")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("name", ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"])
@pytest.mark.parametrize("value", [0, -8.0, math.nan, math.inf, "8.0", None, [8.0], True, "left out"], ids=str)
def test_garbage_in_llama_3_s_rope_scaling(name, value, tmp_path):
    shutil.copytree(FIXTURES / "model_llama31", tmp_path / "x")
    path = tmp_path / "x" / "config.json"
    config = json.loads(path.read_text())
    assert M.load_hf(tmp_path / "x").config.rope_scaling == tuple(config["rope_parameters"][n] for n in M.LLAMA3)
    config["rope_parameters"] |= {name: value}
    if value == "left out":
        del config["rope_parameters"][name]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=name if value == "left out" else "rope_scaling") as error:
        M.load_hf(tmp_path / "x")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_missing_shard_and_a_folder_with_shards(tmp_path):
    folder = tmp_path / "x"
    shutil.copytree(FIXTURES / "model_qwen2", folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    # an old shard beside the new file: two models in one
    with pytest.raises(ValueError, match="shards"):
        M.save_hf(small(), folder)
    for shard in folder.glob("model-*"):
        whole = shard.read_bytes()
        shard.unlink()
        with pytest.raises(ValueError, match="Missing key"):
            M.load_hf(folder)
        shard.write_bytes(whole)
    assert M.count_parameters(M.load_hf(folder)) > 0


def test_save_is_whole_or_not_at_all(tmp_path, monkeypatch):
    M.save_hf(small(), tmp_path)
    before = {f: (tmp_path / f).read_bytes() for f in os.listdir(tmp_path)}

    class Broken:
        special_tokens = {}

        def save(self, path):
            raise OSError("disk full")
    with pytest.raises(OSError):
        M.save_hf(small(seed=1), tmp_path, Broken())
    assert {f: (tmp_path / f).read_bytes() for f in os.listdir(tmp_path)} == before
    for changes in ({"norm": "post"}, {"norm": "none"}, {"positions": "none"}, {"ffn": "silu"},
                    {"qk_norm": True, "qkv_bias": True}):
        with pytest.raises(ValueError, match="Llama"):
            M.save_hf(small(**changes), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_save_with_a_tokenizer(tmp_path):
    class Tokenizer:
        special_tokens = {"<|endoftext|>": 36}

        def save(self, path):
            Path(path).write_text("{}")
    M.save_hf(small(), tmp_path, Tokenizer())
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 36
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"
    assert (tmp_path / "tokenizer.json").read_text() == "{}"


# ---------------------------------------------------------------- bad input, house


def test_configs_that_cannot_be():
    for changes, word in [({"d_model": 25, "head_dim": None}, "divide"), ({"num_kv_heads": 3}, "multiple"),
                          ({"num_layers": 0}, "num_layers"), ({"vocab_size": -1}, "vocab_size"),
                          ({"norm": "layer"}, "norm"),
                          ({"ffn": "gelu"}, "ffn"), ({"positions": "alibi"}, "positions"),
                          ({"rope_layout": "quarter"}, "rope_layout"), ({"d_ff": 0}, "d_ff"),
                          ({"rope_scaling": (8.0,)}, "rope_scaling"),
                          ({"rope_scaling": (8.0, 4.0, 1.0, 64)}, "rope_scaling"),      # low above high
                          ({"rope_scaling": (8.0, 1.0, 1.0, 64)}, "rope_scaling")]:     # nothing between: 0 / 0
        with pytest.raises(ValueError, match=word):
            replace(TINY, **changes)
    assert ModelConfig(**json.loads(json.dumps(asdict(TINY)))) == TINY
    with pytest.raises(ValueError, match="divide"):
        M.CausalSelfAttention(10, 3)
    with pytest.raises(ValueError, match="even"):
        small(head_dim=5)
    assert small(head_dim=5, positions="none")(token_ids(1, 3)).shape == (1, 3, 37)


def test_tokens_that_cannot_be():
    model = small()
    with pytest.raises(ValueError, match="37.*vocabulary"):
        model(torch.tensor([[1, 37]]))
    with pytest.raises(ValueError, match="-1.*vocabulary"):
        model(torch.tensor([[1, -1]]))
    with pytest.raises(ValueError, match="25.*context_length 24"):
        model(token_ids(1, 25))
    assert model(torch.tensor([[5]])).shape == (1, 1, 37)


def test_command_line():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "model.py"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2,127,057,600" in done.stdout and "4.51" in done.stdout and "OK" in done.stdout
    for line in M.__doc__.split("Run:")[1].splitlines()[1:]:           # the docstring quotes what it prints
        if line.strip() and "OK" not in line:
            assert line.strip() in [x.strip() for x in done.stdout.splitlines()], line
    bad = subprocess.run([sys.executable, "model.py", "--device", "nothing"], cwd=ROOT, env=environment,
                         capture_output=True, text=True)
    assert bad.returncode == 2 and "Traceback" not in bad.stderr and "nothing" in bad.stderr

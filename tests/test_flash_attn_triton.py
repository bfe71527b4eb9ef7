"""FlashAttention: the PyTorch and the Triton version against known answers, float64, torch's own attention, and misuse.

On a CPU the Triton kernels run in Triton's interpreter (conftest.py turns it on), on a GPU natively.
Tolerances: float32 rounding of sums of a hundred terms gives 2e-7 to 1e-6 relative, a wrong mask, scale or rescale at
least 1e-2; float16 and bfloat16 round P, dS and the outputs to 11 and 8 bits: 2^-11 = 5e-4 and 2^-8 = 4e-3 each.
"""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flash_attn_triton as flash
from flash_attn_triton import FlashAttentionPyTorch, FlashAttentionTriton, errors, flash_attention, plain_attention

HERE = Path(__file__).resolve().parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = flash.triton is not None and (DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
needs_triton = pytest.mark.skipif(not TRITON, reason="needs a GPU or TRITON_INTERPRET=1")
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
VERSIONS = [FlashAttentionPyTorch.apply, pytest.param(FlashAttentionTriton.apply, marks=needs_triton)]
LIMIT = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def first_tile(monkeypatch):
    """On a GPU: the first candidate tile, untimed, so that a test compiles three kernels and not ten."""
    every = flash._tiles
    monkeypatch.setattr(flash, "_tiles", lambda *args: every(*args)[:1])
    flash._fastest.clear()
    flash._prepared.clear()
    yield every
    flash._fastest.clear()
    flash._prepared.clear()


def tensors(q_shape, kv_shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (q_shape, kv_shape, kv_shape, q_shape)
    return [torch.randn(shape, generator=g).to(DEVICE, dtype) for shape in shapes]     # q, k, v, dO


def relative_error(x, exact):
    return ((x.double() - exact.double()).norm() / exact.double().norm()).item()


def check(attention, q, k, v, do, is_causal, limit=None, parts=("O", "dQ", "dK", "dV")):
    found = errors(attention, q, k, v, do, is_causal)
    bad = {part: found[part] for part in parts if not found[part] < (limit or LIMIT[q.dtype])}
    assert not bad, f"{bad} at q {tuple(q.shape)}, k {tuple(k.shape)}, causal {is_causal}, {q.dtype}"


@pytest.mark.parametrize("attention", VERSIONS)
@pytest.mark.parametrize("case", json.loads((HERE / "fixtures/flash_attn_triton_answers.json").read_text()),
                         ids=lambda case: case["name"])
def test_known_answers(attention, case):
    """Output, L and gradients worked out by numpy in float64; L is natural, (..., T), and saved."""
    q, k, v = (torch.tensor(case[x], dtype=torch.float32, device=DEVICE, requires_grad=True) for x in "qkv")
    if attention == FlashAttentionPyTorch.apply and q.shape[:-2] != k.shape[:-2]:
        pytest.skip("equal heads only")
    out = attention(q, k, v, case["is_causal"])
    saved = [x for x in out.grad_fn.saved_tensors if x.shape == q.shape[:-1]]
    assert len(saved) == 1, "L must be the only saved tensor of its shape"
    gradients = torch.autograd.grad(out, (q, k, v), torch.tensor(case["do"], dtype=torch.float32, device=DEVICE))
    for name, value in (("o", out), ("L", saved[0]), *zip(("dq", "dk", "dv"), gradients)):
        expected = torch.tensor(case[name], dtype=torch.float64, device=DEVICE)
        assert (value.double() - expected).norm() <= 3e-6 * expected.norm() + 1e-12, name


@pytest.mark.parametrize("attention", VERSIONS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("q_shape, kv_shape", [
    ((2, 64, 16), (2, 64, 16)),            # whole tiles
    ((1, 2, 45, 16), (1, 2, 45, 16)),      # ragged
    ((2, 33, 24), (2, 70, 24)),            # more keys than queries; a width that is no power of two
    ((2, 70, 18), (2, 33, 18)),            # more queries than keys; a width TMA cannot take
    ((40, 16), (40, 16)),                  # no leading dimension
    ((2, 1, 2, 17, 16), (2, 1, 2, 17, 16)),
    ((1, 1, 33, 128), (1, 1, 33, 128)),
])
def test_shapes(attention, is_causal, q_shape, kv_shape):
    check(attention, *tensors(q_shape, kv_shape), is_causal)


@pytest.mark.parametrize("attention", VERSIONS)
def test_single_query(attention):
    """T = 1 sees one key under a causal mask (its weight is 1: dQ and dK are zero), all of them without."""
    check(attention, *tensors((2, 1, 16), (2, 50, 16)), False)
    q, k, v, do = (x.requires_grad_() for x in tensors((2, 1, 16), (2, 50, 16)))
    out = attention(q, k, v, True)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), do)
    assert torch.allclose(out, v[:, :1], atol=1e-6) and torch.allclose(dv[:, :1], do, atol=1e-6)
    assert dq.abs().max() < 1e-5 and dk.abs().max() < 1e-5 and not dv[:, 1:].any()


@needs_triton
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("tile", [(16, 32), (32, 32), (32, 16)])
def test_tile_shapes(monkeypatch, is_causal, tile):
    """Tiles wider and narrower than high: the diagonal crosses one or several. (A GPU takes its own tiles.)"""
    monkeypatch.setattr(flash, "INTERPRETER_TILE", flash.Tile(*tile, 4, 1))
    check(FlashAttentionTriton.apply, *tensors((1, 2, 50, 16), (1, 1, 77, 16)), is_causal)


@needs_triton
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (3, 1)])
def test_grouped_queries(is_causal, heads, kv_heads):
    check(FlashAttentionTriton.apply, *tensors((2, heads, 37, 16), (2, kv_heads, 37, 16)), is_causal)


@pytest.mark.parametrize("attention", VERSIONS)
def test_half_precision(attention):
    check(attention, *tensors((1, 2, 50, 32), (1, 2, 50, 32), torch.float16), True)
    if DEVICE == "cuda" or attention == FlashAttentionPyTorch.apply:
        check(attention, *tensors((1, 2, 50, 32), (1, 2, 50, 32), torch.bfloat16), True)


@pytest.mark.parametrize("attention", VERSIONS)
def test_large_scores(attention):
    """Scores of several hundred: exp of them overflows float32 unless the running maximum is taken out first."""
    q, k, v, do = tensors((1, 40, 16), (1, 40, 16))
    # scores near 500 carry rounding of 500 * 2^-24 = 3e-5
    check(attention, q * 20, k * 10, v, do, True, limit=1e-4)


@pytest.mark.parametrize("attention", VERSIONS)
def test_strided_inputs(attention):
    """A transposed view, every other row, a broadcast batch, and the stride-0 gradient of a sum."""
    base = torch.randn(2, 40, 2, 16, device=DEVICE)
    q = base.transpose(1, 2).requires_grad_()                       # (2, 2, 40, 16), as a model hands it over
    k = torch.randn(2, 2, 80, 16, device=DEVICE)[:, :, ::2]
    v = torch.randn(1, 2, 40, 16, device=DEVICE).expand(2, 2, 40, 16)
    out = attention(q, k, v, True)
    out.sum().backward()
    reference = q.detach().double().requires_grad_()
    expected = plain_attention(reference, k.double(), v.double(), True)
    expected.sum().backward()
    assert relative_error(out, expected) < 3e-6 and relative_error(q.grad, reference.grad) < 3e-6


@pytest.mark.parametrize("attention", VERSIONS)
@pytest.mark.parametrize("lead", [(2,), (2, 1, 2)])
def test_columns_in_memory_order(attention, lead):
    """Inputs, and so gradients, whose last dimension is not the dense one; five dimensions in another order."""
    q, k, v, do = tensors((*lead, 33, 16), (*lead, 21, 16))
    for turn in (lambda x: x.mT.contiguous().mT, lambda x: x.transpose(0, -2).contiguous().transpose(0, -2)):
        check(attention, *map(turn, (q, k, v, do)), True)


@needs_triton
@pytest.mark.parametrize("K", [24, 18])                             # by descriptors, by pointers
def test_every_element_and_no_other_is_written(monkeypatch, K):
    """Outputs start as NaN in a larger block of NaN: what is forgotten shows, and what is written outside."""
    blocks = []

    def poisoned(x, **kwargs):
        block = torch.full((x.numel() + 4096,), math.nan, dtype=x.dtype, device=x.device)
        blocks.append((block, x.numel()))
        return block[:x.numel()].view(x.shape)
    monkeypatch.setattr(torch, "empty_like", poisoned)
    q, k, v, do = tensors((2, 2, 45, K), (2, 1, 70, K))
    out, L = flash.flash_forward(q, k, v, True)
    flash.flash_backward(q, k, v, out, L, do, True)
    assert len(blocks) == 4                                         # O, dQ, dK, dV
    for block, size in blocks:
        assert not block[:size].isnan().any() and block[size:].isnan().all()


@needs_triton
def test_same_bits_twice():
    q, k, v, do = (x.requires_grad_() for x in tensors((1, 2, 70, 16), (1, 2, 70, 16)))
    first, second = (torch.autograd.grad(flash_attention(q, k, v), (q, k, v), do) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_gradcheck():
    """The PyTorch backward against finite differences, in float64."""
    shapes = ((2, 9, 3), (2, 11, 3))
    for is_causal in (False, True):
        q, k, v, _ = (x.double().cpu().requires_grad_() for x in tensors(*shapes))
        FlashAttentionPyTorch.QUERIES, FlashAttentionPyTorch.KEYS, before = 4, 5, (FlashAttentionPyTorch.QUERIES,
                                                                                   FlashAttentionPyTorch.KEYS)
        try:
            assert torch.autograd.gradcheck(lambda *x: FlashAttentionPyTorch.apply(*x, is_causal), (q, k, v))
        finally:
            FlashAttentionPyTorch.QUERIES, FlashAttentionPyTorch.KEYS = before


@needs_triton
def test_operator():
    """flash_attention is a registered operator: right schema, fake tensors, autograd, torch.compile in one graph."""
    q, k, v, _ = (x.requires_grad_() for x in tensors((1, 4, 33, 16), (1, 2, 33, 16)))
    torch.library.opcheck(flash.flash_forward, (q, k, v, True),
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    expected = flash_attention(q * 2, k, v).sin()
    compiled = torch.compile(lambda q, k, v: flash_attention(q * 2, k, v).sin(), fullgraph=True, backend="aot_eager")
    out = compiled(q, k, v)
    assert torch.allclose(out, expected, atol=1e-6)
    for a, b in zip(torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(expected.sum(), (q, k, v))):
        assert torch.allclose(a, b, atol=1e-5)


@needs_triton
def test_tensors_without_numbers():
    """Forward and backward of fake tensors, outside torch.compile's own tracing: torch 2.11 traces backward so."""
    with torch._subclasses.FakeTensorMode():
        q, k, v = (torch.empty(1, heads, 33, 16, requires_grad=True) for heads in (4, 2, 2))
        for attention in (flash_attention, FlashAttentionTriton.apply):
            out = attention(q, k, v, True)
            gradients = torch.autograd.grad(out.sum(), (q, k, v))
            assert out.shape == q.shape and [g.shape for g in gradients] == [q.shape, k.shape, v.shape]


@needs_triton
def test_autocast():
    if DEVICE == "cpu":
        pytest.skip("the interpreter has no bfloat16 product")
    q, k, v, _ = tensors((1, 2, 33, 16), (1, 2, 33, 16))
    with torch.autocast(DEVICE, torch.float16):
        assert flash_attention(q, k, v).dtype == torch.float16


@needs_triton
@pytest.mark.parametrize("q_shape, kv_shape, dtype, words", [
    ((1, 2, 8, 8), (1, 2, 8, 8), torch.float32, "head widths 16 to 256, got 8"),
    ((1, 2, 8, 512), (1, 2, 8, 512), torch.float32, "head widths 16 to 256, got 512"),
    ((1, 3, 8, 16), (1, 2, 8, 16), torch.float32, "multiple of the key heads"),
    ((2, 2, 8, 16), (1, 2, 8, 16), torch.float32, "leading dimensions must agree"),
    ((1, 2, 8, 16), (1, 2, 8, 32), torch.float32, "head widths differ"),
    ((1, 2, 8, 16), (2, 8, 16), torch.float32, "want q"),
    ((1, 2, 8, 16), (1, 2, 8, 16), torch.bfloat16, "interpreter gets bfloat16 products wrong"),
    ((1, 2, 8, 16), (1, 2, 8, 16), torch.float64, "float32, float16 and bfloat16, got torch.float64"),
    ((1, 2, 0, 16), (1, 2, 8, 16), torch.float32, "dimension is empty"),
])
def test_misuse(q_shape, kv_shape, dtype, words):
    if dtype == torch.bfloat16 and DEVICE == "cuda":
        pytest.skip("no interpreter here")
    q, k, v, _ = tensors(q_shape, kv_shape, dtype)
    for function in (flash_attention, FlashAttentionTriton.apply):
        with pytest.raises(ValueError, match=words):
            function(q, k, v, True)


def test_mixed_dtypes():
    q, k, v, _ = tensors((1, 8, 16), (1, 8, 16))
    with pytest.raises(ValueError, match="one floating-point dtype"):
        FlashAttentionPyTorch.apply(q, k.half(), v, True)


def test_no_silent_fallback():
    """Compiled kernels and CPU tensors: a ValueError that names the remedy, in a process without the interpreter."""
    if flash.triton is None:
        pytest.skip("needs triton")
    code = ("import torch, flash_attn_triton as f\nx = torch.randn(1, 1, 8, 16)\n"
            "try: f.flash_attention(x, x, x)\nexcept ValueError as error: print(error)")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, env=environment, capture_output=True,
                          text=True)
    assert "need a CUDA GPU" in done.stdout and "TRITON_INTERPRET=1" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("flags, message", [
    (["--lengths", "64", "0"], "must be at least 1, batch at least 0, got [64, 0]"),
    (["--widths", "-1"], "must be at least 1"),
    (["--heads", "0"], "must be at least 1"),
    (["--batch", "-1"], "batch at least 0"),
    (["--dtypes", "int8"], "invalid choice: 'int8'"),
])
def test_a_mistake_on_the_command_line(monkeypatch, capsys, flags, message):
    """One line that names it, exit code 2, and nothing timed. (argparse puts its usage before the line.)"""
    monkeypatch.setattr(sys, "argv", ["flash_attn_triton.py", "--bench", *flags])
    try:
        code = flash.main()
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    assert code == 2 and message in said.err.splitlines()[-1] and not said.out, said


def test_what_does_not_fit_is_said(monkeypatch, capsys):
    """A version that runs out of memory gets a cell, arguments that do end the program in a line; other errors stay."""
    q = torch.randn(1, 1, 4, 16)
    too_large = lambda *tensors: torch.empty(1 << 48)                               # 2^50 bytes
    assert flash._times(too_large, q, q, q, q) == ["memory"] * 3
    with pytest.raises(RuntimeError, match="size"):
        flash._times(lambda q, k, v: q @ k, q, q, q, q)
    monkeypatch.setattr(flash, "_median_ms", lambda function: 1.5)
    for flags in (["--seed", 1 << 70], ["--bench", "--lengths", 1 << 34], ["--bench", "--lengths", 1 << 60]):
        monkeypatch.setattr(sys, "argv", ["flash_attn_triton.py", *map(str, flags)])
        assert flash.main() == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("flash_attn_triton.py: ")


def test_bench_prints_a_row_a_pass(monkeypatch, capsys):
    """The columns of one small cell, untimed: three passes, a median each, and none of them nothing."""
    monkeypatch.setattr(flash, "_median_ms", lambda function: function() is None or 1.5)
    flash.bench([64], [16], [torch.float32], heads=2, batch=1)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert [row[:4] for row in rows] == [["16", "64", "1", part] for part in ("forward", "backward", "both")]
    assert all("1.500" in row[4:] and row[-1].endswith("%") for row in rows)
    monkeypatch.setattr(flash, "_times", lambda *args: ["memory"] * 3)              # no time, so no rate
    flash.bench([64], [16], [torch.float32], heads=2, batch=1)
    assert capsys.readouterr().out.splitlines()[-1].split()[-4:] == ["memory", "memory", "nan", "nan%"]


def test_cost():
    """Hand count for T = 4, K = 2, one head: 2 products of 2*4*4*2 FLOPs; 4*16 + 4*8 numbers plain, 4*8 tiled."""
    assert flash.cost(1, 1, 4, 2, is_causal=False) == (128, 2 * 96, 2 * 32)
    assert flash.cost(1, 1, 4, 2)[0] == 64


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("q_shape, kv_shape", [
    ((2, 4, 512, 64), (2, 4, 512, 64)), ((1, 8, 1000, 128), (1, 2, 1000, 128)), ((1, 2, 333, 64), (1, 2, 700, 64)),
    ((1, 2, 700, 80), (1, 2, 333, 80)), ((1, 2, 500, 256), (1, 2, 500, 256)), ((1, 2, 300, 16), (1, 2, 300, 16)),
    ((1, 2, 300, 18), (1, 2, 300, 18)), ((1, 2, 1, 64), (1, 2, 4097, 64))])
def test_as_accurate_as_torch(dtype, q_shape, kv_shape):
    """Relative errors at most twice those of torch's own attention in the same dtype, plus one rounding."""
    q, k, v, do = tensors(q_shape, kv_shape, dtype)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    for is_causal in (False, True):
        if q_shape[-2] == 1 and is_causal:
            continue                                                # dQ = dK = 0
        ours = errors(FlashAttentionTriton.apply, q, k, v, do, is_causal)
        theirs = errors(lambda q, k, v, c: sdpa(q, k, v, is_causal=c, enable_gqa=q.shape[1] != k.shape[1]), q, k, v,
                        do, is_causal)
        assert all(ours[x] <= 2 * theirs[x] + 1e-7 for x in ours), (ours, theirs)


@needs_gpu
@pytest.mark.parametrize("K", [64, 128, 256])
@pytest.mark.parametrize("descriptors", [True, False])
def test_every_tile(monkeypatch, first_tile, K, descriptors):
    """Each candidate of each kernel by itself, at ragged lengths, through descriptors and through pointers."""
    monkeypatch.setattr(flash, "_descriptors_fit", lambda *args: descriptors)
    q, k, v, do = tensors((1, 4, 500, K), (1, 2, 500, K), torch.bfloat16)
    for number in range(3):
        monkeypatch.setattr(flash, "_tiles", lambda *args: (first_tile(*args) * 2)[number:][:1])
        flash._fastest.clear()
        flash._prepared.clear()
        check(FlashAttentionTriton.apply, q, k, v, do, True)


@needs_gpu
def test_more_than_2_31_elements():
    """Offsets past 2^31: the last head of 2.2e9 elements equals the same head alone."""
    B, T, K = 17, 2**20, 128
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB")
    q = torch.randn(B, 1, T, K, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(B, 1, 256, K, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = flash_attention(q, k, v, False)
    assert torch.equal(out[-1:], flash_attention(q[-1:].clone(), k[-1:].clone(), v[-1:].clone(), False))
    # rows TMA cannot take
    strided = torch.empty(B, 1, T, K + 4, device="cuda", dtype=torch.bfloat16)[..., :K].copy_(q)
    assert torch.equal(flash_attention(strided[-1:], k[-1:], v[-1:], False)[:, :, -256:],
                       flash_attention(strided, k, v, False)[-1:, :, -256:])

"""What `train.py --benchmark` is measured against: GPT-2 as one would build it from torch.nn, with torch's best pieces.

Learned positions, LayerNorm, GELU, tied head, scaled_dot_product_attention, full logits, fused AdamW, bf16 autocast.
Beside ours: python tests/peer_gpt2.py --compile   (124M, batch 64 x 1024; 350M: --width 1024 --layers 24 --batch 32)
"""
import argparse
import itertools
import statistics

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.norms = heads, nn.ModuleList(nn.LayerNorm(width, bias=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width, bias=False), nn.GELU(),
                                 nn.Linear(4 * width, width, bias=False))

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norms[0](x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norms[1](x))


class GPT2(nn.Module):
    """(B, T) tokens and targets -> mean loss."""

    def __init__(self, vocab: int, length: int, width: int, layers: int, heads: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, bias=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, x, y):
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        return F.cross_entropy(F.linear(self.norm(self.blocks(h)), self.tokens.weight).flatten(0, 1), y.flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(batch=64, length=1024, vocab=50304, width=768, layers=12, warmup=6, repeats=14).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = GPT2(args.vocab, args.length, args.width, args.layers, args.width // 64).cuda()
    count = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    loss_of = torch.compile(model) if args.compile else model
    x, y = torch.randint(args.vocab, (2, args.batch, args.length), device="cuda")
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(args.repeats + 1)]
    for i in range(args.warmup + args.repeats):
        if i >= args.warmup:
            marks[i - args.warmup].record()
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    marks[-1].record()
    torch.cuda.synchronize()
    ms = statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))
    print(f"GPT-2 of torch.nn, {count / 1e6:.1f}M, {args.batch} x {args.length}, compile {args.compile}: {ms:.1f} ms, "
          f"{args.batch * args.length / ms * 1e3:,.0f} tokens/s, {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


if __name__ == "__main__":
    main()

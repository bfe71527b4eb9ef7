"""optim.py - the optimizers of language models: SGD, AdamW, Muon; the cosine schedule; gradient clipping.

What:       AdamW three times over (a plain loop, torch's list operations, one Triton kernel over all parameters), Muon
            with its Newton-Schulz iteration, and the two things every run does around them.
Source:     AdamW: Loshchilov & Hutter, arXiv:1711.05101, Algorithm 2; Muon: Jordan et al. 2024,
            kellerjordan.github.io/posts/muon, scaled as in arXiv:2502.16982, eq. 4; cosine: arXiv:1608.03983, eq. 5.
Deviations: AdamW's decay is multiplied by the learning rate, as in torch; Muon's update is scaled so that AdamW's rate
            and decay fit it.
Copy:       this file alone; needs torch (triton only for AdamW(fused="triton")). MIT.
Run:        python optim.py
            AdamW on p = 1 with gradient 2p, lr 0.1, decay 0.1: a step is about lr, whatever the size of the gradient
              step 1: m 0.2000  v 0.0400  corrected 2.0000 / sqrt 4.0000  decay 0.0100  p 1.0000 -> 0.8900
              singular values after 5 Newton-Schulz steps: 1.119, 0.712, 0.699
            all agree with torch, and Newton-Schulz with an SVD, to 8.6e-07  OK
            python optim.py --bench --device cuda   (162M parameters in fp32, one H200, torch 2.11; ms a step)
              AdamW plain 8.83, foreach 3.95, triton 1.10, which moves 4.1 TB/s; torch's 8.29, its fused one 1.30
"""
import argparse
import itertools
import math
import sys
import time

import torch
from torch import Tensor

try:                                   # only AdamW(fused="triton") needs it
    import triton
    import triton.language as tl
except ImportError:
    triton = None


class SGD(torch.optim.Optimizer):
    """Stochastic gradient descent with a decaying rate: p <- p - lr / sqrt(t + 1) * gradient, t = 0, 1, ...

    Raises: ValueError for a negative rate. Example: p = 1, gradient 2, lr 0.1 -> 0.8, and the same again -> 0.6586
    """

    def __init__(self, params, lr: float = 1e-3):
        _check(lr=lr)
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = _evaluate(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    t = self.state[p].get("step", 0)
                    p.sub_(p.grad, alpha=group["lr"] / math.sqrt(t + 1))
                    self.state[p]["step"] = t + 1
        return loss


def _check(**numbers) -> None:
    for name, x in numbers.items():
        if name == "betas":
            if len(x) != 2 or not all(0 <= b < 1 for b in x):
                raise ValueError(f"betas must be two numbers in [0, 1), got {x}")
        elif not x >= 0:
            raise ValueError(f"{name} must be at least 0, got {x}")


def _evaluate(closure):
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _in_cache(*tensors: Tensor):
    """The tensors whole; on a CPU in slices of 2^15 numbers, which stay in its cache while a dozen operations pass."""
    if tensors[0].device.type != "cpu" or not all(x.is_contiguous() for x in tensors):
        return [tensors]
    return zip(*(x.view(-1).split(1 << 15) for x in tensors))


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay. arXiv:1711.05101, Algorithm 2.

    state_dtype: of the two moments; None keeps the parameter's. master_weights: for parameters below fp32, keep an fp32
    copy in the state, update that, and round it to the parameter (bf16 has 8 bits: a step of 1e-4 is lost without it).
    fused: None, the plain loop; "foreach", torch's list operations; "triton", one kernel over all parameters (CUDA).
    Parameters without a gradient are left alone. Raises: ValueError for bad numbers or an unknown backend, and at the
    first step for one that cannot run there (parameters may move to a GPU until then).
    Example: p = 1, gradient 2, lr 0.1, weight_decay 0.1 -> 1 - 0.1 * 0.1 - 0.1 = 0.89
    """

    def __init__(self, params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.01, state_dtype: torch.dtype | None = None, fused: str | None = None,
                 master_weights: bool = False):
        _check(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        if fused not in (None, "foreach", "triton"):
            raise ValueError(f"fused must be None, 'foreach' or 'triton', got {fused!r}")
        super().__init__(params, dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay))
        self.state_dtype, self.fused, self.master_weights = state_dtype, fused, master_weights
        self._tables: dict[int, tuple] = {}                                # of fused="triton", by first parameter
        self._owners: dict[tuple, Tensor] = {}                             # likewise, by device and sizes

    @torch.no_grad()
    def step(self, closure=None):
        loss = _evaluate(closure)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self._start(p)
            update = {None: self._plain, "foreach": self._foreach, "triton": self._triton}[self.fused]
            if params:
                update(params, group)
        return loss

    def _start(self, p: Tensor) -> None:
        m, v = (torch.zeros_like(p, dtype=self.state_dtype or p.dtype) for _ in range(2))
        self.state[p].update(step=0, exp_avg=m, exp_avg_sq=v)
        if self.master_weights and p.dtype.itemsize < 4:
            self.state[p]["master"] = p.float()

    def load_state_dict(self, state_dict):
        """As torch's, but the moments and masters keep the dtype they were saved in (torch's casts them to the
        parameter's)."""
        super().load_state_dict(state_dict)
        self._tables.clear()
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(saved, (p for group in self.param_groups for p in group["params"])):
            for name, x in state_dict["state"].get(i, {}).items():
                if torch.is_tensor(x):
                    self.state[p][name] = x.to(p.device).clone()

    def _plain(self, params: list[Tensor], group: dict) -> None:
        lr, (beta1, beta2), eps, decay = group["lr"], group["betas"], group["eps"], group["weight_decay"]
        for p in params:
            state = self.state[p]
            state["step"] += 1
            t, master = state["step"], state.get("master", p)
            for weight, grad, m, v in _in_cache(master, p.grad, state["exp_avg"], state["exp_avg_sq"]):
                grad = grad.to(m.dtype)
                weight.mul_(1 - lr * decay)                                # decay first: on the weights of step t - 1
                m.mul_(beta1).add_(grad, alpha=1 - beta1)                  # line 7
                v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)        # line 8
                denominator = (v / (1 - beta2 ** t)).sqrt_().add_(eps)     # lines 10 and 12
                weight.addcdiv_(m, denominator, value=-lr / (1 - beta1 ** t))   # lines 9 and 12
            if master is not p:
                p.copy_(master)

    def _foreach(self, params: list[Tensor], group: dict) -> None:
        """The same, each line for all parameters at once: few kernels instead of a dozen per parameter."""
        lr, (beta1, beta2), eps, decay = group["lr"], group["betas"], group["eps"], group["weight_decay"]
        states = [self.state[p] for p in params]
        for state in states:
            state["step"] += 1
        m, v = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        weights = [s.get("master", p) for s, p in zip(states, params)]
        grads = [p.grad.to(x.dtype) for p, x in zip(params, m)]
        torch._foreach_mul_(weights, 1 - lr * decay)
        torch._foreach_mul_(m, beta1)
        torch._foreach_add_(m, grads, alpha=1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, value=1 - beta2)
        denominators = torch._foreach_div(v, [1 - beta2 ** s["step"] for s in states])
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, eps)
        torch._foreach_addcdiv_(weights, m, denominators, [-lr / (1 - beta1 ** s["step"]) for s in states])
        rounded = [(p, w) for p, w in zip(params, weights) if w is not p]
        if rounded:
            torch._foreach_copy_(*map(list, zip(*rounded)))

    def _triton(self, params: list[Tensor], group: dict) -> None:
        """The same in one pass over memory: each weight, gradient and moment is read once and written once.

        The kernel finds the tensors in a table of addresses on the GPU, which is written again only when one has moved.
        """
        if triton is None or not (params[0].is_cuda or triton.knobs.runtime.interpret):
            raise ValueError("AdamW(fused='triton') needs triton and CUDA parameters; use fused='foreach' here")
        lr, eps, decay = float(group["lr"]), float(group["eps"]), group["weight_decay"]
        beta1, beta2 = map(float, group["betas"])
        states = [self.state[p] for p in params]
        for state in states:
            state["step"] += 1
        rows = [(p, p.grad.contiguous(), s["exp_avg"], s["exp_avg_sq"], s.get("master", p))
                for p, s in zip(params, states)]
        newest = states[0]["step"]                                         # a parameter may have started later
        found = [x.data_ptr() for row in rows for x in row], [newest - s["step"] for s in states]
        if self._tables.get(id(params[0]), (None,))[0] != found:
            self._tables[id(params[0])] = found, self._tabulate(rows, found[1])
        for (_, age, *dtypes, aligned, has_master), table, owners in self._tables[id(params[0])][1]:
            t = newest - age
            with torch.cuda.device_of(table):
                _adamw_kernel[(len(owners),)](
                    table, owners, 1 - lr * decay, beta1, 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1 ** t),
                    1 / (1 - beta2 ** t), eps, *dtypes, MASTER=has_master, ALIGNED=aligned, BLOCK=ADAMW_BLOCK)

    def _tabulate(self, rows: list[tuple[Tensor, ...]], ages: list[int]) -> list[tuple]:
        """For each set of tensors that one launch can do: what it has in common, addresses, each program's row."""
        launches: dict[tuple, list[tuple[Tensor, ...]]] = {}
        for age, row in zip(ages, rows):
            p, grad, m, _, master = row
            if not all(x.is_contiguous() for x in row):
                raise ValueError(f"AdamW(fused='triton') walks over memory in order, but a parameter of shape "
                                 f"{tuple(p.shape)} is not contiguous; use fused='foreach'")
            aligned = p.numel() % 16 == 0 and all(x.data_ptr() % 16 == 0 for x in row)
            dtypes = [_triton_dtype(x.dtype) for x in (p, grad, m, master)]
            launches.setdefault((p.device, age, *dtypes, aligned, master is not p), []).append(row)
        tables = []
        for common, rows in launches.items():
            blocks = [triton.cdiv(row[0].numel(), ADAMW_BLOCK) for row in rows]
            table = torch.tensor([[*(x.data_ptr() for x in row), row[0].numel(), start] for row, start in
                                  zip(rows, itertools.accumulate(blocks, initial=0))])
            if common[0].type == "cuda":                                   # pinned, so that no step waits for the copy
                table = table.pin_memory()
            if (sizes := (common[0], *blocks)) not in self._owners:        # addresses move, sizes do not
                owners = torch.arange(len(rows)).repeat_interleave(torch.tensor(blocks))   # of each program, its tensor
                self._owners[sizes] = owners.to(common[0])
            tables.append((common, table.to(common[0], non_blocking=True), self._owners[sizes]))
        return tables


ADAMW_BLOCK = 4096


def _triton_dtype(dtype: torch.dtype):
    known = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    if dtype not in known:
        raise ValueError(f"AdamW(fused='triton') has no {dtype}; use fused='foreach'")
    return known[dtype]


if triton is not None:
    @triton.jit
    def _adamw_kernel(table, owners, keep, beta1, gain1, beta2, gain2, rate, inverse_correction2, eps,
                      P: tl.constexpr, GRAD: tl.constexpr, MOMENT: tl.constexpr, WEIGHT: tl.constexpr,
                      MASTER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
        block = tl.program_id(0)
        row = table + tl.load(owners + block) * 7                          # 5 addresses, length, first block
        param = tl.load(row).to(tl.pointer_type(P))
        grad = tl.load(row + 1).to(tl.pointer_type(GRAD))
        exp_avg = tl.load(row + 2).to(tl.pointer_type(MOMENT))
        exp_avg_sq = tl.load(row + 3).to(tl.pointer_type(MOMENT))
        weight = tl.load(row + 4).to(tl.pointer_type(WEIGHT))
        length = tl.load(row + 5)
        if ALIGNED:                                                        # lets a thread move 16 bytes at a time
            param, grad, weight = tl.multiple_of(param, 16), tl.multiple_of(grad, 16), tl.multiple_of(weight, 16)
            exp_avg, exp_avg_sq = tl.multiple_of(exp_avg, 16), tl.multiple_of(exp_avg_sq, 16)
            length = tl.multiple_of(length, 16)
        at = (block - tl.load(row + 6)) * BLOCK + tl.arange(0, BLOCK)
        mask = at < length
        g = tl.load(grad + at, mask=mask, other=0.0).to(MOMENT).to(tl.float32)
        m = tl.load(exp_avg + at, mask=mask, other=0.0).to(tl.float32) * beta1 + g * gain1
        v = tl.load(exp_avg_sq + at, mask=mask, other=0.0).to(tl.float32) * beta2 + g * g * gain2
        w = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32) * keep
        w -= rate * m / (tl.sqrt(v * inverse_correction2) + eps)
        tl.store(exp_avg + at, m.to(MOMENT), mask=mask)
        tl.store(exp_avg_sq + at, v.to(MOMENT), mask=mask)
        tl.store(weight + at, w.to(WEIGHT), mask=mask)
        if MASTER:
            tl.store(param + at, w.to(P), mask=mask)


def newton_schulz(x: Tensor, steps: int = 5) -> Tensor:
    """Roughly the nearest matrix with orthonormal rows (or columns): every singular value is driven towards 1.

    x (..., m, n); returns the same shape, singular values of about 0.7 to 1.2. An odd polynomial acts on them alone, so
    a x + b (x x^T) x + c (x x^T)^2 x needs no decomposition; these coefficients climb fastest from 0.
    bf16 on a GPU, x's dtype elsewhere. Source: kellerjordan.github.io/posts/muon.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    y = x.to(torch.bfloat16) if x.is_cuda else x
    wide = y.shape[-2] <= y.shape[-1]
    y = y if wide else y.mT                                              # the smaller Gram matrix
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)           # the polynomial wants singular values up to 1
    for _ in range(steps):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return (y if wide else y.mT).to(x.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for the matrices inside the blocks; AdamW for all the rest.

    params: model.named_parameters(). Matrices (two dimensions) go to Muon unless their name has one of `adamw_names` in
    it: an embedding's or head's rows are looked up or compared one by one, and need not be orthogonal.
    The update is scaled by 0.2 sqrt(max(rows, columns)), AdamW's usual size, so one learning rate and decay serve both
    (arXiv:2502.16982, eq. 4). momentum and betas, eps: of the two parts. Weights in fp32, as it keeps no master copy.
    Raises: ValueError if params have no names; AssertionError unless each parameter is in exactly one group.
    Example: Muon(model.named_parameters(), lr=4e-3, weight_decay=0.1), where AdamW(model.parameters(), ...) was before
    """

    def __init__(self, params, lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.01, ns_steps: int = 5,
                 nesterov: bool = True, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 adamw_names: tuple[str, ...] = ("embedding", "lm_head")):
        _check(lr=lr, momentum=momentum, weight_decay=weight_decay, betas=betas, eps=eps)
        params = list(params)
        if not params or not all(isinstance(x, tuple) and len(x) == 2 for x in params):
            raise ValueError("Muon needs names to tell matrices from tables: pass model.named_parameters()")
        everything = [p for _, p in params]
        matrices = [p for name, p in params if p.dim() == 2 and not any(word in name for word in adamw_names)]
        rest = [p for p in everything if not any(p is m for m in matrices)]
        assert sorted(map(id, matrices + rest)) == sorted(set(map(id, everything))), "a parameter in two groups"
        both = dict(lr=lr, weight_decay=weight_decay)
        super().__init__([dict(params=g, kind=k, **both) for g, k in ((matrices, "muon"), (rest, "adamw")) if g],
                         dict(momentum=momentum, nesterov=nesterov, ns_steps=ns_steps, betas=tuple(betas), eps=eps))

    @torch.no_grad()
    def step(self, closure=None):
        loss = _evaluate(closure)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["kind"] == "adamw":
                for p in params:
                    if not self.state[p]:
                        self.state[p].update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                AdamW._plain(self, params, group)
            else:
                self._muon(params, group)
        return loss

    def _muon(self, params: list[Tensor], group: dict) -> None:
        for p in params:
            average = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            average.lerp_(p.grad, 1 - group["momentum"])
            update = p.grad.lerp(average, group["momentum"]) if group["nesterov"] else average
            update = newton_schulz(update, group["ns_steps"])
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(update, alpha=group["lr"] * 0.2 * math.sqrt(max(p.shape)))


def cosine_lr(step: int, max_lr: float, min_lr: float, warmup_steps: int, total_steps: int) -> float:
    """Linear from 0 to max_lr over warmup_steps, then half a cosine down to min_lr at total_steps, then min_lr.

    With warmup_steps = total_steps, that step itself has max_lr. arXiv:1608.03983, eq. 5.
    Example: cosine_lr(55, 1.0, 0.1, 10, 100) -> 0.55, halfway down
    """
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"want 0 <= warmup_steps <= total_steps, got {warmup_steps} and {total_steps}")
    if step < warmup_steps:
        return max_lr * max(step, 0) / warmup_steps
    if step > total_steps:
        return min_lr
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (max_lr - min_lr)


@torch.no_grad()
def clip_grad_norm_(parameters, max_norm: float, eps: float = 1e-6, error_if_nonfinite: bool = True) -> Tensor:
    """Scale all gradients by one factor so that their joint L2 norm is at most max_norm; returns the norm before that.

    Parameters without gradient are skipped. The norm is summed in fp32 (a sum of squares in bf16 stops growing after a
    few hundred terms), on a CPU slice by slice: there torch's sum of 5 million squares is 1e-4 to 1e-3 too small, which
    a run that is close to unstable feels. Raises: ValueError for a norm that is not finite, unless error_if_nonfinite
    is False: looking costs a GPU one wait a step, so a loop that watches its loss may switch it off.
    Example: gradient [3, 4], max_norm 1 -> returns 5, leaves [0.6, 0.8]
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be above 0, got {max_norm}")
    parameters = [parameters] if torch.is_tensor(parameters) else parameters
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    pieces = [piece for g in grads for piece, in _in_cache(g)]
    norm = torch.stack([n.to(grads[0].device) for n in torch._foreach_norm(pieces, 2, dtype=torch.float32)]).norm()
    if error_if_nonfinite and not torch.isfinite(norm):
        raise ValueError(f"the gradient norm is {norm.item()}: look at the loss, the learning rate and the data; "
                         "error_if_nonfinite=False clips on regardless")
    torch._foreach_mul_(grads, (max_norm / (norm + eps)).clamp(max=1.0))
    return norm


def walk_through() -> None:
    """One number, three steps of AdamW; one matrix, orthogonalised; one schedule."""
    p = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = AdamW([p], lr=0.1, betas=(0.9, 0.99), weight_decay=0.1)
    print("AdamW on p = 1 with gradient 2p, lr 0.1, decay 0.1: a step is about lr, whatever the size of the gradient")
    for t in range(1, 4):
        p.grad = 2 * p.detach()
        before = p.item()
        optimizer.step()
        m, v = optimizer.state[p]["exp_avg"].item(), optimizer.state[p]["exp_avg_sq"].item()
        print(f"  step {t}: m {m:.4f}  v {v:.4f}  corrected {m / (1 - 0.9 ** t):.4f} / sqrt {v / (1 - 0.99 ** t):.4f}"
              f"  decay {0.1 * 0.1 * before:.4f}  p {before:.4f} -> {p.item():.4f}")
    x = torch.diag(torch.tensor([1.0, 0.5, 0.1]))
    for steps in (0, 1, 3, 5):
        print(f"  singular values after {steps} Newton-Schulz steps: " +
              ", ".join(f"{s:.3f}" for s in torch.linalg.svdvals(newton_schulz(x, steps)).tolist()))
    print("  cosine, warm-up 10 of 100 steps, 1.0 down to 0.1: " +
          ", ".join(f"{step}: {cosine_lr(step, 1.0, 0.1, 10, 100):.2f}" for step in (0, 5, 10, 55, 100, 200)))


def self_check(seed: int = 0) -> float:
    """Largest difference between each AdamW and torch's after 20 steps, clipping and torch's, Newton-Schulz and an SVD.

    Raises: AssertionError above 2e-6: the numbers are of size 1 in fp32. Decay after the update is off by 1e-4.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes, settings = [(5, 7), (3,), (2, 3, 4)], dict(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(20)]

    def run(make):
        params = [torch.nn.Parameter(x.clone()) for x in start]
        optimizer = make(params)
        for step in gradients:
            for p, g in zip(params, step):
                p.grad = g.clone()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in params])
    backends = [None, "foreach"] + ["triton"] * bool(triton and triton.knobs.runtime.interpret)
    oracle = run(lambda p: torch.optim.AdamW(p, **settings))
    worst = max((run(lambda p: AdamW(p, **settings, fused=f)) - oracle).abs().max().item() for f in backends)
    params = [torch.nn.Parameter(x.clone()) for x in start]
    for p, g in zip(params, gradients[0]):
        p.grad = g.clone()
    norm = clip_grad_norm_(params, 1.0)
    flat = torch.cat([g.flatten() for g in gradients[0]])
    clipped = torch.cat([p.grad.flatten() for p in params])
    worst = max(worst, abs(norm.item() - flat.norm().item()), abs(clipped.norm().item() - 1))
    x = torch.randn(4, 6, generator=generator)
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
    worst = max(worst, (newton_schulz(x) - u @ s.diag() @ vt).abs().max().item())
    assert worst < 2e-6, f"an optimizer is off by {worst:.1e}"
    return worst


def bench(device: str = "cpu", repeats: int = 20) -> None:
    """Milliseconds of one AdamW step on the parameters of a 124M model (a tenth of it on a CPU), clipping and Muon."""
    cuda, layers = device != "cpu", 12 if device != "cpu" else 1
    block = [(768, 768)] * 4 + [(2048, 768)] * 2 + [(768, 2048), (768,), (768,)]
    shapes = [(50304 if cuda else 4096, 768)] * 2 + layers * block
    count = sum(math.prod(s) for s in shapes)
    where = torch.cuda.get_device_name() if cuda else "CPU"
    print(f"{count / 1e6:.0f}M parameters in {len(shapes)} tensors, {where}, torch {torch.__version__}")

    event = lambda: torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))
    mark = event if cuda else time.perf_counter

    def row(name, dtype, step, bytes_each):
        params = [torch.nn.Parameter(torch.randn(s, device=device, dtype=dtype) * 0.02) for s in shapes]
        for p in params:
            p.grad = torch.randn_like(p)
        step = step(params)
        for _ in range(3):
            step()
        if cuda:
            torch.cuda.synchronize()
        marks, start = [mark()], time.perf_counter()
        for _ in range(repeats):                                           # without waits in between, as in a real run
            step()
            marks.append(mark())
        host = (time.perf_counter() - start) * 1e3 / repeats
        if cuda:
            torch.cuda.synchronize()
        times = sorted(a.elapsed_time(b) if cuda else (b - a) * 1e3 for a, b in itertools.pairwise(marks))
        ms = times[len(times) // 2]
        rate = bytes_each * count / ms / 1e6
        print(f"{name:34s} {ms:8.2f} ms  (min {times[0]:.2f}, max {times[-1]:.2f})  {rate:7.1f} GB/s of the "
              f"{bytes_each} bytes a parameter it must move{f'; Python {host:.2f} ms' if cuda else ''}", flush=True)
    kinds = [(f"AdamW {f or 'plain'}", f) for f in (None, "foreach", *["triton"] * cuda)]
    for name, fused in kinds:
        row(f"{name}, fp32", torch.float32, lambda p: AdamW(p, fused=fused).step, 28)
    row("torch.optim.AdamW, fp32", torch.float32, lambda p: torch.optim.AdamW(p, foreach=False).step, 28)
    row("torch.optim.AdamW(fused), fp32", torch.float32, lambda p: torch.optim.AdamW(p, fused=True).step, 28)
    for name, fused in kinds:
        row(f"{name}, bf16 + fp32 master", torch.bfloat16,
            lambda p: AdamW(p, fused=fused, state_dtype=torch.float32, master_weights=True).step, 28)
    row("clip_grad_norm_, fp32", torch.float32, lambda p: lambda: clip_grad_norm_(p, 1.0), 12)
    name = lambda i: f"embedding.{i}" if i < 2 else f"layer.{i}"
    row("Muon, fp32", torch.float32, lambda p: Muon((name(i), x) for i, x in enumerate(p)).step, 20)


def main() -> int:
    """The command line. Returns: the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bench", action="store_true", help="time the optimizers side by side")
    parser.add_argument("--device", default="cpu", help="of --bench",
                        choices=["cpu"] + ["cuda"] * torch.cuda.is_available())
    args = parser.parse_args()
    if args.bench:
        bench(args.device)
        return 0
    walk_through()
    print(f"all agree with torch, and Newton-Schulz with an SVD, to {self_check(args.seed):.1e}  OK")
    return 0


if __name__ == "__main__":
    sys.exit(main())

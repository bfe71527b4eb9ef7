"""optim.py - the optimizers of language models: SGD, AdamW, Muon; the cosine schedule; gradient clipping.

What:       AdamW three times over (a plain loop, torch's list operations, one Triton kernel over all parameters), Muon
            with its Newton-Schulz iteration, and the two things every run does around them.
Source:     AdamW: Loshchilov & Hutter, arXiv:1711.05101, Algorithm 2; Muon: Jordan et al. 2024,
            kellerjordan.github.io/posts/muon, scaled as in arXiv:2502.16982, eq. 4; cosine: arXiv:1608.03983, eq. 5.
Deviations: AdamW's decay is multiplied by the learning rate, as in torch; Muon's update is scaled so that AdamW's learning
            rate and decay fit it.
Copy:       this file alone; needs torch (triton only for AdamW(fused="triton")). MIT.
Run:        python optim.py
"""
import argparse
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
    """Stochastic gradient descent with a decaying rate: p <- p - lr / sqrt(t + 1) * gradient, t = 0, 1, ..."""

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


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay. arXiv:1711.05101, Algorithm 2.

    state_dtype: of the two moments; None keeps the parameter's. master_weights: for parameters below fp32, keep an fp32
    copy in the state, update that, and round it to the parameter (bf16 has 8 bits: a step of lr 1e-4 is lost without it).
    fused: None, the plain loop; "foreach", torch's list operations; "triton", one kernel over all parameters (CUDA).
    Parameters without a gradient are left alone. Raises: ValueError for numbers out of range or a backend that cannot run.
    """

    def __init__(self, params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.01, state_dtype: torch.dtype | None = None, fused: str | None = None,
                 master_weights: bool = False):
        _check(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        if fused not in (None, "foreach", "triton"):
            raise ValueError(f"fused must be None, 'foreach' or 'triton', got {fused!r}")
        super().__init__(params, dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay))
        self.state_dtype, self.fused, self.master_weights = state_dtype, fused, master_weights

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
        dtype = self.state_dtype or p.dtype
        self.state[p].update(step=0, exp_avg=torch.zeros_like(p, dtype=dtype), exp_avg_sq=torch.zeros_like(p, dtype=dtype))
        if self.master_weights and p.dtype.itemsize < 4:
            self.state[p]["master"] = p.float()

    def load_state_dict(self, state_dict):
        """As torch's, but the moments and masters keep the dtype they were saved in (torch's casts them to the
        parameter's)."""
        super().load_state_dict(state_dict)
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
            t, m, v = state["step"], state["exp_avg"], state["exp_avg_sq"]
            weight, grad = state.get("master", p), p.grad.to(m.dtype)
            weight.mul_(1 - lr * decay)                                    # decay first: on the weights of step t - 1
            m.mul_(beta1).add_(grad, alpha=1 - beta1)                      # line 7
            v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)            # line 8
            denominator = (v / (1 - beta2 ** t)).sqrt_().add_(eps)         # lines 10 and 12
            weight.sub_((m / denominator).mul_(lr / (1 - beta1 ** t)))     # lines 9 and 12
            if weight is not p:
                p.copy_(weight)

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
        updates = torch._foreach_div(m, denominators)
        torch._foreach_mul_(updates, [lr / (1 - beta1 ** s["step"]) for s in states])
        torch._foreach_sub_(weights, updates)
        rounded = [(p, w) for p, w in zip(params, weights) if w is not p]
        if rounded:
            torch._foreach_copy_(*map(list, zip(*rounded)))


    def _triton(self, params: list[Tensor], group: dict) -> None:
        """The same in one pass over memory: each weight, gradient and moment is read once and written once."""
        if triton is None or not (params[0].is_cuda or triton.knobs.runtime.interpret):
            raise ValueError("AdamW(fused='triton') needs triton and CUDA parameters; use fused='foreach' here")
        lr, (beta1, beta2), eps, decay = group["lr"], group["betas"], group["eps"], group["weight_decay"]
        launches: dict[tuple, list[list[Tensor]]] = {}                     # tensors of the same dtypes, step and device
        for p in params:
            state = self.state[p]
            state["step"] += 1
            if not p.is_contiguous():
                raise ValueError(f"AdamW(fused='triton') walks over memory in order, but a parameter of shape "
                                 f"{tuple(p.shape)} is not contiguous; use fused='foreach'")
            tensors = [p, p.grad.contiguous(), state["exp_avg"], state["exp_avg_sq"], state.get("master", p)]
            launches.setdefault((*(x.dtype for x in tensors), state["step"], p.device), []).append(tensors)
        for (*_, t, device), rows in launches.items():
            first_blocks, owners = [], []                                  # a program finds its tensor by number
            for i, (p, *_) in enumerate(rows):
                first_blocks.append(len(owners))
                owners += [i] * triton.cdiv(p.numel(), ADAMW_BLOCK)
            pointers = [x.data_ptr() for tensors in rows for x in tensors]
            aligned = all(x % 16 == 0 for x in pointers)
            table = torch.tensor([[*pointers[5 * i:5 * i + 5], p.numel(), first_blocks[i]] for i, (p, *_) in enumerate(rows)])
            table, owners = table.to(device), torch.tensor(owners, dtype=torch.int32).to(device)
            p, grad, m, _, master = rows[0]
            dtypes = [_triton_dtype(x.dtype) for x in (p, grad, m, master)]
            with torch.cuda.device_of(p):
                _adamw_kernel[(len(owners),)](
                    table, owners, 1 - lr * decay, beta1, 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1 ** t),
                    1 / (1 - beta2 ** t), float(eps), *dtypes, MASTER=master is not p, ALIGNED=aligned, BLOCK=ADAMW_BLOCK)


ADAMW_BLOCK = 4096


def _triton_dtype(dtype: torch.dtype):
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


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
        if ALIGNED:                                                        # an address out of a table has lost its alignment
            param, grad, weight = tl.multiple_of(param, 16), tl.multiple_of(grad, 16), tl.multiple_of(weight, 16)
            exp_avg, exp_avg_sq = tl.multiple_of(exp_avg, 16), tl.multiple_of(exp_avg_sq, 16)
        at = (block - tl.load(row + 6)) * BLOCK + tl.arange(0, BLOCK)
        mask = at < tl.load(row + 5)
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

    x (..., m, n); returns the same shape, singular values within about [0.7, 1.2]. An odd polynomial acts on the singular
    values alone, so a x + b (x x^T) x + c (x x^T)^2 x needs no decomposition; these coefficients climb fastest from 0.
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

    params: model.named_parameters(). Matrices (two dimensions) go to Muon unless their name has one of `adamw_names` in it:
    an embedding's or head's rows are looked up or compared one by one, and have no business being made orthogonal.
    The update is scaled by 0.2 sqrt(max(rows, columns)), AdamW's usual size, so one learning rate and decay serve both
    (arXiv:2502.16982, eq. 4). momentum and betas, eps: of the two parts.
    Raises: ValueError if params have no names; AssertionError unless each parameter is in exactly one group.
    """

    def __init__(self, params, lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.01, ns_steps: int = 5,
                 nesterov: bool = True, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 adamw_names: tuple[str, ...] = ("embedding", "lm_head")):
        _check(lr=lr, momentum=momentum, weight_decay=weight_decay, betas=betas, eps=eps)
        params = list(params)
        if not params or not all(isinstance(x, tuple) and len(x) == 2 for x in params):
            raise ValueError("Muon needs names to tell matrices from tables: pass model.named_parameters()")
        matrices = [p for name, p in params if p.dim() == 2 and not any(word in name for word in adamw_names)]
        rest = [p for name, p in params if not any(p is m for m in matrices)]
        assert sorted(map(id, matrices + rest)) == sorted({id(p) for _, p in params}), "a parameter in two groups or none"
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

    Parameters without gradient are skipped. The norm is summed in fp32 (a sum of squares in bf16 stops growing after a few
    hundred terms). Raises: ValueError for a norm that is not finite, unless error_if_nonfinite is False; looking costs a GPU
    one wait a step, so a loop that watches its loss may switch it off.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be above 0, got {max_norm}")
    parameters = [parameters] if torch.is_tensor(parameters) else parameters
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    norm = torch.stack([n.to(grads[0].device) for n in torch._foreach_norm(grads, 2, dtype=torch.float32)]).norm()
    if error_if_nonfinite and not torch.isfinite(norm):
        raise ValueError(f"the gradient norm is {norm.item()}: look at the loss, the learning rate and the data; "
                         "error_if_nonfinite=False clips on regardless")
    torch._foreach_mul_(grads, (max_norm / (norm + eps)).clamp(max=1.0))
    return norm

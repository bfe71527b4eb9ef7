"""scaling.py - scaling laws at home: the fits, a training API with a budget, and a prediction that is then checked.

What:       Power-law, IsoFLOP and parametric fits in numpy; an HTTP server that trains models for a budget, in both
            protocols of Stanford CS336's scaling assignment (2025: GET /loss; 2026: POST /submit); a client; and the
            main job, `run`: sweep small models, fit, predict one of 8 times the compute, train it, compare.
Source:     Hoffmann et al. 2022 (Chinchilla), arXiv:2203.15556, section 3 and appendix D.3; Kaplan et al. 2020,
            arXiv:2001.08361, figure 5 and D.6 (the `law` backend); learning rates: Yang et al. 2022, arXiv:2203.03466
            (as 1 / width), and Bjorck et al. 2024, arXiv:2409.19913 (as D^-0.32).
Deviations: 1. The parametric fit runs Levenberg-Marquardt from the best 48 of Chinchilla's 4,500 starts, not L-BFGS
            from all. 2. In real training N counts every weight that multiplies, so the head but not the input table.
            3. /loss also tells backend, parameters and tokens; every answer has the header X-Backend.
Copy:       this file alone; needs numpy. `--backend train` also wants model.py, optim.py, train.py, bpe.py and torch.
Run:        python scaling.py                          the fits on made-up runs, what goes wrong, the self-check
            python scaling.py run --backend train      the main job, 10 minutes on two CPU cores: settled on seeds 0
            to 5, off by -0.3, -0.8, +0.2% on 6, 7, 8; on an H200 by +0.6% for 1e17 FLOPs (+2.7% without dedup.py):
            --tokens DIR --dtype bfloat16 --compile --context-length 64 --batch-size 256 --workers 4 --rate 0.0832
            --budgets 8e14,2e15,5e15,1.25e16 --widths 256,320,384,512,640,768,896,1024,1152
            python scaling.py serve &                  for the course's client, curl, `sweep` (serve --ranges home) and
            scaling.py query d_model=512 num_layers=8 num_heads=8 batch_size=128 train_flops=1e15 learning_rate=1e-3
"""
import argparse
import json
import math
import multiprocessing
import os
import re
import socket
import sqlite3
import sys
import threading
import time
import timeit
import urllib.request
import warnings
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

import numpy as np

# Dims: N parameters, D tokens, C = 6 N D FLOPs, n runs, S starts of a fit, d model width, L layers, V vocabulary

# ---------------------------------------------------------------------------------------------------------- 1. the fits
def columns(minimum: int, **named) -> list[np.ndarray]:
    """The named sequences as float64 (n,). Raises: ValueError unless equally long, positive, finite, n >= minimum."""
    arrays = [np.asarray(values, dtype=np.float64).ravel() for values in named.values()]
    if len(set(map(len, arrays))) > 1 or len(arrays[0]) < minimum:
        raise ValueError(f"{', '.join(named)} need one value a run, at least {minimum} runs; got {[*map(len, arrays)]}")
    for name, array in zip(named, arrays):
        if len(bad := array[~(np.isfinite(array) & (array > 0))]):
            raise ValueError(f"{name} must be positive and finite, a logarithm is taken; got {bad[0]}, drop that run")
    return arrays

class PowerLaw(namedtuple("PowerLaw", "coefficient exponent r2 coefficient_error exponent_error")):
    """y = coefficient * x ** exponent, R2 of log y, and one standard error of each (to first order; NaN from two x)."""

    def __call__(self, x):
        return self.coefficient * np.asarray(x, dtype=np.float64) ** self.exponent

def fit_power_law(x, y) -> PowerLaw:
    """Least squares on log y = log coefficient + exponent * log x. Raises: ValueError as columns, and on one x alone.

    Example: fit_power_law([1, 10, 100], [3, 30, 300]) -> coefficient 3, exponent 1, r2 1
    """
    x, y = columns(1, x=x, y=y)
    u, v, n = np.log(x), np.log(y), len(x)
    if np.ptp(u) < 1e-12:
        raise ValueError(f"needs at least two distinct x, got only {x[0]:g}; a line needs two points")
    du, dv = u - u.mean(), v - v.mean()
    exponent = du @ dv / (du @ du)
    coefficient, residual = np.exp(v.mean() - exponent * u.mean()), ((dv - exponent * du) ** 2).sum()
    error = math.sqrt(residual / (n - 2) / (du @ du)) if n > 2 else math.nan
    r2 = 1 - residual / (dv @ dv) if dv @ dv > 1e-24 else 1.0
    return PowerLaw(*map(float, (coefficient, exponent, r2, coefficient * error * np.sqrt((u * u).mean()), error)))

Optima = namedtuple("Optima", "C N D loss")                              # arrays, of a value per budget

def isoflop_optima(N, C, loss, method: str = "parabola") -> Optima:
    """The best size N of every budget C, ascending, with D = C / 6N and the loss there (Chinchilla, approach 2).
    Example: isoflop_optima([1e6, 2e6, 4e6], [6e14] * 3, [4, 3, 4]) -> C [6e14], N [2e6], D [5e7], loss [3]
    Args: N parameters, C FLOPs (a budget: equal to six digits), loss nats, of each run. method: "min" takes the lowest
          run; "parabola" the vertex of a quadratic in log N, with a warning when that lies outside the sampled sizes or
          opens downward ("min" then stands in). Raises: ValueError as columns, on another method, on under 3 sizes.
    """
    if method not in ("min", "parabola"):
        raise ValueError(f'method must be "min" or "parabola", got {method!r}')
    (N, C, loss), rows = columns(1, N=N, C=C, loss=loss), []
    rounded = np.array([float(f"{c:.6g}") for c in C])
    for budget in np.unique(rounded):
        u, losses = np.log(N[rounded == budget]), loss[rounded == budget]
        best, best_loss, low, high = u[losses.argmin()], losses.min(), u.min(), u.max()
        if method == "parabola":
            if (sizes := len(np.unique(u))) < 3:
                raise ValueError(f'budget {budget:g} has {sizes} distinct sizes; a parabola needs 3, "min" needs 1')
            c2, c1, c0 = np.polyfit((u - u.mean()) / (high - low), losses, 2)      # centred and scaled
            if c2 > 1e-12 * best_loss:
                best, best_loss = u.mean() - (high - low) * c1 / (2 * c2), c0 - c1 ** 2 / (4 * c2)
            else:
                warnings.warn(f"budget {budget:g}: the parabola opens downward; took the lowest run", stacklevel=2)
        if not low <= best <= high:
            warnings.warn(f"budget {budget:g}: the vertex N {math.exp(best):.4g} lies outside the sampled "
                          f"{math.exp(low):.4g}..{math.exp(high):.4g}; add sizes there", stacklevel=2)
        rows.append((budget, np.exp(best), budget / 6 / np.exp(best), best_loss))
    return Optima(*np.array(rows).T)

class ParametricLaw(namedtuple("ParametricLaw", "E A B alpha beta objective intervals", defaults=(0.0, {}))):
    """L(N, D) = E + A / N**alpha + B / D**beta, nats a token; the mean Huber loss reached; 95% intervals by name."""

    def __call__(self, N, D):
        return self.E + self.A / np.asarray(N, float) ** self.alpha + self.B / np.asarray(D, float) ** self.beta

    def optimal(self, C) -> tuple[np.ndarray, np.ndarray]:
        """(N, D) of the least loss with 6 N D = C, where dL/dN is 0 along the budget. Chinchilla, equation 4."""
        G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        N = G * (np.asarray(C, float) / 6) ** (self.beta / (self.alpha + self.beta))
        return N, np.asarray(C, float) / (6 * N)

CHINCHILLA = ParametricLaw(1.69, 406.4, 410.7, 0.34, 0.28)               # equation 10

def huber_fit(theta: np.ndarray, u, v, y, weight, delta: float, steps: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Levenberg-Marquardt on the Huber loss of log L, from S starts: least squares, r weighing min(1, delta / |r|).

    Args: theta (S, 5) log A, log B, log E, alpha, beta; u, v, y (n,) log N, log D, log L; weight (S, n) of each run.
    Returns: theta (S, 5); the weighted mean Huber loss (S,).
    """
    def evaluate(theta):
        a, b, e, alpha, beta = theta.T[:, :, None]
        terms = np.stack([a - alpha * u, b - beta * v, e + 0 * u])       # (3, S, n) logs of the terms of L
        r = np.logaddexp.reduce(terms) - y                               # Chinchilla, equation 3
        share, size = np.exp(terms - (r + y)), np.abs(r)                 # share: d log L / d log term
        huber = np.where(size <= delta, r * r / 2, delta * (size - delta / 2))
        jacobian = np.stack([*share, -u * share[0], -v * share[1]], -1)  # (S, n, 5)
        return (weight * huber).sum(1) / weight.sum(1), r, jacobian
    theta, damping = theta.copy(), np.full(len(theta), 1e-2)
    value, r, jacobian = evaluate(theta)
    for _ in range(steps):
        weighted = jacobian * (weight * np.minimum(1, delta / np.maximum(np.abs(r), 1e-300)))[..., None]
        hessian = np.einsum("sni,snj->sij", weighted, jacobian)
        diagonal = damping[:, None] * np.einsum("sii->si", hessian) + 1e-14
        gradient = np.einsum("sni,sn->si", weighted, r)[..., None]
        trial = theta - np.linalg.solve(hessian + diagonal[..., None] * np.eye(5), gradient)[..., 0].clip(-2, 2)
        trial[:, 3:] = trial[:, 3:].clip(1e-3)                           # a loss that grows with N or D is no law
        tried = evaluate(trial)
        better = tried[0] < value
        for old, new in zip((theta, value, r, jacobian), (trial, *tried)):
            old[better] = new[better]
        damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-12, 1e12)
        if (damping >= 1e12).all() or value.max() < 1e-28:
            break
    return theta, value

def fit_parametric(N, D, loss, *, delta: float = 1e-3, bootstrap: int = 0, seed: int = 0) -> ParametricLaw:
    """The five constants of L = E + A/N^alpha + B/D^beta, by Huber loss on log L (Chinchilla, approach 3 and D.3).
    Example: N, C, loss = chinchilla_runs(); fit_parametric(N, C / (6 * N), loss) -> E 1.69, A 406.4, B 410.7, ...
    Args: N parameters, D tokens, loss nats, of at least 5 runs. delta: where the Huber loss turns from squares to
          absolute values. bootstrap: how many times the runs are drawn again for the 95% intervals, 0 for none.
    Raises: ValueError as columns, and on one N or one D alone.
    """
    u, v, y = map(np.log, columns(5, N=N, D=D, loss=loss))
    if np.ptp(u) < 1e-9 or np.ptp(v) < 1e-9:
        raise ValueError("needs at least two distinct N and two distinct D; a term that never moves cannot be fitted")
    fives, halves = np.arange(0, 30, 5), np.arange(0, 2.5, 0.5)
    grid = np.array(np.meshgrid(fives, fives, halves - 1, halves, halves)).reshape(5, -1).T      # (4500, 5)
    once, intervals = np.ones((len(grid), len(u))), {}
    _, value = huber_fit(grid, u, v, y, once, delta, steps=0)
    theta, value = huber_fit(grid[value.argsort()[:48]], u, v, y, once[:48], delta)
    best, constants = theta[value.argmin()], lambda theta: np.hstack([np.exp(theta[:, [2, 0, 1]]), theta[:, 3:]])
    if bootstrap:
        drawn = np.random.default_rng(seed).multinomial(len(u), np.full(len(u), 1 / len(u)), size=bootstrap)
        again, _ = huber_fit(np.tile(best, (bootstrap, 1)), u, v, y, drawn, delta)
        ends = np.percentile(constants(again), [2.5, 97.5], axis=0).T.tolist()
        intervals = dict(zip(ParametricLaw._fields, map(tuple, ends)))
    return ParametricLaw(*constants(best[None])[0].tolist(), float(value.min()), intervals)

# --------------------------------------------------------------------------------------- 2. the approaches side by side
def compare(N, C, loss, picture: Path | None = None) -> tuple[Optima, ParametricLaw]:
    """Prints, and draws, the three approaches on the same runs (n,). Returns: the parabolas' vertices, the law."""
    N, C, loss = columns(5, N=N, C=C, loss=loss)
    lowest, best = isoflop_optima(N, C, loss, "min"), isoflop_optima(N, C, loss, "parabola")
    law = fit_parametric(N, C / (6 * N), loss, delta=0.01, bootstrap=200)          # 1%: more than a run's noise
    print("budget    N:loss of each run; vertex of the parabola")
    for budget, vertex, _, value in zip(*best):
        curve = sorted((n, y) for n, c, y in zip(N, C, loss) if math.isclose(c, budget, rel_tol=1e-5))
        print(f"{budget:8.3g} {''.join(f'{n:9.3g}:{y:.3f}' for n, y in curve)}  vertex {vertex:.3g}:{value:.3f}")
    far, a = C.max() * np.array([10, 100]), law.beta / (law.alpha + law.beta)
    rows = [("parametric", a, *law.optimal(far)[0], *law(*law.optimal(far)))]
    for name, optima in (("min", lowest), ("parabola", best)):
        size = fit_power_law(optima.C, optima.N)
        rows.append((name, size.exponent, *size(far), *fit_power_law(optima.C, optima.loss)(far)))
    print("\napproach    N_opt ~ C^a   D_opt ~ C^(1-a)    N, loss at 10x the largest budget       at 100x")
    for name, a, n10, n100, loss10, loss100 in rows:
        print(f"{name:12s}{a:11.3f}{1 - a:18.3f}{n10:19.3g}{loss10:8.3f}{n100:18.3g}{loss100:8.3f}")
    print("with", ", ".join(f"{name} {value:.4g} ({low:.4g} to {high:.4g})"
                            for value, (name, (low, high)) in zip(law, law.intervals.items())))
    if picture:
        draw(N, C, loss, best, law, picture)
    return best, law

def draw(N, C, loss, best: Optima, law: ParametricLaw, path: Path) -> None:
    """A PNG: the runs of each budget, the parametric fit through them and the vertices; N_opt and D_opt against C."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no picture: pip install matplotlib draws one")
    left, right = (figure := Figure(figsize=(11, 4.2), layout="tight")).subplots(1, 2)
    left.set(xlabel="N", ylabel="loss (nats a token)")
    right.set(xlabel="C (FLOPs)", ylabel="N_opt (blue), D_opt (orange)")
    for i, budget in enumerate(best.C):
        n = np.sort(N[same := np.isclose(C, budget, 1e-5)])
        left.semilogx(N[same], loss[same], f"C{i}o", n, law(n, budget / (6 * n)), f"C{i}-")
    left.semilogx(best.N, best.loss, "k*")
    N_line, D_line = law.optimal(best.C)
    right.loglog(best.C, best.N, "C0o", best.C, N_line, "C0", best.C, best.D, "C1o", best.C, D_line, "C1")
    figure.savefig(part := path.with_suffix(".part"), format="png", dpi=130)
    os.replace(part, path)
    print(f"picture: {path}")

def chinchilla_runs(seed: int = 0, noise: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """N, C, loss (35,) of 5 budgets x 7 sizes from one ladder of models: CHINCHILLA times exp(noise * normal)."""
    C = np.repeat([1e17, 3e17, 1e18, 3e18, 1e19], 7)
    N = 1e6 * 2.5 ** (np.tile(np.arange(7), 5) + np.repeat([0, 1, 1, 2, 3], 7))
    return N, C, CHINCHILLA(N, C / (6 * N)) * np.exp(noise * np.random.default_rng(seed).standard_normal(35))

def walk_through(seed: int = 0) -> None:
    """The three approaches on runs made from a known law, two ways to go wrong, and the self-check."""
    print("35 runs made from L = 1.69 + 406.4/N^0.34 + 410.7/D^0.28 with 0.5% noise; in truth N_opt ~ C^0.452\n")
    compare(*chinchilla_runs(seed, 0.005))
    found = []
    for again in range(20):
        best, lowest = (isoflop_optima(*chinchilla_runs(again, 0.01), method) for method in ("parabola", "min"))
        linear = np.polyfit(np.log(best.C), np.log(best.N), 1, w=best.N)         # an error in N is N times one in log N
        found.append((*(fit_power_law(o.C, o.N).exponent for o in (best, lowest)), linear[0]))
    print("\nwhat goes wrong: the exponent a over 20 draws with 1% noise, mean +- standard deviation")
    for a, name in zip(zip(*found), ("vertices, fitted in log-log space", "lowest runs: they jump by whole grid steps",
                                     "vertices, k C^a fitted in linear space: the largest budget decides alone")):
        print(f"  {np.mean(a):.3f} +- {np.std(a):.3f}  {name}")
    print("\n" + self_check())

# --------------------------------------------------------------------------------------------- 3. what may be asked for
class Refused(Exception):
    """A request that is answered with an error; args: the HTTP status, and one line that says why."""

def need(fine: bool, status: int, reason: str) -> None:
    """Raises: Refused with the status and the reason, unless it is fine."""
    if not fine:
        raise Refused(status, reason)

QUERY = dict(d_model=64, num_layers=2, num_heads=2, batch_size=128, learning_rate=1e-3, train_flops=10 ** 13)
COURSE = dict(d_model=[64, 1024], num_layers=[2, 24], num_heads=[2, 16], learning_rate=[1e-4, 1e-3],
              batch_size={128, 256}, train_flops={k * 10 ** e for k in (1, 3, 6) for e in range(13, 18)} | {10 ** 18})
HOME = dict(d_model=[8, 2048], num_layers=[1, 24], num_heads=[1, 32], batch_size=[1, 256],
            learning_rate=[1e-5, 0.2], train_flops=[10 ** 9, 10 ** 18])  # what one machine can train
DTYPES = "float32", "bfloat16"
EITHER = dict(lr_scheduler=dict(peak=1e-3, final_lr_frac=0.0, warmup_frac=0.05, init=0.0), weight_decay=0.1,
              grad_clip_norm=1.0)
ADAMW, SGD = EITHER | dict(betas=[0.9, 0.95], eps=1e-8, eps_root=0.0), EITHER | dict(momentum=0.9, nesterov=False)
LIMITS = dict(model_seed=[0, 2 ** 63 - 1], n_evals=[1, 1000], betas=[0, 1], momentum=[0, 1], weight_decay=[0, 1],
              warmup_frac=[0, 1], final_lr_frac=[0, 1], grad_clip_norm=[1e-6, 1e20], max_runtime_seconds=[1e-6, 1e20])

def like(value, example, name: str, limits: dict = LIMITS):
    """The value in the types of the example: the same keys, as many numbers, an optimizer with momentum as SGD's.

    limits: by name, [from, to] or a set; otherwise numbers go from 0, whole ones from 1, to 1e20.
    Raises: Refused 422, or 404 for a number outside the ranges of a 2025 query.
    """
    if name == "optimizer_config" and isinstance(value, dict) and "momentum" in value:
        example = SGD
    kind = type(example)
    if kind is type(value) is dict:
        wrong = ", ".join(sorted(example.keys() ^ value.keys()))
        need(not wrong, 422, f"{name} must have {', '.join(example)}; unknown or missing: {wrong[:200]}")
        return {key: like(value[key], inner, key, limits) for key, inner in example.items()}
    if kind is type(value) is list and len(value) == len(example):
        return [like(*pair, name, limits) for pair in zip(value, example)]
    if kind is type(value) in (bool, str) or value is None and name == "grad_clip_norm":
        return value
    wanted = {dict: "an object", list: "a list of 2 numbers", bool: "true or false", str: "a word",
              int: "a whole number", float: "a number"}[kind]
    number = kind in (int, float) and type(value) in (int, float) and abs(value) <= 10 ** 20 and value == kind(value)
    need(number, 422, f"{name} must be {wanted}, got {repr(value)[:60]}")      # neither NaN nor true is one
    limit = limits.get(name, [int(kind is int), 10 ** 20])
    fine = value in limit if isinstance(limit, set) else limit[0] <= value <= limit[1]
    where = f"one of {str(sorted(limit))[1:-1]}" if isinstance(limit, set) else f"in range {limit}"
    need(fine, 422 if limits is LIMITS else 404, f"{name} must be {where}, got {kind(value)}")
    return kind(value)

def check_training(config) -> dict:
    """A complete 2026 training config. Raises: Refused 422 with what is wrong in it."""
    shape = (config := like(config, LawBackend().translate(QUERY, 0), "the training config"))["architecture_config"]
    need(shape["head_dim"] % 2 == 0 == shape["num_attention_heads"] % shape["num_key_value_heads"], 422,
         "head_dim must be even, and num_attention_heads a multiple of num_key_value_heads")
    need(shape["dtype"] in DTYPES, 422, f"dtype must be {' or '.join(DTYPES)}, got {shape['dtype'][:60]!r}")
    return config

# -------------------------------------------------------------------------------------------------- 4. the two backends
class LawBackend:
    """Answers at once, for practising: min(CHINCHILLA(N, D), ln V) * (1 + penalties) * noise, with N = 12 L d^2.

    Penalties: 0.02 ln(rate / best)^2 with best = 0.003239 - 0.0001395 ln N (Kaplan, D.6), and 0.004 ln(d / 50 L)^2, as
    flat as Kaplan's figure 5. Noise: 0.2%, seeded by the config. A run "takes" 6 N D / 4e14 seconds.
    """
    name, dtype, vocab_size, head = "law", "float32", 32000, 0

    def count_parameters(self, shape: dict) -> int:
        """N: a layer's attention (4 d^2 in the usual shape) and SwiGLU (8 d^2), and V d where the head is counted."""
        d, heads = shape["hidden_size"], shape["num_attention_heads"] + shape["num_key_value_heads"]
        layer = 2 * d * heads * shape["head_dim"] + 3 * d * shape["intermediate_size"]
        return shape["num_hidden_layers"] * layer + self.head * d * shape["vocab_size"]

    def translate(self, query: dict, seed: int) -> dict:
        """The 2026 training config that a 2025 query means; what it leaves open is set here. D = train_flops / 6N."""
        d, heads, batch = query["d_model"], query["num_heads"], query["batch_size"]
        shape = {"attention_bias": False, "head_dim": max(2, 2 * round(d / heads / 2)), "hidden_size": d,
                 "intermediate_size": 8 * round(d / 3), "num_attention_heads": heads, "num_key_value_heads": heads,
                 "num_hidden_layers": query["num_layers"], "rms_norm_eps": 1e-5, "rope_theta": 1e4,
                 "tie_word_embeddings": False, "dtype": self.dtype, "vocab_size": self.vocab_size}
        rates = ADAMW["lr_scheduler"] | {"peak": query["learning_rate"]}
        return {"architecture_config": shape, "optimizer_config": ADAMW | {"lr_scheduler": rates}, "model_seed": seed,
                "train_batch_size": batch, "val_batch_size": batch, "n_evals": 1, "max_runtime_seconds": 1e6,
                "total_train_tokens": max(1, round(query["train_flops"] / (6 * self.count_parameters(shape))))}

    def run(self, config: dict, report) -> tuple[list[float], float]:
        """(validation losses, seconds); report(losses) is called as they come. Raises: ValueError with the reason."""
        shape, D = config["architecture_config"], float(config["total_train_tokens"])
        N, rate = self.count_parameters(shape), max(config["optimizer_config"]["lr_scheduler"]["peak"], 1e-9)
        if (seconds := 6 * N * D / 4e14) > config["max_runtime_seconds"]:
            raise ValueError(f"passed max_runtime_seconds, it takes {seconds:.0f} s")
        off_rate = math.log(rate / max(1e-5, 0.003239 - 0.0001395 * math.log(N)))
        off_shape = math.log(shape["hidden_size"] / (50 * shape["num_hidden_layers"]))
        noise = np.random.default_rng(list(json.dumps(config, sort_keys=True).encode())).normal(0, 0.002)
        curve = CHINCHILLA(N, D * np.arange(1, config["n_evals"] + 1) / config["n_evals"])
        factor = (1 + 0.02 * off_rate ** 2 + 0.004 * off_shape ** 2) * math.exp(noise)
        return (np.minimum(curve, math.log(shape["vocab_size"])) * factor).tolist(), seconds

class TrainBackend(LawBackend):
    """Trains each run in a process of its own, which can be killed, and which ends soon after the server does."""
    name, head = "train", 1

    def __init__(self, tokens: str | Path, context_length: int = 32, dtype: str = "float32", compiled: bool = False):
        try:
            ids = [np.load(Path(tokens) / f"{split}.npy", mmap_mode="r") for split in ("train", "valid")]
        except (OSError, ValueError) as error:
            raise ValueError(f"no tokens in {tokens} ({error}); give --tokens DIR with train.npy, valid.npy") from None
        self.vocab_size, self.dtype = 1 + max(int(part.max()) for part in ids), dtype
        self.how, self.busy, self.lock = (str(tokens), context_length, compiled), set(), threading.Lock()

    def run(self, config: dict, report) -> tuple[list[float], float]:
        """As LawBackend.run, but trained. The clock starts when torch is there."""
        context, limit = multiprocessing.get_context("spawn"), config["max_runtime_seconds"]     # fork dislikes threads
        receive, send = context.Pipe(duplex=False)
        with self.lock:                                                  # the lowest free place: GPUs are taken in turn
            self.busy.add(place := min(set(range(len(self.busy) + 1)) - self.busy))
        process = context.Process(target=train_once, args=(config, *self.how, place, send), daemon=True)
        process.start()
        send.close()                                                     # now the process's end is the pipe's end
        try:
            losses, done, reason = receive.recv()
            began = time.perf_counter()
            while not done and receive.poll(max(0.0, began + limit - time.perf_counter())):
                losses, done, reason = receive.recv()
                report(losses)
        except EOFError:
            reason = "its process was killed"
        finally:
            process.kill()
            self.busy.remove(place)
        if reason or not done:
            raise ValueError(reason or f"passed max_runtime_seconds {limit:g}")
        return losses, time.perf_counter() - began

NAMES = {"hidden_size": "d_model", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
         "num_key_value_heads": "num_kv_heads", "intermediate_size": "d_ff", "rms_norm_eps": "norm_eps",
         "attention_bias": "qkv_bias", "tie_word_embeddings": "tie_embeddings"}                # in model.py

def train_once(config: dict, tokens: str, context_length: int, compiled: bool, place: int, pipe) -> None:
    """In a process of its own, on one thread: trains model.py by train.py, as the config says.

    Sends (losses so far, whether it ended, why it failed). Validation: n_evals times, on the same 512 windows always.
    """
    losses = []
    try:
        import torch
        import model as transformer                                      # a driver imports siblings, and only in here
        import optim
        import train
        pipe.send((losses, False, ""))
        torch.set_num_threads(1)
        torch.manual_seed(config["model_seed"])
        device = f"cuda:{place % gpus}" if (gpus := torch.cuda.device_count()) else "cpu"    # two GPUs: 0, 1, 0, 1
        if gpus:
            torch.cuda.set_device(device)
        shape, given, evals = config["architecture_config"], config["optimizer_config"], config["n_evals"]
        settings = {NAMES.get(name, name): value for name, value in shape.items() if name != "dtype"}
        model = transformer.TransformerLM(transformer.ModelConfig(context_length=context_length, **settings),
                                          transformer.sdpa_attention).to(device)
        groups = [{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": given["weight_decay"]},
                  {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
        rates, root = given["lr_scheduler"], given.get("eps_root")
        peak, low, init = rates["peak"], rates["peak"] * rates["final_lr_frac"], rates["init"]
        if "momentum" in given:
            optimizer = torch.optim.SGD(groups, peak, given["momentum"], nesterov=given["nesterov"])
        else:
            optimizer = optim.AdamW(groups, peak, given["betas"], given["eps"], fused="triton" if gpus else "foreach")
        for p in model.parameters() if root else ():                     # is added to v below, so v must be there
            optimizer.state[p].update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        how = train.TrainConfig(batch_size=config["train_batch_size"], context_length=context_length,
                                clip_norm=given["grad_clip_norm"] or math.inf,
                                precision="autocast" if shape["dtype"] == "bfloat16" else "fp32")
        loss_fn = torch.compile(train.plain_loss) if compiled else train.plain_loss
        train_ids, valid_ids = (train.open_tokens(Path(tokens) / f"{split}.npy", context_length, shape["vocab_size"])
                                for split in ("train", "valid"))
        windows = train.evaluation_starts(valid_ids, context_length, 512)
        generator = torch.Generator().manual_seed(config["model_seed"])
        steps = max(1, round(config["total_train_tokens"] / how.batch_size / context_length))
        warmup = round(rates["warmup_frac"] * steps)
        for step in range(steps):
            rate = low + (peak - low) * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2
            for group in optimizer.param_groups:
                group["lr"] = init + (peak - init) * (step + 1) / warmup if step < warmup else rate
            for state in optimizer.state.values() if root else ():       # v is then the average of gradient^2 + root
                state["exp_avg_sq"] += root * (1 / given["betas"][1] - 1)
            batch = train.get_batch(train_ids, how.batch_size, context_length, device, generator)
            loss, _ = train.training_step(model, optimizer, [batch], loss_fn, torch.nn.utils.clip_grad_norm_, how)
            if due := (step + 1) * evals // steps > step * evals // steps:
                losses.append(train.evaluate(model, train.plain_loss, valid_ids, windows, context_length,
                                             config["val_batch_size"], how.precision))
            if due or step % 50 == 0:
                if not all(map(math.isfinite, [*losses, loss.item()])):
                    raise ValueError(f"the loss at step {step + 1} is not finite; lower the learning rate")
                pipe.send((losses, step + 1 == steps, ""))               # even nothing new: is the server there?
    except (BrokenPipeError, KeyboardInterrupt):                         # the server is gone, or going
        pass
    except Exception as error:
        pipe.send((losses, True, str(error) or repr(error)))

# ------------------------------------------------------------------------------------------------- 5. the HTTP server
class Server(ThreadingHTTPServer):
    """Both protocols at one address; it answers from the moment it is made.

    A run is a dict, and in the sqlite file before it is answered: the server can be killed at any time, and what was
    left undone starts again with the next. Every key has a budget in FLOPs (2025) and one in seconds (2026): a 2026 run
    costs its max_runtime_seconds until it has ended, then its seconds; a failed 2025 run costs nothing.
    """
    request_queue_size = 128

    def __init__(self, path, backend, *, keys=("local",), ranges=COURSE, seed: int = 0, port: int = 0, workers: int = 1,
                 flops: float = 2e18, seconds: float = 43200.0):
        self.backend, self.keys, self.ranges, self.seed, self.lock = backend, keys, ranges, seed, threading.RLock()
        self.budgets, self.pool = {2025: flops, 2026: seconds}, ThreadPoolExecutor(workers)
        try:
            self.db = sqlite3.connect(path, check_same_thread=False, timeout=0.5, isolation_level=None)
            self.db.executescript("PRAGMA locking_mode=EXCLUSIVE; PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; "
                                  "CREATE TABLE IF NOT EXISTS records (id TEXT PRIMARY KEY, record TEXT)")
            rows = self.db.execute("SELECT id, record FROM records ORDER BY rowid")
            self.records = {run: json.loads(record) for run, record in rows}
            super().__init__(("127.0.0.1", port), Handler)
        except (sqlite3.Error, OSError, OverflowError) as error:
            raise ValueError(f"cannot use {path}, port {port} ({error}); stop the other server or change one") from None
        self.ended = {run: self.pool.submit(self.work, run) for run, record in [*self.records.items()]
                      if record["backend"] == backend.name and record["status"]["status"] in ("queued", "running")}
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.1,), daemon=True).start()

    def keep(self, name: str, record: dict) -> None:
        """Writes a run, or a key's final submission, to the disk. Raises: sqlite3.Error when that is full."""
        with self.lock:
            self.db.execute("INSERT INTO records VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET record = excluded.record",
                            (name, json.dumps(record)))
            self.records[name] = record                                  # only now: a full disk takes none

    def runs(self, protocol: int, key: str) -> dict[str, dict]:
        """Those of one protocol and key, by id, the oldest first."""
        with self.lock:
            return {run: record for run, record in self.records.items()
                    if (record["protocol"], record["key"]) == (protocol, key)}

    def used(self, protocol: int, key: str) -> float:
        """FLOPs (2025) or seconds (2026) that the key's runs cost."""
        return sum((record["cost"] for record in self.runs(protocol, key).values()), 0.0)

    def add(self, protocol: int, key: str, config: dict, asked: dict, cost: float) -> str:
        """The run's id, queued if new. Raises: Refused past the budget and, in 2026, for a config given before."""
        with self.lock:                                                  # held from the look to the charge
            run = next((run for run, record in self.runs(protocol, key).items()
                        if (record["backend"], record["config"]) == (self.backend.name, config)), None)
            if run and protocol == 2025 and self.records[run]["status"]["status"] != "failed":
                return run
            left = (total := self.budgets[protocol]) - self.used(protocol, key)
            need(cost <= left, 403 if protocol == 2025 else 400,
                 f"insufficient budget: the run asks for {cost:g}, {left:g} of {total:g} are left")
            need(protocol == 2025 or not run, 409, f"the same config was submitted before, as experiment {run}")
            self.keep(run := run or os.urandom(16).hex(), {
                "protocol": protocol, "key": key, "backend": self.backend.name, "config": config, "asked": asked,
                "cost": cost, "status": {"type": "queued", "status": "queued"}})
            self.ended[run] = self.pool.submit(self.work, run)
            return run

    def work(self, run: str) -> None:
        """In a worker thread: has the backend run it, and writes down what came of it and what it cost."""
        record, began = self.records[run], time.perf_counter()
        def note(status: str, cost: float = record["cost"], **more) -> None:       # clients read its kind as either
            cost = min(cost, record["cost"])
            self.keep(run, record | {"cost": cost, "status": {"type": status, "status": status} | more})
        note("running", val_losses=[])
        try:
            losses, took = self.backend.run(record["config"], lambda losses: note("running", val_losses=losses))
        except Exception as error:                                       # nothing may stay "running" for ever
            return note("failed", 0 if record["protocol"] == 2025 else time.perf_counter() - began, reason=str(error))
        note("completed", record["cost"] if record["protocol"] == 2025 else took, used_runtime_seconds=took,
             val_losses=losses, completed_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))

    handle_error = lambda self, *args: None                              # a caller who hangs up is no news

NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,30})?([eE][-+]?[0-9]{1,3})?")        # as JSON has it
OF_2025 = "loss", "total_flops_used", "previous_runs"
VERBS = dict.fromkeys((*OF_2025, "budget", "experiments", "experiment"), "GET") | {
    "submit": "POST", "final_submission": "GET or POST"}

class Handler(BaseHTTPRequestHandler):
    """Answers one request in JSON and hangs up; a Refused becomes its status and a message."""
    timeout = 30                                                         # seconds that a caller may fall silent

    def answer(self, name: str, key: str, given):
        """To /name. given: the query (2025), the body (POST), or the id (experiment). Raises: Refused."""
        server, backend = self.server, self.server.backend
        if name == "loss":
            numbers = {name: json.loads(text) for name, text in given.items() if NUMBER.fullmatch(text)}
            asked = like(given | numbers, QUERY, "the query", server.ranges)       # refuses by name what is no number
            config = backend.translate(asked, server.seed)
            run = server.add(2025, key, config, asked, asked["train_flops"])
            if run in server.ended:
                server.ended[run].result()
            status = server.records[run]["status"]
            need("reason" not in status, 500, f"the run failed and costs nothing: {status.get('reason')}")
            return {"loss": status["val_losses"][-1], "total_flops_used": server.used(2025, key),
                    "parameters": backend.count_parameters(config["architecture_config"]),
                    "tokens": config["total_train_tokens"], "backend": backend.name}
        if name == "total_flops_used":
            return server.used(2025, key)
        if name == "previous_runs":
            return {name: [run["asked"] | {"loss": run["status"]["val_losses"][-1], "backend": run["backend"]}
                           for run in server.runs(2025, key).values() if run["status"]["status"] == "completed"]}
        if name == "budget":
            used, total = server.used(2026, key), server.budgets[2026]
            return {"used_seconds": used, "remaining_seconds": max(0.0, total - used), "total_budget_seconds": total}
        if name == "submit":
            config = check_training(given)
            run = server.add(2026, key, config, config, config["max_runtime_seconds"])
            return {"experiment_id": run, "budget_summary": self.answer("budget", key, None)}
        if name == "final_submission":
            if self.command == "POST":
                example = {"training_config": backend.translate(QUERY, 0), "predicted_final_loss": 1.0}
                check_training((final := like(given, example, "the body"))["training_config"])
                server.keep(f"final {key}", {"protocol": name, "key": key, "final": final, "backend": "none"})
            need(f"final {key}" in server.records, 404, "nothing was submitted yet; POST /final_submission first")
            return server.records[f"final {key}"]["final"]
        experiments = {run: {"experiment_id": run, "training_config": record["asked"], "status": record["status"]}
                       for run, record in server.runs(2026, key).items()}
        need(name == "experiments" or given in experiments, 404, f"there is no experiment {str(given)[:60]!r}")
        return experiments[given] if name == "experiment" else list(experiments.values())

    def route(self):
        """Reads the request and who asks. Returns: the answer. Raises: Refused; ValueError for what is not JSON."""
        url = urlsplit(self.path)
        unique = lambda pairs: need(len(dict(pairs)) == len(pairs), 422, "a name is given twice") or dict(pairs)
        query = unique(parse_qsl(url.query, keep_blank_values=True, max_num_fields=32))
        name, *rest = url.path.strip("/").split("/")
        need(name in VERBS and len(rest) == (name == "experiment"), 404,
             f"nothing is at {url.path[:60]}, but at {', '.join('/' + name for name in VERBS)}")
        need(self.command in VERBS[name], 405, f"/{name} takes {VERBS[name]}, got {self.command}")
        if name in OF_2025:
            need((key := query.pop("api_key", None)) in self.server.keys, 422, "api_key must be one of serve --api-key")
        else:
            need((key := self.headers["X-API-Key"]) in self.server.keys, 401, "X-API-Key must be of serve --api-key")
        if self.command == "GET":
            return self.answer(name, key, rest[0] if rest else query)
        length = self.headers.get("Content-Length", "")
        need(length.isdecimal() and len(length) < 8 and int(length) <= 1 << 20, 413,
             "the body must tell its Content-Length, of 1 MiB at most")
        return self.answer(name, key, json.loads(self.rfile.read(int(length)), object_pairs_hook=unique))

    def do_GET(self) -> None:
        try:
            answer = self.route()
        except Refused as refused:
            status, message = refused.args
        except (ValueError, RecursionError, TimeoutError) as error:
            status, message = 422, f"the address cannot be read, or the body is no JSON: {str(error)[:100]}"
        except Exception as error:                                       # the disk is full, above all
            status, message = 500, f"the server failed: {error!r}; mend that, then start it again"
        else:
            return self.reply(200, answer)
        self.reply(status, {"message": message} | ({} if self.path[1:].startswith(OF_2025) else {"detail": message}))

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def send_error(self, code, message=None, explain=None) -> None:
        self.request_version = "HTTP/1.0"                                # even if it could not be read
        self.reply({501: 405, 505: 400}.get(code, code), {"message": message or self.responses[code][0]})

    def reply(self, status: int, body) -> None:
        """Sends the body as JSON, and hears the caller out: a reset while he sends would lose the answer."""
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Backend", self.server.backend.name)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())
        self.connection.shutdown(socket.SHUT_WR)
        all(self.connection.recv(1 << 16) for _ in range(1 << 10))       # up to the first that is empty; 64 MiB at most

    log_message = lambda self, *args: None

# ------------------------------------------------------------------------------------- 6. the client, and the main job
def ask(url: str, path: str, **query):
    """One GET of the 2025 protocol, which lasts as long as the run. Raises: Refused, in the server's words."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))          # a proxy has its own 127.0.0.1
    try:
        with opener.open(f"{url.rstrip('/')}/{path}?{urlencode(query)}") as answer:
            return json.load(answer)
    except urllib.request.HTTPError as error:
        raise Refused(error.code, f"{url} answers {error.code}: {error.read(1000).decode(errors='replace')}") from None
    except (OSError, ValueError) as error:
        raise Refused(503, f"no server at {url} ({error}); start one with: python scaling.py serve") from None

def plan(args, budgets: list[float], widths: list[int], at_a_budget: int = 5) -> list[dict]:
    """The queries of a sweep, the largest first: for each budget five of the widths, moving up with the budget.

    The rate goes as 1 / width, and as D^-0.32 (Bjorck et al.), which along the best sizes is about C^-0.2.
    Probe --rate first: `query` a dry run's last line at several learning_rates (best on an H200: 4 times the default).
    """
    need(all(0 < value < math.inf for value in budgets + widths), 422, "--budgets and --widths must be above 0")
    queries, slide = [], max(0, len(widths) - at_a_budget) / max(1, len(budgets) - 1)
    for i, budget in enumerate(sorted(budgets)):
        for d in widths[round(i * slide):][:at_a_budget]:
            rate = float(f"{args.rate * 64 / d * (budget / min(args.budgets)) ** -0.2:.3g}")
            queries.append(dict(zip(QUERY, (d, args.layers, max(2, d // 64), args.batch_size, rate, int(budget)))))
    return queries[::-1]

def sweep(args, url: str, out: Path) -> None:
    """Writes the answers to the plan's queries to `out`, as JSON lines. Only those that the server lacks cost anything.

    A sweep that breaks off leaves `out` as it was; its answers are in .part, and free when the server is asked again.
    Raises: Refused; before anything is spent, when that costs more than is left of the budget.
    """
    queries, key, began = plan(args, args.budgets, args.widths), args.api_key[0], time.perf_counter()
    known = ask(url, "previous_runs", api_key=key)["previous_runs"]
    missing = [query for query in queries if not any(query.items() <= run.items() for run in known)]
    cost, spent = sum(query["train_flops"] for query in missing), 0
    left = args.flop_budget - ask(url, "total_flops_used", api_key=key)
    print(f"{len(queries)} runs, {len(missing)} to do for {cost:.3g} FLOPs; {left:.3g} of {args.flop_budget:.3g} left")
    need(cost <= left, 403, "the plan costs more than is left; drop budgets or widths")
    if args.dry_run:
        return print(*(" ".join(f"{name}={value}" for name, value in query.items()) for query in missing), sep="\n")
    out.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.workers) as pool, open(part := out.with_suffix(".part"), "w") as file:
        answers = pool.map(lambda query: ask(url, "loss", **query, api_key=key), queries)
        for i, (query, answer) in enumerate(zip(queries, answers), 1):   # an error cancels what still waits
            print(json.dumps(query | answer), file=file, flush=True)
            spent += query["train_flops"] * (query in missing)
            eta = (time.perf_counter() - began) * (cost / spent - 1) if spent else 0
            print(f"run {i}/{len(queries)} | {query['train_flops']:.2g} FLOPs | d_model {query['d_model']} | rate "
                  f"{query['learning_rate']} | loss {answer['loss']:.4f} | eta {eta:.0f} s", flush=True)
    os.replace(part, out)

def load_runs(path: Path) -> list[np.ndarray]:
    """N, C, loss (n,) from the JSON lines of `sweep`; N is 12 L d^2 where the server did not tell."""
    try:
        runs = [json.loads(line) for line in path.read_text().splitlines()]
        N = [run.get("parameters", 12 * run["num_layers"] * run["d_model"] ** 2) for run in runs]
        return columns(5, N=N, C=[run["train_flops"] for run in runs], loss=[run["loss"] for run in runs])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not hold the runs of a sweep ({error!r}); sweep again") from None

def make_server(args, ranges: dict, folder: Path, port: int) -> Server:
    """The server that the command line asks for, already answering."""
    tokens, backend = args.tokens or Path("out/scaling/tokens"), LawBackend()
    if args.backend == "train" and not args.tokens and not (tokens / "valid.npy").exists():
        import bpe                                                       # this Python's library, in a small vocabulary
        import train
        train.gather_corpus(tokens)
        tokenizer = bpe.Tokenizer(*bpe.train_bpe(tokens / "train.txt", 512, [train.END_OF_TEXT]), [train.END_OF_TEXT])
        for split in ("train", "valid"):
            bpe.encode_file(tokenizer, tokens / f"{split}.txt", tokens / f"{split}.npy")
    if args.backend == "train":
        backend = TrainBackend(tokens, args.context_length, args.dtype, args.compile)
    folder.mkdir(parents=True, exist_ok=True)
    server = Server(folder / "store.sqlite", backend, keys=args.api_key, ranges=ranges, seed=args.seed, port=port,
                    workers=args.workers, flops=args.flop_budget, seconds=args.second_budget)
    print(f"{server.url} answers, backend {backend.name}, keys {args.api_key}; Ctrl-C stops it", flush=True)
    return server

def run(args) -> int:
    """The main job: sweep, fit, predict 8 times the largest budget, train that. Returns: 0 when --within the bar.

    Predicted is the middle of two bounds. Above: the parametric law, as a short sweep puts the floor E too high. Below:
    a power law through the vertices of the two largest budgets, as towards the floor the loss falls ever slower; but
    near copies of held-out text in training are learnt by heart as N and D grow: run dedup.py before holding text out.
    """
    began, folder, C = time.perf_counter(), args.out / f"{args.backend}-seed{args.seed}", 8 * max(args.budgets)
    server = make_server(args, HOME, folder, 0)
    sweep(args, server.url, folder / "runs.jsonl")
    best, law = compare(*load_runs(folder / "runs.jsonl"), folder / "isoflop.png")
    wanted, widths = float(fit_power_law(best.C, best.N)(C)), [*range(8, 256, 8), *range(256, 2049, 64)]
    size = lambda query: server.backend.count_parameters(server.backend.translate(query, 0)["architecture_config"])
    query = min(plan(args, [C], widths, at_a_budget=len(widths)), key=lambda query: abs(math.log(size(query) / wanted)))
    high, low = float(law(size(query), C / (6 * size(query)))), float(fit_power_law(best.C[-2:], best.loss[-2:])(C))
    predicted = (low + high) / 2
    print(f"\nprediction for {C:.3g} FLOPs, 8 times the largest: best N {wanted:.3g}; d_model {query['d_model']} has "
          f"{size(query)}, will reach {predicted:.4f} ({low:.4f} to {high:.4f}). Training it", flush=True)
    reached = ask(server.url, "loss", **query, api_key=args.api_key[0])["loss"]
    error, seconds = predicted / reached - 1, round(time.perf_counter() - began)
    verdict = "OK" if abs(error) <= args.within else "MISSED"
    print(f"reached {reached:.4f}, predicted {predicted:.4f}: {error:+.2%}, bar {args.within:.0%}: {verdict}")
    print("RESULT", json.dumps({"seed": args.seed, "backend": args.backend, "predicted": round(predicted, 4),
                                "reached": round(reached, 4), "error": round(error, 4), "seconds": seconds}))
    return int(verdict == "MISSED")

# --------------------------------------------------------------------------------------- 7. check, bench, command line
def self_check() -> str:
    """The parametric fit of exact data, and a round trip over HTTP. Raises: AssertionError. Returns: a summary."""
    N, C, loss = chinchilla_runs()
    worst = np.abs(np.divide(fit_parametric(N, C / (6 * N), loss)[:5], CHINCHILLA[:5]) - 1).max()
    assert worst < 1e-6, f"the noise-free fit is off by {worst:.1e}"     # exact data leave only rounding
    server = Server(":memory:", LawBackend(), flops=QUERY["train_flops"])
    first, again = (ask(server.url, "loss", **QUERY, api_key="local") for _ in range(2))
    assert first == again and again["total_flops_used"] == QUERY["train_flops"], "a repeated query was charged"
    return f"five constants recovered to {worst:.0e}, a repeated query is free  OK"

def bench(repeats: int = 7) -> None:
    """Median milliseconds of the parametric fit and of a request."""
    N, C, loss = chinchilla_runs(0, 0.01)
    server, widths = Server(":memory:", LawBackend(), flops=1e30), iter(range(65, 1000))
    new_run = lambda: ask(server.url, "loss", api_key="local", **QUERY | {"d_model": next(widths)})
    for name, f in (("fit_parametric, 35 runs, 4,500 starts", lambda: fit_parametric(N, C / (6 * N), loss)),
                    ("GET /loss, a new run", new_run)):
        times = [1e3 * seconds for seconds in timeit.repeat(f, number=1, repeat=repeats + 1)[1:]]        # one warms up
        print(f"{name:40s}{np.median(times):9.2f} ms  (min {min(times):.2f}, max {max(times):.2f})")

def main() -> int:
    """The command line. Returns: the exit status."""
    def numbers(text: str) -> list[float]:
        return [int(value) if value.is_integer() else value for value in map(float, text.split(","))]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, kind, default, text in (
            ("--seed", int, 0, "of weights and data order"), ("--backend", ("law", "train"), "law", "serve, run"),
            ("--port", int, 8000, "serve"), ("--ranges", ("course", "home"), "course", "serve: home for small models"),
            ("--out", Path, Path("out/scaling"), "folder of store.sqlite (serve), runs.jsonl (sweep, fit)"),
            ("--flop-budget", float, 2e18, "2025: of a key"), ("--second-budget", float, 43200.0, "2026: seconds"),
            ("--url", str, "http://127.0.0.1:8000", "query, sweep"), ("--context-length", int, 32, "train: tokens"),
            ("--tokens", Path, None, "train: folder with train.npy and valid.npy; none: the standard library's source"),
            ("--workers", int, 2, "runs at a time"), ("--dtype", DTYPES, "float32", "train: of /loss"),
            ("--budgets", numbers, "1e11,2e11,4e11,8e11,1.6e12", "FLOPs"), ("--layers", int, 1, "num_layers"),
            ("--widths", numbers, "20,24,32,40,48,64,80,96,112", "d_model"), ("--within", float, 0.03, "bar"),
            ("--batch-size", int, 16, "sequences"), ("--rate", float, 0.02, "at width 64 and the smallest budget")):
        how = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        parser.add_argument(flag, default=default, help=f"{text} (default {default})", **how)
    parser.add_argument("--api-key", nargs="+", default=["local"], help="serve: those allowed; query, sweep: the first")
    parser.add_argument("--compile", action="store_true", help="train: with torch.compile, for a GPU")
    parser.add_argument("--explain", action="store_true", help="explain, whatever the command")
    parser.add_argument("--dry-run", action="store_true", help="sweep: print the plan and its cost")
    commands = {
        "explain": lambda: walk_through(args.seed), "bench": bench, "run": lambda: run(args),
        "serve": lambda: [make_server(args, HOME if args.ranges == "home" else COURSE, args.out, args.port),
                          threading.Event().wait()],
        "sweep": lambda: sweep(args, args.url, args.out / "runs.jsonl"),
        "query": lambda: print(json.dumps(ask(args.url, "loss", api_key=args.api_key[0],
                                              **dict(pair.partition("=")[::2] for pair in args.pairs)))),
        "fit": lambda: compare(*load_runs(args.out / "runs.jsonl"), args.out / "isoflop.png")}
    parser.add_argument("command", nargs="?", default="explain", choices=commands, help="default: explain")
    parser.add_argument("pairs", nargs="*", metavar="name=value", help="query: what to ask /loss for")
    args = parser.parse_intermixed_args()
    warnings.showwarning = lambda message, *where: print(f"note: {message}")
    try:
        need(args.command == "query" or not args.pairs, 422, f"only query takes name=value, got {' '.join(args.pairs)}")
        return 1 if commands["explain" if args.explain else args.command]() == 1 else 0
    except (Refused, ValueError, OSError, ImportError) as error:
        print(f"scaling.py: {error.args[-1] if isinstance(error, Refused) else error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130

if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)                                                     # a run that nobody awaits is not waited for

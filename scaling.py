"""scaling.py - scaling laws at home: the fits, a training API with a budget, and a prediction that is then checked.

What:       Power-law, IsoFLOP and parametric fits in numpy; an HTTP server that trains models for a budget, in both protocols
            of Stanford CS336's scaling assignment (2025: GET /loss, 2026: POST /submit); a client that sweeps; and the main
            job, `run`: sweep small models, fit, predict one of 8 times the compute, train it, compare.
Source:     Hoffmann et al. 2022 (Chinchilla), arXiv:2203.15556, section 3 and appendix D.3; Kaplan et al. 2020,
            arXiv:2001.08361, sections 3.1 and D.6 (the `law` backend); Yang et al. 2022, arXiv:2203.03466 (rate by width).
Deviations: 1. The parametric fit is Levenberg-Marquardt from the best 48 of Chinchilla's 4,500 starts; the paper runs L-BFGS
            from each. 2. When really training, N counts every weight that multiplies: the head, not the input table; with
            models this small 12 L d^2 alone would leave out much of the work. 3. /loss also answers backend, parameters and
            tokens, and every answer has the header X-Backend.
Copy:       this file alone; needs numpy. `--backend train` also wants model.py, optim.py, train.py, bpe.py and torch.
Run:        python scaling.py                     the three fits on made-up runs, what goes wrong, the self-check
"""
from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import re
import sqlite3
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

# Dims: N parameters, D tokens, C = 6 N D FLOPs, n runs, S starts of a fit, d model width, L layers, V vocabulary

# ------------------------------------------------------------------------------------------------------------ 1. the fits


def columns(minimum: int, **named) -> list[np.ndarray]:
    """The named sequences as float64 (n,). Raises: ValueError unless equally long, positive, finite, n >= minimum."""
    arrays = [np.asarray(values, dtype=np.float64).ravel() for values in named.values()]
    lengths = {name: len(array) for name, array in zip(named, arrays)}
    if len(set(lengths.values())) > 1 or min(lengths.values()) < minimum:
        raise ValueError(f"needs one value of each per run and at least {minimum} runs, got {lengths}")
    for name, array in zip(named, arrays):
        bad = array[~(np.isfinite(array) & (array > 0))]
        if len(bad):
            raise ValueError(f"{name} must be positive and finite, since its logarithm is taken, got {bad[0]}; drop that run")
    return arrays


@dataclass(frozen=True)
class PowerLaw:
    """y = coefficient * x ** exponent; one standard error of each, to first order (NaN from two points); R2 of log y."""
    coefficient: float
    exponent: float
    r2: float
    coefficient_error: float
    exponent_error: float

    def __call__(self, x):
        return self.coefficient * np.asarray(x, dtype=np.float64) ** self.exponent


def fit_power_law(x, y) -> PowerLaw:
    """Least squares on log y = log coefficient + exponent * log x, where every decade counts the same.

    Raises: ValueError for fewer than two distinct x, unequal lengths, or values that are not positive and finite.
    Example: fit_power_law([1, 10, 100], [3, 30, 300]) -> coefficient 3, exponent 1, r2 1
    """
    x, y = columns(1, x=x, y=y)
    u, v = np.log(x), np.log(y)
    if np.ptp(u) < 1e-12:
        raise ValueError(f"needs at least two distinct x, got only {x[0]:g}; a line needs two points")
    du, dv, n = u - u.mean(), v - v.mean(), len(u)
    exponent = du @ dv / (du @ du)
    residual, total = ((dv - exponent * du) ** 2).sum(), dv @ dv
    variance = residual / (n - 2) if n > 2 else math.nan
    coefficient = math.exp(v.mean() - exponent * u.mean())
    return PowerLaw(coefficient, float(exponent), float(1 - residual / total) if total > 1e-24 else 1.0,
                    coefficient * math.sqrt(variance * (1 / n + u.mean() ** 2 / (du @ du))), math.sqrt(variance / (du @ du)))


@dataclass(frozen=True)
class Optima:
    """Per budget, ascending, (budgets,) each: FLOPs C, best size N, its tokens D = C / 6N and loss; what is amiss in notes."""
    C: np.ndarray
    N: np.ndarray
    D: np.ndarray
    loss: np.ndarray
    notes: list[str]


def isoflop_optima(N, C, loss, method: str = "parabola") -> Optima:
    """The best model size of every budget (Chinchilla, approach 2). Budgets are the same when six digits of C agree.

    Args: N parameters, C FLOPs, loss nats, one of each per run. method: "min" takes the run with the lowest loss;
          "parabola" the vertex of a quadratic in log N, from at least three distinct sizes a budget.
    Warns, and notes: a vertex outside the sampled sizes; a curve that opens downward, where "min" stands in.
    Raises: ValueError on another method, too few sizes, or values that are not positive and finite.
    Example: N=[1, 2, 4], C=[6, 6, 6], loss=[2, 1, 2] -> N [2], D [0.5]
    """
    if method not in ("min", "parabola"):
        raise ValueError(f'method must be "min" or "parabola", got {method!r}')
    N, C, loss = columns(1, N=N, C=C, loss=loss)
    rounded, rows, notes = np.array([float(f"{c:.6g}") for c in C]), [], []
    for budget in np.unique(rounded):
        u, losses = np.log(N[rounded == budget]), loss[rounded == budget]
        best, best_loss = u[losses.argmin()], losses.min()
        if method == "parabola":
            if len(np.unique(u)) < 3:
                raise ValueError(f"budget {budget:g} has {len(np.unique(u))} distinct sizes; a parabola needs 3, \"min\" one")
            middle, width = u.mean(), np.ptp(u)                          # centred and scaled, the squares are well conditioned
            c2, c1, c0 = np.polyfit((u - middle) / width, losses, 2)
            if c2 <= 1e-12 * best_loss:
                notes.append(f"budget {budget:g}: the parabola opens downward; took the lowest run, N {math.exp(best):.4g}")
            else:
                best, best_loss = middle - width * c1 / (2 * c2), c0 - c1 ** 2 / (4 * c2)
                if not u.min() <= best <= u.max():
                    notes.append(f"budget {budget:g}: the vertex N {math.exp(best):.4g} lies outside the sampled "
                                 f"{math.exp(u.min()):.4g}..{math.exp(u.max()):.4g}; add sizes on that side")
        rows.append((budget, np.exp(best), budget / 6 / np.exp(best), best_loss))
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return Optima(*np.array(rows).T, notes)


@dataclass(frozen=True)
class ParametricLaw:
    """L(N, D) = E + A / N**alpha + B / D**beta, nats a token. objective: mean Huber loss reached; intervals: 95%, by name."""
    E: float
    A: float
    B: float
    alpha: float
    beta: float
    objective: float = 0.0
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __call__(self, N, D):
        return self.E + self.A / np.asarray(N, float) ** self.alpha + self.B / np.asarray(D, float) ** self.beta

    def optimal(self, C) -> tuple[np.ndarray, np.ndarray]:
        """(N, D) of the least loss with 6 N D = C, where dL/dN is 0 along the budget. Source: Chinchilla, equation 4."""
        G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        N = G * (np.asarray(C, float) / 6) ** (self.beta / (self.alpha + self.beta))
        return N, np.asarray(C, float) / (6 * N)


CHINCHILLA = ParametricLaw(1.69, 406.4, 410.7, 0.34, 0.28)               # its equation 10


def huber_fit(theta: np.ndarray, u, v, y, weight, delta: float, steps: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Levenberg-Marquardt on the Huber loss of log L, from S starts at once.

    A Huber loss is least squares in which a residual r weighs min(1, delta / |r|): that quadratic touches it here and lies
    above it elsewhere, so a step that is small enough goes down.
    Args: theta (S, 5) log A, log B, log E, alpha, beta; u, v, y (n,) log N, log D, log L; weight (S, n) of each run.
    Returns: theta (S, 5); objective (S,), the weighted mean Huber loss.
    """
    def evaluate(theta):
        a, b, e, alpha, beta = theta.T[:, :, None]
        terms = np.stack([a - alpha * u, b - beta * v, e + 0 * u])       # (3, S, n) logs of the terms of L
        total = np.logaddexp.reduce(terms)                              # Chinchilla, equation 3
        share = np.exp(terms - total)                                   # of L: d log L / d log term
        r, size = total - y, np.abs(total - y)
        huber = np.where(size <= delta, r * r / 2, delta * (size - delta / 2))
        jacobian = np.stack([*share, -u * share[0], -v * share[1]], -1)                          # (S, n, 5)
        return (weight * huber).sum(1) / weight.sum(1), r, jacobian

    value, r, jacobian = evaluate(theta)
    damping = np.full(len(theta), 1e-2)
    for _ in range(steps):
        weighted = jacobian * (weight * np.minimum(1, delta / np.maximum(np.abs(r), 1e-300)))[..., None]
        hessian = np.einsum("sni,snj->sij", weighted, jacobian)
        diagonal = damping[:, None] * np.einsum("sii->si", hessian) + 1e-14
        step = np.linalg.solve(hessian + diagonal[..., None] * np.eye(5), np.einsum("sni,sn->si", weighted, r)[..., None])[..., 0]
        trial = theta - np.clip(step, -2, 2)
        trial_value, trial_r, trial_jacobian = evaluate(trial)
        better = trial_value < value
        theta, value = np.where(better[:, None], trial, theta), np.where(better, trial_value, value)
        r, jacobian = np.where(better[:, None], trial_r, r), np.where(better[:, None, None], trial_jacobian, jacobian)
        damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-12, 1e12)
        if (damping >= 1e12).all() or value.max() < 1e-28:
            break
    return theta, value


def fit_parametric(N, D, loss, *, delta: float = 1e-3, bootstrap: int = 0, seed: int = 0) -> ParametricLaw:
    """The five constants of L = E + A/N^alpha + B/D^beta (Chinchilla, approach 3), by Huber loss on log L.

    Args: N parameters, D tokens, loss nats, of at least 5 runs. delta: where the Huber loss turns from squares to absolute
          values. bootstrap: how many times the runs are drawn again for the 95% intervals, 0 for none.
    Raises: ValueError on too few runs, on one N or one D alone, or values that are not positive and finite.
    Source: Hoffmann et al. 2022, equations 2 and 3, appendix D.3 and its grid of starts.
    """
    N, D, loss = columns(5, N=N, D=D, loss=loss)
    u, v, y = np.log(N), np.log(D), np.log(loss)
    if np.ptp(u) < 1e-9 or np.ptp(v) < 1e-9:
        raise ValueError("needs at least two distinct N and two distinct D; a term that never moves cannot be fitted")
    grid = np.array(np.meshgrid(range(0, 30, 5), range(0, 30, 5), np.linspace(-1, 1, 5), np.linspace(0, 2, 5),
                                np.linspace(0, 2, 5))).reshape(5, -1).T  # (4500, 5)
    once = np.ones((len(grid), len(u)))
    _, value = huber_fit(grid, u, v, y, once, delta, steps=0)
    theta, value = huber_fit(grid[value.argsort()[:48]], u, v, y, once[:48], delta)
    best, names = theta[value.argmin()], ("E", "A", "B", "alpha", "beta")
    constants = lambda theta: np.concatenate([np.exp(theta[..., [2, 0, 1]]), theta[..., 3:]], -1)
    intervals = {}
    if bootstrap:
        drawn = np.random.default_rng(seed).multinomial(len(u), np.full(len(u), 1 / len(u)), size=bootstrap)
        again, _ = huber_fit(np.tile(best, (bootstrap, 1)), u, v, y, drawn.astype(float), delta)
        ends = np.percentile(constants(again), [2.5, 97.5], axis=0).T.tolist()
        intervals = dict(zip(names, map(tuple, ends)))
    return ParametricLaw(*constants(best).tolist(), float(value.min()), intervals)


# ----------------------------------------------------------------------------------------- 2. the approaches side by side

def compare(N, C, loss, bootstrap: int = 200, log=print) -> dict:
    """Prints the IsoFLOP table and the three approaches. Returns: {"min", "parabola": N_opt(C) laws, "parametric", "optima"}."""
    N, C, loss = columns(5, N=N, C=C, loss=loss)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                  # the notes are printed below
        optima = {method: isoflop_optima(N, C, loss, method) for method in ("min", "parabola")}
    law, best = fit_parametric(N, C / (6 * N), loss, bootstrap=bootstrap), optima["parabola"]
    log("budget    N:loss of each run, * the lowest; the parabola's vertex")
    for budget, vertex, value in zip(best.C, best.N, best.loss):
        curve = sorted(zip(N[np.isclose(C, budget, 1e-5)], loss[np.isclose(C, budget, 1e-5)]))
        lowest = min(y for _, y in curve)
        log(f"{budget:8.3g}  " + "  ".join(f"{n:.3g}:{y:.3f}{' *'[int(y == lowest)]}" for n, y in curve) + f"  vertex {vertex:.3g}:{value:.3f}")
    for note in best.notes:
        log("note: " + note)
    rows, far = {}, C.max() * np.array([10, 100])
    for name, found in optima.items():
        to_n, to_loss = fit_power_law(found.C, found.N), fit_power_law(found.C, found.loss)
        rows[name] = (to_n.exponent, f"+- {to_n.exponent_error:.3f}  R2 {to_n.r2:.4f}", to_n(far), to_loss(far))
    best_n, best_d = law.optimal(far)
    rows["parametric"] = (law.beta / (law.alpha + law.beta), "", best_n, law(best_n, best_d))
    log(f"\n{'approach':11s}{'N_opt ~ C^a':>12s}{'':21s}{'D_opt ~ C^(1-a)':>16s}{'N, loss at 10x':>20s}{'N, loss at 100x':>20s}")
    for name, (a, how_sure, n, y) in rows.items():
        log(f"{name:11s}{a:12.3f} {how_sure:20s}{1 - a:16.3f}" + "".join(f"{n[i]:12.3g} {y[i]:7.3f}" for i in range(2)))
    log("parametric: " + ", ".join(f"{name} {getattr(law, name):.4g}" + (" in [{:.4g}, {:.4g}]".format(*law.intervals[name])
        if bootstrap else "") for name in ("E", "A", "B", "alpha", "beta")))
    return {name: fit_power_law(found.C, found.N) for name, found in optima.items()} | {"parametric": law, "optima": best}


def draw(N, C, loss, fits: dict, path: Path) -> str:
    """IsoFLOP curves with their optima, and N_opt and D_opt against C, as a PNG. Returns: what to tell the reader."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no picture: pip install matplotlib draws one"
    figure, best, law = Figure(figsize=(11, 4.2), layout="tight"), fits["optima"], fits["parametric"]
    left, right = figure.subplots(1, 2)
    for budget in best.C:
        n, y = N[np.isclose(C, budget, 1e-5)], loss[np.isclose(C, budget, 1e-5)]
        curve, = left.semilogx(n, y, "o", label=f"{budget:.2g} FLOPs")
        left.semilogx(grid := np.geomspace(n.min(), n.max()), law(grid, budget / (6 * grid)), color=curve.get_color())
    left.semilogx(best.N, best.loss, "k*", label="vertex of the parabola")
    left.set(xlabel="parameters N", ylabel="loss (nats a token)", title="IsoFLOP runs; lines: the parametric fit")
    wide = np.geomspace(best.C.min(), best.C.max() * 100)
    for name, points, line in (("N_opt", best.N, law.optimal(wide)[0]), ("D_opt", best.D, law.optimal(wide)[1])):
        curve, = right.loglog(best.C, points, "o", label=f"{name}, parabola")
        right.loglog(wide, line, color=curve.get_color(), label=f"{name}, parametric")
    right.set(xlabel="compute C (FLOPs)", title="the best size and data for a budget")
    left.legend(fontsize=7), right.legend(fontsize=7)
    figure.savefig(part := path.with_suffix(".part.png"), dpi=130)
    os.replace(part, path)
    return f"picture: {path}"


def chinchilla_runs(seed: int = 0, noise: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """N, C, loss (35,) of 5 budgets x 7 sizes from one ladder of models, by CHINCHILLA, times exp(noise * normal)."""
    C = np.repeat([1e17, 3e17, 1e18, 3e18, 1e19], 7)
    N = 1e6 * 2.5 ** (np.tile(np.arange(7), 5) + np.repeat([0, 1, 1, 2, 3], 7))
    return N, C, CHINCHILLA(N, C / (6 * N)) * np.exp(noise * np.random.default_rng(seed).standard_normal(35))


def walk_through(seed: int = 0) -> None:
    """The three approaches on runs made from a known law, then two ways to go wrong."""
    print("35 runs made from L = 1.69 + 406.4/N^0.34 + 410.7/D^0.28 with 0.5% noise; in truth N_opt ~ C^0.452\n")
    compare(*chinchilla_runs(seed, 0.005))
    found = {"parabola, log-log": [], "min, log-log: the lowest run jumps by whole grid steps": [],
             "parabola, N_opt = k C^a fitted in linear space: the largest budget decides alone": []}
    powers = np.linspace(0, 1, 1001)
    for draw_seed in range(20):
        runs = chinchilla_runs(draw_seed, 0.01)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            best, low = isoflop_optima(*runs, "parabola"), isoflop_optima(*runs, "min")
        basis = (best.C / best.C.max()) ** powers[:, None]                # (1001, budgets); k of each power in closed form
        misfit = ((basis * (basis @ best.N / (basis ** 2).sum(1))[:, None] - best.N) ** 2).sum(1)
        for values, a in zip(found.values(), (fit_power_law(best.C, best.N).exponent, fit_power_law(low.C, low.N).exponent,
                                              powers[misfit.argmin()])):
            values.append(a)
    print("\nwhat goes wrong: the exponent a over 20 draws with 1% noise, mean +- standard deviation")
    for name, values in found.items():
        print(f"  {np.mean(values):.3f} +- {np.std(values):.3f}  {name}")


def self_check() -> float:
    """Largest relative error of the five constants fitted to noise-free runs. Raises: AssertionError above 1e-6."""
    N, C, loss = chinchilla_runs()
    law = fit_parametric(N, C / (6 * N), loss)
    worst = max(abs(getattr(law, name) / getattr(CHINCHILLA, name) - 1) for name in ("E", "A", "B", "alpha", "beta"))
    assert worst < 1e-6, f"the noise-free fit is off by {worst:.1e}"
    return worst


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    walk_through()
    print(f"\nfive constants recovered from noise-free runs to {self_check():.0e}  OK")
    return 0


if __name__ == "__main__":
    sys.exit(main())

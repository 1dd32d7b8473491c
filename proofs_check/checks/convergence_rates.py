"""Checks Remarks 4 and 5: measures how the error scales in T, S, K and γ.

The problem is F(w) = ½‖w‖² (L = 1) with many independent coordinates. Each coordinate is a
replicate of a scalar run, so one run gives E‖∇F(w_t)‖² with a small error. A slope is a
least-squares fit of log error over log T (or S, K, γ). The stated order is an upper bound, so the
measured slope must not exceed the slope of the whole order. The noise is large, so the first term
of the order dominates, and the measured slope must also be close to the slope of that term.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from orlomo_jax import ArrivalTrace, Method, simulate
from proofs_check.cases import arrival_order
from proofs_check.optional import need
from proofs_check.registry import Outcome, Size, Subject, holds

SLACK = 0.15  # allowed error of a fitted slope
BETA, SIGMA, COORDINATES = 0.5, 8.0, 512


class Curve(NamedTuple):
    """The measured error over one variable, the stated order, and the order's dominant term."""

    variable: str
    values: np.ndarray
    measured: np.ndarray
    stated: np.ndarray
    ruling: np.ndarray

    def slopes(self) -> tuple[float, float, float]:
        """Return the fitted slopes of the measured error, the whole order and its dominant term."""
        logs = np.log(self.values)
        measured, stated, ruling = (
            float(np.polyfit(logs, np.log(y), 1)[0])
            for y in (self.measured, self.stated, self.ruling)
        )
        return measured, stated, ruling


def loss_fn(params: Any, model_state: Any, noise: jax.Array, key: Any):
    """Return ½‖w‖² + noise·w, which has the gradient w + noise."""
    return jnp.sum(params**2) / 2 + jnp.sum(noise * params), (model_state, {})


def batch_fn(local_steps: int, sigma: float):
    """Return a batch function: Gaussian noise by worker and round, variance σ² per coordinate."""

    def batches(key, worker, round):
        key = jax.random.fold_in(jax.random.fold_in(key, worker), round)
        return sigma * jax.random.normal(key, (local_steps, COORDINATES))

    return batches


def error(method: Method, round_fn, trace: ArrivalTrace, gamma, local_steps, seed, skip) -> float:
    """Return E‖∇F(w_t)‖² per coordinate, averaged over the steps t ≥ ``skip`` of a run."""
    every = max(1, trace.num_steps // 100)
    result = simulate(
        method, None, batch_fn(local_steps, SIGMA), jnp.ones(COORDINATES), round_fn=round_fn,
        trace=trace, key=jax.random.key(seed), local_learning_rate=gamma,
        evaluate=_mean_square, evaluate_every=every,
    )  # fmt: skip
    values = [e.metrics["error"] for e in result.history.evaluations if e.step >= skip]
    return float(np.mean([float(value) for value in values]))


@jax.jit
def _mean_square(params, model_state):
    return {"error": jnp.mean(params**2)}


def _method(subject: Subject, num_workers: int) -> Method:
    return Method("orlomo", subject.rule(num_workers, momentum=BETA), num_workers, 1, BETA)


def _trace(num_workers: int, num_steps: int, seed: int) -> ArrivalTrace:
    order = arrival_order("homogeneous", num_workers, num_steps, seed)
    return ArrivalTrace.from_workers(order.tolist(), num_workers)


@holds("remark-5", strength="statistical")
def convergence_rate(subject: Subject, size: Size) -> Iterator[Outcome]:
    """Run OrLoMo at Remark 5's γ over T, S and K, and compare the slopes with the stated order."""
    thorough = size.settings >= 5
    longest = 4096 if thorough else 1024
    grids = {
        "T": [(2, 1, longest // 8), (2, 1, longest // 4), (2, 1, longest // 2), (2, 1, longest)],
        "S": [(2, 1, longest), (2, 2, longest), (2, 4, longest)],
        "K": [(1, 1, longest), (2, 1, longest), (4, 1, longest)],
    }
    if not thorough:
        grids = {variable: grid[-3::2] for variable, grid in grids.items()}
    rounds = {
        s: subject.local_momentum_sgd(loss_fn, s, momentum=BETA) for s in (1, 2, 4)
    }  # one compiled round for all grids
    known: dict[tuple[int, int, int], tuple[float, float, float]] = {}
    curves = []
    for variable, grid in grids.items():
        for setting in grid:
            if setting not in known:
                known[setting] = _point(subject, rounds, *setting, size.seed)
        position = {"T": 2, "S": 1, "K": 0}[variable]
        along = (np.array([known[s][i] for s in grid]) for i in (0, 1, 2))
        curves.append(Curve(variable, np.array([s[position] for s in grid]), *along))
    if size.plots:
        plot(curves, Path(size.plots) / "remark_5.png")
    yield _judge("remark-5", curves, len(known))


def _point(subject: Subject, rounds, num_workers, local_steps, num_steps, seed):
    """Return the measured error and the stated order at one (K, S, T)."""
    # The error is per coordinate, so σ² and F(w_0) − F* are too: ½‖w‖² is a sum of coordinates.
    candidates = subject.claims.remark_5(BETA, local_steps, num_workers, num_steps, 1.0, SIGMA, 0.5)
    gamma = min(x for x in candidates if x is not None)
    trace = _trace(num_workers, num_steps, seed)
    measured = error(
        _method(subject, num_workers), rounds[local_steps], trace, gamma, local_steps, seed, 0
    )
    terms = subject.claims.remark_5_order(local_steps, num_workers, num_steps, 1.0, SIGMA)
    return measured, sum(terms), terms[0]


@holds("remark-4", strength="statistical")
def stationary_error(subject: Subject, size: Size) -> Iterator[Outcome]:
    """Check that the stationary error of OrLoMo and PRSGDm scales as γ/K (S = 1)."""
    steps = 1600 if size.settings >= 5 else 400
    round_fn = subject.local_momentum_sgd(loss_fn, 1, momentum=BETA)
    curves = []
    over_gamma, over_workers = [(0.02, 2), (0.04, 2), (0.08, 2)], [(0.08, 2), (0.08, 4), (0.08, 8)]
    if size.settings < 5:
        over_gamma, over_workers = over_gamma[::2], over_workers[::2]
    for name in ("orlomo", "prsgdm"):
        points = {}
        for gamma, num_workers in sorted({*over_gamma, *over_workers}):
            synchronous = name == "prsgdm"
            if synchronous:
                count = steps * num_workers // 2  # C = KT̃ gradients; a step is one of K reports
                order = np.arange(count) % num_workers
                trace = ArrivalTrace.from_workers(order.tolist(), num_workers, synchronous=True)
                rule = subject.prsgdm(num_workers)
                method = Method(name, rule, num_workers, 1, BETA, synchronous=True)
            else:
                count = steps
                trace, method = _trace(num_workers, count, size.seed), _method(subject, num_workers)
            points[gamma, num_workers] = error(
                method, round_fn, trace, gamma, 1, size.seed, count // 2
            )
        for variable, position, grid in (
            ("γ", 0, over_gamma),
            ("K", 1, over_workers),
        ):
            terms = [subject.claims.remark_4_order(*point, 1) for point in grid]
            along = ([points[p] for p in grid], [sum(x) for x in terms], [x[0] for x in terms])
            values = np.array([point[position] for point in grid])
            curves.append(Curve(f"{variable} ({name})", values, *map(np.array, along)))
    if size.plots:
        plot(curves, Path(size.plots) / "remark_4.png")
    yield _judge("remark-4", curves, 10)


def _judge(statement: str, curves: list[Curve], cases: int) -> Outcome:
    """Compare every measured slope with the stated one."""
    fits = {curve.variable: curve.slopes() for curve in curves}
    worst = max(
        max(measured - stated, abs(measured - ruling)) for measured, stated, ruling in fits.values()
    )
    note = ", ".join(f"{name} {a:+.2f} ({c:+.2f})" for name, (a, _, c) in fits.items())
    return Outcome(
        statement, cases, worst, SLACK, worst <= SLACK, f"slope measured (stated): {note}"
    )


def plot(curves: list[Curve], path: Path) -> None:
    """Plot the measured error and the stated order on log-log axes, one panel per variable."""
    need("matplotlib").use("Agg")
    pyplot = need("matplotlib.pyplot")
    figure, axes = pyplot.subplots(
        1, len(curves), figsize=(3.2 * len(curves), 3.2), layout="constrained"
    )
    for axis, curve in zip(np.atleast_1d(axes), curves, strict=True):
        shift = float(np.exp(np.mean(np.log(curve.measured / curve.stated))))
        axis.loglog(curve.values, curve.measured, "o-", label="measured")
        axis.loglog(curve.values, shift * curve.stated, "--", label="stated order × constant")
        axis.set_xlabel(curve.variable)
        axis.set_ylabel("E‖∇F‖²")
    np.atleast_1d(axes)[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)

"""Checks the identity and Lemmas 1–3 on runs in which every report has its own S."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from orlomo_jax import LocalUpdate
from proofs_check import sequences
from proofs_check.cases import arrival_order
from proofs_check.checks.every_order import momentum_of
from proofs_check.reference import CURVATURE, START, gamma
from proofs_check.registry import Outcome, Size, Subject, holds

STEPS = (1, 2, 3, 7)  # S of a report is one of these
ALLOWED, REPORTS = 1e-12, 60
SETTINGS = (("one slow", 3, 0.9), ("heterogeneous", 5, 0.5), ("bursts", 2, 0.75))


def _loss(params, model_state, batch, key):
    return jnp.sum(CURVATURE * params**2 / 2 + batch * params), (model_state, {})


def _changes(w: np.ndarray, linear: np.ndarray, rate: float, beta: float) -> np.ndarray:
    """Return Δh = γ Σ_s g_s of a round, from its path in NumPy."""
    u = total = 0 * w
    for c in linear:
        g = CURVATURE * w + c
        u, total = beta * u + rate * g, total + rate * g
        w = w - u
    return total


def _run(subject: Subject, of: sequences.Frame, beta: float, draws: Any) -> dict[str, np.ndarray]:
    """Run the rule and the workers; return each slot's Δu, Δw and Δh, and u and w at each step."""
    rounds = {s: subject.local_momentum_sgd(_loss, s, momentum=beta) for s in STEPS}
    rule = subject.rule(of.num_workers, momentum=beta)
    update = jax.jit(rule.update)
    w = jnp.asarray(START)
    state, key = rule.init(w), jax.random.key(0)
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("du", "dw", "dh", "u", "w")}

    def dispatch(step):
        linear = draws.normal(size=(draws.choice(STEPS), len(START)))
        report = rounds[len(linear)](w, None, jnp.asarray(linear), gamma(step), key).update
        dh = _changes(np.asarray(w), linear, gamma(step), beta)
        for name, value in (("du", report.momentum), ("dw", report.delta), ("dh", dh)):
            found[name].append(np.asarray(value))

    for _ in range(of.num_workers):
        dispatch(0)
    for t, (index, slot) in enumerate(zip(of.dispatched_at, of.used, strict=True)):
        report = LocalUpdate(*(jnp.asarray(found[name][slot]) for name in ("dw", "du")))
        updates, state = update(report, state, w, dispatched_at=index)
        w = w + updates
        found["u"].append(np.asarray(momentum_of(state)))
        found["w"].append(np.asarray(w))
        if t + 1 < of.num_steps:
            dispatch(t + 1)
    return {name: np.stack(values) for name, values in found.items()}


def uneven_residuals(subject: Subject, kind: str, num_workers: int, beta: float, seed: int):
    """Return the relative residual of each statement in one run."""
    claims, draws = subject.claims, np.random.default_rng(seed)
    of = sequences.frame(arrival_order(kind, num_workers, REPORTS, seed), num_workers)
    with jax.enable_x64(True):
        run = _run(subject, of, beta, draws)
    du, dw, dh = (run[name] for name in ("du", "dw", "dh"))
    pairs = [claims.delay_adaptive(num_workers, delay) for delay in of.delays.tolist()]
    in_flight = draws.uniform(-1, 1, of.index.shape[0])  # any η̂
    hat = sequences.hat_rates(of, np.array([a / b for a, b in pairs]), in_flight)
    table = sequences.powers(beta, REPORTS + 2)
    hats = sequences.auxiliary(of, beta, hat, du, dw, dh, START)
    sum_u, sum_w = sequences.in_flight_sums(of, table, hat, du, dw, claims)
    of_u, of_w = claims.identity(beta)
    lemma_3 = hats.scaled_y - (1 - beta) * hats.w - claims.lemma_3(beta) * hats.u
    pairs = {
        "identity": (dh - of_u * du - of_w * dw, dh),
        "lemma-1": (hats.u - run["u"] - sum_u, hats.u),
        "lemma-2": (hats.w - run["w"] - sum_w, hats.w),
        "lemma-3": (lemma_3, hats.scaled_y),
    }
    return {key: float(np.abs(x).max() / np.abs(scale).max()) for key, (x, scale) in pairs.items()}


@holds("identity", "lemma-1", "lemma-2", "lemma-3", strength="property")
def uneven_local_steps(subject: Subject, size: Size) -> Iterator[Outcome]:
    """Check the lemmas on runs of momentum SGD in which every report has a random S."""
    worst: dict[str, float] = {}
    settings = SETTINGS if size.settings >= 5 else SETTINGS[:1]
    for kind, num_workers, beta in settings:
        for key, residual in uneven_residuals(subject, kind, num_workers, beta, size.seed).items():
            residual = residual if residual == residual else float("inf")
            worst[key] = max(worst.get(key, 0.0), residual)
    for key, residual in worst.items():
        note = f"S in {STEPS}, drawn for each report"
        yield Outcome(key, len(settings) * REPORTS, residual, ALLOWED, residual <= ALLOWED, note)

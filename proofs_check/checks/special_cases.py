"""Checks the delay facts of Theorem 1 and the special cases Remark 1, Remark 2 and Eq. (2)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from orlomo_jax import ArrivalTrace, LocalUpdate
from proofs_check import rounding, sequences
from proofs_check.cases import ORDERS, arrival_order
from proofs_check.checks.every_order import momentum_of
from proofs_check.registry import Outcome, Size, Subject, holds


@holds("delays", strength="exhaustive")
def delay_facts(subject: Subject, size: Size) -> Iterator[Outcome]:
    """Check the delay facts on all small orders and each kind of long one, in exact numbers."""
    claims, cases, wrong, where = subject.claims, 0, 0, ""
    small = [(1, 5), (2, 8), (3, 6), (4, 4)]
    orders = [(k, np.array(list(itertools.product(range(k), repeat=steps)))) for k, steps in small]
    for number, kind in enumerate(ORDERS[:-1]):
        for num_workers in (1, 2, 3, 7, 16, 64):
            order = arrival_order(kind, num_workers, 100 + 57 * number, size.seed)
            orders.append((num_workers, order[None]))
    for num_workers, batch in orders:
        of = sequences.frame(batch, num_workers)
        steps, delays = of.num_steps, of.delays
        left = (steps - of.sent[:, -1]).sum(-1) + delays.sum(-1)
        facts = {
            "Σ τ̂ + Σ τ = (K−1)T": left == claims.delay_sum(num_workers, steps),
            "half the delays < 2K": 2 * (delays < 2 * num_workers).sum(-1) >= steps,
        }
        rates = np.vectorize(lambda d, k=num_workers: Fraction(*claims.delay_adaptive(k, d)), "O")(
            delays
        )
        total = rates.sum(-1)
        facts["Σ η ≥ T/(2K)"] = total >= Fraction(steps, 2 * num_workers)
        in_flight = [
            Fraction(claims.in_flight_rate(num_workers, steps - i, i, steps))
            for i in of.index.tolist()
        ]
        hat = sequences.hat_rates(of, rates, np.array(in_flight, object))
        facts["Σ η̂ ≥ Σ η"] = hat.sum(-1) >= total
        flying = of.arrival >= steps
        stay = np.array(in_flight, object) * np.maximum(steps - 1 - of.index, 0)
        facts["η̂ ≤ 1/K in flight"] = ~(flying & (hat * num_workers > 1 + 1e-12)).any(-1)
        facts["η̂(T−1−i) ≤ 2 in flight"] = ~(flying & (stay > 2)).any(-1)
        facts["the library's trace"] = np.array(
            [_same_trace(order, num_workers, of, row) for row, order in enumerate(batch[:200])]
        )
        cases += len(batch)
        for name, fact in facts.items():
            if not np.all(fact):
                wrong += int(np.sum(~fact))
                row = int(np.argmin(np.asarray(fact)))
                where = where or f"{name}: K={num_workers} {batch[row].tolist()[:24]}"
    yield Outcome("delays", cases, float(wrong), 0.0, wrong == 0, where or "integers and fractions")


def _same_trace(order, num_workers: int, of: sequences.Frame, row: int) -> bool:
    """Return whether the library's trace and the paper's definitions give the same delays."""
    trace = ArrivalTrace.from_workers(order.tolist(), num_workers)
    return (
        np.array_equal(trace.dispatched_at, of.dispatched_at[row])
        and np.array_equal(trace.delays, of.delays[row])
        and np.array_equal(trace.in_flight, of.sent[row, -1])
    )


def _apply(rule: Any, of: sequences.Frame, du, dw, start) -> tuple[np.ndarray, np.ndarray]:
    """Apply reports, indexed by slot, with a rule; return w_{t+1} and u_{t+1}, [T, d] each."""

    @jax.jit
    def run(indices, slots, du, dw, start):
        def step(carry, arrival):
            params, state = carry
            index, slot = arrival
            updates, state = rule.update(
                LocalUpdate(dw[slot], du[slot]), state, params, dispatched_at=index
            )
            params = optax.apply_updates(params, updates)
            u = momentum_of(state) if "momentum" in state._fields else params
            return (params, state), (params, u)

        return jax.lax.scan(step, (start, rule.init(start)), (indices, slots))[1]

    w, u = run(*(jnp.asarray(x) for x in (of.dispatched_at, of.used, du, dw, start)))
    return np.asarray(w), np.asarray(u)


def _reports(of: sequences.Frame, dtype, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draws = np.random.default_rng(seed)
    size = (of.index.shape[0], 33)
    return draws.normal(size=size).astype(dtype), draws.normal(size=size).astype(dtype), \
        draws.normal(size=33).astype(dtype)  # fmt: skip


@holds("remark-1", strength="property")
def without_momentum_is_al_sgd(subject: Subject, size: Size) -> Iterator[Outcome]:
    """Check that OrLoMo and local OrMo-DA equal AL-SGD bit for bit at the Python constant β = 0."""
    cases = wrong = 0
    kinds = (("one slow", 3), ("heterogeneous", 8), ("reversed", 2))
    kinds = kinds if size.settings >= 5 else kinds[:1]
    for (kind, num_workers), precision in itertools.product(kinds, (32, 64)):
        of = sequences.frame(arrival_order(kind, num_workers, 80, size.seed), num_workers)
        dtype = np.float64 if precision == 64 else np.float32
        with jax.enable_x64(precision == 64):
            for options in ({}, {"learning_rate": lambda t: 1.0 / (t + 1)}):
                reports = _reports(of, dtype, size.seed + cases)
                plain, _ = _apply(subject.al_sgd(num_workers, **options), of, *reports)
                for rule in (subject.rule, subject.local_ormo_da):
                    ours, _ = _apply(rule(num_workers, momentum=0.0, **options), of, *reports)
                    wrong += int((ours.tobytes() != plain.tobytes()) or ours.dtype != plain.dtype)
                    cases += 1
    yield Outcome("remark-1", cases, float(wrong), 0.0, wrong == 0, "runs of 80 steps, to the bit")


@holds("remark-2", "eq-2", strength="property")
def one_local_step(subject: Subject, size: Size) -> Iterator[Outcome]:
    """Check that OrLoMo at S = 1 is OrMo-DA (Δu = Δw), and momentum SGD if also K = 1."""
    worst = {"remark-2": (0.0, 1.0), "eq-2": (0.0, 1.0)}
    cases = dict.fromkeys(worst, 0)
    gamma = np.float64(0.125)
    with jax.enable_x64(True):
        settings = list(itertools.product((1, 2, 5), (0.9, 0.5)))
        for num_workers, beta in settings if size.settings >= 5 else settings[:3:2]:
            of = sequences.frame(arrival_order("one slow", num_workers, 80, size.seed), num_workers)
            gradient, _, start = _reports(of, np.float64, size.seed)
            du, dw = _one_step_round(subject, beta, gradient, gamma)
            _, plain = _one_step_round(subject, None, gradient, gamma)
            ours = _apply(subject.rule(num_workers, momentum=beta), of, du, dw, start)
            theirs = _apply(subject.local_ormo_da(num_workers, momentum=beta), of, du, plain, start)
            pairs = [("remark-2", ours, theirs)]
            if num_workers == 1:
                stepped = _momentum_sgd(beta, gamma, gradient, start)
                pairs += [("eq-2", ours, stepped), ("eq-2", theirs, stepped)]
            rates = np.array([1 / max(d, num_workers) if d > 2 * num_workers else 1 / num_workers
                              for d in of.delays.tolist()])  # fmt: skip
            table = sequences.powers(beta, of.num_steps + 2)
            allowed = rounding.server_bounds(
                num_workers, of.dispatched_at, table, beta, rates, ours[1], ours[0],
                du[of.used], dw[of.used], start, 2.0**-53,
            )  # fmt: skip
            for statement, left, right in pairs:
                cases[statement] += 1
                for a, b, bound in zip(left, right, reversed(allowed), strict=True):
                    # Two rules, so twice the bound; each round adds 4 roundings of its report.
                    bound = 2 * bound + 8 * 2.0**-53 * (np.abs(a) + np.abs(b))
                    at = np.unravel_index(np.argmax(np.abs(a - b) / bound), a.shape)
                    pair = float(np.abs(a - b)[at]), float(bound[at])
                    if not pair[0] / pair[1] <= worst[statement][0] / worst[statement][1]:
                        worst[statement] = pair
    for statement, (residual, allowed) in worst.items():
        yield Outcome(statement, cases[statement], residual, allowed, residual <= allowed,
                      "to rounding, 80 steps")  # fmt: skip


def _one_step_round(subject: Subject, momentum, gradient, gamma) -> tuple[np.ndarray, np.ndarray]:
    """Return (Δu, Δw) of the library's round with S = 1 for given gradients [D, d]."""
    round_fn = subject.local_momentum_sgd(
        lambda p, s, batch, key: (jnp.sum(p * batch), (s, {})), 1, momentum=momentum
    )

    @jax.jit
    @jax.vmap
    def each(g):
        update = round_fn(jnp.zeros_like(g), None, g[None], gamma, jax.random.key(0)).update
        return update.delta if update.momentum is None else update.momentum, update.delta

    du, dw = each(jnp.asarray(gradient))
    return np.asarray(du), np.asarray(dw)


def _momentum_sgd(beta, gamma, gradient, start) -> tuple[np.ndarray, np.ndarray]:
    """Return w_{t+1} and u_{t+1} of Eq. (2), computed by ``optax.sgd`` (its trace is u/γ)."""
    optimizer = optax.sgd(gamma, momentum=beta)
    params, state = jnp.asarray(start), optimizer.init(jnp.asarray(start))
    update, ws, us = jax.jit(optimizer.update), [], []
    for g in gradient:
        updates, state = update(jnp.asarray(g), state, params)
        params = optax.apply_updates(params, updates)
        ws.append(params)
        us.append(gamma * optax.tree.get(state, "trace"))
    return np.stack(ws), np.stack(us)

"""Compares one server step with Algorithms 1–3: the link from the proofs to the code.

The symbolic proofs are about the step that the paper prints. These checks show that the library's
step is that step. Basis vectors give its coefficients of u, w, Δu and Δw. K and t go far beyond
the (K, T) of the exhaustive checks, with random t and i ≤ t. For dyadic β and η the comparison is
exact (in fractions). For any β and n up to a million it is to rounding (in 60-digit decimals).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from orlomo_jax import LocalUpdate
from proofs_check.checks.every_order import momentum_of
from proofs_check.claims import ServerStep
from proofs_check.registry import Outcome, Size, Subject, holds

WORKERS = (4, 2, 1, 3, 7, 16, 64)
BY_STEP = np.array([1.0, 0.5, 2.0, 0.25, 1.5, 0.75, 3.0])
BY_DELAY = np.array([1.0, 0.25, 0.5, 1.25])
ROUNDINGS = 64  # units in the last place allowed for pow and the 31 doublings of the sum


@dataclass(frozen=True)
class Step:
    """The tested places: each step t, and the index i ≤ t of its report."""

    step: np.ndarray
    index: np.ndarray


def places(num_workers: int, largest_late: int, count: int, seed: int) -> Step:
    """Return steps t ≥ 1 with 0 ≤ i ≤ t and ⌈t/K⌉ − ⌈i/K⌉ ≤ ``largest_late``.

    Args:
        num_workers: K.
        largest_late: The largest n.
        count: How many are drawn at random; the edges of groups precede them.
        seed: Seed of the draws.
    """
    draws = np.random.default_rng([seed, num_workers, largest_late])
    pairs = [
        (t, i)
        for group in (0, 1, 2, min(largest_late, 9))
        for t in range(max(1, group * num_workers - 1), group * num_workers + 3)
        for i in {0, 1, num_workers, num_workers + 1, t - num_workers, t - 1, t}
        if 0 <= i <= t
    ]
    widths = np.resize([2, 8, max(1, largest_late - 1)], count)  # in groups: short and long delays
    delay = draws.integers(0, np.minimum(widths, max(1, largest_late - 1)) * num_workers)
    step = delay + draws.integers(1, 2**30, count) * draws.integers(0, 2, count) + 1
    edges = np.array(pairs, int).reshape(-1, 2)
    return Step(np.append(edges[:, 0], step), np.append(edges[:, 1], step - delay))


def read_step(
    rule: Callable[..., Any], num_workers: int, momentum: Any = None, **options: Any
) -> Callable[..., Any]:
    """Return a jitted function that reads the coefficients of one step of a rule.

    Args:
        rule: The rule factory.
        num_workers: K.
        momentum: β as a Python constant, None for a traced one, or "unset" for the rule's default.
        **options: Passed to the factory.

    Returns:
        ``read(step[B], index[B], beta) -> (u[B, 3], w[B, 4])``: the coefficients of (u, Δu, Δw) in
        the new u and of (u, Δu, Δw, w) in the new w.
    """
    by_step, by_delay = jnp.asarray(BY_STEP), jnp.asarray(BY_DELAY)
    if "delay_weight" not in options:
        options |= {
            "learning_rate": lambda step: by_step[step % len(BY_STEP)],
            "delay_weight": lambda delay: by_delay[delay % len(BY_DELAY)],
        }

    def read_one(step, index, beta):
        given = {} if momentum == "unset" else {"momentum": beta if momentum is None else momentum}
        server = rule(num_workers, **given, **options)
        u, du, dw, w = jnp.eye(4)
        state = server.init(w)._replace(step=step.astype(jnp.int32))
        if "momentum" in state._fields:
            state = state._replace(momentum=u)
        updates, after = server.update(LocalUpdate(dw, du), state, w, dispatched_at=index)
        new_u = momentum_of(after)[:3] if "momentum" in state._fields else jnp.zeros(3)
        return new_u, optax.apply_updates(w, updates), after.step - step

    return jax.jit(jax.vmap(read_one, in_axes=(0, 0, None)))


def stated(
    claim: Callable[..., ServerStep],
    subject: Subject,
    num_workers: int,
    at: Step,
    beta: float,
    rates: np.ndarray,
    number: Callable[..., Any] = Fraction,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the algorithm's coefficients for the same places, in exact numbers.

    Returns:
        The coefficients of (u, Δu, Δw) in the new u and in the change of w, object[B, 3] each.
    """
    group = subject.claims.group
    us, ws, beta = [], [], number(beta)
    for t, i, rate in zip(at.step.tolist(), at.index.tolist(), rates.tolist(), strict=True):
        late = group(t, num_workers) - group(i, num_workers)
        opens = group(t, num_workers) - group(t - 1, num_workers)
        power = beta**late
        past = beta * (1 - power) / (1 - beta)
        it = claim(beta, opens, power, past, number(rate))
        us.append(it.u)
        ws.append(it.w)
    return np.array(us, object), np.array(ws, object)


def compare(
    read: Callable[..., Any], at: Step, beta: float, expected, number: Callable[..., Any] = Fraction
) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest absolute and relative difference of each step, float[B] each."""
    u, w, advance = read(jnp.asarray(at.step), jnp.asarray(at.index), jnp.asarray(beta))
    got = np.concatenate([np.asarray(u), np.asarray(w)], axis=1)
    one = np.ones((len(got), 1), object)
    want = np.concatenate([*expected, one], axis=1)
    exact = np.vectorize(number, otypes=[object])(np.where(np.isfinite(got), got, 1e300))
    want = np.where(want == 0, number(0), want)
    difference = np.abs(exact - want)
    tiny = np.abs(want) < number(2.0**-900)  # close to where floats flush to zero
    relative = np.where(tiny, difference, difference / np.where(tiny, number(1), np.abs(want)))
    wrong_advance = (np.asarray(advance) != 1).astype(float)
    return (
        difference.max(1).astype(float) + wrong_advance,
        relative.max(1).astype(float) + wrong_advance,
    )


def _algorithm(subject: Subject, size: Size, statement: str, rule, claim, betas) -> list[Outcome]:
    worst, worst_wide, cases, where = 0.0, 0.0, 0, ""
    example = None
    with jax.enable_x64(True):
        for num_workers in WORKERS if size.settings >= 5 else WORKERS[:2]:
            traced = read_step(rule, num_workers)
            reads = [(beta, traced) for beta in betas]
            if num_workers == 4:  # also with β as a Python constant, as users write it
                constants = betas if size.settings >= 5 else betas[-1:]
                reads += [(beta, read_step(rule, num_workers, beta)) for beta in constants]
            for beta, read in reads:
                at = places(num_workers, 12, 60, size.seed)
                rates = BY_STEP[at.step % 7] * BY_DELAY[(at.step - at.index) % 4]
                expected = stated(claim, subject, num_workers, at, beta, rates)
                difference, _ = compare(read, at, beta, expected)
                cases += len(difference)
                if difference.max() > worst:
                    worst, b = float(difference.max()), int(np.argmax(difference > 0))
                    where = f"K={num_workers} β={beta} t={at.step[b]} i={at.index[b]}"
                    example = _case(statement, num_workers, beta, at.step[b], at.index[b])
            for beta in (0.9, 0.999, 1 - 2.0**-33) if betas != (0.0,) else ():
                at = places(num_workers, 2**20, 60, size.seed)
                rates = BY_STEP[at.step % 7] * BY_DELAY[(at.step - at.index) % 4]
                with localcontext(prec=60):
                    expected = stated(claim, subject, num_workers, at, beta, rates, Decimal)
                    _, relative = compare(traced, at, beta, expected, Decimal)
                cases += len(relative)
                if relative.max() > worst_wide:
                    worst_wide, b = float(relative.max()), int(np.argmax(relative))
                    if worst_wide > ROUNDINGS * 2.0**-53:
                        example = example or _case(
                            statement, num_workers, beta, at.step[b], at.index[b]
                        )
    allowed = ROUNDINGS * 2.0**-53
    exact = Outcome(statement, cases, worst, 0.0, worst == 0, where or "dyadic β: exact", example)
    if betas == (0.0,):
        return [exact]
    wide = Outcome(
        statement, cases, worst_wide, allowed, worst_wide <= allowed, "any β, n ≤ 2^20: relative",
        None if worst_wide <= allowed else example,
    )  # fmt: skip
    return [exact, wide]


@holds("algorithm-1", "algorithm-2", "algorithm-3", strength="exhaustive")
def server_step(subject: Subject, size: Size) -> Iterator[Outcome]:
    """Compare one step of each asynchronous rule with the printed algorithm."""
    dyadic = (0.0, 0.5, 0.25, 0.75)
    claims = subject.claims
    yield from _algorithm(
        subject, size, "algorithm-1", without_momentum(subject.al_sgd), claims.algorithm_1, (0.0,)
    )
    yield from _algorithm(subject, size, "algorithm-2", subject.rule, claims.algorithm_2, dyadic)
    yield from _algorithm(
        subject, size, "algorithm-3", subject.local_ormo_da, claims.algorithm_3, dyadic
    )


def without_momentum(rule: Callable[..., Any]) -> Callable[..., Any]:
    """Return a rule factory that accepts and ignores β, for a rule without momentum."""
    return lambda num_workers, momentum=None, **options: rule(num_workers, **options)


def replay(subject: Subject, statement: str, case: dict[str, Any]) -> tuple[float, float]:
    """Run a counterexample of :func:`server_step` again; return relative residual and allowance."""
    rule, claim = {
        "algorithm-1": (without_momentum(subject.al_sgd), subject.claims.algorithm_1),
        "algorithm-2": (subject.rule, subject.claims.algorithm_2),
        "algorithm-3": (subject.local_ormo_da, subject.claims.algorithm_3),
    }[statement]
    at = Step(np.array([case["step"]]), np.array([case["dispatched_at"]]))
    rates = BY_STEP[at.step % 7] * BY_DELAY[(at.step - at.index) % 4]
    num_workers, beta = case["num_workers"], case["beta"]
    with jax.enable_x64(True):
        expected = stated(claim, subject, num_workers, at, beta, rates)
        reads = [read_step(rule, num_workers, constant) for constant in (None, beta)]
        worst = max(float(compare(read, at, beta, expected)[1].max()) for read in reads)
    return worst, ROUNDINGS * 2.0**-53


def _case(statement, num_workers, beta, step, index) -> dict[str, Any]:
    return {
        "num_workers": num_workers,
        "beta": beta,
        "step": int(step),
        "dispatched_at": int(index),
    }

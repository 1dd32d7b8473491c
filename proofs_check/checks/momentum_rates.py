"""Checks what momentum gains under delay: in the order of dispatch, or with look-ahead.

K workers report in turn. Their changes are linear: Δ = λ·(the parameters that were sent). λ is near
1 if a round converges along a direction, and small if it hardly moves. A method's rate is the
largest factor by which an error shrinks in one report, over λ in [0.02, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from orlomo_jax import LocalUpdate
from orlomo_jax.rules import look_ahead_over_delay
from proofs_check.registry import Outcome, Size, Subject, holds

LAMBDAS = np.geomspace(0.02, 1.0, 9)
MOMENTA = (0.0, 0.2, 0.4, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)
RATES = tuple(np.arange(0.05, 2.5, 0.05))
ROUNDS = (0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5)
GAIN, ALLOWED, CLOSE = 3.0, 1e-4, 0.1
ORDERED = (0.8, 0.6)
"""μ and η of ordered outer momentum."""
STEPS = 8000
"""Reports from which the rule's own rate is measured."""


def largest_factor(K: int, momentum: float, rate: float, rounds: float) -> float:
    """Return the spectral radius of the recursion of (w, m, the last K points sent), over all λ."""
    rho = momentum ** (1 / K) if momentum else 0.0
    gain = rate * (1 - rho) / (K * (1 - momentum))
    step = np.zeros((len(LAMBDAS), K + 2, K + 2))
    step[:, 1, 1], step[:, 1, K + 1] = rho, gain * LAMBDAS
    step[:, 0] = -step[:, 1]
    step[:, 0, 0] += 1
    step[:, 2] = step[:, 0] - rounds * K * step[:, 1]
    step[:, range(3, K + 2), range(2, K + 1)] = 1
    return float(np.abs(np.linalg.eigvals(step)).max())


def measured_factor(rule: Any, K: int, sends: Callable[[Any, Any], Any]) -> float:
    """Return the factor of a rule itself, fitted to the size of the points that it sends."""
    start = jnp.ones(len(LAMBDAS))

    def report(carry, step):
        w, state, sent, at = carry
        delta = LocalUpdate(jnp.asarray(LAMBDAS) * sent[0])
        update, state = rule.update(delta, state, w, dispatched_at=at[0], worker=step % K)
        w = w + update
        sent = jnp.roll(sent, -1, 0).at[-1].set(sends(state, w))
        at = jnp.roll(at, -1).at[-1].set(step + 1)
        return (w, state, sent, at), jnp.log(jnp.abs(sent).max())

    carry = start, rule.init(start), jnp.ones((K, len(LAMBDAS))), jnp.zeros(K, jnp.int32)
    _, sizes = jax.lax.scan(report, carry, jnp.arange(STEPS, dtype=jnp.int32))
    slope, _ = np.polyfit(np.arange(STEPS // 2), np.asarray(sizes)[STEPS // 2 :], 1)
    return float(np.exp(slope))


@lru_cache
def best(K: int) -> tuple[float, float, float]:
    """Return the best rates: of μ = 0, of any μ without look-ahead, and with look-ahead."""
    plain = min(largest_factor(K, 0.0, eta, 0.0) for eta in RATES)
    momentum = min(largest_factor(K, mu, eta, 0.0) for mu in MOMENTA for eta in RATES)
    ahead = min(
        largest_factor(K, mu, eta, h) for mu in MOMENTA[4:] for eta in RATES[4:24] for h in ROUNDS
    )
    return plain, momentum, ahead


@holds("ordered-momentum-rate", "delay-lookahead-rate", strength="property")
def momentum_rates(subject: Subject, size: Size) -> Iterator[Outcome]:
    """Compare the best rates, and the rules' own rates with them."""
    counts = (2, 4, 8) if size.settings >= 5 else (4,)
    worst, ordered, notes, more = 0.0, 0.0, [], []
    for K in counts:
        plain, momentum, ahead = best(K)
        notes.append(f"K={K}: {plain:.4f} without, {ahead:.4f} with look-ahead")
        if momentum < plain or (1 - ahead) < GAIN * (1 - plain):
            worst = math.inf
        with jax.enable_x64(True):
            rule = subject.field_rule("delay_lookahead")(K, 0.85, 0.5)
            own = measured_factor(rule, K, look_ahead_over_delay(K, 1.75))
            rule = subject.field_rule("local_ormo_da")(K, *ORDERED)
            in_order = measured_factor(rule, K, lambda state, w: w)
        worst = max(worst, abs(own - largest_factor(K, 0.85, 0.5, 1.75)))
        ordered = max(ordered, (in_order - ahead) / (1 - ahead))
        more.append(f"K={K}: {in_order:.4f}")
    yield Outcome(
        "delay-lookahead-rate", len(counts), worst, ALLOWED, worst <= ALLOWED, "; ".join(notes)
    )
    yield Outcome(
        "ordered-momentum-rate", len(counts), ordered, CLOSE, ordered <= CLOSE, "; ".join(more)
    )

"""Defines the paper's formulas once, so that NumPy, fractions and SymPy can all evaluate them.

The checks take every formula from a field of :class:`Claims`. So a wrong statement is easy to make,
``PAPER._replace(lemma_2=…)``, and must fail the same checks. Two quantities are arguments, because
each number type computes them in its own way: ``power`` = β^n and ``past`` = β(1−β^n)/(1−β) =
Σ_{j=1..n} β^j.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class ServerStep(NamedTuple):
    """One server step as a linear map of (u, Δu, Δw) to u_{t+1} and to w_{t+1} − w_t.

    Attributes:
        u: Coefficients of (u_t, Δu, Δw) in u_{t+1}.
        w: Coefficients of (u_t, Δu, Δw) in w_{t+1} − w_t.
    """

    u: tuple[Any, Any, Any]
    w: tuple[Any, Any, Any]


def _algorithm_1(beta, opens, power, past, rate):
    return ServerStep(u=(0, 0, 0), w=(0, 0, -rate))


def _algorithm_2(beta, opens, power, past, rate):
    return ServerStep(
        u=(1 - opens + opens * beta, power * rate, 0), w=(-opens * beta, -past * rate, -rate)
    )


def _algorithm_3(beta, opens, power, past, rate):
    return ServerStep(  # (1−β^{n+1})/(1−β) = 1 + β(1−β^n)/(1−β)
        u=(1 - opens + opens * beta, 0, power * rate), w=(-opens * beta, 0, -(1 + past) * rate)
    )


def _lemma_4(gamma, beta, local_steps):
    factor = gamma**2 * local_steps * (local_steps - 1) / (1 - beta) ** 2
    return factor, factor


def _lemma_10(gamma, beta, local_steps, num_workers):
    factor = 2 * gamma**2 * beta**2 / (1 - beta) ** 4
    return factor / num_workers, factor * local_steps


def _lemma_11(gamma, beta, local_steps, num_workers):
    factor = 4 * gamma**2 * local_steps / (1 - beta) ** 2
    return factor / num_workers, factor


def _theorem_1(gamma, beta, local_steps, num_workers, num_steps, smoothness):
    return (
        4 * num_workers * (1 - beta) / (gamma * local_steps * num_steps),
        4 * gamma * smoothness / (num_workers * (1 - beta) ** 2)
        + gamma**2 * smoothness**2 * (local_steps - 1) / (1 - beta) ** 2,
    )


def _remark_5(beta, local_steps, num_workers, num_steps, smoothness, sigma, gap):
    """Return the three candidates for γ; None if a term's denominator is zero."""
    noise = drift = None
    if sigma != 0:
        noise = (gap / (smoothness * local_steps * num_steps)) ** 0.5
        noise = num_workers * (1 - beta) ** 1.5 * noise / sigma
        if local_steps > 1:
            drift = 4 * num_workers * gap / (local_steps * (local_steps - 1) * num_steps)
            drift = (1 - beta) * (drift / (smoothness * sigma) ** 2) ** (1 / 3)
    return (1 - beta) ** 2 / (16 * smoothness * local_steps), noise, drift


def _remark_5_order(local_steps, num_workers, num_steps, smoothness, sigma):
    total = local_steps * num_steps
    drift = (num_workers * smoothness * sigma) ** (2 / 3) * (local_steps - 1) ** (1 / 3)
    return (
        (smoothness * sigma**2 / total) ** 0.5,
        drift / total ** (2 / 3),
        num_workers * smoothness / num_steps,
    )


def _in_flight_rate(num_workers, virtual_delay, index, num_steps):
    """Return Eq. (6) at the virtual delay T − i, so that η̂·(T−1−i) ≤ 2."""
    return 1 / virtual_delay if virtual_delay > 2 * num_workers else 1 / num_workers


def _delay_adaptive(num_workers, delay):
    return (1, num_workers) if delay <= 2 * num_workers else (1, delay)


class Claims(NamedTuple):
    """The formulas of the paper, as functions; "(a, b) → c" gives the arguments and the result.

    Attributes:
        group: (index i, K) → the group ⌈i/K⌉.
        opens: (step t ≥ 1, K) → whether the step multiplies by β: K | (t−1).
        delay_adaptive: (K, delay) → Eq. (6), as (numerator, denominator).
        algorithm_1, algorithm_2, algorithm_3: (β, opens, power, past, η) → a :class:`ServerStep`.
        identity: β → the coefficients of (Δu, Δw) in Δh, from Δh/(1−β) = βΔu/(1−β) + Δw.
        lemma_1: (power, past, η̂) → the weight of an in-flight Δu in û_{t+1} − u_{t+1}.
        lemma_2: (power, past, η̂) → the weights of an in-flight (Δw, Δu) in ŵ_{t+1} − w_{t+1}.
        lemma_3: β → the factor c of (1−β)(ŷ_t − ŵ_t) = c·û_t.
        lemma_9: (t, K) → m = ⌊(t+K−2)/K⌋; index j has weight β^{m−⌈j/K⌉} in û_t.
        lemma_4: (γ, β, S) → the factors of σ² and Σ_s E‖∇F(w̃_s)‖².
        lemma_10, lemma_11: (γ, β, S, K) → the factors of σ²·H and G.
        theorem_1: (γ, β, S, K, T, L) → the factors of F(w_0) − F* and σ².
        delay_sum: (K, T) → Σ_k τ̂_{T,k} + Σ_t τ_t.
        remark_5: (β, S, K, T, L, σ, F(w_0) − F*) → the three candidates for γ.
        remark_5_order: (S, K, T, L, σ) → the three terms of its order.
        remark_4_order: (γ, K, S) → the terms of the stationary error, γ/K and γ²S.
        in_flight_rate: (K, T − i, i, T) → the η̂ of a report that never arrives.
    """

    group: Callable = lambda index, num_workers: -(-index // num_workers)
    opens: Callable = lambda step, num_workers: (step - 1) % num_workers == 0
    delay_adaptive: Callable = _delay_adaptive
    algorithm_1: Callable = _algorithm_1
    algorithm_2: Callable = _algorithm_2
    algorithm_3: Callable = _algorithm_3
    identity: Callable = lambda beta: (beta, 1 - beta)
    lemma_1: Callable = lambda power, past, rate: rate * power
    lemma_2: Callable = lambda power, past, rate: (-rate, -rate * past)
    lemma_3: Callable = lambda beta: -beta
    lemma_9: Callable = lambda step, num_workers: (step + num_workers - 2) // num_workers
    lemma_4: Callable = _lemma_4
    lemma_10: Callable = _lemma_10
    lemma_11: Callable = _lemma_11
    theorem_1: Callable = _theorem_1
    delay_sum: Callable = lambda num_workers, num_steps: (num_workers - 1) * num_steps
    remark_5: Callable = _remark_5
    remark_5_order: Callable = _remark_5_order
    remark_4_order: Callable = lambda gamma, num_workers, local_steps: (
        gamma / num_workers,
        gamma**2 * local_steps,
    )
    in_flight_rate: Callable = _in_flight_rate


PAPER = Claims()

"""Computes running bounds on the rounding errors of a correct implementation, per element.

Let υ be the unit roundoff of the parameters' dtype and c = 72υ: 64υ for a coefficient (pow and the
doublings of a geometric sum), the rest for the products and sums that use it. One server step keeps
the error so far and adds c times the magnitudes that it uses:

- e^u_{t+1} = (1+c) β^o e^u_t + c (β^o|u_t| + β^n|η_t Δu|),
- e^w_{t+1} = e^w_t + o(e^u_t + e^u_{t+1}) + 4υ(|w_t| + |w_{t+1}|)
  + c (o|u_t| + o|u_{t+1}| + |η_t Δw| + (β^n + Σβ^j)|η_t Δu|),

whether the step is written with the old or the new u. The auxiliary sequences are computed in
longdouble from the recorded reports and rates. Each of their terms is rounded at most 4(t+8+K)
times, so 4(t+8+K)ε times the same sums over absolute values bounds their error.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from proofs_check import sequences
from proofs_check.sequences import Frame, Powers

COEFFICIENT = 72


def server_bounds(
    num_workers: int,
    index: np.ndarray,
    table: Powers,
    beta: Any,
    rates: np.ndarray,
    u: np.ndarray,
    w: np.ndarray,
    du: np.ndarray,
    dw: np.ndarray,
    start: np.ndarray,
    unit: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Return e^u_{t+1} and e^w_{t+1}, each [T, d].

    Args:
        num_workers: K.
        index: The index of the report that arrives at t, int[T].
        table: Powers of β.
        beta: β.
        rates: η_t, [T].
        u: u_{t+1} as computed, [T, d].
        w: w_{t+1} as computed, [T, d].
        du: The Δu that arrives at t, [T, d].
        dw: The Δw that arrives at t, [T, d].
        start: w_0, [d].
        unit: υ, half the distance from 1 to the next number.
    """
    c = COEFFICIENT * unit
    u, w = (np.abs(np.vstack([x[None], y])) for x, y in ((start * 0, u), (start, w)))
    error_u, error_w = np.zeros_like(start), np.zeros_like(start)
    bounds_u, bounds_w = [], []
    for t in range(len(index)):
        late = -(-t // num_workers) - -(-int(index[t]) // num_workers)
        opens = (t - 1) % num_workers == 0
        fade = beta if opens else 1.0
        momentum, change = np.abs(rates[t] * du[t]), np.abs(rates[t] * dw[t])
        before = error_u
        error_u = (1 + c) * fade * error_u + c * (fade * u[t] + table.power[late] * momentum)
        error_w = error_w + 4 * unit * (w[t] + w[t + 1])
        error_w = error_w + c * (change + (table.power[late] + table.past[late]) * momentum)
        if opens:
            error_w = error_w + before + error_u + c * (u[t] + u[t + 1])
        bounds_u.append(error_u)
        bounds_w.append(error_w)
    return np.stack(bounds_u), np.stack(bounds_w)


def reference_bounds(
    of: Frame,
    table: Powers,
    beta: Any,
    hat: np.ndarray,
    du: np.ndarray,
    dw: np.ndarray,
    dh: np.ndarray,
    start: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return bounds on the errors of û, ŵ (each with its lemma's sum) and (1−β)ŷ, [T, d] each."""
    hat = np.abs(hat)
    sizes = sequences.auxiliary(  # −|Δ| makes the terms of ŵ and ŷ positive, so none cancel
        of, beta, hat, -np.abs(du), -np.abs(dw), -np.abs(dh), np.abs(start)
    )
    sum_u, sum_w = sequences.in_flight_sums(of, table, hat, np.abs(du), np.abs(dw))
    steps = 4.0 * (np.arange(of.num_steps) + 8 + of.num_workers)
    each = (steps * np.finfo(np.longdouble).eps)[:, None]
    return (
        each * (np.abs(sizes.u) + np.abs(sum_u)),
        each * (np.abs(sizes.w) + np.abs(sum_w)),
        each * np.abs(sizes.scaled_y),
    )


def worker_bounds(
    beta: Any,
    gamma: Any,
    gradients: np.ndarray,
    sizes: np.ndarray,
    local: np.ndarray,
    unit: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Return bounds on the errors of a round's Δu and Δw, given its gradients; [D, d] each.

    Args:
        beta: β.
        gamma: γ.
        gradients: g_s by slot, [D, S, d].
        sizes: The sum of the absolute values of each gradient's terms, [D, S, d]. A gradient that
            another program computes may differ by 32υ times this.
        local: w̃_s by slot, [D, S, d].
        unit: υ.
    """
    local_steps = gradients.shape[1]
    change = gamma * (np.abs(gradients) + 4 * sizes)
    error_u = error_w = momentum = np.zeros_like(gradients[:, 0])
    for s in range(local_steps):
        momentum = beta * momentum + change[:, s]
        error_u = beta * error_u + 8 * unit * momentum + 32 * unit * gamma * sizes[:, s]
        error_w = error_w + error_u + 4 * unit * (np.abs(local[:, s]) + momentum)
    return error_u, error_w + 4 * unit * np.abs(local[:, 0])

"""Computes the auxiliary sequences û, ŵ, ŷ from their definitions, and the sums of the lemmas.

This module uses NumPy only and does not call any server rule. Every function works for any arrival
order, any rates η_t and any η̂ of the reports in flight. Orders may have leading batch axes. The
numbers may be float64, longdouble, or Fractions (dtype object), which are exact.

Reports are numbered by *slots*: slot k < K is worker k's report of index 0, and slot K−1+j is the
report of index j ≥ 1, up to index T−1. ŷ is always computed as (1−β)ŷ. This avoids a division, so
it is exact for dyadic β.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from proofs_check.claims import PAPER, Claims


@dataclass(frozen=True)
class Frame:
    """An arrival order with T steps, K workers and D = K+T−1 reports.

    Leading axes are batches of orders.

    Attributes:
        num_workers: K.
        workers: k_t, int[..., T].
        sent: ite(t, k), int[..., T+1, K].
        used: The slot used at step t, int[..., T].
        index: The index of each slot, int[D].
        arrival: The step at which each slot is used, int[..., D]; T if it is still in flight.
    """

    num_workers: int
    workers: np.ndarray
    sent: np.ndarray
    used: np.ndarray
    index: np.ndarray
    arrival: np.ndarray

    @property
    def num_steps(self) -> int:
        """The number of steps T."""
        return self.workers.shape[-1]

    @property
    def dispatched_at(self) -> np.ndarray:
        """ite(t, k_t), int[..., T]."""
        return np.take_along_axis(self.sent[..., :-1, :], self.workers[..., None], -1)[..., 0]

    @property
    def delays(self) -> np.ndarray:
        """τ_t = t − ite(t, k_t), int[..., T]."""
        return np.arange(self.num_steps) - self.dispatched_at


class Auxiliary(NamedTuple):
    """The sequences û_{t+1}, ŵ_{t+1} and (1−β)ŷ_{t+1} for t = 0 … T−1, each [T, ..., d]."""

    u: np.ndarray
    w: np.ndarray
    scaled_y: np.ndarray


class Powers(NamedTuple):
    """The values β^n and Σ_{j=1..n} β^j, indexed by n."""

    power: np.ndarray
    past: np.ndarray


def frame(workers: Any, num_workers: int) -> Frame:
    """Return the frame of an arrival order; after step t only worker k_t is sent w_{t+1}.

    Args:
        workers: k_t, int[..., T].
        num_workers: K.

    Example:
        >>> frame([0, 2, 1, 2, 1, 1, 2, 2, 0], 3).dispatched_at  # Figure 1
        array([0, 0, 0, 2, 3, 5, 4, 7, 1])
    """
    workers = np.asarray(workers)
    *batch, num_steps = workers.shape
    num_slots = num_workers + num_steps - 1
    sent = np.zeros((*batch, num_steps + 1, num_workers), int)
    used = np.zeros((*batch, num_steps), int)
    arrival = np.full((*batch, max(num_slots, 1)), num_steps)
    for t in range(num_steps):
        worker = workers[..., t, None]
        index = np.take_along_axis(sent[..., t, :], worker, -1)
        slot = _slot(index, worker, num_workers)
        used[..., t] = slot[..., 0]
        np.put_along_axis(arrival, slot, t, -1)
        sent[..., t + 1, :] = sent[..., t, :]
        np.put_along_axis(sent[..., t + 1, :], worker, t + 1, -1)
    index = np.maximum(np.arange(num_slots) - num_workers + 1, 0)
    return Frame(num_workers, workers, sent, used, index, arrival)


def hat_rates(of: Frame, rates: np.ndarray, in_flight: np.ndarray) -> np.ndarray:
    """Return η̂ of every slot, [..., D]: η at its arrival, or ``in_flight`` if it never arrives."""
    arrived = of.arrival < of.num_steps
    at_arrival = np.take_along_axis(
        np.broadcast_to(rates, of.workers.shape), np.minimum(of.arrival, of.num_steps - 1), -1
    )
    return np.where(arrived, at_arrival, in_flight)


def powers(beta: Any, largest: int, dtype: Any = float) -> Powers:
    """Return β^n and Σ_{j=1..n} β^j for n = 0 … largest, by repeated products; β⁰ = 1 at β = 0.

    Example:
        >>> powers(0.5, 3).past
        array([0.   , 0.5  , 0.75 , 0.875])
    """
    power, past = [beta**0], [beta * 0]
    for _ in range(largest):
        power.append(power[-1] * beta)
        past.append(past[-1] + power[-1])
    return Powers(np.array(power, dtype), np.array(past, dtype))


def auxiliary(
    of: Frame,
    beta: Any,
    rates: np.ndarray,
    du: np.ndarray,
    dw: np.ndarray,
    dh: np.ndarray,
    start: np.ndarray,
) -> Auxiliary:
    """Return û, ŵ and (1−β)ŷ from their definitions.

    Args:
        of: The frame.
        beta: β.
        rates: η̂ of every slot, [..., D] (see :func:`hat_rates`).
        du: Δu of every slot, [..., D, d].
        dw: Δw of every slot, [..., D, d].
        dh: Δh = γ Σ_s g_s of every slot, [..., D, d].
        start: w_0, [..., d].
    """
    num_workers, first = of.num_workers, range(of.num_workers)
    weighed_u, weighed_w, weighed_h = (rates[..., None] * x for x in (du, dw, dh))
    u = sum(weighed_u[..., k, :] for k in first)
    w = start - sum(weighed_w[..., k, :] for k in first)
    y = (1 - beta) * start - sum(weighed_h[..., k, :] for k in first)
    all_u, all_w, all_y = [u], [w], [y]
    for t in range(1, of.num_steps):
        slot = num_workers - 1 + t
        if (t - 1) % num_workers == 0:  # K | (t−1)
            w, u = w - beta * u, beta * u
        u = u + weighed_u[..., slot, :]
        w = w - weighed_w[..., slot, :]
        y = y - weighed_h[..., slot, :]
        all_u.append(u)
        all_w.append(w)
        all_y.append(y)
    return Auxiliary(np.stack(all_u), np.stack(all_w), np.stack(all_y))


def in_flight_sums(
    of: Frame,
    table: Powers,
    rates: np.ndarray,
    du: np.ndarray,
    dw: np.ndarray,
    claims: Claims = PAPER,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the right-hand sides of Lemmas 1 and 2 as printed, for t = 0 … T−1, each [T, ..., d].

    The sums run over the workers k ≠ k_t. Worker k's report has the index ite(t, k).
    """
    num_workers = of.num_workers
    sums_u, sums_w = [], []
    for t in range(of.num_steps):
        sum_u = sum_w = 0
        for k in range(num_workers):
            index = of.sent[..., t, k]
            slot = _slot(index, k, num_workers)
            late = claims.group(t, num_workers) - claims.group(index, num_workers)
            rate = np.take_along_axis(rates, slot[..., None], -1)[..., 0]
            rate = np.where(of.workers[..., t] == k, rate * 0, rate)  # k ≠ k_t
            power, past = table.power[late], table.past[late]
            change, momentum = _take(dw, slot), _take(du, slot)
            weight_1 = np.asarray(claims.lemma_1(power, past, rate))
            weight_w, weight_u = map(np.asarray, claims.lemma_2(power, past, rate))
            others = (of.workers[..., t] != k)[..., None]
            sum_u = sum_u + others * (weight_1[..., None] * momentum)
            sum_w = sum_w + others * (weight_w[..., None] * change + weight_u[..., None] * momentum)
        sums_u.append(sum_u)
        sums_w.append(sum_w)
    return np.stack(sums_u), np.stack(sums_w)


def lemma_9_sums(
    of: Frame, table: Powers, rates: np.ndarray, du: np.ndarray, claims: Claims = PAPER
) -> np.ndarray:
    """Return the right-hand side of Lemma 9 for û_1 … û_T, [T, ..., d]."""
    num_workers = of.num_workers
    weighed = rates[..., None] * du
    sums = []
    for t in range(1, of.num_steps + 1):
        m = claims.lemma_9(t, num_workers)
        total = table.power[m] * sum(weighed[..., k, :] for k in range(num_workers))
        for q in range(1, m + 1):
            for j in range((q - 1) * num_workers + 1, min(q * num_workers, t - 1) + 1):
                total = total + table.power[m - q] * weighed[..., num_workers - 1 + j, :]
        sums.append(total)
    return np.stack(sums)


def ledger_residuals(
    num_workers: int,
    index: np.ndarray,
    arrival: np.ndarray,
    table: Powers,
    beta: Any,
    rates: np.ndarray,
    du: np.ndarray,
    dw: np.ndarray,
    start: np.ndarray,
    num_steps: int,
) -> tuple[np.ndarray, np.ndarray]:
    r"""Return u_{t+1} and w_{t+1} as Lemmas 1 and 2 give them in ledger form, each [T, d].

    **Ledger form.** Each index may have any number of dispatches, to any workers: first ones, late
    joins, re-dispatches after a loss. With D_j the dispatches of index j,

    - û_1 = Σ_{d∈D_0} η̂_d Δu_d; û_{t+1} = β^{[K | (t−1)]} û_t + Σ_{d∈D_t} η̂_d Δu_d,
    - ŵ_1 = w_0 − Σ_{d∈D_0} η̂_d Δw_d; ŵ_{t+1} = ŵ_t − [K | (t−1)] βû_t − Σ_{d∈D_t} η̂_d Δw_d,

    Let Q_t be the dispatches of index ≤ t that have not arrived by the end of step t. They include
    the lost ones, and each may have any η̂. With n_d = ⌈t/K⌉ − ⌈i_d/K⌉, after step t

    - û_{t+1} − u_{t+1} = Σ_{d∈Q_t} β^{n_d} η̂_d Δu_d,
    - ŵ_{t+1} − w_{t+1} = −Σ_{d∈Q_t} [η̂_d Δw_d + β(1−β^{n_d})/(1−β) η̂_d Δu_d].

    Without failures D_t = {k_{t−1}} and Q_t = {k ≠ k_t}, which gives the printed lemmas. Theorem 1
    and the delay facts do not have a ledger form: they assume exactly K dispatches in flight.

    Args:
        num_workers: K, the size of a group. The number of workers may change during the run.
        index: The index of each dispatch, int[D].
        arrival: The step at which it is used, int[D]; T or more if it never arrives.
        table: From :func:`powers`.
        beta: β.
        rates: η̂ of each dispatch, [D].
        du: Δu, [D, d].
        dw: Δw, [D, d].
        start: w_0, [d].
        num_steps: T.
    """
    weighed_u, weighed_w = rates[:, None] * du, rates[:, None] * dw
    u, w = start * 0, start
    us, ws = [], []
    for t in range(num_steps):
        if t >= 1 and (t - 1) % num_workers == 0:
            w, u = w - beta * u, beta * u
        for d in np.flatnonzero(index == t):
            u, w = u + weighed_u[d], w - weighed_w[d]
        flight_u = flight_w = start * 0
        for d in np.flatnonzero((index <= t) & (arrival > t)):
            late = -(-t // num_workers) - -(-int(index[d]) // num_workers)
            flight_u = flight_u + table.power[late] * weighed_u[d]
            flight_w = flight_w - (weighed_w[d] + table.past[late] * weighed_u[d])
        us.append(u - flight_u)
        ws.append(w - flight_w)
    return np.stack(us), np.stack(ws)


def _slot(index, worker, num_workers):
    return np.where(index == 0, worker, num_workers - 1 + index)


def _take(reports, slot):
    """Return reports[..., slot, :] for slot int[...], with or without batch axes on reports."""
    if reports.ndim == 2:
        return reports[slot]
    return np.take_along_axis(reports, slot[..., None, None], -2)[..., 0, :]

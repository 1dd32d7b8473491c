"""Defines CA2FL, buffered reports with cached update calibration (Wang et al. 2024)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from orlomo_jax import trees
from orlomo_jax.checks import check_count
from orlomo_jax.rules import contract, ordering
from orlomo_jax.rules.delay_adaptive_rate import scheduled
from orlomo_jax.rules.round_mean import next_version, place
from orlomo_jax.trees import Array


class CA2FLState(NamedTuple):
    """State of :func:`ca2fl`; its trees are like params, in float32 or wider.

    Attributes:
        step: The number of reports received, int32[].
        version: The number of updates of the parameters, int32[].
        cached: h, the newest Δ of each worker; every leaf has a leading axis K. 0 for a worker
            that has not reported.
        cached_mean: h̄, the mean of the h_k at the last update of the parameters.
        pending: D, the sum of Δ_k − h_k over the reports since that update. The first report
            after it resets the sum.
    """

    step: Array
    version: Array
    cached: trees.Params
    cached_mean: trees.Params
    pending: trees.Params


def ca2fl(
    num_workers: int, buffer_size: int, learning_rate: float | optax.Schedule = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""Average buffered reports, and the last Δ of every worker for those that did not report.

    The server caches h_k, the newest Δ of worker k. A report of worker k makes

    - D ← D + Δ − h_k, then h_k ← Δ;

    and every B-th report makes

    - w ← w − η(D/B + h̄), then D ← 0 and h̄ ← (1/K) Σ_k h_k.

    So h̄ is the mean at the *last* update, not of now. D adds up to the changes of the h_k since
    then, so the new mean is h̄ + D/K: a report reads and writes one row of h only. A worker that
    reports twice between two updates counts with its newest Δ, as in public implementations; the
    paper was not consulted for this case. The Δ of a worker that has left stays in h̄.

    Needs: ``worker``. The state is K + 2 times as large as the parameters.

    Args:
        num_workers: K ≥ 1, including workers that join later.
        buffer_size: B ≥ 1.
        learning_rate: η, a finite float ≥ 0, or a schedule of the server's step, read at the B-th
            report. The default 1 takes the calibrated mean as it is.

    Returns:
        A transformation of a :class:`~orlomo_jax.LocalUpdate` (its ``momentum`` is not read) to
        updates like params; ``update`` needs the keyword ``worker``.

    Raises:
        ValueError: If a concrete hyperparameter or ``worker`` is out of range, or a report's
            structure or shapes differ from those of params.
        TypeError: If a count or ``worker`` is not an integer, ``update`` gets anything but a
            LocalUpdate, or a leaf of params is not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from orlomo_jax import LocalUpdate
        >>> rule = ca2fl(num_workers=2, buffer_size=1)
        >>> state = rule.init(jnp.zeros(1))
        >>> for worker in (0, 1, 0):
        ...     report = LocalUpdate(jnp.full(1, 2.0))
        ...     updates, state = rule.update(report, state, worker=worker)
        ...     print(updates, state.cached_mean)
        [-2.] [1.]
        [-3.] [2.]
        [-2.] [2.]

    References:
        Wang, Cao, Wu, Chen and Chen, `Tackling the data heterogeneity in asynchronous federated
        learning with cached update calibration <https://openreview.net/forum?id=4aywmeb97I>`_,
        2024.
    """
    num_workers = contract.check_num_workers(num_workers)
    buffer_size = check_count("buffer_size", buffer_size, 1)
    rate = scheduled("learning_rate", learning_rate)

    def init(params: trees.Params) -> CA2FLState:
        zeros = trees.zeros(params, jnp.float32)
        rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_workers, *x.shape)), zeros)
        return CA2FLState(
            step=jnp.zeros([], jnp.int32),
            version=jnp.zeros([], jnp.int32),
            cached=rows,
            cached_mean=zeros,
            pending=trees.zeros(params, jnp.float32),
        )

    # Two things let XLA write the state in place, in one pass, instead of copying all of h:
    # D/B + h̄ is computed from the new h̄ as (1/B − 1/K)D + h̄, and the new row is chosen by a
    # condition that always holds, so that it waits for D, which reads the old row.
    def update(updates, state, params=None, *, worker=None, **extra_args):
        del params, extra_args
        report = contract.check_report(updates, state.pending, rule="ca2fl", momentum=False)
        row = contract.check_worker(worker, num_workers)
        keep, last = place(state.step, buffer_size)
        eta, share = jax.lax.optimization_barrier(
            (jnp.where(last, rate(state.step), 0.0), jnp.where(last, 1 / num_workers, 0.0))
        )
        excess = jax.lax.optimization_barrier(eta * (1 / buffer_size - 1 / num_workers))
        old = jax.tree.map(
            lambda h: jax.lax.dynamic_index_in_dim(h, row, keepdims=False), state.cached
        )
        pending = trees.combine(
            [(keep, state.pending), (1.0, report.delta), (-1.0, old)], like=state.pending
        )
        mean = trees.combine([(1.0, state.cached_mean), (share, pending)], like=state.cached_mean)
        new_updates = trees.combine([(-excess, pending), (-eta, mean)], like=report.delta)

        def cached(h, delta, summed):
            new = jnp.where(state.step >= 0, delta.astype(h.dtype), summed)
            return jax.lax.dynamic_update_index_in_dim(h, new, row, 0)

        return new_updates, CA2FLState(
            step=ordering.increment(state.step),
            version=next_version(state.version, last),
            cached=jax.tree.map(cached, state.cached, report.delta, pending),
            cached_mean=mean,
            pending=pending,
        )

    return optax.GradientTransformationExtraArgs(init, update)

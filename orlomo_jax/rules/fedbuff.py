"""Defines FedBuff, buffered asynchronous aggregation (Nguyen et al. 2021)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from orlomo_jax import trees
from orlomo_jax.checks import check_count
from orlomo_jax.rules import contract, ordering
from orlomo_jax.rules.delay_adaptive_rate import DelayWeight, scheduled, weighted
from orlomo_jax.rules.staleness_weights import polynomial
from orlomo_jax.trees import Array


class FedBuffState(NamedTuple):
    """State of :func:`fedbuff`.

    Attributes:
        step: t, the number of reports received, int32[].
        version: The number of updates of the parameters, int32[].
        pending: D = Σ s(τ) Δw over the reports since the last update; a tree like params, in
            float32 or wider. The first report after an update resets it.
    """

    step: Array
    version: Array
    pending: trees.Params


def fedbuff(
    buffer_size: int = 10,
    learning_rate: float | optax.Schedule = 1.0,
    delay_weight: DelayWeight | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Update the parameters once in B reports, by their weighted mean: w ← w − η D/B.

    - Every report: D ← D + s(τ) Δw.
    - Every B-th report: w ← w − η D/B, then D ← 0.

    The delay τ counts *versions*, that is updates of w, since the worker's task was sent. Δw is
    against the parameters that were *sent*. B is fixed: the weights s(τ) are not normalized. With
    B = 1, versions are reports, and this is :func:`~orlomo_jax.al_sgd` with the same weight.

    Needs: ``dispatched_version``.

    Args:
        buffer_size: B ≥ 1; the default is the paper's.
        learning_rate: η, a finite float ≥ 0, or a schedule of the server's step (reports); the
            B-th report's step counts. The default 1 makes B equal weights the plain mean.
        delay_weight: s, a function of the delay in versions; None is (1 + τ)^−½, the paper's.

    Returns:
        A transformation of a :class:`~orlomo_jax.LocalUpdate` (its ``momentum`` is not read) to
        updates like params: zeros, except at every B-th report.

    Raises:
        ValueError: If a concrete hyperparameter is out of range, or a report's structure or shapes
            differ from those of params.
        TypeError: If ``update`` gets anything but a LocalUpdate, ``dispatched_version`` is not an
            integer scalar, or a leaf of params is not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from orlomo_jax import LocalUpdate
        >>> rule = fedbuff(buffer_size=2)
        >>> state = rule.init(jnp.zeros(1))
        >>> for change in (1.0, 3.0):
        ...     report = LocalUpdate(jnp.full(1, change))
        ...     updates, state = rule.update(report, state, dispatched_version=0)
        ...     print(updates, state.version)
        [0.] 0
        [-2.] 1

    References:
        Nguyen et al., `Federated learning with buffered asynchronous aggregation
        <https://arxiv.org/abs/2106.06639>`_, 2021.
    """
    buffer_size = check_count("buffer_size", buffer_size, 1)
    rate = scheduled("learning_rate", learning_rate)
    weight = weighted(polynomial(0.5) if delay_weight is None else delay_weight)

    def init(params: trees.Params) -> FedBuffState:
        return FedBuffState(
            step=jnp.zeros([], jnp.int32),
            version=jnp.zeros([], jnp.int32),  # an array of its own, so that both can be donated
            pending=trees.zeros(params, jnp.float32),
        )

    def update(updates, state, params=None, *, dispatched_version=None, **extra_args):
        del params, extra_args
        report = contract.check_report(updates, state.pending, rule="fedbuff", momentum=False)
        sent = contract.check_dispatched_version(dispatched_version, state.version)
        first = state.step % buffer_size == 0
        last = (state.step + 1) % buffer_size == 0
        keep, scale, share = jax.lax.optimization_barrier(
            (
                jnp.where(first, 0.0, 1.0),
                weight(state.version - sent),
                jnp.where(last, rate(state.step) / buffer_size, 0.0),
            )
        )
        pending = trees.combine([(keep, state.pending), (scale, report.delta)], like=state.pending)
        new_updates = trees.combine([(-share, pending)], like=report.delta)
        version = jnp.where(last, ordering.increment(state.version), state.version)
        return new_updates, FedBuffState(ordering.increment(state.step), version, pending)

    return optax.GradientTransformationExtraArgs(init, update)

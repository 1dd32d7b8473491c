"""Defines FADAS, buffered reports with an AMSGrad step of the server (Wang et al. 2024)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from orlomo_jax import trees
from orlomo_jax.checks import check_count
from orlomo_jax.rules import contract, ordering
from orlomo_jax.rules.delay_adaptive_rate import scheduled
from orlomo_jax.rules.round_mean import add_to_round, next_version
from orlomo_jax.trees import Array


class FADASState(NamedTuple):
    """State of :func:`fadas`.

    Attributes:
        step: The number of reports received, int32[].
        version: The number of updates of the parameters, int32[].
        pending: Σ Δ over the reports since the last update, a tree like params in float32 or
            wider. The first report after it resets the sum.
        max_delay: The largest delay of these reports in versions, int32[]; reset like the sum.
        momentum: m, a tree like params.
        second_moment: v, a tree like params, real, in float32 or wider.
        max_second_moment: v̂, the largest v so far; like v.
    """

    step: Array
    version: Array
    pending: trees.Params
    max_delay: Array
    momentum: trees.Params
    second_moment: trees.Params
    max_second_moment: trees.Params


def fadas(
    buffer_size: int,
    learning_rate: float | optax.Schedule,
    b1: float | Array = 0.9,
    b2: float | Array = 0.99,
    eps: float | Array = 1e-8,
    *,
    delay_threshold: int | None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AMSGrad on the mean of B reports, with a smaller step if one of them is old.

    Every B-th report makes, with Δ̄ the mean of the B newest reports,

    - m ← β₁m + (1−β₁)Δ̄,
    - v ← β₂v + (1−β₂)|Δ̄|²,
    - v̂ ← max(v̂, v),
    - w ← w − η_t m/(√v̂ + ε),

    with η_t = η if τ_max ≤ τ_c, else min(η, 1/τ_max). τ_max is the largest delay of the B
    reports, counted in versions (updates of the parameters). If η ≤ 1/τ_max, an old report changes
    nothing.

    The formulas and the defaults of β₁, β₂ and ε are taken from secondary sources; those for B and
    τ_c differ, so there are none here. The moments are not corrected for their start at 0. Other
    implementations correct them, or use η/τ_max for an old report.

    Needs: ``dispatched_version``.

    Args:
        buffer_size: B ≥ 1.
        learning_rate: η, a finite float ≥ 0, or a schedule of the server's step, read at the B-th
            report.
        b1: β₁ in [0, 1).
        b2: β₂ in [0, 1).
        eps: ε > 0.
        delay_threshold: τ_c ≥ 0, the largest delay that keeps η; None never reduces it.
        accumulator_dtype: dtype of m, if wider than the leaf's.

    Returns:
        A transformation of a :class:`~orlomo_jax.LocalUpdate` (its ``momentum`` is not read) to
        updates like params; ``update`` needs the keyword ``dispatched_version``.

    Raises:
        ValueError: If a concrete hyperparameter is out of range, or a report's structure or shapes
            differ from those of params.
        TypeError: If a count is not an integer, ``update`` gets anything but a LocalUpdate,
            ``dispatched_version`` is not an integer scalar, or a leaf of params is not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from orlomo_jax import LocalUpdate
        >>> rule = fadas(2, 0.5, b1=0.0, b2=0.0, delay_threshold=1)
        >>> state = rule.init(jnp.zeros(1))
        >>> for change in (1.0, 3.0):
        ...     report = LocalUpdate(jnp.full(1, change))
        ...     updates, state = rule.update(report, state, dispatched_version=0)
        ...     print(updates)
        [0.]
        [-0.5]

    References:
        Wang, Wang, Lu and Chen, `FADAS: towards federated adaptive asynchronous optimization
        <https://arxiv.org/abs/2407.18365>`_, 2024.
    """
    buffer_size = check_count("buffer_size", buffer_size, 1)
    rate = scheduled("learning_rate", learning_rate)
    contract.check_momentum(b1, "b1")
    contract.check_momentum(b2, "b2")
    contract.check_positive("eps", eps)
    threshold = contract.check_limit("delay_threshold", delay_threshold, 0)

    def init(params: trees.Params) -> FADASState:
        pending = trees.zeros(params, jnp.float32)
        return FADASState(
            step=jnp.zeros([], jnp.int32),
            version=jnp.zeros([], jnp.int32),
            pending=pending,
            max_delay=jnp.zeros([], jnp.int32),
            momentum=trees.zeros(params, accumulator_dtype),
            second_moment=jax.tree.map(lambda x: jnp.zeros_like(x.real), pending),
            max_second_moment=jax.tree.map(lambda x: jnp.zeros_like(x.real), pending),
        )

    def update(updates, state, params=None, *, dispatched_version=None, **extra_args):
        del params, extra_args
        report = contract.check_report(updates, state.pending, rule="fadas", momentum=False)
        sent = contract.check_dispatched_version(dispatched_version, state.version)
        pending, last = add_to_round(state.step, buffer_size, state.pending, report.delta)
        delay = state.version - sent
        delay = jnp.where(state.step % buffer_size == 0, delay, jnp.maximum(state.max_delay, delay))
        now, beta1, beta2 = rate(state.step), jnp.asarray(b1, float), jnp.asarray(b2, float)
        late = jnp.minimum(now, 1 / jnp.maximum(delay, 1).astype(float))
        eta, decay1, share1, decay2, share2 = jax.lax.optimization_barrier(
            (
                jnp.where(last, jnp.where(delay > threshold, late, now), 0.0),
                jnp.where(last, beta1, 1.0),
                jnp.where(last, (1 - beta1) / buffer_size, 0.0),
                jnp.where(last, beta2, 1.0),
                jnp.where(last, (1 - beta2) / buffer_size**2, 0.0),
            )
        )
        momentum = trees.combine([(decay1, state.momentum), (share1, pending)], like=state.momentum)
        squares = jax.tree.map(lambda x: (x * x.conj()).real, pending)
        moment = trees.combine(
            [(decay2, state.second_moment), (share2, squares)], like=state.second_moment
        )
        top = jax.tree.map(jnp.maximum, state.max_second_moment, moment)

        def direction(m, v):
            dtype = trees.wide_dtype(m, v)
            return m.astype(dtype) / (jnp.sqrt(v) + jnp.asarray(eps, v.dtype)).astype(dtype)

        descent = jax.tree.map(direction, momentum, top)
        new_updates = trees.combine([(-eta, descent)], like=report.delta)
        return new_updates, FADASState(
            step=ordering.increment(state.step),
            version=next_version(state.version, last),
            pending=pending,
            max_delay=delay,
            momentum=momentum,
            second_moment=moment,
            max_second_moment=top,
        )

    return optax.GradientTransformationExtraArgs(init, update)

"""Defines AL-SGD, asynchronous local SGD (Algorithm 1)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from orlomo_jax import trees
from orlomo_jax.rules import contract, ordering
from orlomo_jax.rules.delay_adaptive_rate import DelayWeight, global_learning_rate
from orlomo_jax.trees import Array


class ALSGDState(NamedTuple):
    """State of :func:`al_sgd`.

    Attributes:
        step: t, the number of reports received, int32[].
    """

    step: Array


def al_sgd(
    num_workers: int,
    learning_rate: float | optax.Schedule = 1.0,
    delay_weight: DelayWeight | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Asynchronous local SGD: w_{t+1} = w_t − η_t Δw (Algorithm 1, line 7).

    With one local step (S = 1) this is ASGD. It equals buffered asynchronous aggregation with a
    buffer of one report. It can be chained and wrapped like :func:`~orlomo_jax.orlomo`.

    Args:
        num_workers: K ≥ 1; only Eq. (6) uses it.
        learning_rate: Finite float ≥ 0, or a schedule of the server's step.
        delay_weight: Function of the delay (staleness) to a weight; None is Eq. (6).

    Returns:
        A transformation of a :class:`~orlomo_jax.LocalUpdate` (its ``momentum`` is not read) to
        updates like params; ``update`` needs the keyword ``dispatched_at``.

    Raises:
        ValueError: If a concrete hyperparameter is out of range, or a report's structure or shapes
            differ from those of the ``params`` given with it.
        TypeError: If ``update`` gets anything but a LocalUpdate, ``dispatched_at`` is not an
            integer scalar, or a leaf of params is not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from orlomo_jax import LocalUpdate, al_sgd
        >>> rule = al_sgd(num_workers=4)
        >>> state = rule.init(jnp.zeros(2))
        >>> rule.update(LocalUpdate(jnp.ones(2)), state, dispatched_at=0)[0]
        Array([-0.25, -0.25], dtype=float32)

    References:
        `arXiv:2601.12322 <https://arxiv.org/abs/2601.12322>`_, Algorithm 1.
    """
    rate = global_learning_rate(num_workers, learning_rate, delay_weight)

    def init(params: trees.Params) -> ALSGDState:
        trees.check_floating("params", params)
        return ALSGDState(jnp.zeros([], jnp.int32))

    def update(updates, state, params=None, *, dispatched_at=None, **extra_args):
        del extra_args
        report = contract.check_report(updates, params, rule="al_sgd", momentum=False)
        index = contract.check_dispatched_at(dispatched_at, state.step)
        eta = jax.lax.optimization_barrier(rate(state.step, state.step - index))
        new_updates = trees.combine([(-eta, report.delta)], like=report.delta)  # Alg. 1, l. 7
        return new_updates, ALSGDState(ordering.increment(state.step))

    return optax.GradientTransformationExtraArgs(init, update)

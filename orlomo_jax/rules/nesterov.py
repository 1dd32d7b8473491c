"""Defines asynchronous Nesterov momentum, one outer step for each report."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from orlomo_jax import trees
from orlomo_jax.rules import contract, ordering
from orlomo_jax.rules.delay_adaptive_rate import scheduled
from orlomo_jax.trees import Array


class NesterovState(NamedTuple):
    """State of :func:`nesterov`.

    Attributes:
        step: t, the number of reports received, int32[].
        momentum: m, a tree like params.
    """

    step: Array
    momentum: trees.Params


def nesterov(
    num_workers: int,
    momentum: float | Array = 0.9,
    learning_rate: float | optax.Schedule = 0.7,
    report_weight: float | optax.Schedule | None = None,
    *,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Take a step of Nesterov momentum on every report, in the order of arrival.

    With the pseudo-gradient g = aΔw,

    - m ← μm + g,
    - w ← w − η(g + μm).

    This is DiLoCo's outer optimizer, run asynchronously without any correction. It is known to
    diverge when training starts from scratch; see :func:`~orlomo_jax.rules.delayed_nesterov`. The
    delay is not used. With one worker it is ``optax.sgd(η, μ, nesterov=True)`` on Δw.

    Needs: only ``delta``.

    Args:
        num_workers: K ≥ 1; only the default of ``report_weight`` uses it.
        momentum: μ in [0, 1); the default is DiLoCo's.
        learning_rate: η, a finite float ≥ 0, or a schedule of the server's step. The default is
            that of synchronous DiLoCo. The authors' notebook uses η = 0.07 with a = 1/√K.
        report_weight: a, the weight of a report: a finite float ≥ 0, or a schedule of the step.
            None is 1/K, so that K reports weigh as much as their mean.
        accumulator_dtype: dtype of the momentum, if wider than the leaf's.

    Returns:
        A transformation of a :class:`~orlomo_jax.LocalUpdate` (its ``momentum`` is not read) to
        updates like params.

    Raises:
        ValueError: If a concrete hyperparameter is out of range, or a report's structure or shapes
            differ from those of params.
        TypeError: If ``update`` gets anything but a LocalUpdate, or a leaf of params is not
            floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from orlomo_jax import LocalUpdate
        >>> rule = nesterov(num_workers=2, momentum=0.5, learning_rate=1.0)
        >>> updates, state = rule.update(LocalUpdate(jnp.ones(1)), rule.init(jnp.zeros(1)))
        >>> updates, state.momentum
        (Array([-0.75], dtype=float32), Array([0.5], dtype=float32))

    References:
        Liu et al., `Asynchronous local-SGD training for language modeling
        <https://arxiv.org/abs/2401.09135>`_, 2024.
    """
    num_workers = contract.check_num_workers(num_workers)
    contract.check_momentum(momentum)
    rate = scheduled("learning_rate", learning_rate)
    weight = scheduled("report_weight", 1 / num_workers if report_weight is None else report_weight)

    def init(params: trees.Params) -> NesterovState:
        return NesterovState(jnp.zeros([], jnp.int32), trees.zeros(params, accumulator_dtype))

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        report = contract.check_report(updates, state.momentum, rule="nesterov", momentum=False)
        eta, a, mu = rate(state.step), weight(state.step), jnp.asarray(momentum, float)
        mu, a, of_delta, of_momentum = jax.lax.optimization_barrier((mu, a, -eta * a, -eta * mu))
        new_momentum = trees.combine([(mu, state.momentum), (a, report.delta)], like=state.momentum)
        new_updates = trees.combine(
            [(of_delta, report.delta), (of_momentum, new_momentum)], like=report.delta
        )
        return new_updates, NesterovState(ordering.increment(state.step), new_momentum)

    return optax.GradientTransformationExtraArgs(init, update)

"""Sums the reports of a round, or of a buffer that accepts every report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from orlomo_jax import trees
from orlomo_jax.rules import contract, ordering
from orlomo_jax.trees import Array, ArrayLike


class Place(NamedTuple):
    """A report's place in its round.

    Attributes:
        keep: 0 for the first report of a round, else 1; the factor of the old sum, float[].
        last: Whether the report is the last of its round, bool[].
    """

    keep: Array
    last: Array


def place(step: Array, size: int) -> Place:
    """Return the place of report ``step``, counted from 0, in its round of ``size`` reports."""
    keep = jnp.where(step % size == 0, 0.0, 1.0)
    return jax.lax.optimization_barrier(Place(keep, (step + 1) % size == 0))


def add_to_round(
    step: Array, size: int, pending: trees.Params, delta: trees.Params
) -> tuple[trees.Params, Array]:
    """Return the round's Σ Δ with this report, and whether the report is the last, bool[]."""
    keep, last = place(step, size)
    return trees.combine([(keep, pending), (1.0, delta)], like=pending), last


def next_version(version: Array, updated: Array) -> Array:
    """Return the number of updates of the parameters, one more if ``updated``, int32[]."""
    return jnp.where(updated, ordering.increment(version), version)


class RoundMomentumState(NamedTuple):
    """State of :func:`fedavgm`, :func:`slowmo` and :func:`diloco`.

    Attributes:
        step: The number of reports received, int32[]; a round has K reports.
        version: The number of rounds completed, int32[].
        momentum: m (SlowMo's u) after the last complete round, a tree like params.
        pending: Σ Δ over the reports of the round so far, a tree like params in float32 or wider.
            The first report of the next round resets it.
    """

    step: Array
    version: Array
    momentum: trees.Params
    pending: trees.Params


class Coefficients(NamedTuple):
    """The scalars of the step at the end of a round, with Δ̄ the mean of its reports.

    The step is m ← decay·m + weight·Δ̄, then w ← w − rate·m − mean_rate·Δ̄.
    """

    decay: ArrayLike
    weight: ArrayLike
    rate: ArrayLike
    mean_rate: ArrayLike | None = None


def round_momentum(
    rule: str,
    num_workers: int,
    coefficients: Callable[[Array, Any], Coefficients],
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Return the rule with momentum on the mean Δ of a synchronous round.

    Args:
        rule: The rule's name, for the errors.
        num_workers: K ≥ 1.
        coefficients: ``coefficients(step, local_learning_rate)`` gives the scalars of the step.
            They are used at the last report of a round; ``mean_rate`` None leaves its term out.
        accumulator_dtype: dtype of the momentum, if wider than the leaf's.
    """
    num_workers = contract.check_num_workers(num_workers)

    def init(params: trees.Params) -> RoundMomentumState:
        return RoundMomentumState(
            step=jnp.zeros([], jnp.int32),
            version=jnp.zeros([], jnp.int32),
            momentum=trees.zeros(params, accumulator_dtype),
            pending=trees.zeros(params, jnp.float32),
        )

    def update(updates, state, params=None, *, local_learning_rate=None, **extra_args):
        del params, extra_args
        report = contract.check_report(updates, state.momentum, rule=rule, momentum=False)
        c = coefficients(state.step, local_learning_rate)
        pending, last = add_to_round(state.step, num_workers, state.pending, report.delta)
        at_end = lambda x, otherwise=0.0: jnp.where(last, jnp.asarray(x, float), otherwise)  # noqa: E731
        decay, weight, rate = jax.lax.optimization_barrier(
            (at_end(c.decay, 1.0), at_end(c.weight / num_workers), at_end(c.rate))
        )
        new_momentum = trees.combine(
            [(decay, state.momentum), (weight, pending)], like=state.momentum
        )
        descent = [(-rate, new_momentum)]
        if c.mean_rate is not None:
            mean_rate = jax.lax.optimization_barrier(at_end(c.mean_rate / num_workers))
            descent.append((-mean_rate, pending))
        new_updates = trees.combine(descent, like=report.delta)
        return new_updates, RoundMomentumState(
            step=ordering.increment(state.step),
            version=next_version(state.version, last),
            momentum=new_momentum,
            pending=pending,
        )

    return optax.GradientTransformationExtraArgs(init, update)

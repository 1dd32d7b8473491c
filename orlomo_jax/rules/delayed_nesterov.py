"""Defines delayed Nesterov momentum (Liu et al. 2024)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import core as jax_core

from orlomo_jax import trees
from orlomo_jax.checks import check_count, check_number
from orlomo_jax.rules import contract, ordering
from orlomo_jax.rules.delay_adaptive_rate import scheduled
from orlomo_jax.trees import Array


class DelayedNesterovState(NamedTuple):
    """State of :func:`delayed_nesterov`.

    Attributes:
        step: t, the number of reports received, int32[].
        momentum: m, a tree like params; it changes at every N-th report.
        pending: D = Σ Δw over the reports since then; a tree like params, in float32 or wider. The
            first report after a change resets it.
    """

    step: Array
    momentum: trees.Params
    pending: trees.Params


def delayed_nesterov(
    num_workers: int,
    buffer_size: int | None = None,
    momentum: float | Array = 0.9,
    learning_rate: float | optax.Schedule = 0.7,
    c: float | Array = 0.0,
    *,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Descend along every report, and update the momentum once in N reports.

    Every report: D ← D + Δw. Then,

    - at every N-th report: m ← μm + D/N, w ← w − η[(1 − cN + c)μm + Δw/N], D ← 0;
    - at the others: w ← w − η[cμm + Δw/N].

    With c = 0, N reports move w exactly as one Nesterov step on their mean does. Each report's
    descent is divided by N: a code that descends by εΔw has η = εN. The delay is not used.

    Needs: only ``delta``.

    Args:
        num_workers: K ≥ 1; only the default of ``buffer_size`` uses it.
        buffer_size: N ≥ 1; None is K, the paper's. The public implementations also use 10, or 2K.
        momentum: μ in [0, 1); the default is DiLoCo's.
        learning_rate: η, a finite float ≥ 0, or a schedule of the server's step (reports). The
            default is DiLoCo's.
        c: In [0, 1/N], the share of the momentum that each report between two momentum updates
            applies. The default 0 is that of the public implementations.
        accumulator_dtype: dtype of the momentum, if wider than the leaf's. The sum is always in
            float32 or wider.

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
        >>> rule = delayed_nesterov(num_workers=2, momentum=0.5, learning_rate=1.0)
        >>> state = rule.init(jnp.zeros(1))
        >>> for change in (1.0, 3.0):
        ...     updates, state = rule.update(LocalUpdate(jnp.full(1, change)), state)
        ...     print(updates, state.momentum)
        [-0.5] [0.]
        [-2.5] [2.]

    References:
        Liu et al., `Asynchronous local-SGD training for language modeling
        <https://arxiv.org/abs/2401.09135>`_, 2024.
    """
    num_workers = contract.check_num_workers(num_workers)
    size = num_workers if buffer_size is None else check_count("buffer_size", buffer_size, 1)
    contract.check_momentum(momentum)
    contract.check_scalar("c", c)
    if not isinstance(c, jax_core.Tracer):
        highest = (1 + 1e-6) / size  # 1/N in float32 may be above 1/N
        check_number("c", c, lambda x: 0 <= x <= highest, f"in [0, 1/N={1 / size:g}]")
    rate = scheduled("learning_rate", learning_rate)

    def init(params: trees.Params) -> DelayedNesterovState:
        return DelayedNesterovState(
            step=jnp.zeros([], jnp.int32),
            momentum=trees.zeros(params, accumulator_dtype),
            pending=trees.zeros(params, jnp.float32),
        )

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        report = contract.check_report(
            updates, state.momentum, rule="delayed_nesterov", momentum=False
        )
        first, last = state.step % size == 0, (state.step + 1) % size == 0
        eta, mu, share = rate(state.step), jnp.asarray(momentum, float), jnp.asarray(c, float)
        keep, decay, gain, of_delta, of_momentum = jax.lax.optimization_barrier(
            (
                jnp.where(first, 0.0, 1.0),
                jnp.where(last, mu, 1.0),
                jnp.where(last, 1 / size, 0.0),
                -eta / size,
                -eta * mu * jnp.where(last, 1 - share * size + share, share),
            )
        )
        pending = trees.combine([(keep, state.pending), (1.0, report.delta)], like=state.pending)
        new_momentum = trees.combine(
            [(decay, state.momentum), (gain, pending)], like=state.momentum
        )
        new_updates = trees.combine(
            [(of_delta, report.delta), (of_momentum, new_momentum)], like=report.delta
        )
        step = ordering.increment(state.step)
        return new_updates, DelayedNesterovState(step, new_momentum, pending)

    return optax.GradientTransformationExtraArgs(init, update)

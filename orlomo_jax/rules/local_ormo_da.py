"""Defines local OrMo-DA, ordered momentum of parameter changes (Algorithm 3)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from orlomo_jax import trees
from orlomo_jax.rules import contract, ordering
from orlomo_jax.rules.delay_adaptive_rate import DelayWeight, global_learning_rate
from orlomo_jax.trees import Array


class LocalOrMoDAState(NamedTuple):
    """State of :func:`local_ormo_da`.

    Attributes:
        step: t, the number of reports received, int32[].
        momentum: u_t, a tree like params.
    """

    step: Array
    momentum: trees.Params


def local_ormo_da(
    num_workers: int,
    momentum: float | Array = 0.9,
    learning_rate: float | optax.Schedule = 1.0,
    delay_weight: DelayWeight | None = None,
    *,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Ordered momentum on the server only; the workers run plain SGD (Algorithm 3).

    With n, w_{t+½} and u_{t+½} as in :func:`~orlomo_jax.orlomo`,

    - u_{t+1} = u_{t+½} + β^n η_t Δw,
    - w_{t+1} = w_{t+½} − (1−β^{n+1})/(1−β) η_t Δw.

    With one local step (S = 1) this is OrMo-DA. It can be chained and wrapped like ``orlomo``.

    For workers in turn and linear Δ, momentum in the order of arrival does not help at all. In the
    order of dispatch it is as fast as the best look-ahead, see
    :func:`~orlomo_jax.rules.delay_lookahead`.

    Args:
        num_workers: K ≥ 1.
        momentum: β in [0, 1). The Python constant 0 compiles to AL-SGD's computation (Remark 1).
        learning_rate: Finite float ≥ 0, or a schedule of the server's step.
        delay_weight: Function of the delay (staleness) to a weight; None is Eq. (6).
        accumulator_dtype: dtype of the momentum, if wider than the leaf's.

    Returns:
        A transformation of a :class:`~orlomo_jax.LocalUpdate` (its ``momentum`` is not read) to
        updates like params; ``update`` needs the keyword ``dispatched_at``.

    Raises:
        ValueError: If a concrete hyperparameter is out of range, or a report's structure or shapes
            differ from those of params.
        TypeError: If ``update`` gets anything but a LocalUpdate, ``dispatched_at`` is not an
            integer scalar, or a leaf of params is not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from orlomo_jax import LocalUpdate, local_ormo_da
        >>> rule = local_ormo_da(num_workers=1, momentum=0.5)
        >>> state = rule.init(jnp.zeros(2))
        >>> for step in range(2):
        ...     updates, state = rule.update(LocalUpdate(jnp.ones(2)), state, dispatched_at=step)
        >>> updates
        Array([-1.5, -1.5], dtype=float32)

    References:
        `arXiv:2601.12322 <https://arxiv.org/abs/2601.12322>`_, Algorithm 3.
    """
    num_workers = contract.check_num_workers(num_workers)
    contract.check_momentum(momentum)
    rate = global_learning_rate(num_workers, learning_rate, delay_weight)
    without_momentum = isinstance(momentum, int | float) and momentum == 0

    def init(params: trees.Params) -> LocalOrMoDAState:
        return LocalOrMoDAState(jnp.zeros([], jnp.int32), trees.zeros(params, accumulator_dtype))

    # Algorithm 3 as printed, with i = ite(t, k_t) and n = ⌈t/K⌉ − ⌈i/K⌉:
    #
    #   if ⌈t/K⌉ > ⌈(t−1)/K⌉:  w_{t+½} = w_t − βu_t,  u_{t+½} = βu_t
    #   else:                  w_{t+½} = w_t,         u_{t+½} = u_t
    #   u_{t+1} = u_{t+½} + β^n η_t Δw
    #   w_{t+1} = w_{t+½} − (1−β^{n+1})/(1−β) η_t Δw
    #
    # The code computes βu_t from u_{t+1} and the factor of Δw as a sum; see
    # `ordered_coefficients`. proofs_check's check `server_step` checks that both forms are equal.
    def update(updates, state, params=None, *, dispatched_at=None, **extra_args):
        del params, extra_args
        report = contract.check_report(
            updates, state.momentum, rule="local_ormo_da", momentum=False
        )
        index = contract.check_dispatched_at(dispatched_at, state.step)
        c = ordering.ordered_coefficients(
            state.step, index, num_workers, momentum, rate(state.step, state.step - index)
        )
        new_momentum = trees.combine(
            [(c.decay, state.momentum), (c.weight, report.delta)], like=state.momentum
        )
        if without_momentum:
            descent = [(-c.rate, report.delta)]
        else:  # (1−β^{n+1})/(1−β) = 1 + Σ_{j=1..n} β^j
            descent = [(-(c.rate + c.correction), report.delta), (-c.opens, new_momentum)]
        new_updates = trees.combine(descent, like=report.delta)
        return new_updates, LocalOrMoDAState(ordering.increment(state.step), new_momentum)

    return optax.GradientTransformationExtraArgs(init, update)

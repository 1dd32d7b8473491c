"""Defines OrLoMo, ordered local momentum (Algorithm 2)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from orlomo_jax import trees
from orlomo_jax.rules import contract, ordering
from orlomo_jax.rules.delay_adaptive_rate import DelayWeight, global_learning_rate
from orlomo_jax.trees import Array


class OrLoMoState(NamedTuple):
    """State of :func:`orlomo`.

    Attributes:
        step: t, the number of reports received, int32[].
        momentum: u_t, a tree like params.
    """

    step: Array
    momentum: trees.Params


def orlomo(
    num_workers: int,
    momentum: float | Array = 0.9,
    learning_rate: float | optax.Schedule = 1.0,
    delay_weight: DelayWeight | None = None,
    *,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Merge local momentums in the order of their global iteration index (Algorithm 2).

    At server step t, a report of index i = ``dispatched_at`` is n = ⌈t/K⌉ − ⌈i/K⌉ groups late.
    If ⌈t/K⌉ > ⌈(t−1)/K⌉, a new group opens: w_{t+½} = w_t − βu_t and u_{t+½} = βu_t. Otherwise
    w_{t+½} = w_t and u_{t+½} = u_t. Then, with η_t = ``learning_rate(t) · delay_weight(t − i)``,

    - u_{t+1} = u_{t+½} + β^n η_t Δu,
    - w_{t+1} = w_{t+½} − η_t Δw − β(1−β^n)/(1−β) η_t Δu.

    **In a chain.** Before the rule, use only transformations that scale the whole report by one
    factor (``optax.clip_by_global_norm``, ``optax.scale``). They keep the identity
    Δh/(1−β) = βΔu/(1−β) + Δw, which the proofs need; elementwise ones break it. After the rule,
    any transformation of params-shaped updates works, for example
    ``optax.masked(optax.set_to_zero(), mask)``.

    **In a wrapper.** A wrapper that needs updates and params of the same structure raises an
    error: ``optax.masked``, ``optax.partition``, ``optax.apply_if_finite``, ``optax.MultiSteps``,
    ``optax.flatten``. This one works: ``optax.inject_hyperparams(orlomo,
    static_args=("num_workers", "delay_weight", "accumulator_dtype"),
    hyperparam_dtype=jnp.float32)``.

    Args:
        num_workers: K ≥ 1, also the size of a group.
        momentum: β in [0, 1). The Python constant 0 compiles to AL-SGD's computation (Remark 1).
        learning_rate: Finite float ≥ 0, or a schedule of the server's step.
        delay_weight: Function of the delay (staleness), int32[], to a weight; None is Eq. (6),
            :func:`~orlomo_jax.delay_adaptive`. For a constant rate: ``lambda delay: 1.0``.
        accumulator_dtype: dtype of the momentum, if wider than the leaf's (float32 for bfloat16
            params); None keeps each leaf's.

    Returns:
        A transformation of a :class:`~orlomo_jax.LocalUpdate` to updates like params. Its
        ``update`` needs the keyword ``dispatched_at`` (int[], the model version that the worker
        started from) and ignores ``params`` and unknown extra arguments.

    Raises:
        ValueError: If a concrete hyperparameter is out of range, a report has no momentum, or its
            structure or shapes differ from those of params.
        TypeError: If ``update`` gets anything but a LocalUpdate, ``dispatched_at`` is not an
            integer scalar, or a leaf of params is not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from orlomo_jax import LocalUpdate, orlomo
        >>> rule = orlomo(num_workers=2, momentum=0.5, delay_weight=lambda delay: 1.0)
        >>> params = {"w": jnp.array([1.0, 2.0])}
        >>> state = rule.init(params)
        >>> report = LocalUpdate(delta={"w": jnp.ones(2)}, momentum={"w": jnp.ones(2)})
        >>> for index in (0, 0):  # the first reports of both workers, in any order
        ...     updates, state = rule.update(report, state, params, dispatched_at=index)
        ...     params = optax.apply_updates(params, updates)
        >>> params["w"], state.momentum["w"]  # the second is one group late: −β·Δu is added
        (Array([-2., -1.], dtype=float32), Array([1., 1.], dtype=float32))

    References:
        Ordered Local Momentum for Asynchronous Distributed Learning under Arbitrary Delays,
        `arXiv:2601.12322 <https://arxiv.org/abs/2601.12322>`_, Algorithm 2.
    """
    num_workers = contract.check_num_workers(num_workers)
    contract.check_momentum(momentum)
    rate = global_learning_rate(num_workers, learning_rate, delay_weight)
    without_momentum = isinstance(momentum, int | float) and momentum == 0

    def init(params: trees.Params) -> OrLoMoState:
        return OrLoMoState(jnp.zeros([], jnp.int32), trees.zeros(params, accumulator_dtype))

    # Algorithm 2 as printed, lines 6–13, with i = ite(t, k_t) and n = ⌈t/K⌉ − ⌈i/K⌉:
    #
    #    6   if ⌈t/K⌉ > ⌈(t−1)/K⌉:
    #    7       w_{t+½} = w_t − βu_t,  u_{t+½} = βu_t
    #        else:
    #            w_{t+½} = w_t,         u_{t+½} = u_t
    #   12   u_{t+1} = u_{t+½} + β^n η_t Δu
    #   13   w_{t+1} = w_{t+½} − η_t Δw − β(1−β^n)/(1−β) η_t Δu
    #
    # The code computes βu_t from u_{t+1}; see `ordered_coefficients`. proofs_check's check
    # `server_step` checks that both forms are equal.
    def update(updates, state, params=None, *, dispatched_at=None, **extra_args):
        del params, extra_args
        report = contract.check_report(updates, state.momentum, rule="orlomo", momentum=True)
        index = contract.check_dispatched_at(dispatched_at, state.step)
        c = ordering.ordered_coefficients(
            state.step, index, num_workers, momentum, rate(state.step, state.step - index)
        )
        new_momentum = trees.combine(  # lines 7 and 12
            [(c.decay, state.momentum), (c.weight, report.momentum)], like=state.momentum
        )
        descent = [(-c.rate, report.delta)]  # line 13
        if not without_momentum:  # lines 7 and 13
            descent += [(-c.opens, new_momentum), (-c.correction, report.momentum)]
        new_updates = trees.combine(descent, like=report.delta)
        return new_updates, OrLoMoState(ordering.increment(state.step), new_momentum)

    return optax.GradientTransformationExtraArgs(init, update)

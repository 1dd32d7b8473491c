"""Defines PRSGDm, synchronous parallel restarted SGD with momentum (Yu, Jin and Yang 2019)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from orlomo_jax import trees
from orlomo_jax.rules import contract, ordering
from orlomo_jax.rules.round_mean import add_to_round
from orlomo_jax.trees import Array


class PRSGDmState(NamedTuple):
    """State of :func:`prsgdm`.

    Attributes:
        step: The number of reports received, int32[]; a round has K reports.
        momentum: u, the average of the workers' momentum buffers at the end of the last round; a
            tree like params. The workers of the next round start from it.
        pending: (Σ Δw, Σ ũ_S) over the reports of the round so far; a pair of trees like params,
            in float32 or wider. The first report of the next round resets it.
    """

    step: Array
    momentum: trees.Params
    pending: tuple[trees.Params, trees.Params]


def prsgdm(
    num_workers: int, *, accumulator_dtype: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""Average parameters and momentum buffers over a synchronous round of K reports.

    All K workers start a round from the same (w, u), run S steps of momentum SGD, and

    - w ← w − (1/K) Σ_k Δw^k,
    - u ← (1/K) Σ_k ũ_S^k.

    ``update`` returns zeros for the first K−1 reports of a round and the average for the K-th. The
    server must not dispatch before ``step % K == 0``, so that ``dispatched_at`` is K⌊t/K⌋;
    :class:`~orlomo_jax.ParameterServer` ensures that. The rule can be chained and wrapped like
    :func:`~orlomo_jax.orlomo`.

    Args:
        num_workers: K ≥ 1.
        accumulator_dtype: dtype of the momentum, if wider than the leaf's. The sums are always in
            float32 or wider.

    Returns:
        A transformation of a :class:`~orlomo_jax.LocalUpdate` to updates like params; ``update``
        needs the keyword ``dispatched_at``.

    Raises:
        ValueError: If ``num_workers`` is below 1, a report has no momentum, or its structure or
            shapes differ from those of params.
        TypeError: If ``update`` gets anything but a LocalUpdate, ``dispatched_at`` is not an
            integer scalar, or a leaf of params is not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from orlomo_jax import LocalUpdate, prsgdm
        >>> rule = prsgdm(num_workers=2)
        >>> state = rule.init(jnp.zeros(1))
        >>> for change in (1.0, 3.0):
        ...     report = LocalUpdate(jnp.full(1, change), jnp.full(1, 2 * change))
        ...     updates, state = rule.update(report, state, dispatched_at=0)
        ...     print(updates, state.momentum)
        [0.] [0.]
        [-2.] [4.]

    References:
        Yu, Jin and Yang, `On the linear speedup analysis of communication efficient momentum SGD
        for distributed non-convex optimization <https://arxiv.org/abs/1905.03817>`_, 2019.
    """
    num_workers = contract.check_num_workers(num_workers)

    def init(params: trees.Params) -> PRSGDmState:
        return PRSGDmState(
            step=jnp.zeros([], jnp.int32),
            momentum=trees.zeros(params, accumulator_dtype),
            pending=(trees.zeros(params, jnp.float32), trees.zeros(params, jnp.float32)),
        )

    def update(updates, state, params=None, *, dispatched_at=None, **extra_args):
        del params, extra_args
        report = contract.check_report(updates, state.momentum, rule="prsgdm", momentum=True)
        contract.check_dispatched_at(dispatched_at, state.step)
        pending, last = add_to_round(state.step, num_workers, state.pending, tuple(report))
        share = jax.lax.optimization_barrier(jnp.where(last, 1 / num_workers, 0.0))
        momentum = jax.tree.map(
            lambda mean, u: jnp.where(last, mean, u),
            trees.combine([(share, pending[1])], like=state.momentum),
            state.momentum,
        )
        new_updates = trees.combine([(-share, pending[0])], like=report.delta)
        return new_updates, PRSGDmState(ordering.increment(state.step), momentum, pending)

    return optax.GradientTransformationExtraArgs(init, update)

"""Defines Ringmaster ASGD, which declines reports that are too old (Maranjyan et al. 2025)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from orlomo_jax import trees
from orlomo_jax.rules import contract, ordering
from orlomo_jax.rules.delay_adaptive_rate import scheduled
from orlomo_jax.rules.round_mean import next_version
from orlomo_jax.trees import Array


class RingmasterState(NamedTuple):
    """State of :func:`ringmaster`.

    Attributes:
        step: The number of reports received, int32[].
        version: The number of reports accepted, int32[].
        accepted: Whether the rule has accepted the newest report, bool[]; True at the start.
    """

    step: Array
    version: Array
    accepted: Array


def ringmaster(
    max_delay: int | None, learning_rate: float | optax.Schedule = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""Asynchronous SGD that declines old reports: w ← w − ηΔ if the delay is below R.

    The delay is counted in *accepted* reports: version − dispatched_version. A declined report
    changes neither the parameters nor the version, so it does not make the other reports older.
    A weight that is zero for old reports is different: it counts the declined ones as well.

    The paper computes one gradient in a round (S = 1). With S > 1 its Δ takes the gradient's
    place. This is the paper's method without stops: no worker is interrupted.

    Needs: ``dispatched_version``.

    Args:
        max_delay: R ≥ 1, the smallest delay that is declined; None is no limit (plain ASGD). The
            paper derives R from the noise and the accuracy, so there is no default.
        learning_rate: η, a finite float ≥ 0, or a schedule of the server's step. The default 1
            applies Δ as it is; γ is then the workers' rate.

    Returns:
        A transformation of a :class:`~orlomo_jax.LocalUpdate` (its ``momentum`` is not read) to
        updates like params; ``update`` needs the keyword ``dispatched_version``.

    Raises:
        ValueError: If a concrete hyperparameter is out of range, or a report's structure or shapes
            differ from those of the ``params`` given with it.
        TypeError: If ``max_delay`` is neither an integer nor None, ``update`` gets anything but a
            LocalUpdate, ``dispatched_version`` is not an integer scalar, or a leaf of params is
            not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from orlomo_jax import LocalUpdate
        >>> rule = ringmaster(max_delay=1)
        >>> state = rule.init(jnp.zeros(1))
        >>> for _ in range(2):  # two workers that were sent the same parameters
        ...     updates, state = rule.update(LocalUpdate(jnp.ones(1)), state, dispatched_version=0)
        ...     print(updates, state.accepted, state.version)
        [-1.] True 1
        [0.] False 1

    References:
        Maranjyan, Tyurin and Richtárik, `Ringmaster ASGD: the first asynchronous SGD with optimal
        time complexity <https://arxiv.org/abs/2501.16168>`_, 2025.
    """
    limit = contract.check_limit("max_delay", max_delay, 1)
    rate = scheduled("learning_rate", learning_rate)

    def init(params: trees.Params) -> RingmasterState:
        trees.check_floating("params", params)
        return RingmasterState(
            step=jnp.zeros([], jnp.int32),
            version=jnp.zeros([], jnp.int32),
            accepted=jnp.ones([], bool),
        )

    def update(updates, state, params=None, *, dispatched_version=None, **extra_args):
        del extra_args
        report = contract.check_report(updates, params, rule="ringmaster", momentum=False)
        sent = contract.check_dispatched_version(dispatched_version, state.version)
        accepted = state.version - sent < limit
        eta = jax.lax.optimization_barrier(jnp.where(accepted, rate(state.step), 0.0))
        new_updates = trees.combine([(-eta, report.delta)], like=report.delta)
        return new_updates, RingmasterState(
            step=ordering.increment(state.step),
            version=next_version(state.version, accepted),
            accepted=accepted,
        )

    return optax.GradientTransformationExtraArgs(init, update)

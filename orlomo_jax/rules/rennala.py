"""Defines Rennala SGD, which averages reports of the newest version (Tyurin and Richtárik 2023)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from orlomo_jax import trees
from orlomo_jax.checks import check_count
from orlomo_jax.rules import contract, ordering
from orlomo_jax.rules.delay_adaptive_rate import scheduled
from orlomo_jax.rules.round_mean import next_version
from orlomo_jax.trees import Array


class RennalaState(NamedTuple):
    """State of :func:`rennala`.

    Attributes:
        step: The number of reports received, int32[].
        version: The number of updates of the parameters, int32[].
        accepted: Whether the rule has accepted the newest report, bool[]; True at the start.
        num_pending: The number of reports accepted since the last update, int32[], below B.
        pending: Σ Δ over these reports, a tree like params in float32 or wider. If there are none,
            it is the old sum; the next accepted report resets it.
    """

    step: Array
    version: Array
    accepted: Array
    num_pending: Array
    pending: trees.Params


def rennala(
    buffer_size: int, learning_rate: float | optax.Schedule = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""Average B reports computed from the newest parameters: w ← w − (η/B) Σ Δ.

    A report is accepted only if its worker was sent the newest version of the parameters. The
    B-th accepted report updates the parameters; the reports still under way become too old by
    that, and are declined. So every step of w is one of minibatch SGD without delay. A fast
    worker may give several of the B reports.

    The paper computes one gradient in a round (S = 1). With S > 1 its Δ takes the gradient's
    place. No worker is interrupted here.

    Needs: ``dispatched_version``.

    Args:
        buffer_size: B ≥ 1. The paper derives it from the noise and the accuracy, so there is no
            default.
        learning_rate: η, a finite float ≥ 0, or a schedule of the server's step. The default 1
            applies the mean as it is; γ is then the workers' rate.

    Returns:
        A transformation of a :class:`~orlomo_jax.LocalUpdate` (its ``momentum`` is not read) to
        updates like params; ``update`` needs the keyword ``dispatched_version``.

    Raises:
        ValueError: If a concrete hyperparameter is out of range, or a report's structure or shapes
            differ from those of params.
        TypeError: If ``buffer_size`` is not an integer, ``update`` gets anything but a
            LocalUpdate, ``dispatched_version`` is not an integer scalar, or a leaf of params is
            not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from orlomo_jax import LocalUpdate
        >>> rule = rennala(buffer_size=2)
        >>> state = rule.init(jnp.zeros(1))
        >>> for change in (1.0, 3.0, 5.0):  # three workers that were sent the same parameters
        ...     report = LocalUpdate(jnp.full(1, change))
        ...     updates, state = rule.update(report, state, dispatched_version=0)
        ...     print(updates, state.accepted, state.version)
        [0.] True 0
        [-2.] True 1
        [0.] False 1

    References:
        Tyurin and Richtárik, `Optimal time complexities of parallel stochastic optimization
        methods under a fixed computation model <https://arxiv.org/abs/2305.12387>`_, 2023.
    """
    buffer_size = check_count("buffer_size", buffer_size, 1)
    rate = scheduled("learning_rate", learning_rate)

    def init(params: trees.Params) -> RennalaState:
        return RennalaState(
            step=jnp.zeros([], jnp.int32),
            version=jnp.zeros([], jnp.int32),
            accepted=jnp.ones([], bool),
            num_pending=jnp.zeros([], jnp.int32),
            pending=trees.zeros(params, jnp.float32),
        )

    def update(updates, state, params=None, *, dispatched_version=None, **extra_args):
        del params, extra_args
        report = contract.check_report(updates, state.pending, rule="rennala", momentum=False)
        sent = contract.check_dispatched_version(dispatched_version, state.version)
        accepted = sent == state.version
        last = accepted & (state.num_pending + 1 == buffer_size)
        keep, take, share = jax.lax.optimization_barrier(
            (
                jnp.where(accepted & (state.num_pending == 0), 0.0, 1.0),
                jnp.where(accepted, 1.0, 0.0),
                jnp.where(last, rate(state.step) / buffer_size, 0.0),
            )
        )
        pending = trees.combine([(keep, state.pending), (take, report.delta)], like=state.pending)
        new_updates = trees.combine([(-share, pending)], like=report.delta)
        return new_updates, RennalaState(
            step=ordering.increment(state.step),
            version=next_version(state.version, last),
            accepted=accepted,
            num_pending=jnp.where(last, 0, state.num_pending + accepted.astype(jnp.int32)),
            pending=pending,
        )

    return optax.GradientTransformationExtraArgs(init, update)

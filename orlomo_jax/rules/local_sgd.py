"""Defines synchronous local SGD, also called FedAvg (McMahan et al. 2017)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from orlomo_jax import trees
from orlomo_jax.rules import contract, ordering
from orlomo_jax.rules.delay_adaptive_rate import scheduled
from orlomo_jax.rules.round_mean import add_to_round, next_version
from orlomo_jax.trees import Array


class LocalSGDState(NamedTuple):
    """State of :func:`local_sgd`.

    Attributes:
        step: The number of reports received, int32[]; a round has K reports.
        version: The number of rounds completed, int32[].
        pending: Σ Δ over the reports of the round so far, a tree like params in float32 or wider.
            The first report of the next round resets it.
    """

    step: Array
    version: Array
    pending: trees.Params


def local_sgd(
    num_workers: int, learning_rate: float | optax.Schedule = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""Average a synchronous round of K reports: w ← w − (η/K) Σ_k Δ^k.

    At η = 1 the new parameters are the mean of the workers' parameters. ``update`` returns zeros
    for the first K−1 reports of a round. The server must not dispatch before
    ``step % K == 0``, as with :func:`~orlomo_jax.prsgdm`.

    Needs: nothing but Δ.

    Args:
        num_workers: K ≥ 1.
        learning_rate: η, a finite float ≥ 0, or a schedule of the server's step, read at the last
            report of a round. The default 1 is FedAvg.

    Returns:
        A transformation of a :class:`~orlomo_jax.LocalUpdate` (its ``momentum`` is not read) to
        updates like params.

    Raises:
        ValueError: If a concrete hyperparameter is out of range, or a report's structure or shapes
            differ from those of params.
        TypeError: If ``num_workers`` is not an integer, ``update`` gets anything but a
            LocalUpdate, or a leaf of params is not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from orlomo_jax import LocalUpdate
        >>> rule = local_sgd(num_workers=2)
        >>> state = rule.init(jnp.zeros(1))
        >>> for change in (1.0, 3.0):
        ...     updates, state = rule.update(LocalUpdate(jnp.full(1, change)), state)
        ...     print(updates)
        [0.]
        [-2.]

    References:
        McMahan, Moore, Ramage, Hampson and Agüera y Arcas, `Communication-efficient learning of
        deep networks from decentralized data <https://arxiv.org/abs/1602.05629>`_, 2017.
    """
    num_workers = contract.check_num_workers(num_workers)
    rate = scheduled("learning_rate", learning_rate)

    def init(params: trees.Params) -> LocalSGDState:
        return LocalSGDState(
            step=jnp.zeros([], jnp.int32),
            version=jnp.zeros([], jnp.int32),
            pending=trees.zeros(params, jnp.float32),
        )

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        report = contract.check_report(updates, state.pending, rule="local_sgd", momentum=False)
        pending, last = add_to_round(state.step, num_workers, state.pending, report.delta)
        share = jnp.where(last, rate(state.step) / num_workers, 0.0)
        share = jax.lax.optimization_barrier(share)
        new_updates = trees.combine([(-share, pending)], like=report.delta)
        return new_updates, LocalSGDState(
            step=ordering.increment(state.step),
            version=next_version(state.version, last),
            pending=pending,
        )

    return optax.GradientTransformationExtraArgs(init, update)

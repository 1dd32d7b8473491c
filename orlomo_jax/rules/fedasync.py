"""Defines FedAsync, which mixes each worker's model into the server's (Xie et al. 2019)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import core as jax_core

from orlomo_jax import trees
from orlomo_jax.checks import check_number
from orlomo_jax.rules import contract, ordering
from orlomo_jax.rules.delay_adaptive_rate import DelayWeight, scheduled, weighted
from orlomo_jax.rules.staleness_weights import polynomial
from orlomo_jax.trees import Array


class FedAsyncState(NamedTuple):
    """State of :func:`fedasync`.

    Attributes:
        step: t, the number of reports received, int32[].
    """

    step: Array


def fedasync(
    mixing_rate: float | optax.Schedule = 0.9, delay_weight: DelayWeight | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Mix the worker's model into the server's: w ← (1 − α_τ) w + α_τ local.

    The worker's model is ``local`` = sent − Δw, and α_τ = α s(τ) with the delay τ in reports. The
    update is −α_τ (w − sent + Δw). Unlike :func:`~orlomo_jax.al_sgd`, it pulls w back to the
    parameters that were sent. At τ = 0, w is what was sent, and the update is −α_τ Δw. A server
    that merges model state uses α_τ for it, too.

    Needs: the current ``params``, ``dispatched_at`` and ``dispatched_params``.

    Args:
        mixing_rate: α in [0, 1], or a schedule of the server's step. The default is that of the
            Plato framework.
        delay_weight: s, a function of the delay; None is
            :func:`~orlomo_jax.rules.polynomial` with a = 0.5. The paper also has
            :func:`~orlomo_jax.rules.constant` and :func:`~orlomo_jax.rules.hinge`. The default and
            the defaults of these functions are the values that other implementations attribute to
            the paper's experiments; this was not checked against the paper. Plato's default is
            ``constant()``.

    Returns:
        A transformation of a :class:`~orlomo_jax.LocalUpdate` (its ``momentum`` is not read) to
        updates like params.

    Raises:
        ValueError: If a concrete hyperparameter is out of range, ``params`` or
            ``dispatched_params`` is missing, or trees differ in structure or shapes.
        TypeError: If ``update`` gets anything but a LocalUpdate, ``dispatched_at`` is not an
            integer scalar, or a leaf of params is not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from orlomo_jax import LocalUpdate
        >>> from orlomo_jax.rules import constant
        >>> rule, params = fedasync(0.5, constant()), jnp.array([4.0])
        >>> report, sent = LocalUpdate(jnp.array([1.0])), jnp.array([3.0])  # local is 2
        >>> rule.update(
        ...     report, rule.init(params), params, dispatched_at=0, dispatched_params=sent
        ... )[0]
        Array([-1.], dtype=float32)

    References:
        Xie, Koyejo and Gupta, `Asynchronous federated optimization
        <https://arxiv.org/abs/1903.03934>`_, 2019.
    """
    if not (callable(mixing_rate) or isinstance(mixing_rate, jax_core.Tracer)):
        check_number("mixing_rate", mixing_rate, lambda x: 0 <= x <= 1, "in [0, 1]")
    rate = scheduled("mixing_rate", mixing_rate)
    weight = weighted(polynomial() if delay_weight is None else delay_weight)

    def init(params: trees.Params) -> FedAsyncState:
        trees.check_floating("params", params)
        return FedAsyncState(jnp.zeros([], jnp.int32))

    def update(
        updates, state, params=None, *, dispatched_at=None, dispatched_params=None, **extra_args
    ):
        del extra_args
        if params is None:
            raise ValueError("`fedasync` needs the server's parameters, got params=None")
        report = contract.check_report(updates, params, rule="fedasync", momentum=False)
        index = contract.check_dispatched_at(dispatched_at, state.step)
        sent = contract.check_dispatched_params(dispatched_params, params, rule="fedasync")
        alpha = jax.lax.optimization_barrier(rate(state.step) * weight(state.step - index))
        # The difference of w and sent first: it is exact if they are close.
        distance = trees.combine(
            [(1.0, params), (-1.0, sent), (1.0, report.delta)], like=trees.widened(report.delta)
        )
        new_updates = trees.combine([(-alpha, distance)], like=report.delta)
        return new_updates, FedAsyncState(ordering.increment(state.step))

    return optax.GradientTransformationExtraArgs(init, update)

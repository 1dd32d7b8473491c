"""Defines FedAvgM, synchronous averaging with server momentum (Hsu, Qi and Brown 2019)."""

from __future__ import annotations

from typing import Any

import optax

from orlomo_jax.rules import contract
from orlomo_jax.rules.delay_adaptive_rate import scheduled
from orlomo_jax.rules.round_mean import Coefficients, round_momentum
from orlomo_jax.trees import Array


def fedavgm(
    num_workers: int,
    momentum: float | Array = 0.9,
    learning_rate: float | optax.Schedule = 1.0,
    *,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Heavy-ball momentum on the mean Δ of a synchronous round.

    With Δ̄ = (1/K) Σ_k Δ^k, the last report of a round makes the step

    - m ← μm + Δ̄,
    - w ← w − ηm.

    ``update`` returns zeros for the first K−1 reports of a round. The server must not dispatch
    before ``step % K == 0``, as with :func:`~orlomo_jax.prsgdm`.

    Needs: nothing but Δ.

    Args:
        num_workers: K ≥ 1.
        momentum: μ in [0, 1). The default 0.9 is the usual choice of momentum SGD; the paper
            tunes μ, and Flower's default is 0, which is :func:`local_sgd`.
        learning_rate: η, a finite float ≥ 0, or a schedule of the server's step, read at the last
            report of a round. The default is 1, as in Flower.
        accumulator_dtype: dtype of the momentum, if wider than the leaf's.

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
        >>> rule = fedavgm(num_workers=1, momentum=0.5)
        >>> state = rule.init(jnp.zeros(1))
        >>> for _ in range(2):
        ...     updates, state = rule.update(LocalUpdate(jnp.ones(1)), state)
        ...     print(updates)
        [-1.]
        [-1.5]

    References:
        Hsu, Qi and Brown, `Measuring the effects of non-identical data distribution for federated
        visual classification <https://arxiv.org/abs/1909.06335>`_, 2019.
    """
    contract.check_momentum(momentum)
    rate = scheduled("learning_rate", learning_rate)

    def coefficients(step, _):
        return Coefficients(decay=momentum, weight=1.0, rate=rate(step))

    return round_momentum("fedavgm", num_workers, coefficients, accumulator_dtype)

"""Defines DiLoCo's outer step, Nesterov momentum on the mean Δ (Douillard et al. 2023)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from orlomo_jax.rules import contract
from orlomo_jax.rules.delay_adaptive_rate import scheduled
from orlomo_jax.rules.round_mean import Coefficients, round_momentum
from orlomo_jax.trees import Array


def diloco(
    num_workers: int,
    momentum: float | Array = 0.9,
    learning_rate: float | optax.Schedule = 0.7,
    *,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Nesterov momentum on the mean Δ of a synchronous round.

    With Δ̄ = (1/K) Σ_k Δ^k, the last report of a round makes the step

    - m ← μm + Δ̄,
    - w ← w − η(Δ̄ + μm).

    This is ``optax.sgd(η, μ, nesterov=True)`` on Δ̄. The workers of DiLoCo run AdamW; the rule
    does not depend on that. ``update`` returns zeros for the first K−1 reports of a round. The
    server must not dispatch before ``step % K == 0``, as with :func:`~orlomo_jax.prsgdm`.

    Needs: nothing but Δ.

    Args:
        num_workers: K ≥ 1.
        momentum: μ in [0, 1). The default is DiLoCo's.
        learning_rate: η, a finite float ≥ 0, or a schedule of the server's step, read at the last
            report of a round. The default is DiLoCo's.
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
        >>> rule = diloco(num_workers=1, momentum=0.5, learning_rate=1.0)
        >>> state = rule.init(jnp.zeros(1))
        >>> for _ in range(2):
        ...     updates, state = rule.update(LocalUpdate(jnp.ones(1)), state)
        ...     print(updates)
        [-1.5]
        [-1.75]

    References:
        Douillard et al., `DiLoCo: distributed low-communication training of language models
        <https://arxiv.org/abs/2311.08105>`_, 2023.
    """
    contract.check_momentum(momentum)
    rate = scheduled("learning_rate", learning_rate)

    def coefficients(step, _):
        eta = rate(step)
        return Coefficients(
            decay=momentum, weight=1.0, rate=eta * jnp.asarray(momentum, float), mean_rate=eta
        )

    return round_momentum("diloco", num_workers, coefficients, accumulator_dtype)

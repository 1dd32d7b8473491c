"""Defines SlowMo, synchronous averaging with slow momentum (Wang et al. 2019)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from orlomo_jax.rules import contract
from orlomo_jax.rules.delay_adaptive_rate import scheduled
from orlomo_jax.rules.round_mean import Coefficients, round_momentum
from orlomo_jax.trees import Array


def slowmo(
    num_workers: int,
    momentum: float | Array,
    slow_learning_rate: float | optax.Schedule = 1.0,
    *,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum on the mean Δ/γ of a synchronous round, so that u is in units of a gradient.

    With Δ̄ = (1/K) Σ_k Δ^k and γ the local learning rate, the last report of a round makes the step

    - u ← μu + Δ̄/γ,
    - w ← w − αγu.

    So a change of γ does not change the weight of older rounds in u. All tasks of a round have
    the same γ; the rule reads that of the last report. If γ is 0 (or so small that 1/γ is not
    finite), the workers did not move: Δ̄/γ counts as 0, so that u ← μu, and w stays or moves by
    −αγu.

    ``update`` returns zeros for the first K−1 reports of a round. The server must not dispatch
    before ``step % K == 0``, as with :func:`~orlomo_jax.prsgdm`.

    Needs: ``local_learning_rate``, the γ of the task.

    Args:
        num_workers: K ≥ 1.
        momentum: μ in [0, 1), the slow momentum; it must be tuned, so there is no default.
        slow_learning_rate: α, a finite float ≥ 0, or a schedule of the server's step, read at the
            last report of a round. With the default 1 and μ = 0 the rule is :func:`local_sgd`.
        accumulator_dtype: dtype of the momentum, if wider than the leaf's.

    Returns:
        A transformation of a :class:`~orlomo_jax.LocalUpdate` (its ``momentum`` is not read) to
        updates like params; ``update`` needs the keyword ``local_learning_rate``.

    Raises:
        ValueError: If a concrete hyperparameter is out of range, a report's structure or shapes
            differ from those of params, or ``local_learning_rate`` is missing or not a scalar.
        TypeError: If ``num_workers`` is not an integer, ``update`` gets anything but a
            LocalUpdate, or a leaf of params is not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from orlomo_jax import LocalUpdate
        >>> rule = slowmo(num_workers=1, momentum=0.5)
        >>> state = rule.init(jnp.zeros(1))
        >>> for gamma in (0.5, 0.25):  # Δ = γ · gradient
        ...     report = LocalUpdate(jnp.full(1, gamma))
        ...     updates, state = rule.update(report, state, local_learning_rate=gamma)
        ...     print(updates, state.momentum)
        [-0.5] [1.]
        [-0.375] [1.5]

    References:
        Wang, Tantia, Ballas and Rabbat, `SlowMo: improving communication-efficient distributed SGD
        with slow momentum <https://arxiv.org/abs/1910.00643>`_, 2019.
    """
    contract.check_momentum(momentum)
    rate = scheduled("slow_learning_rate", slow_learning_rate)

    def coefficients(step, local_learning_rate):
        gamma = contract.check_sent_rate(local_learning_rate, rule="slowmo")
        weight = jnp.where(jnp.isfinite(1 / gamma), 1 / gamma, 0.0)
        return Coefficients(decay=momentum, weight=weight, rate=rate(step) * gamma)

    return round_momentum("slowmo", num_workers, coefficients, accumulator_dtype)

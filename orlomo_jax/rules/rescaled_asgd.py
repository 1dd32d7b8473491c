"""Defines Rescaled ASGD, which gives every worker an equal total weight (Mahran et al. 2026)."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from orlomo_jax.rules import contract
from orlomo_jax.rules.al_sgd import al_sgd
from orlomo_jax.rules.delay_adaptive_rate import DelayWeight


def rescaled(num_workers: int) -> DelayWeight:
    """Return the weight (τ + 1)/K² of a delay τ, which gives every worker an equal total weight.

    If no task is lost, the τ + 1 of a worker's reports add up to the number of all reports. So each
    worker's weights add up to 1/K² for each report received, however often it reports. At fixed
    times t_k of a round, mean(τ + 1) = t_k Σ_j 1/t_j: the mean weight is proportional to t_k, as in
    the paper. The paper uses t_k itself; this library knows only delays. Eq. (6) does the opposite:
    it weighs a slow worker's reports less. A weight is above 1 if τ + 1 > K².

    Args:
        num_workers: K ≥ 1.

    Returns:
        A function of the delay τ, an int array of any shape, to float weights.

    Raises:
        TypeError, ValueError: If ``num_workers`` is not an integer ≥ 1.

    Example:
        >>> weight = rescaled(2)
        >>> [float(weight(delay)) for delay in (0, 1, 7)]
        [0.25, 0.5, 2.0]

    References:
        Mahran, Maranjyan and Richtárik, `Rescaled asynchronous SGD: optimal distributed
        optimization under data and system heterogeneity <https://arxiv.org/abs/2605.13434>`_, 2026.
    """
    scale = 1 / contract.check_num_workers(num_workers) ** 2

    def weight(delay):
        return (jnp.asarray(delay).astype(float) + 1) * scale

    return weight


def rescaled_asgd(
    num_workers: int, learning_rate: float | optax.Schedule = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""Asynchronous SGD in which every worker counts equally: w ← w − η (τ + 1)/K² · Δ.

    This is :func:`~orlomo_jax.al_sgd` with the weight :func:`rescaled`. If the workers have
    different data, AL-SGD favours the data of fast workers; this rule does not.

    Needs: ``dispatched_at``.

    Args:
        num_workers: K ≥ 1.
        learning_rate: η, a finite float ≥ 0, or a schedule of the server's step. With the default
            1, the mean weight is 1/K, as with Eq. (6) without old reports.

    Returns:
        A transformation of a :class:`~orlomo_jax.LocalUpdate` (its ``momentum`` is not read) to
        updates like params; ``update`` needs the keyword ``dispatched_at``. The state is an
        ``ALSGDState``.

    Raises:
        ValueError, TypeError: As ``al_sgd``.

    Example:
        >>> import jax.numpy as jnp
        >>> from orlomo_jax import LocalUpdate
        >>> rule = rescaled_asgd(num_workers=2)
        >>> state = rule.init(jnp.zeros(1))
        >>> for _ in range(2):
        ...     updates, state = rule.update(LocalUpdate(jnp.ones(1)), state, dispatched_at=0)
        ...     print(updates)
        [-0.25]
        [-0.5]

    References:
        See :func:`rescaled`.
    """
    return al_sgd(num_workers, learning_rate, rescaled(num_workers))

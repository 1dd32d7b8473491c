"""Computes the asynchronous rules' global learning rate, from the step and the delay."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax.numpy as jnp
import optax

from orlomo_jax.rules import contract
from orlomo_jax.trees import Array, ArrayLike

DelayWeight: TypeAlias = Callable[[Array], ArrayLike]
"""Maps the delay (staleness), int[], to a weight, float[]."""


def delay_adaptive(num_workers: int) -> DelayWeight:
    """Return the delay-adaptive weight of Eq. (6): 1/K up to a delay of 2K, then 1/delay.

    Args:
        num_workers: K ≥ 1.

    Returns:
        A function of the delay τ, an int array of any shape, to float weights.

    Raises:
        TypeError, ValueError: If ``num_workers`` is not an integer ≥ 1.

    Example:
        >>> weight = delay_adaptive(4)
        >>> [round(float(weight(delay)), 4) for delay in (0, 8, 9, 100)]
        [0.25, 0.25, 0.1111, 0.01]
    """
    num_workers = contract.check_num_workers(num_workers)

    def weight(delay):
        delay = jnp.asarray(delay)
        return 1.0 / jnp.where(delay > 2 * num_workers, delay, num_workers).astype(float)

    return weight


def one_over_delay(num_workers: int) -> DelayWeight:
    """Return the weight 1/max(K, τ) of delay-adaptive ASGD (Mishchenko et al., 2022).

    Unlike Eq. (6), it falls from a delay of K.

    Args:
        num_workers: K ≥ 1.

    Example:
        >>> weight = one_over_delay(4)
        >>> [round(float(weight(delay)), 3) for delay in (0, 4, 8)]
        [0.25, 0.25, 0.125]

    References:
        Mishchenko et al., `Asynchronous SGD beats minibatch SGD under arbitrary delays
        <https://arxiv.org/abs/2206.07638>`_, 2022.
    """
    num_workers = contract.check_num_workers(num_workers)

    def weight(delay):
        return 1.0 / jnp.maximum(jnp.asarray(delay), num_workers).astype(float)

    return weight


def global_learning_rate(
    num_workers: int,
    learning_rate: float | optax.Schedule = 1.0,
    delay_weight: DelayWeight | None = None,
) -> Callable[[ArrayLike, ArrayLike], Array]:
    """Return η(t, τ) = learning_rate(t) · delay_weight(τ), which all asynchronous rules use.

    Args:
        num_workers: K ≥ 1.
        learning_rate: A finite float ≥ 0, or a schedule of the server's step t.
        delay_weight: A function of the delay τ; None is ``delay_adaptive(num_workers)``.

    Returns:
        A function of (step, delay) to float[], in float32 or wider.

    Raises:
        ValueError: If ``num_workers`` or a concrete rate is out of range. The returned function
            raises it if a schedule or weight does not return a scalar.
        TypeError: If an argument has a wrong type.

    Example:
        >>> rate = global_learning_rate(2, learning_rate=3.0, delay_weight=lambda delay: 0.5)
        >>> float(rate(0, 1))
        1.5
    """
    num_workers = contract.check_num_workers(num_workers)
    at_step = scheduled("learning_rate", learning_rate)
    of_delay = weighted(delay_adaptive(num_workers) if delay_weight is None else delay_weight)
    return lambda step, delay: at_step(step) * of_delay(delay)


def scheduled(name: str, value: float | optax.Schedule) -> Callable[[ArrayLike], Array]:
    """Return a function of the step to the value of a rate, float[] in float32 or wider.

    Args:
        name: The argument's name, for the messages.
        value: A finite float ≥ 0, or a schedule of the server's step.

    Raises:
        ValueError: If a concrete value is out of range. The returned function raises it if a
            schedule does not return a scalar.
        TypeError: If the value is neither a number nor a function.

    Example:
        >>> rate = scheduled("learning_rate", lambda step: 1 / (1 + step))
        >>> float(rate(3))
        0.25
    """
    if not callable(value):
        contract.check_learning_rate(name, value)

    return partial(_at_step, **{name: value})  # a fingerprint contains the name


def _at_step(step: ArrayLike, **named: Any) -> Array:
    ((name, value),) = named.items()
    now = value(step) if callable(value) else value
    contract.check_scalar(name, now)
    return jnp.asarray(now, float)


def weighted(delay_weight: DelayWeight) -> Callable[[ArrayLike], Array]:
    """Return a function of the delay to its weight, float[] in float32 or wider.

    Raises:
        TypeError: If ``delay_weight`` is not a function. The returned function raises ValueError
            if it does not return a scalar.
    """
    if not callable(delay_weight):
        raise TypeError(
            "`delay_weight` must be a function of the delay or None, "
            f"got delay_weight={delay_weight!r}"
        )

    def of_delay(delay):
        weight = delay_weight(delay)
        contract.check_scalar("delay_weight", weight)
        return jnp.asarray(weight, float)

    return of_delay

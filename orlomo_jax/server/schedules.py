"""Checks learning-rate schedules for a whole run before its first step."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from orlomo_jax.methods.method import Method
from orlomo_jax.server.step import on_cpu
from orlomo_jax.trees import Array, as_partial

CHUNK = 4096
"""Steps that are checked together; always the same number, so one program is enough."""


def check_schedules(method: Method, schedule: Callable | None, num_steps: int) -> None:
    """Raise ValueError unless, at every step of a run, γ is finite and ≥ 0 and η is not negative.

    An infinite η or a NaN is allowed; the run diverges then.

    Args:
        method: Its ``model_state_weight`` for a report without delay is η.
        schedule: The schedule of γ, or None if γ is constant.
        num_steps: T.

    Example:
        >>> from orlomo_jax import make_method
        >>> check_schedules(make_method("al_sgd", 2, 1), lambda step: 1.0 - 0.25 * step, 10)
        Traceback (most recent call last):
        ...
        ValueError: `local_learning_rate` must be finite and ≥ 0, got -0.25 at step 5
    """
    if schedule is not None:
        _check("local_learning_rate", as_partial(schedule), num_steps, finite=True)
    if method.model_state_weight is not None:
        _check("learning_rate", _without_delay(method.model_state_weight), num_steps, finite=False)


@lru_cache(maxsize=64)
def _without_delay(model_state_weight: Callable) -> jax.tree_util.Partial:
    return jax.tree_util.Partial(lambda step: model_state_weight(step, jnp.zeros_like(step)))


def _check(name: str, function: jax.tree_util.Partial, num_steps: int, *, finite: bool) -> None:
    for first in range(0, num_steps, CHUNK):
        steps = np.minimum(np.arange(first, first + CHUNK, dtype=np.int32), num_steps - 1)
        with on_cpu():
            rates = np.asarray(_at_each(function, steps))
        wrong = (rates < 0) | (finite & ~np.isfinite(rates))
        if wrong.any():
            at = int(np.argmax(wrong))
            wanted = "finite and ≥ 0" if finite else "≥ 0"
            raise ValueError(f"`{name}` must be {wanted}, got {rates[at]} at step {steps[at]}")


@jax.jit
def _at_each(function: Callable, steps: Array) -> Any:
    return jax.vmap(lambda step: jnp.asarray(function(step), float))(steps)

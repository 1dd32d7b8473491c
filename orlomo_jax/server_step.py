"""The server's numerics: update, apply and merge as one compiled program."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from orlomo_jax.rules import base


@lru_cache(maxsize=64)
def server_step(
    rule: optax.GradientTransformationExtraArgs,
    merge_weight: Callable | None,
    schedule: optax.Schedule | None,
    donate_params: bool,
    donate_state: bool,
) -> Callable:
    """Return update, apply and merge as one compiled program, which works in place where it may."""

    def step_fn(params, state, model_state, update, end_state, step, dispatched_at):
        updates, state = rule.update(update, state, params, dispatched_at=dispatched_at)
        params = optax.apply_updates(params, updates)
        if jax.tree.leaves(model_state):
            assert merge_weight is not None
            weight = jnp.asarray(merge_weight(step, step - dispatched_at), float)
            model_state = jax.tree.map(
                lambda s, end: (s + weight * (end - s)).astype(s.dtype), model_state, end_state
            )
        rate = None
        if schedule is not None:
            rate = jnp.asarray(schedule(step + 1), float)
            base.check_scalar("local_learning_rate", rate)
        return params, state, model_state, rate

    donated = [name for name, may in (("params", donate_params), ("state", donate_state)) if may]
    return jax.jit(step_fn, donate_argnames=donated)


@lru_cache(maxsize=64)
def _compiled(function: Callable) -> Callable:
    return jax.jit(function)


def merge_weight_on_host(merge_weight: Any, step: int, delay: int) -> float:
    """Evaluate on the CPU where there is one, so that no accelerator's queue is waited for."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        device = None
    with jax.default_device(device):
        return float(_compiled(merge_weight)(np.int32(step), np.int32(delay)))

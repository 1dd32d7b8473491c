"""A worker's whole answer to a task as one compiled program, the same in every runtime."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import jax
import jax.numpy as jnp


@lru_cache(maxsize=32)
def fused_round(round_fn: Callable) -> Callable:
    """Return batches, round and finite check as one compiled program, kept for a sweep's runs.

    Simulator and real runtimes run this same program, so that a replay can be exact to the bit.
    ``first_bad`` is the step of the first non-finite round so far, −1 for none; it comes back with
    this round counted in.
    """

    @jax.jit
    def run_round(
        batch_fn,
        params,
        model_state,
        momentum,
        local_learning_rate,
        data_key,
        noise_key,
        worker,
        round,
        step,
        first_bad,
    ):
        batches = batch_fn(data_key, worker, round)
        key = jax.random.fold_in(jax.random.fold_in(noise_key, worker), round)
        result = round_fn(params, model_state, batches, local_learning_rate, key, momentum=momentum)
        first_bad = jnp.where((first_bad < 0) & ~result.finite, step, first_bad)
        return result, result.loss.mean(), first_bad

    return run_round

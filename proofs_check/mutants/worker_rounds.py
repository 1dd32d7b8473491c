"""Defines mutants of the library's worker round: wrong noise keys and wrong weight decay."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from orlomo_jax import LocalUpdate
from orlomo_jax.trees import all_finite
from orlomo_jax.worker import RoundMetrics, RoundResult
from proofs_check.mutants.bookkeeping import Mutant


def _round(
    step_key: Callable = jax.random.fold_in,
    decay: Callable = lambda rate, decay, w, last: (rate * decay * w, 0),
) -> Callable[[Any, int], Any]:
    """Return the change of ``local_momentum_sgd`` to a plain loop with a fault.

    Args:
        step_key: Maps (the round's key, s) to the key of a local step.
        decay: Maps (γ, λ, w̃, whether this is the last step) to the term added to ũ and the term
            subtracted from w̃ only.
    """

    def factory(
        loss_fn,
        num_local_steps,
        momentum=0.9,
        weight_decay=0.0,
        gradient_transform=None,
        frozen=None,
    ):
        def round_fn(params, model_state, batches, rate, key, *, momentum=None):
            w, u = params, jax.tree.map(jnp.zeros_like, params) if momentum is None else momentum
            losses, metrics = [], []
            for s in range(num_local_steps):
                batch, last = jax.tree.map(lambda x, s=s: x[s], batches), s == num_local_steps - 1
                gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
                (loss, (model_state, metric)), g = gradient_fn(
                    w, model_state, batch, step_key(key, s)
                )
                if gradient_transform is not None:
                    g, _ = gradient_transform.update(g, gradient_transform.init(w), w)
                terms = [decay(rate, weight_decay, x, last) for x in jax.tree.leaves(w)]
                to_u, from_w = (
                    jax.tree.unflatten(jax.tree.structure(w), x) for x in zip(*terms, strict=True)
                )
                u = jax.tree.map(lambda u, g, d: (beta or 0.0) * u + rate * g + d, u, g, to_u)
                w = jax.tree.map(lambda w, u, d: w - u - d, w, u, from_w)
                losses.append(loss)
                metrics.append(metric)
            update = LocalUpdate(jax.tree.map(jnp.subtract, params, w), None if beta is None else u)
            metrics = jax.tree.map(lambda *x: jnp.stack(x), *metrics)
            return RoundResult(
                update, model_state, jnp.stack(losses), metrics, all_finite((update, losses))
            )

        beta = momentum
        return jax.jit(round_fn)

    return lambda original, step: factory


def _noise(own_key: Callable[..., Any]) -> Callable[[Any, int], Any]:
    """Return the change of ``round_program`` that replaces the round's key.

    Args:
        own_key: Maps (noise_key, worker, round, the step of the fault) to the key.
    """

    def change(original, step):
        @lru_cache(maxsize=8)
        def round_program(round_fn, num_steps=None):
            @jax.jit
            def run(batch_fn, start, kept, data_key, noise_key, worker, round, at, first):
                params, state, momentum, rate, _ = start
                batches = batch_fn(data_key, worker, round)
                key = own_key(noise_key, worker, round, step)
                result = round_fn(params, state, batches, rate, key, momentum=momentum)
                bad = jnp.where((first < 0) & ~result.finite, at, first)
                return result, RoundMetrics.of(result), bad

            return run

        return round_program

    return change


def _keyed(noise_key, worker, round):
    return jax.random.fold_in(jax.random.fold_in(noise_key, worker), round)


_ROUND = "orlomo_jax.methods.method:local_momentum_sgd"
_EAGER = "orlomo_jax.worker.workload:round_program"
_COMPILED = "orlomo_jax.simulation.compiled:round_program"
STEP_KEYS = {
    "one key for all local steps": Mutant(_ROUND, _round(step_key=lambda key, s: key)),
    "one key from the second local step on": Mutant(
        _ROUND, _round(step_key=lambda key, s: jax.random.fold_in(key, min(s, 1)))),
}  # fmt: skip
ROUND_KEYS = {
    f"{name}, {engine}": Mutant(where, _noise(key))
    for engine, where in (("eager", _EAGER), ("compiled", _COMPILED))
    for name, key in (
        ("one key for all rounds", lambda key, worker, round, n: jax.random.fold_in(key, worker)),
        ("one key for all workers", lambda key, worker, round, n: jax.random.fold_in(key, round)),
        ("one key for all rounds from a step on",
         lambda key, worker, round, n: _keyed(key, worker, jnp.minimum(round, n))),
        ("a key used again at a step", lambda key, worker, round, n: _keyed(
            key, worker, jnp.where(round == n + 1, n, round))),
    )
}  # fmt: skip
DECAYS: dict[str, Callable[..., Any]] = {
    "weight decay without γ": lambda rate, d, w, last: (d * w, 0),
    "weight decay twice": lambda rate, d, w, last: (2 * rate * d * w, 0),
    "weight decay not at the last step": lambda rate, d, w, last: (
        0 if last else rate * d * w, 0),
    "weight decay at the last step alone": lambda rate, d, w, last: (
        rate * d * w if last else 0, 0),
    "no weight decay": lambda rate, d, w, last: (0, 0),
    "weight decay that misses the momentum": lambda rate, d, w, last: (0, rate * d * w),
    "weight decay of the wrong sign": lambda rate, d, w, last: (-rate * d * w, 0),
}  # fmt: skip
WEIGHT_DECAY = {name: Mutant(_ROUND, _round(decay=decay)) for name, decay in DECAYS.items()}
INTACT = (
    Mutant(_ROUND, _round()),
    *(Mutant(where, _noise(lambda key, worker, round, n: _keyed(key, worker, round)))
      for where in (_EAGER, _COMPILED)),
)  # fmt: skip

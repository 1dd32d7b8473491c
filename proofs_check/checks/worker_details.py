"""Checks a worker's round: the key of each local step, and weight decay."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from orlomo_jax import ArrivalTrace
from proofs_check.checks.long_simulations import ENGINES
from proofs_check.reference import BETA
from proofs_check.registry import Outcome, Size, Subject, holds

WEIGHTS = np.array([1.0, 2.0, 4.0])  # distinct, so the loss depends on the order of local steps


def draw_loss(params, model_state, batch, key):
    """Return a loss drawn from this step's key, and the key as a metric."""
    loss = batch * jax.random.uniform(key) + 0 * params.sum()
    return loss, (model_state, jax.random.key_data(key))


def weights(data_key, worker, round):
    """Return the same batches for every round."""
    return jnp.asarray(WEIGHTS)


def _wrong_step_keys(subject: Subject, name: str, round_keys: jax.Array) -> int:
    """Return how many local steps have a key other than fold_in(key, step), or a repeated key."""
    for local_steps in (1, 2, 5):
        round_fn = subject.make_method(name, 2, local_steps).local_round(draw_loss)

        def step_keys(key, round_fn=round_fn, local_steps=local_steps):
            batches = jnp.ones(local_steps)
            got = round_fn(jnp.zeros(2), None, batches, 0.1, key).metrics
            want = [jax.random.fold_in(key, step) for step in range(local_steps)]
            return got, jnp.stack([jax.random.key_data(k) for k in want])

        got, want = map(np.asarray, jax.jit(jax.vmap(step_keys))(round_keys))
        wrong = int(np.sum((got != want).any(-1)))
        repeated = got[..., 0].size - len(np.unique(got.reshape(-1, got.shape[-1]), axis=0))
        if wrong or repeated:
            return wrong + repeated
    return 0


def _simulated_draws(subject: Subject, engine: str, num_steps: int, seed: int) -> tuple[str, float]:
    """Return where a simulation's draws first differ from the documented scheme, and how much."""
    # Worker 0 runs almost all rounds, so its round counter reaches almost the number of steps.
    workers = np.where(np.arange(num_steps) % 32 == 31, 1 + np.arange(num_steps) // 32 % 3, 0)
    trace, key = ArrivalTrace.from_workers(workers, 4), jax.random.key(seed)
    method = subject.make_method("orlomo", 4, len(WEIGHTS))
    result = subject.simulate(
        method,
        draw_loss,
        weights,
        jnp.zeros(2),
        trace=trace,
        key=key,
        local_learning_rate=0.1,
        engine=ENGINES[engine],
    )
    _, noise_key = jax.random.split(key)

    def loss(worker, round):
        own = jax.random.fold_in(jax.random.fold_in(noise_key, worker), round)
        draws = [jax.random.uniform(jax.random.fold_in(own, s)) for s in range(len(WEIGHTS))]
        return jnp.mean(jnp.stack(draws) * WEIGHTS)

    want = np.asarray(jax.jit(jax.vmap(loss))(trace.workers, trace.rounds))
    difference = np.abs(np.asarray(result.history.loss) - want)
    at = int(np.argmax(difference > 2.0**-48))
    where = f"{engine}: worker {workers[at]}, round {trace.rounds[at]}"
    return where, float(difference.max())


@holds("noise-keys", strength="property")
def worker_noise(subject: Subject, size: Size) -> Iterator[Outcome]:
    """Check that each local step of each round and worker has its own key, also in simulations."""
    wrong, allowed, note, cases = 0.0, 2.0**-48, "", 0
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(size.seed), 100)
        for name in ("orlomo", "al_sgd"):
            count = _wrong_step_keys(subject, name, keys)
            cases += 8 * len(keys)
            if count:
                wrong, note = wrong + count, f"{name}: {count} local steps have a wrong key"
        for engine in ENGINES:
            num_steps = size.long_steps * 17 // 16
            where, difference = _simulated_draws(subject, engine, num_steps, size.seed)
            cases += num_steps
            if not difference <= allowed:
                wrong, note = wrong + difference, note or where
    note = note or "all distinct, and as documented"
    yield Outcome("noise-keys", cases, wrong, allowed, wrong <= allowed, note)


def _quadratic(params, model_state, batch, key):
    """Return Σ (w²/2 + c·w) over both leaves; its gradient is w + c."""
    parts = jax.tree.map(lambda w, c: jnp.sum(w**2 / 2 + c * w), params, batch)
    return sum(jax.tree.leaves(parts)), (model_state, {})


def _tree(flat: np.ndarray) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(flat[..., :2]), jnp.asarray(flat[..., 2])


def _decayed_round(
    params: np.ndarray,
    linear: np.ndarray,
    beta: float | None,
    start: Any,
    gamma: float,
    decay: float,
    scale: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Return ũ_S and Δw: ũ ← βũ + γ(scale·g + λw̃), w̃ ← w̃ − ũ."""  # fmt: skip
    w, u = params, 0 * params if start is None else start
    for c in linear:
        u = (0.0 if beta is None else beta) * u + gamma * (scale * (w + c) + decay * w)
        w = w - u
    return u, params - w


@holds("weight-decay", strength="property")
def worker_weight_decay(subject: Subject, size: Size) -> Iterator[Outcome]:
    """Compare rounds with weight decay with NumPy, for several S, β, γ, λ and starts of ũ."""
    draws, worst, cases, note = np.random.default_rng(size.seed), 0.0, 0, ""
    allowed, gammas = 2.0**-44, (0.0, 0.125, 0.01)
    with jax.enable_x64(True):
        for name, local_steps in product(("orlomo", "prsgdm", "al_sgd", "local_ormo_da"), (1, 4)):
            method = subject.make_method(name, 2, local_steps, momentum=BETA)
            beta = method.worker_momentum
            for decay, scale in ((0.5, 1.0), (0.0625, 0.25)):
                round_fn = method.local_round(
                    _quadratic, weight_decay=decay,
                    gradient_transform=optax.scale(scale) if scale != 1 else None,
                )  # fmt: skip
                for gamma in gammas:
                    params, linear = draws.normal(size=3), draws.normal(size=(local_steps, 3))
                    start = draws.normal(size=3) if method.synchronous else None
                    got = round_fn(
                        _tree(params), None, _tree(linear), gamma, jax.random.key(0),
                        momentum=None if start is None else _tree(start),
                    ).update  # fmt: skip
                    u, dw = _decayed_round(params, linear, beta, start, gamma, decay, scale)
                    pairs = [(got.delta, dw)] + ([(got.momentum, u)] if beta is not None else [])
                    for tree, want in pairs:
                        flat = np.append(*map(np.asarray, tree))
                        difference = float(np.abs(flat - want).max())
                        cases += 1
                        if not difference <= allowed and not note:
                            note = f"{name}: S={local_steps} γ={gamma} λ={decay}"
                        worst = max(worst, difference if np.isfinite(difference) else np.inf)
    note = note or f"S = 1, 4; γ = {', '.join(map(str, gammas))}; four methods"
    yield Outcome("weight-decay", cases, worst, allowed, worst <= allowed, note)

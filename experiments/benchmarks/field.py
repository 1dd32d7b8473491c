"""Benchmarks of every server rule, of local optimizers and of uneven local steps."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks.measure import Row, in_turn, rate
from experiments.models import mlp
from orlomo_jax import ArrivalTrace, LocalUpdate, Method, make_method, simulate

SIZE = 10_000_000
"""Parameters in the benchmark of the rules, in one leaf."""
K = 4
STEPS = 4
"""Steps of one measurement; several, to measure a running server."""

MOVED = {
    "orlomo": 6,
    "local_ormo_da": 5,
    "al_sgd": 3,
    "prsgdm": 10,
    "fedasync": 4,
    "fedbuff": 5,
    "nesterov": 5,
    "delayed_nesterov": 7,
    "momentum_lookahead": 5,
    "heloco": 7,  # two of them for the norms
    "delay_lookahead": 5,
    "ringmaster": 3,
    "rennala": 5,
    "rescaled_asgd": 3,
    "ca2fl": 9,
    "fadas": 11,
    "local_sgd": 5,
    "fedavgm": 7,
    "slowmo": 7,
    "diloco": 7,
}
"""How many arrays of the parameters' size a step must read or write, by method."""

NEEDED: dict[str, dict[str, Any]] = {
    "ringmaster": {"max_delay": 100},
    "rennala": {"buffer_size": K},
    "ca2fl": {"buffer_size": K},
    "fadas": {"buffer_size": K, "learning_rate": 0.01},
    "slowmo": {"momentum": 0.5},
}


def rules(repeats: int) -> Iterator[Row]:
    """Time the step of every rule, with params and state donated, against ``np.add``."""
    a, b, out = np.ones((3, SIZE), np.float32)

    def limit():
        for _ in range(STEPS):
            np.add(a, b, out=out)

    for name, arrays in MOVED.items():
        (timing,) = in_turn(repeats, _steps(name), limit)
        scale = STEPS * SIZE / 1e9
        yield Row(
            f"server step of {name}, {SIZE // 10**6} M parameters",
            4 * arrays * scale / timing.seconds,
            12 * scale / timing.limit,
            "GB/s",
            "np.add",
            arrays / 3 * timing.ratio,
            0.9,
        )


def _steps(name: str) -> Any:
    rule = make_method(name, K, 1, **NEEDED.get(name, {})).rule

    @partial(jax.jit, donate_argnums=(0, 1))
    def run(params, state, update, sent, facts):
        updates, state = rule.update(update, state, params, dispatched_params=sent, **facts)
        return optax.apply_updates(params, updates), state

    params = jnp.ones(SIZE)
    held = [params, rule.init(params)]
    update, sent = LocalUpdate(jnp.ones(SIZE), jnp.ones(SIZE)), jnp.ones(SIZE)

    def steps():
        for step in range(STEPS):
            facts = {
                "dispatched_at": np.int32(0),
                "dispatched_version": np.asarray(getattr(held[1], "version", np.int32(0))),
                "worker": np.int32(step % K),
                "num_local_steps": 1,
                "local_learning_rate": np.float32(0.1),
            }
            held[:] = run(*held, update, sent, facts)
        jax.block_until_ready(held)

    return steps


def optimizers(repeats: int) -> Iterator[Row]:
    """Compare simulated AdamW runs, with kept states, with their bare rounds."""
    adamw = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1))
    for widths in ((64, 512, 80), (64, 1024, 512, 10)):
        steps = 16
        method = make_method("ordered_outer_momentum", K, steps, local_optimizer=adamw)
        size, ours, bare, count = _runs(method, widths, 100)
        (timing,) = in_turn(repeats, ours, bare)
        name = f"simulator, compiled, AdamW, MLP of {size}, S={steps}, K={K}"
        yield rate(name, count, timing, "iterations/s", "bare rounds", 0.95)


def uneven(repeats: int) -> Iterator[Row]:
    """Compare a simulated run with S of 2 to 16 with the bare rounds of the same lengths."""
    method = make_method("al_sgd", K, (16, 8, 4, 2))
    size, ours, bare, count = _runs(method, (64, 512, 80), 200)
    (timing,) = in_turn(repeats, ours, bare)
    name = f"simulator, compiled, S of 16, 8, 4 and 2, MLP of {size}"
    yield rate(name, count, timing, "iterations/s", "bare rounds of the same S", 1 / 1.05)


def _runs(method: Method, widths: tuple[int, ...], num_steps: int) -> tuple[int, Any, Any, int]:
    """Return the number of parameters, a simulated run, its bare rounds, and their number."""
    params = mlp.init(jax.random.key(0), widths)
    lengths = method.steps_of_worker
    batches = jnp.ones((max(lengths), 32, widths[0])), jnp.zeros((max(lengths), 32), jnp.int32)
    batch_fn = jax.tree_util.Partial(_first, batches)
    trace = ArrivalTrace.from_workers(np.arange(num_steps) % K, K)
    round_fn, key = method.local_round(mlp.loss_fn), jax.random.key(0)

    def ours():
        result = simulate(
            method,
            None,
            batch_fn,
            params,
            round_fn=round_fn,
            trace=trace,
            key=key,
            local_learning_rate=0.01,
            engine="compiled",
        )
        jax.block_until_ready(result.params)

    def bare():
        states: dict[int, Any] = {}
        result: Any = None
        for worker in trace.workers.tolist():
            own = jax.tree.map(lambda x, worker=worker: x[: lengths[worker]], batches)
            kept = {"local_state": states[worker]} if worker in states else {}
            result = round_fn(params, None, own, 0.01, key, **kept)
            if result.local_state is not None:
                states[worker] = result.local_state
        jax.block_until_ready(result)

    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return size, ours, bare, num_steps


def _first(batches: Any, key: Any, worker: Any, round: Any, num_steps: int | None = None) -> Any:
    return jax.tree.map(lambda x: x[:num_steps], batches)

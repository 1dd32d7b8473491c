"""Benchmark of the language experiment: a simulated run against a bare AdamW loop."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import optax

from experiments.benchmarks.measure import Row, in_turn, rate
from experiments.language.optimizers import optimizer
from experiments.language.parts import LanguageRun, Parts, assemble
from orlomo_jax import simulate_many

REPORTS = 16


def language(repeats: int) -> Iterator[Row]:
    """Measure tokens per second of a run with K = 4, S = 32, and of a loop without a server."""
    run = LanguageRun(
        method="delay_lookahead", compute_times="equal", num_reports=REPORTS, learning_rate=0.01
    )
    parts = assemble(run)
    (timing,) = in_turn(repeats, partial(simulated, parts), bare_loop(run, parts))
    tokens = REPORTS * 32 * parts.tokens_per_step
    name = f"language model of {run.config.num_parameters}, S=32, K=4"
    yield rate(name, tokens, timing, "tokens/s", "a jitted AdamW loop", 0.95)


def simulated(parts: Parts) -> None:
    """Carry out the run."""
    results = simulate_many(
        parts.method, None, parts.batch_fn, [parts.start], round_fn=parts.round_fn
    )
    assert results is not None
    jax.block_until_ready(results[0].params)


def bare_loop(run: LanguageRun, parts: Parts):
    """Return a function that trains one worker for as many steps, in one program per 32 steps."""
    transformation = optax.chain(
        optimizer(run.optimizer, run.weight_decay, run.clip), optax.scale(-run.top_rate)
    )

    @partial(jax.jit, donate_argnums=(1, 2))
    def steps(batch_fn, params, state, key, round):
        def step(carry, batch):
            params, state = carry
            loss_fn = lambda w: parts.loss_fn(w, {}, batch, key)[0]  # noqa: E731
            loss, gradient = jax.value_and_grad(loss_fn)(params)
            updates, state = transformation.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (params, state), batch_fn(key, 0, round))

    def loop() -> None:
        params = jax.tree.map(lambda x: x.copy(), parts.start.params)
        state = transformation.init(params)
        for round in range(REPORTS):
            (params, state), _ = steps(parts.batch_fn, params, state, parts.start.key, round)
        jax.block_until_ready(params)

    return loop

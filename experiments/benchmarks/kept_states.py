"""Measures the memory and the messages that the kept states of workers' optimizers need."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.benchmarks.measure import Row
from orlomo_jax import (
    Checkpointer,
    Method,
    RayWorkers,
    StepRecord,
    ThreadWorkers,
    make_method,
    one_slow_worker,
    simulate,
    train,
)

K = 4
STEPS = 6 * K
SIZES = (100_000, 4_000_000)


def kept_states(repeats: int) -> Iterator[Row]:
    """Count the bytes of AdamW's states, and those that Ray and checkpoints need for them."""
    del repeats  # the figures are exact
    for size in SIZES:
        state, name = 8 * size / 1e6, f"AdamW, {size} parameters, K={K}"
        live = _Live(size)
        _simulated(size, live)
        against = "K states of 2 numbers per parameter"
        yield _row(f"kept states, compiled simulator, {name}", live.peak, K * state, against)
        live = _Live(size)
        _real(size, True, ThreadWorkers(), callbacks=[live])
        yield _row(f"kept states, threads, {name}", live.peak, 2 * K * state, "2 for each worker")
        (sent, received, saved), (bare_sent, bare_received, bare_saved) = (
            _on_ray(size, keep) for keep in (True, False)
        )
        against = "without a kept state"
        yield _row(f"Ray, bytes of a task, {name}", sent, bare_sent, against)
        yield _row(f"Ray, bytes of a report, {name}", received, bare_received, against)
        against = "without kept states, and K states"
        yield _row(f"bytes of a checkpoint, {name}", saved, bare_saved + K * state, against)


def _row(name: str, figure: float, limit: float, against: str) -> Row:
    return Row(name, figure, limit, "MB", against, limit / figure, 1 / 1.05)


class _Live:
    """A callback that finds the most bytes of states on all devices after a step, in MB."""

    def __init__(self, size: int) -> None:
        self._size, self.peak = size, 0.0

    def __call__(self, record: StepRecord) -> None:
        shapes = {(1, self._size), (K, 1, self._size)}
        arrays = {x.unsafe_buffer_pointer(): x for x in jax.live_arrays() if x.shape in shapes}
        self.peak = max(self.peak, sum(x.nbytes for x in arrays.values()) / 1e6)


def _method(keep: bool) -> Method:
    """Return a method with AdamW; its state has another axis, to be told from parameters."""
    adamw = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1))
    expand = lambda state: jax.tree.map(lambda x: x[None], state)  # noqa: E731

    def update(updates, state, params=None):
        direction, state = adamw.update(updates, jax.tree.map(lambda x: x[0], state), params)
        return direction, expand(state)

    optimizer = optax.GradientTransformation(lambda params: expand(adamw.init(params)), update)
    return make_method("diloco", K, 2, local_optimizer=optimizer, keep_local_state=keep)


def _arguments() -> dict[str, Any]:
    return {"num_steps": STEPS, "key": jax.random.key(0), "local_learning_rate": 0.01}


def _simulated(size: int, live: _Live) -> None:
    simulate(
        _method(True),
        _quadratic,
        _no_data,
        jnp.ones(size),
        compute_times=one_slow_worker(2),
        engine="compiled",
        callbacks=[live],
        **_arguments(),
    )


def _real(size: int, keep: bool, workers: Any, **options: Any) -> Any:
    params = jax.random.normal(jax.random.key(1), (size,))
    options |= _arguments()
    return train(_method(keep), _quadratic, _no_data, params, workers, **options)


def _on_ray(size: int, keep: bool) -> tuple[float, float, float]:
    """Return the MB of a task, of a report and of a checkpoint's files."""
    with tempfile.TemporaryDirectory() as folder:
        result = _real(size, keep, RayWorkers(), checkpoint=Checkpointer(folder, every=STEPS))
        files = (Path(folder) / str(STEPS)).rglob("*")
        saved = sum(file.stat().st_size for file in files if file.is_file())
    health = result.health
    return health.sent_bytes / STEPS / 1e6, health.received_bytes / STEPS / 1e6, saved / 1e6


def _quadratic(params, model_state, batch, key):
    return 0.5 * params @ params, (model_state, {})


def _no_data(key, worker, round):
    return jnp.zeros(2)

"""Benchmarks of real workers: threads and Ray against bare loops, and a race of methods."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import config, runner
from experiments.benchmarks.measure import Row, of_pairs
from experiments.models import mlp
from orlomo_jax import RayWorkers, ThreadWorkers, make_method, train

WARM = 0.2
"""Share of a run's reports that is not timed, while processes start and programs compile."""


def _rate(job: tuple[Any, ...], workers: Any, num_steps: int) -> float:
    """Return the reports per second of a run, without its beginning."""
    stamps: list[float] = []
    method, round_fn, batch_fn, params = job
    result = train(
        method,
        None,
        batch_fn,
        params,
        workers,
        round_fn=round_fn,
        num_steps=num_steps,
        key=jax.random.key(0),
        local_learning_rate=1e-3,
        callbacks=[lambda record: stamps.append(time.perf_counter())],
    )
    assert result.status == "finished"
    warm = int(WARM * num_steps)
    return (num_steps - 1 - warm) / (stamps[-1] - stamps[warm])


def threads(repeats: int) -> Iterator[Row]:
    """Compare the reports per second of threads with a loop of the same rounds.

    The loop waits for each round, as a worker does. One thread alone shows the cost of driver and
    server; with two, one computes while the other waits.
    """
    for widths, num_local_steps, batch_size, num_steps in (
        ((64, 512, 80), 8, 32, 400),
        ((64, 512, 80), 32, 64, 100),
    ):
        params = mlp.init(jax.random.key(0), widths)
        shape = (num_local_steps, batch_size)
        batches = jnp.ones((*shape, widths[0])), jnp.zeros(shape, jnp.int32)
        key = jax.random.key(0)  # made once, since making a key outside of a program is slow
        for num_workers in (1, 2):
            method = make_method("orlomo", num_workers, num_local_steps)
            round_fn = method.local_round(mlp.loss_fn)
            job = (method, round_fn, lambda key, worker, round, b=batches: b, params)
            figures, limits = [], []
            for _ in range(min(repeats, 5) + 1):  # the first compiles
                begin = time.perf_counter()
                for _ in range(num_steps):
                    jax.block_until_ready(round_fn(params, None, batches, 1e-3, key))
                limits.append(num_steps / (time.perf_counter() - begin))
                figures.append(_rate(job, ThreadWorkers(), num_steps))
            size = sum(leaf.size for leaf in jax.tree.leaves(params))
            name = (
                f"threads, K={num_workers}, MLP of {size}, S={num_local_steps}, batch {batch_size}"
            )
            yield of_pairs(
                name, figures[1:], limits[1:], "reports/s", "a loop of the same rounds", 0.9
            )


class _Echo:
    """An actor that receives parameters and returns as many bytes as a report."""

    def __init__(self, size: int, round_fn: Callable | None, batches: Any) -> None:
        jax.config.update("jax_platforms", "cpu")
        self._round_fn, self._batches, self._key = round_fn, batches, jax.random.key(0)
        self._answer = (np.ones(size, np.float32), np.ones(size, np.float32))

    def answer(self, params: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self._round_fn is None:
            return self._answer
        result = self._round_fn(params, None, self._batches, 1e-3, self._key)
        return jax.device_get(tuple(result.update))


def _bare_ray_rate(
    size: int, num_workers: int, num_steps: int, round_fn: Callable | None, batches: Any
) -> float:
    """Return the round trips per second of Ray alone: put, call, wait, get."""
    import ray

    actor: Any = ray.remote(num_cpus=1)(_Echo)
    actors: list[Any] = [actor.remote(size, round_fn, batches) for _ in range(num_workers)]
    params, stamps = np.ones(size, np.float32), []
    pending = {worker.answer.remote(ray.put(params)): worker for worker in actors}
    for _ in range(num_steps):
        (ready,), _ = ray.wait(list(pending), num_returns=1)
        worker = pending.pop(ready)
        ray.get(ready)
        stamps.append(time.perf_counter())
        pending[worker.answer.remote(ray.put(params))] = worker
    for worker in actors:
        ray.kill(worker)
    warm = int(WARM * num_steps)
    return (num_steps - 1 - warm) / (stamps[-1] - stamps[warm])


def _vector_loss(params, model_state, batch, key):
    """Return a very cheap loss with a gradient in every parameter."""
    del key
    return batch[0] * jnp.vdot(params, params), (model_state, {})


def ray_round_trips(repeats: int) -> Iterator[Row]:
    """Compare the round trips per second on Ray with a bare Ray loop that moves the same bytes.

    In one row the bare actors answer from memory. In the other they compute the same round, so that
    the difference is the cost of server, driver and journal.
    """
    import ray

    num_workers, batches = 2, jnp.ones((1, 1))
    method = make_method("orlomo", num_workers, 1)
    round_fn = method.local_round(_vector_loss)
    job = (method, round_fn, lambda key, worker, round: batches)
    begun_here = not ray.is_initialized()
    if begun_here:
        ray.init(num_cpus=num_workers, include_dashboard=False, log_to_driver=False)
    for megabytes, num_steps in ((1, 400), (44, 60)):
        size = megabytes * 250_000
        figures, bytes_alone, with_round = [], [], []
        for _ in range(min(repeats, 3)):
            bytes_alone.append(_bare_ray_rate(size, num_workers, num_steps, None, None))
            with_round.append(_bare_ray_rate(size, num_workers, num_steps, round_fn, batches))
            figures.append(_rate((*job, jnp.ones(size)), RayWorkers(), num_steps))
        name = f"Ray round trips, {megabytes} MB of parameters, K={num_workers}"
        yield of_pairs(name, figures, with_round, "1/s", "bare Ray, the same bytes and rounds", 0.8)
        yield of_pairs(name, figures, bytes_alone, "1/s", "bare Ray, the same bytes alone", 0.8)
    if begun_here:
        ray.shutdown()


def race(repeats: int) -> Iterator[Row]:
    """Compare the real seconds of OrLoMo and PRSGDm to a training loss, on threads.

    One of four workers is 4× slower. Each method uses the rate of one grid that reaches the loss
    first in virtual time.
    """
    target, grid = 0.005, (0.03, 0.1, 0.3)
    base = config.Run(
        model="mlp",
        width=8,
        dataset="digits",
        scenario="one_slow",
        slowdown=4,
        workers=4,
        epochs=400,
        local_iterations=32,
        batch_size=32,
        weight_decay=0.0,
    )
    seconds: dict[str, list[float]] = {"orlomo": [], "prsgdm": []}
    chosen = {}
    for method in seconds:
        candidates = [replace(base, method=method, learning_rate=rate) for rate in grid]
        chosen[method] = min(candidates, key=lambda run: _time_to(target, run, "virtual_time"))
    for seed in range(min(repeats, 5)):
        for method, run in chosen.items():
            real = replace(run, runtime="threads", seed=seed)
            seconds[method].append(_time_to(target, real, "real_time"))
    yield of_pairs(
        f"threads, K=4, one 4× slower: training loss {target}",
        [1 / s for s in seconds["orlomo"]],
        [1 / s for s in seconds["prsgdm"]],
        "times/s",
        "PRSGDm",
        1 / 0.6,
    )


def _time_to(target: float, run: config.Run, clock: str) -> float:
    row, _ = runner.execute(run, evaluate_every=run.workers)
    curve = row["curve"]
    reached = [t for t, loss in zip(curve[clock], curve["train_loss"], strict=True)
               if loss is not None and loss <= target]  # fmt: skip
    return reached[0] if reached else float("inf")

"""Benchmarks of real workers: threads and Ray against bare loops, and a race of methods."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import config, runner
from experiments.benchmarks.measure import Row, of_pairs
from experiments.models import mlp
from orlomo_jax import LocalUpdate, Method, RayWorkers, ThreadWorkers, make_method, train
from orlomo_jax.worker import quantize_reports

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


def _server_step(method: Method) -> Callable:
    """Return the rule and the addition to the parameters as one program."""

    @jax.jit
    def server_step(params, rule_state, update, step):
        updates, rule_state = method.rule.update(
            update,
            rule_state,
            params,
            dispatched_at=step,
            dispatched_version=step,
            worker=0,
            num_local_steps=method.num_local_steps,
            local_learning_rate=1e-3,
            dispatched_params=None,
        )
        return optax.apply_updates(params, updates), rule_state

    return server_step


def _bare_rates(job: tuple[Any, ...], batches: Any, num_steps: int) -> tuple[float, float]:
    """Return the rounds per second of a loop of rounds, and of one of rounds and server steps.

    Both wait for each result, as worker and server do.
    """
    method, round_fn, _, params = job
    key = jax.random.key(0)  # made once, since making a key outside of a program is slow
    begin = time.perf_counter()
    for _ in range(num_steps):
        jax.block_until_ready(round_fn(params, None, batches, 1e-3, key))
    rounds = num_steps / (time.perf_counter() - begin)

    server_step = _server_step(method)
    state = params, method.rule.init(params)
    update = round_fn(params, None, batches, 1e-3, key).update
    jax.block_until_ready(server_step(*state, update, np.int32(0)))  # compiles
    begin = time.perf_counter()
    for step in range(num_steps):
        result = jax.block_until_ready(round_fn(state[0], None, batches, 1e-3, key))
        state = jax.block_until_ready(server_step(*state, result.update, np.int32(step)))
    return rounds, num_steps / (time.perf_counter() - begin)


def threads(repeats: int) -> Iterator[Row]:
    """Compare the reports per second of threads with loops of rounds, and of server steps too.

    One thread alone shows the cost of driver and server; with two, one computes while the other
    waits.
    """
    for widths, num_local_steps, batch_size, num_steps in (
        ((64, 512, 80), 8, 32, 400),
        ((64, 512, 80), 32, 64, 100),
    ):
        params = mlp.init(jax.random.key(0), widths)
        shape = (num_local_steps, batch_size)
        batches = jnp.ones((*shape, widths[0])), jnp.zeros(shape, jnp.int32)
        for num_workers in (1, 2):
            method = make_method("orlomo", num_workers, num_local_steps)
            round_fn = method.local_round(mlp.loss_fn)
            job = (method, round_fn, lambda key, worker, round, b=batches: b, params)
            figures, limits = [], []
            for _ in range(min(repeats, 5) + 1):  # the first compiles
                limits.append(_bare_rates(job, batches, num_steps))
                figures.append(_rate(job, ThreadWorkers(), num_steps))
            alone, with_steps = zip(*limits[1:], strict=True)
            size = sum(leaf.size for leaf in jax.tree.leaves(params))
            name = (
                f"threads, K={num_workers}, MLP of {size}, S={num_local_steps}, batch {batch_size}"
            )
            for against, rates in (
                ("a loop of the same rounds", alone),
                ("a loop of the same rounds and server steps", with_steps),
            ):
                yield of_pairs(name, figures[1:], list(rates), "reports/s", against, 0.9)


def int8_reports(repeats: int) -> Iterator[Row]:
    """Compare the bytes of a report in int8 with those in float32, on the network."""
    del repeats
    params = mlp.init(jax.random.key(0), (64, 512, 400, 10))  # 1 MB
    round_fn = quantize_reports(make_method("orlomo", 2, 1).local_round(mlp.loss_fn))
    batches = jnp.ones((1, 8, 64)), jnp.zeros((1, 8), jnp.int32)
    update = round_fn(params, None, batches, 1e-3, jax.random.key(0)).update
    sizes = [
        sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        for tree in (round_fn.wire.pack(update), update)
    ]
    name = f"a report of {sum(x.size for x in jax.tree.leaves(params))} parameters in int8"
    sent, whole = (size / 1e6 for size in sizes)
    yield Row(name, sent, whole, "MB", "float32", whole / sent, 1 / 0.27)


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
    job: tuple[Any, ...], batches: Any, num_steps: int, *, rounds: bool, steps: bool
) -> float:
    """Return the round trips per second of Ray alone: put, call, wait, get.

    Args:
        job: As in :func:`_rate`.
        batches: The batches of every round.
        num_steps: The number of round trips.
        rounds: Whether the actors compute rounds, or answer from memory.
        steps: Whether the server step is computed after each answer.
    """
    import ray

    method, round_fn, _, params = job
    actor: Any = ray.remote(num_cpus=1)(_Echo)
    actors: list[Any] = [
        actor.remote(params.size, round_fn if rounds else None, batches)
        for _ in range(method.num_workers)
    ]
    state, server_step = (params, method.rule.init(params)), _server_step(method)
    sent, stamps = np.asarray(params), []
    pending = {worker.answer.remote(ray.put(sent)): worker for worker in actors}
    for step in range(num_steps):
        (ready,), _ = ray.wait(list(pending), num_returns=1)
        worker = pending.pop(ready)
        update = LocalUpdate(*ray.get(ready))
        if steps:
            state = server_step(*state, update, np.int32(step))
            sent = np.asarray(state[0])
        stamps.append(time.perf_counter())
        pending[worker.answer.remote(ray.put(sent))] = worker
    for worker in actors:
        ray.kill(worker)
    warm = int(WARM * num_steps)
    return (num_steps - 1 - warm) / (stamps[-1] - stamps[warm])


def _vector_loss(params, model_state, batch, key):
    """Return a very cheap loss with a gradient in every parameter."""
    del key
    return batch[0] * jnp.vdot(params, params), (model_state, {})


def ray_round_trips(repeats: int) -> Iterator[Row]:
    """Compare the round trips per second on Ray with bare Ray loops that move the same bytes.

    The bare actors answer from memory, or compute the same rounds. The third loop computes server
    steps too, so that the difference is the cost of driver, checks, journal and records.
    """
    import ray

    num_workers, batches = 2, jnp.ones((1, 1))
    method = make_method("orlomo", num_workers, 1)
    round_fn = method.local_round(_vector_loss)
    begun_here = not ray.is_initialized()
    if begun_here:
        ray.init(num_cpus=num_workers, include_dashboard=False, log_to_driver=False)
    limits = {
        "bare Ray, the same bytes, rounds and server steps": {"rounds": True, "steps": True},
        "bare Ray, the same bytes and rounds": {"rounds": True, "steps": False},
        "bare Ray, the same bytes alone": {"rounds": False, "steps": False},
    }
    for megabytes, num_steps in ((1, 400), (44, 60)):
        params = jnp.ones(megabytes * 250_000)
        job = (method, round_fn, lambda key, worker, round: batches, params)
        figures, bare = [], {against: [] for against in limits}
        for _ in range(min(repeats, 9)):
            for against, what in limits.items():
                bare[against].append(_bare_ray_rate(job, batches, num_steps, **what))
            figures.append(_rate(job, RayWorkers(), num_steps))
        name = f"Ray round trips, {megabytes} MB of parameters, K={num_workers}"
        for against, rates in bare.items():
            yield of_pairs(name, figures, rates, "1/s", against, 0.95)
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

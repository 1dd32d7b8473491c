"""Samples a trace of arrivals from a model of compute times."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from orlomo_jax.checks import check_count, check_local_steps, check_type
from orlomo_jax.traces.compute_times import ComputeTimes
from orlomo_jax.traces.event_loop import EventLoop, RoundClock
from orlomo_jax.traces.policies import Policy
from orlomo_jax.traces.trace import ArrivalTrace


def sample_trace(
    model: ComputeTimes,
    num_workers: int,
    num_steps: int,
    num_local_steps: int | Sequence[int],
    seed: int,
    *,
    synchronous: bool = False,
    policy: Policy | None = None,
) -> ArrivalTrace:
    """Return the arrivals of workers with these compute times; the server itself takes no time.

    Each worker draws from its own stream, seeded by (seed, worker), one number per round. So a
    round takes equally long under every policy, and a shorter trace is a prefix of a longer one.
    Reports with the same time arrive in the order of their workers.

    Args:
        model: The compute times.
        num_workers: K ≥ 1.
        num_steps: T ≥ 0, the number of reports.
        num_local_steps: S ≥ 1, the gradients per round (H in the DiLoCo papers): one number for all
            workers, or one for each.
        seed: Integer ≥ 0.
        synchronous: Whether all workers wait until a round is complete.
        policy: Makes workers wait or start again, for example
            :class:`~orlomo_jax.traces.StalenessBound`; not for a synchronous trace. A silent worker
            counts the reports that arrive, also those that the policy drops.

    Returns:
        A trace whose only events are the policy's restarts before an arrival; a silent worker just
        stops reporting.

    Raises:
        TypeError, ValueError: If an argument is out of range, or the silent workers leave fewer
            than ``num_steps`` reports.

    Example:
        >>> from orlomo_jax import per_worker_times
        >>> model = per_worker_times([1.0, 2.5], variation=0.0)
        >>> sample_trace(model, 2, num_steps=6, num_local_steps=1, seed=0).workers.tolist()
        [0, 0, 1, 0, 0, 0]
        >>> from orlomo_jax.traces import StalenessBound
        >>> sample_trace(model, 2, 6, [1, 1], 0, policy=StalenessBound(1)).workers.tolist()
        [0, 1, 0, 1, 0, 1]
    """
    if not isinstance(model, ComputeTimes):
        raise TypeError(f"`model` must be a model of compute times, got model={model!r}")
    num_steps, seed = check_count("num_steps", num_steps), check_count("seed", seed)
    means = model.mean_times(num_workers)
    seconds = np.multiply(check_local_steps(num_local_steps, num_workers), means)
    limits = np.full(num_workers, np.iinfo(np.int64).max)
    for worker, after_rounds in model.silent_after:
        limits[check_count("worker", worker, 0, num_workers - 1)] = after_rounds

    def stream(worker: int) -> Callable[[int], np.ndarray]:
        return functools.partial(model.draw_factors, np.random.default_rng([seed, worker]))

    arguments = stream, seconds, model.communication_time, limits, num_steps
    options: dict[str, Any] = {"synchronous": synchronous}
    if policy is None:
        workers, times = (_barrier_arrivals if synchronous else _free_arrivals)(*arguments)
    else:
        check_type("policy", policy, Policy, "a Policy, such as StalenessBound")
        if synchronous:
            raise ValueError(f"`policy` must be None if synchronous, got policy={policy!r}")
        policy.check_num_workers(num_workers)
        workers, times, events = _policy_arrivals(policy, *arguments)
        options = {"events": events, "max_wait": policy.max_wait}
    if len(workers) < num_steps:
        raise ValueError(
            f"`num_steps` must be ≤ {len(workers)}, got num_steps={num_steps}: the silent workers "
            "send no more reports"
        )
    return ArrivalTrace.from_workers(workers, num_workers, times=times, **options)


def _free_arrivals(stream, seconds, communication_time, limits, num_steps):
    """Return the workers and times of the first reports of an asynchronous run."""
    limits = limits.tolist()
    num_steps = min(num_steps, sum(limits))
    rate = np.sum(1 / (seconds + communication_time))
    # Almost always late enough, unless fast workers fall silent: U changes the number of reports
    # by about √T, and each worker's unfinished round by less than one.
    horizon = (num_steps + 2 * math.sqrt(num_steps) + len(seconds)) / rate
    while True:
        times = [
            report_times(stream(worker), mean, communication_time, limit, horizon)
            for worker, (mean, limit) in enumerate(zip(seconds, limits, strict=True))
        ]
        counts = [len(own) for own in times]
        if sum(counts) >= num_steps:
            break
        horizon *= 2
    times = np.concatenate(times)
    first = np.argsort(times, kind="stable")[:num_steps]
    return np.repeat(np.arange(len(seconds)), counts)[first], times[first]


def report_times(draw, mean, communication_time, limit, horizon):
    """Return the times of one worker's reports up to the horizon."""
    drift = np.zeros(1)  # Σ U of the rounds so far; independent of how many are drawn at once
    while True:
        times = mean * drift + communication_time * np.arange(len(drift))
        if times[-1] > horizon or len(drift) > limit:
            return times[1 : np.searchsorted(times, horizon, "right")]
        expected = (horizon - times[-1]) / (mean + communication_time)
        count = min(int(expected + 2 * math.sqrt(expected)) + 1, limit + 1 - len(drift))
        drift = np.concatenate([drift[:-1], np.cumsum(np.append(drift[-1], draw(count)))])


def _barrier_arrivals(stream, seconds, communication_time, limits, num_steps):
    """Return the workers and times of the first reports of a synchronous run."""
    num_workers, num_rounds = len(seconds), -(-num_steps // len(seconds))
    drift = np.stack([stream(worker)(num_rounds) for worker in range(num_workers)], axis=1)
    durations = seconds * drift + communication_time
    durations[np.arange(num_rounds)[:, None] >= limits] = math.inf
    starts = np.cumsum(np.append(0.0, durations.max(axis=1)))[:-1]
    times = starts[:, None] + durations
    workers = np.argsort(times, axis=1, kind="stable")
    times = np.take_along_axis(times, workers, axis=1).ravel()[:num_steps]
    return workers.ravel()[:num_steps][times < math.inf], times[times < math.inf]


def _policy_arrivals(policy, stream, seconds, communication_time, limits, num_steps):
    """Return the workers and times of the first reports under a policy, and the restarts."""
    clocks = [
        RoundClock(stream(worker), mean, communication_time)
        for worker, mean in enumerate(seconds.tolist())
    ]
    loop = EventLoop(policy, clocks, limits.tolist())
    loop.run(num_steps)
    events = [event for event in loop.events if event.step < num_steps]
    return loop.workers, loop.times, events

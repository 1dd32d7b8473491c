"""Fits a model of compute times to the arrivals of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from orlomo_jax.checks import check_count, check_local_steps, check_one_each
from orlomo_jax.traces.compute_times import ComputeTimes
from orlomo_jax.traces.policies import StalenessBound
from orlomo_jax.traces.sample_trace import sample_trace
from orlomo_jax.traces.trace import ArrivalTrace

_MIN_ROUNDS = 3
"""The least number of rounds per worker, so that there are residuals."""
_ROUNDING = 1e-9
"""Deviations below this are rounding errors of the times."""


class HasTrace(Protocol):
    """A record of a run, such as a journal."""

    def trace(self) -> ArrivalTrace:
        """Return the run's arrivals."""
        ...


class ComputeTimesFit(NamedTuple):
    """A fitted model of compute times; ``str`` returns it as a table.

    Attributes:
        compute_times: The model.
        counts: The number of rounds of each worker that the fit uses.
        spread: The standard deviation of U, the compute time of a round divided by its mean.
        separable: Whether the communication time could be estimated; else it is 0, and the time
            per gradient contains it.
        r_squared: The fraction of the variance of the rounds' durations that worker and S explain;
            near 0 for equal workers, whose durations differ by chance only.
        delay_distance: How well the model reproduces the delays, in [0, 1]: the largest difference
            between the distribution functions of the run's delays and of those of a trace sampled
            from the model (Kolmogorov–Smirnov), over all runs.
    """

    compute_times: ComputeTimes
    counts: tuple[int, ...]
    spread: float
    separable: bool
    r_squared: float
    delay_distance: float

    def __str__(self) -> str:
        """Return a table of the workers, and the goodness of fit."""
        model = self.compute_times
        means = model.mean_times(len(self.counts))
        rows = [f"{'worker':>6} {'rounds':>7} {'s per gradient':>15}"]
        rows += [
            f"{worker:>6} {count:>7} {mean:>15.6g}"
            for worker, (count, mean) in enumerate(zip(self.counts, means, strict=True))
        ]
        communication = f"communication {model.communication_time:.6g} s per round"
        if not self.separable:
            communication += " (not separable: every worker has one number of local steps)"
        return "\n".join(
            [
                *rows,
                communication,
                f"variation {model.variation:.4g}, {model.noise} noise, spread {self.spread:.4g}",
                f"R² of the durations {self.r_squared:.4g}, "
                f"distance of the delays' distributions {self.delay_distance:.4g}",
            ]
        )


def fit_compute_times(
    runs: ArrivalTrace | HasTrace | Sequence[ArrivalTrace | HasTrace],
    num_local_steps: Any = 1,
    *,
    skip_rounds: int = 0,
) -> ComputeTimesFit:
    """Return the model of compute times that fits the arrival times of one or several runs.

    The duration of a round is the time from the arrival after which its task was sent to its own
    arrival. Lost and cancelled rounds are ignored, and so are rounds that an event started, because
    a trace does not contain its time. If a policy cancels long rounds, the remaining ones are
    shorter on average, and so are the fitted times.

    In one run, each worker has one number of local steps S_k. Its mean duration is S_k times its
    seconds per gradient, plus communication: K equations for K + 1 unknowns. So the communication
    time is estimated only if some worker has different S in several runs. Else it is 0.

    Args:
        runs: A trace or a journal; or a sequence of them, all with the same K workers.
        num_local_steps: S, the gradients per round: one number for all workers, or one for each.
            For a sequence of runs, a sequence with such a value for each run.
        skip_rounds: How many of each worker's first rounds to ignore, for example because a real
            worker compiles in them.

    Raises:
        TypeError, ValueError: If an argument is out of range, the runs differ in K, or a worker has
            fewer than 3 rounds.

    Example:
        >>> from orlomo_jax.traces import per_worker_times, sample_trace
        >>> model = per_worker_times([1.0, 2.0], variation=0.0).with_communication(latency=0.5)
        >>> runs = [sample_trace(model, 2, 100, steps, seed=0) for steps in (4, 8)]
        >>> print(fit_compute_times(runs, [4, 8]))
        worker  rounds  s per gradient
             0     130               1
             1      70               2
        communication 1 s per round
        variation 0, uniform noise, spread 0
        R² of the durations 1, distance of the delays' distributions 0
    """
    several = isinstance(runs, Sequence)
    traces = [_as_trace(run) for run in (runs if several else [runs])]
    if len({trace.num_workers for trace in traces}) != 1:
        sizes = [trace.num_workers for trace in traces]
        raise ValueError(f"`runs` must have the same number of workers, got num_workers={sizes}")
    num_workers = traces[0].num_workers
    if several:
        check_one_each("num_local_steps", num_local_steps, len(traces), "run")
    given = num_local_steps if several else [num_local_steps]
    steps = [np.broadcast_to(check_local_steps(x, num_workers), num_workers) for x in given]
    skip_rounds = check_count("skip_rounds", skip_rounds)
    rounds = [_durations(trace, own, skip_rounds) for trace, own in zip(traces, steps, strict=True)]
    workers, local_steps, durations = map(np.concatenate, zip(*rounds, strict=True))
    counts = np.bincount(workers, minlength=num_workers)
    if (counts < _MIN_ROUNDS).any():
        worker = int(np.argmin(counts))
        raise ValueError(
            f"`runs` must have {_MIN_ROUNDS} or more complete rounds of each worker, "
            f"got {counts[worker]} of worker {worker}"
        )
    communication = _communication(workers, local_steps, durations, num_workers)
    constant = communication or 0.0
    per_gradient = (durations - constant) / local_steps
    means = np.bincount(workers, per_gradient) / counts
    if not (means > 0).all():
        worker = int(np.argmin(means))
        raise ValueError(f"`runs` must have rounds that take time, got 0 s of worker {worker}")
    factors = per_gradient / means[workers]
    spread = math.sqrt(np.sum((factors - 1) ** 2) / (len(factors) - num_workers))
    spread = spread if spread > _ROUNDING else 0.0
    model = ComputeTimes(
        tuple(means.tolist()), communication_time=constant, **_noise(factors - 1, spread)
    )
    residuals = durations - constant - local_steps * means[workers]
    total = np.sum((durations - durations.mean()) ** 2)
    r_squared = 1 - float(np.sum(residuals**2) / total) if total else 0.0
    distances = [_delay_distance(model, *run) for run in zip(traces, steps, strict=True)]
    return ComputeTimesFit(
        model, tuple(counts.tolist()), spread, communication is not None, r_squared, max(distances)
    )


def _as_trace(run: Any) -> ArrivalTrace:
    is_record = hasattr(run, "trace") and not hasattr(run, "dtype")  # an array's is a sum
    trace = run.trace() if is_record and not isinstance(run, ArrivalTrace) else run
    if not isinstance(trace, ArrivalTrace):
        raise TypeError(f"`runs` must be traces or journals, got {run!r}")
    return trace


def _durations(trace: ArrivalTrace, local_steps, skip_rounds: int):
    """Return worker, S and duration of every complete round that an arrival started."""
    started = np.append(0.0, trace.times)[trace.dispatched_at]
    used = trace.rounds >= skip_rounds
    for step, _, worker in trace.events:  # ignore the round of the worker that it is in
        later = np.flatnonzero(trace.workers[step:] == worker)[:1] + step
        used[later[trace.dispatched_at[later] <= step]] = False
        if trace.max_wait is not None:  # workers that waited may have started then
            used[trace.dispatched_at == step] = False
    workers = trace.workers[used]
    return workers, local_steps[workers], (trace.times - started)[used]


def _communication(workers, local_steps, durations, num_workers: int) -> float | None:
    """Return the communication time by weighted least squares; None if it is not separable."""
    cells, cell, counts = np.unique(
        np.stack([workers, local_steps]), axis=1, return_inverse=True, return_counts=True
    )
    if cells.shape[1] == num_workers:
        return None
    of_worker, steps = cells
    means = np.bincount(cell.ravel(), durations) / counts
    design = np.zeros((len(means), num_workers + 1))
    design[np.arange(len(means)), of_worker] = steps
    design[:, -1] = 1
    solution, fitted = np.zeros(num_workers + 1), means
    for _ in range(5):  # the deviation of a round is proportional to its compute time
        weights = np.sqrt(counts) / np.maximum(fitted, 1e-12 * means.max())
        solution = np.linalg.lstsq(design * weights[:, None], means * weights, rcond=None)[0]
        fitted = design[:, :-1] @ solution[:-1]
    return float(np.clip(solution[-1], 0.0, durations.min()))


def _noise(deviations, spread: float) -> dict[str, Any]:
    """Return variation and noise of a model from the deviations of U from 1."""
    skewness = np.mean(deviations**3) / spread**3 if spread else 0.0
    if skewness > 0.5:  # halfway between uniform (0) and half-normal (1)
        rest = math.sqrt(1 - 2 / math.pi) - spread * math.sqrt(2 / math.pi)
        variation = spread / rest if rest > 0 else math.inf
        return {"variation": min(variation, 0.999), "noise": "half-normal"}
    return {"variation": min(math.sqrt(3) * spread, 0.999)}


def _delay_distance(model: ComputeTimes, trace: ArrivalTrace, local_steps) -> float:
    """Return the distance between the delays of a trace and of one sampled from the model."""
    policy = None if trace.max_wait is None else StalenessBound(trace.max_wait)
    sampled = sample_trace(
        model,
        trace.num_workers,
        trace.num_steps,
        local_steps.tolist(),
        seed=0,
        synchronous=trace.synchronous,
        policy=policy,
    )
    ours, theirs = (np.sort(x.delays) for x in (sampled, trace))
    values = np.union1d(ours, theirs)
    below = [np.searchsorted(x, values, "right") / trace.num_steps for x in (ours, theirs)]
    return float(np.max(np.abs(below[0] - below[1])))

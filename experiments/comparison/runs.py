"""Carries out the runs of a comparison, and chooses each method's best point."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments import records
from experiments.comparison.clusters import DEFAULTS, Cluster, hyperparameters, make
from experiments.comparison.tasks import Task, partition_of
from orlomo_jax import (
    ArrivalTrace,
    Method,
    RunStart,
    TrainingResult,
    delay_adaptive,
    simulate_many,
)
from orlomo_jax.rules import rescaled

EVALUATIONS = 10
"""Points of a curve."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """The settings of one run; a finished row with equal settings is not run again."""

    task: str
    cluster: str
    workers: int
    local_steps: str
    partition: str
    optimizer: str
    batch_size: int
    num_gradients: int
    method: str
    learning_rate: float
    eta_factor: float
    seed: int
    purpose: str
    digest: str
    """Of the compute times and the method's hyperparameters, so that a change runs again."""

    @property
    def cell(self) -> Setting:
        """The settings that the methods are compared under."""
        blank = {"method": "", "local_steps": "", "purpose": "", "digest": ""}
        return replace(self, learning_rate=0.0, eta_factor=0.0, seed=0, **blank)


class Point(NamedTuple):
    """A point of the tuning grid: γ and the factor of η."""

    learning_rate: float
    eta_factor: float


class Job(NamedTuple):
    """One run to carry out: its settings, and the objects that they name."""

    setting: Setting
    task: Task
    cluster: Cluster


def job(
    task: Task, cluster: Cluster, method: str, point: Point, shared: dict[str, Any], **own: Any
) -> Job:
    """Return the run of a method at a point of the grid."""
    chosen = hyperparameters(method, cluster.num_workers, point.eta_factor)
    content = json.dumps([asdict(cluster.compute_times), chosen])
    setting = Setting(
        cluster=cluster.name,
        workers=cluster.num_workers,
        method=method,
        digest=hashlib.sha256(content.encode()).hexdigest()[:8],
        **point._asdict(),
        **shared,
        **own,
    )
    return Job(setting, task, cluster)


class Prepared(NamedTuple):
    """A run that is ready to start.

    Attributes:
        job: The run's job.
        method: The method; ``start`` may have another η.
        batch_fn: The batch function.
        start: What the run has for itself in a sweep.
    """

    job: Job
    method: Method
    batch_fn: Callable
    start: RunStart

    @property
    def shape(self) -> tuple[Any, ...]:
        """A key that is equal for runs that can share a sweep."""
        setting = self.job.setting
        blank = replace(setting, learning_rate=0.0, eta_factor=0.0, seed=0, digest="")
        return blank, self.method, id(self.batch_fn), self.start.trace.num_steps


def prepare(job: Job) -> Prepared:
    """Prepare a run. If the method's program can take η as an argument, it does."""
    setting, task, cluster = job
    K, steps = cluster.num_workers, cluster.local_steps(setting.local_steps)
    default, eta = DEFAULTS[setting.method], {}
    if default.rate is not None and default.traced and task.model_state is None:
        eta[default.rate] = hyperparameters(setting.method, K, setting.eta_factor)[default.rate]
    eta_factor = 1.0 if eta else setting.eta_factor
    method = make(setting.method, K, steps, eta_factor, setting.optimizer)
    if task.model_state is not None and method.model_state_weight is not None:
        weight = method.model_state_weight  # a larger η may raise it above 1
        method = method._replace(
            model_state_weight=lambda step, delay: jnp.clip(weight(step, delay), 0, 1)
        )
    params, model_state, key = task.start(setting.seed)
    start = RunStart(
        params,
        cluster.arrivals(method, setting.num_gradients, setting.seed),
        key,
        setting.learning_rate,
        model_state,
        eta,
    )
    batch_fn = task.batches(K, steps, setting.partition, setting.seed)
    return Prepared(job, method, batch_fn, start)


def carry_out(jobs: Iterable[Job]) -> Iterator[list[Row]]:
    """Train once for each job; yield the rows of the runs that shared a sweep.

    Rows of tuning have only the end of their run. ``wall_time`` is that of the whole sweep of
    ``together`` runs.
    """
    sweeps: dict[Any, list[Prepared]] = defaultdict(list)
    for one in map(prepare, jobs):
        sweeps[one.shape].append(one)
    for sweep in sweeps.values():
        first = sweep[0]
        setting, task, _ = first.job
        begin = time.perf_counter()
        num_steps = first.start.trace.num_steps
        results = simulate_many(
            first.method,
            task.loss_fn,
            first.batch_fn,
            [one.start for one in sweep],
            evaluate=task.evaluate,
            evaluate_every=None
            if setting.purpose == "tuning"
            else max(1, num_steps // EVALUATIONS),
            engine="auto" if setting.task == "cifar" else "compiled",
            over_runs="loop",  # an interrupted sweep gives the same rows; tuning and final share it
        )
        assert results is not None
        seconds = round(time.perf_counter() - begin, 2)
        more = {"wall_time": seconds, "together": len(sweep)}
        pairs = zip(sweep, results, strict=True)
        yield [_row(one, result) | more for one, result in pairs]


def _row(run: Prepared, result: TrainingResult) -> Row:
    setting, task, cluster = run.job
    evaluations, trace = result.history.evaluations, result.trace
    last = evaluations[-1].metrics if evaluations else {}
    finished = result.status == "finished" and math.isfinite(last.get("loss", math.nan))
    row: Row = {
        "setting": asdict(setting),
        "status": "finished" if finished else "diverged",
        "loss": short(last["loss"]) if finished else None,
    }
    if setting.purpose == "tuning":
        return row
    updates = _updates(result.rule_state, trace)
    done = np.cumsum(np.array(run.method.steps_of_worker)[trace.workers])
    row |= {
        "accuracy": short(last["accuracy"]) if finished and "accuracy" in last else None,
        "mean_delay": short(float(trace.delays.mean())),
        "max_delay": int(trace.max_delay),
        "reports": trace.num_steps,
        "declined": int(np.sum(~result.history.accepted)),
        "updates": updates,
        "curve": {
            "gradients": [int(done[e.step - 1]) for e in evaluations],
            "time": [short(e.time) for e in evaluations],
            "loss": [short(e.metrics["loss"]) for e in evaluations],
        },
    }
    if finished and task.labels is not None:
        row |= _unequal(setting, cluster, task.labels, trace, last)
    return row


def _updates(rule_state: Any, trace: ArrivalTrace) -> int:
    """Return how many times the rule has changed w."""
    if hasattr(rule_state, "version"):
        return int(rule_state.version)
    return trace.num_steps // (trace.num_workers if trace.synchronous else 1)


def _unequal(
    setting: Setting, cluster: Cluster, labels: np.ndarray, trace: ArrivalTrace, last: Row
) -> Row:
    """Return what the slowest and the fastest worker contribute and get.

    ``reports`` is a worker's share of all reports. ``eq6`` and ``rescaled`` are its shares of the
    total weight under Eq. (6) and under (τ + 1)/K². ``accuracy`` is the mean of the classes'
    accuracies, weighted by the worker's own classes.
    """
    parts = partition_of(labels, cluster.num_workers, setting.partition, setting.seed)
    out: Row = {}
    for name, worker in (("slowest", cluster.slowest), ("fastest", cluster.fastest)):
        mine = trace.workers == worker
        out[name] = {"reports": short(float(mine.mean()))}
        for rule, weigh in (("eq6", delay_adaptive), ("rescaled", rescaled)):
            weights = np.asarray(weigh(cluster.num_workers)(jnp.asarray(trace.delays)))
            out[name][rule] = short(float(weights[mine].sum() / weights.sum()))
        counts = np.bincount(labels[parts[worker]], minlength=int(labels.max()) + 1)
        of_class = [last.get(f"accuracy_of_class_{c}", math.nan) for c in range(len(counts))]
        own = short(float(np.dot(counts, of_class) / counts.sum()))
        if own is not None:
            out[name]["accuracy"] = own
    return out


def short(value: float) -> float | None:
    """Round to five significant digits; None for NaN and Inf.

    Example:
        >>> short(0.12345678), short(float("nan"))
        (0.12346, None)
    """
    return float(f"{value:.5g}") if math.isfinite(value) else None


class Book:
    """The rows of a file, by their settings."""

    def __init__(self, path: Path) -> None:
        """Read the file, if it exists."""
        records.check_writable(path)
        self.path = path
        self.rows: dict[Setting, Row] = {
            Setting(**row["setting"]): row for row in records.read(path)
        }

    def complete(self, groups: Iterable[Sequence[Job]], on_row: Callable[[Row], None]) -> None:
        """Carry out the jobs that are not in the file; append the rows of each sweep at once."""
        for jobs in groups:
            missing = [one for one in jobs if one.setting not in self.rows]
            for rows in carry_out(missing) if missing else ():
                records.append(self.path, *rows)
                self.rows |= {Setting(**row["setting"]): row for row in rows}
            for one in jobs:
                on_row(self.rows[one.setting])

    def of(self, jobs: Iterable[Job]) -> list[Row]:
        """Return the rows of jobs, without those that are not in the file."""
        return [self.rows[one.setting] for one in jobs if one.setting in self.rows]


def best_point(rows: Iterable[Row]) -> Point | None:
    """Return the point of the lowest mean loss over the tuning seeds.

    Points at which a run diverged are excluded; None if all diverged.
    """
    losses: dict[Point, list[float | None]] = defaultdict(list)
    for row in rows:
        setting = row["setting"]
        losses[Point(setting["learning_rate"], setting["eta_factor"])].append(row["loss"])
    means = {
        point: float(np.mean([x for x in values if x is not None]))
        for point, values in losses.items()
        if None not in values
    }
    return min(means, key=means.__getitem__) if means else None


def loss_at(row: Row, when: float) -> float | None:
    """Return a run's loss at a virtual time, by a straight line between its evaluations.

    It is None for a run that diverged, and before the first evaluation; after the last one it is
    the last loss.
    """
    times, losses = row["curve"]["time"], row["curve"]["loss"]
    if row["status"] != "finished" or None in losses or when < times[0]:
        return None
    return float(np.interp(when, times, losses))

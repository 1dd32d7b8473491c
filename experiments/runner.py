"""Carries out runs of the experiments and makes their rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments import rows
from experiments.config import ComputeOptions, Run
from experiments.parts import assemble, beginning, run_start, schedule, shape_of
from orlomo_jax import (
    ArrivalTrace,
    Checkpointer,
    RayWorkers,
    ThreadWorkers,
    TrainingResult,
    simulate,
    simulate_many,
    train,
)
from orlomo_jax.runtimes import WorkerPool


def execute(
    run: Run,
    data_dir: Path | None = None,
    *,
    evaluate_every: int | None = None,
    callbacks: Sequence[Any] = (),
    checkpoint: Checkpointer | None = None,
    replay: ArrivalTrace | None = None,
    compute: ComputeOptions | None = None,
    ray: Ray | None = None,
    **supervision: Any,
) -> tuple[dict[str, Any], TrainingResult]:
    """Train once; return the run's row for the records, and its result.

    Args:
        run: The run to train.
        data_dir: The TFDS data_dir; None is the default.
        evaluate_every: Global iterations between evaluations; None is a twentieth of the run.
        callbacks: See :func:`orlomo_jax.simulate`.
        checkpoint: Where to save, and to resume from.
        replay: Arrivals to repeat instead of the scenario's (simulated runs).
        compute: How the rounds are computed.
        ray: Where the workers run, and with which resources (Ray).
        **supervision: Further arguments of :func:`orlomo_jax.train` (real workers).

    Returns:
        The row (full configuration, versions and device, final metrics, the curve, virtual and
        real time, status), and the result.
    """
    compute = ComputeOptions() if compute is None else compute
    parts = assemble(run, data_dir, compute.convolution)
    num_steps = run.num_steps(len(parts.train.labels))
    params, model_state, key = beginning(run, parts)
    shared: dict[str, Any] = {
        "key": key,
        "model_state": model_state,
        "local_learning_rate": schedule(run.learning_rate, num_steps),
        "evaluate": parts.evaluate,
        "evaluate_every": evaluate_every or max(1, num_steps // 20),
        "callbacks": callbacks,
        "round_fn": parts.round_fn,
        "checkpoint": checkpoint,
    }
    job = (parts.method, None, parts.batch_fn, params)
    start = time.perf_counter()
    if run.runtime == "simulated":
        if replay is None:
            result = simulate(*job, trace=run.trace(num_steps), engine=compute.engine, **shared)
        else:  # by the same programs that the workers ran
            result = simulate(*job, trace=replay, engine="eager", **shared)
    else:
        times = run.compute_times().mean_times(run.workers)
        workers = real_workers(run.runtime, times, Ray() if ray is None else ray)
        result = train(*job, workers, num_steps=num_steps, **shared, **supervision)
    row = rows.row(run, compute, result, time.perf_counter() - start)
    if replay is not None:
        row["replayed"] = replay.digest()
    return row, result


def execute_together(
    runs: Sequence[Run],
    data_dir: Path | None = None,
    *,
    evaluate_every: int | None = None,
    callbacks: Sequence[Sequence[Any]] = (),
    checkpoint: Checkpointer | None = None,
    stop: Callable[[], bool] | None = None,
    compute: ComputeOptions | None = None,
    over_runs: Literal["vmap", "loop"] = "vmap",
) -> list[dict[str, Any]] | None:
    """Simulate runs of one shape as a sweep; return their rows.

    Args:
        runs: Runs that differ only in seed, learning rate and scenario.
        data_dir: See :func:`execute`.
        evaluate_every: See :func:`execute`.
        callbacks: The callbacks of the first run, of the second, and so on.
        checkpoint: One for all runs.
        stop: Called after each compiled segment; True saves the runs and ends the call.
        compute: How the rounds of a run are computed; "vmap" uses only its convolution.
        over_runs: See :func:`orlomo_jax.simulate_many`. The rows of "loop" are those of single
            runs, bit for bit.

    Returns:
        The rows, or None if ``stop`` ended the call. Each row of several runs has their total
        ``wall_time``, and their number as ``together``.

    Raises:
        ValueError: If the runs differ in shape.
    """
    compute = ComputeOptions() if compute is None else compute
    if len(shapes := {shape_of(run) for run in runs}) != 1:
        raise ValueError(f"runs together must be of one shape, got {shapes}")
    parts = assemble(runs[0], data_dir, compute.convolution)
    num_steps = runs[0].num_steps(len(parts.train.labels))
    start = time.perf_counter()
    starts = [run_start(run, parts, num_steps) for run in runs]
    for index, own in enumerate(callbacks):
        starts[index] = starts[index]._replace(callbacks=own)
    one_by_one = len(runs) == 1 or over_runs == "loop"
    results = simulate_many(
        parts.method,
        None,
        parts.batch_fn,
        starts,
        evaluate=parts.evaluate,
        evaluate_every=evaluate_every or max(1, num_steps // 20),
        checkpoint=checkpoint,
        stop=stop,
        engine=compute.engine if one_by_one else "auto",
        over_runs="loop" if one_by_one else "vmap",
        round_fn=parts.round_fn,
    )
    if results is None:
        return None
    wall_time = time.perf_counter() - start
    made = [
        rows.row(run, compute, result, wall_time) for run, result in zip(runs, results, strict=True)
    ]
    return made if len(runs) == 1 else [row | {"together": len(runs)} for row in made]


@dataclass(frozen=True)
class Ray:
    """Where Ray's workers run, and with which resources."""

    address: str | None = None
    """Address of a running cluster ("auto" for this host's); by default a local one is started."""
    cpus_per_worker: float = 1
    """Processors that Ray reserves for each worker."""
    gpus_per_worker: float = 0
    """GPUs that Ray reserves for each worker; with 0 it computes on the CPU."""


def real_workers(runtime: str, mean_times: np.ndarray, ray: Ray) -> WorkerPool:
    """Return real workers, slowed down as their seconds per gradient say.

    Args:
        runtime: "threads" or "ray".
        mean_times: The seconds of each worker, float64[K].
        ray: Where Ray's workers run.
    """
    slowdowns = (mean_times / mean_times.min()).tolist()
    if runtime == "threads":
        return ThreadWorkers(slowdowns=slowdowns)
    options: dict[str, Any] = {"num_cpus": ray.cpus_per_worker}
    if ray.gpus_per_worker:
        options["num_gpus"] = ray.gpus_per_worker
    return RayWorkers(ray.address, options, slowdowns)

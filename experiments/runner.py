"""Carries out a run of the experiments and makes its row."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import models, records
from experiments.config import ComputeOptions, Run
from experiments.data import datasets
from orlomo_jax import (
    ArrivalTrace,
    Checkpointer,
    Method,
    RayWorkers,
    RunStart,
    ThreadWorkers,
    TrainingResult,
    cast_reports,
    make_method,
    simulate,
    simulate_many,
    train,
)
from orlomo_jax.recording import Health
from orlomo_jax.runtimes import WorkerPool

MILESTONES = (0.5, 0.75)
"""Shares of a run after which the local learning rate drops by 10: epochs 80 and 120 of 160."""


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
        workers = _workers(run, Ray() if ray is None else ray)
        result = train(*job, workers, num_steps=num_steps, **shared, **supervision)
    row = _row(run, compute, result, time.perf_counter() - start)
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
    rows = [
        _row(run, compute, result, wall_time) for run, result in zip(runs, results, strict=True)
    ]
    return rows if len(runs) == 1 else [row | {"together": len(runs)} for row in rows]


def run_start(run: Run, parts: Parts, num_steps: int) -> RunStart:
    """Return the start of a run: parameters, arrivals, key, schedule and model state."""
    params, model_state, key = beginning(run, parts)
    rate = schedule(run.learning_rate, num_steps)
    return RunStart(params, run.trace(num_steps), key, rate, model_state)


@dataclass(frozen=True)
class Ray:
    """Where Ray's workers run, and with which resources."""

    address: str | None = None
    """Address of a running cluster ("auto" for this host's); by default a local one is started."""
    cpus_per_worker: float = 1
    """Processors that Ray reserves for each worker."""
    gpus_per_worker: float = 0
    """GPUs that Ray reserves for each worker; with 0 it computes on the CPU."""


def _workers(run: Run, ray: Ray) -> WorkerPool:
    """Return real workers, slowed down as the scenario says."""
    times = run.compute_times().mean_times(run.workers)
    slowdowns = (times / times.min()).tolist()
    if run.runtime == "threads":
        return ThreadWorkers(slowdowns=slowdowns)
    options: dict[str, Any] = {"num_cpus": ray.cpus_per_worker}
    if ray.gpus_per_worker:
        options["num_gpus"] = ray.gpus_per_worker
    return RayWorkers(ray.address, options, slowdowns)


class Parts(NamedTuple):
    """The objects that runs of one shape share, so that each shape is compiled once."""

    method: Method
    network: models.Network
    train: datasets.Split
    loss_fn: Callable
    batch_fn: Callable
    round_fn: Callable
    evaluate: Callable


def assemble(
    run: Run,
    data_dir: Path | None = None,
    convolution: Literal["auto", "xla", "matmul", "onednn"] = "auto",
) -> Parts:
    """Return the parts of a run, the same objects for runs of one shape."""
    return _assemble(replace(shape_of(run), epochs=1, runtime="simulated"), data_dir, convolution)


def shape_of(run: Run) -> Run:
    """Return the run with defaults for settings that change neither its program nor its length."""
    return replace(run, scenario="homogeneous", seed=0, learning_rate=0.0, slowdown=1, max_delay=0)


@lru_cache(maxsize=8)
def _assemble(run: Run, data_dir: Path | None, convolution: Any) -> Parts:
    source, network, evaluate = _learning_problem(
        *(run.dataset, data_dir, run.pool, run.model, run.width, run.dtype, convolution)
    )
    method = make_method(run.method, run.workers, run.local_iterations, momentum=run.momentum)
    loss_fn = source.training_loss(network.loss_fn)
    round_fn = method.local_round(loss_fn, weight_decay=run.weight_decay)
    if run.wire != "float32":
        round_fn = cast_reports(round_fn, run.wire)
    return Parts(
        method=method,
        network=network,
        train=source.train,
        loss_fn=loss_fn,
        batch_fn=datasets.shuffled_batches(source.train, run.batch_size, run.local_iterations),
        round_fn=round_fn,
        evaluate=evaluate,
    )


@lru_cache(maxsize=8)
def _learning_problem(
    dataset: str, data_dir: Path | None, pool: int, model: str, width: float, dtype: str, form: Any
) -> tuple[datasets.Dataset, models.Network, Callable]:
    """Return data set, network and evaluation; all methods share the compiled evaluation."""
    source = datasets.load(dataset, data_dir, pool=pool)
    network = models.make(
        model,
        source.num_classes,
        source.image_shape,
        width=width,
        dtype=jnp.dtype(dtype),
        convolution=form,
    )
    return source, network, _evaluation(network, source)


def beginning(run: Run, parts: Parts) -> tuple[Any, Any, jax.Array]:
    """Return the initial parameters and model state of a run, and its key."""
    init_key, key = jax.random.split(jax.random.key(run.seed))
    return *parts.network.init(init_key), key


def _evaluation(
    network: models.Network, source: datasets.Dataset, batch_size: int = 100
) -> Callable:
    """Return a function of params and model state to training loss and test accuracy.

    The training loss uses at most 10 000 fixed training examples, without augmentation. The images
    are arguments of the jitted function: as constants they would be part of its program.
    """

    def summed(params, model_state, split, statistic):
        count = len(split.labels)
        whole = count - count % batch_size

        def over(images, labels):
            logits = network.predict(params, model_state, source.preprocess(images))
            return statistic(logits, labels).sum()

        head = jax.tree.map(lambda x: x[:whole].reshape(-1, batch_size, *x.shape[1:]), split)
        total = jax.lax.map(lambda batch: over(*batch), head).sum()
        if whole < count:
            total += over(*jax.tree.map(lambda x: x[whole:], split))
        return total / count

    @jax.jit
    def evaluate(train, test, params, model_state):
        sample = jax.tree.map(lambda x: x[:10_000], train)
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        accuracy = lambda logits, labels: logits.argmax(-1) == labels  # noqa: E731
        return {
            "train_loss": summed(params, model_state, sample, cross_entropy),
            "test_accuracy": 100 * summed(params, model_state, test, accuracy),
        }

    return jax.tree_util.Partial(evaluate, source.train, source.test)


def schedule(learning_rate: float, num_steps: int) -> optax.Schedule:
    """Return a schedule that drops by 10 at each milestone of the global iterations.

    All schedules share one compiled program.
    """
    drops = np.array([round(share * num_steps) for share in MILESTONES], np.int32)
    return jax.tree_util.Partial(_in_steps, np.float32(learning_rate), drops)


def _in_steps(start: jax.Array, drops: jax.Array, step: jax.Array) -> jax.Array:
    return start * 0.1 ** (step >= drops).sum()


def _row(
    run: Run, compute: ComputeOptions, result: TrainingResult, wall_time: float
) -> dict[str, Any]:
    evaluations = result.history.evaluations
    real, end = run.runtime != "simulated", float(result.trace.times.max(initial=0.0))
    # A real run has two times: its scenario's virtual time, and the seconds that it really took.
    virtual = float(run.trace(result.trace.num_steps).times.max(initial=0.0)) if real else end
    curve: dict[str, list] = {
        "step": [e.step for e in evaluations],
        "real_time" if real else "virtual_time": [_short(e.time) for e in evaluations],
    }
    for metric in ("train_loss", "test_accuracy"):
        curve[metric] = [_short(e.metrics[metric]) for e in evaluations]
    # Finite parameters may still give an infinite loss, which counts as diverged.
    finished = result.status == "finished" and curve["train_loss"][-1:] != [None]
    return {
        "run": asdict(run),
        "form": asdict(compute),
        "status": "finished" if finished else "diverged",
        "diverged_at": result.diverged_at,
        "num_steps": result.trace.num_steps,
        "max_delay": result.trace.max_delay,
        "virtual_time": _short(virtual),
        **({"real_time": _short(end), "health": _summary(result.health)} if real else {}),
        "wall_time": round(wall_time, 3),
        "parameters": digest(result.params),
        "train_loss": curve["train_loss"][-1] if finished else None,
        "test_accuracy": curve["test_accuracy"][-1] if finished else None,
        "curve": curve,
        "environment": records.environment(),
    }


def digest(params: Any) -> str:
    """Return the first 16 hexadecimal digits of a SHA-256 of all parameters."""
    content = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        content.update(np.asarray(leaf).tobytes())
    return content.hexdigest()[:16]


def _summary(health: Health | None) -> dict[str, Any] | None:
    if health is None:
        return None
    norm = health.momentum_norm  # the norm may overflow although u is finite
    return health._asdict() | {"momentum_norm": None if norm is None else _short(norm)}


def _short(value: float) -> float | None:
    """Round to six significant digits, so that rows stay small; None for NaN and Inf."""
    return float(f"{value:.6g}") if math.isfinite(value) else None

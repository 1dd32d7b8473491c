"""Carries out a run of the language experiment, and makes its row."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from experiments import records
from experiments.language import text
from experiments.language.parts import LanguageRun, Parts, assemble
from experiments.rows import digest, health_summary, short
from experiments.runner import Ray, real_workers
from orlomo_jax import Checkpointer, TrainingResult, simulate_many, train


def execute(
    run: LanguageRun,
    *,
    parts: Parts | None = None,
    evaluate: Callable | None = None,
    evaluate_every: int | None = None,
    callbacks: Sequence[Any] = (),
    checkpoint: Checkpointer | None = None,
    ray: Ray | None = None,
    **supervision: Any,
) -> tuple[dict[str, Any], TrainingResult]:
    """Train once; return the run's row for the records, and its result.

    Args:
        run: The run to train.
        parts: Its parts, if they are assembled already.
        evaluate: Instead of the parts' evaluation; it must return "loss" too.
        evaluate_every: Reports between evaluations; None is a twentieth of the run.
        callbacks: See :func:`orlomo_jax.simulate`.
        checkpoint: Where to save, and to resume from.
        ray: Where the workers run, and with which resources (Ray).
        **supervision: Further arguments of :func:`orlomo_jax.train` (real workers).
    """
    parts = assemble(run) if parts is None else parts
    start, method = parts.start, parts.method
    num_steps = start.trace.num_steps
    shared: dict[str, Any] = {
        "evaluate": parts.evaluate if evaluate is None else evaluate,
        "evaluate_every": evaluate_every or max(1, num_steps // 20),
        "checkpoint": checkpoint,
        "round_fn": parts.round_fn,
    }
    began = time.perf_counter()
    if run.runtime == "simulated":
        start = start._replace(callbacks=tuple(callbacks))
        (result,) = _all(simulate_many(method, None, parts.batch_fn, [start], **shared))
    else:
        cluster = run.cluster()
        times = cluster.compute_times.mean_times(cluster.num_workers)
        result = train(
            method.with_hyperparameters(**start.hyperparameters)
            if start.hyperparameters
            else method,
            None,
            parts.batch_fn,
            start.params,
            real_workers(run.runtime, times, ray or Ray()),
            num_steps=num_steps,
            key=start.key,
            model_state=start.model_state,
            local_learning_rate=start.local_learning_rate,
            callbacks=callbacks,
            **shared,
            **supervision,
        )
    return row(run, parts, result, time.perf_counter() - began), result


def _all(results: list[TrainingResult] | None) -> list[TrainingResult]:
    assert results is not None  # only ``stop`` ends a sweep without results
    return results


def settings(run: LanguageRun) -> dict[str, Any]:
    """Return a run's settings as JSON can write them."""
    values = asdict(run) | {"text": [str(path) for path in run.text], "speeds": list(run.speeds)}
    return values


def row(run: LanguageRun, parts: Parts, result: TrainingResult, wall_time: float) -> dict[str, Any]:
    """Return the row of a run: settings, text, environment, curve and final held-out loss.

    The curve has the held-out loss in nats per byte against tokens (of all workers), the server's
    steps, and seconds: virtual ones of a simulated run, else those since the run began.
    """
    history, trace = result.history, result.trace
    steps = np.array(parts.method.steps_of_worker)[trace.workers]
    tokens = np.cumsum(steps) * parts.tokens_per_step
    evaluations = history.evaluations
    loss = [short(e.metrics["loss"]) for e in evaluations]
    finished = result.status == "finished" and loss[-1:] != [None]
    last = evaluations[-1].metrics["loss"] if finished and evaluations else math.nan
    time_name = "virtual_time" if run.runtime == "simulated" else "real_time"
    return {
        "language": settings(run),
        "text": text.load(run.text).digest,
        "num_parameters": run.config.num_parameters,
        "compute_dtype": np.dtype(run.config.compute_dtype).name,
        "workers": parts.method.num_workers,
        "local_steps": list(parts.method.steps_of_worker),
        "status": result.status if result.status == "stopped" or finished else "diverged",
        "diverged_at": result.diverged_at,
        "num_steps": trace.num_steps,
        "tokens": int(tokens[-1]) if len(tokens) else 0,
        "mean_delay": short(float(trace.delays.mean())),
        "max_delay": int(trace.max_delay),
        "loss": short(last),
        "perplexity": short(float(np.exp(last))),
        "curve": {
            "tokens": [int(tokens[e.step - 1]) for e in evaluations],
            "step": [e.step for e in evaluations],
            time_name: [short(e.time) for e in evaluations],
            "loss": loss,
        },
        "wall_time": round(wall_time, 3),
        "health": health_summary(result.health),
        "parameters": digest(result.params),
        "environment": records.environment(),
    }

"""Makes the row of a run of the experiments."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict
from typing import Any

import jax
import numpy as np

from experiments import records
from experiments.config import ComputeOptions, Run
from orlomo_jax import TrainingResult
from orlomo_jax.recording import Health


def row(
    run: Run, compute: ComputeOptions, result: TrainingResult, wall_time: float
) -> dict[str, Any]:
    """Return the row of a run: configuration, environment, final metrics, curve and times."""
    evaluations = result.history.evaluations
    real, end = run.runtime != "simulated", float(result.trace.times.max(initial=0.0))
    # A real run has two times: its scenario's virtual time, and the seconds that it really took.
    virtual = float(run.trace(result.trace.num_steps).times.max(initial=0.0)) if real else end
    curve: dict[str, list] = {
        "step": [e.step for e in evaluations],
        "real_time" if real else "virtual_time": [short(e.time) for e in evaluations],
    }
    for metric in ("train_loss", "test_accuracy"):
        curve[metric] = [short(e.metrics[metric]) for e in evaluations]
    # Finite parameters may still give an infinite loss, which counts as diverged.
    finished = result.status == "finished" and curve["train_loss"][-1:] != [None]
    return {
        "run": asdict(run),
        "form": asdict(compute),
        "status": "finished" if finished else "diverged",
        "diverged_at": result.diverged_at,
        "num_steps": result.trace.num_steps,
        "max_delay": result.trace.max_delay,
        "virtual_time": short(virtual),
        **({"real_time": short(end), "health": health_summary(result.health)} if real else {}),
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


def health_summary(health: Health | None) -> dict[str, Any] | None:
    """Return the health of a real run as JSON can write it."""
    if health is None:
        return None
    norm = health.momentum_norm  # the norm may overflow although u is finite
    return health._asdict() | {"momentum_norm": None if norm is None else short(norm)}


def short(value: float) -> float | None:
    """Round to six significant digits, so that rows stay small; None for NaN and Inf."""
    return float(f"{value:.6g}") if math.isfinite(value) else None

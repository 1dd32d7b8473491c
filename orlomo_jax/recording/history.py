"""Defines the records of a run: steps, evaluations, history and result."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np

from orlomo_jax import trees
from orlomo_jax.recording.health import Health
from orlomo_jax.traces.trace import ArrivalTrace
from orlomo_jax.trees import Array, ArrayLike, PyTree


class StepRecord(NamedTuple):
    """One global iteration; callbacks get it.

    Attributes:
        step: Number of applied reports, including this one; in [1, T].
        time: Virtual seconds at the arrival.
        worker: The worker that reported.
        delay: τ_t, the delay (staleness).
        loss: The mean loss of the local steps, float[]. In a simulated run it may be on the
            device: ``float(record.loss)`` waits for it, so do that rarely.
        metrics: The metrics of ``loss_fn``, means over the local steps; on the same device.
        evaluation: The result of ``evaluate`` after this step, or None.
        accepted: Whether the rule accepted the report, bool[]; on the same device.
        received_bytes: The size of the report as sent over the network; 0 without a network.
    """

    step: int
    time: float
    worker: int
    delay: int
    loss: Array | float
    metrics: PyTree
    evaluation: dict[str, float] | None
    accepted: ArrayLike = True
    received_bytes: int = 0


class Evaluation(NamedTuple):
    """Metrics of the server's parameters.

    Attributes:
        step: How many reports had been applied.
        time: Seconds of the run, or virtual seconds of a simulated run.
        metrics: What ``evaluate`` returned, as floats.
    """

    step: int
    time: float
    metrics: dict[str, float]


class History(NamedTuple):
    """The records of all steps, up to the end or to the first non-finite report.

    Attributes:
        step: int32[n], 1 … n.
        time: float64[n], virtual seconds.
        worker: int32[n].
        delay: int32[n].
        loss: float[n], the mean loss of the report's local steps.
        metrics: The metrics of ``loss_fn``, means over the local steps; every leaf has a leading
            axis of n.
        evaluations: In order of step.
        accepted: bool[n], whether the rule accepted the report. A rule such as Ringmaster ignores
            reports that are too old; such a step changes nothing.
    """

    step: np.ndarray
    time: np.ndarray
    worker: np.ndarray
    delay: np.ndarray
    loss: np.ndarray
    metrics: PyTree
    evaluations: tuple[Evaluation, ...]
    accepted: np.ndarray


class TrainingResult(NamedTuple):
    """The result of a simulated or real run.

    Attributes:
        params: The final parameters; if the run diverged, those when that was detected.
        model_state: The final merged model state.
        rule_state: The rule's final state (u_T).
        history: See :class:`History`.
        trace: The arrival order of the run.
        status: ``"finished"``, ``"stopped"`` by a callback, or ``"diverged"``.
        diverged_at: The index t of the first report with a NaN or an Inf; if only the merge
            overflowed, the step at which that was detected; None if the run did not diverge.
        health: The health of a real run; None for a simulated one.
    """

    params: trees.Params
    model_state: PyTree
    rule_state: Any
    history: History
    trace: ArrivalTrace
    status: Literal["finished", "stopped", "diverged"]
    diverged_at: int | None
    health: Health | None = None

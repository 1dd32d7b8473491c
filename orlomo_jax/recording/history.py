"""Records of a run: its steps, its evaluations and its result."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np

from orlomo_jax import trees
from orlomo_jax.recording.health import Health
from orlomo_jax.traces.trace import ArrivalTrace
from orlomo_jax.trees import Array, PyTree


class StepRecord(NamedTuple):
    """One global iteration, as callbacks see it.

    Attributes:
        step: How many reports are applied, this one included; in [1, T].
        time: Virtual seconds at its arrival.
        worker: Who reported.
        delay: τ_t.
        loss: The mean loss of its local steps, float[]; of a simulated run on the device:
            ``float(record.loss)`` waits for it, so do that rarely.
        metrics: What ``loss_fn`` returned as metrics, means over the local steps; on the device
            where the loss is.
        evaluation: What ``evaluate`` returned after this step, or None.
    """

    step: int
    time: float
    worker: int
    delay: int
    loss: Array | float
    metrics: PyTree
    evaluation: dict[str, float] | None


class Evaluation(NamedTuple):
    """Metrics of the server's parameters after ``step`` reports, at virtual ``time`` (seconds)."""

    step: int
    time: float
    metrics: dict[str, float]


class History(NamedTuple):
    """What happened, step by step, up to the end or to the first non-finite report.

    Attributes:
        step: int32[n], 1 … n.
        time: float64[n], virtual seconds.
        worker: int32[n].
        delay: int32[n].
        loss: float[n], the mean loss of the report's local steps.
        metrics: What ``loss_fn`` returned as metrics, means over the local steps; every leaf has a
            leading axis of n.
        evaluations: In order of step.
    """

    step: np.ndarray
    time: np.ndarray
    worker: np.ndarray
    delay: np.ndarray
    loss: np.ndarray
    metrics: PyTree
    evaluations: tuple[Evaluation, ...]


class TrainingResult(NamedTuple):
    """What a simulated or real run returns.

    Attributes:
        params: The final parameters; where the run diverged, those at which it was noticed.
        model_state: The final merged model state.
        rule_state: The rule's final state (u_T).
        history: See :class:`History`.
        trace: The arrival order that was run.
        status: ``"finished"``, ``"stopped"`` by a callback, or ``"diverged"``.
        diverged_at: The index t of the first report with a NaN or an Inf (of the step at which it
            was noticed, where finite reports overflowed in the merge); None where finished.
        health: Of a real run, how it fared; None of a simulated one.
    """

    params: trees.Params
    model_state: PyTree
    rule_state: Any
    history: History
    trace: ArrivalTrace
    status: Literal["finished", "stopped", "diverged"]
    diverged_at: int | None
    health: Health | None = None

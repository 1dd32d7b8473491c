"""What a run gathers: records of its steps, evaluations, and the first bad step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from orlomo_jax.health import Health
from orlomo_jax.rules import contract
from orlomo_jax.server import ParameterServer
from orlomo_jax.trace import ArrivalTrace
from orlomo_jax.worker import all_finite

if TYPE_CHECKING:
    from jaxtyping import Array, Float, PyTree, Scalar

    from orlomo_jax.compiled import Compiled
    from orlomo_jax.driven import Driven
    from orlomo_jax.together import Lane

    Engine: TypeAlias = Driven | Compiled | Lane


class StepRecord(NamedTuple):
    """One global iteration, as ``on_step`` sees it.

    Attributes:
        step: How many reports are applied, this one included; in [1, T].
        time: Virtual seconds at its arrival.
        worker: Who reported.
        delay: τ_t.
        loss: The mean loss of its local steps, float[]; of a simulated run on the device:
            ``float(record.loss)`` waits for it, so do that rarely.
        metrics: The evaluation after this step, or None.
    """

    step: int
    time: float
    worker: int
    delay: int
    loss: Float[Array, ""] | float
    metrics: dict[str, float] | None


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
        evaluations: In order of step.
    """

    step: np.ndarray
    time: np.ndarray
    worker: np.ndarray
    delay: np.ndarray
    loss: np.ndarray
    evaluations: tuple[Evaluation, ...]


class TrainingResult(NamedTuple):
    """What a simulated or real run returns.

    Attributes:
        params: The final parameters; where the run diverged, those at which it was noticed.
        model_state: The final merged model state.
        state: The rule's final state (u_T among it).
        history: See :class:`History`.
        trace: The arrival order that was run.
        status: ``"finished"`` or ``"diverged"``.
        diverged_at: The index t of the first report with a NaN or an Inf (of the step at which it
            was noticed, where finite reports overflowed in the merge); None where finished.
        health: Of a real run, how it fared; None of a simulated one.
    """

    params: contract.Params
    model_state: PyTree[Array]
    state: Any
    history: History
    trace: ArrivalTrace
    status: Literal["finished", "diverged"]
    diverged_at: int | None
    health: Health | None = None


class Progress:
    """What a run has gathered so far, beside the server."""

    def __init__(self, losses: np.ndarray | None = None, evaluations: list | None = None) -> None:
        """Start anew, or from what a checkpoint holds."""
        self.losses = [] if losses is None else list(losses)
        self.evaluations = [] if evaluations is None else [Evaluation(*e) for e in evaluations]
        self.waiting_losses: list[Scalar] = []

    def look(self, engine: Engine, step: int) -> int:
        """Fetch the losses; return the index of the first non-finite step, or −1.

        Where every report was finite and only the merge was not, that is the newest step.
        """
        self.losses += jax.device_get(self.waiting_losses)
        self.waiting_losses = []
        if int(engine.first_bad) < 0 and not bool(all_finite(engine.peek())):
            engine.first_bad = jnp.int32(step - 1)
        return int(engine.first_bad)

    def history(self, trace: ArrivalTrace, length: int) -> History:
        """Return the first ``length`` steps."""
        return History(
            step=np.arange(1, length + 1, dtype=np.int32),
            time=trace.times[:length],
            worker=trace.workers[:length],
            delay=trace.delays[:length],
            loss=np.asarray(self.losses[:length]),
            evaluations=tuple(self.evaluations),
        )

    def snapshot(self, server: ParameterServer) -> tuple[dict, dict]:
        """Return a checkpoint's arrays and notes."""
        arrays, books = server.snapshot()
        notes = {"server": books, "evaluations": self.evaluations}
        return {"server": arrays, "losses": np.asarray(self.losses)}, notes

"""What a run gathers: records of its steps, evaluations, and the first bad step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from orlomo_jax.health import Health
from orlomo_jax.rounds import RoundMetrics
from orlomo_jax.rules import contract
from orlomo_jax.server import ParameterServer
from orlomo_jax.trace import ArrivalTrace
from orlomo_jax.worker import all_finite

if TYPE_CHECKING:
    from jaxtyping import Array, Float, PyTree

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
        metrics: What ``loss_fn`` returned as metrics, means over the local steps; on the device
            where the loss is.
        evaluation: What ``evaluate`` returned after this step, or None.
    """

    step: int
    time: float
    worker: int
    delay: int
    loss: Float[Array, ""] | float
    metrics: PyTree[Any]
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
    metrics: PyTree[np.ndarray]
    evaluations: tuple[Evaluation, ...]


class TrainingResult(NamedTuple):
    """What a simulated or real run returns.

    Attributes:
        params: The final parameters; where the run diverged, those at which it was noticed.
        model_state: The final merged model state.
        state: The rule's final state (u_T among it).
        history: See :class:`History`.
        trace: The arrival order that was run.
        status: ``"finished"``, ``"stopped"`` by ``on_step``, or ``"diverged"``.
        diverged_at: The index t of the first report with a NaN or an Inf (of the step at which it
            was noticed, where finite reports overflowed in the merge); None where finished.
        health: Of a real run, how it fared; None of a simulated one.
    """

    params: contract.Params
    model_state: PyTree[Array]
    state: Any
    history: History
    trace: ArrivalTrace
    status: Literal["finished", "stopped", "diverged"]
    diverged_at: int | None
    health: Health | None = None


def ends_run(on_step: Callable[[StepRecord], bool | None], record: StepRecord) -> bool:
    """Call ``on_step``; return whether it ends the run, by True or by StopIteration."""
    try:
        return on_step(record) is True
    except StopIteration:
        return True


def evaluated(evaluate: Callable, params: Any, model_state: Any) -> dict[str, float]:
    """Return what ``evaluate`` says of the parameters.

    Raises:
        TypeError: If it does not return ``{name: scalar}``.
    """
    values = evaluate(params, model_state)
    try:
        return {name: float(value) for name, value in values.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise TypeError(f"`evaluate` must return {{name: scalar}}, got {values!r}") from error


class Progress:
    """What a run has gathered so far, beside the server."""

    def __init__(self, like: RoundMetrics) -> None:
        """Start with nothing; ``like`` has the shapes of a round's metrics."""
        self._like = like
        self._rows: list[Sequence[np.ndarray]] = []
        self.evaluations: list[Evaluation] = []
        self.waiting: list[RoundMetrics] = []

    def resume(self, arrays: list[np.ndarray], evaluations: list, step: int) -> None:
        """Take what a :meth:`snapshot` holds, which must be of this step."""
        self._rows = list(zip(*arrays, strict=True))
        self.evaluations = [Evaluation(*e) for e in evaluations]
        if len(self._rows) != step:
            raise ValueError(f"the history must have {step} steps, got {len(self._rows)}")

    def look(self, engine: Engine, step: int) -> int:
        """Fetch the metrics; return the index of the first non-finite step, or −1.

        Where every report was finite and only the merge was not, that is the newest step.
        """
        self._rows += map(jax.tree.leaves, jax.device_get(self.waiting))
        self.waiting = []
        if int(engine.first_bad) < 0 and not bool(all_finite(engine.peek())):
            engine.first_bad = jnp.int32(step - 1)
        return int(engine.first_bad)

    def arrays(self, length: int | None = None) -> list[np.ndarray]:
        """Return the leaves of the metrics of the first steps, each with a leading axis."""
        leaves = [
            np.asarray(column).reshape(-1, *like.shape)
            for column, like in zip(
                zip(*self._rows[:length], strict=True), jax.tree.leaves(self._like), strict=False
            )
        ]
        return leaves or [
            np.zeros((0, *like.shape), like.dtype) for like in jax.tree.leaves(self._like)
        ]

    def history(self, trace: ArrivalTrace, length: int) -> History:
        """Return the first ``length`` steps."""
        metrics = jax.tree.unflatten(jax.tree.structure(self._like), self.arrays(length))
        return History(
            step=np.arange(1, length + 1, dtype=np.int32),
            time=trace.times[:length],
            worker=trace.workers[:length],
            delay=trace.delays[:length],
            loss=metrics.loss,
            metrics=metrics.metrics,
            evaluations=tuple(self.evaluations),
        )

    def snapshot(self, server: ParameterServer) -> tuple[dict, dict]:
        """Return a checkpoint's arrays and notes."""
        arrays, books = server.snapshot()
        notes = {"server": books, "evaluations": self.evaluations}
        return {"server": arrays, "metrics": self.arrays()}, notes

"""Records a run: evaluation, callbacks, history, divergence, snapshots and the result."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from orlomo_jax.checks import check_count, shortened
from orlomo_jax.recording.callbacks import AnyCallback, as_callback
from orlomo_jax.recording.columns import MetricColumns, Stacked
from orlomo_jax.recording.evaluation import check_evaluation, evaluated
from orlomo_jax.recording.health import Health
from orlomo_jax.recording.history import Evaluation, History, StepRecord, TrainingResult
from orlomo_jax.recording.state_source import StateSource
from orlomo_jax.server.snapshots import nonempty_leaves, unflatten_like
from orlomo_jax.traces.trace import ArrivalTrace
from orlomo_jax.worker.protocols import Evaluate
from orlomo_jax.worker.workload import RoundMetrics, Workload

SEGMENT = 256
"""The largest number of steps between two checks for divergence."""


class Recording(NamedTuple):
    """The user's settings for recording; see :func:`~orlomo_jax.simulate`."""

    num_steps: int
    evaluate: Evaluate | None
    evaluate_every: int
    callbacks: tuple[Any, ...]

    @classmethod
    def of(
        cls,
        num_steps: int,
        evaluate: Evaluate | None,
        evaluate_every: int | None,
        callbacks: Sequence[AnyCallback],
    ) -> Recording:
        """Check the arguments of ``simulate`` and ``train``."""
        every = num_steps
        if evaluate_every is not None:
            every = check_count("evaluate_every", evaluate_every, 1)
        if not isinstance(callbacks, Sequence):
            raise TypeError(f"`callbacks` must be a list, got callbacks={shortened(callbacks)}")
        return cls(num_steps, evaluate, every, tuple(map(as_callback, callbacks)))


class RunRecorder:
    """Records one simulated or real run, report by report.

    Args:
        source: The source of the run's state.
        workload: The workers' computation.
        arrival: Returns (time, worker, delay) of the arrival at a step t.
        recording: The user's settings.

    Attributes:
        step: The number of reports recorded.
        first_nonfinite: The step at which the run diverged, −1 if it has not.
        stopped: Whether a callback has ended the run.
    """

    def __init__(
        self,
        source: StateSource,
        workload: Workload,
        arrival: Callable[[int], tuple[float, int, int]],
        recording: Recording,
    ) -> None:
        """Start at step 0."""
        self.source, self.recording = source, recording
        self.step, self.first_nonfinite, self.stopped = 0, -1, False
        self.evaluations: list[Evaluation] = []
        self._arrival, self._workload = arrival, workload
        self._columns = MetricColumns(source.like)

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to do."""
        done = self.step >= self.recording.num_steps
        return done or self.stopped or self.first_nonfinite >= 0

    def next_stop(self, *periods: int) -> int:
        """Return the step of the next evaluation, check for divergence, or multiple of a period."""
        periods = (*periods, self.recording.evaluate_every, SEGMENT)
        return min(self.recording.num_steps, *(self.step - self.step % n + n for n in periods))

    def start(self, trace: ArrivalTrace) -> None:
        """Build a result and test the evaluation, so that errors occur before the first step."""
        if not self.ended:
            self.result(trace)
            if self.recording.evaluate is not None:
                check_evaluation(self.recording.evaluate, *self.source.model())
        for callback in self.recording.callbacks:
            callback.on_start(self.step, self.recording.num_steps)

    def end(self, result: TrainingResult) -> TrainingResult:
        """Pass the result to the callbacks and return it."""
        for callback in self.recording.callbacks:
            callback.on_end(result)
        return result

    def close(self) -> None:
        """Close the callbacks, after the end or an error."""
        with contextlib.ExitStack() as stack:  # closes all, even if one raises
            for callback in reversed(self.recording.callbacks):
                stack.callback(callback.close)

    def applied_all(self, rounds: Stacked | Iterable[RoundMetrics], end: int) -> None:
        """Record the reports of a segment until step ``end``, as an engine returns them."""
        if isinstance(rounds, Stacked):
            if not self.recording.callbacks:
                self._columns.add_all(rounds)
                self.step = end
                self.check()
                self._evaluate_if_due()
                return
            rounds = rounds.by_round()
        for metrics in rounds:
            self.applied(metrics, check=self.step + 1 == end)
            if self.stopped and self.step == self.source.server.step:  # the rest is not computed
                break
        if self.step < end:
            self.check()

    def applied(
        self, metrics: RoundMetrics, *, check: bool = False, received_bytes: int = 0
    ) -> None:
        """Record the next applied report: evaluate if it is due, and call the callbacks.

        Args:
            metrics: The metrics of the report's round.
            check: Whether to check for divergence first; callbacks get no step after one.
            received_bytes: The size of the report as sent over the network.
        """
        self.step += 1
        self._columns.add(metrics)
        if check:
            self.check()
        evaluation = self._evaluate_if_due()
        if self.first_nonfinite < 0 and self.recording.callbacks:
            at = self._arrival(self.step - 1)
            loss, others, accepted = metrics
            record = StepRecord(self.step, *at, loss, others, evaluation, accepted, received_bytes)
            ends = [_ends_run(callback, record) for callback in self.recording.callbacks]
            self.stopped |= any(ends)

    def _evaluate_if_due(self) -> dict[str, float] | None:
        """Evaluate at this step if it is due and the run has not diverged."""
        recording = self.recording
        due = self.step % recording.evaluate_every == 0 or self.step == recording.num_steps
        if recording.evaluate is None or not due or self.first_nonfinite >= 0:
            return None
        evaluation = evaluated(recording.evaluate, *self.source.model())
        time = self._arrival(self.step - 1)[0]
        self.evaluations.append(Evaluation(self.step, time, evaluation))
        return evaluation

    def check(self) -> None:
        """Fetch the metrics from the device, and check whether the run has diverged."""
        self._columns.fetch()
        if self.first_nonfinite < 0:
            self.first_nonfinite = self.source.find_nonfinite()

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return arrays and JSON-able notes of the run and its server."""
        self.source.sync_to_server()
        arrays, table = self.source.server.snapshot()
        notes = {"server": table, "evaluations": self.evaluations}
        notes |= {"first_nonfinite": self.first_nonfinite, "stopped": self.stopped}
        fresh = self.source.server.table.fresh
        states = {
            str(worker): jax.device_get(nonempty_leaves(state))
            for worker, state in self.source.local_states.items()
            if not fresh[worker]
        }
        return {"server": arrays, "metrics": self._columns.leaves(), "local_states": states}, notes

    def restore(self, arrays: dict[str, Any], notes: dict[str, Any], step: int) -> None:
        """Continue from a :meth:`snapshot` of this step, or an earlier one if the run had ended."""
        self.first_nonfinite = check_count("first_nonfinite", notes["first_nonfinite"], -1)
        self.stopped = bool(notes.get("stopped"))
        count = self._columns.restore(arrays["metrics"])
        self.evaluations = [Evaluation(*e) for e in notes["evaluations"]]
        self.source.server.restore(arrays["server"], notes["server"])
        first = 0 if self.stopped or self.first_nonfinite >= 0 else step
        self.step = check_count("step", self.source.server.step, first, step)
        if count != self.step:
            raise ValueError(f"the history must have {self.step} steps, got {count}")
        if self._workload.keeps_state:
            like = self._workload.init_state(self.source.server.to_send())
            self.source.local_states = {
                int(worker): unflatten_like("local_states", like, leaves)
                for worker, leaves in (arrays["local_states"] or {}).items()
            }
        if self.first_nonfinite >= 0:
            self.source.first_nonfinite = self.first_nonfinite

    def result(self, trace: ArrivalTrace, health: Health | None = None) -> TrainingResult:
        """Return the result of the run so far."""
        self.check()
        bad = self.first_nonfinite
        state = self.source.view()
        length = self.step if bad < 0 else min(bad + 1, self.step)
        arrivals = (trace.times, trace.workers, trace.delays)
        ended = "stopped" if self.step < self.recording.num_steps else "finished"
        return TrainingResult(
            params=state.params,
            model_state=state.model_state,
            rule_state=state.rule_state,
            history=self._history(*(values[:length] for values in arrivals)),
            trace=trace,
            status="diverged" if bad >= 0 else ended,
            diverged_at=None if bad < 0 else bad,
            health=health,
        )

    def _history(self, times: Any, workers: Any, delays: Any) -> History:
        length = len(times)
        columns = [column[:length] for column in self._columns.leaves()]
        metrics = jax.tree.unflatten(jax.tree.structure(self.source.like), columns)
        step = np.arange(1, length + 1, dtype=np.int32)
        evaluations = tuple(self.evaluations)
        return History(
            step,
            times,
            workers,
            delays,
            metrics.loss,
            metrics.metrics,
            evaluations,
            metrics.accepted,
        )


def _ends_run(callback: Any, record: StepRecord) -> bool:
    """Return whether a callback ends the run, by True or StopIteration."""
    try:
        return callback.on_step(record) is True
    except StopIteration:
        return True

"""Logs a real run: journal, clock and the counts of its health."""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np
import optax

from orlomo_jax.recording.health import Health, Meter
from orlomo_jax.recording.journal import Arrival, Journal
from orlomo_jax.recording.recorder import RunRecorder
from orlomo_jax.rules import contract
from orlomo_jax.runtimes import metric_rows
from orlomo_jax.runtimes.protocol import TaskOutcome
from orlomo_jax.server.reports import RejectedReportError, Report, Task, claimed_id
from orlomo_jax.server.state import start_momentum
from orlomo_jax.server.task_table import TaskId
from orlomo_jax.worker.workload import RoundMetrics

_norm = jax.jit(optax.tree.norm)


class RunLog:
    """Logs the events of a real run to its journal, and counts them for its health."""

    def __init__(self, journal: Journal, recorder: RunRecorder) -> None:
        """Start the clock."""
        self.journal, self.recorder = journal, recorder
        self.meter = Meter(recorder.source.server.num_workers)
        rule_state = recorder.source.server.view().rule_state  # its structure stays
        self._may_decline = contract.accepted_of(rule_state) is not True
        self._counts = contract.version_of(rule_state, None) is not None
        self._began = time.monotonic()
        self._health_at: dict[int, float] = {}  # the next time, by the callback's index

    def resume_clock(self) -> None:
        """Continue from the time of the last arrival; time between processes does not count."""
        if self.journal.arrivals:
            self._began = time.monotonic() - self.journal.arrivals[-1].time

    def seconds(self) -> float:
        """Return the seconds since the run began, without the time between processes."""
        return time.monotonic() - self._began

    def received(self, outcome: TaskOutcome) -> None:
        """Count the duration and bytes of an outcome."""
        self.meter.busy[outcome.id.worker] += outcome.seconds
        self.meter.received_bytes += outcome.received_bytes

    def arrived(
        self,
        report: Report,
        round_metrics: RoundMetrics | None,
        task: Task | None = None,
        received_bytes: int = 0,
    ) -> Arrival:
        """Log an applied report; call it before the report has any consequence.

        Args:
            report: The report.
            round_metrics: Its round's metrics, if they are known.
            task: Its task.
            received_bytes: Its size as sent over the network.
        """
        loss, others = float("nan"), None
        if round_metrics is not None:
            loss, others = float(round_metrics.loss), round_metrics.metrics
        task_id = TaskId(*map(int, report.id))
        accepted, version = True, None
        if self._may_decline:  # reading it waits for the device
            accepted = bool(self.recorder.source.server.view().accepted)
        if self._counts and task is not None:
            version = int(np.asarray(task.start.version))
        row = metric_rows.as_row(others)
        at = self.seconds()
        arrival = Arrival(*task_id, at, loss, row, version, accepted, received_bytes)
        self.journal.arrived(arrival)
        return arrival

    def applied(self, arrival: Arrival) -> None:
        """Count an applied report, and pass it to the recorder."""
        delay = self.recorder.step - arrival.dispatched_at
        self.meter.applied(arrival.worker, delay)
        stacked = metric_rows.stacked([arrival.metrics], self.recorder.source.like.metrics)
        of_round = jax.tree.map(lambda x: x[0], stacked)
        metrics = RoundMetrics(arrival.loss, of_round, np.bool_(arrival.accepted))
        self.recorder.applied(metrics, received_bytes=arrival.received_bytes)

    def rejected(self, report: Any, error: RejectedReportError) -> None:
        """Count and log a rejected report."""
        self.meter.rejected[error.reason] += 1
        task_id = claimed_id(report)
        worker = None if task_id is None else task_id.worker
        self.journal.refused(worker, error.reason, str(error), self.seconds())

    def happened(self, kind: str, worker: int, why: str = "") -> None:
        """Log an event."""
        self.journal.happened(kind, worker, self.seconds(), why)

    def report_health(self, present: set[int]) -> None:
        """Call ``on_health`` of the callbacks that are due."""
        now = time.monotonic()
        for place, callback in enumerate(self.recorder.recording.callbacks):
            if (every := callback.health_every) is None:
                continue
            if now >= self._health_at.setdefault(place, now + every):
                self._health_at[place] = now + every
                callback.on_health(self.health(present, place))

    def health(self, present: set[int], viewer: int | None = None) -> Health:
        """Return the run's health, given the workers that take part."""
        server = self.recorder.source.server
        momentum = start_momentum(server.view().rule_state)
        norm = None if momentum is None else float(_norm(momentum))
        there = tuple(worker in present for worker in range(server.num_workers))
        return self.meter.view(server.step, there, norm, viewer)

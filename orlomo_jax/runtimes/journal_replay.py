"""Repeats the rounds that a journal has beyond a checkpoint."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from orlomo_jax.recording.journal import Arrival, Journal
from orlomo_jax.server.parameter_server import ParameterServer
from orlomo_jax.server.reports import Report
from orlomo_jax.traces.events import apply_event
from orlomo_jax.traces.trace_validation import TraceEvent
from orlomo_jax.worker.workload import Workload

_log = logging.getLogger("orlomo_jax")


class JournalReplay:
    """Brings a server from its checkpoint to the end of the journal.

    Attributes:
        present: The workers that take part.
        unseen: How many of the journal's events are not repeated yet.
        local_states: The kept states of the workers' optimizers, by worker; those of a checkpoint
            at first.
    """

    def __init__(
        self,
        server: ParameterServer,
        workload: Workload,
        journal: Journal,
        local_states: dict[int, Any],
    ) -> None:
        """Repeat nothing yet."""
        self.local_states = local_states
        self._server, self._workload, self._journal = server, workload, journal
        self.present = set(range(server.num_workers)) - set(journal.identity["absent"])
        self.unseen = 0

    def run(self, seen: int | None, record: Callable[[Report, Arrival], None]) -> None:
        """Repeat the same rounds, in the journal's order.

        Args:
            seen: How many of its events the checkpoint has seen; None without a checkpoint.
            record: Called after each report.

        Raises:
            ValueError: If the journal does not match the checkpoint.
        """
        server, journal = self._server, self._journal
        if seen is None:
            for worker in sorted(self.present):
                server.dispatch(worker)
        for event in journal.events[: seen or 0]:
            self._update_membership(event)
        events: defaultdict[int, list[TraceEvent]] = defaultdict(list)
        for event in journal.events[seen or 0 :]:
            events[event.step].append(event)
            self.unseen += 1
        arrivals = journal.arrivals[server.step :]
        if arrivals:
            _log.info("repeating %d reports since the checkpoint", len(arrivals))
        for arrival in arrivals:
            self._apply(events.pop(server.step, []))
            task, task_id = server.held(arrival.worker), arrival.id
            if task is None or task.id != task_id:
                raise ValueError(
                    f"{journal.path} must go with its checkpoint: at step {server.step} it has "
                    f"{arrival}, but the worker holds {task and task.id}"
                )
            worker = task_id.worker
            kept = None if task.fresh else self.local_states.get(worker)
            result, *_ = self._workload.run(worker, task_id.round, task.start, kept)
            if result.local_state is not None:
                self.local_states[worker] = result.local_state
            report = task.report(result)
            for worker in server.receive(report):
                server.dispatch(worker)
            record(report, arrival)
        self._apply(events.pop(server.step, []))

    def _apply(self, events: list[TraceEvent]) -> None:
        self.unseen -= len(events)
        for event in events:
            apply_event(event, self._server)
            self._update_membership(event)

    def _update_membership(self, event: TraceEvent) -> None:
        if event.kind == "joined":
            self.present.add(event.worker)
        elif event.kind == "left":
            self.present.discard(event.worker)

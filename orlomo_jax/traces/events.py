"""Applies the events of a trace to a server or planner."""

from __future__ import annotations

from collections import defaultdict
from typing import Protocol

from orlomo_jax.traces.trace import ArrivalTrace
from orlomo_jax.traces.trace_validation import TraceEvent


class Table(Protocol):
    """The part of a task table that events need."""

    def due(self) -> tuple[int, ...]:
        """Return the waiting workers that need a task now."""
        ...

    def leave(self, worker: int) -> None:
        """Record that a worker leaves."""

    def join(self, worker: int) -> None:
        """Record that an absent worker joins, and waits for a task."""


class Dispatches(Protocol):
    """The part of a server or planner that events need."""

    @property
    def table(self) -> Table:
        """The task table."""
        ...

    def held(self, worker: int) -> object | None:
        """Return the worker's task, or None."""

    def dispatch(self, worker: int) -> object:
        """Send the worker a task."""

    def release(self, worker: int) -> object:
        """Remove the worker's task; its report is lost."""


class Events:
    """The events of a trace, by step."""

    def __init__(self, trace: ArrivalTrace) -> None:
        """Index the events by step."""
        self._by_step: defaultdict[int, list[TraceEvent]] = defaultdict(list)
        for event in trace.events:
            self._by_step[event.step].append(event)

    def apply(self, step: int, to: Dispatches) -> None:
        """Apply the events before the arrival at ``step``."""
        for event in self._by_step.get(step, ()):
            apply_event(event, to)


def apply_event(event: TraceEvent, to: Dispatches) -> None:
    """Apply an event, and dispatch the workers that wait no longer because of it."""
    _, kind, worker = event
    if kind in ("lost", "restarted", "left") and to.held(worker) is not None:
        to.release(worker)
    if kind in ("redispatched", "restarted"):
        to.dispatch(worker)
    elif kind == "left":
        to.table.leave(worker)
    elif kind == "joined":
        to.table.join(worker)
    for waiting in to.table.due():
        to.dispatch(waiting)

"""Applies the events of a trace to a server or planner."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Protocol

from orlomo_jax.traces.trace import ArrivalTrace
from orlomo_jax.traces.trace_validation import TraceEvent


class Dispatches(Protocol):
    """The part of a server or planner that events need."""

    def held(self, worker: int) -> object | None:
        """Return the worker's task, or None."""

    def dispatch(self, worker: int) -> object:
        """Send the worker a task."""

    def release(self, worker: int) -> object:
        """Remove the worker's task; its report is lost."""

    def leave(self, worker: int) -> None:
        """Remove the worker's task, if it holds one; it gets no other until it joins."""

    def due(self) -> Iterable[int]:
        """Return the waiting workers that need a task now."""
        ...


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
    """Dispatch or release the event's worker, and then the workers that waited for it."""
    kind, worker = event.kind, event.worker
    if kind == "left":
        to.leave(worker)
        for waiting in to.due():
            to.dispatch(waiting)
        return
    if kind in ("lost", "restarted"):
        to.release(worker)
    if kind != "lost":
        to.dispatch(worker)

"""Applies the events of a trace to a server or planner."""

from __future__ import annotations

from collections import defaultdict
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
    """Dispatch or release the event's worker."""
    if event.kind in ("redispatched", "joined"):
        to.dispatch(event.worker)
    elif to.held(event.worker) is not None:
        to.release(event.worker)

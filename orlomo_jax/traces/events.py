"""Applies the events of a trace: losses, re-dispatches, joins and leaves."""

from __future__ import annotations

from collections import defaultdict
from typing import Protocol

from orlomo_jax.traces.arrival_order import TraceEvent
from orlomo_jax.traces.trace import ArrivalTrace


class Dispatches(Protocol):
    """What events act on: a server, or a planner."""

    def held(self, worker: int) -> object | None:
        """Return what the worker holds."""

    def dispatch(self, worker: int) -> object:
        """Send the worker a task."""

    def release(self, worker: int) -> object:
        """Give up the worker's report."""


class Events:
    """The events of a trace, by step."""

    def __init__(self, trace: ArrivalTrace) -> None:
        """Sort them."""
        self._by_step: defaultdict[int, list[TraceEvent]] = defaultdict(list)
        for event in trace.events:
            self._by_step[event.step].append(event)

    def apply(self, step: int, to: Dispatches) -> None:
        """Do what happens before the arrival of ``step``."""
        for event in self._by_step.get(step, ()):
            apply_event(event, to)


def apply_event(event: TraceEvent, to: Dispatches) -> None:
    """Do what an event says."""
    if event.kind in ("redispatched", "joined"):
        to.dispatch(event.worker)
    elif to.held(event.worker) is not None:
        to.release(event.worker)

"""Stretches of a simulated run, planned ahead: which step reads and writes which copy of w."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from orlomo_jax.books import Books, Ticket
from orlomo_jax.order import Event
from orlomo_jax.trace import ArrivalTrace

if TYPE_CHECKING:
    from numpy.typing import NDArray


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
        self._by_step: defaultdict[int, list[Event]] = defaultdict(list)
        for event in trace.events:
            self._by_step[event.step].append(event)

    def apply(self, step: int, to: Dispatches) -> None:
        """Do what happens before the arrival of ``step``."""
        for event in self._by_step.get(step, ()):
            if event.kind in ("redispatched", "joined"):
                to.dispatch(event.worker)
            elif to.held(event.worker) is not None:
                to.release(event.worker)


class Stretch(NamedTuple):
    """Consecutive steps as data, int32[length] each; entries beyond the stretch are padding.

    At step t the newest parameters are written to slot ``writes[t]``, and the report is computed
    from slot ``reads[t]``. A group is a run of steps whose tasks were all dispatched before it, so
    that its rounds can be computed together: every entry of ``starts`` is its first step, counted
    within the stretch, and of ``sizes`` how many steps it has.
    """

    workers: NDArray[np.int32]
    rounds: NDArray[np.int32]
    dispatched_at: NDArray[np.int32]
    reads: NDArray[np.int32]
    writes: NDArray[np.int32]
    starts: NDArray[np.int32]
    sizes: NDArray[np.int32]


class Planner:
    """Runs the books ahead of the arrays, and finds every version of w a slot to live in.

    All tasks of one version share a slot, and a slot whose last task has reported is free for the
    next version: there are never more than distinct versions at work. The newest version has none
    yet: the step that comes next writes it, to a slot of its own where a task holds it by then,
    else to one that is free.

    Args:
        books: The books to run ahead; changed in place.
        trace: The arrivals.
        batch: The most steps of a group.
        slots: How many slots there are, at least :func:`count_slots`.

    Attributes:
        versions: The slot of every version that tasks held at the start, but the newest.

    Example:
        >>> books = Books("orlomo", 2, synchronous=False)
        >>> tickets = [books.dispatch(worker) for worker in range(2)]
        >>> planner = Planner(books, ArrivalTrace.from_workers([0, 0, 1], 2), batch=2, slots=2)
        >>> stretch = planner.advance(3, length=3)
        >>> stretch.writes.tolist(), stretch.reads.tolist()  # worker 1 holds w_0 till the end
        ([0, 1, 1], [0, 1, 0])
        >>> stretch.starts.tolist(), stretch.sizes.tolist()
        ([0, 1, 0], [1, 2, 0])
    """

    def __init__(self, books: Books, trace: ArrivalTrace, batch: int, slots: int) -> None:
        """Give the versions that are held their slots."""
        self.books, self.batch = books, batch
        self._workers, self._events = trace.workers, Events(trace)
        self._free = list(range(slots))[::-1]
        self._users = [0] * slots
        self._written = [books.step] * slots  # at which step
        self._slots: dict[int, int] = {}  # by worker
        self._newest: int | None = None  # its slot, where a task holds it
        self.versions: dict[int, int] = {}
        for worker, (_, _, version) in books.held.items():
            if version == books.step:
                self._hold_newest(worker)
            else:
                if version not in self.versions:
                    self.versions[version] = self._free.pop()
                self._hold(worker, self.versions[version])

    def slot(self, worker: int) -> int | None:
        """Return the slot of the worker's task; None where it is the newest, unwritten version."""
        slot = self._slots[worker]
        return None if slot == self._newest else slot

    def held(self, worker: int) -> Ticket | None:
        """Return the worker's ticket."""
        return self.books.held.get(worker)

    def dispatch(self, worker: int) -> None:
        """Send the newest version."""
        self.books.dispatch(worker)
        self._hold_newest(worker)

    def release(self, worker: int) -> None:
        """Give up a task."""
        self.books.release(worker)
        self._leave(worker)

    def advance(self, stop: int, length: int) -> Stretch:
        """Run the books from their step to ``stop``, at most ``length`` steps on."""
        first, books = self.books.step, self.books
        rows, written = [], []
        for t in range(first, stop):
            self._events.apply(t, self)
            worker = int(self._workers[t])
            write = self._free[-1] if self._newest is None else self._newest
            rows.append((*books.held[worker], self._slots[worker], write))
            written.append(self._written[self._slots[worker]])
            self._leave(worker)
            self._newest = None
            for waiting in books.receive(worker):
                self.dispatch(waiting)
        table = np.zeros((len(Stretch._fields), length), np.int32)
        table[:5, : len(rows)] = np.array(rows, np.int32).T
        starts = group_starts(np.array(written), first, self.batch)
        table[5, : len(starts)] = starts
        table[6, : len(starts)] = np.diff(starts, append=len(rows))
        return Stretch(*table)

    def _hold_newest(self, worker: int) -> None:
        if self._newest is None:
            self._newest = self._free.pop()
            self._written[self._newest] = self.books.step
        self._hold(worker, self._newest)

    def _hold(self, worker: int, slot: int) -> None:
        self._slots[worker] = slot
        self._users[slot] += 1

    def _leave(self, worker: int) -> None:
        slot = self._slots.pop(worker)
        self._users[slot] -= 1
        if not self._users[slot]:
            self._free.append(slot)
            if slot == self._newest:
                self._newest = None


def group_starts(ready_at: NDArray[np.integer], first: int, batch: int) -> list[int]:
    """Return where groups start, each as long as it can be and at most ``batch`` steps.

    Args:
        ready_at: The step from which on a report can be computed, int[n] of consecutive steps.
        first: The step of the first entry.
        batch: ≥ 1.
    """
    starts: list[int] = []
    start = -batch
    for index, version in enumerate((ready_at - first).tolist()):
        if version > start or index - start >= batch:
            start = index
            starts.append(start)
    return starts


def count_slots(trace: ArrivalTrace) -> int:
    """Return how many versions of w a run holds at once at most: never more than K.

    With events it is an upper bound.
    """
    last_use = np.arange(trace.num_steps + 1)  # the newest version counts in any case
    np.maximum.at(last_use, trace.dispatched_at, np.arange(trace.num_steps))
    held = trace.in_flight
    last_use[held[held >= 0]] = trace.num_steps
    ends = np.bincount(last_use, minlength=trace.num_steps + 1)
    alive = np.arange(1, trace.num_steps + 2) - np.cumsum(ends) + ends
    return min(trace.num_workers, int(alive.max()) + len(trace.events))

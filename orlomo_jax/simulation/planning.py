"""Plans the segments of a simulated run: the copies of w that each step reads and writes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from orlomo_jax.server.task_table import TaskId, TaskTable
from orlomo_jax.traces.events import Events
from orlomo_jax.traces.trace import ArrivalTrace


class Segment(NamedTuple):
    """The plan of consecutive steps, int32[length] each; entries beyond the segment are padding.

    At step t the newest parameters are written to slot ``writes[t]``, and the report is computed
    from slot ``reads[t]``; ``fresh[t]`` is 1 if the worker's optimizer starts anew. All tasks of a
    group of steps were dispatched before the group and have the same S, so its rounds can be
    computed together. ``starts`` contains the first step of each group, counted from the segment's
    start, and ``sizes`` its number of steps.
    """

    workers: np.ndarray
    rounds: np.ndarray
    dispatched_at: np.ndarray
    reads: np.ndarray
    writes: np.ndarray
    fresh: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray


class SlotPlanner:
    """Advances the task table before the arrays are computed, and assigns slots to versions of w.

    All tasks of a version share a slot. After the last of them has reported, the slot is free. The
    newest version gets a slot when a task holds it; if none does by the next step, that step writes
    it to any free slot.

    Args:
        table: The task table; changed in place.
        trace: The arrivals.
        batch: The largest number of steps in a group.
        slots: The number of slots, at least :func:`count_slots`.
        local_steps: S of each worker; None if it is the same.

    Attributes:
        versions: The slot of every version that tasks held at the start, except the newest.

    Example:
        >>> table = TaskTable("orlomo", 2, synchronous=False)
        >>> ids = [table.dispatch(worker) for worker in range(2)]
        >>> planner = SlotPlanner(table, ArrivalTrace.from_workers([0, 0, 1], 2), batch=2, slots=2)
        >>> segment = planner.advance(3, length=3)
        >>> segment.writes.tolist(), segment.reads.tolist()  # worker 1 holds w_0 till the end
        ([0, 1, 1], [0, 1, 0])
        >>> segment.starts.tolist(), segment.sizes.tolist()
        ([0, 1, 0], [1, 2, 0])
    """

    def __init__(
        self,
        table: TaskTable,
        trace: ArrivalTrace,
        batch: int,
        slots: int,
        local_steps: tuple[int, ...] | None = None,
    ) -> None:
        """Assign slots to the versions that tasks hold."""
        self.table, self.batch = table, batch
        self._local_steps = None if local_steps is None else np.array(local_steps)
        self._workers, self._events = trace.workers, Events(trace)
        self._free = list(range(slots))[::-1]
        self._users = [0] * slots
        self._written = [table.step] * slots  # the step at which each slot is written
        self._slots: dict[int, int] = {}  # by worker
        self._newest: int | None = None  # the slot of the newest version, if a task holds it
        self.versions: dict[int, int] = {}
        for worker, (_, _, version) in table.held.items():
            if version == table.step:
                self._hold_newest(worker)
            else:
                if version not in self.versions:
                    self.versions[version] = self._free.pop()
                self._hold(worker, self.versions[version])

    def slot(self, worker: int) -> int | None:
        """Return the slot of the worker's task; None for the newest, unwritten version."""
        slot = self._slots[worker]
        return None if slot == self._newest else slot

    def held(self, worker: int) -> TaskId | None:
        """Return the id of the worker's task, or None."""
        return self.table.held.get(worker)

    def dispatch(self, worker: int) -> None:
        """Dispatch the newest version to a worker."""
        self.table.dispatch(worker)
        self._hold_newest(worker)

    def release(self, worker: int) -> None:
        """Remove the worker's task."""
        self.table.release(worker)
        self._free_slot(worker)

    def advance(self, stop: int, length: int) -> Segment:
        """Plan the steps until ``stop``, at most ``length`` of them."""
        first, table = self.table.step, self.table
        rows, written = [], []
        for t, worker in enumerate(self._workers[first:stop].tolist(), first):
            self._events.apply(t, self)
            write = self._free[-1] if self._newest is None else self._newest
            slot = self._slots[worker]
            rows.append((*table.held[worker], slot, write, table.fresh[worker]))
            written.append(self._written[slot])
            self._free_slot(worker)
            self._newest = None
            for waiting in table.receive(worker):
                self.dispatch(waiting)
        columns = np.zeros((len(Segment._fields), length), np.int32)
        columns[:6, : len(rows)] = np.array(rows, np.int32).T
        kinds = None
        if self._local_steps is not None:
            kinds = self._local_steps[columns[0, : len(rows)]]
        starts = group_starts(np.array(written), first, self.batch, kinds)
        columns[6, : len(starts)] = starts
        columns[7, : len(starts)] = np.diff(starts, append=len(rows))
        return Segment(*columns)

    def _hold_newest(self, worker: int) -> None:
        if self._newest is None:
            self._newest = self._free.pop()
            self._written[self._newest] = self.table.step
        self._hold(worker, self._newest)

    def _hold(self, worker: int, slot: int) -> None:
        self._slots[worker] = slot
        self._users[slot] += 1

    def _free_slot(self, worker: int) -> None:
        slot = self._slots.pop(worker)
        self._users[slot] -= 1
        if not self._users[slot]:
            self._free.append(slot)
            if slot == self._newest:
                self._newest = None


def group_starts(
    ready_at: np.ndarray, first: int, batch: int, kinds: np.ndarray | None = None
) -> list[int]:
    """Return the first step of each group; groups are as long as possible, up to ``batch`` steps.

    Args:
        ready_at: The step from which each report can be computed, int[n].
        first: The step of the first entry.
        batch: ≥ 1.
        kinds: Steps of different kinds are never in one group, int[n]; None if all are equal.
    """
    starts: list[int] = []
    start = -batch
    changes = np.zeros(len(ready_at), bool)
    if kinds is not None:
        changes[1:] = kinds[1:] != kinds[:-1]
    entries = zip((ready_at - first).tolist(), changes.tolist(), strict=True)
    for index, (version, changed) in enumerate(entries):
        if version > start or changed or index - start >= batch:
            start = index
            starts.append(start)
    return starts


def count_slots(trace: ArrivalTrace) -> int:
    """Return the largest number of versions of w in use, ≤ K; with events, an upper bound."""
    last_use = np.arange(trace.num_steps + 1)  # the newest version always counts
    np.maximum.at(last_use, trace.dispatched_at, np.arange(trace.num_steps))
    held = trace.in_flight
    last_use[held[held >= 0]] = trace.num_steps
    ends = np.bincount(last_use, minlength=trace.num_steps + 1)
    alive = np.arange(1, trace.num_steps + 2) - np.cumsum(ends) + ends
    return min(trace.num_workers, int(alive.max()) + len(trace.events))

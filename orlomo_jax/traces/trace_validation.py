"""Validates a sequence of arrivals and events, and derives which version each worker holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from orlomo_jax.checks import check_count
from orlomo_jax.traces.policies import Policy, StalenessBound


class TraceEvent(NamedTuple):
    """A worker event other than an arrival: loss, re-dispatch, restart, join or leave.

    Attributes:
        step: Number of reports applied before it. Events of the same step are applied in order.
        kind: "lost": the outstanding report will never be used; the worker is idle.
            "redispatched": the idle worker is sent the current parameters.
            "restarted": the outstanding report will never be used; the busy worker is sent the
            current parameters.
            "left": the worker leaves; an outstanding report is lost.
            "joined": an absent worker is sent the current parameters, with ``max_wait`` after it
            has waited its turn. A worker is absent after it left, and from the start if this is its
            first event.
        worker: The worker's index.
    """

    step: int
    kind: str
    worker: int


# Kind -> (allowed states before, state after). A worker that becomes busy is sent the parameters;
# a waiting one is sent them as soon as barrier and bound allow.
_TRANSITIONS = {
    "arrived": ({"busy"}, "waiting"),
    "lost": ({"busy"}, "idle"),
    "redispatched": ({"idle"}, "busy"),
    "restarted": ({"busy"}, "busy"),
    "left": ({"busy", "idle", "waiting"}, "absent"),
    "joined": ({"absent"}, "waiting"),
}
_KINDS = tuple(_TRANSITIONS)[1:]


class ArrivalOrder(NamedTuple):
    """A validated order of arrivals; fields as in :class:`~orlomo_jax.ArrivalTrace`."""

    num_workers: int
    workers: np.ndarray
    synchronous: bool
    events: tuple[TraceEvent, ...]
    max_wait: int | None
    rounds: np.ndarray
    dispatched_at: np.ndarray
    in_flight: np.ndarray

    def check(self, name: str, values: Any) -> None:
        """Raise unless the values equal the field ``name`` of this order."""
        array, held = _array(name, values, len(self.workers)), getattr(self, name)
        if (t := _first(array != held)) is not None:
            raise ValueError(
                f"`{name}` must follow from the arrivals and events: {held[t]} for worker "
                f"{self.workers[t]} at step {t}, got {name}[{t}]={array[t]}"
            )


def check_arrival_order(
    workers: Any, num_workers: Any, synchronous: Any, events: Any, max_wait: Any = None
) -> ArrivalOrder:
    """Return the validated order; arguments as in :class:`~orlomo_jax.ArrivalTrace`.

    Raises:
        TypeError, ValueError: If the order is malformed or impossible; the message names the
            field, the index and the value.

    Example:
        >>> check_arrival_order([0, 0], 2, False, [(1, "lost", 1)]).in_flight
        array([ 2, -1], dtype=int32)
    """
    num_workers = check_count("num_workers", num_workers, 1)
    workers = _array("workers", workers)
    if (t := _first((workers < 0) | (workers >= num_workers))) is not None:
        raise ValueError(
            f"`workers` must be in [0, num_workers={num_workers}), got workers[{t}]={workers[t]}"
        )
    workers = workers.astype(np.int32)
    if not isinstance(synchronous, bool):
        raise TypeError(f"`synchronous` must be a bool, got synchronous={synchronous!r}")
    events = _events(events, num_workers, len(workers))
    if synchronous and (away := [e for e in events if e.kind in ("left", "joined")]):
        raise ValueError(f"`events` of a synchronous trace must not be joins or leaves: {away[0]}")
    max_wait = check_max_wait(max_wait, num_workers, synchronous)
    held = (
        _replay(workers, num_workers, synchronous, events, max_wait)
        if events or max_wait is not None
        else _count_dispatches(workers, num_workers, synchronous)
    )
    held = (array.astype(np.int32) for array in held)
    return ArrivalOrder(num_workers, workers, synchronous, events, max_wait, *held)


def check_max_wait(max_wait: Any, num_workers: int, synchronous: bool) -> int | None:
    """Return ``max_wait`` as an int or None; raise if K workers cannot keep the bound."""
    if max_wait is None:
        return None
    check_count("max_wait", max_wait, num_workers - 1)
    if synchronous:
        raise ValueError(f"`max_wait` must be None if synchronous, got max_wait={max_wait}")
    return int(max_wait)


def check_times(times: Any, num_steps: int) -> np.ndarray:
    """Validate the arrival times and return them as float64[num_steps]."""
    times = _array("times", times, num_steps, (int, float, np.integer, np.floating)).astype(float)
    if (t := _first(~((times >= 0) & (times < math.inf)))) is not None:
        raise ValueError(f"`times` must be finite and ≥ 0, got times[{t}]={times[t]}")
    if (t := _first(times[1:] < times[:-1])) is not None:
        raise ValueError(
            f"`times` must not decrease, got times[{t + 1}]={times[t + 1]} after {times[t]}"
        )
    return times


def late_joiners(events: Sequence[TraceEvent]) -> set[int]:
    """Return the workers that are absent at the start and join later."""
    first_kinds = {worker: kind for _, kind, worker in reversed(events)}
    return {worker for worker, kind in first_kinds.items() if kind == "joined"}


def _count_dispatches(workers, num_workers, synchronous):
    """Return rounds, dispatched_at and in_flight of a trace without events."""
    steps = np.arange(len(workers))
    by_worker = np.argsort(workers, kind="stable")
    counts = np.bincount(workers, minlength=num_workers)
    rounds, dispatched_at = np.empty_like(steps), np.zeros_like(steps)
    rounds[by_worker] = steps - np.repeat(np.cumsum(counts) - counts, counts)
    if synchronous:
        if (t := _first(rounds != steps // num_workers)) is not None:
            raise ValueError(
                "`workers` must contain each worker once in every round of a synchronous trace, "
                f"got workers[{t}]={workers[t]} for the second time in round {t // num_workers}"
            )
        full = len(workers) // num_workers
        return rounds, rounds * num_workers, np.where(counts > full, -1, full * num_workers)
    dispatched_at[by_worker[1:]] = by_worker[:-1] + 1  # wrong for each worker's first report
    dispatched_at[rounds == 0] = 0
    in_flight = np.zeros_like(counts)
    in_flight[workers] = steps + 1  # the last entry of each worker stays
    return rounds, dispatched_at, in_flight


def _replay(workers, num_workers, synchronous, events, max_wait):
    """Return rounds, dispatched_at and in_flight by applying arrivals and events one by one."""
    late = late_joiners(events)
    states = ["absent" if worker in late else "busy" for worker in range(num_workers)]
    held = {worker: 0 for worker in range(num_workers) if worker not in late}
    dispatches = [int(worker in held) for worker in range(num_workers)]
    waiting: list[int] = []
    rounds, dispatched_at = np.empty_like(workers), np.empty_like(workers)
    policy = Policy() if max_wait is None else StalenessBound(max_wait)
    timeline = [(step, 0, i, kind, worker) for i, (step, kind, worker) in enumerate(events)]
    timeline += [(t, 1, t, "arrived", worker) for t, worker in enumerate(workers.tolist())]
    for step, arrives, index, kind, worker in sorted(timeline):
        before, after = _TRANSITIONS[kind]
        if states[worker] not in before:
            name = "workers" if arrives else "events"
            raise ValueError(
                f"`{name}[{index}]` must be possible, got {kind!r} at step {step} for worker "
                f"{worker}, which is {states[worker]} then, not {' or '.join(sorted(before))}"
            )
        if arrives:
            rounds[step], dispatched_at[step] = dispatches[worker] - 1, held[worker]
        if states[worker] == "waiting":
            waiting.remove(worker)
        states[worker] = after
        held.pop(worker, None)
        if after == "waiting":
            waiting.append(worker)
        version = step + arrives
        sent = (worker,) if after == "busy" else ()
        if synchronous:
            sent += () if version % num_workers else tuple(waiting)
            version -= version % num_workers
        else:
            sent += policy.due(version, held, waiting, num_workers)
        for other in sent:
            if states[other] == "waiting":
                waiting.remove(other)
            states[other], held[other] = "busy", version
            dispatches[other] += 1
    in_flight = np.array([held.get(worker, -1) for worker in range(num_workers)])
    return rounds, dispatched_at, in_flight


def _events(events, num_workers: int, num_steps: int) -> tuple[TraceEvent, ...]:
    if not isinstance(events, Iterable):
        raise TypeError(f"`events` must be a sequence, got events={events!r}")
    checked: list[TraceEvent] = []
    for index, event in enumerate(events):
        name = f"events[{index}]"
        if not isinstance(event, tuple | list) or len(event) != 3:
            raise TypeError(f"`{name}` must be (step, kind, worker), got {event!r}")
        step, kind, worker = event
        if kind not in _KINDS:
            raise ValueError(f"`{name}.kind` must be one of {_KINDS}, got {kind!r}")
        step = check_count(f"{name}.step", step, checked[-1].step if checked else 0, num_steps)
        checked.append(
            TraceEvent(step, kind, check_count(f"{name}.worker", worker, 0, num_workers - 1))
        )
    return tuple(checked)


def _array(name: str, values, length: int | None = None, types=(int, np.integer)) -> np.ndarray:
    """Return a one-dimensional array of numbers of these types; raise for booleans."""
    wanted, kinds = ("numbers", "iuf") if float in types else ("integers", "iu")
    if not isinstance(values, Iterable):
        raise TypeError(f"`{name}` must be a sequence of {wanted}, got {name}={values!r}")
    if not hasattr(values, "__array__"):
        values = list(values)
        for index, value in enumerate(values):
            if not isinstance(value, types) or isinstance(value, bool):
                raise TypeError(f"`{name}` must contain {wanted}, got {name}[{index}]={value!r}")
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in kinds):
        raise TypeError(
            f"`{name}` must be {wanted} in one dimension, got {array.dtype}{list(array.shape)}"
        )
    if length is not None and len(array) != length:
        raise ValueError(
            f"`{name}` must have an entry for each of {length} reports, got {len(array)}"
        )
    return array if array.size else array.astype(int)


def _first(wrong: np.ndarray) -> int | None:
    return int(np.argmax(wrong)) if wrong.any() else None

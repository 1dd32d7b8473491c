"""The order of arrivals that a run follows: who reported when, from which parameters."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from orlomo_jax.checks import check_count

if TYPE_CHECKING:  # numpy.typing takes half as long to import as all of this library
    from numpy.typing import NDArray


class Event(NamedTuple):
    """Something that happens to a worker beside the arrival of its report.

    Attributes:
        step: Number of reports applied before it; events of one step stand in their order.
        kind: "lost": the outstanding report will never be used, the worker holds nothing now.
            "redispatched": after a loss the worker is sent the current parameters.
            "left": the worker leaves; an outstanding report is lost.
            "joined": an absent worker is sent the current parameters. Absent is who has left, and
            from the start a worker whose first event this is.
        worker: Its index.
    """

    step: int
    kind: str
    worker: int


# From which states of a worker to which. Where a worker becomes busy, it is sent the parameters.
_TRANSITIONS = {
    "arrived": ({"busy"}, "busy"),
    "lost": ({"busy"}, "idle"),
    "redispatched": ({"idle"}, "busy"),
    "left": ({"busy", "idle"}, "absent"),
    "joined": ({"absent"}, "busy"),
}
_KINDS = tuple(_TRANSITIONS)[1:]
_FORMAT = "orlomo_jax.ArrivalTrace"


@dataclasses.dataclass(frozen=True, eq=False)
class ArrivalTrace:
    """The order of arrivals: who reports at each of T steps, from which parameters, and when.

    After step t the worker that reported is sent w_{t+1}; in a synchronous trace it waits for all K
    first. The events of a synchronous trace are losses and re-dispatches alone: the barrier would
    wait for ever for a worker that has left.

    ``rounds`` and ``dispatched_at`` are data, checked against what the arrivals and the events
    leave in each worker's hands. Arrays are copied and read-only.

    Attributes:
        num_workers: K ≥ 1.
        workers: k_t in [0, K), int32[T].
        rounds: The worker's own round, int32[T]: its dispatches from 0, lost ones counted.
        dispatched_at: ite(t, k_t), the step of the parameters that it was sent, int32[T].
        times: Virtual seconds of the arrivals, float64[T], finite, ≥ 0 and nondecreasing.
        synchronous: Whether all workers wait for one another; dispatched_at is then K⌊t/K⌋.
        events: Losses and changes of membership, by step.

    Raises:
        TypeError, ValueError: If a field is malformed or contradicts another; the message names
            the field, the index and the value.

    Example:
        >>> trace = ArrivalTrace.from_workers([0, 2, 1, 2, 1, 1, 2, 2, 0], 3)  # Figure 1
        >>> trace.dispatched_at.tolist(), trace.max_delay
        ([0, 0, 0, 2, 3, 5, 4, 7, 1], 7)
        >>> trace.in_flight.tolist()
        [9, 6, 8]
    """

    num_workers: int
    workers: NDArray[np.int32]
    rounds: NDArray[np.int32]
    dispatched_at: NDArray[np.int32]
    times: NDArray[np.float64]
    synchronous: bool = False
    events: tuple[Event, ...] = ()

    def __post_init__(self) -> None:
        """Check every field, and keep read-only copies of the arrays."""
        ledger = _ledger(self.workers, self.num_workers, self.synchronous, self.events)
        checked = ledger._asdict() | {"times": _times(self.times, len(ledger.workers))}
        for name in ("rounds", "dispatched_at"):
            array, held = _array(name, getattr(self, name), len(ledger.workers)), checked[name]
            if (t := _first(array != held)) is not None:
                raise ValueError(
                    f"`{name}` must be what the worker holds, {held[t]} for worker "
                    f"{ledger.workers[t]} then, got {name}[{t}]={array[t]}"
                )
        for name in _FIELDS:
            if isinstance(checked[name], np.ndarray):
                checked[name].flags.writeable = False
            object.__setattr__(self, name, checked[name])

    @classmethod
    def from_workers(
        cls,
        workers: Iterable[int],
        num_workers: int,
        *,
        times: Iterable[float] | None = None,
        synchronous: bool = False,
        events: Iterable[tuple[int, str, int]] = (),
    ) -> ArrivalTrace:
        """Return the trace in which the workers report in this order, any order at all.

        Of a synchronous trace, each K reports must come from all K workers. ``times`` None is
        1, 2, …, T.

        Example:
            >>> events = [(1, "lost", 1), (2, "redispatched", 1)]
            >>> ArrivalTrace.from_workers([0, 0, 1], 2, events=events).rounds.tolist()
            [0, 1, 1]
        """
        ledger = _ledger(workers, num_workers, synchronous, events)
        fields: dict[str, Any] = ledger._asdict() | {"times": times}
        del fields["in_flight"]
        if times is None:
            fields["times"] = np.arange(1.0, len(ledger.workers) + 1)
        return cls(**fields)

    @property
    def num_steps(self) -> int:
        """T, the number of reports."""
        return len(self.workers)

    @property
    def delays(self) -> NDArray[np.int32]:
        """τ_t = t − ite(t, k_t), the reports applied since the dispatch, int32[T]."""
        return np.arange(self.num_steps, dtype=np.int32) - self.dispatched_at

    @property
    def max_delay(self) -> int:
        """The largest delay; 0 where nothing arrived."""
        return int(self.delays.max(initial=0))

    @property
    def late_joiners(self) -> set[int]:
        """The workers who are absent at the start and join later."""
        return _late_joiners(self.events)

    @property
    def in_flight(self) -> NDArray[np.int32]:
        """ite(T, k), the step of the parameters that worker k holds at the end, −1 for none.

        int32[K]. In an asynchronous trace without events Σ_k (T − ite(T, k)) + Σ_t τ_t = (K − 1)T.
        """
        return _ledger(self.workers, self.num_workers, self.synchronous, self.events).in_flight

    def __eq__(self, other: object) -> bool:
        """Whether every field is the same, arrays entry by entry."""
        if not isinstance(other, ArrivalTrace):
            return NotImplemented
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in _FIELDS)

    def digest(self) -> str:
        """Return a hexadecimal SHA-256 of all fields: equal for equal traces."""
        content = hashlib.sha256(repr((self.num_workers, self.synchronous, self.events)).encode())
        for name in ("workers", "rounds", "dispatched_at", "times"):
            content.update(getattr(self, name).tobytes())
        return content.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace to a file as JSON text, all of it or nothing."""
        data: dict[str, Any] = {"format": _FORMAT, "version": 1}
        for name in _FIELDS:
            value = getattr(self, name)
            data[name] = value.tolist() if isinstance(value, np.ndarray) else value
        path = Path(path)
        unfinished = path.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            with open(unfinished, "x", encoding="utf-8") as file:
                file.write(json.dumps(data) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ArrivalTrace:
        """Read a trace that :meth:`save`, or a person, wrote.

        By hand, ``{"format": "orlomo_jax.ArrivalTrace", "num_workers": 2, "workers": [0, 1, 0]}``
        is enough; ``times``, ``synchronous`` and ``events`` are as in :meth:`from_workers`.

        Raises:
            ValueError: If the file holds no trace; the message names it and what is wrong.
        """
        path = Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(data, dict) or data.pop("format", None) != _FORMAT:
                raise ValueError(f'it must be an object with "format": "{_FORMAT}"')
            by_hand = data.keys().isdisjoint(("rounds", "dispatched_at"))
            required = {"num_workers", "workers"} if by_hand else {"version", *_FIELDS}
            if missing := required - data.keys():
                raise ValueError(f"it lacks the fields {sorted(missing)}")
            if unknown := data.keys() - {"version", *_FIELDS}:
                raise ValueError(f"it has the unknown fields {sorted(unknown)}")
            check_count("version", data.pop("version", 1), 1, 1)
            return cls.from_workers(**data) if by_hand else cls(**data)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is not an arrival trace: {error}") from error


_FIELDS = tuple(field.name for field in dataclasses.fields(ArrivalTrace))


class _Ledger(NamedTuple):
    """A checked order of arrivals and what it leaves in each worker's hands; see ArrivalTrace."""

    num_workers: int
    workers: NDArray[np.int32]
    synchronous: bool
    events: tuple[Event, ...]
    rounds: NDArray[np.int32]
    dispatched_at: NDArray[np.int32]
    in_flight: NDArray[np.int32]


def _ledger(workers, num_workers, synchronous, events) -> _Ledger:
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
        raise ValueError(f"`events` of a synchronous trace must not change who is there: {away[0]}")
    held = (
        _replay(workers, num_workers, synchronous, events)
        if events
        else _count_dispatches(workers, num_workers, synchronous)
    )
    held = (array.astype(np.int32) for array in held)
    return _Ledger(num_workers, workers, synchronous, events, *held)


def _count_dispatches(workers, num_workers, synchronous):
    """Return rounds, dispatched_at and in_flight where no event interferes."""
    steps = np.arange(len(workers))
    by_worker = np.argsort(workers, kind="stable")
    counts = np.bincount(workers, minlength=num_workers)
    rounds, dispatched_at = np.empty_like(steps), np.zeros_like(steps)
    rounds[by_worker] = steps - np.repeat(np.cumsum(counts) - counts, counts)
    if synchronous:
        if (t := _first(rounds != steps // num_workers)) is not None:
            raise ValueError(
                "`workers` must have each worker once in every round of a synchronous trace, got "
                f"workers[{t}]={workers[t]} for the second time in round {t // num_workers}"
            )
        full = len(workers) // num_workers
        return rounds, rounds * num_workers, np.where(counts > full, -1, full * num_workers)
    dispatched_at[by_worker[1:]] = by_worker[:-1] + 1  # right but for each worker's first report
    dispatched_at[rounds == 0] = 0
    in_flight = np.zeros_like(counts)
    in_flight[workers] = steps + 1  # of a worker's entries the last stays
    return rounds, dispatched_at, in_flight


def _late_joiners(events):
    first_kinds = {worker: kind for _, kind, worker in reversed(events)}
    return {worker for worker, kind in first_kinds.items() if kind == "joined"}


def _replay(workers, num_workers, synchronous, events):
    """Return rounds, dispatched_at and in_flight, going through arrivals and events one by one."""
    late = _late_joiners(events)
    states = ["absent" if worker in late else "busy" for worker in range(num_workers)]
    held = [-1 if worker in late else 0 for worker in range(num_workers)]
    dispatches = [0 if worker in late else 1 for worker in range(num_workers)]
    rounds, dispatched_at = np.empty_like(workers), np.empty_like(workers)
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
        version, sent = step + arrives, [worker] if after == "busy" else []
        if synchronous:
            if arrives:  # at the barrier until the last one comes
                after, sent = "waiting", []
                if version % num_workers == 0:
                    sent = range(num_workers)
            version -= version % num_workers
        states[worker], held[worker] = after, -1
        for other in sent:
            states[other], held[other] = "busy", version
            dispatches[other] += 1
    return rounds, dispatched_at, np.array(held)


def _events(events, num_workers: int, num_steps: int) -> tuple[Event, ...]:
    if not isinstance(events, Iterable):
        raise TypeError(f"`events` must be a sequence, got events={events!r}")
    checked: list[Event] = []
    for index, event in enumerate(events):
        name = f"events[{index}]"
        if not isinstance(event, tuple | list) or len(event) != 3:
            raise TypeError(f"`{name}` must be (step, kind, worker), got {event!r}")
        step, kind, worker = event
        if kind not in _KINDS:
            raise ValueError(f"`{name}.kind` must be one of {_KINDS}, got {kind!r}")
        step = check_count(f"{name}.step", step, checked[-1].step if checked else 0, num_steps)
        checked.append(Event(step, kind, check_count(f"{name}.worker", worker, 0, num_workers - 1)))
    return tuple(checked)


def _times(times, num_steps: int) -> NDArray[np.float64]:
    times = _array("times", times, num_steps, (int, float, np.integer, np.floating)).astype(float)
    if (t := _first(~((times >= 0) & (times < math.inf)))) is not None:
        raise ValueError(f"`times` must be finite and ≥ 0, got times[{t}]={times[t]}")
    if (t := _first(times[1:] < times[:-1])) is not None:
        raise ValueError(
            f"`times` must not decrease, got times[{t + 1}]={times[t + 1]} after {times[t]}"
        )
    return times


def _array(name: str, values, length: int | None = None, types=(int, np.integer)) -> NDArray:
    """Return a one-dimensional array of numbers of these types; booleans are none."""
    wanted, kinds = ("numbers", "iuf") if float in types else ("integers", "iu")
    if not isinstance(values, Iterable):
        raise TypeError(f"`{name}` must be a sequence of {wanted}, got {name}={values!r}")
    if not hasattr(values, "__array__"):
        values = list(values)
        for index, value in enumerate(values):
            if not isinstance(value, types) or isinstance(value, bool):
                raise TypeError(f"`{name}` must hold {wanted}, got {name}[{index}]={value!r}")
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in kinds):
        raise TypeError(
            f"`{name}` must hold {wanted} in one dimension, got {array.dtype}{list(array.shape)}"
        )
    if length is not None and len(array) != length:
        raise ValueError(
            f"`{name}` must have an entry for each of {length} reports, got {len(array)}"
        )
    return array if array.size else array.astype(int)


def _first(wrong: NDArray[np.bool_]) -> int | None:
    return int(np.argmax(wrong)) if wrong.any() else None

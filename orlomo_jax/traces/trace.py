"""The order of arrivals that a run follows: who reported when, from which parameters."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from orlomo_jax.checks import check_count
from orlomo_jax.traces.arrival_order import (
    TraceEvent,
    check_arrival_order,
    check_times,
    late_joiners,
)

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
    workers: np.ndarray
    rounds: np.ndarray
    dispatched_at: np.ndarray
    times: np.ndarray
    synchronous: bool = False
    events: tuple[TraceEvent, ...] = ()

    def __post_init__(self) -> None:
        """Check every field, and keep read-only copies of the arrays."""
        order = check_arrival_order(self.workers, self.num_workers, self.synchronous, self.events)
        checked = order._asdict() | {"times": check_times(self.times, len(order.workers))}
        for name in ("rounds", "dispatched_at"):
            order.check(name, getattr(self, name))
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
        order = check_arrival_order(workers, num_workers, synchronous, events)
        fields: dict[str, Any] = order._asdict() | {"times": times}
        del fields["in_flight"]
        if times is None:
            fields["times"] = np.arange(1.0, len(order.workers) + 1)
        return cls(**fields)

    @property
    def num_steps(self) -> int:
        """T, the number of reports."""
        return len(self.workers)

    @property
    def delays(self) -> np.ndarray:
        """τ_t = t − ite(t, k_t), the reports applied since the dispatch, int32[T]."""
        return np.arange(self.num_steps, dtype=np.int32) - self.dispatched_at

    def arrival(self, step: int) -> tuple[float, int, int]:
        """Return time, worker and delay of the arrival at step t."""
        delay = step - int(self.dispatched_at[step])
        return float(self.times[step]), int(self.workers[step]), delay

    @property
    def max_delay(self) -> int:
        """The largest delay; 0 where nothing arrived."""
        return int(self.delays.max(initial=0))

    @property
    def late_joiners(self) -> set[int]:
        """The workers who are absent at the start and join later."""
        return late_joiners(self.events)

    @property
    def in_flight(self) -> np.ndarray:
        """ite(T, k), the step of the parameters that worker k holds at the end, −1 for none.

        int32[K]. In an asynchronous trace without events Σ_k (T − ite(T, k)) + Σ_t τ_t = (K − 1)T.
        """
        order = check_arrival_order(self.workers, self.num_workers, self.synchronous, self.events)
        return order.in_flight

    def __eq__(self, other: object) -> bool:
        """Whether every field is the same, arrays entry by entry."""
        if not isinstance(other, ArrivalTrace):
            return NotImplemented
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in _FIELDS)

    def digest(self, num_steps: int | None = None) -> str:
        """Return a hexadecimal SHA-256 of all fields: equal for equal traces.

        Args:
            num_steps: Of the run up to this step alone, the same for every trace that goes on from
                it: of these arrivals, the events before them, and who is absent at the start.
        """
        events: Any = self.events
        if num_steps is not None:
            events = (
                [event for event in events if event.step < num_steps],
                sorted(self.late_joiners),
            )
        content = hashlib.sha256(repr((self.num_workers, self.synchronous, events)).encode())
        for name in ("workers", "rounds", "dispatched_at", "times"):
            content.update(getattr(self, name)[:num_steps].tobytes())
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

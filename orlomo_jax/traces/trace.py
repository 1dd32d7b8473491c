"""Defines the arrival trace: which worker reports at each step, from which model version."""

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

from orlomo_jax.checks import check_format_version
from orlomo_jax.traces.trace_validation import (
    ArrivalOrder,
    TraceEvent,
    check_arrival_order,
    check_times,
    late_joiners,
)

_FORMAT = "orlomo_jax.ArrivalTrace"

FORMAT_VERSION = 1
"""The version of the format of a trace's file."""


@dataclasses.dataclass(frozen=True, eq=False)
class ArrivalTrace:
    """The worker, model version and time of each of T arrivals, and the events between them.

    After step t the worker that reported is sent w_{t+1}; in a synchronous trace it first waits for
    all K workers, and with ``max_wait`` it first waits until no delay can exceed the bound. A
    synchronous trace cannot contain joins and leaves, because its barrier needs all K workers.

    ``rounds`` and ``dispatched_at`` follow from the arrivals and events; given values are compared
    with them. Arrays are copied and read-only.

    Attributes:
        num_workers: K ≥ 1.
        workers: k_t in [0, K), int32[T].
        rounds: The worker's own round, int32[T]: its dispatches from 0, including lost ones.
        dispatched_at: ite(t, k_t), the step of the parameters that the worker was sent (their
            model version), int32[T].
        times: Virtual seconds of the arrivals, float64[T], finite, ≥ 0 and nondecreasing.
        synchronous: Whether all workers wait for one another; dispatched_at is then K⌊t/K⌋.
        events: Losses, re-dispatches, restarts, joins and leaves, by step.
        max_wait: The bound on delays that workers wait for, ≥ K − 1; None for no bound. It is the
            ``max_delay`` of a :class:`~orlomo_jax.traces.StalenessBound`.

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
    max_wait: int | None = None

    def __post_init__(self) -> None:
        """Check every field and make read-only copies of the arrays."""
        order = self._order()
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
        max_wait: int | None = None,
    ) -> ArrivalTrace:
        """Return the trace in which the workers report in this order.

        Any order is valid; in a synchronous trace, each K reports must come from all K workers. If
        ``times`` is None, the times are 1, 2, …, T.

        Example:
            >>> events = [(1, "lost", 1), (2, "redispatched", 1)]
            >>> ArrivalTrace.from_workers([0, 0, 1], 2, events=events).rounds.tolist()
            [0, 1, 1]
            >>> ArrivalTrace.from_workers([0, 1, 0, 1], 2, max_wait=1).dispatched_at.tolist()
            [0, 0, 2, 2]
        """
        order = check_arrival_order(workers, num_workers, synchronous, events, max_wait)
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
        """τ_t = t − ite(t, k_t), the delay (staleness) of each report, int32[T]."""
        return np.arange(self.num_steps, dtype=np.int32) - self.dispatched_at

    def arrival(self, step: int) -> tuple[float, int, int]:
        """Return (time, worker, delay) of the arrival at a step."""
        delay = step - int(self.dispatched_at[step])
        return float(self.times[step]), int(self.workers[step]), delay

    @property
    def max_delay(self) -> int:
        """The largest delay; 0 for an empty trace."""
        return int(self.delays.max(initial=0))

    @property
    def late_joiners(self) -> set[int]:
        """The workers that are absent at the start and join later."""
        return late_joiners(self.events)

    @property
    def in_flight(self) -> np.ndarray:
        """ite(T, k), the model version that worker k holds at the end, −1 for none; int32[K].

        In an asynchronous trace without events, Σ_k (T − ite(T, k)) + Σ_t τ_t = (K − 1)T.
        """
        return self._order().in_flight

    def _order(self) -> ArrivalOrder:
        return check_arrival_order(
            self.workers, self.num_workers, self.synchronous, self.events, self.max_wait
        )

    def __eq__(self, other: object) -> bool:
        """Return whether all fields are equal, arrays entry by entry."""
        if not isinstance(other, ArrivalTrace):
            return NotImplemented
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in _FIELDS)

    def digest(self, num_steps: int | None = None) -> str:
        """Return a hexadecimal SHA-256 of all fields.

        Args:
            num_steps: If given, only the first ``num_steps`` arrivals, the events before them and
                the workers absent at the start count. So every continuation has the same digest.
        """
        events: Any = self.events
        if num_steps is not None:
            events = (
                [event for event in events if event.step < num_steps],
                sorted(self.late_joiners),
            )
        settings: Any = (self.num_workers, self.synchronous, events)
        if self.max_wait is not None:
            settings += (self.max_wait,)
        content = hashlib.sha256(repr(settings).encode())
        for name in ("workers", "rounds", "dispatched_at", "times"):
            content.update(getattr(self, name)[:num_steps].tobytes())
        return content.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace to a JSON file, atomically."""
        data: dict[str, Any] = {"format": _FORMAT, "version": FORMAT_VERSION}
        for name in _FIELDS:
            value = getattr(self, name)
            data[name] = value.tolist() if isinstance(value, np.ndarray) else value
        if self.max_wait is None:  # as in files of earlier releases
            del data["max_wait"]
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
        """Read a trace written by :meth:`save` or by hand.

        ``{"format": "orlomo_jax.ArrivalTrace", "num_workers": 2, "workers": [0, 1, 0]}`` is a
        complete file; ``times``, ``synchronous``, ``events`` and ``max_wait`` are as in
        :meth:`from_workers`.

        Raises:
            ValueError: If the file is not a trace, or of another format version; the message names
                the file and the error.
        """
        path = Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(data, dict) or data.pop("format", None) != _FORMAT:
                raise ValueError(f'it must be an object with "format": "{_FORMAT}"')
            check_format_version(data.get("version", FORMAT_VERSION), FORMAT_VERSION)
            by_hand = data.keys().isdisjoint(("rounds", "dispatched_at"))
            required = (
                {"num_workers", "workers"} if by_hand else {"version", *_FIELDS} - {"max_wait"}
            )
            if missing := required - data.keys():
                raise ValueError(f"it lacks the fields {sorted(missing)}")
            data.pop("version", None)
            if unknown := data.keys() - set(_FIELDS):
                raise ValueError(f"it has the unknown fields {sorted(unknown)}")
            return cls.from_workers(**data) if by_hand else cls(**data)
        except (ValueError, TypeError, RecursionError) as error:
            hint = "; for a journal: Journal.load(path).trace()" if path.suffix == ".jsonl" else ""
            raise ValueError(f"{path} is not an arrival trace: {error}{hint}") from error


_FIELDS = tuple(field.name for field in dataclasses.fields(ArrivalTrace))

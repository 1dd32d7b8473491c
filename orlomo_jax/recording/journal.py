"""Writes the arrivals and events of a real run to a file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from orlomo_jax.checks import check_format_version, check_same
from orlomo_jax.recording.locks import open_alone
from orlomo_jax.server.task_table import TaskId
from orlomo_jax.traces.trace import ArrivalTrace
from orlomo_jax.traces.trace_validation import TraceEvent

_FORMAT, _FORMAT_VERSION = "orlomo_jax.Journal", 1


class Arrival(NamedTuple):
    """An applied report.

    Attributes:
        worker: The worker that reported.
        round: The round of its task.
        dispatched_at: The model version of its task.
        time: Seconds since the run began.
        loss: The mean loss of its local steps.
        metrics: The metrics of ``loss_fn``, means over the local steps: leaves as nested lists.
        version: How many updates the rule had made when the task was sent; None if that is
            ``dispatched_at``.
        accepted: Whether the rule accepted the report.
        received_bytes: The size of the report as sent over the network; 0 without a network.
    """

    worker: int
    round: int
    dispatched_at: int
    time: float
    loss: float
    metrics: Sequence[Any] = ()
    version: int | None = None
    accepted: bool = True
    received_bytes: int = 0

    @property
    def id(self) -> TaskId:
        """The task's."""
        return TaskId(self.worker, self.round, self.dispatched_at)


class Journal:
    """The log of a real run: arrivals, events and rejected reports, one JSON line each.

    A line is written when its report has been applied, before workers or callbacks see a
    consequence. So after a crash the file contains everything that anyone has seen of the run. An
    unfinished last line is dropped. Only one process at a time can write to a file.

    Args:
        identity: The run's identity, JSON-able: ``num_workers``, ``synchronous``, ``absent`` (the
            workers absent at the start), ``max_wait`` (see ArrivalTrace), and any other settings.
        path: The file, created with its first line; a file of the same run is continued. None keeps
            the journal in memory.

    Attributes:
        identity: The run's identity; for a continued file, with the file's ``absent``.
        arrivals: Every :class:`Arrival`, in order.
        events: Every :class:`~orlomo_jax.traces.TraceEvent`, in order.
        rejected: Pairs (step, reason and message), in order.
        format_version: The version of the file's format.

    Raises:
        ValueError: If the file is not a journal, of another run or of another format version; the
            message names file and line.
        BlockingIOError: If another process writes to the file, or has written since it was read.

    Example:
        >>> journal = Journal({"num_workers": 2, "synchronous": False})
        >>> journal.arrived(Arrival(1, 0, 0, time=0.5, loss=2.0))
        >>> journal.happened("lost", 0, time=0.7, why="killed")
        >>> journal.happened("redispatched", 0, time=0.9)
        >>> journal.arrived(Arrival(0, 1, 1, time=1.5, loss=1.0))
        >>> journal.trace().dispatched_at.tolist(), journal.trace().rounds.tolist()
        ([0, 1], [0, 1])
    """

    def __init__(
        self, identity: dict[str, Any], path: str | os.PathLike[str] | None = None
    ) -> None:
        """Read the file if it exists, and open it."""
        self.identity = {"absent": []} | json.loads(json.dumps(identity))
        self.path = None if path is None else Path(path)
        self.arrivals: list[Arrival] = []
        self.events: list[TraceEvent] = []
        self.rejected: list[tuple[int, str]] = []
        self.format_version = _FORMAT_VERSION
        self._file: IO[bytes] | None = None
        self._size = 0  # bytes of the complete lines that were read
        if self.path is None or not self.path.exists() or not self._read(self.path):
            return
        absent = {"absent": self._header["absent"]}
        check_same(self.path, self._header, self.identity | absent)
        self.identity |= absent
        self._open()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Journal:
        """Read a journal into memory, without opening the file for writing.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If it is not a journal.
        """
        journal = cls({})
        if not journal._read(Path(path)):
            raise ValueError(f"{path} is empty, not a journal of a run")
        journal.identity = journal._header
        return journal

    @staticmethod
    def set_aside(path: str | os.PathLike[str]) -> None:
        """Rename a file, if it exists, to ``….old``; raise BlockingIOError if it is in use."""
        path = Path(path)
        if path.exists():
            with open_alone(path):
                path.replace(path.with_name(f"{path.name}.old"))

    def arrived(self, arrival: Arrival) -> None:
        """Log an applied report."""
        loss = float(arrival.loss) if math.isfinite(arrival.loss) else None
        row = arrival._asdict() | {"loss": loss}
        for name, default in Arrival._field_defaults.items():
            if row[name] == default or (name == "metrics" and not arrival.metrics):
                del row[name]
        self._note(row)

    def happened(self, kind: str, worker: int, time: float, why: str = "") -> None:
        """Log an event before the next arrival; ``kind`` is that of a TraceEvent."""
        step = len(self.arrivals)
        self._note({"event": kind, "step": step, "worker": worker, "time": time, "why": why})

    def refused(self, worker: Any, reason: str, message: str, time: float) -> None:
        """Log a rejected report."""
        row = {"rejected": reason, "step": len(self.arrivals), "worker": repr(worker)}
        self._note({**row, "time": time, "why": message})

    def trace(self) -> ArrivalTrace:
        """Return the trace so far; raise ValueError if a worker did not hold a report's task."""
        workers, rounds, dispatched_at, times, *_ = (
            zip(*self.arrivals, strict=True) if self.arrivals else ((),) * len(Arrival._fields)
        )
        return ArrivalTrace(  # it checks the rounds and model versions
            num_workers=self.identity["num_workers"],
            workers=list(workers),  # pyright: ignore[reportArgumentType]
            rounds=list(rounds),  # pyright: ignore[reportArgumentType]
            dispatched_at=list(dispatched_at),  # pyright: ignore[reportArgumentType]
            times=list(times),  # pyright: ignore[reportArgumentType]
            synchronous=self.identity["synchronous"],
            max_wait=self.identity.get("max_wait"),
            events=tuple(self.events),
        )

    def sync(self) -> None:
        """Force all lines to disk, so that they survive a power failure."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _note(self, line: dict[str, Any]) -> None:
        if self.path is not None and self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._open()
            header = {"format": _FORMAT, "format_version": _FORMAT_VERSION}
            self._write(header | self.identity)
        if self._file is not None:
            self._write(line)
        self._remember(line)

    def _remember(self, line: dict[str, Any]) -> None:
        if "event" in line:
            self.events.append(TraceEvent(line["step"], line["event"], line["worker"]))
        elif "rejected" in line:
            self.rejected.append((line["step"], f"{line['rejected']}: {line['why']}"))
        else:
            arrival = Arrival(**line)
            known = math.nan if line["loss"] is None else arrival.loss
            self.arrivals.append(arrival._replace(loss=known))

    def _open(self) -> None:
        assert self.path is not None
        self._file = open_alone(self.path)
        size = self.path.read_bytes().rfind(b"\n") + 1
        if size != self._size:
            self.close()
            raise BlockingIOError(f"another process has written {self.path} since it was read")
        os.ftruncate(self._file.fileno(), size)  # remove half a line of a killed process

    def _write(self, line: dict[str, Any]) -> None:
        """Append one line to the file, atomically, and pass it to the operating system."""
        assert self._file is not None
        data = (json.dumps(line, allow_nan=False) + "\n").encode()
        end = self._file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError:
            os.ftruncate(self._file.fileno(), end)
            raise

    def _read(self, path: Path) -> bool:
        """Read the file's complete lines; return whether there is a header."""
        data = path.read_bytes()
        self._size = data.rfind(b"\n") + 1
        lines = data[: self._size].splitlines()
        for number, text in enumerate(lines, 1):
            try:
                line = json.loads(text)
                if number > 1:
                    self._remember(line)
                elif line.pop("format") != _FORMAT:
                    raise ValueError("it must begin with a journal's header")
                else:  # files of earlier releases do not state their version
                    self.format_version = line.pop("format_version", _FORMAT_VERSION)
                    check_format_version(self.format_version, _FORMAT_VERSION)
                    self._header = line
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}:{number} is not a line of a journal: {error}") from None
        return bool(lines)

"""A real run's arrivals and events, on disk as they happen."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from orlomo_jax.trace import ArrivalTrace, Event

_FORMAT = "orlomo_jax.Journal"


class Arrival(NamedTuple):
    """An applied report: whose, when (seconds since the run began), and its mean loss."""

    worker: int
    time: float
    loss: float


class Journal:
    """The log of a real run: arrivals, events and rejected reports, a JSON line each.

    A line is written when its report is applied and before anything follows from it, so that after
    a crash the file holds all that anybody has seen of the run. A line that a dying process left
    unfinished is dropped.

    Args:
        num_workers: K of the run.
        synchronous: Whether its method is.
        path: The file; one that exists is continued. None keeps the journal in memory.

    Attributes:
        arrivals: Every :class:`Arrival`, in order.
        events: Every :class:`~orlomo_jax.Event`, in order.
        rejected: Pairs of the step and the reason's text, in order.

    Raises:
        ValueError: If the file is of another run or no journal; the message names file and line.

    Example:
        >>> journal = Journal(num_workers=2, synchronous=False)
        >>> journal.arrived(1, time=0.5, loss=2.0)
        >>> journal.happened("lost", 0, time=0.7, why="killed")
        >>> journal.happened("redispatched", 0, time=0.9)
        >>> journal.arrived(0, time=1.5, loss=1.0)
        >>> journal.trace().dispatched_at.tolist(), journal.trace().rounds.tolist()
        ([0, 1], [0, 1])
    """

    def __init__(
        self, num_workers: int, synchronous: bool, path: str | os.PathLike[str] | None = None
    ) -> None:
        """Open the file, and read what is there."""
        self.num_workers, self.synchronous = num_workers, synchronous
        self.path = None if path is None else Path(path)
        self.arrivals: list[Arrival] = []
        self.events: list[Event] = []
        self.rejected: list[tuple[int, str]] = []
        header = {"format": _FORMAT, "num_workers": num_workers, "synchronous": synchronous}
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = _whole_lines(self.path)
        if not lines:
            self._write(header)
            return
        if lines[0] != header:
            raise ValueError(f"{self.path} must begin with {header}, got {lines[0]}")
        for number, line in enumerate(lines[1:], 2):
            try:
                self._remember(line)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{self.path}:{number} is no line of a journal: {line}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Journal:
        """Return the journal in a file, which must exist.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If it is no journal.
        """
        lines = _whole_lines(Path(path)) if Path(path).stat().st_size else []
        if not lines or lines[0].get("format") != _FORMAT:
            raise ValueError(f"{path} is not a journal of a run")
        return cls(lines[0]["num_workers"], lines[0]["synchronous"], path)

    def arrived(self, worker: int, time: float, loss: float) -> None:
        """Note that the worker's report was applied."""
        loss = loss if math.isfinite(loss) else math.nan
        self._note({"worker": worker, "time": time, "loss": None if math.isnan(loss) else loss})

    def happened(self, kind: str, worker: int, time: float, why: str = "") -> None:
        """Note an event of an :class:`~orlomo_jax.Event`'s kind, before the next arrival."""
        step = len(self.arrivals)
        self._note({"event": kind, "step": step, "worker": worker, "time": time, "why": why})

    def refused(self, worker: Any, reason: str, message: str, time: float) -> None:
        """Note that a report was rejected, and why."""
        step = len(self.arrivals)
        row = {"rejected": reason, "step": step, "worker": repr(worker), "time": time}
        self._note({**row, "why": message})

    def trace(self) -> ArrivalTrace:
        """Return the order of arrivals so far, with its events; times in seconds."""
        return ArrivalTrace.from_workers(
            [arrival.worker for arrival in self.arrivals],
            self.num_workers,
            times=[arrival.time for arrival in self.arrivals],
            synchronous=self.synchronous,
            events=self.events,
        )

    def _note(self, line: dict[str, Any]) -> None:
        self._write(line)
        self._remember(line)

    def _remember(self, line: dict[str, Any]) -> None:
        if "event" in line:
            self.events.append(Event(line["step"], line["event"], line["worker"]))
        elif "rejected" in line:
            self.rejected.append((line["step"], f"{line['rejected']}: {line['why']}"))
        else:
            loss = math.nan if line["loss"] is None else float(line["loss"])
            self.arrivals.append(Arrival(int(line["worker"]), float(line["time"]), loss))

    def _write(self, line: dict[str, Any]) -> None:
        """Append one line, whole or not at all; the kernel has it when this returns."""
        if self.path is None:
            return
        data = (json.dumps(line, allow_nan=False) + "\n").encode()
        with self.path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                os.ftruncate(file.fileno(), end)
                raise


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Return the file's lines; cut off one that a dying process left unfinished."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    lines = []
    for number, text in enumerate(data[:whole].splitlines(), 1):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}") from None
        if not isinstance(line, dict):
            raise ValueError(f"{path}:{number} must be a JSON object, got {line!r}")
        lines.append(line)
    return lines

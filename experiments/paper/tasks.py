"""Runs that share a device: one after the other, in threads, as one program, or in processes.

A batch of 64 small images leaves a large GPU nearly idle. Runs that differ in seed, learning rate
or arrivals can go through one program ("vmap"). Any runs can share a device as separate processes
("processes"). Results of "vmap" differ from single runs by rounding.
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from experiments import records, runner
from experiments.config import ComputeOptions, Run
from experiments.data.tfds_cache import DataError
from experiments.paper import tables
from experiments.parts import assemble, shape_of
from orlomo_jax import Checkpointer

CACHE = Path(".cache")
"""Folder of checkpoints."""

SAVING = 2.0
"""Seconds reserved for a checkpoint before a deadline."""


@dataclass(frozen=True)
class Way:
    """How runs share a device.

    Attributes:
        how: One after the other ("alone"), as sweeps of such runs in several threads ("threads"),
            as one program ("vmap"), or each in a separate process ("processes").
        count: The largest number of runs that go together.
        convolution: How the runs compute convolutions.
    """

    how: Literal["alone", "threads", "vmap", "processes"] = "alone"
    count: int = 1
    convolution: Literal["auto", "xla", "matmul", "native"] = "auto"

    def family(self, run: Run) -> Run:
        """Return a key that is equal for runs that can go together, or in one thread."""
        if self.how == "alone":
            return run
        shape = shape_of(run)
        return replace(shape, method="orlomo") if self.how == "processes" else shape

    def compute_options(self, compute: ComputeOptions) -> ComputeOptions:
        """Return the options with this way's convolution, unless that is "auto"."""
        if self.convolution == "auto":
            return compute
        return replace(compute, convolution=self.convolution)

    def groups(self, wave: Sequence[Run]) -> Iterator[list[Run]]:
        """Split runs into groups of at most ``count`` that go together."""
        for first in range(0, len(wave), self.count):
            yield list(wave[first : first + self.count])


@dataclass(frozen=True)
class Task:
    """Settings to carry out runs with.

    Attributes:
        way: How runs share the device.
        compute: How the rounds of single runs are computed.
        checkpoint_every: Global iterations between checkpoints; 0 for one only at a deadline.
        data_dir: The TFDS data_dir.
        deadline: When to stop, on the clock ``time.time()``; infinite for never.
        stop: Returns True when runs in threads must stop; None for never.
    """

    way: Way
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    checkpoint_every: int = 0
    data_dir: Path | None = None
    deadline: float = math.inf
    stop: Callable[[], bool] | None = None

    def num_steps(self, run: Run) -> int:
        """Return T of a run."""
        parts = assemble(run, self.data_dir, self.way.compute_options(self.compute).convolution)
        return run.num_steps(len(parts.train.labels))

    def carry_out(
        self, runs: Sequence[Run], callbacks: Sequence[Sequence[Any]] = ()
    ) -> list[dict[str, Any]]:
        """Carry out runs that go together; return the rows of those that end before the deadline.

        The others are saved, and resume when they are carried out again. A failure is a row too.

        Args:
            runs: At most ``way.count`` runs of one family.
            callbacks: The callbacks of the first run, of the second, and so on. Processes ignore
                them.

        Raises:
            DataError: If the data is missing or damaged.
        """
        if self.way.how != "processes":
            return self._in_this_process(runs, callbacks)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(len(runs), context) as pool:
            rows = [row for [row] in filter(None, pool.map(self._by_itself, runs))]
        return [row | {"processes": len(runs)} for row in rows]

    def _by_itself(self, run: Run) -> list[dict[str, Any]]:
        return self._in_this_process([run])

    def _in_this_process(
        self, runs: Sequence[Run], callbacks: Sequence[Sequence[Any]] = ()
    ) -> list[dict[str, Any]]:
        clock, folder = Clock(self.deadline), _folder(runs)
        note, checkpoint, before = folder / "seconds", None, 0.0
        try:
            num_steps = self.num_steps(runs[0])
            if self.checkpoint_every or self.deadline < math.inf:
                checkpoint = Checkpointer(folder, self.checkpoint_every or num_steps)
                before = float(note.read_text()) if note.exists() else 0.0
            rows = runner.execute_together(
                runs,
                self.data_dir,
                evaluate_every=max(1, num_steps // tables.curve_points(runs[0])),
                callbacks=callbacks,
                checkpoint=checkpoint,
                stop=lambda: clock.stop() or (self.stop is not None and self.stop()),
                compute=self.way.compute_options(self.compute),
                over_runs="vmap" if self.way.how == "vmap" else "loop",
            )
        except DataError:
            raise
        except Exception as error:
            return [_failure(run, error, clock.elapsed()) for run in runs]
        if rows is None:
            if checkpoint is not None:
                records.write(note, f"{before + clock.elapsed():.3f}")
            return []
        times = {"wall_time": before + rows[0]["wall_time"], "startup": clock.startup or 0.0}
        return [row | {name: round(value, 3) for name, value in times.items()} for row in rows]


def forget(runs: Sequence[Run]) -> None:
    """Remove the checkpoints of runs; their rows must be recorded."""
    for group in ([*runs], *([run] for run in runs)):
        shutil.rmtree(_folder(group), ignore_errors=True)


class Clock:
    """Decides when a run must stop, from the time left and the duration of its segments.

    Attributes:
        startup: Seconds until the end of the first segment, including compilation; None before.
    """

    def __init__(self, deadline: float) -> None:
        """Start the clock."""
        self.startup: float | None = None
        self._deadline, self._longest = deadline, 0.0
        self._start = self._last = time.time()

    def stop(self) -> bool:
        """Return whether the next segment would end too late; call this after each segment."""
        now, last = time.time(), self._last
        if self.startup is None:
            self.startup = now - self._start
        else:
            self._longest = max(self._longest, now - last)
        self._last = now
        return now + self._longest + SAVING > self._deadline

    def elapsed(self) -> float:
        """Return the seconds since the start."""
        return time.time() - self._start


def _folder(runs: Sequence[Run]) -> Path:
    versions = records.environment()  # other versions refuse the checkpoint
    text = repr((list(runs), versions["jax"], versions["jaxlib"]))
    return CACHE / "checkpoints" / hashlib.sha256(text.encode()).hexdigest()[:16]


def _failure(run: Run, error: Exception, wall_time: float) -> dict[str, Any]:
    return {
        "run": asdict(run),
        "status": "failed",
        "error": "".join(traceback.format_exception_only(error)).strip(),
        "wall_time": round(wall_time, 3),
        "environment": records.environment(),
    }

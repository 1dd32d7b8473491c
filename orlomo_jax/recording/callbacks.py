"""Defines callbacks, which ``simulate`` and ``train`` call during a run."""

from __future__ import annotations

import csv
import importlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np

from orlomo_jax.checks import check_number
from orlomo_jax.recording.health import Health
from orlomo_jax.recording.history import StepRecord, TrainingResult

_log = logging.getLogger("orlomo_jax")


class Callback:
    """The methods that a run calls; override the ones you need.

    A plain function can be passed instead of an object; it is called as :meth:`on_step`.

    Attributes:
        health_every: Seconds > 0 between two calls of :meth:`on_health`; None for never.

    Example:
        >>> class StopBelow(Callback):
        ...     def __init__(self, loss):
        ...         self.loss = loss
        ...
        ...     def on_step(self, record):
        ...         return float(record.loss) < self.loss
    """

    health_every: float | None = None

    def on_start(self, step: int, num_steps: int) -> None:
        """Called before the first step of this process; the run is at ``step`` of ``num_steps``."""

    def on_step(self, record: StepRecord) -> bool | None:
        """Called after each step, in order; in a compiled run, after the step's segment.

        Return True or raise StopIteration to end the run: a checkpoint is saved, and the status is
        ``"stopped"``. A compiled run ends after the segment. In a run that diverges, this may be
        called for a few steps after the divergence.
        """

    def on_health(self, health: Health) -> None:
        """Called every ``health_every`` seconds of a real run."""

    def on_end(self, result: TrainingResult) -> None:
        """Called after the last step."""

    def close(self) -> None:
        """Called at the end, also after an error: free what :meth:`on_start` opened."""


AnyCallback: TypeAlias = Callback | Callable[[StepRecord], bool | None]


class _StepFunction(Callback):
    def __init__(self, function: Callable[[StepRecord], Any]) -> None:
        self._function = function

    def on_step(self, record: StepRecord) -> bool | None:
        """Call the function."""
        return self._function(record)


def as_callback(callback: Any) -> Callback:
    """Return a Callback; raise unless it is one or a function, and ``health_every`` is > 0."""
    if isinstance(callback, Callback):
        if (every := callback.health_every) is not None:
            check_number("health_every", every, lambda x: x > 0, "> 0")
        return callback
    if not callable(callback) or isinstance(callback, type):
        raise TypeError(f"`callbacks` must be Callback objects or functions, got {callback!r}")
    return _StepFunction(callback)


class ProgressBar(Callback):
    """Shows steps, loss, evaluations and speed in the terminal; needs rich.

    Args:
        label: Text before the bar.
        console: A ``rich.console.Console``; None is a new one.
        every: Seconds ≥ 0 between two updates; each update waits for the device.
        tokens_per_step: The tokens > 0 of a report, or their mean; with it, tokens/s are shown.
    """

    def __init__(
        self,
        label: str = "",
        console: Any = None,
        every: float = 1.0,
        tokens_per_step: float | None = None,
    ) -> None:
        """Check that rich is installed."""
        self._rich = import_extra("rich.progress", "ProgressBar", "rich")
        self._label, self._console = label, console
        self._every = check_number("every", every, lambda x: x >= 0, "≥ 0")
        if tokens_per_step is not None:
            check_number("tokens_per_step", tokens_per_step, lambda x: x > 0, "> 0")
        self._tokens = tokens_per_step
        self._progress: Any = None

    def on_start(self, step: int, num_steps: int) -> None:
        """Show the bar."""
        rich = self._rich
        self._first, self._began, self._updated = step, time.monotonic(), 0.0
        self._evaluation, self._total = "", num_steps
        self._progress = rich.Progress(
            rich.TextColumn("{task.description}"),
            rich.BarColumn(bar_width=20),
            rich.TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[rate]}"),
            rich.TimeElapsedColumn(),
            rich.TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._bar = self._progress.add_task(self._label, total=num_steps, completed=step, rate="")
        self._progress.start()

    def on_step(self, record: StepRecord) -> None:
        """Update the bar if ``every`` seconds have passed."""
        now = time.monotonic()
        if record.evaluation is not None:
            self._evaluation = "  ".join(f"{k} {v:.4g}" for k, v in record.evaluation.items())
        elif self._progress is None or (
            now - self._updated < self._every and record.step != self._total
        ):
            return
        self._updated = now
        rate = (record.step - self._first) / max(now - self._began, 1e-9)
        tokens = "" if self._tokens is None else f" {rate * self._tokens:,.0f} tokens/s"
        parts = (self._label, f"loss {float(record.loss):.4f}", self._evaluation)
        self._progress.update(
            self._bar,
            completed=record.step,
            rate=f"{rate:.1f}/s{tokens}",
            description="  ".join(filter(None, (*parts, f"delay {record.delay}"))),
        )

    def close(self) -> None:
        """Remove the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class TensorBoard(Callback):
    """Writes each evaluation, with loss and delay, for TensorBoard; needs tensorboardX.

    Args:
        folder: The folder for the event files. Their times are the run's seconds.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Check that tensorboardX is installed."""
        self._module = import_extra("tensorboardX", "TensorBoard", "tensorboardX")
        self._folder, self._writer = os.fspath(folder), None

    def on_start(self, step: int, num_steps: int) -> None:
        """Open an event file."""
        self._writer: Any = self._module.SummaryWriter(self._folder)

    def on_step(self, record: StepRecord) -> None:
        """Write the step if it has an evaluation."""
        if record.evaluation is None:
            return
        scalars = {**record.evaluation, "loss": float(record.loss), "delay": record.delay}
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, record.step, walltime=record.time)
        self._writer.flush()

    def close(self) -> None:
        """Write what is still in memory, and close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class CSVLog(Callback):
    """Writes losses, scalar metrics and evaluations to a CSV file, one number per row.

    The columns are step, time, worker, delay, name and value. A resumed run removes the rows after
    its checkpoint and continues the file.

    Args:
        path: The file.

    Example:
        >>> import tempfile
        >>> log = CSVLog(Path(tempfile.mkdtemp()) / "run.csv")
        >>> log.on_start(0, 1)
        >>> _ = log.on_step(StepRecord(1, 0.5, 3, 0, 2.0, {"hits": 0.25}, {"accuracy": 0.5}))
        >>> log.close()
        >>> print(log.path.read_text())
        step,time,worker,delay,name,value
        1,0.5,3,0,loss,2.0
        1,0.5,3,0,metrics['hits'],0.25
        1,0.5,3,0,accuracy,0.5
        <BLANKLINE>
    """

    HEADER = ("step", "time", "worker", "delay", "name", "value")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Keep the path; the file is opened when the run starts."""
        self.path = Path(path)
        self._file: Any = None

    def on_start(self, step: int, num_steps: int) -> None:
        """Open the file and keep the rows up to ``step``."""
        rows: list[list[str]] = []
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                header, *rows = list(csv.reader(file)) or [list(self.HEADER)]
                if header != list(self.HEADER):
                    raise ValueError(f"{self.path} was not written by CSVLog: choose another path")
        kept = [row for row in rows if len(row) == len(self.HEADER) and int(row[0]) <= step]
        new = self.path.with_name(f"{self.path.name}.new")  # a killed process leaves the old rows
        with new.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([self.HEADER, *kept])
        new.replace(self.path)
        self._file = self.path.open("a", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file, lineterminator="\n")

    def on_step(self, record: StepRecord) -> None:
        """Write the numbers of a step."""
        at = record.step, record.time, record.worker, record.delay
        self._writer.writerows([*at, name, value] for name, value in _scalars(record))
        self._file.flush()  # so that a killed process has the rows up to its checkpoint

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


class HealthLog(Callback):
    """Logs the health of a real run.

    Args:
        every: Seconds > 0 between two logs.
        log: Called with the text; None is the logger ``orlomo_jax``, at level INFO.
    """

    def __init__(self, every: float = 10.0, log: Callable[[str], Any] | None = None) -> None:
        """Check the period."""
        self.health_every = check_number("every", every, lambda x: x > 0, "> 0")
        self._log = _log.info if log is None else log

    def on_health(self, health: Health) -> None:
        """Log the health."""
        self._log(str(health))


def _scalars(record: StepRecord) -> Iterator[tuple[str, float]]:
    yield "loss", float(record.loss)
    for path, leaf in jax.tree.leaves_with_path(record.metrics):
        if np.size(leaf) == 1 and np.ndim(leaf) == 0:
            yield f"metrics{jax.tree_util.keystr(path)}", float(leaf)
    yield from (record.evaluation or {}).items()


def import_extra(module: str, what: str, package: str) -> Any:
    """Import a module of an optional package; raise an ImportError that names the extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{what} needs {package}: pip install 'orlomo-jax[callbacks]'") from error

"""Shows how far the runs of a sweep are, and which one is best."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass
from typing import Any

from orlomo_jax.checks import check_count, check_number
from orlomo_jax.recording.callbacks import Callback, import_extra
from orlomo_jax.recording.history import StepRecord, TrainingResult


class SweepProgress:
    """Shows finished runs, steps, time left and the best run of a sweep; needs rich.

    All runs share one bar. They may be in several threads. The bar is visible while a
    run is in progress.

    Args:
        total: The number of runs ≥ 1. You may assign another number later.
        metric: The name of the evaluation that says which run is best; "" shows no best run. A
            run's newest value counts. A run that has diverged is never the best.
        highest: Whether the highest value is the best, instead of the lowest.
        console: A ``rich.console.Console``; None is a new one. Nothing is shown unless it is a
            terminal or a notebook.
        every: Seconds ≥ 0 between two updates.

    Attributes:
        total: The number of runs.
        metric: As given.
        finished: The number of runs that have ended.
        best: (label, value) of the best run; None before the first evaluation.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from orlomo_jax import RunStart, from_loss, heterogeneous, make_method, sample_trace
        >>> from orlomo_jax import simulate_many
        >>> rates = (0.01, 0.02, 0.05)
        >>> bar = SweepProgress(total=len(rates), metric="w")
        >>> trace = sample_trace(heterogeneous(), 2, 30, 4, seed=0)
        >>> start = RunStart(jnp.ones(1), trace, jax.random.key(0), 0.01)
        >>> _ = simulate_many(
        ...     make_method("orlomo", num_workers=2, num_local_steps=4),
        ...     from_loss(lambda params, batch: jnp.mean((params - batch) ** 2)),
        ...     lambda key, worker, round: jnp.zeros((4, 1)),
        ...     [
        ...         start._replace(local_learning_rate=rate, callbacks=[bar.run(f"γ={rate}")])
        ...         for rate in rates
        ...     ],
        ...     evaluate=lambda params, model_state: {"w": abs(params[0])},
        ... )
        >>> bar.finished, bar.best[0]
        (3, 'γ=0.05')
    """

    def __init__(
        self,
        total: int,
        metric: str = "",
        *,
        highest: bool = False,
        console: Any = None,
        every: float = 0.1,
    ) -> None:
        """Check the arguments, and that rich is installed."""
        rich = import_extra("rich.progress", "SweepProgress", "rich")
        self.total = check_count("total", total, 1)
        self.finished = 0
        self.metric, self._sign = metric, -1 if highest else 1
        self._every = check_number("every", every, lambda x: x >= 0, "≥ 0")
        self._lock = threading.Lock()
        self._runs: list[_Run] = []
        self._updated = 0.0
        console = rich.get_console() if console is None else console
        self._progress = rich.Progress(
            rich.TextColumn("{task.fields[runs]}"),
            rich.BarColumn(bar_width=20),
            rich.TextColumn("{task.fields[steps]}"),
            rich.TimeElapsedColumn(),
            rich.TimeRemainingColumn(),
            rich.TextColumn("{task.description}", markup=False),
            console=console,
            transient=True,
            disable=not (console.is_interactive or console.is_jupyter),
        )
        self._bar = self._progress.add_task("", total=total, start=False, runs="", steps="")

    @property
    def best(self) -> tuple[str, float] | None:
        """The label and newest value of the best run."""
        with self._lock:
            return self._best()

    def run(self, label: str) -> Callback:
        """Return the callback of one run; each run needs its own.

        Args:
            label: Names the run if it is the best.
        """
        with self._lock:
            self._runs.append(_Run(self, label))
            return self._runs[-1]

    def update(self) -> None:
        """Update the bar if it is due; show it while a run is in progress."""
        with self._lock:
            going = any(run.going for run in self._runs)
            self.finished = sum(run.ended for run in self._runs)
            if not going or self.is_due():
                self._updated = time.monotonic()
                self._draw()
            (self._progress.start if going else self._progress.stop)()

    def is_due(self) -> bool:
        """Return whether the bar is older than ``every`` seconds."""
        return time.monotonic() - self._updated >= self._every

    def _draw(self) -> None:
        steps = sum(run.step for run in self._runs)
        parts = [run.step / max(run.num_steps, 1) for run in self._runs if not run.ended]
        best = self._best()
        self._progress.start_task(self._bar)
        self._progress.update(
            self._bar,
            total=self.total,
            completed=self.finished + sum(parts),
            description="" if best is None else f"best {best[0]}: {self.metric} {best[1]:.4g}",
            runs=f"{self.finished}/{self.total} runs",
            steps=f"{steps:,} steps",
        )

    def _best(self) -> tuple[str, float] | None:
        of_runs = [(run.label, run.value) for run in self._runs if math.isfinite(run.value)]
        return min(of_runs, key=lambda pair: self._sign * pair[1], default=None)


@dataclass(eq=False)
class _Run(Callback):
    """The state of one run."""

    progress: SweepProgress
    label: str
    step: int = 0
    num_steps: int = 0
    value: float = math.nan
    going: bool = False
    ended: bool = False

    def on_start(self, step: int, num_steps: int) -> None:
        """Show the bar."""
        self.step, self.num_steps, self.going = step, num_steps, True
        self.progress.update()

    def on_step(self, record: StepRecord) -> None:
        """Note the step, and the evaluation if there is one."""
        self.step, metric = record.step, self.progress.metric
        if record.evaluation is not None and metric:
            if metric not in record.evaluation:
                raise ValueError(
                    f"`metric` must be one of the evaluation's {sorted(record.evaluation)}, "
                    f"got metric={metric!r}"
                )
            self.value = record.evaluation[metric]
        if self.progress.is_due():
            self.progress.update()

    def on_end(self, result: TrainingResult) -> None:
        """Count the run."""
        self.ended = True
        if result.status == "diverged":
            self.value = math.nan
        self.progress.update()

    def close(self) -> None:
        """Hide the bar if no other run is in progress."""
        self.going = False
        self.progress.update()

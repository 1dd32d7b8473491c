"""Defines the protocol of worker pools: start workers, submit tasks, wait for outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from orlomo_jax.checks import check_number
from orlomo_jax.server.reports import Report, Task
from orlomo_jax.server.task_table import TaskId
from orlomo_jax.worker.local_worker import KeptState
from orlomo_jax.worker.workload import RoundMetrics, Workload


class TaskOutcome(NamedTuple):
    """The outcome of a task: a report or an error.

    Attributes:
        id: The task's id.
        report: The report, or None after an error.
        metrics: The means over the round's steps; None if they are unknown.
        error: The error as text; empty if there is a report.
        exception: The exception of the round, with its traceback; None if the worker was lost.
        seconds: The duration of the round.
        received_bytes: The size of the report as sent over the network.
    """

    id: TaskId
    report: Report | None
    metrics: RoundMetrics | None = None
    error: str = ""
    exception: Exception | None = None
    seconds: float = 0.0
    received_bytes: int = 0


class WorkerPool(Protocol):
    """K workers of some kind; :func:`~orlomo_jax.train` drives them from one thread.

    A pool must run a worker's tasks with its :class:`~orlomo_jax.worker.LocalWorker`, and create
    the report with ``task.report(result)``, so that a real run can be replayed bit for bit. Test
    your own pool with :func:`orlomo_jax.testing.check_worker_pool`.
    """

    def open(self, workload: Workload, num_workers: int) -> None:
        """Prepare for a run of K workers; raise RuntimeError if another one is under way."""

    def start(self, worker: int, kept: KeptState | None = None) -> None:
        """Start a worker; if it is running, replace it with a new one.

        Args:
            worker: k.
            kept: The state that its optimizer continues from, if it is kept and the run resumes.
        """

    def submit(self, task: Task) -> int:
        """Send a task to a started worker, without waiting; return the bytes sent.

        If the worker has another task, that was cancelled: its outcome is ignored.
        """
        ...

    def local_state(self, worker: int, round: int) -> Any:
        """Return the kept state after a round, without stopping the worker; used if there is one.

        Raises:
            Exception: If the worker is lost.
        """
        ...

    def wait(self, timeout: float) -> TaskOutcome | None:
        """Return the next outcome, in order of completion; None after ``timeout`` seconds."""
        ...

    def stop(self, worker: int) -> None:
        """Stop a worker at once; a later outcome of its task is ignored."""

    def close(self) -> None:
        """Stop all workers; called once after :meth:`open`, also after an error."""


def check_slowdowns(slowdowns: Sequence[float] | None, num_workers: int) -> tuple[float, ...]:
    """Return one factor ≥ 1 for each worker; None means 1 for all."""
    if slowdowns is None:
        return (1.0,) * num_workers
    if len(slowdowns) != num_workers:
        raise ValueError(
            f"`slowdowns` must have a factor for each of {num_workers} workers, got {slowdowns!r}"
        )
    return tuple(
        check_number(f"slowdowns[{worker}]", factor, lambda x: 1 <= x < float("inf"), "≥ 1")
        for worker, factor in enumerate(slowdowns)
    )

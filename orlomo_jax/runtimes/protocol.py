"""What the driver needs from a worker pool: start workers, submit tasks, wait for outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from orlomo_jax.checks import check_number
from orlomo_jax.server.reports import Report, Task
from orlomo_jax.server.task_table import TaskId
from orlomo_jax.worker.workload import RoundMetrics, Workload


class TaskOutcome(NamedTuple):
    """How a task ended.

    Attributes:
        id: The task's.
        report: The report, or None if there is none.
        metrics: The means over the round's steps; None if they are unknown.
        error: If there is no report, what happened to the worker.
        exception: What the round raised, with its traceback; None if the worker itself is lost.
        seconds: How long the round took.
        received_bytes: The report's size on the wire.
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

    A pool runs a task with ``workload.run(worker, round, task.start)`` and builds the report with
    ``task.report(result)``: then a real run can be replayed bit for bit. Test a pool of your own
    with :func:`orlomo_jax.testing.check_worker_pool`.
    """

    def open(self, workload: Workload, num_workers: int) -> None:
        """Prepare for a run of K workers; raise RuntimeError if another one is under way."""

    def start(self, worker: int) -> None:
        """Start a worker; if it runs already, replace it by a new one."""

    def submit(self, task: Task) -> int:
        """Give a started worker a task, without waiting; return the bytes sent over a wire."""
        ...

    def wait(self, timeout: float) -> TaskOutcome | None:
        """Return the next outcome, in order of finish; None after ``timeout`` seconds."""
        ...

    def stop(self, worker: int) -> None:
        """End a worker, whatever it does; if its task has an outcome later, that is ignored."""

    def close(self) -> None:
        """End all of them; called once after :meth:`open`, also after an error."""


def check_slowdowns(slowdowns: Sequence[float] | None, num_workers: int) -> tuple[float, ...]:
    """Return one factor ≥ 1 for each worker; None is 1 for all."""
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

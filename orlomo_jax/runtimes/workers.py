"""What a runtime must do for the driver: start workers, send tasks, wait for outcomes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import numpy as np

from orlomo_jax.checks import check_number
from orlomo_jax.reports import Report, Task
from orlomo_jax.rounds import RoundMetrics, fused_round
from orlomo_jax.server_step import as_partial
from orlomo_jax.worker import RoundResult

if TYPE_CHECKING:
    from jaxtyping import Array


class Work(NamedTuple):
    """What every worker of a run knows.

    Attributes:
        round_fn: The local round.
        batch_fn: ``batch_fn(data_key, worker, round) -> batches``.
        data_key: A ``jax.random.key``, of the batches.
        noise_key: A ``jax.random.key``, of the rounds.
    """

    round_fn: Callable
    batch_fn: Callable
    data_key: Array
    noise_key: Array

    @classmethod
    def of(cls, round_fn: Callable, batch_fn: Callable, key: Array) -> Work:
        """Split the run's key, and let the batch function's arrays be arguments of programs."""
        return cls(round_fn, as_partial(batch_fn), *jax.random.split(key))


class Outcome(NamedTuple):
    """What became of a task.

    Attributes:
        worker: k in [K].
        round: The task's.
        report: The report, or None where there is none.
        loss: Its mean loss.
        error: Where there is no report, what happened to the worker.
        seconds: How long the round took.
        received_bytes: The report's size on the wire.
        metrics: Those of ``loss_fn``, means over the local steps; None is all NaN.
        exception: What the round raised, with its traceback; None where the worker itself is lost.
    """

    worker: int
    round: int
    report: Report | None
    loss: float = float("nan")
    error: str = ""
    seconds: float = 0.0
    received_bytes: int = 0
    metrics: Any = None
    exception: Exception | None = None


class Workers(Protocol):
    """K workers of some kind; :func:`~orlomo_jax.train` drives them from one thread.

    Attributes:
        num_workers: K ≥ 1.
    """

    num_workers: int

    def open(self, work: Work) -> None:
        """Prepare for a run; raise, and leave nothing open, where another one is under way."""

    def start(self, worker: int) -> None:
        """Start a worker; where it runs already, put a new one in its place."""

    def submit(self, task: Task) -> int:
        """Give a started worker a task, without waiting; return the bytes sent over a wire."""
        ...

    def wait(self, timeout: float) -> Outcome | None:
        """Return the next outcome, in order of finish; None after ``timeout`` seconds."""
        ...

    def stop(self, worker: int) -> None:
        """End a worker, whatever it does."""

    def close(self) -> None:
        """End all of them; called once after :meth:`open`, also after an error."""


def answer(
    work: Work, worker: int, round: int, start: tuple[Any, Any, Any, Any]
) -> tuple[RoundResult, RoundMetrics]:
    """Return the result of a task's round and its metrics.

    The program is the simulator's, so that a replay of the run can be the same to the bit.

    Args:
        work: What every worker knows.
        worker: k.
        round: The task's.
        start: The task's params, model state, momentum and local learning rate.
    """
    result, metrics, _ = fused_round(work.round_fn)(*_arguments(work, worker, round, start))
    return result, metrics


def prepare(work: Work, worker: int, round: int, start: tuple[Any, Any, Any, Any]) -> None:
    """Compile the program that :func:`answer` runs, where that is not done yet; run nothing."""
    fused_round(work.round_fn).lower(*_arguments(work, worker, round, start)).compile()


def _arguments(work: Work, worker: int, round: int, start: tuple[Any, Any, Any, Any]) -> tuple:
    return (
        work.batch_fn,
        *start,
        work.data_key,
        work.noise_key,
        np.int32(worker),
        np.int32(round),
        np.int32(0),
        np.int32(-1),
    )


def check_slowdowns(slowdowns: Sequence[float] | None, num_workers: int) -> tuple[float, ...]:
    """Return one factor ≥ 1 for each worker; None is 1 for all."""
    if slowdowns is None:
        return (1.0,) * num_workers
    if len(slowdowns) != num_workers:
        raise ValueError(
            f"`slowdowns` must hold a factor for each of {num_workers} workers, got {slowdowns!r}"
        )
    return tuple(
        check_number(f"slowdowns[{worker}]", factor, lambda x: 1 <= x < float("inf"), "≥ 1")
        for worker, factor in enumerate(slowdowns)
    )

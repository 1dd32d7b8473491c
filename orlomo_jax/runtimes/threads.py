"""One thread and one device a worker, in one process."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

import jax

from orlomo_jax.checks import check_count
from orlomo_jax.reports import Task
from orlomo_jax.runtimes.workers import Outcome, Work, answer, check_slowdowns


class Threads:
    """Workers that are threads of this process: several GPUs of one host, or a CPU.

    A thread that hangs cannot be killed: it is left to itself, and a new one takes its place.

    Args:
        num_workers: K ≥ 1.
        devices: Worker k computes on ``devices[k % len(devices)]``; None is ``jax.devices()``.
        slowdowns: Factors ≥ 1, one a worker: after a round of c seconds worker k sleeps
            (slowdowns[k] − 1)·c. Equal machines can so play unequal ones.

    Raises:
        TypeError, ValueError: If an argument is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from orlomo_jax import Threads, make_method, train
        >>> def loss_fn(params, model_state, batch, key):
        ...     return jnp.mean((params - batch) ** 2), (model_state, {})
        >>> method = make_method("orlomo", num_workers=2)
        >>> result = train(
        ...     method,
        ...     method.local_round(loss_fn, num_local_steps=4),
        ...     lambda key, worker, round: jnp.ones((4, 1)),
        ...     jnp.zeros(1),
        ...     Threads(2),
        ...     num_steps=30,
        ...     key=jax.random.key(0),
        ...     local_learning_rate=0.01,
        ... )
        >>> result.status, result.trace.num_steps
        ('finished', 30)
    """

    def __init__(
        self,
        num_workers: int,
        devices: Sequence[Any] | None = None,
        slowdowns: Sequence[float] | None = None,
    ) -> None:
        """Check the arguments; threads start with the run."""
        self.num_workers = check_count("num_workers", num_workers, 1)
        self.slowdowns = check_slowdowns(slowdowns, num_workers)
        if devices is not None and not devices:
            raise ValueError("`devices` must hold a device, got none")
        self._devices = devices
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._inboxes: dict[int, queue.SimpleQueue[Task | None]] = {}
        self._work: dict[Any, Work] = {}

    def open(self, work: Work) -> None:
        """Put the batches' arrays on every device."""
        self._outcomes = queue.SimpleQueue()
        devices = jax.devices() if self._devices is None else self._devices
        self._used = [devices[worker % len(devices)] for worker in range(self.num_workers)]
        self._work = {
            device: Work(work.round_fn, *jax.device_put(work[1:], device))
            for device in dict.fromkeys(self._used)
        }

    def start(self, worker: int) -> None:
        """Start a thread; one that hangs goes on by itself, and its report will be stale."""
        self.stop(worker)
        inbox = self._inboxes[worker] = queue.SimpleQueue()
        name = f"orlomo worker {worker}"
        threading.Thread(target=self._run, args=(worker, inbox), name=name, daemon=True).start()

    def submit(self, task: Task) -> int:
        """Give the worker's thread a task; nothing goes over a wire."""
        self._inboxes[task.worker].put(task)
        return 0

    def wait(self, timeout: float) -> Outcome | None:
        """Return the next outcome, or None."""
        try:
            return self._outcomes.get(timeout=timeout)
        except queue.Empty:
            return None

    def stop(self, worker: int) -> None:
        """Let the worker's thread end after what it does now."""
        if (inbox := self._inboxes.pop(worker, None)) is not None:
            inbox.put(None)

    def close(self) -> None:
        """Let all threads end."""
        for worker in list(self._inboxes):
            self.stop(worker)

    def _run(self, worker: int, inbox: queue.SimpleQueue[Task | None]) -> None:
        device, outcomes = self._used[worker], self._outcomes
        work = self._work[device]
        while (task := inbox.get()) is not None:
            begin = time.perf_counter()
            try:
                outcome = _carry_out(work, task, device)
            except Exception as error:  # The driver decides what a failed round means.
                outcome = Outcome(
                    worker, task.round, None, error=f"{type(error).__name__}: {error}"
                )
            seconds = time.perf_counter() - begin
            time.sleep((self.slowdowns[worker] - 1) * seconds)
            outcomes.put(outcome._replace(seconds=seconds * self.slowdowns[worker]))


def _carry_out(work: Work, task: Task, device: Any) -> Outcome:
    start = jax.device_put(task[3:], device)
    result, loss = answer(work, task.worker, task.round, start)
    jax.block_until_ready(result)  # else the order of arrivals would be that of the dispatches
    report = task.report(result)._replace(finite=bool(result.finite))
    return Outcome(task.worker, task.round, report, float(loss))

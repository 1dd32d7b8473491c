"""Runs each worker as a thread with one device, in one process."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

import jax

from orlomo_jax import jax_settings
from orlomo_jax.runtimes.protocol import TaskOutcome, check_slowdowns
from orlomo_jax.server.placement import to_numpy
from orlomo_jax.server.reports import Task
from orlomo_jax.worker.host_batches import HostBatches
from orlomo_jax.worker.local_worker import KeptState, LocalWorker
from orlomo_jax.worker.workload import RoundMetrics, Workload

_PATIENCE = 60.0
"""Seconds to wait for the current rounds of all threads at the end of a run."""

_HEAD_START = 0.001
"""Seconds that the driver waits at most until a thread has begun its task.

Python runs one thread at a time. Without this wait the driver would record the last report first,
and the worker could not start to compute meanwhile.
"""

_log = logging.getLogger("orlomo_jax")


class ThreadWorkers:
    """Workers that are threads of this process: several GPUs of one host, or a CPU.

    Workers compute with the JAX settings of the caller of ``train``, including contexts such as
    ``jax.enable_x64(True)``. A thread that hangs cannot be killed; it keeps running, and a new
    thread replaces it.

    Args:
        devices: Worker k computes on ``devices[k % len(devices)]``. None is JAX's default device if
            one is set, else ``jax.devices()``.
        slowdowns: One factor ≥ 1 per worker, to imitate slow machines: after a round of c seconds,
            worker k sleeps (slowdowns[k] − 1)·c seconds, except after its first round, which
            compiles.

    Raises:
        TypeError, ValueError: If an argument is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from orlomo_jax import ThreadWorkers, from_loss, make_method, train
        >>> result = train(
        ...     make_method("orlomo", num_workers=2, num_local_steps=4),
        ...     from_loss(lambda params, batch: jnp.mean((params - batch) ** 2)),
        ...     lambda key, worker, round: jnp.ones((4, 1)),
        ...     jnp.zeros(1),
        ...     ThreadWorkers(),
        ...     num_steps=30,
        ...     key=jax.random.key(0),
        ...     local_learning_rate=0.01,
        ... )
        >>> result.status, result.trace.num_steps
        ('finished', 30)
    """

    def __init__(
        self,
        devices: Sequence[Any] | None = None,
        slowdowns: Sequence[float] | None = None,
    ) -> None:
        """Check the arguments; threads start with the run."""
        self._factors, self.slowdowns = slowdowns, ()
        if devices is not None and not devices:
            raise ValueError("`devices` must contain a device, got none")
        self._devices, self._free = devices, threading.Lock()
        self._threads: dict[int, _Thread] = {}
        self._ending: list[_Thread] = []
        self._workloads: dict[Any, Workload] = {}
        self._compiling: dict[Any, threading.Lock] = {}
        self._used: list[Any] = []
        self._settings: dict[str, Any] = {}
        self._outcomes: queue.SimpleQueue[TaskOutcome] = queue.SimpleQueue()

    def open(self, workload: Workload, num_workers: int) -> None:
        """Put the batches' arrays on every device."""
        slowdowns = check_slowdowns(self._factors, num_workers)
        if not self._free.acquire(blocking=False):
            raise RuntimeError("these workers are in another run: use others, or wait for its end")
        self.slowdowns = slowdowns
        self._outcomes = queue.SimpleQueue()  # drops the outcomes of an earlier run's threads
        self._settings = jax_settings.capture()
        devices = _default_devices() if self._devices is None else self._devices
        self._used = [devices[worker % len(devices)] for worker in range(num_workers)]
        try:
            self._workloads = {
                device: _on_device(workload, device) for device in dict.fromkeys(self._used)
            }
        except BaseException:
            self._free.release()
            raise
        self._compiling = {device: threading.Lock() for device in self._workloads}

    def start(self, worker: int, kept: KeptState | None = None) -> None:
        """Start a thread; if the previous one hangs, it keeps running, and its report is stale."""
        self.stop(worker)
        device = self._used[worker]
        self._threads[worker] = _Thread(
            worker,
            self._workloads[device],
            device,
            self._compiling[device],
            self.slowdowns[worker],
            self._settings,
            self._outcomes,
            None if kept is None else kept._replace(state=jax.device_put(kept.state, device)),
        )

    def local_state(self, worker: int, round: int) -> Any:
        """Return the state of the worker's optimizer after a round."""
        return self._threads[worker].local.local_state(round)

    def submit(self, task: Task) -> int:
        """Give the worker's thread a task; return 0, because no bytes are sent."""
        self._threads[task.id.worker].give(task)
        return 0

    def wait(self, timeout: float) -> TaskOutcome | None:
        """Return the next outcome, or None."""
        try:
            return self._outcomes.get(timeout=timeout) if timeout else self._outcomes.get_nowait()
        except queue.Empty:
            return None

    def stop(self, worker: int) -> None:
        """Let the worker's thread end after its current round."""
        if (thread := self._threads.pop(worker, None)) is not None:
            thread.end()
            self._ending.append(thread)

    def close(self) -> None:
        """Let all threads end, and wait for their current rounds.

        Python would abort if it exited while a thread computes.
        """
        for worker in list(self._threads):
            self.stop(worker)
        threads, self._ending = self._ending, []
        deadline = time.monotonic() + _PATIENCE
        for thread in threads:
            if not thread.join(max(0.0, deadline - time.monotonic())):
                _log.warning("the thread of worker %s hangs and keeps running", thread.worker)
        self._free.release()


class _Thread:
    """A worker's thread and its inbox."""

    def __init__(
        self,
        worker: int,
        workload: Workload,
        device: Any,
        compiling: threading.Lock,
        slowdown: float,
        settings: dict[str, Any],
        outcomes: queue.SimpleQueue[TaskOutcome],
        kept: KeptState | None,
    ) -> None:
        self.worker, self._device = worker, device
        self.local = LocalWorker(workload, worker, kept)
        self._compiling, self._prepared = compiling, False
        self._slowdown, self._settings, self._outcomes = slowdown, settings, outcomes
        self.inbox: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._begun: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._ending = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name=f"orlomo worker {worker}", daemon=True
        )
        self._thread.start()

    def give(self, task: Task) -> None:
        """Give the thread a task, and let it begin before the caller continues."""
        while not self._begun.empty():
            self._begun.get()
        self.inbox.put(task)
        with contextlib.suppress(queue.Empty):
            self._begun.get(timeout=_HEAD_START)

    def end(self) -> None:
        self._ending.set()
        self.inbox.put(None)

    def join(self, timeout: float) -> bool:
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        with jax_settings.using(self._settings):
            self._serve()

    def _serve(self) -> None:
        slowdown = 1.0  # for the first round, which compiles
        while (task := self._newest_task()) is not None and not self._ending.is_set():
            begin = time.perf_counter()
            try:
                outcome = self._carry_out(task)
            except Exception as error:  # The driver handles it.
                what = f"{type(error).__name__}: {error}"
                outcome = TaskOutcome(task.id, None, error=what, exception=error)
            seconds = time.perf_counter() - begin
            if slowdown > 1:
                self._ending.wait((slowdown - 1) * seconds)
            self._outcomes.put(outcome._replace(seconds=seconds * slowdown))
            del task, outcome  # frees their arrays now, not when the next task has come
            slowdown = self._slowdown

    def _newest_task(self) -> Task | None:
        """Wait for a task; of several, return the newest: the others were cancelled."""
        task = self.inbox.get()
        while task is not None and not self.inbox.empty():
            task = self.inbox.get()
        return task

    def _carry_out(self, task: Task) -> TaskOutcome:
        worker, round, _ = task.id
        start = task.start
        # Merged parameters are committed to a device; committing w_0 too saves a compilation.
        if any(
            leaf.devices() != {self._device} or not leaf.committed
            for leaf in jax.tree.leaves(start)
        ):
            start = jax.device_put(start, self._device)  # slow for many leaves, also without a move
        if not self._prepared:
            with self._compiling:  # otherwise each thread of a device would compile the program
                self.local.workload.compile(worker, round, start)
            self._prepared = True
        result, metrics = self.local.run(round, start, fresh=task.fresh)
        self._begun.put(None)
        jax.block_until_ready(result)  # otherwise reports would arrive in the order of dispatch
        finite, metrics = to_numpy((result.finite, metrics))
        report = task.report(result)._replace(finite=bool(finite))
        return TaskOutcome(task.id, report, RoundMetrics(*metrics))


def _on_device(workload: Workload, device: Any) -> Workload:
    """Return the workload with its arrays on a device."""
    batch_fn = workload.batch_fn
    if not isinstance(batch_fn, HostBatches):
        batch_fn = jax.device_put(batch_fn, device)
    data_key, noise_key = jax.device_put(workload.keys, device)
    return workload._replace(batch_fn=batch_fn, data_key=data_key, noise_key=noise_key)


def _default_devices() -> Sequence[Any]:
    default = jax_settings.capture()["default_device"]
    if default is None or isinstance(default, str):
        return jax.devices(default)
    return [default]

"""Runs each worker as a Ray actor, on one machine or on a cluster."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from orlomo_jax import jax_settings, trees
from orlomo_jax.runtimes.protocol import TaskOutcome, check_slowdowns
from orlomo_jax.runtimes.ray_actor import Answer, Known, OrlomoWorker, Raised, import_ray, versions
from orlomo_jax.server.placement import to_numpy
from orlomo_jax.server.reports import Report, Task
from orlomo_jax.server.task_table import TaskId
from orlomo_jax.worker.host_batches import HostBatches
from orlomo_jax.worker.local_worker import KeptState
from orlomo_jax.worker.wire import Wire, wire_of
from orlomo_jax.worker.workload import RoundInput, RoundMetrics, Workload

_PATIENCE = 5.0
"""Seconds to wait for an answer of the cluster."""

_STATE_PATIENCE = 120.0
"""Seconds to wait for the state of a worker's optimizer, which may be large."""

_STATE_GROUP = "state"
"""The concurrency group in which an actor is asked for its state while it computes."""


class RayWorkers:
    """Workers that are Ray actors; the process that calls ``train`` is the server.

    If Ray is not initialized, it calls ``ray.init(address=address)``. Without an address and
    RAY_ADDRESS, that starts a local cluster, with token authentication and without a dashboard.
    Ray's own processes listen on all addresses of a host. The cluster must have the CPUs and GPUs
    for all actors when the run starts; scale up a cluster that grows on demand first.

    Ray never restarts or retries an actor, so no report can be applied twice; the driver starts a
    new actor instead. Data is sent as NumPy arrays: parameters once to each host, Δw and Δu in the
    form of :func:`~orlomo_jax.cast_reports` or :func:`~orlomo_jax.worker.quantize_reports` if the
    round uses one. Actors compute with the JAX settings of the caller of ``train``, including
    contexts such as ``jax.enable_x64(True)``, but not with its default device.

    Args:
        address: The address of a running cluster, ``"auto"`` for this host's; see ``ray.init``.
        actor_options: Ray's options for each actor, for example ``{"num_gpus": 1}``. The default is
            ``{"num_cpus": 1, "scheduling_strategy": "SPREAD"}``. Without ``num_gpus``, actors
            compute on the CPU.
        slowdowns: As in :class:`~orlomo_jax.ThreadWorkers`.

    Raises:
        ImportError: If Ray is not installed.
        TypeError, ValueError: If an argument is out of range.

    Example:
        >>> from orlomo_jax import RayWorkers
        >>> workers = RayWorkers(actor_options={"num_cpus": 2}, slowdowns=[1, 1, 1, 2])
    """

    def __init__(
        self,
        address: str | None = None,
        actor_options: Mapping[str, Any] | None = None,
        slowdowns: Sequence[float] | None = None,
    ) -> None:
        """Check the arguments; actors start with the run."""
        self._ray = import_ray()
        self._factors, self.slowdowns, self.num_workers = slowdowns, (), 0
        self._address = address
        defaults = {"num_cpus": 1, "scheduling_strategy": "SPREAD"}
        never_again = {"max_restarts": 0, "max_task_retries": 0}
        self._options = defaults | dict(actor_options or {}) | never_again
        self._actors: dict[int, Any] = {}
        self._pending: dict[Any, TaskId] = {}  # oldest first
        self._known: Any = None
        self._class: Any = None
        self._version: tuple[int, Any, int] | None = None
        self._dtypes: list[Any] = []
        self._wire: Wire | None = None
        self._free = threading.Lock()
        self._initialised_here = False

    def open(self, workload: Workload, num_workers: int) -> None:
        """Connect to Ray, and put the data for all actors into its object store.

        Raises:
            ConnectionError: If no cluster answers at the address.
            RuntimeError: If these workers are in another run.
            ValueError: If the cluster does not have the CPUs or GPUs for all actors.
        """
        slowdowns = check_slowdowns(self._factors, num_workers)
        if not self._free.acquire(blocking=False):
            raise RuntimeError("these workers are in another run: use others, or wait for its end")
        self.slowdowns, self.num_workers = slowdowns, num_workers
        try:
            self._connect()
            self._publish(workload)
        except BaseException:
            self.close()
            raise

    def _connect(self) -> None:
        if not self._ray.is_initialized():
            self._initialised_here = True
            if self._address is None and not os.environ.get("RAY_ADDRESS"):
                cpus = max(os.cpu_count() or 1, int(np.ceil(self._wanted("num_cpus"))))
                self._ray.init("local", num_cpus=cpus, include_dashboard=False)
            else:
                _check_answers(self._address)
                self._ray.init(self._address)
        self._check_resources()

    def _publish(self, workload: Workload) -> None:
        """Put the data for all actors into the object store."""
        self._wire = wire_of(workload.round_fn)
        impl = str(jax.random.key_impl(workload.data_key))
        keys = [jax.random.key_data(key) for key in (workload.data_key, workload.noise_key)]
        batch_fn, keys = workload.batch_fn, jax.device_get(keys)
        if not isinstance(batch_fn, HostBatches):
            batch_fn = jax.device_get(batch_fn)
        known = self._ray.put((workload.round_fn, batch_fn, keys, impl, workload.local_steps))
        self._known = Known(
            versions=versions(),
            settings=jax_settings.portable(jax_settings.capture()),
            gpu=bool(self._options.get("num_gpus")),
            wire=self._wire,
            workload=[known],
        )
        groups = {"concurrency_groups": {_STATE_GROUP: 1}} if workload.keeps_state else {}
        self._class = self._ray.remote(**self._options, **groups)(OrlomoWorker)
        self._version = None
        self._pending.clear()

    def start(self, worker: int, kept: KeptState | None = None) -> None:
        """Start an actor; kill the worker's previous one."""
        self.stop(worker)
        kept = None if kept is None else KeptState(kept.round, to_numpy(kept.state))
        args = self._known, worker, self.slowdowns[worker], kept
        self._actors[worker] = self._class.remote(*args)

    def submit(self, task: Task) -> int:
        """Send a task; tasks of one version share an object in the store."""
        worker, round, version = task.id
        if self._version is None or self._version[0] != version:
            start = RoundInput(*to_numpy(task.start))
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(start))
            self._version = (version, self._ray.put(start), size)
            leaves = jax.tree.leaves(start.params)
            self._dtypes = [trees.widest(leaf.dtype, np.float32) for leaf in leaves]
        _, start, size = self._version
        for ref, other in list(self._pending.items()):  # cancelled; a running round ends first
            if other.worker == worker:
                del self._pending[ref]
                with contextlib.suppress(Exception):
                    self._ray.cancel(ref)
        self._pending[self._actors[worker].run.remote(round, start, task.fresh)] = task.id
        return size

    def local_state(self, worker: int, round: int) -> Any:
        """Return the state of the worker's optimizer after a round; its actor keeps computing."""
        method = self._actors[worker].local_state.options(concurrency_group=_STATE_GROUP)
        return self._ray.get(method.remote(round), timeout=_STATE_PATIENCE)

    def wait(self, timeout: float) -> TaskOutcome | None:
        """Return the next outcome; if several tasks are done, that of the oldest."""
        if not self._pending:
            time.sleep(timeout)
            return None
        ready, _ = self._ray.wait(list(self._pending), num_returns=1, timeout=timeout)
        if not ready:
            return None
        task_id = self._pending.pop(ready[0])
        try:
            payload: Answer | Raised = self._ray.get(ready[0])
        except self._ray.exceptions.RayError as error:
            return TaskOutcome(task_id, None, error=_what_happened(error))
        if isinstance(payload, Raised):
            return TaskOutcome(task_id, None, error=payload.what, exception=payload.exception())
        result, metrics, seconds = payload
        size = sum(leaf.nbytes for leaf in jax.tree.leaves((result.update, result.model_state)))
        update = result.update
        if self._wire is not None:
            update = self._wire.unpack(update, self._dtypes)
        report = Report(task_id, update, result.model_state, result.loss, bool(result.finite))
        metrics = RoundMetrics(*metrics)
        return TaskOutcome(task_id, report, metrics, seconds=seconds, received_bytes=size)

    def stop(self, worker: int) -> None:
        """Kill the worker's actor; its task gets no outcome."""
        if (actor := self._actors.pop(worker, None)) is not None:
            self._ray.kill(actor)
        self._pending = {ref: task for ref, task in self._pending.items() if task.worker != worker}

    def close(self) -> None:
        """Kill all actors; shut Ray down only if :meth:`open` started it."""
        try:
            for worker in list(self._actors):
                with contextlib.suppress(Exception):  # the cluster may be gone
                    self.stop(worker)
        finally:
            self._known = self._version = None
            if self._initialised_here:
                self._initialised_here = False
                self._ray.shutdown()
            self._free.release()

    def _wanted(self, resource: str) -> float:
        return self.num_workers * float(self._options.get(resource) or 0)

    def _check_resources(self) -> None:
        there = self._ray.cluster_resources()
        for option, name in (("num_cpus", "CPU"), ("num_gpus", "GPU")):
            if self._wanted(option) > there.get(name, 0):
                raise ValueError(
                    f"`num_workers` = {self.num_workers} actors of {option}="
                    f"{self._options[option]} need {self._wanted(option):g} {name}, the cluster "
                    f"has {there.get(name, 0):g}: see actor_options"
                )


def _what_happened(error: Exception) -> str:
    """Return the last line of Ray's message about a lost actor."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1].strip()[:300]}"


def _check_answers(address: str | None) -> None:
    """Raise ConnectionError if nothing answers at an address; Ray would retry for minutes."""
    address = os.environ.get("RAY_ADDRESS") or address or ""
    if address == "auto":
        with contextlib.suppress(OSError):  # `ray start` writes its address to this file
            folder = os.environ.get("RAY_TMPDIR") or "/tmp"
            address = Path(folder, "ray", "ray_current_cluster").read_text().strip()
    host, _, port = address.split("://")[-1].split("/")[0].rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()
    except OSError as error:
        raise ConnectionError(f"no Ray cluster answers at {address}: {error}") from error

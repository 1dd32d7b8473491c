"""One Ray actor a worker: several processes on a laptop, several hosts on a cluster."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from orlomo_jax.arrays import on_host
from orlomo_jax.checks import check_count
from orlomo_jax.reports import Report, Task
from orlomo_jax.rounds import wire_dtype
from orlomo_jax.rules import LocalUpdate
from orlomo_jax.runtimes import settings
from orlomo_jax.runtimes.workers import Outcome, Work, answer, check_slowdowns


class RayWorkers:
    """Workers that are Ray actors; the process that calls ``train`` is the server.

    Where Ray is not yet initialised, ``ray.init(address=address)`` is called: with no address (and
    no RAY_ADDRESS) it starts a local cluster, with its token authentication on and its dashboard
    off. Ray's own processes listen on all addresses of a host.

    A cluster must have the processors and GPUs when the run starts: one that grows on demand is to
    be scaled up first.

    An actor is never restarted or retried by Ray itself, so that no report can be applied twice:
    the driver starts a new one. What travels is NumPy. Parameters that several workers are sent
    travel once to each host; Δw and Δu travel in the dtype of
    :func:`~orlomo_jax.narrow_reports`, where the round is of it. An actor keeps the memory that its
    rounds free, for the next. It computes under the JAX settings of the caller of ``train``,
    contexts such as ``jax.enable_x64(True)`` included; the default device is not one of them.

    Args:
        num_workers: K ≥ 1.
        address: Of a running cluster, ``"auto"`` for the one of this host; see ``ray.init``.
        actor_options: Ray's options of each actor, such as ``{"num_gpus": 1}``. The default is
            ``{"num_cpus": 1, "scheduling_strategy": "SPREAD"}``. Without ``num_gpus`` actors
            compute on the CPU.
        slowdowns: As of :class:`~orlomo_jax.Threads`.

    Raises:
        ImportError: If Ray is not installed; the message says which extra holds it.
        TypeError, ValueError: If an argument is out of range.

    Example:
        >>> from orlomo_jax import RayWorkers
        >>> RayWorkers(4, slowdowns=[1, 1, 1, 2]).num_workers
        4
    """

    def __init__(
        self,
        num_workers: int,
        address: str | None = None,
        actor_options: Mapping[str, Any] | None = None,
        slowdowns: Sequence[float] | None = None,
    ) -> None:
        """Check the arguments; actors start with the run."""
        self._ray = _import_ray()
        self.num_workers = check_count("num_workers", num_workers, 1)
        self.slowdowns = check_slowdowns(slowdowns, num_workers)
        self._address = address
        defaults = {"num_cpus": 1, "scheduling_strategy": "SPREAD"}
        never_again = {"max_restarts": 0, "max_task_retries": 0}
        self._options = defaults | dict(actor_options or {}) | never_again
        self._actors: dict[int, Any] = {}
        self._pending: dict[Any, tuple[int, int, int]] = {}  # oldest first
        self._known: Any = None
        self._class: Any = None
        self._version: tuple[int, Any, int] | None = None
        self._dtypes: list[Any] = []
        self._narrow: Any = None
        self._settings: dict[str, Any] = {}
        self._initialised_here = False

    def open(self, work: Work) -> None:
        """Connect to Ray, and put what all actors know into its object store.

        Raises:
            ValueError: If the cluster has not the processors or GPUs for all actors.
        """
        ray = self._ray
        if not ray.is_initialized():
            self._initialised_here = True
            local = self._address is None and not os.environ.get("RAY_ADDRESS")
            cpus = max(os.cpu_count() or 1, int(np.ceil(self._wanted("num_cpus"))))
            options: dict[str, Any] = (
                {"num_cpus": cpus, "include_dashboard": False} if local else {}
            )
            ray.init(self._address, **options)
        self._check_resources()
        self._narrow = getattr(work.round_fn, "wire_dtype", None)
        impl = str(jax.random.key_impl(work.data_key))
        keys = [jax.random.key_data(key) for key in (work.data_key, work.noise_key)]
        known = (work.round_fn, *jax.device_get((work.batch_fn, keys)), impl)
        self._known = ray.put(known)  # once, for all actors
        self._settings = settings.portable(settings.capture())
        self._class = ray.remote(**self._options)(OrlomoWorker)
        self._version = None
        self._pending.clear()

    def start(self, worker: int) -> None:
        """Start an actor; kill the one that was there."""
        self.stop(worker)
        gpu = bool(self._options.get("num_gpus"))
        # In a list the reference is passed on as it is: the actor chooses its platform first.
        self._actors[worker] = self._class.remote(
            self._settings, [self._known], worker, gpu, self.slowdowns[worker], self._narrow
        )

    def submit(self, task: Task) -> int:
        """Send a task; tasks of one version share an object."""
        if self._version is None or self._version[0] != task.dispatched_at:
            start = on_host(task[3:])
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(start))
            self._version = (task.dispatched_at, self._ray.put(start), size)
            self._dtypes = [leaf.dtype for leaf in jax.tree.leaves(start[0])]
        _, start, size = self._version
        ref = self._actors[task.worker].answer.remote(task.round, start)
        self._pending[ref] = task[:3]
        return size

    def wait(self, timeout: float) -> Outcome | None:
        """Return the outcome of the task that is done first, of several the oldest."""
        if not self._pending:
            time.sleep(timeout)
            return None
        ready, _ = self._ray.wait(list(self._pending), num_returns=1, timeout=timeout)
        if not ready:
            return None
        worker, round, index = self._pending.pop(ready[0])
        try:
            payload = self._ray.get(ready[0])
        except self._ray.exceptions.RayError as error:
            return Outcome(worker, round, None, error=_what_happened(error))
        update, model_state, losses, loss, finite, seconds = payload
        size = sum(leaf.nbytes for leaf in jax.tree.leaves((update, model_state)))
        report = Report(worker, round, index, self._widen(update), model_state, losses, finite)
        return Outcome(worker, round, report, loss, "", seconds, size)

    def stop(self, worker: int) -> None:
        """Kill the worker's actor; what it was sent has no outcome then."""
        if (actor := self._actors.pop(worker, None)) is not None:
            self._ray.kill(actor)
        self._pending = {ref: tag for ref, tag in self._pending.items() if tag[0] != worker}

    def close(self) -> None:
        """Kill all actors; leave Ray running if it ran before."""
        try:
            for worker in list(self._actors):
                with contextlib.suppress(Exception):  # of a cluster that is gone
                    self.stop(worker)
        finally:
            self._known = self._version = None
            if self._initialised_here:
                self._initialised_here = False
                self._ray.shutdown()

    def _widen(self, update: LocalUpdate) -> LocalUpdate:
        """Return the update in the parameters' dtypes."""
        if self._narrow is None:
            return update
        leaves, structure = jax.tree.flatten(update)
        dtypes = self._dtypes * (len(leaves) // max(len(self._dtypes), 1))
        wide = [x.astype(dtype) for x, dtype in zip(leaves, dtypes, strict=True)]
        return jax.tree.unflatten(structure, wide)

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


class OrlomoWorker:
    """The actor of one worker; Ray shows its name."""

    def __init__(
        self,
        caller: dict[str, Any],
        known: list[Any],
        worker: int,
        gpu: bool,
        slowdown: float,
        narrow: Any,
    ) -> None:
        """Adopt the caller's settings, before any array is made; then fetch what all know."""
        _keep_freed_memory()
        settings.adopt(caller)
        if gpu:
            os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # several actors share a GPU
        else:
            jax.config.update("jax_platforms", "cpu")
        round_fn, batch_fn, keys, impl = _import_ray().get(known[0])
        batch_fn = jax.tree.map(jnp.asarray, batch_fn)
        keys = [jax.random.wrap_key_data(key, impl=impl) for key in keys]
        self._work = Work(round_fn, batch_fn, *keys)
        self._worker, self._slowdown, self._narrow = worker, slowdown, narrow
        self._warm = False

    def answer(self, round: int, start: tuple[Any, Any, Any, Any]) -> tuple[Any, ...]:
        """Return update, model state, losses, mean loss, whether all is finite, and seconds."""
        begin = time.perf_counter()
        result, (loss, _) = on_host(answer(self._work, self._worker, round, start))
        update = result.update
        if self._narrow is not None:
            cast = lambda x: x.astype(wire_dtype(x.dtype, self._narrow))  # noqa: E731
            update = jax.tree.map(cast, update)
        seconds = time.perf_counter() - begin
        if self._warm:  # the first round compiles
            time.sleep((self._slowdown - 1) * seconds)
            seconds *= self._slowdown
        self._warm = True
        finite = bool(result.finite)
        return update, result.model_state, result.loss, float(loss), finite, seconds


def _keep_freed_memory() -> None:
    """Let this process reuse the memory of a round's results for those of the next.

    glibc gives large arrays back as they are freed, and the kernel clears every page of the new
    ones: with 44 MB of parameters a quarter of a worker's processor time. What its threads free of
    arenas of their own still goes; one arena for all slows short rounds down. Other allocators are
    left as they are.
    """
    largest = 2**31 - 1  # bytes
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, largest)  # M_TRIM_THRESHOLD
        mallopt(-3, largest)  # M_MMAP_THRESHOLD


def _what_happened(error: Exception) -> str:
    """Return the exception that a round raised, or else the last line of what Ray says."""
    if (cause := getattr(error, "cause", None)) is not None:
        return f"{type(cause).__name__}: {cause}"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1].strip()[:300]}"


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ImportError("Ray workers need Ray: pip install 'orlomo-jax[ray]'") from error
    return ray

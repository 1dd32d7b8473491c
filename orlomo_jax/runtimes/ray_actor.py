"""Defines the Ray actor of a worker, and the messages between actor and driver."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import time
import traceback
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from orlomo_jax import jax_settings
from orlomo_jax.server.placement import to_numpy
from orlomo_jax.worker.host_batches import HostBatches
from orlomo_jax.worker.local_worker import KeptState, LocalWorker
from orlomo_jax.worker.step_loop import RoundResult
from orlomo_jax.worker.wire import Wire
from orlomo_jax.worker.workload import RoundInput, RoundMetrics, Workload


class Known(NamedTuple):
    """The data that every actor gets from the driver before it creates any array.

    Attributes:
        versions: The driver's :func:`versions`.
        settings: The driver's JAX settings.
        gpu: Whether actors compute on GPUs.
        wire: The form in which reports are sent, or None.
        workload: A reference to it, in a list so that Ray passes the reference itself.
    """

    versions: dict[str, str]
    settings: dict[str, Any]
    gpu: bool
    wire: Wire | None
    workload: list[Any]


class Answer(NamedTuple):
    """The result of a round, as NumPy arrays, and its duration."""

    result: RoundResult
    metrics: RoundMetrics
    seconds: float


class Raised(NamedTuple):
    """An exception as a message to another process.

    Attributes:
        what: Its type and message.
        traceback: Its traceback as text.
        pickled: The pickled exception, or None if it cannot be pickled.
    """

    what: str
    traceback: str
    pickled: bytes | None

    @classmethod
    def of(cls, error: Exception) -> Raised:
        """Return the message for an exception."""
        try:
            pickled = import_ray().cloudpickle.dumps(error)
        except Exception:  # pickling may raise anything
            pickled = None
        what = f"{type(error).__name__}: {error}"
        return cls(what, "".join(traceback.format_exception(error)), pickled)

    def exception(self) -> Exception:
        """Return the exception with its traceback as a note; a RuntimeError if unpickling fails."""
        error: Any = None
        if self.pickled is not None:
            with contextlib.suppress(Exception):  # this process may not have the class
                error = import_ray().cloudpickle.loads(self.pickled)
        if not isinstance(error, Exception):
            error = RuntimeError(self.what)
        error.add_note(self.traceback)
        return error


class OrlomoWorker:
    """The actor of one worker; Ray displays the class name."""

    def __init__(
        self, known: Known, worker: int, slowdown: float, kept: KeptState | None = None
    ) -> None:
        """Prepare; an error is returned as the answer to the first task."""
        self._slowdown, self._wire = slowdown, known.wire
        self._warm = False
        self._error: Exception | None = None
        try:
            self._prepare(known, worker, kept)
        except Exception as error:
            self._error = error

    def _prepare(self, known: Known, worker: int, kept: KeptState | None) -> None:
        check_versions(known.versions)
        jax_settings.adopt(known.settings)
        _keep_freed_memory()
        if known.gpu:
            os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # several actors share a GPU
        else:
            jax.config.update("jax_platforms", "cpu")
        round_fn, batch_fn, keys, impl, steps = import_ray().get(known.workload[0])
        if not isinstance(batch_fn, HostBatches):
            batch_fn = jax.tree.map(jnp.asarray, batch_fn)
        data_key, noise_key = (jax.random.wrap_key_data(key, impl=impl) for key in keys)
        workload = Workload(round_fn, batch_fn, data_key, noise_key, steps)
        self._worker = LocalWorker(workload, worker, kept)

    def local_state(self, round: int) -> Any:
        """Return the state of the optimizer after a round; a round may run meanwhile."""
        return to_numpy(self._worker.local_state(round))

    def run(self, round: int, start: RoundInput, fresh: bool) -> Answer | Raised:
        """Run a task's round; return its result or its exception."""
        try:
            if self._error is not None:
                raise self._error
            return self._run(round, start, fresh)
        except Exception as error:
            return Raised.of(error)

    def _run(self, round: int, start: RoundInput, fresh: bool) -> Answer:
        begin = time.perf_counter()
        result, metrics = self._worker.run(round, start, fresh=fresh)
        if self._wire is not None:
            result = result._replace(update=self._wire.pack(result.update))
        result, metrics = to_numpy((result, metrics))
        seconds = time.perf_counter() - begin
        if self._warm:  # the first round compiles
            time.sleep((self._slowdown - 1) * seconds)
            seconds *= self._slowdown
        self._warm = True
        return Answer(result._replace(metrics=None), metrics, seconds)


def versions() -> dict[str, str]:
    """Return the versions of the packages that must be the same for driver and actors."""
    found = {}
    for name in ("orlomo-jax", "jax", "jaxlib", "optax"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # not installed
            found[name] = importlib.metadata.version(name)
    return found


def check_versions(drivers: dict[str, str]) -> None:
    """Raise RuntimeError unless this process has the driver's versions."""
    ours = versions()
    for name in sorted(drivers.keys() & ours.keys()):
        if drivers[name] != ours[name]:
            raise RuntimeError(
                f"actors must have the driver's {name} {drivers[name]}, got {name} {ours[name]} "
                f"on {os.uname().nodename}"
            )


def import_ray() -> Any:
    """Return the module; raise an ImportError that names the extra if it is missing."""
    try:
        import ray
    except ImportError as error:
        raise ImportError("Ray workers need Ray: pip install 'orlomo-jax[ray]'") from error
    return ray


def _keep_freed_memory() -> None:
    """Let this process reuse the memory of a round's results for the next round.

    By default, glibc returns large freed arrays to the kernel, which clears every page of the new
    ones; for large models that takes much of a worker's CPU time. This does not affect the arenas
    of other threads (one arena for all threads would slow down short rounds) or other allocators.
    """
    largest = 2**31 - 1  # bytes
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, largest)  # M_TRIM_THRESHOLD
        mallopt(-3, largest)  # M_MMAP_THRESHOLD

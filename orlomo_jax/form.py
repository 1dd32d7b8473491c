"""How a run is carried out: driven from Python or compiled, its rounds one by one or together."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from orlomo_jax.checks import check_count
from orlomo_jax.compiled import Compiled, Version
from orlomo_jax.driven import Driven, Job
from orlomo_jax.plan import group_starts
from orlomo_jax.server import ParameterServer
from orlomo_jax.worker import convolves

if TYPE_CHECKING:
    from orlomo_jax.compiled import WorkerAxis


MANY = 1_000_000
"""Parameters from which on a step driven from Python is the faster one on a CPU: it lends versions
where a compiled stretch copies each into its slot and out again."""


class Form(NamedTuple):
    """The form of a run; runs are the same to the bit within one form.

    Attributes:
        compiled: Whether stretches are compiled, or every step is driven from Python.
        worker_axis: How rounds are computed together.
        compute_batch: The most rounds computed together.
    """

    compiled: bool
    worker_axis: WorkerAxis
    compute_batch: int

    def __str__(self) -> str:
        """Return it as the arguments of :func:`~orlomo_jax.simulate`."""
        return ", ".join(f"{name}={value!r}" for name, value in self._asdict().items())

    def engine(self, server: ParameterServer, job: Job) -> Driven | Compiled:
        """Return what carries the job out."""
        if not self.compiled:
            return Driven(server, job)
        return Compiled(server, job, self.worker_axis, self.compute_batch)


def choose(
    compiled: Any, worker_axis: Any, compute_batch: Any, server: ParameterServer, job: Job
) -> Form:
    """Return the form that the arguments of :func:`~orlomo_jax.simulate` lead to.

    Raises:
        ValueError: If an argument is unknown or out of range, or the rounds of a run driven from
            Python were to be computed together.
        TypeError: If ``compute_batch`` is no integer.
    """
    if compiled not in ("auto", True, False):
        raise ValueError(f'`compiled` must be "auto", True or False, got compiled={compiled!r}')
    if worker_axis not in ("auto", "loop", "map", "vmap"):
        raise ValueError(
            '`worker_axis` must be "auto", "loop", "map" or "vmap", '
            f"got worker_axis={worker_axis!r}"
        )
    cap = job.trace.num_workers
    if compute_batch is not None:
        cap = min(cap, check_count("compute_batch", compute_batch, 1))
    if compiled is False and worker_axis in ("map", "vmap"):
        raise ValueError(
            f'`worker_axis` must be "loop" where compiled=False, got worker_axis={worker_axis!r}'
        )
    together = worker_axis in ("map", "vmap")
    cpu = jax.default_backend() == "cpu"
    if compiled == "auto":
        slow = cpu and (_size(server) >= MANY or _convolves(server, job))
        compiled = together or not slow
    if worker_axis == "auto":
        worker_axis = "loop" if not compiled or cpu or _convolves(server, job) else "vmap"
    if worker_axis == "loop":
        return Form(bool(compiled), "loop", 1)
    return Form(True, worker_axis, min(cap, _mean_group(job)))


def _size(server: ParameterServer) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(server.params))


def _convolves(server: ParameterServer, job: Job) -> bool:
    """Return whether the job's rounds convolve; to look costs a trace, so once for each round."""
    seen = _seen(job.round_fn)
    if not seen:
        seen.append(_look(server, job))
    return seen[0]


@lru_cache(maxsize=32)
def _seen(round_fn: Callable) -> list[bool]:
    del round_fn
    return []


def _look(server: ParameterServer, job: Job) -> bool:
    def run(batch_fn, version, key):
        batches = batch_fn(job.data_key, np.int32(0), np.int32(0))
        rate = version.local_learning_rate
        return job.round_fn(version.params, version.model_state, batches, rate, key)

    version = Version(server.params, server.model_state, None, jnp.zeros([]))
    return convolves(run, job.batch_fn, version, job.noise_key)


def _mean_group(job: Job) -> int:
    """Return how many rounds can be computed together, averaged over the run."""
    num_steps = job.trace.num_steps
    starts = group_starts(job.trace.dispatched_at, 0, max(1, num_steps))
    return max(1, round(num_steps / max(1, len(starts))))

"""Checks a custom worker pool; for its test suite."""

from __future__ import annotations

import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from orlomo_jax.methods import METHOD_NAMES, make_method
from orlomo_jax.recording.checkpoint import Checkpointer
from orlomo_jax.recording.history import TrainingResult
from orlomo_jax.runtimes import TaskOutcome, WorkerPool, WorkersLostError, train
from orlomo_jax.simulation.simulate import simulate
from orlomo_jax.worker.host_batches import HostBatches
from orlomo_jax.worker.workload import Workload

_K, _S = 2, 2


def check_worker_pool(pool: WorkerPool, round_timeout: float = 120.0) -> None:
    """Run a small problem on a worker pool, and check the behavior that ``train`` needs.

    - Runs of the paper's four methods, one with :class:`~orlomo_jax.HostBatches`, and one with
      workers that keep their optimizer's state and save it, end, and the simulator repeats each of
      them bit for bit.
    - A worker that replaces a lost one runs the next task.
    - An exception in a first round reaches the caller, and the pool can be used again.
    - A pool that is in a run rejects another one.

    Args:
        pool: The pool; its workers compute on devices of the kind that the simulator uses.
        round_timeout: Seconds until a round without an outcome fails. The worker's start and the
            compilation count too.

    Raises:
        AssertionError: If a check fails; the message says which.

    Example:
        >>> from orlomo_jax import ThreadWorkers
        >>> check_worker_pool(ThreadWorkers())
    """
    for name in METHOD_NAMES:
        _check_replay(pool, name, _batches, round_timeout)
    _check_replay(pool, "orlomo", HostBatches.of(_host_batches), round_timeout)
    with tempfile.TemporaryDirectory() as folder:
        _check_replay(pool, "al_sgd", _batches, round_timeout, optax.scale_by_adam(), folder)
    losing = _check_replay(_Losing(pool), "prsgdm", _batches, round_timeout)  # needs every worker
    kinds = [event.kind for event in losing.trace.events]
    assert kinds == ["lost", "redispatched"], f"one round must be lost, got the events {kinds}"
    _check_exception(pool, round_timeout)
    _check_one_run_at_a_time(pool)
    _check_replay(pool, "orlomo", _batches, round_timeout)  # after an error, too


def _loss(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
    noisy = batch + 0.1 * jax.random.normal(key, batch.shape)
    error = jnp.tanh(noisy @ params["w"]) - 0.5
    count, mean = model_state
    return jnp.mean(error**2), ((count + 1, 0.9 * mean + 0.1 * noisy.mean()), {"error": error[0]})


def _batches(key: Any, worker: Any, round: Any) -> Any:
    return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, worker), round), (_S, 4, 3))


def _host_batches(worker: int, round: int) -> Any:
    return np.random.default_rng([worker, round]).normal(size=(_S, 4, 3)).astype(np.float32)


def _arguments(name: str, batch_fn: Any, optimizer: Any = None) -> tuple:
    method = make_method(name, _K, _S, local_optimizer=optimizer)
    return method, _loss, batch_fn, {"w": jnp.ones((3,))}


_OPTIONS = {"local_learning_rate": 0.1, "model_state": (jnp.int32(0), jnp.float32(0))}


def _train(
    pool: Any, args: tuple, round_timeout: float, folder: str | None = None
) -> TrainingResult:
    return train(
        *args,
        workers=pool,
        num_steps=6 * _K,
        key=jax.random.key(0),
        round_timeout=round_timeout,
        start_timeout=0.0,
        max_failures=1,
        checkpoint=None if folder is None else Checkpointer(folder, every=4),
        **_OPTIONS,
    )


def _check_replay(
    pool: Any,
    name: str,
    batch_fn: Any,
    round_timeout: float,
    optimizer: Any = None,
    folder: str | None = None,
) -> TrainingResult:
    args = _arguments(name, batch_fn, optimizer)
    try:
        real = _train(pool, args, round_timeout, folder)
    except WorkersLostError as error:
        raise AssertionError(f"a run of {name} must finish, got {error!r}") from error
    assert real.status == "finished", f"a run of {name} must finish, got {real.status!r}"
    key = jax.random.key(0)
    again = simulate(*args, trace=real.trace, key=key, engine="eager", **_OPTIONS)
    for part in ("params", "model_state", "rule_state"):
        leaves = (jax.tree.leaves(getattr(run, part)) for run in (real, again))
        for one, other in zip(*leaves, strict=True):
            same = np.array_equal(np.asarray(one), np.asarray(other))
            assert same, f"the simulator must repeat a run of {name} bit for bit, not its {part}"
    assert np.array_equal(real.history.loss, again.history.loss), f"losses of {name} must be equal"
    return real


class _Losing:
    """A pool whose worker 0 loses its first round."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        for name in ("open", "start", "submit", "local_state", "stop", "close"):
            setattr(self, name, getattr(pool, name))

    def wait(self, timeout: float) -> TaskOutcome | None:
        """Return the next outcome, without the report if it is of worker 0's first round."""
        outcome = self._pool.wait(timeout)
        if outcome is None or (outcome.id.worker, outcome.id.round) != (0, 0):
            return outcome
        return TaskOutcome(outcome.id, None, error="lost by check_worker_pool")


def _check_exception(pool: WorkerPool, round_timeout: float) -> None:
    def batches(worker, round):
        if worker == 1:
            raise KeyError("check_worker_pool has no batch for worker 1")
        return _host_batches(worker, round)

    args = _arguments("prsgdm", HostBatches.of(batches))
    try:
        _train(pool, args, round_timeout)
    except KeyError as error:
        if "worker 1" not in str(error):
            raise AssertionError("the exception must be the worker's own") from error
        return
    except WorkersLostError as error:
        raise AssertionError(
            "an exception in a worker's first round must reach the caller"
        ) from error
    raise AssertionError("an exception in a worker's first round must reach the caller")


def _check_one_run_at_a_time(pool: WorkerPool) -> None:
    method, loss_fn, batch_fn, _ = _arguments("orlomo", _batches)
    workload = Workload.of(method.local_round(loss_fn), batch_fn, jax.random.key(0))
    pool.open(workload, _K)
    try:
        try:
            pool.open(workload, _K)
        except RuntimeError:
            return
        raise AssertionError("`open` of a pool that is open must raise RuntimeError")
    finally:
        pool.close()

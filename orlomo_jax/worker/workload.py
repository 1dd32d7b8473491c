"""Defines the workload: batches, local round and finite check as one compiled program."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from orlomo_jax import trees
from orlomo_jax.trees import Array, ArrayLike, PyTree
from orlomo_jax.worker.host_batches import HostBatches
from orlomo_jax.worker.round_parts import check_leading_axis, convolves
from orlomo_jax.worker.step_loop import RoundResult, init_state, keeps_state

_NONE, _ZERO = np.int32(-1), np.int32(0)


def as_batch_fn(batch_fn: Callable) -> Callable:
    """Return a batch function as a ``Partial``, and HostBatches unchanged."""
    return batch_fn if isinstance(batch_fn, HostBatches) else trees.as_partial(batch_fn)


def check_key(key: Any) -> None:
    """Raise TypeError unless ``key`` is a ``jax.random.key``."""
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise TypeError(
            f"`key` must be a jax.random.key such as jax.random.key(0), got key={key!r}"
        )


class RoundInput(NamedTuple):
    """The inputs of a local round.

    Attributes:
        params: w_t, in the dtypes of the model. The server and other tasks share it: do not donate.
        model_state: The server's model state, or None.
        momentum: The starting buffer ũ_0 (PRSGDm), else None.
        local_learning_rate: γ at the server's step, float32[].
        version: How many updates the server's rule had made, int32[].
    """

    params: trees.Params
    model_state: PyTree
    momentum: trees.Params | None
    local_learning_rate: Array
    version: ArrayLike = _ZERO


class RoundMetrics(NamedTuple):
    """What is recorded of a round: means over its local steps.

    Attributes:
        loss: float[].
        metrics: The metrics of ``loss_fn``.
        accepted: Whether the server's rule accepted the report, bool[]; True before it has decided.
    """

    loss: Array | float
    metrics: PyTree
    accepted: ArrayLike = np.True_

    @classmethod
    def of(cls, result: RoundResult) -> RoundMetrics:
        """Return the means over a result's local steps."""
        return cls(result.loss.mean(), jax.tree.map(lambda x: x.mean(0), result.metrics))


class Workload(NamedTuple):
    """The computation of every worker of a run.

    Attributes:
        round_fn: The local round.
        batch_fn: ``batch_fn(data_key, worker, round) -> batches``, a ``Partial``; or
            :class:`~orlomo_jax.HostBatches`.
        data_key: A ``jax.random.key`` for the batches.
        noise_key: A ``jax.random.key`` for the rounds.
        local_steps: S of each worker, which ``batch_fn`` gets as a fourth argument; None if all
            workers have the same.
    """

    round_fn: Callable
    batch_fn: Callable
    data_key: Array
    noise_key: Array
    local_steps: tuple[int, ...] | None = None

    @classmethod
    def of(
        cls,
        round_fn: Callable,
        batch_fn: Callable,
        key: Array,
        num_local_steps: int | tuple[int, ...] = 1,
    ) -> Workload:
        """Split the run's key, and turn the batch function into a ``Partial``."""
        steps = num_local_steps if isinstance(num_local_steps, tuple) else None
        data_key, noise_key = jax.random.split(key)
        return cls(round_fn, as_batch_fn(batch_fn), data_key, noise_key, steps)

    @property
    def keys(self) -> tuple[Array, Array]:
        """The keys of batches and rounds."""
        return self.data_key, self.noise_key

    @property
    def keeps_state(self) -> bool:
        """Whether each worker keeps the state of its optimizer between rounds."""
        return keeps_state(self.round_fn)

    def steps_of(self, worker: int) -> int | None:
        """Return S of a worker; None if all workers have the same."""
        return None if self.local_steps is None else self.local_steps[int(worker)]

    def run(
        self,
        worker: Any,
        round: Any,
        start: RoundInput,
        local_state: PyTree = None,
        step: Any = 0,
        first_nonfinite: Any = _NONE,
    ) -> tuple[RoundResult, RoundMetrics, Array]:
        """Run one round; the simulator and every runtime use the same program.

        Args:
            worker: k.
            round: The number of tasks that the worker was sent before.
            start: The round's inputs.
            local_state: The state of the worker's optimizer; None is a new one.
            step: The server's step, which ``first_nonfinite`` becomes if this round is the first.
            first_nonfinite: The step of the first non-finite round so far, −1 for none.

        Returns:
            The result, its metrics, and the new ``first_nonfinite``.
        """
        args = self._arguments(worker, round, start, local_state, step, first_nonfinite)
        return self._program(worker)(*args)

    def compile(self, worker: int, round: int, start: RoundInput) -> None:
        """Compile the program of :meth:`run` without running it."""
        args = self._arguments(worker, round, start, None, 0, _NONE)
        self._program(worker).lower(*args).compile()

    def init_state(self, start: RoundInput) -> PyTree:
        """Return a new state of a worker's optimizer; None if the workers do not keep one."""
        return _init_program(self.round_fn)(start.params)

    def shapes(self, start: RoundInput) -> tuple[RoundResult, RoundMetrics]:
        """Return the shapes of a round's result and metrics, without computing them."""
        args = self._arguments(0, 0, start, None, 0, _NONE)
        result, metrics, _ = jax.eval_shape(self._program(0), *args)
        return result, metrics

    def close(self) -> None:
        """End the threads that read batches on the host."""
        if isinstance(self.batch_fn, HostBatches):
            self.batch_fn.close()

    def convolves(self, start: RoundInput) -> bool:
        """Return whether a round contains a convolution; trace each round function once."""
        batch_fn, start, *_ = self._arguments(0, 0, start, None, 0, _NONE)
        batches = jax.eval_shape(
            partial(make_batches, batch_fn, self.steps_of(0)), self.data_key, _ZERO, _ZERO
        )
        args = jax.eval_shape(lambda *args: args, start, batches, self.noise_key)
        leaves, structure = jax.tree.flatten(args)
        return _convolves(self.round_fn, structure, tuple(leaves))

    def _program(self, worker: int) -> jax.stages.Wrapped:
        return round_program(self.round_fn, self.steps_of(worker))

    def _arguments(self, worker, round, start, local_state, step, first_nonfinite) -> tuple:
        batch_fn = self.batch_fn
        if isinstance(batch_fn, HostBatches):
            batch_fn = batch_fn.argument(worker, round)
        if local_state is None:
            local_state = self.init_state(start)
        counts = (np.int32(worker), np.int32(round), np.int32(step))
        keys = (self.data_key, self.noise_key)
        return (batch_fn, start, local_state, *keys, *counts, first_nonfinite)


@lru_cache(maxsize=32)
def _convolves(round_fn: Callable, structure: Any, leaves: tuple[Any, ...]) -> bool:
    (params, model_state, momentum, rate, _), batches, key = jax.tree.unflatten(structure, leaves)
    run = partial(round_fn, momentum=momentum)
    return convolves(run, params, model_state, batches, rate, key)


@lru_cache(maxsize=64)
def _init_program(round_fn: Callable) -> Callable:
    if not keeps_state(round_fn):
        return lambda params: None
    return jax.jit(partial(init_state, round_fn))


def make_batches(batch_fn: Callable, steps: int | None, key: Array, worker: Any, round: Any) -> Any:
    """Return a round's batches; ``steps`` is S if it differs between workers.

    The round only knows the S of all workers, so the number of this worker is checked here.
    """
    if steps is None:
        return batch_fn(key, worker, round)
    batches = batch_fn(key, worker, round, steps)
    check_leading_axis(batches, steps)
    return batches


@lru_cache(maxsize=64)
def round_program(round_fn: Callable, steps: int | None = None) -> jax.stages.Wrapped:
    """Return batches, round and finite check as one compiled program; see :meth:`Workload.run`.

    Args:
        round_fn: The local round.
        steps: S, if it differs between workers.
    """

    @jax.jit
    def run_round(
        batch_fn, start, local_state, data_key, noise_key, worker, round, step, first_nonfinite
    ):
        params, model_state, momentum, rate, _ = start
        batches = make_batches(batch_fn, steps, data_key, worker, round)
        key = jax.random.fold_in(jax.random.fold_in(noise_key, worker), round)
        kept = {} if local_state is None else {"local_state": local_state}
        result = round_fn(params, model_state, batches, rate, key, momentum=momentum, **kept)
        is_first = (first_nonfinite < 0) & ~result.finite
        return result, RoundMetrics.of(result), jnp.where(is_first, step, first_nonfinite)

    return run_round

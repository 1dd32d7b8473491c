"""Defines the workload: batches, local round and finite check as one compiled program."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from orlomo_jax import trees
from orlomo_jax.trees import Array, PyTree
from orlomo_jax.worker.host_batches import HostBatches
from orlomo_jax.worker.local_round import RoundResult, convolves

_NONE = np.int32(-1)


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
    """

    params: trees.Params
    model_state: PyTree
    momentum: trees.Params | None
    local_learning_rate: Array


class RoundMetrics(NamedTuple):
    """Means over the local steps of a round.

    Attributes:
        loss: float[].
        metrics: The metrics of ``loss_fn``.
    """

    loss: Array | float
    metrics: PyTree

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
    """

    round_fn: Callable
    batch_fn: Callable
    data_key: Array
    noise_key: Array

    @classmethod
    def of(cls, round_fn: Callable, batch_fn: Callable, key: Array) -> Workload:
        """Split the run's key, and turn the batch function into a ``Partial``."""
        return cls(round_fn, as_batch_fn(batch_fn), *jax.random.split(key))

    @property
    def keys(self) -> tuple[Array, Array]:
        """The keys of batches and rounds."""
        return self.data_key, self.noise_key

    def run(
        self,
        worker: Any,
        round: Any,
        start: RoundInput,
        step: Any = 0,
        first_nonfinite: Any = _NONE,
    ) -> tuple[RoundResult, RoundMetrics, Array]:
        """Run one round; the simulator and every runtime use the same program.

        Args:
            worker: k.
            round: The number of tasks that the worker was sent before.
            start: The round's inputs.
            step: The server's step, which ``first_nonfinite`` becomes if this round is the first.
            first_nonfinite: The step of the first non-finite round so far, −1 for none.

        Returns:
            The result, its metrics, and the new ``first_nonfinite``.
        """
        return self._program(*self._arguments(worker, round, start, step, first_nonfinite))

    def compile(self, worker: int, round: int, start: RoundInput) -> None:
        """Compile the program of :meth:`run` without running it."""
        self._program.lower(*self._arguments(worker, round, start, 0, _NONE)).compile()

    def shapes(self, start: RoundInput) -> tuple[RoundResult, RoundMetrics]:
        """Return the shapes of a round's result and metrics, without computing them."""
        result, metrics, _ = jax.eval_shape(self._program, *self._arguments(0, 0, start, 0, _NONE))
        return result, metrics

    def close(self) -> None:
        """End the threads that read batches on the host."""
        if isinstance(self.batch_fn, HostBatches):
            self.batch_fn.close()

    def convolves(self, start: RoundInput) -> bool:
        """Return whether a round contains a convolution; trace each round function once."""
        batch_fn, start, *_ = self._arguments(0, 0, start, 0, _NONE)
        batches = jax.eval_shape(batch_fn, self.data_key, np.int32(0), np.int32(0))
        args = jax.eval_shape(lambda *args: args, start, batches, self.noise_key)
        leaves, structure = jax.tree.flatten(args)
        return _convolves(self.round_fn, structure, tuple(leaves))

    @property
    def _program(self) -> jax.stages.Wrapped:
        return round_program(self.round_fn)

    def _arguments(self, worker, round, start, step, first_nonfinite) -> tuple:
        batch_fn = self.batch_fn
        if isinstance(batch_fn, HostBatches):
            batch_fn = batch_fn.argument(worker, round)
        counts = (np.int32(worker), np.int32(round), np.int32(step))
        return (batch_fn, start, self.data_key, self.noise_key, *counts, first_nonfinite)


@lru_cache(maxsize=32)
def _convolves(round_fn: Callable, structure: Any, leaves: tuple[Any, ...]) -> bool:
    (params, model_state, momentum, rate), batches, key = jax.tree.unflatten(structure, leaves)
    run = partial(round_fn, momentum=momentum)
    return convolves(run, params, model_state, batches, rate, key)


@lru_cache(maxsize=32)
def round_program(round_fn: Callable) -> jax.stages.Wrapped:
    """Return batches, round and finite check as one compiled program; see :meth:`Workload.run`."""

    @jax.jit
    def run_round(batch_fn, start, data_key, noise_key, worker, round, step, first_nonfinite):
        params, model_state, momentum, rate = start
        batches = batch_fn(data_key, worker, round)
        key = jax.random.fold_in(jax.random.fold_in(noise_key, worker), round)
        result = round_fn(params, model_state, batches, rate, key, momentum=momentum)
        is_first = (first_nonfinite < 0) & ~result.finite
        return result, RoundMetrics.of(result), jnp.where(is_first, step, first_nonfinite)

    return run_round

"""A worker's whole answer to a task as one compiled program, the same in every runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from orlomo_jax.worker import RoundResult, all_finite

if TYPE_CHECKING:
    from jaxtyping import Array, Float, PyTree


class RoundMetrics(NamedTuple):
    """What a round tells of itself: means over its local steps.

    Attributes:
        loss: float[].
        metrics: Those of ``loss_fn``.
    """

    loss: Float[Array, ""]
    metrics: PyTree[Array]

    @classmethod
    def of(cls, result: RoundResult) -> RoundMetrics:
        """Return the means of a result."""
        return cls(result.loss.mean(), jax.tree.map(lambda x: x.mean(0), result.metrics))


@lru_cache(maxsize=32)
def fused_round(round_fn: Callable) -> jax.stages.Wrapped:
    """Return batches, round and finite check as one compiled program, kept for a sweep's runs.

    Simulator and real runtimes run this same program, so that a replay can be exact to the bit.
    ``first_bad`` is the step of the first non-finite round so far, −1 for none; it comes back with
    this round counted in.
    """

    @jax.jit
    def run_round(
        batch_fn,
        params,
        model_state,
        momentum,
        local_learning_rate,
        data_key,
        noise_key,
        worker,
        round,
        step,
        first_bad,
    ):
        batches = batch_fn(data_key, worker, round)
        key = jax.random.fold_in(jax.random.fold_in(noise_key, worker), round)
        result = round_fn(params, model_state, batches, local_learning_rate, key, momentum=momentum)
        first_bad = jnp.where((first_bad < 0) & ~result.finite, step, first_bad)
        return result, RoundMetrics.of(result), first_bad

    return run_round


@dataclass(frozen=True)
class NarrowRound:
    """See :func:`narrow_reports`."""

    round_fn: Callable[..., RoundResult]
    wire_dtype: Any

    def __call__(self, *args: Any, **kwargs: Any) -> RoundResult:
        """Return the round's result, Δw and Δu rounded."""
        info = jnp.finfo(self.wire_dtype)

        def leaf(x):  # a cast there and back would be optimised away
            fits = wire_dtype(x.dtype, self.wire_dtype) != x.dtype
            return jax.lax.reduce_precision(x, info.nexp, info.nmant) if fits else x

        result = self.round_fn(*args, **kwargs)
        update = jax.tree.map(leaf, result.update)  # which may overflow
        return result._replace(update=update, finite=result.finite & all_finite(update))


def narrow_reports(round_fn: Callable[..., RoundResult], dtype: Any) -> NarrowRound:
    """Return a round that rounds Δw and Δu to ``dtype``, and reports them in the leaves' own.

    :class:`~orlomo_jax.RayWorkers` sends them over the wire in ``dtype``, which loses nothing more:
    the simulator and all runtimes give the same with the same round.

    Args:
        round_fn: As from :func:`~orlomo_jax.local_momentum_sgd`.
        dtype: A floating dtype; leaves that are no wider stay as they are.

    Raises:
        TypeError: If ``dtype`` is not floating.

    Example:
        >>> from orlomo_jax import local_momentum_sgd
        >>> def loss_fn(params, model_state, batch, key):
        ...     return jnp.sum(params * batch), (model_state, {})
        >>> round_fn = narrow_reports(local_momentum_sgd(loss_fn, 1), jnp.bfloat16)
        >>> batches = jnp.full((1, 1), 1.001)
        >>> round_fn(jnp.zeros(1), None, batches, 1.0, jax.random.key(0)).update.delta
        Array([1.], dtype=float32)
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`dtype` must be a floating dtype, got dtype={dtype!r}")
    return NarrowRound(round_fn, jnp.dtype(dtype))


def wire_dtype(dtype: Any, narrow: Any) -> Any:
    """Return the narrower of a real floating leaf's dtype and ``narrow``, else the leaf's own."""
    fits = jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(narrow).itemsize < dtype.itemsize
    return narrow if fits else dtype


def check_key(key: Any) -> None:
    """Raise TypeError unless ``key`` is a ``jax.random.key``."""
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise TypeError(f"`key` must be a jax.random.key, got key={key!r}")

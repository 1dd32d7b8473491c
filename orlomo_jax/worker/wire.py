"""Rounds the reports of a local round to a narrower dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from orlomo_jax.trees import all_finite
from orlomo_jax.worker.step_loop import RoundResult, init_state, keeps_state


@dataclass(frozen=True)
class CastRound:
    """See :func:`cast_reports`."""

    round_fn: Callable[..., RoundResult]
    wire_dtype: Any

    def init_state(self, params: Any) -> Any:
        """Return a new state of the round's optimizer."""
        return init_state(self.round_fn, params)

    @property
    def keep_state(self) -> bool:
        """Whether the round keeps the state of its optimizer."""
        return keeps_state(self.round_fn)

    def __call__(self, *args: Any, **kwargs: Any) -> RoundResult:
        """Return the round's result with rounded Δw and Δu."""
        info = jnp.finfo(self.wire_dtype)

        def leaf(x):  # XLA would remove a cast to the dtype and back
            fits = wire_dtype(x.dtype, self.wire_dtype) != x.dtype
            return jax.lax.reduce_precision(x, info.nexp, info.nmant) if fits else x

        result = self.round_fn(*args, **kwargs)
        update = jax.tree.map(leaf, result.update)  # may overflow
        return result._replace(update=update, finite=result.finite & all_finite(update))


def cast_reports(round_fn: Callable[..., RoundResult], dtype: Any) -> CastRound:
    """Return a round that rounds Δw and Δu to ``dtype``, but keeps the dtypes of the leaves.

    :class:`~orlomo_jax.RayWorkers` sends them in ``dtype``, without further loss. The simulator and
    all runtimes give the same results with the same round.

    Args:
        round_fn: A local round, for example of :func:`~orlomo_jax.local_momentum_sgd`.
        dtype: A floating dtype; leaves that are not wider are unchanged.

    Raises:
        TypeError: If ``dtype`` is not floating.

    Example:
        >>> from orlomo_jax import local_momentum_sgd
        >>> def loss_fn(params, model_state, batch, key):
        ...     return jnp.sum(params * batch), (model_state, {})
        >>> round_fn = cast_reports(local_momentum_sgd(loss_fn, 1), jnp.bfloat16)
        >>> batches = jnp.full((1, 1), 1.001)
        >>> round_fn(jnp.zeros(1), None, batches, 1.0, jax.random.key(0)).update.delta
        Array([1.], dtype=float32)
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`dtype` must be a floating dtype, got dtype={dtype!r}")
    return CastRound(round_fn, jnp.dtype(dtype))


def wire_dtype(dtype: Any, narrow: Any) -> Any:
    """Return ``narrow`` if ``dtype`` is real, floating and wider, else ``dtype``."""
    fits = jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(narrow).itemsize < dtype.itemsize
    return narrow if fits else dtype

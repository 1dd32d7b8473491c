"""Defines rounds that shorten their reports, and how worker pools send such reports.

A round that shortens its reports has an attribute ``wire``, a :class:`Wire`. The round itself
returns float32 arrays, so every engine and runtime gets the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from orlomo_jax.rules import LocalUpdate
from orlomo_jax.trees import all_finite
from orlomo_jax.worker.int8_blocks import Int8Blocks, decode_on_host, encode, is_smaller
from orlomo_jax.worker.step_loop import RoundResult, init_state, keeps_state


class Wire(Protocol):
    """The form in which reports of a round are sent over a network, without further loss."""

    def pack(self, update: LocalUpdate, /) -> Any:
        """Return a round's Δw and Δu, JAX arrays, as a tree of arrays with fewer bytes."""
        ...

    def unpack(self, packed: Any, dtypes: list[Any], /) -> LocalUpdate:
        """Return Δw and Δu as NumPy arrays.

        Args:
            packed: The result of :meth:`pack`, as NumPy arrays.
            dtypes: The dtype of each leaf of Δw; those of Δu are the same.
        """
        ...


def wire_of(round_fn: Callable[..., RoundResult]) -> Wire | None:
    """Return the form of a round's reports on the network; None if they are sent as they are."""
    return getattr(round_fn, "wire", None)


@dataclass(frozen=True)
class NarrowWire:
    """Leaves in a narrower dtype; see :func:`cast_reports`."""

    dtype: Any

    def pack(self, update: LocalUpdate, /) -> Any:
        """Return the leaves in the narrow dtype."""
        narrow = lambda x: np.asarray(x).astype(wire_dtype(x.dtype, self.dtype))  # noqa: E731
        return jax.tree.map(narrow, update)

    def unpack(self, packed: Any, dtypes: list[Any], /) -> LocalUpdate:
        """Return the leaves in their own dtypes."""
        return _map_leaves(lambda x, dtype: x.astype(dtype), packed, dtypes)


@dataclass(frozen=True)
class Int8Wire:
    """Leaves as int8 with one float32 scale per block; see :func:`quantize_reports`."""

    block: int

    def pack(self, update: LocalUpdate, /) -> Any:
        """Return codes and scales; very small and complex leaves stay."""
        return _encode_all(update, self.block)

    def unpack(self, packed: Any, dtypes: list[Any], /) -> LocalUpdate:
        """Return the leaves in their own dtypes."""

        def leaf(x, dtype):
            return decode_on_host(x, self.block, dtype) if isinstance(x, Int8Blocks) else x

        return _map_leaves(leaf, packed, dtypes)


@partial(jax.jit, static_argnums=1)
def _encode_all(update: LocalUpdate, block: int) -> Any:
    leaf = lambda x: encode(x, block) if is_smaller(x.size, x.dtype, block) else x  # noqa: E731
    return jax.tree.map(leaf, update)


def _map_leaves(function: Callable[[Any, Any], Any], packed: Any, dtypes: list[Any]) -> Any:
    """Map the leaves of a packed update, each with its dtype."""
    leaves, structure = jax.tree.flatten(packed, is_leaf=lambda x: isinstance(x, Int8Blocks))
    dtypes = dtypes * (len(leaves) // max(len(dtypes), 1))
    return jax.tree.unflatten(structure, map(function, leaves, dtypes))


@dataclass(frozen=True)
class CastRound:
    """See :func:`cast_reports`."""

    round_fn: Callable[..., RoundResult]
    wire_dtype: Any

    @property
    def wire(self) -> NarrowWire:
        """How reports are sent."""
        return NarrowWire(self.wire_dtype)

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

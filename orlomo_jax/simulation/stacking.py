"""Stacks trees of arrays, and reads and writes one of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from orlomo_jax.trees import Array


def cast_like(x: Array, old: Array) -> Array:
    """Return an array in the dtype of another."""
    return x if x.dtype == old.dtype else x.astype(old.dtype)


def take(many: Any, index: Any) -> Any:
    """Return one of stacked trees."""
    at = partial(jax.lax.dynamic_index_in_dim, index=index, keepdims=False)
    return jax.tree.map(at, many)


def put(many: Any, one: Any, index: Any) -> Any:
    """Return stacked trees with one tree written to an index."""
    return jax.tree.map(
        lambda many, one: jax.lax.dynamic_update_index_in_dim(many, one, index, 0), many, one
    )


read = jax.jit(take)
write_to = jax.jit(put, donate_argnums=0)


@jax.jit
def copy(tree: Any) -> Any:
    """Return a copy of a tree, made by one program."""
    return jax.tree.map(jnp.copy, tree)


@jax.jit
def stack(trees: Sequence[Any]) -> Any:
    """Return trees of one structure as one tree, whose leaves have a leading axis of trees."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@partial(jax.jit, static_argnums=1)
def repeat(start: Any, count: int) -> Any:
    """Return ``count`` copies of a tree, stacked."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), start)

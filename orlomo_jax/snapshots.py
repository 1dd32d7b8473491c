"""Trees in a snapshot: lists of the leaves that have an entry, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from orlomo_jax.rules import contract

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, PyTree


def content(tree: PyTree[Array]) -> list[Array]:
    """Return the leaves that have an entry: of the others a checkpoint has nothing to hold."""
    return [leaf for leaf in jax.tree.leaves(tree) if leaf.size]


def filled(name: str, like: PyTree[Array], leaves: list[ArrayLike] | None) -> PyTree[Array]:
    """Return a tree like ``like`` of leaves that :func:`content` returned, each placed as its like.

    Raises:
        ValueError: If there are more or fewer, or one has another shape or dtype.

    Example:
        >>> like = {"a": jnp.ones(2), "none": jnp.ones(0)}
        >>> filled("params", like, [jnp.zeros(2)])["a"]
        Array([0., 0.], dtype=float32)
    """
    wanted, structure = jax.tree.flatten(like)
    there: Any = leaves or []
    if len(there) != len(content(like)):
        raise ValueError(
            f"the snapshot's `{name}` must have {len(content(like))} leaves, got {len(there)}"
        )
    there = iter(there)
    tree = jax.tree.unflatten(
        # A leaf without entries is made anew: one that the trees of a server share is donated once.
        structure,
        [_placed(next(there) if x.size else np.zeros(x.shape, x.dtype), x) for x in wanted],
    )
    contract.check_like(name, tree, like, dtypes=True)
    return tree


def _placed(value: ArrayLike, like: Array) -> Array:
    return jax.device_put(value, like.sharding) if like.committed else jnp.asarray(value)

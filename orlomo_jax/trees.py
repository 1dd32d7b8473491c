"""Computes with pytrees, checks them, and names array types."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Array: TypeAlias = jax.Array
ArrayLike: TypeAlias = jax.typing.ArrayLike
PyTree: TypeAlias = Any
"""A tree of arrays."""
Params: TypeAlias = Any
"""A tree of floating arrays."""


def combine(terms: Sequence[tuple[Array | float, Params]], like: Params) -> Params:
    """Return Σ coefficient · tree, leaf by leaf, in the dtypes of ``like``.

    The sum is computed in float32 or wider and rounded once, so that bfloat16 trees are not rounded
    between the terms.
    """
    coefficients = [coefficient for coefficient, _ in terms]

    def leaf(reference, *leaves):
        dtype = wide_dtype(*leaves)
        scalar_dtype = jnp.finfo(dtype).dtype  # a complex leaf's scalars are real
        total = sum(
            jnp.asarray(c, scalar_dtype) * jnp.asarray(x, dtype)
            for c, x in zip(coefficients, leaves, strict=True)
        )
        return jnp.asarray(total, jnp.result_type(reference))

    return jax.tree.map(leaf, like, *(tree for _, tree in terms))


def wide_dtype(*leaves: ArrayLike) -> Any:
    """Return the widest dtype of the leaves, at least float32; weak types count like others."""
    return widest(jnp.float32, *(jnp.asarray(x).dtype for x in leaves))


def widest(*dtypes: Any) -> Any:
    """Return the dtype that these promote to, independent of JAX's promotion mode.

    Example:
        >>> widest(jnp.bfloat16, jnp.float32)
        dtype('float32')
    """
    with jax.numpy_dtype_promotion("standard"):  # in "strict" mode promotion raises
        return reduce(jnp.promote_types, map(jnp.dtype, dtypes))


def widened(tree: Params) -> Params:
    """Return a tree with narrower floating leaves cast to float32."""

    def leaf(x):
        x = x if isinstance(x, jax.Array) else jnp.asarray(x)
        wide = widest(jnp.float32, x.dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else x.dtype
        return x if x.dtype == wide else x.astype(wide)

    return jax.tree.map(leaf, tree)


def zeros(params: Params, accumulator_dtype: Any = None) -> Params:
    """Return zeros like ``params``, in ``accumulator_dtype`` if it is wider; check the leaves."""
    check_floating("params", params)

    def leaf(x):
        dtype = jnp.result_type(x)
        if accumulator_dtype is not None:
            dtype = widest(dtype, accumulator_dtype)
        return jnp.zeros_like(x, dtype=dtype)

    return jax.tree.map(leaf, params)


def check_floating(name: str, tree: Params) -> None:
    """Raise TypeError unless every leaf is floating or complex; the message names the path."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            where = f"{name}{jax.tree_util.keystr(path)}"
            raise TypeError(f"`{name}` must have floating leaves, got {dtype} at {where}")


def check_numbers(name: str, tree: Any) -> None:
    """Raise TypeError unless every leaf is an array of numbers or flags."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        dtype = jnp.result_type(leaf)
        if not (jnp.issubdtype(dtype, jnp.number) or dtype == jnp.bool_):
            where = f"{name}{jax.tree_util.keystr(path)}"
            raise TypeError(f"`{name}` must have numeric leaves, got {dtype} at {where}")


def check_like(name: str, tree: Params, like: Params, *, dtypes: bool = False) -> None:
    """Raise ValueError unless ``tree`` has the structure, shapes (and dtypes) of ``like``."""
    structure, expected = jax.tree.structure(tree), jax.tree.structure(like)
    if structure != expected:
        raise ValueError(f"`{name}` must have the structure {expected}, got {structure}")
    for (path, leaf), reference in zip(
        jax.tree.leaves_with_path(tree), jax.tree.leaves(like), strict=True
    ):
        where = f"{name}{jax.tree_util.keystr(path)}"
        if np.shape(leaf) != np.shape(reference):
            wanted = np.shape(reference)
            raise ValueError(f"`{where}` must have shape {wanted}, got shape {np.shape(leaf)}")
        if dtypes and (dtype := own_dtype(leaf)) != own_dtype(reference):
            raise ValueError(f"`{where}` must be {own_dtype(reference)}, got {dtype}")


def own_dtype(leaf: Any) -> np.dtype:
    """Return a leaf's own dtype: float64 for a NumPy array even if JAX would narrow it."""
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


@partial(jax.jit, inline=True)
def all_finite(tree: PyTree) -> Array:
    """Return whether no floating leaf of ``tree`` has a NaN or an Inf, bool[].

    Example:
        >>> bool(all_finite({"a": jnp.ones(2), "b": jnp.array(jnp.inf)}))
        False
    """
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    # Inf − Inf and NaN − NaN are NaN; on a CPU this is much faster than isfinite.
    return jnp.stack([jnp.sum(x - x) == 0 for x in leaves]).all() if leaves else jnp.array(True)


def as_partial(function: Callable) -> jax.tree_util.Partial:
    """Return the function as a ``Partial``, a pytree; keep one, because nesting hides arrays."""
    is_one = isinstance(function, jax.tree_util.Partial)
    return function if is_one else jax.tree_util.Partial(function)

"""Converts the metrics of rounds to rows of a journal and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from orlomo_jax.trees import PyTree


def as_row(metrics: PyTree) -> list[Any]:
    """Return the leaves as JSON-able nested lists, of strings if a leaf has a NaN or an Inf.

    Example:
        >>> as_row({"accuracy": np.float32(0.5), "norms": np.array([1.0, np.inf])})
        [0.5, ['1.0', 'inf']]
    """
    return [_plain(np.asarray(leaf)) for leaf in jax.tree.leaves(metrics)]


def stacked(rows: Sequence[Sequence[Any]], like: PyTree) -> PyTree:
    """Return rows as a tree of arrays with a leading axis of rows; an empty row becomes NaN.

    Args:
        rows: Rows of :func:`as_row`.
        like: The shapes and dtypes of a round's metrics.

    Raises:
        ValueError: If the number of leaves or a shape differs.

    Example:
        >>> like = {"accuracy": jax.ShapeDtypeStruct((), np.float32)}
        >>> stacked([[0.5], ["nan"]], like)
        {'accuracy': array([0.5, nan], dtype=float32)}
    """
    leaves, structure = jax.tree.flatten(like)
    if wrong := [row for row in rows if len(row) not in (0, len(leaves))]:
        raise ValueError(f"a step must have loss_fn's {len(leaves)} metrics, got {wrong[0]}")
    columns = [
        _column([row[index] if row else None for row in rows], leaf)
        for index, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, columns)


def _plain(x: np.ndarray) -> Any:
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = np.stack([np.real(x), np.imag(x)], axis=-1)
    x = x.astype(float)  # exact
    return x.tolist() if np.isfinite(x).all() else x.astype(str).tolist()


def _column(values: list[Any], like: Any) -> np.ndarray:
    is_complex = jnp.issubdtype(like.dtype, jnp.complexfloating)
    shape = (*like.shape, 2) if is_complex else like.shape
    column = np.full((len(values), *shape), np.nan)
    for index, value in enumerate(values):
        if value is not None:
            column[index] = np.array(value, float).reshape(shape)
    if is_complex:
        column = column[..., 0] + 1j * column[..., 1]
    return column.astype(like.dtype)

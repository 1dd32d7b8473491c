"""Checks the optax transformation of a local round, and its state."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import optax

from orlomo_jax import trees
from orlomo_jax.trees import PyTree

_PROBES = 3
"""Steps of the probe; a schedule may start with a rate of 0."""


def check_optimizer(optimizer: Any) -> None:
    """Raise unless this is an optax transformation that returns an ascent direction."""
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(f"`optimizer` must be an optax transformation, got optimizer={optimizer!r}")
    check_ascends(optimizer)


@lru_cache(maxsize=64)
def check_ascends(optimizer: optax.GradientTransformation) -> None:
    """Raise if a transformation returns a descent direction, or needs unknown arguments.

    It is tried on one small matrix, with a loss of 1. A transformation that does not accept it, for
    example one with a mask for other parameters, is not checked.

    Example:
        >>> check_ascends(optax.scale_by_adam())
    """
    gradient = jnp.array([[1.0, 0.5], [0.25, 1.0]])
    params = jnp.zeros((2, 2))
    try:
        state = optimizer.init(params)
        products = []
        for _ in range(_PROBES):
            direction, state = transformed(optimizer, gradient, state, params, jnp.float32(1))
            products.append(float(jnp.vdot(direction, gradient)))  # pyright: ignore
    except Exception as error:
        if isinstance(error, TypeError) and "required keyword-only argument" in str(error):
            raise TypeError(
                "`optimizer` must not need arguments other than `value`, the loss, got one that "
                f"does: {error}"
            ) from None
        # It needs other parameters; the first round will raise the full error.
        return
    if min(products) < 0:
        raise ValueError(
            "`optimizer` must return an ascent direction without a learning rate, got one that "
            "descends: pass for example optax.chain(optax.scale_by_adam(), "
            "optax.add_decayed_weights(0.1)) instead of optax.adamw(…), and γ as "
            "`local_learning_rate`"
        )


def transformed(
    optimizer: optax.GradientTransformation, gradient: PyTree, state: Any, params: PyTree, loss: Any
) -> tuple[PyTree, Any]:
    """Return the direction and the new state; a transformation may read the loss as ``value``."""
    value = trees.widened(loss)
    return optax.with_extra_args_support(optimizer).update(gradient, state, params, value=value)


def as_strong(tree: PyTree) -> PyTree:
    """Return the leaves as arrays with strong types, so that each round has the same types."""
    return jax.tree.map(lambda x: jnp.asarray(x).astype(jnp.result_type(x)), tree)


def check_kept(new: Any, old: Any) -> Any:
    """Return an optimizer's new state in the dtypes of the old one.

    Raises:
        ValueError: If a structure or shape differs; the message names the leaf.
    """
    structure, expected = jax.tree.structure(new), jax.tree.structure(old)
    if structure != expected:
        raise ValueError(
            f"the state of `optimizer` must keep its structure {expected}, got {structure}"
        )
    for (path, x), y in zip(jax.tree.leaves_with_path(new), jax.tree.leaves(old), strict=True):
        if jnp.shape(x) != jnp.shape(y):
            where = jax.tree_util.keystr(path)
            raise ValueError(
                f"the state of `optimizer` must keep its shapes, got {jnp.shape(x)} at {where} "
                f"instead of {jnp.shape(y)}"
            )
    return jax.tree.map(lambda x, y: jnp.asarray(x).astype(y.dtype), new, old)

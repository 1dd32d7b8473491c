"""Checks and splits the inputs of a local round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from orlomo_jax import trees
from orlomo_jax.trees import Array, PyTree


class Split:
    """Splits trees like params into trained and frozen leaves."""

    def __init__(self, params: trees.Params, frozen: list[bool] | None) -> None:
        """Take the parameters, and for each leaf whether it is frozen."""
        self._leaves, self._structure = jax.tree.flatten(params)
        self._frozen = [False] * len(self._leaves) if frozen is None else frozen

    def trained(self, tree: PyTree) -> list[Array]:
        """Return the trained leaves of a tree like params."""
        leaves = jax.tree.leaves(tree)
        return [x for x, frozen in zip(leaves, self._frozen, strict=True) if not frozen]

    def rounded(self, trained: list[Array]) -> list[Array]:
        """Return trained leaves in the dtypes of params, as ``loss_fn`` gets them."""
        wanted = self.trained(self._leaves)
        return [x.astype(like.dtype) for x, like in zip(trained, wanted, strict=True)]

    def optional(self, trained: list[Any]) -> trees.Params:
        """Return a tree like params from trained leaves, with MaskedNode for the other leaves.

        So an optax transformation has no state for them.
        """
        trained_leaves = iter(trained)
        leaves = [optax.MaskedNode() if f else next(trained_leaves) for f in self._frozen]
        return jax.tree.unflatten(self._structure, leaves)

    def whole(
        self, trained: list[Any], frozen: Callable[[Array], Array] = lambda x: x
    ) -> trees.Params:
        """Return a tree like params from trained leaves; ``frozen`` maps the other leaves."""
        trained_leaves = iter(trained)
        leaves = [
            frozen(x) if is_frozen else next(trained_leaves)
            for x, is_frozen in zip(self._leaves, self._frozen, strict=True)
        ]
        return jax.tree.unflatten(self._structure, leaves)


def is_zero(value: Any) -> bool:
    """Return whether a value is the Python number 0."""
    return isinstance(value, int | float) and value == 0


def check_loss(result: Any, model_state: PyTree) -> Any:
    """Return the result of ``loss_fn``; raise if its form is wrong."""
    wanted = "`loss_fn` must return (loss, (model_state, metrics))"
    if not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(f"{wanted}, got {type(result).__name__}")
    loss, aux = result
    if not (isinstance(aux, tuple) and len(aux) == 2):
        raise TypeError(f"{wanted}, got (loss, {type(aux).__name__})")
    if np.shape(loss) != ():
        raise ValueError(f"{wanted} with a scalar loss, got a loss of shape {np.shape(loss)}")
    trees.check_like("loss_fn's model_state", aux[0], model_state)
    return result


def convolves(function: Callable, *args: Any) -> bool:
    """Return whether a function contains a convolution; its arguments may be abstract.

    Example:
        >>> import jax.numpy as jnp
        >>> convolves(jnp.convolve, jnp.ones(3), jnp.ones(2)), convolves(jnp.dot, 1.0, 1.0)
        (True, False)
    """
    return "conv_general_dilated" in str(jax.make_jaxpr(function)(*args))


def choose_unroll(
    unroll: int | bool | None, local_step: Callable, carry: Any, steps: Any
) -> int | bool:
    """Return ``unroll``, or its default; see :func:`local_momentum_sgd`."""
    if unroll is not None:
        return unroll
    if jax.default_backend() != "cpu":
        return 1
    first = jax.tree.map(lambda x: x[0], steps)
    return True if convolves(local_step, carry, first) else 1


def check_leading_axis(batches: PyTree, num_local_steps: int | tuple[int, ...]) -> int:
    """Return the steps of a round: the leading axis of its batches; raise unless it is S."""
    wanted = num_local_steps if isinstance(num_local_steps, tuple) else (num_local_steps,)
    first: int | None = wanted[0] if len(set(wanted)) == 1 else None
    for path, leaf in jax.tree.leaves_with_path(batches):
        shape = np.shape(leaf)
        if first is None and shape and shape[0] in wanted:
            first = int(shape[0])
        if shape[:1] != (first,):
            expected = first if first is not None else f"one of {sorted(set(wanted))}"
            raise ValueError(
                f"`batches{jax.tree_util.keystr(path)}` must have a leading axis of "
                f"num_local_steps={expected}, got shape {shape}"
            )
    if first is None:
        raise ValueError(
            f"`batches` must have a leaf with a leading axis of num_local_steps={wanted}, got none"
        )
    return first

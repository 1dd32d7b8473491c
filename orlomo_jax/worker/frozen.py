"""Defines the mask of frozen parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from orlomo_jax.trees import PyTree


class Mask(NamedTuple):
    """A hashable tree of bools, or a function that maps params to such a tree.

    Attributes:
        function: The function, or None.
        values: The bools of the tree.
        structure: The tree's structure.

    Example:
        >>> mask = Mask.of({"backbone": True, "head": False})
        >>> mask.leaves({"backbone": [1.0, 2.0], "head": 3.0})
        [True, True, False]
    """

    function: Callable[[Any], Any] | None
    values: tuple[bool, ...] = ()
    structure: Any = None

    @classmethod
    def of(cls, frozen: Any) -> Mask:
        """Return the mask of a tree of bools, or of a function that returns one."""
        if isinstance(frozen, Mask):
            return frozen
        if _is_function(frozen):
            return cls(frozen)
        for path, leaf in jax.tree.leaves_with_path(frozen):
            if not isinstance(leaf, bool | np.bool_):
                where = f"frozen{jax.tree_util.keystr(path)}"
                raise TypeError(f"`{where}` must be a bool, got {leaf!r}")
        values, structure = jax.tree.flatten(frozen)
        return cls(None, tuple(map(bool, values)), structure)

    def leaves(self, params: PyTree) -> list[bool]:
        """Return for each leaf of params whether it is frozen."""
        if self.function is not None:
            return Mask.of(self.function(params)).leaves(params)
        mask = jax.tree.unflatten(self.structure, self.values)
        try:
            spread = jax.tree.map(
                lambda frozen, part: [frozen] * len(jax.tree.leaves(part)), mask, params
            )
        except ValueError as error:
            raise ValueError(
                f"`frozen` must be a tree of bools like params or like its first levels: {error}"
            ) from None
        return jax.tree.leaves(spread)


def _is_function(frozen: Any) -> bool:
    """Return whether it is a function, and not a tree of bools that can be called.

    A module of Equinox is a tree, and one with bools instead of arrays can still be called.
    """
    if not callable(frozen) or isinstance(frozen, jax.tree_util.Partial):
        return callable(frozen)
    leaves = jax.tree.leaves(frozen)
    return not leaves or not all(isinstance(leaf, bool | np.bool_) for leaf in leaves)

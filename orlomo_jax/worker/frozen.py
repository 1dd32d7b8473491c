"""Finds the frozen parameters, from a mask or from a rule's zero updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from orlomo_jax.rules.contract import LocalUpdate
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
        if callable(frozen):
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


def zero_updates(rule: Any, params: PyTree, *, momentum: bool) -> list[bool]:
    """Return for each leaf of params whether the rule's update of it is always zero.

    Such an update is a constant in the rule's jaxpr.

    Args:
        rule: A server rule, possibly in a chain.
        params: Arrays, which may be traced or abstract.
        momentum: Whether reports have a momentum.

    Example:
        >>> import optax
        >>> from orlomo_jax import al_sgd
        >>> mask = {"backbone": True, "head": False}
        >>> rule = optax.chain(al_sgd(2), optax.masked(optax.set_to_zero(), mask))
        >>> zero_updates(rule, {"backbone": jnp.ones(2), "head": jnp.ones(3)}, momentum=False)
        [True, False]
    """
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), params)

    def updates(params, report):
        update, _ = rule.update(report, rule.init(params), params, dispatched_at=0, worker=0)
        return update

    try:
        program = jax.make_jaxpr(updates)(like, LocalUpdate(like, like if momentum else None))
    except Exception:  # the rule fails; the server step will raise the full error
        return [False] * len(jax.tree.leaves(params))
    return _zeros(program.jaxpr)


def _zeros(jaxpr: Any) -> list[bool]:
    """Return for each result of a jaxpr whether it is a constant zero."""
    zero: set[Any] = set()

    def is_zero(atom: Any) -> bool:
        value = getattr(atom, "val", None)  # of a literal
        return atom in zero if value is None else np.ndim(value) == 0 and value == 0

    for equation in jaxpr.eqns:
        name, inner = equation.primitive.name, equation.params.get("jaxpr")
        if name in ("broadcast_in_dim", "convert_element_type", "reshape", "copy"):
            found = [is_zero(equation.invars[0])]
        elif name in ("pjit", "jit") and inner is not None:
            found = _zeros(inner.jaxpr)
        else:
            continue
        zero |= {var for var, yes in zip(equation.outvars, found, strict=True) if yes}
    return [is_zero(atom) for atom in jaxpr.outvars]

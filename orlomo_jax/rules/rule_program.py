"""Traces a rule's update, to find what it always leaves unchanged and whether it reads w_i."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from orlomo_jax.rules.contract import LocalUpdate
from orlomo_jax.trees import PyTree


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
    program = _program(rule, params, momentum)
    number = len(jax.tree.leaves(params))
    return [False] * number if program is None else _zeros(program)[:number]


def reads_sent_params(rule: Any, params: PyTree, *, momentum: bool) -> bool:
    """Return whether the rule reads the parameters that the worker was sent.

    Example:
        >>> from orlomo_jax import al_sgd
        >>> reads_sent_params(al_sgd(2), jnp.ones(2), momentum=False)
        False
    """
    leaves, structure = jax.tree.flatten(params)
    return _reads_sent(rule, structure, tuple(map(_like, leaves)), momentum)


@lru_cache(maxsize=64)
def _reads_sent(rule: Any, structure: Any, leaves: tuple[Any, ...], momentum: bool) -> bool:
    program = _program(rule, jax.tree.unflatten(structure, leaves), momentum)
    if program is None:
        return True
    sent = set(program.invars[: len(leaves)])
    read = [atom for equation in program.eqns for atom in equation.invars]
    return any(atom in sent for atom in [*read, *program.outvars] if not hasattr(atom, "val"))


def _like(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))


def _program(rule: Any, params: PyTree, momentum: bool) -> Any:
    """Return the jaxpr of (sent params, params, report) to updates and state; None if it fails."""
    like = jax.tree.map(_like, params)

    def updates(sent, params, report):
        return rule.update(
            report,
            rule.init(params),
            params,
            dispatched_at=0,
            dispatched_version=0,
            worker=0,
            num_local_steps=1,
            local_learning_rate=1.0,
            dispatched_params=sent,
        )

    try:
        return jax.make_jaxpr(updates)(
            like, like, LocalUpdate(like, like if momentum else None)
        ).jaxpr
    except Exception:  # the rule fails; the server step will raise the full error
        return None


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

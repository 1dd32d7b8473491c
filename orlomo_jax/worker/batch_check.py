"""Checks that a batch function depends on its arguments only."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from orlomo_jax.trees import Array
from orlomo_jax.worker.host_batches import HostBatches

_ADVICE = (
    "`batch_fn` must be a function of its arguments alone: it is traced once, so every round would "
    "get that one batch. Index arrays by `worker` and `round`, or pass Python code as HostBatches"
)


def check_batch_fn(batch_fn: Callable, key: Array, steps: int | None = None) -> None:
    """Raise TypeError if a batch function takes other arguments, or its traces differ.

    Two traces differ if they have different constants.

    Args:
        batch_fn: The batch function.
        key: A ``jax.random.key``.
        steps: The fourth argument of ``batch_fn``, if it takes one.
    """
    if isinstance(batch_fn, HostBatches):
        return
    _check_signature(batch_fn, steps)
    first, second = _constants(batch_fn, key, steps), _constants(batch_fn, key, steps)
    same_number = len(first) == len(second)  # not if the function caches its first results
    if same_number and not all(map(_equal, first, second)):
        raise TypeError(f"{_ADVICE}. Two calls returned different batches")


def _check_signature(batch_fn: Callable, steps: int | None) -> None:
    """Raise TypeError unless a batch function can be called with our arguments."""
    names = ("key", "worker", "round") + (() if steps is None else ("num_local_steps",))
    try:
        signature = inspect.signature(batch_fn)
    except (TypeError, ValueError):  # it does not have one that Python can read
        return
    try:
        signature.bind(*names)
    except TypeError as error:
        why = "is one number" if steps is None else "has one number for each worker"
        raise TypeError(
            f"`batch_fn` must take ({', '.join(names)}), because the method's num_local_steps "
            f"{why}, got a function of {signature}: {error}"
        ) from None


def _constants(batch_fn: Callable, key: Array, steps: int | None) -> list[Any]:
    """Return the constant arrays and numbers in a function's program."""
    function = getattr(batch_fn, "func", batch_fn)  # of a Partial
    args, keywords = getattr(batch_fn, "args", ()), getattr(batch_fn, "keywords", {})
    while isinstance(function, jax.stages.Wrapped):  # jax.jit would cache the first trace
        function = inspect.unwrap(function, stop=lambda f: not isinstance(f, jax.stages.Wrapped))
    try:
        more = () if steps is None else (steps,)
        closed = jax.make_jaxpr(lambda *rest: function(*args, *rest, *more, **keywords))(
            key, np.int32(0), np.int32(0)
        )
    except StopIteration as error:
        raise TypeError(f"{_ADVICE}. It raised StopIteration") from error
    from jax.extend.core import Literal  # slow to import: it loads Pallas

    atoms = [*closed.jaxpr.outvars, *(atom for eqn in closed.eqns for atom in eqn.invars)]
    return [*closed.consts, *(atom.val for atom in atoms if isinstance(atom, Literal))]


def _equal(x: Any, y: Any) -> bool:
    if x is y:
        return True
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.extended):
        x, y = jax.random.key_data(x), jax.random.key_data(y)
    x, y = np.asarray(x), np.asarray(y)
    return (x.shape, x.dtype, x.tobytes()) == (y.shape, y.dtype, y.tobytes())

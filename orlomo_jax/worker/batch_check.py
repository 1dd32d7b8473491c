"""Whether a batch function gives the same whenever it is traced."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from orlomo_jax.trees import Array
from orlomo_jax.worker.host_batches import HostBatches

_ADVICE = (
    "`batch_fn` must be a function of its arguments alone: it is traced once, and that one batch "
    "would come in every round. Index arrays by `worker` and `round`, or pass Python code as "
    "HostBatches"
)


def check_batch_fn(batch_fn: Callable, key: Array) -> None:
    """Trace a batch function twice, and compare the constants that it brings along.

    Raises:
        TypeError: If they differ, as those of a data loader or of NumPy's random numbers do.
    """
    if isinstance(batch_fn, HostBatches):
        return
    first, second = _constants(batch_fn, key), _constants(batch_fn, key)
    same_number = len(first) == len(second)  # else it has kept what it computed at first
    if same_number and not all(map(_equal, first, second)):
        raise TypeError(f"{_ADVICE}. Two calls gave different batches; both are used up")


def _constants(batch_fn: Callable, key: Array) -> list[Any]:
    """Return arrays and numbers of a function's program that do not depend on its arguments."""
    function = getattr(batch_fn, "func", batch_fn)  # of a Partial
    args, keywords = getattr(batch_fn, "args", ()), getattr(batch_fn, "keywords", {})
    while isinstance(function, jax.stages.Wrapped):  # jax.jit would remember the first call
        function = inspect.unwrap(function, stop=lambda f: not isinstance(f, jax.stages.Wrapped))
    try:
        closed = jax.make_jaxpr(lambda *rest: function(*args, *rest, **keywords))(
            key, np.int32(0), np.int32(0)
        )
    except StopIteration as error:
        raise TypeError(f"{_ADVICE}. It raised StopIteration") from error
    atoms = [*closed.jaxpr.outvars, *(atom for eqn in closed.eqns for atom in eqn.invars)]
    return [*closed.consts, *(atom.val for atom in atoms if isinstance(atom, Literal))]


def _equal(x: Any, y: Any) -> bool:
    if x is y:
        return True
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.extended):
        x, y = jax.random.key_data(x), jax.random.key_data(y)
    x, y = np.asarray(x), np.asarray(y)
    return (x.shape, x.dtype, x.tobytes()) == (y.shape, y.dtype, y.tobytes())

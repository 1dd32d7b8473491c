"""The server's numerics: update, apply and merge as one compiled program."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from orlomo_jax.methods import Method, Unmoved
from orlomo_jax.rules import LocalOrMoDAState, OrLoMoState, PRSGDmState, contract

_WITH_MOMENTUM = (OrLoMoState, LocalOrMoDAState, PRSGDmState)


@lru_cache(maxsize=64)
def server_step(method: Method, donate_params: bool, donate_state: bool) -> Callable:
    """Return update, apply and merge as one compiled program, which works in place where it may.

    Its first argument, a list of arrays like leaves of params or of none, is memory to write over.
    Its last, the schedule of γ, is a ``Partial`` or None: schedules that differ in the arrays of a
    ``Partial`` alone share a program.

    Integers and flags of the model state (counters, say) are not averaged. They are those of the
    newest report; in a synchronous round, of the worker with the highest index.
    """

    def step_fn(
        scratch,
        params,
        state,
        model_state,
        update,
        end_state,
        step,
        dispatched_at,
        worker,
        schedule,
    ):
        del scratch
        updates, state = method.rule.update(update, state, params, dispatched_at=dispatched_at)
        params = _unless_frozen(method, optax.apply_updates(params, updates), params)
        if jax.tree.leaves(model_state):
            assert method.merge_weight is not None
            weight = jnp.asarray(method.merge_weight(step, step - dispatched_at), float)

            def merged(s, end):
                if jnp.issubdtype(s.dtype, jnp.inexact):
                    return (s + weight * (end - s)).astype(s.dtype)
                if not method.synchronous or method.num_workers is None:
                    return end
                return jnp.where(worker == method.num_workers - 1, end, s)

            model_state = jax.tree.map(merged, model_state, end_state)
        rate = None
        if schedule is not None:
            rate = jnp.asarray(schedule(step + 1), float)
            contract.check_scalar("local_learning_rate", rate)
        return params, state, model_state, rate

    donated = [name for name, may in (("params", donate_params), ("state", donate_state)) if may]
    return jax.jit(step_fn, donate_argnames=["scratch", *donated], keep_unused=True)


def _unless_frozen(method: Method, new: Any, old: Any) -> Any:
    """Return the new parameters, but frozen ones as they were, to the bit."""
    return jax.tree.map(lambda frozen, x, y: x if frozen else y, Unmoved(method)(old), old, new)


def sent_dtypes(tree: Any) -> tuple[Any, ...]:
    """Return the dtypes in which workers get the leaves of a tree."""
    return tuple(leaf.dtype for leaf in jax.tree.leaves(tree))


def rounded(tree: Any, dtypes: tuple[Any, ...]) -> Any:
    """Return a tree as it is sent; leaves that need no rounding stay the same arrays."""
    leaves, structure = jax.tree.flatten(tree)
    if sent_dtypes(leaves) == dtypes:
        return tree
    return jax.tree.unflatten(structure, _cast(leaves, dtypes))


@partial(jax.jit, static_argnums=1)
def _cast(leaves: list[Any], dtypes: tuple[Any, ...]) -> list[Any]:
    return [x.astype(dtype) for x, dtype in zip(leaves, dtypes, strict=True)]


def as_partial(function: Callable) -> jax.tree_util.Partial:
    """Return the function as a pytree; one Partial round another would hide its arrays."""
    is_one = isinstance(function, jax.tree_util.Partial)
    return function if is_one else jax.tree_util.Partial(function)


@lru_cache(maxsize=64)
def _compiled(function: Callable) -> Callable:
    """Return the function of scalars, compiled, also for arrays."""
    return jax.jit(jnp.vectorize(function))


def on_cpu() -> Any:
    """Compute on the CPU where there is one, so that no accelerator's queue is waited for."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        device = None
    return jax.default_device(device)


def merge_weight_on_host(merge_weight: Any, step: Any, delay: Any) -> np.ndarray:
    """Return the weights of reports; step and delay are int[] or int[n] each, so is the result."""
    with on_cpu():
        return np.asarray(_compiled(merge_weight)(np.int32(step), np.int32(delay)))


def check_merge_weight(weight: float, step: int, delay: int) -> None:
    """Raise ValueError unless a report's weight in the model state is in [0, 1]."""
    if not 0 <= weight <= 1:
        raise ValueError(
            "the weight of a report's model state must be in [0, 1], got "
            f"learning_rate · delay_weight = {weight} at step={step}, delay={delay}"
        )


def start_momentum(state: Any) -> contract.Params:
    """Return the momentum of a rule's state, wherever a chain keeps it; None where there is none.

    That of a rule of this package, of several the first; else the first field of that name in the
    state of any transformation. Reports that a state holds are left out.
    """
    is_rule = lambda x: isinstance(x, _WITH_MOMENTUM)  # noqa: E731
    rules = [x for x in jax.tree.leaves(state, is_leaf=is_rule) if is_rule(x)]
    if rules:
        return rules[0].momentum

    def of_a_state(path, value):  # not of a params tree, of hyperparameters or of a report
        key = path[-1]
        is_field = isinstance(key, optax.tree_utils.NamedTupleKey)
        return is_field and key.tuple_name != contract.LocalUpdate.__name__

    found = optax.tree.get_all_with_path(state, "momentum", filtering=of_a_state)
    return found[0][1] if found else None

"""Defines the LocalUpdate, and checks reports and hyperparameters for the rules."""

from __future__ import annotations

import operator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import core as jax_core

from orlomo_jax import trees
from orlomo_jax.checks import check_count, check_nonnegative, check_number
from orlomo_jax.trees import Array, Params


class LocalUpdate(NamedTuple):
    """The result of a worker's local round, which the server applies.

    Attributes:
        delta: Δw = w̃_0 − w̃_S, the dispatched parameters minus the local ones (also called
            pseudo-gradient or outer gradient); a tree like params.
        momentum: Δu = ũ_S, the local momentum after the round; a tree like params. None if the
            rule does not need it (AL-SGD, local OrMo-DA).
    """

    delta: Params
    momentum: Params | None = None


def check_report(report: Any, like: Params | None, *, rule: str, momentum: bool) -> LocalUpdate:
    """Return ``report``, or raise unless it is a LocalUpdate of trees like ``like``.

    Args:
        report: The updates given to ``rule.update``.
        like: A tree with the shapes of params; None compares the report's two trees only.
        rule: The rule's name, for the message.
        momentum: Whether the rule needs ``LocalUpdate.momentum``.
    """
    if not isinstance(report, LocalUpdate):
        raise TypeError(
            f"`{rule}` maps a LocalUpdate to updates, got {type(report).__name__}. A wrapper that "
            "flattens, masks, partitions or accumulates updates must not contain the rule: put it "
            "after the rule in an optax.chain"
        )
    if momentum and report.momentum is None:
        raise ValueError(
            f"`{rule}` needs the local momentum, got LocalUpdate.momentum=None: let the workers "
            "run momentum SGD (for example local_momentum_sgd with momentum=0.9)"
        )
    if like is not None:
        trees.check_like("LocalUpdate.delta", report.delta, like)
    if momentum:
        trees.check_like(
            "LocalUpdate.momentum", report.momentum, report.delta if like is None else like
        )
    return report


def check_num_workers(num_workers: Any) -> int:
    """Return K as an int; raise unless it is an integer ≥ 1."""
    return check_count("num_workers", num_workers, 1)


def check_momentum(momentum: Any, name: str = "momentum") -> None:
    """Raise unless β is traced, or in [0, 1) both as given and in the dtype that is used."""
    if isinstance(momentum, jax_core.Tracer):
        return
    check_number(name, momentum, lambda x: 0 <= x < 1, "in [0, 1)")
    if _as_used(momentum) >= 1:
        raise ValueError(
            f"`{name}` must be below 1 in float32, got {name}={momentum}, which rounds to 1: "
            "enable x64"
        )


def check_positive(name: str, value: Any) -> None:
    """Raise unless the number is traced, or finite and > 0 in the dtype that is used."""
    check_scalar(name, value)
    if not isinstance(value, jax_core.Tracer):
        wanted = "finite and > 0 (in float32, unless x64 is enabled)"
        check_number(name, value, lambda x: bool(0 < _as_used(x) < np.inf), wanted)


def check_learning_rate(name: str, value: Any) -> None:
    """Raise unless the rate is a scalar and either traced or finite and ≥ 0."""
    check_scalar(name, value)
    if not isinstance(value, jax_core.Tracer):
        check_nonnegative(name, value)
        check_number(name, _as_used(value), np.isfinite, "finite in float32, unless x64 is enabled")


def _as_used(value: Any) -> np.ndarray:
    """Return the number in the dtype in which JAX computes coefficients."""
    with np.errstate(over="ignore"):
        return np.asarray(value).astype(jax.dtypes.canonicalize_dtype(float))


def check_limit(name: str, value: Any, low: int) -> int:
    """Return a limit of delays, an integer ≥ ``low``; None is no limit, the largest int32."""
    largest = int(np.iinfo(np.int32).max)
    return largest if value is None else check_count(name, value, low, largest)


def check_scalar(name: str, value: Any) -> None:
    """Raise unless ``value`` has shape (); it may be traced."""
    if np.shape(value) != ():
        raise ValueError(f"`{name}` must be a scalar, got shape {np.shape(value)}")


def check_dispatched_at(dispatched_at: Any, step: Array) -> Array:
    """Return the report's index i as int32[]; raise unless 0 ≤ i ≤ t, if both are concrete."""
    what = "the step of the parameters sent to the worker"
    return _check_index("dispatched_at", dispatched_at, "step", step, what)


def check_dispatched_version(dispatched_version: Any, version: Array) -> Array:
    """Return how many updates the rule had made when the task was sent, int32[].

    Raises:
        TypeError: If it is not an integer scalar.
        ValueError: If it is concrete and not in [0, version].
    """
    what = "the number of updates that the rule had made when it was sent the task"
    return _check_index("dispatched_version", dispatched_version, "version", version, what)


def check_worker(worker: Any, num_workers: int) -> Array:
    """Return the worker's index as int32[]; raise unless it is in [0, K), if it is concrete."""
    what = "the index of the worker that reports"
    return _check_index("worker", worker, "num_workers − 1", num_workers - 1, what)


def check_dispatched_params(dispatched_params: Any, like: Params, *, rule: str) -> Params:
    """Return the parameters that the worker was sent; raise ValueError if they are missing."""
    if dispatched_params is None:
        raise ValueError(
            f"`{rule}` needs the parameters that the worker was sent, got dispatched_params=None"
        )
    trees.check_like("dispatched_params", dispatched_params, like)
    return dispatched_params


def check_sent_rate(local_learning_rate: Any, *, rule: str) -> Array:
    """Return γ of the task, float[]; raise ValueError if it is missing."""
    if local_learning_rate is None:
        raise ValueError(f"`{rule}` needs γ of the worker's task, got local_learning_rate=None")
    check_scalar("local_learning_rate", local_learning_rate)
    return jnp.asarray(local_learning_rate, float)


def _check_index(name: str, value: Any, bound: str, last: Any, what: str) -> Array:
    """Return an integer scalar as int32[]; raise unless 0 ≤ value ≤ last, if both are concrete."""
    index = value
    if not isinstance(index, jax.Array):
        try:
            index = operator.index(index)
        except TypeError:
            index = jnp.asarray(jnp.nan)
    elif jnp.issubdtype(index.dtype, jnp.integer) and not isinstance(index, jax_core.Tracer):
        index = int(index) if index.shape == () else index
    if isinstance(index, int):
        last = np.iinfo(np.int32).max if isinstance(last, jax_core.Tracer) else int(last)
        if not 0 <= index <= last:
            raise ValueError(f"`{name}` must be in [0, {bound}={last}], got {name}={index}")
    elif index.shape != () or not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(f"`{name}` must be an integer scalar, {what}; got {name}={value!r}")
    return jnp.asarray(index, jnp.int32)


def version_of(rule_state: Any, default: Any) -> Any:
    """Return the first field ``version`` in a rule's state, also in a chain, else ``default``.

    It counts the updates of the parameters that the rule has made. A rule that updates them at
    every report does not need the field.
    """
    return _first_field(rule_state, "version", default)


def accepted_of(rule_state: Any) -> Any:
    """Return the first field ``accepted`` in a rule's state, also in a chain, else True.

    It says whether the rule has accepted the newest report.
    """
    return _first_field(rule_state, "accepted", True)


def _first_field(rule_state: Any, name: str, default: Any) -> Any:
    found = [state for state in _states_with(rule_state, name) if _has_field(state, name)]
    return getattr(found[0], name) if found else default


def _states_with(rule_state: Any, name: str) -> list[Any]:
    return jax.tree.leaves(rule_state, is_leaf=lambda x: _has_field(x, name))


def _has_field(state: Any, name: str) -> bool:
    """Return whether a state is a NamedTuple with a field that holds an array."""
    is_state = isinstance(state, tuple) and name in getattr(state, "_fields", ())
    return (
        is_state and not isinstance(state, LocalUpdate) and hasattr(getattr(state, name), "dtype")
    )


def find_state(rule_state: Any, kind: type) -> Any:
    """Return the first state of a type in a rule's state, also in a chain or a wrapper.

    Raises:
        TypeError: If there is none.

    Example:
        >>> import optax
        >>> chained = optax.chain(optax.trace(0.5), optax.scale_by_schedule(lambda step: 1.0))
        >>> int(find_state(chained.init(jnp.ones(2)), optax.ScaleByScheduleState).count)
        0
    """
    leaves = jax.tree.leaves(rule_state, is_leaf=lambda x: isinstance(x, kind))
    found = [leaf for leaf in leaves if isinstance(leaf, kind)]
    if not found:
        raise TypeError(
            f"the rule's state must contain a {kind.__name__}, got a {type(rule_state).__name__}"
        )
    return found[0]


def keep_unaccepted(accepted: Any, new: Any, old: Any) -> Any:
    """Return a rule's new state; if it did not accept the report, only its own part is new.

    The rule itself leaves everything but its ``step`` and ``accepted`` unchanged then. The states
    of the transformations that are chained with it do not change.

    Args:
        accepted: bool[].
        new: The state after ``update``.
        old: The state before.
    """
    if accepted is True:
        return new
    is_own = partial(_has_field, name="accepted")

    def leaf(new, old):
        return new if is_own(new) else jnp.where(accepted, new, old)

    return jax.tree.map(leaf, new, old, is_leaf=is_own)

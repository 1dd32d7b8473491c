"""Defines the LocalUpdate, and checks reports and hyperparameters for the rules."""

from __future__ import annotations

import operator
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


def check_momentum(momentum: Any) -> None:
    """Raise unless β is traced, or in [0, 1) both as given and in the dtype that is used."""
    if isinstance(momentum, jax_core.Tracer):
        return
    check_number("momentum", momentum, lambda x: 0 <= x < 1, "in [0, 1)")
    if _as_used(momentum) >= 1:
        raise ValueError(
            f"`momentum` must be below 1 in float32, got momentum={momentum}, which rounds to 1: "
            "enable x64"
        )


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


def check_scalar(name: str, value: Any) -> None:
    """Raise unless ``value`` has shape (); it may be traced."""
    if np.shape(value) != ():
        raise ValueError(f"`{name}` must be a scalar, got shape {np.shape(value)}")


def check_dispatched_at(dispatched_at: Any, step: Array) -> Array:
    """Return the report's index i as int32[]; raise unless 0 ≤ i ≤ t, if both are concrete."""
    index = dispatched_at
    if not isinstance(index, jax.Array):
        try:
            index = operator.index(index)
        except TypeError:
            index = jnp.asarray(jnp.nan)
    elif jnp.issubdtype(index.dtype, jnp.integer) and not isinstance(index, jax_core.Tracer):
        index = int(index) if index.shape == () else index
    if isinstance(index, int):
        last = np.iinfo(np.int32).max if isinstance(step, jax_core.Tracer) else int(step)
        if not 0 <= index <= last:
            raise ValueError(
                f"`dispatched_at` must be in [0, step={last}], got dispatched_at={index}"
            )
    elif index.shape != () or not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(
            "`dispatched_at` must be an integer scalar, the step of the parameters sent to the "
            f"worker; got dispatched_at={dispatched_at!r}"
        )
    return jnp.asarray(index, jnp.int32)

"""Defines and registers the paper's four methods."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from orlomo_jax import rules
from orlomo_jax.methods.method import Method
from orlomo_jax.methods.registry import register_method
from orlomo_jax.rules import contract
from orlomo_jax.rules.delay_adaptive_rate import global_learning_rate

METHOD_NAMES = ("orlomo", "prsgdm", "al_sgd", "local_ormo_da")
"""The paper's four methods."""


def running_mean(num_workers: int) -> Callable:
    """Return the model state's weight that merges the K reports of a round to their average."""

    def weight(step, delay):
        return 1.0 / jnp.asarray(step % num_workers + 1).astype(float)

    return weight


def _orlomo(
    num_workers, S, momentum=0.9, learning_rate=1.0, delay_weight=None, accumulator_dtype=None
) -> Method:
    args = num_workers, momentum, learning_rate, delay_weight
    rule = rules.orlomo(*args, accumulator_dtype=accumulator_dtype)
    rate = global_learning_rate(num_workers, learning_rate, delay_weight)
    return Method("orlomo", rule, num_workers, S, momentum, model_state_weight=rate)


def _local_ormo_da(
    num_workers, S, momentum=0.9, learning_rate=1.0, delay_weight=None, accumulator_dtype=None
) -> Method:
    args = num_workers, momentum, learning_rate, delay_weight
    rule = rules.local_ormo_da(*args, accumulator_dtype=accumulator_dtype)
    rate = global_learning_rate(num_workers, learning_rate, delay_weight)
    return Method("local_ormo_da", rule, num_workers, S, model_state_weight=rate)


def _al_sgd(
    num_workers, S, momentum=0.9, learning_rate=1.0, delay_weight=None, accumulator_dtype=None
) -> Method:
    contract.check_momentum(momentum)  # not used; all four methods take the same arguments
    rule = rules.al_sgd(num_workers, learning_rate, delay_weight)
    rate = global_learning_rate(num_workers, learning_rate, delay_weight)
    return Method("al_sgd", rule, num_workers, S, model_state_weight=rate)


def _prsgdm(
    num_workers, S, momentum=0.9, learning_rate=1.0, delay_weight=None, accumulator_dtype=None
) -> Method:
    contract.check_momentum(momentum)
    if learning_rate != 1.0 or delay_weight is not None:
        raise ValueError(
            "prsgdm averages its reports: `learning_rate` must be 1.0 and `delay_weight` None, "
            f"got learning_rate={learning_rate!r}, delay_weight={delay_weight!r}"
        )

    rule = rules.prsgdm(num_workers, accumulator_dtype=accumulator_dtype)
    method = Method("prsgdm", rule, num_workers, S, momentum, synchronous=True)
    return method._replace(model_state_weight=running_mean(num_workers))


for _name, _factory in zip(METHOD_NAMES, (_orlomo, _prsgdm, _al_sgd, _local_ormo_da), strict=True):
    register_method(_name, _factory)

"""Defines and registers the field's other methods; each name is that of its rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from orlomo_jax import rules
from orlomo_jax.checks import check_flag
from orlomo_jax.methods.method import Method
from orlomo_jax.methods.paper import running_mean
from orlomo_jax.methods.registry import register_method
from orlomo_jax.rules.delay_adaptive_rate import scheduled
from orlomo_jax.traces.policies import RestartEvery, StalenessBound


def share_of(learning_rate: Any, share: float) -> Callable:
    """Return the model state's weight η · share, clipped to [0, 1], whatever the delay is."""
    rate = scheduled("learning_rate", learning_rate)

    def weight(step, delay):
        return jnp.clip(rate(step) * share, 0, 1) * jnp.ones_like(delay, float)

    return weight


def clipped(weight: Callable) -> Callable:
    """Return a weight of (step, delay), clipped to [0, 1]."""

    def within(step, delay):
        return jnp.clip(weight(step, delay), 0, 1)

    return within


def _fedasync(K, S, mixing_rate=0.9, delay_weight=None) -> Method:
    rule = rules.fedasync(mixing_rate, delay_weight)
    rate = rules.global_learning_rate(K, mixing_rate, delay_weight or rules.polynomial())
    return Method("fedasync", rule, K, S, model_state_weight=clipped(rate))


def _fedbuff(K, S, buffer_size=10, learning_rate=1.0, delay_weight=None) -> Method:
    rule = rules.fedbuff(buffer_size, learning_rate, delay_weight)
    return Method(
        "fedbuff", rule, K, S, model_state_weight=share_of(learning_rate, 1 / buffer_size)
    )


def _nesterov(
    K, S, momentum=0.9, learning_rate=0.7, report_weight=None, accumulator_dtype=None
) -> Method:
    rule = rules.nesterov(
        K, momentum, learning_rate, report_weight, accumulator_dtype=accumulator_dtype
    )
    share = share_of(1 / K if report_weight is None else report_weight, 1.0)
    return Method("nesterov", rule, K, S, model_state_weight=share)


def _delayed_nesterov(
    K, S, buffer_size=None, momentum=0.9, learning_rate=0.7, c=0.0, accumulator_dtype=None
) -> Method:
    rule = rules.delayed_nesterov(
        K, buffer_size, momentum, learning_rate, c, accumulator_dtype=accumulator_dtype
    )
    share = 1 / (K if buffer_size is None else buffer_size)
    return Method("delayed_nesterov", rule, K, S, model_state_weight=share_of(1.0, share))


def _momentum_lookahead(
    K, S, momentum=0.9, learning_rate=0.7, report_weight=None, accumulator_dtype=None
) -> Method:
    args = K, momentum, learning_rate, report_weight
    rule = rules.momentum_lookahead(*args, accumulator_dtype=accumulator_dtype)
    share = share_of(1 / math.sqrt(K) if report_weight is None else report_weight, 1.0)
    return Method("momentum_lookahead", rule, K, S, model_state_weight=share)


def _heloco(
    K, S, momentum=0.9, learning_rate=0.7, report_weight=None, accumulator_dtype=None
) -> Method:
    args = K, momentum, learning_rate, report_weight
    rule = rules.heloco(*args, accumulator_dtype=accumulator_dtype)
    share = share_of(1 / math.sqrt(K) if report_weight is None else report_weight, 1.0)
    dispatch = rules.look_ahead(momentum, learning_rate)
    return Method("heloco", rule, K, S, model_state_weight=share, dispatch=dispatch)


def _delay_lookahead(
    K, S, momentum=0.85, learning_rate=0.5, rounds=1.75, accumulator_dtype=None
) -> Method:
    rule = rules.delay_lookahead(K, momentum, learning_rate, accumulator_dtype=accumulator_dtype)
    return Method(
        "delay_lookahead",
        rule,
        K,
        S,
        model_state_weight=share_of(1.0, 1 / K),
        dispatch=rules.look_ahead_over_delay(K, rounds),
    )


def _ringmaster(K, S, max_delay, learning_rate=1.0, stops=False) -> Method:
    rule = rules.ringmaster(max_delay, learning_rate)
    policy, stops = None, check_flag("stops", stops)
    if stops and max_delay is not None:  # a report with delay R or more would be declined
        policy = StalenessBound(max_delay - 1, "restart")
    weight = share_of(learning_rate, 1.0)
    return Method("ringmaster", rule, K, S, model_state_weight=weight, policy=policy)


def _rennala(K, S, buffer_size, learning_rate=1.0, restart=False) -> Method:
    rule = rules.rennala(buffer_size, learning_rate)
    policy = RestartEvery(buffer_size) if check_flag("restart", restart) else None
    weight = share_of(learning_rate, 1 / buffer_size)
    return Method("rennala", rule, K, S, model_state_weight=weight, policy=policy)


def _rescaled_asgd(K, S, learning_rate=1.0) -> Method:
    rate = rules.global_learning_rate(K, learning_rate, rules.rescaled(K))
    rule = rules.rescaled_asgd(K, learning_rate)
    return Method("rescaled_asgd", rule, K, S, model_state_weight=clipped(rate))


def _ca2fl(K, S, buffer_size, learning_rate=1.0) -> Method:
    rule = rules.ca2fl(K, buffer_size, learning_rate)
    weight = share_of(learning_rate, 1 / buffer_size)
    return Method("ca2fl", rule, K, S, model_state_weight=weight)


def _fadas(
    K,
    S,
    buffer_size,
    learning_rate,
    b1=0.9,
    b2=0.99,
    eps=1e-8,
    delay_threshold=None,
    accumulator_dtype=None,
) -> Method:
    rule = rules.fadas(
        buffer_size,
        learning_rate,
        b1,
        b2,
        eps,
        delay_threshold=delay_threshold,
        accumulator_dtype=accumulator_dtype,
    )
    return Method("fadas", rule, K, S, model_state_weight=share_of(1.0, 1 / buffer_size))


def _synchronous(name: str, rule: Any, K: int, S: Any) -> Method:
    method = Method(name, rule, K, S, synchronous=True)
    return method._replace(model_state_weight=running_mean(K))


def _local_sgd(K, S, learning_rate=1.0) -> Method:
    return _synchronous("local_sgd", rules.local_sgd(K, learning_rate), K, S)


def _fedavgm(K, S, momentum=0.9, learning_rate=1.0, accumulator_dtype=None) -> Method:
    rule = rules.fedavgm(K, momentum, learning_rate, accumulator_dtype=accumulator_dtype)
    return _synchronous("fedavgm", rule, K, S)


def _slowmo(K, S, momentum=0.9, slow_learning_rate=1.0, accumulator_dtype=None) -> Method:
    rule = rules.slowmo(K, momentum, slow_learning_rate, accumulator_dtype=accumulator_dtype)
    return _synchronous("slowmo", rule, K, S)


def _diloco(K, S, momentum=0.9, learning_rate=0.7, accumulator_dtype=None) -> Method:
    rule = rules.diloco(K, momentum, learning_rate, accumulator_dtype=accumulator_dtype)
    return _synchronous("diloco", rule, K, S)


def _delay_adaptive_asgd(K, S, learning_rate=None) -> Method:
    """AL-SGD with weight 1/max(K, τ) and η = K (Mishchenko et al., 2022)."""
    eta, weight = float(K) if learning_rate is None else learning_rate, rules.one_over_delay(K)
    rate = rules.global_learning_rate(K, eta, weight)
    rule = rules.al_sgd(K, eta, weight)
    return Method("delay_adaptive_asgd", rule, K, S, model_state_weight=clipped(rate))


def _ordered_outer_momentum(
    K, S, momentum=0.9, learning_rate=1.0, delay_weight=None, accumulator_dtype=None
) -> Method:
    """Local OrMo-DA (Algorithm 3) on the changes of workers with any local optimizer."""
    args = K, momentum, learning_rate, delay_weight
    rule = rules.local_ormo_da(*args, accumulator_dtype=accumulator_dtype)
    rate = rules.global_learning_rate(K, learning_rate, delay_weight)
    return Method("ordered_outer_momentum", rule, K, S, model_state_weight=clipped(rate))


_FACTORIES = {
    "fedasync": _fedasync,
    "fedbuff": _fedbuff,
    "nesterov": _nesterov,
    "delayed_nesterov": _delayed_nesterov,
    "momentum_lookahead": _momentum_lookahead,
    "heloco": _heloco,
    "delay_lookahead": _delay_lookahead,
    "ringmaster": _ringmaster,
    "rennala": _rennala,
    "rescaled_asgd": _rescaled_asgd,
    "ca2fl": _ca2fl,
    "fadas": _fadas,
    "local_sgd": _local_sgd,
    "fedavgm": _fedavgm,
    "slowmo": _slowmo,
    "diloco": _diloco,
    "delay_adaptive_asgd": _delay_adaptive_asgd,
    "ordered_outer_momentum": _ordered_outer_momentum,
}
FIELD_METHODS = tuple(_FACTORIES)
"""The methods of the field in addition to the paper's four."""

for _name, _factory in _FACTORIES.items():
    register_method(_name, _factory)

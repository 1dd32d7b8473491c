"""What the rules of mixing and momentum take and refuse: hyperparameters, reports, dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orlomo_jax import LocalUpdate
from orlomo_jax.rules import (
    Correction,
    delay_lookahead,
    delayed_nesterov,
    fedasync,
    fedbuff,
    heloco,
    hinge,
    look_ahead,
    look_ahead_over_delay,
    momentum_lookahead,
    nesterov,
    polynomial,
)
from tests.support import helpers


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fedasync(1.5), ValueError, r"`mixing_rate` must be in \[0, 1\], got"),
        (lambda: fedasync(np.float32(2)), ValueError, "mixing_rate=2.0"),
        (lambda: fedasync("0.5"), TypeError, "mixing_rate='0.5'"),
        (lambda: fedasync(0.5, 0.5), TypeError, "`delay_weight` must be a function of the delay"),
        (lambda: fedbuff(0), ValueError, "`buffer_size` must be ≥ 1, got buffer_size=0"),
        (lambda: fedbuff(2, -1.0), ValueError, "`learning_rate` must be finite and ≥ 0"),
        (lambda: fedbuff(2, 1.0, "sqrt"), TypeError, "delay_weight='sqrt'"),
        (lambda: nesterov(0), ValueError, "`num_workers` must be ≥ 1, got num_workers=0"),
        (lambda: nesterov(2, 1.0), ValueError, r"`momentum` must be in \[0, 1\)"),
        (lambda: nesterov(2, report_weight=-1), ValueError, "`report_weight` must be finite"),
        (lambda: delayed_nesterov(2, 0), ValueError, "buffer_size=0"),
        (lambda: delayed_nesterov(2, 2.5), TypeError, "`buffer_size` must be an integer"),
        (lambda: delayed_nesterov(4, c=0.5), ValueError, r"`c` must be in \[0, 1/N=0.25\], got"),
        (lambda: delayed_nesterov(4, c=np.zeros(2)), ValueError, "`c` must be a scalar"),
        (lambda: momentum_lookahead(2, -0.1), ValueError, "momentum=-0.1"),
        (lambda: momentum_lookahead(2, 0.9, np.inf), ValueError, "learning_rate=inf"),
        (lambda: heloco(2, correction=Correction(aligned=0)), ValueError, r"`aligned` .* \(0, 1\]"),
        (lambda: heloco(2, correction=0.2), TypeError, "`correction` must be a Correction or None"),
        (lambda: heloco(2, correction=Correction(max_shrink=2)), ValueError, "max_shrink=2"),
        (lambda: heloco(2, correction=Correction(epsilon=0)), ValueError, "epsilon=0"),
        (lambda: heloco(2, correction=Correction(kappa=-1)), ValueError, "kappa=-1"),
        (lambda: look_ahead(1.0), ValueError, "momentum=1.0"),
        (lambda: look_ahead(0.9, -1), ValueError, "learning_rate=-1"),
        (lambda: delay_lookahead(0), ValueError, "`num_workers` must be ≥ 1, got num_workers=0"),
        (lambda: delay_lookahead(2, 1.0), ValueError, r"`momentum` must be in \[0, 1\)"),
        (lambda: look_ahead_over_delay(0), ValueError, "num_workers=0"),
        (lambda: look_ahead_over_delay(2, np.inf), ValueError, "`rounds` must be .* rounds=inf"),
        (lambda: polynomial(-1), ValueError, "`a` must be finite and ≥ 0, got a=-1"),
        (lambda: hinge(1, np.nan), ValueError, "b=nan"),
    ],
)  # fmt: skip
def test_bad_hyperparameters(make, error, message):
    with pytest.raises(error, match=message):
        make()


RULES = {
    "fedasync": fedasync(),
    "fedbuff": fedbuff(),
    "nesterov": nesterov(2),
    "delayed_nesterov": delayed_nesterov(2),
    "momentum_lookahead": momentum_lookahead(2),
    "heloco": heloco(2),
    "delay_lookahead": delay_lookahead(2),
}


@pytest.mark.parametrize("name", RULES)
def test_reports_are_checked(name):
    rule, params = RULES[name], helpers.tree()
    state, more = rule.init(params), helpers.given(params)
    with pytest.raises(TypeError, match=f"`{name}` maps a LocalUpdate to updates, got dict"):
        rule.update(params, state, params, **more)
    with pytest.raises(ValueError, match=r"LocalUpdate\.delta` must have the structure"):
        rule.update(LocalUpdate({"a": jnp.ones(2)}), state, params, **more)
    with pytest.raises(TypeError, match="floating leaves"):
        rule.init(jnp.arange(3))


@pytest.mark.parametrize(
    ("name", "more", "error", "message"),
    [
        ("fedbuff", {"dispatched_version": None}, TypeError, "dispatched_version=None"),
        ("fedbuff", {"dispatched_version": 1}, ValueError, r"must be in \[0, version=0\]"),
        ("fedasync", {"dispatched_at": None}, TypeError, "dispatched_at=None"),
        ("fedasync", {"dispatched_params": None}, ValueError, "got dispatched_params=None"),
        ("fedasync", {"dispatched_params": jnp.ones(3)}, ValueError, "structure"),
    ],
)
def test_what_a_rule_needs(name, more, error, message):
    rule, params = RULES[name], helpers.tree()
    with pytest.raises(error, match=message):
        rule.update(helpers.report(), rule.init(params), params, **helpers.given(params) | more)


def test_schedules_return_scalars():
    rule = nesterov(2, report_weight=lambda step: jnp.ones(3))
    with pytest.raises(ValueError, match="`report_weight` must be a scalar, got shape"):
        rule.update(LocalUpdate(jnp.ones(())), rule.init(jnp.ones(())))


def test_strict_promotion_and_bfloat16_params_with_float32_reports():
    params = jnp.full(3, 1.5, jnp.bfloat16)
    report = LocalUpdate(jnp.ones(3))
    with jax.numpy_dtype_promotion("strict"):
        for rule in RULES.values():
            more = helpers.given(params)
            updates, _ = jax.jit(rule.update)(report, rule.init(params), params, **more)
            assert updates.dtype == jnp.float32

"""What the buffered and the synchronous rules refuse: hyperparameters, reports, facts."""

import jax.numpy as jnp
import numpy as np
import pytest

from orlomo_jax import LocalUpdate, rules
from proofs_check.checks.field_identities import SEQUENTIAL, sequential_rule

BAD_HYPERPARAMETERS = [
    (lambda: rules.ringmaster(0), ValueError, "`max_delay` must be in .1, 2147483647., got max_d"),
    (lambda: rules.ringmaster(float("inf")), TypeError, "`max_delay` must be an integer.*=inf"),
    (lambda: rules.ringmaster(2, -1.0), ValueError, "`learning_rate` must be finite and ≥ 0"),
    (lambda: rules.rennala(0), ValueError, "`buffer_size` must be ≥ 1, got buffer_size=0"),
    (lambda: rules.rennala(2.0), TypeError, "buffer_size=2.0"),
    (lambda: rules.rescaled(0), ValueError, "num_workers=0"),
    (lambda: rules.rescaled_asgd(2, float("nan")), ValueError, "learning_rate=nan"),
    (lambda: rules.ca2fl(0, 1), ValueError, "num_workers=0"),
    (lambda: rules.ca2fl(1, True), TypeError, "buffer_size=True"),
    (lambda: rules.fadas(0, 1.0, delay_threshold=1), ValueError, "buffer_size=0"),
    (lambda: rules.fadas(1, -1.0, delay_threshold=1), ValueError, "learning_rate=-1.0"),
    (lambda: rules.fadas(1, 1.0, 1.0, delay_threshold=1), ValueError, r"`b1` must be in \[0, 1\)"),
    (
        lambda: rules.fadas(1, 1.0, b2=1 - 1e-12, delay_threshold=1),
        ValueError,
        "`b2` must be below",
    ),
    (
        lambda: rules.fadas(1, 1.0, eps=0.0, delay_threshold=1),
        ValueError,
        "`eps` must be finite and",
    ),
    (
        lambda: rules.fadas(1, 1.0, eps=1e-60, delay_threshold=1),
        ValueError,
        "in float32.*got eps=1e-60",
    ),
    (lambda: rules.fadas(1, 1.0, delay_threshold=-1), ValueError, "delay_threshold=-1"),
    (lambda: rules.fadas(1, 1.0, delay_threshold=1.5), TypeError, "delay_threshold=1.5"),
    (lambda: rules.local_sgd(0), ValueError, "num_workers=0"),
    (lambda: rules.fedavgm(1, 1.0), ValueError, r"`momentum` must be in \[0, 1\)"),
    (lambda: rules.slowmo(1, -0.5), ValueError, "momentum=-0.5"),
    (lambda: rules.slowmo(1, 0.5, -1.0), ValueError, "`slow_learning_rate` must be finite and ≥ 0"),
    (lambda: rules.diloco(1, 0.5, np.ones(2)), ValueError, "must be a scalar"),
    (lambda: rules.diloco(2.5), TypeError, "num_workers=2.5"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD_HYPERPARAMETERS)
def test_bad_hyperparameters(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_bad_reports(name):
    rule, params = sequential_rule(name, getattr(rules, name)), jnp.zeros(4)
    facts = {"dispatched_at": 0, "dispatched_version": 0, "worker": 0, "local_learning_rate": 1.0}
    state = rule.init(params)
    with pytest.raises(TypeError, match="maps a LocalUpdate to updates"):
        rule.update(params, state, params, **facts)
    with pytest.raises(ValueError, match=r"`LocalUpdate\.delta` must have shape"):
        rule.update(LocalUpdate(jnp.ones(3)), state, params, **facts)
    with pytest.raises(ValueError, match=r"`LocalUpdate\.delta` must have the structure"):
        rule.update(LocalUpdate({"a": params}), state, params, **facts)
    with pytest.raises(TypeError, match="must have floating leaves"):
        rule.init(jnp.arange(3))


@pytest.mark.parametrize(
    ("name", "fact", "value", "error", "message"),
    [
        ("ringmaster", "dispatched_version", None, TypeError, "got dispatched_version=None"),
        ("ringmaster", "dispatched_version", 1, ValueError, r"must be in \[0, version=0\]"),
        ("rennala", "dispatched_version", None, TypeError, "got dispatched_version=None"),
        ("rennala", "dispatched_version", -1, ValueError, "dispatched_version=-1"),
        ("fadas", "dispatched_version", 0.0, TypeError, "`dispatched_version` must be an integer"),
        ("rescaled_asgd", "dispatched_at", None, TypeError, "got dispatched_at=None"),
        ("ca2fl", "worker", None, TypeError, "`worker` must be an integer scalar"),
        ("ca2fl", "worker", 1, ValueError, "`worker` must be in .* got worker=1"),
        ("slowmo", "local_learning_rate", None, ValueError, "`slowmo` needs γ"),
        ("slowmo", "local_learning_rate", np.ones(2), ValueError, "must be a scalar"),
    ],
)
def test_bad_facts(name, fact, value, error, message):
    rule, params = sequential_rule(name, getattr(rules, name)), jnp.zeros(4)
    with pytest.raises(error, match=message):
        rule.update(LocalUpdate(params), rule.init(params), params, **{fact: value})

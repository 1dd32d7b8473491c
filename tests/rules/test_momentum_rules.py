"""Asynchronous rules of mixing and momentum against exact arithmetic, optax and each other."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from orlomo_jax import al_sgd, rules
from orlomo_jax.rules import (
    Correction,
    MomentumLookAheadState,
    constant,
    contract,
    delay_lookahead,
    delayed_nesterov,
    fedasync,
    fedbuff,
    heloco,
    hinge,
    look_ahead,
    momentum_lookahead,
    nesterov,
    polynomial,
)
from proofs_check import exact_rules_momentum as exact
from proofs_check.mutants.field_rules import (
    against_current,
    changed,
    counted_twice,
    dispatched_now,
    steps_as_delays,
)
from proofs_check.rule_comparison import MOMENTUM, K, disagreement, rate
from tests.support import helpers

MU = Fraction(0.9)
RHO = Fraction(0.5)
LOOK = look_ahead(0.9, rate)


def of(name):
    """Return the rule, its transcription and its dispatch."""
    row = MOMENTUM[name]
    return row.made(getattr(rules, row.rule)), row.exact, row.dispatch


@pytest.mark.parametrize("name", MOMENTUM)
def test_exact_rational(name):
    rule, make_exact, dispatch = of(name)
    for seed in range(5):
        error, _ = disagreement(rule, make_exact, seed, dispatch)
        assert error <= 1e-12


def test_the_runs_reach_every_case_of_heloco():
    _, servers = disagreement(*of("heloco")[:2], 0, LOOK)
    seen = set.union(*(server.seen for server in servers.values()))
    assert seen == {"none", "aligned", "opposed", "turned"}


def without_look_ahead(rule_state, params):
    return params


MUTANTS = {
    "Δ against the current w": ("fedbuff", changed(fedbuff(3, rate), before=against_current)),
    "delay in reports": ("fedbuff", changed(fedbuff(3, rate), before=steps_as_delays)),
    "not divided by B": ("fedbuff", fedbuff(3, lambda step: 3 * rate(step))),
    "each report twice": (
        "delayed_nesterov",
        changed(delayed_nesterov(K, None, 0.9, rate), after=counted_twice(K, rate)),
    ),
    "η for ε": ("delayed_nesterov", delayed_nesterov(K, None, 0.9, lambda t: K * rate(t))),
    "ε for η": ("delayed_nesterov", delayed_nesterov(K, None, 0.9, lambda t: rate(t) / K)),
    "another N": ("delayed_nesterov", delayed_nesterov(K, K + 1, 0.9, rate)),
    "c = 0": ("delayed_nesterov, c", delayed_nesterov(K, 3, 0.9, rate)),
    "Δ for w − local": ("fedasync", al_sgd(K, rate, polynomial())),
    "delay 0": ("fedasync", changed(fedasync(rate), before=dispatched_now)),
    "no weight": ("fedasync", fedasync(rate, constant())),
    "ρ = 1/√K": ("nesterov", nesterov(K, 0.9, rate, K**-0.5)),
    "sum, not average": ("momentum_lookahead", nesterov(K, 0.9, rate, K**-0.5)),
    "μ for ρ": ("delay_lookahead", delay_lookahead(K, 0.5, rate)),
    "no correction": ("heloco", momentum_lookahead(K, 0.9, rate)),
    "Δ after ρ": (
        "heloco",
        changed(
            heloco(K, 0.9, rate, 1.0),
            before=lambda report, *_: jax.tree.map(lambda x: K**-0.5 * x, report),
        ),
    ),
    "no shrinking": ("heloco", heloco(K, 0.9, rate, correction=Correction(shrink=0.0))),
    "no turning": ("heloco", heloco(K, 0.9, rate, correction=Correction(turn=0.0))),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_disagree(mutant):
    name, rule = MUTANTS[mutant]
    _, make_exact, dispatch = of(name)
    error, _ = disagreement(rule, make_exact, 0, dispatch)
    assert error > 1e-4


@pytest.mark.parametrize("name", ["heloco", "delay_lookahead"])
def test_the_point_ahead_is_sent(name):
    rule, make_exact, _ = of(name)
    error, _ = disagreement(rule, make_exact, 0, without_look_ahead)
    assert error > 1e-4


def original(w):
    return exact.LookAheadOriginal(w, MU, lambda step: Fraction(1, 2), RHO)


class PointAhead:
    """MLA in its original coordinates θ; its w is the point that it sends, θ − ημm."""

    def __init__(self, w):
        server = original(w)
        self.receive, self.dispatch = server.receive, server.dispatch

    @property
    def w(self):
        return self.dispatch().params


def test_mla_sends_the_point_ahead_of_the_original_coordinates():
    """In θ = w + ημm, the step has the old m, and w = θ − ημm is sent."""
    rule = momentum_lookahead(K, 0.9, 0.5)
    assert disagreement(rule, PointAhead, 0)[0] <= 1e-12
    assert disagreement(rule, PointAhead, 0, look_ahead(0.9, 0.5))[0] > 1e-3  # ahead twice
    assert disagreement(rule, original, 0)[0] > 1e-3  # the old m in the step of w


class TestLookAhead:
    def test_equal_functions_are_equal(self):
        assert look_ahead(0.9, 0.7) == look_ahead() != look_ahead(0.8)
        assert len({look_ahead(), look_ahead(0.9, np.float64(0.7)), look_ahead(0.9, rate)}) == 2

    @pytest.mark.parametrize("make", [momentum_lookahead, heloco])
    @pytest.mark.parametrize("wrap", ["alone", "chain", "inject"])
    def test_finds_the_rules_state(self, make, wrap):
        rule = {
            "alone": make(2, 0.5, rate, accumulator_dtype=jnp.float32),
            "chain": optax.chain(optax.scale(1.0), make(2, 0.5, rate), optax.trace(0.5)),
            "inject": optax.inject_hyperparams(make, static_args="num_workers")(2, 0.5, rate),
        }[wrap]
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), helpers.tree())
        state = rule.init(params)
        for _ in range(2):
            _, state = rule.update(helpers.report(), state, params)
        sent = jax.jit(look_ahead(0.5, rate))(state, params)
        momentum = contract.find_state(state, MomentumLookAheadState).momentum
        wanted = jax.tree.map(
            lambda w, m: (w.astype(float) - rate(2) * 0.5 * m.astype(float)).astype(w.dtype),
            params,
            momentum,
        )
        helpers.assert_trees_equal(sent, wanted)

    def test_other_states_are_refused(self):
        state = nesterov(1).init(jnp.zeros(2))
        with pytest.raises(TypeError, match="must contain a MomentumLookAheadState, got a Nest"):
            look_ahead()(state, jnp.zeros(2))


def test_weights_of_the_delay():
    delays = np.arange(8)
    np.testing.assert_allclose(polynomial(2)(delays), (1.0 + delays) ** -2)
    np.testing.assert_allclose(constant()(delays), np.ones(8))
    np.testing.assert_allclose(hinge(2, 3)(delays), [1, 1, 1, 1, 1 / 3, 1 / 5, 1 / 7, 1 / 9])
    assert len({polynomial(), polynomial(0.5), constant(), hinge(), hinge(10, 4), hinge(2)}) == 4

"""The buffered and the synchronous rules against exact arithmetic, known optimizers, each other."""

from fractions import Fraction
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orlomo_jax import LocalUpdate, al_sgd, delay_adaptive, rules
from proofs_check import exact_rules_buffers as exact
from proofs_check.checks.field_identities import (
    SEQUENTIAL,
    cycle_delays,
    optax_run,
    sequential_rule,
)
from proofs_check.rule_comparison import (
    B1,
    B2,
    BUFFERS,
    EPS,
    MU,
    STEPS,
    buffer_error,
    facts_of,
    scanned,
)
from tests.support import helpers

ONE = lambda delay: 1.0  # noqa: E731


@cache
def run_of(name):
    row = BUFFERS[name]
    return scanned(row.made(getattr(rules, row.rule)))


@cache
def walk_of(name, seed):
    row = BUFFERS[name]
    return exact.walk(row.exact, row.num_workers, STEPS, seed)


def error_of(name, seed, make=None):
    """The rule's error from an exact one over a random order."""
    return buffer_error(run_of(name), make or BUFFERS[name].exact, walk_of(name, seed))[0]


@pytest.mark.parametrize("name", BUFFERS)
def test_exact_rational(name):
    for seed in range(3):
        assert error_of(name, seed) <= 1e-12


class CountsReceived(exact.Ringmaster):
    def delay(self, report):
        return self.step - report.dispatched_at


class AcceptsStale(exact.Rennala):
    def accepts(self, report):
        return True


class MeanOfNow(exact.CA2FL):
    def flush(self, last):
        self.cached_mean = exact.mean(self.cached)
        super().flush(last)


class Undivided(exact.SlowMo):
    def gradient(self):
        return self.mean()


class EveryDelay(exact.FADAS):
    def accepts(self, report):
        self.largest = max(self.largest, self.version - report.dispatched_version)
        return True


MUTANTS = {
    "ringmaster R=3": partial(CountsReceived, 3),
    "ringmaster R=1": partial(exact.Ringmaster, 2),
    "rennala B=3": partial(AcceptsStale, 3),
    "ca2fl B=3": partial(MeanOfNow, 3, 5),
    "ca2fl B=6": partial(exact.LocalSGD, 6),
    "fadas B=2": partial(EveryDelay, 2, *map(Fraction, (B1, B2, EPS)), 2),
    "fadas B=5": partial(exact.FADAS, 5, *map(Fraction, (B1, B2, EPS)), 1),
    "slowmo K=3": partial(Undivided, 3, Fraction(MU)),
    "diloco K=5": partial(exact.FedAvgM, 5, Fraction(MU)),
    "fedavgm K=2": partial(exact.DiLoCo, 2, Fraction(MU)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_exact_rational_catches(name):
    assert error_of(name, 0, MUTANTS[name]) > 1e-6


SEEDS = given(seed=st.integers(0, 2**16))
FEW = settings(max_examples=8, deadline=None, derandomize=True)


def drawn(seed, num_workers, synchronous=False, gamma=None):
    """Return deltas and facts of a random order in which every report is accepted."""
    make = partial(exact.LocalSGD, num_workers) if synchronous else partial(exact.Ringmaster, None)
    reports = exact.walk(make, num_workers, 30, seed)
    facts = facts_of(reports)
    if gamma is not None:
        facts["local_learning_rate"] = np.full(30, gamma)
    return np.stack([report.delta for report in reports]).astype(np.float32), facts


def close(left, right, tolerance=1e-5):
    return np.allclose(left, right, rtol=0, atol=tolerance * np.abs(right).max())


K = 3
SAME = {
    "Ringmaster without limit is ASGD": (
        rules.ringmaster(None, 0.5),
        al_sgd(K, 0.5, ONE),
        rules.ringmaster(2, 0.5),
        False,
    ),
    "Rescaled ASGD is AL-SGD with its weight": (
        rules.rescaled_asgd(K),
        al_sgd(K, 1.0, lambda delay: (delay + 1) / K**2),
        al_sgd(K, 1.0, delay_adaptive(K)),
        False,
    ),
    "DiLoCo without momentum is local SGD": (
        rules.diloco(K, 0.0, 1.0),
        rules.local_sgd(K),
        rules.diloco(K, 0.25, 1.0),
        True,
    ),
    "FedAvgM without momentum is local SGD": (
        rules.fedavgm(K, 0.0),
        rules.local_sgd(K),
        rules.fedavgm(K, 0.25),
        True,
    ),
    "SlowMo without momentum is local SGD": (
        rules.slowmo(K, 0.0),
        rules.local_sgd(K),
        rules.slowmo(K, 0.25),
        True,
    ),
    "a buffer of K reports of a round is local SGD": (
        rules.rennala(K, 0.5),
        rules.local_sgd(K, 0.5),
        rules.rennala(K + 1, 0.5),
        True,
    ),
}
SAME_RUNS = {name: tuple(map(scanned, of[:3])) for name, of in SAME.items()}


@pytest.mark.parametrize("name", SAME)
@FEW
@SEEDS
def test_same_rules(name, seed):
    deltas, facts = drawn(seed, K, synchronous=SAME[name][3])
    ours, theirs, other = (run(deltas, facts)[0] for run in SAME_RUNS[name])
    assert close(ours, theirs)
    assert not close(other, theirs)


SLOWMO, FEDAVGM = (scanned(make(K, MU)) for make in (rules.slowmo, rules.fedavgm))


@FEW
@SEEDS
def test_slowmo_is_fedavgm_while_the_local_rate_is_constant(seed):
    deltas, facts = drawn(seed, K, synchronous=True, gamma=0.125)
    assert close(SLOWMO(deltas, facts)[0], FEDAVGM(deltas, facts)[0])
    deltas, facts = drawn(seed, K, synchronous=True)
    assert not close(SLOWMO(deltas, facts)[0], FEDAVGM(deltas, facts)[0])


@pytest.mark.parametrize("gamma", [0.0, 1e-45])
def test_slowmo_with_a_local_rate_of_zero(gamma):
    rule = rules.slowmo(1, 0.5)
    state = rule.init(jnp.zeros(2))
    for rate, delta in ((0.5, 1.0), (gamma, 0.0), (0.5, 0.0)):
        report = LocalUpdate(jnp.full(2, delta))
        updates, state = rule.update(report, state, local_learning_rate=rate)
        if rate == gamma:
            np.testing.assert_array_equal(state.momentum, 1.0)  # μu, and u was Δ/γ = 2
            np.testing.assert_allclose(updates, 0.0, atol=1e-40)
    np.testing.assert_array_equal(updates, -0.25)


def test_a_weight_of_zero_is_not_ringmaster():
    """R = 1: worker 1's report is declined; worker 0's next one is as new as can be."""
    reports = [(0, 0), (0, 0), (1, 1)]  # (dispatched_at, dispatched_version)
    limit, weight = rules.ringmaster(1), al_sgd(2, 1.0, lambda delay: jnp.where(delay < 1, 1.0, 0))
    seen = []
    for rule in (limit, weight):
        state, changes = rule.init(jnp.zeros(())), []
        for at, version in reports:
            facts = {"dispatched_at": at, "dispatched_version": version}
            updates, state = rule.update(LocalUpdate(jnp.ones(())), state, **facts)
            changes.append(float(updates))
        seen.append(changes)
    assert seen == [[-1, 0, -1], [-1, 0, 0]]


@pytest.mark.parametrize("rule", [rules.ringmaster(1), rules.rennala(2)])
def test_a_declined_report_changes_nothing_but_the_step(rule):
    state = rule.init(helpers.tree())
    for _ in range(2):
        _, state = rule.update(helpers.report(0), state, dispatched_version=int(state.version))
    assert bool(state.accepted)
    updates, new = rule.update(helpers.report(1), state, dispatched_version=0)
    assert not any(np.any(x) for x in jax.tree.leaves(updates))
    assert (int(new.step), bool(new.accepted)) == (3, False)
    helpers.assert_trees_equal(new._replace(step=state.step, accepted=state.accepted), state)


CA2FL = scanned(rules.ca2fl(4, 3, 0.5), size=1)


@FEW
@SEEDS
def test_ca2fl_of_equal_reports_descends_by_their_change(seed):
    """At every flush, once all have reported before an earlier one."""
    _, facts = drawn(seed, 4)
    params, state = CA2FL(np.full((30, 1), 2.0, np.float32), facts)
    changes = np.diff(np.ravel(params), prepend=0)[2::3]
    complete = np.ravel(np.all(state.cached == 2, axis=1))[2::3]
    wanted = np.concatenate([[False], complete[:-1]])
    np.testing.assert_allclose(changes[wanted], -1.0, rtol=1e-5)
    assert abs(changes[0]) == pytest.approx(len(set(facts["worker"][:3])) / 3)
    assert np.all(np.asarray(state.cached_mean)[2::3][complete] == 2)


@pytest.mark.parametrize("times", [(2, 3, 4), (1, 1), (1, 5, 7, 2)])
def test_rescaled_weights_are_equal_per_worker(times):
    """At fixed times t_k, mean(τ + 1) = t_k Σ_j 1/t_j, over a whole cycle."""
    cycle, delays = cycle_delays(times)
    rates = sum(Fraction(1, time) for time in times)
    assert [Fraction(sum(d) + len(d), len(d)) for d in delays] == [t * rates for t in times]

    def totals(weight):
        return [float(np.sum(weight(np.array(d)))) for d in delays]

    ours = totals(rules.rescaled(len(times)))
    np.testing.assert_allclose(ours, cycle * float(rates) / len(times) ** 2, rtol=1e-6)
    if len(set(times)) > 1:
        assert np.ptp(totals(delay_adaptive(len(times)))) > 0.1


AMSGRAD = SEQUENTIAL["fadas"][1]


def rule_of(name):
    """The rule with K = B = 1."""
    return sequential_rule(name, getattr(rules, name))


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_one_worker_is_a_sequential_optimizer(name):
    """K = B = S = 1, with γ = 0.125 and Δ = γ·g."""
    rule, optimizer = rule_of(name), SEQUENTIAL[name][1]
    gradients = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    steps = np.arange(12)
    facts = {"dispatched_at": steps, "dispatched_version": steps, "worker": 0 * steps}
    facts["local_learning_rate"] = np.full(12, 0.125, np.float32)
    ours = scanned(rule)(gradients * np.float32(0.125), facts)[0]
    theirs = optax_run(optimizer, gradients * np.float32(0.125))
    assert close(ours, theirs, 1e-6)


def test_fadas_in_complex_numbers_is_amsgrad():
    """|Δ|² is real, and the step is along the complex momentum."""
    rule, params = rules.fadas(1, 0.25, delay_threshold=None), jnp.zeros(3, jnp.complex64)
    gradients = np.random.default_rng(0).normal(size=(6, 3, 2)).astype(np.float32)
    gradients = jnp.asarray(gradients[..., 0] + 1j * gradients[..., 1])
    state, ours = rule.init(params), params
    their_state, theirs = AMSGRAD.init(params), params
    for t, gradient in enumerate(gradients):
        updates, state = rule.update(LocalUpdate(gradient), state, dispatched_version=t)
        ours += updates
        updates, their_state = AMSGRAD.update(gradient, their_state)
        theirs += updates
    assert state.second_moment.dtype == jnp.float32
    assert close(ours, theirs)

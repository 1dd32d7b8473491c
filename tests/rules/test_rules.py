"""The server rules against exact arithmetic, the paper's example and each other."""

from fractions import Fraction
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import orlomo_jax
from orlomo_jax import LocalUpdate, al_sgd, delay_adaptive, local_ormo_da, orlomo, prsgdm
from orlomo_jax.rules import ordering
from orlomo_jax.rules.ordering import geometric_sum
from tests.support import helpers

STEPS = 2000
ONE = lambda delay: 1.0  # noqa: E731


@lru_cache
def scanned(name: str, num_workers: int, constant: bool):
    """Run a rule over a whole sequence of reports, compiled once for all β."""

    @jax.jit
    def run(decay, indices, deltas, momentums):
        options = {"learning_rate": 0.75, "delay_weight": ONE} if constant else {}
        hyper = {} if name == "al_sgd" else {"momentum": decay}
        rule = getattr(orlomo_jax, name)(num_workers, **hyper, **options)

        def step(carry, inputs):
            change, state = carry
            index, delta, momentum = inputs
            update = LocalUpdate(delta, momentum)
            updates, state = rule.update(update, state, dispatched_at=index)
            return (change + updates, state), None

        start = jnp.zeros(deltas.shape[1])
        carry, _ = jax.lax.scan(step, (start, rule.init(start)), (indices, deltas, momentums))
        return carry

    return run


@pytest.mark.parametrize(
    "num_workers",
    [1, 5, 64, pytest.param(2, marks=pytest.mark.slow), pytest.param(16, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", ["orlomo", "local_ormo_da", "al_sgd"])
@pytest.mark.parametrize("constant", [True, False], ids=["constant", "delay_adaptive"])
def test_exact_rational(name, num_workers, constant):
    rng = np.random.default_rng(num_workers)
    indices = helpers.random_order(rng, num_workers, STEPS)
    delays = np.arange(STEPS) - indices
    if constant:
        rates = [Fraction(3, 4)] * STEPS
    else:
        rates = [Fraction(1, int(d) if d > 2 * num_workers else num_workers) for d in delays]
    deltas, momentums = rng.integers(-(2**20), 2**20, size=(2, STEPS, 6))
    deltas[:, 3:], momentums[:, 3:] = abs(deltas[:, 3:]), abs(momentums[:, 3:])  # no cancellation
    for decay in (0.0, 0.5, 0.9, 0.99, 0.999999):
        merged = {"orlomo": momentums, "local_ormo_da": deltas, "al_sgd": np.zeros_like(deltas)}
        exact_u, exact_w = helpers.exact_ordered_sums(
            indices, deltas, merged[name], num_workers, decay, rates
        )
        with jax.enable_x64(True):
            change, state = scanned(name, num_workers, constant)(
                jnp.float64(decay), indices, deltas.astype(float), momentums.astype(float)
            )
            pairs = [(change, exact_w)]
            if name != "al_sgd":
                pairs.append((state.momentum, exact_u))
        for got, exact in pairs:
            error = np.abs(np.asarray(got) - exact)
            assert np.all(error[3:] <= 1e-12 * np.abs(exact[3:])), decay
            assert np.linalg.norm(error) <= 1e-12 * np.linalg.norm(exact), decay


def test_figure_1_coefficient_by_coefficient():
    """Basis vectors for reports make the state hold each report's coefficient."""
    indices = [0, 0, 0, 2, 3, 5, 4, 7, 1]
    basis = np.eye(18)
    reports = [LocalUpdate(jnp.array(basis[t]), jnp.array(basis[9 + t])) for t in range(9)]
    eta, b = 0.25, 0.5
    rule = orlomo(3, b, learning_rate=eta, delay_weight=ONE)
    change, state = helpers.run_rule(rule, jnp.zeros(18), reports, indices)
    exponents = np.array([3, 3, 3, 2, 2, 1, 1, 0, 2])  # of Δu of index 0,0,0,2,3,5,4,7,1
    np.testing.assert_array_equal(state.momentum[9:], eta * b**exponents)
    np.testing.assert_array_equal(state.momentum[:9], 0)
    missed = {0: 0.0, 1: b, 2: b + b**2, 3: b + b**2 + b**3}
    np.testing.assert_array_equal(change[9:], [-eta * missed[e] for e in exponents])
    np.testing.assert_array_equal(change[:9], -eta)


@pytest.mark.parametrize("decay", [0.0, 0.25, 0.5, 0.75])
def test_geometric_sum_is_exact_for_dyadic_decay(decay):
    with jax.enable_x64(True):
        sums = jax.jit(jax.vmap(partial(geometric_sum, jnp.float64(decay))))(jnp.arange(-1, 26))
    expected = [-1.0] + [sum(decay**j for j in range(1, n + 1)) for n in range(26)]
    np.testing.assert_array_equal(sums, expected)


@pytest.mark.parametrize("count", [1, 1000, 2**31 - 1])
def test_geometric_sum_near_one(count):
    decay = 1 - 1e-10
    with jax.enable_x64(True):
        got = float(geometric_sum(jnp.float64(decay), count))
    exact_decay = Fraction(decay)
    log = float(np.log1p(float(exact_decay - 1)))
    expected = decay * -np.expm1(count * log) / float(1 - exact_decay)
    assert got == pytest.approx(expected, rel=1e-13)
    assert float(geometric_sum(0.999999, 1000)) == pytest.approx(
        sum(float(np.float32(0.999999)) ** j for j in range(1, 1001)), rel=1e-6
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_every_platform_gets_the_same_coefficients(momentum):
    args = [
        (jnp.float32(momentum), jnp.float32(0.1), jnp.bool(opens), late, late - opens)
        for opens in (False, True)
        for late in map(jnp.int32, range(10))
    ]
    for here, elsewhere in zip(
        (ordering.by_branch(*arg) for arg in args),
        (ordering.behind_a_barrier(*arg) for arg in args),
        strict=True,
    ):
        np.testing.assert_allclose(here, elsewhere, rtol=1e-6)


def test_delay_adaptive_is_eq_6():
    weight = delay_adaptive(8)
    delays = np.arange(100)
    np.testing.assert_allclose(
        weight(delays), np.where(delays <= 16, 1 / 8, 1 / np.maximum(delays, 1))
    )


class TestDegenerations:
    """β = 0, S = 1, K = 1: the methods that the paper contains as special cases."""

    reports = tuple(helpers.report(seed) for seed in range(12))
    indices = helpers.random_order(np.random.default_rng(1), 3, 12).tolist()

    @pytest.mark.parametrize("make", [orlomo, local_ormo_da])
    @pytest.mark.parametrize("compiled", [True, False])
    def test_zero_momentum_is_al_sgd_to_the_bit(self, make, compiled):
        """Remark 1."""

        def run(rule):
            go = partial(helpers.run_rule, rule)
            # As arguments: of constants, a compiler makes another sum in each program.
            indices = [np.int32(index) for index in self.indices]
            return (jax.jit(go) if compiled else go)(helpers.tree(), self.reports, indices)[0]

        helpers.assert_trees_equal(run(make(3, 0)), run(al_sgd(3)))
        helpers.assert_trees_equal(run(make(3, 0.0)), run(al_sgd(3)))

    def test_zero_momentum_still_tracks_the_momentum(self):
        rule = orlomo(2, 0.0, delay_weight=ONE)
        reports = [LocalUpdate(jnp.zeros(4), jnp.eye(4)[t]) for t in range(4)]
        _, state = helpers.run_rule(rule, jnp.zeros(4), reports, [0, 0, 1, 3])
        np.testing.assert_array_equal(state.momentum, [0, 0, 0, 1])  # 3 alone is of group ⌈3/2⌉

    def test_one_local_step_makes_orlomo_ormo_da(self):
        """Remark 2: with S = 1, Δu = Δw = γg."""
        reports = [LocalUpdate(r.delta, r.delta) for r in self.reports]
        ours, u = helpers.run_rule(orlomo(3, 0.9), helpers.tree(), reports, self.indices)
        theirs, v = helpers.run_rule(local_ormo_da(3, 0.9), helpers.tree(), reports, self.indices)
        helpers.assert_trees_close(ours, theirs, rtol=1e-5, atol=1e-6)
        helpers.assert_trees_equal(u.momentum, v.momentum)

    @pytest.mark.parametrize("make", [orlomo, local_ormo_da])
    def test_one_worker_one_step_is_momentum_sgd(self, make):
        """K = S = 1 with η = 1 is Eq. (2), against optax.sgd."""
        gradients = [r.delta for r in self.reports]
        reports = [LocalUpdate(*[jax.tree.map(lambda g: 0.1 * g, g)] * 2) for g in gradients]
        ours, _ = helpers.run_rule(make(1, 0.9), helpers.tree(), reports, range(12))
        sgd, params = optax.sgd(0.1, momentum=0.9), helpers.tree()
        state = sgd.init(params)
        for gradient in gradients:
            updates, state = sgd.update(gradient, state)
            params = optax.apply_updates(params, updates)
        helpers.assert_trees_close(ours, params, rtol=1e-5, atol=1e-6)

    def test_one_local_step_makes_al_sgd_asgd(self):
        """w − η_t γ g, against optax.sgd with the rate of each step's delay."""
        ours, _ = helpers.run_rule(al_sgd(3), helpers.tree(), self.reports, self.indices)
        params, weight = helpers.tree(), delay_adaptive(3)
        for t, (update, index) in enumerate(zip(self.reports, self.indices, strict=True)):
            rate = weight(t - index)
            params = jax.tree.map(lambda w, d, rate=rate: w - rate * d, params, update.delta)
        helpers.assert_trees_close(ours, params, rtol=1e-5, atol=1e-6)

    def test_prsgdm_averages_a_round(self):
        reports = self.reports[:6]
        params, state = helpers.run_rule(prsgdm(3), helpers.tree(), reports, [0] * 3 + [3] * 3)
        mean = lambda trees: jax.tree.map(lambda *x: sum(x) / len(x), *trees)  # noqa: E731
        deltas = [mean([r.delta for r in half]) for half in (reports[:3], reports[3:])]
        expected = jax.tree.map(lambda w, a, b: w - a - b, helpers.tree(), *deltas)
        helpers.assert_trees_close(params, expected, rtol=1e-5, atol=1e-6)
        expected = mean([r.momentum for r in reports[3:]])
        helpers.assert_trees_close(state.momentum, expected, rtol=1e-5, atol=1e-6)

    def test_prsgdm_is_still_within_a_round(self):
        params, state = helpers.run_rule(prsgdm(3), helpers.tree(), self.reports[:2], [0, 0])
        helpers.assert_trees_equal(params, helpers.tree())
        assert not any(np.any(x) for x in jax.tree.leaves(state.momentum))


def test_schedule_is_read_at_the_servers_step():
    rule = al_sgd(1, learning_rate=lambda step: 10.0**-step, delay_weight=ONE)
    params, _ = helpers.run_rule(rule, jnp.zeros(1), [LocalUpdate(jnp.ones(1))] * 3, range(3))
    np.testing.assert_allclose(params, -1.11, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: orlomo(0), ValueError, "`num_workers` must be ≥ 1, got num_workers=0"),
        (lambda: orlomo(2.5), TypeError, "num_workers=2.5"),
        (lambda: al_sgd(True), TypeError, "num_workers=True"),
        (lambda: prsgdm(-1), ValueError, "num_workers=-1"),
        (lambda: orlomo(2, 1.0), ValueError, r"`momentum` must be in \[0, 1\), got momentum=1.0"),
        (lambda: local_ormo_da(2, -0.1), ValueError, "momentum=-0.1"),
        (lambda: orlomo(2, float("nan")), ValueError, "momentum=nan"),
        (lambda: orlomo(2, jnp.float32(1.5)), ValueError, "momentum=1.5"),
        (lambda: orlomo(2, 1 - 1e-10), ValueError, "which rounds to 1"),
        (lambda: al_sgd(2, 1e300), ValueError, "`learning_rate` must be finite in float32"),
        (lambda: al_sgd(2, np.ones(3)), ValueError, "must be a scalar, got shape \\(3,\\)"),
        (lambda: orlomo(2, "0.9"), TypeError, "momentum='0.9'"),
        (lambda: orlomo(2, 0.9, -1.0), ValueError, "`learning_rate` must be finite and ≥ 0"),
        (lambda: al_sgd(2, float("inf")), ValueError, "learning_rate=inf"),
        (lambda: al_sgd(2, delay_weight=0.5), TypeError, "delay_weight=0.5"),
        (lambda: delay_adaptive(0), ValueError, "num_workers=0"),
        (lambda: al_sgd(2).init({"a": [jnp.arange(3)]}), TypeError, r"int32 at params\['a'\]\[0\]"),
        (lambda: orlomo(2).init(jnp.arange(3)), TypeError, "must have floating leaves"),
    ],
)
def test_bad_hyperparameters(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("name", helpers.RULES)
@pytest.mark.parametrize(
    ("update", "index", "error", "message"),
    [
        (helpers.tree(), 0, TypeError, "maps a LocalUpdate to updates, got dict"),
        (helpers.report(), 1, ValueError, r"`dispatched_at` must be in \[0, step=0\]"),
        (helpers.report(), -1, ValueError, "dispatched_at=-1"),
        (helpers.report(), np.int64(2**32), ValueError, "dispatched_at=4294967296"),
        (helpers.report(), 2**40, ValueError, "dispatched_at=1099511627776"),
        (helpers.report(), 0.0, TypeError, "`dispatched_at` must be an integer scalar"),
        (helpers.report(), np.zeros(2, int), TypeError, "integer scalar"),
        (LocalUpdate({"other": jnp.ones(2)}, helpers.tree()), 0, ValueError, "structure"),
        (
            LocalUpdate(
                jax.tree.map(lambda x: jnp.zeros((4, *x.shape)), helpers.tree()), helpers.tree()
            ),
            0,
            ValueError,
            r"LocalUpdate.delta\['layer'\]\[0\]` must have shape \(3, 2\), got shape \(4, 3, 2\)",
        ),
    ],
)
def test_bad_reports(name, update, index, error, message):
    rule, params = helpers.RULES[name](2), helpers.tree()
    with pytest.raises(error, match=message):
        rule.update(update, rule.init(params), params, dispatched_at=index)


@pytest.mark.parametrize("name", ["orlomo", "prsgdm"])
def test_missing_local_momentum(name):
    rule, params = helpers.RULES[name](2), helpers.tree()
    with pytest.raises(ValueError, match="needs the local momentum"):
        rule.update(LocalUpdate(params), rule.init(params), params, dispatched_at=0)


@pytest.mark.parametrize("option", ["learning_rate", "delay_weight"])
def test_schedules_return_scalars(option):
    rule = al_sgd(2, **{option: lambda _: jnp.ones(3)})
    with pytest.raises(ValueError, match=f"`{option}` must be a scalar, got shape"):
        rule.update(LocalUpdate(jnp.ones(())), rule.init(jnp.ones(())), dispatched_at=0)


def test_the_step_stays_at_the_largest_integer():
    state = al_sgd(2).init(jnp.ones(1))._replace(step=jnp.int32(2**31 - 1))
    _, state = al_sgd(2).update(LocalUpdate(jnp.ones(1)), state, dispatched_at=2**31 - 1)
    assert int(state.step) == 2**31 - 1


def test_missing_index():
    rule = orlomo(2)
    with pytest.raises(
        TypeError, match=r"`dispatched_at` must be an integer scalar.*got dispatched_at=None"
    ):
        rule.update(helpers.report(), rule.init(helpers.tree()), None)

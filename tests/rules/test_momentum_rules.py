"""Asynchronous rules of mixing and momentum against exact arithmetic, optax and each other."""

from fractions import Fraction
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from orlomo_jax import LocalUpdate, al_sgd, rules
from orlomo_jax.rules import (
    Correction,
    MomentumLookAheadState,
    constant,
    contract,
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


def test_heloco_sends_the_point_ahead():
    rule, make_exact, _ = of("heloco")
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


# Rules that are equal to others. Every test has a rule that is not.

T, SIZE = 12, 5


@lru_cache
def path(rule):
    """Return a compiled function to the parameters after each report; w is what was sent."""

    @jax.jit
    def run(deltas, indices, versions):
        def step(carry, inputs):
            w, state = carry
            delta, at, version = inputs
            updates, state = rule.update(
                LocalUpdate(delta), state, w,
                dispatched_at=at, dispatched_version=version, dispatched_params=w,
            )  # fmt: skip
            return (w + updates, state), w + updates

        start = jnp.ones(deltas.shape[1])
        return jax.lax.scan(step, (start, rule.init(start)), (deltas, indices, versions))[1]

    return run


def of_optimizer(optimizer):
    """Return an optax optimizer of gradients as a rule."""

    def update(report, state, params=None, **extra):
        return optimizer.update(report.delta, state, params)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def mixed(alpha):
    """Return the exponential moving average of the workers' models as a rule."""

    def update(report, state, params=None, **extra):
        new = optax.incremental_update(params - report.delta, params, alpha)
        return new - params, state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


def averaged(mu, eta):
    """Return MLA of a single worker as optax writes it."""
    ema = optax.ema(mu, debias=False)

    def update(report, state, params=None, **extra):
        mean, state = ema.update(report.delta, state)
        return -eta * (report.delta + mu * mean), state

    return optax.GradientTransformationExtraArgs(ema.init, update)


ONE = lambda delay: 1.0  # noqa: E731
DELAY = lambda delay: 1.0 / (2.0 + delay)  # noqa: E731
SGD = of_optimizer(optax.sgd(0.5, momentum=0.9, nesterov=True))
# Each row: a rule, one that is equal to it, and one that is not.
EQUALS = {
    "FedBuff, B = 1, is AL-SGD": (
        fedbuff(1, rate, DELAY),
        al_sgd(K, rate, DELAY),
        fedbuff(1, rate),
    ),
    "MLA, μ = 0, is AL-SGD of weight ρ": (
        momentum_lookahead(K, 0.0, rate, 0.3),
        al_sgd(K, rate, lambda delay: 0.3),
        momentum_lookahead(K, 0.5, rate, 0.3),
    ),
    "Nesterov, K = 1": (nesterov(1, 0.9, 0.5), SGD, nesterov(2, 0.9, 0.5)),
    "Delayed Nesterov, N = 1": (
        delayed_nesterov(1, None, 0.9, 0.5),
        SGD,
        delayed_nesterov(2, None, 0.9, 0.5),
    ),
    "Delayed Nesterov, N = 1, any c": (delayed_nesterov(1, 1, 0.9, 0.5, 0.75), SGD, None),
    "MLA, K = 1": (
        momentum_lookahead(1, 0.9, 0.5),
        averaged(0.9, 0.5),
        momentum_lookahead(2, 0.9, 0.5),
    ),
}


def draw(seed):
    rng = np.random.default_rng(seed)
    deltas = rng.normal(size=(T, SIZE)).astype(np.float32)
    indices = helpers.random_order(rng, K, T).astype(np.int32)
    return deltas, indices, indices


def agree(ours, theirs, rtol=1e-4, atol=1e-5):
    return np.allclose(ours, theirs, rtol, atol)


examples = partial(settings, max_examples=10, deadline=None)


@pytest.mark.parametrize("name", EQUALS)
@examples()
@given(st.integers(0, 2**32 - 1))
def test_equal_rules(name, seed):
    rule, same, other = EQUALS[name]
    case = draw(seed)
    wanted = path(same)(*case)
    assert agree(path(rule)(*case), wanted)
    assert other is None or not agree(path(other)(*case), wanted)


@examples()
@given(st.integers(0, 2**32 - 1))
def test_n_reports_of_delayed_nesterov_are_one_step_on_their_mean(seed):
    deltas, *rest = draw(seed)
    means = jnp.asarray(deltas).reshape(T // K, K, SIZE).mean(1)
    wanted = path(SGD)(means, *(x[: T // K] for x in rest))
    rule = delayed_nesterov(K, None, 0.9, 0.5)
    assert agree(path(rule)(deltas, *rest)[K - 1 :: K], wanted)
    assert not agree(path(rule)(deltas, *rest)[::K], wanted)
    assert not agree(path(TWICE)(deltas, *rest)[K - 1 :: K], wanted)


TWICE = changed(delayed_nesterov(K, None, 0.9, 0.5), after=counted_twice(K, 0.5))


@examples()
@given(st.integers(0, 2**32 - 1))
def test_fedbuff_of_one_worker_accumulates_gradients(seed):
    deltas, *_ = draw(seed)
    steps = np.arange(T, dtype=np.int32)
    wanted = path(of_optimizer(optax.MultiSteps(optax.sgd(0.5), 3)))(deltas, steps, steps)
    assert agree(path(fedbuff(3, 0.5))(deltas, steps, steps // 3), wanted)
    assert not agree(path(fedbuff(3, 0.5))(deltas, steps, 0 * steps), wanted)


@examples()
@given(st.integers(0, 2**32 - 1))
def test_fedasync_of_one_worker_averages_models(seed):
    deltas, *_ = draw(seed)
    steps = np.arange(T, dtype=np.int32)
    wanted = path(mixed(0.75))(deltas, steps, steps)
    assert agree(path(fedasync(0.75))(deltas, steps, steps), wanted)
    assert agree(path(fedasync(0.75, hinge()))(deltas, np.maximum(steps - 4, 0), steps), wanted)
    assert not agree(path(fedasync(0.75))(deltas, 0 * steps, steps), wanted)


@examples()
@given(st.integers(0, 2**32 - 1))
def test_heloco_keeps_aligned_reports(seed):
    deltas, *rest = draw(seed)
    along = abs(deltas[:, :1]) * deltas[:1]
    rule, mla = heloco(K, 0.9, 0.5), momentum_lookahead(K, 0.9, 0.5)
    assert agree(path(rule)(along, *rest), path(mla)(along, *rest))
    along[1::2] *= -1
    assert not agree(path(rule)(along, *rest), path(mla)(along, *rest))


HELOCO = jax.jit(heloco(1, 0.5, 1.0).update)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-1, 1), st.sampled_from([1e-3, 1.0, 1e3]))
def test_heloco_corrects_the_direction_and_keeps_the_rest(seed, cosine, scale):
    """Opposed: the part across m stays. Ambiguous: the norm stays. Both come closer to m."""
    assume(min(abs(cosine), abs(cosine - 0.2)) > 1e-12)  # the correction jumps there
    rng = np.random.default_rng(seed)
    m, across = np.linalg.qr(rng.normal(size=(SIZE, 2)))[0].T
    delta = scale * (cosine * m + np.sqrt(1 - cosine**2) * across)
    with jax.enable_x64(True):
        state = MomentumLookAheadState(jnp.int32(0), jnp.asarray(m))
        _, state = HELOCO(LocalUpdate(jnp.asarray(delta)), state)
        new = 2 * np.asarray(state.momentum) - m  # m' = m/2 + Δ̂/2
    tolerance = 1e-12 * (1 + scale)
    if cosine >= 0.2:
        np.testing.assert_allclose(new, delta, atol=tolerance)
    elif cosine < 0:
        np.testing.assert_allclose(new @ across, delta @ across, atol=tolerance)
        assert delta @ m - tolerance <= new @ m <= tolerance
    else:
        assert abs(np.linalg.norm(new) - scale) <= tolerance
        assert new @ m >= delta @ m - tolerance


def test_heloco_takes_a_complex_leaf_as_a_real_vector():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 6, SIZE)).astype(np.float32)
    rule, steps = heloco(K, 0.9, 0.5), np.arange(6, dtype=np.int32)
    both = path(rule)(np.concatenate([x[0], x[1]], 1), steps, steps)
    w, state = jnp.ones(SIZE, jnp.complex64) * (1 + 1j), rule.init(jnp.ones(SIZE, jnp.complex64))
    for delta in x[0] + 1j * x[1]:
        updates, state = rule.update(LocalUpdate(jnp.asarray(delta)), state)
        w = w + updates
    np.testing.assert_allclose(np.concatenate([w.real, w.imag]), both[-1], rtol=1e-5)


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

"""Rules of mixing and momentum that are equal to others; each test has a rule that is not."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from orlomo_jax import LocalUpdate, al_sgd
from orlomo_jax.rules import (
    MomentumLookAheadState,
    delayed_nesterov,
    fedasync,
    fedbuff,
    heloco,
    hinge,
    momentum_lookahead,
    nesterov,
)
from proofs_check.mutants.field_rules import changed, counted_twice
from proofs_check.rule_comparison import K, rate
from tests.support import helpers

T, SIZE = 12, 5
TWICE = changed(delayed_nesterov(K, None, 0.9, 0.5), after=counted_twice(K, 0.5))
HELOCO = jax.jit(heloco(1, 0.5, 1.0).update)


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

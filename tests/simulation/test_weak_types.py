"""Leaves that JAX types weakly are computed in their own precision where x64 is on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orlomo_jax import (
    ArrivalTrace,
    LocalUpdate,
    ThreadWorkers,
    local_momentum_sgd,
    make_method,
    simulate,
    train,
)
from orlomo_jax.methods import METHOD_NAMES
from tests.support import helpers
from tests.support.helpers import ENGINES

K, S = 2, 3


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def weak(*values):
    """Return a scalar tree of weakly typed float64 leaves."""
    tree = {name: jnp.asarray(value) * 1 for name, value in zip("ab", values, strict=False)}
    assert all(leaf.weak_type and leaf.dtype == jnp.float64 for leaf in tree.values())
    return tree


def strong(tree):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), tree)


def loss_fn(params, model_state, batch, key):
    error = params["a"] * batch.mean() - params["b"] ** 2 + 0.1
    return error**2, (0.9 * model_state + 0.1 * error, {})


def batch_fn(key, worker, round):
    return jax.random.normal(jax.random.fold_in(key, round), (S, 4))


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("name", METHOD_NAMES)
def test_rules(name, momentum):
    rule = make_method(name, K, S, momentum=momentum).rule
    params, report = weak(1 / 3, 2 / 3), LocalUpdate(weak(1 / 7, 1 / 11), weak(1 / 13, 1 / 17))
    results = []
    for cast in (lambda x: x, strong):
        state, w = rule.init(cast(params)), cast(params)
        for index in (0, 0, 1, 2):
            updates, state = rule.update(cast(report), state, w, dispatched_at=index)
            w = jax.tree.map(jnp.add, w, updates)
        results.append((w, updates, state))
    for mine, exact in zip(*map(jax.tree.leaves, results), strict=True):
        assert mine.dtype == exact.dtype
        np.testing.assert_allclose(mine, exact, rtol=1e-14)


@pytest.mark.parametrize("momentum", [0.9, 0.0, None])
def test_rounds(momentum):
    round_fn = local_momentum_sgd(loss_fn, S, momentum, weight_decay=0.01)
    batches, key = jnp.ones((S, 4)), jax.random.key(0)
    params, state = weak(1 / 3, 2 / 3), jnp.asarray(0.7) * 1
    mine = round_fn(params, state, batches, 0.1, key)
    exact = round_fn(strong(params), strong(state), batches, 0.1, key)
    helpers.assert_trees_close(mine, exact, 1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHOD_NAMES)
@pytest.mark.parametrize("engine", [*ENGINES, "threads"])
def test_runs(name, engine):
    method = make_method(name, K, S)
    trace = ArrivalTrace.from_workers([0, 1] * 8, K, synchronous=method.synchronous)
    results = []
    for cast in (lambda x: x, strong):
        params, state = cast(weak(1 / 3, 2 / 3)), cast(jnp.asarray(0.7) * 1)
        job = (method, loss_fn, batch_fn, params)
        settings = {
            "key": jax.random.key(0),
            "local_learning_rate": 0.05,
            "model_state": state,
        }
        if engine == "threads" and not results:
            real = train(*job, ThreadWorkers(), num_steps=16, **settings)
            trace, result = real.trace, real
        else:
            settings["engine"] = ENGINES["eager" if engine == "threads" else engine]
            result = simulate(*job, trace=trace, **settings)
        assert {leaf.dtype for leaf in jax.tree.leaves(result.params)} == {jnp.dtype("float64")}
        results.append(result)
    helpers.assert_trees_close(results[0][:3], results[1][:3], 1e-12)

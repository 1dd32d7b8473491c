"""Losses of (params, batch) alone train as losses with model state and metrics do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orlomo_jax import ThreadWorkers, from_loss, local_momentum_sgd, make_method, simulate, train
from tests.support import helpers

K, S, T = 2, 2, 12


def plain(params, batch):
    return jnp.mean((batch @ params["w"] - 1.0) ** 2)


def in_full(params, model_state, batch, key):
    return plain(params, batch), (model_state, {})


def batch_fn(key, worker, round):
    return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, worker), round), (S, 4, 3))


JOB = {"key": jax.random.key(0), "local_learning_rate": 0.05}
PARAMS = {"w": jnp.zeros(3)}


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_it_trains_as_the_full_loss(engine):
    results = [
        simulate(
            make_method("orlomo", K, S), loss, batch_fn, PARAMS, num_steps=T, engine=engine, **JOB
        )
        for loss in (from_loss(plain), in_full)
    ]
    helpers.assert_trees_equal(results[0].params, results[1].params)
    np.testing.assert_array_equal(results[0].history.loss, results[1].history.loss)
    assert results[0].model_state is None
    assert results[0].history.metrics == {}
    assert results[0].history.loss[-4:].mean() < results[0].history.loss[:4].mean()


def test_it_trains_on_threads():
    job = (make_method("orlomo", K, S), from_loss(plain), batch_fn, PARAMS)
    real = train(*job, ThreadWorkers(), num_steps=T, **JOB)
    again = simulate(*job, trace=real.trace, engine="eager", **JOB)
    helpers.assert_trees_equal(real.params, again.params)


def test_a_loss_made_twice_shares_a_round():
    assert from_loss(plain) == from_loss(plain) != from_loss(lambda params, batch: 0.0)
    assert local_momentum_sgd(from_loss(plain), S) is local_momentum_sgd(from_loss(plain), S)


def test_a_state_that_is_given_stays_as_it_is():
    _, (state, metrics) = from_loss(plain)(PARAMS, {"n": 3}, jnp.ones((4, 3)), None)
    assert (state, metrics) == ({"n": 3}, {})

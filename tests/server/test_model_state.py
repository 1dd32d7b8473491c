"""What a model carries beside its parameters, merged by the server under delays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orlomo_jax import make_method, simulate
from orlomo_jax.methods import METHOD_NAMES

K = 4


def batch_norm_loss(params, model_state, batch, key):
    """One hidden layer with BatchNorm in training mode; running statistics are the state."""
    x, y = batch
    hidden = x @ params["a"]
    mean, variance = hidden.mean(0), hidden.var(0)
    state = {
        "mean": 0.9 * model_state["mean"] + 0.1 * mean,
        "variance": 0.9 * model_state["variance"] + 0.1 * variance,
    }
    return batch_norm_error(params, mean, variance, x, y), (state, {})


def batch_norm_error(params, mean, variance, x, y):
    hidden = (x @ params["a"] - mean) / jnp.sqrt(variance + 1e-5)
    return jnp.mean((jax.nn.relu(hidden * params["scale"]) @ params["b"] - y) ** 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHOD_NAMES)
def test_merged_statistics_evaluate_as_well_as_fresh_ones(name):
    steps = 8

    def batches(key, worker, round):
        key = jax.random.fold_in(jax.random.fold_in(key, worker), round)
        x = 3 * jax.random.normal(key, (steps, 64, 3)) + 5  # far from mean 0 and variance 1
        return x, jnp.sin((x - 5) / 3).sum(-1)

    params = {
        "a": jax.random.normal(jax.random.key(1), (3, 16)),
        "scale": jnp.ones(16),
        "b": jnp.zeros(16),
    }
    start = {"mean": jnp.zeros(16), "variance": jnp.ones(16)}
    method = make_method(name, K, steps)
    result = simulate(
        method,
        batch_norm_loss,
        batches,
        params,
        num_steps=80,
        key=jax.random.key(0),
        model_state=start,
        local_learning_rate=0.03 if method.worker_momentum is None else 0.01,
    )
    x, y = jax.tree.map(lambda b: b.reshape(-1, *b.shape[2:]), batches(jax.random.key(7), 0, 0))
    hidden = x @ result.params["a"]
    fresh = batch_norm_error(result.params, hidden.mean(0), hidden.var(0), x, y)
    merged = batch_norm_error(
        result.params, result.model_state["mean"], result.model_state["variance"], x, y
    )
    unmerged = batch_norm_error(result.params, start["mean"], start["variance"], x, y)
    assert result.status == "finished"
    np.testing.assert_allclose(merged, fresh, rtol=0.05)
    assert unmerged > 2 * fresh  # what evaluation would be without the merge

"""One small problem for many tests, so that they share its compiled programs."""

import jax
import jax.numpy as jnp

from orlomo_jax import heterogeneous, make_method, sample_trace

K, S = 3, 2
PARAMS = {"a": jnp.ones((3, 2)) * jnp.array([0.5, 1.0]), "b": jnp.ones(2), "none": None}
STATE = {"mean": jnp.zeros(3)}
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
"""float32 over 100 iterations, in programs that add in different orders."""


def loss_fn(params, model_state, batch, key):
    """A regression with noise from the round's key, and a running mean as model state."""
    noisy = batch + 0.1 * jax.random.normal(key, batch.shape)
    error = jnp.tanh(noisy @ params["a"]) @ params["b"] - jnp.sin(batch).sum(-1)
    state = {"mean": 0.9 * model_state["mean"] + 0.1 * noisy.mean(0)}
    return jnp.mean(error**2), (state, {})


def batch_fn(key, worker, round):
    key = jax.random.fold_in(jax.random.fold_in(key, worker), round)
    return jax.random.normal(key, (S, 4, 3))


def _poisoned(place, key, worker, round):
    bad = (worker == place[0]) & (round == place[1])
    return jnp.where(bad, jnp.nan, batch_fn(key, worker, round))


def poisoned(worker, round):
    """Batches of which those of one round are not finite."""
    return jax.tree_util.Partial(_poisoned, jnp.array([worker, round]))


def schedule(step):
    return 0.1 / (1.0 + 0.1 * step)


def evaluate(params, model_state):
    return {"a": params["a"].sum()}


def method_of(name):
    return make_method(name, K, S)


def trace_of(name, num_steps, seed=0):
    """Arrivals of workers of two speeds; in rounds for PRSGDm."""
    return sample_trace(heterogeneous(), K, num_steps, S, seed, synchronous=name == "prsgdm")

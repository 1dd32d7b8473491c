"""The caller's JAX settings reach the workers: a replay under them is the same to the bit."""

import contextlib

import jax
import jax.numpy as jnp
import pytest

from orlomo_jax import RayWorkers, ThreadWorkers, jax_settings, make_method, simulate, train
from tests.support import helpers
from tests.support.toy import batch_fn

K = 2
CONTEXTS = {
    "x64": lambda: jax.enable_x64(True),
    "random bits": lambda: jax.threefry_partitionable(False),
    "default key": lambda: jax.default_prng_impl("rbg"),
    "precision": lambda: jax.default_matmul_precision("bfloat16"),
    "promotion": lambda: jax.numpy_dtype_promotion("strict"),
}


def a_loss():
    """Return a loss that differs where a setting is missing; Ray pickles it by value."""

    def loss_fn(params, model_state, batch, key):
        noise = jax.random.normal(jax.random.key(7), (2,))  # of the default implementation
        error = batch @ params + 0.1 * noise
        strict = jnp.float32(jax.config.jax_numpy_dtype_promotion == "strict")
        return jnp.mean(error**2), (model_state, {"strict": strict})

    return loss_fn


def assert_reaches_the_workers(workers, dtype=None):
    job = (make_method("orlomo", K, 2), a_loss(), batch_fn, jnp.ones((3, 2), dtype))
    common = {"key": jax.random.key(0), "local_learning_rate": 0.01}
    result = train(*job, workers, num_steps=8, **common)
    again = simulate(*job, trace=result.trace, engine="eager", **common)
    assert result.health.lost == 0
    helpers.assert_trees_equal(result.params, again.params)
    return result


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTEXTS)
def test_contexts_reach_threads(name):
    with CONTEXTS[name]():
        assert_reaches_the_workers(ThreadWorkers(), float)


@pytest.mark.slow
def test_contexts_reach_ray_actors():
    with contextlib.ExitStack() as stack:
        for name in ("x64", "random bits", "default key", "precision"):
            stack.enter_context(CONTEXTS[name]())
        result = assert_reaches_the_workers(RayWorkers(), float)
    assert result.params.dtype == jnp.float64


@pytest.mark.slow
def test_a_thread_computes_on_the_default_device():
    with jax.default_device(jax.devices()[1]):
        workers = ThreadWorkers()
        result = assert_reaches_the_workers(workers)
    assert result.params.devices() == {jax.devices()[1]}


def test_settings_are_adopted_once_and_given_back():
    before = jax_settings.capture()
    with jax.enable_x64(True), jax.default_matmul_precision("float32"), jax.disable_jit():
        inside = jax_settings.capture()
    assert jax_settings.capture() == before
    with jax_settings.using(inside):
        assert jax_settings.capture() == inside
    assert jax_settings.capture() == before
    try:
        jax_settings.adopt(jax_settings.portable(inside))
        assert jax_settings.capture() == inside
    finally:
        jax_settings.adopt(jax_settings.portable(before))

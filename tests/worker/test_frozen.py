"""Frozen parameters: they stay to the bit, and the others train as if they were constants."""

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from orlomo_jax import ArrivalTrace, local_momentum_sgd, make_method, simulate
from orlomo_jax.methods import METHOD_NAMES

K = 2
FROZEN = {"backbone": True, "head": False}
X = jax.random.normal(jax.random.key(1), (16, 5))
Y = jnp.sin(X.sum(1, keepdims=True))


def start(dtype=jnp.float32):
    backbone = jax.random.normal(jax.random.key(2), (5, 8), jnp.float32)
    backbone = backbone.at[0, 0].set(-0.0)
    return {"backbone": [backbone.astype(dtype)], "head": jnp.zeros((8, 1), dtype)}


def loss(backbone, head):
    return jnp.mean((jnp.tanh(X @ backbone) @ head - Y) ** 2)


def whole_loss(params, model_state, batch, key):
    return loss(params["backbone"][0], params["head"]), (model_state, {})


def frozen_method(name, num_local_steps, frozen, how):
    """Freeze by the method's own mask, or by a transformation after its rule."""
    if how == "method":
        return make_method(name, K, num_local_steps, frozen=frozen)
    method = make_method(name, K, num_local_steps)
    mask = optax.masked(optax.set_to_zero(), frozen)
    return method.with_rule(optax.chain(method.rule, mask))


def run(
    name, loss_fn, params, num_local_steps, frozen=None, engine="compiled", how="method", **options
):
    method = make_method(name, K, num_local_steps)
    if frozen is not None:
        method = frozen_method(name, num_local_steps, frozen, how)
    order = np.tile(np.arange(K), 15)
    result = simulate(
        method,
        None,
        lambda key, worker, round: jnp.ones((num_local_steps, 1)),
        params,
        trace=ArrivalTrace.from_workers(order, K, synchronous=method.synchronous),
        key=jax.random.key(0),
        local_learning_rate=0.1,
        engine=engine,
        round_fn=method.local_round(loss_fn, **options),
    )
    return result.params


@pytest.mark.slow
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("num_local_steps", [1, 4])
@pytest.mark.parametrize("how", ["method", "chain"])
@pytest.mark.parametrize("name", METHOD_NAMES)
def test_the_rest_trains_as_if_they_were_constants(name, how, num_local_steps, weight_decay):
    with jax.enable_x64(True):
        params = start(jnp.float64)

        def of_the_head(head, model_state, batch, key):
            return loss(params["backbone"][0], head), (model_state, {})

        options = {"weight_decay": weight_decay}
        options["gradient_transform"] = optax.clip_by_global_norm(0.3)
        constant = run(name, of_the_head, params["head"], num_local_steps, **options)
        frozen = run(name, whole_loss, params, num_local_steps, FROZEN, how=how, **options)
        np.testing.assert_allclose(frozen["head"], constant, rtol=0, atol=1e-12)
        assert abs(constant).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["compiled", "eager"])
@pytest.mark.parametrize("how", ["method", "chain"])
@pytest.mark.parametrize("name", METHOD_NAMES)
def test_they_stay_to_the_bit(name, how, engine):
    for dtype in (jnp.float32, jnp.bfloat16):
        params = start(dtype)
        mask = lambda params: {"backbone": [True], "head": False}  # noqa: E731
        ended = run(name, whole_loss, params, 4, mask, engine, how, weight_decay=0.05)
        before = np.asarray(params["backbone"][0], np.float32)
        after = np.asarray(ended["backbone"][0])
        assert before.tobytes() == after.tobytes()  # −0 stays −0
        assert abs(np.asarray(ended["head"])).max() > 0.1


def test_a_round_of_its_own_takes_the_mask_too():
    round_fn = local_momentum_sgd(whole_loss, 3, weight_decay=0.1, frozen=FROZEN)
    update = round_fn(start(), None, jnp.ones((3, 1)), 0.1, jax.random.key(0)).update
    assert not update.delta["backbone"][0].any()
    assert not update.momentum["backbone"][0].any()
    assert update.delta["head"].any()


@pytest.mark.parametrize(
    ("frozen", "error", "message"),
    [
        ({"backbone": 1, "head": False}, TypeError, r"`frozen\['backbone'\]` must be a bool"),
        ({"backbone": True}, ValueError, "`frozen` must be a tree of bools like params"),
    ],
)
def test_bad_masks(frozen, error, message):
    def run():
        round_fn = local_momentum_sgd(whole_loss, 1, frozen=frozen)
        return round_fn(start(), None, jnp.ones((1, 1)), 0.1, jax.random.key(0))

    with pytest.raises(error, match=message):
        run()


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_parameters_that_can_be_called_are_no_mask_function(engine):
    """A module of Equinox with bools instead of arrays is a tree of bools."""
    params = equinox.nn.Linear(5, 1, key=jax.random.key(0))

    def loss_fn(params, model_state, batch, key):
        return jnp.mean((jax.vmap(params)(X) - Y) ** 2), (model_state, {})

    def run(frozen):
        return simulate(
            make_method("orlomo", K, 2, frozen=frozen), loss_fn,
            lambda key, worker, round: jnp.zeros(2), params, engine=engine,
            trace=ArrivalTrace.from_workers([0, 1, 1, 0], K), key=jax.random.key(0),
            local_learning_rate=0.1,
        ).params  # fmt: skip

    assert not np.array_equal(run(None).weight, params.weight)
    bias = equinox.tree_at(lambda p: (p.weight, p.bias), params, (False, True))
    for frozen in (bias, lambda params: bias):
        assert not np.array_equal(run(frozen).weight, params.weight)
        np.testing.assert_array_equal(run(frozen).bias, params.bias)

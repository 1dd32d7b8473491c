"""The local round against a plain loop, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from orlomo_jax import cast_reports, local_momentum_sgd
from orlomo_jax.trees import all_finite
from tests.support import helpers

S = 5


def loss_fn(params, model_state, batch, key):
    """A small regression with dropout-like noise, a running mean and a metric."""
    x, y = batch
    hidden = jnp.tanh(x @ params["a"]) * jax.random.bernoulli(key, 0.8, (4,))
    error = hidden @ params["b"] - y
    loss = jnp.mean(error**2)
    return loss, (
        {"mean": 0.9 * model_state["mean"] + 0.1 * hidden.mean(0)},
        {"mae": abs(error).mean()},
    )


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32), "b": jnp.ones(4)}
    batches = (
        jnp.asarray(rng.normal(size=(S, 8, 3)), jnp.float32),
        jnp.asarray(rng.normal(size=(S, 8)), jnp.float32),
    )
    return params, {"mean": jnp.zeros(4)}, batches, jax.random.key(3)


def plain_loop(problem, optimizer, start=None):
    """The same steps by optax, one jitted gradient at a time."""
    params, model_state, batches, key = problem
    initial, state = params, optimizer.init(params)
    if start is not None:
        state = optax.tree.set(state, trace=start)
    losses = []
    gradient_fn = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    for s in range(S):
        batch = jax.tree.map(lambda x, s=s: x[s], batches)
        (loss, (model_state, _)), gradient = gradient_fn(
            params, model_state, batch, jax.random.fold_in(key, s)
        )
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(loss)
    return jax.tree.map(jnp.subtract, initial, params), model_state, jnp.stack(losses), state


@pytest.mark.parametrize("momentum", [0.9, 0.0, None])
@pytest.mark.parametrize("unroll", [None, 1, pytest.param(True, marks=pytest.mark.slow)])
def test_round_is_optax_momentum_sgd(problem, momentum, unroll):
    params, model_state, batches, key = problem
    round_fn = local_momentum_sgd(
        loss_fn,
        S,
        momentum,
        weight_decay=0.01,
        gradient_transform=optax.clip_by_global_norm(0.5),
        unroll=unroll,
    )
    result = round_fn(params, model_state, batches, 0.1, key)
    optimizer = optax.chain(
        optax.clip_by_global_norm(0.5), optax.add_decayed_weights(0.01), optax.sgd(0.1, momentum)
    )
    delta, end_state, losses, state = plain_loop(problem, optimizer)
    helpers.assert_trees_close(result.update.delta, delta, rtol=1e-4, atol=1e-6)
    helpers.assert_trees_close(result.model_state, end_state, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.loss, losses, rtol=1e-5)
    assert result.metrics["mae"].shape == (S,)
    assert bool(result.finite)
    if momentum is None:
        assert result.update.momentum is None
    elif momentum:
        trace = jax.tree.map(lambda m: 0.1 * m, optax.tree.get(state, "trace"))
        helpers.assert_trees_close(result.update.momentum, trace, rtol=1e-4, atol=1e-6)


def test_round_starts_from_a_given_momentum(problem):
    params, model_state, batches, key = problem
    start = jax.tree.map(lambda x: 0.01 * jnp.ones_like(x), params)
    round_fn = local_momentum_sgd(loss_fn, S, 0.9)
    result = round_fn(params, model_state, batches, 0.1, key, momentum=start)
    unscaled = jax.tree.map(lambda u: u / 0.1, start)
    delta, *_ = plain_loop(problem, optax.sgd(0.1, 0.9), unscaled)
    helpers.assert_trees_close(result.update.delta, delta, rtol=1e-4, atol=1e-6)


def test_identity_of_the_proofs(problem):
    """Δh/(1−β) = βΔu/(1−β) + Δw, with Δh = γ Σ g: here by a loss of constant gradient."""
    slope = jnp.arange(3.0)

    def linear(params, model_state, batch, key):
        return batch * params @ slope, (model_state, {})

    result = local_momentum_sgd(linear, 4, 0.9)(
        jnp.zeros(3), None, jnp.arange(4.0), 0.1, jax.random.key(0)
    )
    gradients = 0.1 * np.arange(4).sum() * slope
    identity = 0.9 * result.update.momentum / 0.1 + result.update.delta
    np.testing.assert_allclose(gradients / 0.1, identity, rtol=1e-5)


def test_transform_is_initialised_each_round(problem):
    params, model_state, batches, key = problem
    counting = optax.scale_by_schedule(lambda count: 1.0 + count)
    round_fn = local_momentum_sgd(loss_fn, S, gradient_transform=counting)
    once = round_fn(params, model_state, batches, 0.1, key)
    again = round_fn(params, model_state, batches, 0.1, key)
    helpers.assert_trees_equal(once, again)


def test_learning_rate_and_key_do_not_retrace(problem):
    params, model_state, batches, key = problem
    traces = []

    def counted(*args):
        traces.append(args)
        return loss_fn(*args)

    round_fn = local_momentum_sgd(counted, S, unroll=1)
    for rate in (0.1, 0.2, 0.3):
        round_fn(params, model_state, batches, rate, jax.random.fold_in(key, int(rate * 10)))
    assert len(traces) == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_reports_are_in_float32_at_least(dtype):
    def quadratic(params, model_state, batch, key):
        return jnp.sum((params - batch) ** 2).astype(jnp.float32), (model_state, {})

    batches = jnp.ones((3, 2), dtype)
    result = local_momentum_sgd(quadratic, 3, weight_decay=0.1)(
        jnp.zeros(2, dtype), None, batches, 0.1, jax.random.key(0)
    )
    assert result.update.delta.dtype == result.update.momentum.dtype == jnp.float32
    assert result.loss.dtype == jnp.float32


@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_low_precision_rounds_are_float32_rounds_rounded_once(decay):
    """In bfloat16 itself β = 0.999 would be 1."""

    def zero(params, model_state, batch, key):
        return 0 * jnp.sum(params).astype(jnp.float32), (model_state, {})

    result = local_momentum_sgd(zero, 1000, decay)(
        jnp.zeros(1, jnp.bfloat16),
        None,
        jnp.ones(1000),
        0.0,
        jax.random.key(0),
        momentum=jnp.ones(1),
    )
    np.testing.assert_allclose(float(result.update.momentum[0]), decay**1000, rtol=0.01, atol=1e-30)


def test_complex_parameters_descend():
    def square(params, model_state, batch, key):
        return jnp.sum(jnp.abs(params - batch) ** 2), (model_state, {})

    goal = jnp.full((50, 2), 1 - 2j, jnp.complex64)
    start = 1j * jnp.ones(2, jnp.complex64)
    result = local_momentum_sgd(square, 50, 0.5)(start, None, goal, 0.1, jax.random.key(0))
    np.testing.assert_allclose(start - result.update.delta, goal[0], rtol=1e-3)


def test_loop_is_unrolled_where_the_loss_convolves():
    """On a CPU: no while loop in the program of a convolution, one in that of a matmul."""

    def convolution(params, model_state, batch, key):
        out = jax.lax.conv(batch, params, (1, 1), "SAME")
        return jnp.sum(out**2), (model_state, {})

    def matmul(params, model_state, batch, key):
        return jnp.sum((batch @ params) ** 2), (model_state, {})

    key = jax.random.key(0)
    texts = [
        jax.jit(local_momentum_sgd(loss, 3)).lower(params, None, batches, 0.1, key).as_text()
        for loss, params, batches in (
            (convolution, jnp.ones((2, 1, 3, 3)), jnp.ones((3, 4, 1, 8, 8))),
            (matmul, jnp.ones((2, 2)), jnp.ones((3, 4, 2))),
        )
    ]
    assert [("stablehlo.while" in text) for text in texts] == [False, True]


@pytest.mark.parametrize("where", ["params", "loss", "model_state"])
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_finite_flag(where, value):
    def poisoned(params, model_state, batch, key):
        loss = jnp.sum(params * (batch if where == "params" else 1.0))
        loss = loss + (jax.lax.stop_gradient(batch) if where == "loss" else 0.0)
        return loss, (model_state + (batch if where == "model_state" else 0.0), {})

    round_fn = local_momentum_sgd(poisoned, 2)
    args = (jnp.ones(()), jnp.zeros(()))
    assert bool(round_fn(*args, jnp.ones(2), 0.1, jax.random.key(0)).finite)
    assert not bool(round_fn(*args, jnp.array([1.0, value]), 0.1, jax.random.key(0)).finite)


def test_all_finite_of_nothing_and_of_integers():
    assert bool(all_finite(None))
    assert bool(all_finite({"a": jnp.arange(3)}))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_local_steps": 0}, ValueError, "`num_local_steps` must be ≥ 1"),
        ({"num_local_steps": 1.5}, TypeError, "num_local_steps=1.5"),
        ({"num_local_steps": 1, "momentum": 1.0}, ValueError, r"`momentum` must be in \[0, 1\)"),
        ({"num_local_steps": 1, "weight_decay": -1.0}, ValueError, "weight_decay=-1.0"),
    ],
)
def test_bad_hyperparameters(options, error, message):
    with pytest.raises(error, match=message):
        local_momentum_sgd(loss_fn, **options)


def test_bad_calls(problem):
    params, model_state, batches, key = problem
    args = (params, model_state, batches, 0.1, key)
    with pytest.raises(
        ValueError, match=r"`batches\[0\]` must have a leading axis of num_local_ste"
    ):
        local_momentum_sgd(loss_fn, 4)(*args)
    with pytest.raises(ValueError, match="plain SGD"):
        local_momentum_sgd(loss_fn, S, None)(*args, momentum=params)
    with pytest.raises(ValueError, match="structure"):
        local_momentum_sgd(loss_fn, S)(*args, momentum=params["a"])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.complex64])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_all_finite_finds_any_bad_value(dtype, bad):
    largest = float(jnp.finfo(dtype).max)
    good = jnp.array([-largest, 0.0, largest], dtype)
    if dtype == jnp.complex64:
        good = good * (1 + 1j)  # whose absolute value overflows
    assert bool(all_finite([good, jnp.zeros((0, 3), dtype), jnp.arange(3)]))
    for index in range(3):
        assert not bool(all_finite([good, good.at[index].set(bad)]))


def test_a_narrowing_that_overflows_is_not_finite(problem):
    params, model_state, batches, key = problem
    round_fn = local_momentum_sgd(loss_fn, S)
    args = (params, model_state, (1e4 * batches[0], 1e8 * batches[1]), 1.0, key)
    wide, narrow = round_fn(*args), cast_reports(round_fn, jnp.float16)(*args)
    assert bool(wide.finite)
    assert not bool(jnp.isfinite(narrow.update.delta["b"]).all())
    assert not bool(narrow.finite)

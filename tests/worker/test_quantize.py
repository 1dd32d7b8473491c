"""Reports in int8: codes and scales, the rounding error that a worker keeps, and its edges."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from orlomo_jax import (
    LocalUpdate,
    ParameterServer,
    cast_reports,
    local_momentum_sgd,
    local_round,
    make_method,
    simulate,
)
from orlomo_jax.worker import LocalWorker, RoundResult, Workload, quantize_reports
from orlomo_jax.worker.int8_blocks import Int8Blocks, decode, decode_on_host, encode
from orlomo_jax.worker.wire import wire_of
from tests.support import helpers

KEY = jax.random.key(0)
SHAPES = {"matrix": (37, 19), "vector": (300,), "tiny": (3,), "scalar": (), "one": (1,)}
PARAMS = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}


def loss_fn(params, model_state, batch, key):
    """A linear loss: the gradient is the batch."""
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, params, batch))), (model_state, {})


def random_tree(seed, scale=1.0):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {
        name: scale * jax.random.normal(key, shape) ** 3
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }


def batches_of(seed, num_steps=1):
    trees = [random_tree(100 * seed + step) for step in range(num_steps)]
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def bits(x):
    return np.asarray(x).view(np.uint32)


@pytest.mark.parametrize(
    "block",
    [
        1,
        7,
        256,
        pytest.param(2, marks=pytest.mark.slow),
        pytest.param(64, marks=pytest.mark.slow),
        pytest.param(1000, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "scale",
    [
        1e-35,
        1.0,
        pytest.param(1e-20, marks=pytest.mark.slow),
        pytest.param(1e35, marks=pytest.mark.slow),
    ],
)
def test_the_codes_of_decoded_arrays_are_the_same(block, scale):
    for seed in range(3):
        x = random_tree(seed, scale)["matrix"]
        first = jax.jit(encode, static_argnums=1)(x, block)
        rounded = jax.jit(decode, static_argnums=(1, 2))(first, block, jnp.float32)
        again = encode(rounded, block)  # not compiled as one program
        helpers.assert_trees_equal(first, again)
        host = decode_on_host(Int8Blocks(*map(np.asarray, first)), block, np.float32)
        np.testing.assert_array_equal(bits(host), bits(rounded))
        error = np.abs(np.asarray(x, float) - np.asarray(rounded, float)).reshape(-1)
        scales = np.repeat(np.asarray(first.scales, float), block)[: error.size]
        assert (error <= 0.5001 * scales + 127 * 2.0**-120).all()


def test_scales_of_full_precision_would_not_survive():
    """Negative control: this is why the scales have 17 bits."""
    x = np.asarray(random_tree(0)["matrix"]).reshape(-1)
    scale = np.abs(x).max() / np.float32(127)
    rounded = np.round(x / scale) * scale
    lost = [np.abs(rounded * m).max() / np.float32(127) != np.float32(scale * m)
            for m in np.linspace(1, 2, 1000, dtype=np.float32)]  # fmt: skip
    assert any(lost)


def test_zero_blocks_are_positive_zeros_and_bad_blocks_are_nan():
    x = jnp.array([-0.0, 0.0, 1.0, -1e-9, jnp.nan, 1.0, jnp.inf, 2.0, 3e-38, -1e-39])
    blocks = encode(x, 2)
    rounded = decode(blocks, 2, jnp.float32)
    host = decode_on_host(Int8Blocks(*map(np.asarray, blocks)), 2, np.float32)
    expected = [0, 0, 1, 0, np.nan, np.nan, np.nan, np.nan, 0, 0]
    for found in (rounded, host):
        np.testing.assert_allclose(np.asarray(found), np.float32(expected), rtol=1e-4)
        assert not np.signbit(np.asarray(found)[[0, 3, 9]]).any()


def test_a_wrong_number_of_scales_is_refused():
    with pytest.raises(ValueError, match="`scales` must be one for each 4 of 8 codes"):
        decode_on_host(Int8Blocks(np.zeros(8, np.int8), np.ones(3, np.float32)), 4, np.float32)


@pytest.mark.parametrize("momentum", [pytest.param(None, marks=pytest.mark.slow), 0.9])
def test_reports_and_the_last_error_add_up_to_the_updates(momentum):
    plain = local_momentum_sgd(loss_fn, 2, momentum)
    round_fn = quantize_reports(plain, 64)
    update = plain(PARAMS, None, batches_of(0, 2), 0.1, KEY).update
    sums = jax.tree.map(lambda x: np.zeros(x.shape), update)
    exact, sizes, state = sums, sums, None
    for round in range(20):
        args = (PARAMS, None, batches_of(round, 2), 0.1, KEY)
        update = plain(*args).update
        result = round_fn(*args, local_state=state)
        error = result.local_state.error
        if state is not None:
            # In one round: report + new error = update + old error, rounded once.
            for x, old, new, y in zip(
                big_leaves(update), state.error, error, big_leaves(result.update), strict=True
            ):
                np.testing.assert_array_equal(np.float64(new) + np.float64(y), x + old)
        state = result.local_state
        add = lambda total, x: total + np.asarray(x, float)  # noqa: E731
        sums = jax.tree.map(add, sums, result.update)
        exact = jax.tree.map(add, exact, update)
        sizes = jax.tree.map(lambda total, x: total + np.abs(x).max(), sizes, update)
    assert len(state.error) == len(big_leaves(update))
    for c, d, e, size in zip(
        big_leaves(sums), big_leaves(exact), state.error, big_leaves(sizes), strict=True
    ):
        np.testing.assert_allclose(c, d - np.asarray(e, float), rtol=0, atol=2e-7 * size.max())
        assert np.abs(np.asarray(e)).max() > 1e-5, "an error that matters"


def big_leaves(update):
    """The rounded leaves: those with more than one entry."""
    return [x for x in jax.tree.leaves(update) if np.size(x) > 1]


def test_without_error_feedback_the_errors_add_up():
    """Negative control of the sums: a component that is always rounded to 0 is never reported."""
    batches = {**batches_of(0), "tiny": jnp.array([[127.0, 0.25, 0.0]])}
    plain = local_momentum_sgd(loss_fn, 1, None)
    for feedback, expected in ((True, 2.0), (False, 0.0)):
        round_fn = quantize_reports(plain, error_feedback=feedback)
        total, state = 0.0, None
        for _ in range(8):
            kept = {"local_state": state} if feedback else {}
            result = round_fn(PARAMS, None, batches, 1.0, KEY, **kept)
            state, total = result.local_state, total + float(result.update.delta["tiny"][1])
        assert total == expected
        assert (state is None) == (not feedback)


def test_entries_that_int8_would_not_shorten_stay_exact():
    plain = local_momentum_sgd(loss_fn, 1)
    args = (PARAMS, None, batches_of(1), 0.1, KEY)
    ours, exact = quantize_reports(plain)(*args).update, plain(*args).update
    for name in ("scalar", "one"):
        helpers.assert_trees_equal(ours.delta[name], exact.delta[name])
    for name in ("matrix", "vector", "tiny"):
        assert not np.array_equal(ours.delta[name], exact.delta[name])


@pytest.mark.slow
def test_the_wire_returns_the_same_bits_in_a_quarter_of_the_bytes():
    params = {"w": jnp.zeros((500, 500)), "b": jnp.zeros(500), "gain": jnp.zeros(())}
    round_fn = quantize_reports(local_momentum_sgd(loss_fn, 1))
    batch = jax.tree.map(lambda x: jax.random.normal(KEY, (1, *x.shape)), params)
    update = round_fn(params, None, batch, 0.1, KEY).update
    wire = wire_of(round_fn)
    packed = jax.device_get(wire.pack(update))
    sent, whole = (sum(x.nbytes for x in jax.tree.leaves(t)) for t in (packed, update))
    assert sent <= 0.27 * whole
    dtypes = [x.dtype for x in jax.tree.leaves(params)]
    helpers.assert_trees_equal(jax.device_get(update), wire.unpack(packed, dtypes))
    assert wire_of(local_momentum_sgd(loss_fn, 1)) is None


@pytest.mark.slow
def test_bfloat16_complex_and_frozen_leaves():
    params = {
        "narrow": jnp.zeros(300, jnp.bfloat16),
        "complex": jnp.zeros(8, jnp.complex64),
        "frozen": jnp.ones(40),
    }

    def real_loss(params, model_state, batch, key):
        total = jnp.vdot(params["narrow"], batch) + jnp.sum(params["frozen"])
        return total + jnp.sum(jnp.abs(params["complex"] - 1) ** 2), (model_state, {})

    frozen = {"narrow": False, "complex": False, "frozen": True}
    plain = local_momentum_sgd(real_loss, 1, frozen=frozen)
    round_fn = quantize_reports(plain)
    args = (params, None, jax.random.normal(KEY, (1, 300), jnp.bfloat16), 0.1, KEY)
    result, exact = round_fn(*args), plain(*args)
    assert result.update.delta["narrow"].dtype == jnp.float32
    assert not np.array_equal(result.update.delta["narrow"], exact.update.delta["narrow"])
    helpers.assert_trees_equal(result.update.delta["complex"], exact.update.delta["complex"])
    helpers.assert_trees_equal(result.update.delta["frozen"], jnp.zeros(40))
    assert [x.shape for x in result.local_state.error] == [(40,), (300,)] * 2
    packed = jax.device_get(round_fn.wire.pack(result.update))
    dtypes = [np.dtype(x.dtype) for x in jax.tree.leaves(result.update.delta)]
    helpers.assert_trees_equal(jax.device_get(result.update), round_fn.wire.unpack(packed, dtypes))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_what_is_not_finite_counts_as_such(bad):
    round_fn = quantize_reports(local_momentum_sgd(loss_fn, 1, None))
    batches = {**batches_of(0), "tiny": jnp.array([[bad, 1.0, 1.0]], jnp.float32)}
    state = round_fn(PARAMS, None, batches_of(1), 1.0, KEY).local_state
    if bad == 3e38:  # it is finite, until the kept error is added
        assert round_fn(PARAMS, None, batches, 1.0, KEY, local_state=state).finite
        error = [x.at[0].set(3e38) if x.shape == (3,) else x for x in state.error]
        state = state._replace(error=error)
    assert not round_fn(PARAMS, None, batches, 1.0, KEY, local_state=state).finite


@pytest.mark.slow
def test_it_keeps_the_state_of_the_optimizer_too():
    inner = local_round(loss_fn, 2, optax.scale_by_adam())
    round_fn = quantize_reports(cast_reports(inner, jnp.bfloat16), 64)
    workload = Workload.of(round_fn, lambda key, worker, round: batches_of(0, 2), KEY)
    server = ParameterServer(make_method("al_sgd", 1, 2), PARAMS, local_learning_rate=0.05)
    worker = LocalWorker(workload, 0)
    for round in range(3):
        worker.run(round, server.to_send(), fresh=round == 0)
    state = worker.local_state(2)
    assert int(state.optimizer.count) == 6
    assert any(np.any(x) for x in state.error)
    forgetful = quantize_reports(local_round(loss_fn, 2, optax.scale_by_adam(), keep_state=False))
    state = forgetful(PARAMS, None, batches_of(0, 2), 0.1, KEY).local_state
    assert state.optimizer is None
    inner_only = quantize_reports(inner, error_feedback=False)
    state = inner_only(PARAMS, None, batches_of(0, 2), 0.1, KEY).local_state
    assert int(state.count) == 2


def test_a_round_of_your_own_with_or_without_a_momentum():
    def own(params, model_state, batches, rate, key, *, momentum=None):
        update = LocalUpdate(jax.tree.map(lambda x: rate * x[0], batches))
        return RoundResult(update, model_state, jnp.zeros(1), {}, jnp.array(True))

    round_fn, state = quantize_reports(own), None
    for _ in range(2):
        result = round_fn(PARAMS, None, batches_of(0), 0.1, KEY, local_state=state)
        assert state is None or jax.tree.structure(state) == jax.tree.structure(result.local_state)
        state = result.local_state
    assert any(np.any(x) for x in state.error)


@pytest.mark.parametrize(
    "name",
    [
        "orlomo",
        pytest.param("prsgdm", marks=pytest.mark.slow),
        pytest.param("al_sgd", marks=pytest.mark.slow),
    ],
)
def test_both_engines_agree_and_error_feedback_helps(name):
    method = make_method(name, 3, 2)
    target = random_tree(5)

    def to_target(params, model_state, batch, key):
        parts = jax.tree.map(lambda x, y: jnp.sum((x - y) ** 2), params, target)
        return sum(jax.tree.leaves(parts)), (model_state, {})

    def run(round_fn, engine):
        batch_fn = lambda key, worker, round: jnp.zeros((2, 1))  # noqa: E731
        return simulate(method, None, batch_fn, PARAMS, round_fn=round_fn, engine=engine,
                        num_steps=240, key=KEY, local_learning_rate=0.02).params  # fmt: skip

    round_fn = quantize_reports(method.local_round(to_target), 64)
    eager, compiled = (run(round_fn, engine) for engine in ("eager", "compiled"))
    helpers.assert_trees_close(eager, compiled, rtol=1e-3, atol=1e-4)
    distance = lambda x: float(optax.tree.norm(jax.tree.map(jnp.subtract, x, target)))  # noqa: E731
    assert distance(eager) < 0.01 * distance(PARAMS)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((loss_fn, 0), ValueError, "`block` must be ≥ 1, got block=0"),
        ((loss_fn, 2.5), TypeError, "`block` must be an integer, got block=2.5"),
        ((None,), TypeError, "`round_fn` must be a local round, got round_fn=None"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        quantize_reports(*arguments)
    with pytest.raises(TypeError, match="`error_feedback`"):
        quantize_reports(loss_fn, error_feedback="yes")

"""Simulated runs under JAX's debugging and strictness modes: one result on every engine."""

from contextlib import ExitStack

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from orlomo_jax import ArrivalTrace, Checkpointer, ThreadWorkers, make_method, simulate, train
from tests.support import helpers
from tests.support.helpers import ENGINES

K, S, T = 2, 2, 8
MODES = {
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "disable_jit": jax.disable_jit,
    "dtype_promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
    "checks": lambda: jax.enable_checks(True),
    "leaks": jax.checking_leaks,
    "transfers": lambda: jax.transfer_guard_device_to_device("disallow"),
    "x64": lambda: jax.enable_x64(True),
}


def loss_fn(params, model_state, batch, key):
    noise = jax.random.normal(key, batch.shape, batch.dtype)
    error = (batch + jnp.float32(0.1) * noise) @ params["w"] - jnp.float32(1)
    new = {"mean": jnp.float32(0.5) * (model_state["mean"] + error.mean()), "count": jnp.int32(1)}
    return (error * error).mean(), (new, {"largest": abs(error).max()})


def batch_fn(key, worker, round):
    key = jax.random.fold_in(jax.random.fold_in(key, worker), round)
    return jax.random.normal(key, (S, 4, 8), jnp.float32)


@jax.jit
def evaluate(params, model_state):
    return {"norm": abs(params["w"]).sum() + model_state["mean"]}


@jax.tree_util.Partial
def schedule(step):
    return jnp.float32(0.1) / (jnp.float32(1) + step.astype(jnp.float32))


def run(name, engine, params=None, **options):
    method = make_method(name, K, S)
    return simulate(
        method,
        loss_fn,
        batch_fn,
        {"w": jnp.zeros(8, jnp.float32)} if params is None else params,
        trace=ArrivalTrace.from_workers([0, 1] * (T // 2), K, synchronous=method.synchronous),
        key=jax.random.key(0),
        local_learning_rate=schedule,
        model_state={"mean": jnp.zeros((), jnp.float32), "count": jnp.zeros((), jnp.int32)},
        evaluate=evaluate,
        evaluate_every=3,
        engine=ENGINES[engine],
        **options,
    )


@pytest.mark.slow  # each is compiled anew in each mode
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["orlomo", "prsgdm"])
def test_modes(name, mode, engine, tmp_path):
    expected = run(name, engine)
    with ExitStack() as stack:
        stack.enter_context(MODES[mode]())
        result = run(name, engine, checkpoint=Checkpointer(tmp_path, 5))
        again = run(name, engine, checkpoint=Checkpointer(tmp_path, 5))
    helpers.assert_trees_equal(result[:3], again[:3])
    if mode != "x64":  # whose random numbers of other modes are others
        helpers.assert_trees_close(result[:3], expected[:3], 1e-4, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("axis", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("engine", ENGINES)
def test_meshes(engine, axis):
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",), axis_types=(axis,))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    params = {"w": jax.device_put(jnp.zeros(8, jnp.float32), sharding)}
    result = run("orlomo", engine, params)
    assert result.params["w"].sharding.is_equivalent_to(sharding, 1)
    helpers.assert_trees_close(result[:3], run("orlomo", engine)[:3], 1e-4, 1e-6)


@pytest.mark.parametrize(
    "engine",
    [pytest.param(x, marks=() if x == "eager" else pytest.mark.slow) for x in ENGINES],
)
def test_debug_nans_names_the_operation(engine):
    def root(params, model_state, batch, key):
        return jnp.sqrt(params["w"] - 1).sum(), (model_state, {})

    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        simulate(
            make_method("orlomo", K, S),
            root,
            batch_fn,
            {"w": jnp.zeros(8)},
            trace=ArrivalTrace.from_workers([0, 1] * 2, K),
            key=jax.random.key(0),
            local_learning_rate=0.1,
            engine=ENGINES[engine],
        )


@pytest.mark.slow
def test_threads_train_parameters_on_a_mesh_with_explicit_axes():
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",), axis_types=(AxisType.Explicit,))
    shardings = {
        "w": NamedSharding(mesh, PartitionSpec("x")),
        "b": NamedSharding(mesh, PartitionSpec()),
    }
    params = jax.device_put({"w": jnp.zeros((8, 3)), "b": jnp.zeros(3)}, shardings)

    def loss_fn(params, model_state, batch, key):
        return ((batch @ params["w"] + params["b"] - 1) ** 2).mean(), (model_state, {})

    method = make_method("orlomo", K, S)
    settings = {"num_steps": T, "key": jax.random.key(0), "local_learning_rate": 0.1}
    result = train(method, loss_fn, batch_fn, params, ThreadWorkers(), **settings)
    assert jax.tree.map(lambda x: x.sharding, result.params) == shardings


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.bfloat16])
def test_strict_promotion_and_parameters_that_are_not_float32(dtype):
    def loss_fn(params, model_state, batch, key):
        return jnp.square(params.astype(jnp.float32)).sum(), (model_state, {})

    method = make_method("orlomo", K, S, accumulator_dtype=jnp.float32)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        result = simulate(
            method,
            loss_fn,
            batch_fn,
            jnp.ones(3, dtype),
            trace=ArrivalTrace.from_workers([0, 1] * 3, K),
            key=jax.random.key(0),
            local_learning_rate=0.1,
        )
    assert result.params.dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)

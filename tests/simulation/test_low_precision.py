"""Parameters of 16 bits: float32 masters on the server and within a round."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orlomo_jax import (
    ArrivalTrace,
    Checkpointer,
    LocalUpdate,
    ParameterServer,
    Report,
    ThreadWorkers,
    make_method,
    simulate,
    train,
)
from orlomo_jax.methods import METHOD_NAMES
from tests.support import helpers
from tests.support.helpers import ENGINES

K, S, T = 4, 2, 40
DTYPES = [jnp.bfloat16, jnp.float16]


def loss_fn(params, model_state, batch, key):
    """Its gradient is the sign of the parameters, whatever their size."""
    return jnp.abs(params["w"].astype(jnp.float32)).sum() + 0 * batch.sum(), (
        {"seen": params["w"].astype(model_state["seen"].dtype)},
        {},
    )


def batch_fn(key, worker, round):
    return jnp.ones((S, 1))


def run(name, dtype, engine="loop", state_dtype=jnp.float32, **options):
    method = make_method(name, K, S, **options.pop("method", {}))
    order = np.tile(np.arange(K), T // K)
    return simulate(
        method,
        loss_fn,
        batch_fn,
        {"w": jnp.full(4, 1.0, dtype)},
        trace=ArrivalTrace.from_workers(order, K, synchronous=method.synchronous),
        key=jax.random.key(0),
        local_learning_rate=1e-3,
        model_state={"seen": jnp.ones(4, state_dtype)},
        engine=ENGINES[engine],
        **options,
    )


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", METHOD_NAMES)
def test_masters_train_as_float32_does(name, dtype, engine):
    wide, narrow = run(name, jnp.float32, engine), run(name, dtype, engine)
    assert narrow.params["w"].dtype == jnp.float32
    np.testing.assert_allclose(narrow.params["w"], wide.params["w"], atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_masters_one_kth_of_a_report_is_lost(dtype):
    """What the masters are for; and the option that turns them off."""
    options = {"method": {"master_params": False}}
    stuck = run("al_sgd", jnp.bfloat16, **options)
    assert stuck.params["w"].dtype == jnp.bfloat16
    assert (stuck.params["w"] == 1).all()


def test_the_loss_sees_rounded_parameters():
    seen = run("al_sgd", jnp.bfloat16, state_dtype=jnp.float32).model_state["seen"]
    masters = run("al_sgd", jnp.bfloat16).params["w"]
    assert not (masters == masters.astype(jnp.bfloat16).astype(jnp.float32)).all()
    assert seen.dtype == jnp.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_sent_is_rounded_and_what_is_kept_is_not(dtype):
    method = make_method("al_sgd", K, S)
    params, state = {"w": jnp.ones(3, dtype), "b": jnp.ones(2)}, {"mean": jnp.ones(3, dtype)}
    server = ParameterServer(method, params, state, local_learning_rate=0.1)
    task = server.dispatch(0)
    assert (task.start.params["w"].dtype, task.start.params["b"].dtype) == (dtype, jnp.float32)
    assert task.start.model_state["mean"].dtype == dtype
    step = {"w": jnp.full(3, 1e-3), "b": jnp.full(2, 1e-3)}
    server.receive(Report(task.id, LocalUpdate(step), {"mean": jnp.zeros(3, dtype)}))
    np.testing.assert_allclose(server.params["w"], 1 - 1e-3 / K, rtol=1e-6)
    np.testing.assert_allclose(server.model_state["mean"], 1 - 1 / K, rtol=1e-6)
    assert (server.dispatch(0).start.params["w"] == server.params["w"].astype(dtype)).all()


@pytest.mark.parametrize("engine", [pytest.param("eager", marks=pytest.mark.slow), "loop"])
@pytest.mark.parametrize("name", ["orlomo", pytest.param("prsgdm", marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(name, engine, tmp_path):
    unbroken = run(name, jnp.bfloat16, engine, state_dtype=jnp.bfloat16)

    def interrupt(record):
        if record.step == 27:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(
            name,
            jnp.bfloat16,
            engine,
            state_dtype=jnp.bfloat16,
            checkpoint=Checkpointer(tmp_path, 10),
            callbacks=[interrupt],
        )
    resumed = run(
        name, jnp.bfloat16, engine, state_dtype=jnp.bfloat16, checkpoint=Checkpointer(tmp_path, 10)
    )
    helpers.assert_trees_equal(resumed[:3], unbroken[:3])


@pytest.mark.parametrize("name", ["orlomo", pytest.param("prsgdm", marks=pytest.mark.slow)])
def test_a_real_run_is_its_replay_to_the_bit(name):
    params = {"w": jnp.full(4, 1.0, jnp.bfloat16)}
    job = (make_method(name, K, S), loss_fn, batch_fn, params)
    settings = {"key": jax.random.key(0), "local_learning_rate": 1e-3}
    settings["model_state"] = {"seen": jnp.ones(4)}
    real = train(*job, ThreadWorkers(), num_steps=2 * K, **settings)
    again = simulate(*job, trace=real.trace, engine="eager", **settings)
    helpers.assert_trees_equal(real[:3], again[:3])
    assert real.params["w"].dtype == jnp.float32

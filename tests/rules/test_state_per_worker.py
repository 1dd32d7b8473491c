"""A server rule of one's own with state for each worker, in every kind of run."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from orlomo_jax import (
    Checkpointer,
    LocalUpdate,
    Method,
    ParameterServer,
    RayWorkers,
    ThreadWorkers,
    make_method,
    register_method,
    simulate,
    train,
)
from tests.support import helpers
from tests.support.real_runs import Killed, arguments, killed_at
from tests.support.toy import (
    PARAMS,
    ROUNDING,
    STATE,
    K,
    S,
    batch_fn,
    loss_fn,
    schedule,
    trace_of,
)

T = 30


class NewestState(NamedTuple):
    """The newest Δw of each worker; every leaf has a leading axis K."""

    newest: Any


def newest_of_each(num_workers, decay):
    """Descend along the mean of the workers' newest Δw, the older ones decayed."""

    def init(params):
        return NewestState(jax.tree.map(lambda x: jnp.zeros((num_workers, *x.shape)), params))

    def update(updates, state, params=None, *, worker, dispatched_at=None, **extra_args):
        newest = jax.tree.map(
            lambda all, mine: (decay * all).at[worker].set(mine), state.newest, updates.delta
        )
        return jax.tree.map(lambda x: -x.mean(0), newest), NewestState(newest)

    return optax.GradientTransformationExtraArgs(init, update)


def factory(num_workers, num_local_steps, decay=0.5):
    return Method(
        "newest_of_each",
        newest_of_each(num_workers, decay),
        num_workers,
        num_local_steps,
        model_state_weight=lambda step, delay: 1.0 / num_workers,
    )


register_method("newest_of_each", factory)


def method():
    return make_method("newest_of_each", K, S)


def run(engine, trace=None, **options):
    options = arguments() | {"trace": trace_of("newest", T) if trace is None else trace} | options
    return simulate(method(), loss_fn, batch_fn, PARAMS, engine=engine, **options)


def by_hand(trace):
    """Each version from the newest Δw of each worker, in NumPy; no rule, no server."""
    data_key, noise_key = jax.random.split(arguments()["key"])
    round_fn = method().local_round(loss_fn)
    versions, kept = [PARAMS], [jax.tree.map(np.zeros_like, PARAMS) for _ in range(K)]
    for worker, round, index in zip(trace.workers, trace.rounds, trace.dispatched_at, strict=True):
        key = jax.random.fold_in(jax.random.fold_in(noise_key, worker), round)
        batches = batch_fn(data_key, worker, round)
        result = round_fn(versions[index], STATE, batches, schedule(index), key)
        kept = [jax.tree.map(lambda x: 0.5 * x, old) for old in kept]
        kept[worker] = jax.tree.map(np.asarray, result.update.delta)
        mean = jax.tree.map(lambda *leaves: sum(leaves) / K, *kept)
        versions.append(jax.tree.map(lambda w, x: w - x, versions[-1], mean))
    return versions[-1], kept


@pytest.mark.parametrize("engine", [pytest.param("eager", marks=pytest.mark.slow), "compiled"])
def test_the_simulator_trains_as_by_hand(engine):
    result = run(engine)
    params, kept = by_hand(result.trace)
    helpers.assert_trees_close(result.params, params, **ROUNDING)
    newest = [jax.tree.map(lambda x, k=k: x[k], result.rule_state.newest) for k in range(K)]
    helpers.assert_trees_close(newest, kept, **ROUNDING)
    assert not np.allclose(result.params["a"], PARAMS["a"], atol=1e-3)


def test_a_loop_of_ones_own_trains_as_by_hand():
    """The rule alone, and the parameter server."""
    trace = trace_of("newest", T)
    data_key, noise_key = jax.random.split(arguments()["key"])
    round_fn = jax.jit(method().local_round(loss_fn))
    rule = method().rule
    update_fn = jax.jit(rule.update)
    params, state, versions = PARAMS, rule.init(PARAMS), [PARAMS]
    server = ParameterServer(method(), PARAMS, STATE, local_learning_rate=schedule)
    for worker in range(K):
        server.dispatch(worker)
    for worker, round, index in zip(trace.workers, trace.rounds, trace.dispatched_at, strict=True):
        key = jax.random.fold_in(jax.random.fold_in(noise_key, worker), round)
        batches = batch_fn(data_key, worker, round)
        result = round_fn(versions[index], STATE, batches, schedule(index), key)
        updates, state = update_fn(result.update, state, params, worker=worker, dispatched_at=index)
        params = optax.apply_updates(params, updates)
        versions.append(params)
        task = server.held(int(worker))
        assert task.id == (worker, round, index)
        start = task.start
        sent = (start.params, start.model_state, batches, start.local_learning_rate, key)
        for waiting in server.receive(task.report(round_fn(*sent))):
            server.dispatch(waiting)
    expected, _ = by_hand(trace)
    helpers.assert_trees_close(params, expected, **ROUNDING)
    helpers.assert_trees_close(server.params, expected, **ROUNDING)


def real(workers=None, num_steps=T, **options):
    workers = ThreadWorkers() if workers is None else workers
    options = arguments() | {"num_steps": num_steps} | options
    return train(method(), loss_fn, batch_fn, PARAMS, workers, **options)


def assert_replays(result):
    again = run("eager", result.trace)
    for part in ("params", "model_state", "rule_state"):
        helpers.assert_trees_equal(getattr(result, part), getattr(again, part))
    np.testing.assert_array_equal(result.history.loss, again.history.loss)


@pytest.mark.slow
def test_threads_train_as_the_simulator():
    assert_replays(real(ThreadWorkers(slowdowns=[1, 1, 2])))


@pytest.mark.slow
def test_ray_trains_as_the_simulator():
    assert_replays(real(RayWorkers()))


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_a_killed_simulation_resumes_bit_for_bit(engine, tmp_path):
    unbroken = run(engine)
    with pytest.raises(Killed):
        run(engine, checkpoint=Checkpointer(tmp_path, every=4), callbacks=[killed_at(15)])
    assert Checkpointer(tmp_path, every=4).steps()[-1] == 12
    resumed = run(engine, checkpoint=Checkpointer(tmp_path, every=4))
    for part in ("params", "model_state", "rule_state"):
        helpers.assert_trees_equal(getattr(resumed, part), getattr(unbroken, part))
    np.testing.assert_array_equal(resumed.history.loss, unbroken.history.loss)


@pytest.mark.slow
def test_a_killed_real_run_resumes_bit_for_bit(tmp_path):
    with pytest.raises(Killed):
        real(checkpoint=Checkpointer(tmp_path, every=4), callbacks=[killed_at(15)])
    result = real(checkpoint=Checkpointer(tmp_path, every=4))
    assert result.rule_state.newest["a"].shape == (K, 3, 2)
    assert_replays(result)


def test_another_hyperparameter_does_not_resume(tmp_path):
    run("eager", checkpoint=Checkpointer(tmp_path, every=10))
    other = make_method("newest_of_each", K, S, decay=0.25)
    options = arguments() | {"trace": trace_of("newest", T), "engine": "eager"}
    options["checkpoint"] = Checkpointer(tmp_path, every=10)
    with pytest.raises(ValueError, match="got one of another method"):
        simulate(other, loss_fn, batch_fn, PARAMS, **options)


def test_what_a_chain_with_the_rule_freezes_is_constant_for_workers():
    mask = {"a": True, "b": False, "none": None}
    chained = optax.chain(method().rule, optax.masked(optax.set_to_zero(), mask))
    round_fn = method().with_rule(chained).local_round(loss_fn)
    batches = batch_fn(jax.random.key(0), 0, 0)
    update = round_fn(PARAMS, STATE, batches, 0.1, jax.random.key(1)).update
    assert isinstance(update, LocalUpdate)
    assert not np.any(update.delta["a"])
    assert np.all(update.delta["b"] != 0)

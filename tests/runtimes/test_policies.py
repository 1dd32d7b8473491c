"""Policies in real runs: delays stay within the bound, and the run repeats in the simulator."""

import jax
import numpy as np
import pytest

from orlomo_jax import (
    Checkpointer,
    RestartEvery,
    StalenessBound,
    ThreadWorkers,
    make_method,
    per_worker_times,
    sample_trace,
    simulate,
    train,
)
from orlomo_jax.simulation import Compiled, Eager
from tests.support import helpers
from tests.support.real_runs import Killed, killed_at
from tests.support.toy import PARAMS, ROUNDING, STATE, K, S, batch_fn, loss_fn

T = 40
POLICIES = {
    "wait": StalenessBound(K),
    "barrier": StalenessBound(K - 1),
    "drop": StalenessBound(2, "drop"),
    "restart": StalenessBound(2, "restart"),
    "every": RestartEvery(4),
}
SLOW = per_worker_times([1.0, 1.0, 9.0], variation=0.3)


def arguments():
    return {"key": jax.random.key(1), "model_state": STATE, "local_learning_rate": 0.02}


def method_of(policy):
    return make_method("al_sgd", K, S, policy=policy)


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_a_real_run_follows_its_policy(name, tmp_path):
    policy, checkpoint = POLICIES[name], Checkpointer(tmp_path, every=10)
    method = method_of(policy)

    def run(**options):
        workers = ThreadWorkers(slowdowns=[1.0, 1.0, 20.0])
        more = arguments() | {"checkpoint": checkpoint} | options
        return train(method, loss_fn, batch_fn, PARAMS, workers, num_steps=T, **more)

    with pytest.raises(Killed):
        run(callbacks=[killed_at(23)])
    result = run()
    assert result.status == "finished"
    if isinstance(policy, StalenessBound):
        assert result.trace.max_delay <= policy.max_delay
    again = simulate(
        method, loss_fn, batch_fn, PARAMS, trace=result.trace, engine="eager", **arguments()
    )
    helpers.assert_trees_equal(result.params, again.params)


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=() if x in ("wait", "every") else pytest.mark.slow) for x in POLICIES],
)
def test_a_simulated_run_follows_its_policy(name):
    policy = POLICIES[name]
    trace = sample_trace(SLOW, K, T, S, 0, policy=policy)
    free = sample_trace(SLOW, K, T, S, 0)
    if isinstance(policy, StalenessBound):
        assert trace.max_delay <= policy.max_delay < free.max_delay
    else:
        starts = np.arange(T) // policy.num_reports * policy.num_reports
        assert (trace.dispatched_at >= starts).all()
        assert (free.dispatched_at < starts).any()
    runs = [
        simulate(
            method_of(policy), loss_fn, batch_fn, PARAMS, trace=trace, engine=engine, **arguments()
        )
        for engine in (Eager(), Compiled())
    ]
    helpers.assert_trees_close(*(run.params for run in runs), **ROUNDING)


def test_a_trace_must_follow_the_policy():
    trace = sample_trace(SLOW, K, T, S, 0)
    for policy in (StalenessBound(K), StalenessBound(2, "drop"), StalenessBound(2, "restart")):
        with pytest.raises(ValueError, match="`trace` must"):
            simulate(method_of(policy), loss_fn, batch_fn, PARAMS, trace=trace, **arguments())


@pytest.mark.parametrize(
    ("name", "policy", "message"),
    [
        ("prsgdm", StalenessBound(5), "`policy` must be None for prsgdm"),
        ("al_sgd", StalenessBound(1), "`max_delay` must be ≥ num_workers − 1 = 2"),
        ("al_sgd", "wait", "`policy` must be a StalenessBound or RestartEvery"),
    ],
)
def test_a_method_refuses_a_policy_that_it_cannot_use(name, policy, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make_method(name, K, S, policy=policy)

"""Several runs of one shape as one program: the results of single runs, and checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orlomo_jax import Checkpointer, simulate
from orlomo_jax.methods import METHOD_NAMES
from orlomo_jax.simulation import RunStart, simulate_together
from orlomo_jax.traces import heterogeneous, homogeneous, sample_trace
from tests.support import helpers
from tests.support.toy import STATE, K, S, batch_fn, loss_fn, method_of

T = 24
ROUNDING = {"rtol": 2e-5, "atol": 2e-6}
"""float32 over 24 iterations: one program for all runs adds in another order than one for one."""


@jax.jit
def evaluate(params, model_state):
    return {"norm": jnp.abs(params["a"]).sum() + model_state["mean"].sum()}


def decayed(rate, step):
    return rate / (1 + 0.1 * step)


def start(name, seed, rate=0.05):
    times = (homogeneous, heterogeneous)[seed % 2]()
    keys = jax.random.split(jax.random.key(seed), 2)
    return RunStart(
        params={"a": 0.3 * jax.random.normal(keys[0], (3, 2)), "b": jnp.ones(2)},
        trace=sample_trace(times, K, T, S, seed, synchronous=name == "prsgdm"),
        key=keys[1],
        local_learning_rate=jax.tree_util.Partial(decayed, np.float32(rate)),
        model_state=STATE,
    )


def together(name, starts, **options):
    method = method_of(name)
    options = {"evaluate": evaluate, "evaluate_every": 10} | options
    return simulate_together(method, method.local_round(loss_fn), batch_fn, starts, **options)


def alone(name, start):
    return simulate(
        method_of(name),
        loss_fn,
        batch_fn,
        start.params,
        trace=start.trace,
        key=start.key,
        model_state=start.model_state,
        local_learning_rate=start.local_learning_rate,
        evaluate=evaluate,
        evaluate_every=10,
        engine="compiled",
    )


def trees(result):
    return result.params, result.model_state, result.rule_state, np.asarray(result.history.loss)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHOD_NAMES)
def test_results_are_those_of_single_runs(name):
    starts = [start(name, seed, rate=0.03 * (seed + 1)) for seed in range(3)]
    results = together(name, starts)
    for one, result in zip(starts, results, strict=True):
        single = alone(name, one)
        helpers.assert_trees_close(trees(result), trees(single), **ROUNDING)
        assert result.status == "finished"
        assert [e.step for e in result.history.evaluations] == [10, 20, 24]
        for mine, other in zip(result.history.evaluations, single.history.evaluations, strict=True):
            assert mine.metrics["norm"] == pytest.approx(other.metrics["norm"], rel=1e-4)
            assert mine.time == other.time
    assert not np.allclose(results[0].params["a"], results[1].params["a"])


@pytest.mark.slow
def test_one_that_diverges_leaves_the_others_alone():
    starts = [start("orlomo", 0), start("orlomo", 1, rate=1e30), start("orlomo", 2)]
    first, bad, third = together("orlomo", starts)
    single = alone("orlomo", starts[1])
    assert (bad.status, bad.diverged_at) == ("diverged", single.diverged_at)
    assert len(bad.history.step) == bad.diverged_at + 1
    for one, result in ((starts[0], first), (starts[2], third)):
        helpers.assert_trees_close(trees(result), trees(alone("orlomo", one)), **ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["orlomo", "prsgdm"])
def test_stopped_and_resumed_is_unbroken_to_the_bit(name, tmp_path):
    starts = [start(name, 0), start(name, 1, rate=1e30), start(name, 2)]
    unbroken = together(name, starts)
    checkpoint, results, calls = Checkpointer(tmp_path / "runs", every=7), None, 0
    while results is None:
        results = together(name, starts, checkpoint=checkpoint, stop=lambda: True)
        calls += 1
    assert calls > 3
    for mine, other in zip(results, unbroken, strict=True):
        assert (mine.status, mine.diverged_at) == (other.status, other.diverged_at)
        assert mine.history.evaluations == other.history.evaluations
        helpers.assert_trees_equal(trees(mine), trees(other))


def test_one_run_stops_and_resumes_too(tmp_path):
    starts = [start("orlomo", 0)]
    stops = iter([False, True])
    assert (
        together("orlomo", starts, checkpoint=Checkpointer(tmp_path, 100), stop=lambda: next(stops))
        is None
    )
    assert Checkpointer(tmp_path, 100).steps() == [20]
    (result,) = together("orlomo", starts, checkpoint=Checkpointer(tmp_path, 100))
    helpers.assert_trees_equal(trees(result), trees(together("orlomo", starts)[0]))


@pytest.mark.slow
def test_another_group_does_not_resume(tmp_path):
    starts = [start("orlomo", seed) for seed in range(2)]
    together("orlomo", starts, checkpoint=Checkpointer(tmp_path, 100), stop=lambda: True)
    with pytest.raises(ValueError, match="another together"):
        together("orlomo", [*starts, starts[0]], checkpoint=Checkpointer(tmp_path, 100))
    with pytest.raises(ValueError, match="another keys"):
        together("orlomo", starts[::-1], checkpoint=Checkpointer(tmp_path, 100))


def test_what_cannot_run_together_is_refused():
    one = start("orlomo", 0)
    shorter = one._replace(trace=sample_trace(homogeneous(), K, T - 1, S, 0))
    constant = one._replace(local_learning_rate=0.1)
    wider = one._replace(params={"a": jnp.ones((3, 5)), "b": jnp.ones(5)})
    for starts, message in (
        ([], "at least one run"),
        ([one, shorter], "same number of steps"),
        ([one, constant], "learning rate"),
        ([one, wider], "shape"),
    ):
        with pytest.raises(ValueError, match=message):
            together("orlomo", starts)

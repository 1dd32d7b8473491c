"""Sweeps: the results of single runs, checkpoints, and runs that end early."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orlomo_jax import Checkpointer, Compiled, make_method, simulate
from orlomo_jax.methods import METHOD_NAMES
from orlomo_jax.simulation import RunStart, simulate_many
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
    return simulate_many(method, loss_fn, batch_fn, starts, **options)


def alone(name, start, method=None):
    return simulate(
        method_of(name) if method is None else method,
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
@pytest.mark.parametrize("over_runs", ["vmap", "map", "loop"])
@pytest.mark.parametrize("name", METHOD_NAMES)
def test_results_are_those_of_single_runs(name, over_runs):
    starts = [start(name, seed, rate=0.03 * (seed + 1)) for seed in range(3)]
    results = together(name, starts, over_runs=over_runs, engine=Compiled("loop"))
    for one, result in zip(starts, results, strict=True):
        single = alone(name, one)
        if over_runs == "loop":
            helpers.assert_trees_equal(trees(result), trees(single))
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
    # With the same period, since a diverged run ends with its segment.
    unbroken = together(name, starts, checkpoint=Checkpointer(tmp_path / "unbroken", every=7))
    checkpoint, results, calls = Checkpointer(tmp_path / "runs", every=7), None, 0
    while results is None:
        results = together(name, starts, checkpoint=checkpoint, stop=lambda: True)
        calls += 1
    assert calls > 3
    for mine, other in zip(results, unbroken, strict=True):
        assert (mine.status, mine.diverged_at) == (other.status, other.diverged_at)
        assert mine.history.evaluations == other.history.evaluations
        helpers.assert_trees_equal(trees(mine), trees(other))


@pytest.mark.slow
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
    with pytest.raises(ValueError, match="another axis"):
        together("orlomo", starts, checkpoint=Checkpointer(tmp_path, 100), over_runs="map")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["orlomo", "momentum_lookahead", "fedasync"])
@pytest.mark.parametrize("over_runs", ["vmap", "loop"])
def test_hyperparameters_of_the_rule_differ(name, over_runs):
    """One program serves all values; each run is that of a method with its value."""
    hyperparameter = "mixing_rate" if name == "fedasync" else "learning_rate"
    rates, method = (0.25, 0.5, 1.0), make_method(name, K, S)
    one = start("orlomo", 0)
    starts = [one._replace(hyperparameters={hyperparameter: rate}) for rate in rates]
    results = simulate_many(
        method, loss_fn, batch_fn, starts, over_runs=over_runs, engine=Compiled("loop")
    )
    for rate, result in zip(rates, results, strict=True):
        single = alone(name, one, make_method(name, K, S, **{hyperparameter: rate}))
        helpers.assert_trees_close(trees(result), trees(single), **ROUNDING)
    assert not np.allclose(results[0].params["a"], results[2].params["a"])


def test_hyperparameters_that_one_program_cannot_have_are_refused():
    one = start("orlomo", 0)
    for name, values, message in (
        ("orlomo", {"momentum": 0.5}, "momentum must stay as it is.*worker_momentum"),
        ("orlomo", {"learning_rate": -1.0}, "learning_rate=-1"),
        ("fedbuff", {"buffer_size": 3}, "buffer_size changes the program of fedbuff"),
    ):
        runs = [one._replace(hyperparameters=values)] * 2
        with pytest.raises(ValueError, match=message):
            simulate_many(make_method(name, K, S), loss_fn, batch_fn, runs)
    method, runs = make_method("orlomo", K, S), [one._replace(hyperparameters={"eta": 1.0})]
    with pytest.raises(TypeError, match=r"takes the hyperparameters .*; got eta"):
        simulate_many(method, loss_fn, batch_fn, runs)
    bare = method.with_rule(method.rule)
    with pytest.raises(ValueError, match="must come from make_method"):
        simulate_many(bare, loss_fn, batch_fn, [one._replace(hyperparameters={"c": 0.5})])


@pytest.mark.slow
@pytest.mark.parametrize("over_runs", ["vmap", "loop"])
def test_a_run_that_its_callback_ends_keeps_its_state(over_runs, tmp_path):
    """It ends with the segment, as a compiled run alone; the others continue, also if resumed."""
    steps = []

    def ends_early(record):
        steps.append(record.step)
        return record.step == 12

    starts = [start("orlomo", 0), start("orlomo", 1)._replace(callbacks=[ends_early])]
    options = {"over_runs": over_runs, "engine": Compiled("loop")}
    whole, ended = together("orlomo", starts, **options)
    assert (whole.status, ended.status, steps) == ("finished", "stopped", list(range(1, 21)))
    (single,) = together("orlomo", starts[1:], engine=Compiled("loop"))
    assert single.status == "stopped"
    helpers.assert_trees_close(trees(ended), trees(single), **ROUNDING)
    checkpoint = Checkpointer(tmp_path, every=21)
    stops = iter([False, False, True])
    assert (
        together("orlomo", starts, checkpoint=checkpoint, stop=lambda: next(stops), **options)
        is None
    )
    assert checkpoint.steps() == [21]
    again = together("orlomo", starts, checkpoint=checkpoint, **options)
    for mine, other in zip(again, (whole, ended), strict=True):
        assert mine.status == other.status
        helpers.assert_trees_equal(trees(mine), trees(other))


def test_each_run_has_its_callbacks():
    losses = [[], []]
    starts = [
        start("orlomo", seed)._replace(callbacks=[lambda r, to=to: to.append(float(r.loss))])
        for seed, to in enumerate(losses)
    ]
    results = together("orlomo", starts)
    for mine, result in zip(losses, results, strict=True):
        np.testing.assert_array_equal(np.float32(mine), result.history.loss)


@pytest.mark.slow
def test_devices_share_the_runs():
    """Two CPU devices, in a process of its own: the results are those of one device."""
    code = """
import jax, numpy as np
from orlomo_jax import Compiled
from tests.simulation.test_simulate_many import start, together, trees
assert len(jax.devices()) == 2
starts = [start("orlomo", seed) for seed in range(5)]
results = together("orlomo", starts, over_runs="vmap")
on = {d for r in results for x in jax.tree.leaves(r.params) for d in x.devices()}
assert len(on) == 2, on
jax.config.update("jax_default_device", jax.devices()[1])
ones = [together("orlomo", [one], engine=Compiled("loop"))[0] for one in starts]
for one, result in zip(ones, results):
    for x, y in zip(jax.tree.leaves(trees(one)), jax.tree.leaves(trees(result))):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6)
"""
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, timeout=300)


def test_what_cannot_run_together_is_refused():
    one = start("orlomo", 0)
    shorter = one._replace(trace=sample_trace(homogeneous(), K, T - 1, S, 0))
    constant = one._replace(local_learning_rate=0.1)
    wider = one._replace(params={"a": jnp.ones((3, 5)), "b": jnp.ones(5)})
    for starts, message in (
        ([], "at least one run"),
        ([one, shorter], "same number of steps, got 24 for runs.0. and 23 for runs.1."),
        ([one, constant], "learning rate"),
        ([one, wider], "shape"),
    ):
        with pytest.raises(ValueError, match=message):
            together("orlomo", starts, over_runs="vmap")
    with pytest.raises(TypeError, match=r"`runs\[0\]` must be a RunStart"):
        together("orlomo", [one.params])
    with pytest.raises(ValueError, match="over_runs='pmap'"):
        together("orlomo", [one], over_runs="pmap")
    with pytest.raises(ValueError, match='must be "loop" for engine='):
        together("orlomo", [one, one], over_runs="vmap", engine="eager")

"""The simulator against a replay by hand, and what it records."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from orlomo_jax import (
    ArrivalTrace,
    heterogeneous,
    local_momentum_sgd,
    make_method,
    one_slow_worker,
    sample_trace,
    simulate,
)
from orlomo_jax.methods import METHOD_NAMES
from tests.support import helpers, toy
from tests.support.toy import PARAMS, STATE, K, S, batch_fn, loss_fn, method_of, schedule

RATE = 0.05


def trace_for(name, num_steps=40, seed=0):
    return toy.trace_of(name, num_steps, seed)


def run(name, trace=None, seed=0, **options):
    defaults = {"batch_fn": batch_fn, "model_state": STATE, "key": jax.random.key(seed)}
    options = defaults | {"local_learning_rate": schedule} | options
    options["trace"] = trace_for(name) if trace is None else trace
    return simulate(method_of(name), loss_fn, params=PARAMS, **options)


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_same_seed_and_trace_are_the_same_to_the_bit(name):
    first, second, other = run(name), run(name), run(name, seed=1)
    helpers.assert_trees_equal(first.params, second.params)
    helpers.assert_trees_equal(first.rule_state, second.rule_state)
    np.testing.assert_array_equal(first.history.loss, second.history.loss)
    assert not np.array_equal(first.params["a"], other.params["a"])


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_simulation_is_the_replay_by_hand(name):
    """A list of all versions, and the rule: no server, no clock."""
    method = method_of(name)
    round_fn = method.local_round(loss_fn)
    trace = trace_for(name)
    data_key, noise_key = jax.random.split(jax.random.key(0))
    state = method.rule.init(PARAMS)
    versions, momentums, losses = [PARAMS], [state], []
    for worker, round, index in zip(trace.workers, trace.rounds, trace.dispatched_at, strict=True):
        key = jax.random.fold_in(jax.random.fold_in(noise_key, worker), round)
        start = momentums[index].momentum if name == "prsgdm" else None
        batches, rate = batch_fn(data_key, worker, round), schedule(index)
        result = round_fn(versions[index], STATE, batches, rate, key, momentum=start)
        updates, state = method.rule.update(result.update, state, dispatched_at=int(index))
        versions.append(optax.apply_updates(versions[-1], updates))
        momentums.append(state)
        losses.append(result.loss.mean())
    simulated = run(name)
    helpers.assert_trees_close(simulated.params, versions[-1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(simulated.history.loss, losses, rtol=1e-4, atol=1e-6)


def test_arrays_of_a_partial_are_arguments():
    """Runs whose batches differ in a Partial's arrays alone share one compiled program."""
    method, traces = make_method("al_sgd", 2, 1), []

    def counting(scale, key, worker, round):
        traces.append(1)
        return scale * jnp.ones((1, 1))

    linear = lambda p, m, batch, key: ((p * batch).sum(), (m, {}))  # noqa: E731
    for engine in ("compiled", "eager"):
        counts = []
        for scale in (1.0, 2.0, 3.0):
            batches = jax.tree_util.Partial(counting, jnp.array(scale))
            result = simulate(
                method,
                linear,
                batches,
                jnp.zeros(1),
                trace=ArrivalTrace.from_workers([0, 1], 2),
                key=jax.random.key(0),
                local_learning_rate=1.0,
                engine=engine,
            )
            np.testing.assert_allclose(result.params, -scale)
            counts.append(len(traces))
        assert counts[1] - counts[0] == counts[2] - counts[1] <= 4  # to look at it, not to compile


def test_one_worker_one_step_is_optax_sgd():
    result = simulate(
        make_method("orlomo", 1, 1),
        loss_fn,
        lambda key, worker, round: batch_fn(key, worker, round)[:1],
        PARAMS,
        num_steps=20,
        model_state=STATE,
        key=jax.random.key(0),
        local_learning_rate=RATE,
    )
    data_key, noise_key = jax.random.split(jax.random.key(0))
    sgd, params = optax.sgd(RATE, momentum=0.9), PARAMS
    state = sgd.init(params)
    gradient_fn = jax.grad(lambda params, batch, key: loss_fn(params, STATE, batch, key)[0])
    for t in range(20):
        batch = batch_fn(data_key, 0, t)[0]
        key = jax.random.fold_in(jax.random.fold_in(noise_key, 0), t)
        gradient = gradient_fn(params, batch, jax.random.fold_in(key, 0))
        updates, state = sgd.update(gradient, state)
        params = optax.apply_updates(params, updates)
    helpers.assert_trees_close(result.params, params, rtol=1e-4, atol=1e-6)


def test_what_a_round_reads_depends_on_worker_and_round_alone():
    """The delta of a linear loss is its batch: the server's sum counts who read what."""

    def linear(params, model_state, batch, key):
        return params @ batch, (model_state, {})

    def one_hot(key, worker, round):
        return jax.nn.one_hot(jnp.array([worker * 10 + round]), 20)

    method = make_method("al_sgd", 2, 1, delay_weight=lambda delay: 1.0)
    for order in ([0, 0, 0, 1, 1], [1, 0, 1, 0, 0]):
        result = simulate(
            method,
            linear,
            one_hot,
            jnp.zeros(20),
            trace=ArrivalTrace.from_workers(order, 2),
            key=jax.random.key(0),
            local_learning_rate=1.0,
        )
        assert np.flatnonzero(result.params).tolist() == [0, 1, 2, 10, 11]


def test_history_records_and_evaluations():
    records = []
    trace = trace_for("orlomo", 25)
    result = run(
        "orlomo",
        trace,
        evaluate=lambda params, model_state: {"norm": optax.tree.norm(params)},
        evaluate_every=10,
        callbacks=[records.append],
    )
    assert (result.status, result.diverged_at) == ("finished", None)
    assert result.trace is trace
    np.testing.assert_array_equal(result.history.step, np.arange(1, 26))
    np.testing.assert_array_equal(result.history.time, trace.times)
    np.testing.assert_array_equal(result.history.delay, trace.delays)
    np.testing.assert_array_equal(result.history.worker, trace.workers)
    moments = [(e.step, e.time) for e in result.history.evaluations]
    assert moments == [(step, trace.times[step - 1]) for step in (10, 20, 25)]
    norm = float(optax.tree.norm(result.params))
    assert result.history.evaluations[-1].metrics == {"norm": pytest.approx(norm)}
    assert [r.step for r in records] == list(range(1, 26))
    assert [r.step for r in records if r.evaluation] == [10, 20, 25]
    np.testing.assert_allclose([float(r.loss) for r in records], result.history.loss, rtol=1e-6)


def test_training_lowers_the_loss():
    loss = run("orlomo", trace_for("orlomo", 100)).history.loss
    assert loss[-20:].mean() < 0.9 * loss[:20].mean()


def test_evaluation_does_not_change_the_run():
    evaluated = run("orlomo", evaluate=lambda p, s: {"a": p["a"].sum()}, evaluate_every=1)
    helpers.assert_trees_close(evaluated.params, run("orlomo").params, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["orlomo", "prsgdm"])
@pytest.mark.parametrize("num_steps", [pytest.param(320, marks=pytest.mark.slow), 40])
def test_divergence_is_found_where_it_began(name, num_steps):
    trace = trace_for(name, num_steps)
    result = run(
        name,
        trace,
        batch_fn=toy.poisoned(1, 2),
        evaluate=lambda params, model_state: {"norm": optax.tree.norm(params)},
    )
    poisoned = np.flatnonzero((trace.workers == 1) & (trace.rounds == 2))[0]
    assert (result.status, result.diverged_at) == ("diverged", poisoned)
    assert len(result.history.loss) == len(result.history.step) == poisoned + 1
    assert np.isfinite(result.history.loss[:-1]).all()
    assert np.isnan(result.history.loss[-1])
    assert result.history.evaluations == ()


@pytest.mark.parametrize("engine", ["compiled", "eager"])
@pytest.mark.parametrize("rate", [pytest.param(lambda step: jnp.nan, marks=pytest.mark.slow), 1e38])
def test_a_merge_that_overflows_is_divergence(rate, engine):
    """Every report is finite, the last one too; only what the server makes of it is not."""

    def stateless(params, model_state, batch, key):
        return loss_fn(params, STATE, batch, key)[0], (model_state, {})

    result = simulate(
        make_method("orlomo", 2, S, learning_rate=rate, delay_weight=lambda delay: 10.0),
        stateless,
        batch_fn,
        PARAMS,
        trace=ArrivalTrace.from_workers([0], 2),
        key=jax.random.key(0),
        local_learning_rate=RATE,
        engine=engine,
    )
    assert (result.status, result.diverged_at) == ("diverged", 0)


def test_events_are_replayed():
    """Worker 1's first report is lost; worker 2 joins late; worker 0 leaves."""
    events = [(1, "lost", 1), (2, "joined", 2), (3, "redispatched", 1), (5, "left", 0)]
    trace = ArrivalTrace.from_workers([0, 0, 0, 1, 2, 1, 2, 2], 3, events=events)
    assert trace.dispatched_at.tolist() == [0, 1, 2, 3, 2, 4, 5, 7]
    counted = lambda key, worker, round: jax.nn.one_hot(jnp.array([worker * 4 + round]), 12)  # noqa: E731
    result = simulate(
        make_method("al_sgd", 3, 1, delay_weight=lambda delay: 1.0),
        lambda p, m, batch, key: (p @ batch, (m, {})),
        counted,
        jnp.zeros(12),
        trace=trace,
        key=jax.random.key(0),
        local_learning_rate=1.0,
    )
    assert np.flatnonzero(result.params).tolist() == [0, 1, 2, 5, 6, 8, 9, 10]


def test_no_steps():
    result = run("orlomo", ArrivalTrace.from_workers([], K))
    helpers.assert_trees_equal(result.params, PARAMS)
    assert (result.status, len(result.history.loss)) == ("finished", 0)


def test_schedule_follows_global_progress():
    """With one step a round and a loss of slope one, the descent is the sum of rates."""
    trace = ArrivalTrace.from_workers([0, 1, 1, 0], 2)
    result = simulate(
        make_method("al_sgd", 2, 1, delay_weight=lambda delay: 1.0),
        lambda p, m, batch, key: (p.sum(), (m, {})),
        lambda key, worker, round: jnp.zeros(1),
        jnp.zeros(1),
        trace=trace,
        key=jax.random.key(0),
        local_learning_rate=lambda step: 1.0 + step,
    )
    assert trace.dispatched_at.tolist() == [0, 0, 2, 1]
    np.testing.assert_allclose(result.params, -(1 + 1 + 3 + 2))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"trace": trace_for("prsgdm")},
            ValueError,
            "`trace` must have synchronous=False and num_workers=3 for orlomo, "
            "got synchronous=True and num_workers=3",
        ),
        (
            {"trace": ArrivalTrace.from_workers([0], 2)},
            ValueError,
            "num_workers=3 for orlomo, got synchronous=False and num_workers=2",
        ),
        (
            {"trace": ArrivalTrace.from_workers([0], K, max_wait=9)},
            ValueError,
            "`trace` must have max_wait=None for orlomo, got max_wait=9",
        ),
        ({"num_steps": 9}, ValueError, "pass no num_steps and no compute_times"),
        ({"compute_times": heterogeneous()}, ValueError, "pass no num_steps and no compute_times"),
        ({"trace": None}, ValueError, "`num_steps` must be given, or a trace"),
        ({"round_fn": method_of("orlomo").local_round(loss_fn)}, ValueError, "got both"),
        ({"loss_fn": None}, ValueError, "pass either `loss_fn` or `round_fn`, got neither"),
        ({"callbacks": [3]}, TypeError, "`callbacks` must be Callback objects or functions"),
        ({"engine": "fast"}, ValueError, "`engine` must be .* got engine='fast'"),
        ({"key": 0}, TypeError, "`key` must be a jax.random.key"),
        ({"key": jax.random.PRNGKey(0)}, TypeError, "`key` must be a jax.random.key"),
        ({"evaluate_every": 0}, ValueError, "`evaluate_every` must be ≥ 1"),
        ({"local_learning_rate": -1.0}, ValueError, "local_learning_rate=-1.0"),
        ({"model_state": {"n": jax.random.key(0)}}, TypeError, r"key<fry> at model_state\['n'\]"),
    ],
)
def test_bad_arguments(options, error, message):
    arguments = {"trace": trace_for("orlomo"), "key": jax.random.key(0), "local_learning_rate": 0.1}
    arguments |= {"loss_fn": loss_fn, "batch_fn": batch_fn, "params": PARAMS} | options
    with pytest.raises(error, match=message):
        simulate(method_of("orlomo"), **arguments)


@pytest.mark.parametrize("name", ["orlomo", "prsgdm"])
def test_without_a_trace_the_arrivals_are_sampled(name):
    """From the method's K and S, and of its kind."""
    job = (make_method(name, K, S), loss_fn, batch_fn, PARAMS)
    options = {"key": jax.random.key(0), "local_learning_rate": schedule, "model_state": STATE}
    sampled = simulate(*job, num_steps=40, trace_seed=3, **options)
    assert sampled.trace == trace_for(name, seed=3)
    helpers.assert_trees_equal(sampled.params, run(name, sampled.trace).params)
    slow = one_slow_worker(9.0)
    sampled = simulate(*job, num_steps=40, compute_times=slow, **options)
    synchronous = name == "prsgdm"
    assert sampled.trace == sample_trace(slow, K, 40, S, 0, synchronous=synchronous)


def test_a_round_of_another_kind_is_refused():
    """AL-SGD's reports carry no momentum: a momentum round was meant for another method."""
    with pytest.raises(ValueError, match=r"make the round by method\.local_round"):
        simulate(
            make_method("al_sgd", K, S),
            None,
            batch_fn,
            PARAMS,
            num_steps=40,
            key=jax.random.key(0),
            model_state=STATE,
            local_learning_rate=0.1,
            round_fn=local_momentum_sgd(loss_fn, S),
        )

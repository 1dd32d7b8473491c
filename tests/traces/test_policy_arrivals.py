"""Arrivals under a policy: who waits, who is restarted, and when."""

import dataclasses
import math
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orlomo_jax.traces import (
    ComputeTimes,
    Policy,
    RestartEvery,
    StalenessBound,
    heterogeneous,
    homogeneous,
    one_slow_worker,
    per_worker_times,
    sample_trace,
)

UNHURRIED = settings(deadline=None)  # a busy machine is not a failure
MODELS = st.builds(
    ComputeTimes,
    gradient_time=st.sampled_from([0.5, 1.0]),
    variation=st.sampled_from([0.0, 0.3, 0.99]),
    slowdown=st.floats(1.0, 100.0),
    slow_fraction=st.floats(0.0, 1.0),
    communication_time=st.sampled_from([0.0, 0.1, 10.0]),
)
POLICIES = st.one_of(
    st.builds(StalenessBound, st.integers(4, 12)),
    st.builds(StalenessBound, st.integers(0, 12), st.sampled_from(["drop", "restart"])),
    st.builds(RestartEvery, st.integers(1, 9)),
)


def reference(policy, model, num_workers, num_steps, steps, seed):
    """Return (worker, round, version, time) of each arrival, by looking at all workers each time.

    The times are sums of the durations of single rounds.
    """
    streams = [np.random.default_rng([seed, worker]) for worker in range(num_workers)]
    rounds, ends, held, waiting, arrivals = [-1] * num_workers, {}, {}, [], []
    seconds = model.mean_times(num_workers) * steps

    def send(worker, now):
        factor = streams[worker].uniform(1 - model.variation, 1 + model.variation)
        ends[worker] = now + seconds[worker] * factor + model.communication_time
        held[worker] = len(arrivals)
        rounds[worker] += 1

    for worker in range(num_workers):
        send(worker, 0.0)
    while len(arrivals) < num_steps:
        worker = min(ends, key=lambda k: (ends[k], k))
        now = ends.pop(worker)
        if policy.drops(len(arrivals), held[worker]):
            send(worker, now)
            continue
        arrivals.append((worker, rounds[worker], held.pop(worker), now))
        waiting.append(worker)
        for other in policy.due(len(arrivals), held, waiting, num_workers):
            waiting.remove(other)
            send(other, now)
        for other in policy.restarts(len(arrivals), held):
            send(other, now)
    return arrivals


@settings(deadline=None, max_examples=200)
@given(POLICIES, MODELS, st.integers(1, 5), st.integers(0, 60), st.integers(0, 9))
def test_agrees_with_the_definition(policy, model, num_workers, num_steps, seed):
    if not model.variation:  # multiples of ½, so that rounding does not break ties
        exact = {
            "slowdown": round(model.slowdown),
            "communication_time": round(model.communication_time),
        }
        model = dataclasses.replace(model, **exact)
    steps = [1 + worker % 2 for worker in range(num_workers)]
    trace = sample_trace(model, num_workers, num_steps, steps, seed, policy=policy)
    wanted = reference(policy, model, num_workers, num_steps, steps, seed)
    ids = zip(trace.workers, trace.rounds, trace.dispatched_at, strict=True)
    assert list(ids) == [arrival[:3] for arrival in wanted]
    np.testing.assert_allclose(trace.times, [time for *_, time in wanted], rtol=1e-9)


@UNHURRIED
@given(POLICIES, MODELS, st.integers(1, 5), st.integers(0, 100), st.integers(0, 100))
def test_fewer_steps_are_a_prefix(policy, model, num_workers, some, more):
    some, more = sorted((some, more))
    short, long = (
        sample_trace(model, num_workers, steps, 2, 7, policy=policy) for steps in (some, more)
    )
    for name in ("workers", "rounds", "dispatched_at", "times"):
        np.testing.assert_array_equal(getattr(short, name), getattr(long, name)[:some])
    assert short.events == tuple(event for event in long.events if event.step < some)
    assert short.digest(some) == long.digest(some)


@UNHURRIED
@given(MODELS, st.integers(1, 5), st.integers(0, 100), st.sampled_from(["wait", "drop", "restart"]))
def test_a_policy_that_never_acts_changes_nothing(model, num_workers, num_steps, action):
    """Bit for bit: the loop adds in the order of the vectorized code."""
    free = sample_trace(model, num_workers, num_steps, 3, 1)
    for policy in (StalenessBound(10**6, action), Policy(), RestartEvery(10**6)):
        trace = sample_trace(model, num_workers, num_steps, 3, 1, policy=policy)
        assert trace.events == ()
        for name in ("workers", "rounds", "dispatched_at", "times"):
            np.testing.assert_array_equal(getattr(trace, name), getattr(free, name))


@pytest.mark.parametrize("action", ["wait", "drop", "restart"])
@pytest.mark.parametrize("model", [homogeneous(), one_slow_worker(50.0)])
def test_no_delay_exceeds_the_bound(model, action):
    for max_delay in (7, 11, 30):
        policy = StalenessBound(max_delay, action)
        trace = sample_trace(model, 8, 2000, 4, 0, policy=policy)
        assert trace.max_delay <= max_delay
        assert trace.max_wait == (max_delay if action == "wait" else None)
        assert {event.kind for event in trace.events} <= {"restarted"}
        assert (trace.events == ()) == (action == "wait" or sample_delay(model) <= max_delay)


def sample_delay(model):
    return sample_trace(model, 8, 2000, 4, 0).max_delay


def test_the_tightest_bound_is_a_barrier():
    barrier = sample_trace(heterogeneous(), 5, 200, 3, 4, synchronous=True)
    bound = sample_trace(heterogeneous(), 5, 200, 3, 4, policy=StalenessBound(4))
    for name in ("workers", "rounds", "dispatched_at"):
        np.testing.assert_array_equal(getattr(bound, name), getattr(barrier, name))
    np.testing.assert_allclose(bound.times, barrier.times, rtol=1e-12)


def test_all_start_again_from_the_same_version():
    trace = sample_trace(homogeneous(), 6, 300, 2, 0, policy=RestartEvery(4))
    np.testing.assert_array_equal(trace.dispatched_at // 4, np.arange(300) // 4)
    assert {event.step % 4 for event in trace.events} == {0}


def test_a_slow_worker_is_waited_for_or_stopped():
    model = per_worker_times([1.0, 100.0], variation=0.0)
    order = {
        action: sample_trace(model, 2, 12, 1, 0, policy=StalenessBound(4, action))
        for action in ("wait", "drop", "restart")
    }
    assert order["wait"].workers.tolist() == [0, 0, 0, 0, 1] + [0] * 4 + [1] + [0] * 2
    assert order["wait"].times.tolist() == [1, 2, 3, 4, 100, 101, 102, 103, 104, 200, 201, 202]
    for action in ("drop", "restart"):
        assert order[action].workers.tolist() == [0] * 12
    assert [event.step for event in order["restart"].events] == [5, 10]
    assert order["drop"].events == ()  # its first report has not arrived


def test_a_silent_worker():
    model = homogeneous().with_silent_worker(1, after_rounds=3)
    trace = sample_trace(model, 4, 200, 1, 0, policy=StalenessBound(6, "restart"))
    assert np.count_nonzero(trace.workers == 1) == 3
    assert sum(event.worker == 1 for event in trace.events) > 10
    with pytest.raises(ValueError, match="got num_steps=200: the silent workers send no more"):
        sample_trace(model, 4, 200, 1, 0, policy=StalenessBound(6))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"policy": StalenessBound(2)}, ValueError, "`max_delay` must be ≥ num_workers − 1 = 3"),
        ({"policy": cast(Any, 4)}, TypeError, "`policy` must be a Policy, .* got policy=4"),
        (
            {"policy": RestartEvery(3), "synchronous": True},
            ValueError,
            r"`policy` must be None if synchronous, got policy=RestartEvery\(num_reports=3\)",
        ),
    ],
)
def test_out_of_range(options, error, message):
    with pytest.raises(error, match=message):
        sample_trace(homogeneous(), 4, 10, 1, 0, **options)


def test_rounds_take_equally_long_under_every_policy():
    """Round r of a worker has the same random number, also if earlier rounds were cancelled."""
    model, num_workers = per_worker_times([1.0, 3.0, 7.0], variation=0.5), 3
    streams = [np.random.default_rng([5, k]).uniform(0.5, 1.5, 400) for k in range(num_workers)]
    policy = StalenessBound(3, "restart")
    trace = sample_trace(model, num_workers, 300, 1, 5, policy=policy)
    assert len(trace.events) > 20
    starts = np.append(0.0, trace.times)[trace.dispatched_at]
    means = model.mean_times(num_workers)
    for t, worker in enumerate(trace.workers.tolist()):
        wanted = means[worker] * streams[worker][trace.rounds[t]]
        assert math.isclose(trace.times[t] - starts[t], wanted, rel_tol=1e-9)

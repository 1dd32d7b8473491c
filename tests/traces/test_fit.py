"""The model of compute times that fits a run's arrivals."""

from typing import Any, cast

import numpy as np
import pytest

from orlomo_jax.recording.journal import Arrival, Journal
from orlomo_jax.traces import (
    ArrivalTrace,
    RestartEvery,
    StalenessBound,
    deepmind_toy,
    fit_compute_times,
    heterogeneous,
    homogeneous,
    per_worker_times,
    sample_trace,
    sqrt_k,
)

TIMES = [1.0, 1.5, 4.0, 2.0]
MODEL = per_worker_times(TIMES, variation=0.4)
POLICY = StalenessBound(5)


@pytest.mark.parametrize("num_local_steps", [1, 8, [8, 5, 2, 4]])
@pytest.mark.parametrize("options", [{}, {"synchronous": True}, {"policy": POLICY}])
def test_a_known_model_is_recovered(num_local_steps, options):
    """Within 3 %: four standard errors of a mean over some 500 rounds."""
    trace = sample_trace(MODEL, 4, 4000, num_local_steps, 3, **options)
    fit = fit_compute_times(trace, num_local_steps)
    np.testing.assert_allclose(fit.compute_times.mean_times(4), TIMES, rtol=0.03)
    assert abs(fit.compute_times.variation - 0.4) < 0.02
    assert (fit.compute_times.noise, fit.compute_times.communication_time) == ("uniform", 0)
    assert fit.counts == tuple(np.bincount(trace.workers))
    assert abs(fit.spread - 0.4 / np.sqrt(3)) < 0.01
    assert fit.delay_distance < 0.05
    assert not fit.separable


def test_half_normal_noise_is_recognized():
    trace = sample_trace(sqrt_k(5), 5, 5000, 2, 0)
    fit = fit_compute_times(trace, 2)
    np.testing.assert_allclose(fit.compute_times.mean_times(5), sqrt_k(5).mean_times(5), rtol=0.01)
    assert fit.compute_times.noise == "half-normal"
    assert abs(fit.compute_times.variation - 0.05) < 0.005
    assert fit.r_squared > 0.98


def test_communication_is_estimated_from_two_numbers_of_local_steps():
    model = MODEL.with_communication(latency=1.5)
    steps = [2, [8, 12, 8, 8]]
    runs = [sample_trace(model, 4, 4000, own, seed) for seed, own in enumerate(steps)]
    fit = fit_compute_times(runs, steps)
    assert fit.separable
    assert abs(fit.compute_times.communication_time - 3.0) < 0.15
    np.testing.assert_allclose(fit.compute_times.mean_times(4), TIMES, rtol=0.03)
    assert abs(fit.compute_times.variation - 0.4) < 0.03
    assert fit.counts == tuple(sum(np.bincount(run.workers) for run in runs).tolist())


def test_communication_belongs_to_the_gradients_if_it_is_not_separable():
    """Even if S differs between workers: K means cannot give K + 1 numbers."""
    model = per_worker_times([1.0, 2.0], variation=0.0).with_communication(latency=1.0)
    trace = sample_trace(model, 2, 100, [8, 4], 0)
    fit = fit_compute_times([trace], [[8, 4]])
    assert not fit.separable
    np.testing.assert_allclose(fit.compute_times.mean_times(2), [10 / 8, 10 / 4])
    assert "communication 0 s per round (not separable: " in str(fit)
    without = sample_trace(MODEL, 4, 500, 2, 0), sample_trace(MODEL, 4, 500, 8, 0)
    assert fit_compute_times(without, [2, 8]).compute_times.communication_time < 0.2


def test_times_without_noise_are_exact():
    trace = sample_trace(deepmind_toy(), 4, 300, 5, 0)
    fit = fit_compute_times(trace, 5)
    np.testing.assert_allclose(
        fit.compute_times.mean_times(4), deepmind_toy().mean_times(4), rtol=1e-9
    )
    assert (fit.compute_times.variation, fit.spread) == (0, 0)
    assert fit.r_squared > 1 - 1e-12
    assert fit.delay_distance < 0.02


def test_a_wrong_model_fits_worse():
    """The workers' speeds change in the middle, which the model cannot express."""
    first = sample_trace(per_worker_times([1.0, 9.0], variation=0.1), 2, 500, 1, 0)
    second = sample_trace(per_worker_times([9.0, 1.0], variation=0.1), 2, 500, 1, 0)
    trace = ArrivalTrace.from_workers(
        [*first.workers, *second.workers], 2, times=[*first.times, *second.times + first.times[-1]]
    )
    good, bad = fit_compute_times(first), fit_compute_times(trace)
    assert good.delay_distance < 0.05 < 0.2 < bad.delay_distance
    assert bad.r_squared < 0.1 < 0.9 < good.r_squared


class TestEvents:
    def test_lost_rounds_and_those_after_them_are_ignored(self):
        """Worker 1 computes for 1 s, but hangs for 100 s once, and joins late."""
        events = [(1, "joined", 2), (3, "lost", 1), (4, "redispatched", 1), (9, "restarted", 0)]
        workers = [0, 1, 2, 0, 0, 1, 2, 2, 0, 0, 0, 0, 1, 1, 1, 2]
        times = [1, 1.5, 3, 104, 105, 110, *range(111, 121)]
        trace = ArrivalTrace.from_workers(workers, 3, times=times, events=events)
        fit = fit_compute_times(trace)
        # Ignored: worker 2's first round, worker 1's second, and worker 0's after step 9.
        assert fit.counts == (6, 4, 3)

    def test_waiting_workers_that_an_event_sent_are_ignored(self):
        events = [(2, "left", 0), (4, "joined", 0)]
        workers = [1, 1, 1, 1, 0, 1, 0, 0, 1, 0]
        trace = ArrivalTrace.from_workers(workers, 2, events=events, max_wait=2)
        # Ignored: worker 1's round from step 2, and worker 0's from step 4.
        assert trace.dispatched_at.tolist()[2] == 2
        assert fit_compute_times(trace).counts == (3, 4)

    def test_restarts_by_a_policy(self):
        trace = sample_trace(MODEL, 4, 4000, 2, 0, policy=RestartEvery(5))
        fit = fit_compute_times(trace, 2)
        assert sum(fit.counts) < 4000
        assert fit.compute_times.mean_times(4)[0] < 1.0  # long rounds were cancelled


def test_a_journal_of_a_real_run():
    journal = Journal({"num_workers": 2, "synchronous": False})
    rng, held, rounds = np.random.default_rng(0), [0, 0], [0, 0]
    ends = [30.0, 31.0]  # the first rounds compile
    for step in range(400):
        worker = int(np.argmin(ends))
        journal.arrived(Arrival(worker, rounds[worker], held[worker], ends[worker], loss=1.0))
        held[worker], rounds[worker] = step + 1, rounds[worker] + 1
        ends[worker] += (2 + worker) * rng.uniform(0.9, 1.1)
    fit = fit_compute_times(journal, 2, skip_rounds=1)
    np.testing.assert_allclose(fit.compute_times.mean_times(2), [1.0, 1.5], rtol=0.02)
    assert abs(fit.compute_times.variation - 0.1) < 0.02
    assert sum(fit.counts) == 398
    assert fit_compute_times(journal, 2).compute_times.mean_times(2)[0] > 1.05


def test_as_text():
    fit = fit_compute_times(sample_trace(heterogeneous(), 4, 800, 8, 0), 8)
    lines = str(fit).splitlines()
    assert lines[0].split() == ["worker", "rounds", "s", "per", "gradient"]
    assert [line.split()[:2] for line in lines[1:5]] == [
        [str(worker), str(count)] for worker, count in enumerate(fit.counts)
    ]
    assert lines[-2].startswith("variation 0.7")
    assert lines[-1].startswith("R² of the durations 0.")
    assert len(lines) == 8


@pytest.mark.parametrize(
    ("runs", "num_local_steps", "error", "message"),
    [
        (ArrivalTrace.from_workers([0, 0, 0, 1, 1], 2), 1, ValueError, "got 2 of worker 1"),
        (ArrivalTrace.from_workers([0, 0, 0, 0], 2), 1, ValueError, "3 or more .* got 0 of wor"),
        (ArrivalTrace.from_workers([], 2), 1, ValueError, "got 0 of worker 0"),
        (ArrivalTrace.from_workers([0] * 3, 1, times=[0] * 3), 1, ValueError, "got 0 s of worker"),
        ([], [], ValueError, r"the same number of workers, got num_workers=\[\]"),
        (
            [ArrivalTrace.from_workers([], k) for k in (1, 2)],
            [1, 1],
            ValueError,
            r"num_workers=\[1, 2\]",
        ),
        ([ArrivalTrace.from_workers([], 2)], [1, 2], ValueError, "each of 1 runs, got 2"),
        (ArrivalTrace.from_workers([], 2), [1, 2, 3], ValueError, "each of 2 workers, got 3"),
        (ArrivalTrace.from_workers([], 2), 0, ValueError, "num_local_steps=0"),
        (cast(Any, "trace.json"), 1, TypeError, "`runs` must be traces or journals, got 't"),
        (cast(Any, 3), 1, TypeError, "`runs` must be traces or journals, got 3"),
        (cast(Any, np.ones(2)), 1, TypeError, "`runs` must be traces or journals, got array"),
        ([ArrivalTrace.from_workers([], 2)], 2, TypeError, "each run, got num_local_steps=2"),
    ],
)
def test_refused(runs, num_local_steps, error, message):
    with pytest.raises(error, match=message):
        fit_compute_times(runs, num_local_steps)


def test_skip_rounds_is_checked():
    with pytest.raises(ValueError, match="skip_rounds=-1"):
        fit_compute_times(sample_trace(homogeneous(), 2, 50, 1, 0), skip_rounds=-1)
    with pytest.raises(ValueError, match="3 or more complete rounds"):
        fit_compute_times(sample_trace(homogeneous(), 2, 50, 1, 0), skip_rounds=30)

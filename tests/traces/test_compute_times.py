"""Compute-time models and the arrivals that they lead to."""

import dataclasses
import itertools
import math
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orlomo_jax.traces import (
    ComputeTimes,
    heterogeneous,
    homogeneous,
    one_slow_worker,
    per_worker_times,
    sample_trace,
)
from orlomo_jax.traces.sample_trace import report_times

UNHURRIED = settings(deadline=None)  # a busy machine is not a failure


class TestComputeTimes:
    def test_mean_times(self):
        assert homogeneous(gradient_time=2.0).mean_times(2).tolist() == [2, 2]
        assert heterogeneous().mean_times(8).tolist() == [1] * 6 + [2] * 2
        assert heterogeneous().mean_times(2).tolist() == [1, 2]  # halves round up
        assert heterogeneous().mean_times(1).tolist() == [1]
        assert heterogeneous(0.5, 4.0, gradient_time=3.0).mean_times(4).tolist() == [3, 3, 12, 12]
        assert one_slow_worker(50.0).mean_times(3).tolist() == [1, 1, 50]
        assert one_slow_worker(50.0).mean_times(1).tolist() == [50]
        assert per_worker_times([1, 0.5]).mean_times(2).tolist() == [1, 0.5]
        with pytest.raises(ValueError, match=r"`num_workers` must be 2, .* got num_workers=3"):
            per_worker_times([1, 0.5]).mean_times(3)

    def test_communication(self):
        sent = homogeneous().with_communication(
            latency=0.25, bandwidth=100.0, upload_bytes=200, download_bytes=50
        )
        assert sent.communication_time == 2 * 0.25 + 250 / 100
        assert homogeneous().with_communication(upload_bytes=1e9).communication_time == 0

    def test_changed_copies(self):
        model = homogeneous()
        silent = model.with_silent_worker(1).with_silent_worker(2, 5).with_silent_worker(1, 3)
        assert silent.silent_after == ((2, 5), (1, 3))
        assert model == homogeneous()

    @pytest.mark.parametrize(
        ("build", "error", "message"),
        [
            (lambda: homogeneous(1.0), ValueError, r"`variation` must be in \[0, 1\), got .*=1.0"),
            (lambda: homogeneous(math.nan), ValueError, "variation=nan"),
            (lambda: homogeneous(cast(Any, "0.5")), TypeError, "variation='0.5'"),
            (lambda: homogeneous(True), TypeError, "variation=True"),
            (lambda: homogeneous(gradient_time=0.0), ValueError, "gradient_time=0.0"),
            (lambda: homogeneous(gradient_time=math.inf), ValueError, "gradient_time=inf"),
            (lambda: heterogeneous(1.5), ValueError, "slow_fraction=1.5"),
            (lambda: heterogeneous(slowdown=0.5), ValueError, "slowdown=0.5"),
            (lambda: one_slow_worker(0.5), ValueError, "`ratio` must be .*≥ 1, got ratio=0.5"),
            (lambda: one_slow_worker(math.inf), ValueError, "ratio=inf"),
            (lambda: per_worker_times([1.0, -1.0]), ValueError, r"gradient_times\[1\]=-1.0"),
            (lambda: per_worker_times([]), ValueError, r"gradient_times=\[\]"),
            (lambda: per_worker_times(cast(Any, 2.0)), TypeError, "gradient_times=2.0"),
            (lambda: sample_trace(cast(Any, 2.0), 2, 4, 1, 0), TypeError, "`model` .*model=2.0"),
            (lambda: ComputeTimes(slow_workers=-1), ValueError, "slow_workers=-1"),
            (lambda: ComputeTimes(noise=cast(Any, "normal")), ValueError, "noise='normal'"),
            (lambda: homogeneous().with_silent_worker(-1), ValueError, "worker=-1"),
            (
                lambda: homogeneous().with_silent_worker(0, cast(Any, 0.5)),
                TypeError,
                "after_rounds=0.5",
            ),
            (lambda: homogeneous().with_communication(latency=-1), ValueError, "latency=-1"),
            (lambda: homogeneous().with_communication(bandwidth=0), ValueError, "bandwidth=0"),
            (
                lambda: homogeneous().with_communication(upload_bytes=math.inf),
                ValueError,
                "upload_bytes=inf",
            ),
        ],
    )
    def test_out_of_range(self, build, error, message):
        with pytest.raises(error, match=message):
            build()


@pytest.mark.parametrize("noise", ["uniform", "half-normal"])
def test_noise_has_mean_one(noise):
    model = ComputeTimes(variation=0.5, noise=noise)
    factors = model.draw_factors(np.random.default_rng(0), 100_000)
    assert abs(factors.mean() - 1) < 0.005
    half_normal_spread = 0.5 * math.sqrt(1 - 2 / math.pi) / model.half_normal_mean
    spread = 0.5 / math.sqrt(3) if noise == "uniform" else half_normal_spread
    assert abs(factors.std() / spread - 1) < 0.01


MODELS = st.builds(
    ComputeTimes,
    gradient_time=st.floats(1e-3, 1e3),
    variation=st.sampled_from([0.0, 0.3, 0.7, 0.99]),
    slowdown=st.floats(1.0, 100.0),
    slow_fraction=st.floats(0.0, 1.0),
    communication_time=st.sampled_from([0.0, 0.1, 10.0]),
    silent_after=st.sampled_from([(), ((0, 0),), ((0, 3), (1, 1))]),
    noise=st.sampled_from(["uniform", "half-normal"]),
)


def factor(model, stream):
    """Return one U, from the definition."""
    if model.noise == "uniform":
        return stream.uniform(1 - model.variation, 1 + model.variation)
    mean = 1 + model.variation * math.sqrt(2 / math.pi)
    return (1 + model.variation * abs(stream.standard_normal())) / mean


def reference_times(model, num_workers, num_rounds, num_local_steps, seed):
    """Every worker's report times, one round after the other, from the definition."""
    silent = dict(model.silent_after)
    reports = []
    for worker, mean in enumerate(model.mean_times(num_workers)):
        stream, compute = np.random.default_rng([seed, worker]), 0.0
        for round_ in range(min(num_rounds, silent.get(worker, num_rounds))):
            compute += factor(model, stream)
            spent = (round_ + 1) * model.communication_time
            reports.append((num_local_steps * mean * compute + spent, worker))
    return sorted(reports)


class TestSimulate:
    @UNHURRIED
    @given(MODELS, st.integers(3, 5), st.integers(0, 40), st.integers(1, 4), st.integers(0, 9))
    def test_agrees_with_the_definition(self, model, num_workers, num_steps, local_steps, seed):
        trace = sample_trace(model, num_workers, num_steps, local_steps, seed)
        reports = reference_times(model, num_workers, num_steps, local_steps, seed)[:num_steps]
        assert list(zip(trace.times.tolist(), trace.workers.tolist(), strict=True)) == reports

    @UNHURRIED
    @given(MODELS, st.integers(3, 6), st.integers(0, 200), st.integers(0, 200), st.booleans())
    def test_fewer_steps_are_a_prefix(self, model, num_workers, some, more, synchronous):
        if synchronous:
            model = dataclasses.replace(model, silent_after=())
        some, more = sorted((some, more))
        short, long = (
            sample_trace(model, num_workers, steps, 2, 7, synchronous=synchronous)
            for steps in (some, more)
        )
        for name in ("workers", "rounds", "dispatched_at", "times"):
            np.testing.assert_array_equal(getattr(short, name), getattr(long, name)[:some])

    def test_drawing_on_continues_the_same_sum(self):
        """Rounds far shorter than expected are drawn in several goes, which must not show."""
        durations = np.random.default_rng(0).uniform(0.01, 0.3, 2000)
        stream = iter(durations)
        goes = []

        def draw(count):
            goes.append(count)
            return np.array([next(stream) for _ in range(count)])

        times = report_times(draw, 1.0, 0.0, 10**9, 100.0)
        in_order = np.array(list(itertools.accumulate(durations)))
        np.testing.assert_array_equal(times, in_order[in_order <= 100.0])
        assert len(goes) > 3

    def test_ties_go_to_the_lower_worker(self):
        trace = sample_trace(homogeneous(variation=0.0), 3, 7, 2, 0)
        assert trace.workers.tolist() == [0, 1, 2, 0, 1, 2, 0]
        assert trace.times.tolist() == [2, 2, 2, 4, 4, 4, 6]

    def test_the_barrier(self):
        model = per_worker_times([1.0, 3.0, 2.0], variation=0.0).with_communication(latency=0.5)
        trace = sample_trace(model, 3, 7, 2, 0, synchronous=True)
        assert trace.workers.tolist() == [0, 2, 1, 0, 2, 1, 0]
        assert trace.times.tolist() == [3, 5, 7, 10, 12, 14, 17]
        assert trace.dispatched_at.tolist() == [0, 0, 0, 3, 3, 3, 6]
        assert trace.synchronous

    def test_synchronous_rounds_start_together(self):
        model, num_workers, num_rounds = heterogeneous(), 4, 5
        trace = sample_trace(model, num_workers, 4 * num_rounds, 3, 1, synchronous=True)
        streams = [np.random.default_rng([1, worker]) for worker in range(num_workers)]
        start = 0.0
        for times in trace.times.reshape(num_rounds, num_workers):
            draws = [stream.uniform(0.3, 1.7) for stream in streams]
            np.testing.assert_allclose(times - start, sorted(3 * model.mean_times(4) * draws))
            start = times[-1]

    def test_silent_workers(self):
        model = homogeneous().with_silent_worker(0).with_silent_worker(2, after_rounds=3)
        trace = sample_trace(model, 4, 50, 1, 0)
        assert np.bincount(trace.workers, minlength=4)[[0, 2]].tolist() == [0, 3]
        assert trace.in_flight[0] == 0

    def test_a_silent_worker_a_million_times_faster(self):
        model = per_worker_times([1e-6, 1.0]).with_silent_worker(0, 2)
        assert sample_trace(model, 2, 5, 1, 0).workers.tolist() == [0, 0, 1, 1, 1]

    def test_too_few_reports(self):
        silent = homogeneous().with_silent_worker(0, 1).with_silent_worker(1, 2)
        assert sample_trace(silent, 2, 3, 1, 0).num_steps == 3
        with pytest.raises(ValueError, match="must be ≤ 3, got num_steps=4: the silent workers"):
            sample_trace(silent, 2, 4, 1, 0)
        # Behind the barrier round 1 is worker 0's, which is silent, and worker 1's, its last.
        assert sample_trace(silent, 2, 3, 1, 0, synchronous=True).workers[2] == 1
        with pytest.raises(ValueError, match="must be ≤ 3, got num_steps=9: the silent workers"):
            sample_trace(silent, 2, 9, 1, 0, synchronous=True)

    def test_maximum_delay_of_table_3(self):
        delays = [sample_trace(homogeneous(), 16, 15_625, 8, s).max_delay for s in range(5)]
        assert 32 <= np.median(delays) <= 36

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"num_workers": 0}, ValueError, "num_workers=0"),
            ({"num_workers": True}, TypeError, "num_workers=True"),
            ({"num_steps": -1}, ValueError, "num_steps=-1"),
            ({"num_local_steps": 0}, ValueError, "num_local_steps=0"),
            ({"seed": -1}, ValueError, "seed=-1"),
            ({"seed": 0.0}, TypeError, "seed=0.0"),
            ({"synchronous": 1}, TypeError, "synchronous=1"),
            (
                {"model": homogeneous().with_silent_worker(2)},
                ValueError,
                r"`worker` must be in \[0, 1\], got worker=2",
            ),
        ],
    )
    def test_out_of_range(self, change, error, message):
        good = {
            "model": homogeneous(),
            "num_workers": 2,
            "num_steps": 5,
            "num_local_steps": 1,
            "seed": 0,
        }
        with pytest.raises(error, match=message):
            sample_trace(**good | change)

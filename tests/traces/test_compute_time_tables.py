"""Compute times of published experiments."""

from typing import Any, cast

import numpy as np
import pytest

from orlomo_jax.traces import (
    COMPUTE_TIME_NAMES,
    deepmind_toy,
    forgather_4to1,
    halos_16,
    named_compute_times,
    per_worker_times,
    sample_trace,
    sqrt_k,
)

SIZES = {"deepmind_toy": 4, "halos_16": 16, "forgather_4to1": 4, "sqrt_k": 6}


def test_the_tables_are_as_published():
    assert deepmind_toy().mean_times(4).tolist() == [0.58, 0.75, 1.51, 3.33]
    assert forgather_4to1().mean_times(4).tolist() == [0.156, 0.312, 0.469, 0.625]
    speeds = ".232 .907 .828 .347 .574 .531 .722 .194 .852 .132 .896 .107 .827 .515 .527 .788"
    wanted = [float(speed) for speed in speeds.split()]
    np.testing.assert_allclose(1 / halos_16().mean_times(16), wanted, rtol=1e-15)


def test_the_tables_have_no_noise_unless_asked():
    for table in (deepmind_toy, halos_16, forgather_4to1):
        assert table().variation == 0
        assert table(0.2).variation == 0.2
    assert deepmind_toy() == per_worker_times([0.58, 0.75, 1.51, 3.33], variation=0.0)


def test_half_normal_noise_only_slows_down():
    """The duration of a round is √k · (1 + 0.05 · |Z|), with its own Z for each round."""
    trace = sample_trace(sqrt_k(4), 4, 400, 1, seed=2)
    starts = np.append(0.0, trace.times)[trace.dispatched_at]
    factors = (trace.times - starts) / np.sqrt(trace.workers + 1)
    for worker in range(4):
        own = factors[trace.workers == worker]
        normal = np.random.default_rng([2, worker]).standard_normal(len(own))
        np.testing.assert_allclose(own, 1 + 0.05 * np.abs(normal), rtol=1e-9)
    assert factors.min() >= 1 - 1e-9


@pytest.mark.parametrize("name", COMPUTE_TIME_NAMES)
def test_by_name(name):
    num_workers = SIZES[name]
    model = named_compute_times(name, num_workers)
    assert len(model.mean_times(num_workers)) == num_workers
    assert sample_trace(model, num_workers, 50, 2, 0).num_steps == 50
    if name != "sqrt_k":
        assert named_compute_times(name) == model


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: named_compute_times("deepmind"), ValueError, r"`name` must be one of deepmi"),
        (lambda: named_compute_times("sqrt_k"), ValueError, "must be given for 'sqrt_k'"),
        (lambda: named_compute_times("sqrt_k", 0), ValueError, "num_workers=0"),
        (lambda: named_compute_times("deepmind_toy", 5), ValueError, "must be 4 for 'deepmind_toy"),
        (lambda: sqrt_k(cast(Any, 2.0)), TypeError, "num_workers=2.0"),
        (lambda: sqrt_k(2, variation=1.0), ValueError, "variation=1.0"),
        (lambda: halos_16(-0.1), ValueError, "variation=-0.1"),
    ],
)
def test_out_of_range(call, error, message):
    with pytest.raises(error, match=message):
        call()

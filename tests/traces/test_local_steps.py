"""Numbers of local steps that differ between workers."""

import math
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orlomo_jax.checks import check_local_steps
from orlomo_jax.traces import dynamic_local_steps, homogeneous, per_worker_times, sample_trace

SPEEDS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8)


class TestDynamicLocalSteps:
    @given(st.lists(st.integers(1, 1000), min_size=1, max_size=8), st.integers(1, 500))
    def test_integer_speeds_are_exact(self, speeds, num_local_steps):
        wanted = [max(1, num_local_steps * speed // max(speeds)) for speed in speeds]
        assert dynamic_local_steps(speeds, num_local_steps) == tuple(wanted)

    @given(st.integers(1, 300), st.integers(1, 300))
    def test_rounding_costs_no_step(self, factor, num_local_steps):
        """A worker that takes exactly ``factor`` times longer."""
        steps = dynamic_local_steps([1.0, 1 / factor], num_local_steps * factor)
        assert steps == (num_local_steps * factor, num_local_steps)

    @given(SPEEDS, st.integers(1, 100), st.data())
    def test_range(self, speeds, num_local_steps, data):
        minimum = data.draw(st.integers(1, num_local_steps))
        steps = dynamic_local_steps(speeds, num_local_steps, minimum=minimum)
        assert max(steps) == num_local_steps
        assert min(steps) >= minimum
        assert steps[int(np.argmax(speeds))] == num_local_steps
        assert [b for _, b in sorted(zip(speeds, steps, strict=True))] == sorted(steps)

    @pytest.mark.parametrize(
        ("speeds", "num_local_steps", "minimum", "error", "message"),
        [
            ([], 4, 1, ValueError, r"speeds=\[\]"),
            ([1.0, 0.0], 4, 1, ValueError, r"`speeds\[1\]` must be finite and > 0, .*=0.0"),
            ([1.0, math.inf], 4, 1, ValueError, r"speeds\[1\]=inf"),
            ([1.0, math.nan], 4, 1, ValueError, r"speeds\[1\]=nan"),
            (["1"], 4, 1, TypeError, r"speeds\[0\]='1'"),
            (b"12", 4, 1, TypeError, "speeds=b'12'"),
            (2.0, 4, 1, TypeError, "speeds=2.0"),
            (np.array(2.0), 4, 1, TypeError, r"speeds=array\(2.\)"),
            ({1: 1.0}, 4, 1, TypeError, r"speeds=\{1: 1.0\}"),
            ([1.0], 0, 1, ValueError, "num_local_steps=0"),
            ([1.0], 4, 0, ValueError, "minimum=0"),
            ([1.0], 4, 5, ValueError, r"`minimum` must be in \[1, 4\], got minimum=5"),
        ],
    )
    def test_out_of_range(self, speeds, num_local_steps, minimum, error, message):
        with pytest.raises(error, match=message):
            dynamic_local_steps(speeds, num_local_steps, minimum=minimum)

    def test_delays_shrink(self):
        model = per_worker_times([1.0, 2.0, 4.0, 8.0], variation=0.05)
        steps = dynamic_local_steps(1 / model.mean_times(4), 32)
        assert steps == (32, 16, 8, 4)
        uneven, even = (sample_trace(model, 4, 500, s, 0).max_delay for s in (steps, 32))
        assert uneven <= 6 < even


class TestSampleTrace:
    @pytest.mark.parametrize("synchronous", [False, True])
    def test_equal_numbers_are_one_number(self, synchronous):
        options = {"seed": 3, "synchronous": synchronous}
        one, many = (
            sample_trace(homogeneous(), 3, 50, steps, **options) for steps in (4, [4, 4, 4])
        )
        assert one == many

    def test_one_number_may_be_an_array(self):
        for number in (np.array(4), np.int64(4), jnp.array(4)):
            assert sample_trace(homogeneous(), 2, 9, cast(Any, number), 0) == (
                sample_trace(homogeneous(), 2, 9, 4, 0)
            )
            assert check_local_steps(number, 2) == 4
        assert check_local_steps(jnp.array([4, 2]), 2) == (4, 2)

    def test_a_worker_with_twice_the_steps_takes_twice_as_long(self):
        slow = sample_trace(per_worker_times([1.0, 2.0]), 2, 100, 4, 0)
        more = sample_trace(homogeneous(), 2, 100, np.array([4, 8]), 0)
        assert slow == more

    @pytest.mark.parametrize(
        ("num_local_steps", "error", "message"),
        [
            ([1], ValueError, "a number for each of 2 workers, got 1"),
            ([1, 1, 1], ValueError, "each of 2 workers, got 3"),
            ([1, 0], ValueError, r"`num_local_steps\[1\]` must be ≥ 1, got .*\[1\]=0"),
            ([1, True], TypeError, r"num_local_steps\[1\]=True"),
            ([1.5, 1], TypeError, r"num_local_steps\[0\]=1.5"),
            ("12", TypeError, "num_local_steps='12'"),
            (1.5, TypeError, "num_local_steps=1.5"),
            (b"12", TypeError, "num_local_steps=b'12'"),
            ({1, 2}, TypeError, r"num_local_steps=\{1, 2\}"),
            (iter([1, 2]), TypeError, "num_local_steps=<list_iterator"),
            (np.array(1.5), TypeError, r"num_local_steps=array\(1.5\)"),
        ],
    )
    def test_out_of_range(self, num_local_steps, error, message):
        for check in (
            lambda: sample_trace(homogeneous(), 2, 5, cast(Any, num_local_steps), 0),
            lambda: check_local_steps(num_local_steps, 2),
        ):
            with pytest.raises(error, match=message):
                check()

"""Models of compute times."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from orlomo_jax.checks import (
    check_choice,
    check_count,
    check_nonnegative,
    check_number,
    check_one_each,
)

_VARIATION = 0.7  # see `homogeneous`
_POSITIVE = (lambda x: 1e-100 <= x <= 1e100, "in [1e-100, 1e100] seconds")
_NOISES = ("uniform", "half-normal")
_AT_LEAST_ONE = (lambda x: 1 <= x < math.inf, "finite and ≥ 1")


@dataclasses.dataclass(frozen=True)
class ComputeTimes:
    """The time of a round: S · mean · U + communication, in virtual seconds.

    U has the mean 1. It is drawn once per round, because a machine's speed changes slowly compared
    with one gradient. By default it is uniform on [1 − variation, 1 + variation]. Create a model
    with :func:`homogeneous`, :func:`heterogeneous`, :func:`one_slow_worker` or
    :func:`per_worker_times`.

    Attributes:
        gradient_time: Mean seconds per gradient, > 0: one number for all workers, or a tuple with
            one for each.
        variation: Half the width of U's range, in [0, 1); for half-normal noise, its scale.
        slowdown: Factor ≥ 1 on the mean of the slow workers, which are the last ones.
        slow_fraction: Fraction of slow workers; slow_fraction·K rounds halves up.
        slow_workers: Number of slow workers in addition to that fraction.
        communication_time: Seconds ≥ 0 that every round adds.
        silent_after: Pairs (worker, number of its reports, after which it is silent).
        noise: "uniform", or "half-normal" for U ∝ 1 + variation · |Z| with Z ~ N(0, 1): rounds are
            sometimes slower, but never faster than a limit.

    Raises:
        TypeError, ValueError: If a field is not a number, or out of its range.

    Example:
        >>> model = per_worker_times([1.0, 2.0]).with_communication(bandwidth=1e6, upload_bytes=5e5)
        >>> model.communication_time, model.with_silent_worker(0, after_rounds=3).silent_after
        (0.5, ((0, 3),))
    """

    gradient_time: float | tuple[float, ...] = 1.0
    variation: float = _VARIATION
    slowdown: float = 1.0
    slow_fraction: float = 0.0
    slow_workers: int = 0
    communication_time: float = 0.0
    silent_after: tuple[tuple[int, int], ...] = ()
    noise: Literal["uniform", "half-normal"] = "uniform"

    def __post_init__(self) -> None:
        """Check every field."""
        if isinstance(self.gradient_time, tuple):
            check_one_each("gradient_times", self.gradient_time)
            for worker, seconds in enumerate(self.gradient_time):
                check_number(f"gradient_times[{worker}]", seconds, *_POSITIVE)
        else:
            check_number("gradient_time", self.gradient_time, *_POSITIVE)
        check_number("variation", self.variation, lambda x: 0 <= x < 1, "in [0, 1)")
        check_number("slowdown", self.slowdown, *_AT_LEAST_ONE)
        check_number("slow_fraction", self.slow_fraction, lambda x: 0 <= x <= 1, "in [0, 1]")
        check_count("slow_workers", self.slow_workers)
        check_nonnegative("communication_time", self.communication_time)
        check_choice("noise", self.noise, _NOISES)
        for pair in self.silent_after:
            if len(pair) != 2:
                raise ValueError(
                    f"`silent_after` must contain (worker, after_rounds), got {pair!r}"
                )
            worker, after_rounds = pair
            check_count("worker", worker)
            check_count("after_rounds", after_rounds)

    def with_silent_worker(self, worker: int, after_rounds: int = 0) -> ComputeTimes:
        """Return a copy in which ``worker`` is silent after ``after_rounds`` reports."""
        others = tuple(pair for pair in self.silent_after if pair[0] != worker)
        return dataclasses.replace(self, silent_after=(*others, (worker, after_rounds)))

    def with_communication(
        self,
        *,
        latency: float = 0.0,
        bandwidth: float = math.inf,
        upload_bytes: float = 0,
        download_bytes: float = 0,
    ) -> ComputeTimes:
        """Return a copy with 2·latency + (upload + download)/bandwidth more seconds per round.

        ``latency`` is in seconds, one way; ``bandwidth`` is in bytes per second.
        """
        check_nonnegative("latency", latency)
        check_number("bandwidth", bandwidth, lambda x: x > 0, "> 0")
        check_nonnegative("upload_bytes", upload_bytes)
        check_nonnegative("download_bytes", download_bytes)
        seconds = 2 * latency + (upload_bytes + download_bytes) / bandwidth
        return dataclasses.replace(self, communication_time=seconds)

    @property
    def half_normal_mean(self) -> float:
        """The mean of 1 + variation · |Z|, by which half-normal noise is divided."""
        return 1 + self.variation * math.sqrt(2 / math.pi)

    def draw_factors(self, generator: np.random.Generator, count: int) -> np.ndarray:
        """Return the next ``count`` factors U of a stream, float64[count]."""
        if self.noise == "uniform":
            return generator.uniform(1 - self.variation, 1 + self.variation, count)
        noise = np.abs(generator.standard_normal(count))
        return (1 + self.variation * noise) / self.half_normal_mean

    def mean_times(self, num_workers: int) -> np.ndarray:
        """Return every worker's mean seconds per gradient without communication, float64[K]."""
        means = np.ones(check_count("num_workers", num_workers, 1))
        if isinstance(self.gradient_time, tuple) and len(self.gradient_time) != num_workers:
            raise ValueError(
                f"`num_workers` must be {len(self.gradient_time)}, the number of gradient times "
                f"given, got num_workers={num_workers}"
            )
        slow = self.slow_workers + math.floor(self.slow_fraction * num_workers + 0.5)
        means[max(num_workers - slow, 0) :] = self.slowdown
        return means * self.gradient_time


def homogeneous(variation: float = _VARIATION, gradient_time: float = 1.0) -> ComputeTimes:
    """Return a model in which every worker's mean is ``gradient_time`` seconds.

    The paper says that gradient times vary within a range, but does not give the range. The default
    ``variation`` reproduces the maximum delay of its Table 3.

    Args:
        variation: As in :class:`ComputeTimes`.
        gradient_time: The mean seconds of a gradient, > 0.

    Example:
        >>> homogeneous(gradient_time=0.5).mean_times(3)
        array([0.5, 0.5, 0.5])
    """
    return ComputeTimes(gradient_time, variation)


def heterogeneous(
    slow_fraction: float = 0.25,
    slowdown: float = 2.0,
    variation: float = _VARIATION,
    gradient_time: float = 1.0,
) -> ComputeTimes:
    """Return the paper's unequal workers: the last quarter has twice the mean of the others.

    This is the setting of Tables 1, 2, 4 and 5; ``slowdown=4`` is the setting of Table 6.

    Args:
        slow_fraction: The share of slow workers, in [0, 1]; they are the last ones.
        slowdown: How many times slower they are, ≥ 1.
        variation: As in :class:`ComputeTimes`.
        gradient_time: The mean seconds of a fast worker's gradient, > 0.

    Example:
        >>> heterogeneous().mean_times(4)
        array([1., 1., 1., 2.])
    """
    return ComputeTimes(gradient_time, variation, slowdown, slow_fraction)


def one_slow_worker(
    ratio: float, variation: float = _VARIATION, gradient_time: float = 1.0
) -> ComputeTimes:
    """Return a model whose last worker is ``ratio`` ≥ 1 times slower than the others (Table 3).

    The maximum delays are much smaller than those of the paper's Table 3: its slow worker fell
    further behind than its ratio alone explains.

    Args:
        ratio: How many times slower the last worker is, ≥ 1.
        variation: As in :class:`ComputeTimes`.
        gradient_time: The mean seconds of a gradient of the others, > 0.

    Raises:
        ValueError: If a number is out of range; also of the other functions here.

    Example:
        >>> one_slow_worker(10).mean_times(3)
        array([ 1.,  1., 10.])
    """
    check_number("ratio", ratio, *_AT_LEAST_ONE)
    return ComputeTimes(gradient_time, variation, ratio, slow_workers=1)


def per_worker_times(
    gradient_times: Sequence[float], variation: float = _VARIATION
) -> ComputeTimes:
    """Return a model with each worker's mean seconds per gradient, all > 0.

    Args:
        gradient_times: The mean seconds of a gradient, > 0, for each worker.
        variation: As in :class:`ComputeTimes`.

    Example:
        >>> per_worker_times([1.0, 3.0]).mean_times(2)
        array([1., 3.])
    """
    check_one_each("gradient_times", gradient_times)
    return ComputeTimes(tuple(gradient_times), variation)

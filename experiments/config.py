"""Defines one run of the paper's experiments, and derives its length and arrivals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from experiments.checks import check
from orlomo_jax import (
    ArrivalTrace,
    Compiled,
    heterogeneous,
    homogeneous,
    one_slow_worker,
    sample_trace,
)
from orlomo_jax.traces import ComputeTimes, StalenessBound


@dataclass(frozen=True)
class ComputeOptions:
    """How the rounds of a run are computed; results differ by rounding."""

    worker_axis: Literal["auto", "loop", "map", "vmap"] = "auto"
    """Compute rounds one by one, or together by lax.map or vmap (simulated runs)."""
    compute_batch: int | None = None
    """The largest number of rounds computed together; by default as many as possible."""
    convolution: Literal["auto", "xla", "matmul", "native"] = "auto"
    """Convolutions by XLA, as matrix products, or by C++ loops (on a CPU; needs a C++ compiler)."""

    @property
    def engine(self) -> Any:
        """The ``engine`` of :func:`orlomo_jax.simulate`."""
        if (self.worker_axis, self.compute_batch) == ("auto", None):
            return "auto"
        return Compiled(self.worker_axis, self.compute_batch)


PAPER_STEPS = 15_625
"""Global iterations of the runs of the paper's Table 3, which gives their maximum delays."""


@dataclass(frozen=True)
class Run:
    """The complete settings of one training run."""

    method: Literal["orlomo", "prsgdm", "al_sgd", "local_ormo_da"] = "orlomo"
    """Server rule and local optimizer."""
    model: Literal["resnet20", "resnet32", "resnet8", "squeezenet", "mlp"] = "resnet20"
    """Architecture."""
    dataset: Literal["cifar10", "cifar100", "tiny-imagenet", "digits"] = "cifar10"
    """Data set."""
    scenario: Literal["homogeneous", "heterogeneous", "one_slow", "one_delayed"] = "heterogeneous"
    """How unequal the workers are."""
    workers: int = 16
    """K, the number of workers."""
    local_iterations: int = 32
    """S, the number of local steps in a round."""
    seed: int = 0
    """Seed of initialisation, data order, noise and arrivals."""
    epochs: float = 160
    """Passes over the training set, counted over all workers."""
    batch_size: int = 64
    """Examples in one local step."""
    learning_rate: float = 0.1
    """Local learning rate γ at the start; ×0.1 at half and at three quarters of the run."""
    momentum: float = 0.9
    """β of server and workers."""
    weight_decay: float = 1e-3
    """Weight decay of the local steps."""
    slow_fraction: float = 0.25
    """Share of slow workers (heterogeneous)."""
    slowdown: float = 2.0
    """How many times longer a slow worker's gradient takes (heterogeneous, one_slow)."""
    max_delay: int = 0
    """Delay of the last worker's reports, scaled to the run's length (one_delayed)."""
    staleness_bound: int = 0
    """The largest delay of a report; workers wait to keep it. K − 1 is a barrier, 0 no bound."""
    width: float = 1.0
    """Factor on the model's number of channels; slim models have less than 1."""
    pool: int = 1
    """Side of the square windows over which images are averaged."""
    augmented: bool = True
    """Crop and flip training images at random (not digits)."""
    train_size: int = 0
    """Train on this many examples, the first of the training set; 0 for all."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the model's computation."""
    wire: Literal["float32", "bfloat16"] = "float32"
    """Dtype that Δw and Δu are rounded to; on Ray they are sent in it."""
    runtime: Literal["simulated", "threads", "ray"] = "simulated"
    """Simulated workers in virtual time, or real workers, slowed down as the scenario says."""

    def __post_init__(self) -> None:
        """Raise ValueError for settings that are invalid in every run."""
        for names, valid, wanted in (
            ("workers local_iterations batch_size pool", _is_count, "an integer ≥ 1"),
            (
                "seed max_delay staleness_bound train_size",
                lambda x: x == 0 or _is_count(x),
                "an integer in [0, 2³¹)",
            ),
            ("learning_rate weight_decay", lambda x: 0 <= x < 3e38, "in [0, 3e38)"),
            ("epochs width", lambda x: 0 < x < math.inf, "finite and > 0"),
            ("momentum", lambda x: 0 <= x < 1, "in [0, 1)"),
            ("slowdown", lambda x: 1 <= x < math.inf, "finite and ≥ 1"),
            ("slow_fraction", lambda x: 0 <= x <= 1, "in [0, 1]"),
        ):
            for name in names.split():
                check(name, getattr(self, name), valid, wanted)
        if self.staleness_bound:
            check(
                "staleness_bound",
                self.staleness_bound,
                lambda x: x >= self.workers - 1 and self.method != "prsgdm",
                f"0 or ≥ workers − 1 = {self.workers - 1}, and 0 for prsgdm",
            )

    def num_steps(self, train_size: int) -> int:
        """Return T, the reports in ``epochs``; a multiple of K for the synchronous method."""
        reports = math.floor(self.epochs * train_size / (self.batch_size * self.local_iterations))
        if self.method == "prsgdm":
            reports -= reports % self.workers
        if reports < self.workers:
            raise ValueError(
                f"`epochs` must give each of {self.workers} workers a report, got "
                f"epochs={self.epochs:g}, which gives {reports} reports"
            )
        return reports

    @property
    def policy(self) -> StalenessBound | None:
        """The policy that ensures ``staleness_bound``."""
        return StalenessBound(self.staleness_bound) if self.staleness_bound else None

    def trace(self, num_steps: int) -> ArrivalTrace:
        """Return the scenario's arrivals."""
        if self.scenario == "one_delayed":
            return self._one_delayed(num_steps)
        return sample_trace(
            self.compute_times(),
            self.workers,
            num_steps,
            self.local_iterations,
            self.seed,
            synchronous=self.method == "prsgdm",
            policy=self.policy,
        )

    def compute_times(self) -> ComputeTimes:
        """Return the speeds of the scenario's workers."""
        if self.scenario == "homogeneous":
            return homogeneous()
        if self.scenario == "heterogeneous":
            return heterogeneous(self.slow_fraction, self.slowdown)
        if self.scenario == "one_slow":
            return one_slow_worker(self.slowdown)
        raise ValueError(
            f"`scenario` must be one of speeds on the runtime {self.runtime!r}, got "
            f"scenario={self.scenario!r}, which fixes the order of arrivals instead"
        )

    def _one_delayed(self, num_steps: int) -> ArrivalTrace:
        """Return arrivals in which all reports of the last worker have the same delay.

        The delay is ``max_delay``, scaled by T / 15 625; the other workers are homogeneous. A speed
        ratio cannot explain the delays in the paper's Table 3, so this scenario sets the delay.
        """
        if self.method == "prsgdm":
            raise ValueError(
                "`scenario` must not be one_delayed for prsgdm, which waits for every worker"
            )
        if self.workers == 1:
            raise ValueError("`scenario` must not be one_delayed for workers=1")
        if self.staleness_bound:
            raise ValueError(
                "`staleness_bound` must be 0 for one_delayed, which sets the delay, got "
                f"staleness_bound={self.staleness_bound}"
            )
        period = max(1, round(self.max_delay * num_steps / PAPER_STEPS)) + 1
        others = sample_trace(
            homogeneous(), self.workers - 1, num_steps, self.local_iterations, self.seed
        )
        late = np.arange(num_steps) % period == period - 1
        rest = np.cumsum(~late) - 1
        workers = np.where(late, self.workers - 1, others.workers[rest])
        times = np.maximum.accumulate(others.times[np.maximum(rest, 0)])
        return ArrivalTrace.from_workers(workers, self.workers, times=times)


def _is_count(x: float) -> bool:
    return isinstance(x, int) and 1 <= x < 2**31

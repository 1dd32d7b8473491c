"""Describes the methods and clusters of a comparison: hyperparameters, speeds, local steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optax

from orlomo_jax import ArrivalTrace, Method, homogeneous, make_method, one_slow_worker, sample_trace
from orlomo_jax.methods import FIELD_METHODS, METHOD_NAMES
from orlomo_jax.recording import Journal
from orlomo_jax.traces import (
    COMPUTE_TIME_NAMES,
    ComputeTimes,
    dynamic_local_steps,
    fit_compute_times,
    named_compute_times,
    per_worker_times,
)

ALL_METHODS = (*METHOD_NAMES, *FIELD_METHODS)
CLUSTER_NAMES = ("equal", "one_slow", *COMPUTE_TIME_NAMES)
SLOWDOWN = 10.0
"""How many times slower the last worker of ``one_slow`` is."""


class Default(NamedTuple):
    """A method's hyperparameters before tuning.

    Attributes:
        rate: The name of its η; None if the method does not have one.
        eta: η, or a function of K.
        others: The other hyperparameters that it needs, as a function of K.
        largest: The largest valid η.
        traced: Whether one compiled program can serve several η.
    """

    rate: str | None = "learning_rate"
    eta: float | Callable[[int], float] = 1.0
    others: Callable[[int], dict[str, Any]] = lambda K: {}
    largest: float = float("inf")
    traced: bool = True


def _half(K: int) -> dict[str, Any]:
    return {"buffer_size": max(2, K // 2)}


DEFAULTS = {
    "orlomo": Default(),
    "prsgdm": Default(None),
    "al_sgd": Default(),
    "local_ormo_da": Default(),
    "fedasync": Default("mixing_rate", 0.9, largest=1.0),
    "fedbuff": Default(others=_half),
    "nesterov": Default(eta=0.7),
    "delayed_nesterov": Default(eta=0.7),
    "momentum_lookahead": Default(eta=0.7),
    "heloco": Default(eta=0.7, traced=False),
    "delay_lookahead": Default(eta=0.5),
    "ringmaster": Default(others=lambda K: {"max_delay": 2 * K}),
    "rennala": Default(others=_half),
    "rescaled_asgd": Default(),
    "ca2fl": Default(others=_half),
    "fadas": Default(eta=0.01, others=lambda K: _half(K) | {"delay_threshold": 2}),
    "local_sgd": Default(),
    "fedavgm": Default(),
    "slowmo": Default("slow_learning_rate"),
    "diloco": Default(eta=0.7),
    "delay_adaptive_asgd": Default(eta=float),
    "ordered_outer_momentum": Default(),
}
"""Each method's default η, which the η factors multiply, and its other hyperparameters."""


def hyperparameters(name: str, num_workers: int, factor: float) -> dict[str, Any]:
    """Return a method's hyperparameters with its default η times ``factor``.

    Example:
        >>> hyperparameters("fedbuff", 8, factor=0.5)
        {'buffer_size': 4, 'learning_rate': 0.5}
        >>> hyperparameters("fedasync", 8, factor=3.0)  # η is a mixing rate, at most 1
        {'mixing_rate': 1.0}
    """
    default = DEFAULTS[name]
    chosen = default.others(num_workers)
    if default.rate is not None:
        eta = default.eta(num_workers) if callable(default.eta) else default.eta
        chosen[default.rate] = min(eta * factor, default.largest)
    return chosen


OPTIMIZERS = {
    "sgd": None,
    "adamw": optax.chain(
        optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.add_decayed_weights(0.01)
    ),
}
"""The workers' optimizers; OrLoMo and PRSGDm always run momentum SGD."""


def make(
    name: str, num_workers: int, local_steps: int | tuple[int, ...], factor: float, optimizer: str
) -> Method:
    """Return a method with its default η times ``factor``.

    PRSGDm averages its reports and does not have an η: ``factor`` multiplies its updates.
    """
    method = make_method(
        name, num_workers, local_steps, **hyperparameters(name, num_workers, factor)
    )
    if DEFAULTS[name].rate is None and factor != 1.0:
        method = method.with_rule(_scaled(method.rule, factor))
    if method.worker_momentum is None and (chosen := OPTIMIZERS[optimizer]) is not None:
        method = method.with_local_optimizer(chosen)
    return method


_SCALED: dict[Any, Any] = {}


def _scaled(rule: Any, factor: float) -> Any:
    """Return the same object for equal arguments, so that runs share a program."""
    chained = optax.chain(rule, optax.scale(factor))
    return _SCALED.setdefault((rule, factor), chained)


class Cluster(NamedTuple):
    """K workers and their compute times.

    Attributes:
        name: How rows and tables name it.
        compute_times: The model of compute times.
        num_workers: K.
    """

    name: str
    compute_times: ComputeTimes
    num_workers: int

    @property
    def slowest(self) -> int:
        """The worker with the longest time per gradient."""
        return int(np.argmax(self.compute_times.mean_times(self.num_workers)))

    @property
    def fastest(self) -> int:
        """The worker with the shortest time per gradient."""
        return int(np.argmin(self.compute_times.mean_times(self.num_workers)))

    def local_steps(self, wanted: str) -> int | tuple[int, ...]:
        """Return S, for "8"; or each worker's S, for "dynamic" (at most 8) or "dynamic:16".

        Example:
            >>> Cluster("mine", per_worker_times([1.0, 2.0]), 2).local_steps("dynamic:6")
            (6, 3)
        """
        kind, _, largest = wanted.partition(":")
        try:
            if kind != "dynamic":
                return int(wanted)
            top = int(largest) if largest else 8
        except ValueError:
            raise ValueError(
                "`local_steps` must be an integer, dynamic or dynamic:N, got "
                f"local_steps={wanted!r}"
            ) from None
        speeds = 1 / self.compute_times.mean_times(self.num_workers)
        return dynamic_local_steps(speeds.tolist(), top)

    def arrivals(self, method: Method, num_gradients: int, seed: int) -> ArrivalTrace:
        """Return the arrivals of a method's reports, with ``num_gradients`` gradients at most.

        A synchronous method makes whole rounds only.
        """
        steps = method.steps_of_worker

        def sampled(count: int) -> ArrivalTrace:
            return sample_trace(
                self.compute_times,
                self.num_workers,
                count,
                method.num_local_steps,
                seed,
                synchronous=method.synchronous,
                policy=method.policy,
            )

        longest = sampled(num_gradients // min(steps))
        gradients = np.cumsum(np.array(steps)[longest.workers])
        count = int(np.searchsorted(gradients, num_gradients, "right"))
        count -= count % self.num_workers if method.synchronous else 0
        if count < self.num_workers:
            raise ValueError(
                f"`num_gradients` must give each of {self.num_workers} workers a report of "
                f"{max(steps)} gradients, got num_gradients={num_gradients}"
            )
        return sampled(count)


def named_cluster(name: str, num_workers: int, variation: float | None) -> Cluster:
    """Return a cluster of ``CLUSTER_NAMES``; the tables with a fixed K ignore ``num_workers``."""
    if name not in CLUSTER_NAMES:
        raise ValueError(
            f"`compute_times` must be of {', '.join(CLUSTER_NAMES)}, got compute_times={name!r}"
        )
    if name == "equal":
        model = homogeneous()
    elif name == "one_slow":
        model = one_slow_worker(SLOWDOWN)
    else:
        fixed = name != "sqrt_k"
        model = named_compute_times(name, None if fixed else num_workers)
        if fixed:
            num_workers = len(np.atleast_1d(model.gradient_time))
    if variation is not None:
        model = replace(model, variation=variation)
    return Cluster(name, model, num_workers)


def cluster_of_speeds(speeds: Sequence[float], variation: float | None) -> Cluster:
    """Return a cluster of workers with these relative speeds."""
    if not all(0 < speed < math.inf for speed in speeds):
        raise ValueError(f"`speeds` must be finite and > 0, got speeds={tuple(speeds)}")
    times = [1 / speed for speed in speeds]
    model = per_worker_times(times) if variation is None else per_worker_times(times, variation)
    return Cluster("speeds " + " ".join(f"{speed:g}" for speed in speeds), model, len(speeds))


def cluster_of_trace(path: Path, num_local_steps: int) -> Cluster:
    """Return the cluster of a recorded run: an ArrivalTrace or a journal."""
    try:
        trace = ArrivalTrace.load(path)
    except ValueError:
        trace = Journal.load(path).trace()
    fitted = fit_compute_times(trace, num_local_steps)
    return Cluster(f"trace {trace.digest()[:8]}", fitted.compute_times, trace.num_workers)

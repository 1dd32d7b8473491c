"""Defines Hypothesis strategies for runs with random and adversarial delays."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from orlomo_jax import (
    heterogeneous,
    homogeneous,
    one_slow_worker,
    per_worker_times,
    sample_trace,
)
from proofs_check.optional import need

NUM_WORKERS = (1, 2, 3, 5, 16, 64)
MAX_STEPS = 500
PROBLEMS = ("scalar", "vector", "nested", "mixed")
ORDERS = (
    "homogeneous", "heterogeneous", "one slow", "given", "silent", "bursts", "round robin",
    "reversed", "any",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """The settings of one run; JSON can store them.

    Attributes:
        problem: One of :data:`PROBLEMS`.
        precision: 64 or 32.
        num_workers: K.
        workers: k_t.
        beta: β.
        rates: "constant", "adaptive" or "arbitrary" η_t.
        in_flight: Scale of the random η̂ of in-flight reports; 0 makes them zero.
        gamma: γ.
        seed: Seed of batches, w_0, η and η̂.
    """

    problem: str
    precision: int
    num_workers: int
    workers: tuple[int, ...]
    beta: float
    rates: str
    in_flight: float
    gamma: float
    seed: int

    def as_json(self) -> dict[str, Any]:
        """Return the case as a trace and its settings."""
        values = asdict(self)
        workers, num_workers = values.pop("workers"), values.pop("num_workers")
        trace = {"num_workers": num_workers, "workers": list(workers)}
        return {"trace": {"format": "orlomo_jax.ArrivalTrace"} | trace} | values

    @staticmethod
    def from_json(values: dict[str, Any]) -> Case:
        """Return the case that :meth:`as_json` wrote."""
        values = dict(values)
        trace = values.pop("trace")
        return Case(workers=tuple(trace["workers"]), num_workers=trace["num_workers"], **values)


def arrival_order(kind: str, num_workers: int, num_steps: int, seed: int) -> np.ndarray:
    """Return an arrival order int[T] of a kind in :data:`ORDERS`, except "any".

    Raises:
        ValueError: If the kind is unknown.

    Example:
        >>> arrival_order("reversed", 3, 6, 0).tolist()
        [0, 1, 2, 2, 1, 0]
    """
    draws = np.random.default_rng([seed, num_workers, num_steps])
    steps = np.arange(num_steps)
    models = {
        "homogeneous": homogeneous(),
        "heterogeneous": heterogeneous(),
        "one slow": one_slow_worker(20.0),
        "given": per_worker_times(tuple(draws.uniform(0.5, 5.0, num_workers).tolist())),
    }
    if kind in models:
        return sample_trace(models[kind], num_workers, num_steps, 1, seed).workers
    if kind == "silent":  # worker 0 reports never or only at the last step
        order = draws.integers(min(1, num_workers - 1), num_workers, num_steps)
        order[-1] *= seed % 2
        return order
    if kind == "bursts":
        return np.repeat(draws.integers(0, num_workers, num_steps), 7)[:num_steps]
    if kind == "round robin":
        return steps % num_workers
    if kind == "reversed":  # each group reverses the order of the previous one
        there = steps % num_workers
        return np.where(steps // num_workers % 2, num_workers - 1 - there, there)
    raise ValueError(f"`kind` must be one of {ORDERS[:-1]}, got kind={kind!r}")


def cases() -> Any:
    """Return a strategy that draws instances of :class:`Case`."""
    st = need("hypothesis.strategies")

    @st.composite
    def draw_case(draw):
        num_workers = draw(st.sampled_from(NUM_WORKERS))
        kind = draw(st.sampled_from(ORDERS))
        seed = draw(st.integers(0, 2**16))
        if kind == "any":
            workers = draw(st.lists(st.integers(0, num_workers - 1), min_size=1, max_size=40))
        else:
            num_steps = draw(st.integers(1, 60) | st.integers(1, MAX_STEPS))
            workers = arrival_order(kind, num_workers, num_steps, seed).tolist()
        return Case(
            problem=draw(st.sampled_from(PROBLEMS)),
            precision=draw(st.sampled_from((64, 64, 32))),
            num_workers=num_workers,
            workers=tuple(workers),
            beta=draw(
                st.sampled_from((0.0, 0.5, 0.9, 0.99)) | st.floats(2.0**-20, 1 - 2.0**-20, width=32)
            ),
            rates=draw(st.sampled_from(("constant", "adaptive", "arbitrary"))),
            in_flight=draw(st.sampled_from((0.0, 1.0, 1000.0))),
            gamma=draw(st.sampled_from((2.0**-10, 0.01, 0.1))),
            seed=seed,
        )

    return draw_case()

"""Time the library against its limits; ``python -m experiments.benchmarks`` runs all of it.

Each row holds a figure, the limit measured in turn with it in the same run, and their ratio; all
are medians. Rows go to the terminal and, with ``--output``, to a JSONL file with device and
versions.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.table import Table

from experiments import records
from experiments.models import mlp
from orlomo_jax import (
    ArrivalTrace,
    LocalUpdate,
    make_method,
    one_slow_worker,
    orlomo,
    simulate,
    simulate_arrivals,
)


@dataclass(frozen=True)
class Benchmarks:
    """Which benchmarks to run."""

    only: tuple[Literal["server_step", "simulator", "arrivals"], ...] = (
        "server_step",
        "simulator",
        "arrivals",
    )
    """Groups to run."""
    repeats: int = 9
    """Measurements of each figure and of its limit, in turn."""
    output: Path | None = None
    """JSONL file that the rows are appended to."""


def medians(repeats: int, *functions: Callable[[], Any]) -> list[float]:
    """Return the median seconds of each function, measured in turn after one call each."""
    for function in functions:
        function()
    times = [[] for _ in functions]
    for _ in range(repeats):
        for function, own in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in times]


def server_step(repeats: int) -> Iterator[dict[str, Any]]:
    """OrLoMo's step, params and state donated, against ``np.add(a, b, out=c)`` in bytes/s."""
    for size, leaves in ((10_000_000, 1), (50_000_000, 1), (10_000_000, 200), (50_000_000, 200)):
        rule = orlomo(16)

        @partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, update, index, rule=rule):
            updates, state = rule.update(update, state, params, dispatched_at=index)
            return optax.apply_updates(params, updates), state

        make = lambda n=leaves, size=size: [jnp.ones(size // n) for _ in range(n)]  # noqa: E731
        update = LocalUpdate(make(), make())
        held = {"params": make(), "state": rule.init(make())}

        def ours(held=held, step=step, update=update):
            held["params"], held["state"] = jax.block_until_ready(
                step(held["params"], held["state"], update, np.int32(0))
            )

        a, b, out = np.ones((3, size), np.float32)
        seconds, limit = medians(repeats, ours, lambda a=a, b=b, out=out: np.add(a, b, out=out))
        yield {
            "benchmark": f"server step, {size // 10**6} M parameters, {leaves} leaves",
            "figure": 24 * size / seconds / 1e9,
            "limit": 12 * size / limit / 1e9,
            "unit": "GB/s",
            "against": "np.add",
            "ratio": 2 * limit / seconds,
        }


def simulator(repeats: int) -> Iterator[dict[str, Any]]:
    """Simulated global iterations against bare calls of the same jitted round."""
    jobs = (
        ((64, 32, 10), 8, 32, 4, 2000),
        ((64, 512, 80), 8, 32, 4, 200),
        ((64, 256, 200, 10), 32, 32, 16, 64),
    )
    for widths, num_local_steps, batch_size, num_workers, num_steps in jobs:
        params = mlp.init(jax.random.key(0), widths)
        method = make_method("orlomo", num_workers)
        round_fn = method.local_round(mlp.loss_fn, num_local_steps)
        shape = (num_local_steps, batch_size)
        images = jax.random.normal(jax.random.key(1), (*shape, widths[0]))
        batches = (images, jnp.zeros(shape, jnp.int32))
        batch_fn = lambda key, worker, round, batches=batches: batches  # noqa: E731
        trace = simulate_arrivals(one_slow_worker(5), num_workers, num_steps, num_local_steps, 0)
        key = jax.random.key(0)

        def simulated(
            method=method, round_fn=round_fn, batch_fn=batch_fn, params=params, trace=trace, key=key
        ):
            result = simulate(
                method, round_fn, batch_fn, params, trace, key=key, local_learning_rate=0.01
            )
            jax.block_until_ready(result.params)

        def rounds(round_fn=round_fn, params=params, batches=batches, key=key, count=num_steps):
            results = [round_fn(params, None, batches, 0.01, key) for _ in range(count)]
            return jax.block_until_ready(results)[-1]

        @partial(jax.jit, donate_argnames="state")
        def step(params, state, update, index, rule=method.rule):
            updates, state = rule.update(update, state, params, dispatched_at=index)
            return optax.apply_updates(params, updates), state

        def rounds_and_steps(
            step=step, rounds=rounds, rule=method.rule, params=params, count=num_steps
        ):
            update, state = rounds().update, rule.init(params)
            for t in range(count):
                params, state = step(params, state, update, np.int32(max(0, t - 3)))
            jax.block_until_ready(params)

        seconds, bare, contained = medians(repeats, simulated, rounds, rounds_and_steps)
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        name = f"simulator, MLP of {size}, S={num_local_steps}, batch {batch_size}, K={num_workers}"
        for against, limit in (("bare rounds", bare), ("bare rounds and server steps", contained)):
            yield {
                "benchmark": name,
                "figure": num_steps / seconds,
                "limit": num_steps / limit,
                "unit": "iterations/s",
                "against": against,
                "ratio": limit / seconds,
            }


def arrivals(repeats: int) -> Iterator[dict[str, Any]]:
    """A million arrivals of 1024 workers, against sorting as many random times."""
    count, workers = 1_000_000, 1024
    times = np.random.default_rng(0).random(count)

    def ours() -> ArrivalTrace:
        return simulate_arrivals(one_slow_worker(5), workers, count, 8, 0)

    seconds, limit = medians(min(repeats, 3), ours, lambda: np.argsort(times, kind="stable"))
    yield {
        "benchmark": f"arrivals, T={count}, K={workers}",
        "figure": count / seconds / 1e6,
        "limit": count / limit / 1e6,
        "unit": "M/s",
        "against": "np.argsort",
        "ratio": limit / seconds,
    }


GROUPS = {"server_step": server_step, "simulator": simulator, "arrivals": arrivals}


def main(args: Sequence[str] | None = None) -> None:
    """Run the benchmarks."""
    settings = tyro.cli(Benchmarks, args=args, description=__doc__)
    table = Table("benchmark", "figure", "limit", "", "ratio")
    console = Console()
    for group in settings.only:
        for row in GROUPS[group](settings.repeats):
            figures = (f"{row['figure']:.4g}", f"{row['limit']:.4g} ({row['against']})")
            table.add_row(row["benchmark"], *figures, row["unit"], f"{row['ratio']:.2f}")
            console.print(f"{row['benchmark']}: ratio {row['ratio']:.2f}", highlight=False)
            if settings.output is not None:
                records.append(settings.output, {**row, "environment": records.environment()})
    console.print(table)


if __name__ == "__main__":
    main()

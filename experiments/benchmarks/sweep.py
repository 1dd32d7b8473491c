"""Benchmarks of sweeps: many runs as one call, against the same runs one after another."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product

import jax

from experiments.benchmarks.measure import Row, fresh_process, in_turn, rate, seconds
from experiments.benchmarks.simulator import Job, perceptron
from orlomo_jax import RunStart, one_slow_worker, sample_trace, simulate, simulate_many

RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
SEEDS = range(3)
COMMANDS = (
    ("experiments.quickstart", 20.0),
    ("experiments.reproduce --table 2 --scale digits", 90.0),
)
"""Commands and the seconds that each may take on two cores."""


def sweep(repeats: int) -> Iterator[Row]:
    """Measure 15 runs, 3 seeds × 5 γ, at several batch sizes and lengths of the local rounds."""
    for batch_size, num_local_steps in product((8, 32), (8, 32)):
        job = perceptron((64, 32, 10), num_local_steps, 4, 250, batch_size=batch_size)
        starts = [start(job, seed, gamma) for seed in SEEDS for gamma in RATES]
        (timing,) = in_turn(repeats, partial(together, job, starts), partial(apart, job, starts))
        name = f"sweep of {len(starts)} runs, {job.name}"
        steps = len(starts) * job.trace.num_steps
        bar = 4.0 if (batch_size, num_local_steps) == (8, 8) else None
        yield rate(name, steps, timing, "iterations/s", "one after another", bar)


def start(job: Job, seed: int, gamma: float) -> RunStart:
    """Return the start of one run of a sweep."""
    num_steps, K, S = job.trace.num_steps, job.method.num_workers, job.method.num_local_steps
    trace = sample_trace(one_slow_worker(5), K, num_steps, S, seed)
    return RunStart(job.params, trace, jax.random.key(seed), gamma)


def together(job: Job, starts: Sequence[RunStart]) -> None:
    """Carry out the runs as a sweep."""
    results = simulate_many(job.method, None, job.batch_fn, starts, round_fn=job.round_fn)
    assert results is not None
    jax.block_until_ready([result.params for result in results])


def apart(job: Job, starts: Sequence[RunStart]) -> None:
    """Carry out the runs one after another, compiled."""
    for one in starts:
        result = simulate(
            *(job.method, None, job.batch_fn, one.params),
            trace=one.trace,
            key=one.key,
            local_learning_rate=one.local_learning_rate,
            round_fn=job.round_fn,
            engine="compiled",
        )
        jax.block_until_ready(result.params)


def commands(repeats: int) -> Iterator[Row]:
    """Time whole commands that consist of sweeps, at most three times each."""
    for command, limit in COMMANDS:
        module, *flags = command.split()
        times = []
        for _ in range(min(repeats, 3)):
            with tempfile.TemporaryDirectory() as folder:
                args = [module, *flags, "--output", f"{folder}/new"]
                code = f"import runpy, sys; sys.argv = {args}; "
                code += f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
                # A folder of its own for compiled programs: the time is that of the first run.
                run = partial(fresh_process, code, XDG_CACHE_HOME=folder)
                times.append(seconds(run))
        figure = statistics.median(times)
        yield Row(f"python -m {command}", figure, limit, "s", f"{limit:g} s", limit / figure, 1.0)

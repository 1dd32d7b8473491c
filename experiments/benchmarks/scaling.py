"""Measures time and memory as the number of workers, steps, parameters or arrivals grows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.measure import Row, fresh_process, in_turn, rate
from experiments.benchmarks.simulator import perceptron
from orlomo_jax import ArrivalTrace, make_method, one_slow_worker, sample_trace, simulate

DTYPES = ("float32", "bfloat16")


def workers(repeats: int) -> Iterator[Row]:
    """Compare the time per global iteration at larger K with K = 8; every worker reports."""
    repeats, few = min(repeats, 3), perceptron((64, 512, 80), 8, 8, 1536)
    for num_workers in (1, 64, 1024):
        many = perceptron((64, 512, 80), 8, num_workers, 1536)
        (timing,) = in_turn(repeats, many.simulated, few.simulated)
        bar = 1 / 1.2 if num_workers == 1024 else None
        yield rate(many.name, 1536, timing, "iterations/s", "K = 8", bar)


def local_steps(repeats: int) -> Iterator[Row]:
    """Compare the local steps per second with bare rounds as S grows."""
    for num_local_steps in (1, 8, 32, 128):
        count = max(8, 1024 // num_local_steps)
        job = perceptron((64, 32, 10), num_local_steps, 4, count)
        (timing,) = in_turn(repeats, job.simulated, job.rounds)
        steps = count * num_local_steps
        yield rate(f"local steps, {job.name}", steps, timing, "local steps/s", "bare rounds")


def parameters(repeats: int) -> Iterator[Row]:
    """Compare the time per global iteration with bare, very cheap rounds as d grows."""
    for exponent in range(3, 9):
        size, count = 10**exponent, 64 if exponent < 7 else 8
        job = perceptron((1, size // 3, 1), 1, 4, count, batch_size=1)
        turns = repeats if exponent < 7 else min(repeats, 3)
        (timing,) = in_turn(turns, job.simulated, job.rounds)
        yield rate(f"d = 10^{exponent}, {job.name}", count, timing, "iterations/s", "bare rounds")


def arrivals(repeats: int) -> Iterator[Row]:
    """Time a million arrivals of 1024 workers, and simulated runs of up to a million steps."""
    count, num_workers = 1_000_000, 1024
    times = np.random.default_rng(0).random(count)

    def ours() -> ArrivalTrace:
        return sample_trace(one_slow_worker(5), num_workers, count, 8, 0)

    (timing,) = in_turn(min(repeats, 3), ours, lambda: np.argsort(times, kind="stable"))
    name = f"arrivals, T={count}, K={num_workers}"
    yield Row(name, timing.seconds, 1.0, "s", "one second", 1 / timing.seconds, 1.0)
    few = perceptron((4, 2), 1, 4, 10_000, batch_size=1)
    for num_steps in (100_000, 1_000_000):
        many = perceptron((4, 2), 1, 4, num_steps, batch_size=1)
        (timing,) = in_turn(1, many.simulated, few.simulated)
        figure, limit = num_steps / timing.seconds, 10_000 / timing.limit
        yield Row(f"T={num_steps}", figure, limit, "iterations/s", "T = 10000", figure / limit)


def memory(repeats: int) -> Iterator[Row]:
    """Compare the peak memory of a run's arrays, in a fresh process, with the design's bound.

    The bound is one copy of w for each version that workers hold, three for w, u and the step, and
    two for one report. Freed arrays that the C library keeps count too, which is a large share in
    the eager engine; GLIBC_TUNABLES=glibc.malloc.mmap_threshold=1000000 avoids it.
    """
    del repeats
    size = 4_000_000
    for num_workers in (1, 8, 64):
        for compiled in (True, False):
            code = f"from experiments.benchmarks import scaling; scaling.peak({size}, "
            peak = json.loads(fresh_process(f"{code}{num_workers}, {compiled})"))
            bound = (num_workers + 3 + 2) * 4 * size / 1e6
            form = "compiled" if compiled else "driven from Python"
            name = f"memory, {form}, d={size}, K={num_workers}"
            yield Row(name, peak, bound, "MB", "(K + 5) · 4d bytes", bound / peak)
    code = f"from experiments.benchmarks import scaling; scaling.peak({size}, 8, True, "
    wide, narrow = (json.loads(fresh_process(f"{code}{name!r})")) for name in DTYPES)
    name = f"memory, compiled, float32 masters of bfloat16, d={size}, K=8"
    yield Row(name, narrow, wide, "MB", "float32 parameters", wide / narrow)


def peak(size: int, num_workers: int, compiled: bool, dtype: str = "float32") -> None:
    """Print the growth of this process's peak memory over a run, in MB."""
    method = make_method("orlomo", num_workers, 1)

    def run(size: int) -> None:
        result = simulate(
            method,
            _quadratic,
            _no_data,
            jnp.ones(size, dtype),
            num_steps=4 * num_workers + 4,
            compute_times=one_slow_worker(2),
            key=jax.random.key(0),
            local_learning_rate=0.01,
            engine="compiled" if compiled else "eager",
        )
        jax.block_until_ready(result.params)

    run(10)  # so that the peak excludes compilation
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _memory("VmRSS")
    run(size)
    print(json.dumps(_memory("VmHWM") - before))


def _quadratic(params, model_state, batch, key):
    return 0.5 * params @ params, (model_state, {})


def _no_data(key, worker, round):
    return jnp.zeros(1)


def _memory(field: str) -> float:
    """Return a field of /proc/self/status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(kilobytes) / 1e3

"""Measures which way of sharing a device is the fastest."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax

from experiments import records
from experiments.config import Run
from experiments.paper.tasks import Way
from experiments.parts import assemble, run_start
from orlomo_jax import simulate_many

SEGMENT = 32
"""Global iterations of a timed segment."""


def candidates(count: int) -> list[Way]:
    """Return the ways that :func:`choose` compares."""
    return [
        Way("alone", 1, "xla"),
        Way("alone", 1, "matmul"),
        Way("vmap", count, "matmul"),  # vmap makes XLA's convolutions grouped, which is slow
        Way("processes", count, "xla"),
    ]


def choose(
    path: Path,
    run: Run,
    ways: Sequence[Way],
    data_dir: Path | None = None,
    *,
    seconds: float = 3.0,
    segment: int = SEGMENT,
    log: Callable[[str], None] = print,
) -> Way:
    """Return the way with the most local steps per second; measure once per device.

    The file keeps the choice and all rates. Results of the ways differ by rounding, so later calls
    must use the same way.

    Args:
        path: The file that keeps the choice.
        run: The run to measure with; its program is compiled once for measurement and use.
        ways: The ways to compare. All but the processes compile in parallel, then run in turn.
        data_dir: The TFDS data_dir.
        seconds: How long each way is timed.
        segment: Global iterations between readings of the clock.
        log: Called with a line of text for each rate.
    """
    device = jax.devices()[0].device_kind
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if kept.get("device") == device:
        return Way(**kept["way"])
    rates = measure(run, ways, data_dir, seconds=seconds, segment=segment)
    for way, rate in zip(ways, rates, strict=True):
        shown = f"{rate:.0f} local steps/s" if isinstance(rate, float) else rate
        log(f"{way.how} {way.count} {way.convolution}: {shown}")
    speeds = [rate if isinstance(rate, float) else 0.0 for rate in rates]
    best = ways[speeds.index(max(speeds))]
    measured = [asdict(way) | {"rate": rate} for way, rate in zip(ways, rates, strict=True)]
    choice = {"device": device, "way": asdict(best), "measured": measured}
    records.write(path, json.dumps(choice, indent=1))
    return best


def measure(
    run: Run,
    ways: Sequence[Way],
    data_dir: Path | None = None,
    *,
    seconds: float = 3.0,
    segment: int = SEGMENT,
) -> list[float | str]:
    """Return each way's local steps per second, summed over its runs, or its error message."""
    short: dict[str, Any] = {"data_dir": data_dir, "segment": segment}

    def compile_one(way: Way) -> str | None:
        try:
            _rate(run, way, seconds=0.0, **short)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    inside = [way for way in ways if way.how != "processes"]
    with ThreadPoolExecutor(len(inside) or 1) as pool:  # XLA compiles in parallel
        errors = dict(zip(inside, pool.map(compile_one, inside), strict=True))
    rates: list[float | str] = []
    for way in ways:
        if way.how == "processes":
            rates.append(_rate_of_processes(run, way, seconds=seconds, **short))
        else:
            rates.append(errors[way] or _rate(run, way, seconds=seconds, **short))
    return rates


def _rate(run: Run, way: Way, *, data_dir: Path | None, segment: int, seconds: float) -> float:
    """Return the local steps per second of runs in this process, after the first segment."""
    parts = assemble(run, data_dir, way.convolution)
    num_steps = run.num_steps(len(parts.train.labels))
    count = way.count if way.how == "vmap" else 1
    runs = [replace(run, seed=run.seed + index) for index in range(count)]
    times: list[float] = []

    def stop() -> bool:
        times.append(time.perf_counter())
        return times[-1] - times[0] >= seconds and len(times) > (seconds > 0)

    simulate_many(
        parts.method,
        None,
        parts.batch_fn,
        [run_start(run, parts, num_steps) for run in runs],
        evaluate_every=segment,
        stop=stop,
        over_runs="auto" if len(runs) == 1 else "vmap",
        round_fn=parts.round_fn,
    )
    if len(times) < 2:
        return 0.0
    steps = count * segment * run.local_iterations * (len(times) - 1)
    return steps / (times[-1] - times[0])


def _rate_of_processes(run: Run, way: Way, **options: Any) -> float | str:
    """Return the local steps per second of all processes; their clocks start together."""
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(way.count)
    runs = [replace(run, seed=run.seed + index) for index in range(way.count)]
    try:
        with ProcessPoolExecutor(way.count, context, _share, (ready,)) as pool:
            futures = [pool.submit(_rate_when_ready, one, way, options) for one in runs]
            return sum(future.result() for future in futures)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _share(barrier: Any) -> None:
    global _ready
    _ready = barrier


_ready: Any = None


def _rate_when_ready(run: Run, way: Way, options: dict[str, Any]) -> float:
    compile_only: dict[str, Any] = options | {"seconds": 0.0}
    _rate(run, way, **compile_only)
    _ready.wait(timeout=300)
    return _rate(run, way, **options)

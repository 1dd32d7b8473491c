"""Measures figures in turn with their limits, and takes medians."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One figure and its limit.

    Attributes:
        benchmark: The name of the measurement.
        figure: Our value, in ``unit``.
        limit: The value to compare with, in ``unit``, measured in the same run.
        unit: The unit of figure and limit.
        against: A description of the limit.
        ratio: Share of the limit that was reached: the median over pairs measured one after the
            other. More is better.
        bar: The ratio asked for, or None.
    """

    benchmark: str
    figure: float
    limit: float
    unit: str
    against: str
    ratio: float
    bar: float | None = None


class Timing(NamedTuple):
    """Median seconds of our function and of a limit, and the median of limit / ours over pairs."""

    seconds: float
    limit: float
    ratio: float


def in_turn(repeats: int, ours: Callable[[], Any], *limits: Callable[[], Any]) -> list[Timing]:
    """Time our function and every limit in turn, ``repeats`` times, after one warm-up call each.

    Functions must wait for their results. A disturbance of the machine that lasts longer than one
    round of measurements affects both sides of a ratio.

    Example:
        >>> timing, = in_turn(3, lambda: time.sleep(0.02), lambda: time.sleep(0.01))
        >>> timing.ratio < 0.9
        True
    """
    functions = (ours, *limits)
    for function in functions:
        function()
    rounds = [[seconds(function) for function in functions] for _ in range(repeats)]
    own = statistics.median(times[0] for times in rounds)
    return [
        Timing(
            own,
            statistics.median(times[index] for times in rounds),
            statistics.median(times[index] / times[0] for times in rounds),
        )
        for index in range(1, len(functions))
    ]


def rate(name: str, count: float, timing: Timing, unit: str, against: str, bar=None) -> Row:
    """Return a row with ``count`` per second of both times, in ``unit``."""
    return Row(name, count / timing.seconds, count / timing.limit, unit, against, timing.ratio, bar)


def of_pairs(
    name: str, figures: list[float], limits: list[float], unit: str, against: str, bar=None
) -> Row:
    """Return a row of medians; the ratio is the median over pairs measured together."""
    ratio = statistics.median(f / x for f, x in zip(figures, limits, strict=True))
    return Row(
        name, statistics.median(figures), statistics.median(limits), unit, against, ratio, bar
    )


def fresh_process(code: str, **changes: str) -> str:
    """Run ``code`` in a fresh Python process and return its output.

    The process may write bytecode, as for an installed package. It does not inherit a folder of
    compiled programs. ``changes`` are variables of its environment.
    """
    run = [sys.executable, "-c", code]
    dropped = ("PYTHONDONTWRITEBYTECODE", "JAX_COMPILATION_CACHE_DIR")
    env = {name: value for name, value in os.environ.items() if name not in dropped} | changes
    return subprocess.run(run, capture_output=True, text=True, check=True, env=env).stdout


def seconds(function: Callable[[], Any]) -> float:
    """Return the seconds that a call takes; it must wait for its results."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start

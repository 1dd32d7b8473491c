"""How figures are measured: beside their limits, in turn, as medians."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One figure beside its limit.

    Attributes:
        benchmark: What was measured.
        figure: Ours, in ``unit``.
        limit: What it is held against, in ``unit``, measured in the same run.
        unit: Of both.
        against: What the limit is.
        ratio: How much of the limit was reached, the median over pairs measured one after the
            other; more is better.
        bar: The ratio asked for, or None where none is.
    """

    benchmark: str
    figure: float
    limit: float
    unit: str
    against: str
    ratio: float
    bar: float | None = None


class Timing(NamedTuple):
    """Median seconds of ours and of a limit, and the median over pairs of limit / ours."""

    seconds: float
    limit: float
    ratio: float


def in_turn(repeats: int, ours: Callable[[], Any], *limits: Callable[[], Any]) -> list[Timing]:
    """Time ours and every limit one after the other, ``repeats`` times, after one call each.

    Functions must wait for their results. What disturbs the machine for longer than one round of
    measurements disturbs both sides of a ratio.

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
    """Return the row of ``count`` things in both times, in ``unit``."""
    return Row(name, count / timing.seconds, count / timing.limit, unit, against, timing.ratio, bar)


def of_pairs(
    name: str, figures: list[float], limits: list[float], unit: str, against: str, bar=None
) -> Row:
    """Return a row of medians; the ratio is that of the pairs, which saw the same machine."""
    ratio = statistics.median(f / x for f, x in zip(figures, limits, strict=True))
    return Row(
        name, statistics.median(figures), statistics.median(limits), unit, against, ratio, bar
    )


def fresh_process(code: str) -> str:
    """Return what a fresh Python process prints that runs ``code``.

    It may keep bytecode, as an installed package does.
    """
    run = [sys.executable, "-c", code]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run(run, capture_output=True, text=True, check=True, env=env).stdout


def seconds(function: Callable[[], Any]) -> float:
    """Return how long a call takes; it must wait for its results."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start

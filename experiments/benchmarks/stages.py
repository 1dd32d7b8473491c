"""Benchmarks in stages that must fit into a budget of seconds."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from experiments.benchmarks.measure import Row


class Stage(NamedTuple):
    """A part of the benchmarks that is run whole or left out.

    Attributes:
        group: The group of its rows.
        name: What it measures, or prepares.
        seconds: How long it may take, compiling included.
        rows: What measures it.
        after: The name of the stage that prepares it: where that is left out, so is this one.
    """

    group: str
    name: str
    seconds: float
    rows: Callable[[], Iterable[Row]]
    after: str = ""


class Missed(NamedTuple):
    """Stages without rows: one line for each, with the reason."""

    left_out: list[str]
    failed: list[str]


def run(stages: Iterable[Stage], budget: float, missed: Missed) -> Iterator[tuple[str, Row]]:
    """Yield group and row of each stage that fits into what is left of the budget, as measured.

    One that fails leaves the others alone: each row costs time on a machine that may be rare.

    Args:
        stages: In order.
        budget: Seconds for all of them.
        missed: Where the stages that were left out or failed are named.
    """
    start, out = time.perf_counter(), set[str]()
    for stage in stages:
        left = budget - (time.perf_counter() - start)
        if stage.after in out or stage.seconds > left:
            out.add(stage.name)
            missed.left_out.append(f"{stage.name}: {left:.0f} s were left")
            continue
        try:
            for row in stage.rows():
                yield stage.group, row
        except Exception as error:
            traceback.print_exc()
            out.add(stage.name)
            missed.failed.append(f"{stage.name}: {type(error).__name__}: {error}".splitlines()[0])

"""Runs benchmarks in stages within a budget of seconds."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from experiments.benchmarks.measure import Row


class Stage(NamedTuple):
    """A part of the benchmarks that is run completely or left out.

    Attributes:
        group: The group of its rows.
        name: The measurement or preparation that it does.
        seconds: The time that it may take, including compilation.
        rows: The function that measures and returns the rows.
        after: The name of the stage that prepares it; if that is left out, so is this one.
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
    """Run each stage that fits into the rest of the budget; yield (group, row) pairs.

    A stage that fails does not stop the others: time on a GPU may be rare.

    Args:
        stages: The stages in order.
        budget: Seconds for all stages.
        missed: Receives the names of stages that were left out or failed.
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

"""Joins our runs of a cell to the paper's number of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from experiments.config import Run
from experiments.paper import scales, tables
from experiments.paper.search import Rows, Search, cell_of, search

DIGITS = {"test_accuracy": 2, "train_loss": 4}
"""Decimal places of a metric."""


class Entry(NamedTuple):
    """Our runs of one cell at the chosen learning rate, and the paper's number."""

    number: tables.Number
    run: Run
    search: Search
    rows: list[dict[str, Any]]

    def mean(self) -> float | None:
        """Return our mean over the seeds; None if no rate is chosen yet or no run finished."""
        values = [row[self.number.metric] for row in self.rows]
        return float(np.mean(values)) if values else None

    def std(self) -> float:
        """Return our sample standard deviation; 0 for a single seed."""
        values = [row[self.number.metric] for row in self.rows]
        return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0

    def spread(self) -> str:
        """Return " ± std", or "" for a single seed."""
        places = DIGITS[self.number.metric]
        return f" ± {self.std():.{places}f}" if len(self.rows) > 1 else ""

    def virtual_time(self) -> float:
        """Return the virtual time of the run, the mean over the seeds."""
        return float(np.mean([row["curve"]["virtual_time"][-1] for row in self.rows]))


def entries(table: int, rows: Rows, scale: scales.Scale, *, empty: bool = False) -> Iterator[Entry]:
    """Yield each recorded cell of a table once, in the paper's order.

    Args:
        table: Of the paper, 1 to 6.
        rows: The recorded runs.
        scale: The scale of these runs.
        empty: Whether to yield the cells without a recorded run too.
    """
    by_cell: dict[Run, Rows] = {}
    for done, row in rows.items():
        by_cell.setdefault(cell_of(done), {})[done] = row
    seen = set()
    for number in tables.paper_numbers():
        if number.table != table:
            continue
        for form in tables.paper_runs(number):
            run = cell_of(scale.shrink(form))
            if (run, number.metric) in seen or not (empty or run in by_cell):
                continue
            seen.add((run, number.metric))
            of_cell = by_cell.get(run, {})
            found = search(of_cell, run, scale)
            finished = [
                row
                for done, row in of_cell.items()
                if done.learning_rate == found.chosen and row["status"] == "finished"
            ]
            yield Entry(number, run, found, finished)


Group = dict[str, Entry]
"""The entries of one cell by method."""


def groups(found: Iterator[Entry] | list[Entry]) -> dict[tuple, dict[tuple, Group]]:
    """Group entries: (model, metric, dataset) → (scenario, K, S) → method → entry."""
    blocks: dict[tuple, dict[tuple, Group]] = {}
    for entry in found:
        run = entry.run
        block = blocks.setdefault((run.model, entry.number.metric, run.dataset), {})
        place = (run.scenario, run.workers, run.local_iterations)
        block.setdefault(place, {})[run.method] = entry
    return blocks


def time_ratio(group: Group) -> str:
    """Return PRSGDm's virtual time over OrLoMo's, for the same number of epochs; "–" if unknown."""
    both = [group[method] for method in ("prsgdm", "orlomo") if method in group]
    if len(both) < 2 or not all(entry.rows for entry in both):
        return "–"
    return f"{both[0].virtual_time() / both[1].virtual_time():.2f}×"

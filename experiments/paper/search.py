"""Searches for each cell's learning rate, and lists the runs that a table still lacks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from experiments import records
from experiments.checks import check
from experiments.config import Run
from experiments.paper import scales

Rows = dict[Run, dict[str, Any]]


def recorded(path: Path) -> Rows:
    """Return the rows of a file by run, the last row of equal runs.

    A replay of arrivals does not belong to a cell and is left out.

    Raises:
        ValueError: If a row does not describe a run; the message names file and line.
    """
    rows = {}
    for number, row in enumerate(records.read(path), 1):
        try:
            run = Run(**row["run"])
            _check(row)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number} is not the row of a run: {error}") from None
        if not row.get("replayed"):
            rows[run] = row
    return rows


def _check(row: dict[str, Any]) -> None:
    """Raise KeyError, TypeError or ValueError if a row lacks data for tables and figures."""
    environment = row["environment"]
    for name in ("device", "cpus", "jax"):
        environment[name]
    if row["status"] not in ("finished", "diverged", "failed"):
        raise ValueError(f"its status is {row['status']!r}")
    if row["status"] == "finished":
        for metric in ("train_loss", "test_accuracy"):
            check(metric, row[metric], math.isfinite, "finite")
            if not row["curve"][metric]:
                raise ValueError(f"its curve has no {metric}")


class Search(NamedTuple):
    """The state of a cell's search for its learning rate.

    Attributes:
        best: The recorded rate of the grid with the lowest training loss for seed 0; the grid's
            middle if none is recorded.
        statuses: The status of each recorded rate.
        untried: Rates to try next, out of ``best`` and its neighbours; empty at the search's end.
    """

    best: float
    statuses: dict[float, str]
    untried: tuple[float, ...]

    @property
    def chosen(self) -> float | None:
        """The cell's rate; None if it is not found yet or no run finished."""
        return None if self.untried or "finished" not in self.statuses.values() else self.best


def search(rows: Rows, run: Run, scale: scales.Scale) -> Search:
    """Return the state of a cell's search.

    A rate that failed or diverged is worse than any other; among equals the lowest rate wins.
    """
    grid = sorted(scale.learning_rates)
    tried = {rate: rows.get(at(run, rate)) for rate in grid}
    statuses = {rate: row["status"] for rate, row in tried.items() if row is not None}
    losses = {
        rate: row["train_loss"] if row["status"] == "finished" else math.inf
        for rate, row in tried.items()
        if row is not None
    }
    best = min(losses, key=losses.__getitem__, default=grid[len(grid) // 2])
    middle = grid.index(best)
    neighbours = grid[max(0, middle - 1) : middle + 2]
    return Search(best, statuses, tuple(rate for rate in neighbours if rate not in losses))


def waves(
    families: Sequence[Sequence[Run]],
    rows: Rows,
    scale: scales.Scale,
    seeds: int,
    *,
    breadth_first: bool = False,
) -> Iterator[list[Run]]:
    """Yield lists of runs to do, in order; the runs of a list can go together.

    Args:
        families: Groups of cells, in order of priority; the runs of a group can go together.
        rows: The runs that are done. Before it asks for the next list, the caller must add all runs
            of the current one.
        scale: Gives the grid of learning rates.
        seeds: Number of seeds at a cell's chosen learning rate.
        breadth_first: Whether every cell gets one run, at the middle rate of the grid, before any
            cell gets a second.
    """
    grid = sorted(scale.learning_rates)
    if breadth_first:
        for family in families:
            first = [at(run, grid[len(grid) // 2]) for run in family]
            if new := [run for run in first if run not in rows]:
                yield new
    for family in families:
        while untried := [
            at(run, rate) for run in family for rate in search(rows, run, scale).untried
        ]:
            yield untried
        repeats = [
            at(run, rate, seed)
            for run in family
            if (rate := search(rows, run, scale).chosen) is not None
            for seed in range(1, seeds)
        ]
        if new := [run for run in repeats if run not in rows]:
            yield new


def at_most(families: Sequence[Sequence[Run]], rows: Rows, scale: scales.Scale, seeds: int) -> int:
    """Return an upper bound of the number of runs to do."""
    count = 0
    for run in (run for family in families for run in family):
        found = search(rows, run, scale)
        count += len(scale.learning_rates) - len(found.statuses) if found.untried else 0
        count += sum(at(run, found.best, seed) not in rows for seed in range(1, seeds))
    return count


def missing(wanted: Sequence[Run], rows: Rows, scale: scales.Scale, seeds: int) -> Iterator[Run]:
    """Yield the runs to do one by one; the caller must add each to ``rows`` before the next."""
    for wave in waves([[run] for run in wanted], rows, scale, seeds):
        yield from wave


def cell_of(run: Run) -> Run:
    """Return the run with seed 0 and learning rate 0, which a cell does not fix."""
    return replace(run, learning_rate=0.0, seed=0)


def at(run: Run, learning_rate: float, seed: int = 0) -> Run:
    """Return the run of a cell at a learning rate."""
    return replace(run, learning_rate=learning_rate, seed=seed)

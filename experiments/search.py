"""What a table still lacks: rows on record, the search for a learning rate, and what comes next."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from experiments import cells, records
from experiments.checks import check
from experiments.runs import Run

Rows = dict[Run, dict[str, Any]]


def recorded(path: Path) -> Rows:
    """Return the rows of a file by run; of equal runs the last.

    A run that repeated other arrivals than its scenario's is none of a cell's and left out.

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
    """Raise where a row lacks what tables and figures are made of."""
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
    """How far a cell has come in choosing its learning rate."""

    best: float
    """Of the grid's rates that are recorded that of the lowest training loss with seed 0."""
    statuses: dict[float, str]
    """Of each recorded rate."""
    untried: tuple[float, ...]
    """Rates to try next: ``best`` and its neighbours; empty when the search has ended."""

    @property
    def chosen(self) -> float | None:
        """The cell's rate; None where it is not found yet, or nothing finished."""
        return None if self.untried or "finished" not in self.statuses.values() else self.best


def search(rows: Rows, run: Run, scale: cells.Scale) -> Search:
    """Return where a cell's search stands.

    A rate that failed or diverged is worse than any other; of several, the lowest is the best.
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
    beside = grid[max(0, middle - 1) : middle + 2]
    return Search(best, statuses, tuple(rate for rate in beside if rate not in losses))


def waves(
    families: Sequence[Sequence[Run]],
    rows: Rows,
    scale: cells.Scale,
    seeds: int,
    *,
    breadth_first: bool = False,
) -> Iterator[list[Run]]:
    """Yield the runs to do, in order, those that can go together in one list.

    Args:
        families: Cells whose runs can go together, in order of priority.
        rows: What is done; must hold all runs of a list before the next is asked for.
        scale: Holds the grid of learning rates.
        seeds: Runs at a cell's chosen learning rate.
        breadth_first: Whether every cell gets one run, at the middle rate of the grid, before any
            gets a second.
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


def missing(wanted: Sequence[Run], rows: Rows, scale: cells.Scale, seeds: int) -> Iterator[Run]:
    """Yield the runs to do one by one; ``rows`` must hold each before the next is asked for."""
    for wave in waves([[run] for run in wanted], rows, scale, seeds):
        yield from wave


def cell_of(run: Run) -> Run:
    """Return the run with what its cell does not fix set to its default."""
    return replace(run, learning_rate=0.0, seed=0)


def at(run: Run, learning_rate: float, seed: int = 0) -> Run:
    """Return the run of a cell at a learning rate."""
    return replace(run, learning_rate=learning_rate, seed=seed)

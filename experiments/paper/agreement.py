"""Compares OrLoMo's lead over each other method with its lead in the paper."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from experiments.config import Run
from experiments.paper import tables
from experiments.paper.entries import DIGITS, Entry, Group, entries, groups, slower
from experiments.paper.figures import LABELS, TITLES
from experiments.paper.search import Rows, cell_of

OTHERS = ("al_sgd", "local_ormo_da", "prsgdm")
"""The methods that OrLoMo is compared with."""

SCENARIOS = {"homogeneous": "equal", "heterogeneous": "unequal"}

POINTS = 20
"""Evaluations of a run that a figure shows."""

VERDICTS = ("as in the paper", "level in one of the two", "the opposite")


class Lead(NamedTuple):
    """How much better OrLoMo is than another method.

    Attributes:
        mean: Points of accuracy, or the other's training loss minus OrLoMo's.
        spread: The larger of the two standard deviations over the seeds.
    """

    mean: float
    spread: float

    def sign(self) -> int:
        """Return 1 if OrLoMo is better, −1 if the other is, 0 if the lead is within the spread."""
        if abs(self.mean) <= self.spread:
            return 0
        return 1 if self.mean > 0 else -1


def leads(group: Group, other: str) -> tuple[Lead, Lead] | None:
    """Return OrLoMo's lead in our runs and in the paper; None if a method has no result yet."""
    both = [group[method] for method in ("orlomo", other) if method in group]
    if len(both) < 2 or not all(entry.rows for entry in both):
        return None
    better = 1 if both[0].number.metric == "test_accuracy" else -1
    ours, theirs = ([_of(entry) for entry in both], [_paper(entry) for entry in both])
    return tuple(  # pyright: ignore[reportReturnType]
        Lead(better * (own[0] - rival[0]), max(own[1], rival[1])) for own, rival in (ours, theirs)
    )


def _of(entry: Entry) -> tuple[float, float]:
    mean = entry.mean()
    assert mean is not None  # it has rows
    return mean, entry.std()


def _paper(entry: Entry) -> tuple[float, float]:
    return entry.number.mean, entry.number.std or 0.0


def verdict(ours: Lead, paper: Lead) -> str:
    """Return one of :data:`VERDICTS`.

    Example:
        >>> verdict(Lead(1.2, 0.5), Lead(0.9, 0.3)), verdict(Lead(0.2, 0.5), Lead(0.9, 0.3))
        ('as in the paper', 'level in one of the two')
        >>> verdict(Lead(-1.2, 0.5), Lead(0.9, 0.3))
        'the opposite'
    """
    if ours.sign() == paper.sign():
        return VERDICTS[0]
    return VERDICTS[2] if ours.sign() * paper.sign() < 0 else VERDICTS[1]


def agreement(table: int, rows: Rows, scale: tables.Scale) -> list[str]:
    """Return Markdown lines: each cell's leads, here (the paper's), and their summary."""
    lines = []
    for (model, metric, dataset), members in groups(entries(table, rows, scale)).items():
        if not any(leads(group, other) for group in members.values() for other in OTHERS):
            continue
        lines += [
            f"**{LABELS[metric]}, {model} on {dataset}**",
            "",
            f"| workers | K | S | {' | '.join(TITLES[other] for other in OTHERS)} | time |",
            "|---|---:|---:|" + "---:|" * (len(OTHERS) + 1),
        ]
        counts: dict[str, Counter[str]] = {other: Counter() for other in OTHERS}
        for (scenario, workers, steps), group in members.items():
            cells = [_cell(group, other, counts[other]) for other in OTHERS]
            place = (SCENARIOS[scenario], workers, steps)
            lines.append(f"| {' | '.join(map(str, (*place, *cells, slower(group))))} |")
        lines += [
            "",
            f"| OrLoMo against | ahead in cells (the paper) | {' | '.join(VERDICTS)} |",
            "|---|---:|" + "---:|" * len(VERDICTS),
        ]
        for other, count in counts.items():
            numbers = " | ".join(str(count[name]) for name in VERDICTS)
            lines.append(f"| {TITLES[other]} | {_ahead(members, other)} | {numbers} |")
        lines.append("")
    return lines[:-1]


def _ahead(members: dict[tuple, Group], other: str) -> str:
    found = [pair for group in members.values() if (pair := leads(group, other)) is not None]
    ours, paper = (sum(pair[i].mean > 0 for pair in found) for i in (0, 1))
    return f"{ours} of {len(found)} ({paper})"


def _cell(group: Group, other: str, count: Counter[str]) -> str:
    found = leads(group, other)
    if found is None:
        return "–"
    ours, paper = found
    places = 1 if group[other].number.metric == "test_accuracy" else 3
    said = verdict(ours, paper)
    count[said] += 1
    mark = {VERDICTS[1]: "*", VERDICTS[2]: "**"}.get(said, "")
    return f"{mark}{_signed(ours.mean, places)}{mark} ({_signed(paper.mean, min(places, 2))})"


def _signed(value: float, places: int) -> str:
    text = f"{value:+.{places}f}".replace("-", "−")
    return text[1:] if not float(f"{value:.{places}f}") else text


def rates(table: int, rows: Rows, scale: tables.Scale) -> list[str]:
    """Return Markdown lines: seed 0 of every cell at each learning rate of the grid."""
    grid = sorted(scale.learning_rates)
    by_cell: dict[Run, dict[float, str]] = {}
    for entry in entries(table, rows, scale):
        by_cell.setdefault(entry.run, {})
    for done, row in rows.items():
        cell = cell_of(done)
        if done.seed == 0 and cell in by_cell:
            by_cell[cell][done.learning_rate] = _tried(row)
    if not by_cell:
        return []
    lines = [
        f"| data | workers | K | S | method | {' | '.join(f'{rate:g}' for rate in grid)} |",
        "|---|---|---:|---:|---|" + "---:|" * len(grid),
    ]
    for run, tried in by_cell.items():
        place = (run.dataset, SCENARIOS[run.scenario], run.workers, run.local_iterations)
        cells = [tried.get(rate, "–") for rate in grid]
        lines.append(f"| {' | '.join(map(str, (*place, TITLES[run.method], *cells)))} |")
    return lines


def _tried(row: dict[str, Any]) -> str:
    if row["status"] != "finished":
        return row["status"]
    return f"{row['test_accuracy']:.1f} / {row['train_loss']:.3g}"


def at_the_same_time(table: int, rows: Rows, scale: tables.Scale) -> list[str]:
    """Return Markdown lines: OrLoMo at its end, PRSGDm at the same virtual time and at its own end.

    Only for cells whose curves have as many points as the figures: the others are evaluated too
    rarely.
    """
    lines = []
    for (_, metric, dataset), members in groups(entries(table, rows, scale)).items():
        for (scenario, workers, steps), group in members.items():
            both = [group[name].rows for name in ("orlomo", "prsgdm") if name in group]
            if len(both) < 2 or not all(both) or min(map(_points, both[0] + both[1])) < POINTS:
                continue
            end = group["orlomo"].virtual_time()
            values = [
                np.mean([_until(row["curve"], metric, until) for row in found])
                for found, until in ((both[0], np.inf), (both[1], end), (both[1], np.inf))
            ]
            place = (dataset, SCENARIOS[scenario], workers, steps)
            cells = [f"{value:.{DIGITS[metric]}f}" for value in values]
            lines.append(f"| {' | '.join(map(str, (*place, *cells, slower(group))))} |")
    if not lines:
        return []
    return [
        "| data | workers | K | S | OrLoMo | PRSGDm at the same virtual time | at its end | time |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
        *lines,
    ]


def _points(row: dict[str, Any]) -> int:
    return len(row["curve"]["virtual_time"])


def _until(curve: dict[str, Any], metric: str, time: float) -> float:
    """Return a curve's last value that is not later than ``time``."""
    before = np.searchsorted(curve["virtual_time"], time, side="right")
    return curve[metric][before - 1]

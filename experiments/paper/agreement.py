"""Compares OrLoMo's lead over each other method with its lead in the paper."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from experiments.paper import scales, tables
from experiments.paper.entries import DIGITS, Group, entries, groups, time_ratio
from experiments.paper.figures import LABELS, TITLES
from experiments.paper.search import Rows, at

OTHERS = ("al_sgd", "local_ormo_da", "prsgdm")
"""The methods that OrLoMo is compared with."""

LEAD_DIGITS = {"test_accuracy": 1, "train_loss": 4}
"""Decimal places of a lead."""

SCENARIOS = {"homogeneous": "equal", "heterogeneous": "unequal"}


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
        if abs(self.mean) <= self.spread + 1e-9:  # the paper's numbers are decimals
            return 0
        return 1 if self.mean > 0 else -1


def leads(group: Group, other: str, seeds: int) -> tuple[Lead, Lead] | None:
    """Return OrLoMo's lead in our runs and in the paper; None unless both have all their seeds."""
    if not {"orlomo", other} <= group.keys():
        return None
    own, rival = group["orlomo"], group[other]
    if min(len(own.rows), len(rival.rows)) < seeds:
        return None
    better = 1 if own.number.metric == "test_accuracy" else -1
    means = [entry.mean() or 0.0 for entry in (own, rival)]
    stds = [entry.number.std or 0.0 for entry in (own, rival)]
    return (
        Lead(better * (means[0] - means[1]), max(own.std(), rival.std())),
        Lead(better * (own.number.mean - rival.number.mean), max(stds)),
    )


def agreement(table: int, rows: Rows, scale: scales.Scale) -> list[str]:
    """Return Markdown lines: each cell's leads, here (the paper's), and how many have which sign.

    A lead is italic if the methods are level here but not in the paper, or the other way round, and
    bold if it is the opposite of the paper's.
    """
    lines = []
    for (model, metric, dataset), members in groups(entries(table, rows, scale)).items():
        found = {
            place: {other: leads(group, other, scale.seeds) for other in OTHERS}
            for place, group in members.items()
        }
        if not any(pair for of_cell in found.values() for pair in of_cell.values()):
            continue
        paper = next(iter(next(iter(members.values())).values())).number.run
        lines += [
            f"**Lead of OrLoMo: {LABELS[metric]}, {model} on {dataset}** (in brackets: the paper, "
            f"{paper.model} on {paper.dataset})",
            "",
            f"| workers | K | S | {' | '.join(TITLES[other] for other in OTHERS)} | time |",
            "|---|---:|---:|" + "---:|" * (len(OTHERS) + 1),
        ]
        for (scenario, workers, steps), of_cell in found.items():
            cells = [_cell(of_cell[other], LEAD_DIGITS[metric]) for other in OTHERS]
            time = time_ratio(members[scenario, workers, steps])
            row = (SCENARIOS[scenario], workers, steps, *cells, time)
            lines.append(f"| {' | '.join(map(str, row))} |")
        lines += [
            "",
            "| OrLoMo against | ahead | level | behind | in the paper ahead | level | behind |",
            "|---|" + "---:|" * 6,
        ]
        for other in OTHERS:
            pairs = [pair for of_cell in found.values() if (pair := of_cell[other])]
            signs = [[pair[i].sign() for pair in pairs] for i in (0, 1)]
            counts = [of.count(sign) for of in signs for sign in (1, 0, -1)]
            lines.append(f"| {TITLES[other]} | {' | '.join(map(str, counts))} |")
        lines.append("")
    return lines[:-1]


def _cell(pair: tuple[Lead, Lead] | None, places: int) -> str:
    if pair is None:
        return "–"
    ours, paper = pair
    differ = abs(ours.sign() - paper.sign())  # 2 if one is ahead and the other behind
    mark = "*" * differ
    return f"{mark}{_signed(ours.mean, places)}{mark} ({_signed(paper.mean, min(places, 2))})"


def _signed(value: float, places: int) -> str:
    text = f"{value:+.{places}f}".replace("-", "−")
    return text[1:] if not float(f"{value:.{places}f}") else text


def rates(table: int, rows: Rows, scale: scales.Scale) -> list[str]:
    """Return Markdown lines: seed 0 of every cell at each learning rate; the chosen one is bold."""
    grid = sorted(scale.learning_rates)
    found = list(entries(table, rows, scale))
    if not found:
        return []
    lines = [
        f"| data | workers | K | S | method | {' | '.join(f'{rate:g}' for rate in grid)} |",
        "|---|---|---:|---:|---|" + "---:|" * len(grid),
    ]
    for entry in found:
        run = entry.run
        place = (run.dataset, SCENARIOS[run.scenario], run.workers, run.local_iterations)
        cells = [_tried(rows.get(at(run, rate)), rate == entry.search.chosen) for rate in grid]
        lines.append(f"| {' | '.join(map(str, (*place, TITLES[run.method], *cells)))} |")
    return lines


def _tried(row: dict[str, Any] | None, chosen: bool) -> str:
    if row is None:
        return "–"
    if row["status"] != "finished":
        return row["status"]
    text = f"{row['test_accuracy']:.1f} / {row['train_loss']:.3g}"
    return f"**{text}**" if chosen else text


def at_the_same_rate(table: int, rows: Rows, scale: scales.Scale) -> list[str]:
    """Return Markdown lines: OrLoMo's leads over PRSGDm at equal learning rates.

    A lead is the mean over the seeds that both methods have at that rate. Their number follows in
    brackets if there are several.
    """
    grid = sorted(scale.learning_rates)
    lines = []
    for (_, metric, dataset), members in groups(entries(table, rows, scale)).items():
        for (scenario, workers, steps), group in members.items():
            if {"orlomo", "prsgdm"} <= group.keys():
                cells = [_paired(group, rows, metric, rate, scale.seeds) for rate in grid]
                place = (dataset, SCENARIOS[scenario], workers, steps)
                lines.append(f"| {' | '.join(map(str, (*place, *cells)))} |")
    if not lines:
        return []
    return [
        f"| data | workers | K | S | {' | '.join(f'{rate:g}' for rate in grid)} |",
        "|---|---|---:|---:|" + "---:|" * len(grid),
        *lines,
    ]


def _paired(group: Group, rows: Rows, metric: str, rate: float, seeds: int) -> str:
    """Return OrLoMo's mean lead over PRSGDm at a rate over the seeds that both have finished."""
    ours, theirs = (
        {
            seed: row[metric]
            for seed in range(seeds)
            if (row := rows.get(at(group[method].run, rate, seed))) and row["status"] == "finished"
        }
        for method in ("orlomo", "prsgdm")
    )
    if not (common := sorted(ours.keys() & theirs.keys())):
        return "–"
    better = 1 if metric == "test_accuracy" else -1
    lead = better * float(np.mean([ours[seed] - theirs[seed] for seed in common]))
    return _signed(lead, LEAD_DIGITS[metric]) + (f" ({len(common)})" if len(common) > 1 else "")


def at_the_same_time(table: int, rows: Rows, scale: scales.Scale) -> list[str]:
    """Return Markdown lines: OrLoMo at its end, PRSGDm at the same virtual time and at its own end.

    PRSGDm's last evaluation that is not later than OrLoMo's end counts. Cells that are evaluated
    less often than those of the figures are left out.
    """
    lines = []
    for (_, metric, dataset), members in groups(entries(table, rows, scale)).items():
        for (scenario, workers, steps), group in members.items():
            if leads(group, "prsgdm", scale.seeds) is None:
                continue
            both = [group[name].rows for name in ("orlomo", "prsgdm")]
            if min(map(_points, both[0] + both[1])) < tables.FIGURE_POINTS:
                continue
            end = group["orlomo"].virtual_time()
            values = [
                np.mean([_until(row["curve"], metric, until) for row in found])
                for found, until in ((both[0], np.inf), (both[1], end), (both[1], np.inf))
            ]
            place = (dataset, SCENARIOS[scenario], workers, steps)
            cells = [f"{value:.{DIGITS[metric]}f}" for value in values]
            lines.append(f"| {' | '.join(map(str, (*place, *cells, time_ratio(group))))} |")
    if not lines:
        return []
    return [
        "| data | workers | K | S | OrLoMo at its end | PRSGDm at that time | PRSGDm at its end | "
        "time |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
        *lines,
    ]


def planned_for_the_same_time(table: int, rows: Rows, scale: scales.Scale) -> list[str]:
    """Return Markdown lines: OrLoMo, and PRSGDm with as many epochs as fit into OrLoMo's time.

    Args:
        table: 2 for test accuracy, 4 for training loss.
        rows: The recorded runs.
        scale: The scale of these runs, at which PRSGDm has fewer epochs.
    """
    lines = []
    for (_, metric, dataset), members in groups(entries(table, rows, scale)).items():
        for (scenario, workers, steps), group in members.items():
            if (pair := leads(group, "prsgdm", scale.seeds)) is None:
                continue
            ours, theirs = group["orlomo"], group["prsgdm"]
            places = DIGITS[metric]
            cells = [f"{entry.mean():.{places}f}{entry.spread()}" for entry in (ours, theirs)]
            place = (dataset, SCENARIOS[scenario], workers, steps, f"{theirs.run.epochs:.0f}")
            verdict = {1: "ahead", 0: "level", -1: "behind"}[pair[0].sign()]
            lead = _signed(pair[0].mean, LEAD_DIGITS[metric])
            lines.append(
                f"| {' | '.join(map(str, (*place, *cells, lead, verdict, time_ratio(group))))} |"
            )
    if not lines:
        return []
    return [
        "| data | workers | K | S | PRSGDm's epochs | OrLoMo | PRSGDm | lead of OrLoMo | it is | "
        "time |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|---:|",
        *lines,
    ]


def _points(row: dict[str, Any]) -> int:
    return len(row["curve"]["virtual_time"])


def _until(curve: dict[str, Any], metric: str, time: float) -> float:
    """Return a curve's last value that is not later than ``time``."""
    before = np.searchsorted(curve["virtual_time"], time, side="right")
    return curve[metric][before - 1] if before else np.nan

"""Compares OrLoMo's lead over each other method with its lead in the paper."""

from __future__ import annotations

from typing import Any, NamedTuple

from experiments.paper import scales
from experiments.paper.entries import Group, entries, groups, time_ratio
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
    return f"{mark}{signed(ours.mean, places)}{mark} ({signed(paper.mean, min(places, 2))})"


def signed(value: float, places: int) -> str:
    """Return a number with its sign; without one if it is rounded to zero."""
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

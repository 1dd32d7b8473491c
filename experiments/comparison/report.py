"""Makes the table and the answer of a comparison from its rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments import records
from experiments.comparison import figures
from experiments.comparison.clusters import DEFAULTS
from experiments.comparison.runs import Point, Row, Setting, best_point, loss_at

SHOWN = ("method", "S", "γ", "η factor", "loss at t", "accuracy %", "delay mean / max")
"""The columns that fit a terminal."""
HEADINGS = (
    *("method", "S", "γ", "η factor", "loss at t", "loss at end", "accuracy %"),
    *("end (s)", "delay mean / max", "updates", "declined"),
)


class Entry(NamedTuple):
    """A method with one S in one cell: its best point, and its runs there.

    Attributes:
        method: Its name.
        local_steps: S.
        point: The best point of the grid; None if a run diverged at each.
        edges: Which coordinates of the point are at an edge of the grid, of "γ" and "η".
        rows: The final runs, by seed.
        losses: Each run's loss at the given time; None if it diverged or was not evaluated yet.
    """

    method: str
    local_steps: str
    point: Point | None
    edges: str
    rows: list[Row]
    losses: list[float | None]

    @property
    def mean(self) -> float:
        """The mean loss at the given time; infinite if a run has none."""
        return mean(self.losses)

    def cells(self) -> list[str]:
        """Return the texts of a table's row."""
        if self.point is None or not self.rows:
            return [self.method, self.local_steps, "none", "none", *["diverged"] * 2, *[""] * 5]
        rows, at = self.rows, self.point
        delays = f"{_mean(rows, 'mean_delay'):.1f} / {max(row['max_delay'] for row in rows)}"
        ends = [row["curve"]["time"][-1] for row in rows]
        return [
            self.method,
            self.local_steps,
            f"{at.learning_rate:g}" + "*" * ("γ" in self.edges),
            f"{at.eta_factor:g}" + "*" * ("η" in self.edges),
            spread(self.losses),
            spread([row["loss"] for row in rows]),
            "" if rows[0]["accuracy"] is None else spread([r["accuracy"] for r in rows], ".1f"),
            f"{np.mean(ends):.4g}",
            delays,
            f"{_mean(rows, 'updates'):.0f}",
            f"{_mean(rows, 'declined'):.0f}",
        ]


class Cell(NamedTuple):
    """The methods on one cluster with one partition, the lowest loss first.

    Attributes:
        setting: What the methods have in common.
        when: The virtual time of the ranking.
        entries: The methods.
    """

    setting: Setting
    when: float
    entries: list[Entry]

    @property
    def title(self) -> str:
        """The cell's name."""
        return f"{self.setting.cluster} (K = {self.setting.workers}), {self.setting.partition}"

    def answer(self) -> str:
        """Return the sentence that names the best method."""
        best, *others = self.entries
        where = f"On {self.title}, task {self.setting.task}, after {self.when:.4g} virtual seconds"
        if not np.isfinite(best.mean):
            return f"{where}, no method has a finite loss."
        same = [entry for entry in others if entry.losses == best.losses]
        others = [entry for entry in others if entry not in same]
        ties = "".join(f" (the same as {entry.method} here)" for entry in same)
        text = (
            f"{where}, {best.method}{ties} with S = {best.local_steps} has the lowest loss, "
            f"{spread(best.losses)}"
        )
        if not others or not np.isfinite(others[0].mean):
            return text + "."
        second = others[0]
        pairs = list(zip(best.losses, second.losses, strict=False))
        wins = sum(a < b for a, b in pairs if a is not None and b is not None)
        return (
            f"{text}; the next is {second.method} with S = {second.local_steps}, "
            f"{spread(second.losses)}, which is worse for {wins} of {len(pairs)} seeds."
        )


def cells(rows: Sequence[Row], when: float | None) -> list[Cell]:
    """Return the cells of a comparison in the order of its rows."""
    tuning: dict[tuple, list[Row]] = defaultdict(list)
    final: dict[Setting, dict[tuple, list[Row]]] = {}
    for row in rows:
        setting = Setting(**row["setting"])
        candidate = setting.cluster, setting.method, setting.local_steps
        if setting.purpose == "tuning":
            tuning[candidate].append(row)
        else:
            final.setdefault(setting.cell, {}).setdefault(candidate, []).append(row)
    out = []
    for cell, found in final.items():
        ends = [row["curve"]["time"][-1] for group in found.values() for row in group]
        time = min(ends) if when is None else when
        entries = [
            _entry(candidate, tuning[candidate], found.get(candidate, []), time)
            for candidate in tuning
            if candidate[0] == cell.cluster
        ]
        out.append(Cell(cell, time, sorted(entries, key=lambda entry: entry.mean)))
    return out


def _entry(candidate: tuple, tuning: list[Row], rows: list[Row], time: float) -> Entry:
    _, method, local_steps = candidate
    point, edges = best_point(tuning), ""
    if point is not None:
        for name, field in (("γ", "learning_rate"), ("η", "eta_factor")):
            grid = {row["setting"][field] for row in tuning}
            if len(grid) > 1 and getattr(point, field) in (min(grid), max(grid)):
                edges += name
    rows = sorted(rows, key=lambda row: row["setting"]["seed"])
    return Entry(method, local_steps, point, edges, rows, [loss_at(row, time) for row in rows])


def mean(values: Sequence[float | None]) -> float:
    """Return the mean, or infinity if a value is None or there is none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else np.inf


def _mean(rows: Sequence[Row], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def spread(values: Sequence[float | None], form: str = ".4g") -> str:
    """Return "mean ± standard deviation".

    Example:
        >>> spread([1.0, 2.0, 3.0]), spread([1.0, None])
        ('2 ± 1', '1 of 2 diverged')
    """
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return f"{len(values) - len(known)} of {len(values)} diverged"
    text = f"{np.mean(known):{form}}"
    return text if len(known) < 2 else f"{text} ± {np.std(known, ddof=1):{form.replace('4', '2')}}"


def markdown(found: Sequence[Cell]) -> str:
    """Return the report as Markdown."""
    lines = [
        "# Comparison of methods",
        "",
        "Made by `python -m experiments.compare` from rows.jsonl. Losses are mean ± standard "
        "deviation over the seeds; those at t are interpolated between evaluations. "
        "\\* means that the best point is at an edge of the grid. Delays are counted in reports.",
    ]
    for cell in found:
        lines += ["", f"## {cell.title}", "", cell.answer(), ""]
        lines += [f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|"]
        lines += [f"| {' | '.join(e.cells())} |".replace("*", "\\*") for e in cell.entries]
        lines += _slow_worker_lines(cell) if figures.has_shares(cell) else []
    default = [name for name, value in DEFAULTS.items() if value.rate is None]
    lines += ["", f"The η factor of {', '.join(default)} multiplies its updates.", ""]
    return "\n".join(lines)


def _slow_worker_lines(cell: Cell) -> list[str]:
    """Return the table of the slowest worker as Markdown lines."""
    lines = [
        *("", f"### The slowest worker: {cell.title}", ""),
        "The slowest worker's share of the reports, and of the weight that Eq. (6) and (τ + 1)/K² "
        "would give to them; the test accuracy on the classes of the slowest and of the fastest "
        "worker.",
        "",
        "| method | reports % | Eq. (6) % | (τ + 1)/K² % | accuracy, slowest % | fastest % |",
        "|---|---|---|---|---|---|",
    ]
    for entry in cell.entries:
        shares = [figures.mean_of(entry, kind) for kind in ("reports", "eq6", "rescaled")]
        texts = ["" if share is None else f"{100 * share:.2f}" for share in shares]
        for worker in ("slowest", "fastest"):
            of = [row.get(worker, {}).get("accuracy") for row in entry.rows]
            texts.append(spread(of, ".1f") if of else "")
        lines.append(f"| {entry.method}, S = {entry.local_steps} | {' | '.join(texts)} |")
    return lines


def write(rows: Sequence[Row], when: float | None, out: Path, console: Console) -> None:
    """Print the tables and the answers; write report.md and the figures."""
    found = cells(rows, when)
    if not found:
        console.print("Every run for tuning diverged: use smaller learning rates.")
        return
    for cell in found:
        table = Table(title=f"{cell.title}; t = {cell.when:.4g} s")
        for heading in SHOWN:
            table.add_column(heading, justify="left" if heading == "method" else "right")
        for entry in cell.entries:
            texts = dict(zip(HEADINGS, entry.cells(), strict=True))
            table.add_row(*(texts[heading] for heading in SHOWN))
        console.print(table)
    records.write(out / "report.md", markdown(found))
    drawn = figures.draw_all(found, rows, out)
    for cell in found:
        console.print(cell.answer(), soft_wrap=True, highlight=False)
    console.print(f"Report: {out / 'report.md'}; figures: {', '.join(drawn)}", soft_wrap=True)

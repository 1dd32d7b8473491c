"""Make tables and figures from the records: our numbers next to the paper's.

``python -m experiments.report --scale digits`` reads the records of a scale, and writes Markdown
tables and PNG and SVG figures to ``experiments/results/SCALE/``. ``--trace FILE`` draws the
timeline of an arrival trace instead; ``--benchmarks FILE`` makes the table and plot of benchmarks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import tyro

from experiments import records
from experiments.benchmarks import chart
from experiments.paper import figures, scales, tables
from experiments.paper.entries import DIGITS, Entry, Group, entries, groups, time_ratio
from experiments.paper.search import Rows, cell_of, recorded
from experiments.terminal import accept_any_terminal
from orlomo_jax import ArrivalTrace


@dataclass(frozen=True)
class Report:
    """The report to make."""

    scale: Literal["paper", "small", "slim", "fits", "same_time", "barrier", "digits", "smoke"] = (
        "digits"
    )
    """The scale of the runs."""
    records: Path | None = None
    """File of the records; by default experiments/results/SCALE.jsonl."""
    output: Path | None = None
    """Folder to write to; by default experiments/results/SCALE/, or that of the input file."""
    trace: Path | None = None
    """An arrival trace: draw its timeline instead."""
    benchmarks: Path | None = None
    """Rows of the benchmarks: write benchmarks.md, .png and .svg instead."""


def table_lines(table: int, rows: Rows, scale: scales.Scale, *, empty: bool = False) -> list[str]:
    """Return a table as Markdown lines; ``empty`` also shows the cells without a run."""
    found = list(entries(table, rows, scale, empty=empty))
    if not found:
        return []
    lines = [f"## Table {table}", ""]
    if table == 3:
        return lines + _delay_lines(found)
    for (model, metric, dataset), members in groups(found).items():
        paper = next(iter(next(iter(members.values())).values())).number.run
        names = list(tables.METHODS)
        lines += [
            f"**{figures.LABELS[metric]}, {model} on {dataset}** (paper: {paper.model} on "
            f"{paper.dataset}); ours ± std (n) / paper's ± std / difference; time: PRSGDm's "
            "virtual time over OrLoMo's",
            "",
            f"| scenario | K | S | {' | '.join(names)} | best here | best in paper | time |",
            "|---|---|---|" + "---|" * (len(names) + 3),
        ]
        for place, group in members.items():
            numbers = [_against_paper(group.get(method)) for method in tables.METHODS.values()]
            lines.append(
                f"| {' | '.join(map(str, (*place, *numbers)))} | "
                f"{_best(group, metric, ours=True)} | {_best(group, metric, ours=False)} | "
                f"{time_ratio(group)} |"
            )
        lines.append("")
    return lines


def _delay_lines(found: list[Entry]) -> list[str]:
    lines = [
        "| slow worker | max delay | accuracy ± std (n) | paper's max delay | paper's accuracy |",
        "|---|---|---|---|---|",
    ]
    for entry in found:
        run, paper = entry.run, entry.number.run
        form = f"{run.slowdown:g}× slower" if run.scenario == "one_slow" else "set delay"
        delay = max((row["max_delay"] for row in entry.rows), default="–")
        lines.append(
            f"| {form} | {delay} | {_ours(entry)} | {paper.max_delay} | {entry.number.mean:.2f} |"
        )
    return [*lines, ""]


def _ours(entry: Entry) -> str:
    mean, places = entry.mean(), DIGITS[entry.number.metric]
    statuses = entry.search.statuses.values()
    if not statuses:
        return "–"
    if entry.search.untried:
        return f"rates run: {len(statuses)}"
    if mean is None:
        return "failed" if "failed" in statuses else "diverged at every rate"
    return f"{mean:.{places}f}{entry.spread()} ({len(entry.rows)})"


def _against_paper(entry: Entry | None) -> str:
    if entry is None:
        return "–"
    paper = f"{entry.number.mean:.2f} ± {entry.number.std or 0:.2f}"
    mean = entry.mean()
    difference = "" if mean is None else f" / {mean - entry.number.mean:+.2f}"
    return f"{_ours(entry)} / {paper}{difference}"


def _best(group: Group, metric: str, *, ours: bool) -> str:
    if len(group) < len(tables.METHODS):
        return "–"
    titles = {method: name for name, method in tables.METHODS.items()}
    values = {
        titles[method]: entry.mean() if ours else entry.number.mean
        for method, entry in group.items()
    }
    if ours and any(entry.search.untried for entry in group.values()):
        return "–"
    known = {name: value for name, value in values.items() if value is not None}
    pick = max if metric == "test_accuracy" else min
    return pick(known, key=lambda name: known[name]) if known else "–"


def provenance(rows: Rows, scale: scales.Scale) -> list[str]:
    """Return lines that state the scale, the devices and the statuses of the runs."""
    environments = Counter(
        (row["environment"]["device"], row["environment"]["cpus"], row["environment"]["jax"])
        for row in rows.values()
    )
    statuses = Counter(row["status"] for row in rows.values())
    devices = "; ".join(
        f"{count} runs on {device}, {cpus} processors, jax {jax}"
        for (device, cpus, jax), count in environments.items()
    )
    return [
        f"Scale: {scale.name}: {scale.about}. Learning-rate grid, one for all methods: "
        f"{', '.join(f'{rate:g}' for rate in scale.learning_rates)}. The rate is chosen with seed "
        "0 by training loss: the search starts in the middle of the grid and ends when a rate is "
        f"better than both its neighbours. Each chosen rate has {scale.seeds} seeds, unless the "
        "(n) of a cell gives another number.",
        "",
        f"Run: {devices}. Status: "
        + ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
        + ".",
        "",
    ]


def build(rows: Rows, scale: scales.Scale, output: Path) -> None:
    """Write report.md and every figure that the records cover."""
    lines = [f"# Results at the scale “{scale.name}”", "", *provenance(rows, scale)]
    for table in tables.SOURCES:
        lines += table_lines(table, rows, scale)
    for figure, (table, metrics) in tables.FIGURES.items():
        wanted = {cell_of(scale.shrink(run)) for run in tables.figure_runs(figure)}
        curves = [
            (entry.run, entry.rows)
            for entry in entries(table, rows, scale)
            if entry.run in wanted and entry.rows
        ]
        unique = list({run: (run, found) for run, found in curves}.values())
        if unique:
            name = f"figure{figure}"
            figures.draw_curves(unique, metrics, output / name)
            lines += [f"## Figure {figure}", "", f"![Figure {figure}]({name}.png)", ""]
    if scale.shows_dependence:
        lines += _dependence_lines(rows, scale, output)
    records.write(output / "report.md", "\n".join(lines))


def _dependence_lines(rows: Rows, scale: scales.Scale, output: Path) -> list[str]:
    """Draw Table 2 against S·K and the learning rate, for each data set, K and kind of workers."""
    parts: dict[tuple, dict[str, dict[int, Group]]] = {}
    for table in (2, 4):
        for (_, metric, dataset), members in groups(entries(table, rows, scale)).items():
            for (scenario, workers, steps), group in members.items():
                part = parts.setdefault((dataset, workers, scenario), {})
                part.setdefault(metric, {})[steps] = group
    lines = []
    for (dataset, workers, scenario), cells in parts.items():
        name = f"dependence-{dataset}-{workers}-{scenario}"
        title = f"Against S·K and γ: {dataset}, K = {workers}, {scenario}"
        figures.draw_dependence(cells, rows, scale.learning_rates, output / name)
        lines += [f"## {title}", "", f"![{title}]({name}.png)", ""]
    return lines


def benchmarks(path: Path, output: Path) -> Path:
    """Write the table and the plot of the benchmarks' newest rows; return the table's path."""
    try:
        rows = chart.newest(records.read(path))
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if not rows:
        raise SystemExit(f"no rows in {path}: run python -m experiments.benchmarks --output {path}")
    lines = ["# Benchmarks", "", "![Shares of the limits](benchmarks.png)", "", *chart.table(rows)]
    records.write(output / "benchmarks.md", "\n".join(lines))
    chart.draw(rows, output / "benchmarks")
    return output / "benchmarks.md"


def main(args: Sequence[str] | None = None) -> None:
    """Write the report."""
    accept_any_terminal()
    settings = tyro.cli(Report, prog="python -m experiments.report", args=args, description=__doc__)
    plt.switch_backend("agg")
    try:
        print(_made(settings))
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None


def _made(settings: Report) -> Path:
    """Make the report that the settings ask for; return its main file."""
    if settings.benchmarks is not None:
        return benchmarks(settings.benchmarks, settings.output or settings.benchmarks.parent)
    if settings.trace is not None:
        output = settings.output or settings.trace.parent
        figures.draw_timeline(ArrivalTrace.load(settings.trace), output / "timeline")
        return output / "timeline.png"
    output = settings.output or records.RESULTS / settings.scale
    scale = scales.SCALES[settings.scale]
    path = settings.records or records.RESULTS / scale.file
    rows = recorded(path)
    if not rows:
        raise ValueError(f"{path} holds no rows: run python -m experiments.reproduce first")
    build(rows, scale, output)
    return output / "report.md"


if __name__ == "__main__":
    main()

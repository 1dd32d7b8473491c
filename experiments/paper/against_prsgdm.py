"""Compares OrLoMo with PRSGDm: at equal learning rates, at equal times, with a barrier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from experiments.config import Run
from experiments.paper import scales, tables
from experiments.paper.agreement import LEAD_DIGITS, SCENARIOS, leads, signed
from experiments.paper.entries import DIGITS, Group, entries, groups, time_ratio
from experiments.paper.search import Rows, at


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
    runs = [group[method].run for method in ("orlomo", "prsgdm")]
    ours, theirs = _finished(runs, rows, metric, rate, seeds)
    if not len(ours):
        return "–"
    better = 1 if metric == "test_accuracy" else -1
    lead = better * float(np.mean(ours - theirs))
    return signed(lead, LEAD_DIGITS[metric]) + (f" ({len(ours)})" if len(ours) > 1 else "")


def _finished(
    runs: Sequence[Run], rows: Rows, metric: str, rate: float, seeds: int
) -> tuple[np.ndarray, ...]:
    """Return each run's metric at a rate, over the seeds at which all of them have finished."""
    found = [[rows.get(at(run, rate, seed)) for run in runs] for seed in range(seeds)]
    values = [
        [row[metric] for row in of_seed if row is not None and row["status"] == "finished"]
        for of_seed in found
    ]
    common = [of_seed for of_seed in values if len(of_seed) == len(runs)]
    return tuple(np.array(common).reshape(-1, len(runs)).T)


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
            lead = signed(pair[0].mean, LEAD_DIGITS[metric])
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


def with_a_barrier(table: int, rows: Rows, scale: scales.Scale) -> list[str]:
    """Return Markdown lines: OrLoMo, OrLoMo with a barrier, and PRSGDm at equal learning rates.

    The values are means over the seeds that all three have. The last columns split PRSGDm's lead
    over OrLoMo into the gain from the barrier and the further gain of PRSGDm.

    Args:
        table: 2 for test accuracy, 4 for training loss.
        rows: The recorded runs.
        scale: The scale of these runs, at which the workers of OrLoMo wait for each other.
    """
    lines = []
    for (_, metric, dataset), members in groups(entries(table, rows, scale)).items():
        places, better = DIGITS[metric], 1 if metric == "test_accuracy" else -1
        for (scenario, workers, steps), group in members.items():
            if not {"orlomo", "prsgdm"} <= group.keys():
                continue
            waiting = group["orlomo"].run
            runs = (replace(waiting, staleness_bound=0), waiting, group["prsgdm"].run)
            for rate in sorted(scale.learning_rates):
                values = _finished(runs, rows, metric, rate, scale.seeds)
                if not len(values[0]):
                    continue
                free, held, synchronous = (float(np.mean(of_run)) for of_run in values)
                cells = [f"{value:.{places}f}" for value in (free, held, synchronous)]
                gains = (better * (held - free), better * (synchronous - held))
                cells += [signed(gain, places) for gain in gains]
                place = (dataset, SCENARIOS[scenario], workers, steps, f"{rate:g}", len(values[0]))
                lines.append(f"| {' | '.join(map(str, (*place, *cells)))} |")
    if not lines:
        return []
    return [
        "| data | workers | K | S | rate | seeds | OrLoMo | with a barrier | PRSGDm | "
        "gain from the barrier | further gain of PRSGDm |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        *lines,
    ]

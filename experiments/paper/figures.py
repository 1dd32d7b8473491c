"""Draws the figures: curves against virtual time, results against S·K and γ, and timelines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from experiments.config import Run
from experiments.paper.entries import Group
from experiments.paper.search import Rows, at
from experiments.paper.tables import METHODS
from orlomo_jax import ArrivalTrace

TITLES = {method: name for name, method in METHODS.items()}
STYLES = {"orlomo": "-", "prsgdm": "--", "al_sgd": "-.", "local_ormo_da": ":"}
SHADES = {"orlomo": "#0b3d91", "prsgdm": "#e07b00", "al_sgd": "#3a9d5d", "local_ormo_da": "#c2185b"}
LABELS = {"test_accuracy": "test accuracy (%)", "train_loss": "training loss"}


def save(figure: Any, stem: Path) -> None:
    """Save a figure as PNG and SVG; the same figure gives the same bytes."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context({"svg.hashsalt": "orlomo_jax"}):
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
        figure.savefig(stem.with_suffix(".png"), dpi=120, metadata={"Software": None})
    plt.close(figure)


def draw_curves(
    groups: Sequence[tuple[Run, list[dict[str, Any]]]], metrics: Sequence[str], stem: Path
) -> None:
    """Draw one panel per (metric, data set) and scenario: mean over seeds, band from min to max.

    Lines differ in pattern as well as colour, so that greyscale shows them apart.
    """
    datasets = list(dict.fromkeys(run.dataset for run, _ in groups))
    scenarios = list(dict.fromkeys(run.scenario for run, _ in groups))
    panels = [(metric, dataset) for metric in metrics for dataset in datasets]
    figure, axes = plt.subplots(
        len(panels),
        len(scenarios),
        figsize=(5 * len(scenarios), 3.4 * len(panels)),
        squeeze=False,
        layout="constrained",
    )
    for (metric, dataset), line_of_axes in zip(panels, axes, strict=True):
        for scenario, axis in zip(scenarios, line_of_axes, strict=True):
            for run, rows in groups:
                if (run.dataset, run.scenario) == (dataset, scenario):
                    draw_band(axis, run.method, [row["curve"] for row in rows], metric)
            axis.set(
                title=f"{dataset}, {scenario}",
                xlabel="virtual time (gradients of a fast worker)",
                ylabel=LABELS[metric],
            )
            if metric == "train_loss":
                axis.set_yscale("log")
            axis.grid(alpha=0.3)
    axes[0, 0].legend()
    save(figure, stem)


def draw_band(axis: Any, method: str, curves: list[dict[str, list]], metric: str) -> None:
    """Draw a method's mean over seeds, and a band from the lowest to the highest."""
    times = np.mean([curve["virtual_time"] for curve in curves], axis=0)
    values = np.array([curve[metric] for curve in curves], float)
    look = {"color": SHADES[method], "linestyle": STYLES[method]}
    axis.plot(times, values.mean(0), label=TITLES[method], **look)
    axis.fill_between(times, values.min(0), values.max(0), color=SHADES[method], alpha=0.15, lw=0)


def draw_dependence(
    cells: dict[str, dict[int, Group]], rows: Rows, rates: Sequence[float], stem: Path
) -> None:
    """Draw results against S·K and the learning rate γ: one row of panels per metric.

    The first panel shows each method at its chosen rates: the mean over seeds, and the standard
    deviation as a bar. The others show seed 0 at every rate that was tried, for one S each, with a
    ring around the chosen one. Results far worse than those of the first panel are cut off.

    Args:
        cells: Metric → S → the entries of one kind of workers at one K.
        rows: The recorded runs.
        rates: The grid of learning rates.
        stem: Path of the figure, without its ending.
    """
    columns = 1 + max(map(len, cells.values()))
    figure, axes = plt.subplots(
        len(cells),
        columns,
        figsize=(3.4 * columns, 3.2 * len(cells)),
        squeeze=False,
        sharex="col",
        sharey="row",
        layout="constrained",
    )
    for (metric, by_steps), line_of_axes in zip(cells.items(), axes, strict=True):
        _draw_against_steps(line_of_axes[0], metric, by_steps)
        for axis, steps in zip(line_of_axes[1:], sorted(by_steps), strict=False):
            _draw_against_rates(axis, metric, by_steps[steps], rows, rates)
            axis.set(title=f"S = {steps}", xlabel="learning rate γ, seed 0", xscale="log")
        _cut_off(line_of_axes, metric)
        for axis in line_of_axes:
            axis.grid(alpha=0.3)
    axes[0, 0].legend()
    save(figure, stem)


def _cut_off(line_of_axes: Any, metric: str) -> None:
    """Limit a row of panels to twice the first panel's range, towards worse results."""
    low, high = line_of_axes[0].dataLim.intervaly
    if not np.isfinite([low, high]).all():
        return  # no cell has a chosen rate yet
    ends = np.concatenate([axis.dataLim.intervaly for axis in line_of_axes])
    shown = ends[np.isfinite(ends)]  # a panel without a finished run is empty
    if metric == "test_accuracy":
        bottom, top = low - (high - low), np.max(shown)
    else:
        bottom, top = np.min(shown), high + (high - low)
    margin = 0.05 * (top - bottom) or 1.0
    line_of_axes[0].set_ylim(bottom - margin, top + margin)


def _draw_against_steps(axis: Any, metric: str, by_steps: dict[int, Group]) -> None:
    for method in STYLES:
        found = [by_steps[steps][method] for steps in sorted(by_steps) if method in by_steps[steps]]
        shown = [entry for entry in found if entry.rows]
        axis.errorbar(
            [entry.run.local_iterations * entry.run.workers for entry in shown],
            [entry.mean() for entry in shown],
            [entry.std() for entry in shown],
            label=TITLES[method],
            color=SHADES[method],
            linestyle=STYLES[method],
            marker=".",
            capsize=3,
        )
    axis.set(title="chosen γ, all seeds", xlabel="S·K", ylabel=LABELS[metric], xscale="log")
    runs = [next(iter(group.values())).run for group in by_steps.values()]
    ticks = sorted(run.local_iterations * run.workers for run in runs)
    axis.set_xlim(ticks[0] / 1.2, ticks[-1] * 1.2)
    axis.set_xticks(ticks, map(str, ticks))
    axis.minorticks_off()


def _draw_against_rates(
    axis: Any, metric: str, group: Group, rows: Rows, rates: Sequence[float]
) -> None:
    for method, entry in group.items():
        tried = {rate: rows.get(at(entry.run, rate)) for rate in sorted(rates)}
        values = {r: row[metric] for r, row in tried.items() if row and row[metric] is not None}
        look = {"color": SHADES[method], "linestyle": STYLES[method]}
        axis.plot(values.keys(), values.values(), marker=".", **look)
        if entry.search.chosen in values:
            best = entry.search.chosen
            axis.plot(best, values[best], marker="o", markersize=10, fillstyle="none", **look)


def draw_timeline(trace: ArrivalTrace, stem: Path, most: int = 120) -> None:
    """Draw the first ``most`` reports as bars from dispatch to arrival, one row per worker.

    The shade of a bar is its group ⌈i/K⌉ modulo 4, its number is the delay τ. A dotted line marks
    the start of each group.
    """
    steps = min(trace.num_steps, most)
    times, starts = trace.times[:steps], np.zeros(steps)
    later = trace.dispatched_at[:steps] > 0
    starts[later] = trace.times[trace.dispatched_at[:steps][later] - 1]
    figure, axis = plt.subplots(figsize=(12, 1.5 + 0.35 * trace.num_workers), layout="constrained")
    groups = -(-trace.dispatched_at[:steps] // trace.num_workers)
    greys = np.array(["0.92", "0.8", "0.68", "0.56"])[groups % 4]
    axis.barh(
        trace.workers[:steps],
        times - starts,
        left=starts,
        color=greys,
        edgecolor="black",
        linewidth=0.5,
    )
    for time, worker, delay in zip(times, trace.workers, trace.delays, strict=False):
        axis.text(time, worker, f"{delay} ", ha="right", va="center", fontsize=7)
    for step in range(1, steps, trace.num_workers):
        axis.axvline(times[step], color="black", linestyle=":", linewidth=0.6)
    axis.set(xlabel="virtual time (s)", ylabel="worker", yticks=range(trace.num_workers))
    axis.invert_yaxis()
    save(figure, stem)

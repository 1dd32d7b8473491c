"""Draws the figures: curves against virtual time, and the timeline of an arrival trace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from experiments.config import Run
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

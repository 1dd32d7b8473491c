"""Makes the tables and figures of the study from its rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from experiments import records
from experiments.comparison.clusters import named_cluster
from experiments.paper.figures import save
from orlomo_jax import make_method

REFERENCE = "diloco"
QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""The 97.5 % quantiles of Student's t for 1, 2, … degrees of freedom."""
AXES = {
    "tokens": "tokens",
    "step": "server steps (reports)",
    "virtual_time": "virtual time (s)",
}
STYLES = {
    "diloco": "-",
    "delay_lookahead": "-",
    "heloco": (0, (5, 1, 1, 1, 1, 1)),
    "al_sgd": "-.",
    "ordered_outer_momentum": "--",
    "delayed_nesterov": ":",
}
"""The methods in the figures and in the README, and their lines."""
Row = dict[str, Any]


def gap(losses: dict[int, float], reference: dict[int, float]) -> tuple[float, float, float] | None:
    """Return the mean difference of perplexity in %, and its 95 % interval, paired by seed.

    Returns:
        None if the two have less than two seeds in common.

    Example:
        >>> [round(x, 2) for x in gap({0: 1.50, 1: 1.52}, {0: 1.50, 1: 1.50})]
        [1.01, -11.04, 14.69]
    """
    differences = [losses[seed] - reference[seed] for seed in sorted(losses.keys() & reference)]
    if len(differences) < 2:
        return None
    mean = statistics.mean(differences)
    half = QUANTILES[len(differences) - 2] * statistics.stdev(differences)
    half /= math.sqrt(len(differences))
    low, middle, high = (100 * math.expm1(x) for x in (mean - half, mean, mean + half))
    return middle, low, high


@lru_cache(maxsize=64)
def synchronous_times(cluster: str, num_local_steps: int, num_rounds: int, seed: int) -> np.ndarray:
    """Return the virtual seconds at the end of each round of a synchronous method."""
    place = named_cluster(cluster, 4, None)
    K = place.num_workers
    method = make_method("local_sgd", K, num_local_steps)
    return place.arrivals(method, num_rounds * K * num_local_steps, seed).times[K - 1 :: K]


def curve(row: Row, cluster: str) -> dict[str, np.ndarray]:
    """Return a run's curve, with the virtual time of its reference method on a cluster."""
    points = {name: np.array(values, float) for name, values in row["curve"].items()}
    steps, seed = points["step"].astype(int), row["seed"]
    if row["arm"] == REFERENCE and cluster != row["cluster"]:
        K, S = row["workers"], row["local_steps"][0]
        times = synchronous_times(cluster, S, row["num_steps"] // K, seed)
        points["virtual_time"] = times[steps // K - 1]
    elif row["arm"] == "data_parallel":  # its one worker stands for four with a step each
        S = row["local_steps"][0]
        times = synchronous_times(cluster, 1, row["num_steps"] * S, seed)
        points["virtual_time"] = times[steps * S - 1]
        points["step"] = points["step"] * S
    return points


def of_cluster(rows: Sequence[Row], purpose: str, cluster: str) -> dict[str, dict[int, Row]]:
    """Return the rows by arm and seed; four workers share the runs of the references."""
    found: dict[str, dict[int, Row]] = {}
    shared = named_cluster(cluster, 4, None).num_workers == 4
    for row in rows:
        own = row["cluster"] == cluster
        reference = row["arm"] in (REFERENCE, "data_parallel") and row["cluster"] == "equal"
        if row["purpose"] == purpose and (own or (reference and shared and purpose == "study")):
            found.setdefault(row["arm"], {})[row["seed"]] = row
    return found


def table(arms: Sequence[Any], of_arm: dict[str, dict[int, Row]], cluster: str) -> list[str]:
    """Return the lines of a cluster's table, in the order of the losses."""
    lines = [
        "| method | seeds | held-out loss (nats per byte) | perplexity against DiLoCo (95 %) "
        "| time, DiLoCo = 1 | mean delay |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    body = []
    for arm in arms:
        runs = of_arm.get(arm.name, {})
        if not runs:
            continue
        losses = {seed: row["loss"] for seed, row in runs.items() if row["loss"] is not None}
        failed = len(runs) - len(losses)
        mean = statistics.mean(losses.values()) if losses else math.inf
        shown = f"{mean:.4f}" if losses else "diverged"
        shown += f" ± {statistics.stdev(losses.values()):.4f}" if len(losses) > 1 else ""
        shown += f", {failed} diverged" if losses and failed else ""
        apart, ratio = compared(of_arm, arm.name, cluster)
        delay = statistics.mean(row["mean_delay"] for row in runs.values())
        delay = "–" if arm.reference else f"{delay:.1f}"
        body.append((mean, f"| {arm.name} | {len(runs)} | {shown} | {apart} | {ratio} | {delay} |"))
    return [*lines, *(line for _, line in sorted(body, key=lambda pair: pair[0]))]


def compared(of_arm: dict[str, dict[int, Row]], name: str, cluster: str) -> list[str]:
    """Return a method's gap to DiLoCo, and its time if DiLoCo's is 1, as texts."""
    runs, reference = of_arm.get(name, {}), of_arm.get(REFERENCE, {})
    if not runs or not reference:
        return ["–", "–"]
    time = f"{_final_time(runs, cluster) / _final_time(reference, cluster):.2f}"
    losses, base = ({s: row["loss"] for s, row in rows.items()} for rows in (runs, reference))
    difference = None
    if None not in losses.values() and name != REFERENCE:
        difference = gap(losses, base)
    if difference is None:
        return ["–", time]
    middle, low, high = difference
    return [f"{middle:+.1f} % ({low:+.1f} to {high:+.1f})", time]


def _final_time(runs: dict[int, Row], cluster: str) -> float:
    if not runs:
        return 0.0
    return statistics.mean(curve(row, cluster)["virtual_time"][-1] for row in runs.values())


def tuning_table(arms: Sequence[Any], rows: Sequence[Row]) -> list[str]:
    """Return the lines of the table of all trials; the best of a method is bold."""
    lines = ["| method | default η | trials: γ, factor of η: held-out loss |", "|---|---:|---|"]
    for arm in arms:
        own = [row for row in rows if row["purpose"] == "tuning" and row["arm"] == arm.name]
        best = min((row["loss"] for row in own if row["loss"] is not None), default=None)
        cells = []
        for row in own:
            loss = "diverged" if row["loss"] is None else f"{row['loss']:.3f}"
            mark = "**" if row["loss"] == best and best is not None else ""
            cells.append(f"{row['rate']:g}, {row['factor']:g}: {mark}{loss}{mark}")
        if cells:
            eta = "–" if arm.eta is None else f"{arm.eta:g}"
            lines.append(f"| {arm.name} | {eta} | {'; '.join(cells)} |")
    return lines


def draw(
    clusters: Sequence[str], rows: Sequence[Row], stem: Path, names: Sequence[str] = tuple(AXES)
) -> None:
    """Draw the losses of the main methods, a line of panels for each cluster.

    With a single axis the clusters are next to each other.
    """
    panels = [(cluster, name) for cluster in clusters for name in names]
    height, width = (len(clusters), len(names)) if len(names) > 1 else (1, len(clusters))
    figure, axes = plt.subplots(
        height, width, figsize=(4.2 * width, 3.4 * height), squeeze=False, layout="constrained"
    )
    for axis, (cluster, name) in zip(axes.flat, panels, strict=True):
        _draw_panel(axis, of_cluster(rows, "study", cluster), cluster, name)
    axes[0, 0].legend()
    save(figure, stem)


def _draw_panel(axis: Any, of_arm: dict[str, dict[int, Row]], cluster: str, name: str) -> None:
    """Draw each method's mean over the seeds, and a band from the lowest to the highest."""
    for number, (arm, style) in enumerate(STYLES.items()):
        curves = [curve(row, cluster) for row in of_arm.get(arm, {}).values()]
        curves = [points for points in curves if np.isfinite(points["loss"]).all()]
        if not curves:
            continue
        x = np.mean([points[name] for points in curves], axis=0)
        losses, look = np.array([points["loss"] for points in curves]), {"color": f"C{number}"}
        axis.plot(x, losses.mean(0), linestyle=style, label=arm, **look)
        axis.fill_between(x, losses.min(0), losses.max(0), alpha=0.2, lw=0, **look)
    axis.set(xlabel=AXES[name], ylabel="held-out loss (nats per byte)", title=cluster)
    axis.set_ylim(top=2.4)
    axis.grid(alpha=0.3)


def write(rows: Sequence[Row], arms: Sequence[Any], folder: Path) -> None:
    """Write report.md and the figure to a folder."""
    clusters = list(dict.fromkeys(row["cluster"] for row in rows if row["purpose"] == "study"))
    lines = ["# Asynchronous language models", ""]
    environments = {(row["environment"]["python"], row["text"]) for row in rows}
    texts = ", ".join(f"Python {python}, text {digest}" for python, digest in sorted(environments))
    lines += [f"Made from {len(rows)} rows by `python -m experiments.language.study --report`.", ""]
    lines += [
        f"{texts}. The plan is in [docs/language_study.md](../../../docs/language_study.md).",
        "",
    ]
    for cluster in clusters:
        of_arm = of_cluster(rows, "study", cluster)
        lines += [f"## {cluster}", "", *table(arms, of_arm, cluster), ""]
    if warm := of_cluster(rows, "warm", "equal"):
        lines += ["## equal, after a warm start", "", *table(arms, warm, "equal"), ""]
    lines += ["## Tuning", "", *tuning_table(arms, rows), ""]
    if clusters:
        draw(clusters, rows, folder / "curves")
        draw(clusters[:2], rows, folder / "front", ("virtual_time",))
        lines += ["![Held-out loss](curves.png)", ""]
    records.write(folder / "report.md", "\n".join(lines))

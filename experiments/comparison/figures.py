"""Draws the figures of a comparison."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter
from PIL import Image

from experiments.comparison.runs import Row

if TYPE_CHECKING:
    from experiments.comparison.report import Cell

TOP = 5
"""Methods of a cell that are coloured, in addition to ``ALWAYS``; the others are grey."""
ALWAYS = ("orlomo", "ordered_outer_momentum", "al_sgd")
DASHES = ("-", "--", "-.", ":")


def draw_all(found: Sequence[Cell], rows: Sequence[Row], out: Path) -> list[str]:
    """Draw all figures of a comparison; return the names of their files."""
    names = ["ranking.png", "curves.png", "sensitivity.png"]
    _ranking(found, out / names[0])
    _curves(found, out / names[1])
    _sensitivity([row for row in rows if row["setting"]["purpose"] == "tuning"], out / names[2])
    unequal = [cell for cell in found if has_shares(cell)]
    if unequal:
        names.append("slow_workers.png")
        _slow_workers(unequal, out / names[-1])
    return names


def _save(figure: Any, path: Path, dpi: int = 70) -> None:
    """Save a PNG of few colours, so that it is small; the same figure gives the same bytes."""
    whole = io.BytesIO()
    figure.savefig(whole, dpi=dpi, format="png")
    plt.close(figure)
    Image.open(whole).convert("RGB").quantize(64, Image.Quantize.MAXCOVERAGE).save(
        path, optimize=True
    )


def _colours(names: Sequence[str]) -> dict[str, Any]:
    palette = plt.get_cmap("tab20").colors  # pyright: ignore[reportAttributeAccessIssue]
    return {name: palette[(2 * i + i // 10) % 20] for i, name in enumerate(dict.fromkeys(names))}


def _label(entry: Any, several: bool) -> str:
    return f"{entry.method}, S = {entry.local_steps}" if several else entry.method


def _several(cell: Cell) -> bool:
    return len({entry.local_steps for entry in cell.entries}) > 1


def _ranking(found: Sequence[Cell], path: Path) -> None:
    """Draw each method's losses at the time of the ranking, one panel per cell."""
    columns = min(4, len(found))
    lines = -(-len(found) // columns)
    height = 1.2 + 0.17 * max(len(cell.entries) for cell in found)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.2 * columns, height * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(found) :]:
        axis.remove()
    ordered = sorted(found, key=lambda cell: cell.setting.partition)
    ordered = sorted(ordered, key=lambda cell: cell.setting.partition != "iid")
    for axis, cell in zip(axes.flat, ordered, strict=False):
        shown = [entry for entry in cell.entries if np.isfinite(entry.mean)][::-1]
        for place, entry in enumerate(shown):
            shade = "#0b3d91" if entry.method in ALWAYS else "0.45"
            axis.plot(entry.losses, [place] * len(entry.losses), ".", color=shade, alpha=0.5)
            axis.plot(entry.mean, place, "|", color=shade, markersize=12)
        names = [_label(entry, _several(cell)) for entry in shown]
        axis.set_yticks(range(len(shown)), names, fontsize=8)
        axis.set_title(cell.title, fontsize=9)
        axis.set(xscale="log", xlabel=f"loss at {cell.when:.4g} s")
        axis.grid(alpha=0.3, axis="x")
    _save(figure, path)


def _curves(found: Sequence[Cell], path: Path) -> None:
    """Draw the mean loss per gradient, per update of w and per virtual second."""
    kinds = (("gradients", "gradients"), ("updates", "updates of w"), ("time", "virtual seconds"))
    figure, axes = plt.subplots(
        len(found), 3, figsize=(12, 2.3 * len(found)), squeeze=False, layout="constrained"
    )
    colours = _colours([*ALWAYS, *(e.method for cell in found for e in cell.entries[:TOP])])
    for line, cell in zip(axes, found, strict=True):
        for rank, entry in enumerate(cell.entries):
            rows = [row for row in entry.rows if row["status"] == "finished"]
            if not rows:
                continue
            bold = rank < TOP or entry.method in ALWAYS
            look: dict[str, Any] = {"color": "0.8", "linewidth": 0.8, "zorder": 1}
            if bold:
                look = {"color": colours[entry.method], "zorder": 3}
                look["label"] = f"{rank + 1}. {_label(entry, _several(cell))}"
                look["linestyle"] = DASHES[rank % len(DASHES)]
            loss = np.mean([row["curve"]["loss"] for row in rows], axis=0)
            for axis, (kind, _) in zip(line, kinds, strict=True):
                axis.plot(np.mean([_axis(row, kind) for row in rows], axis=0), loss, **look)
        line[0].set_ylabel(f"{cell.title}\nloss", fontsize=9)
        for axis, (_, title) in zip(line, kinds, strict=True):
            axis.set(yscale="log", xlabel=title)
            axis.grid(alpha=0.3)
            first = cell.entries[0].rows
            if first:
                top = max(row["curve"]["loss"][0] for row in first) * 3
                axis.set_ylim(top=min(top, axis.get_ylim()[1]))
        line[1].set_xscale("log")
        line[1].xaxis.set_minor_formatter(NullFormatter())
        line[2].set_xlim(0, 1.7 * cell.when)  # a barrier makes the rest much longer
        line[2].axvline(cell.when, color="black", linewidth=0.7, linestyle=":")
        line[2].legend(fontsize=7, loc="upper right")
    _save(figure, path, 52)


def _axis(row: Row, kind: str) -> list[float]:
    curve = row["curve"]
    if kind != "updates":
        return curve[kind]
    return [x / curve["gradients"][-1] * row["updates"] for x in curve["gradients"]]


def _sensitivity(rows: Sequence[Row], path: Path) -> None:
    """Draw the final loss of the whole tuning grid, one panel per method."""
    losses: dict[str, dict[tuple, dict[float, list]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        setting = row["setting"]
        line = setting["eta_factor"], setting["cluster"], setting["local_steps"]
        rates = losses[setting["method"]][line]
        rates.setdefault(setting["learning_rate"], []).append(row["loss"])
    factors = sorted({line[0] for lines in losses.values() for line in lines})
    places = list(dict.fromkeys(line[1:] for lines in losses.values() for line in lines))
    columns = min(6, len(losses))
    figure, axes = plt.subplots(
        -(-len(losses) // columns),
        columns,
        figsize=(2.4 * columns + 1, 2.2 * -(-len(losses) // columns) + 0.8),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(factors)))
    for axis in axes.flat[len(losses) :]:
        axis.remove()
    values = [row["loss"] for row in rows if row["loss"] is not None]
    top = 20 * float(np.median(values)) if values else 1.0
    for axis, (method, lines) in zip(axes.flat, losses.items(), strict=False):
        for (factor, *place), rates in sorted(lines.items()):
            dash = DASHES[places.index(tuple(place)) % len(DASHES)]
            x = sorted(rates)
            means = [np.nan if None in rates[rate] else np.mean(rates[rate]) for rate in x]
            y = np.minimum(np.array(means, float), top)
            axis.plot(x, y, dash, color=shades[factors.index(factor)], lw=1, marker=".", ms=3)
        axis.set_title(method, fontsize=8)
        axis.set(xscale="log", yscale="log")
        rates = sorted({row["setting"]["learning_rate"] for row in rows})
        axis.set_xticks(rates, [f"{rate:g}" for rate in rates], fontsize=7)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.supylabel(f"final loss (cut at {top:.2g}; gaps diverged)")
    lines = [Line2D([], [], color=shade) for shade in shades]
    names = [f"η factor {factor:g}" for factor in factors]
    for index, place in enumerate(places):
        lines.append(Line2D([], [], color="black", linestyle=DASHES[index % len(DASHES)]))
        names.append(", S = ".join(place))
    title = "The final loss against γ"
    figure.legend(lines, names, title=title, loc="outside lower center", ncols=4, fontsize=8)
    _save(figure, path, 60)


def has_shares(cell: Cell) -> bool:
    """Return whether the workers differ in speed and data."""
    rows = [row for entry in cell.entries for row in entry.rows]
    differ = (_of(row) != _of(row, "fastest") and "accuracy" in _of(row) for row in rows)
    return cell.setting.partition != "iid" and any(differ)


def _of(row: Row, worker: str = "slowest") -> Row:
    return row.get(worker, {})


def _slow_workers(found: Sequence[Cell], path: Path) -> None:
    """Draw the slowest worker's share of the weight, and the accuracy on its classes."""
    figure, axes = plt.subplots(
        2,
        len(found),
        figsize=(4 * len(found), 8),
        squeeze=False,
        height_ratios=[1, 3],
        layout="constrained",
    )
    for (above, below), cell in zip(axes.T, found, strict=True):
        free = [e for e in cell.entries if e.rows and mean_of(e, "reports") is not None]
        by_name = {entry.method: entry for entry in free}
        sample = by_name.get("al_sgd", free[0])
        kinds = ("reports", "eq6", "rescaled")
        shares = [100 * (mean_of(sample, kind) or 0) for kind in kinds]
        above.barh(["reports", "Eq. (6)", "rescaled"], shares, color=["0.6", "#c2185b", "#3a9d5d"])
        above.axvline(100 / cell.setting.workers, color="black", linestyle=":")
        above.invert_yaxis()
        above.set_title(cell.title, fontsize=9)
        above.set(xlabel=f"slowest worker's share of {sample.method}, %")
        shown = sorted(free, key=lambda entry: mean_of(entry, "accuracy") or 0.0)
        for place, entry in enumerate(shown):
            for worker, mark in (("slowest", "o"), ("fastest", "x")):
                value = mean_of(entry, "accuracy", worker)
                shade = "#0b3d91" if entry.method in (*ALWAYS, "rescaled_asgd") else "0.5"
                below.plot(value, place, mark, color=shade, markersize=5)
        names = [_label(entry, _several(cell)) for entry in shown]
        below.set_yticks(range(len(shown)), names, fontsize=8)
        below.set(xlabel="test accuracy on the classes of the\nslowest (o), fastest (x) worker, %")
        below.grid(alpha=0.3)
    _save(figure, path)


def mean_of(entry: Any, kind: str, worker: str = "slowest") -> float | None:
    """Return the mean over the seeds of what a worker contributes or gets; None if unknown."""
    values = [_of(row, worker)[kind] for row in entry.rows if kind in _of(row, worker)]
    return float(np.mean(values)) if values else None

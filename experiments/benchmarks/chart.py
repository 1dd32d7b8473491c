"""Makes the table and the plot of the benchmarks from their rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

Rows = Sequence[dict[str, Any]]
FIELDS = {"group", "benchmark", "figure", "limit", "unit", "against", "ratio", "bar", "environment"}


def newest(rows: Rows) -> list[dict[str, Any]]:
    """Return the last row for each (group, name, limit, device)."""
    found = {}
    for row in rows:
        if missing := FIELDS - row.keys():
            raise ValueError(f"a row of the benchmarks must have {sorted(missing)}, got {row}")
        device = row["environment"]["device"]
        found[row["group"], row["benchmark"], row["against"], device] = row
    return list(found.values())


def table(rows: Rows) -> list[str]:
    """Return the lines of a Markdown table, and of a note on the machines."""
    lines = [
        "| benchmark | figure | limit | | of the limit | bar |",
        "|---|---:|---:|---|---:|---:|",
    ]
    for row in rows:
        bar = "" if row["bar"] is None else f"≥ {row['bar']:.2f}"
        lines.append(
            f"| {row['benchmark']} | {row['figure']:.4g} | {row['limit']:.4g} ({row['against']}) | "
            f"{row['unit']} | {row['ratio']:.2f} | {bar} |"
        )
    places = {
        f"{e['device']}, {e['cpus']} processors, jax {e['jax']}, jaxlib {e['jaxlib']}, "
        f"Python {e['python']}"
        for e in (row["environment"] for row in rows)
    }
    return [*lines, "", f"Measured on {'; '.join(sorted(places))}.", ""]


def draw(rows: Rows, path: Path) -> None:
    """Draw each figure's share of its limit, as PNG and SVG.

    Bars show the ratio on a logarithmic axis, ticks the ratio asked for. A bar that misses its tick
    is hatched, so that it is visible in greyscale too.
    """
    figure, axes = plt.subplots(figsize=(9, 0.28 * len(rows) + 1.2), layout="constrained")
    for place, row in enumerate(rows):
        missed = row["bar"] is not None and row["ratio"] < row["bar"]
        axes.barh(
            place,
            row["ratio"],
            color="white" if missed else "0.65",
            edgecolor="0.2",
            hatch="///" if missed else None,
        )
        if row["bar"] is not None:
            axes.plot([row["bar"]] * 2, [place - 0.45, place + 0.45], color="black", lw=2)
    axes.axvline(1, color="black", lw=0.8, ls=":")
    axes.set_xscale("log")
    axes.set_yticks(
        range(len(rows)), [f"{row['benchmark']}  ({row['against']})" for row in rows], fontsize=7
    )
    axes.invert_yaxis()
    axes.set_xlabel("share of the limit; more is better, a black tick is what is asked for")
    axes.grid(axis="x", color="0.85", lw=0.5)
    axes.set_axisbelow(True)
    for suffix in ("png", "svg"):
        figure.savefig(path.with_suffix(f".{suffix}"), dpi=150)
    plt.close(figure)

"""Makes the table and the plot of the benchmarks from their rows."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

Rows = Sequence[dict[str, Any]]
QUESTIONS = {
    "A server step": {"server_step", "rules", "masters"},
    "Receiving a report": {"receive", "finite"},
    "A simulated run": {"worker", "simulator", "optimizers", "uneven", "language", "axes", "appfl"},
    "A sweep of runs": {"sweep"},
    "Networks": {"torch", "layers", "compiling"},
    "Growing sizes": {"workers", "local_steps", "parameters", "arrivals", "memory", "kept_states"},
    "Real runs": {"threads", "race", "ray", "int8_reports"},
    "Start and commands": {"startup", "first_step", "commands"},
}
"""The groups that answer each question, a panel of the plot."""
LEFT, RIGHT = 0.2, 10.0
"""The range of the plot; ratios beyond it are drawn at its edge."""
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


def by_question(rows: Rows) -> dict[str, list[dict[str, Any]]]:
    """Return the rows that have a bar, grouped by question.

    Example:
        >>> row = {"group": "ray", "bar": 0.8}
        >>> by_question([row, {"group": "ray", "bar": None}])
        {'Real runs': [{'group': 'ray', 'bar': 0.8}]}
    """
    asked = [row for row in rows if row["bar"] is not None]
    known = {group for groups in QUESTIONS.values() for group in groups}
    questions = QUESTIONS | {"Others": {row["group"] for row in asked} - known}
    found = {
        question: [row for row in asked if row["group"] in groups]
        for question, groups in questions.items()
    }
    return {question: of_question for question, of_question in found.items() if of_question}


def draw(rows: Rows, path: Path) -> None:
    """Draw each figure's share of its limit, one panel for each question, as PNG and SVG.

    A dot is our figure, the dotted line the limit, a black tick the share that is asked for. The
    dot of a figure below its tick is hollow. The text names figure, limit and unit.
    """
    panels = by_question(rows)
    counts = [len(of_question) for of_question in panels.values()]
    figure, axes = plt.subplots(
        max(1, len(panels)),
        figsize=(9.5, 0.22 * sum(counts) + 0.62 * len(counts) + 0.4),
        height_ratios=[count + 0.8 for count in counts] or [1],
        layout="constrained",
        squeeze=False,
        sharex=True,
    )
    for panel, (question, of_question) in zip(axes[:, 0], panels.items(), strict=False):
        _draw_panel(panel, question, of_question)
    axes[-1, 0].set_xlabel("share of the limit; more is better, a tick is what is asked for")
    for suffix in ("png", "svg"):
        figure.savefig(path.with_suffix(f".{suffix}"), dpi=110)
    plt.close(figure)


def _draw_panel(panel: Any, question: str, rows: Rows) -> None:
    for place, row in enumerate(rows):
        missed = row["ratio"] < row["bar"]
        ratio, bar = (min(max(x, LEFT), RIGHT) for x in (row["ratio"], row["bar"]))
        panel.plot([1, ratio], [place, place], color="0.7", lw=1, zorder=1)
        face = "white" if missed else "0.2"
        panel.plot(ratio, place, "o", ms=5, color="0.2", markerfacecolor=face, zorder=3)
        panel.plot([bar] * 2, [place - 0.35, place + 0.35], color="black", lw=2, zorder=2)
        ours, limit = (
            f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in (row["figure"], row["limit"])
        )
        text = f"{ours} / {limit} {row['unit']}, {row['against']}"
        panel.annotate(
            textwrap.shorten(text, 52, placeholder=" …"),
            (1.01, place),
            xycoords=("axes fraction", "data"),
            fontsize=6.5,
            va="center",
        )
    names = [textwrap.shorten(row["benchmark"], 62, placeholder=" …") for row in rows]
    panel.set_yticks(range(len(rows)), names, fontsize=7)
    panel.set_ylim(len(rows) - 0.4, -0.6)
    panel.set_title(question, fontsize=9, loc="left")
    panel.axvline(1, color="black", lw=0.8, ls=":")
    panel.set_xscale("log")
    panel.set_xlim(LEFT * 0.9, RIGHT * 1.1)
    panel.set_xticks([0.25, 0.5, 1, 2, 4, 8], ["1/4", "1/2", "1", "2", "4", "8"])
    panel.minorticks_off()
    panel.grid(axis="x", color="0.88", lw=0.5)
    panel.set_axisbelow(True)

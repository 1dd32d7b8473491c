"""Write the tables of README.md, docs/*.md and experiments/results/*.md from the committed rows.

``python -m experiments.readme`` replaces everything between ``<!-- block NAME -->`` and
``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import quickstart, records, report
from experiments.benchmarks import chart
from experiments.language import study, study_report
from experiments.paper import against_prsgdm, agreement, scales, tables
from experiments.paper.entries import Entry, entries
from experiments.paper.search import Rows, recorded
from experiments.records import RESULTS
from proofs_check.registry import STATEMENTS
from proofs_check.statements import FIELD_STATEMENTS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")), *sorted(RESULTS.glob("*.md")))


def quickstart_table() -> str:
    """Return the quickstart's table, as its command prints it."""
    rows = records.read(RESULTS / "quickstart" / "runs.jsonl")
    console = Console(width=80, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(quickstart.table(quickstart.best_runs(rows)))
    lines = [line.rstrip() for line in capture.get().strip("\n").splitlines()]
    return "\n".join(["```text", *lines, "```"])


def theory_table() -> str:
    """Return the table of checked cases for each statement and strength."""
    outcomes = json.loads((RESULTS / "proofs.json").read_text(encoding="utf-8"))
    strengths = list(dict.fromkeys(outcome["strength"] for outcome in outcomes))
    by_statement: dict[str, list[dict[str, Any]]] = {}
    for outcome in outcomes:
        by_statement.setdefault(outcome["statement"], []).append(outcome)
    lines = [f"| statement | {' | '.join(strengths)} |", "|---|" + "---|" * len(strengths)]
    for key, (title, about, *_) in STATEMENTS.items():
        own = by_statement.get(key, [])
        counts = [_strength([o for o in own if o["strength"] == name]) for name in strengths]
        lines.append(f"| {title}: {about} | {' | '.join(counts)} |")
    held = sum(outcome["passed"] for outcome in outcomes)
    return "\n".join([*lines, "", f"{held} of {len(outcomes)} rows hold. Numbers are cases."])


def _strength(outcomes: list[dict[str, Any]]) -> str:
    if not outcomes:
        return "–"
    count = sum(outcome["cases"] for outcome in outcomes)
    return f"{count:,}".replace(",", " ") + ("" if all(o["passed"] for o in outcomes) else " FAILS")


def verdict(statement: str) -> str:
    """Return how a statement was checked, and whether it holds, in one line."""
    outcomes = json.loads((RESULTS / "proofs.json").read_text(encoding="utf-8"))
    own = [outcome for outcome in outcomes if outcome["statement"] == statement]
    by_check: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for o in own:
        by_check.setdefault((o["check"], o["strength"]), []).append(o)
    checks = ", ".join(f"`{c}` ({kind}, {_strength(of)})" for (c, kind), of in by_check.items())
    if not own:
        return "**Check:** none recorded yet. **Verdict:** open."
    holds = "holds" if all(outcome["passed"] for outcome in own) else "DOES NOT HOLD"
    return f"**Check:** {checks}. **Verdict:** {holds}."


def field_verdicts() -> str:
    """Return a table of the checks and verdicts of the rules of the field."""
    lines = ["| statement | check and verdict |", "|---|---|"]
    lines += [f"| {s.title}: {s.says} | {verdict(key)} |" for key, s in FIELD_STATEMENTS.items()]
    return "\n".join(lines)


def results_tables() -> str:
    """Return Table 2's cells with K = 16 at every scale with records of its own."""
    blocks = []
    for scale in (scale for scale in scales.SCALES.values() if not scale.shares):
        rows = _recorded(scale.file)
        found = [e for e in entries(2, rows, scale) if e.run.workers == 16]
        if not found:
            continue
        names = list(tables.METHODS)
        lines = [
            f"**`{scale.name}`: {scale.about}.** Test accuracy % (± std of several seeds) / "
            f"training loss, K = 16, Table 2 ({len(rows)} runs; [all tables and figures]"
            f"(../experiments/results/{scale.name}/report.md)):",
            "",
            f"| data | scenario | S | {' | '.join(names)} |",
            "|---|---|---|" + "---|" * len(names),
        ]
        groups: dict[tuple, dict[str, Entry]] = {}
        for entry in found:
            run = entry.run
            key = (run.dataset, run.scenario, run.local_iterations)
            groups.setdefault(key, {})[run.method] = entry
        for key, group in groups.items():
            values = [both_metrics(group.get(method)) for method in tables.METHODS.values()]
            lines.append(f"| {' | '.join(map(str, key))} | {' | '.join(values)} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def both_metrics(entry: Entry | None) -> str:
    """Return a cell of :func:`results_tables`; a dash until its learning rate is chosen."""
    if entry is None:
        return "–"
    accuracy, loss = (
        entry._replace(number=entry.number._replace(metric=metric))
        for metric in ("test_accuracy", "train_loss")
    )
    if accuracy.mean() is None:
        return "–" if accuracy.search.untried else "diverged"
    return f"{accuracy.mean():.2f}{accuracy.spread()} / {loss.mean():.3g}"


def of_scale(lines: Callable[..., list[str]], name: str, table: int, **options: Any) -> str:
    """Return the lines about a table of the paper at a scale, without the table's heading."""
    rows = _recorded(scales.SCALES[name].file)
    made = lines(table, rows, scales.SCALES[name], **options)
    shown = "\n".join(line for line in made if not line.startswith("## ")).strip()
    return shown or ("No cell is complete yet." if rows else "Not run yet.")


@functools.cache
def _recorded(file: str) -> Rows:
    return recorded(RESULTS / file)


def best_methods() -> str:
    """Return the best methods of each cell of the comparison, from its reports."""
    shown = ("orlomo", "al_sgd", "diloco")
    lines = [
        f"| cluster, data | first | second | {' | '.join(f'`{name}`' for name in shown)} |",
        "|---|---|---|---|---|---|",
    ]
    for folder, note in (("", ""), ("tuned_on_dirichlet", ", tuned on this data")):
        text = (RESULTS / "compare" / folder / "report.md").read_text(encoding="utf-8")
        for cell in re.split(r"^## ", text, flags=re.M)[1:]:
            title, _, body = cell.partition("\n")
            rows = re.findall(r"^\| (\w+) \| \d+ \|[^|]*\|[^|]*\| (\S+) ±", body, re.M)
            loss = {name: value for name, value in rows if name != "local_ormo_da"}
            names = list(loss)
            best = [f"`{name}`<br>{float(loss[name]):.2g}" for name in names[:2]]
            places = [
                f"{float(loss[name]):.2g}<br>place\u00a0{names.index(name) + 1}" for name in shown
            ]
            cluster, data = re.findall(r"(\w+) \(K = \d+\), (\S+)", title)[0]
            lines.append(f"| `{cluster}`,<br>{data}{note} | {' | '.join([*best, *places])} |")
    return "\n".join(lines)


def language_tables() -> str:
    """Return the table of each cluster of the language study."""
    rows = records.read(RESULTS / "language" / "rows.jsonl")
    blocks = []
    for title, purpose, cluster in (
        *((f"`{cluster}`", "study", cluster) for cluster in study.CLUSTERS),
        ("`equal`, after a warm start", "warm", "equal"),
    ):
        of_arm = study_report.of_cluster(rows, purpose, cluster)
        if of_arm.keys() - {arm.name for arm in study.ARMS if arm.reference}:
            blocks.append([f"**{title}**", "", *study_report.table(study.ARMS, of_arm, cluster)])
    return "\n\n".join("\n".join(lines) for lines in blocks)


def language_summary() -> str:
    """Return the gap and the time of the study's main methods on its first two clusters."""
    rows = records.read(RESULTS / "language" / "rows.jsonl")
    lines = [
        "| server | equal workers: perplexity against DiLoCo (95 %) | time | speeds 4:1 | time |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in study_report.STYLES:
        cells = [f"`{name}`" + (", synchronous" if name == "diloco" else "")]
        for cluster in study.CLUSTERS[:2]:
            of_arm = study_report.of_cluster(rows, "study", cluster)
            cells += study_report.compared(of_arm, name, cluster)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def benchmark_table() -> str:
    """Return the table of benchmarks that have a bar."""
    rows = chart.newest(records.read(RESULTS / "benchmarks" / "benchmarks.jsonl"))
    return "\n".join(chart.table([row for row in rows if row["bar"] is not None])).rstrip()


AGREEMENTS = (
    *(("small", 1), ("small", 2)),
    *(("slim", 2), ("slim", 4), ("slim", 6)),
    *(("fits", 2), ("fits", 4)),
)
"""Scales, and tables of the paper, that are compared cell by cell."""

BLOCKS: dict[str, Callable[[], str]] = (
    {
        "quickstart": quickstart_table,
        "theory": theory_table,
        "verdicts-field": field_verdicts,
        "results": results_tables,
        "which-method": best_methods,
        "benchmarks": benchmark_table,
        "language": language_tables,
        "language-short": language_summary,
    }
    | {
        f"verdict-{key}": functools.partial(verdict, key)
        for key in STATEMENTS
        if key not in FIELD_STATEMENTS
    }
    | {
        f"agreement-{name}-{table}": functools.partial(of_scale, agreement.agreement, name, table)
        for name, table in AGREEMENTS
    }
    | {
        f"rates-{name}": functools.partial(of_scale, agreement.rates, name, 2)
        for name in ("slim", "fits")
    }
    | {
        f"time-{name}": functools.partial(of_scale, against_prsgdm.at_the_same_time, name, 2)
        for name in ("small", "slim")
    }
    | {
        f"same-rate-{name}-{table}": functools.partial(
            of_scale, against_prsgdm.at_the_same_rate, name, table
        )
        for name, table in AGREEMENTS
        if table in (2, 4)
    }
    | {
        f"same-time-{table}": functools.partial(
            of_scale, against_prsgdm.planned_for_the_same_time, "same_time", table
        )
        for table in (2, 4)
    }
    | {
        f"barrier-{table}": functools.partial(
            of_scale, against_prsgdm.with_a_barrier, "barrier", table
        )
        for table in (2, 4)
    }
    | {
        f"cells-{name}-3": functools.partial(of_scale, report.table_lines, name, 3)
        for name in ("small", "slim")
    }
    | {
        f"cells-{table}": functools.partial(
            of_scale, report.table_lines, "paper", table, empty=True
        )
        for table in tables.SOURCES
    }
)


def render(text: str) -> str:
    """Return a page with every block rendered again.

    Raises:
        ValueError: If a block is unknown.
    """

    def block(match: re.Match[str]) -> str:
        if match[1] not in BLOCKS:
            raise ValueError(f"block must be one of {sorted(BLOCKS)}, got {match[1]!r}")
        return f"<!-- block {match[1]} -->\n\n{BLOCKS[match[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- block (\S+) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


def main() -> None:
    """Update all pages that have a block."""
    argparse.ArgumentParser(prog="python -m experiments.readme", description=__doc__).parse_args()
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        if (text := render(before)) != before:
            records.write(page, text)


if __name__ == "__main__":
    main()

"""The paper's tables and figures, at a scale that fits the machine.

``python -m experiments.reproduce --table 2 --scale digits`` runs the cells that the records lack.
Every method chooses its learning rate from the scale's one grid, with seed 0, by training loss:
from the middle of the grid on, until a rate is better than both beside it. The other seeds run at
that rate. Kill it when you like: what is recorded is not run again.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro
from rich.console import Console

from experiments import cells, execution, records
from experiments.checks import check
from experiments.decoded import DataError
from experiments.runs import Run
from experiments.train import progress_bar, reporter
from orlomo_jax import Checkpoints

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Reproduce:
    """Which cells to run; give --table or --figure."""

    table: Literal[1, 2, 3, 4, 5, 6] | None = None
    """Table of the paper; 4 and 5 are the training losses of 2 and 1."""
    figure: Literal[2, 3, 4, 5, 6] | None = None
    """Figure of the paper."""
    scale: Literal["paper", "small", "digits", "smoke"] = "digits"
    """How large the runs are."""
    only: str = ""
    """Cells of the paper's to keep, by its models and data sets whatever the scale, as
    field=value[|value],… (workers=16,local_iterations=32)."""
    seeds: int | None = None
    """Seeds at the chosen learning rate; by default the scale's."""
    data_dir: Path | None = None
    """The TFDS data_dir; by default $TFDS_DATA_DIR or TFDS's own."""
    output: Path | None = None
    """File of the records; by default experiments/results/SCALE.jsonl."""
    retry_failed: bool = False
    """Run again what is recorded as failed."""


def recorded(path: Path) -> dict[Run, dict[str, Any]]:
    """Return the rows of a file by run; of equal runs the last.

    A run that repeated other arrivals than its scenario's is none of a cell's and left out.

    Raises:
        ValueError: If a row is no run of this project's; the message names file and line.
    """
    rows = {}
    for number, row in enumerate(records.read(path), 1):
        try:
            run = Run(**row["run"])
            _check(row)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number} is not the row of a run: {error}") from None
        if not row.get("replayed"):
            rows[run] = row
    return rows


def _check(row: dict[str, Any]) -> None:
    """Raise where a row lacks what tables and figures are made of."""
    environment = row["environment"]
    for name in ("device", "cpus", "jax"):
        environment[name]
    if row["status"] not in ("finished", "diverged", "failed"):
        raise ValueError(f"its status is {row['status']!r}")
    if row["status"] == "finished":
        for metric in ("train_loss", "test_accuracy"):
            check(metric, row[metric], math.isfinite, "finite")
            if not row["curve"][metric]:
                raise ValueError(f"its curve has no {metric}")


class Search(NamedTuple):
    """How far a cell has come in choosing its learning rate."""

    best: float
    """Of the grid's rates that are recorded that of the lowest training loss with seed 0."""
    statuses: dict[float, str]
    """Of each recorded rate."""
    untried: tuple[float, ...]
    """Rates to try next, ``best`` and those beside it; none where the search is at its end."""

    @property
    def chosen(self) -> float | None:
        """The cell's rate; None where it is not found yet, or nothing finished."""
        return None if self.untried or "finished" not in self.statuses.values() else self.best


def search(rows: dict[Run, dict[str, Any]], run: Run, scale: cells.Scale) -> Search:
    """Return where a cell's search stands.

    A rate that failed or diverged is worse than any other; of several, the lowest is the best.
    """
    grid = sorted(scale.learning_rates)
    tried = {rate: rows.get(replace(run, learning_rate=rate, seed=0)) for rate in grid}
    statuses = {rate: row["status"] for rate, row in tried.items() if row is not None}
    losses = {
        rate: row["train_loss"] if row["status"] == "finished" else math.inf
        for rate, row in tried.items()
        if row is not None
    }
    best = min(losses, key=losses.__getitem__, default=grid[len(grid) // 2])
    middle = grid.index(best)
    beside = grid[max(0, middle - 1) : middle + 2]
    return Search(best, statuses, tuple(rate for rate in beside if rate not in losses))


def missing(
    wanted: Sequence[Run], rows: dict[Run, dict[str, Any]], scale: cells.Scale, seeds: int
) -> Iterator[Run]:
    """Yield the runs to do, in order; ``rows`` must hold each before the next is asked for."""
    for run in wanted:
        while untried := search(rows, run, scale).untried:
            yield from (replace(run, learning_rate=rate, seed=0) for rate in untried)
        rate = search(rows, run, scale).chosen
        if rate is not None:
            repeats = [replace(run, learning_rate=rate, seed=seed) for seed in range(1, seeds)]
            yield from (repeat for repeat in repeats if repeat not in rows)


def run_cell(run: Run, settings: Reproduce, scale: cells.Scale, console: Console) -> dict[str, Any]:
    """Carry out one run and return its row; a failure becomes a row too."""
    name = f"{run.method} K={run.workers} S={run.local_iterations} γ={run.learning_rate:g}"
    label = f"{run.dataset} {run.scenario} {name} seed {run.seed}"
    checkpoint = None
    if scale.checkpoint_every:
        identity = hashlib.sha256(repr(run).encode()).hexdigest()[:16]
        folder = Path(".cache") / "checkpoints" / identity
        checkpoint = Checkpoints(folder, scale.checkpoint_every)
    start = time.perf_counter()
    try:
        with progress_bar(console) as progress:
            train_size = len(execution.assemble(run, settings.data_dir).train.labels)
            num_steps = run.num_steps(train_size)
            row, _ = execution.execute(
                run,
                settings.data_dir,
                evaluate_every=max(1, num_steps // cells.curve_points(run)),
                on_step=reporter(progress, label, run.epochs, num_steps),
                checkpoint=checkpoint,
                form=scale.form,
            )
    except DataError:
        raise
    except Exception as error:
        console.print(f"[red]failed[/red] {label}: {error}")
        return {
            "run": asdict(run),
            "status": "failed",
            "error": "".join(traceback.format_exception_only(error)).strip(),
            "wall_time": round(time.perf_counter() - start, 3),
            "environment": records.environment(),
        }
    if checkpoint is not None:
        shutil.rmtree(checkpoint.directory)
    loss = "diverged" if row["train_loss"] is None else f"loss {row['train_loss']:.4f}"
    console.print(f"{label}: {loss}, {row['wall_time']:.1f} s", highlight=False)
    return row


def main(args: Sequence[str] | None = None) -> None:
    """Run what is missing of a table or figure."""
    settings = tyro.cli(
        Reproduce, prog="python -m experiments.reproduce", args=args, description=__doc__
    )
    if (settings.table is None) == (settings.figure is None):
        raise SystemExit("give either --table or --figure")
    scale = cells.SCALES[settings.scale]
    path = settings.output or RESULTS / f"{scale.name}.jsonl"
    console = Console()
    try:
        at_paper = (
            cells.table_runs(settings.table)
            if settings.table is not None
            else cells.figure_runs(settings.figure or 0)
        )
        selected = cells.select(at_paper, settings.only)
        rows = recorded(path)
        seeds = scale.seeds if settings.seeds is None else settings.seeds
        check("seeds", seeds, lambda x: x >= 1, "≥ 1")
        records.check_writable(path)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
    if settings.retry_failed:
        rows = {run: row for run, row in rows.items() if row["status"] != "failed"}
    wanted = list(dict.fromkeys(cell_of(scale.shrink(run)) for run in selected))
    done = 0
    try:
        for run in missing(wanted, rows, scale, seeds):
            row = run_cell(run, settings, scale, console)
            records.append(path, row)
            rows[run] = row
            done += 1
    except (DataError, OSError) as error:  # a disk that is full
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted after {done} runs; they are in {path}") from None
    failed = sum(row["status"] == "failed" for run, row in rows.items() if cell_of(run) in wanted)
    again = f", {failed} runs failed: --retry-failed" if failed else ""
    console.print(f"{done} runs done, {len(wanted)} cells complete in {path}{again}")


def cell_of(run: Run) -> Run:
    """Return the run with what its cell does not fix set to its default."""
    return replace(run, learning_rate=0.0, seed=0)


if __name__ == "__main__":
    main()

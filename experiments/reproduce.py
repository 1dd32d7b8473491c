"""Run the cells of the paper's tables and figures, at a scale that fits the machine.

``python -m experiments.reproduce --table 2 --scale digits`` runs the cells that the records lack.
All methods choose their learning rate from one grid, with seed 0, by training loss. The search
starts in the middle of the grid and ends when a rate is better than both its neighbours. The other
seeds run at that rate. You can kill the command at any time: recorded runs are not run again.

``--budget SECONDS`` works through Tables 1 and 2, the most important cells first, and stops in
time. It saves a run that is not finished then, and the same command resumes it.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import tyro
from rich.console import Console

from experiments import records
from experiments.checks import check
from experiments.config import Run
from experiments.data.tfds_cache import DataError
from experiments.paper import choice, search, tables, tasks
from experiments.paper.tasks import Task, Way
from experiments.terminal import accept_any_terminal
from orlomo_jax import ProgressBar


@dataclass(frozen=True)
class Reproduce:
    """The cells to run; give --table, --figure or --budget."""

    table: Literal[1, 2, 3, 4, 5, 6] | None = None
    """Table of the paper; 4 and 5 are the training losses of 2 and 1."""
    figure: Literal[2, 3, 4, 5, 6] | None = None
    """Figure of the paper."""
    scale: Literal["paper", "small", "digits", "smoke", "rehearsal"] = "digits"
    """Size of the runs."""
    only: str = ""
    """Cells to keep, as field=value[|value],… (workers=16,local_iterations=32). The fields have the
    paper's values at every scale."""
    seeds: int | None = None
    """Number of seeds at the chosen learning rate; by default the scale's."""
    data_dir: Path | None = None
    """The TFDS data_dir; by default $TFDS_DATA_DIR or TFDS's own."""
    output: Path | None = None
    """File of the records; by default experiments/results/SCALE.jsonl."""
    retry_failed: bool = False
    """Repeat runs that are recorded as failed."""
    budget: float | None = None
    """Seconds after which to stop. Cells then run by importance, each first at one rate. Without
    --table and --figure they are the cells of Tables 1 and 2."""
    together: Literal["auto", "measured", "alone", "vmap", "processes"] = "auto"
    """How runs share the device: one after the other ("alone"), as one program ("vmap"), in
    separate processes, or in the fastest of these ways ("measured"); "auto" is "measured" on a GPU
    under a budget, else "alone"."""
    at_once: int = 4
    """The largest number of runs at the same time."""


def wanted_runs(settings: Reproduce, scale: tables.Scale) -> list[Run]:
    """Return the cells to run, in order.

    Raises:
        ValueError: If the settings name no cell.
    """
    if settings.table is not None and settings.figure is not None:
        raise ValueError("give either --table or --figure")
    if settings.table is not None:
        at_paper = tables.table_runs(settings.table)
    elif settings.figure is not None:
        at_paper = tables.figure_runs(settings.figure)
    elif settings.budget is not None:
        at_paper = tables.table_runs(1) + tables.table_runs(2)
    else:
        raise ValueError("give either --table or --figure, or a --budget")
    selected = tables.select(at_paper, settings.only)
    if settings.budget is not None:
        selected = sorted(selected, key=tables.importance)
    return list(dict.fromkeys(search.cell_of(scale.shrink(run)) for run in selected))


def choose_way(settings: Reproduce, path: Path, run: Run, scale: tables.Scale, log: Any) -> Way:
    """Return how runs share the device; measure it once per file of records if it is not given."""
    if settings.together == "vmap":
        return Way("vmap", settings.at_once, "matmul")
    if settings.together == "processes":
        return Way("processes", settings.at_once)
    measured = settings.budget is not None and jax.default_backend() == "gpu"
    if settings.together != "measured" and not (measured and settings.together == "auto"):
        return Way()
    middle = sorted(scale.learning_rates)[len(scale.learning_rates) // 2]
    return choice.choose(
        path.with_suffix(".together.json"),
        search.at(run, middle),
        choice.candidates(settings.at_once),
        settings.data_dir,
        log=log,
    )


def startup_time(rows: search.Rows) -> float:
    """Return the median seconds until a run's first segment ends on this device; 0 if unknown."""
    device = jax.devices()[0].device_kind
    times = [
        row["startup"]
        for row in rows.values()
        if "startup" in row and row["environment"]["device"] == device
    ]
    return statistics.median(times) if times else 0.0


def label_of(runs: Sequence[Run]) -> str:
    """Return a short label for runs that go together."""
    run, *others = runs
    name = f"{run.method} K={run.workers} S={run.local_iterations} γ={run.learning_rate:g}"
    more = f" and {len(others)} more" if others else ""
    return f"{run.dataset} {run.scenario} {name} seed {run.seed}{more}"


def carry_out(task: Task, runs: Sequence[Run], console: Console) -> list[dict[str, Any]]:
    """Carry out runs with a progress bar; print the outcome of each."""
    rows = task.carry_out(runs, [ProgressBar(label_of(runs), console)])
    for row in rows:
        label = label_of([Run(**row["run"])])
        if row["status"] == "failed":
            console.print(f"[red]failed[/red] {label}: {row['error']}")
            continue
        loss = "diverged" if row["train_loss"] is None else f"loss {row['train_loss']:.4f}"
        console.print(f"{label}: {loss}, {row['wall_time']:.1f} s", highlight=False)
    return rows


def main(args: Sequence[str] | None = None) -> None:
    """Run the missing cells of a table or figure."""
    accept_any_terminal()
    begin = time.time()
    settings = tyro.cli(
        Reproduce, prog="python -m experiments.reproduce", args=args, description=__doc__
    )
    scale = tables.SCALES[settings.scale]
    path = settings.output or records.RESULTS / f"{scale.name}.jsonl"
    console = Console()
    try:
        wanted = wanted_runs(settings, scale)
        rows = search.recorded(path)
        seeds = scale.seeds if settings.seeds is None else settings.seeds
        check("seeds", seeds, lambda x: x >= 1, "≥ 1")
        check("at_once", settings.at_once, lambda x: x >= 1, "≥ 1")
        if settings.budget is not None:
            check("budget", settings.budget, lambda x: x > 0, "> 0")
        records.check_writable(path)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
    if settings.retry_failed:
        rows = {run: row for run, row in rows.items() if row["status"] != "failed"}
    deadline = math.inf if settings.budget is None else begin + settings.budget
    done, in_time = 0, True
    try:
        if settings.budget is not None:
            _prepare_device()
        way = choose_way(settings, path, wanted[0], scale, console.print)
        task = Task(way, scale.compute, scale.checkpoint_every, settings.data_dir, deadline)
        families: dict[Run, list[Run]] = {}
        for run in wanted:
            families.setdefault(way.family(run), []).append(run)
        waves = search.waves(
            list(families.values()), rows, scale, seeds, breadth_first=settings.budget is not None
        )
        for runs in (group for wave in waves for group in way.groups(wave)):
            in_time = time.time() + startup_time(rows) + tasks.SAVING < deadline
            if not in_time:
                break
            new = carry_out(task, runs, console)
            records.append(path, *new)
            rows |= {Run(**row["run"]): row for row in new}
            done += len(new)
            in_time = len(new) == len(runs)
            if not in_time:
                break
            tasks.forget(runs)
    except (DataError, OSError) as error:  # such as a full disk
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted after {done} runs; they are in {path}") from None
    if not in_time:
        console.print(f"{done} runs done in the budget; run the same command to resume")
        return
    failed = sum(
        row["status"] == "failed" for run, row in rows.items() if search.cell_of(run) in wanted
    )
    again = f", {failed} runs failed: add --retry-failed to repeat them" if failed else ""
    console.print(f"{done} runs done, {len(wanted)} cells complete in {path}{again}")


def _prepare_device() -> None:
    """Let processes share the GPU's memory, and let later calls reuse compiled programs."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = str((tasks.CACHE / "compiled").absolute())
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        jax.config.update("jax_compilation_cache_dir", folder)


if __name__ == "__main__":
    main()

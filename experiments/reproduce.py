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
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import tyro
from rich.console import Console

from experiments import records
from experiments.checks import check
from experiments.compilation_cache import keep_compiled_programs
from experiments.config import Run
from experiments.data.tfds_cache import DataError
from experiments.models import native
from experiments.paper import choice, scales, search, tables, tasks
from experiments.paper.tasks import Task, Way
from experiments.terminal import accept_any_terminal
from experiments.threads import in_threads
from orlomo_jax import ProgressBar
from orlomo_jax.recording import SweepProgress


@dataclass(frozen=True)
class Reproduce:
    """The cells to run; give --table, --figure or --budget."""

    table: Literal[1, 2, 3, 4, 5, 6] | None = None
    """Table of the paper; 4 and 5 are the training losses of 2 and 1."""
    figure: Literal[2, 3, 4, 5, 6] | None = None
    """Figure of the paper."""
    scale: Literal[
        "paper", "small", "slim", "fits", "same_time", "barrier", "digits", "smoke", "rehearsal"
    ] = "digits"
    """Size of the runs."""
    only: str = ""
    """Cells to keep, as field=value[|value],… (workers=16,local_iterations=32). The fields have the
    paper's values at every scale."""
    seeds: int | None = None
    """Number of seeds at the chosen learning rate; by default the scale's."""
    data_dir: Path | None = None
    """The TFDS data_dir; by default $TFDS_DATA_DIR or TFDS's own."""
    output: Path | None = None
    """File of the records; by default experiments/results/SCALE.jsonl (same_time shares
    the file of slim)."""
    retry_failed: bool = False
    """Repeat runs that are recorded as failed."""
    budget: float | None = None
    """Seconds after which to stop. Cells then run by importance, each first at one rate. Without
    --table and --figure they are the cells of Tables 1 and 2."""
    together: Literal["auto", "measured", "alone", "threads", "vmap", "processes"] = "auto"
    """How runs share the device: one after the other ("alone"), in a thread per core ("threads"),
    as one program ("vmap"), in separate processes, or in the fastest of the other ways
    ("measured"). "auto" is "measured" on a GPU under a budget, "threads" for an MLP on a CPU
    without a budget, else "alone"."""
    at_once: int = 4
    """The largest number of runs at the same time, with "vmap" and "processes"."""


def wanted_runs(settings: Reproduce, scale: scales.Scale) -> list[Run]:
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


def choose_way(settings: Reproduce, path: Path, run: Run, scale: scales.Scale, log: Any) -> Way:
    """Return how runs share the device; measure it once per file of records if it is not given."""
    if settings.together == "vmap":
        return Way("vmap", settings.at_once, "matmul")
    if settings.together == "processes":
        return Way("processes", settings.at_once)
    small = run.model == "mlp" and jax.default_backend() == "cpu" and settings.budget is None
    if settings.together == "threads" or (settings.together == "auto" and small):
        return Way("threads", count=sys.maxsize)
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


class Work:
    """Carries out the missing runs of cells, and records each when it ends.

    Args:
        task: Settings of the runs.
        scale: The scale of the cells.
        seeds: Number of seeds at a cell's chosen rate.
        path: File of the records.
        rows: The recorded runs; new ones are added.
        console: Gets the outcomes.

    Attributes:
        done: The number of new runs.
    """

    def __init__(
        self,
        task: Task,
        scale: scales.Scale,
        seeds: int,
        path: Path,
        rows: search.Rows,
        console: Console,
    ) -> None:
        """Keep the arguments."""
        self.task, self.scale, self.seeds, self.path = task, scale, seeds, path
        self.rows, self.console, self.done = rows, console, 0
        self._lock = threading.Lock()
        self._bar: SweepProgress | None = None

    def carry_out(self, families: Sequence[Sequence[Run]], stop: threading.Event) -> bool:
        """Carry out families of cells; return whether all runs ended in time."""
        if self.task.way.how != "threads":
            return self._complete(families)
        if most := search.at_most(families, self.rows, self.scale, self.seeds):
            self._bar = SweepProgress(most, "train_loss", console=self.console)
        work = [partial(self._complete, [family]) for family in families]
        return all([*in_threads(work, stop)])

    def _complete(self, families: Sequence[Sequence[Run]]) -> bool:
        """Carry out families one after the other."""
        most = search.at_most(families, self.rows, self.scale, self.seeds)
        breadth_first = self.task.deadline < math.inf
        for wave in search.waves(
            families, self.rows, self.scale, self.seeds, breadth_first=breadth_first
        ):
            for runs in self.task.way.groups(wave):
                if not self._is_in_time():
                    return False
                if self._bar is None:
                    callbacks = [[ProgressBar(label_of(runs), self.console)]]
                else:
                    callbacks = [[self._bar.run(label_of([run]))] for run in runs]
                new = self.task.carry_out(runs, callbacks)
                self._record(new)
                most -= len(new)
                if len(new) < len(runs):
                    return False
                tasks.forget(runs)
        if self._bar is not None:
            with self._lock:
                self._bar.total -= most
        return True

    def _is_in_time(self) -> bool:
        """Return whether a run that starts now can begin before the deadline."""
        if self.task.deadline == math.inf:
            return True
        return time.time() + startup_time(self.rows) + tasks.SAVING < self.task.deadline

    def _record(self, new: Sequence[dict[str, Any]]) -> None:
        """Record rows and print their outcomes."""
        with self._lock:
            records.append(self.path, *new)
            self.rows |= {Run(**row["run"]): row for row in new}
            self.done += len(new)
        for row in new:
            label = label_of([Run(**row["run"])])
            if row["status"] == "failed":
                self.console.print(f"[red]failed[/red] {label}: {row['error']}")
                continue
            loss = "diverged" if row["train_loss"] is None else f"loss {row['train_loss']:.4f}"
            self.console.print(f"{label}: {loss}, {row['wall_time']:.1f} s", highlight=False)


def main(args: Sequence[str] | None = None) -> None:
    """Run the missing cells of a table or figure."""
    accept_any_terminal()
    begin = time.time()
    settings = tyro.cli(
        Reproduce, prog="python -m experiments.reproduce", args=args, description=__doc__
    )
    scale = scales.SCALES[settings.scale]
    path = settings.output or records.RESULTS / scale.file
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
        if scale.compute.convolution == "native":
            native.load()  # fails at once without a compiler
        keep_compiled_programs()
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
    if settings.retry_failed:
        rows = {run: row for run, row in rows.items() if row["status"] != "failed"}
    deadline = math.inf if settings.budget is None else begin + settings.budget
    stop = threading.Event()
    work = None
    try:
        if settings.budget is not None:
            # So that processes can share the GPU's memory.
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        way = choose_way(settings, path, wanted[0], scale, console.print)
        task = Task(
            way, scale.compute, scale.checkpoint_every, settings.data_dir, deadline, stop.is_set
        )
        families: dict[Run, list[Run]] = {}
        for run in wanted:
            families.setdefault(way.family(run), []).append(run)
        work = Work(task, scale, seeds, path, rows, console)
        in_time = work.carry_out(list(families.values()), stop)
    except (DataError, OSError) as error:  # such as a full disk
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        done = 0 if work is None else work.done
        raise SystemExit(f"interrupted after {done} runs; they are in {path}") from None
    done = work.done
    if not in_time:
        console.print(f"{done} runs done in the budget; run the same command to resume")
        return
    failed = sum(
        row["status"] == "failed" for run, row in rows.items() if search.cell_of(run) in wanted
    )
    again = f", {failed} runs failed: add --retry-failed to repeat them" if failed else ""
    console.print(f"{done} runs done, {len(wanted)} cells complete in {path}{again}")


if __name__ == "__main__":
    main()

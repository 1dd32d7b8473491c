"""Time the library against its limits; ``python -m experiments.benchmarks`` runs all of it.

That takes ten minutes on two cores, and tells something where nothing else runs on them.

Each row holds a figure, the limit measured in turn with it in the same run, and their ratio. Rows
go to the terminal and, with ``--output``, to a JSONL file with device and versions, of which
``python -m experiments.report --benchmarks FILE`` makes a table and a plot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from experiments import records
from experiments.benchmarks import runtimes, scaling, server, simulator, startup
from experiments.benchmarks.measure import Row

GROUPS: dict[str, Callable[[int], Iterator[Row]]] = {
    "server_step": server.step,
    "receive": server.receive,
    "finite": server.finite,
    "worker": simulator.worker,
    "simulator": simulator.simulator,
    "axes": simulator.axes,
    "workers": scaling.workers,
    "local_steps": scaling.local_steps,
    "parameters": scaling.parameters,
    "arrivals": scaling.arrivals,
    "memory": scaling.memory,
    "startup": startup.startup,
    "threads": runtimes.threads,
    "race": runtimes.race,
    "ray": runtimes.ray_round_trips,
}
"""Every group of figures, by name: a function of the number of repeats to rows."""


@dataclass(frozen=True)
class Benchmarks:
    """Which benchmarks to run."""

    only: tuple[str, ...] = tuple(GROUPS)
    """Groups to run."""
    repeats: int = 9
    """Measurements of each figure and of its limit, in turn."""
    output: Path | None = None
    """JSONL file that the rows are appended to."""
    appfl: Path | None = None
    """Python of an environment with APPFL 1.12, whose simulator then does the small job too."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the benchmarks."""
    settings = tyro.cli(
        Benchmarks, prog="python -m experiments.benchmarks", args=args, description=__doc__
    )
    if unknown := set(settings.only) - set(GROUPS):
        raise SystemExit(f"--only must be of {', '.join(GROUPS)}, got {', '.join(unknown)}")
    if settings.repeats < 1:
        raise SystemExit(f"--repeats must be ≥ 1, got {settings.repeats}")
    if "ray" in settings.only and find_spec("ray") is None:
        raise SystemExit("the group ray needs Ray (pip install 'orlomo-jax[ray]'); or give --only")
    if settings.appfl is not None and not simulator.has_appfl(settings.appfl):
        raise SystemExit(f"--appfl must be a Python that has APPFL, got {settings.appfl}")
    groups = {name: GROUPS[name] for name in settings.only}
    if settings.appfl is not None:
        groups["appfl"] = partial(simulator.against_appfl, python=settings.appfl)
    table = Table("benchmark", "figure", "limit", "", "ratio", "bar")
    console = Console()
    for group, rows in groups.items():
        for row in rows(settings.repeats):
            bar = "" if row.bar is None else f"{row.bar:.2f}"
            figures = (f"{row.figure:.4g}", f"{row.limit:.4g} ({row.against})", row.unit)
            table.add_row(row.benchmark, *figures, f"{row.ratio:.2f}", bar)
            console.print(f"{row.benchmark}: ratio {row.ratio:.2f} {bar}", highlight=False)
            if settings.output is not None:
                fields = {"group": group, **row._asdict()}
                records.append(settings.output, fields | {"environment": records.environment()})
    console.print(table)


if __name__ == "__main__":
    main()

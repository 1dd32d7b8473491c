"""Compare the library with its limits; ``python -m experiments.benchmarks`` runs all benchmarks.

The results are valid only if nothing else runs on the machine. ``--gpu`` runs the benchmarks of one
GPU instead.

Each row has a figure, a limit measured in turn with it in the same run, and their ratio. Rows go to
the terminal and, with ``--output``, to a JSONL file with device and versions.
``python -m experiments.report --benchmarks FILE`` makes a table and a plot of that file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import jax
import tyro
from rich.console import Console
from rich.table import Table

from experiments import records
from experiments.benchmarks import (
    field,
    first_step,
    gpu,
    kept_states,
    language,
    layers,
    networks,
    runtimes,
    scaling,
    server,
    simulator,
    stages,
    startup,
    sweep,
)
from experiments.benchmarks.gpu_training import TINY, Sizes
from experiments.benchmarks.measure import Row
from experiments.terminal import accept_any_terminal

GROUPS: dict[str, Callable[[int], Iterator[Row]]] = {
    "server_step": server.step,
    "rules": field.rules,
    "receive": server.receive,
    "finite": server.finite,
    "masters": server.masters,
    "worker": simulator.worker,
    "simulator": simulator.simulator,
    "optimizers": field.optimizers,
    "uneven": field.uneven,
    "language": language.language,
    "axes": simulator.axes,
    "sweep": sweep.sweep,
    "workers": scaling.workers,
    "local_steps": scaling.local_steps,
    "parameters": scaling.parameters,
    "arrivals": scaling.arrivals,
    "memory": scaling.memory,
    "kept_states": kept_states.kept_states,
    "startup": startup.startup,
    "layers": layers.layers,
    "first_step": first_step.first_step,
    "compiling": networks.compiling,
    "commands": sweep.commands,
    "threads": runtimes.threads,
    "int8_reports": runtimes.int8_reports,
    "race": runtimes.race,
    "ray": runtimes.ray_round_trips,
}
"""Maps the name of each group to its function from the number of repeats to rows."""
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
GPU_GROUPS = ("limits", "server_step", "resnet", "gradients", "profile")


@dataclass(frozen=True)
class Benchmarks:
    """The benchmarks to run."""

    only: tuple[str, ...] = ()
    """Groups to run; by default all of them."""
    repeats: int = 9
    """Measurements of each figure and of its limit, in turn (not with --gpu)."""
    output: Path | None = None
    """JSONL file that the rows are appended to."""
    appfl: Path | None = None
    """Python of an environment with APPFL 1.12: also time its simulator at the small job."""
    torch: Path | None = None
    """Python of an environment with PyTorch: also time training steps of ResNets."""
    gpu: bool = False
    """Run the benchmarks of one GPU instead."""
    tiny: bool = False
    """With --gpu: run them at a tiny size, also on a CPU."""
    budget: float = 170
    """Seconds for --gpu; a benchmark that is not expected to fit is left out."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the benchmarks."""
    accept_any_terminal()
    settings = tyro.cli(
        Benchmarks, prog="python -m experiments.benchmarks", args=args, description=__doc__
    )
    known = GPU_GROUPS if settings.gpu else tuple(GROUPS)
    if unknown := set(settings.only) - set(known):
        raise SystemExit(f"--only must be of {', '.join(known)}, got {', '.join(unknown)}")
    if settings.repeats < 1:
        raise SystemExit(f"--repeats must be ≥ 1, got {settings.repeats}")
    missed = stages.Missed([], [])
    rows = _of_gpu(settings, missed) if settings.gpu else _of_cpu(settings)
    table = Table("benchmark", "figure", "limit", "", "ratio", "bar")
    console = Console()
    for group, row in rows:
        bar = "" if row.bar is None else f"{row.bar:.2f}"
        figures = (f"{row.figure:.4g}", f"{row.limit:.4g} ({row.against})", row.unit)
        table.add_row(row.benchmark, *figures, f"{row.ratio:.2f}", bar)
        console.print(f"{row.benchmark}: ratio {row.ratio:.2f} {bar}", highlight=False)
        if settings.output is not None:
            fields = {"group": group, **row._asdict()}
            records.append(settings.output, fields | {"environment": records.environment()})
    console.print(table)
    for line in missed.left_out:
        console.print(f"left out: {line}", highlight=False)
    if missed.failed:
        raise SystemExit("\n".join(("failed:", *missed.failed)))


def _of_cpu(settings: Benchmarks) -> Iterator[tuple[str, Row]]:
    only = settings.only or tuple(GROUPS)
    if "ray" in only and find_spec("ray") is None:
        raise SystemExit(
            "the group ray needs Ray: pip install 'orlomo-jax[ray]', or choose groups with --only"
        )
    if settings.appfl is not None and not simulator.has_appfl(settings.appfl):
        raise SystemExit(f"--appfl must be a Python with APPFL, got {settings.appfl}")
    if settings.torch is not None and not networks.has_torch(settings.torch):
        raise SystemExit(f"--torch must be a Python with PyTorch, got {settings.torch}")
    groups = {name: GROUPS[name] for name in only}
    if settings.appfl is not None:
        groups["appfl"] = partial(simulator.against_appfl, python=settings.appfl)
    if settings.torch is not None:
        groups["torch"] = partial(networks.against_torch, python=settings.torch)
    for group, rows in groups.items():
        for row in rows(settings.repeats):
            yield group, row


def _of_gpu(settings: Benchmarks, missed: stages.Missed) -> Iterator[tuple[str, Row]]:
    if settings.tiny:  # must come before JAX starts; compiling takes most of the time
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_TO_COMPILE}"
    elif jax.default_backend() == "cpu":
        raise SystemExit("--gpu needs a GPU; --gpu --tiny runs the same at a tiny size on a CPU")
    only = settings.only or GPU_GROUPS
    planned = gpu.stages(TINY if settings.tiny else Sizes())
    return stages.run([x for x in planned if x.group in only], settings.budget, missed)


if __name__ == "__main__":
    main()

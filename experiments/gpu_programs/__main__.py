"""Inspect the program that XLA compiles for a GPU; ``python -m experiments.gpu_programs``.

It compiles a simulated run of ResNet20 on images like CIFAR10's for an H100 and an H200, and counts
kernels, launches, host waits and memory traffic of a local step. It needs JAX's CUDA plugin
(``pip install 'jax[cuda13]'``) but no GPU.

The seconds are predicted, not measured. On a real device, XLA tries out algorithms for convolutions
and tiles for matrix products. Without a device it uses defaults, so the figures may differ there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

from experiments.gpu_programs.inspection import Program, inspect, predict
from experiments.gpu_programs.targets import GPUS, compile_for, target
from experiments.gpu_programs.training import (
    BATCH_SIZE,
    LOCAL_STEPS,
    TRAIN_SIZE,
    WORKERS,
    training,
)
from experiments.terminal import accept_any_terminal


@dataclass(frozen=True)
class Inspection:
    """The programs to compile."""

    gpus: tuple[Literal["h100", "h200"], ...] = ("h100", "h200")
    """The GPUs to compile for."""
    convolutions: tuple[Literal["xla", "matmul"], ...] = ("xla", "matmul")
    """How to compute convolutions."""
    together: int = 1
    """Number of runs that one program computes together."""
    epochs: float = 160
    """Length of the run in the time prediction."""


def main(args: Sequence[str] | None = None) -> None:
    """Compile the programs and print a table of their figures."""
    accept_any_terminal()
    settings = tyro.cli(
        Inspection, prog="python -m experiments.gpu_programs", args=args, description=__doc__
    )
    local_steps = int(settings.epochs * TRAIN_SIZE / BATCH_SIZE)
    columns = []
    for name in settings.gpus:
        place = target(name)
        for convolution in settings.convolutions:
            function, arguments = training(convolution, settings.together)
            program = inspect(*compile_for(place, function, arguments))
            seconds = predict(program, GPUS[name], local_steps)
            columns.append((f"{name}, {convolution}", _figures(program, seconds, settings)))
    title = f"ResNet20, K = {WORKERS}, S = {LOCAL_STEPS}, batch {BATCH_SIZE}"
    table = Table("", *(head for head, _ in columns), title=title)
    for row in columns[0][1]:
        table.add_row(row, *(figures[row] for _, figures in columns))
    console = Console()
    console.print(table)
    console.print((__doc__ or "").split("\n\n")[-1].strip())


def _figures(program: Program, seconds: float, settings: Inspection) -> dict[str, str]:
    figures = {"runs together": str(settings.together)}
    for name, body in (("local step", program.step), ("rest of a round", program.round)):
        figures |= {
            f"{name}: kernels": str(len(body.kernels)),
            f"{name}: launches by the host": str(body.launches),
            f"{name}: host waits": str(body.waits),
            f"{name}: large copies": str(body.large_copies),
            f"{name}: GB": f"{body.bytes / 1e9:.3f}",
            f"{name}: GFLOP": f"{body.flops / 1e9:.2f}",
        }
    return figures | {
        "peak GB": f"{program.peak / 1e9:.2f}",
        f"predicted s for {settings.epochs:g} epochs": f"{seconds:.0f}",
        "predicted s per run": f"{seconds / settings.together:.0f}",
    }


if __name__ == "__main__":
    main()

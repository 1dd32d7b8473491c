"""Look at what XLA makes of a training run for a GPU; ``python -m experiments.gpu_programs``.

It compiles a simulated run of ResNet20 on images like CIFAR10's for an H100 and an H200, and tells
kernels, launches, host waits and memory traffic of a local step. It needs JAX's CUDA plugin
(``pip install 'jax[cuda13]'``) and no GPU.

The predicted seconds are no measurement. XLA tries out algorithms for convolutions and tiles for
matrix products on the device; without one it takes its defaults, so that these may change there.
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
    """What to compile."""

    gpus: tuple[Literal["h100", "h200"], ...] = ("h100", "h200")
    """For which GPUs."""
    convolutions: tuple[Literal["xla", "matmul"], ...] = ("xla", "matmul")
    """How convolutions are computed."""
    together: int = 1
    """Runs that one program computes side by side."""
    epochs: float = 160
    """Length of the run whose seconds are predicted."""


def main(args: Sequence[str] | None = None) -> None:
    """Compile, and print what came of it."""
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
        "of it for each run": f"{seconds / settings.together:.0f}",
    }


if __name__ == "__main__":
    main()

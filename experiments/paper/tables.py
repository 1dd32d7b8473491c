"""Defines the cells of the paper's tables and figures, and the scales to run them at."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from experiments.config import ComputeOptions, Run
from orlomo_jax.methods import METHOD_NAMES

METHODS = {
    "PRSGDm": "prsgdm",
    "AL-SGD": "al_sgd",
    "local OrMo-DA": "local_ormo_da",
    "OrLoMo": "orlomo",
}
"""Maps the paper's names of the methods, in the order of its columns, to ours."""

SOURCES = {1: 1, 2: 2, 3: 3, 4: 2, 5: 1, 6: 6}
"""The table that defines each table's runs; Tables 4 and 5 are training losses of 2 and 1."""

FIGURES = {
    2: (1, ("test_accuracy",)),
    3: (2, ("test_accuracy",)),
    4: (2, ("train_loss",)),
    5: (1, ("train_loss",)),
    6: (6, ("test_accuracy", "train_loss")),
}
"""For each figure: the table that defines its runs (K = S = 16), and its metrics."""


FIGURE_POINTS = 20
"""Evaluations of a run that a figure shows."""


class Number(NamedTuple):
    """One number of the paper: the cell's run at the paper's scale, and mean ± std (or None)."""

    table: int
    metric: str
    run: Run
    mean: float
    std: float | None


@cache
def paper_numbers() -> tuple[Number, ...]:
    """Return every number of Tables 1–6, in the paper's order."""
    with (Path(__file__).with_name("tables.csv")).open(encoding="utf-8") as file:
        return tuple(_number(row) for row in csv.DictReader(file))


def _number(row: dict[str, str]) -> Number:
    table = int(row["table"])
    run = Run(
        method=METHODS[row["method"]],  # pyright: ignore[reportArgumentType]
        model=row["model"].lower(),  # pyright: ignore[reportArgumentType]
        dataset=row["dataset"].replace("_", "-"),  # pyright: ignore[reportArgumentType]
        workers=int(row["workers"]),
        local_iterations=int(row["local_iterations"]),
    )
    if slow := re.fullmatch(r"one slow worker x(\d+) \(max delay (\d+)\)", row["scenario"]):
        run = replace(run, scenario="one_slow", slowdown=float(slow[1]), max_delay=int(slow[2]))
    else:
        slowdown = 4.0 if table == 6 else 2.0
        run = replace(run, scenario=row["scenario"], slowdown=slowdown)
    metric = {"test_accuracy": "test_accuracy", "training_loss": "train_loss"}[row["metric"]]
    std = float(row["std"]) if row["std"] else None
    return Number(table, metric, run, float(row["mean"]), std)


def paper_runs(number: Number) -> tuple[Run, ...]:
    """Return the runs of a number: in Table 3 one with the speed ratio and one with the delay."""
    run = number.run
    if run.scenario != "one_slow":
        return (run,)
    return (
        replace(run, max_delay=0),
        replace(run, scenario="one_delayed", slowdown=1.0),
    )


def table_runs(table: int) -> tuple[Run, ...]:
    """Return the distinct runs of a table at the paper's scale.

    Example:
        >>> len(table_runs(1)), table_runs(4) == table_runs(2), len(table_runs(3))
        (96, True, 10)
    """
    runs = [
        run
        for number in paper_numbers()
        if number.table == SOURCES[table]
        for run in paper_runs(number)
    ]
    return tuple(dict.fromkeys(runs))


def importance(run: Run) -> tuple:
    """Return a sort key for the runs of Tables 1 and 2, most important first.

    ResNet20 on CIFAR10 with K = 16, S = 32 and unequal workers is first. Equal workers, S = 16 and
    8, SqueezeNet, CIFAR100 and K = 8 follow in this order.
    """
    return (
        run.workers != 16,
        run.dataset != "cifar10",
        run.model != "resnet20",
        -run.local_iterations,
        run.scenario != "heterogeneous",
        METHOD_NAMES.index(run.method),
    )


def figure_runs(figure: int) -> tuple[Run, ...]:
    """Return the runs of a figure at the paper's scale.

    Example:
        >>> {(run.workers, run.local_iterations) for run in figure_runs(3)}
        {(16, 16)}
    """
    table, _ = FIGURES[figure]
    return tuple(run for run in table_runs(table) if _in_figures(run))


def _in_figures(run: Run) -> bool:
    return (run.workers, run.local_iterations) == (16, 16)


def curve_points(run: Run) -> int:
    """Return the number of evaluations of a run: fewer if no figure shows its curve.

    On slim models, evaluations take a large share of the time.
    """
    return FIGURE_POINTS if _in_figures(run) else 4


@dataclass(frozen=True)
class Scale:
    """A way to shrink the paper's runs so that they fit a machine.

    Attributes:
        name: Its name on the command line, and the stem of its file of records.
        about: One line for the reports.
        shrink: Maps a run of the paper to the run that is carried out.
        learning_rates: The grid that every method searches, with seed 0.
        seeds: Number of seeds at the chosen rate.
        checkpoint_every: Global iterations between checkpoints; 0 for none.
        compute: How the rounds are computed.
        shows_dependence: Whether the report shows results against S·K and the learning rate.
        shares: The scale whose file of records it shares; by default it has its own.
    """

    name: str
    about: str
    shrink: Callable[[Run], Run]
    learning_rates: tuple[float, ...]
    seeds: int
    checkpoint_every: int = 0
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    shows_dependence: bool = False
    shares: str = ""

    @property
    def file(self) -> str:
        """The name of the file of records."""
        return f"{self.shares or self.name}.jsonl"


def _on_digits(run: Run, epochs: float, batch_size: int) -> Run:
    return replace(
        run, model="mlp", dataset="digits", epochs=epochs, batch_size=batch_size, weight_decay=0.0
    )


def _small(run: Run) -> Run:
    """Shrink a run for a CPU. Batches of 16 give four times the reports of the paper's 64."""
    if run.model == "squeezenet":  # its three poolings would reduce 8×8 images to one pixel
        run = replace(run, width=0.125, pool=2, epochs=4)
    else:
        pool = 8 if run.dataset == "tiny-imagenet" else 4
        run = replace(run, model="resnet8", width=0.5, pool=pool, epochs=12)
    return replace(run, batch_size=16)


def _slim(run: Run) -> Run:
    """Shrink only the network and the images; T, K, S, batch, epochs and decay are the paper's."""
    if run.model == "squeezenet":
        return replace(run, width=0.125, pool=2)
    return replace(run, model="resnet8", width=0.5, pool=8 if run.dataset == "tiny-imagenet" else 4)


def _fits(run: Run) -> Run:
    """Shrink the training set too, at the same number of steps, so that the network can fit it."""
    run, kept = _slim(run), 5000
    whole = 100_000 if run.dataset == "tiny-imagenet" else 50_000
    epochs = run.epochs * whole / kept
    return replace(run, augmented=False, train_size=kept, epochs=epochs)


WAITING = {
    ("homogeneous", 8): 1.54,
    ("heterogeneous", 8): 2.21,
    ("homogeneous", 16): 1.62,
    ("heterogeneous", 16): 2.49,
}
"""PRSGDm's virtual time over OrLoMo's for the same epochs, by kind of workers and K (Table 2)."""


def _same_time(run: Run) -> Run:
    """As slim, but PRSGDm has only as many epochs as it completes in OrLoMo's virtual time.

    Raises:
        ValueError: If the cell's ratio of times is unknown.
    """
    if run.method != "prsgdm":
        return _slim(run)
    place = (run.scenario, run.workers)
    if place not in WAITING or run.dataset == "tiny-imagenet":
        raise ValueError(f"the scale same_time needs a cell of Table 1 or 2, got {place}")
    return replace(_slim(run), epochs=run.epochs / WAITING[place])


FULL_LENGTH: dict[str, Any] = {
    "learning_rates": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    "seeds": 3,
    "checkpoint_every": 2000,
    "compute": ComputeOptions("loop", convolution="native"),
    "shows_dependence": True,
}
"""Settings of the scales that train slim networks for as long as in the paper."""

SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            "paper",
            "the paper's models, data and 160 epochs",
            lambda run: run,
            (0.03, 0.1, 0.3),
            seeds=3,
            checkpoint_every=1000,
        ),
        Scale(
            "small",
            "slim models on real images averaged down, batch 16: ResNet8 of half the width on 8×8, "
            "12 epochs; SqueezeNet of an eighth of the width on 16×16, 4 epochs",
            _small,
            (0.004, 0.02, 0.1, 0.5, 2.5),
            seeds=2,
            # Faster for slim networks on one thread.
            compute=ComputeOptions("vmap", compute_batch=4),
        ),
        Scale(
            "slim",
            "slim models on real images averaged down, for as long as in the paper (batch 64, 160 "
            "epochs): ResNet8 of half the width on 8×8, SqueezeNet of an eighth of the width on "
            "16×16",
            _slim,
            **FULL_LENGTH,
        ),
        Scale(
            "fits",
            "the networks of slim on the first 5 000 training images, neither cropped nor flipped, "
            "for as many steps as in the paper: they can fit these images",
            _fits,
            **FULL_LENGTH,
        ),
        Scale(
            "same_time",
            "as slim, but PRSGDm ends when OrLoMo does: it has fewer epochs, since it waits",
            _same_time,
            shares="slim",
            **FULL_LENGTH,
        ),
        Scale(
            "digits",
            "an MLP on scikit-learn's digits, 200 epochs",
            lambda run: _on_digits(run, epochs=200, batch_size=32),
            (0.01, 0.03, 0.1, 0.3, 1.0),
            seeds=3,
        ),
        Scale(
            "smoke",
            "an MLP on scikit-learn's digits, 6 epochs: only shows that the commands run",
            lambda run: _on_digits(run, epochs=6, batch_size=8),
            (0.1,),
            seeds=1,
        ),
        Scale(
            "rehearsal",
            "ResNet8 of a quarter of the width on 4×4 pixels: only rehearses the scale paper",
            lambda run: replace(
                run,
                model="resnet8",
                width=0.25,
                pool=8,
                local_iterations=max(1, run.local_iterations // 16),
                batch_size=4,
                epochs=1,
            ),
            (0.1,),
            seeds=1,
        ),
    )
}


def select(runs: tuple[Run, ...], only: str) -> tuple[Run, ...]:
    """Return the runs that match ``only``, such as ``workers=16,method=orlomo|prsgdm``.

    Raises:
        ValueError: If a field is unknown or nothing matches; the message lists valid values.

    Example:
        >>> len(select(table_runs(2), "workers=16,local_iterations=32,method=orlomo|al_sgd"))
        8
    """
    names = {field.name for field in fields(Run)}
    for condition in filter(None, only.split(",")):
        name, equals, wanted = condition.partition("=")
        if name not in names or not equals:
            raise ValueError(
                f"`only` must be field=value[|value],…, with fields of {sorted(names)}; "
                f"got {condition!r}"
            )
        there = sorted({_text(getattr(run, name)) for run in runs})
        if unknown := set(wanted.split("|")) - set(there):
            raise ValueError(
                f"`only` must match a cell: {name} is one of {there}, got {sorted(unknown)}"
            )
        runs = tuple(run for run in runs if _text(getattr(run, name)) in wanted.split("|"))
    return runs


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)

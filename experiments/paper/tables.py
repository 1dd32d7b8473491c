"""Defines the cells of the paper's tables and figures."""

from __future__ import annotations

import csv
import re
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from experiments.config import Run
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

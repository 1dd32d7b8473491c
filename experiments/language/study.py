"""Runs the study of asynchronous language models; docs/language_study.md fixed it beforehand.

``python -m experiments.language.study`` carries out the runs that the rows lack, the most telling
first. You can stop it at any time. ``--part 0 2`` and ``--part 1 2`` share the work between two
commands. ``--report`` makes tables and figures from the rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from rich.console import Console

from experiments import records
from experiments.compilation_cache import keep_compiled_programs
from experiments.language import runs, study_report
from experiments.language.parts import LanguageRun, assemble
from experiments.terminal import accept_any_terminal

REPORTS, TUNING_REPORTS = 600, 300
"""Reports of a run with K = 4, S = 32 and batches of 8: 9.8 million tokens; and in tuning."""
SEEDS, TUNING_SEED = range(5), 100
CLUSTERS = ("equal", "forgather_4to1", "deepmind_toy", "halos_16")
WARM_SHARE = 0.25
"""The tokens of data-parallel training before a warm start, as a share of a run's."""


class Arm(NamedTuple):
    """A method of the study.

    Attributes:
        name: How rows and tables name it.
        settings: Its settings, if they are not the defaults of :class:`LanguageRun`.
        eta: Its default η; None if it does not have one.
        rates: The local learning rates γ to try.
        factors: The factors of η to try.
        buffer: Reports in a buffer, divided by K; 0 for none.
        reference: Whether it is synchronous.
    """

    name: str
    settings: dict[str, Any]
    eta: float | None = None
    rates: tuple[float, ...] = (0.003, 0.01)
    factors: tuple[float, ...] = (0.5, 1.0, 2.0)
    buffer: float = 0
    reference: bool = False

    @property
    def same_on(self) -> tuple[str, ...]:
        """The clusters on which a reference has the losses that it has on ``equal``."""
        return CLUSTERS[1:] if self.name == "data_parallel" else CLUSTERS[1:3]

    def points(self) -> Iterator[tuple[float, float]]:
        """Return the points to try: γ and the factor of η."""
        return ((rate, factor) for rate in self.rates for factor in self.factors)


def _arm(method: str, eta: float, *, name: str = "", buffer: float = 0, **settings: Any) -> Arm:
    return Arm(name or method, {"method": method, **settings}, eta, buffer=buffer)


DATA_PARALLEL = {"method": "al_sgd", "compute_times": "equal", "workers": 1, "batch_size": 32}
"""One worker with the batches of all four."""
ARMS = (
    _arm("diloco", 0.7)._replace(reference=True),
    _arm("delay_lookahead", 0.5),
    _arm("ordered_outer_momentum", 1.0),
    _arm("al_sgd", 1.0),
    _arm("delayed_nesterov", 0.7, buffer=2),
    Arm(
        "data_parallel",
        DATA_PARALLEL,
        rates=(0.001, 0.002, 0.003, 0.005, 0.01, 0.02),
        factors=(1.0,),
        reference=True,
    ),
    _arm("momentum_lookahead", 0.7),
    _arm("heloco", 0.7),
    _arm("fedbuff", 1.0, buffer=0.5),
    _arm("delayed_nesterov", 0.7, name="delayed_nesterov_dylu", buffer=2, local_steps="dynamic:32"),
    _arm("nesterov", 0.7),
    _arm("orlomo", 1.0)._replace(rates=(0.1, 0.3)),
)
FIRST = ("diloco", "delay_lookahead", "ordered_outer_momentum", "al_sgd", "delayed_nesterov")
"""The arms that run first, on equal workers and at 4:1."""


class Job(NamedTuple):
    """A run of the study; ``purpose`` is "tuning", "study" or "warm"."""

    arm: Arm
    purpose: str
    cluster: str
    seed: int
    rate: float
    factor: float

    @property
    def key(self) -> tuple[Any, ...]:
        """What identifies the run in the rows."""
        return self.arm.name, *self[1:]

    def run(self) -> LanguageRun:
        """Return the run's settings."""
        tuning = self.purpose == "tuning"
        run = LanguageRun(
            **{"compute_times": self.cluster, **self.arm.settings},
            learning_rate=self.rate,
            num_reports=TUNING_REPORTS if tuning else REPORTS,
            seed=self.seed,
        )
        if self.arm.eta is not None:
            run = replace(run, server_learning_rate=self.arm.eta * self.factor)
        if self.arm.name == "data_parallel":
            run = replace(run, num_reports=run.num_reports // 4)
        if self.arm.buffer:
            size = round(self.arm.buffer * run.cluster().num_workers)
            run = replace(run, buffer_size=size)
        return run


Rows = dict[tuple[Any, ...], dict[str, Any]]


def recorded(path: Path) -> Rows:
    """Return the rows of a file by the key of their run."""
    names = ("arm", "purpose", "cluster", "seed", "rate", "factor")
    return {tuple(row[name] for name in names): row for row in records.read(path)}


def chosen(arm: Arm, rows: Rows) -> tuple[float, float] | None:
    """Return the point of the lowest held-out loss in tuning; None before all points are tried."""
    losses = {}
    for job in tuning(arm):
        if job.key not in rows:
            return None
        loss = rows[job.key]["loss"]
        losses[job.rate, job.factor] = math.inf if loss is None else loss
    return min(losses, key=losses.__getitem__)


def tuning(arm: Arm) -> list[Job]:
    """Return the tuning runs of an arm, all on equal workers."""
    return [Job(arm, "tuning", "equal", TUNING_SEED, *point) for point in arm.points()]


def missing(arms: Sequence[Arm], rows: Rows) -> Iterator[Job]:
    """Yield the runs to do, in order; the caller must add each to ``rows`` before the next."""
    first = [arm for arm in arms if arm.name in FIRST]
    rest = [arm for arm in arms if arm.name not in FIRST]
    for cluster, group in (
        *((cluster, first) for cluster in CLUSTERS[:2]),
        *((cluster, rest) for cluster in CLUSTERS[:2]),
        ("warm", first),
        *((cluster, [*first, *rest]) for cluster in CLUSTERS[2:]),
    ):
        for arm in group:
            yield from (job for job in tuning(arm) if job.key not in rows)
        for seed in SEEDS:
            for arm in group:
                if arm.reference and cluster in arm.same_on:
                    continue
                point = chosen(arm, rows)
                assert point is not None
                purpose, where = ("warm", "equal") if cluster == "warm" else ("study", cluster)
                job = Job(arm, purpose, where, seed, *point)
                if job.key not in rows:
                    yield job


@lru_cache(maxsize=8)
def warm_params(seed: int) -> Any:
    """Return the parameters after data-parallel training on a share of a run's tokens."""
    run = LanguageRun(
        **DATA_PARALLEL,
        learning_rate=0.003,
        num_reports=round(WARM_SHARE * REPORTS / 4),
        seed=1000 + seed,
    )
    return runs.execute(run)[1].params


def carry_out(job: Job) -> dict[str, Any]:
    """Train once; return the row."""
    run = job.run()
    parts = assemble(run)
    if job.purpose == "warm":
        parts = parts._replace(start=parts.start._replace(params=warm_params(job.seed)))
    every = max(1, parts.start.trace.num_steps // 20)
    row, _ = runs.execute(run, parts=parts, evaluate_every=every)
    return {"arm": job.arm.name, **dict(zip(job._fields[1:], job[1:], strict=True)), **row}


@dataclass(frozen=True)
class Study:
    """What to do."""

    output: Path = records.RESULTS / "language" / "rows.jsonl"
    """File of the rows."""
    part: tuple[int, int] = (0, 1)
    """Which share of the arms to run: i of n."""
    report: bool = False
    """Make tables and figures from the rows, next to them, and run nothing."""


def main(args: Sequence[str] | None = None) -> None:
    """Carry out the missing runs, or make the report."""
    accept_any_terminal()
    settings = tyro.cli(
        Study, prog="python -m experiments.language.study", args=args, description=__doc__
    )
    console, (index, count) = Console(), settings.part
    if not 0 <= index < count:
        raise SystemExit(f"--part must be i n with 0 ≤ i < n, got {index} {count}")
    try:
        rows = recorded(settings.output)
        if settings.report:
            study_report.write(list(rows.values()), ARMS, settings.output.parent)
            return
        records.check_writable(settings.output)
    except (KeyError, OSError, ValueError) as error:
        raise SystemExit(f"{settings.output}: {error}") from None
    keep_compiled_programs()
    try:
        for job in missing(ARMS[index::count], rows):
            row = carry_out(job)
            records.append(settings.output, row)
            rows[job.key] = row
            console.print(f"{job.key}: loss {row['loss']}, {row['wall_time']:.0f} s")
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command resumes") from None


if __name__ == "__main__":
    main()

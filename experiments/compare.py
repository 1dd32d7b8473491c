"""Compare methods on the same cluster, with the same seeds and the same tuning budget.

``python -m experiments.compare --task quadratic --methods orlomo fedbuff --compute-times one_slow``
answers "which method, with which S, on my cluster?". Each method is tuned on the same grid of local
learning rates γ and factors of its own default η. Its best point, by the mean loss over the tuning
seeds, then runs with other seeds. All methods compute equally many gradients. The folder ``--out``
gets rows.jsonl, report.md and figures. The same command resumes an interrupted comparison.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.comparison import clusters, report, tasks
from experiments.comparison.clusters import ALL_METHODS, Cluster
from experiments.comparison.runs import Book, Job, Point, best_point, job
from experiments.compilation_cache import keep_compiled_programs
from experiments.data.tfds_cache import DataError
from experiments.terminal import accept_any_terminal


@dataclass(frozen=True)
class Config:
    """The settings of a comparison."""

    methods: tuple[str, ...] = ("all",)
    """Names of methods, or all."""
    compute_times: tuple[str, ...] = ("one_slow",)
    """Clusters: equal, one_slow (the last worker 10 times slower), or tables such as halos_16."""
    speeds: tuple[float, ...] = ()
    """Relative speeds of the workers, for example 1 1 2 4, instead of --compute-times."""
    trace: Path | None = None
    """A recorded trace or journal, whose compute times are fitted, instead of --compute-times."""
    trace_local_steps: int = 1
    """S of the recorded run."""
    variation: float | None = None
    """A round's time varies by ± this share; by default as in the cluster's model."""
    num_workers: int = 4
    """K, for clusters without a fixed number of workers."""
    local_steps: tuple[str, ...] = ("8",)
    """S: numbers, or dynamic:N (the fastest worker makes N local steps, slower ones fewer)."""
    seeds: int = 3
    """Runs at the best point; their seeds are not those of the tuning."""
    tuning_seeds: int = 1
    """Runs at each point of the grid."""
    num_gradients: int = 4096
    """The gradients of each run, over all workers."""
    learning_rates: tuple[float, ...] = (0.02, 0.1, 0.5)
    """The grid of γ."""
    eta_factors: tuple[float, ...] = (0.3, 1.0, 3.0)
    """The grid of factors that multiply each method's own default η."""
    task: str = "quadratic"
    """quadratic, softmax, digits, cifar, or module:function that returns a Task."""
    partition: tuple[str, ...] = ("iid",)
    """How workers share the data: iid, dirichlet:ALPHA or classes:N. The first is tuned on."""
    optimizer: str = "sgd"
    """The workers' optimizer, sgd or adamw; OrLoMo and PRSGDm always run momentum SGD."""
    batch_size: int = 16
    """Examples in one local step."""
    time: float | None = None
    """The virtual time of the ranking; by default the time at which the first method ends."""
    out: Path = Path("compare_output")
    """Folder of rows.jsonl, report.md and the figures."""

    def __post_init__(self) -> None:
        """Raise ValueError for settings that no run could use."""
        if unknown := set(self.methods) - {*ALL_METHODS, "all"}:
            raise ValueError(
                f"`methods` must be all or of {', '.join(ALL_METHODS)}, got {sorted(unknown)[0]!r}"
            )
        if self.optimizer not in clusters.OPTIMIZERS:
            raise ValueError(f"`optimizer` must be sgd or adamw, got optimizer={self.optimizer!r}")
        for name in ("num_workers", "seeds", "tuning_seeds", "num_gradients", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be ≥ 1, got {name}={getattr(self, name)}")
        for name in ("methods", "compute_times", "local_steps", "partition"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):  # a run would count twice
                raise ValueError(f"`{name}` must be distinct, at least one, got {name}={values}")
        for name in ("learning_rates", "eta_factors"):
            values = getattr(self, name)
            valid = all(0 < x < math.inf for x in values)
            if not values or not valid or len(set(values)) < len(values):
                raise ValueError(f"`{name}` must be distinct, finite and > 0, got {name}={values}")
        if self.time is not None and not 0 < self.time < math.inf:
            raise ValueError(f"`time` must be finite and > 0, got time={self.time}")
        if self.speeds and self.trace:
            raise ValueError("`speeds` and `trace` both describe the cluster: pass only one")

    @property
    def method_names(self) -> tuple[str, ...]:
        """The methods to compare."""
        return ALL_METHODS if "all" in self.methods else self.methods

    def clusters(self) -> list[Cluster]:
        """Return the clusters to compare on."""
        if self.speeds:
            return [clusters.cluster_of_speeds(self.speeds, self.variation)]
        if self.trace is not None:
            return [clusters.cluster_of_trace(self.trace, self.trace_local_steps)]
        names = self.compute_times
        return [clusters.named_cluster(name, self.num_workers, self.variation) for name in names]


class Comparison:
    """The jobs of a comparison."""

    def __init__(self, config: Config) -> None:
        """Load the task, describe the clusters, and check that every run can start."""
        self.config, self.clusters = config, config.clusters()
        self.task = tasks.load(config.task, config.batch_size)
        for cluster, partition in itertools.product(self.clusters, config.partition):
            tasks.check_start(config.task, self.task, cluster.num_workers, partition)
        self.candidates = list(
            itertools.product(config.method_names, config.local_steps, self.clusters)
        )
        for name, local_steps, cluster in self.candidates:
            steps = cluster.local_steps(local_steps)
            method = clusters.make(name, cluster.num_workers, steps, 1.0, config.optimizer)
            cluster.arrivals(method, config.num_gradients, 0)

    def tuning(self, method: str, local_steps: str, cluster: Cluster) -> list[Job]:
        """Return the runs of the whole grid, on the first partition."""
        config = self.config
        return [
            self._job(cluster, method, Point(rate, factor), local_steps, "tuning", seed)
            for factor in config.eta_factors
            for rate in config.learning_rates
            for seed in range(config.tuning_seeds)
        ]

    def final(self, method: str, local_steps: str, cluster: Cluster, point: Point) -> list[Job]:
        """Return the runs at the best point, for each partition."""
        begin = self.config.tuning_seeds
        return [
            self._job(cluster, method, point, local_steps, "final", seed, partition)
            for partition in self.config.partition
            for seed in range(begin, begin + self.config.seeds)
        ]

    def num_runs(self) -> int:
        """Return the number of runs if each method has a best point."""
        config = self.config
        grid = len(config.learning_rates) * len(config.eta_factors) * config.tuning_seeds
        return len(self.candidates) * (grid + len(config.partition) * config.seeds)

    def jobs(self, book: Book) -> Iterator[list[Job]]:
        """Yield the runs in order, in groups; a method's final runs depend on its tuning."""
        for candidate in self.candidates:
            yield (tuning := self.tuning(*candidate))
            if (point := best_point(book.of(tuning))) is not None:
                yield self.final(*candidate, point)

    def _job(self, cluster, method, point, local_steps, purpose, seed, partition=None) -> Job:
        config = self.config
        shared: dict[str, Any] = {
            "task": config.task,
            "optimizer": config.optimizer,
            "batch_size": config.batch_size,
            "num_gradients": config.num_gradients,
            "local_steps": local_steps,
        }
        partition = config.partition[0] if partition is None else partition
        own = {"purpose": purpose, "seed": seed, "partition": partition}
        return job(self.task, cluster, method, point, shared, **own)


def run_all(comparison: Comparison, book: Book, console: Console) -> list[dict[str, Any]]:
    """Carry out the runs that the file lacks; return all rows of the comparison."""
    rows = []
    columns = (
        TextColumn("{task.description}", justify="left"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("runs"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("starting", total=comparison.num_runs())

        def on_row(row):
            rows.append(row)
            setting = row["setting"]
            label = f"{setting['method']} on {setting['cluster']}, {setting['purpose']}"
            progress.update(bar, advance=1, description=label)

        book.complete(comparison.jobs(book), on_row)
    return rows


def main(args: Sequence[str] | None = None) -> None:
    """Run the comparison from the command line."""
    accept_any_terminal()
    plt.switch_backend("agg")
    console = Console()
    try:
        config = tyro.cli(
            Config, prog="python -m experiments.compare", args=args, description=__doc__
        )
        keep_compiled_programs()
        comparison = Comparison(config)
        book = Book(config.out / "rows.jsonl")
    except (ValueError, OSError, DataError) as error:
        raise SystemExit(str(error)) from None
    try:
        rows = run_all(comparison, book, console)
    except KeyboardInterrupt:
        raise SystemExit(
            f"interrupted; finished runs are in {book.path}, and the same command resumes"
        ) from None
    report.write(rows, config.time, config.out, console)


if __name__ == "__main__":
    main()

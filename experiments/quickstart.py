"""Compare four methods under the same delays on real digits.

``python -m experiments.quickstart`` trains a small network with OrLoMo, PRSGDm, AL-SGD and local
OrMo-DA on 16 workers; a quarter of them are slow. Each method uses the best learning rate of one
grid, over three seeds. The command prints a table, draws loss and accuracy against virtual time,
and records each run as a JSON row.
"""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments import records
from experiments.compilation_cache import keep_compiled_programs
from experiments.data import datasets
from experiments.models import mlp
from experiments.paper.figures import LABELS, TITLES, draw_band
from experiments.terminal import accept_any_terminal
from experiments.threads import in_threads
from orlomo_jax import (
    RunStart,
    TrainingResult,
    heterogeneous,
    make_method,
    sample_trace,
    simulate_many,
)
from orlomo_jax.methods import METHOD_NAMES
from orlomo_jax.recording import SweepProgress


@dataclass(frozen=True)
class Config:
    """The quickstart's settings."""

    workers: int = 16
    """K, the number of workers."""
    local_iterations: int = 32
    """S, the number of local steps in a round."""
    slow_fraction: float = 0.25
    """The share of slow workers."""
    slowdown: float = 2.0
    """How many times longer a slow worker's gradient takes."""
    variation: float = 0.2
    """A worker's gradient time varies by ± this share; small, so that slow workers stand out."""
    epochs: int = 400
    """Passes over the training set, counted over all workers."""
    batch_size: int = 32
    """Examples in one local step."""
    hidden: int = 64
    """Width of the hidden layer."""
    momentum: float = 0.9
    """β of server and workers."""
    learning_rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    """The grid of local learning rates, the same for each method."""
    seeds: int = 3
    """Runs for each learning rate."""
    output: Path = Path("quickstart_output")
    """Folder of runs.jsonl and quickstart.png; existing files are replaced."""

    def __post_init__(self) -> None:
        """Raise ValueError for settings that the library would refuse too late or not at all."""
        for name in ("workers", "local_iterations", "epochs", "batch_size", "hidden", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be ≥ 1, got {name}={getattr(self, name)}")
        rates = self.learning_rates
        if not rates or min(rates) <= 0 or len(set(rates)) < len(rates):
            raise ValueError(
                f"`learning_rates` must be distinct and > 0, got learning_rates={rates}"
            )


class Experiment:
    """The data, methods and compiled functions that all runs share."""

    def __init__(self, config: Config) -> None:
        """Load the data and prepare the methods."""
        self.config = config
        with ThreadPoolExecutor() as pool:  # compiles while scikit-learn is imported
            beginnings = [pool.submit(self._beginning, seed) for seed in range(config.seeds)]
            self.train, test = datasets.digits()
        self.beginnings = [beginning.result() for beginning in beginnings]
        self.batch_fn = datasets.shuffled_batches(
            self.train, config.batch_size, config.local_iterations
        )
        self.methods = {
            name: make_method(
                name, config.workers, config.local_iterations, momentum=config.momentum
            )
            for name in METHOD_NAMES
        }
        per_report = config.batch_size * config.local_iterations
        reports = config.epochs * len(self.train.labels) // per_report
        self.num_steps = reports - reports % config.workers  # whole rounds for PRSGDm
        if self.num_steps == 0:
            raise ValueError(
                f"`epochs` must give each worker a report, got epochs={config.epochs}, {reports} "
                f"reports in total"
            )
        self.compute_times = heterogeneous(config.slow_fraction, config.slowdown, config.variation)

        @jax.jit
        def evaluate(params, model_state):
            train_loss, _ = mlp.loss_fn(params, model_state, self.train, None)
            hits = mlp.logits(params, test.images).argmax(-1) == test.labels
            return {"train_loss": train_loss, "test_accuracy": 100 * hits.mean()}

        self.evaluate = evaluate

    def _beginning(self, seed: int) -> tuple[Any, jax.Array]:
        """Return the initial parameters and the key of the runs of a seed."""
        init_key, run_key = jax.random.split(jax.random.key(seed))
        return mlp.init(init_key, (64, self.config.hidden, 10)), run_key

    def sweep(self, name: str, bar: SweepProgress, stop: threading.Event) -> list[dict[str, Any]]:
        """Train with every learning rate and seed; return the runs' rows, [] after ``stop``.

        The ``wall_time`` of a row is that of the whole sweep of ``together`` runs. The other
        methods' sweeps run at the same time.
        """
        config, method = self.config, self.methods[name]
        start = time.perf_counter()
        points = [(rate, seed) for rate in config.learning_rates for seed in range(config.seeds)]
        runs = []
        for rate, seed in points:
            trace = sample_trace(
                self.compute_times,
                config.workers,
                self.num_steps,
                config.local_iterations,
                seed,
                synchronous=method.synchronous,
            )
            params, key = self.beginnings[seed]
            callback = bar.run(f"{TITLES[name]} γ={rate:g} seed {seed}")
            runs.append(RunStart(params, trace, key, rate, callbacks=[callback]))
        results = simulate_many(
            method,
            mlp.loss_fn,
            self.batch_fn,
            runs,
            evaluate=self.evaluate,
            evaluate_every=max(1, self.num_steps // 20),
            stop=stop.is_set,
            over_runs="loop",  # the same rows as single runs, bit for bit
        )
        if results is None:
            return []
        wall_time = time.perf_counter() - start
        return [
            self._row(name, *point, result, wall_time)
            for point, result in zip(points, results, strict=True)
        ]

    def _row(
        self, name: str, learning_rate: float, seed: int, result: TrainingResult, wall_time: float
    ) -> dict[str, Any]:
        config, evaluations = self.config, result.history.evaluations
        curve: dict[str, list] = {"virtual_time": [evaluation.time for evaluation in evaluations]}
        for metric in ("train_loss", "test_accuracy"):
            values = [evaluation.metrics[metric] for evaluation in evaluations]
            curve[metric] = [value if math.isfinite(value) else None for value in values]
        # Finite parameters may still be too large for a finite loss.
        finished = result.status == "finished" and curve["train_loss"][-1] is not None
        return {
            "experiment": "quickstart",
            "method": name,
            "learning_rate": learning_rate,
            "seed": seed,
            "status": "finished" if finished else "diverged",
            "diverged_at": result.diverged_at,
            "num_steps": self.num_steps,
            "max_delay": int(result.trace.max_delay),
            "virtual_time": float(result.trace.times[-1]),
            "wall_time": wall_time,
            "together": len(config.learning_rates) * config.seeds,
            "train_loss": curve["train_loss"][-1] if finished else None,
            "test_accuracy": curve["test_accuracy"][-1] if finished else None,
            "curve": curve,
            "config": {**asdict(config), "output": None},
            "environment": records.environment(),
        }


def run_all(experiment: Experiment, console: Console) -> list[dict[str, Any]]:
    """Run every method × learning rate × seed; record the runs of a method when they end.

    Each method's runs are a sweep with programs of its own. Sweeps in several threads compile them
    at the same time.
    """
    config = experiment.config
    path = config.output / "runs.jsonl"
    path.unlink(missing_ok=True)
    total = len(METHOD_NAMES) * len(config.learning_rates) * config.seeds
    bar = SweepProgress(total, "train_loss", console=console)
    stop = threading.Event()
    sweeps = [partial(experiment.sweep, name, bar, stop) for name in METHOD_NAMES]
    for rows in in_threads(sweeps, stop):
        records.append(path, *rows)
    return records.read(path)


def best_runs(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return each method's runs at the learning rate of the lowest mean training loss.

    A rate is excluded if a seed diverged at it. A method without any other rate gets [].
    """
    cells = defaultdict(list)
    for row in rows:
        cells[row["method"], row["learning_rate"]].append(row)
    best = {name: [] for name in METHOD_NAMES}
    for (name, _), cell in cells.items():
        if all(row["status"] == "finished" for row in cell):
            best[name] = min(
                (runs for runs in (best[name], cell) if runs),
                key=lambda runs: np.mean([row["train_loss"] for row in runs]),
            )
    return best


def table(best: dict[str, list[dict[str, Any]]]) -> Table:
    """Return a table of mean ± standard deviation over the seeds."""
    out = Table(title="Digits: the best learning rate of the grid for each method")
    out.add_column("method", no_wrap=True)
    for heading in ("γ", "accuracy %", "training loss", "virtual time s"):
        out.add_column(heading, justify="right", no_wrap=True)
    for name, runs in best.items():
        if not runs:
            out.add_row(TITLES[name], "none", "diverged at every rate", "", "")
            continue
        of = partial(_mean_std, runs)
        out.add_row(
            TITLES[name],
            f"{runs[0]['learning_rate']:g}",
            of("test_accuracy", ".2f"),
            of("train_loss", ".5f"),
            of("virtual_time", ".0f"),
        )
    return out


def _mean_std(runs: list[dict[str, Any]], metric: str, form: str) -> str:
    values = [row[metric] for row in runs]
    std = np.std(values, ddof=1) if len(values) > 1 else 0.0
    return f"{np.mean(values):{form}} ± {std:{form}}"


def draw(best: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw training loss and test accuracy against virtual time: mean and range over seeds."""
    figure, axes = plt.subplots(2, 1, figsize=(6, 6), sharex=True, layout="constrained")
    for axis, metric in zip(axes, ("train_loss", "test_accuracy"), strict=True):
        for name, runs in best.items():
            if runs:
                draw_band(axis, name, [row["curve"] for row in runs], metric)
        axis.set_ylabel(LABELS[metric])
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[1].set_xlabel("virtual time (gradients of a fast worker)")
    if any(best.values()):
        axes[1].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(args: Sequence[str] | None = None) -> None:
    """Run the quickstart from the command line."""
    accept_any_terminal()
    plt.switch_backend("agg")
    console = Console()
    start = time.perf_counter()
    try:
        config = tyro.cli(
            Config, prog="python -m experiments.quickstart", args=args, description=__doc__
        )
        keep_compiled_programs()
        experiment = Experiment(config)
        config.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    try:
        rows = run_all(experiment, console)
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted; finished runs are in {config.output}") from None
    best = best_runs(rows)
    draw(best, config.output / "quickstart.png")
    console.print(table(best))
    console.print(
        f"{time.perf_counter() - start:.0f} s. Figure: {config.output / 'quickstart.png'}; "
        f"runs: {config.output / 'runs.jsonl'}"
    )


if __name__ == "__main__":
    main()

"""One run of the paper's experiments: what it is, and how it is carried out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import data, models, records
from orlomo_jax import (
    ArrivalTrace,
    Checkpoints,
    Method,
    StepRecord,
    TrainingResult,
    heterogeneous,
    homogeneous,
    make_method,
    one_slow_worker,
    simulate,
    simulate_arrivals,
)

MILESTONES = (0.5, 0.75)
"""Shares of a run after which the local learning rate falls to a tenth: epochs 80, 120 of 160."""

PAPER_STEPS = 15_625
"""Global iterations of the paper's Table 3, which its maximum delays belong to."""


@dataclass(frozen=True)
class Run:
    """One training run, in full; equal runs are the same run."""

    method: Literal["orlomo", "prsgdm", "al_sgd", "local_ormo_da"] = "orlomo"
    """Server rule and local optimizer."""
    model: Literal["resnet20", "resnet32", "resnet8", "squeezenet", "mlp"] = "resnet20"
    """Architecture."""
    dataset: Literal["cifar10", "cifar100", "tiny-imagenet", "digits"] = "cifar10"
    """Data set."""
    scenario: Literal["homogeneous", "heterogeneous", "one_slow", "one_delayed"] = "heterogeneous"
    """How unequal the workers are."""
    workers: int = 16
    """K, the number of workers."""
    local_iterations: int = 32
    """S, the local steps of a round."""
    seed: int = 0
    """Seeds initialisation, data order, noise and arrivals."""
    epochs: float = 160
    """Passes over the training set, counted over all workers."""
    batch_size: int = 64
    """Examples of one local step."""
    learning_rate: float = 0.1
    """Local learning rate γ at the start; ×0.1 at half and at three quarters of the run."""
    momentum: float = 0.9
    """β of server and workers."""
    weight_decay: float = 1e-3
    """Weight decay of the local steps."""
    slow_fraction: float = 0.25
    """Share of slow workers (heterogeneous)."""
    slowdown: float = 2.0
    """A slow worker's gradient time over the others' (heterogeneous, one_slow)."""
    max_delay: int = 0
    """Delay of the last worker's reports, scaled to the run's length (one_delayed)."""
    width: float = 1.0
    """Factor on the model's channels; below 1 a slim one."""
    pool: int = 1
    """Images are averaged over windows of this side."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the model computes in."""

    def num_steps(self, train_size: int) -> int:
        """Return T: reports for that many epochs, in whole rounds where the method waits."""
        reports = math.floor(self.epochs * train_size / (self.batch_size * self.local_iterations))
        if self.method == "prsgdm":
            reports -= reports % self.workers
        if reports < self.workers:
            raise ValueError(
                f"`epochs` must give each of {self.workers} workers a report, got "
                f"epochs={self.epochs:g}, which is {reports} reports"
            )
        return reports

    def trace(self, num_steps: int) -> ArrivalTrace:
        """Return the arrivals of this scenario."""
        if self.scenario == "one_delayed":
            return self._one_delayed(num_steps)
        compute_times = {
            "homogeneous": homogeneous,
            "heterogeneous": lambda: heterogeneous(self.slow_fraction, self.slowdown),
            "one_slow": lambda: one_slow_worker(self.slowdown),
        }[self.scenario]()
        return simulate_arrivals(
            compute_times,
            self.workers,
            num_steps,
            self.local_iterations,
            self.seed,
            synchronous=self.method == "prsgdm",
        )

    def _one_delayed(self, num_steps: int) -> ArrivalTrace:
        """The last worker's every report is ``max_delay`` steps late, scaled by T / 15 625.

        The others are homogeneous. A speed ratio of its own machine cannot explain the paper's
        delays, so this form sets the delay itself.
        """
        if self.method == "prsgdm":
            raise ValueError(
                "`scenario` must not be one_delayed for prsgdm, which waits for every worker"
            )
        period = max(1, round(self.max_delay * num_steps / PAPER_STEPS)) + 1
        others = simulate_arrivals(
            homogeneous(), self.workers - 1, num_steps, self.local_iterations, self.seed
        )
        late = np.arange(num_steps) % period == period - 1
        rest = np.cumsum(~late) - 1
        workers = np.where(late, self.workers - 1, others.workers[rest])
        times = np.maximum.accumulate(others.times[np.maximum(rest, 0)])
        return ArrivalTrace.from_workers(workers, self.workers, times=times)


def execute(
    run: Run,
    data_dir: Path | None = None,
    *,
    evaluate_every: int | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
    checkpoint: Checkpoints | None = None,
) -> dict[str, Any]:
    """Train once and return the run's row for the records.

    Args:
        run: What to train.
        data_dir: The TFDS data_dir; None is TFDS's own default.
        evaluate_every: Global iterations between evaluations; None is a twentieth of the run.
        on_step: See :func:`orlomo_jax.simulate`.
        checkpoint: Where to save, and to go on from.

    Returns:
        The full configuration, versions and device, final metrics, the curve, virtual and wall
        time, and the status.
    """
    parts = assemble(run, data_dir)
    num_steps = run.num_steps(len(parts.train.labels))
    trace = run.trace(num_steps)
    init_key, run_key = jax.random.split(jax.random.key(run.seed))
    params, model_state = parts.network.init(init_key)
    start = time.perf_counter()
    result = simulate(
        parts.method,
        parts.round_fn,
        parts.batch_fn,
        params,
        trace,
        key=run_key,
        model_state=model_state,
        local_learning_rate=schedule(run.learning_rate, num_steps),
        evaluate=parts.evaluate,
        evaluate_every=evaluate_every or max(1, num_steps // 20),
        on_step=on_step,
        checkpoint=checkpoint,
    )
    return _row(run, result, time.perf_counter() - start)


class Parts(NamedTuple):
    """What runs of one shape share, so that each shape is compiled once."""

    method: Method
    network: models.Network
    train: data.Split
    loss_fn: Callable
    batch_fn: Callable
    round_fn: Callable
    evaluate: Callable


def assemble(run: Run, data_dir: Path | None = None) -> Parts:
    """Return the parts of a run, the same objects for runs of one shape."""
    return _assemble(_shared(run), data_dir)


def _shared(run: Run) -> Run:
    """Return the run with all that needs no other program set to its default."""
    return replace(
        run, scenario="homogeneous", seed=0, epochs=1, learning_rate=0.0, slowdown=1, max_delay=0
    )


@lru_cache(maxsize=8)
def _assemble(run: Run, data_dir: Path | None) -> Parts:
    source = data.load(run.dataset, data_dir, pool=run.pool)
    network = models.make(
        run.model,
        source.num_classes,
        source.image_shape,
        width=run.width,
        dtype=jnp.dtype(run.dtype),
    )
    method = make_method(run.method, run.workers, run.momentum)
    loss_fn = source.training_loss(network.loss_fn)
    return Parts(
        method=method,
        network=network,
        train=source.train,
        loss_fn=loss_fn,
        batch_fn=data.shuffled_batches(source.train, run.batch_size, run.local_iterations),
        round_fn=method.local_round(loss_fn, run.local_iterations, weight_decay=run.weight_decay),
        evaluate=_evaluation(network, source),
    )


def _evaluation(network: models.Network, source: data.Dataset, batch_size: int = 100) -> Callable:
    """Return the jitted training loss and test accuracy, with the merged model state.

    The training loss is over at most 10 000 fixed training examples, as they are.
    """

    def summed(params, model_state, split, statistic):
        count = len(split.labels)
        whole = count - count % batch_size

        def over(images, labels):
            logits = network.predict(params, model_state, source.preprocess(images))
            return statistic(logits, labels).sum()

        head = jax.tree.map(lambda x: x[:whole].reshape(-1, batch_size, *x.shape[1:]), split)
        total = jax.lax.map(lambda batch: over(*batch), head).sum()
        if whole < count:
            total += over(*jax.tree.map(lambda x: x[whole:], split))
        return total / count

    @jax.jit
    def evaluate(params, model_state):
        sample = jax.tree.map(lambda x: x[:10_000], source.train)
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        accuracy = lambda logits, labels: logits.argmax(-1) == labels  # noqa: E731
        return {
            "train_loss": summed(params, model_state, sample, cross_entropy),
            "test_accuracy": 100 * summed(params, model_state, source.test, accuracy),
        }

    return evaluate


@lru_cache(maxsize=64)
def schedule(learning_rate: float, num_steps: int) -> optax.Schedule:
    """Return ×0.1 at each milestone of global progress; cached, since it is compiled in."""
    drops = {round(share * num_steps): 0.1 for share in MILESTONES}
    return optax.piecewise_constant_schedule(learning_rate, drops)


def _row(run: Run, result: TrainingResult, wall_time: float) -> dict[str, Any]:
    evaluations = result.history.evaluations
    curve: dict[str, list] = {
        "step": [e.step for e in evaluations],
        "virtual_time": [_short(e.time) for e in evaluations],
    }
    for metric in ("train_loss", "test_accuracy"):
        curve[metric] = [_short(e.metrics[metric]) for e in evaluations]
    # An infinite loss of finite parameters is a failed run too.
    finished = result.status == "finished" and curve["train_loss"][-1] is not None
    return {
        "run": asdict(run),
        "status": "finished" if finished else "diverged",
        "diverged_at": result.diverged_at,
        "num_steps": result.trace.num_steps,
        "max_delay": result.trace.max_delay,
        "virtual_time": _short(float(result.trace.times[-1])),
        "wall_time": round(wall_time, 3),
        "train_loss": curve["train_loss"][-1] if finished else None,
        "test_accuracy": curve["test_accuracy"][-1] if finished else None,
        "curve": curve,
        "environment": records.environment(),
    }


def _short(value: float) -> float | None:
    """Return six significant digits, which keep the rows small; None for a NaN or an Inf."""
    return float(f"{value:.6g}") if math.isfinite(value) else None

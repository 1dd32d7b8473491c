"""One worker with one local step against a plain optax loop: the same batches, keys and schedule.

``python -m experiments.against_optax --data-dir DIR`` trains ResNet20 for an epoch of CIFAR10 both
ways, in half an hour on one core, and prints both accuracies and how far the parameters are apart.
The exit status is 1 where the last accuracies differ by more than ``--tolerance``.

Two programs that compute the same round differently, and training at a high learning rate lets
that grow until two runs are as far apart as those of two seeds: the default is a fifth of the
paper's. How far rounding alone goes is shown by a control: the optax loop once more, from
parameters that are a rounding apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro
from rich.console import Console
from rich.progress import Progress

from experiments import execution, runs
from experiments.decoded import DataError
from experiments.train import progress_bar, reporter


@dataclass(frozen=True)
class AgainstOptax:
    """Settings of the comparison."""

    run: Annotated[runs.Run, tyro.conf.OmitArgPrefixes] = field(
        default_factory=lambda: runs.Run(
            workers=1, local_iterations=1, epochs=1, learning_rate=0.02
        )
    )
    """What to train."""
    data_dir: Path | None = None
    """The TFDS data_dir; by default $TFDS_DATA_DIR or TFDS's own."""
    evaluations: int = 4
    """How often to evaluate, the last time after the last step."""
    tolerance: float = 1.0
    """By how many points the last accuracies may differ."""

    def __post_init__(self) -> None:
        """Refuse what plain optax has no counterpart of."""
        if (self.run.workers, self.run.local_iterations) != (1, 1):
            raise ValueError(
                "`workers` and `local_iterations` must be 1, got "
                f"workers={self.run.workers}, local_iterations={self.run.local_iterations}"
            )
        if self.evaluations < 1:
            raise ValueError(f"`evaluations` must be ≥ 1, got evaluations={self.evaluations}")


class Comparison(NamedTuple):
    """Both sides of one training run.

    Attributes:
        simulated: {step: metrics} of this library's run.
        plain: {step: metrics} of the optax loop.
        control: The same from parameters a rounding apart.
        distance: Of the last parameters from each other, over the way from the first parameters.
    """

    simulated: dict[int, dict[str, float]]
    plain: dict[int, dict[str, float]]
    control: dict[int, dict[str, float]]
    distance: float


def compare(
    run: runs.Run,
    data_dir: Path | None = None,
    evaluations: int = 4,
    progress: Progress | None = None,
) -> Comparison:
    """Train as every run is, and by optax, with a bar for each."""
    progress = Progress(disable=True) if progress is None else progress
    parts = execution.assemble(run, data_dir)
    num_steps = run.num_steps(len(parts.train.labels))
    every = max(1, num_steps // evaluations)
    on_step = reporter(progress, "simulated", run.epochs, num_steps)
    _, result = execution.execute(run, data_dir, evaluate_every=every, on_step=on_step)
    params, model_state, key = execution.beginning(run, parts)
    schedule = execution.schedule(run.learning_rate, num_steps)

    def by_optax(label: str, params: Any) -> tuple[Any, dict[int, dict[str, float]]]:
        metrics, last = {}, params
        states = plain_optax(run, parts, schedule, params, model_state, key)
        bar = progress.add_task(label, total=num_steps, rate="")
        for step, (last, statistics) in enumerate(islice(states, num_steps), 1):
            progress.update(bar, completed=step)
            if step % every == 0 or step == num_steps:
                metrics[step] = _floats(parts.evaluate(last, statistics))
        return last, metrics

    last, plain = by_optax("plain optax", params)
    apart = jax.tree.map(lambda x: x * (1 + jnp.finfo(x.dtype).eps), params)
    _, control = by_optax("from a rounding apart", apart)
    norm, minus = optax.tree.norm, optax.tree.sub
    return Comparison(
        {evaluation.step: dict(evaluation.metrics) for evaluation in result.history.evaluations},
        plain,
        control,
        float(norm(minus(result.params, last)) / norm(minus(last, params))),
    )


def plain_optax(
    run: runs.Run,
    parts: execution.Parts,
    schedule: optax.Schedule,
    params: Any,
    model_state: Any,
    key: jax.Array,
) -> Iterator[tuple[Any, Any]]:
    """Yield parameters and model state after each step of momentum SGD with weight decay.

    The learning rate is within the momentum, u ← βu + γg, as in the paper's local steps; it is
    ``optax.sgd`` where γ is constant.

    Batches and keys are those that :func:`orlomo_jax.simulate` gives to its only worker.
    """
    optimizer = optax.chain(
        optax.add_decayed_weights(run.weight_decay),
        optax.scale_by_schedule(schedule),
        optax.identity() if run.method == "al_sgd" else optax.trace(run.momentum),
        optax.scale(-1.0),
    )
    data_key, noise_key = jax.random.split(key)

    @jax.jit
    def step(batch_fn: Callable, params, model_state, opt_state, round):
        batch = jax.tree.map(lambda x: x[0], batch_fn(data_key, 0, round))
        step_key = jax.random.fold_in(noise_key, 0)
        for number in (round, 0):
            step_key = jax.random.fold_in(step_key, number)
        value_and_grad = jax.value_and_grad(parts.loss_fn, has_aux=True)
        (_, (model_state, _)), gradient = value_and_grad(params, model_state, batch, step_key)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), model_state, opt_state

    opt_state, round = optimizer.init(params), 0
    while True:
        params, model_state, opt_state = step(parts.batch_fn, params, model_state, opt_state, round)
        round += 1
        yield params, model_state


def _floats(metrics: dict[str, jax.Array]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def main(args: Sequence[str] | None = None) -> None:
    """Compare from the command line."""
    settings = tyro.cli(
        AgainstOptax, prog="python -m experiments.against_optax", args=args, description=__doc__
    )
    try:
        with progress_bar(Console(stderr=True)) as progress:
            comparison = compare(settings.run, settings.data_dir, settings.evaluations, progress)
    except (DataError, ValueError) as error:
        raise SystemExit(str(error)) from None
    last = 0.0
    for step, plain in comparison.plain.items():
        ours, control = comparison.simulated[step], comparison.control[step]
        last = ours["test_accuracy"] - plain["test_accuracy"]
        rounding = control["test_accuracy"] - plain["test_accuracy"]
        print(
            f"step {step}: test accuracy {ours['test_accuracy']:.2f} % simulated, "
            f"{plain['test_accuracy']:.2f} % plain optax, difference {last:+.2f}; training loss "
            f"{ours['train_loss']:.4f}, {plain['train_loss']:.4f}; from a rounding apart "
            f"{rounding:+.2f}"
        )
    print(f"parameters apart by {comparison.distance:.2g} of the way that they have gone")
    if not abs(last) <= settings.tolerance:
        raise SystemExit(f"accuracies differ by more than --tolerance {settings.tolerance:g}")


if __name__ == "__main__":
    main()

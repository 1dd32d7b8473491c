"""Compare one worker with one local step to a plain optax loop.

``python -m experiments.against_optax --data-dir DIR`` trains ResNet20 for an epoch of CIFAR10 both
ways, with the same batches, keys and schedule. It prints both accuracies and the distance of the
parameters. It takes long on a CPU.

Two programs round differently. At a high learning rate these differences grow until two runs differ
as much as runs of two seeds. So the default learning rate is a fifth of the paper's. Controls
measure the effect of rounding alone: they repeat the optax loop from slightly different parameters.

The exit status is 1 if the last accuracy differs from the mean of all optax loops by more than
three of their standard deviations and by more than ``--tolerance``.
"""

from __future__ import annotations

import statistics
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
from rich.progress import track

from experiments import config, runner
from experiments.checks import check
from experiments.data.tfds_cache import DataError
from experiments.parts import Parts, assemble, beginning, schedule
from experiments.terminal import accept_any_terminal
from orlomo_jax import ProgressBar


@dataclass(frozen=True)
class AgainstOptax:
    """Settings of the comparison."""

    run: Annotated[config.Run, tyro.conf.OmitArgPrefixes] = field(
        default_factory=lambda: config.Run(
            workers=1, local_iterations=1, epochs=1, learning_rate=0.02
        )
    )
    """The run to train."""
    data_dir: Path | None = None
    """The TFDS data_dir; by default $TFDS_DATA_DIR or TFDS's own."""
    evaluations: int = 4
    """Number of evaluations; the last one is after the last step."""
    controls: int = 4
    """Number of further optax loops, which measure the effect of rounding alone."""
    tolerance: float = 0.2
    """Difference of the last accuracy, in percentage points, that is always allowed."""

    def __post_init__(self) -> None:
        """Raise ValueError for settings that plain optax cannot reproduce."""
        if (self.run.workers, self.run.local_iterations) != (1, 1):
            raise ValueError(
                "`workers` and `local_iterations` must be 1, got "
                f"workers={self.run.workers}, local_iterations={self.run.local_iterations}"
            )
        for name in ("evaluations", "controls"):
            check(name, getattr(self, name), lambda x: x >= 1, "≥ 1")


class Comparison(NamedTuple):
    """Both sides of one training run.

    Attributes:
        simulated: {step: metrics} of this library's run.
        plain: {step: metrics} of the optax loop.
        controls: The same for each control.
        distance: Distance between both last parameters, over the distance that the optax loop
            moved its parameters.
    """

    simulated: dict[int, dict[str, float]]
    plain: dict[int, dict[str, float]]
    controls: list[dict[int, dict[str, float]]]
    distance: float

    def rounding(self, step: int) -> tuple[float, float]:
        """Return mean and sample standard deviation of all optax loops' accuracies."""
        accuracies = [side[step]["test_accuracy"] for side in (self.plain, *self.controls)]
        return statistics.mean(accuracies), statistics.stdev(accuracies)


def compare(
    run: config.Run,
    data_dir: Path | None = None,
    evaluations: int = 4,
    controls: int = 1,
    console: Console | None = None,
) -> Comparison:
    """Train by this library and by optax loops, with a progress bar for each on a console."""
    parts = assemble(run, data_dir)
    num_steps = run.num_steps(len(parts.train.labels))
    every = max(1, num_steps // evaluations)
    bars = [] if console is None else [ProgressBar("simulated", console)]
    _, result = runner.execute(run, data_dir, evaluate_every=every, callbacks=bars)
    params, model_state, key = beginning(run, parts)
    rates = schedule(run.learning_rate, num_steps)

    def by_optax(label: str, params: Any) -> tuple[Any, dict[int, dict[str, float]]]:
        metrics, last = {}, params
        states = islice(plain_optax(run, parts, rates, params, model_state, key), num_steps)
        shown = track(
            states, label, num_steps, console=console, transient=True, disable=console is None
        )
        for step, (last, merged) in enumerate(shown, 1):
            if step % every == 0 or step == num_steps:
                metrics[step] = _floats(parts.evaluate(last, merged))
        return last, metrics

    last, plain = by_optax("plain optax", params)
    apart = []
    for count in range(1, controls + 1):
        start = jax.tree.map(lambda x, n=count: x * (1 + n * jnp.finfo(x.dtype).eps), params)
        apart.append(by_optax(f"control {count} of {controls}", start)[1])
    norm, minus = optax.tree.norm, optax.tree.sub
    return Comparison(
        {evaluation.step: dict(evaluation.metrics) for evaluation in result.history.evaluations},
        plain,
        apart,
        float(norm(minus(result.params, last)) / norm(minus(last, params))),
    )


def plain_optax(
    run: config.Run,
    parts: Parts,
    rates: optax.Schedule,
    params: Any,
    model_state: Any,
    key: jax.Array,
) -> Iterator[tuple[Any, Any]]:
    """Yield parameters and model state after each step of momentum SGD with weight decay.

    The learning rate is inside the momentum, u ← βu + γg, as in the paper's local steps. For a
    constant γ this equals ``optax.sgd``.

    Batches and keys are those that :func:`orlomo_jax.simulate` gives to its only worker.
    """
    optimizer = optax.chain(
        optax.add_decayed_weights(run.weight_decay),
        optax.scale_by_schedule(rates),
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
    accept_any_terminal()
    try:
        settings = tyro.cli(
            AgainstOptax, prog="python -m experiments.against_optax", args=args, description=__doc__
        )
        options = (settings.evaluations, settings.controls, Console(stderr=True))
        comparison = compare(settings.run, settings.data_dir, *options)
    except (DataError, ValueError) as error:
        raise SystemExit(str(error)) from None
    difference = allowed = 0.0
    for step, plain in comparison.plain.items():
        ours, (mean, std) = comparison.simulated[step], comparison.rounding(step)
        difference, allowed = ours["test_accuracy"] - mean, max(3 * std, settings.tolerance)
        print(
            f"step {step}: test accuracy {ours['test_accuracy']:.2f} % simulated, "
            f"{plain['test_accuracy']:.2f} % plain optax, {mean:.2f} ± {std:.2f} % over "
            f"{len(comparison.controls) + 1} optax loops, difference {difference:+.2f}; training "
            f"loss {ours['train_loss']:.4f}, {plain['train_loss']:.4f}"
        )
    print(f"distance of the parameters: {comparison.distance:.2g} of the way from the start")
    if not abs(difference) <= allowed:
        raise SystemExit(
            f"the accuracy differs by {difference:+.2f} points, more than {allowed:.2f}"
        )


if __name__ == "__main__":
    main()

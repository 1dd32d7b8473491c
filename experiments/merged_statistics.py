"""Compare merged BatchNorm statistics with freshly computed ones.

``python -m experiments.merged_statistics --data-dir DIR`` trains once, by default a slim ResNet8 on
CIFAR10 averaged down to 8×8. It prints the test accuracy of the last parameters with three
statistics:

- merged: by the server, from the workers' reports,
- recomputed: by a pass over the training set with fixed parameters,
- initial: as a server without merging would have.

The exit status is 1 if the first two accuracies differ by more than ``--tolerance``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from experiments import config, runner
from experiments.data.tfds_cache import DataError
from experiments.parts import Parts, assemble, beginning
from experiments.terminal import accept_any_terminal


@dataclass(frozen=True)
class MergedStatistics:
    """Settings of the comparison."""

    run: Annotated[config.Run, tyro.conf.OmitArgPrefixes] = field(
        default_factory=lambda: config.Run(
            model="resnet8", width=0.5, pool=4, batch_size=16, epochs=12
        )
    )
    """The run to train."""
    data_dir: Path | None = None
    """The TFDS data_dir; by default $TFDS_DATA_DIR or TFDS's own."""
    tolerance: float = 0.5
    """Largest allowed difference of the accuracies, in percentage points."""


def recomputed(parts: Parts, params: Any, model_state: Any, num_batches: int = 100) -> Any:
    """Return the statistics of one pass over the training set, with augmented images.

    They are running averages, so after 100 batches the weight of ``model_state`` is 0.9¹⁰⁰ = 3e-5.
    """
    size = len(parts.train.labels) // num_batches

    @jax.jit
    def over(train, params, model_state):
        batches = jax.tree.map(
            lambda x: x[: num_batches * size].reshape(num_batches, size, *x.shape[1:]), train
        )

        def see(model_state, inputs):
            batch, key = inputs
            _, (model_state, _) = parts.loss_fn(params, model_state, batch, key)
            return model_state, None

        keys = jax.random.split(jax.random.key(0), num_batches)
        return jax.lax.scan(see, model_state, (batches, keys))[0]

    return over(parts.train, params, model_state)


def accuracies(run: config.Run, data_dir: Path | None = None) -> dict[str, float]:
    """Train, and return the test accuracy with merged, recomputed and initial statistics."""
    parts = assemble(run, data_dir)
    num_steps = run.num_steps(len(parts.train.labels))
    _, result = runner.execute(run, data_dir, evaluate_every=num_steps)
    if result.status != "finished":
        raise ValueError(f"`learning_rate` must let the run finish, got {run.learning_rate:g}")
    _, initial, _ = beginning(run, parts)
    statistics = {
        "merged": result.model_state,
        "recomputed": recomputed(parts, result.params, initial),
        "initial": initial,
    }
    return {
        name: float(parts.evaluate(result.params, state)["test_accuracy"])
        for name, state in statistics.items()
    }


def main(args: Sequence[str] | None = None) -> None:
    """Compare from the command line."""
    accept_any_terminal()
    settings = tyro.cli(
        MergedStatistics,
        prog="python -m experiments.merged_statistics",
        args=args,
        description=__doc__,
    )
    try:
        found = accuracies(settings.run, settings.data_dir)
    except (DataError, ValueError) as error:
        raise SystemExit(str(error)) from None
    for name, accuracy in found.items():
        print(f"{name} statistics: test accuracy {accuracy:.2f} %")
    difference = found["merged"] - found["recomputed"]
    print(f"merged − recomputed: {difference:+.2f}")
    if abs(difference) > settings.tolerance:
        raise SystemExit(f"accuracies differ by more than --tolerance {settings.tolerance:g}")


if __name__ == "__main__":
    main()

"""Defines the scales: ways to shrink the paper's runs so that they fit a machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from experiments.config import ComputeOptions, Run


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


def _barrier(run: Run) -> Run:
    """As slim, but the workers of OrLoMo wait for each other after every round.

    Raises:
        ValueError: If the run sets the delay of a worker.
    """
    if run.scenario == "one_delayed":
        raise ValueError("the scale barrier needs workers with speeds, got one_delayed")
    run = _slim(run)
    return replace(run, staleness_bound=run.workers - 1) if run.method == "orlomo" else run


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
            "barrier",
            "as slim, but OrLoMo's workers wait for each other after every round, as PRSGDm's do",
            _barrier,
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

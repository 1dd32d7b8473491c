"""One run of any method × model × data set × scenario × K × S × seed.

``python -m experiments.train --method orlomo --model resnet20 --dataset cifar10 --data-dir DIR``
prints a progress bar and appends one JSON row to ``--output``. With ``--checkpoint-dir`` it saves
as it goes, and ``--resume`` goes on from there, to the bit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments import records, runs
from experiments.decoded import DataError
from orlomo_jax import Checkpoints, StepRecord


@dataclass(frozen=True)
class Train:
    """Settings of one training run."""

    run: Annotated[runs.Run, tyro.conf.OmitArgPrefixes] = field(default_factory=runs.Run)
    """What to train."""
    data_dir: Path | None = None
    """The TFDS data_dir; by default $TFDS_DATA_DIR or TFDS's own."""
    output: Path = Path("runs.jsonl")
    """File that the run's row is appended to."""
    evaluate_every: int | None = None
    """Global iterations between evaluations; by default a twentieth of the run."""
    checkpoint_dir: Path | None = None
    """Folder for this run's checkpoints; by default none are written."""
    checkpoint_every: int = 500
    """Global iterations between checkpoints."""
    resume: bool = False
    """Go on from the newest checkpoint in --checkpoint-dir."""
    tensorboard: Path | None = None
    """Folder for TensorBoard logs; by default none are written."""


@contextmanager
def progress_bar(console: Console):
    """Yield a rich progress bar whose description holds what a run tells of itself."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield progress


def reporter(
    progress: Progress, label: str, epochs: float, num_steps: int
) -> Callable[[StepRecord], None]:
    """Return an ``on_step`` that keeps one bar up to date, looking at the device once a second."""
    bar = progress.add_task(label, total=num_steps, rate="")
    start, first, looked = time.monotonic(), None, 0.0
    shown = {"loss": "–", "accuracy": "–"}

    def on_step(record: StepRecord) -> None:
        nonlocal first, looked
        first = record.step if first is None else first
        now = time.monotonic()
        if record.metrics is not None:
            shown["accuracy"] = f"{record.metrics['test_accuracy']:.2f}%"
        elif now - looked < 1.0 and record.step != num_steps:
            return
        looked = now
        shown["loss"] = f"{float(record.loss):.4f}"
        rate = (record.step - first) / max(now - start, 1e-9)
        progress.update(
            bar,
            completed=record.step,
            rate=f"{rate:.1f}/s",
            description=f"{label} epoch {epochs * record.step / num_steps:.1f} loss "
            f"{shown['loss']} accuracy {shown['accuracy']} delay {record.delay}",
        )

    return on_step


def tensorboard_writer(folder: Path) -> Callable[[StepRecord], None]:
    """Return an ``on_step`` that writes each evaluation, with its step and virtual time."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise SystemExit(
            "--tensorboard needs tensorboardX: pip install 'orlomo-jax[experiments]'"
        ) from None
    writer = SummaryWriter(str(folder))

    def on_step(record: StepRecord) -> None:
        if record.metrics is None:
            return
        scalars = {**record.metrics, "loss": float(record.loss), "delay": record.delay}
        for name, value in scalars.items():
            writer.add_scalar(name, value, record.step, walltime=record.time)
        writer.flush()

    return on_step


def _claim(path: Path, run: runs.Run) -> None:
    """Note whose checkpoints a folder holds; refuse those of a run with other settings."""
    if not path.exists():
        path.write_text(json.dumps(asdict(run)), encoding="utf-8")
        return
    theirs = json.loads(path.read_text(encoding="utf-8"))
    others = [name for name, value in asdict(run).items() if theirs.get(name) != value]
    if others:
        raise SystemExit(f"{path} is of a run with another {', '.join(others)}")


def main(args: Sequence[str] | None = None) -> None:
    """Train once from the command line."""
    settings = tyro.cli(Train, args=args, description=__doc__)
    console = Console()
    checkpoint = None
    if settings.checkpoint_dir is not None:
        checkpoint = Checkpoints(settings.checkpoint_dir, settings.checkpoint_every)
        if checkpoint.steps() and not settings.resume:
            raise SystemExit(
                f"{settings.checkpoint_dir} holds checkpoints: add --resume to go on from the "
                "newest, or choose another --checkpoint-dir"
            )
        _claim(settings.checkpoint_dir / "run.json", settings.run)
    elif settings.resume:
        raise SystemExit("--resume needs --checkpoint-dir")
    listeners = []
    if settings.tensorboard is not None:
        listeners.append(tensorboard_writer(settings.tensorboard))
    run = settings.run
    try:
        train_size = len(runs.assemble(run, settings.data_dir).train.labels)
        num_steps = run.trace(run.num_steps(train_size)).num_steps
    except (DataError, ValueError) as error:
        raise SystemExit(str(error)) from None
    with progress_bar(console) as progress:
        listeners.append(reporter(progress, run.method, run.epochs, num_steps))

        def on_step(record: StepRecord) -> None:
            for listen in listeners:
                listen(record)

        row = runs.execute(
            run,
            settings.data_dir,
            evaluate_every=settings.evaluate_every,
            on_step=on_step,
            checkpoint=checkpoint,
        )
    records.append(settings.output, row)
    if row["status"] == "finished":
        console.print(
            f"test accuracy {row['test_accuracy']:.2f} %, training loss {row['train_loss']:.4f}, "
            f"virtual time {row['virtual_time']:.0f} s, {row['wall_time']:.0f} s here; "
            f"row appended to {settings.output}"
        )
    else:
        console.print(f"diverged; row appended to {settings.output}")


if __name__ == "__main__":
    main()

"""Train one run of any method × model × data set × scenario × K × S × seed.

``python -m experiments.train --method orlomo --model resnet20 --dataset cifar10 --data-dir DIR``
prints a progress bar and appends one JSON row to ``--output``. ``--checkpoint-dir`` saves
checkpoints, and ``--resume`` continues from the newest one; the result is the same, bit for bit.
``--runtime threads`` and ``--runtime ray`` train on real workers. ``--trace FILE`` saves the order
of their arrivals, and ``--replay FILE`` repeats it in the simulator.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro
from rich.console import Console

from experiments import config, records, runner
from experiments.compilation_cache import keep_compiled_programs
from experiments.data.tfds_cache import DataError
from experiments.parts import assemble
from experiments.run_folder import claim, open_checkpoints
from experiments.terminal import accept_any_terminal
from orlomo_jax import (
    ArrivalTrace,
    Callback,
    Checkpointer,
    HealthLog,
    ProgressBar,
    RayWorkers,
    TensorBoard,
)
from orlomo_jax.recording import Journal
from orlomo_jax.runtimes import WorkersLostError
from orlomo_jax.server import AuditError


@dataclass(frozen=True)
class Train:
    """Settings of one training run."""

    run: Annotated[config.Run, tyro.conf.OmitArgPrefixes] = field(default_factory=config.Run)
    """The run to train."""
    data_dir: Path | None = None
    """The TFDS data_dir; by default $TFDS_DATA_DIR or TFDS's own."""
    output: Path = Path("runs.jsonl")
    """File to append the run's row to."""
    evaluate_every: int | None = None
    """Global iterations between evaluations; by default a twentieth of the run."""
    checkpoint_dir: Path | None = None
    """Folder for this run's checkpoints; by default none are written."""
    checkpoint_every: int = 500
    """Global iterations between checkpoints."""
    resume: bool = False
    """Resume from the newest checkpoint in --checkpoint-dir."""
    tensorboard: Path | None = None
    """Folder for TensorBoard logs; by default none are written."""
    trace: Path | None = None
    """File for the order of arrivals; by default next to --output, named after the run."""
    replay: Path | None = None
    """A trace, or the arrivals.jsonl of a killed run: repeat its arrivals in the simulator."""
    audit: bool = False
    """Check Lemmas 1 and 2 on the server at each step (real runtimes, OrLoMo)."""
    compute: config.ComputeOptions = field(default_factory=config.ComputeOptions)
    """How the rounds are computed."""
    ray: runner.Ray = field(default_factory=runner.Ray)
    """Where Ray's workers run, and with which resources."""


def _arrivals(path: Path, run: config.Run, num_steps: int) -> ArrivalTrace:
    """Read the arrivals to repeat; raise ValueError unless they fit the run."""
    try:
        with path.open(encoding="utf-8") as file:
            is_trace = "orlomo_jax.ArrivalTrace" in file.readline()
        trace = ArrivalTrace.load(path) if is_trace else Journal.load(path).trace()
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has no arrivals to repeat: {error!r}") from None
    if run.runtime != "simulated":
        raise ValueError(f"--replay repeats a run in the simulator, not on {run.runtime}")
    if trace.num_workers != run.workers:
        raise ValueError(f"{path} has {trace.num_workers} workers: set --workers to match")
    if trace.num_steps == 0:
        raise ValueError(f"{path} has no report to repeat")
    if trace.synchronous != (run.method == "prsgdm"):
        raise ValueError(
            f"{path} is of a run with synchronous={trace.synchronous}: set --method to match"
        )
    if trace.num_steps > num_steps:
        raise ValueError(f"{path} has {trace.num_steps} reports, the run has {num_steps}")
    return trace


def _check_runtime(settings: Train) -> None:
    run = settings.run
    if settings.evaluate_every is not None and settings.evaluate_every < 1:
        raise ValueError(f"--evaluate-every must be ≥ 1, got {settings.evaluate_every}")
    if run.runtime == "simulated" and settings.audit:
        raise ValueError("--audit needs --runtime threads or ray")
    together = (settings.compute.worker_axis, settings.compute.compute_batch)
    if together != ("auto", None) and (run.runtime != "simulated" or settings.replay is not None):
        raise ValueError(
            "--compute.worker-axis and --compute.compute-batch apply only to simulated runs: real "
            "workers, and replays of their runs, compute each round alone"
        )
    if run.runtime != "simulated":
        run.compute_times()  # raises if the scenario fixes the order of arrivals
    if run.runtime == "ray":
        RayWorkers()  # raises if Ray is not installed


def _trace_path(settings: Train) -> Path:
    run = settings.run
    what = (run,) if settings.replay is None else (run, str(settings.replay))
    name = hashlib.sha256(repr(what).encode()).hexdigest()[:8]
    name = f"{settings.output.stem}-{run.method}-{run.runtime}-{name}.trace.json"
    return settings.output.with_name(name)


class _Prepared(NamedTuple):
    """The checked inputs and outputs of a run, in addition to its settings."""

    trace_path: Path
    checkpoint: Checkpointer | None
    replay: ArrivalTrace | None
    journal: Path | None
    callbacks: list[Callback]


def _prepare(settings: Train) -> _Prepared:
    """Check the settings and prepare the files before anything is computed."""
    run, trace_path = settings.run, settings.trace or _trace_path(settings)
    checkpoint = open_checkpoints(
        settings.checkpoint_dir, settings.checkpoint_every, settings.resume
    )
    num_steps = run.num_steps(len(assemble(run, settings.data_dir).train.labels))
    replay = None if settings.replay is None else _arrivals(settings.replay, run, num_steps)
    _check_runtime(settings)
    run.trace(num_steps)  # raises if the scenario is impossible
    if settings.output.resolve() == trace_path.resolve():
        raise ValueError(f"--trace must be another file than --output, got {trace_path}")
    records.check_writable(settings.output)
    records.check_writable(trace_path)
    journal = None  # by default next to the checkpoints
    if checkpoint is not None:
        mine = asdict(run) | {"convolution": settings.compute.convolution}
        claim(checkpoint, mine, older=asdict(config.Run()) | {"convolution": "auto"})
    elif run.runtime != "simulated":  # so that a run that dies can be repeated
        journal = trace_path.with_suffix(".arrivals.jsonl")
        Journal.set_aside(journal)
    folder = settings.tensorboard
    callbacks: list[Callback] = [] if folder is None else [TensorBoard(folder)]
    return _Prepared(trace_path, checkpoint, replay, journal, callbacks)


def main(args: Sequence[str] | None = None) -> None:
    """Train once from the command line."""
    accept_any_terminal()
    settings = tyro.cli(Train, prog="python -m experiments.train", args=args, description=__doc__)
    keep_compiled_programs()
    console, run = Console(), settings.run
    try:
        trace_path, checkpoint, replay, journal, callbacks = _prepare(settings)
    except (DataError, OSError, ValueError, ImportError, MemoryError) as error:
        raise SystemExit(str(error)) from None
    callbacks += [
        ProgressBar(run.method, console),
        HealthLog(log=lambda health: console.print(health, highlight=False)),
    ]
    try:
        row, result = runner.execute(
            run,
            settings.data_dir,
            evaluate_every=settings.evaluate_every,
            callbacks=callbacks,
            checkpoint=checkpoint,
            replay=replay,
            compute=settings.compute,
            ray=settings.ray,
            audit=settings.audit,
            journal=journal,
        )
    except (WorkersLostError, AuditError) as error:
        kept = journal or settings.checkpoint_dir
        raise SystemExit(f"{error}; all arrivals so far are in {kept}") from None
    except (OSError, ValueError) as error:  # such as a full disk
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        go_on = "" if checkpoint is None else "; --resume continues from the newest checkpoint"
        raise SystemExit(f"interrupted{go_on}") from None
    if result.health is not None:
        console.print(str(result.health), highlight=False)
    try:
        records.append(settings.output, row)
        result.trace.save(trace_path)
    except OSError as error:
        print(json.dumps(row))  # so that the result is not lost
        raise SystemExit(f"{error}; the run's row is printed above") from None
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

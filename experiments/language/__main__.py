"""Train a byte-level GPT with asynchronous workers, on text of this machine.

``python -m experiments.language`` needs neither data nor a network: it trains a GPT of 119 000
parameters on Python's standard library, with four workers of unequal speed, AdamW and delay
look-ahead. It shows progress and samples of text, and appends one JSON row to ``--output``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from experiments import records
from experiments.compilation_cache import keep_compiled_programs
from experiments.language import runs
from experiments.language.parts import LanguageRun, Parts, assemble
from experiments.language.sample import Samples, drawing
from experiments.run_folder import claim, open_checkpoints
from experiments.runner import Ray
from experiments.terminal import accept_any_terminal
from orlomo_jax import Callback, Checkpointer, HealthLog, ProgressBar, RayWorkers, TensorBoard
from orlomo_jax.runtimes import WorkersLostError


@dataclass(frozen=True)
class Language:
    """Settings of one training run and of its outputs."""

    run: Annotated[LanguageRun, tyro.conf.OmitArgPrefixes] = field(default_factory=LanguageRun)
    """The run to train."""
    output: Path = Path("language.jsonl")
    """File to append the run's row to."""
    evaluate_every: int | None = None
    """Reports between evaluations; by default an eighth of the run."""
    prompt: str = "def "
    """Beginning of the text samples."""
    sample_length: int = 160
    """Bytes of a sample; 0 shows none."""
    temperature: float = 0.8
    """Temperature of the samples; lower ones give more likely text."""
    checkpoint_dir: Path | None = None
    """Folder for this run's checkpoints; by default none are written."""
    checkpoint_every: int = 50
    """Reports between checkpoints."""
    resume: bool = False
    """Resume from the newest checkpoint in --checkpoint-dir."""
    tensorboard: Path | None = None
    """Folder for TensorBoard logs; by default none are written."""
    ray: Ray = field(default_factory=Ray)
    """Where Ray's workers run, and with which resources."""


def _check(settings: Language) -> None:
    if settings.evaluate_every is not None and settings.evaluate_every < 1:
        raise ValueError(f"--evaluate-every must be ≥ 1, got {settings.evaluate_every}")
    if settings.sample_length < 0:
        raise ValueError(f"--sample-length must be ≥ 0, got {settings.sample_length}")
    if not settings.temperature > 0:
        raise ValueError(f"--temperature must be > 0, got {settings.temperature}")
    if not settings.prompt:
        raise ValueError("--prompt must have a character or more, got ''")
    if settings.run.runtime == "ray":
        RayWorkers()  # raises if Ray is not installed


def _prepare(settings: Language) -> tuple[Parts, Checkpointer | None, list[Callback]]:
    """Check the settings and prepare the files before anything is computed."""
    _check(settings)
    checkpoint = open_checkpoints(
        settings.checkpoint_dir, settings.checkpoint_every, settings.resume
    )
    parts = assemble(settings.run)
    records.check_writable(settings.output)
    callbacks: list[Callback] = []
    if settings.tensorboard is not None:
        callbacks.append(TensorBoard(settings.tensorboard))
    if checkpoint is not None:
        claim(checkpoint, runs.settings(settings.run))
    return parts, checkpoint, callbacks


def _samples(settings: Language, parts: Parts, console: Console) -> Samples:
    """Return the evaluation that also draws text, and prints both."""
    run, total = settings.run, parts.start.trace.num_steps
    draw = drawing(
        parts.network,
        run.config.context,
        settings.prompt.encode(),
        settings.sample_length,
        settings.temperature,
        run.seed,
    )

    def show(step: int, evaluation: dict[str, float], text: str) -> None:
        head = f"report {step} of {total}: held-out loss {evaluation['loss']:.3f} nats per byte"
        console.rule(head, align="left")
        console.print(settings.prompt + text, markup=False, highlight=False)

    return Samples(parts.evaluate, draw, show)


def main(args: Sequence[str] | None = None) -> None:
    """Train once from the command line."""
    accept_any_terminal()
    settings = tyro.cli(
        Language, prog="python -m experiments.language", args=args, description=__doc__
    )
    keep_compiled_programs()
    console, run = Console(), settings.run
    try:
        parts, checkpoint, callbacks = _prepare(settings)
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise SystemExit(str(error)) from None
    num_steps, evaluate = parts.start.trace.num_steps, parts.evaluate
    steps = parts.method.steps_of_worker
    mean_steps = sum(steps[worker] for worker in parts.start.trace.workers) / num_steps
    if settings.sample_length:
        samples = _samples(settings, parts, console)
        callbacks.append(samples)
        evaluate = samples.evaluate
    callbacks += [
        ProgressBar(run.method, console, tokens_per_step=mean_steps * parts.tokens_per_step),
        HealthLog(log=lambda health: console.print(health, highlight=False)),
    ]
    try:
        row, result = runs.execute(
            run,
            parts=parts,
            evaluate=evaluate,
            evaluate_every=settings.evaluate_every or max(1, num_steps // 8),
            callbacks=callbacks,
            checkpoint=checkpoint,
            ray=settings.ray,
        )
    except (WorkersLostError, OSError, ValueError) as error:  # such as a full disk
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        go_on = "" if checkpoint is None else "; --resume continues from the newest checkpoint"
        raise SystemExit(f"interrupted{go_on}") from None
    if result.health is not None:
        console.print(str(result.health), highlight=False)
    try:
        records.append(settings.output, row)
    except OSError as error:
        print(json.dumps(row))  # so that the result is not lost
        raise SystemExit(f"{error}; the run's row is printed above") from None
    if row["status"] != "finished":
        console.print(f"{row['status']}; row appended to {settings.output}")
        return
    console.print(
        f"held-out loss {row['loss']:.3f} nats per byte, perplexity {row['perplexity']:.2f}, "
        f"{row['tokens']:,} tokens, mean delay {row['mean_delay']:.1f}, "
        f"{row['tokens'] / row['wall_time']:,.0f} tokens/s, {row['wall_time']:.0f} s; "
        f"row appended to {settings.output}",
        highlight=False,
    )


if __name__ == "__main__":
    main()

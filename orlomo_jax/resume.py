"""Simulated runs begin, or go on from their newest checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orlomo_jax.checkpoint import JOURNAL, Checkpoints
from orlomo_jax.form import Form
from orlomo_jax.identity import of_keys, of_work


def begin_or_resume(
    runs: Sequence[Any], form: Form, checkpoint: Checkpoints, *, fixed: bool
) -> tuple[Form, dict[str, Any]]:
    """Go on from the newest checkpoint, or begin; return the form that the runs have had so far.

    How many rounds are computed together is the checkpoint's, unless it is ``fixed``: it hangs on
    the length of the trace, which may have grown.
    """
    first, *others = runs
    identity = {"run by": "simulate", "together": len(runs)} | first.server.identity()
    identity |= of_keys(*first.job[-2:]) | of_work(*first.job[:2])
    for index, run in enumerate(others, 1):
        own = run.server.rate_identity() | of_keys(*run.job[-2:])
        identity |= {f"{name} of run {index}": value for name, value in own.items()}
    if (saved := checkpoint.newest()) is None:
        if (checkpoint.directory / JOURNAL).exists():
            raise ValueError(f"{checkpoint.directory} holds a run by train: choose another folder")
        for run in runs:
            run.begin()
        return form, identity | form._asdict()
    if isinstance(batch := saved.identity.get("compute_batch"), int) and not fixed:
        form = form._replace(compute_batch=batch)
    identity |= form._asdict()
    saved.check(identity | of_arrivals(runs, saved.step), any_version=checkpoint.any_version)
    with saved.reading():
        parts = zip(runs, saved.arrays["runs"], saved.notes["runs"], strict=True)
        for run, arrays, notes in parts:
            run.resume(arrays, notes, saved.step)
    return form, identity


def of_arrivals(runs: Sequence[Any], step: int) -> dict[str, Any]:
    """Return the identity of the arrivals up to a step: what comes later may still change."""
    trace = runs[0].trace
    if trace.num_steps < step:
        raise ValueError(
            f"`trace` must have the {step} steps that the run to resume has made, got "
            f"{trace.num_steps}"
        )
    return {"trace": [run.trace.digest(step) for run in runs]}

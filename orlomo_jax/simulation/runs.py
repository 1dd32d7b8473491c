"""Simulates runs segment by segment: one, or several through one compiled program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, replace
from functools import partial, wraps
from typing import Any, NamedTuple

import optax

from orlomo_jax import trees
from orlomo_jax.methods.method import Method
from orlomo_jax.recording.callbacks import AnyCallback
from orlomo_jax.recording.checkpoint import JOURNAL, Checkpointer, Saved
from orlomo_jax.recording.history import TrainingResult
from orlomo_jax.recording.identity import of_keys, of_rate, of_run
from orlomo_jax.recording.recorder import Recording, RunRecorder
from orlomo_jax.recording.saver import RunSaver
from orlomo_jax.server.parameter_server import ParameterServer
from orlomo_jax.server.placement import mesh_context
from orlomo_jax.server.schedules import check_schedules
from orlomo_jax.simulation.engine_choice import Compiled, Eager, choose, make_engine
from orlomo_jax.simulation.together import Alone, Together
from orlomo_jax.traces.trace import ArrivalTrace
from orlomo_jax.trees import Array, PyTree
from orlomo_jax.worker.batch_check import check_batch_fn
from orlomo_jax.worker.host_batches import HostBatches
from orlomo_jax.worker.protocols import BatchFn, Evaluate, RoundFn
from orlomo_jax.worker.workload import Workload, as_batch_fn, check_key


class RunStart(NamedTuple):
    """What one of several runs of a shape has for itself; see :func:`simulate`."""

    params: trees.Params
    trace: ArrivalTrace
    key: Array
    local_learning_rate: float | optax.Schedule
    model_state: PyTree = None


def _in_their_mesh(function: Any) -> Any:
    """Run a function of ``starts`` in the mesh of their parameters, if it has explicit axes."""

    @wraps(function)
    def call(method, round_fn, batch_fn, starts, **options):
        with mesh_context([start.params for start in starts]):
            return function(method, round_fn, batch_fn, starts, **options)

    return call


@_in_their_mesh
def simulate_together(
    method: Method,
    round_fn: RoundFn,
    batch_fn: BatchFn | HostBatches,
    starts: Sequence[RunStart],
    *,
    evaluate: Evaluate | None = None,
    evaluate_every: int | None = None,
    callbacks: Sequence[AnyCallback] = (),
    checkpoint: Checkpointer | None = None,
    stop: Callable[[], bool] | None = None,
    engine: Any = "auto",
) -> list[TrainingResult] | None:
    """Simulate runs of one method, shape and length; several go through one compiled program.

    Several runs are computed by ``vmap`` over the runs. Their results are those of single runs up
    to rounding. If a run diverges, the others continue.

    Args:
        method: As in :func:`simulate`, and so are all arguments that are not named here.
        round_fn: The local round of all runs.
        batch_fn: The batch function of all runs.
        starts: At least one run; constant learning rates and schedules cannot be mixed.
        evaluate: Called for each run.
        evaluate_every: Steps between evaluations.
        callbacks: They see the first run only.
        checkpoint: All runs share one folder, and resume together.
        stop: Called after each segment. If it returns True, the runs are saved to ``checkpoint``,
            if there is one, and the call ends.
        engine: Of several runs always ``Compiled(rounds="loop")``.

    Returns:
        The result of each run, or None if ``stop`` ended the call.

    Raises:
        ValueError: If there is no run, or the runs cannot share a program.
    """
    if not starts:
        raise ValueError("`starts` must contain at least one run")
    num_steps = starts[0].trace.num_steps
    if any(start.trace.num_steps != num_steps for start in starts):
        raise ValueError("the traces of runs together must have the same number of steps")
    recording = Recording.of(num_steps, evaluate, evaluate_every, callbacks)
    engine = Compiled("loop") if len(starts) > 1 else engine
    batch_fn = as_batch_fn(batch_fn)  # one for all: Partials are compared by identity
    runs = [_Run.of(method, round_fn, batch_fn, start) for start in starts]
    first = runs[0].workload
    check_batch_fn(first.batch_fn, starts[0].key, first.steps_of(0))
    alone = nullcontext() if checkpoint is None else checkpoint.alone()
    with closing(runs[0].workload), alone:
        return _simulate(runs, engine, recording, checkpoint, stop)


class _Run(NamedTuple):
    """What an engine carries out."""

    server: ParameterServer
    workload: Workload
    trace: ArrivalTrace

    @classmethod
    def of(
        cls, method: Method, round_fn: RoundFn, batch_fn: BatchFn | HostBatches, start: RunStart
    ) -> _Run:
        """Check one run, and make its server."""
        params, trace, key, rate, model_state = start
        if method.synchronous != trace.synchronous or method.num_workers != trace.num_workers:
            raise ValueError(
                f"`trace` must have synchronous={method.synchronous} and "
                f"num_workers={method.num_workers} for {method.name}, got "
                f"synchronous={trace.synchronous} and num_workers={trace.num_workers}"
            )
        check_key(key)
        server = ParameterServer(method, params, model_state, local_learning_rate=rate)
        if server.table.max_wait != trace.max_wait:
            raise ValueError(
                f"`trace` must have max_wait={server.table.max_wait} for {method.name}, got "
                f"max_wait={trace.max_wait}"
            )
        if method.policy is not None:
            method.policy.check_trace(trace.dispatched_at)
        check_schedules(method, server.schedule, trace.num_steps)
        return cls(server, Workload.of(round_fn, batch_fn, key, method.num_local_steps), trace)

    def begin(self) -> None:
        """Dispatch the first tasks."""
        for worker in set(range(self.trace.num_workers)) - self.trace.late_joiners:
            self.server.dispatch(worker)


def _simulate(
    runs: Sequence[_Run],
    engine: Any,
    recording: Recording,
    checkpoint: Checkpointer | None,
    stop: Callable[[], bool] | None,
) -> list[TrainingResult] | None:
    """Simulate from the newest checkpoint to the end; see :func:`simulate_together`."""
    saved = None if checkpoint is None else checkpoint.newest()
    if checkpoint is not None and saved is None and (checkpoint.directory / JOURNAL).exists():
        raise ValueError(f"{checkpoint.directory} has a run by train: choose another folder")
    settings = _as_saved(choose(engine, *runs[0]), engine, saved)
    engines: list[Any] = [make_engine(settings, *run) for run in runs]
    group = Together(engines) if len(runs) > 1 else Alone(engines[0])
    recordings = [recording, *[recording._replace(callbacks=())] * (len(runs) - 1)]
    recorders = [
        RunRecorder(lane, run.workload, run.trace.arrival, mine)
        for lane, run, mine in zip(group.lanes, runs, recordings, strict=True)
    ]
    saver = None
    if checkpoint is not None:
        saver = RunSaver(checkpoint, recorders, _identity(runs, settings), partial(_arrivals, runs))
    if saved is not None and saver is not None:
        saver.restore(saved)
    else:
        for run in runs:
            run.begin()
    with closing(recorders[0]):
        return _run_segments(runs, group, recorders, saver, stop)


def _run_segments(
    runs: Sequence[_Run],
    group: Alone | Together,
    recorders: Sequence[RunRecorder],
    saver: RunSaver | None,
    stop: Callable[[], bool] | None,
) -> list[TrainingResult] | None:
    """Advance the runs segment by segment to the end, record them and save them."""
    first, num_steps = recorders[0], recorders[0].recording.num_steps
    first.start(runs[0].trace)
    periods = () if saver is None else (saver.checkpoint.every,)
    while not (first.stopped or first.step == num_steps):
        end = first.next_stop(*periods)
        for recorder, rounds in zip(recorders, group.advance(end), strict=True):
            recorder.applied_all(rounds, end)
        if all(recorder.first_nonfinite >= 0 for recorder in recorders):
            break
        if saver is not None and saver.is_due():
            saver.save()
        if stop is not None and first.step < num_steps and stop():
            if saver is not None and not saver.is_due():
                saver.save()
            return None
    results = (recorder.result(run.trace) for recorder, run in zip(recorders, runs, strict=True))
    return [recorder.end(result) for recorder, result in zip(recorders, results, strict=True)]


def _as_saved(settings: Eager | Compiled, wanted: Any, saved: Saved | None) -> Eager | Compiled:
    """Return the settings with the checkpoint's batch of rounds, unless it was given.

    The default depends on the length of the trace, which may have grown.
    """
    if saved is None or not isinstance(settings, Compiled) or settings.rounds == "loop":
        return settings
    if isinstance(wanted, Compiled) and wanted.max_batch is not None:
        return settings
    batch = saved.identity.get("max_batch")
    return replace(settings, max_batch=batch) if isinstance(batch, int) else settings


def _identity(runs: Sequence[_Run], settings: Eager | Compiled) -> dict[str, Any]:
    """Return what runs that resume must have in common with these, JSON-able."""
    (server, workload, _), *others = runs
    identity = {"run by": "simulate", "together": len(runs)} | of_run(server, workload)
    for index, run in enumerate(others, 1):
        own = of_rate(run.server) | of_keys(*run.workload.keys)
        identity |= {f"{name} of run {index}": value for name, value in own.items()}
    return identity | {"engine": type(settings).__name__} | asdict(settings)


def _arrivals(runs: Sequence[_Run], step: int) -> dict[str, Any]:
    """Return the identity of the arrivals before a step: later ones may still change."""
    if (num_steps := runs[0].trace.num_steps) < step:
        raise ValueError(
            f"`trace` must have the {step} steps that the run to resume has made, got {num_steps}"
        )
    return {"trace": [run.trace.digest(step) for run in runs]}

"""Simulates K delayed workers on one device, exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, replace
from functools import partial, wraps
from typing import Any, Literal, NamedTuple

import optax

from orlomo_jax import trees
from orlomo_jax.methods.method import Method, round_of
from orlomo_jax.recording.callbacks import AnyCallback
from orlomo_jax.recording.checkpoint import JOURNAL, Checkpointer, Saved
from orlomo_jax.recording.history import TrainingResult
from orlomo_jax.recording.identity import of_keys, of_rate, of_run
from orlomo_jax.recording.interrupts import put_off_interrupts
from orlomo_jax.recording.recorder import Recording, RunRecorder
from orlomo_jax.recording.saver import RunSaver
from orlomo_jax.server.parameter_server import ParameterServer
from orlomo_jax.server.placement import mesh_context
from orlomo_jax.server.schedules import check_schedules
from orlomo_jax.simulation.engine import Compiled, Eager, choose, make_engine
from orlomo_jax.simulation.together import Alone, Together
from orlomo_jax.traces.compute_times import ComputeTimes, heterogeneous, sample_trace
from orlomo_jax.traces.trace import ArrivalTrace
from orlomo_jax.trees import Array, PyTree
from orlomo_jax.worker.batch_check import check_batch_fn
from orlomo_jax.worker.host_batches import HostBatches
from orlomo_jax.worker.protocols import BatchFn, Evaluate, LossFn, RoundFn
from orlomo_jax.worker.workload import Workload, as_batch_fn, check_key


class RunStart(NamedTuple):
    """The arguments of one of several runs of one shape; see :func:`simulate`."""

    params: trees.Params
    trace: ArrivalTrace
    key: Array
    local_learning_rate: float | optax.Schedule
    model_state: PyTree = None


def simulate(
    method: Method,
    loss_fn: LossFn | None,
    batch_fn: BatchFn | HostBatches,
    params: trees.Params,
    *,
    num_steps: int | None = None,
    compute_times: ComputeTimes | None = None,
    trace: ArrivalTrace | None = None,
    trace_seed: int = 0,
    key: Array,
    model_state: PyTree = None,
    local_learning_rate: float | optax.Schedule,
    evaluate: Evaluate | None = None,
    evaluate_every: int | None = None,
    callbacks: Sequence[AnyCallback] = (),
    checkpoint: Checkpointer | None = None,
    engine: Literal["auto", "eager", "compiled"] | Eager | Compiled = "auto",
    round_fn: RoundFn | None = None,
) -> TrainingResult:
    """Train with K delayed workers on one device, exactly.

    Each report is computed from exactly the parameters that its worker was sent. The same arguments
    give the same parameters bit for bit (same program, jaxlib, flags, device).

    Randomness: ``data_key, noise_key = jax.random.split(key)``. ``batch_fn`` gets ``data_key``; the
    key of a round is ``fold_in(fold_in(noise_key, worker), round)``. So batches and noise depend on
    worker and round, not on the order of arrivals.

    Args:
        method: A :class:`~orlomo_jax.Method`: the server rule, K and S.
        loss_fn: ``loss_fn(params, model_state, batch, key) -> (loss, (model_state, metrics))``;
            for a plain loss see :func:`~orlomo_jax.from_loss`. None if ``round_fn`` is given.
        batch_fn: ``batch_fn(data_key, worker, round) -> batches`` with a leading axis S; jit-able
            and hashable. Arrays of a ``jax.tree_util.Partial`` are arguments of the compiled
            program; arrays in a closure become its constants. Or :class:`~orlomo_jax.HostBatches`.
        params: w_0.
        num_steps: T, the number of reports to apply; not with ``trace``.
        compute_times: The workers' speeds; None is :func:`~orlomo_jax.heterogeneous`.
        trace: The order of arrivals, instead of ``num_steps`` and ``compute_times``; for example
            that of a real run. A synchronous method needs a synchronous trace.
        trace_seed: Seed of the compute times, an integer ≥ 0.
        key: A ``jax.random.key``.
        model_state: See :class:`~orlomo_jax.ParameterServer`.
        local_learning_rate: γ, a float or a schedule of the server's step.
        evaluate: ``evaluate(params, model_state) -> {name: scalar}``; jit it yourself. It is also
            called once before the first step, as a test.
        evaluate_every: Steps between evaluations, ≥ 1; None evaluates only after the last step.
        callbacks: :class:`~orlomo_jax.Callback` objects, or functions of a
            :class:`~orlomo_jax.StepRecord`. A callback can end the run.
        checkpoint: Where to save. If the folder contains checkpoints of the same run, the run
            resumes from the newest and gives the results of an uninterrupted run bit for bit;
            callbacks get only the steps after it. The trace may be longer now. If method, round,
            batches, learning rate, key, engine or trees differ, an error is raised; see
            :class:`~orlomo_jax.Checkpointer`. It does not notice another w_0, or changes in the
            code of the loss that change neither names nor numbers.
        engine: ``"eager"`` runs every step from Python; ``"compiled"``, or
            :class:`~orlomo_jax.Compiled` with settings, runs up to 256 steps as one program.
            ``"auto"`` is "compiled", except on a CPU with a million parameters or more, or with a
            loss with convolutions. The results of the engines differ by rounding.
        round_fn: The local round, if it is not ``method.local_round(loss_fn)``.

    Returns:
        A :class:`TrainingResult`. Divergence is not an error; see its ``status``.

    Raises:
        ValueError: If method and trace do not match, an argument is out of range (for schedules, at
            any step of the run), or ``checkpoint`` is of another run.
        BlockingIOError: If another run writes to the folder of ``checkpoint``.
        TypeError: If ``key`` is not a key, a leaf of params is not floating or one of model state
            not numeric, or ``batch_fn`` returns a different batch each time it is called.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from orlomo_jax import from_loss, make_method, simulate
        >>> result = simulate(
        ...     make_method("orlomo", num_workers=2, num_local_steps=4),
        ...     from_loss(lambda params, batch: jnp.mean((params - batch) ** 2)),
        ...     lambda key, worker, round: jnp.ones((4, 1)),
        ...     jnp.zeros(1),
        ...     num_steps=30,
        ...     key=jax.random.key(0),
        ...     local_learning_rate=0.01,
        ... )
        >>> result.status, bool(abs(result.params[0] - 1) < 0.1)
        ('finished', True)
    """
    round_fn = round_of(method, loss_fn, round_fn)
    if trace is None:
        trace = _sampled(method, num_steps, compute_times, trace_seed)
    elif num_steps is not None or compute_times is not None:
        raise ValueError("`trace` says who reports when: pass no num_steps and no compute_times")
    start = RunStart(params, trace, key, local_learning_rate, model_state)
    with put_off_interrupts(checkpoint is not None) as interrupted:
        results = simulate_together(
            method,
            round_fn,
            batch_fn,
            [start],
            evaluate=evaluate,
            evaluate_every=evaluate_every,
            callbacks=callbacks,
            checkpoint=checkpoint,
            stop=interrupted,
            engine=engine,
        )
    assert results is not None  # an interrupted run has raised
    return results[0]


def _sampled(
    method: Method, num_steps: int | None, compute_times: ComputeTimes | None, seed: int
) -> ArrivalTrace:
    if num_steps is None:
        raise ValueError("`num_steps` must be given, or a trace")
    model = heterogeneous() if compute_times is None else compute_times
    K, S = method.num_workers, method.num_local_steps
    return sample_trace(model, K, num_steps, S, seed, synchronous=method.synchronous)


def _in_their_mesh(function: Any) -> Any:
    """Run a function of ``starts`` in the mesh of their parameters if it has explicit axes."""

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
    """Simulate runs of one method, shape and length, in one compiled program.

    Several runs are computed by ``vmap``. The results equal those of single runs up to rounding. If
    a run diverges, the others continue.

    Args:
        method: As in :func:`simulate`, like all arguments that are not listed here.
        round_fn: The local round of all runs.
        batch_fn: The batch function of all runs.
        starts: At least one run; constant learning rates and schedules cannot be mixed.
        evaluate: Called for each run.
        evaluate_every: Steps between evaluations.
        callbacks: They get the first run only.
        checkpoint: All runs share one folder and resume together.
        stop: Called after each segment. If it returns True, the runs are saved to ``checkpoint``
            (if given) and the call ends.
        engine: Several runs always use ``Compiled(rounds="loop")``.

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
    check_batch_fn(runs[0].workload.batch_fn, starts[0].key)
    with nullcontext() if checkpoint is None else checkpoint.alone():
        return _simulate(runs, engine, recording, checkpoint, stop)


class _Run(NamedTuple):
    """A run for an engine."""

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
        check_schedules(method, server.schedule, trace.num_steps)
        return cls(server, Workload.of(round_fn, batch_fn, key), trace)

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
    engines = [make_engine(settings, *run) for run in runs]
    group = Together(engines) if len(runs) > 1 else Alone(engines[0])
    recordings = [recording, *[recording._replace(callbacks=())] * (len(runs) - 1)]
    recorders = [
        RunRecorder(lane, run.workload, run.trace.arrival, mine)
        for lane, run, mine in zip(group.lanes, runs, recordings, strict=True)
    ]
    saver = None
    if checkpoint is not None:
        saver = RunSaver(checkpoint, recorders, partial(_identity, runs, settings))
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


def _identity(runs: Sequence[_Run], settings: Eager | Compiled, step: int) -> dict[str, Any]:
    """Return the identity of these runs for runs that resume at a step, JSON-able.

    Only the arrivals before the step count; later ones may change.
    """
    (server, workload, trace), *others = runs
    if trace.num_steps < step:
        raise ValueError(
            f"`trace` must have the {step} steps that the run to resume has made, got "
            f"{trace.num_steps}"
        )
    identity = {"run by": "simulate", "together": len(runs)} | of_run(server, workload)
    for index, run in enumerate(others, 1):
        own = of_rate(run.server) | of_keys(*run.workload[2:])
        identity |= {f"{name} of run {index}": value for name, value in own.items()}
    identity |= {"engine": type(settings).__name__} | asdict(settings)
    return identity | {"trace": [run.trace.digest(step) for run in runs]}

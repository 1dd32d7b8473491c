"""Simulates the runs of a sweep, segment by segment; a single run is a sweep of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple

import jax

from orlomo_jax import jax_settings
from orlomo_jax.methods.method import Method
from orlomo_jax.recording.checkpoint import JOURNAL, Checkpointer, Saved
from orlomo_jax.recording.history import TrainingResult
from orlomo_jax.recording.identity import of_keys, of_rate, of_run
from orlomo_jax.recording.recorder import Recording, RunRecorder
from orlomo_jax.recording.saver import RunSaver
from orlomo_jax.server.parameter_server import ParameterServer
from orlomo_jax.server.schedules import check_schedules
from orlomo_jax.simulation.engine_choice import Compiled, Eager, choose, make_engine
from orlomo_jax.simulation.groups import OneByOne, Together, make_alike
from orlomo_jax.simulation.run_axis import RunAxis, choose_axis, devices_of_groups
from orlomo_jax.simulation.run_start import RunStart
from orlomo_jax.traces.trace import ArrivalTrace
from orlomo_jax.worker.host_batches import HostBatches
from orlomo_jax.worker.protocols import BatchFn, RoundFn
from orlomo_jax.worker.workload import Workload, check_key


class Run(NamedTuple):
    """A checked run: server, computation and arrivals.

    The server has the run's hyperparameters; ``method`` is that of all runs.
    """

    server: ParameterServer
    workload: Workload
    trace: ArrivalTrace
    method: Method
    hyperparameters: dict[str, float]

    @classmethod
    def of(
        cls, method: Method, round_fn: RoundFn, batch_fn: BatchFn | HostBatches, start: RunStart
    ) -> Run:
        """Check one run, and make its server."""
        params, trace, key, rate, model_state, hyperparameters, _ = start
        if method.synchronous != trace.synchronous or method.num_workers != trace.num_workers:
            raise ValueError(
                f"`trace` must have synchronous={method.synchronous} and "
                f"num_workers={method.num_workers} for {method.name}, got "
                f"synchronous={trace.synchronous} and num_workers={trace.num_workers}"
            )
        check_key(key)
        own = _with_hyperparameters(method, dict(hyperparameters))
        server = ParameterServer(own, params, model_state, local_learning_rate=rate)
        if server.table.max_wait != trace.max_wait:
            raise ValueError(
                f"`trace` must have max_wait={server.table.max_wait} for {method.name}, got "
                f"max_wait={trace.max_wait}"
            )
        if method.policy is not None:
            method.policy.check_trace(trace.dispatched_at)
        check_schedules(own, server.schedule, trace.num_steps)
        workload = Workload.of(round_fn, batch_fn, key, method.num_local_steps)
        return cls(server, workload, trace, method, dict(hyperparameters))

    def begin(self) -> None:
        """Dispatch the first tasks."""
        for worker in set(range(self.trace.num_workers)) - self.trace.late_joiners:
            self.server.dispatch(worker)


def _with_hyperparameters(method: Method, values: dict[str, float]) -> Method:
    """Return the method of one run; raise ValueError if one program cannot have its values."""
    if not values:
        return method
    own = method.with_hyperparameters(**values)
    for name, value in values.items():
        try:
            jax.eval_shape(
                lambda x, name=name: method.with_hyperparameters(**{name: x}) and x, value
            )
        except (TypeError, ValueError) as error:  # JAX's tracer errors are TypeErrors
            raise ValueError(
                f"`hyperparameters` must be numbers in the rule's formula, got {name}={value!r}: "
                f"{name} changes the program of {method.name}, so make a sweep for each value"
            ) from error
    return own


def simulate_runs(
    runs: Sequence[Run],
    recordings: Sequence[Recording],
    engine: Any,
    axis: RunAxis | None,
    checkpoint: Checkpointer | None,
    stop: Callable[[], bool] | None,
) -> list[TrainingResult] | None:
    """Simulate from the newest checkpoint to the end; see :func:`~orlomo_jax.simulate_many`."""
    saved = None if checkpoint is None else checkpoint.newest()
    if checkpoint is not None and saved is None and (checkpoint.directory / JOURNAL).exists():
        raise ValueError(f"{checkpoint.directory} has a run by train: choose another folder")
    with ExitStack() as stack:
        groups, settings = _grouped(runs, engine, axis, saved)
        lanes = [lane for group in groups for lane in group.lanes]
        recorders = [
            RunRecorder(lane, run.workload, run.trace.arrival, recording)
            for lane, run, recording in zip(lanes, runs, recordings, strict=True)
        ]
        for recorder in recorders:
            stack.enter_context(closing(recorder))
        saver = None
        if checkpoint is not None:
            identity = _identity(runs, settings)
            saver = RunSaver(checkpoint, recorders, identity, partial(_arrivals, runs))
        if saved is not None and saver is not None:
            saver.restore(saved)
        else:
            for run in runs:
                run.begin()
        return _Sweep(runs, groups, recorders).run(saver, stop)


class _Sweep:
    """Advances groups of runs, records each run, and collects the results."""

    def __init__(
        self,
        runs: Sequence[Run],
        groups: Sequence[OneByOne | Together],
        recorders: Sequence[RunRecorder],
    ) -> None:
        self.runs, self.groups, self.recorders = runs, groups, recorders
        self.results: list[TrainingResult | None] = [None] * len(runs)
        sizes = [len(group.lanes) for group in groups]
        self.firsts = [sum(sizes[:index]) for index in range(len(sizes))]

    def run(
        self, saver: RunSaver | None, stop: Callable[[], bool] | None
    ) -> list[TrainingResult] | None:
        """Advance to the end, or until ``stop`` returns True."""
        for run, recorder in zip(self.runs, self.recorders, strict=True):
            recorder.start(run.trace)
        self._end_runs()
        periods = () if saver is None else (saver.checkpoint.every,)
        with self._advancing() as advance_all:
            while active := [r for r in self.recorders if not r.ended]:
                end = active[0].next_stop(*periods)
                for first, rows in zip(self.firsts, advance_all(end), strict=True):
                    for index, rounds in rows.items():
                        self.recorders[first + index].applied_all(rounds, end)
                diverged = all(recorder.first_nonfinite >= 0 for recorder in self.recorders)
                if saver is not None and saver.is_due() and not diverged:
                    saver.save()
                self._end_runs()
                if stop is not None and None in self.results and stop():
                    if saver is not None and not saver.is_due():
                        saver.save()
                    return None
        return [result for result in self.results if result is not None]

    def _end_runs(self) -> None:
        """Take the results of the runs that have ended."""
        for first, group in zip(self.firsts, self.groups, strict=True):
            for index in range(len(group.lanes)):
                at = first + index
                recorder = self.recorders[at]
                if recorder.ended and self.results[at] is None:
                    group.end(index)
                    self.results[at] = recorder.end(recorder.result(self.runs[at].trace))

    @contextmanager
    def _advancing(self) -> Iterator[Callable[[int], Iterator[Any]]]:
        """Return a function that advances all groups, each in its own thread if there are more."""
        if len(self.groups) == 1:
            yield lambda end: iter([self.groups[0].advance(end)])
            return
        settings = jax_settings.capture()
        devices = devices_of_groups(len(self.groups))

        def advance(number: int, end: int) -> Any:
            with jax_settings.using(settings | {"default_device": devices[number]}):
                return self.groups[number].advance(end)

        with ThreadPoolExecutor(len(self.groups)) as pool:

            def advance_all(end: int) -> Iterator[Any]:
                futures = [pool.submit(advance, n, end) for n in range(len(self.groups))]
                return (future.result() for future in futures)

            yield advance_all


def _grouped(
    runs: Sequence[Run], engine: Any, wanted: RunAxis | None, saved: Saved | None
) -> tuple[list[OneByOne | Together], dict[str, Any]]:
    """Return groups of runs, each for one thread, and the settings that a resumed run keeps."""
    if len(runs) > 1 and wanted in ("vmap", "map") and engine == "auto":
        engine = Compiled("loop")
    settings = _as_saved(choose(engine, *runs[0][:3]), engine, saved)
    axis, num_groups = choose_axis(wanted, settings, engine, runs, saved)
    if axis != "loop":
        settings = Compiled("loop", 1)
    engines: list[Any] = [make_engine(settings, *run) for run in runs]
    width = -(-len(runs) // num_groups)
    parts = [engines[start : start + width] for start in range(0, len(engines), width)]
    groups: list[OneByOne | Together] = [OneByOne(part) for part in parts]
    if axis != "loop":
        make_alike(engines)
        devices = devices_of_groups(len(parts))
        groups = [
            Together(part, axis, width, device) for part, device in zip(parts, devices, strict=True)
        ]
    kept = {"engine": type(settings).__name__} | asdict(settings)
    if len(runs) > 1:
        kept |= {"axis": axis, "groups": len(groups)}
    return groups, kept


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


def _identity(runs: Sequence[Run], settings: dict[str, Any]) -> dict[str, Any]:
    """Return what runs that resume must have in common with these, JSON-able."""
    first, *others = runs
    identity = {"run by": "simulate", "together": len(runs)} | of_run(first.server, first.workload)
    for index, run in enumerate(others, 1):
        own = of_rate(run.server) | of_keys(*run.workload.keys)
        own |= {f"hyperparameter {name}": str(x) for name, x in run.hyperparameters.items()}
        identity |= {f"{name} of run {index}": value for name, value in own.items()}
    return identity | settings


def _arrivals(runs: Sequence[Run], step: int) -> dict[str, Any]:
    """Return the identity of the arrivals before a step: later ones may still change."""
    if (num_steps := runs[0].trace.num_steps) < step:
        raise ValueError(
            f"`trace` must have the {step} steps that the run to resume has made, got {num_steps}"
        )
    return {"trace": [run.trace.digest(step) for run in runs]}

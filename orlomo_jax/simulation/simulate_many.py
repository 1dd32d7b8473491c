"""Simulates a sweep: many runs of one method and shape, which share compiled programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from typing import Literal

from orlomo_jax.checks import check_functions, check_type
from orlomo_jax.methods.method import Method, round_of
from orlomo_jax.recording.checkpoint import Checkpointer
from orlomo_jax.recording.history import TrainingResult
from orlomo_jax.recording.interrupts import put_off_interrupts
from orlomo_jax.recording.recorder import Recording
from orlomo_jax.server.placement import mesh_context
from orlomo_jax.simulation.engine_choice import Compiled, Eager
from orlomo_jax.simulation.run_axis import check_axis
from orlomo_jax.simulation.run_start import RunStart
from orlomo_jax.simulation.runs import Run, simulate_runs
from orlomo_jax.worker.batch_check import check_batch_fn
from orlomo_jax.worker.host_batches import HostBatches
from orlomo_jax.worker.protocols import BatchFn, Evaluate, LossFn, RoundFn
from orlomo_jax.worker.workload import as_batch_fn


def simulate_many(
    method: Method,
    loss_fn: LossFn | None,
    batch_fn: BatchFn | HostBatches,
    runs: Sequence[RunStart],
    *,
    evaluate: Evaluate | None = None,
    evaluate_every: int | None = None,
    checkpoint: Checkpointer | None = None,
    stop: Callable[[], bool] | None = None,
    engine: Literal["auto", "eager", "compiled"] | Eager | Compiled = "auto",
    over_runs: Literal["auto", "vmap", "map", "loop"] = "auto",
    round_fn: RoundFn | None = None,
) -> list[TrainingResult] | None:
    """Simulate a sweep of runs, which differ in values and arrivals.

    The results are those of :func:`~orlomo_jax.simulate` with each run's arguments, up to rounding
    (bit for bit if ``over_runs`` is "loop"). If a run diverges, or a callback ends it, the others
    continue. Memory must hold all runs.

    Args:
        method: As in :func:`~orlomo_jax.simulate`, and so are the arguments that are not described
            here.
        loss_fn: The loss of all runs.
        batch_fn: The batch function of all runs; each run passes it its own key.
        runs: At least one. They have the same shapes and number of steps. They may differ in seed,
            learning rates, the values of schedules, initial parameters, arrivals, and numbers in
            the formula of the server's rule; see :class:`~orlomo_jax.RunStart`. Constant learning
            rates and schedules cannot be mixed; schedules with different numbers are one
            ``jax.tree_util.Partial`` with different arguments.
        evaluate: Called for each run.
        evaluate_every: Steps between evaluations.
        checkpoint: All runs share one folder, and resume together.
        stop: Called after each segment of at most 256 steps. If it returns True, the runs are saved
            to ``checkpoint``, if there is one, and the call ends.
        engine: How the steps of a run are computed.
        over_runs: How the runs are computed: by one program for several runs, with ``jax.vmap``
            ("vmap") or one run after another inside it ("map"); or by one program for each run
            ("loop"). The runs are divided into groups, one for each device or CPU core, which
            compute at the same time. "auto" is "vmap", except for an S that differs between
            workers, for ``engine`` "eager" or with rounds computed together, and on a CPU from
            20,000 parameters.
        round_fn: The local round, if it is not ``method.local_round(loss_fn)``.

    Returns:
        The result of each run, or None if ``stop`` ended the call.

    Raises:
        ValueError: If ``runs`` is empty, if the runs cannot share a program, or for the reasons of
            :func:`~orlomo_jax.simulate`.
        BlockingIOError, TypeError: As in :func:`~orlomo_jax.simulate`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from orlomo_jax import RunStart, from_loss, heterogeneous, make_method, sample_trace
        >>> def run(seed, rate):
        ...     trace = sample_trace(heterogeneous(), 2, 30, 4, seed)
        ...     return RunStart(jnp.zeros(1), trace, jax.random.key(seed), rate)
        >>> runs = [run(seed, rate) for seed in range(2) for rate in (0.01, 0.02)]
        >>> results = simulate_many(
        ...     make_method("orlomo", num_workers=2, num_local_steps=4),
        ...     from_loss(lambda params, batch: jnp.mean((params - batch) ** 2)),
        ...     lambda key, worker, round: jnp.ones((4, 1)),
        ...     runs,
        ... )
        >>> [result.status for result in results]
        ['finished', 'finished', 'finished', 'finished']
    """
    check_type("method", method, Method, "a Method, as from make_method")
    check_type("checkpoint", checkpoint, Checkpointer, "a Checkpointer")
    check_functions(loss_fn=loss_fn, batch_fn=batch_fn, evaluate=evaluate, round_fn=round_fn)
    axis = check_axis(over_runs)
    round_fn = round_of(method, loss_fn, round_fn)
    if not runs:
        raise ValueError("`runs` must contain at least one run, got none")
    for index, run in enumerate(runs):
        check_type(f"runs[{index}]", run, RunStart, "a RunStart")
    num_steps = runs[0].trace.num_steps
    for index, run in enumerate(runs):
        if run.trace.num_steps != num_steps:
            raise ValueError(
                "the traces of `runs` must have the same number of steps, got "
                f"{num_steps} for runs[0] and {run.trace.num_steps} for runs[{index}]"
            )
    recordings = [Recording.of(num_steps, evaluate, evaluate_every, run.callbacks) for run in runs]
    batch_fn = as_batch_fn(batch_fn)  # one for all: Partials are compared by identity
    alone = nullcontext() if checkpoint is None else checkpoint.alone()
    with mesh_context([run.params for run in runs]):
        checked = [Run.of(method, round_fn, batch_fn, run) for run in runs]
        first = checked[0].workload
        check_batch_fn(first.batch_fn, runs[0].key, first.steps_of(0))
        with put_off_interrupts(checkpoint is not None) as interrupted, alone, closing(first):

            def stops() -> bool:
                return interrupted() or (stop is not None and stop())

            return simulate_runs(checked, recordings, engine, axis, checkpoint, stops)

"""Trains on real workers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import optax

from orlomo_jax import trees
from orlomo_jax.checks import check_count, check_functions, check_number, check_type
from orlomo_jax.methods.method import Method, round_of
from orlomo_jax.recording.callbacks import AnyCallback
from orlomo_jax.recording.checkpoint import JOURNAL, Checkpointer
from orlomo_jax.recording.history import TrainingResult
from orlomo_jax.recording.identity import of_run
from orlomo_jax.recording.journal import Journal
from orlomo_jax.recording.recorder import Recording, RunRecorder
from orlomo_jax.recording.saver import RunSaver
from orlomo_jax.recording.state_source import ServerSource
from orlomo_jax.runtimes.driver import Driver
from orlomo_jax.runtimes.membership import Membership
from orlomo_jax.runtimes.protocol import WorkerPool
from orlomo_jax.runtimes.run_log import RunLog
from orlomo_jax.runtimes.run_options import RunOptions
from orlomo_jax.server.audit import Audit, check_auditable
from orlomo_jax.server.parameter_server import ParameterServer
from orlomo_jax.server.placement import as_jax_arrays, explicit_mesh, with_auto_axes
from orlomo_jax.server.reports import Report
from orlomo_jax.server.schedules import check_schedules
from orlomo_jax.trees import Array, PyTree
from orlomo_jax.worker.batch_check import check_batch_fn
from orlomo_jax.worker.host_batches import HostBatches
from orlomo_jax.worker.protocols import BatchFn, Evaluate, LossFn, RoundFn
from orlomo_jax.worker.workload import Workload, check_key


def train(
    method: Method,
    loss_fn: LossFn | None,
    batch_fn: BatchFn | HostBatches,
    params: trees.Params,
    workers: WorkerPool,
    *,
    num_steps: int,
    key: Array,
    model_state: PyTree = None,
    local_learning_rate: float | optax.Schedule,
    evaluate: Evaluate | None = None,
    evaluate_every: int | None = None,
    callbacks: Sequence[AnyCallback] = (),
    checkpoint: Checkpointer | None = None,
    journal: str | os.PathLike[str] | None = None,
    membership: Membership | None = None,
    round_timeout: float = 600.0,
    start_timeout: float = 1800.0,
    max_failures: int = 3,
    audit: bool = False,
    fault_injector: Callable[[Report], Iterable[Report]] | None = None,
    round_fn: RoundFn | None = None,
) -> TrainingResult:
    """Train on real workers; reports are applied in the order in which they arrive.

    Server, rules, compiled rounds and randomness are those of :func:`~orlomo_jax.simulate`:
    ``simulate`` with the same arguments and ``trace=result.trace`` repeats the run.

    A worker that dies, raises or is silent for too long loses its round; it is started again and
    sent the newest parameters. A worker also loses its round if its report is rejected. If a worker
    raises in the first round of a run, the exception is raised here at once.

    With ``checkpoint``, a :class:`~orlomo_jax.recording.Journal` of the arrivals is written next to
    the checkpoints. A killed run resumes from the newest checkpoint, repeats (in this process, one
    by one) the later rounds in the journal, and gives every worker its task again. So no applied
    report is lost or applied twice. Callbacks get the repeated steps too. Ctrl-C saves a checkpoint
    first; a second Ctrl-C stops at once.

    Args:
        method: A :class:`~orlomo_jax.Method`: the server rule, K and S.
        loss_fn: As in :func:`~orlomo_jax.simulate`; None if ``round_fn`` is given.
        batch_fn: As in :func:`~orlomo_jax.simulate`.
        params: w_0.
        workers: The worker pool: :class:`~orlomo_jax.ThreadWorkers` or
            :class:`~orlomo_jax.RayWorkers`.
        num_steps: T ≥ 1, the number of reports to apply.
        key: A ``jax.random.key``.
        model_state: See :class:`~orlomo_jax.ParameterServer`.
        local_learning_rate: γ, a float or a schedule of the server's step.
        evaluate: ``evaluate(params, model_state) -> {name: scalar}``; jit it yourself. Workers
            continue meanwhile, but their reports wait. Before the first step it is
            tested: compiled if it is jitted, otherwise called.
        evaluate_every: Steps between evaluations, ≥ 1; None evaluates only after the last step.
        callbacks: :class:`~orlomo_jax.Callback` objects, or functions of a
            :class:`~orlomo_jax.StepRecord`. A callback can end the run.
        checkpoint: Where to save and resume; :class:`~orlomo_jax.Checkpointer` says what must be
            the same. ``num_steps`` may be larger now.
        journal: The journal's file; None is ``arrivals.jsonl`` next to the checkpoints, or no file
            without checkpoints. If the file exists, its run continues.
        membership: Workers that join late or leave; not for a synchronous method.
        round_timeout: Seconds > 0 from a dispatch until its report counts as lost; ``math.inf`` for
            never.
        start_timeout: Additional seconds ≥ 0 for the first round after each start of a worker,
            because that round compiles.
        max_failures: A worker is given up after more than this many lost rounds in a row, ≥ 0.
        audit: Whether to check Lemmas 1 and 2 on the server at each step (OrLoMo only); it takes a
            few passes over the parameters in float64.
        fault_injector: For tests: maps each arriving report to the reports that the server gets.
        round_fn: The local round, if it is not ``method.local_round(loss_fn)``.

    Returns:
        A :class:`~orlomo_jax.TrainingResult`; times are in seconds since the run began. The run has
        diverged if all workers (in a synchronous method, one) were given up because of a NaN or an
        Inf in their reports, or if the final parameters have one.

    Raises:
        WorkersLostError: If no worker is left, or a synchronous method lost one.
        AuditError: If ``audit`` finds that the server contradicts a lemma.
        ValueError: If an argument is out of range, or ``checkpoint`` or journal are of another run
            or do not match.
        BlockingIOError: If another process writes to the journal, or another run to the folder of
            ``checkpoint``.
        TypeError: If ``key`` is not a key, a leaf of params is not floating or one of model state
            not numeric, or ``batch_fn`` returns a different batch each time it is called.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from orlomo_jax import ThreadWorkers, from_loss, make_method, train
        >>> method = make_method("orlomo", num_workers=2, num_local_steps=4)
        >>> loss_fn = from_loss(lambda params, batch: jnp.mean((params - batch) ** 2))
        >>> result = train(
        ...     method, loss_fn, lambda key, worker, round: jnp.ones((4, 8)), jnp.zeros(8),
        ...     ThreadWorkers(), num_steps=40, key=jax.random.key(0), local_learning_rate=0.1)
        >>> result.status, bool(abs(result.params - 1).max() < 0.5)
        ('finished', True)
    """
    check_type("method", method, Method, "a Method, as from make_method")
    check_type("checkpoint", checkpoint, Checkpointer, "a Checkpointer")
    check_type("membership", membership, Membership, "a Membership")
    check_functions(loss_fn=loss_fn, batch_fn=batch_fn, evaluate=evaluate, round_fn=round_fn)
    check_functions(fault_injector=fault_injector)
    if isinstance(workers, type) or not hasattr(workers, "submit"):
        raise TypeError(
            f"`workers` must be a worker pool such as ThreadWorkers(), got workers={workers!r}"
        )
    num_steps = check_count("num_steps", num_steps, 1)
    recording = Recording.of(num_steps, evaluate, evaluate_every, callbacks)
    options = RunOptions(
        membership=Membership() if membership is None else membership,
        round_timeout=check_number("round_timeout", round_timeout, lambda x: x > 0, "> 0"),
        start_timeout=check_number("start_timeout", start_timeout, lambda x: x >= 0, "≥ 0"),
        max_failures=check_count("max_failures", max_failures),
        fault_injector=fault_injector,
    )
    options.membership.bind(method.num_workers)
    if method.synchronous and options.membership.absent:
        raise ValueError(f"`membership.absent` must be empty: {method.name} waits for all workers")
    check_key(key)
    if audit:
        check_auditable(method)
    trees.check_floating("params", params)
    server = ParameterServer(
        method, _bound(params), model_state, local_learning_rate=local_learning_rate
    )
    run_round = round_of(method, loss_fn, round_fn)
    workload = Workload.of(run_round, batch_fn, key, method.num_local_steps)
    check_batch_fn(workload.batch_fn, key, workload.steps_of(0))
    check_schedules(method, server.schedule, num_steps)
    path = journal if checkpoint is None or journal else checkpoint.directory / JOURNAL
    with contextlib.ExitStack() as stack:
        stack.callback(options.membership.unbind)
        stack.callback(workload.close)
        if checkpoint is not None:
            stack.enter_context(checkpoint.alone())
        result = _train(server, workload, workers, recording, options, checkpoint, path, audit)
    return result._replace(
        params=jax.tree.map(
            lambda given, x: jax.device_put(x, given.sharding) if explicit_mesh(given) else x,
            params,
            result.params,
        )
    )


def _train(
    server: ParameterServer,
    workload: Workload,
    workers: WorkerPool,
    recording: Recording,
    options: RunOptions,
    checkpoint: Checkpointer | None,
    path: Any,
    audit: bool,
) -> TrainingResult:
    """Train from the newest checkpoint and the journal to the end."""
    method = server.method
    absent = {"absent": sorted(options.membership.absent)}
    identity = {"num_workers": method.num_workers, "synchronous": method.synchronous}
    if checkpoint is not None or path is not None:
        identity = {"run by": "train"} | of_run(server, workload)
    if server.table.max_wait is not None:
        identity["max_wait"] = server.table.max_wait
    saved = None if checkpoint is None else checkpoint.newest_of(identity)
    journal = Journal(identity | absent, path)
    with contextlib.closing(journal):

        def arrival(step: int) -> tuple[float, int, int]:
            at = journal.arrivals[step]
            return at.time, at.worker, step - at.dispatched_at

        recorder = RunRecorder(ServerSource(server, workload), workload, arrival, recording)
        saver = seen = None
        if checkpoint is not None:
            saver = RunSaver(checkpoint, [recorder], identity)
        if saved is not None and saver is not None:
            notes = saver.restore(saved)
            with saved.reading():
                seen = check_count("events", notes["events"])
        _check_journal(journal, server.step, seen or 0, recording.num_steps)
        auditor = None
        if audit:
            state = server.state
            auditor = Audit(method, state.params, state.rule_state)
        log = RunLog(journal, recorder)
        driver = Driver(workers, workload, recorder, log, saver, auditor, options)
        with contextlib.closing(recorder):
            recorder.start(journal.trace())
            log.health(driver.present)  # so that errors show before the first step
            driver.replay.run(seen, driver.record)
            log.resume_clock()
            if not recorder.ended:
                driver.train()
            return recorder.end(recorder.result(journal.trace(), log.health(driver.present)))


def _check_journal(journal: Journal, step: int, events: int, num_steps: int) -> None:
    """Raise ValueError unless the journal matches the checkpoint and this run's length."""
    for name, there, wanted in (
        ("reports", len(journal.arrivals), step),
        ("events", len(journal.events), events),
    ):
        if there < wanted:
            raise ValueError(
                f"{journal.path} must have the run up to its checkpoint, {wanted} {name}, "
                f"but it has {there}"
            )
    try:
        journal.trace()
    except ValueError as error:
        raise ValueError(f"{journal.path} must be of one run: {error}") from error
    if len(journal.arrivals) > num_steps:
        raise ValueError(
            f"`num_steps` must be ≥ {len(journal.arrivals)}, the reports that the run to "
            f"resume has applied, got num_steps={num_steps}"
        )


def _bound(params: trees.Params) -> trees.Params:
    """Commit parameters to their devices, like merged ones, so that one server step compiles."""

    def leaf(x):  # a copy, because the server may reuse the memory of its parameters
        return x if x.committed else jax.device_put(x, x.sharding, may_alias=False)

    return jax.tree.map(leaf, with_auto_axes(as_jax_arrays(params)))

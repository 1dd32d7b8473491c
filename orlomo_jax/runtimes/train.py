"""Training on real workers, behind one function."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import jax
import optax

from orlomo_jax.arrays import explicit_mesh, own, with_auto_axes
from orlomo_jax.audit import check_auditable
from orlomo_jax.checkpoint import JOURNAL, Checkpoints
from orlomo_jax.checks import check_count, check_number
from orlomo_jax.health import Health
from orlomo_jax.history import StepRecord, TrainingResult
from orlomo_jax.methods import Method
from orlomo_jax.pure import check_pure
from orlomo_jax.reports import Report
from orlomo_jax.rounds import check_key
from orlomo_jax.rules import contract
from orlomo_jax.runtimes.driver import Driver
from orlomo_jax.runtimes.membership import Membership
from orlomo_jax.runtimes.notes import Plan
from orlomo_jax.runtimes.workers import Work, Workers
from orlomo_jax.schedules import check_schedules
from orlomo_jax.server import ParameterServer

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, PyTree, Scalar

    Evaluate = Callable[[contract.Params, PyTree[Array]], dict[str, Scalar]]


def train(
    method: Method,
    round_fn: Callable,
    batch_fn: Callable,
    params: contract.Params,
    workers: Workers,
    *,
    num_steps: int,
    key: Array,
    model_state: PyTree[ArrayLike] = None,
    local_learning_rate: float | optax.Schedule,
    evaluate: Evaluate | None = None,
    evaluate_every: int | None = None,
    on_step: Callable[[StepRecord], bool | None] | None = None,
    on_health: Callable[[Health], None] | None = None,
    health_every: float = 10.0,
    checkpoint: Checkpoints | None = None,
    journal: str | os.PathLike[str] | None = None,
    membership: Membership | None = None,
    round_timeout: float = 600.0,
    start_timeout: float = 1800.0,
    max_failures: int = 3,
    audit: bool = False,
    inject: Callable[[Report], Iterable[Report]] | None = None,
) -> TrainingResult:
    """Train on real workers, whose reports are applied in the order in which they come.

    The same server, rules and compiled rounds as in :func:`~orlomo_jax.simulate`, and the same
    randomness: ``simulate`` with the same arguments and ``result.trace`` repeats the run.

    A worker that dies, raises or is silent for too long loses its round; it is started again and
    sent the newest parameters. A rejected report loses its round too. What a worker raises in the
    first round of a run is raised here at once.

    With ``checkpoint``, a :class:`~orlomo_jax.Journal` of the arrivals lies beside the checkpoints.
    A run whose process was killed resumes from the newest checkpoint, repeats (here, one by one)
    the rounds that the journal holds beyond it, and gives every worker the task that it had:
    nothing that was applied is lost or applied twice. ``on_step`` sees the repeated steps too.
    Ctrl-C saves a checkpoint first; a second one does not wait for it.

    Args:
        method: A :class:`~orlomo_jax.Method`.
        round_fn: ``method.local_round(loss_fn, num_local_steps)``.
        batch_fn: As in :func:`~orlomo_jax.simulate`.
        params: w_0.
        workers: :class:`~orlomo_jax.Threads` or :class:`~orlomo_jax.RayWorkers`; K of them.
        num_steps: T ≥ 1, the reports to apply.
        key: A ``jax.random.key``.
        model_state: See :class:`~orlomo_jax.ParameterServer`.
        local_learning_rate: γ, a float or a schedule of the server's step.
        evaluate: ``evaluate(params, model_state) -> {name: scalar}``; jit it yourself. Workers go
            on meanwhile, but their reports wait. It is tried once before the first step.
        evaluate_every: Steps between evaluations, ≥ 1; None is after the last step alone.
        on_step: Called with a :class:`~orlomo_jax.StepRecord` after each step. If it returns True
            or raises StopIteration, the run ends there, with the status "stopped"; a checkpoint is
            saved first.
        on_health: Called with a :class:`~orlomo_jax.Health` from time to time.
        health_every: Seconds > 0 between two of them.
        checkpoint: Where to save as the run goes, and to go on from; what must be the same is said
            in :class:`~orlomo_jax.Checkpoints`. ``num_steps`` may have become larger.
        journal: File of the arrivals; None is ``arrivals.jsonl`` beside the checkpoints, or none
            without. A run goes on from the one that is there.
        membership: Who joins late or leaves; not for a synchronous method.
        round_timeout: Seconds > 0 after its dispatch until a report is given up; ``math.inf`` for
            never.
        start_timeout: Seconds ≥ 0 that the first round of a worker has in addition, whenever it is
            started: it starts and compiles then.
        max_failures: Lost rounds in a row, ≥ 0, that are forgiven: with one more a worker is given
            up.
        audit: Whether to hold Lemmas 1 and 2 against the server at each step (OrLoMo alone); a few
            passes over the parameters in float64.
        inject: Fault injection: maps each report that comes to those that the server sees.

    Returns:
        A :class:`~orlomo_jax.TrainingResult`; times are in seconds since the run began. It has
        ``diverged`` where all workers were given up (of a synchronous method, one) since their
        reports held a NaN or an Inf, or where the parameters do in the end.

    Raises:
        WorkersGone: If no worker is left, or one that a synchronous method needs is given up.
        AuditFailure: If ``audit`` finds the server at odds with a lemma.
        ValueError: If an argument is out of range, or ``checkpoint`` or journal are of another run
            or do not go together.
        BlockingIOError: If another process is writing the journal, or another run has the folder
            of ``checkpoint``.
        TypeError: If ``key`` is no key, a leaf of params or model state is not floating, or
            ``batch_fn`` gives another batch each time it is called.

    Example:
        See :class:`~orlomo_jax.Threads`.
    """
    plan = Plan(
        num_steps=check_count("num_steps", num_steps, 1),
        evaluate=evaluate,
        evaluate_every=(
            num_steps
            if evaluate_every is None
            else check_count("evaluate_every", evaluate_every, 1)
        ),
        on_step=on_step,
        on_health=on_health,
        health_every=check_number("health_every", health_every, lambda x: x > 0, "> 0"),
        checkpoint=checkpoint,
        journal=journal if checkpoint is None or journal else checkpoint.directory / JOURNAL,
        membership=Membership(workers.num_workers) if membership is None else membership,
        round_timeout=check_number("round_timeout", round_timeout, lambda x: x > 0, "> 0"),
        start_timeout=check_number("start_timeout", start_timeout, lambda x: x >= 0, "≥ 0"),
        max_failures=check_count("max_failures", max_failures),
        audit=audit,
        inject=inject,
    )
    check_key(key)
    if audit:
        check_auditable(method)
    if plan.membership.num_workers != workers.num_workers:
        raise ValueError(
            f"`membership` must be of the {workers.num_workers} workers, got one of "
            f"{plan.membership.num_workers}"
        )
    if method.synchronous and plan.membership.absent:
        raise ValueError(f"`membership.absent` must be empty: {method.name} waits for all workers")
    contract.check_floating("params", params)
    server = ParameterServer(
        method,
        _bound(params),
        workers.num_workers,
        model_state,
        local_learning_rate=local_learning_rate,
    )
    work = Work.of(round_fn, batch_fn, key)
    check_pure(work.batch_fn, key)
    check_schedules(method, server.schedule, plan.num_steps)
    driver = Driver(server, workers, work, plan)
    with contextlib.nullcontext() if checkpoint is None else checkpoint.alone():
        result = driver.run()
    return result._replace(
        params=jax.tree.map(
            lambda given, x: jax.device_put(x, given.sharding) if explicit_mesh(given) else x,
            params,
            result.params,
        )
    )


def _bound(params: contract.Params) -> contract.Params:
    """Return parameters that are bound to devices, as merged ones are: one server step compiles."""

    def leaf(x):  # a copy, since the server may write over the memory of its own
        return x if x.committed else jax.device_put(x, x.sharding, may_alias=False)

    return jax.tree.map(leaf, with_auto_axes(own(params)))

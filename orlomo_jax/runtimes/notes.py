"""What is noted of a real run: journal, audit, evaluations, checkpoints, health, the result."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from orlomo_jax import identity
from orlomo_jax.audit import Audit
from orlomo_jax.checkpoint import Checkpoints
from orlomo_jax.checks import check_count
from orlomo_jax.driven import check_job
from orlomo_jax.health import Health, Meter
from orlomo_jax.history import Evaluation, History, StepRecord, TrainingResult, ends_run, evaluated
from orlomo_jax.journal import Arrival, Journal
from orlomo_jax.reports import Report
from orlomo_jax.runtimes import metrics
from orlomo_jax.runtimes.membership import Membership
from orlomo_jax.runtimes.workers import Work
from orlomo_jax.server import ParameterServer
from orlomo_jax.server_step import start_momentum
from orlomo_jax.worker import all_finite

_norm = jax.jit(optax.tree.norm)


class Plan(NamedTuple):
    """The arguments of :func:`~orlomo_jax.train` that its loop needs, checked."""

    num_steps: int
    evaluate: Callable | None
    evaluate_every: int
    on_step: Callable[[StepRecord], bool | None] | None
    on_health: Callable[[Health], None] | None
    health_every: float
    checkpoint: Checkpoints | None
    journal: Any
    membership: Membership
    round_timeout: float
    start_timeout: float
    max_failures: int
    audit: bool
    inject: Callable[[Report], Iterable[Report]] | None


class Notes:
    """What is noted of one run, and saved."""

    def __init__(self, server: ParameterServer, work: Work, plan: Plan) -> None:
        """Begin the clock; nothing is read or written yet."""
        self.server, self.work, self.plan = server, work, plan
        self.meter = Meter(server.num_workers)
        self.evaluations: list[Evaluation] = []
        self.audit: Audit | None = None
        self.stopped = False  # by on_step
        self.unseen = 0  # the newest events of the journal, while its reports are repeated
        self._like = check_job(server, work).metrics
        self._began = time.monotonic()

    def open(self) -> int | None:
        """Open the journal, and put the server where the newest checkpoint left it.

        Returns:
            How many of the journal's events the checkpoint has seen; None without a checkpoint.

        Raises:
            ValueError: If journal, checkpoint and run do not go together.
        """
        plan, method = self.plan, self.server.method
        mine = {"num_workers": self.server.num_workers, "synchronous": method.synchronous}
        if plan.checkpoint is not None or plan.journal is not None:
            mine = self.identity()
        saved = None if plan.checkpoint is None else plan.checkpoint.newest_of(mine)
        self._identity = mine
        absent = {"absent": sorted(plan.membership.absent)}
        self.journal = journal = Journal(mine | absent, plan.journal)
        seen = None
        if saved is not None:
            with saved.reading():
                seen = check_count("events", saved.notes["events"])
                self.evaluations = [Evaluation(*e) for e in saved.notes["evaluations"]]
                self.server.restore(saved.arrays["server"], saved.notes["server"])
                check_count("step", self.server.step, saved.step, saved.step)
        for name, there, wanted in (
            ("reports", len(journal.arrivals), self.server.step),
            ("events", len(journal.events), seen or 0),
        ):
            if there < wanted:
                raise ValueError(
                    f"{journal.path} must hold the run up to its checkpoint, {wanted} {name}, "
                    f"but it holds {there}"
                )
        if len(journal.arrivals) > plan.num_steps:
            raise ValueError(
                f"`num_steps` must be ≥ {len(journal.arrivals)}, the reports that the run to "
                f"resume has applied, got num_steps={plan.num_steps}"
            )
        if plan.audit:
            self.audit = Audit(self.server.method, self.server.params, self.server.state)
        return seen

    def rehearse(self, present: set[int]) -> None:
        """Evaluate and make a result as at the end: errors show before the first step."""
        if self.server.step < self.plan.num_steps:
            self.result(diverged=False, present=present)
            if self.plan.evaluate is not None:
                evaluated(self.plan.evaluate, self.server.params, self.server.model_state)

    def resume_clock(self) -> None:
        """Go on from the time of the last arrival: what was down in between does not count."""
        if self.journal.arrivals:
            self._began = time.monotonic() - self.journal.arrivals[-1].time

    def seconds(self) -> float:
        """Return the seconds since the run began, without those in which it was down."""
        return time.monotonic() - self._began

    def after_step(self, report: Report, arrival: Arrival) -> None:
        """Audit, evaluate, tell and save, as simulated runs do."""
        plan, step = self.plan, self.server.step
        last, evaluation = step == plan.num_steps, None
        delay = step - 1 - arrival.dispatched_at
        self.meter.applied(arrival.worker, delay)
        if self.audit is not None:
            self.audit.applied(report, step - 1, self.server.params, self.server.state)
        if plan.evaluate is not None and (step % plan.evaluate_every == 0 or last):
            evaluation = evaluated(plan.evaluate, self.server.params, self.server.model_state)
            self.evaluations.append(Evaluation(step, arrival.time, evaluation))
        if plan.on_step is not None:
            of_round = jax.tree.map(lambda x: x[0], metrics.stacked([arrival.metrics], self._like))
            record = StepRecord(
                step, arrival.time, arrival.worker, delay, arrival.loss, of_round, evaluation
            )
            self.stopped |= ends_run(plan.on_step, record)
        ends = last or self.stopped
        if plan.checkpoint is not None and (step % plan.checkpoint.every == 0 or ends):
            self.save()

    def save(self) -> None:
        """Write a checkpoint, the journal up to it first."""
        assert self.plan.checkpoint is not None
        self.journal.sync()
        arrays, books = self.server.snapshot()
        notes = {
            "server": books,
            "evaluations": self.evaluations,
            "events": len(self.journal.events) - self.unseen,
        }
        save = self.plan.checkpoint.save_run
        save(self.server.step, {"server": arrays}, notes, self._identity)

    def health(self, present: set[int]) -> Health:
        """Return a view of the run, in which these workers take part."""
        momentum = start_momentum(self.server.peek()[2])
        norm = None if momentum is None else float(_norm(momentum))
        there = tuple(worker in present for worker in range(self.server.num_workers))
        return self.meter.view(self.server.step, there, norm)

    def identity(self) -> dict[str, Any]:
        """Return what a checkpoint must have in common with the run that resumes from it."""
        round_fn, batch_fn, *keys = self.work
        work = identity.of_work(round_fn, batch_fn)
        return {"run by": "train"} | self.server.identity() | identity.of_keys(*keys) | work

    def result(self, *, diverged: bool, present: set[int]) -> TrainingResult:
        """Return what came of the run; parameters that overflowed have diverged, too."""
        trace, arrivals, server = self.journal.trace(), self.journal.arrivals, self.server
        history = History(
            step=np.arange(1, trace.num_steps + 1, dtype=np.int32),
            time=trace.times,
            worker=trace.workers,
            delay=trace.delays,
            loss=np.array([a.loss for a in arrivals], jnp.result_type(float)),
            metrics=metrics.stacked([a.metrics for a in arrivals], self._like),
            evaluations=tuple(self.evaluations),
        )
        trees = server.peek()  # the run is over, or has not begun
        overflowed = not diverged and not bool(all_finite(trees))
        diverged = diverged or overflowed
        stopped = self.stopped and server.step < self.plan.num_steps
        return TrainingResult(
            *trees,
            history=history,
            trace=trace,
            status="diverged" if diverged else "stopped" if stopped else "finished",
            diverged_at=server.step - overflowed if diverged else None,
            health=self.health(present),
        )

"""The loop that every real runtime shares: dispatch, wait, apply, note, look after the workers."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from orlomo_jax.audit import Audit
from orlomo_jax.checkpoint import Checkpoints
from orlomo_jax.health import Health, Meter
from orlomo_jax.history import Evaluation, History, StepRecord, TrainingResult
from orlomo_jax.journal import Journal
from orlomo_jax.reports import Report, ReportRejected, Task
from orlomo_jax.runtimes.membership import Membership
from orlomo_jax.runtimes.workers import Outcome, Work, Workers, answer
from orlomo_jax.server import ParameterServer
from orlomo_jax.server_step import start_momentum
from orlomo_jax.trace import Event

_POLL = 0.2
"""Seconds after which the driver looks at clocks and memberships though no report came."""

_norm = jax.jit(optax.tree.norm)
_log = logging.getLogger("orlomo_jax")


class WorkersGone(RuntimeError):
    """No worker is left, or one that a synchronous method waits for; all before it is saved."""


class Plan(NamedTuple):
    """The arguments of :func:`~orlomo_jax.train` that its loop needs, checked."""

    num_steps: int
    evaluate: Callable | None
    evaluate_every: int
    on_step: Callable[[StepRecord], None] | None
    on_health: Callable[[Health], None] | None
    health_every: float
    checkpoint: Checkpoints | None
    membership: Membership
    round_timeout: float
    max_failures: int
    inject: Callable[[Report], Iterable[Report]] | None


class Driver:
    """One run: a server, its workers, and what is noted of them."""

    def __init__(self, server: ParameterServer, workers: Workers, work: Work, plan: Plan) -> None:
        """Open the journal; it lies beside the checkpoints, where there are any."""
        self.server, self.workers, self.work, self.plan = server, workers, work, plan
        num_workers = server.num_workers
        self.present = set(range(num_workers)) - plan.membership.absent
        self.meter = Meter(num_workers)
        self.failures = [0] * num_workers  # lost rounds in a row
        self.last_failure = ["left"] * num_workers
        self.sent_at: dict[int, float] = {}  # of the outstanding tasks
        self.evaluations: list[Evaluation] = []
        self.audit: Audit | None = None
        self.diverged = False
        path = None if plan.checkpoint is None else plan.checkpoint.directory / "arrivals.jsonl"
        self.journal = Journal(num_workers, server.method.synchronous, path)

    def run(self, *, audit: bool) -> TrainingResult:
        """Go on from what is saved, and train to the end."""
        seen = self._restore()
        if audit:
            self.audit = Audit(self.server.method, self.server.params, self.server.state)
        self._repeat(seen)
        earlier = self.journal.arrivals[-1].time if self.journal.arrivals else 0.0
        self._began = time.monotonic() - earlier
        self._looked = time.monotonic()
        self._health_due = self._looked + self.plan.health_every
        if self.server.step < self.plan.num_steps:
            try:
                self.workers.open(self.work)
                self._begin()
                while self.server.step < self.plan.num_steps and not self.diverged:
                    self._turn()
            finally:
                self.workers.close()
        return self._result()

    def _restore(self) -> int:
        """Put the server where the newest checkpoint left it; return the events seen by then."""
        checkpoint = self.plan.checkpoint
        saved = None if checkpoint is None else checkpoint.newest_of(self._identity())
        if saved is None:
            for worker in sorted(self.present):
                self.server.dispatch(worker)
            return 0
        self.server.restore(saved.arrays["server"], saved.notes["server"])
        self.evaluations = [Evaluation(*e) for e in saved.notes["evaluations"]]
        seen = saved.notes["events"]
        for event in self.journal.events[:seen]:
            self._count_in(event)
        return seen

    def _repeat(self, seen: int) -> None:
        """Repeat what the journal holds beyond the checkpoint: the same rounds, in its order."""
        events: defaultdict[int, list[Event]] = defaultdict(list)
        for event in self.journal.events[seen:]:
            events[event.step].append(event)
        for arrival in self.journal.arrivals[self.server.step :]:
            self._happen_again(events.pop(self.server.step, []))
            task = self.server.held(arrival.worker)
            if task is None:
                raise ValueError(
                    f"{self.journal.path} must go with its checkpoint, but worker "
                    f"{arrival.worker} held no task at step {self.server.step}"
                )
            result, _ = answer(self.work, task.worker, task.round, task[3:])
            report = task.report(result)
            for worker in self.server.receive(report):
                self.server.dispatch(worker)
            self._after_step(report, arrival.time, arrival.loss)
        self._happen_again(events.pop(self.server.step, []))

    def _happen_again(self, events: list[Event]) -> None:
        for event in events:
            if event.kind in ("lost", "left") and self.server.held(event.worker) is not None:
                self.server.release(event.worker)
            self._count_in(event)
            if event.kind in ("redispatched", "joined"):
                self.server.dispatch(event.worker)

    def _count_in(self, event: Event) -> None:
        if event.kind == "joined":
            self.present.add(event.worker)
        elif event.kind == "left":
            self.present.discard(event.worker)

    def _begin(self) -> None:
        """Start the workers, with the tasks that they hold."""
        resumed = bool(self.journal.arrivals or self.journal.events)
        lost = set()  # and not sent anything since
        for event in self.journal.events:
            (lost.add if event.kind == "lost" else lost.discard)(event.worker)
        for worker in sorted(self.present):
            self.workers.start(worker)
            if (task := self.server.held(worker)) is not None:
                self._submit(task)
            elif worker in lost:
                self._dispatch(worker, "redispatched")
        if resumed:  # whoever was given up has a fresh chance
            gone = set(range(self.server.num_workers)) - self.present
            for worker in sorted(gone - self.plan.membership.absent):
                self._join(worker)

    def _turn(self) -> None:
        """Take one outcome, if one comes soon, and look after the workers now and then."""
        outcome = self.workers.wait(_POLL)
        if outcome is not None:
            self._take(outcome)
        now = time.monotonic()
        if now < self._looked + _POLL:
            return
        self._looked = now
        for change, worker in self.plan.membership.changes():
            if change == "join" and worker not in self.present:
                self._join(worker)
            elif change == "leave" and worker in self.present:
                self._leave(worker, "it was asked to")
        for worker, sent_at in list(self.sent_at.items()):
            if now - sent_at > self.plan.round_timeout:
                self._lose(worker, f"no report within {self.plan.round_timeout:g} s", restart=True)
        if now >= self._health_due:
            self._health_due = now + self.plan.health_every
            health = self._health()
            _log.info("%s", health)
            if self.plan.on_health is not None:
                self.plan.on_health(health)

    def _take(self, outcome: Outcome) -> None:
        worker = outcome.worker
        self.meter.busy[worker] += outcome.seconds
        self.meter.received_bytes += outcome.received_bytes
        if outcome.report is None:
            task = self.server.held(worker)
            if task is not None and task.round == outcome.round:
                self._lose(worker, outcome.error, restart=True)
            return
        inject = self.plan.inject
        for report in [outcome.report] if inject is None else inject(outcome.report):
            if self.server.step < self.plan.num_steps:
                self._receive(report, outcome.loss)

    def _receive(self, report: Report, loss: float) -> None:
        try:
            waiting = self.server.receive(report)
        except ReportRejected as error:
            self._refuse(report, error)
            return
        seconds = self._seconds()
        self.failures[report.worker] = 0
        self.sent_at.pop(report.worker, None)
        # Only what is in the journal may have consequences: a resumed run repeats all of it.
        self.journal.arrived(report.worker, seconds, loss)
        for worker in waiting:
            task = self.server.dispatch(worker)
            if self.server.step < self.plan.num_steps:
                self._submit(task)
        self._after_step(report, seconds, loss)

    def _after_step(self, report: Report, seconds: float, loss: float) -> None:
        """Audit, evaluate, tell and save, as simulated runs do."""
        plan, step = self.plan, self.server.step
        last, metrics = step == plan.num_steps, None
        delay = step - 1 - report.dispatched_at
        self.meter.applied(report.worker, delay)
        if self.audit is not None:
            self.audit.arrived(report, step - 1)
            self.audit.check(self.server.params, self.server.state)
        if plan.evaluate is not None and (step % plan.evaluate_every == 0 or last):
            values = plan.evaluate(self.server.params, self.server.model_state)
            metrics = {name: float(value) for name, value in values.items()}
            self.evaluations.append(Evaluation(step, seconds, metrics))
        if plan.on_step is not None:
            plan.on_step(StepRecord(step, seconds, report.worker, delay, loss, metrics))
        if plan.checkpoint is not None and (step % plan.checkpoint.every == 0 or last):
            self._save()

    def _refuse(self, report: Any, error: ReportRejected) -> None:
        """Note a rejected report; a worker whose own round it was has lost that round."""
        worker = getattr(report, "worker", None)
        self.meter.rejected[error.reason] += 1
        _log.warning("rejected a report, %s: %s", error.reason, error)
        self.journal.refused(worker, error.reason, str(error), self._seconds())
        if error.reason == "stale" or not isinstance(report, Report):
            return
        if isinstance(worker, int) and worker in self.present:
            task = self.server.held(worker)
            if task is not None and tuple(report[:3]) == tuple(task[:3]):
                self._lose(worker, f"rejected, {error.reason}: {error}", restart=False)

    def _lose(self, worker: int, why: str, *, restart: bool) -> None:
        """Give up the worker's round, and start it again unless it failed too often in a row."""
        self.server.release(worker)
        self.sent_at.pop(worker, None)
        self.meter.lost += 1
        self.failures[worker] += 1
        self.last_failure[worker] = why
        self.journal.happened("lost", worker, self._seconds(), why)
        _log.warning("worker %s lost its round: %s", worker, why)
        if self.failures[worker] > self.plan.max_failures:
            self._leave(worker, f"{self.failures[worker]} lost rounds in a row")
            return
        if restart:
            self.workers.start(worker)
        self._dispatch(worker, "redispatched")

    def _join(self, worker: int) -> None:
        self.failures[worker] = 0
        self.present.add(worker)
        self.workers.start(worker)
        self._dispatch(worker, "joined")

    def _leave(self, worker: int, why: str) -> None:
        _log.warning("worker %s leaves: %s", worker, why)
        self.workers.stop(worker)
        self.present.discard(worker)
        self.sent_at.pop(worker, None)
        if not self.server.method.synchronous:  # whose traces know no leaving
            if self.server.held(worker) is not None:
                self.server.release(worker)
            self.journal.happened("left", worker, self._seconds(), why)
            if self.present:
                return
        if all("not finite" in failure for failure in self.last_failure):
            self.diverged = True
            return
        if self.plan.checkpoint is not None:
            self._save()
        failures = "; ".join(f"worker {w}: {why}" for w, why in enumerate(self.last_failure))
        waits = ", and prsgdm waits for all" if self.server.method.synchronous else ""
        raise WorkersGone(
            f"at step {self.server.step} of {self.plan.num_steps} worker {worker} is gone ({why})"
            f"{waits or ', the last one'}. Last failures: {failures}"
        )

    def _dispatch(self, worker: int, kind: str) -> None:
        task = self.server.dispatch(worker)
        self.journal.happened(kind, worker, self._seconds())
        self._submit(task)

    def _submit(self, task: Task) -> None:
        self.sent_at[task.worker] = time.monotonic()
        self.meter.sent_bytes += self.workers.submit(task)

    def _seconds(self) -> float:
        """Return the seconds since the run began, without those in which it was down."""
        return time.monotonic() - self._began

    def _health(self) -> Health:
        momentum = start_momentum(self.server.state)
        norm = None if momentum is None else float(_norm(momentum))
        present = tuple(worker in self.present for worker in range(self.server.num_workers))
        return self.meter.view(self.server.step, present, norm)

    def _identity(self) -> dict[str, Any]:
        """Return what a checkpoint must have in common with the run that resumes from it."""
        keys = (self.work.data_key, self.work.noise_key)
        return {
            "runtime": "real",
            "method": self.server.method.name,
            "num_workers": self.server.num_workers,
            "keys": [jax.random.key_data(key).tolist() for key in keys],
        }

    def _save(self) -> None:
        assert self.plan.checkpoint is not None
        arrays, books = self.server.snapshot()
        notes = {
            "identity": self._identity(),
            "server": books,
            "evaluations": self.evaluations,
            "events": len(self.journal.events),
        }
        self.plan.checkpoint.save(self.server.step, {"server": arrays}, notes)

    def _result(self) -> TrainingResult:
        trace, server = self.journal.trace(), self.server
        history = History(
            step=np.arange(1, trace.num_steps + 1, dtype=np.int32),
            time=trace.times,
            worker=trace.workers,
            delay=trace.delays,
            loss=np.array([arrival.loss for arrival in self.journal.arrivals], np.float32),
            evaluations=tuple(self.evaluations),
        )
        return TrainingResult(
            params=server.params,
            model_state=server.model_state,
            state=server.state,
            history=history,
            trace=trace,
            status="diverged" if self.diverged else "finished",
            diverged_at=server.step if self.diverged else None,
            health=self._health(),
        )

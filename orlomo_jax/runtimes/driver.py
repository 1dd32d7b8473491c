"""The loop that every real runtime shares: dispatch, wait, apply, note, look after the workers."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import defaultdict
from typing import Any, NamedTuple

from orlomo_jax.history import TrainingResult
from orlomo_jax.interrupts import put_off_interrupts
from orlomo_jax.journal import Arrival
from orlomo_jax.order import Event
from orlomo_jax.reports import Reason, Report, ReportRejected, Task
from orlomo_jax.runtimes.metrics import as_row
from orlomo_jax.runtimes.notes import Notes, Plan
from orlomo_jax.runtimes.workers import Outcome, Work, Workers, answer
from orlomo_jax.server import ParameterServer

_POLL = 0.2
"""Seconds between two looks at clocks and memberships."""

_log = logging.getLogger("orlomo_jax")


class WorkersGone(RuntimeError):
    """No worker is left, or one that a synchronous method waits for; all before it is saved."""


class Failure(NamedTuple):
    """Why a worker lost its round: in words, as a rejected report's reason, as an exception."""

    why: str
    reason: Reason | None = None
    exception: Exception | None = None


class Driver:
    """One run: a server, its workers, and what is noted of them."""

    def __init__(self, server: ParameterServer, workers: Workers, work: Work, plan: Plan) -> None:
        """Take up the run; nothing is written yet."""
        self.server, self.workers, self.work, self.plan = server, workers, work, plan
        self.notes = Notes(server, work, plan)
        self.present: set[int] = set()
        self.failures: dict[int, list[Failure]] = defaultdict(list)  # a worker's latest, in a row
        self.given_up: dict[int, Failure] = {}
        self.sent_at: dict[int, float] = {}  # of the outstanding tasks
        self.starting: set[int] = set()  # workers that were started and have not answered since
        self.untried: set[int] = set()  # those from the beginning without a report so far
        self.diverged = False

    def run(self) -> TrainingResult:
        """Go on from what is saved, and train to the end."""
        seen = self.notes.open()
        self.journal = self.notes.journal
        try:
            self.present = set(range(self.server.num_workers))
            self.present -= set(self.journal.identity["absent"])
            if seen is None:
                for worker in sorted(self.present):
                    self.server.dispatch(worker)
            for event in self.journal.events[: seen or 0]:
                self._count_in(event)
            self._repeat(seen or 0)
            self.notes.rehearse(self.present)
            self.notes.resume_clock()
            if self.server.step < self.plan.num_steps and not self.notes.stopped:
                self._train()
            return self.notes.result(diverged=self.diverged, present=self.present)
        finally:
            self.journal.close()

    def _train(self) -> None:
        self._looked = time.monotonic()
        self._health_due = self._looked + self.plan.health_every
        self.workers.open(self.work)
        try:
            with put_off_interrupts(self.plan.checkpoint is not None) as interrupted:
                self._begin()
                while self._goes_on() and not self.diverged and not interrupted():
                    self._turn()
                if interrupted():
                    self.notes.save()
        finally:
            self.workers.close()

    def _goes_on(self) -> bool:
        return self.server.step < self.plan.num_steps and not self.notes.stopped

    def _repeat(self, seen: int) -> None:
        """Repeat what the journal holds beyond the checkpoint: the same rounds, in its order."""
        events: defaultdict[int, list[Event]] = defaultdict(list)
        for event in self.journal.events[seen:]:
            events[event.step].append(event)
            self.notes.unseen += 1
        arrivals = self.journal.arrivals[self.server.step :]
        if arrivals:
            _log.info("repeating %d reports since the checkpoint", len(arrivals))
        for arrival in arrivals:
            self._happen_again(events.pop(self.server.step, []))
            task = self.server.held(arrival.worker)
            if task is None or task[:3] != arrival[:3]:
                raise ValueError(
                    f"{self.journal.path} must go with its checkpoint: at step {self.server.step} "
                    f"it has {arrival}, but the worker holds {task and task[:3]}"
                )
            result, _ = answer(self.work, task.worker, task.round, task[3:])
            report = task.report(result)
            for worker in self.server.receive(report):
                self.server.dispatch(worker)
            self.notes.after_step(report, arrival)
        self._happen_again(events.pop(self.server.step, []))

    def _happen_again(self, events: list[Event]) -> None:
        self.notes.unseen -= len(events)
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
        """Start the workers, with the tasks that they hold; everybody but the absent takes part."""
        lost = set()  # and not sent anything since
        for event in self.journal.events:
            (lost.add if event.kind == "lost" else lost.discard)(event.worker)
        wanted = set(range(self.server.num_workers)) - self.plan.membership.absent
        for worker in sorted(wanted - self.present):
            self._join(worker)
        for worker in sorted(self.present - wanted):
            self._leave(worker, "absent since the run was resumed")
        for worker in sorted(self.present - self.sent_at.keys()):
            self._start(worker)
            self.untried.add(worker)
            if (task := self.server.held(worker)) is not None:
                self._submit(task)
            elif worker in lost:
                self._dispatch(worker, "redispatched")

    def _turn(self) -> None:
        """Take an outcome, if one comes soon, and look after the workers now and then."""
        outcome = self.workers.wait(_POLL)
        ready = [] if outcome is None else [outcome]
        if time.monotonic() > self._looked + _POLL:
            while (outcome := self.workers.wait(0)) is not None:
                ready.append(outcome)
            self._look_after({outcome.worker for outcome in ready})
            self._looked = time.monotonic()
        for outcome in ready:
            self._take(outcome)

    def _look_after(self, reported: set[int]) -> None:
        now = time.monotonic()
        joined, left = self.plan.membership.changes()
        for worker in joined:
            if worker not in self.present:
                self._join(worker)
        for worker in left:
            if worker in self.present:
                self._leave(worker, "it was asked to")
        for worker, sent_at in list(self.sent_at.items()):
            limit, start = self.plan.round_timeout, ""
            if worker in self.starting:  # it starts and compiles first
                limit, start = limit + self.plan.start_timeout, " of its start"
            if now - sent_at > limit and worker not in reported:
                self._lose(worker, Failure(f"no report within {limit:g} s{start}"), restart=True)
        if now >= self._health_due:
            self._health_due = now + self.plan.health_every
            health = self.notes.health(self.present)
            _log.info("%s", health)
            if self.plan.on_health is not None:
                self.plan.on_health(health)

    def _take(self, outcome: Outcome) -> None:
        worker = outcome.worker
        self.notes.meter.busy[worker] += outcome.seconds
        self.notes.meter.received_bytes += outcome.received_bytes
        task = self.server.held(worker)
        if task is not None and task.round == outcome.round:
            self.starting.discard(worker)
            if outcome.report is None:
                self._fail(worker, outcome)
        if outcome.report is None:
            return
        inject = self.plan.inject
        for report in [outcome.report] if inject is None else inject(outcome.report):
            if self._goes_on():
                self._receive(report, outcome)

    def _fail(self, worker: int, outcome: Outcome) -> None:
        """Lose the round of a worker; if nothing of it ever succeeded, its error ends the run."""
        error = outcome.exception
        if error is not None and worker in self.untried:
            error.add_note(f"worker {worker} raised this in its first round of the run")
            raise error
        self._lose(worker, Failure(outcome.error, exception=error), restart=True)

    def _receive(self, report: Report, outcome: Outcome) -> None:
        try:
            waiting = self.server.receive(report)
        except ReportRejected as error:
            self._refuse(report, error)
            return
        worker, round, index = map(int, report[:3])
        row = as_row(outcome.metrics)
        arrival = Arrival(worker, round, index, self.notes.seconds(), outcome.loss, row)
        self.untried.discard(worker)
        self.failures.pop(worker, None)
        self.sent_at.pop(worker, None)
        # Only what is in the journal may have consequences: a resumed run repeats all of it.
        self.journal.arrived(arrival)
        for other in waiting:
            task = self.server.dispatch(other)
            if self.server.step < self.plan.num_steps:
                self._submit(task)
        self.notes.after_step(report, arrival)

    def _refuse(self, report: Any, error: ReportRejected) -> None:
        """Note a rejected report; a worker whose own round it was has lost that round."""
        self.notes.meter.rejected[error.reason] += 1
        _log.warning("rejected a report, %s: %s", error.reason, error)
        worker = getattr(report, "worker", None)
        self.journal.refused(worker, error.reason, str(error), self.notes.seconds())
        if error.reason == "stale" or not isinstance(report, Report):
            return
        for task in filter(None, map(self.server.held, sorted(self.present))):
            if tuple(task[:3]) == tuple(report[:3]):
                self._lose(task.worker, Failure(str(error), error.reason), restart=False)

    def _lose(self, worker: int, failure: Failure, *, restart: bool) -> None:
        """Give up the worker's round, and start it again unless it failed too often in a row."""
        why, _, error = failure
        self.server.release(worker)
        self.sent_at.pop(worker, None)
        self.notes.meter.failed(worker, why)
        self.failures[worker].append(failure)
        self.journal.happened("lost", worker, self.notes.seconds(), why)
        _log.warning("worker %s lost its round: %s", worker, why, exc_info=error)
        if (count := len(self.failures[worker])) > self.plan.max_failures:
            self.given_up[worker] = failure
            self._leave(worker, f"{count} lost rounds in a row, the last: {failure.why}")
            return
        if restart:
            self._start(worker)
        self._dispatch(worker, "redispatched")

    def _join(self, worker: int) -> None:
        self.failures.pop(worker, None)
        self.given_up.pop(worker, None)
        self.present.add(worker)
        self._start(worker)
        self._dispatch(worker, "joined")

    def _leave(self, worker: int, why: str) -> None:
        _log.warning("worker %s leaves: %s", worker, why)
        self.workers.stop(worker)
        self.present.discard(worker)
        self.sent_at.pop(worker, None)
        synchronous = self.server.method.synchronous
        if not synchronous:  # whose traces know no leaving
            if self.server.held(worker) is not None:
                self.server.release(worker)
            self.journal.happened("left", worker, self.notes.seconds(), why)
            if self.present:
                return
        reasons = {failure.reason for failure in self.given_up.values()}
        self.diverged = reasons == {"not finite"}
        if self.plan.checkpoint is not None:
            with contextlib.suppress(OSError):  # the journal holds it all; say what happened
                self.notes.save()
        if not self.diverged:
            waits = f"{self.server.method.name} waits for it" if synchronous else "it was the last"
            cause = None if (last := self.given_up.get(worker)) is None else last.exception
            others = "".join(f"; worker {w}: {f.why}" for w, f in self.given_up.items())
            raise WorkersGone(
                f"worker {worker} is gone at step {self.server.step} of {self.plan.num_steps} and "
                f"{waits}: {why}{others}"
            ) from cause

    def _start(self, worker: int) -> None:
        self.workers.start(worker)
        self.starting.add(worker)

    def _dispatch(self, worker: int, kind: str) -> None:
        task = self.server.dispatch(worker)
        self.journal.happened(kind, worker, self.notes.seconds())
        self._submit(task)

    def _submit(self, task: Task) -> None:
        self.sent_at[task.worker] = time.monotonic()
        self.notes.meter.sent_bytes += self.workers.submit(task)

"""Runs the loop of every real run: dispatch, wait, apply, record, check the workers."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable
from typing import Any

from orlomo_jax.recording.interrupts import put_off_interrupts
from orlomo_jax.recording.journal import Arrival
from orlomo_jax.recording.recorder import RunRecorder
from orlomo_jax.recording.saver import RunSaver
from orlomo_jax.runtimes.failures import Failure, Failures, WorkersLostError
from orlomo_jax.runtimes.journal_replay import JournalReplay
from orlomo_jax.runtimes.protocol import TaskOutcome, WorkerPool
from orlomo_jax.runtimes.run_log import RunLog
from orlomo_jax.runtimes.run_options import RunOptions
from orlomo_jax.server.audit import Audit
from orlomo_jax.server.reports import RejectedReportError, Report, Task, claimed_id
from orlomo_jax.server.task_table import TaskId
from orlomo_jax.traces.policies import Policy
from orlomo_jax.worker.local_worker import KeptState
from orlomo_jax.worker.workload import Workload

_POLL = 0.2
"""Seconds between two checks of timeouts and membership."""

_log = logging.getLogger("orlomo_jax")


class Driver:
    """Drives one run: dispatches, waits, applies, and checks the workers."""

    def __init__(
        self,
        workers: WorkerPool,
        workload: Workload,
        recorder: RunRecorder,
        log: RunLog,
        saver: RunSaver | None,
        audit: Audit | None,
        options: RunOptions,
    ) -> None:
        """Take over a run; its server has the state of the newest checkpoint."""
        self.server, self.workers, self.workload = recorder.source.server, workers, workload
        self.recorder, self.log, self.journal = recorder, log, log.journal
        self.saver, self.audit, self.options = saver, audit, options
        self.policy = self.server.method.policy or Policy()
        self.failures = Failures(options.max_failures)
        self.sent_at: dict[int, float] = {}  # of the outstanding tasks
        self.starting: set[int] = set()  # workers without an answer since they were started
        self.untried: set[int] = set()  # workers from the beginning, without a report
        states = recorder.source.local_states
        self.replay = JournalReplay(self.server, workload, self.journal, states)
        self.cancelled: set[TaskId] = set()  # tasks with outcomes that are ignored
        self.running = False  # whether the workers have the kept states
        self.present = self.replay.present

    def train(self) -> None:
        """Train to the end, on real workers."""
        self._looked = time.monotonic()
        self.workers.open(self.workload, self.server.num_workers)
        try:
            with put_off_interrupts(self.saver is not None) as interrupted:
                self._begin()
                while not self.recorder.ended and not interrupted():
                    self._poll()
                if interrupted():
                    self._save()
        finally:
            self.workers.close()

    def record(self, report: Report, arrival: Arrival) -> None:
        """Audit, record and save, after the server has applied a report."""
        if self.audit is not None:
            state = self.server.state
            self.audit.applied(report, self.server.step - 1, state.params, state.rule_state)
        self.log.applied(arrival)
        if self.saver is not None and self.saver.is_due():
            self._save()

    def _save(self) -> None:
        """Sync the journal to disk, then write a checkpoint, unless a worker's state is lost."""
        assert self.saver is not None
        self.journal.sync()
        if self.running and self.workload.keeps_state:
            try:
                rounds = self.server.table.kept_rounds().items()
                states = {worker: self.workers.local_state(worker, r) for worker, r in rounds}
            except Exception as error:  # the journal has everything since the last checkpoint
                return _log.warning("no checkpoint at step %s: %s", self.server.step, error)
            self.recorder.source.local_states = states
        self.saver.save(events=len(self.journal.events) - self.replay.unseen)
        if self.running:
            self.recorder.source.local_states = {}  # the workers have them; this frees memory

    def _begin(self) -> None:
        """Start all workers except the absent ones, with the tasks that they hold."""
        lost = set()  # workers that were not sent a task since
        for event in self.journal.events:
            (lost.add if event.kind == "lost" else lost.discard)(event.worker)
        wanted = set(range(self.server.num_workers)) - self.options.membership.absent
        joining, leaving = sorted(wanted - self.present), sorted(self.present - wanted)
        for worker in sorted(self.present & wanted):
            task = self.server.held(worker)
            self._start(worker)
            self.untried.add(worker)
            if task is not None:
                self._submit(task)
            elif worker in lost:
                self._dispatch(worker, "redispatched")
        self.running = True
        self.recorder.source.local_states = self.replay.local_states = {}  # the workers have them
        for worker in joining:  # before any worker leaves, so that one is always present
            self._join(worker)
        for worker in leaving:
            self._leave(worker, "absent since the run was resumed")
        self._follow_policy()

    def _poll(self) -> None:
        """Handle the next outcomes, and check the workers from time to time."""
        outcome = self.workers.wait(_POLL)
        ready = [] if outcome is None else [outcome]
        if time.monotonic() > self._looked + _POLL:
            while (outcome := self.workers.wait(0)) is not None:
                ready.append(outcome)
            self._look_after({outcome.id.worker for outcome in ready})
            self._looked = time.monotonic()
        for outcome in ready:
            self._handle(outcome)

    def _look_after(self, reported: set[int]) -> None:
        now = time.monotonic()
        joined, left = self.options.membership.changes()
        for worker in (x for x in joined if x not in self.present):
            self._join(worker)
        for worker in (x for x in left if x in self.present):
            self._leave(worker, "it was asked to")
        for worker, sent_at in list(self.sent_at.items()):
            limit, start = self.options.round_timeout, ""
            if worker in self.starting:  # it starts and compiles first
                limit, start = limit + self.options.start_timeout, " of its start"
            if now - sent_at > limit and worker not in reported:
                self._abandon_round(
                    worker, Failure(f"no report within {limit:g} s{start}"), restart=True
                )
        self.log.report_health(self.present)

    def _handle(self, outcome: TaskOutcome) -> None:
        worker = outcome.id.worker
        self.log.received(outcome)
        if outcome.id in self.cancelled:
            self.cancelled.discard(outcome.id)
            self.starting.discard(worker)
            return
        task = self.server.held(worker)
        if task is not None and task.id.round == outcome.id.round:
            self.starting.discard(worker)
            if outcome.report is None:
                self._fail(worker, outcome)
        if outcome.report is None:
            return
        inject = self.options.fault_injector
        for report in [outcome.report] if inject is None else inject(outcome.report):
            if not self.recorder.ended:
                self._receive(report, outcome)

    def _fail(self, worker: int, outcome: TaskOutcome) -> None:
        """Abandon a worker's round; if the worker never succeeded, raise its error."""
        error = outcome.exception
        if error is not None and worker in self.untried:
            error.add_note(f"worker {worker} raised this in its first round of the run")
            raise error
        self._abandon_round(worker, Failure(outcome.error, exception=error), restart=True)

    def _receive(self, report: Report, outcome: TaskOutcome) -> None:
        if self._drops(report):
            return
        task = self.server.held(outcome.id.worker)
        try:
            waiting = self.server.receive(report)
        except RejectedReportError as error:
            return self._reject(report, error)
        worker = int(report.id.worker)
        self.untried.discard(worker)
        self.failures.forgive(worker)
        self.sent_at.pop(worker, None)  # the journal comes first: a resumed run repeats only that
        arrival = self.log.arrived(report, outcome.metrics, task, outcome.received_bytes)
        self._send(waiting)
        self._follow_policy()
        self.record(report, arrival)

    def _drops(self, report: Any) -> bool:
        """Return whether the policy does not use this report; its worker is then restarted."""
        task_id, table = claimed_id(report), self.server.table
        if task_id is None or table.why_stale(task_id) is not None:
            return False
        if drops := self.policy.drops(self.server.step, task_id.dispatched_at):
            self.server.release(task_id.worker)
            self._dispatch(task_id.worker, "restarted")
        return drops

    def _follow_policy(self) -> None:
        """Cancel rounds from parameters that the policy calls too old; send the newest ones."""
        if self.server.step < self.recorder.recording.num_steps:
            held = {worker: i.dispatched_at for worker, i in self.server.table.held.items()}
            for worker in self.policy.restarts(self.server.step, held):
                self.cancelled.add(self.server.release(worker).id)
                self._dispatch(worker, "restarted")

    def _reject(self, report: Any, error: RejectedReportError) -> None:
        """Log a rejected report; if it belongs to a worker's current round, abandon that."""
        self.log.rejected(report, error)
        _log.warning("rejected a report, %s: %s", error.reason, error)
        if error.reason == "stale" or not isinstance(report, Report):
            return
        task_id = claimed_id(report)
        for task in filter(None, map(self.server.held, sorted(self.present))):
            if task.id == task_id:
                failure = Failure(str(error), error.reason)
                self._abandon_round(task.id.worker, failure, restart=False)

    def _abandon_round(self, worker: int, failure: Failure, *, restart: bool) -> None:
        """Release the worker's task, and dispatch again unless it failed too often in a row."""
        why, _, error = failure
        self.server.release(worker)
        self.sent_at.pop(worker, None)
        self.log.meter.failed(worker, why)
        in_a_row = self.failures.count(worker, failure)
        self.log.happened("lost", worker, why)
        _log.warning("worker %s lost its round: %s", worker, why, exc_info=error)
        if worker in self.failures.given_up:
            self._leave(worker, f"{in_a_row} lost rounds in a row, the last: {failure.why}")
            return
        if restart:
            self._start(worker)
        self._dispatch(worker, "redispatched")
        self._send(self.server.table.due())

    def _join(self, worker: int) -> None:
        self.failures.forgive(worker)
        self.present.add(worker)
        self._start(worker)
        self.server.table.join(worker)
        self.log.happened("joined", worker)
        self._send(self.server.table.due())

    def _leave(self, worker: int, why: str) -> None:
        _log.warning("worker %s leaves: %s", worker, why)
        self.workers.stop(worker)
        self.present.discard(worker)
        self.sent_at.pop(worker, None)
        synchronous = self.server.method.synchronous
        if not synchronous:  # synchronous traces have no event for leaving
            if self.server.held(worker) is not None:
                self.server.release(worker)
            self.server.table.leave(worker)
            self.log.happened("left", worker, why)
            self._send(self.server.table.due())
            if self.present:
                return
        if self.saver is not None:
            with contextlib.suppress(OSError):  # the journal has everything; raise the cause
                self._save()
        if self.failures.are_not_finite():
            self.recorder.first_nonfinite = self.server.step
        else:
            waits = f"{self.server.method.name} waits for it" if synchronous else "it was the last"
            last = self.failures.given_up.get(worker)
            raise WorkersLostError(
                f"worker {worker} is gone at step {self.server.step} of "
                f"{self.recorder.recording.num_steps} and {waits}: {why}{self.failures}"
            ) from (None if last is None else last.exception)

    def _start(self, worker: int) -> None:
        """Start a worker; if the run resumes, with the state that its optimizer had."""
        states, rounds = self.replay.local_states, self.server.table.kept_rounds()
        if not self.running and worker in states.keys() & rounds.keys():
            self.workers.start(worker, KeptState(rounds[worker], states[worker]))
        else:
            self.workers.start(worker)
        self.starting.add(worker)

    def _dispatch(self, worker: int, kind: str) -> None:
        task = self.server.dispatch(worker)
        self.log.happened(kind, worker)
        self._submit(task)

    def _send(self, waiting: Iterable[int]) -> None:
        """Dispatch workers that waited; after the last step, without sending the tasks."""
        for worker in waiting:
            task = self.server.dispatch(worker)
            if self.server.step < self.recorder.recording.num_steps:
                self._submit(task)

    def _submit(self, task: Task) -> None:
        self.sent_at[task.id.worker] = time.monotonic()
        self.log.meter.sent_bytes += self.workers.submit(task)

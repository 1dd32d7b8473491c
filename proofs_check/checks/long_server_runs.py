"""Checks the server's bookkeeping over thousands of steps, with every kind of event at each step.

The server is compared with :mod:`proofs_check.reference` after each call. So a fault is found at
the step where it appears, even late in a run or at a single step. This module calls the server
directly; :mod:`proofs_check.checks.long_simulations` runs it through the simulator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from orlomo_jax import LocalUpdate, Method, Report
from orlomo_jax.server import RejectedReportError, Task
from proofs_check import reference
from proofs_check.checks.every_order import momentum_of
from proofs_check.reference import BETA, Sent, Timeline
from proofs_check.registry import Outcome, Size, Subject, holds

WORKERS = {"orlomo": 12, "local_ormo_da": 9, "al_sgd": 7, "prsgdm": 5}
ALLOWED = 2.0**-32  # relative error: 2 048 steps of 72 roundings each, times 1/(1−β)


class Difference(Exception):
    """Raised when the library and the reference differ."""


class Comparison:
    """Compares values and keeps the largest difference.

    Attributes:
        worst: The largest difference so far among those allowed, relative to a value's size.
        count: How many values were compared.
    """

    def __init__(self) -> None:
        """Start without any comparison."""
        self.worst, self.count, self._step = 0.0, 0, 0
        self._largest: dict[str, float] = {}

    def at(self, step: int) -> None:
        """Set the step of the next comparisons, for their messages."""
        self._step = step

    def fail(self, what: str) -> NoReturn:
        """Raise Difference with the step and this message."""
        raise Difference(f"step {self._step}: {what}")

    def same(self, what: str, got: Any, want: Any) -> None:
        """Raise Difference unless the two values are equal."""
        self.count += 1
        if got != want:
            self.fail(f"{what}: got {got}, expected {want}")

    def close(self, what: str, got: Any, want: Any) -> None:
        """Raise Difference unless float64 arrays agree to rounding.

        The error is relative to the largest value seen so far under this name.
        """
        self.count += 1
        if got is None or want is None:
            return self.same(what, got, want)
        got, want = np.asarray(got), np.asarray(want)
        if got.shape != want.shape or got.dtype != np.float64:
            expected = f"float64{list(want.shape)}"
            self.fail(f"{what}: got {got.dtype}{list(got.shape)}, expected {expected}")
        size = self._largest.get(what, 2.0**-1000)
        size = self._largest[what] = max(size, float(np.abs(want).max()))
        difference = float(np.abs(got - want).max()) / size
        if not difference <= ALLOWED:
            self.fail(f"{what}: got {got}, expected {want}")
        self.worst = max(self.worst, difference)


@lru_cache(maxsize=32)
def long_method(make_method: Callable[..., Method], name: str, num_workers: int) -> Method:
    """Return a method with an η that changes with the step and the delay."""
    rates = {} if name == "prsgdm" else {
        "learning_rate": reference.global_rate, "delay_weight": reference.delay_weight
    }  # fmt: skip
    return make_method(name, num_workers, 3, momentum=BETA, **rates)


gamma = jax.tree_util.Partial(reference.gamma)


class ServerRun:
    """Makes the same calls on a ParameterServer and on the reference, and compares them.

    Args:
        subject: Gives the server and the method.
        name: The method.
        timeline: The arrivals and events.
        seed: Seed of the reports.
        resumes: Whether to save and restore, then export and import, the server after every step.
    """

    def __init__(
        self, subject: Subject, name: str, timeline: Timeline, seed: int, resumes: bool
    ) -> None:
        """Dispatch to every worker that is present at the start."""
        self.comparison, self._timeline, self._resumes = Comparison(), timeline, resumes
        self._draws = np.random.default_rng(seed)
        num_workers = timeline.num_workers
        method = long_method(subject.make_method, name, num_workers)
        self._reports_momentum = method.worker_momentum is not None
        self._has_momentum = name != "al_sgd"
        self.want = reference.Server(name, num_workers, subject.claims)
        self.server = subject.parameter_server(
            method,
            jnp.asarray(reference.START),
            jnp.asarray(reference.START_STATE),
            local_learning_rate=gamma,
        )
        self._lost: Report | None = None
        self._old: Report | None = None
        for worker in sorted(set(range(num_workers)) - timeline.absent):
            self._dispatch(worker)
        self._compare_server()

    def run(self) -> None:
        """Run the whole timeline.

        Raises:
            Difference: At the first difference.
        """
        for step, worker in enumerate(self._timeline.workers):
            self.comparison.at(step)
            for kind, who in self._timeline.events[step]:
                self._event(kind, who)
            report = self._report(worker)
            self._compare_task(self.server.held(worker), self.want.held[worker])
            self._reject_all(report)
            waiting = self._must("a report", self.server.receive, report)
            update, end = report.update, np.asarray(report.model_state)
            du = update.momentum if self._reports_momentum else update.delta
            wanted = self.want.receive(worker, np.asarray(du), np.asarray(update.delta), end)
            self.comparison.same("the workers that wait for a task", waiting, wanted)
            self._old = report
            self.comparison.at(step + 1)
            for other in wanted:
                self._dispatch(other)
            if self._resumes:
                self._must("a snapshot", self.server.restore, *self.server.snapshot())
                self._must("the exported state", self.server.import_, self.server.export())
            self._compare_server()

    def _must(self, what: str, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except Exception as error:
            self.comparison.fail(f"{what} is rejected: {error}")

    def _dispatch(self, worker: int) -> None:
        task = self._must("a dispatch", self.server.dispatch, worker)
        self._compare_task(task, self.want.dispatch(worker))

    def _event(self, kind: str, worker: int) -> None:
        if kind in ("redispatched", "joined"):
            self._dispatch(worker)
        elif worker in self.want.held:
            self._lost = self._report(worker)
            task = self._must("a release", self.server.release, worker)
            self._compare_task(task, self.want.release(worker))
        self._compare_held()

    def _report(self, worker: int) -> Report:
        task = self.server.held(worker)
        if task is None:
            self.comparison.fail(f"worker {worker} does not hold a task")
        du, dw = self._draws.normal(size=(2, 2))
        update = LocalUpdate(dw, du if self._reports_momentum else None)
        return Report(task.id, update, self._draws.normal(size=1))

    def _compare_task(self, task: Task | None, want: Sent) -> None:
        self.comparison.same("a task", task and tuple(task.id), tuple(want[:3]))
        for field in Sent._fields[3:]:
            got = getattr(task and task.start, field)
            self.comparison.close(f"a task's {field}", got, getattr(want, field))

    def _compare_held(self) -> None:
        tasks = map(self.server.held, range(self._timeline.num_workers))
        held = {task.id.worker: tuple(task.id) for task in tasks if task is not None}
        wanted = {worker: tuple(sent[:3]) for worker, sent in self.want.held.items()}
        self.comparison.same("the workers' tasks", held, wanted)

    def _compare_server(self) -> None:
        self.comparison.same("the server's step", self.server.step, self.want.step)
        self.comparison.close("w", self.server.params, self.want.params)
        self.comparison.close("the model state", self.server.model_state, self.want.model_state)
        if self._has_momentum:
            self.comparison.close(
                "u", momentum_of(self.server.state.rule_state), self.want.momentum
            )
        self._compare_held()

    def _reject_all(self, good: Report) -> None:
        """Send invalid calls before a good report; each must be rejected and change nothing."""
        worker, round, index = good.id
        nothing, momentum = np.full(2, np.nan), good.update.momentum
        delta = np.asarray(good.update.delta)
        other = None if self._reports_momentum else delta
        bad = [
            ("a duplicate", "stale", self._old),
            ("a lost report", "stale", self._lost),
            ("another round", "stale", _of(good, round=round + 1)),
            ("another round", "stale", _of(good, round=round - 1) if round else None),
            ("another version", "stale", _of(good, dispatched_at=index + 1)),
            ("another version", "stale", _of(good, dispatched_at=index - 1) if index else None),
            ("an unknown worker", "malformed", _of(good, worker=self._timeline.num_workers)),
            ("NaN", "not finite", good._replace(update=LocalUpdate(nothing, momentum))),
            ("finite=False", "not finite", good._replace(finite=np.bool_(False))),
            ("another shape", "malformed", good._replace(update=LocalUpdate(delta[:1], momentum))),
            ("another momentum", "malformed", good._replace(update=LocalUpdate(delta, other))),
            ("no model state", "malformed", good._replace(model_state=None)),
        ]
        for what, reason, report in bad:
            if report is not None:
                found = None
                try:
                    self.server.receive(report)
                except RejectedReportError as error:
                    found = error.reason
                except Exception:  # a faulty server may raise anything
                    found = "another error"
                self.comparison.same(f"the reason to reject {what}", found, reason)
        self._must_refuse("a dispatch to a busy worker", self.server.dispatch, worker)
        for idle in [k for k in range(self._timeline.num_workers) if k not in self.want.held][:1]:
            self._must_refuse("a release of an idle worker", self.server.release, idle)
        for waiting in sorted(self.want.reported)[:1]:
            self._must_refuse("a dispatch within a round", self.server.dispatch, waiting)
        self._compare_server()

    def _must_refuse(self, what: str, call: Callable[..., Any], worker: int) -> None:
        try:
            call(worker)
        except ValueError:
            return
        self.comparison.fail(f"{what} is not rejected")


def _of(report: Report, **fields: int) -> Report:
    """Return the report with another task id."""
    return report._replace(id=report.id._replace(**fields))


def examine(subject: Subject, case: dict[str, Any]) -> tuple[Comparison, str | None]:
    """Run a case; return the comparison, and the first difference or None."""
    name, seed = case["method"], case["seed"]
    timeline = reference.timeline(
        WORKERS[name], case["num_steps"], seed, synchronous=name == "prsgdm",
        density=case["density"],
    )  # fmt: skip
    with jax.enable_x64(True):
        run = None
        try:
            run = ServerRun(subject, name, timeline, seed, case["resumes"])
            run.run()
        except Difference as difference:
            return run.comparison if run else Comparison(), str(difference)
    return run.comparison, None


@holds("bookkeeping", strength="property")
def long_server_runs(subject: Subject, size: Size) -> Iterator[Outcome]:
    """Run a ParameterServer for thousands of steps, and compare it after each call."""
    worst, count, steps = 0.0, 0, 0
    runs = [(name, 1.0, False) for name in WORKERS]
    runs += [(name, 0.2, True) for name in ("orlomo", "prsgdm")]
    for number, (name, density, resumes) in enumerate(runs):
        case = {"method": name, "num_steps": size.long_steps, "seed": size.seed + number,
                "density": density, "resumes": resumes}  # fmt: skip
        compared, difference = examine(subject, case)
        worst, count = max(worst, compared.worst), count + compared.count
        if difference is not None:
            note = f"{name}, {difference}"[:200]
            yield Outcome("bookkeeping", count, float("inf"), ALLOWED, False, note, case)
            return
        steps += size.long_steps
    note = f"{steps} steps; every kind of event before each step; {len(WORKERS)} methods"
    yield Outcome("bookkeeping", count, worst, ALLOWED, True, note)


def replay(subject: Subject, statement: str, case: dict[str, Any]) -> tuple[float, float]:
    """Run a counterexample of :func:`long_server_runs` again; return residual and allowance."""
    compared, difference = examine(subject, case)
    return compared.worst if difference is None else float("inf"), ALLOWED

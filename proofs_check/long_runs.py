"""Bookkeeping along thousands of steps, with every kind of event before every step.

A fault that begins late in a run, or shows at one step alone, is met where it shows: the server is
compared with :mod:`proofs_check.reference` after each call. The server is driven directly here,
and by the simulator in :mod:`proofs_check.long_simulations`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from orlomo_jax import LocalUpdate, Method, Report, ReportRejected, Task
from proofs_check import reference
from proofs_check.exhaustive import momentum_of
from proofs_check.reference import BETA, Sent, Timeline
from proofs_check.registry import Outcome, Size, Subject, holds

WORKERS = {"orlomo": 12, "local_ormo_da": 9, "al_sgd": 7, "prsgdm": 5}
ALLOWED = 2.0**-32  # of a value's size: 2 048 steps of 72 roundings each, times 1/(1−β)


class Difference(Exception):
    """The library and the reference differ."""


class Comparison:
    """Compares values, and keeps the largest difference.

    Attributes:
        worst: The largest difference that is allowed, as a share of a value's size.
        count: How many values were compared.
    """

    def __init__(self) -> None:
        """Start with nothing compared."""
        self.worst, self.count, self._step = 0.0, 0, 0
        self._largest: dict[str, float] = {}

    def at(self, step: int) -> None:
        """Name the step of what follows."""
        self._step = step

    def fail(self, what: str) -> NoReturn:
        """Raise the difference."""
        raise Difference(f"step {self._step}: {what}")

    def same(self, what: str, got: Any, want: Any) -> None:
        """Compare exactly."""
        self.count += 1
        if got != want:
            self.fail(f"{what} is {got}, not {want}")

    def close(self, what: str, got: Any, want: Any) -> None:
        """Compare numbers up to rounding; their size is the largest of this name so far."""
        self.count += 1
        if got is None or want is None:
            return self.same(what, got, want)
        got, want = np.asarray(got), np.asarray(want)
        if got.shape != want.shape or got.dtype != np.float64:
            self.fail(f"{what} is {got.dtype}{list(got.shape)}, not float64{list(want.shape)}")
        size = self._largest.get(what, 2.0**-1000)
        size = self._largest[what] = max(size, float(np.abs(want).max()))
        difference = float(np.abs(got - want).max()) / size
        if not difference <= ALLOWED:
            self.fail(f"{what} is {got}, not {want}")
        self.worst = max(self.worst, difference)


@lru_cache(maxsize=32)
def long_method(make_method: Callable[..., Method], name: str, num_workers: int) -> Method:
    """Return a method whose η changes with the step and the delay."""
    rates = {} if name == "prsgdm" else {
        "learning_rate": reference.global_rate, "delay_weight": reference.delay_weight
    }  # fmt: skip
    return make_method(name, num_workers, BETA, **rates)


gamma = jax.tree_util.Partial(reference.gamma)


class ServerRun:
    """A ParameterServer and the reference, through the same calls.

    Args:
        subject: Gives the server and the method.
        name: The method.
        timeline: What happens.
        seed: For the reports.
        resumes: Whether the server is saved and restored, lent and settled after every step.
    """

    def __init__(
        self, subject: Subject, name: str, timeline: Timeline, seed: int, resumes: bool
    ) -> None:
        """Dispatch to everybody who is there."""
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
            num_workers,
            jnp.asarray(reference.START_STATE),
            local_learning_rate=gamma,
        )
        self._lost: Report | None = None
        self._old: Report | None = None
        for worker in sorted(set(range(num_workers)) - timeline.absent):
            self._dispatch(worker)
        self._compare_server()

    def run(self) -> None:
        """Go through the timeline.

        Raises:
            Difference: At the first one.
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
            self.comparison.same("who waits", waiting, wanted)
            self._old = report
            self.comparison.at(step + 1)
            for other in wanted:
                self._dispatch(other)
            if self._resumes:
                self._must("a snapshot", self.server.restore, *self.server.snapshot())
                self._must("what was lent", self.server.settle, self.server.lend())
            self._compare_server()

    def _must(self, what: str, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except Exception as error:
            self.comparison.fail(f"{what} is refused: {error}")

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
            self.comparison.fail(f"worker {worker} holds nothing")
        du, dw = self._draws.normal(size=(2, 2))
        update = LocalUpdate(dw, du if self._reports_momentum else None)
        at = task.worker, task.round, task.dispatched_at
        return Report(*at, update, self._draws.normal(size=1))

    def _compare_task(self, task: Task | None, want: Sent) -> None:
        self.comparison.same("a task", tuple(task or ())[:3], tuple(want[:3]))
        for field in Sent._fields[3:]:
            self.comparison.close(f"a task's {field}", getattr(task, field), getattr(want, field))

    def _compare_held(self) -> None:
        tasks = map(self.server.held, range(self._timeline.num_workers))
        held = {task[0]: tuple(task[:3]) for task in tasks if task is not None}
        wanted = {worker: tuple(sent[:3]) for worker, sent in self.want.held.items()}
        self.comparison.same("what workers hold", held, wanted)

    def _compare_server(self) -> None:
        self.comparison.same("the server's step", self.server.step, self.want.step)
        self.comparison.close("w", self.server.params, self.want.params)
        self.comparison.close("the model state", self.server.model_state, self.want.model_state)
        if self._has_momentum:
            self.comparison.close("u", momentum_of(self.server.state), self.want.momentum)
        self._compare_held()

    def _reject_all(self, good: Report) -> None:
        """Send what must be refused before a good report, and find that nothing has changed."""
        worker, round, index = good[:3]
        nothing, momentum = np.full(2, np.nan), good.update.momentum
        delta = np.asarray(good.update.delta)
        other = None if self._reports_momentum else delta
        bad = [
            ("a duplicate", "stale", self._old),
            ("a lost report", "stale", self._lost),
            ("another round", "stale", good._replace(round=round + 1)),
            ("another round", "stale", good._replace(round=round - 1) if round else None),
            ("another version", "stale", good._replace(dispatched_at=index + 1)),
            ("another version", "stale", good._replace(dispatched_at=index - 1) if index else None),
            ("an unknown worker", "malformed", good._replace(worker=self._timeline.num_workers)),
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
                except ReportRejected as error:
                    found = error.reason
                except Exception:  # whatever a faulty server raises
                    found = "another error"
                self.comparison.same(f"the refusal of {what}", found, reason)
        self._must_refuse("a dispatch to a busy worker", self.server.dispatch, worker)
        for idle in [k for k in range(self._timeline.num_workers) if k not in self.want.held][:1]:
            self._must_refuse("a release of nothing", self.server.release, idle)
        for waiting in sorted(self.want.reported)[:1]:
            self._must_refuse("a dispatch within a round", self.server.dispatch, waiting)
        self._compare_server()

    def _must_refuse(self, what: str, call: Callable[..., Any], worker: int) -> None:
        try:
            call(worker)
        except ValueError:
            return
        self.comparison.fail(f"{what} is not refused")


def examine(subject: Subject, case: dict[str, Any]) -> tuple[Comparison, str | None]:
    """Run a case; return what was compared, and the first difference."""
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
    """Drive a ParameterServer through thousands of steps, and compare after each call."""
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
    """Run a counterexample of :func:`long_server_runs` again: its residual and allowance."""
    compared, difference = examine(subject, case)
    return compared.worst if difference is None else float("inf"), ALLOWED

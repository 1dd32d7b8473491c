"""Checks ParameterServer under random arrivals, losses, joins, re-dispatches and bad reports.

A Hypothesis state machine draws the events. After every event the lemmas must hold in ledger form
(see :func:`~proofs_check.sequences.ledger_residuals`), with any η̂ for the reports that have not
arrived. Without failures this is the printed form. A rejected report must leave u, w and the step
as they were, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from orlomo_jax import LocalUpdate, Method, Report, delay_adaptive, local_momentum_sgd
from orlomo_jax.server import RejectedReportError
from proofs_check import rounding, sequences
from proofs_check.checks.every_order import momentum_of
from proofs_check.checks.random_runs import loss
from proofs_check.optional import need
from proofs_check.registry import Outcome, Size, Subject, holds

LOCAL_STEPS, GAMMA = 2, 0.05
REJECTED = ("duplicate", "wrong index", "unknown worker", "not finite", "wrong shape")
BETAS = (0.5, 0.9)
SETTINGS = tuple((k, beta) for k in (1, 2, 3) for beta in BETAS)
BY_STEP = np.array([1.0, 0.3, 1.7, 0.6, 1.1])


@lru_cache(maxsize=64)
def _method(subject: Subject, num_workers: int, beta: float) -> Method:
    by_step = jnp.asarray(BY_STEP)
    rule = subject.rule(
        num_workers,
        momentum=beta,
        learning_rate=lambda step: by_step[step % len(BY_STEP)],
        delay_weight=delay_adaptive(num_workers),
    )
    return Method(
        "subject", rule, num_workers, LOCAL_STEPS, beta if subject.worker_momentum else None
    )


@lru_cache(maxsize=64)
def _round(momentum: float | None) -> Callable[..., Any]:
    def loss_fn(params, model_state, batch, key):
        return loss(params, batch), (model_state, {})

    return local_momentum_sgd(loss_fn, LOCAL_STEPS, momentum=momentum)


class Ledger:
    """Runs a server and its workers, and records every dispatch in a ledger.

    Args:
        subject: Gives the server and the rule.
        num_workers: K.
        beta: β.
        absent: The workers that are absent at the start.
    """

    def __init__(self, subject: Subject, num_workers: int, beta: float, absent: set[int]) -> None:
        """Dispatch w_0 to every worker that is present."""
        self.subject, self.num_workers, self.beta = subject, num_workers, beta
        self.method = _method(subject, num_workers, beta)
        self.params = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
        self.server = subject.parameter_server(self.method, self.params, local_learning_rate=GAMMA)
        self.present = set(range(num_workers)) - absent
        self.held: dict[int, int] = {}  # worker to its entry in the ledger
        self.old: Report | None = None
        self.index: list[int] = []
        self.arrival: list[int] = []
        self.reports: list[Report] = []
        self.used: list[int] = []
        self.history: list[tuple[np.ndarray, np.ndarray]] = []
        self.log: dict[str, Any] = {"absent": sorted(absent), "workers": [], "events": []}
        for worker in sorted(self.present):
            self._dispatch(worker)

    def _dispatch(self, worker: int) -> None:
        task = self.server.dispatch(worker)
        number = len(self.index)
        batch = {
            "a": jnp.sin(jnp.arange(1.0, 2 * LOCAL_STEPS + 1).reshape(-1, 2) * (number + 1)),
            "b": jnp.cos(jnp.arange(LOCAL_STEPS) * (number + 1.0)),
        }
        result = _round(self.method.worker_momentum)(
            task.start.params, None, batch, task.start.local_learning_rate, jax.random.key(0)
        )
        self.reports.append(Report(task.id, result.update, None, result.loss, result.finite))
        self.held[worker] = number
        self.index.append(len(self.used))
        self.arrival.append(-1)

    def receive(self, worker: int) -> None:
        """Receive the worker's report and send it the new parameters."""
        entry = self.held.pop(worker)
        self.log["workers"].append(worker)
        self.old = self.reports[entry]
        self.server.receive(self.old)
        self.arrival[entry] = len(self.used)
        self.used.append(entry)
        self.history.append(self._server())
        self._dispatch(worker)

    def event(self, kind: str, worker: int) -> None:
        """Apply a worker event of an ArrivalTrace: "lost", "left", "redispatched" or "joined"."""
        self.log["events"].append([len(self.used), kind, worker])
        if kind in ("lost", "left") and worker in self.held:
            self.server.release(worker)
            del self.held[worker]
        if kind == "left":
            self.present.remove(worker)
        if kind == "joined":
            self.present.add(worker)
        if kind in ("redispatched", "joined"):
            self._dispatch(worker)

    def reject(self, kind: str, worker: int) -> bool:
        """Send a bad report; return whether the server rejected it and did not change."""
        self.log["events"].append([len(self.used), kind, worker])
        if kind == "duplicate":
            bad = self.old
        else:
            bad = self.reports[self.held[worker]]
        assert bad is not None
        if kind == "wrong index":
            bad = bad._replace(id=bad.id._replace(dispatched_at=bad.id.dispatched_at + 1))
        if kind == "unknown worker":
            bad = bad._replace(id=bad.id._replace(worker=self.num_workers))
        if kind == "not finite":
            delta = jax.tree.map(lambda x: x * jnp.nan, bad.update.delta)
            bad = bad._replace(
                update=LocalUpdate(delta, bad.update.momentum), finite=jnp.array(False)
            )
        if kind == "wrong shape":
            bad = bad._replace(update=LocalUpdate({"a": jnp.zeros(2)}, bad.update.momentum))
        before = self._server()
        try:
            self.server.receive(bad)
        except RejectedReportError:
            after = self._server()
            same = all(a.tobytes() == b.tobytes() for a, b in zip(before, after, strict=True))
            return same and self.server.step == len(self.used)
        return False

    def _server(self) -> tuple[np.ndarray, np.ndarray]:
        u = momentum_of(self.server.state.rule_state)
        return np.asarray(ravel_pytree(u)[0]), np.asarray(ravel_pytree(self.server.params)[0])

    def residual(self) -> tuple[float, float]:
        """Return the worst residual of Lemmas 1 and 2 in ledger form, and its allowance."""
        if not self.used:
            return 0.0, 1.0
        wide, num_steps = np.longdouble, len(self.used)
        beta = wide(self.beta)
        index, arrival = np.array(self.index), np.array(self.arrival)
        arrival = np.where(arrival < 0, num_steps, arrival)
        both = [(r.update.momentum if self.subject.worker_momentum else r.update.delta,
                 r.update.delta) for r in self.reports]  # fmt: skip
        du, dw = (
            np.stack([np.asarray(ravel_pytree(x[i])[0]) for x in both]).astype(wide) for i in (0, 1)
        )
        delays = np.arange(num_steps) - index[self.used]
        pairs = [self.subject.claims.delay_adaptive(self.num_workers, d) for d in delays.tolist()]
        rates = BY_STEP[np.arange(num_steps) % 5] * np.array([a / b for a, b in pairs])
        hat = np.resize([2.5, -1.0, 0.0, 0.7], len(index)).astype(wide)  # any η̂ in flight
        hat[self.used] = rates
        start = np.asarray(ravel_pytree(self.params)[0]).astype(wide)
        table = sequences.powers(beta, num_steps + 2, wide)
        expected = sequences.ledger_residuals(
            self.num_workers, index, arrival, table, beta, hat, du, dw, start, num_steps
        )
        u, w = (np.stack(x).astype(wide) for x in zip(*self.history, strict=True))
        bounds = rounding.server_bounds(
            self.num_workers, index[self.used], table, beta, rates, u, w, du[self.used],
            dw[self.used], start, 2.0**-53,
        )  # fmt: skip
        sizes = np.abs(start) + (np.abs(hat)[:, None] * (np.abs(dw) + 20 * np.abs(du))).sum(0)
        own = 8 * (num_steps + 8) * float(np.finfo(wide).eps) * sizes
        worst = (0.0, 1.0)
        for got, want, bound in zip((u, w), expected, bounds, strict=True):
            residual, bound = np.abs(got - want).astype(float), (bound + own).astype(float)
            residual = np.where(np.isfinite(residual), residual, np.inf)
            at = np.unravel_index(np.argmax(residual / bound), residual.shape)
            if residual[at] / bound[at] > worst[0] / worst[1]:
                worst = float(residual[at]), float(bound[at])
        return worst

    def as_json(self) -> dict[str, Any]:
        """Return the run so far as a trace and its settings."""
        rejected = [event for event in self.log["events"] if event[1] in REJECTED]
        events = [event for event in self.log["events"] if event[1] not in REJECTED]
        trace = {"num_workers": self.num_workers, "workers": self.log["workers"], "events": events}
        return {
            "trace": {"format": "orlomo_jax.ArrivalTrace"} | trace,
            "beta": self.beta,
            "absent": self.log["absent"],
            "rejected": rejected,
        }


def _machine(subject: Subject, on_event: Callable[[Ledger, float, float], None]) -> Any:
    """Return a Hypothesis state machine; it calls ``on_event`` with residual and allowance."""
    stateful, st = need("hypothesis.stateful"), need("hypothesis.strategies")

    class Events(stateful.RuleBasedStateMachine):
        @stateful.initialize(setting=st.sampled_from(SETTINGS), absent=st.sets(st.integers(1, 2)))
        def start(self, setting, absent):
            num_workers, beta = setting
            absent = {worker for worker in absent if worker < num_workers}
            self.ledger = Ledger(subject, num_workers, beta, absent)

        def _pick(self, choice, workers):
            workers = sorted(workers)
            return workers[choice % len(workers)]

        @stateful.rule(choice=st.integers(0, 5))
        @stateful.precondition(lambda self: self.ledger.held)
        def arrives(self, choice):
            self.ledger.receive(self._pick(choice, self.ledger.held))

        @stateful.rule(choice=st.integers(0, 5), kind=st.sampled_from(("lost", "left")))
        @stateful.precondition(lambda self: len(self.ledger.held) > 1)
        def fails(self, choice, kind):
            self.ledger.event(kind, self._pick(choice, self.ledger.held))

        @stateful.rule(choice=st.integers(0, 5))
        @stateful.precondition(lambda self: self.ledger.present - self.ledger.held.keys())
        def is_dispatched_again(self, choice):
            idle = self.ledger.present - self.ledger.held.keys()
            self.ledger.event("redispatched", self._pick(choice, idle))

        @stateful.rule(choice=st.integers(0, 5))
        @stateful.precondition(lambda self: len(self.ledger.present) < self.ledger.num_workers)
        def joins(self, choice):
            absent = set(range(self.ledger.num_workers)) - self.ledger.present
            self.ledger.event("joined", self._pick(choice, absent))

        @stateful.rule(choice=st.integers(0, 5), kind=st.sampled_from(REJECTED))
        @stateful.precondition(lambda self: self.ledger.held and self.ledger.old is not None)
        def is_rejected(self, choice, kind):
            rejected = self.ledger.reject(kind, self._pick(choice, self.ledger.held))
            if not rejected:
                on_event(self.ledger, float("inf"), 0.0)
            assert rejected

        @stateful.invariant()
        @stateful.precondition(lambda self: hasattr(self, "ledger"))
        def lemmas_hold(self):
            residual, allowance = self.ledger.residual()
            on_event(self.ledger, residual, allowance)
            assert residual <= allowance

    return Events


@holds("ledger", "lemma-1", "lemma-2", strength="property", rule_only=True, needs=("hypothesis",))
def server_events(subject: Subject, size: Size) -> Iterator[Outcome]:
    """Send random events to a ParameterServer and check the ledger form after each one."""
    hypothesis = need("hypothesis")
    stateful = need("hypothesis.stateful")
    worst, found, events = (0.0, 1.0), None, 0

    def on_event(ledger: Ledger, residual: float, allowance: float) -> None:
        nonlocal worst, found, events
        events += 1
        if residual > allowance or found is None:
            if residual * worst[1] > worst[0] * allowance or residual > allowance:
                worst = residual, allowance
        if residual > allowance:
            found = ledger.as_json()  # Hypothesis runs the smallest one last

    phases = [hypothesis.Phase.generate]
    phases += [hypothesis.Phase.shrink] if size.minimize else []
    settings = hypothesis.settings(
        max_examples=max(4, size.examples // 3), stateful_step_count=25, database=None,
        deadline=None, phases=phases, report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck), print_blob=False,
    )  # fmt: skip
    with jax.enable_x64(True):
        try:
            machine = hypothesis.seed(size.seed)(_machine(subject, on_event))
            stateful.run_state_machine_as_test(machine, settings=settings)
        except AssertionError:
            if found is None:
                raise
    passed = worst[0] <= worst[1]
    note = "after every event; any η̂ in flight, lost reports included"
    for statement in ("ledger", "lemma-1", "lemma-2"):
        yield Outcome(statement, events, *worst, passed, note, found)


def replay(subject: Subject, statement: str, case: dict[str, Any]) -> tuple[float, float]:
    """Run a counterexample of :func:`server_events` again; return its residual and allowance."""
    trace = case["trace"]
    with jax.enable_x64(True):
        ledger = Ledger(subject, trace["num_workers"], case["beta"], set(case["absent"]))
        rest = sorted([*trace["events"], *case["rejected"]], key=lambda event: event[0])
        for step, worker in enumerate([*trace["workers"], None]):
            for _, kind, who in [event for event in rest if event[0] == step]:
                if kind not in REJECTED:
                    ledger.event(kind, who)
                elif not ledger.reject(kind, who):
                    return float("inf"), 0.0
            if worker is not None:
                ledger.receive(worker)
        return ledger.residual()

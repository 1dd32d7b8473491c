"""Defines mutants of the library's bookkeeping; each one errs only at one given step."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np


class Mutant(NamedTuple):
    """A fault: a wrong function that replaces one of the library.

    Attributes:
        where: The function to replace, as "module:name".
        change: Maps (the function, the step of the fault) to its replacement.
    """

    where: str
    change: Callable[[Any, int], Any]

    @contextmanager
    def applied(self, step: int = 257) -> Iterator[None]:
        """Return a context in which the library has the fault."""
        module, _, name = self.where.partition(":")
        original = pkgutil.resolve_name(self.where)
        # The library keeps the programs of earlier runs: these must not hide the fault, and its
        # own must not outlive it.
        programs = pkgutil.resolve_name("orlomo_jax.simulation.compiled:segment_program")
        programs.cache_clear()
        try:
            with mock.patch(f"{module}.{name}", self.change(original, step)):
                yield
        finally:
            programs.cache_clear()


def at_step(faulty: Callable[..., Any]) -> Callable[[Any, int], Any]:
    """Return the change of a method: ``faulty(method, self, *args)`` replaces it at one step."""

    def change(method, step):
        def changed(self, *args):
            if self.step == step:
                return faulty(method, self, *args)
            return method(self, *args)

        return changed

    return change


def _ticket(**difference: int) -> Callable[..., Any]:
    """Return a faulty ``Books.dispatch``: these differences are added to the id's fields."""

    def dispatch(method, table, worker):
        task_id = method(table, worker)
        changes = {name: abs(getattr(task_id, name) + by) for name, by in difference.items()}
        table.held[worker] = task_id._replace(**changes)
        return table.held[worker]

    return dispatch


def _resets_round(method, table, worker):
    table.rounds[worker] = 0 if table.rounds[worker] else 1
    return method(table, worker)


def _moves(steps: int) -> Callable[..., Any]:
    def receive(method, table, worker):
        waiting = method(table, worker)
        table.step += steps
        return waiting

    return receive


def _barrier(method, table, worker):
    waiting = method(table, worker)
    if not table.synchronous:
        return waiting
    return () if waiting else tuple(range(table.num_workers))


def _nobody_waits(method, table, worker):
    waiting = method(table, worker)
    return () if waiting else (worker,)


def _keeps_id(method, table, worker):
    return table.held[worker]


def _keeps_task(method, server, worker):
    task = server.tasks[worker]
    method(server, worker)
    server.table.dispatch(worker)
    server.tasks[worker] = task
    return task


def _moved(task):
    start = task.start._replace(params=task.start.params + 2.0**-20)
    return task._replace(start=start)


def _old_version(method, server, worker):
    task = method(server, worker)
    server.tasks[worker] = _moved(task)
    return server.tasks[worker]


def _old_everything(method, server, worker):
    task = method(server, worker)
    index = abs(task.id.dispatched_at - 1)
    task = _moved(task)._replace(id=task.id._replace(dispatched_at=index))
    server.tasks[worker] = task
    server.table.held[worker] = server.table.held[worker]._replace(dispatched_at=index)
    return task


def _old_learning_rate(method, server, worker):
    task = method(server, worker)
    rate = task.start.local_learning_rate * (1 + 2.0**-20)
    start = task.start._replace(local_learning_rate=rate)
    server.tasks[worker] = task._replace(start=start)
    return server.tasks[worker]


def _takes(*kinds: str) -> Callable[..., Any]:
    """Return a faulty ``check_report`` that accepts these kinds of invalid report."""

    def check(method, server, report):
        try:
            method(server, report)
        except ValueError as error:
            worker = report.id.worker
            held = worker in server.tasks
            kind = getattr(error, "reason", "") if held else "of nobody"
            if kind not in kinds:
                raise
            if kind == "of nobody" and worker < server.num_workers:
                server.tasks[worker] = server.table.dispatch(worker)
            elif kind == "of nobody":
                raise

    return check


def _counts_refusals(method, server, report):
    try:
        method(server, report)
    except ValueError:
        server.table.step += 1
        raise


def _numerics(fault: Callable[..., Any]) -> Callable[[Any, int], Any]:
    """Return the change of ``server_step``: ``fault(step_fn, *args)`` replaces it at one step."""

    def change(factory, faulty_step):
        def changed(method, *_):
            step_fn = factory(method, False, False)

            def run(*args):
                *_, step, _ = args
                return fault(step_fn, *args) if step == faulty_step else step_fn(*args)

            return run

        return changed

    return change


def _twice(step_fn, *args):
    state = step_fn(*args)
    rest = state._replace(params=None, rule_state=None)
    return step_fn([], state.params, state.rule_state, rest, *args[4:])


def _dropped(step_fn, *args):
    rate = step_fn(*args).local_learning_rate
    return args[3]._replace(params=args[1], rule_state=args[2], local_learning_rate=rate)


def _not_merged(step_fn, *args):
    before, after = args[3], step_fn(*args)
    pending = before.pending_model_state
    return after._replace(model_state=before.model_state, pending_model_state=pending)


def _wrong_delay(step_fn, *args):
    report = args[4]
    task_id = report.id._replace(dispatched_at=np.int32(report.id.dispatched_at - 1))
    return step_fn(*args[:4], report._replace(id=task_id), *args[5:])


def _old_rate(step_fn, *args):
    state = step_fn(*args)
    return state._replace(local_learning_rate=state.local_learning_rate * (1 + 2.0**-20))


_TABLE, _SERVER = (
    "orlomo_jax.server.task_table:TaskTable",
    "orlomo_jax.server.parameter_server:ParameterServer",
)
_NUMERICS = "orlomo_jax.server.parameter_server:server_step"
SERVER: dict[str, Mutant] = {
    "a version one step early": Mutant(
        f"{_TABLE}.dispatch", at_step(_ticket(dispatched_at=-1))),
    "a round counted twice": Mutant(f"{_TABLE}.dispatch", at_step(_ticket(round=1))),
    "a round counter reset": Mutant(f"{_TABLE}.dispatch", at_step(_resets_round)),
    "a step skipped": Mutant(f"{_TABLE}.receive", at_step(_moves(1))),
    "a step not counted": Mutant(f"{_TABLE}.receive", at_step(_moves(-1))),
    "a barrier that opens too early or too late": Mutant(f"{_TABLE}.receive", at_step(_barrier)),
    "a worker forgotten": Mutant(f"{_TABLE}.receive", at_step(_nobody_waits)),
    "an id kept after its loss": Mutant(f"{_TABLE}.release", at_step(_keeps_id)),
    "a task kept after its loss": Mutant(f"{_SERVER}.release", at_step(_keeps_task)),
    "parameters that are not the newest": Mutant(f"{_SERVER}.dispatch", at_step(_old_version)),
    "an old version with its step": Mutant(f"{_SERVER}.dispatch", at_step(_old_everything)),
    "γ of another step": Mutant(f"{_SERVER}.dispatch", at_step(_old_learning_rate)),
    "a stale report accepted": Mutant(f"{_SERVER}.check_report", at_step(_takes("stale"))),
    "a lost report accepted": Mutant(f"{_SERVER}.check_report", at_step(_takes("of nobody"))),
    "NaN accepted": Mutant(f"{_SERVER}.check_report", at_step(_takes("not finite"))),
    "a refusal counted as a step": Mutant(f"{_SERVER}.check_report", at_step(_counts_refusals)),
    "a report applied twice": Mutant(_NUMERICS, _numerics(_twice)),
    "a report dropped": Mutant(_NUMERICS, _numerics(_dropped)),
    "a model state not merged": Mutant(_NUMERICS, _numerics(_not_merged)),
    "η of another delay": Mutant(_NUMERICS, _numerics(_wrong_delay)),
    "γ off after a report": Mutant(_NUMERICS, _numerics(_old_rate)),
}  # fmt: skip
SIMULATOR = {
    name: SERVER[name] for name in (
        "a version one step early", "a round counted twice", "a round counter reset",
        "parameters that are not the newest",
    )
}  # fmt: skip

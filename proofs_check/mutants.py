"""Defines mutants of the library's bookkeeping; each one errs only at one given step."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from orlomo_jax import Report


class Mutant(NamedTuple):
    """A fault: a wrong function that replaces one of the library.

    Attributes:
        where: The function to replace, as "module:name".
        change: Maps (the function, the step of the fault) to its replacement.
    """

    where: str
    change: Callable[[Any, int], Any]

    def applied(self, step: int = 257) -> AbstractContextManager:
        """Return a context in which the library has the fault."""
        module, _, name = self.where.partition(":")
        original = pkgutil.resolve_name(self.where)
        return mock.patch(f"{module}.{name}", self.change(original, step))


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
    """Return a faulty ``Books.dispatch``: these differences are added to the ticket's fields."""

    def dispatch(method, books, worker):
        ticket = method(books, worker)
        changes = {name: abs(getattr(ticket, name) + by) for name, by in difference.items()}
        books.held[worker] = ticket._replace(**changes)
        return books.held[worker]

    return dispatch


def _resets_round(method, books, worker):
    books._rounds[worker] = 0 if books._rounds[worker] else 1
    return method(books, worker)


def _moves(steps: int) -> Callable[..., Any]:
    def receive(method, books, worker):
        waiting = method(books, worker)
        books.step += steps
        return waiting

    return receive


def _barrier(method, books, worker):
    waiting = method(books, worker)
    if not books.synchronous:
        return waiting
    return () if waiting else tuple(range(books.num_workers))


def _nobody_waits(method, books, worker):
    waiting = method(books, worker)
    return () if waiting else (worker,)


def _keeps_ticket(method, books, worker):
    return books.held[worker]


def _keeps_task(method, server, worker):
    task = server._held[worker]
    method(server, worker)
    server._books.dispatch(worker)
    server._held[worker] = task
    return task


def _old_version(method, server, worker):
    task = method(server, worker)
    server._held[worker] = task._replace(params=task.params + 2.0**-20)
    return server._held[worker]


def _old_everything(method, server, worker):
    task = method(server, worker)
    index = abs(task.dispatched_at - 1)
    task = task._replace(dispatched_at=index, params=task.params + 2.0**-20)
    server._held[worker] = task
    server._books.held[worker] = server._books.held[worker]._replace(dispatched_at=index)
    return task


def _old_learning_rate(method, server, worker):
    task = method(server, worker)
    rate = task.local_learning_rate * (1 + 2.0**-20)
    server._held[worker] = task._replace(local_learning_rate=rate)
    return server._held[worker]


def _takes(*kinds: str) -> Callable[..., Any]:
    """Return a faulty ``_check_report`` that accepts these kinds of invalid report."""

    def check(method, server, report):
        try:
            method(server, report)
        except ValueError as error:
            held = isinstance(report, Report) and report.worker in server._held
            kind = getattr(error, "reason", "") if held else "of nobody"
            if kind not in kinds:
                raise
            if kind == "of nobody" and report.worker < server.num_workers:
                server._held[report.worker] = server._books.dispatch(report.worker)
            elif kind == "of nobody":
                raise

    return check


def _counts_refusals(method, server, report):
    try:
        method(server, report)
    except ValueError:
        server._books.step += 1
        raise


def _numerics(fault: Callable[..., Any]) -> Callable[[Any, int], Any]:
    """Return the change of ``server_step``: ``fault(step_fn, *args)`` replaces it at one step."""

    def change(factory, step):
        def changed(method, *_):
            step_fn = factory(method, False, False)

            def run(*args):
                return fault(step_fn, *args) if int(args[6]) == step else step_fn(*args)

            return run

        return changed

    return change


def _twice(step_fn, *args):
    params, state, merging, _ = step_fn(*args)
    return step_fn([], params, state, merging, *args[4:])


def _dropped(step_fn, *args):
    return *args[1:4], step_fn(*args)[3]


def _not_merged(step_fn, *args):
    params, state, _, rate = step_fn(*args)
    return params, state, args[3], rate


def _wrong_delay(step_fn, *args):
    return step_fn(*args[:7], np.int32(args[7] - 1), *args[8:])


def _old_rate(step_fn, *args):
    params, state, merging, rate = step_fn(*args)
    return params, state, merging, rate * (1 + 2.0**-20)


_BOOKS, _SERVER = "orlomo_jax.books:Books", "orlomo_jax.server:ParameterServer"
_NUMERICS = "orlomo_jax.server:server_step"
SERVER: dict[str, Mutant] = {
    "a version one step early": Mutant(
        f"{_BOOKS}.dispatch", at_step(_ticket(dispatched_at=-1))),
    "a round counted twice": Mutant(f"{_BOOKS}.dispatch", at_step(_ticket(round=1))),
    "a round counter reset": Mutant(f"{_BOOKS}.dispatch", at_step(_resets_round)),
    "a step skipped": Mutant(f"{_BOOKS}.receive", at_step(_moves(1))),
    "a step not counted": Mutant(f"{_BOOKS}.receive", at_step(_moves(-1))),
    "a barrier that opens too early or too late": Mutant(f"{_BOOKS}.receive", at_step(_barrier)),
    "a worker forgotten": Mutant(f"{_BOOKS}.receive", at_step(_nobody_waits)),
    "a ticket kept after its loss": Mutant(f"{_BOOKS}.release", at_step(_keeps_ticket)),
    "a task kept after its loss": Mutant(f"{_SERVER}.release", at_step(_keeps_task)),
    "parameters that are not the newest": Mutant(f"{_SERVER}.dispatch", at_step(_old_version)),
    "an old version with its step": Mutant(f"{_SERVER}.dispatch", at_step(_old_everything)),
    "γ of another step": Mutant(f"{_SERVER}.dispatch", at_step(_old_learning_rate)),
    "a stale report accepted": Mutant(f"{_SERVER}._check_report", at_step(_takes("stale"))),
    "a lost report accepted": Mutant(f"{_SERVER}._check_report", at_step(_takes("of nobody"))),
    "NaN accepted": Mutant(f"{_SERVER}._check_report", at_step(_takes("not finite"))),
    "a refusal counted as a step": Mutant(f"{_SERVER}._check_report", at_step(_counts_refusals)),
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

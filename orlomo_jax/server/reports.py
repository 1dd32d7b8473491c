"""Defines tasks and reports, and validates reports."""

from __future__ import annotations

import operator
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from orlomo_jax import trees
from orlomo_jax.checks import check_count
from orlomo_jax.rules import LocalUpdate
from orlomo_jax.server.task_table import TaskId, TaskTable
from orlomo_jax.trees import ArrayLike, PyTree, all_finite
from orlomo_jax.worker.step_loop import RoundResult
from orlomo_jax.worker.workload import RoundInput

Reason: TypeAlias = Literal["stale", "malformed", "not finite"]


class Report(NamedTuple):
    """A worker's message to the server after a round.

    Attributes:
        id: The :class:`TaskId` of the task.
        update: Δw and Δu, trees like params.
        model_state: The worker's model state after the round, or None.
        loss: float[S], for the records; the server does not read it.
        finite: Whether update and model state have no NaN or Inf; if None, the server checks. It
            always checks NumPy leaves.
    """

    id: TaskId
    update: LocalUpdate
    model_state: PyTree = None
    loss: ArrayLike | None = None
    finite: ArrayLike | None = None


class Task(NamedTuple):
    """The server's message to a worker: one round to compute.

    Attributes:
        id: Worker, round, and the step of the parameters (their model version).
        start: The round's inputs.
        fresh: Whether the worker's optimizer starts with a new state, even if it keeps states.
    """

    id: TaskId
    start: RoundInput
    fresh: bool = True

    def report(self, result: RoundResult) -> Report:
        """Return the report of this task's round."""
        return Report(self.id, result.update, result.model_state, result.loss, result.finite)


class RejectedReportError(ValueError):
    """Raised for a report that the server does not apply; the server is unchanged.

    Args:
        message: What is wrong.
        reason: Kept as an attribute: ``"stale"`` if the worker does not hold the report's task (for
            example a duplicate), ``"not finite"`` if there is a NaN or an Inf, else
            ``"malformed"``.
    """

    def __init__(self, message: str, reason: Reason = "malformed") -> None:
        """Keep the message and the reason."""
        super().__init__(message)
        self.reason: Reason = reason


def claimed_id(report: Any) -> TaskId | None:
    """Return the id of a report, which may be malformed; None unless it has three integers.

    Example:
        >>> claimed_id(Report((0, 1, True), None)), claimed_id(Report("id", None)), claimed_id(None)
        (TaskId(worker=0, round=1, dispatched_at=1), None, None)
    """
    try:
        return TaskId(*map(operator.index, report.id))
    except (AttributeError, TypeError):
        return None


class ReportSchema:
    """The expected structure, shapes and dtypes of reports.

    Args:
        params: The server's parameters, which may be abstract.
        model_state: The server's model state, which may be abstract.
        momentum: Whether the method's workers report their local momentum.
    """

    def __init__(self, params: trees.Params, model_state: PyTree, *, momentum: bool) -> None:
        """Keep shapes and dtypes, but no arrays."""
        self._params = jax.tree.map(  # reports are in float32 or wider
            lambda x: jax.ShapeDtypeStruct(x.shape, trees.widest(x.dtype, jnp.float32)), params
        )
        self._model_state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model_state
        )
        self._momentum = self._params if momentum else None
        self._signature = _signature((LocalUpdate(self._params, self._momentum), self._model_state))

    def validate(self, report: Report, table: TaskTable) -> None:
        """Raise RejectedReportError unless a report is well formed, finite, and of a held task."""
        reason: Reason = "malformed"
        try:
            if not isinstance(report, Report):
                raise TypeError(f"`report` must be a Report, got {type(report).__name__}")
            if not (isinstance(report.id, tuple) and len(report.id) == 3):
                raise TypeError(f"`id` must be the TaskId of a task, got id={report.id!r}")
            worker, round, index = report.id
            task_id = TaskId(
                table.check_worker(worker),
                check_count("round", round),
                check_count("dispatched_at", index),
            )
            if (why := table.why_stale(task_id)) is not None:
                reason = "stale"
                raise ValueError(why)
            self.check(report)
            reason = "not finite"
            check_finite(report)
        except (TypeError, ValueError, RuntimeError) as error:
            raise RejectedReportError(str(error), reason) from error

    def check(self, report: Report) -> None:
        """Raise unless the report's trees are like the server's.

        Raises:
            TypeError: If ``report.update`` is not a LocalUpdate.
            ValueError: If the structure of a tree, or the shape or dtype of a leaf differs; the
                message names the leaf by its path.
        """
        update = report.update
        if _signature((update, report.model_state)) == self._signature:
            return
        if not isinstance(update, LocalUpdate):
            raise TypeError(f"`update` must be a LocalUpdate, got {type(update).__name__}")
        if (self._momentum is None) != (update.momentum is None):
            wanted = "have no local momentum" if self._momentum is None else "have a local momentum"
            raise ValueError(
                f"`update` must {wanted}, got update.momentum={type(update.momentum).__name__}: "
                "make the round by method.local_round"
            )
        for name, tree, like in (
            ("update.delta", update.delta, self._params),
            ("update.momentum", update.momentum, self._momentum),
            ("model_state", report.model_state, self._model_state),
        ):
            trees.check_like(name, tree, like, dtypes=True)


def _signature(tree: PyTree) -> tuple:
    """Return the structure, shapes and dtypes of a tree; faster than a comparison of leaves."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(getattr(x, "shape", ()), getattr(x, "dtype", None)) for x in leaves]


def check_finite(report: Report) -> None:
    """Raise unless update and model state are finite.

    Raises:
        TypeError: If ``report.finite`` is neither a bool nor None.
        ValueError: If a value is not finite, or ``report.finite`` is false; the message names the
            leaf.
    """
    leaves = jax.tree.leaves((report.update, report.model_state))
    on_host = [np.asarray(x) for x in leaves if not isinstance(x, jax.Array)]
    finite = report.finite
    if finite is None:
        finite = all_finite([x for x in leaves if isinstance(x, jax.Array)])
    if not isinstance(finite, bool | np.bool_ | jax.Array) or np.shape(finite) != ():
        raise TypeError(f"`finite` must be a bool or None, got finite={finite!r}")
    if bool(finite) and all(map(_is_finite, on_host)):
        return
    for name, tree in (("update", report.update), ("model_state", report.model_state)):
        for path, leaf in jax.tree.leaves_with_path(tree):
            if not np.isfinite(np.asarray(leaf)).all():
                where = f"{name}{jax.tree_util.keystr(path)}"
                raise ValueError(f"`{where}` must be finite, got a NaN or an Inf")
    raise ValueError("`finite` must be true, got finite=False: the round had a NaN or an Inf")


def _is_finite(x: np.ndarray) -> bool:
    """Return whether all entries are finite.

    A finite Σ|x|² proves it without a temporary array. An infinite one does not disprove it,
    because the squares of finite numbers may overflow.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(np.vdot(x, x)) or np.isfinite(x).all())

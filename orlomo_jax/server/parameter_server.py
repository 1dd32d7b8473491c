"""The parameter server: dispatches tasks, validates reports and applies each at most once."""

from __future__ import annotations

import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from orlomo_jax import trees
from orlomo_jax.methods.method import Method
from orlomo_jax.rules import contract
from orlomo_jax.server.buffer_pool import BufferPool
from orlomo_jax.server.placement import as_jax_arrays, commit_like, put_like
from orlomo_jax.server.reports import Report, ReportSchema, Task
from orlomo_jax.server.snapshots import Export, read_snapshot, take_snapshot
from orlomo_jax.server.state import ServerState, leaf_dtypes
from orlomo_jax.server.step import check_model_state_weight, server_step, weight_on_host
from orlomo_jax.server.task_table import TaskId, TaskTable
from orlomo_jax.server.transactions import transaction
from orlomo_jax.trees import PyTree, as_partial
from orlomo_jax.worker.workload import RoundInput


class ParameterServer:
    """Dispatches tasks and applies reports, each at most once.

    Several threads may share one server: each call is one transaction. Reports may come from any
    device; they are moved to the device of the parameters.

    Args:
        method: A :class:`~orlomo_jax.Method`, for K workers.
        params: w_0; any tree of floating leaves. NumPy leaves are copied. For 16-bit parameters,
            the server keeps float32 masters (see ``master_params`` of :func:`make_method`).
        model_state: State of the model besides its parameters (BatchNorm statistics), or None.
            Floating leaves merge as s ← s + η_t (s_end − s), a convex combination; PRSGDm averages
            the round. Integers and flags are those of the newest report; for PRSGDm, those of the
            worker with the highest index.
        local_learning_rate: γ, a finite float ≥ 0 or a schedule of the server's step. Each task
            contains its value. The arrays of a ``jax.tree_util.Partial`` are arguments of the
            compiled program, so schedules that differ only in them share a program.

    Attributes:
        step: t, the number of reports applied.
        table: The task table.
        tasks: The outstanding task of every busy worker.
        schedule: The schedule of γ as a ``jax.tree_util.Partial``, or None if γ is constant.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If a leaf of ``params`` is not floating or one of ``model_state`` is not numeric;
            the message names its path.

    Example:
        >>> import jax.numpy as jnp
        >>> from orlomo_jax import LocalUpdate, ParameterServer, Report, make_method
        >>> method = make_method("al_sgd", num_workers=2, num_local_steps=1)
        >>> server = ParameterServer(method, jnp.zeros(1), local_learning_rate=0.1)
        >>> tasks = [server.dispatch(worker) for worker in range(2)]
        >>> server.receive(Report(tasks[1].id, LocalUpdate(jnp.ones(1))))
        (1,)
        >>> server.params, server.step, server.dispatch(1).id.dispatched_at
        (Array([-0.5], dtype=float32), 1, 1)
        >>> server.receive(Report(tasks[1].id, LocalUpdate(jnp.ones(1))))
        Traceback (most recent call last):
        ...
        orlomo_jax.server.reports.RejectedReportError: worker 1 holds round=1, dispatched_at=1; got
        a report of round=0, dispatched_at=0, a duplicate or stale one
    """

    def __init__(
        self,
        method: Method,
        params: trees.Params,
        model_state: PyTree = None,
        *,
        local_learning_rate: float | optax.Schedule,
    ) -> None:
        """Start at step 0 with every worker idle."""
        trees.check_floating("params", params)
        trees.check_numbers("model_state", model_state)
        if jax.tree.leaves(model_state) and method.model_state_weight is None:
            raise ValueError(
                f"`model_state` needs a method with model_state_weight, got {method.name!r}"
            )
        self.schedule = as_partial(local_learning_rate) if callable(local_learning_rate) else None
        first = self.schedule(np.int32(0)) if self.schedule else local_learning_rate
        contract.check_learning_rate("local_learning_rate", first)
        self.method, self.num_workers = method, method.num_workers
        self._lock = threading.RLock()
        self.tasks: dict[int, Task] = {}
        self.table = TaskTable.of(method)
        params, model_state = as_jax_arrays((params, model_state))
        params, model_state = commit_like((params, model_state), params)
        with_momentum = method.worker_momentum is not None
        self._schema = ReportSchema(params, model_state, momentum=with_momentum)
        self._reads_sent_params = method.reads_sent_params(params)
        self.sent_dtypes = leaf_dtypes((params, model_state))
        if method.master_params:  # in 16 bits, rounding can lose 1/K of a report
            params, model_state = trees.widened((params, model_state))
        # The rule's state may share arrays with params or itself; only copies can be donated.
        rule_state = jax.tree.map(jnp.copy, method.rule.init(params))
        self._state: ServerState | None = ServerState(
            params,
            commit_like(rule_state, params),  # as in later steps, so that one step compiles
            model_state,
            model_state if method.synchronous else None,
            *commit_like((jnp.asarray(first, float), jnp.int32(0), jnp.asarray(True)), params),
        )
        self._sends_own_dtypes = leaf_dtypes((params, model_state)) == self.sent_dtypes
        self._share_all()

    @property
    def step(self) -> int:
        """t, the number of reports applied."""
        return self.table.step

    @property
    @transaction
    def params(self) -> trees.Params:
        """w_t. Reading it keeps the arrays alive through the next step."""
        return self._hand_out()

    @property
    @transaction
    def model_state(self) -> PyTree:
        """The merged model state; in a synchronous round, that of the round's start."""
        return self.view().model_state

    @property
    @transaction
    def state(self) -> ServerState:
        """The whole state. Reading it keeps the arrays alive through the next step."""
        self._rule_state_shared = True
        return self.view()._replace(params=self._hand_out())

    @transaction
    def view(self) -> ServerState:
        """Return the state without keeping it alive; it is valid until the next report.

        Raises:
            RuntimeError: If an engine has exported the state.
        """
        if self._state is None:
            raise RuntimeError("the server's state is exported: import it first")
        return self._state

    def check_form(self, report: Report) -> None:
        """Raise TypeError or ValueError unless a report's trees are like the server's."""
        self._schema.check(report)

    @transaction
    def held(self, worker: int) -> Task | None:
        """Return the outstanding task of ``worker``, or None."""
        return self.tasks.get(self.table.check_worker(worker))

    @transaction
    def dispatch(self, worker: int) -> Task:
        """Return a new task for ``worker``, with the newest parameters.

        Raises:
            ValueError: If the worker is unknown or busy, or has already reported in this
                synchronous round.
        """
        self.view()  # raises before anything changes
        task_id = self.table.dispatch(worker)
        task = Task(task_id, self.to_send(), self.table.fresh_task(task_id.worker))
        self.tasks[task_id.worker] = task
        return task

    @transaction
    def release(self, worker: int) -> Task:
        """Remove and return the task of ``worker``, so that it can be dispatched to again.

        If the report still arrives, the server rejects it.

        Raises:
            ValueError: If the worker is unknown or idle.
        """
        return self.tasks.pop(self.table.release(worker).worker)

    @transaction
    def receive(self, report: Report) -> tuple[int, ...]:
        """Apply a report: one server step.

        Returns:
            The workers that need a task now: the reporting one; in a synchronous method, all of
            them after the K-th report of a round, else none.

        Raises:
            RejectedReportError: If the worker is unknown, the report is not of its outstanding
                task, a structure, shape or dtype is wrong, there is a NaN or an Inf, or the weight
                of the model state is not in [0, 1]. The server is unchanged then.
        """
        self.check_report(report)
        worker = int(report.id.worker)
        start = self.tasks[worker].start
        if not self._reads_sent_params:
            start = start._replace(params=None)
        state, shared = self.view(), self._handed_out is not None
        step_fn = server_step(self.method, not shared, not self._rule_state_shared)
        task_id: Any = TaskId(*map(np.int32, report.id))  # pyright: ignore[reportArgumentType]
        self._state = step_fn(
            self._buffers.acquire() if shared else [],
            state.params,
            state.rule_state,
            state._replace(params=None, rule_state=None),
            Report(
                task_id,
                put_like(report.update, state.params),
                put_like(report.model_state, state.model_state),
            ),
            start._replace(model_state=None, momentum=None),
            np.int32(self.step),
            self.schedule,
        )
        if shared:
            self._buffers.retire(state.params)
        self._handed_out, self._rule_state_shared, self._rounded = None, False, None
        del self.tasks[worker]
        return self.table.receive(worker)

    @transaction
    def export(self) -> Export:
        """Hand over everything, until :meth:`import_` returns it.

        Callers may share the arrays; copy an array before you donate it.
        """
        exported = Export(self.table, self.view(), self.tasks)
        self._state, self._handed_out, self.tasks = None, None, {}
        return exported

    @transaction
    def import_(self, exported: Export) -> None:
        """Take over everything from an engine."""
        self.table, self._state, self.tasks = exported
        self._share_all()

    @transaction
    def snapshot(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return everything as arrays by name, and as JSON-able bookkeeping."""
        return take_snapshot(Export(self.table, self.view(), self.tasks))

    @transaction
    def restore(self, arrays: dict[str, Any], rows: dict[str, Any]) -> None:
        """Take a :meth:`snapshot` of a server made with the same arguments.

        Raises:
            ValueError: If the number of workers or a tree differs; the server is unchanged then.
        """
        table = TaskTable.of(self.method)
        state = self.view()
        self.import_(read_snapshot(state, self._newest(state), table, arrays, rows))

    def _share_all(self) -> None:
        """Mark all arrays as shared, so that the next step donates none of them."""
        params = self.view().params
        self._buffers = BufferPool(params)
        self._handed_out, self._rule_state_shared = params, False
        self._rounded: RoundInput | None = None

    @transaction
    def to_send(self) -> RoundInput:
        """Return the inputs of a task that is dispatched now; copies if they are not w itself."""
        state = self.view()
        if self.method.synchronous:
            self._rule_state_shared = True  # the workers start from its momentum
        if self.method.dispatch is None and self._sends_own_dtypes:
            return self._newest(state._replace(params=self._hand_out()))
        if self._rounded is None:
            self._rounded = self._newest(state)
        return self._rounded

    def _newest(self, state: ServerState) -> RoundInput:
        return state.sent(self.method, self.sent_dtypes)

    def _hand_out(self) -> trees.Params:
        if self._handed_out is None:
            self._handed_out = self._buffers.share(self.view().params)
        return self._handed_out

    def check_report(self, report: Report) -> None:
        """Raise RejectedReportError unless the report may be applied."""
        self._schema.validate(report, self.table)
        if jax.tree.leaves(self.view().model_state):
            delay = self.step - int(report.id.dispatched_at)
            weight = weight_on_host(self.method.model_state_weight, self.step, delay)
            check_model_state_weight(float(weight), self.step, delay)

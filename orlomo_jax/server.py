"""The parameter server: who holds which parameters, and what a report must be to be applied."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from orlomo_jax import identity
from orlomo_jax.arrays import beside, bound, own
from orlomo_jax.books import Books, Ticket
from orlomo_jax.buffers import Buffers
from orlomo_jax.checks import check_count
from orlomo_jax.methods import Method
from orlomo_jax.reports import Form, Reason, Report, ReportRejected, Task, check_finite
from orlomo_jax.rules import base, contract
from orlomo_jax.server_step import (
    as_partial,
    check_merge_weight,
    merge_weight_on_host,
    rounded,
    sent_dtypes,
    server_step,
    start_momentum,
)
from orlomo_jax.snapshots import content, filled

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, PyTree, Scalar


class Holdings(NamedTuple):
    """All that a server holds, for who runs it ahead; fields as in the server."""

    books: Books
    params: contract.Params
    state: Any
    merging: PyTree[Array]
    model_state: PyTree[Array]
    local_learning_rate: Scalar
    tasks: dict[int, Task]


def _transaction(method: Callable[..., Any]) -> Any:
    """Let one thread at a time into the server."""

    @wraps(method)
    def alone(self, *args, **kwargs):
        with self._lock:
            return method(self, *args, **kwargs)

    return alone


class ParameterServer:
    """Holds w, u and the model state; hands out tasks and merges reports, each at most once.

    Several threads may share one server: each call is one transaction. Reports may come from any
    device; they are brought to where the parameters are.

    Args:
        method: A :class:`~orlomo_jax.Method`.
        params: w_0; any tree of floating leaves. NumPy leaves are copied. Of parameters of 16 bits
            the server keeps float32 masters (see ``master_params`` of :func:`make_method`).
        num_workers: K ≥ 1.
        model_state: What the model carries beside its parameters (BatchNorm statistics); None for
            nothing. Floating leaves merge by s ← s + η_t (s_end − s), a convex combination,
            PRSGDm's by the average of a round. Integers and flags are those of the newest report;
            of PRSGDm's, of the worker with the highest index.
        local_learning_rate: γ, a finite float ≥ 0 or a schedule of the server's step (a
            ``jax.tree_util.Partial`` hands its arrays over as arguments, so that schedules that
            differ in them share a compiled program); a task
            carries its value.

    Attributes:
        step: t, the number of reports applied.
        schedule: The schedule of γ as a ``jax.tree_util.Partial``, or None where it is constant.

    Raises:
        ValueError: If ``num_workers`` is not the method's K, or a number is out of range.
        TypeError: If a leaf of ``params`` or ``model_state`` is not floating; by path.

    Example:
        >>> import jax.numpy as jnp
        >>> from orlomo_jax import LocalUpdate, ParameterServer, Report, make_method
        >>> method = make_method("al_sgd", num_workers=2)
        >>> server = ParameterServer(method, jnp.zeros(1), 2, local_learning_rate=0.1)
        >>> tasks = [server.dispatch(worker) for worker in range(2)]
        >>> server.receive(Report(*tasks[1][:3], LocalUpdate(jnp.ones(1))))
        (1,)
        >>> server.params, server.step, server.dispatch(1).dispatched_at
        (Array([-0.5], dtype=float32), 1, 1)
        >>> server.receive(Report(*tasks[1][:3], LocalUpdate(jnp.ones(1))))
        Traceback (most recent call last):
        ...
        orlomo_jax.reports.ReportRejected: worker 1 holds round=1, dispatched_at=1; got a report of
        round=0, dispatched_at=0, a duplicate or stale one
    """

    def __init__(
        self,
        method: Method,
        params: contract.Params,
        num_workers: int,
        model_state: PyTree[ArrayLike] = None,
        *,
        local_learning_rate: float | optax.Schedule,
    ) -> None:
        """Start at step 0 with every worker idle."""
        num_workers = contract.check_num_workers(num_workers)
        if method.num_workers not in (None, num_workers):
            raise ValueError(
                f"`num_workers` must be the method's, {method.num_workers}, "
                f"got num_workers={num_workers}"
            )
        contract.check_floating("params", params)
        contract.check_numbers("model_state", model_state)
        if jax.tree.leaves(model_state) and method.merge_weight is None:
            raise ValueError(f"`model_state` needs a method with merge_weight, got {method.name!r}")
        self.method, self.num_workers = method, num_workers
        self._books = Books(method.name, num_workers, method.synchronous)
        params, model_state = own((params, model_state))
        params, model_state = bound((params, model_state), params)
        with_momentum = method.worker_momentum is not None
        self._form = Form(params, model_state, momentum=with_momentum)
        self.sent_dtypes = sent_dtypes((params, model_state))
        if method.master_params:  # 1/K of a report can be lost to rounding in 16 bits
            params, model_state = base.widened((params, model_state))
        self._params, self._model_state = params, model_state
        self._merging = self._model_state  # ahead of it within a synchronous round
        # A rule may keep params, or one array twice: copies of its own can be donated.
        state = jax.tree.map(jnp.copy, method.rule.init(self._params))
        self._state = bound(state, self._params)  # as from the second step on, or it compiles twice
        # What was handed out to a worker or a caller is never donated while they can see it.
        self._share_all()
        self.schedule = as_partial(local_learning_rate) if callable(local_learning_rate) else None
        first = self.schedule(np.int32(0)) if self.schedule else local_learning_rate
        contract.check_learning_rate("local_learning_rate", first)
        self._local_learning_rate = jnp.asarray(first, float)
        self._lock = threading.RLock()
        self._held: dict[int, Task] = {}

    @property
    def step(self) -> int:
        """t, the number of reports applied."""
        return self._books.step

    @property
    @_transaction
    def params(self) -> contract.Params:
        """w_t. Reading it keeps the arrays alive through the next step."""
        return self._hand_out()

    @property
    @_transaction
    def model_state(self) -> PyTree[Array]:
        """The merged model state; like params, it stays through a synchronous round."""
        return self._model_state

    @property
    @_transaction
    def state(self) -> Any:
        """The rule's state (u_t among it). Reading it keeps the arrays alive through a step."""
        self._state_shared = True
        return self._state

    @_transaction
    def peek(self) -> tuple[contract.Params, PyTree[Array], Any]:
        """Return params, model state and the rule's state, of use until the next report."""
        return self._params, self._model_state, self._state

    def identity(self) -> dict[str, Any]:
        """Return what a run that resumes this one must have in common with it, JSON-able."""
        sent = iter(self.sent_dtypes)
        return {
            **identity.of_method(self.method),
            "num_workers": self.num_workers,
            "synchronous": self.method.synchronous,
            **self.rate_identity(),
            "params": identity.of_tree(self._params, sent),
            "model_state": identity.of_tree(self._model_state, sent),
            "rule_state": identity.of_tree(self._state),
        }

    def rate_identity(self) -> dict[str, Any]:
        """Return what tells one γ from another, JSON-able."""
        return identity.of_rate(self.schedule, self._local_learning_rate)

    def check_form(self, report: Report) -> None:
        """Raise TypeError or ValueError unless a report's trees are like the server's."""
        self._form.check(report)

    @_transaction
    def held(self, worker: int) -> Task | None:
        """Return the task that ``worker`` holds, or None."""
        return self._held.get(self._books.check_worker(worker))

    @_transaction
    def dispatch(self, worker: int) -> Task:
        """Return a new task for ``worker``, with the newest parameters.

        Raises:
            ValueError: If the worker is unknown or busy, or, in a synchronous method, has already
                reported in this round.
        """
        momentum = start_momentum(self.state) if self.method.synchronous else None
        ticket = self._books.dispatch(worker)
        params, model_state = self.to_send()
        task = Task(*ticket, params, model_state, momentum, self._local_learning_rate)
        self._held[ticket.worker] = task
        return task

    @_transaction
    def release(self, worker: int) -> Task:
        """Give up the report of ``worker``, which died or hangs; return the task that it held.

        The worker may then be dispatched to again; the lost report is rejected if it comes after
        all.

        Raises:
            ValueError: If the worker is unknown or holds nothing.
        """
        return self._held.pop(self._books.release(worker).worker)

    @_transaction
    def receive(self, report: Report) -> tuple[int, ...]:
        """Apply a report: one server step.

        Returns:
            The workers that wait for a task now: the reporting one; all of them, or none before the
            K-th report of a round, in a synchronous method.

        Raises:
            ReportRejected: If the worker is unknown, the report is not of the task that it holds (a
                duplicate, a stale or a future one), a tree has another structure, a leaf another
                shape or dtype, there is a NaN or an Inf, or the weight of the model state is not in
                [0, 1]. Nothing has changed then.
        """
        self._check_report(report)
        shared = self._handed_out is not None
        step_fn = server_step(self.method, not shared, not self._state_shared)
        params, self._state, self._merging, rate = step_fn(
            self._buffers.take() if shared else [],
            self._params,
            self._state,
            self._merging,
            beside(report.update, self._params),
            beside(report.model_state, self._model_state),
            np.int32(self.step),
            np.int32(report.dispatched_at),
            np.int32(report.worker),
            self.schedule,
        )
        if shared:
            self._buffers.retire(self._params)
        self._params, self._handed_out, self._state_shared = params, None, False
        self._rounded = None
        worker = int(report.worker)
        del self._held[worker]
        waiting = self._books.receive(worker)
        if self.step == self._books.version:  # not within a synchronous round
            self._model_state = self._merging
            if rate is not None:
                self._local_learning_rate = rate
        return waiting

    @_transaction
    def lend(self) -> Holdings:
        """Return all that the server holds, and let go of it until :meth:`settle`.

        The arrays may be shared with callers: to donate one, copy it first.
        """
        holdings = Holdings(
            self._books,
            self._params,
            self._state,
            self._merging,
            self._model_state,
            self._local_learning_rate,
            self._held,
        )
        del self._params, self._state, self._merging, self._model_state, self._handed_out
        self._held = {}
        return holdings

    @_transaction
    def settle(self, holdings: Holdings) -> None:
        """Take back what was lent, further on."""
        (
            self._books,
            self._params,
            self._state,
            self._merging,
            self._model_state,
            self._local_learning_rate,
            self._held,
        ) = holdings
        self._share_all()

    @_transaction
    def snapshot(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return everything the server holds, as arrays by name and as JSON-able bookkeeping.

        Tasks of the same version share one copy. Arrays are lists of leaves: :meth:`restore`
        knows the structures.
        """
        versions = {
            str(task.dispatched_at): {
                "params": content(task.params),
                "model_state": content(task.model_state),
                "momentum": content(task.momentum),
                "local_learning_rate": task.local_learning_rate,
            }
            for task in self._held.values()
        }
        arrays = {
            "params": content(self._params),
            "state": content(self._state),
            "model_state": content(self._model_state),
            "merging": content(self._merging),
            "local_learning_rate": self._local_learning_rate,
            "versions": versions,
        }
        return jax.device_get(arrays), self._books.snapshot()

    @_transaction
    def restore(self, arrays: dict[str, Any], books: dict[str, Any]) -> None:
        """Take the state of a :meth:`snapshot` of a server made with the same arguments.

        Raises:
            ValueError: If the snapshot is of another number of workers, or its trees are not like
                this server's; nothing has changed then.
        """
        ledger = Books(self.method.name, self.num_workers, self.method.synchronous)
        ledger.restore(books)
        like = {"params": self._params, "state": self._state}
        like |= {"model_state": self._model_state, "merging": self._merging}
        trees = {name: filled(name, tree, arrays[name]) for name, tree in like.items()}
        momentum = start_momentum(self._state) if self.method.synchronous else None
        params, model_state = rounded((self._params, self._model_state), self.sent_dtypes)
        versions = {
            int(index): (
                filled("params", params, version["params"]),
                filled("model_state", model_state, version["model_state"]),
                filled("momentum", momentum, version["momentum"]),
                jnp.asarray(version["local_learning_rate"]),
            )
            for index, version in (arrays["versions"] or {}).items()
        }
        tasks = [
            Task(worker, round, index, *versions[index]) for worker, round, index in books["held"]
        ]
        self._params, self._state = trees["params"], trees["state"]
        self._model_state, self._merging = trees["model_state"], trees["merging"]
        self._local_learning_rate = jnp.asarray(arrays["local_learning_rate"])
        self._held = {task.worker: task for task in tasks}
        self._books = ledger
        self._share_all()

    def _share_all(self) -> None:
        """Take arrays that others may see: none of them was lent by the buffers."""
        self._buffers = Buffers(self._params)
        self._handed_out, self._state_shared = self._params, False
        self._rounded: Any = None

    def to_send(self) -> tuple[contract.Params, PyTree[Array]]:
        """Return params and model state as a task carries them: 16-bit ones are rounded copies."""
        if sent_dtypes((self._params, self._model_state)) == self.sent_dtypes:
            return self._hand_out(), self._model_state
        if self._rounded is None:
            self._rounded = rounded((self._params, self._model_state), self.sent_dtypes)
        return self._rounded

    def _hand_out(self) -> contract.Params:
        if self._handed_out is None:
            self._handed_out = self._buffers.lend(self._params)
        return self._handed_out

    def _check_report(self, report: Report) -> None:
        reason: Reason = "malformed"
        try:
            if not isinstance(report, Report):
                raise TypeError(f"`report` must be a Report, got {type(report).__name__}")
            ticket = Ticket(
                self._books.check_worker(report.worker),
                check_count("round", report.round),
                check_count("dispatched_at", report.dispatched_at),
            )
            if (why := self._books.why_stale(ticket)) is not None:
                reason = "stale"
                raise ValueError(why)
            self._check_merge_weight(ticket.dispatched_at)
            self._form.check(report)
            reason = "not finite"
            check_finite(report)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ReportRejected(str(error), reason) from error

    def _check_merge_weight(self, dispatched_at: int) -> None:
        if not jax.tree.leaves(self._model_state):
            return
        delay = self.step - dispatched_at
        weight = merge_weight_on_host(self.method.merge_weight, self.step, delay)
        check_merge_weight(float(weight), self.step, delay)

"""The parameter server: who holds which parameters, and what a report must be to be applied."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from orlomo_jax.checks import check_count
from orlomo_jax.methods import Method
from orlomo_jax.reports import Report, ReportRejected, Task, check_payload
from orlomo_jax.rules import base

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, PyTree


class ParameterServer:
    """Holds w, u and the model state; hands out tasks and merges reports, each at most once.

    Args:
        method: A :class:`~orlomo_jax.Method`.
        params: w_0; any tree of floating leaves. NumPy leaves are copied.
        num_workers: K ≥ 1.
        model_state: What the model carries beside its parameters (BatchNorm statistics), floating
            leaves only; None for nothing. A report merges by s ← s + η_t (s_end − s), a convex
            combination, PRSGDm's by the average of a round.
        local_learning_rate: γ, a finite float ≥ 0 or a schedule of the server's step; a task
            carries its value.

    Attributes:
        step: t, the number of reports applied.

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
        params: base.Params,
        num_workers: int,
        model_state: PyTree[ArrayLike] = None,
        *,
        local_learning_rate: float | optax.Schedule,
    ) -> None:
        """Start at step 0 with every worker idle."""
        num_workers = base.check_num_workers(num_workers)
        if method.num_workers not in (None, num_workers):
            raise ValueError(
                f"`num_workers` must be the method's, {method.num_workers}, "
                f"got num_workers={num_workers}"
            )
        if not callable(local_learning_rate):
            base.check_learning_rate("local_learning_rate", local_learning_rate)
        base.check_floating("params", params)
        base.check_floating("model_state", model_state)
        if jax.tree.leaves(model_state) and method.merge_weight is None:
            raise ValueError(f"`model_state` needs a method with merge_weight, got {method.name!r}")
        self.method, self.num_workers, self.step = method, num_workers, 0
        self._params, self._model_state = _own((params, model_state))
        self._merging = self._model_state  # ahead of it within a synchronous round
        self._state = method.rule.init(self._params)
        # What was handed out to a worker or a caller is never donated to the next step.
        self._params_shared, self._state_shared = True, False
        self._schedule = local_learning_rate if callable(local_learning_rate) else None
        first = local_learning_rate(0) if callable(local_learning_rate) else local_learning_rate
        self._local_learning_rate = jnp.asarray(first, float)
        self._held: dict[int, Task] = {}
        self._rounds = [0] * num_workers
        self._reported_at = [-1] * num_workers

    @property
    def params(self) -> base.Params:
        """w_t. Reading it keeps the arrays alive through the next step."""
        self._params_shared = True
        return self._params

    @property
    def model_state(self) -> PyTree[Array]:
        """The merged model state; like params, it stays through a synchronous round."""
        return self._model_state

    @property
    def state(self) -> Any:
        """The rule's state (u_t among it). Reading it keeps the arrays alive through a step."""
        self._state_shared = True
        return self._state

    def held(self, worker: int) -> Task | None:
        """Return the task that ``worker`` holds, or None."""
        return self._held.get(self._check_worker(worker))

    def dispatch(self, worker: int) -> Task:
        """Return a new task for ``worker``, with the newest parameters.

        Raises:
            ValueError: If the worker is unknown or busy, or, in a synchronous method, has already
                reported in this round.
        """
        worker = self._check_worker(worker)
        if worker in self._held:
            index = self._held[worker].dispatched_at
            raise ValueError(f"worker {worker} is busy with the task dispatched at step {index}")
        dispatched_at, momentum = self.step, None
        if self.method.synchronous:
            dispatched_at -= self.step % self.num_workers
            if self._reported_at[worker] >= dispatched_at:
                raise ValueError(
                    f"worker {worker} has reported in this round: {self.method.name} dispatches "
                    f"it again at step {dispatched_at + self.num_workers}, not at step {self.step}"
                )
            momentum = optax.tree.get(self.state, "momentum")
        self._params_shared = True
        task = Task(
            worker,
            self._rounds[worker],
            dispatched_at,
            self._params,
            self._model_state,
            momentum,
            self._local_learning_rate,
        )
        self._rounds[worker] += 1
        self._held[worker] = task
        return task

    def release(self, worker: int) -> Task:
        """Give up the report of ``worker``, which died or hangs; return the task that it held.

        The worker may then be dispatched to again; the lost report is rejected if it comes after
        all.

        Raises:
            ValueError: If the worker is unknown or holds nothing.
        """
        worker = self._check_worker(worker)
        if worker not in self._held:
            raise ValueError(f"worker {worker} holds no task")
        return self._held.pop(worker)

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
        step_fn = _server_step(
            self.method.rule,
            self.method.merge_weight,
            self._schedule,
            not self._params_shared,
            not self._state_shared,
        )
        self._params, self._state, self._merging, rate = step_fn(
            self._params,
            self._state,
            self._merging,
            report.update,
            report.model_state,
            np.int32(self.step),
            np.int32(report.dispatched_at),
        )
        self._params_shared = self._state_shared = False
        if rate is not None:
            self._local_learning_rate = rate
        worker = int(report.worker)
        del self._held[worker]
        self._reported_at[worker] = self.step
        self.step += 1
        if self.method.synchronous and self.step % self.num_workers:
            return ()
        self._model_state = self._merging
        return tuple(range(self.num_workers)) if self.method.synchronous else (worker,)

    def _check_worker(self, worker: Any) -> int:
        return check_count("worker", worker, 0, self.num_workers - 1)

    def _check_report(self, report: Report) -> None:
        try:
            if not isinstance(report, Report):
                raise TypeError(f"`report` must be a Report, got {type(report).__name__}")
            task = self.held(report.worker)
            round, index = int(report.round), int(report.dispatched_at)
            if task is None:
                raise ValueError(
                    f"worker {report.worker} holds no task; got a report of round={round}, "
                    f"dispatched_at={index}, a duplicate or stale one"
                )
            if (round, index) != (task.round, task.dispatched_at):
                kind = "a duplicate or stale" if round < task.round else "a wrong"
                raise ValueError(
                    f"worker {task.worker} holds round={task.round}, dispatched_at="
                    f"{task.dispatched_at}; got a report of round={round}, dispatched_at={index}, "
                    f"{kind} one"
                )
            self._check_merge_weight(index)
            check_payload(
                report,
                self._params,
                self._model_state,
                momentum=self.method.worker_momentum is not None,
            )
        except (TypeError, ValueError) as error:
            raise ReportRejected(str(error)) from error

    def _check_merge_weight(self, dispatched_at: int) -> None:
        if not jax.tree.leaves(self._model_state):
            return
        delay = self.step - dispatched_at
        weight = _merge_weight_on_host(self.method.merge_weight, self.step, delay)
        if not 0 <= weight <= 1:
            raise ValueError(
                "the weight of a report's model state must be in [0, 1], got "
                f"learning_rate · delay_weight = {weight} at step={self.step}, delay={delay}"
            )


def _own(tree: PyTree[ArrayLike]) -> PyTree[Array]:
    """Return the tree as JAX arrays that no NumPy array shares memory with."""
    return jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jnp.array(x), tree)


@lru_cache(maxsize=64)
def _server_step(
    rule: optax.GradientTransformationExtraArgs,
    merge_weight: Callable | None,
    schedule: optax.Schedule | None,
    donate_params: bool,
    donate_state: bool,
) -> Callable:
    """Return update, apply and merge as one compiled program, which works in place where it may."""

    def step_fn(params, state, model_state, update, end_state, step, dispatched_at):
        updates, state = rule.update(update, state, params, dispatched_at=dispatched_at)
        params = optax.apply_updates(params, updates)
        if jax.tree.leaves(model_state):
            assert merge_weight is not None
            weight = jnp.asarray(merge_weight(step, step - dispatched_at), float)
            model_state = jax.tree.map(
                lambda s, end: (s + weight * (end - s)).astype(s.dtype), model_state, end_state
            )
        rate = None if schedule is None else jnp.asarray(schedule(step + 1), float)
        return params, state, model_state, rate

    donated = [name for name, may in (("params", donate_params), ("state", donate_state)) if may]
    return jax.jit(step_fn, donate_argnames=donated)


@lru_cache(maxsize=64)
def _compiled(function: Callable) -> Callable:
    return jax.jit(function)


def _merge_weight_on_host(merge_weight: Any, step: int, delay: int) -> float:
    """Evaluate on the CPU where there is one, so that no accelerator's queue is waited for."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        device = None
    with jax.default_device(device):
        return float(_compiled(merge_weight)(np.int32(step), np.int32(delay)))

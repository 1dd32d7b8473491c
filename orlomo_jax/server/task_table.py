"""Defines the task table, which records the task of each worker."""

from __future__ import annotations

from typing import Any, NamedTuple

from orlomo_jax.checks import check_count
from orlomo_jax.methods.method import Method
from orlomo_jax.traces.policies import StalenessBound


class TaskId(NamedTuple):
    """Identifies a task.

    Attributes:
        worker: k in [K].
        round: How many tasks this worker was sent before.
        dispatched_at: The step t of the task's parameters, also called model version; K⌊t/K⌋ for
            a synchronous method.
    """

    worker: int
    round: int
    dispatched_at: int


class TaskTable:
    """Tracks each worker's task, and enforces the synchronous barrier or a bound on delays.

    Args:
        name: The method's name, for messages.
        num_workers: K ≥ 1.
        synchronous: Whether all workers wait for one another after a round.
        max_wait: If workers wait to keep delays small, the largest delay; see
            :class:`~orlomo_jax.traces.StalenessBound`.

    Attributes:
        step: t, the number of reports applied.
        held: The task id of every busy worker.
        rounds: How many tasks each worker was sent.
        fresh: Whether each worker's current or next task starts with a new state of its optimizer:
            at first, and after a lost or cancelled round.
        waiting: The workers that have reported and hold no task, in the order of their reports.

    Example:
        >>> table = TaskTable("orlomo", num_workers=2, synchronous=False)
        >>> table.dispatch(1), table.receive(1)
        (TaskId(worker=1, round=0, dispatched_at=0), (1,))
        >>> table.dispatch(1)
        TaskId(worker=1, round=1, dispatched_at=1)
    """

    def __init__(
        self, name: str, num_workers: int, synchronous: bool, max_wait: int | None = None
    ) -> None:
        """Start at step 0 with every worker idle."""
        self.name, self.num_workers, self.synchronous = name, num_workers, synchronous
        self._bound = None if max_wait is None else StalenessBound(max_wait)
        self.fresh = [True] * num_workers
        self.waiting: list[int] = []
        self.step = 0
        self.held: dict[int, TaskId] = {}
        self.rounds = [0] * num_workers
        self._reported_at = [-1] * num_workers

    @classmethod
    def of(cls, method: Method) -> TaskTable:
        """Return an empty table for a method."""
        max_wait = None if method.policy is None else method.policy.max_wait
        return cls(method.name, method.num_workers, method.synchronous, max_wait)

    @property
    def version(self) -> int:
        """The step of the parameters in a task that is dispatched now."""
        return self.step - self.step % self.num_workers if self.synchronous else self.step

    def check_worker(self, worker: Any) -> int:
        """Return ``worker`` as an int in [0, K), or raise."""
        return check_count("worker", worker, 0, self.num_workers - 1)

    def why_stale(self, task_id: TaskId) -> str | None:
        """Return why a report of this task cannot be applied; None if its worker holds it."""
        worker, round, index = task_id
        held = self.held.get(worker)
        if held is None:
            return (
                f"worker {worker} holds no task; got a report of round={round}, "
                f"dispatched_at={index}, a duplicate or stale one"
            )
        if held == task_id:
            return None
        kind = "a duplicate or stale" if round < held.round else "a wrong"
        return (
            f"worker {worker} holds round={held.round}, dispatched_at={held.dispatched_at}; "
            f"got a report of round={round}, dispatched_at={index}, {kind} one"
        )

    def dispatch(self, worker: int) -> TaskId:
        """Record and return a new task; see :meth:`~orlomo_jax.ParameterServer.dispatch`."""
        worker, version = self.check_worker(worker), self.version
        if worker in self.held:
            index = self.held[worker].dispatched_at
            raise ValueError(f"worker {worker} is busy with the task dispatched at step {index}")
        if self.synchronous and self._reported_at[worker] >= version:
            raise ValueError(
                f"worker {worker} has reported in this round: {self.name} dispatches "
                f"it again at step {version + self.num_workers}, not at step {self.step}"
            )
        task_id = self.held[worker] = TaskId(worker, self.rounds[worker], version)
        self.rounds[worker] += 1
        if worker in self.waiting:
            self.waiting.remove(worker)
        return task_id

    def fresh_task(self, worker: int) -> bool:
        """Return whether the worker's task starts with a new state of its optimizer."""
        return self.fresh[worker]

    def release(self, worker: int) -> TaskId:
        """Remove and return a worker's task; raise ValueError if it holds none."""
        worker = self.check_worker(worker)
        if worker not in self.held:
            raise ValueError(f"worker {worker} holds no task")
        self.fresh[worker] = True
        return self.held.pop(worker)

    def leave(self, worker: int) -> None:
        """Remove a worker's task, if it holds one; it does not wait for a task either."""
        worker = self.check_worker(worker)
        self.held.pop(worker, None)
        self.fresh[worker] = True
        if worker in self.waiting:
            self.waiting.remove(worker)

    def due(self) -> tuple[int, ...]:
        """Return the waiting workers that need a task now."""
        if self.synchronous:
            return () if self.step % self.num_workers else tuple(sorted(self.waiting))
        if self._bound is None:
            return tuple(self.waiting)
        held = {worker: task_id.dispatched_at for worker, task_id in self.held.items()}
        return self._bound.due(self.step, held, self.waiting, self.num_workers)

    def receive(self, worker: int) -> tuple[int, ...]:
        """Record the report of a busy worker; return the workers that need a task now."""
        del self.held[worker]
        self._reported_at[worker] = self.step
        self.step += 1
        self.fresh[worker] = False
        self.waiting.append(worker)
        is_free = not self.synchronous and self._bound is None
        return (worker,) if is_free else self.due()

    def snapshot(self) -> dict[str, Any]:
        """Return the table as JSON-able data."""
        return {
            "step": self.step,
            "rounds": list(self.rounds),
            "reported_at": list(self._reported_at),
            "fresh": list(map(int, self.fresh)),
            "waiting": list(self.waiting),
            "held": [list(task_id) for task_id in self.held.values()],
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Restore a :meth:`snapshot`; raise ValueError or TypeError if it does not fit."""
        lists = [snapshot.get(name) for name in ("rounds", "reported_at", "fresh")]
        if any(not isinstance(x, list) or len(x) != self.num_workers for x in lists):
            raise ValueError(
                f"the snapshot must be of num_workers={self.num_workers}, got rounds={lists[0]}, "
                f"reported_at={lists[1]}"
            )
        step, held = check_count("step", snapshot["step"]), {}
        rounds = [check_count("rounds", value) for value in snapshot["rounds"]]
        reported_at = [check_count("reported_at", value, -1) for value in snapshot["reported_at"]]
        for worker, round, index in snapshot["held"]:
            counts = check_count("round", round), check_count("dispatched_at", index, 0, step)
            held[worker] = TaskId(self.check_worker(worker), *counts)
        self.fresh = [bool(check_count("fresh", value, 0, 1)) for value in snapshot["fresh"]]
        self.waiting = [self.check_worker(worker) for worker in snapshot["waiting"]]
        self.step, self.held = step, held
        self.rounds, self._reported_at = rounds, reported_at

"""Defines the task table, which records the task of each worker."""

from __future__ import annotations

from typing import Any, NamedTuple

from orlomo_jax.checks import check_count
from orlomo_jax.methods.method import Method
from orlomo_jax.traces.policies import Policy, StalenessBound
from orlomo_jax.traces.trace_validation import check_max_wait


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
    """Tracks each worker's outstanding task, and makes workers wait for the barrier or the bound.

    Args:
        name: The method's name, for messages.
        num_workers: K ≥ 1.
        synchronous: Whether all workers wait for one another after a round.
        max_wait: The bound on delays that workers wait for; see :class:`~orlomo_jax.ArrivalTrace`.

    Attributes:
        step: t, the number of reports applied.
        held: The task id of every busy worker.
        rounds: How many tasks each worker was sent.
        waiting: The workers that reported or joined and were not sent a task since, in order.
        fresh: Whether each worker's task, or else its next one, starts with a new state of the
            local optimizer: not if the worker's last task was reported.

    Raises:
        TypeError, ValueError: If ``max_wait`` is out of range.

    Example:
        >>> table = TaskTable("orlomo", num_workers=2, synchronous=False)
        >>> table.dispatch(1), table.receive(1)
        (TaskId(worker=1, round=0, dispatched_at=0), (1,))
        >>> table.dispatch(1)
        TaskId(worker=1, round=1, dispatched_at=1)
        >>> table.fresh_task(1)
        False
    """

    def __init__(
        self, name: str, num_workers: int, synchronous: bool, max_wait: int | None = None
    ) -> None:
        """Start at step 0 with every worker idle."""
        self.name, self.num_workers, self.synchronous = name, num_workers, synchronous
        self.max_wait = check_max_wait(max_wait, num_workers, synchronous)
        self._policy = Policy() if self.max_wait is None else StalenessBound(self.max_wait)
        self.step = 0
        self.held: dict[int, TaskId] = {}
        self.rounds = [0] * num_workers
        self.waiting: list[int] = []
        self.fresh = [True] * num_workers
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
        if type(worker) is int and 0 <= worker < self.num_workers:  # fast, for plans of many steps
            return worker
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
        if self.max_wait is not None and worker in self.waiting and worker not in self.due():
            raise ValueError(
                f"worker {worker} must wait: a task sent at step {self.step} could make a delay "
                f"exceed max_wait={self.max_wait}"
            )
        task_id = self.held[worker] = TaskId(worker, self.rounds[worker], version)
        self.rounds[worker] += 1
        if worker in self.waiting:
            self.waiting.remove(worker)
        return task_id

    def release(self, worker: int) -> TaskId:
        """Remove and return a worker's task; raise ValueError if it holds none."""
        task_id = self._task(worker)
        self.fresh[task_id.worker] = True
        return self.held.pop(task_id.worker)

    def restart(self, worker: int) -> TaskId:
        """Replace a busy worker's task by a new one; raise ValueError if it holds none."""
        self.release(worker)
        return self.dispatch(worker)

    def leave(self, worker: int) -> None:
        """Record that a worker leaves; its task is removed."""
        worker = self.check_worker(worker)
        self.held.pop(worker, None)
        self.fresh[worker] = True
        if worker in self.waiting:
            self.waiting.remove(worker)

    def join(self, worker: int) -> None:
        """Record that an absent worker joins; it waits for a task, see :meth:`due`."""
        worker = self.check_worker(worker)
        if worker in self.held or worker in self.waiting:
            raise ValueError(f"worker {worker} is not absent: it holds or waits for a task")
        self.waiting.append(worker)

    def fresh_task(self, worker: int) -> bool:
        """Return whether a busy worker's task starts with a new state of the local optimizer.

        That is so for its first task, and after a task that was lost or cancelled.

        Raises:
            ValueError: If the worker holds no task.
        """
        return self.fresh[self._task(worker).worker]

    def kept_rounds(self) -> dict[int, int]:
        """Return the newest reported round of each worker with an optimizer that continues."""
        return {
            worker: self.rounds[worker] - (2 if worker in self.held else 1)
            for worker, fresh in enumerate(self.fresh)
            if not fresh
        }

    def receive(self, worker: int) -> tuple[int, ...]:
        """Record the report of a busy worker; return the workers that need a task now."""
        del self.held[worker]
        self.fresh[worker] = False
        self.waiting.append(worker)
        self._reported_at[worker] = self.step
        self.step += 1
        if self.synchronous or self.max_wait is not None:
            return self.due()
        return (worker,)

    def due(self) -> tuple[int, ...]:
        """Return the waiting workers that barrier or bound allow to be sent a task now.

        After a task was released or a worker left, the bound may allow more workers than before.
        """
        if self.synchronous:
            return () if self.step % self.num_workers else tuple(sorted(self.waiting))
        held = {worker: task_id.dispatched_at for worker, task_id in self.held.items()}
        return self._policy.due(self.step, held, self.waiting, self.num_workers)

    def snapshot(self) -> dict[str, Any]:
        """Return the table as JSON-able data."""
        return {
            "step": self.step,
            "rounds": list(self.rounds),
            "reported_at": list(self._reported_at),
            "waiting": list(self.waiting),
            "fresh": list(self.fresh),
            "held": [list(task_id) for task_id in self.held.values()],
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Restore a :meth:`snapshot`; raise ValueError or TypeError if it does not fit."""
        names = ("rounds", "reported_at", "fresh")
        lists = [snapshot.get(name) for name in names]
        if any(not isinstance(x, list) or len(x) != self.num_workers for x in lists):
            found = ", ".join(f"{name}={x}" for name, x in zip(names, lists, strict=True))
            raise ValueError(f"the snapshot must be of num_workers={self.num_workers}, got {found}")
        step, held = check_count("step", snapshot["step"]), {}
        rounds = [check_count("rounds", value) for value in snapshot["rounds"]]
        reported_at = [check_count("reported_at", value, -1) for value in snapshot["reported_at"]]
        waiting = [self.check_worker(worker) for worker in snapshot["waiting"]]
        for index, value in enumerate(snapshot["fresh"]):
            if not isinstance(value, bool):
                raise TypeError(f"`fresh[{index}]` must be a bool, got fresh[{index}]={value!r}")
        for worker, round, index in snapshot["held"]:
            counts = check_count("round", round), check_count("dispatched_at", index, 0, step)
            held[worker] = TaskId(self.check_worker(worker), *counts)
        self.step, self.held, self.waiting = step, held, waiting
        self.rounds, self._reported_at = rounds, reported_at
        self.fresh = list(snapshot["fresh"])

    def _task(self, worker: int) -> TaskId:
        worker = self.check_worker(worker)
        if worker not in self.held:
            raise ValueError(f"worker {worker} holds no task")
        return self.held[worker]

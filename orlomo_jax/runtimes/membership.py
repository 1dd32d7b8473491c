"""Lets workers join and leave during a run."""

from __future__ import annotations

import queue
from collections.abc import Iterable

from orlomo_jax.checks import check_count


class Membership:
    """Controls which workers take part while :func:`~orlomo_jax.train` runs; thread-safe.

    Args:
        absent: The workers that are absent at the start; at least one must remain. A resumed run
            also starts with all workers except these.

    Raises:
        ValueError: If an index is negative.

    Example:
        >>> membership = Membership(absent=[3])
        >>> membership.leave(0)
        >>> membership.join(3)
        >>> membership.changes()  # joins are applied first, so a run never has zero workers
        ([3], [0])
    """

    def __init__(self, absent: Iterable[int] = ()) -> None:
        """Note who is absent."""
        self._last: int | None = None  # the largest index, once the run is known
        self.absent = frozenset(self._check("absent", worker) for worker in absent)
        self._changes: queue.SimpleQueue[tuple[bool, int]] = queue.SimpleQueue()

    def bind(self, num_workers: int) -> None:
        """Check the membership for a run of K workers; ``train`` does this.

        Raises:
            ValueError: If a worker is not in [0, K), or all are absent.
        """
        for worker in self.absent:
            check_count("absent", worker, 0, num_workers - 1)
        if len(self.absent) == num_workers:
            raise ValueError(f"`absent` must leave a worker, got absent={sorted(self.absent)}")
        pending = self._pending()
        for change in pending:
            self._changes.put(change)
        for _, worker in pending:
            check_count("worker", worker, 0, num_workers - 1)
        self._last = num_workers - 1

    def unbind(self) -> None:
        """Forget the run's K, at its end."""
        self._last = None

    def join(self, worker: int) -> None:
        """Let a worker join; no effect if it takes part already."""
        self._changes.put((True, self._check("worker", worker)))

    def leave(self, worker: int) -> None:
        """Let a worker leave; its outstanding report is lost."""
        self._changes.put((False, self._check("worker", worker)))

    def changes(self) -> tuple[list[int], list[int]]:
        """Return who joined and who left since the last call; for each worker the last change."""
        joins = {worker: joins for joins, worker in self._pending()}
        return [w for w in joins if joins[w]], [w for w in joins if not joins[w]]

    def _pending(self) -> list[tuple[bool, int]]:
        return [self._changes.get() for _ in range(self._changes.qsize())]

    def _check(self, name: str, worker: int) -> int:
        return check_count(name, worker, 0, self._last)

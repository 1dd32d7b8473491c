"""Workers that join late and leave for good."""

from __future__ import annotations

import queue
from collections.abc import Iterable

from orlomo_jax.checks import check_count


class Membership:
    """Says who takes part in a run, from any thread, while :func:`~orlomo_jax.train` goes on.

    Args:
        num_workers: K of the run.
        absent: The workers who are not there at the start, not all of them. A run that is resumed
            begins with everybody but these, whoever was there before.

    Raises:
        ValueError: If a worker is not in [0, K), or all are absent.

    Example:
        >>> membership = Membership(num_workers=4, absent=[3])
        >>> membership.leave(0)
        >>> membership.join(3)
        >>> membership.changes()  # whoever joins comes first, lest nobody is left between
        ([3], [0])
    """

    def __init__(self, num_workers: int, absent: Iterable[int] = ()) -> None:
        """Note who is absent."""
        self.num_workers = check_count("num_workers", num_workers, 1)
        self.absent = frozenset(self._check("absent", worker) for worker in absent)
        if len(self.absent) == num_workers:
            raise ValueError(f"`absent` must leave a worker, got absent={sorted(self.absent)}")
        self._changes: queue.SimpleQueue[tuple[bool, int]] = queue.SimpleQueue()

    def join(self, worker: int) -> None:
        """Let a worker take part from now on; one that does already is left alone."""
        self._changes.put((True, self._check("worker", worker)))

    def leave(self, worker: int) -> None:
        """End a worker's part; its outstanding report is lost."""
        self._changes.put((False, self._check("worker", worker)))

    def changes(self) -> tuple[list[int], list[int]]:
        """Return who joined and who left since the last call; of one worker the last word."""
        said = [self._changes.get() for _ in range(self._changes.qsize())]
        joins = {worker: joins for joins, worker in said}
        return [w for w in joins if joins[w]], [w for w in joins if not joins[w]]

    def _check(self, name: str, worker: int) -> int:
        return check_count(name, worker, 0, self.num_workers - 1)

"""Workers that join late and leave for good."""

from __future__ import annotations

import queue
from collections.abc import Iterable
from typing import Literal, TypeAlias

from orlomo_jax.checks import check_count

Change: TypeAlias = tuple[Literal["join", "leave"], int]


class Membership:
    """Says who takes part in a run, from any thread, while :func:`~orlomo_jax.train` goes on.

    Args:
        absent: The workers who are not there at the start.

    Example:
        >>> membership = Membership(absent=[3])
        >>> membership.join(3)
        >>> membership.leave(0)
        >>> membership.changes()
        [('join', 3), ('leave', 0)]
    """

    def __init__(self, absent: Iterable[int] = ()) -> None:
        """Note who is absent."""
        self.absent = frozenset(check_count("absent", worker) for worker in absent)
        self._changes: queue.SimpleQueue[Change] = queue.SimpleQueue()

    def join(self, worker: int) -> None:
        """Let a worker take part from now on; one that does already is left alone."""
        self._changes.put(("join", check_count("worker", worker)))

    def leave(self, worker: int) -> None:
        """End a worker's part; its outstanding report is lost."""
        self._changes.put(("leave", check_count("worker", worker)))

    def changes(self) -> list[Change]:
        """Return what was said since the last call, in order."""
        return [self._changes.get() for _ in range(self._changes.qsize())]

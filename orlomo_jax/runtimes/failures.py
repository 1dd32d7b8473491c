"""Lost rounds of workers, and when a worker is given up."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from orlomo_jax.server.reports import Reason


class WorkersLostError(RuntimeError):
    """Raised if no worker is left, or a synchronous method lost one. Progress has been saved."""


class Failure(NamedTuple):
    """Why a worker lost its round: in words, as a rejected report's reason, as an exception."""

    why: str
    reason: Reason | None = None
    exception: Exception | None = None


class Failures:
    """The lost rounds of each worker since its last good one.

    Args:
        most: How many lost rounds in a row, ≥ 0, a worker may have.

    Attributes:
        given_up: The last failure of each worker that was given up.

    Example:
        >>> failures = Failures(most=1)
        >>> failures.count(2, Failure("it died")), failures.count(2, Failure("it died again"))
        (1, 2)
        >>> failures.given_up[2].why
        'it died again'
    """

    def __init__(self, most: int) -> None:
        """Start without a failure."""
        self._most, self._in_a_row = most, defaultdict(int)
        self.given_up: dict[int, Failure] = {}

    def count(self, worker: int, failure: Failure) -> int:
        """Count a lost round; give the worker up if it is one too many. Return the count."""
        self._in_a_row[worker] += 1
        if self._in_a_row[worker] > self._most:
            self.given_up[worker] = failure
        return self._in_a_row[worker]

    def forgive(self, worker: int) -> None:
        """Forget the worker's failures: it has reported, or joined anew."""
        self._in_a_row.pop(worker, None)
        self.given_up.pop(worker, None)

    def are_not_finite(self) -> bool:
        """Return whether every worker that was given up had a NaN or an Inf in its report."""
        return {failure.reason for failure in self.given_up.values()} == {"not finite"}

    def __str__(self) -> str:
        """Return why each worker was given up."""
        return "".join(f"; worker {w}: {failure.why}" for w, failure in self.given_up.items())

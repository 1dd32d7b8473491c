"""Policies that bound or reset staleness: which workers wait, which start their round again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from orlomo_jax.checks import check_choice, check_count

_ACTIONS = ("wait", "drop", "restart")


class Policy:
    """Decides which waiting workers are sent a task, and which rounds are cancelled.

    The methods are pure functions. ``held`` maps each busy worker to the step of the parameters
    that its task was sent with. This base class never holds a worker back and cancels nothing.
    """

    @property
    def max_wait(self) -> int | None:
        """The largest delay, if workers wait to ensure it; else None."""
        return None

    def check_num_workers(self, num_workers: int) -> None:
        """Raise ValueError if this policy cannot work with K workers."""

    def due(
        self, step: int, held: Mapping[int, int], waiting: Sequence[int], num_workers: int
    ) -> tuple[int, ...]:
        """Return the waiting workers that are sent a task now.

        Args:
            step: t, the number of reports applied.
            held: The model version of each outstanding task, by worker.
            waiting: The workers that wait for a task, in the order in which they began to wait.
            num_workers: K; lost and absent workers count as busy, so that they may return at once.
        """
        return tuple(waiting)

    def restarts(self, step: int, held: Mapping[int, int]) -> tuple[int, ...]:
        """Return the busy workers to cancel and restart, after a report has moved t to ``step``."""
        return ()

    def drops(self, step: int, dispatched_at: int) -> bool:
        """Return whether a report that arrives at ``step`` is not used."""
        return False

    def oldest(self, steps: np.ndarray) -> np.ndarray:
        """Return the oldest model version that a report at each step may have, int[T]."""
        return np.zeros_like(steps)

    def check_trace(self, dispatched_at: np.ndarray) -> None:
        """Raise ValueError if a report is older than this policy allows."""
        steps = np.arange(len(dispatched_at))
        for step in np.flatnonzero(dispatched_at < self.oldest(steps))[:1]:
            raise ValueError(
                f"`trace` must follow the method's policy {self}, got a report with "
                f"dispatched_at={dispatched_at[step]} at step {step}"
            )


@dataclasses.dataclass(frozen=True)
class StalenessBound(Policy):
    """Ensures that no applied report has a delay above ``max_delay``.

    Attributes:
        max_delay: The largest delay, counted in applied reports, ≥ 0.
        action: How the bound is ensured.
            "wait": the server holds tasks back. A worker that has reported is sent a task at step t
            only if t + b − 1 − i ≤ max_delay, with b the number of busy workers and i the oldest
            model version, both including its own task. So even if the oldest task is the last of
            the b to report, its delay is within the bound. Workers are served in the order in which
            they began to wait. It needs max_delay ≥ K − 1; K − 1 gives the arrivals of a barrier.
            "drop": a report with a larger delay is not used; its worker is sent the newest
            parameters.
            "restart": after each report, a worker whose report would have a larger delay is
            cancelled and sent the newest parameters. These are the stops of Ringmaster ASGD.

    Raises:
        TypeError, ValueError: If a field is out of range.

    Example:
        >>> StalenessBound(3).due(step=2, held={1: 0}, waiting=[2, 0], num_workers=3)
        (2,)
        >>> StalenessBound(3, "restart").restarts(step=5, held={0: 5, 1: 1, 2: 2})
        (1,)
        >>> StalenessBound(3, "drop").drops(step=5, dispatched_at=1)
        True

    References:
        Ho et al., 2013 (stale synchronous parallel). Maranjyan, Tyurin and Richtárik, 2025
        (arXiv 2501.16168, Ringmaster ASGD).
    """

    max_delay: int
    action: Literal["wait", "drop", "restart"] = "wait"

    def __post_init__(self) -> None:
        """Check the fields."""
        object.__setattr__(self, "max_delay", check_count("max_delay", self.max_delay))
        check_choice("action", self.action, _ACTIONS)

    @property
    def max_wait(self) -> int | None:
        """The largest delay, if workers wait to ensure it; else None."""
        return self.max_delay if self.action == "wait" else None

    def check_num_workers(self, num_workers: int) -> None:
        """Raise ValueError if workers would wait forever: max_delay < K − 1 with "wait"."""
        if self.action == "wait" and self.max_delay < num_workers - 1:
            raise ValueError(
                f"`max_delay` must be ≥ num_workers − 1 = {num_workers - 1} if workers wait, "
                f"got max_delay={self.max_delay}"
            )

    def oldest(self, steps: np.ndarray) -> np.ndarray:
        """Return the oldest model version that a report at each step may have, int[T]."""
        return steps - self.max_delay

    def due(
        self, step: int, held: Mapping[int, int], waiting: Sequence[int], num_workers: int
    ) -> tuple[int, ...]:
        """Return the first waiting workers, as many as the bound allows."""
        if self.action != "wait":
            return tuple(waiting)
        busy = num_workers - len(waiting)
        age = step - min(held.values(), default=step)
        return tuple(waiting[: max(0, self.max_delay + 1 - age - busy)])

    def restarts(self, step: int, held: Mapping[int, int]) -> tuple[int, ...]:
        """Return the busy workers whose report would now have a delay above the bound."""
        if self.action != "restart":
            return ()
        return tuple(sorted(k for k, index in held.items() if step - index > self.max_delay))

    def drops(self, step: int, dispatched_at: int) -> bool:
        """Return whether a report that arrives at ``step`` has a delay above the bound."""
        return self.action == "drop" and step - dispatched_at > self.max_delay


@dataclasses.dataclass(frozen=True)
class RestartEvery(Policy):
    """Restarts all workers that compute from an older version, after every B-th report.

    These are the restarts of Rennala SGD, which uses each version for B reports.

    Attributes:
        num_reports: B ≥ 1.

    Raises:
        TypeError, ValueError: If ``num_reports`` is out of range.

    Example:
        >>> RestartEvery(2).restarts(step=4, held={0: 4, 1: 2, 2: 3})
        (1, 2)
        >>> RestartEvery(2).restarts(step=5, held={0: 5, 1: 2})
        ()

    References:
        Tyurin and Richtárik, 2023 (arXiv 2305.12387, Rennala SGD).
    """

    num_reports: int

    def __post_init__(self) -> None:
        """Check the field."""
        object.__setattr__(self, "num_reports", check_count("num_reports", self.num_reports, 1))

    def oldest(self, steps: np.ndarray) -> np.ndarray:
        """Return the oldest model version that a report at each step may have, int[T]."""
        return steps - steps % self.num_reports

    def restarts(self, step: int, held: Mapping[int, int]) -> tuple[int, ...]:
        """Return the busy workers with an older version, if B divides ``step``."""
        if step % self.num_reports:
            return ()
        return tuple(sorted(worker for worker, index in held.items() if index < step))

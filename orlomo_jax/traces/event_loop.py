"""Samples arrivals under a policy, one event after the other."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import numpy as np

from orlomo_jax.traces.policies import Policy
from orlomo_jax.traces.trace_validation import TraceEvent

_DRAWS = 64  # random numbers drawn at once


class RoundClock:
    """The ends of one worker's rounds.

    A round that starts when the one before ended continues the same sums, so that a worker that
    never waits has bit for bit the times of :func:`~orlomo_jax.sample_trace` without a policy.

    Args:
        draw: Returns the next n factors U.
        mean: Mean seconds of a round without communication.
        communication_time: Seconds that every round adds.

    Example:
        >>> clock = RoundClock(np.ones, mean=2.0, communication_time=0.5)
        >>> clock.end(0.0), clock.end(2.5), clock.end(10.0)
        (2.5, 5.0, 12.5)
    """

    def __init__(
        self, draw: Callable[[int], np.ndarray], mean: float, communication_time: float
    ) -> None:
        """Start at time 0."""
        self._draw, self._mean, self._communication_time = draw, mean, communication_time
        self._factors: list[float] = []
        self._origin, self._drift, self._count, self._end = 0.0, 0.0, 0, 0.0

    def end(self, start: float) -> float:
        """Return the end of the worker's next round, which starts at this time."""
        if start != self._end:  # it waited, or its last round was cancelled
            self._origin, self._drift, self._count = start, 0.0, 0
        if not self._factors:
            self._factors = self._draw(_DRAWS).tolist()[::-1]
        self._drift += self._factors.pop()
        self._count += 1
        spent = self._mean * self._drift + self._communication_time * self._count
        self._end = self._origin + spent
        return self._end


class EventLoop:
    """Advances workers, server and policy from report to report; the server takes no time.

    Args:
        policy: Says who waits, who is restarted, and which reports are dropped.
        clocks: The clock of each worker.
        limits: How many reports each worker sends before it is silent.

    Attributes:
        workers: The worker of each applied report.
        times: Its time.
        events: The restarts.
    """

    def __init__(self, policy: Policy, clocks: Sequence[RoundClock], limits: Sequence[int]) -> None:
        """Send every worker its first task at time 0."""
        self._policy, self._clocks = policy, clocks
        self._reports_left = list(limits)
        self._heap: list[tuple[float, int, int]] = []  # (end, worker, round)
        self._rounds = [-1] * len(clocks)
        self._held: dict[int, int] = {}
        self._waiting: list[int] = []
        self.workers: list[int] = []
        self.times: list[float] = []
        self.events: list[TraceEvent] = []
        for worker in range(len(clocks)):
            self._send(worker, 0.0)

    def run(self, num_steps: int) -> None:
        """Advance to ``num_steps`` applied reports, or until no report is outstanding."""
        while len(self.workers) < num_steps and self._heap:
            now, worker, round = heapq.heappop(self._heap)
            if round == self._rounds[worker]:  # else it was cancelled
                self._arrive(worker, now)

    def _arrive(self, worker: int, now: float) -> None:
        self._reports_left[worker] -= 1
        if self._policy.drops(len(self.workers), self._held[worker]):
            self._restart(worker, now)
            return
        self.workers.append(worker)
        self.times.append(now)
        del self._held[worker]
        self._waiting.append(worker)
        self._send_due(now)
        for other in self._policy.restarts(len(self.workers), self._held):
            self._restart(other, now)
        self._send_due(now)

    def _send_due(self, now: float) -> None:
        due = self._policy.due(len(self.workers), self._held, self._waiting, len(self._clocks))
        for worker in due:
            self._waiting.remove(worker)
            self._send(worker, now)

    def _restart(self, worker: int, now: float) -> None:
        self.events.append(TraceEvent(len(self.workers), "restarted", worker))
        self._send(worker, now)

    def _send(self, worker: int, now: float) -> None:
        self._held[worker] = len(self.workers)
        self._rounds[worker] += 1
        end = self._clocks[worker].end(now)
        if self._reports_left[worker] > 0:
            heapq.heappush(self._heap, (end, worker, self._rounds[worker]))

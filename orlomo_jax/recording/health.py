"""Measures the health of a real run: speed, delays, idle time, lost rounds and traffic."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any, NamedTuple


class Health(NamedTuple):
    """The health of a real run; ``str(health)`` is a summary of a few lines.

    Attributes:
        seconds: Seconds since this process started or resumed the run.
        step: Reports applied, including those before the run resumed.
        reports_per_second: Speed since the previous view.
        delays: Counts of delays 0, 1, 2–3, 4–7, …, up to the largest delay.
        shares: Each worker's share of the applied reports, float[K].
        idle: The fraction of time in which each worker did not compute, float[K].
        present: Whether each worker takes part, bool[K].
        lost: Lost rounds: of workers that died, failed or hung, or whose report was rejected.
        rejected: Rejected reports by reason; see :class:`~orlomo_jax.server.RejectedReportError`.
        momentum_norm: ‖u‖, or None if the rule does not have a momentum.
        sent_bytes: Bytes of tasks sent over the network.
        received_bytes: Bytes of reports received over the network.
        failures: Why each worker lost its latest lost round, in one line.
    """

    seconds: float
    step: int
    reports_per_second: float
    delays: tuple[int, ...]
    shares: tuple[float, ...]
    idle: tuple[float, ...]
    present: tuple[bool, ...]
    lost: int
    rejected: dict[str, int]
    momentum_norm: float | None
    sent_bytes: int
    received_bytes: int
    failures: dict[int, str]

    def __str__(self) -> str:
        """Return the summary."""
        norm = "-" if self.momentum_norm is None else f"{self.momentum_norm:.3g}"
        edges = [_bucket_name(bucket) for bucket in range(len(self.delays))]
        delays = "  ".join(f"{e}: {n}" for e, n in zip(edges, self.delays, strict=True) if n)
        rejected = ", ".join(f"{n} {why}" for why, n in sorted(self.rejected.items())) or "none"
        workers = "  ".join(
            f"{worker}: {share:.0%}/{idle:.0%}" if there else f"{worker}: gone"
            for worker, (share, idle, there) in enumerate(
                zip(self.shares, self.idle, self.present, strict=True)
            )
        )
        failures = "".join(f"\n  worker {w}: {why}" for w, why in sorted(self.failures.items()))
        return (
            f"step {self.step}, {self.seconds:.0f} s, {self.reports_per_second:.1f} reports/s, "
            f"|u| {norm}, sent {self.sent_bytes / 1e6:.1f} MB, "
            f"received {self.received_bytes / 1e6:.1f} MB\n"
            f"delays        {delays or 'none yet'}\n"
            f"share/idle    {workers}\n"
            f"lost rounds   {self.lost}; rejected reports: {rejected}{failures}"
        )


class Meter:
    """Counts the events that a :class:`Health` reports.

    Example:
        >>> meter = Meter(num_workers=2)
        >>> for delay in (0, 1, 3):
        ...     meter.applied(worker=0, delay=delay)
        >>> meter.rejected["stale"] += 1
        >>> meter.view(3, (True, True), None).delays
        (1, 1, 1)
    """

    def __init__(self, num_workers: int) -> None:
        """Start the clock."""
        self.begin = time.monotonic()
        self._viewed: dict[Any, tuple[float, int]] = {}  # time and step of each viewer's last view
        self.reports, self.busy = [0] * num_workers, [0.0] * num_workers
        self.delays: Counter[int] = Counter()
        self.rejected: Counter[str] = Counter()
        self.failures: dict[int, str] = {}
        self.lost = self.sent_bytes = self.received_bytes = 0

    def applied(self, worker: int, delay: int) -> None:
        """Count a report that the server applied."""
        self.reports[worker] += 1
        self.delays[int(delay).bit_length()] += 1

    def failed(self, worker: int, why: str) -> None:
        """Count a lost round."""
        self.lost += 1
        line = next(iter(why.strip().splitlines()), "")
        self.failures[worker] = line if len(line) <= 200 else f"{line[:199]}…"

    def view(
        self, step: int, present: tuple[bool, ...], momentum_norm: float | None, viewer: Any = None
    ) -> Health:
        """Return the counts so far, and the speed since this viewer's last call."""
        now, total = time.monotonic(), sum(self.reports)
        viewed_at, before = self._viewed.get(viewer, (self.begin, step - total))
        rate = (step - before) / max(now - viewed_at, 1e-9)
        self._viewed[viewer] = now, step
        seconds = now - self.begin
        return Health(
            seconds=seconds,
            step=step,
            reports_per_second=rate,
            delays=tuple(self.delays[b] for b in range(max(self.delays, default=-1) + 1)),
            shares=tuple(count / max(total, 1) for count in self.reports),
            idle=tuple(max(0.0, 1 - busy / max(seconds, 1e-9)) for busy in self.busy),
            present=present,
            lost=self.lost,
            rejected=dict(self.rejected),
            momentum_norm=momentum_norm,
            sent_bytes=self.sent_bytes,
            received_bytes=self.received_bytes,
            failures=dict(self.failures),
        )


def _bucket_name(bucket: int) -> str:
    low, high = (1 << bucket) >> 1, (1 << bucket) - 1
    return str(high) if high <= 1 else f"{low}–{high}"

"""Computes the buffered and the synchronous rules of the field exactly, as the reference.

It uses none of the library's code, only the rules' formulas, in rational arithmetic. Each rule
keeps its reports and caches in lists, as the formulas are printed. Only FADAS has a root; it is a
rational number that is correct to 2^−200.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import isqrt
from typing import Any, NamedTuple, TypeAlias

import numpy as np

Vector: TypeAlias = Any  # an array of Fractions
SIZE = 4  # the number of parameters
ZERO: Vector = np.array([Fraction(0)] * SIZE, object)
COUNTS = ("step", "version", "accepted")


class Report(NamedTuple):
    """What the server knows of a report.

    Attributes:
        worker: The worker's index.
        dispatched_at: The number of reports received when the task was sent.
        dispatched_version: The rule's number of updates (or of accepted reports) then.
        gamma: γ of the task.
        delta: Δ.
    """

    worker: int
    dispatched_at: int
    dispatched_version: int
    gamma: Fraction
    delta: Vector


def eta(step: int) -> Fraction:
    """Return a learning rate that differs between consecutive steps."""
    return Fraction(1 + step % 4, 4)


def gamma(step: int) -> Fraction:
    """Return a local learning rate that differs between steps and between rounds."""
    return Fraction(1, 2 ** (step // 2 % 3))


def mean(vectors: Sequence[Vector]) -> Vector:
    """Return the mean of some vectors."""
    return sum(vectors, ZERO) / Fraction(len(vectors))


def root(x: Fraction) -> Fraction:
    """Return √x, rounded down to a multiple of 2^−200 divided by x's denominator."""
    return Fraction(isqrt(x.numerator * x.denominator << 400), x.denominator << 200)


class Rule:
    """A server rule; the attributes are those of the start."""

    synchronous = False  # whether the workers wait for one another after a round
    kept = ()  # the names of the attributes that the rule also keeps in its state
    step = version = 0  # the numbers of reports received and of updates made
    accepted = True  # whether the newest report was accepted
    params = ZERO  # w

    def receive(self, report: Report) -> None:
        """Apply a report."""
        self.accepted = True
        self.apply(report)
        self.step += 1

    def apply(self, report: Report) -> None:
        """Change the parameters and the rule's own state."""
        raise NotImplementedError

    def descend(self, direction: Vector) -> None:
        """Make an update: w ← w − direction."""
        self.params = self.params - direction
        self.version += 1


@dataclass
class Ringmaster(Rule):
    """A report with a delay below R, counted in accepted reports, makes w ← w − ηΔ."""

    max_delay: int | None

    def delay(self, report: Report) -> int:
        """Return the delay."""
        return self.version - report.dispatched_version

    def apply(self, report: Report) -> None:
        """Accept or decline."""
        self.accepted = self.max_delay is None or self.delay(report) < self.max_delay
        if self.accepted:
            self.descend(eta(self.step) * report.delta)


@dataclass
class Buffered(Rule):
    """Collects B accepted reports, then updates the parameters."""

    buffer_size: int
    buffer = ()

    def accepts(self, report: Report) -> bool:
        """Return whether the report goes into the buffer."""
        return True

    def apply(self, report: Report) -> None:
        """Put the report into the buffer."""
        self.accepted = self.accepts(report)
        if self.accepted:
            self.buffer = (*self.buffer, report)
            if len(self.buffer) == self.buffer_size:
                self.flush(report)
                self.buffer = ()

    def mean(self) -> Vector:
        """Return the mean Δ of the buffer."""
        return mean([report.delta for report in self.buffer])

    def flush(self, last: Report) -> None:
        """Update the parameters from a full buffer."""
        self.descend(eta(self.step) * self.mean())


class Rennala(Buffered):
    """Accepts reports computed from the current w only: w ← w − η·mean."""

    def accepts(self, report: Report) -> bool:
        """Return whether w has not changed since the task was sent."""
        return report.dispatched_version == self.version


@dataclass
class RescaledASGD(Rule):
    """AL-SGD with the weight (τ + 1)/K²."""

    num_workers: int

    def apply(self, report: Report) -> None:
        """Make w ← w − η(τ + 1)/K²·Δ."""
        delay = self.step - report.dispatched_at
        self.descend(eta(self.step) * Fraction(delay + 1, self.num_workers**2) * report.delta)


@dataclass
class CA2FL(Buffered):
    """D ← D + Δ_k − h_k; h_k ← Δ_k; at the B-th report w ← w − η(D/B + h̄)."""

    kept = ("cached", "cached_mean")
    num_workers: int
    cached_mean = sum = ZERO  # h̄ is the mean of the h_k at the last flush

    def __post_init__(self) -> None:
        """Start with h = 0."""
        self.cached = (ZERO,) * self.num_workers

    def apply(self, report: Report) -> None:
        """Calibrate the report, cache it, and put it into the buffer."""
        of, k = self.cached, report.worker
        self.sum = self.sum + report.delta - of[k]
        self.cached = (*of[:k], report.delta, *of[k + 1 :])
        super().apply(report)

    def flush(self, last: Report) -> None:
        """Update w, and then h̄."""
        self.descend(eta(self.step) * (self.sum / self.buffer_size + self.cached_mean))
        self.sum, self.cached_mean = ZERO, mean(self.cached)


@dataclass
class FADAS(Buffered):
    """Steps of AMSGrad along the buffered mean, with the rate of the largest delay."""

    kept = ("momentum", "second_moment", "max_second_moment")
    b1: Fraction
    b2: Fraction
    eps: Fraction
    threshold: int | None
    momentum = second_moment = max_second_moment = ZERO
    largest = 0

    def accepts(self, report: Report) -> bool:
        """Accept, and note the delay in versions."""
        delay = self.version - report.dispatched_version
        self.largest = max(self.largest, delay) if self.buffer else delay
        return True

    def rate(self) -> Fraction:
        """Return η, or min(η, 1/τ_max) if τ_max is above τ_c."""
        now = eta(self.step)
        late = self.threshold is not None and self.largest > self.threshold
        return min(now, Fraction(1, self.largest)) if late else now

    def flush(self, last: Report) -> None:
        """Update the moments, then w."""
        g, m, v, top = self.mean(), self.momentum, self.second_moment, self.max_second_moment
        self.momentum = m = self.b1 * m + (1 - self.b1) * g
        self.second_moment = v = self.b2 * v + (1 - self.b2) * g * g
        self.max_second_moment = top = np.maximum(top, v)
        scale = np.array([root(x) + self.eps for x in top], object)
        self.descend(self.rate() * m / scale)


class LocalSGD(Buffered):
    """A round of K workers: w ← w − η·mean."""

    synchronous = True


@dataclass
class FedAvgM(LocalSGD):
    """m ← μm + mean Δ; w ← w − ηm."""

    kept = ("momentum",)
    mu: Fraction
    momentum = ZERO

    def flush(self, last: Report) -> None:
        """End the round."""
        self.momentum = self.mu * self.momentum + self.mean()
        self.descend(eta(self.step) * self.momentum)


class DiLoCo(FedAvgM):
    """Nesterov: m ← μm + mean Δ; w ← w − η(mean Δ + μm)."""

    def flush(self, last: Report) -> None:
        """End the round."""
        self.momentum = self.mu * self.momentum + self.mean()
        self.descend(eta(self.step) * (self.mean() + self.mu * self.momentum))


class SlowMo(FedAvgM):
    """u ← μu + mean Δ/γ; w ← w − αγu; α is called η here."""

    def gradient(self) -> Vector:
        """Return mean Δ/γ."""
        return mean([report.delta / report.gamma for report in self.buffer])

    def flush(self, last: Report) -> None:
        """End the round."""
        self.momentum = self.mu * self.momentum + self.gradient()
        self.descend(eta(self.step) * last.gamma * self.momentum)


def replay(rule: Rule, reports: list[Report]) -> list[dict[str, Any]]:
    """Return what a rule holds after each of some reports."""
    seen = []
    for report in reports:
        rule.receive(report)
        seen.append({name: getattr(rule, name) for name in ("params", *COUNTS, *rule.kept)})
    return seen


def walk(make: Callable[[], Rule], num_workers: int, num_steps: int, seed: int) -> list[Report]:
    """Draw an order of arrivals with losses, leaves and joins, and return its reports.

    Worker 0 is rare. In a synchronous round every worker reports once, in a random order, and a
    lost task is sent again as it was.
    """
    draws, rule = random.Random(seed), make()
    tasks: dict[int, tuple[int, int, Fraction]] = {}
    absent = set() if rule.synchronous else set(range(1, num_workers)[::3])
    reports = []
    for step in range(num_steps):
        task = step, rule.version, gamma(step)
        free = set(range(num_workers)) - absent - set(tasks)
        if rule.synchronous and step % num_workers:
            free = set()
        tasks |= dict.fromkeys(sorted(free), task)
        others = sorted(set(tasks) - {0})
        if len(others) > 1 and not rule.synchronous:
            if draws.random() < 0.2:  # lost, and sent anew
                tasks[draws.choice(others)] = task
            if draws.random() < 0.1:
                absent.add(left := draws.choice(others))
                del tasks[left]
            if draws.random() < 0.2 and absent:
                absent.remove(joined := draws.choice(sorted(absent)))
                tasks[joined] = task
        weights = [1 / 8 if worker == 0 and not rule.synchronous else 1 for worker in tasks]
        worker = draws.choices(list(tasks), weights)[0]
        delta = [Fraction(draws.randint(-(2**10), 2**10), 2**6) for _ in range(SIZE)]
        reports.append(Report(worker, *tasks.pop(worker), np.array(delta, object)))
        rule.receive(reports[-1])
    return reports

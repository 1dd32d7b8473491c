"""Transcribes asynchronous rules of mixing and momentum into exact fractions, as a reference.

It does not use the library's code. Each class is a server for one leaf: a list of fractions. Roots
are rounded to 256 binary digits; everything else is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

Vector = list[Fraction]
Weight = Callable[[int], Fraction]
Rate = Callable[[int], Fraction]
"""Maps the server's step to a rate."""

_DIGITS = 256


def rounded(x: Fraction) -> Fraction:
    """Return ``x`` with 256 binary digits after the point."""
    return Fraction(round(x * 2**_DIGITS), 2**_DIGITS)


def root(x: Fraction) -> Fraction:
    """Return √x, rounded."""
    return Fraction(math.isqrt(int(x * 4**_DIGITS)), 2**_DIGITS)


def norm(x: Vector) -> Fraction:
    """Return ‖x‖, rounded."""
    return root(sum((xi * xi for xi in x), Fraction()))


def add(*terms: tuple[Fraction | int, Vector]) -> Vector:
    """Return Σ factor · vector."""
    vectors = [[Fraction(factor) * xi for xi in vector] for factor, vector in terms]
    return [sum(column, Fraction()) for column in zip(*vectors, strict=True)]


def inverse_root(delay: int) -> Fraction:
    """Return (1 + τ)^−½, the polynomial weight with a = ½."""
    return 1 / root(Fraction(1 + delay))


def hinge(a: int, b: int) -> Weight:
    """Return the weight that is 1 up to b, then 1/(a(τ − b) + 1)."""
    return lambda delay: Fraction(1) if delay <= b else Fraction(1, a * (delay - b) + 1)


class Sent(NamedTuple):
    """What a worker was sent, and the server's step and version at that time."""

    step: int
    version: int
    params: Vector


class Server:
    """A server with the parameters w.

    Attributes:
        w: The parameters.
        m: The momentum.
        step: The number of reports received.
        version: The number of changes of w.
    """

    def __init__(self, w: Vector) -> None:
        """Start at w, with zero momentum."""
        self.w, self.m = w, [Fraction()] * len(w)
        self.step = self.version = 0

    def dispatch(self) -> Sent:
        """Return what a worker is sent now."""
        return Sent(self.step, self.version, self.w)

    def receive(self, delta: Vector, sent: Sent) -> None:
        """Apply Δ of a worker that was sent ``sent``."""
        self.apply(delta, sent)
        self.step += 1

    def apply(self, delta: Vector, sent: Sent) -> None:
        """Change w; count a version."""
        raise NotImplementedError


class FedAsync(Server):
    """w ← (1 − α_τ) w + α_τ·local."""

    def __init__(self, w: Vector, alpha: Rate, s: Weight) -> None:
        """Mix with α s(τ)."""
        super().__init__(w)
        self.alpha, self.s = alpha, s

    def apply(self, delta: Vector, sent: Sent) -> None:
        """Mix the worker's model into w."""
        local = add((1, sent.params), (-1, delta))
        alpha = self.alpha(self.step) * self.s(self.step - sent.step)
        self.w = add((1 - alpha, self.w), (alpha, local))
        self.version += 1


class FedBuff(Server):
    """w ← w − (η/B) Σ s(τ)Δ at every B-th report; τ counts versions."""

    def __init__(self, w: Vector, size: int, eta: Rate, s: Weight) -> None:
        """Keep the reports themselves in the buffer."""
        super().__init__(w)
        self.size, self.eta, self.s, self.buffer = size, eta, s, []

    def apply(self, delta: Vector, sent: Sent) -> None:
        """Put the report into the buffer; at B, empty the buffer into w."""
        self.buffer.append((self.s(self.version - sent.version), delta))
        if len(self.buffer) == self.size:
            share = self.eta(self.step) / self.size
            self.w = add(
                (1, self.w), *[(-share * weight, report) for weight, report in self.buffer]
            )
            self.version, self.buffer = self.version + 1, []


class Nesterov(Server):
    """g = aΔ; m ← μm + g; w ← w − η(g + μm) at every report."""

    def __init__(self, w: Vector, mu: Fraction, eta: Rate, a: Fraction) -> None:
        """Start with zero momentum."""
        super().__init__(w)
        self.mu, self.eta, self.a = mu, eta, a

    def apply(self, delta: Vector, sent: Sent) -> None:
        """Take one step."""
        del sent
        g = add((self.a, delta))
        self.m = add((self.mu, self.m), (1, g))
        self.w = add((1, self.w), (-self.eta(self.step), add((1, g), (self.mu, self.m))))
        self.version += 1


class DelayedNesterov(Server):
    """Descend along every Δ/N; update m at every N-th report only."""

    def __init__(self, w: Vector, size: int, mu: Fraction, eta: Rate, c: Fraction) -> None:
        """Keep the reports themselves until the N-th."""
        super().__init__(w)
        self.size, self.mu, self.eta, self.c, self.buffer = size, mu, eta, c, []

    def apply(self, delta: Vector, sent: Sent) -> None:
        """Take one step."""
        del sent
        share = Fraction(1, self.size)
        self.buffer.append(delta)
        of_m = self.c
        if len(self.buffer) == self.size:
            self.m = add((self.mu, self.m), *[(share, report) for report in self.buffer])
            of_m = 1 - self.c * self.size + self.c
            self.buffer = []
        descent = add((of_m * self.mu, self.m), (share, delta))
        self.w = add((1, self.w), (-self.eta(self.step), descent))
        self.version += 1


class MomentumLookAhead(Server):
    """G = ρΔ; m ← μm + (1−μ)G; w ← w − η(G + μm)."""

    def __init__(self, w: Vector, mu: Fraction, eta: Rate, rho: Fraction) -> None:
        """Start with zero momentum."""
        super().__init__(w)
        self.mu, self.eta, self.rho = mu, eta, rho

    def apply(self, delta: Vector, sent: Sent) -> None:
        """Take one step."""
        del sent
        g = add((self.rho, self.corrected(delta)))
        self.m = add((self.mu, self.m), (1 - self.mu, g))
        self.w = add((1, self.w), (-self.eta(self.step), add((1, g), (self.mu, self.m))))
        self.version += 1

    def corrected(self, delta: Vector) -> Vector:
        """Return Δ as it is."""
        return delta


class LookAheadOriginal(MomentumLookAhead):
    """The same in the coordinates θ: θ ← θ − η(G + μm) with the old m; θ − ημm is sent."""

    def apply(self, delta: Vector, sent: Sent) -> None:
        """Take one step; ``w`` is θ."""
        del sent
        g = add((self.rho, delta))
        self.w = add((1, self.w), (-self.eta(self.step), add((1, g), (self.mu, self.m))))
        self.m = add((self.mu, self.m), (1 - self.mu, g))
        self.version += 1

    def dispatch(self) -> Sent:
        """Return θ − ημm."""
        ahead = add((1, self.w), (-self.eta(self.step) * self.mu, self.m))
        return super().dispatch()._replace(params=ahead)


class DelayLookAhead(Server):
    """m ← ρm + η(1−ρ)/(K(1−ρ^K))Δ; w ← w − m; w − hKm is sent."""

    def __init__(
        self, w: Vector, num_workers: int, rho: Fraction, eta: Rate, rounds: Fraction
    ) -> None:
        """Start with zero momentum."""
        super().__init__(w)
        self.K, self.rho, self.eta, self.rounds = num_workers, rho, eta, rounds

    def dispatch(self) -> Sent:
        """Return w − hKm."""
        ahead = add((1, self.w), (-self.rounds * self.K, self.m))
        return super().dispatch()._replace(params=ahead)

    def apply(self, delta: Vector, sent: Sent) -> None:
        """Take one step."""
        del sent
        lasting = self.K * (1 - self.rho**self.K)
        gain = self.eta(self.step) * (1 - self.rho) / lasting
        self.m = add((self.rho, self.m), (gain, delta))
        self.w = add((1, self.w), (-1, self.m))
        self.version += 1


class HeLoCo(MomentumLookAhead):
    """MLA with a corrected Δ; w − ημm is sent.

    Attributes:
        seen: The cases that have occurred: "none", "aligned", "opposed", "turned".
    """

    ALIGNED, SHRINK, TURN, KAPPA = Fraction(1, 5), Fraction(1, 2), Fraction(1), Fraction(3)
    MOST, EPSILON = Fraction(1, 2), Fraction(1, 10**8)

    def __init__(self, *args) -> None:
        """Start as MLA does."""
        super().__init__(*args)
        self.seen: set[str] = set()

    def dispatch(self) -> Sent:
        """Return w − ημm."""
        ahead = add((1, self.w), (-self.eta(self.step) * self.mu, self.m))
        return super().dispatch()._replace(params=ahead)

    def corrected(self, delta: Vector) -> Vector:
        """Return Δ̂."""
        length, of_m = norm(delta), norm(self.m)
        if length == 0 or of_m == 0:
            self.seen.add("none")
            return delta
        along, towards = add((1 / length, delta)), add((1 / of_m, self.m))
        cosine = rounded(sum((x * y for x, y in zip(along, towards, strict=True)), Fraction()))
        confidence = length / (length + self.KAPPA * of_m + self.EPSILON)
        if cosine >= self.ALIGNED:
            self.seen.add("aligned")
            return delta
        if cosine < 0:
            self.seen.add("opposed")
            beta = min(self.SHRINK * -cosine * confidence, self.MOST)
            return [rounded(x) for x in add((1, delta), (-beta * cosine * length, towards))]
        self.seen.add("turned")
        turned = min(self.TURN * (1 - cosine) * confidence, Fraction(1))
        v = add((1 - turned, along), (turned, towards))
        return [rounded(x) for x in add((length / norm(v), v))]

"""Derives the bounds' constants again, from the steps of their proofs, by computer algebra.

"Left ≤ right" holds with a wide margin in Lemmas 4, 10, 11 and Theorem 1, so a measurement cannot
tell a constant from its half. Here each right-hand side is rebuilt from the inequalities of its
proof. SymPy certifies each inequality, except Jensen's and Assumption 1, which are named. The
difference from the formula in :class:`~proofs_check.claims.Claims` must simplify to zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from proofs_check.optional import sympy
from proofs_check.registry import Outcome, Size, Subject, holds


class Derivation:
    """Holds the symbols of the bounds, and certifies the inequalities of a derivation.

    β = b/(1+b) with b ≥ 0 covers [0, 1), and S = 1 + s, K = 1 + k cover the integers ≥ 1. An
    inequality is certified if right − left is a fraction of polynomials in b, s, k, … with all
    coefficients ≥ 0.
    """

    def __init__(self) -> None:
        """Create the symbols."""
        sp = sympy()
        self.gamma, self.smoothness = sp.symbols("gamma L", positive=True)
        self.beta = sp.Symbol("beta", positive=True)
        self.s, self.k, self.b = sp.symbols("s k b", nonnegative=True)
        self.local_steps, self.num_workers = 1 + self.s, 1 + self.k
        self.num_steps = sp.Symbol("T", positive=True)
        self.failed: list[str] = []
        self.steps = 0

    def at_most(self, left: Any, right: Any, name: str) -> Any:
        """Certify left ≤ right for every β, and return right."""
        sp = sympy()
        self.steps += 1
        difference = sp.together((right - left).subs(self.beta, self.b / (1 + self.b)))
        numerator, denominator = sp.fraction(sp.cancel(difference))
        parts = [
            coefficient
            for part in (numerator, denominator)
            for coefficient in (sp.Poly(part).coeffs() if part.free_symbols else [part])
        ]
        if not (all(c >= 0 for c in parts) or all(c <= 0 for c in parts)):
            self.failed.append(name)
        return right

    def outcome(self, statement: str, stated: tuple, derived: tuple) -> Outcome:
        """Compare the stated constants with the derived ones."""
        sp = sympy()
        residuals = [sp.simplify(a - b) for a, b in zip(stated, derived, strict=True)]
        wrong = [f"stated/derived = {sp.simplify(a / b)}"
                 for a, b, r in zip(stated, derived, residuals, strict=True) if r != 0]  # fmt: skip
        note = "; ".join([*wrong, *self.failed]) or f"{self.steps} certified proof steps"
        failed = len(wrong) + len(self.failed)
        cases = len(stated) + self.steps
        return Outcome(statement, cases, float(failed), 0.0, failed == 0, note[:200])


def lemma_4(claims: Any) -> tuple[Derivation, tuple, tuple]:
    """Derive Lemma 4: Σ_s 2γ²(Σ_{i<s} c_i²σ² + s Σ_{i<s} c_i²‖∇F_i‖²), c_i = (1−β^{s−i})/(1−β).

    This and the next three functions return (derivation, stated constants, derived constants).
    """
    d, sp = Derivation(), sympy()
    n, x = sp.Symbol("n", integer=True, positive=True), sp.Symbol("x", nonnegative=True)
    # c_i ≤ 1/(1−β), because 1 − β^n ≤ 1; x stands for β^n ≥ 0.
    bound = d.at_most((1 - x) / (1 - d.beta), 1 / (1 - d.beta), "c_i ≤ 1/(1−β)")
    one = 2 * d.gamma**2 * n * bound**2  # ‖a + b‖² ≤ 2‖a‖² + 2‖b‖²; Assumption 1; Jensen
    total = sp.summation(one, (n, 0, d.s))
    stated = claims.lemma_4(d.gamma, d.beta, d.local_steps)
    return d, stated, (total, total)


def lemma_10(claims: Any) -> tuple[Derivation, tuple, tuple]:
    """Derive Lemma 10: β²/((1−β)²K) ΣE‖û_t‖², with E‖û_t‖² split into noise and gradients."""
    d = Derivation()
    factor = d.beta**2 / (1 - d.beta) ** 2 / d.num_workers  # Lemma 3, η̂ ≤ 1/K
    geometric = 1 / (1 - d.beta)  # Σ_n β^n
    squares = d.at_most(1 / (1 - d.beta**2), geometric, "Σ_n β^{2n} ≤ 1/(1−β)")
    # Noise of one report: E‖Δu − E Δu‖² = γ²σ² Σ_s β^{2(S−1−s)} ≤ γ²σ²/(1−β).
    noise = 2 * d.gamma**2 * squares
    # Each report has each exponent n in û_t for K values of t: Σ_t β^{2n_t} ≤ K Σ_n β^{2n}.
    noise = factor * noise * d.num_workers * squares / d.num_workers  # η̂² ≤ η̂/K
    # Gradients: Jensen over the reports (z_t ≤ KΣβ^n) and over the S local steps.
    gradients = 2 * d.gamma**2 * d.num_workers * geometric * d.local_steps
    gradients = factor * gradients * d.num_workers * geometric / d.num_workers
    stated = claims.lemma_10(d.gamma, d.beta, d.local_steps, d.num_workers)
    return d, stated, (noise, gradients)


def lemma_11(claims: Any) -> tuple[Derivation, tuple, tuple]:
    """Derive Lemma 11: 2γ²Σ over the K−1 in-flight reports, each with η̂·(next − j) ≤ 2."""
    d, sp = Derivation(), sympy()
    x = sp.Symbol("x", nonnegative=True)
    weight = d.at_most((1 - x) / (1 - d.beta), 1 / (1 - d.beta), "(1−β^n)/(1−β) ≤ 1/(1−β)")
    noise = 2 * d.gamma**2 * d.local_steps * weight**2
    d.at_most(d.k, d.num_workers, "K−1 ≤ K")
    gradients = noise * d.num_workers  # Jensen over the workers and the S local steps
    # Under Eq. (6), η̂(next − j) ≤ 2: (1/K)·2K below the threshold, (1/τ)·τ above it.
    tau = sp.Symbol("tau", positive=True)
    d.at_most(1 / tau * tau, sp.Integer(2), "τ/τ ≤ 2")
    stay = d.at_most(1 / d.num_workers * 2 * d.num_workers, sp.Integer(2), "2K/K ≤ 2")
    noise, gradients = (x * stay / d.num_workers for x in (noise, gradients))  # η̂_t ≤ 1/K
    stated = claims.lemma_11(d.gamma, d.beta, d.local_steps, d.num_workers)
    return d, stated, (noise, gradients)


def theorem_1(claims: Any) -> tuple[Derivation, tuple, tuple]:
    """Derive Theorem 1: put Lemmas 4, 10, 11 into the descent inequality.

    The result is divided by γSA/(2(1−β)) with A = Ση̂.
    """
    d, sp = Derivation(), sympy()
    g, L, S, K, beta = d.gamma, d.smoothness, d.local_steps, d.num_workers, d.beta
    theta = 1 / (1 + sp.Symbol("p", nonnegative=True))  # γ = θ(1−β)²/(16LS), θ ∈ (0, 1]
    largest = {g: theta * (1 - beta) ** 2 / (16 * L * S)}
    drift_noise, drift_gradients = claims.lemma_4(g, beta, S)
    y_noise, y_gradients = claims.lemma_10(g, beta, S, K)
    w_noise, w_gradients = claims.lemma_11(g, beta, S, K)
    half, close = g * L**2 / (2 * (1 - beta)), 2 * L**2 * g * S / (1 - beta)
    # E F(ŷ_T) − F(w_0) + γSA/(2(1−β))·left is at most A times σ²·noise + gradients·ΣE‖∇F‖²/A:
    gradients = half * drift_gradients + close * (y_gradients + w_gradients)
    d.at_most((gradients / g).subs(largest), 1 / (8 * (1 - beta)), "gradients absorbed")
    d.at_most(
        (g**2 * L * S / (1 - beta) ** 2 / g).subs(largest), 1 / (8 * (1 - beta)), "8γLS ≤ 1−β"
    )
    own = g**2 * L * S / (1 - beta) ** 2 / K  # η̂² ≤ η̂/K
    small = own + close * (y_noise + w_noise)
    twice = 2 * g**2 * L * S / ((1 - beta) ** 3 * K)
    d.at_most((small / g**2).subs(largest), (twice / g**2).subs(largest), "noise ≤ 2γ²LSσ²/…")
    divide = 2 * (1 - beta) / (g * S)
    weight = d.num_steps / (2 * K)  # A ≥ T/(2K), the delay facts
    derived = (divide / weight, divide * (twice + half * drift_noise))
    return d, claims.theorem_1(g, beta, S, K, d.num_steps, L), derived


def remark_5(claims: Any) -> Outcome:
    """Check that each γ of Remark 5 balances two terms of Theorem 1 or is its condition on γ."""
    beta, S, K, T, L, sigma, gap = 0.75, 6, 5, 700, 3.0, 1.7, 2.5
    condition, noise, drift = claims.remark_5(beta, S, K, T, L, sigma, gap)

    def terms(gamma, local_steps):
        of_gap, of_noise = claims.theorem_1(gamma, beta, local_steps, K, T, L)
        alone = claims.theorem_1(gamma, beta, 1, K, T, L)[1]
        return of_gap * gap, alone * sigma**2, (of_noise - alone) * sigma**2

    gap_term, noise_term, _ = terms(noise, S)
    gap_at_drift, _, drift_term = terms(drift, S)
    residual = max(
        abs(16 * L * S * condition / (1 - beta) ** 2 - 1),
        abs(gap_term / noise_term - 1),
        abs(gap_at_drift / drift_term - 1),
    )
    dropped = claims.remark_5(beta, 1, K, T, L, sigma, gap)[2] is None
    dropped &= claims.remark_5(beta, S, K, T, L, 0.0, gap)[1:] == (None, None)
    allowed = 2.0**-45
    return Outcome(
        "remark-5",
        5,
        residual,
        allowed,
        residual <= allowed and dropped,
        "each γ balances two terms",
    )


@holds(
    "lemma-4",
    "lemma-10",
    "lemma-11",
    "theorem-1",
    "remark-5",
    strength="symbolic",
    needs=("sympy",),
)
def constants(subject: Subject, size: Size) -> Iterator[Outcome]:
    """Derive every constant again and compare it with the stated one."""
    for statement, derive in (
        ("lemma-4", lemma_4),
        ("lemma-10", lemma_10),
        ("lemma-11", lemma_11),
        ("theorem-1", theorem_1),
    ):
        derivation, stated, derived = derive(subject.claims)
        yield derivation.outcome(statement, stated, derived)
    yield remark_5(subject.claims)

"""Strength 1 (symbolic): proves the lemmas' inductive steps for all K, β and orders, with SymPy.

A step is proved if its residual simplifies to zero in every case: K | (t−1) or not (``opens``),
and k_t = k_{t−1} or not. All summands over the other workers obey the same exponent relation,
⌈t/K⌉ − ⌈i/K⌉ = ⌈(t−1)/K⌉ − ⌈i/K⌉ + [K | (t−1)], and the residual is linear in them. So one summand
with a symbolic exponent n ≥ 0 represents them all. β is a positive symbol; the residuals are
polynomials in β, so β = 0 follows.

The server's step is Algorithm 2 of :class:`~proofs_check.claims.Claims`.
:mod:`proofs_check.checks.server_step` shows that the library's step is the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from proofs_check.optional import sympy
from proofs_check.registry import Outcome, Size, Subject, holds

GROUPS_GROW = "⌈t/K⌉ = ⌈(t−1)/K⌉ + [K | (t−1)]"


class Report(NamedTuple):
    """A report with symbolic η̂, Δu and Δw."""

    rate: Any
    du: Any
    dw: Any


def _report(name: str) -> Report:
    return Report(*sympy().symbols(f"eta_{name} du_{name} dw_{name}"))


def _scalars() -> tuple[Any, Callable[[Any], Any], Callable[[Any], Any]]:
    """Return β, n ↦ β^n and n ↦ β(1−β^n)/(1−β)."""
    beta = sympy().Symbol("beta", positive=True)
    return beta, lambda n: beta**n, lambda n: beta * (1 - beta**n) / (1 - beta)


def in_flight(claims, report: Report, late) -> tuple[Any, Any]:
    """Return the terms of one in-flight report in û − u (Lemma 1) and in ŵ − w (Lemma 2)."""
    _, power, past = _scalars()
    weight = claims.lemma_1(power(late), past(late), report.rate)
    of_w, of_u = claims.lemma_2(power(late), past(late), report.rate)
    return weight * report.du, of_w * report.dw + of_u * report.du


def lemma_1_and_2_step(claims, opens: int, arrives_new: bool, stays: bool) -> tuple[Any, Any]:
    """Return the residuals of the inductive step from t−1 to t ≥ 1.

    In the printed lemmas the only report of index t is from k_{t−1}. If k_t = k_{t−1}, it arrives
    at once (``arrives_new``). Otherwise it stays in flight and an older report arrives, with the
    exponent m at t−1. In ledger form any number of reports may have index t, and those that do not
    arrive stay in flight (``stays``).

    Args:
        claims: Gives Lemmas 1 and 2 and Algorithm 2.
        opens: [K | (t−1)].
        arrives_new: Whether the report that arrives at t has index t.
        stays: Whether a (further) report of index t stays in flight.
    """
    beta, power, past = _scalars()
    n, m = sympy().symbols("n m", integer=True, nonnegative=True)
    u, w = sympy().symbols("u w")
    other, new, arriving = _report("other"), _report("new"), _report("arriving")
    late = 0 if arrives_new else m + opens
    # The induction hypothesis at t−1.
    was_u, was_w = in_flight(claims, other, n)
    if not arrives_new:
        more_u, more_w = in_flight(claims, arriving, m)
        was_u, was_w = was_u + more_u, was_w + more_w
    hat_u, hat_w = u + was_u, w + was_w
    # The definitions of û, ŵ at t.
    dispatched = [r for r, there in ((arriving, arrives_new), (new, stays)) if there]
    hat_w = hat_w - opens * beta * hat_u - sum(r.rate * r.dw for r in dispatched)
    hat_u = beta**opens * hat_u + sum(r.rate * r.du for r in dispatched)
    # The server's step with the report that arrives; its η̂ is η_t.
    step = claims.algorithm_2(beta, opens, power(late), past(late), arriving.rate)
    given = (u, arriving.du, arriving.dw)
    u, w = (
        sum(c * x for c, x in zip(step.u, given, strict=True)),
        w + sum(c * x for c, x in zip(step.w, given, strict=True)),
    )
    # The lemmas at t.
    is_u, is_w = in_flight(claims, other, n + opens)
    if stays:
        more_u, more_w = in_flight(claims, new, 0)
        is_u, is_w = is_u + more_u, is_w + more_w
    return hat_u - u - is_u, hat_w - w - is_w


def base_case(claims) -> tuple[Any, Any]:
    """Return the residuals of Lemmas 1 and 2 at t = 0, where u_0 = 0 and every n is 0."""
    beta, power, past = _scalars()
    w = sympy().Symbol("w")
    arriving, other = _report("arriving"), _report("other")
    hat_u = arriving.rate * arriving.du + other.rate * other.du
    hat_w = w - arriving.rate * arriving.dw - other.rate * other.dw
    opens = sympy().Symbol("opens")  # its value does not matter: it multiplies u_0 = 0
    step = claims.algorithm_2(beta, opens, power(0), past(0), arriving.rate)
    given = (0, arriving.du, arriving.dw)
    u_1 = sum(c * x for c, x in zip(step.u, given, strict=True))
    w_1 = w + sum(c * x for c, x in zip(step.w, given, strict=True))
    is_u, is_w = in_flight(claims, other, 0)
    return hat_u - u_1 - is_u, hat_w - w_1 - is_w


def lemma_3_step(claims, opens: int) -> Any:
    """Return the residual of Lemma 3's inductive step, times 1−β."""
    beta, *_ = _scalars()
    u, w, report = *sympy().symbols("u_hat w_hat"), _report("t")
    scaled_y = (1 - beta) * w + claims.lemma_3(beta) * u  # the hypothesis
    scaled_y -= report.rate * _dh(claims, report)
    w = w - opens * beta * u - report.rate * report.dw
    u = beta**opens * u + report.rate * report.du
    return scaled_y - (1 - beta) * w - claims.lemma_3(beta) * u


def lemma_3_base(claims) -> Any:
    """Return the residual of Lemma 3 at t = 1, for one of the K summands, times 1−β."""
    beta, *_ = _scalars()
    w, report = sympy().Symbol("w_0"), _report("0")
    scaled_y = (1 - beta) * w - report.rate * _dh(claims, report)
    hat_w, hat_u = w - report.rate * report.dw, report.rate * report.du
    return scaled_y - (1 - beta) * hat_w - claims.lemma_3(beta) * hat_u


def identity_step(claims) -> Any:
    """Return the residual of the identity after one more local step; before the first all is 0."""
    beta, *_ = _scalars()
    du, dw, change = sympy().symbols("du dw gamma_g")  # change = γ g_s
    of_u, of_w = claims.identity(beta)
    dh = of_u * du + of_w * dw + change  # the hypothesis, and one more gradient
    du = beta * du + change
    return dh - of_u * du - of_w * (dw + du)


def _dh(claims, report: Report) -> Any:
    of_u, of_w = claims.identity(_scalars()[0])
    return of_u * report.du + of_w * report.dw


def whole(expression: Any) -> Any:
    """Return an expression with each floor replaced by an integer expression that SymPy proves.

    With t−1 = qK + r, 0 ≤ r < K, a floor ⌊x⌋ is the c with 0 ≤ x − c < 1. The candidates c are ±q
    and their neighbours. SymPy proves the inequalities from the signs of its symbols. If it proves
    none of them, the floor stays, and the residual cannot simplify to zero.
    """
    q = sympy().Symbol("q", integer=True, nonnegative=True)
    expression = sympy().sympify(expression)
    for found in expression.atoms(sympy().floor):
        x = found.args[0]
        for c in (q + s for s in (-1, 0, 1, 2)):
            for candidate in (c, -c):
                above = sympy().factor(x - candidate)
                below = sympy().factor(candidate + 1 - x)
                if above.is_nonnegative and below.is_positive:
                    expression = expression.subs(found, candidate)
                    break
    return sympy().expand(expression)


def group_facts(claims) -> Iterator[tuple[str, Any]]:
    """Yield named residuals for ⌈t/K⌉ = ⌈(t−1)/K⌉ + [K | (t−1)] and for Lemma 9's m."""
    q, s, d = sympy().symbols("q s d", integer=True, nonnegative=True)
    # Either t − 1 = qK with any K ≥ 1, or t − 1 = qK + r with r = 1 + s and K = r + 1 + d.
    for opens, r, size in ((1, 0, 1 + d), (0, 1 + s, 2 + s + d)):
        t = q * size + r + 1
        now, before = whole(claims.group(t, size)), whole(claims.group(t - 1, size))
        yield GROUPS_GROW, now - before - opens
        m_next, m = whole(claims.lemma_9(t + 1, size)), whole(claims.lemma_9(t, size))
        yield "Lemma 9's exponents grow by [K | (t−1)]", m_next - m - opens
        yield "Lemma 9's newest report weighs 1", m_next - now


def exponent_relation() -> Any:
    """Return the residual of β(1−β^{n+1})/(1−β) = β(1−β^n)/(1−β) + β·β^n."""
    beta, power, past = _scalars()
    n = sympy().Symbol("n", integer=True, nonnegative=True)
    return past(n + 1) - past(n) - beta * power(n)


def _is_zero(expression: Any) -> bool:
    return sympy().simplify(sympy().powsimp(sympy().expand(sympy().together(expression)))) == 0


def _proved(statement: str, residuals: list[tuple[str, Any]]) -> Outcome:
    left = [(name, x) for name, x in residuals if not _is_zero(x)]
    note = f"residual 0 in {len(residuals)} cases"
    if left:
        name, x = left[0]
        note = f"{name}: {str(sympy().factor(x))[:120]}"
    return Outcome(statement, len(residuals), float(len(left)), 0.0, not left, note)


@holds(
    "identity",
    "lemma-1",
    "lemma-2",
    "lemma-3",
    "lemma-9",
    "ledger",
    strength="symbolic",
    needs=("sympy",),
)
def induction(subject: Subject, size: Size) -> Iterator[Outcome]:
    """Prove the inductive steps and base cases of Lemmas 1, 2, 3 and 9 and of the ledger form."""
    claims = subject.claims
    steps = {
        (opens, same): lemma_1_and_2_step(claims, opens, arrives_new=same, stays=not same)
        for opens, same in itertools.product((0, 1), (False, True))
    }
    base = base_case(claims)
    facts = list(group_facts(claims))
    shared = [("exponents", exponent_relation()), *(x for x in facts if x[0] == GROUPS_GROW)]
    for which, lemma in enumerate(("lemma-1", "lemma-2")):
        cases = [("base", base[which]), *shared]
        for (opens, same), residuals in steps.items():
            where = f"K | (t−1): {bool(opens)}, k_t = k_(t−1): {same}"
            cases.append((where, residuals[which]))
        yield _proved(lemma, cases)
    lemma_3 = [("base", lemma_3_base(claims))]
    lemma_3 += [(f"K | (t−1): {bool(opens)}", lemma_3_step(claims, opens)) for opens in (0, 1)]
    yield _proved("lemma-3", lemma_3)
    yield _proved("identity", [("step", identity_step(claims))])
    yield _proved("lemma-9", facts)
    ledger = []
    for opens, new, stays in itertools.product((0, 1), (False, True), (False, True)):
        pair = lemma_1_and_2_step(claims, opens, new, stays)
        ledger += [(f"opens {opens}, arrives new {new}, others stay {stays}", x) for x in pair]
    yield _proved("ledger", ledger + lemma_3 + shared)

"""Registers the statements and the checks, and runs the checks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import orlomo_jax
import orlomo_jax.rules
from proofs_check.claims import PAPER, Claims
from proofs_check.optional import MissingPackage, require
from proofs_check.statements import FIELD_STATEMENTS, Statement

_server = r"Alg(orithm|\.) {0}\b(?!, l(ines?|\.) (1[7-9]|2\d))"
STATEMENTS: dict[str, Statement] = {
    "eq-2": Statement("Eq. (2)", "K = S = 1 is momentum SGD", r"Eq\. \(2\)|optax\.sgd"),
    "eq-6": Statement("Eq. (6)", "η_t = 1/K up to a delay of 2K, then 1/τ", r"Eq\. \(6\)"),
    "algorithm-1": Statement("Algorithm 1", "AL-SGD's server step", _server.format(1)),
    "algorithm-2": Statement("Algorithm 2", "OrLoMo's server step", _server.format(2)),
    "worker": Statement(
        "Algorithm 2, worker",
        "S steps of momentum SGD",
        r"Alg(orithm|\.) 2, l(ines?|\.) (1[7-9]|2\d)",
    ),
    "algorithm-3": Statement("Algorithm 3", "local OrMo-DA's server step", _server.format(3)),
    "prsgdm": Statement("PRSGDm", "average w and u over K reports", r"PRSGDm"),
    "noise-keys": Statement(
        "Worker, noise keys",
        "each local step of each round of each worker has its own",
        r"fold_in\((jax\.random\.)?fold_in\(noise_key",
    ),
    "weight-decay": Statement(
        "Worker, weight decay", "ũ ← βũ + γ(g + λw̃) at each local step", r"weight_decay · w̃_s"
    ),
    "bookkeeping": Statement(
        "Server bookkeeping",
        "each report is applied at most once, with the delay of its own dispatch",
        r"at most once|bookkeeping of staleness",
    ),
    "figure-1": Statement("Figure 1", "the worked example: K = 3, t = 8", r"Fig(ure|\.) 1"),
    "identity": Statement("Identity", "Δh/(1−β) = βΔu/(1−β) + Δw", r"Δh/\(1−β\)"),
    "lemma-1": Statement("Lemma 1", "û − u = Σ β^n η̂Δu over in-flight reports", r"Lemmas? 1\b"),
    "lemma-2": Statement(
        "Lemma 2", "ŵ − w = −Σ [η̂Δw + β(1−β^n)/(1−β) η̂Δu]", r"Lemma 2\b|Lemmas 1(, 2|–3)"
    ),
    "lemma-3": Statement("Lemma 3", "ŷ − ŵ = −β/(1−β) û", r"Lemma 3\b|Lemmas 1–3"),
    "lemma-9": Statement("Lemma 9", "û as a sum over groups", r"Lemma 9\b"),
    "ledger": Statement(
        "Lemmas 1–3, ledger form",
        "the same under losses, joins, re-dispatches (Theorem 1, delay facts: not)",
        r"[Ll]edger",
    ),
    "lemma-4": Statement("Lemma 4", "local drift ≤ γ²S(S−1)/(1−β)² · (σ² + ΣE‖∇F‖²)", r"Lemma 4\b"),
    "lemma-10": Statement("Lemma 10", "ΣE η̂‖ŷ − ŵ‖² ≤ …", r"Lemma 10\b"),
    "lemma-11": Statement("Lemma 11", "ΣE η̂‖ŵ − w‖² ≤ …", r"Lemma 11\b"),
    "delays": Statement(
        "Delay facts",
        "Σ_k τ̂_{T,k} + Σ_t τ_t = (K−1)T; Σ_t η_t ≥ T/(2K)",
        r"\(K − 1\)·T|delay facts",
    ),
    "theorem-1": Statement("Theorem 1", "E‖∇F(w̄_T)‖² ≤ …", r"Theorem 1\b"),
    "remark-1": Statement("Remark 1", "β = 0 is AL-SGD, to the bit", r"Remark 1\b"),
    "remark-2": Statement("Remark 2", "S = 1 is OrMo-DA, to rounding", r"Remark 2\b|is OrMo-DA"),
    "remark-4": Statement("Remark 4", "error ~ γ/K + γ²S, as PRSGDm's", r"Remark 4\b"),
    "remark-5": Statement(
        "Remark 5", "O(√(Lσ²/(ST)) + (KLσ)^{2/3}(S−1)^{1/3}/(ST)^{2/3} + KL/T)", r"Remark 5\b"
    ),
} | FIELD_STATEMENTS


def field_rule(name: str) -> Callable[..., Any]:
    """Return the factory in :mod:`orlomo_jax.rules` with this name."""
    return getattr(orlomo_jax.rules, name)


@dataclass(frozen=True)
class Subject:
    """The functions under test: the public functions of orlomo_jax, or replacements.

    Attributes:
        name: The name in reports.
        rule: ``rule(num_workers, momentum=…, learning_rate=…, delay_weight=…)``, tested as OrLoMo.
        worker_momentum: Whether the workers report Δu. If False, Δw replaces Δu in the lemmas.
        al_sgd, local_ormo_da, prsgdm, delay_adaptive, local_momentum_sgd, parameter_server: The
            functions and classes of the same names.
        field_rule: Maps a name to the factory in ``orlomo_jax.rules``.
        make_method, simulate: The library's main entry points.
        claims: The formulas that the functions are compared with.
    """

    name: str = "orlomo_jax"
    rule: Callable[..., Any] = orlomo_jax.orlomo
    worker_momentum: bool = True
    al_sgd: Callable[..., Any] = orlomo_jax.al_sgd
    local_ormo_da: Callable[..., Any] = orlomo_jax.local_ormo_da
    prsgdm: Callable[..., Any] = orlomo_jax.prsgdm
    delay_adaptive: Callable[..., Any] = orlomo_jax.delay_adaptive
    local_momentum_sgd: Callable[..., Any] = orlomo_jax.local_momentum_sgd
    parameter_server: Callable[..., Any] = orlomo_jax.ParameterServer
    field_rule: Callable[[str], Callable[..., Any]] = field_rule
    make_method: Callable[..., orlomo_jax.Method] = orlomo_jax.make_method
    simulate: Callable[..., orlomo_jax.TrainingResult] = orlomo_jax.simulate
    claims: Claims = PAPER


@dataclass(frozen=True)
class Size:
    """The number of cases to try.

    Attributes:
        examples: Hypothesis examples for each property.
        exhaustive: (K, T) pairs; all K^T orders of each are run.
        replicates: Monte Carlo runs for each setting.
        settings: How many of the (K, S, T) settings the bounds are measured at.
        long_steps: Steps of each run that checks the bookkeeping.
        seed: Seed of all draws.
        minimize: Whether to search for the smallest counterexample after a failure.
        plots: Folder for the plots, or None.
    """

    examples: int = 60
    exhaustive: tuple[tuple[int, int], ...] = (
        (1, 6), (2, 5), (2, 12), (3, 4), (3, 9), (4, 7), (5, 6), (6, 5)
    )  # fmt: skip
    replicates: int = 256
    settings: int = 5
    long_steps: int = 2048
    seed: int = 0
    minimize: bool = True
    plots: str | None = None


SMALL = Size(
    examples=4, exhaustive=((2, 6), (3, 3)), replicates=64, settings=2, long_steps=300,
    minimize=False,
)  # fmt: skip


@dataclass
class Outcome:
    """The result of one check for one statement.

    Attributes:
        statement: A key of :data:`STATEMENTS`.
        cases: How many cases were tried.
        residual: The worst |left − right|, the left side of an inequality, or a count of failures.
        allowance: The largest residual allowed, or the right side; 0 means exact.
        passed: Whether the statement holds.
        note: The size of the check, or where it failed or how tight it was.
        counterexample: A case that ``--replay`` runs again, or None.
        check: The check's name; :func:`run` fills it in.
        strength: The check's strength; :func:`run` fills it in.
    """

    statement: str
    cases: int
    residual: float
    allowance: float
    passed: bool
    note: str = ""
    counterexample: dict[str, Any] | None = None
    check: str = ""
    strength: str = ""


@dataclass(frozen=True)
class Check:
    """A registered check.

    Attributes:
        name: The function's name.
        strength: "symbolic", "exhaustive", "property" or "statistical".
        statements: Keys of :data:`STATEMENTS`.
        function: ``(subject, size) -> outcomes``.
        rule_only: Whether it can check a user's server rule.
        needs: Optional packages that it imports.
    """

    name: str
    strength: str
    statements: tuple[str, ...]
    function: Callable[[Subject, Size], Iterable[Outcome]]
    rule_only: bool = False
    needs: tuple[str, ...] = ()


CHECKS: dict[str, Check] = {}


def holds(
    *statements: str, strength: str, rule_only: bool = False, needs: tuple[str, ...] = ()
) -> Callable:
    """Register a function ``(subject, size) -> outcomes`` as a check of these statements.

    Args:
        *statements: Keys of :data:`STATEMENTS`.
        strength: "symbolic", "exhaustive", "property" or "statistical".
        rule_only: Whether it can check a user's server rule. If True, it uses the library's other
            functions only where the rule's test needs them.
        needs: Optional packages that it imports.
    """
    unknown = set(statements) - STATEMENTS.keys()
    if unknown:
        raise ValueError(f"`statements` must be keys of STATEMENTS, got {sorted(unknown)}")

    def register(function):
        name = function.__name__.replace("_", "-")
        CHECKS[name] = Check(name, strength, statements, function, rule_only, needs)
        return function

    return register


def chosen(
    checks: Iterable[str] | None = None, statements: Iterable[str] | None = None
) -> list[Check]:
    """Return the checks with these names that check any of these statements; None is all.

    Raises:
        MissingPackage: If one of them needs a package that is not installed.
    """
    wanted = set(STATEMENTS if statements is None else statements)
    found = [CHECKS[name] for name in (CHECKS if checks is None else checks)]
    found = [check for check in found if wanted.intersection(check.statements)]
    require(package for check in found for package in check.needs)
    return found


def run(
    subject: Subject,
    size: Size,
    *,
    checks: Iterable[str] | None = None,
    statements: Iterable[str] | None = None,
    on_check: Callable[[str, float], None] | None = None,
) -> Iterator[Outcome]:
    """Run checks and yield their outcomes.

    A check that raises an error has failed: its outcomes have the error as their note.

    Args:
        subject: The functions under test.
        size: The number of cases to try.
        checks: Names in :data:`CHECKS`; None is all.
        statements: Keys of :data:`STATEMENTS` to check; None is all.
        on_check: Called with a check's name and its seconds when it is done.

    Raises:
        MissingPackage: If a check needs a package that is not installed. Then no check has run.
    """
    wanted = set(STATEMENTS if statements is None else statements)
    for item in chosen(checks, wanted):
        held = [key for key in item.statements if key in wanted]
        began = time.perf_counter()
        try:
            outcomes = list(item.function(subject, size))
        except MissingPackage:  # says nothing about the statement
            raise
        except Exception as error:
            note = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            outcomes = [Outcome(key, 0, float("inf"), 0.0, False, note) for key in held]
        missing = set(held) - {outcome.statement for outcome in outcomes}
        outcomes += [Outcome(key, 0, float("inf"), 0.0, False, "not tried") for key in missing]
        for outcome in outcomes:
            outcome.check, outcome.strength = item.name, item.strength
            if outcome.statement in wanted:
                yield outcome
        if on_check is not None:
            on_check(item.name, time.perf_counter() - began)

"""Lists the negative controls: each mutant or wrong statement, with the check that catches it."""

from __future__ import annotations

from contextlib import nullcontext
from fractions import Fraction
from typing import Any, NamedTuple

import jax.numpy as jnp

from orlomo_jax import al_sgd, local_ormo_da, orlomo, prsgdm
from proofs_check.claims import PAPER, Claims
from proofs_check.mutants import bookkeeping, field_rules, worker_rounds
from proofs_check.mutants.bookkeeping import Mutant
from proofs_check.mutants.faulty_rules import (
    RULES,
    Faults,
    ServerOneLate,
    ServerThatTakesAnything,
    changed,
    eq_6_from,
    faulty,
    past_descent,
    rate_without_workers,
    round_with_squared_momentum,
    with_defaults,
)
from proofs_check.registry import CHECKS, SMALL, Outcome, Size, Subject, run


class Control(NamedTuple):
    """A negative control: a deliberate fault and the check that must catch it.

    Attributes:
        subject: The faulty subject; its name describes the fault.
        caught_by: The check that must catch it.
        statements: The statements that this check must find violated; it may find more.
        mutant: A fault in the library itself, or None.
    """

    subject: Subject
    caught_by: str
    statements: tuple[str, ...]
    mutant: Mutant | None = None

    def outcomes(self, size: Size = SMALL, step: int = 257) -> list[Outcome]:
        """Run the check that must catch the fault; a bookkeeping mutant errs at ``step``."""
        with nullcontext() if self.mutant is None else self.mutant.applied(step):
            return list(run(self.subject, size, checks=[self.caught_by]))


def _less(name: str, factor: float) -> Any:
    """Return the claims with the constants of one bound multiplied by a factor."""
    bound = getattr(PAPER, name)
    return PAPER._replace(**{name: lambda *args: tuple(factor * x for x in bound(*args))})


def _remark_5_without_workers(beta, local_steps, num_workers, *rest):
    condition, noise, drift = PAPER.remark_5(beta, local_steps, num_workers, *rest)
    return condition, noise if noise is None else noise / num_workers, drift


WRONG_STATEMENTS: dict[str, tuple[tuple[str, ...], tuple[str, ...], Claims]] = {
    "Lemma 2 without the η̂ on Δu": (
        ("lemma-2",), ("lemma-2", "ledger"),
        PAPER._replace(lemma_2=lambda power, past, rate: (-rate, -past))),
    "Lemma 2 with (1−β^n)/(1−β)": (
        ("lemma-2",), ("lemma-2",),
        PAPER._replace(lemma_2=lambda power, past, rate: (-rate, -rate * (past + 1 - power)))),
    "Lemma 2 with the other sign": (
        ("lemma-2",), ("lemma-2",),
        PAPER._replace(lemma_2=lambda power, past, rate: (rate, rate * past))),
    "Lemma 1 with weight 1": (
        ("lemma-1",), ("lemma-1",),
        PAPER._replace(lemma_1=lambda power, past, rate: rate)),
    "Lemma 1 without the η̂": (
        ("lemma-1",), ("lemma-1",),
        PAPER._replace(lemma_1=lambda power, past, rate: power + 0 * rate)),
    "Lemma 3 with the other sign": (
        ("lemma-3",), ("lemma-3",), PAPER._replace(lemma_3=lambda beta: beta)),
    "Lemma 9 with one group more": (
        ("lemma-9",), ("lemma-9",),
        PAPER._replace(lemma_9=lambda step, num_workers: (step + num_workers - 1) // num_workers)),
    "the identity without 1−β": (
        ("lemma-3",), ("identity", "lemma-3"), PAPER._replace(identity=lambda beta: (beta, 1))),
    "groups by floor": (
        ("lemma-1", "lemma-2"), ("lemma-1", "lemma-2"),
        PAPER._replace(group=lambda index, num_workers: index // num_workers)),
}  # fmt: skip
WRONG_CONSTANTS = (
    ("constants", "1/2", "lemma_4"),
    ("constants", "1/2", "lemma_10"),
    ("constants", "1/2", "lemma_11"),
    ("constants", "1/2", "theorem_1"),
    ("quadratic-moments", "1/3", "lemma_4"),
    ("quadratic-moments", "1/6", "lemma_10"),
    ("quadratic-moments", "1/20", "lemma_11"),
    ("quadratic-moments", "1/10", "theorem_1"),
    ("nonconvex-monte-carlo", "1/3", "lemma_4"),
)
_without_workers = PAPER._replace(remark_5=_remark_5_without_workers)
_full_in_flight = PAPER._replace(in_flight_rate=lambda k, virtual, i, t: 1 / k)
_float32 = faulty(Faults(dtype=jnp.float32))
OTHERS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("constants", "Remark 5's γ without K", "remark-5", {"claims": _without_workers}),
    ("server-step", "float32 coefficients", "algorithm-2", {"rule": _float32}),
    ("server-step", "n+1 for n", "algorithm-2", {"rule": faulty(RULES["n+1 for n"][0])}),
    ("server-step", "AL-SGD with twice the step", "algorithm-1",
     {"al_sgd": changed(al_sgd, lambda x: 2 * x)}),
    ("server-step", "local OrMo-DA with n−1", "algorithm-3",
     {"local_ormo_da": faulty(Faults(swap=True, past=lambda b, n: past_descent(b, n - 1)))}),
    ("defaults-and-dtypes", "another default of β", "algorithm-2",
     {"rule": with_defaults(orlomo, momentum=0.99)}),
    ("defaults-and-dtypes", "AL-SGD with another default rate", "algorithm-1",
     {"al_sgd": with_defaults(al_sgd, learning_rate=0.5)}),
    ("defaults-and-dtypes", "local OrMo-DA with another default of β", "algorithm-3",
     {"local_ormo_da": with_defaults(local_ormo_da, momentum=0.99)}),
    ("defaults-and-dtypes", "Eq. (6) from K on", "eq-6",
     {"delay_adaptive": eq_6_from(1, strict=True)}),
    ("defaults-and-dtypes", "Eq. (6) with ≥", "eq-6",
     {"delay_adaptive": eq_6_from(2, strict=False)}),
    ("synchronous-rounds", "PRSGDm that adds up", "prsgdm",
     {"prsgdm": lambda k: changed(prsgdm, lambda x: k * x)(k)}),
    ("worked-example", "floor for ceiling in the group index", "figure-1",
     {"rule": faulty(RULES["floor for ceiling in the group index"][0])}),
    ("random-runs", "float32 coefficients", "lemma-2", {"rule": _float32}),
    ("random-runs", "group size K−1", "lemma-1 lemma-2 lemma-9",
     {"rule": faulty(RULES["group size K−1"][0])}),
    ("random-runs", "β applied to u but not to w", "lemma-3",
     {"rule": faulty(RULES["β applied to u but not to w"][0])}),
    ("random-runs", "a round with β² for β", "worker identity",
     {"local_momentum_sgd": round_with_squared_momentum}),
    ("server-events", "no past descent", "ledger lemma-2",
     {"rule": faulty(RULES["no past descent"][0])}),
    ("server-events", "n+1 for n", "lemma-1", {"rule": faulty(RULES["n+1 for n"][0])}),
    ("server-events", "a server one step late", "ledger", {"parameter_server": ServerOneLate}),
    ("server-events", "a server that takes anything", "ledger",
     {"parameter_server": ServerThatTakesAnything}),
    ("silent-worker", "η̂ = 1/K in flight", "lemma-11", {"claims": _full_in_flight}),
    ("delay-facts", "η̂ = 1/K in flight", "delays", {"claims": _full_in_flight}),
    ("delay-facts", "delays that add up to K·T", "delays",
     {"claims": PAPER._replace(delay_sum=lambda k, t: k * t)}),
    ("without-momentum-is-al-sgd", "one bit off at β = 0", "remark-1",
     {"rule": changed(orlomo, lambda x: x * (1 + 2.0**-23))}),
    ("one-local-step", "local OrMo-DA without the newest step", "remark-2 eq-2",
     {"local_ormo_da": faulty(Faults(swap=True, past=lambda b, n: past_descent(b, n) - 1))}),
    ("convergence-rate", "Remark 5's γ without K", "remark-5", {"claims": _without_workers}),
    ("stationary-error", "η = ½ for every K", "remark-4", {"rule": rate_without_workers}),
    ("uneven-local-steps", "a round with β² for β", "identity lemma-3",
     {"local_momentum_sgd": round_with_squared_momentum}),
    ("uneven-local-steps", "no past descent", "lemma-2",
     {"rule": faulty(RULES["no past descent"][0])}),
    ("uneven-local-steps", "n+1 for n", "lemma-1", {"rule": faulty(RULES["n+1 for n"][0])}),
    ("kept-states", "momentum in the order of arrival", "ordered-outer-momentum",
     {"make_method": field_rules.in_order_of_arrival}),
)  # fmt: skip

MUTANTS = (
    ("long-server-runs", "bookkeeping", bookkeeping.SERVER),
    ("long-simulations", "bookkeeping", bookkeeping.SIMULATOR),
    ("long-simulations", "noise-keys", worker_rounds.STEP_KEYS),
    ("long-simulations", "weight-decay", worker_rounds.WEIGHT_DECAY),
    ("worker-noise", "noise-keys", worker_rounds.STEP_KEYS | worker_rounds.ROUND_KEYS),
    ("worker-weight-decay", "weight-decay", worker_rounds.WEIGHT_DECAY),
    ("kept-states", "kept-states", field_rules.KEPT),
)


def controls() -> dict[str, Control]:
    """Return every negative control; the keys are "name [check]"."""
    rows: list[tuple[str, str, tuple[str, ...], dict[str, Any]]] = []
    for name, (faults, statements) in RULES.items():
        rows.append(("every-order", name, statements, {"rule": faulty(faults)}))
    for name, (lemmas, proved, claims) in WRONG_STATEMENTS.items():
        rows.append(("every-order", name, lemmas, {"claims": claims}))
        rows.append(("induction", name, proved, {"claims": claims}))
    for check, factor, lemma in WRONG_CONSTANTS:
        name = f"{lemma.replace('_', ' ').capitalize()} with {factor} of the constant"
        claims = _less(lemma, float(Fraction(factor)))
        rows.append((check, name, (lemma.replace("_", "-"),), {"claims": claims}))
    rows += [(check, name, tuple(held.split()), how) for check, name, held, how in OTHERS]
    for rule, fault, held, factory in field_rules.FAULTY:
        how = {"field_rule": field_rules.replaced(rule, factory)}
        for check in field_rules.CHECKED_BY:
            caught = tuple(key for key in held.split() if key in CHECKS[check].statements)
            if caught:
                rows.append((check, f"{rule}: {fault}", caught, how))
    found = [Control(Subject(name, **broken), check, held) for check, name, held, broken in rows]
    for check, statement, faults in MUTANTS:
        found += [Control(Subject(n), check, (statement,), fault) for n, fault in faults.items()]
    return {f"{control.subject.name} [{control.caught_by}]": control for control in found}

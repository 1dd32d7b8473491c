"""Checks the paper's lemmas and theorem on the code that trains.

The checks have four strengths:

- symbolic: a proof for all K, β and arrival orders;
- exhaustive: every order of small runs, exactly;
- property: random runs, within rounding bounds;
- statistical: bounds measured on problems with known constants.

A check is a function registered in :mod:`proofs_check.registry`. The paper's formulas are fields of
:class:`~proofs_check.claims.Claims`. The functions under test are fields of
:class:`~proofs_check.registry.Subject`.

Example:
    >>> import proofs_check
    >>> from orlomo_jax import orlomo
    >>> small = proofs_check.Size(examples=1, exhaustive=((2, 3),))
    >>> outcomes = proofs_check.check(orlomo, size=small, statements=["lemma-9"])
    >>> all(outcome.passed for outcome in outcomes)
    True
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from proofs_check import checks  # importing it registers the checks
from proofs_check.claims import PAPER, Claims
from proofs_check.registry import CHECKS, SMALL, STATEMENTS, Outcome, Size, Subject, run

__all__ = [
    "CHECKS",
    "PAPER",
    "SMALL",
    "STATEMENTS",
    "Claims",
    "Outcome",
    "Size",
    "Subject",
    "check",
    "checks",
    "run",
]


def check(
    rule_factory: Callable[..., Any],
    worker_momentum: bool = True,
    *,
    size: Size | None = None,
    statements: Iterable[str] | None = None,
) -> list[Outcome]:
    """Run the checks that need only a server rule: Lemmas 1, 2, 3 and 9, and their ledger form.

    Args:
        rule_factory: ``rule_factory(num_workers, momentum=…, learning_rate=…, delay_weight=…)``,
            like :func:`orlomo_jax.orlomo`. It returns an Optax transformation of a ``LocalUpdate``.
            The state has the fields ``step`` and ``momentum`` (u_t), and ``update`` takes
            ``dispatched_at``. ``momentum`` may be a traced array. ``learning_rate`` is a function
            of the step and ``delay_weight`` a function of the delay; η_t is their product.
        worker_momentum: Whether the workers run momentum SGD and report Δu. If False, Δw replaces
            Δu in every lemma; local OrMo-DA obeys this form.
        size: How many cases are tried; None is the command's default.
        statements: Keys of :data:`STATEMENTS` to check; None is all.

    Returns:
        One outcome for each check and statement. ``outcome.passed`` is the verdict.
        ``outcome.counterexample`` is the smallest failing case, which
        ``python -m proofs_check --replay`` runs again.
    """
    name = getattr(rule_factory, "__name__", "rule")
    subject = Subject(name, rule=rule_factory, worker_momentum=worker_momentum)
    checks = [item.name for item in CHECKS.values() if item.rule_only]
    return list(run(subject, size or Size(), checks=checks, statements=statements))

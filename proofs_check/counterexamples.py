"""Writes counterexamples as JSON, and runs them again for ``--replay``."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

from proofs_check.registry import CHECKS, Outcome, Size, Subject, run


def as_json(outcome: Outcome, size: Size, rule: str | None) -> dict[str, Any]:
    """Return a failed outcome as a JSON object for :func:`replay`.

    If the outcome does not have a single failing case, the object contains the size instead. The
    check is deterministic, so it can run again at that size.

    Args:
        outcome: The failed outcome.
        size: The size at which the check ran.
        rule: "module:factory" of a user's rule, or None.
    """
    case = outcome.counterexample or {"size": asdict(size)}
    return {
        "format": "proofs_check.counterexample",
        "check": outcome.check,
        "statement": outcome.statement,
        "rule": rule,
        "case": case,
    }


def replay(subject: Subject, content: dict[str, Any]) -> tuple[float, float]:
    """Run a counterexample again; return its residual and its allowance.

    Raises:
        ValueError: If ``content`` is not a counterexample.
    """
    if content.get("format") != "proofs_check.counterexample" or content["check"] not in CHECKS:
        raise ValueError(
            "the file must be a counterexample that python -m proofs_check printed, got "
            f"format={content.get('format')!r}, check={content.get('check')!r}"
        )
    item, case = CHECKS[content["check"]], content["case"]
    if "size" in case:
        size = dict(case["size"])
        size["exhaustive"] = tuple(tuple(pair) for pair in size["exhaustive"])
        found = list(
            run(subject, Size(**size), checks=[item.name], statements=[content["statement"]])
        )
        worst = max(found, key=lambda o: (not o.passed, o.residual))
        return worst.residual, worst.allowance
    return sys.modules[item.function.__module__].replay(subject, content["statement"], case)

"""Compares each rule of the field with its transcription in exact fractions, on random orders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from proofs_check import exact_rules_buffers
from proofs_check.registry import Outcome, Size, Subject, holds
from proofs_check.rule_comparison import (
    BUFFERS,
    MOMENTUM,
    REPORTS,
    STEPS,
    Compared,
    buffer_error,
    disagreement,
    scanned,
)

ALLOWED = 1e-12


def key_of(rule: str) -> str:
    """Return the statement of a rule.

    Example:
        >>> key_of("local_sgd")
        'local-sgd'
    """
    return rule.replace("_", "-")


@lru_cache(maxsize=256)
def _momentum_error(name: str, factory: Callable[..., Any], seeds: range) -> tuple[float, str]:
    """Return a row's largest error over the orders of some seeds, and where it is."""
    row = MOMENTUM[name]
    rule, worst = row.made(factory), (0.0, "")
    for seed in seeds:
        error, _ = disagreement(rule, row.exact, seed, row.dispatch)
        if not error <= worst[0]:
            worst = error, f"{name}, seed {seed}"
    return worst


@lru_cache(maxsize=256)
def _buffer_error(name: str, factory: Callable[..., Any], seeds: range) -> tuple[float, str]:
    """Return a row's largest error over the orders of some seeds, and where it is."""
    row = BUFFERS[name]
    run, worst = scanned(row.made(factory)), (0.0, "")
    for seed in seeds:
        reports = exact_rules_buffers.walk(row.exact, row.num_workers, STEPS, seed)
        error, field = buffer_error(run, row.exact, reports)
        if not error <= worst[0]:
            worst = error, f"{name}, seed {seed}, {field}"
    return worst


def _outcomes(
    subject: Subject, size: Size, rows: dict[str, Compared], error_of: Callable, reports: int
) -> Iterator[Outcome]:
    seeds = range(size.seed, size.seed + (3 if size.settings >= 5 else 1))
    found: dict[str, tuple[float, str, int]] = {}
    for name, row in rows.items():
        error, where = error_of(name, subject.field_rule(row.rule), seeds)
        worst, note, count = found.get(row.rule, (0.0, "", 0))
        if not error <= worst:
            worst, note = error, where
        found[row.rule] = worst, note, count + len(seeds) * reports
    for rule, (error, note, count) in found.items():
        passed = error <= ALLOWED
        note = f"at worst in {note}" if note else "no rounding"
        residual = error if error == error else float("inf")
        yield Outcome(key_of(rule), count, residual, ALLOWED, passed, note)


@holds(*dict.fromkeys(key_of(row.rule) for row in MOMENTUM.values()), strength="property")
def field_momentum_rules(subject: Subject, size: Size) -> Iterator[Outcome]:
    """Compare the rules of mixing and momentum with fractions, with losses, leaves and joins."""
    yield from _outcomes(subject, size, MOMENTUM, _momentum_error, REPORTS)


@holds(*dict.fromkeys(key_of(row.rule) for row in BUFFERS.values()), strength="property")
def field_buffer_rules(subject: Subject, size: Size) -> Iterator[Outcome]:
    """Compare the buffered and the synchronous rules with fractions, and all that they keep."""
    yield from _outcomes(subject, size, BUFFERS, _buffer_error, STEPS)

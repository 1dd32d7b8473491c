"""Tests that the checks catch every negative control: mutants and wrong statements."""

import pytest

from proofs_check import SMALL, run
from proofs_check.mutants import faulty_rules
from proofs_check.mutants.catalogue import controls
from proofs_check.registry import CHECKS

CONTROLS = controls()


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTROLS)
def test_is_caught(name):
    control = CONTROLS[name]
    outcomes = control.outcomes()
    failed = {outcome.statement for outcome in outcomes if not outcome.passed}
    assert failed >= set(control.statements)
    assert not any("Error" in outcome.note for outcome in outcomes), "caught by a crash"


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(c.name, marks=pytest.mark.slow if c.name == "random-runs" else ())
        for c in CHECKS.values()
        if c.rule_only
    ],
)
def test_the_rule_without_a_fault_passes(check):
    outcomes = list(run(faulty_rules.intact(), SMALL, checks=[check]))
    assert [outcome for outcome in outcomes if not outcome.passed] == []


def test_every_check_has_a_control():
    assert {control.caught_by for control in CONTROLS.values()} == set(CHECKS)


def test_every_statement_has_a_control():
    held = {statement for control in CONTROLS.values() for statement in control.statements}
    assert held == {statement for check in CHECKS.values() for statement in check.statements}


@pytest.mark.parametrize(
    "fault",
    [
        "floor for ceiling in the group index",
        "n+1 for n",
        "n−1 for n",
        "momentum never multiplied by β",
        "momentum multiplied one step late",
        "β applied to u but not to w",
        "(1−β^n)/(1−β) without its leading β",
        "η from the dispatch step",
        "arrival order with weight 1",
        "Δu for Δw",
        "group size K−1",
        "float32 coefficients",
        "fedbuff: Δ against the current w",
        "delayed_nesterov: each report twice",
        "delayed_nesterov: ε for η",
        "ringmaster: declined reports in the delay",
        "rennala: stale reports accepted",
        "ca2fl: h̄ of now",
        "Adam's step counter restarted in each round",
    ],
)
def test_the_promised_faults_are_among_them(fault):
    assert fault in {control.subject.name for control in CONTROLS.values()}

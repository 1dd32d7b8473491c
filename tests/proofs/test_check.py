"""Tests that the library passes the checks, and that failures are reported and can be replayed."""

import itertools
import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

import proofs_check
from orlomo_jax import local_ormo_da, orlomo
from proofs_check import SMALL, Subject, counterexamples, coverage, run, sequences
from proofs_check.checks import convergence_rates
from proofs_check.mutants import faulty_rules
from proofs_check.mutants.catalogue import controls
from proofs_check.registry import CHECKS, STATEMENTS, Outcome, Size, holds
from proofs_check.statements import FIELD_STATEMENTS


@pytest.mark.slow
@pytest.mark.parametrize("check", list(CHECKS))
def test_the_library_passes(check):
    outcomes = list(run(Subject(), SMALL, checks=[check]))
    assert {o.statement for o in outcomes} == set(CHECKS[check].statements)
    assert [o for o in outcomes if not o.passed] == []
    if CHECKS[check].strength == "exhaustive":
        assert all(o.residual == 0 for o in outcomes if o.allowance == 0)


def test_every_statement_is_held_by_a_check():
    assert {s for check in CHECKS.values() for s in check.statements} == set(STATEMENTS)


def test_the_default_size_exhausts_enough_orders():
    assert sum(k**t for k, t in Size().exhaustive) >= 50_000


@pytest.mark.slow
def test_check_takes_a_users_rule():
    size = replace(SMALL, examples=2)
    outcomes = proofs_check.check(
        local_ormo_da, worker_momentum=False, size=size, statements=["lemma-3", "lemma-9"]
    )
    assert {outcome.check for outcome in outcomes} == {"every-order", "random-runs"}
    assert all(outcome.passed for outcome in outcomes)
    outcomes = proofs_check.check(
        faulty_rules.without_past_descent, size=size, statements=["lemma-2"]
    )
    assert outcomes
    assert not any(outcome.passed for outcome in outcomes)


def test_a_check_that_raises_has_failed():
    def refuses(num_workers, **options):
        raise ValueError("no")

    outcomes = proofs_check.check(refuses, size=SMALL)
    assert not any(outcome.passed for outcome in outcomes)
    assert {outcome.note for outcome in outcomes} == {"ValueError: no"}


def test_a_statement_that_a_check_forgets_has_failed(monkeypatch):
    monkeypatch.setattr("proofs_check.registry.CHECKS", dict(CHECKS))

    @holds("lemma-1", "lemma-2", strength="symbolic")
    def forgetful(subject, size):
        yield Outcome("lemma-1", 1, 0.0, 0.0, True)

    outcomes = {o.statement: o for o in run(Subject(), SMALL, checks=["forgetful"])}
    assert outcomes["lemma-1"].passed
    assert outcomes["lemma-2"].note == "not tried"
    assert not outcomes["lemma-2"].passed
    with pytest.raises(ValueError, match="lemma-99"):
        holds("lemma-99", strength="symbolic")


@pytest.mark.slow
@pytest.mark.parametrize("check", ["every-order", "server-step", "random-runs", "server-events"])
def test_counterexamples_are_small_and_replay(check):
    subject = Subject("faulty", rule=faulty_rules.without_past_descent)
    size = replace(SMALL, minimize=True)
    failed = [o for o in run(subject, size, checks=[check]) if not o.passed]
    content = json.loads(json.dumps(counterexamples.as_json(failed[-1], size, None)))
    residual, allowance = counterexamples.replay(subject, content)
    assert residual > allowance
    residual, allowance = counterexamples.replay(Subject(), content)
    assert residual <= allowance
    if "trace" in content["case"]:
        assert len(content["case"]["trace"]["workers"]) <= 3


def test_a_counterexample_without_a_smallest_case_is_rerun():
    control = controls()["η̂ = 1/K in flight [delay-facts]"]
    (failed,) = run(control.subject, SMALL, checks=["delay-facts"])
    content = json.loads(json.dumps(counterexamples.as_json(failed, SMALL, None)))
    residual, allowance = counterexamples.replay(control.subject, content)
    assert residual > allowance
    residual, allowance = counterexamples.replay(Subject(), content)
    assert residual <= allowance


def test_plots(tmp_path):
    values = np.array([1.0, 2.0, 4.0])
    curves = [convergence_rates.Curve("T", values, 3 / values, 1 / values, 1 / values)] * 2
    convergence_rates.plot(curves, tmp_path / "deep" / "remark.png")
    assert (tmp_path / "deep" / "remark.png").stat().st_size > 5_000


@pytest.mark.slow
def test_map_names_code_checks_and_what_they_caught(monkeypatch):
    wanted = {"float32 coefficients [server-step]", "Lemma 1 with weight 1 [induction]"}
    some = {k: v for k, v in controls().items() if k in wanted}
    monkeypatch.setattr(coverage, "controls", lambda: some)
    text = "\n".join(coverage.lines())
    for piece in (
        "orlomo_jax/rules/orlomo.py",
        "proofs_check/checks/every_order.py",
        "server-step",
    ):
        assert piece in text
    assert "caught  float32 coefficients" in text
    assert "caught  Lemma 1 with weight 1" in text
    assert "NOT CAUGHT" not in text
    assert "Algorithm 2, lines 20–27" in text
    code = [line for line in text.splitlines() if line.startswith("  code")]
    assert len(code) > len(STATEMENTS)


@pytest.mark.parametrize("key", FIELD_STATEMENTS)
def test_the_source_cites_each_statement_about_the_field(key):
    assert coverage.citations(FIELD_STATEMENTS[key].cited)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_lemma_sums_in_fractions_and_ledger_form_agree(num_workers):
    beta, draws = Fraction(2, 3), np.random.default_rng(0)
    for order in itertools.islice(itertools.product(range(num_workers), repeat=5), 0, None, 7):
        of = sequences.frame(order, num_workers)
        count = of.index.shape[0]

        def fractions(*shape):
            return np.vectorize(Fraction, otypes=[object])(draws.integers(-9, 9, shape))

        du, dw, start, hat = (fractions(*s) for s in ((count, 2), (count, 2), (2,), (count,)))
        table = sequences.powers(beta, 8, object)
        hats = sequences.auxiliary(of, beta, hat, du, dw, du, start)
        sum_u, sum_w = sequences.in_flight_sums(of, table, hat, du, dw)
        u, w = sequences.ledger_residuals(
            num_workers, of.index, of.arrival, table, beta, hat, du, dw, start, 5
        )
        assert (hats.u - sum_u == u).all()
        assert (hats.w - sum_w == w).all()


def test_orlomo_is_what_is_checked():
    assert Subject().rule is orlomo

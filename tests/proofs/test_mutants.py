"""Tests that the checks catch faults at one step of a long run and in a worker's round."""

from contextlib import ExitStack

import pytest

from proofs_check import SMALL, Size, Subject, run
from proofs_check.__main__ import main
from proofs_check.mutants.bookkeeping import SERVER
from proofs_check.mutants.catalogue import controls
from proofs_check.mutants.worker_rounds import INTACT, ROUND_KEYS
from proofs_check.reference import EVENTS, timeline

STEPS = (0, 1, 255, 256, 257, 1000, 1999)


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", SERVER)
def test_a_fault_of_the_bookkeeping_is_caught_at_every_step(name, step):
    control = controls()[f"{name} [long-server-runs]"]
    (outcome,) = control.outcomes(Size(), step)
    assert not outcome.passed
    assert f"step {step}:" in outcome.note or f"step {step + 1}:" in outcome.note
    assert outcome.counterexample is not None


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", [name for name in ROUND_KEYS if "step" in name])
def test_a_noise_key_used_again_is_caught_at_every_round(name, step):
    (outcome,) = controls()[f"{name} [worker-noise]"].outcomes(Size(), step)
    assert not outcome.passed


@pytest.mark.slow
@pytest.mark.parametrize("check", ["worker-noise", "worker-weight-decay", "long-simulations"])
def test_the_mutants_without_a_fault_pass(check):
    with ExitStack() as stack:
        for mutant in INTACT:
            stack.enter_context(mutant.applied())
        assert all(outcome.passed for outcome in run(Subject(), SMALL, checks=[check]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a report dropped", "a round counter reset"])
def test_the_command_finds_a_late_fault_that_replays(name, tmp_path):
    path = str(tmp_path / "counterexample.json")
    arguments = ["--check", "long-server-runs", "--counterexample", path]
    with SERVER[name].applied(1999):
        assert main(arguments) == 1
        assert main(["--replay", path]) == 1
    assert main(["--replay", path]) == 0


@pytest.mark.parametrize("synchronous", [False, True])
def test_every_kind_of_event_stands_before_every_step(synchronous):
    kinds = set(EVENTS[:2] if synchronous else EVENTS)
    for seed in range(3):
        events = timeline(7, 2048, seed, synchronous=synchronous).events
        assert all(kinds <= {kind for kind, _ in events_of_step} for events_of_step in events)

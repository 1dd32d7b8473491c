"""Policies: when workers wait, restart, or have their report dropped."""

from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orlomo_jax.traces.policies import Policy, RestartEvery, StalenessBound


@st.composite
def situations(draw):
    """Draw a step, the busy workers with their versions, and the waiting workers in order."""
    num_workers, step = draw(st.integers(1, 6)), draw(st.integers(0, 20))
    order = draw(st.permutations(range(num_workers)))
    busy = draw(st.integers(0, num_workers))
    held = {worker: draw(st.integers(0, step)) for worker in order[:busy]}
    return step, held, order[busy:], num_workers


def may_be_sent(bound, step, held, waiting, num_workers):
    """Return whether the first waiting worker may be sent a task, from the definition."""
    still_waiting = len(waiting) - 1
    oldest = min([*held.values(), step])
    return step + (num_workers - still_waiting - 1) - oldest <= bound.max_delay


class TestWait:
    @given(situations(), st.integers(0, 30))
    def test_agrees_with_the_definition_one_worker_at_a_time(self, situation, slack):
        step, held, waiting, num_workers = situation
        bound = StalenessBound(num_workers - 1 + slack)
        due = bound.due(step, held, waiting, num_workers)
        sent, held, waiting = [], dict(held), list(waiting)
        while waiting and may_be_sent(bound, step, held, waiting, num_workers):
            sent.append(waiting.pop(0))
            held[sent[-1]] = step
        assert due == tuple(sent)

    @given(situations(), st.integers(0, 30))
    def test_somebody_is_always_busy(self, situation, slack):
        step, _, waiting, num_workers = situation
        if waiting:
            assert StalenessBound(num_workers - 1 + slack).due(step, {}, waiting, num_workers)

    @given(situations())
    def test_a_worker_that_is_sent_a_task_leaves_the_others_due(self, situation):
        step, held, waiting, num_workers = situation
        bound = StalenessBound(num_workers)
        due = bound.due(step, held, waiting, num_workers)
        for worker in due:
            rest = [other for other in waiting if other != worker]
            left = bound.due(step, held | {worker: step}, rest, num_workers)
            assert set(left) == set(due) - {worker}

    def test_cancels_nothing(self):
        bound = StalenessBound(1)
        assert bound.restarts(9, {0: 0}) == ()
        assert not bound.drops(9, 0)

    def test_needs_room_for_all_workers(self):
        StalenessBound(3).check_num_workers(4)
        with pytest.raises(ValueError, match=r"≥ num_workers − 1 = 4 .* got max_delay=3"):
            StalenessBound(3).check_num_workers(5)
        for other in (StalenessBound(0, "drop"), StalenessBound(0, "restart"), RestartEvery(1)):
            other.check_num_workers(5)


class TestRestartAndDrop:
    @given(situations(), st.integers(0, 20))
    def test_only_reports_beyond_the_bound(self, situation, max_delay):
        step, held, waiting, num_workers = situation
        late = {worker for worker, index in held.items() if step - index > max_delay}
        restart, drop = StalenessBound(max_delay, "restart"), StalenessBound(max_delay, "drop")
        assert restart.restarts(step, held) == tuple(sorted(late))
        assert {worker for worker, index in held.items() if drop.drops(step, index)} == late
        assert drop.restarts(step, held) == ()
        assert not any(restart.drops(step, index) for index in held.values())
        for policy in (restart, drop):
            assert policy.due(step, held, waiting, num_workers) == tuple(waiting)
            assert policy.max_wait is None

    @given(situations(), st.integers(1, 5))
    def test_every_few_reports(self, situation, num_reports):
        step, held, waiting, num_workers = situation
        policy = RestartEvery(num_reports)
        older = {worker for worker, index in held.items() if index < step}
        wanted = older if step % num_reports == 0 else set()
        assert policy.restarts(step, held) == tuple(sorted(wanted))
        assert policy.due(step, held, waiting, num_workers) == tuple(waiting)
        assert not policy.drops(step, 0)


def test_hash_and_equality():
    assert {StalenessBound(3), StalenessBound(3, "wait"), StalenessBound(3, "drop")} == {
        StalenessBound(3),
        StalenessBound(3, "drop"),
    }
    assert RestartEvery(2) == RestartEvery(2) != RestartEvery(3)
    assert (StalenessBound(3).max_wait, Policy().max_wait) == (3, None)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: StalenessBound(-1), ValueError, "`max_delay` must be ≥ 0, got max_delay=-1"),
        (lambda: StalenessBound(cast(Any, 1.5)), TypeError, "max_delay=1.5"),
        (lambda: StalenessBound(True), TypeError, "max_delay=True"),
        (lambda: StalenessBound(1, cast(Any, "stop")), ValueError, "`action` .*action='stop'"),
        (lambda: RestartEvery(0), ValueError, "`num_reports` must be ≥ 1, got num_reports=0"),
        (lambda: RestartEvery(cast(Any, "2")), TypeError, "num_reports='2'"),
    ],
)
def test_out_of_range(build, error, message):
    with pytest.raises(error, match=message):
        build()

"""Real runs on threads with reports that are poisoned, repeated or not reports at all."""

import numpy as np
import pytest

from tests.support.real_runs import (
    T,
    assert_replays,
    poison,
    run,
    with_id,
)


@pytest.mark.parametrize(
    ("kind", "reason", "lost"),
    [
        ("nan", "not finite", 1),
        ("shape", "malformed", 1),
        ("index", "stale", 0),
        ("round", "stale", 0),
        ("worker", "malformed", 0),
    ],
)
def test_a_poisoned_report_changes_nothing(kind, reason, lost):
    seen = []

    def inject(report):  # the eighth, whosever it is: while others compile, one may make them all
        seen.append(report)
        return [poison(report, kind), report] if len(seen) == 8 else [report]

    result = run(fault_injector=inject)
    expected = {reason: 1}
    if lost:  # the round is given up, and the good report comes too late
        expected["stale"] = expected.get("stale", 0) + 1
    assert result.health.rejected == expected
    assert result.health.lost == lost
    assert_replays(result)


def test_duplicates_and_replays_are_applied_at_most_once():
    old = []

    def inject(report):
        old.append(report)
        return [report, report, old[0], old[len(old) // 2]]

    result = run(fault_injector=inject)
    assert result.health.rejected["stale"] > 2 * T
    assert_replays(result)


def test_what_is_no_report_is_rejected():
    result = run(fault_injector=lambda report: ["garbage", None, report])
    assert result.health.rejected == {"malformed": 2 * T}
    assert_replays(result)


@pytest.mark.parametrize("odd", [5, "abc", (), (None, 0, 0), (np.zeros(2), 0, 0), [9, 0, 0]])
def test_what_is_no_id_is_rejected(odd):
    result = run(fault_injector=lambda report: [report._replace(id=odd), report], num_steps=6)
    assert result.health.rejected == {"malformed": 6}
    assert_replays(result)


def test_an_odd_report_stops_nothing():
    def inject(report):
        return [with_id(report, worker=True), with_id(report, worker=np.int64(report.id.worker))]

    result = run(fault_injector=inject)
    assert_replays(result)

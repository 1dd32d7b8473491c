"""The task table: which task each worker holds, and which workers wait."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orlomo_jax.server.task_table import TaskTable
from orlomo_jax.traces import ArrivalTrace
from orlomo_jax.traces.events import Events
from tests.support.orders import eventful_runs, synchronous_orders

UNHURRIED = settings(deadline=None)  # a busy machine is not a failure


class Server:
    """The part of a server that events need, without parameters."""

    def __init__(self, table):
        self.table, self.release, self.dispatch = table, table.release, table.dispatch

    def held(self, worker):
        return self.table.held.get(worker)


def replay(trace, table, on_step=lambda table: table):
    """Apply a trace; return the task ids in order of arrival, and the table."""
    events, task_ids = Events(trace), []
    for worker in set(range(trace.num_workers)) - trace.late_joiners:
        table.dispatch(worker)
    for step in range(trace.num_steps):
        table = on_step(table)
        events.apply(step, Server(table))
        worker = int(trace.workers[step])
        task_ids.append(table.held[worker])
        for waiting in table.receive(worker):
            table.dispatch(waiting)
    events.apply(trace.num_steps, Server(table))
    return task_ids, table


def new_table(trace):
    return TaskTable("orlomo", trace.num_workers, trace.synchronous, trace.max_wait)


def saved_and_restored(table):
    other = TaskTable(table.name, table.num_workers, table.synchronous, table.max_wait)
    other.restore(json.loads(json.dumps(table.snapshot())))
    assert other.snapshot() == table.snapshot()
    return other


@UNHURRIED
@given(st.one_of(eventful_runs(), eventful_runs(bounded=True)), st.booleans())
def test_the_table_agrees_with_the_trace(run, save):
    workers, num_workers, events, *_, max_wait = run
    trace = ArrivalTrace.from_workers(workers, num_workers, events=events, max_wait=max_wait)
    on_step = saved_and_restored if save else lambda table: table
    task_ids, table = replay(trace, new_table(trace), on_step)
    assert [x.worker for x in task_ids] == trace.workers.tolist()
    assert [x.round for x in task_ids] == trace.rounds.tolist()
    assert [x.dispatched_at for x in task_ids] == trace.dispatched_at.tolist()
    held = [table.held[k].dispatched_at if k in table.held else -1 for k in range(num_workers)]
    assert held == trace.in_flight.tolist()
    assert table.due() == ()


@UNHURRIED
@given(synchronous_orders())
def test_a_barrier_agrees_with_the_trace(order):
    trace = ArrivalTrace.from_workers(*order, synchronous=True)
    task_ids, table = replay(trace, new_table(trace), saved_and_restored)
    assert [x.dispatched_at for x in task_ids] == trace.dispatched_at.tolist()
    assert set(table.held) == {k for k in range(trace.num_workers) if trace.in_flight[k] >= 0}


def ready_table(num_workers=2, **options):
    table = TaskTable("orlomo", num_workers, options.pop("synchronous", False), **options)
    for worker in range(num_workers):
        table.dispatch(worker)
    return table


class TestBound:
    def test_a_worker_waits_until_the_oldest_task_ends(self):
        table = ready_table(max_wait=2)
        assert table.receive(1) == (1,)
        table.dispatch(1)
        assert table.receive(1) == ()
        with pytest.raises(ValueError, match=r"worker 1 must wait: .* step 2 .* max_wait=2"):
            table.dispatch(1)
        assert table.due() == ()
        table.release(0)
        assert table.due() == (1,)
        assert table.dispatch(1) == (1, 2, 2)
        assert table.due() == ()

    def test_the_workers_are_served_in_turn(self):
        table = ready_table(3, max_wait=2)
        assert (table.receive(2), table.receive(0)) == ((), ())
        assert table.receive(1) == (2, 0, 1)

    def test_a_worker_that_leaves_does_not_wait(self):
        table = ready_table(3, max_wait=2)
        table.receive(2)
        table.leave(2)
        assert table.waiting == []
        table.receive(1)
        table.join(2)
        assert (table.waiting, table.due()) == ([1, 2], ())
        table.leave(0)  # it had the oldest task
        assert table.due() == (1, 2)

    def test_only_an_absent_worker_joins(self):
        table = ready_table(max_wait=1)
        for _ in range(2):
            with pytest.raises(ValueError, match="worker 1 is not absent"):
                table.join(1)
            if 1 in table.held:
                table.receive(1)

    def test_the_bound_must_be_possible(self):
        with pytest.raises(ValueError, match="`max_wait` must be ≥ 2, got max_wait=1"):
            TaskTable("orlomo", 3, False, max_wait=1)
        with pytest.raises(ValueError, match="`max_wait` must be None if synchronous"):
            TaskTable("prsgdm", 3, True, max_wait=5)


def test_workers_without_a_task_are_due_again():
    table = ready_table()
    assert table.receive(1) == (1,)
    assert table.receive(0) == (0,)
    assert table.due() == (1, 0)
    barrier = ready_table(synchronous=True)
    barrier.receive(1)
    assert barrier.due() == ()
    barrier.receive(0)
    assert barrier.due() == (0, 1)


class TestFreshTasks:
    def test_only_a_report_keeps_the_state(self):
        table = ready_table()
        assert table.fresh == [True, True]
        table.receive(1)
        table.dispatch(1)
        assert (table.fresh_task(0), table.fresh_task(1)) == (True, False)
        assert table.restart(1) == (1, 2, 1)
        assert table.fresh_task(1)
        table.receive(1)
        table.dispatch(1)
        table.release(1)
        table.dispatch(1)
        assert table.fresh_task(1)

    def test_a_worker_that_leaves_starts_anew(self):
        table = ready_table(max_wait=1)
        table.receive(1)
        assert table.fresh == [True, False]
        table.leave(1)
        assert table.fresh == [True, True]
        table.receive(0)
        assert table.fresh == [False, True]
        table.dispatch(0)
        table.leave(0)
        assert (table.fresh, table.held) == ([True, True], {})

    def test_needs_a_task(self):
        table = ready_table(max_wait=1)
        table.receive(1)
        for call in (table.fresh_task, table.restart, table.release):
            with pytest.raises(ValueError, match="worker 1 holds no task"):
                call(1)
            with pytest.raises(ValueError, match=r"`worker` must be in \[0, 1\], got worker=2"):
                call(2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"fresh": [True]}, ValueError, "num_workers=2, got rounds=.*, fresh=\\[True\\]"),
        ({"fresh": None}, ValueError, "num_workers=2, got .*fresh=None"),
        ({"fresh": [True, 1]}, TypeError, r"`fresh\[1\]` must be a bool, got fresh\[1\]=1"),
        ({"waiting": [2]}, ValueError, "worker=2"),
        ({"rounds": [0, -1]}, ValueError, "rounds=-1"),
    ],
)
def test_a_damaged_snapshot(change, error, message):
    table = ready_table()
    before = table.snapshot()
    with pytest.raises(error, match=message):
        table.restore(before | change)
    assert table.snapshot() == before

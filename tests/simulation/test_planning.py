"""The plan of a segment: every report is computed from the version that its worker was sent."""

from hypothesis import given, settings
from hypothesis import strategies as st

from orlomo_jax.server.task_table import TaskTable
from orlomo_jax.simulation.planning import SlotPlanner, count_slots
from orlomo_jax.traces import ArrivalTrace
from tests.support.orders import eventful_runs


@settings(deadline=None)  # a busy machine is not a failure
@given(st.one_of(eventful_runs(), eventful_runs(bounded=True)), st.integers(1, 4))
def test_each_step_reads_the_version_of_its_task(run, batch):
    workers, num_workers, events, *_, max_wait = run
    trace = ArrivalTrace.from_workers(workers, num_workers, events=events, max_wait=max_wait)
    table = TaskTable("orlomo", num_workers, synchronous=False, max_wait=max_wait)
    for worker in set(range(num_workers)) - trace.late_joiners:
        table.dispatch(worker)
    slots = count_slots(trace)
    planner = SlotPlanner(table, trace, batch, slots)
    plan = planner.advance(trace.num_steps, length=trace.num_steps)
    assert plan.rounds.tolist() == trace.rounds.tolist()
    assert plan.dispatched_at.tolist() == trace.dispatched_at.tolist()
    content = {}  # the version in each slot
    for step in range(trace.num_steps):
        assert 0 <= plan.writes[step] < slots
        content[plan.writes[step]] = step
        assert content[plan.reads[step]] == trace.dispatched_at[step]
    starts = [start for start, size in zip(plan.starts, plan.sizes, strict=True) if size]
    for start, size in zip(starts, plan.sizes, strict=False):
        assert (plan.dispatched_at[start : start + size] <= start).all()
    assert sum(plan.sizes) == trace.num_steps

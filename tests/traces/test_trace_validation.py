"""What an order of arrivals leaves in each worker's hands."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orlomo_jax.traces.trace import ArrivalTrace
from orlomo_jax.traces.trace_validation import TraceEvent
from tests.support.orders import eventful_runs, orders, synchronous_orders

UNHURRIED = settings(deadline=None)  # a busy machine is not a failure
FIGURE_1 = [0, 2, 1, 2, 1, 1, 2, 2, 0]


class TestFromWorkers:
    def test_figure_1(self):
        trace = ArrivalTrace.from_workers(FIGURE_1, 3)
        assert trace.dispatched_at.tolist() == [0, 0, 0, 2, 3, 5, 4, 7, 1]
        assert trace.rounds.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 1]
        assert trace.delays.tolist() == [0, 1, 2, 1, 1, 0, 2, 0, 7]
        assert trace.in_flight.tolist() == [9, 6, 8]
        assert trace.times.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
        assert (trace.num_steps, trace.max_delay) == (9, 7)

    @UNHURRIED
    @given(orders())
    def test_agrees_with_a_dictionary(self, order):
        workers, num_workers = order
        trace = ArrivalTrace.from_workers(workers, num_workers)
        holds = {worker: (0, 0) for worker in range(num_workers)}
        for t, worker in enumerate(workers):
            assert (trace.dispatched_at[t], trace.rounds[t]) == holds[worker]
            holds[worker] = (t + 1, holds[worker][1] + 1)
        assert trace.in_flight.tolist() == [holds[worker][0] for worker in range(num_workers)]

    @UNHURRIED
    @given(orders())
    def test_delays_sum_to_k_minus_one_a_step(self, order):
        """Σ_k τ̂_{T,k} + Σ_{t<T} τ_t = (K−1)T for every T, and what Theorem 1 takes from it."""
        workers, num_workers = order
        for num_steps in range(len(workers) + 1):
            trace = ArrivalTrace.from_workers(workers[:num_steps], num_workers)
            outstanding = num_steps - trace.in_flight
            assert outstanding.sum() + trace.delays.sum() == (num_workers - 1) * num_steps
            assert 2 * np.count_nonzero(trace.delays < 2 * num_workers) >= num_steps
            rates = 1 / np.where(trace.delays > 2 * num_workers, trace.delays, num_workers)
            assert rates.sum() >= num_steps / (2 * num_workers) * (1 - 1e-12)

    @UNHURRIED
    @given(synchronous_orders())
    def test_synchronous_workers_hold_the_start_of_their_round(self, order):
        workers, num_workers = order
        trace = ArrivalTrace.from_workers(workers, num_workers, synchronous=True)
        steps = np.arange(len(workers))
        np.testing.assert_array_equal(trace.rounds, steps // num_workers)
        np.testing.assert_array_equal(trace.dispatched_at, steps // num_workers * num_workers)
        full = len(workers) // num_workers * num_workers
        reported = workers[full:]
        assert trace.in_flight.tolist() == [
            -1 if worker in reported else full for worker in range(num_workers)
        ]

    def test_synchronous_refuses_a_worker_twice_in_a_round(self):
        with pytest.raises(ValueError, match=r"workers\[4\]=1 for the second time in round 1"):
            ArrivalTrace.from_workers([0, 1, 2, 1, 1, 0], 3, synchronous=True)

    @UNHURRIED
    @given(st.one_of(eventful_runs(), eventful_runs(bounded=True)))
    def test_events_are_replayed(self, run):
        workers, num_workers, events, held, in_flight, max_wait = run
        trace = ArrivalTrace.from_workers(workers, num_workers, events=events, max_wait=max_wait)
        assert list(zip(trace.dispatched_at.tolist(), trace.rounds.tolist(), strict=True)) == held
        assert trace.in_flight.tolist() == in_flight

    def test_every_kind_of_event(self):
        events = [
            (0, "joined", 2),  # late, before anything arrived
            (1, "lost", 1),
            (2, "redispatched", 1),
            (3, "left", 0),
            (3, "joined", 0),
            (4, "restarted", 1),
        ]
        trace = ArrivalTrace.from_workers([0, 2, 1, 0, 1], 3, events=events)
        assert trace.dispatched_at.tolist() == [0, 0, 2, 3, 4]
        assert trace.rounds.tolist() == [0, 0, 1, 2, 3]
        assert trace.in_flight.tolist() == [4, 5, 2]
        assert trace.events == tuple(TraceEvent(*event) for event in events)

    def test_nothing_arrived(self):
        trace = ArrivalTrace.from_workers([], 2)
        assert (trace.num_steps, trace.max_delay) == (0, 0)
        assert trace.in_flight.tolist() == [0, 0]
        assert trace.workers.dtype == trace.delays.dtype == np.int32
        assert trace.times.dtype == np.float64


class TestMaxWait:
    @UNHURRIED
    @given(eventful_runs(bounded=True))
    def test_no_delay_exceeds_the_bound(self, run):
        workers, num_workers, events, *_, max_wait = run
        trace = ArrivalTrace.from_workers(workers, num_workers, events=events, max_wait=max_wait)
        assert trace.max_delay <= max_wait
        assert (trace.num_steps - trace.in_flight[trace.in_flight >= 0] <= max_wait).all()

    @UNHURRIED
    @given(synchronous_orders())
    def test_the_tightest_bound_is_a_barrier(self, order):
        workers, num_workers = order
        barrier = ArrivalTrace.from_workers(workers, num_workers, synchronous=True)
        bound = ArrivalTrace.from_workers(workers, num_workers, max_wait=num_workers - 1)
        for name in ("rounds", "dispatched_at", "in_flight"):
            np.testing.assert_array_equal(getattr(bound, name), getattr(barrier, name))

    @UNHURRIED
    @given(orders())
    def test_a_loose_bound_changes_nothing(self, order):
        workers, num_workers = order
        free = ArrivalTrace.from_workers(workers, num_workers)
        bound = ArrivalTrace.from_workers(workers, num_workers, max_wait=len(workers) + num_workers)
        np.testing.assert_array_equal(bound.dispatched_at, free.dispatched_at)
        np.testing.assert_array_equal(bound.in_flight, free.in_flight)

    def test_waiting_workers_are_served_in_turn(self):
        # Worker 0 waits at step 1, worker 1 at step 2; worker 2's report makes room for all.
        trace = ArrivalTrace.from_workers([0, 1, 2, 1], 3, max_wait=2)
        assert trace.in_flight.tolist() == [3, -1, 3]
        with pytest.raises(ValueError, match=r"workers\[1\].*worker 0, which is waiting then"):
            ArrivalTrace.from_workers([0, 0], 3, max_wait=2)

    @pytest.mark.parametrize("kind", ["lost", "left", "restarted"])
    def test_an_event_that_ends_the_oldest_task_makes_room(self, kind):
        order, events = [1, 1], [(2, kind, 0)]
        assert ArrivalTrace.from_workers(order, 2, max_wait=2).in_flight.tolist() == [0, -1]
        trace = ArrivalTrace.from_workers(order, 2, events=events, max_wait=2)
        assert trace.in_flight.tolist() == [2 if kind == "restarted" else -1, 2]

    def test_a_worker_that_left_while_it_waited_waits_again(self):
        events = [(1, "left", 0), (1, "joined", 0)]
        trace = ArrivalTrace.from_workers([0, 1, 0], 2, events=events, max_wait=1)
        assert trace.dispatched_at.tolist() == [0, 0, 2]

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"max_wait": 0}, ValueError, "`max_wait` must be ≥ 1, got max_wait=0"),
            ({"max_wait": True}, TypeError, "max_wait=True"),
            ({"max_wait": 1.0}, TypeError, "max_wait=1.0"),
            ({"max_wait": 5, "synchronous": True}, ValueError, "None if synchronous.*max_wait=5"),
        ],
    )
    def test_out_of_range(self, options, error, message):
        with pytest.raises(error, match=message):
            ArrivalTrace.from_workers([0, 1], 2, **options)

"""What an order of arrivals leaves in each worker's hands."""

import numpy as np
import pytest
from hypothesis import given, settings

from orlomo_jax.traces.trace import ArrivalTrace
from orlomo_jax.traces.trace_validation import TraceEvent
from tests.support.orders import eventful_runs, orders, synchronous_orders

UNHURRIED = settings(deadline=None)  # a busy machine is no failure
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
    @given(eventful_runs())
    def test_events_are_replayed(self, run):
        workers, num_workers, events, held, in_flight = run
        trace = ArrivalTrace.from_workers(workers, num_workers, events=events)
        assert list(zip(trace.dispatched_at.tolist(), trace.rounds.tolist(), strict=True)) == held
        assert trace.in_flight.tolist() == in_flight

    def test_every_kind_of_event(self):
        events = [
            (0, "joined", 2),  # late, before anything arrived
            (1, "lost", 1),
            (2, "redispatched", 1),
            (3, "left", 0),
            (3, "joined", 0),
        ]
        trace = ArrivalTrace.from_workers([0, 2, 1, 0, 1], 3, events=events)
        assert trace.dispatched_at.tolist() == [0, 0, 2, 3, 3]
        assert trace.rounds.tolist() == [0, 0, 1, 2, 2]
        assert trace.in_flight.tolist() == [4, 5, 2]
        assert trace.events == tuple(TraceEvent(*event) for event in events)

    def test_nothing_arrived(self):
        trace = ArrivalTrace.from_workers([], 2)
        assert (trace.num_steps, trace.max_delay) == (0, 0)
        assert trace.in_flight.tolist() == [0, 0]
        assert trace.workers.dtype == trace.delays.dtype == np.int32
        assert trace.times.dtype == np.float64

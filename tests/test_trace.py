"""The trace of arrivals: its ledger, its files, and what it refuses."""

import dataclasses
import json
import math
import os
import stat

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orlomo_jax.arrivals import (
    homogeneous,
    simulate_arrivals,
)
from orlomo_jax.order import Event
from orlomo_jax.trace import ArrivalTrace

UNHURRIED = settings(deadline=None)  # a busy machine is no failure
FIGURE_1 = [0, 2, 1, 2, 1, 1, 2, 2, 0]
FORMAT = {"format": "orlomo_jax.ArrivalTrace"}


@st.composite
def orders(draw):
    num_workers = draw(st.integers(1, 6))
    return draw(st.lists(st.integers(0, num_workers - 1), max_size=40)), num_workers


@st.composite
def synchronous_orders(draw):
    num_workers = draw(st.integers(1, 5))
    rounds = draw(st.lists(st.permutations(range(num_workers)), max_size=6))
    order = [worker for own in rounds for worker in own]
    return order[: draw(st.integers(0, len(order)))], num_workers


@st.composite
def eventful_runs(draw):
    """Draw a run by walking through it, and what a server would have noted beside each report."""
    num_workers = draw(st.integers(1, 5))
    late = draw(st.sets(st.integers(0, num_workers - 1)))
    holds = {worker: (0, 0) for worker in range(num_workers) if worker not in late}
    there, untouched_late = set(holds), set(late)
    next_round = {worker: int(worker in there) for worker in range(num_workers)}
    workers, held, events = [], [], []
    for _ in range(draw(st.integers(0, 30))):
        step = len(workers)
        worker = draw(st.integers(0, num_workers - 1))
        if worker not in there:
            kind = "joined"
        elif worker not in holds:
            kind = draw(st.sampled_from(["redispatched", "left"]))
        else:
            kind = draw(st.sampled_from(["arrived", "arrived", "lost", "left"]))
        if kind == "arrived":
            workers.append(worker)
            held.append(holds[worker])
        else:
            events.append(Event(step, kind, worker))
        if kind in ("left", "lost"):
            holds.pop(worker, None)
            there -= {worker} if kind == "left" else set()
        else:
            there.add(worker)
            untouched_late.discard(worker)
            holds[worker] = (step + (kind == "arrived"), next_round[worker])
            next_round[worker] += 1
    # A worker without any event is there from the start, so those that never came must come.
    for worker in sorted(untouched_late):
        events.append(Event(len(workers), "joined", worker))
        holds[worker] = (len(workers), 0)
    in_flight = [holds.get(worker, (-1, 0))[0] for worker in range(num_workers)]
    return workers, num_workers, events, held, in_flight


def fields_of(trace):
    return {field.name: getattr(trace, field.name) for field in dataclasses.fields(trace)}


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
        assert trace.events == tuple(Event(*event) for event in events)

    def test_nothing_arrived(self):
        trace = ArrivalTrace.from_workers([], 2)
        assert (trace.num_steps, trace.max_delay) == (0, 0)
        assert trace.in_flight.tolist() == [0, 0]
        assert trace.workers.dtype == trace.delays.dtype == np.int32
        assert trace.times.dtype == np.float64


class TestValidation:
    def test_arrays_are_copied_and_read_only(self):
        workers, times = np.array([0, 1, 0], np.int32), np.array([1.0, 2.0, 3.0])
        trace = ArrivalTrace.from_workers(workers, 2, times=times)
        workers[0], times[0] = 1, 9.0
        assert trace.workers.tolist() == [0, 1, 0]
        assert trace.times.tolist() == [1, 2, 3]
        for name in ("workers", "rounds", "dispatched_at", "times"):
            with pytest.raises(ValueError, match="read-only"):
                getattr(trace, name)[0] = 1
        assert trace.workers.dtype == trace.rounds.dtype == trace.dispatched_at.dtype == np.int32

    def test_equality_compares_every_field(self):
        trace = ArrivalTrace.from_workers([0, 1], 2)
        assert trace == ArrivalTrace.from_workers([0, 1], 2)
        assert trace != ArrivalTrace.from_workers([1, 0], 2)
        assert trace != ArrivalTrace.from_workers([0, 1], 3)
        assert trace != ArrivalTrace.from_workers([0, 1], 2, times=[1, 3])
        assert trace != ArrivalTrace.from_workers([0, 1], 2, synchronous=True)
        assert trace != ArrivalTrace.from_workers([0, 1], 2, events=[(2, "lost", 0)])
        assert trace != "trace"

    @pytest.mark.parametrize(
        ("field", "value", "error", "message"),
        [
            ("num_workers", True, TypeError, "`num_workers` must be an integer, got"),
            ("num_workers", 0, ValueError, "num_workers=0"),
            ("workers", [0, 2, 0], ValueError, r"workers\[1\]=2"),
            ("workers", [0, -1, 0], ValueError, r"workers\[1\]=-1"),
            ("workers", [0, True, 0], TypeError, r"workers\[1\]=True"),
            ("workers", [0, 1.0, 0], TypeError, r"workers\[1\]=1.0"),
            ("workers", np.array([0.0, 1.0, 0.0]), TypeError, "integers"),
            ("workers", np.array([False, True, False]), TypeError, "integers"),
            ("workers", [[0, 1, 0]], TypeError, r"workers\[0\]=\[0, 1, 0\]"),
            ("workers", np.zeros((1, 3), int), TypeError, "one dimension"),
            ("workers", 7, TypeError, "workers=7"),
            ("rounds", [0, 0, 0], ValueError, r"1 for worker 0 then, got rounds\[2\]=0"),
            ("rounds", [0, 0], ValueError, "`rounds` must have an entry for each of 3"),
            ("dispatched_at", [0, 1, 1], ValueError, r"dispatched_at\[1\]=1"),
            ("dispatched_at", [0, 0, 2**32 + 1], ValueError, r"dispatched_at\[2\]=4294967297"),
            ("dispatched_at", [0, 0, 2**70], TypeError, "dispatched_at"),
            ("times", [1.0, 2.0], ValueError, "`times` must have an entry"),
            ("times", [1.0, 3.0, 2.0], ValueError, r"times\[2\]=2.0 after 3.0"),
            ("times", [-1.0, 0.0, 0.0], ValueError, r"times\[0\]=-1.0"),
            ("times", [1.0, math.nan, 2.0], ValueError, r"times\[1\]=nan"),
            ("times", [1.0, 2.0, math.inf], ValueError, r"times\[2\]=inf"),
            ("times", [1.0, "2", 3.0], TypeError, r"times\[1\]='2'"),
            ("synchronous", 1, TypeError, "`synchronous` must be a bool"),
            ("events", None, TypeError, "events=None"),
            ("events", ["lost"], TypeError, r"events\[0\]"),
            ("events", [(0, "died", 1)], ValueError, r"events\[0\].kind.*'died'"),
            ("events", [(0, "arrived", 1)], ValueError, r"events\[0\].kind.*'arrived'"),
            ("events", [(4, "lost", 1)], ValueError, r"events\[0\].step.*=4"),
            ("events", [(True, "lost", 1)], TypeError, r"events\[0\].step"),
            ("events", [(3, "lost", 2)], ValueError, r"events\[0\].worker.*=2"),
            ("events", [(3, "lost", 1), (2, "left", 1)], ValueError, r"events\[1\].step.*=2"),
        ],
    )
    def test_malformed_fields(self, field, value, error, message):
        good = fields_of(ArrivalTrace.from_workers([0, 1, 0], 2))
        with pytest.raises(error, match=message):
            ArrivalTrace(**good | {field: value})

    @pytest.mark.parametrize(
        ("events", "message"),
        [
            ([(0, "redispatched", 0)], r"events\[0\].*worker 0, which is busy then, not idle"),
            ([(0, "lost", 0), (0, "lost", 0)], r"events\[1\].*idle then, not busy"),
            ([(1, "left", 0), (2, "redispatched", 0)], r"events\[1\].*absent then, not idle"),
            ([(1, "lost", 0)], r"workers\[2\].*worker 0, which is idle then, not busy"),
            ([(0, "joined", 0), (1, "joined", 0)], r"events\[1\].*busy then, not absent"),
            ([(1, "lost", 0), (1, "joined", 0)], r"events\[1\].*idle then, not absent"),
            ([(3, "joined", 0)], r"workers\[0\].*absent then, not busy"),
        ],
    )
    def test_impossible_events(self, events, message):
        with pytest.raises(ValueError, match=message):
            ArrivalTrace.from_workers([0, 1, 0], 2, events=events)

    def test_synchronous_refuses_changes_of_membership(self):
        for kind in ("left", "joined"):
            with pytest.raises(ValueError, match="must not change who is there"):
                ArrivalTrace.from_workers([0, 1], 2, synchronous=True, events=[(2, kind, 0)])

    def test_synchronous_losses_start_again_from_the_round(self):
        events = [(1, "lost", 1), (1, "redispatched", 1), (4, "lost", 0), (5, "redispatched", 0)]
        trace = ArrivalTrace.from_workers([0, 1, 1, 0, 1, 0], 2, synchronous=True, events=events)
        assert trace.rounds.tolist() == [0, 1, 2, 1, 3, 3]
        assert trace.dispatched_at.tolist() == [0, 0, 2, 2, 4, 4]
        assert trace.in_flight.tolist() == [6, 6]
        with pytest.raises(ValueError, match="worker 0, which is waiting then"):
            ArrivalTrace.from_workers([0, 0], 2, synchronous=True, events=events[:2])


class TestFiles:
    @given(eventful_runs(), st.data())
    @settings(max_examples=50, deadline=None)
    def test_round_trip(self, tmp_path_factory, run, data):
        workers, num_workers, events, *_ = run
        finite = st.floats(0, 1e300, width=64)
        times = sorted(data.draw(st.tuples(*[finite] * len(workers))))
        trace = ArrivalTrace.from_workers(workers, num_workers, times=times, events=events)
        path = tmp_path_factory.mktemp("trace") / "trace.json"
        trace.save(path)
        assert ArrivalTrace.load(path) == trace
        assert os.listdir(path.parent) == ["trace.json"]

    def test_what_is_written(self, tmp_path):
        trace = ArrivalTrace.from_workers([1, 0], 2, times=[0.1, 0.5], events=[(2, "lost", 0)])
        trace.save(tmp_path / "trace.json")
        assert json.loads((tmp_path / "trace.json").read_text()) == FORMAT | {
            "version": 1,
            "num_workers": 2,
            "synchronous": False,
            "workers": [1, 0],
            "rounds": [0, 0],
            "dispatched_at": [0, 0],
            "times": [0.1, 0.5],
            "events": [[2, "lost", 0]],
        }
        mode = stat.S_IMODE(os.stat(tmp_path / "trace.json").st_mode)
        umask = os.umask(0)
        os.umask(umask)
        assert mode == 0o666 & ~umask

    def test_synchronous_round_trip(self, tmp_path):
        trace = simulate_arrivals(homogeneous(), 3, 8, 1, 0, synchronous=True)
        trace.save(tmp_path / "trace.json")
        assert ArrivalTrace.load(tmp_path / "trace.json") == trace

    @pytest.mark.parametrize("failing", ["replace", "fsync"])
    def test_a_failed_save_leaves_the_old_file_alone(self, tmp_path, monkeypatch, failing):
        path = tmp_path / "trace.json"
        old = ArrivalTrace.from_workers([0], 1)
        old.save(path)

        def fail(*_):
            raise OSError("no space left")

        monkeypatch.setattr(os, failing, fail)
        with pytest.raises(OSError, match="no space left"):
            ArrivalTrace.from_workers([0, 0], 1).save(path)
        assert os.listdir(tmp_path) == ["trace.json"]
        assert ArrivalTrace.load(path) == old

    @pytest.mark.parametrize("extra", [{}, {"version": 1}, {"times": [1, 2.5, 2.5]}])
    def test_written_by_hand(self, tmp_path, extra):
        path = tmp_path / "hand.json"
        path.write_text(json.dumps(FORMAT | {"num_workers": 2, "workers": [0, 1, 0]} | extra))
        extra.pop("version", None)
        assert ArrivalTrace.load(path) == ArrivalTrace.from_workers([0, 1, 0], 2, **extra)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": "json"}, "it must be an object"),
            ({"version": 2}, r"`version` must be in \[1, 1\], got version=2"),
            ({"version": True}, "`version` must be an integer"),
            ({"version": None}, "`version` must be an integer"),
            ({"seed": 1}, r"unknown fields \['seed'\]"),
            ({"num_workers": 2.0}, "`num_workers` must be an integer"),
            ({"num_workers": 1}, r"workers\[1\]=1"),
            ({"workers": [0, True]}, r"workers\[1\]=True"),
            ({"workers": [0, None]}, r"workers\[1\]=None"),
            ({"workers": "01"}, r"workers\[0\]='0'"),
            ({"workers": 3}, "workers=3"),
            ({"workers": [0]}, "`times` must have an entry for each of 1"),
            ({"rounds": [0, [0]]}, r"rounds\[1\]=\[0\]"),
            ({"dispatched_at": [0, 1]}, r"dispatched_at\[1\]=1"),
            ({"times": [1.0, math.nan]}, r"times\[1\]=nan"),
            ({"times": [1.0, False]}, r"times\[1\]=False"),
            ({"synchronous": 0}, "`synchronous` must be a bool"),
            ({"events": [[1, "lost"]]}, r"events\[0\]"),
            ({"events": None}, "events=None"),
            ({"events": [[1, ["lost"], 0]]}, r"events\[0\].kind"),
        ],
    )
    def test_malformed_contents(self, tmp_path, change, message):
        path = tmp_path / "bad.json"
        ArrivalTrace.from_workers([0, 1], 2).save(path)
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(ValueError, match=rf"bad\.json is not an arrival trace: .*{message}"):
            ArrivalTrace.load(path)

    @pytest.mark.parametrize("name", ["version", "num_workers", "times", "rounds", "events"])
    def test_missing_field(self, tmp_path, name):
        path = tmp_path / "bad.json"
        ArrivalTrace.from_workers([0, 1], 2).save(path)
        contents = json.loads(path.read_text())
        del contents[name]
        path.write_text(json.dumps(contents))
        with pytest.raises(ValueError, match=rf"bad\.json .* it lacks the fields \['{name}'\]"):
            ArrivalTrace.load(path)

    @pytest.mark.parametrize("contents", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
    def test_no_json_object(self, tmp_path, contents):
        (tmp_path / "bad.json").write_bytes(contents)
        with pytest.raises(ValueError, match=r"bad\.json is not an arrival trace: "):
            ArrivalTrace.load(tmp_path / "bad.json")

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            ArrivalTrace.load(tmp_path / "none.json")

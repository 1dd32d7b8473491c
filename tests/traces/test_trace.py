"""The trace of arrivals: its files, and what it refuses."""

import dataclasses
import hashlib
import json
import math
import os
import stat

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orlomo_jax.traces import (
    homogeneous,
    sample_trace,
)
from orlomo_jax.traces.trace import ArrivalTrace
from tests.support.orders import eventful_runs

FORMAT = {"format": "orlomo_jax.ArrivalTrace"}


def fields_of(trace):
    return {field.name: getattr(trace, field.name) for field in dataclasses.fields(trace)}


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
        assert trace != ArrivalTrace.from_workers([0, 1], 2, max_wait=9)
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
            ("rounds", [0, 0, 0], ValueError, r"1 for worker 0 at step 2, got rounds\[2\]=0"),
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
            ([(1, "lost", 0), (1, "restarted", 0)], r"events\[1\].*idle then, not busy"),
        ],
    )
    def test_impossible_events(self, events, message):
        with pytest.raises(ValueError, match=message):
            ArrivalTrace.from_workers([0, 1, 0], 2, events=events)

    def test_synchronous_refuses_changes_of_membership(self):
        for kind in ("left", "joined"):
            with pytest.raises(ValueError, match="must not be joins or leaves"):
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
    @given(st.one_of(eventful_runs(), eventful_runs(bounded=True)), st.data())
    @settings(max_examples=50, deadline=None)
    def test_round_trip(self, tmp_path_factory, run, data):
        workers, num_workers, events, *_, max_wait = run
        finite = st.floats(0, 1e300, width=64)
        times = sorted(data.draw(st.tuples(*[finite] * len(workers))))
        trace = ArrivalTrace.from_workers(
            workers, num_workers, times=times, events=events, max_wait=max_wait
        )
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

    def test_the_bound_is_written_and_belongs_to_the_digest(self, tmp_path):
        free, bound = (ArrivalTrace.from_workers([0, 1], 2, max_wait=x) for x in (None, 9))
        bound.save(tmp_path / "trace.json")
        assert json.loads((tmp_path / "trace.json").read_text())["max_wait"] == 9
        assert free.digest() != bound.digest()
        settings = hashlib.sha256(repr((2, False, ())).encode())  # as before there were bounds
        for name in ("workers", "rounds", "dispatched_at", "times"):
            settings.update(getattr(free, name).tobytes())
        assert free.digest() == settings.hexdigest()

    def test_synchronous_round_trip(self, tmp_path):
        trace = sample_trace(homogeneous(), 3, 8, 1, 0, synchronous=True)
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

    @pytest.mark.parametrize(
        "extra", [{}, {"version": 1}, {"times": [1, 2.5, 2.5]}, {"max_wait": 1}]
    )
    def test_written_by_hand(self, tmp_path, extra):
        path = tmp_path / "hand.json"
        path.write_text(json.dumps(FORMAT | {"num_workers": 2, "workers": [0, 1, 0]} | extra))
        extra.pop("version", None)
        assert ArrivalTrace.load(path) == ArrivalTrace.from_workers([0, 1, 0], 2, **extra)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": "json"}, "it must be an object"),
            ({"version": 2}, "its format version is 2, but this orlomo_jax reads 1"),
            ({"version": True}, r"its format version is True, but this orlomo_jax reads 1"),
            ({"version": None}, r"its format version is None, but this orlomo_jax reads 1"),
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
            ({"max_wait": 0}, "max_wait=0"),
            ({"max_wait": "1"}, "max_wait='1'"),
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

    def test_a_journal_is_read_otherwise(self, tmp_path):
        (tmp_path / "arrivals.jsonl").write_text('{"a": 1}\n{"b": 2}\n')
        with pytest.raises(ValueError, match=r"for a journal: Journal\.load\(path\)\.trace\(\)"):
            ArrivalTrace.load(tmp_path / "arrivals.jsonl")

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            ArrivalTrace.load(tmp_path / "none.json")

"""A command with a budget: order, ways of sharing the device, and rows that do not depend on it."""

import itertools
import json
import time
from dataclasses import replace

import pytest

from experiments import records, reproduce
from experiments.config import Run
from experiments.paper import choice, scales, search, tasks
from experiments.paper.tasks import Clock, Task, Way

RUN = Run(
    model="mlp",
    dataset="digits",
    workers=2,
    local_iterations=4,
    epochs=1,
    batch_size=16,
    weight_decay=0.0,
    scenario="homogeneous",
)
TIMES = {"wall_time", "startup", "environment"}
RUNS = [replace(RUN, seed=seed, learning_rate=0.1 * (seed + 1)) for seed in range(3)]


def without_times(rows):
    return [{name: row[name] for name in row.keys() - TIMES} for row in rows]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class TestOrder:
    def order(self, way):
        settings = reproduce.Reproduce(scale="paper", budget=1.0)
        scale, rows = scales.SCALES["paper"], {}
        families = {}
        for run in reproduce.wanted_runs(settings, scale):
            families.setdefault(way.family(run), []).append(run)
        groups = []
        for wave in search.waves(list(families.values()), rows, scale, 3, breadth_first=True):
            for group in way.groups(wave):
                groups.append(group)
                for run in group:
                    rows[run] = {"status": "finished", "train_loss": abs(run.learning_rate - 0.1)}
        return groups

    def test_the_most_important_cells_come_first_each_at_one_rate(self):
        runs = [run for (run,) in self.order(Way())]
        first = runs[:192]
        assert {(run.learning_rate, run.seed) for run in first} == {(0.1, 0)}
        assert [run.method for run in first[:4]] == ["orlomo", "prsgdm", "al_sgd", "local_ormo_da"]
        fields = lambda run: (  # noqa: E731
            run.workers,
            run.dataset,
            run.model,
            run.local_iterations,
            run.scenario,
        )
        cells_in_order = list(dict.fromkeys(map(fields, first)))
        head = (16, "cifar10", "resnet20")
        assert cells_in_order[:4] == [
            (*head, 32, "heterogeneous"),
            (*head, 32, "homogeneous"),
            (*head, 16, "heterogeneous"),
            (*head, 16, "homogeneous"),
        ]
        assert cells_in_order[6] == (16, "cifar10", "squeezenet", 32, "heterogeneous")
        assert cells_in_order[12] == (16, "cifar100", "resnet20", 32, "heterogeneous")
        assert cells_in_order[24] == (8, "cifar10", "resnet20", 32, "heterogeneous")
        assert len(set(runs)) == len(runs) == 192 * (3 + 2)

    def test_ways_carry_out_the_same_runs(self):
        alone = {run for (run,) in self.order(Way())}
        for way in (Way("vmap", 3), Way("processes", 8)):
            groups = self.order(way)
            assert {run for group in groups for run in group} == alone
            assert max(map(len, groups)) <= way.count

    def test_a_program_holds_one_method_and_processes_any(self):
        assert {run.method for run in self.order(Way("vmap", 4))[0]} == {"orlomo"}
        assert len({run.method for run in self.order(Way("processes", 8))[0]}) == 4


class TestClock:
    def clock(self, monkeypatch, times, deadline):
        monkeypatch.setattr(tasks.time, "time", lambda: times.pop(0))
        return Clock(deadline)

    def test_it_stops_before_a_segment_that_would_end_too_late(self, monkeypatch):
        clock = self.clock(monkeypatch, [0, 50, 60, 70], deadline=80)
        assert not clock.stop()  # 50 s of compiling say nothing of the next segment
        assert clock.startup == 50
        assert not clock.stop()
        assert clock.stop()  # 70 + 10 + the time to save

    def test_without_a_deadline_it_never_stops(self):
        clock = Clock(float("inf"))
        assert not any(clock.stop() for _ in range(5))


class TestCarryOut:
    def until_done(self, task, runs):
        for calls in range(1, 20):
            rows = task.carry_out(runs)
            if rows:
                return rows, calls
        raise AssertionError("it never ends")

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "way", [Way(), Way("threads", 3), Way("vmap", 3, "matmul")], ids=lambda way: way.how
    )
    def test_stopped_runs_go_on_to_the_same_rows(self, way, monkeypatch):
        runs = RUNS[: way.count]
        whole = Task(way).carry_out(runs)
        assert [row["run"]["seed"] for row in whole] == list(range(way.count))
        assert [row.get("together", 1) for row in whole] == [way.count] * way.count
        late = Task(way, deadline=time.time())  # stops after every segment
        rows, calls = self.until_done(late, runs)
        assert calls > 2
        assert without_times(rows) == without_times(whole)
        assert rows[0]["wall_time"] > 0
        assert list((tasks.CACHE / "checkpoints").iterdir())
        tasks.forget(runs)
        assert not list((tasks.CACHE / "checkpoints").iterdir())

    @pytest.mark.slow
    @pytest.mark.slow
    def test_a_sweep_in_a_thread_has_the_rows_of_runs_alone_bit_for_bit(self):
        runs = [replace(run, model="mlp", dataset="digits", epochs=6) for run in RUNS]
        rows = Task(Way("threads", 3)).carry_out(runs)
        assert len({row["parameters"] for row in rows}) == 3
        for run, row in zip(runs, rows, strict=True):
            (single,) = Task(Way()).carry_out([run])
            assert without_times([row]) == without_times([single | {"together": 3}])

    @pytest.mark.slow
    def test_runs_in_threads_stop_when_they_are_told(self):
        runs = [replace(run, model="mlp", dataset="digits", epochs=6) for run in RUNS]
        assert Task(Way("threads", 3), stop=lambda: True).carry_out(runs) == []
        assert not tasks.CACHE.exists()

    @pytest.mark.slow
    def test_runs_together_are_runs_alone_to_rounding(self):
        rows = Task(Way("vmap", 3)).carry_out(RUNS)
        for run, row in zip(RUNS, rows, strict=True):
            (single,) = Task(Way()).carry_out([run])
            assert row["train_loss"] == pytest.approx(single["train_loss"], rel=1e-4)
            assert row["curve"]["step"] == single["curve"]["step"]

    def test_runs_of_several_shapes_do_not_go_together(self):
        rows = Task(Way("vmap", 2)).carry_out([RUN, replace(RUN, workers=4)])
        assert {row["status"] for row in rows} == {"failed"}
        assert "of one shape" in rows[0]["error"]


@pytest.fixture
def small_cells(monkeypatch):
    """Four cells of tiny runs at the scale smoke, two of a shape."""
    scale = replace(
        scales.SCALES["smoke"],
        shrink=lambda run: replace(RUN, method=run.method, scenario=run.scenario),
    )
    monkeypatch.setitem(scales.SCALES, "smoke", scale)


class TestCommand:
    flags = ("--scale", "smoke", "--only", "method=orlomo|al_sgd,workers=16")

    def reproduce(self, *flags):
        reproduce.main([*self.flags, "--output", "rows.jsonl", *flags])
        return records.read(tasks.Path("rows.jsonl"))

    @pytest.mark.slow
    def test_rows_are_those_of_an_unbroken_command(self, small_cells, monkeypatch, capsys):
        whole = self.reproduce("--budget", "1000")
        tasks.Path("rows.jsonl").unlink()
        calls, counts = itertools.count(1), []
        monkeypatch.setattr(Clock, "stop", lambda self: next(calls) % 8 == 0)
        while not counts or counts[-1] < len(whole):
            counts.append(len(self.reproduce("--budget", "1000")))
        assert len(set(counts)) > 2
        assert without_times(records.read(tasks.Path("rows.jsonl"))) == without_times(whole)
        assert not list((tasks.CACHE / "checkpoints").iterdir())
        assert "run the same command to resume" in capsys.readouterr().out

    def test_nothing_starts_that_would_end_too_late(self, small_cells, monkeypatch):
        monkeypatch.setattr(reproduce, "startup_time", lambda rows: 30.0)
        assert self.reproduce("--budget", "20") == []

    def test_startup_time_is_that_of_this_device(self):
        environment = records.environment()
        row = {"startup": 7.0, "environment": environment}
        other = {"startup": 99.0, "environment": environment | {"device": "another"}}
        assert reproduce.startup_time({0: row, 1: other, 2: {}}) == 7.0
        assert reproduce.startup_time({}) == 0.0

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (("--budget", "0"), "`budget` must be > 0"),
            (("--budget", "9", "--at-once", "0"), "`at_once` must be ≥ 1"),
            ((), "or a --budget"),
        ],
    )
    def test_bad_flags(self, flags, message):
        with pytest.raises(SystemExit, match=message):
            reproduce.main(["--output", "rows.jsonl", *flags])


class TestChoice:
    def test_the_fastest_way_is_kept(self, monkeypatch, tmp_path):
        ways, path = choice.candidates(4), tmp_path / "together.json"
        rates = [1.0, 2.0, 5.0, "MemoryError: no room"]
        monkeypatch.setattr(choice, "measure", lambda *args, **options: rates)
        said = []
        assert choice.choose(path, RUN, ways, log=said.append) == ways[2]
        assert "MemoryError" in said[3]
        monkeypatch.setattr(choice, "measure", lambda *args, **options: 1 / 0)
        assert choice.choose(path, RUN, ways) == ways[2]
        kept = json.loads(path.read_text())
        path.write_text(json.dumps(kept | {"device": "another"}))
        with pytest.raises(ZeroDivisionError):
            choice.choose(path, RUN, ways)

    @pytest.mark.slow
    def test_ways_of_this_process_are_measured(self):
        run = replace(RUN, epochs=20)
        ways = [Way("alone", 1, "matmul"), Way("vmap", 2, "matmul"), Way("vmap", 0)]
        *rates, failed = choice.measure(run, ways, seconds=0.05, segment=16)
        assert all(rate > 0 for rate in rates)
        assert "at least one run" in failed


@pytest.mark.slow
@pytest.mark.parametrize("count", [2])
def test_processes_train_and_are_measured(count):
    """Each run has a process of its own, and the rows of a run alone."""
    way, runs = Way("processes", count), RUNS[:count]
    rows = Task(way).carry_out(runs)
    assert [row.pop("processes") for row in rows] == [count] * count
    single = [Task(Way()).carry_out([run])[0] for run in runs]
    assert without_times(rows) == without_times(single)
    (rate,) = choice.measure(replace(RUN, epochs=20), [way], seconds=0.05, segment=16)
    assert rate > 0

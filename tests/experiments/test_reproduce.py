"""Cells, what is missing of them, and the command: on made-up rows."""

import threading
from dataclasses import replace

import numpy as np
import pytest

from experiments import records, reproduce
from experiments.config import Run
from experiments.paper import scales, search, tables, tasks
from tests.experiments.paper_rows import SCALE, fill, row_of


class TestPaper:
    def test_every_number_is_there(self):
        numbers = tables.paper_numbers()
        assert len(numbers) == 485
        by_table = [sum(n.table == table for n in numbers) for table in range(1, 7)]
        assert by_table == [96, 96, 5, 96, 96, 96]

    def test_numbers_known_by_heart(self):
        want = Run("orlomo", "resnet20", "cifar10", "heterogeneous", 16, 32)
        (number,) = [n for n in tables.paper_numbers() if n.run == want and n.table == 4]
        assert (number.metric, number.mean, number.std) == ("train_loss", 0.15, 0.01)

    def test_tiny_imagenets_slow_workers_take_four_times(self):
        assert {run.slowdown for run in tables.table_runs(6)} == {4.0}

    def test_table_3_has_two_forms(self):
        forms = [(r.scenario, r.slowdown, r.max_delay) for r in tables.table_runs(3)]
        assert ("one_slow", 50.0, 0) in forms
        assert ("one_delayed", 1.0, 9449) in forms


@pytest.mark.parametrize(("scale", "train_size"), [("slim", 0), ("fits", 5000)])
def test_runs_as_long_as_the_papers(scale, train_size):
    for table, whole in ((2, 50_000), (6, 100_000)):
        for paper in tables.table_runs(table):
            run = scales.SCALES[scale].shrink(paper)
            assert run.train_size == train_size
            assert run.num_steps(train_size or whole) == paper.num_steps(whole)


def test_prsgdm_ends_with_orlomo_at_the_scale_same_time():
    for paper in tables.table_runs(2):
        short, whole = (scales.SCALES[name].shrink(paper) for name in ("same_time", "slim"))
        assert (short == whole) == (paper.method != "prsgdm")
        if paper.method == "prsgdm" and paper.dataset == "cifar10":
            asynchronous = replace(whole, method="orlomo")
            ends = [run.trace(run.num_steps(50_000)).times[-1] for run in (short, asynchronous)]
            assert ends[0] == pytest.approx(ends[1], rel=0.02)


def test_variants_of_slim_share_its_records():
    variants = ("same_time", "barrier")
    assert {scales.SCALES[name].file for name in variants} == {"slim.jsonl"}
    assert {scale.file for scale in scales.SCALES.values() if scale.name not in variants} == {
        f"{name}.jsonl" for name in scales.SCALES if name not in variants
    }


def test_orlomo_waits_as_prsgdm_does_at_the_scale_barrier():
    for paper in tables.table_runs(2):
        waiting, free = (scales.SCALES[name].shrink(paper) for name in ("barrier", "slim"))
        assert (waiting == free) == (paper.method != "orlomo")
        if paper.method == "orlomo":
            num_steps = 10 * paper.workers
            trace, synchronous = (
                run.trace(num_steps) for run in (waiting, replace(free, method="prsgdm"))
            )
            assert trace.dispatched_at.tolist() == synchronous.dispatched_at.tolist()
            np.testing.assert_allclose(trace.times, synchronous.times, rtol=1e-12)


def test_the_scale_barrier_cannot_set_a_delay():
    late = next(run for run in tables.table_runs(3) if run.scenario == "one_delayed")
    with pytest.raises(ValueError, match="got one_delayed"):
        scales.SCALES["barrier"].shrink(late)


def test_the_scale_same_time_knows_tables_1_and_2_only():
    synchronous = next(run for run in tables.table_runs(6) if run.method == "prsgdm")
    with pytest.raises(ValueError, match="Table 1 or 2"):
        scales.SCALES["same_time"].shrink(synchronous)


class TestSelect:
    def test_conditions_are_joined(self):
        runs = tables.select(tables.table_runs(1), "workers=8,method=orlomo,dataset=cifar100")
        assert {(r.workers, r.method, r.dataset) for r in runs} == {(8, "orlomo", "cifar100")}
        assert len(runs) == 6

    @pytest.mark.parametrize(
        ("only", "message"),
        [
            ("worker=8", "`only` must be field=value.*got 'worker=8'"),
            ("workers", "got 'workers'"),
            ("workers=32", r"workers is one of \['16', '8'\], got \['32'\]"),
        ],
    )
    def test_unknown_cells(self, only, message):
        with pytest.raises(ValueError, match=message):
            tables.select(tables.table_runs(1), only)


class TestMissing:
    run = search.cell_of(SCALE.shrink(tables.table_runs(2)[0]))

    def done(self, losses):
        """Return what a cell runs, in order, where these are the losses of the grid's rates."""
        rows, order = {}, []
        for run in search.missing([self.run], rows, SCALE, 3):
            order.append((run.learning_rate, run.seed))
            loss = losses[SCALE.learning_rates.index(run.learning_rate)]
            rows[run] = row_of(run, loss, "diverged" if loss is None else "finished")
        assert list(search.missing([self.run], rows, SCALE, 3)) == []
        return order

    @pytest.mark.parametrize(
        ("losses", "rates"),
        [
            ([5, 2, 1, 2, 5], [0.03, 0.1, 0.3]),
            ([5, 1, 2, 3, 5], [0.03, 0.1, 0.3, 0.01]),
            ([1, 2, 3, 4, 5], [0.03, 0.1, 0.3, 0.01]),
            ([5, 4, 3, 2, 1], [0.03, 0.1, 0.3, 1.0]),
            ([1, None, None, None, None], [0.03, 0.1, 0.3, 0.01]),
            ([5, 2, 1, None, None], [0.03, 0.1, 0.3]),
        ],
    )
    def test_until_a_rate_is_better_than_those_beside_it_then_seeds_at_it(self, losses, rates):
        best = min(rates, key=lambda rate: losses[SCALE.learning_rates.index(rate)] or 9)
        seeds = [(best, 1), (best, 2)]
        assert self.done(losses) == [*((rate, 0) for rate in rates), *seeds]

    def test_what_is_recorded_is_skipped(self):
        rows = {}
        fill([self.run], rows)
        first, *_, last = rows
        del rows[first], rows[last]
        assert next(search.missing([self.run], rows, SCALE, 3)) == first

    def test_a_rate_beyond_the_search_counts(self):
        """Where more of the grid is recorded than the search needs, the best of all is chosen."""
        losses = dict(zip(SCALE.learning_rates, (0.5, 2, 1, 2, 5), strict=True))
        runs = [replace(self.run, learning_rate=rate) for rate in losses]
        rows = {run: row_of(run, losses[run.learning_rate]) for run in runs}
        assert search.search(rows, self.run, SCALE).chosen == 0.01

    def test_diverged_rates_are_not_chosen(self):
        rows = {}
        for run in search.missing([self.run], rows, SCALE, 2):
            rows[run] = row_of(run, status="diverged" if run.learning_rate < 0.3 else "finished")
        assert search.search(rows, self.run, SCALE).chosen == 0.3

    def test_a_cell_that_always_diverges_ends_at_the_lowest_rate(self):
        rows = {}
        fill([self.run], rows, status="diverged")
        assert [run.learning_rate for run in rows] == [0.03, 0.1, 0.3, 0.01]
        assert search.search(rows, self.run, SCALE).chosen is None

    def test_tables_4_and_5_are_the_runs_of_2_and_1(self):
        assert tables.table_runs(5) == tables.table_runs(1)


class TestCommand:
    flags = ("--table", "2", "--scale", "smoke", "--only", "method=orlomo,workers=8")

    def reproduce(self, monkeypatch, path, execute, *flags):
        def execute_together(runs, *args, **options):
            return [execute(run, *args, **options) for run in runs]

        monkeypatch.setattr(tasks.runner, "execute_together", execute_together)
        reproduce.main([*self.flags, "--output", str(path), *flags])

    def test_a_killed_command_goes_on(self, monkeypatch, tmp_path):
        path, executed = tmp_path / "rows.jsonl", []

        def execute(run, *args, **options):
            if len(executed) == 3:
                raise KeyboardInterrupt
            executed.append(run)
            return row_of(run)

        with pytest.raises(SystemExit, match="interrupted after 3 runs"):
            self.reproduce(monkeypatch, path, execute, "--together", "alone")
        first = list(executed)
        assert len(records.read(path)) == 3
        executed.append(None)  # past the interruption
        self.reproduce(monkeypatch, path, execute, "--together", "alone")
        assert len(executed) == 4 + 3  # six cells in all, none twice
        assert not set(first) & set(executed[4:])

    def test_a_killed_command_with_threads_goes_on(self, monkeypatch, tmp_path):
        path, lock, executed = tmp_path / "rows.jsonl", threading.Lock(), []

        def execute(run, *args, **options):
            with lock:
                if len(executed) == 3:
                    raise KeyboardInterrupt
                executed.append(run)
            return row_of(run)

        with pytest.raises(SystemExit, match=r"interrupted after \d runs"):
            self.reproduce(monkeypatch, path, execute, "--together", "threads")
        kept = search.recorded(path)
        assert kept.keys() <= set(executed)
        executed = [None] * 4  # past the interruption
        self.reproduce(monkeypatch, path, execute, "--together", "threads")
        assert len(executed) == 4 + 6 - len(kept)
        assert not kept.keys() & set(executed)
        assert len(records.read(path)) == len(search.recorded(path)) == 6

    def test_failures_are_recorded_and_retried_on_request(self, monkeypatch, tmp_path, capsys):
        path = tmp_path / "rows.jsonl"

        def fail(run, *args, **options):
            raise MemoryError("no room")

        self.reproduce(monkeypatch, path, fail)
        rows = records.read(path)
        assert {row["status"] for row in rows} == {"failed"}
        assert rows[0]["error"] == "MemoryError: no room"
        self.reproduce(monkeypatch, path, fail)
        assert f"{len(rows)} runs failed: add --retry-failed" in " ".join(
            capsys.readouterr().out.split()
        )
        assert len(records.read(path)) == len(rows)
        self.reproduce(monkeypatch, path, lambda run, *_, **__: row_of(run), "--retry-failed")
        assert len(records.read(path)) == 2 * len(rows)

    def test_curves_that_figures_show_have_the_points(self, monkeypatch, tmp_path):
        points = {}

        def execute(run, *_, evaluate_every, **__):
            num_steps = run.num_steps(len(tasks.assemble(run).train.labels))
            points[run.local_iterations] = num_steps // evaluate_every
            return row_of(run)

        flags = ("--only", "method=orlomo,workers=16,scenario=homogeneous,dataset=cifar10")
        self.reproduce(monkeypatch, tmp_path / "rows.jsonl", execute, *flags)
        assert points[16] >= 20 > points[32] >= 4

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ((), "give either --table or --figure"),
            (("--table", "1", "--figure", "2"), "give either"),
            (("--table", "1", "--only", "workers=9"), "got \\['9'\\]"),
            (("--table", "1", "--seeds", "0"), "`seeds` must be ≥ 1"),
            (("--table", "1", "--output", "/dev/null/rows.jsonl"), "/dev/null"),
        ],
    )
    def test_bad_flags(self, flags, message):
        with pytest.raises(SystemExit, match=message):
            reproduce.main(flags)

    @pytest.mark.parametrize(
        "changes",
        [
            {"run": {"metod": "orlomo"}},
            {"run": {"workers": "16"}},
            {"status": "done"},
            {"train_loss": None},
            {"curve": {"train_loss": []}},
            {"environment": {}},
        ],
    )
    def test_a_row_that_is_none_is_named(self, tmp_path, changes):
        path = tmp_path / "rows.jsonl"
        records.append(path, row_of(Run()))
        records.append(path, row_of(Run()) | changes)
        with pytest.raises(SystemExit, match=r"rows.jsonl:2 is not the row of a run"):
            reproduce.main([*self.flags, "--output", str(path)])

    def test_other_arrivals_than_the_scenarios_are_no_run_of_a_cell(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        records.append(path, row_of(Run()) | {"replayed": "0f"})
        assert search.recorded(path) == {}


@pytest.mark.parametrize(
    "changes", [{"staleness_bound": 14}, {"staleness_bound": 15, "method": "prsgdm"}]
)
def test_a_staleness_bound_that_no_run_can_keep_is_refused(changes):
    with pytest.raises(ValueError, match=f"`staleness_bound` must .*={changes['staleness_bound']}"):
        Run(workers=16, **changes)


def test_one_delayed_worker_reports_as_late_as_asked():
    run = replace(Run(scenario="one_delayed", max_delay=1905, local_iterations=8), epochs=1)
    trace = run.trace(15_625)
    late = trace.delays[trace.workers == 15]
    assert late.max() == trace.max_delay == 1905
    assert len(late) == 15_625 // 1906
    assert trace.delays[trace.workers != 15].max() < 50

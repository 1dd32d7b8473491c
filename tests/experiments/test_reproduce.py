"""Cells, what is missing of them, and the report: on made-up rows."""

import threading
from dataclasses import asdict, replace

import pytest

from experiments import readme, records, report, reproduce
from experiments.config import Run
from experiments.paper import agreement, search, tables, tasks
from experiments.paper.entries import entries
from orlomo_jax import ArrivalTrace

SCALE = tables.SCALES["digits"]
ENVIRONMENT = {"device": "cpu", "cpus": 2, "jax": "0.10.2"}


def row_of(run: Run, loss=None, status="finished"):
    loss = 0.1 * run.learning_rate + 0.01 * run.seed if loss is None else loss
    metrics = {"train_loss": loss, "test_accuracy": 100 - loss}
    curve = {"step": [1, 2], "virtual_time": [1.0, 2.0]}
    curve |= {name: [value, value] for name, value in metrics.items()}
    missing = status != "finished"
    return {
        "run": asdict(run),
        "status": status,
        "max_delay": 34,
        "wall_time": 1.0,
        "curve": curve,
        "environment": ENVIRONMENT,
        **{name: None if missing else value for name, value in metrics.items()},
    }


def fill(runs, rows, seeds=3, **options):
    for run in search.missing(runs, rows, SCALE, seeds):
        rows[run] = row_of(run, **options)


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
            run = tables.SCALES[scale].shrink(paper)
            assert run.train_size == train_size
            assert run.num_steps(train_size or whole) == paper.num_steps(whole)


def test_prsgdm_ends_with_orlomo_at_the_scale_same_time():
    for paper in tables.table_runs(2):
        short, whole = (tables.SCALES[name].shrink(paper) for name in ("same_time", "slim"))
        assert (short == whole) == (paper.method != "prsgdm")
        if paper.method == "prsgdm" and paper.dataset == "cifar10":
            asynchronous = replace(whole, method="orlomo")
            ends = [run.trace(run.num_steps(50_000)).times[-1] for run in (short, asynchronous)]
            assert ends[0] == pytest.approx(ends[1], rel=0.02)


def test_the_scale_same_time_shares_the_records_of_slim():
    assert tables.SCALES["same_time"].file == "slim.jsonl"
    assert {scale.file for scale in tables.SCALES.values() if scale.name != "same_time"} == {
        f"{name}.jsonl" for name in tables.SCALES if name != "same_time"
    }


def test_the_scale_same_time_knows_tables_1_and_2_only():
    synchronous = next(run for run in tables.table_runs(6) if run.method == "prsgdm")
    with pytest.raises(ValueError, match="Table 1 or 2"):
        tables.SCALES["same_time"].shrink(synchronous)


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


class TestReport:
    def rows(self):
        runs = [search.cell_of(SCALE.shrink(run)) for run in tables.table_runs(2)]
        rows = {}
        for run in search.missing(list(dict.fromkeys(runs)), rows, SCALE, 3):
            worse = {"orlomo": 0.0, "prsgdm": 0.1, "al_sgd": 0.2, "local_ormo_da": 0.3}[run.method]
            rows[run] = row_of(run, loss=worse + run.learning_rate + 0.01 * run.seed)
        return rows

    def test_ours_stands_beside_the_papers(self):
        lines = report.table_lines(2, self.rows(), SCALE)
        (line,) = [x for x in lines if x.startswith("| heterogeneous | 16 | 32 |")]
        columns = [column.strip() for column in line.strip("|").split("|")]
        assert columns[6] == "99.98 ± 0.01 (3) / 90.15 ± 0.23 / +9.83"
        assert columns[-3:] == ["OrLoMo", "OrLoMo", "1.00×"]

    def test_all_of_it_is_built_from_rows(self, tmp_path):
        rows = self.rows()
        report.build(rows, SCALE, tmp_path)
        text = (tmp_path / "report.md").read_text()
        for heading in ("## Table 1", "## Table 2", "## Table 4", "## Figure 3"):
            assert heading in text
        assert f"{len(rows)} runs on cpu, 2 processors" in text
        first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        report.build(rows, SCALE, tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first

    def test_results_against_the_rate_are_drawn_where_the_scale_asks(self, tmp_path):
        kept = (16, "homogeneous")
        rows = {r: row for r, row in self.rows().items() if (r.workers, r.scenario) == kept}
        report.build(rows, replace(SCALE, shows_dependence=True), tmp_path)
        drawn = {path.stem for path in tmp_path.glob("dependence-*.png")}
        assert drawn == {"dependence-digits-16-homogeneous"}
        text = (tmp_path / "report.md").read_text()
        assert "## Against S·K and γ: digits, K = 16, homogeneous" in text

    @pytest.mark.parametrize("status", ["finished", "diverged"])
    def test_the_first_run_of_a_scale_is_drawn(self, tmp_path, status):
        run = search.at(search.cell_of(SCALE.shrink(tables.table_runs(2)[0])), 0.1)
        scale = replace(SCALE, shows_dependence=True)
        report.build({run: row_of(run, status=status)}, scale, tmp_path)
        assert (tmp_path / "dependence-digits-8-homogeneous.svg").stat().st_size > 1000

    def test_a_part_of_the_rates_and_cells_is_drawn(self, tmp_path):
        """Some searches have not ended, and one S has only diverged runs."""
        kept = (16, "homogeneous")
        rows = {r: row for r, row in self.rows().items() if (r.workers, r.scenario) == kept}
        for run in list(rows):
            if run.local_iterations == 8:
                rows[run] = row_of(run, status="diverged")
            if run.method == "orlomo" and run.learning_rate == min(SCALE.learning_rates):
                del rows[run]
        report.build(rows, replace(SCALE, shows_dependence=True), tmp_path)
        assert (tmp_path / "dependence-digits-16-homogeneous.svg").stat().st_size > 1000

    def test_a_cell_without_a_finished_run_says_so(self):
        rows = {}
        run = search.cell_of(SCALE.shrink(tables.table_runs(2)[0]))
        fill([run], rows, status="diverged")
        text = "\n".join(report.table_lines(2, rows, SCALE))
        assert "diverged at every rate" in text
        for run in rows:
            rows[run]["status"] = "failed"
        assert "| failed / " in "\n".join(report.table_lines(2, rows, SCALE))

    def test_a_grid_that_is_not_run_to_its_end_says_so(self):
        rows = self.rows()
        gone = min((run for run in rows if run.method == "orlomo"), key=lambda r: r.learning_rate)
        del rows[gone]
        text = "\n".join(report.table_lines(2, rows, SCALE))
        (line,) = [x for x in text.splitlines() if "rates run: 3 / " in x]
        assert line.split(" | ")[-3] == "–"

    def test_part_of_a_cell(self):
        """With one seed there is no spread. If a method is missing, no best method is named."""
        run = search.cell_of(SCALE.shrink(tables.table_runs(2)[0]))
        rows = {}
        fill([run], rows, seeds=1)
        (line,) = [x for x in report.table_lines(2, rows, SCALE) if x.startswith("| homogeneous")]
        assert "| 100.00 (1) / 9" in line
        assert line.count("| – ") == 3 + 2 + 1
        assert line.endswith("| – |")

    def test_table_3(self):
        rows = {}
        runs = [search.cell_of(SCALE.shrink(run)) for run in tables.table_runs(3)]
        fill(runs, rows)
        text = "\n".join(report.table_lines(3, rows, SCALE))
        assert "| 50× slower | 34 | 99.99 ± 0.01 (3) | 9449 | 91.44 |" in text
        assert text.count("set delay") == 5

    def test_nothing_recorded(self, tmp_path):
        with pytest.raises(SystemExit, match=r"none\.jsonl holds no rows"):
            report.main(["--records", str(tmp_path / "none.jsonl")])

    def test_timeline(self, tmp_path):
        path = tmp_path / "trace.json"
        ArrivalTrace.from_workers([0, 2, 1, 2, 1, 1, 2, 2, 0], 3).save(path)
        report.main(["--trace", str(path)])
        assert (tmp_path / "timeline.svg").stat().st_size > 1000


class TestAgreement:
    def rows(self, **accuracy):
        """One cell: K = 16, S = 32, unequal workers; accuracies of three seeds by method."""
        rows = {}
        runs = tables.select(
            tables.table_runs(2),
            "workers=16,local_iterations=32,scenario=heterogeneous,dataset=cifar10",
        )
        for run in search.missing([search.cell_of(SCALE.shrink(x)) for x in runs], rows, SCALE, 3):
            rows[run] = row_of(run)
            if run.method in accuracy:
                rows[run]["test_accuracy"] = accuracy[run.method] + 0.1 * run.seed
        return rows

    def test_each_lead_is_marked(self):
        rows = self.rows(orlomo=90, al_sgd=88, local_ormo_da=90.06, prsgdm=91)
        lines = agreement.agreement(2, rows, SCALE)
        assert "| unequal | 16 | 32 | +2.0 (+1.0) | *−0.1* (+7.9) | " in lines[4]
        assert lines[4].endswith(" | **−1.0** (+0.4) | 1.00× |")
        assert lines[-3:] == [
            "| AL-SGD | 1 | 0 | 0 | 1 | 0 | 0 |",
            "| local OrMo-DA | 0 | 1 | 0 | 1 | 0 | 0 |",
            "| PRSGDm | 0 | 0 | 1 | 1 | 0 | 0 |",
        ]

    @pytest.mark.parametrize(
        ("mean", "spread", "sign"), [(0.3, 0.2, 1), (-0.3, 0.2, -1), (0.2, 0.2, 0), (0, 0, 0)]
    )
    def test_a_lead_within_the_spread_is_none(self, mean, spread, sign):
        assert agreement.Lead(mean, spread).sign() == sign

    def test_a_lower_training_loss_is_a_lead(self):
        rows = self.rows()
        for run, row in rows.items():
            row["train_loss"] = {"orlomo": 0.1, "al_sgd": 0.2}.get(run.method, 0.1)
        line = agreement.agreement(4, rows, SCALE)[4]
        assert "| +0.1000 (+0.07) | *0.0000* (+0.32) | " in line

    def test_a_cell_counts_once_it_has_all_its_seeds(self):
        rows = self.rows()
        last = max((run for run in rows if run.method == "orlomo"), key=lambda run: run.seed)
        del rows[last]
        assert agreement.agreement(2, rows, SCALE) == []
        assert agreement.at_the_same_time(2, rows, SCALE) == []

    def test_a_method_without_a_result_is_a_dash(self):
        rows = {run: row for run, row in self.rows().items() if run.method != "al_sgd"}
        assert "| unequal | 16 | 32 | – | " in agreement.agreement(2, rows, SCALE)[4]
        only = {run: row for run, row in rows.items() if run.method == "orlomo"}
        assert agreement.agreement(2, only, SCALE) == []

    def test_every_rate_of_the_search_is_shown(self):
        rows = self.rows()
        (line,) = [x for x in agreement.rates(2, rows, SCALE) if "| OrLoMo |" in x]
        losses = "**100.0 / 0.001** | 100.0 / 0.003 | 100.0 / 0.01 | 100.0 / 0.03 | –"
        assert line == f"| digits | unequal | 16 | 32 | OrLoMo | {losses} |"
        first = next(run for run in rows if run.method == "orlomo")
        rows[first] |= {"status": "diverged"}
        (line,) = [x for x in agreement.rates(2, rows, SCALE) if "| OrLoMo |" in x]
        assert " | diverged | " in line

    def test_equal_rates_are_compared_over_the_common_seeds(self):
        rows = self.rows(orlomo=90, prsgdm=88)
        (line,) = agreement.at_the_same_rate(2, rows, SCALE)[2:]
        assert line == "| digits | unequal | 16 | 32 | +2.0 (3) | +2.0 | +2.0 | +2.0 | – |"
        for run, row in rows.items():
            row["train_loss"] = 0.1 if run.method == "orlomo" else 0.3 + 0.1 * run.seed
        last = max((run for run in rows if run.method == "prsgdm"), key=lambda run: run.seed)
        rows[last] |= {"status": "diverged", "train_loss": None}
        (line,) = agreement.at_the_same_rate(4, rows, SCALE)[2:]
        assert "| 32 | +0.2500 (2) | +0.2000 | +0.2000 | +0.2000 | – |" in line
        only = {run: row for run, row in rows.items() if run.method == "orlomo"}
        assert agreement.at_the_same_rate(2, only, SCALE) == []

    def test_prsgdm_is_read_off_at_the_end_of_orlomo(self):
        rows = self.rows()
        for run, row in rows.items():
            last = 20.0 if run.method == "orlomo" else 40.0
            accuracy = [90.0] * 10 + [95.0] * 10
            row["curve"] |= {"virtual_time": [last * (i + 1) / 20 for i in range(20)]}
            row["curve"] |= {"test_accuracy": accuracy}
        lines = agreement.at_the_same_time(2, rows, SCALE)
        assert lines[2:] == ["| digits | unequal | 16 | 32 | 95.00 | 90.00 | 95.00 | 2.00× |"]
        assert agreement.at_the_same_time(2, self.rows(), SCALE) == []  # too few points
        for run, row in rows.items():  # PRSGDm is not evaluated before OrLoMo ends
            row["curve"]["virtual_time"] = [1.0 if run.method == "orlomo" else 2.0] * 20
        assert "| 95.00 | nan | 95.00 |" in agreement.at_the_same_time(2, rows, SCALE)[2]

    def test_prsgdm_planned_for_the_time_of_orlomo(self):
        rows = self.rows(orlomo=90, prsgdm=88)
        (line,) = agreement.planned_for_the_same_time(2, rows, SCALE)[2:]
        numbers = "90.10 ± 0.10 | 88.10 ± 0.10 | +2.0 | ahead | 1.00×"
        assert line == f"| digits | unequal | 16 | 32 | 200 | {numbers} |"
        (line,) = agreement.planned_for_the_same_time(4, rows, SCALE)[2:]
        assert line.endswith(" | 0.0110 ± 0.0100 | 0.0110 ± 0.0100 | 0.0000 | level | 1.00× |")
        last = max((run for run in rows if run.method == "prsgdm"), key=lambda run: run.seed)
        del rows[last]
        assert agreement.planned_for_the_same_time(2, rows, SCALE) == []

    def test_cells_without_runs_can_be_shown_as_empty(self):
        assert report.table_lines(2, {}, tables.SCALES["paper"]) == []
        lines = report.table_lines(2, {}, tables.SCALES["paper"], empty=True)
        (line,) = [x for x in lines if x.startswith("| heterogeneous | 16 | 32 | – / 89.76")]
        assert line.endswith("| – / 90.15 ± 0.23 | – | OrLoMo | – |")

    def test_a_search_that_has_not_ended_is_a_dash(self):
        run = search.cell_of(tables.SCALES["slim"].shrink(tables.table_runs(2)[0]))
        rows = {search.at(run, 0.3): row_of(search.at(run, 0.3))}
        (entry,) = entries(2, rows, tables.SCALES["slim"])
        assert readme.both_metrics(entry) == "–"


def test_one_delayed_worker_reports_as_late_as_asked():
    run = replace(Run(scenario="one_delayed", max_delay=1905, local_iterations=8), epochs=1)
    trace = run.trace(15_625)
    late = trace.delays[trace.workers == 15]
    assert late.max() == trace.max_delay == 1905
    assert len(late) == 15_625 // 1906
    assert trace.delays[trace.workers != 15].max() < 50

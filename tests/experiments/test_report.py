"""The report, and the comparison with the paper: on made-up rows."""

from dataclasses import replace

import pytest

from experiments import readme, report
from experiments.paper import against_prsgdm, agreement, scales, search, tables
from experiments.paper.entries import entries
from orlomo_jax import ArrivalTrace
from tests.experiments.paper_rows import SCALE, fill, row_of


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
        assert against_prsgdm.at_the_same_time(2, rows, SCALE) == []

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
        (line,) = against_prsgdm.at_the_same_rate(2, rows, SCALE)[2:]
        assert line == "| digits | unequal | 16 | 32 | +2.0 (3) | +2.0 | +2.0 | +2.0 | – |"
        for run, row in rows.items():
            row["train_loss"] = 0.1 if run.method == "orlomo" else 0.3 + 0.1 * run.seed
        last = max((run for run in rows if run.method == "prsgdm"), key=lambda run: run.seed)
        rows[last] |= {"status": "diverged", "train_loss": None}
        (line,) = against_prsgdm.at_the_same_rate(4, rows, SCALE)[2:]
        assert "| 32 | +0.2500 (2) | +0.2000 | +0.2000 | +0.2000 | – |" in line
        only = {run: row for run, row in rows.items() if run.method == "orlomo"}
        assert against_prsgdm.at_the_same_rate(2, only, SCALE) == []

    def test_prsgdm_is_read_off_at_the_end_of_orlomo(self):
        rows = self.rows()
        for run, row in rows.items():
            last = 20.0 if run.method == "orlomo" else 40.0
            accuracy = [90.0] * 10 + [95.0] * 10
            row["curve"] |= {"virtual_time": [last * (i + 1) / 20 for i in range(20)]}
            row["curve"] |= {"test_accuracy": accuracy}
        lines = against_prsgdm.at_the_same_time(2, rows, SCALE)
        assert lines[2:] == ["| digits | unequal | 16 | 32 | 95.00 | 90.00 | 95.00 | 2.00× |"]
        assert against_prsgdm.at_the_same_time(2, self.rows(), SCALE) == []  # too few points
        for run, row in rows.items():  # PRSGDm is not evaluated before OrLoMo ends
            row["curve"]["virtual_time"] = [1.0 if run.method == "orlomo" else 2.0] * 20
        assert "| 95.00 | nan | 95.00 |" in against_prsgdm.at_the_same_time(2, rows, SCALE)[2]

    def test_prsgdm_planned_for_the_time_of_orlomo(self):
        rows = self.rows(orlomo=90, prsgdm=88)
        (line,) = against_prsgdm.planned_for_the_same_time(2, rows, SCALE)[2:]
        numbers = "90.10 ± 0.10 | 88.10 ± 0.10 | +2.0 | ahead | 1.00×"
        assert line == f"| digits | unequal | 16 | 32 | 200 | {numbers} |"
        (line,) = against_prsgdm.planned_for_the_same_time(4, rows, SCALE)[2:]
        assert line.endswith(" | 0.0110 ± 0.0100 | 0.0110 ± 0.0100 | 0.0000 | level | 1.00× |")
        last = max((run for run in rows if run.method == "prsgdm"), key=lambda run: run.seed)
        del rows[last]
        assert against_prsgdm.planned_for_the_same_time(2, rows, SCALE) == []

    def test_a_barrier_splits_the_difference_between_orlomo_and_prsgdm(self):
        scale, rows = scales.SCALES["barrier"], {}
        cells = "workers=16,local_iterations=16,scenario=homogeneous,dataset=cifar10"
        values = {"orlomo": 60.0, "barrier": 61.0, "prsgdm": 63.0}
        runs = {x.method: scale.shrink(x) for x in tables.select(tables.table_runs(2), cells)}
        kinds = {"barrier": runs["orlomo"], "prsgdm": runs["prsgdm"]}
        kinds["orlomo"] = replace(runs["orlomo"], staleness_bound=0)
        for kind, run in kinds.items():
            for rate, seeds in ((0.1, 1), (0.3, 3), (1.0, 2)):
                for seed in range(seeds + (kind == "prsgdm")):
                    done = search.at(run, rate, seed)
                    rows[done] = row_of(done, loss=100 - values[kind] - seed)
        rows[search.at(runs["prsgdm"], 1.0, 1)] |= {"status": "diverged"}
        lines = against_prsgdm.with_a_barrier(2, rows, scale)[2:]
        place = "| cifar10 | equal | 16 | 16 |"
        assert lines == [
            f"{place} 0.1 | 1 | 60.00 | 61.00 | 63.00 | +1.00 | +2.00 |",
            f"{place} 0.3 | 3 | 61.00 | 62.00 | 64.00 | +1.00 | +2.00 |",
            f"{place} 1 | 1 | 60.00 | 61.00 | 63.00 | +1.00 | +2.00 |",
        ]
        first = against_prsgdm.with_a_barrier(4, rows, scale)[2]
        assert first.endswith(" | 40.0000 | 39.0000 | 37.0000 | +1.0000 | +2.0000 |")
        only = {run: row for run, row in rows.items() if not run.staleness_bound}
        assert against_prsgdm.with_a_barrier(2, only, scale) == []

    def test_cells_without_runs_can_be_shown_as_empty(self):
        assert report.table_lines(2, {}, scales.SCALES["paper"]) == []
        lines = report.table_lines(2, {}, scales.SCALES["paper"], empty=True)
        (line,) = [x for x in lines if x.startswith("| heterogeneous | 16 | 32 | – / 89.76")]
        assert line.endswith("| – / 90.15 ± 0.23 | – | OrLoMo | – |")

    def test_a_search_that_has_not_ended_is_a_dash(self):
        run = search.cell_of(scales.SCALES["slim"].shrink(tables.table_runs(2)[0]))
        rows = {search.at(run, 0.3): row_of(search.at(run, 0.3))}
        (entry,) = entries(2, rows, scales.SCALES["slim"])
        assert readme.both_metrics(entry) == "–"

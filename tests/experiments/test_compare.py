"""The comparison of methods: what is run, what resumes, what is refused, what is reported."""

import re
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import compare, records
from experiments.comparison import clusters, report, runs, tasks
from orlomo_jax import from_loss, sample_trace
from orlomo_jax.traces import per_worker_times

SMALL = (
    "--methods orlomo fedbuff --compute-times one_slow --local-steps 2 --num-gradients 240 "
    "--learning-rates 0.05 0.2 --eta-factors 1 --seeds 2 --batch-size 4"
)


def run(out, more=""):
    compare.main([*SMALL.split(), *more.split(), "--out", str(out)])
    return records.read(out / "rows.jsonl")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare")
    return out, run(out)


@pytest.mark.slow
class TestRuns:
    def test_every_method_gets_the_same_budget(self, finished):
        _, rows = finished
        for method in ("orlomo", "fedbuff"):
            own = [row["setting"] for row in rows if row["setting"]["method"] == method]
            assert [s["purpose"] for s in own] == ["tuning"] * 2 + ["final"] * 2
            assert {s["seed"] for s in own if s["purpose"] == "tuning"} == {0}
            assert {s["seed"] for s in own if s["purpose"] == "final"} == {1, 2}
        final = [row for row in rows if row["setting"]["purpose"] == "final"]
        assert {row["curve"]["gradients"][-1] for row in final} == {240}

    def test_finished_rows_are_not_run_again(self, finished, monkeypatch):
        out, rows = finished
        monkeypatch.setattr(runs, "carry_out", None)
        assert run(out) == rows

    def test_a_sweep_has_the_rows_of_single_runs(self, tmp_path):
        """Two η are arguments of one program; for PRSGDm and HeLoCo each is in the program."""
        more = "--methods orlomo prsgdm heloco --eta-factors 0.5 1"
        rows = run(tmp_path, f"{more} --partition iid classes:3")
        tuning = {"orlomo": 4, "prsgdm": 2, "heloco": 2}
        for row in rows:
            setting = row["setting"]
            final = 2 if setting["partition"] == "iid" else 1  # each seed has its own partition
            shared = tuning[setting["method"]] if setting["purpose"] == "tuning" else final
            assert row["together"] == shared
        config = compare.Config(
            **vars(compare.Config())
            | {
                "methods": ("orlomo", "prsgdm", "heloco"),
                "local_steps": ("2",),
                "num_gradients": 240,
                "learning_rates": (0.05, 0.2),
                "eta_factors": (0.5, 1.0),
                "batch_size": 4,
            }
        )
        comparison = compare.Comparison(config)
        known = {runs.Setting(**row["setting"]): row for row in rows}
        jobs = [job for candidate in comparison.candidates for job in comparison.tuning(*candidate)]
        assert len(jobs) == 12
        for job in jobs:
            ((row,),) = runs.carry_out([job])
            assert row["loss"] == pytest.approx(known[job.setting]["loss"], rel=1e-4)

    def test_an_interrupted_comparison_gives_the_same_rows(self, finished, tmp_path):
        out, rows = finished
        lines = (out / "rows.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "rows.jsonl").write_text("".join(lines[:5]) + lines[5][:20])
        again = run(tmp_path)

        def timeless(row):
            return {k: value for k, value in row.items() if k not in ("wall_time", "together")}

        assert list(map(timeless, again)) == list(map(timeless, rows))

    def test_another_cluster_is_run_anew(self, finished):
        out, _ = finished
        config = compare.Config(methods=("fedbuff",), local_steps=("2",), variation=0.1)
        (cluster,) = config.clusters()
        comparison = compare.Comparison(replace(config, num_gradients=240))
        settings = {job.setting for job in comparison.tuning("fedbuff", "2", cluster)}
        assert not settings & set(runs.Book(out / "rows.jsonl").rows)

    def test_methods_draw_the_same_compute_times(self):
        cluster = clusters.named_cluster("halos_16", 4, variation=0.5)
        make = [clusters.make(name, 16, 8, 1.0, "sgd") for name in ("orlomo", "fedbuff", "diloco")]
        free, buffered, barrier = (cluster.arrivals(method, 4096, seed=3) for method in make)
        assert np.array_equal(free.times, buffered.times)
        first = [trace.times[trace.rounds == 0].min() for trace in (free, barrier)]
        assert first[0] == first[1]

    def test_local_steps_that_differ_keep_the_number_of_gradients(self):
        cluster = clusters.cluster_of_speeds((1, 1, 2, 4), 0.1)
        steps = cluster.local_steps("dynamic:8")
        assert steps == (2, 2, 4, 8)
        method = clusters.make("al_sgd", 4, steps, 1.0, "adamw")
        trace = cluster.arrivals(method, 500, seed=0)
        assert 492 < np.array(steps)[trace.workers].sum() <= 500

    def test_a_recorded_trace_gives_its_speeds(self, tmp_path):
        model = per_worker_times([1.0, 3.0], variation=0.0)
        sample_trace(model, 2, 60, 4, seed=0).save(tmp_path / "trace.json")
        cluster = clusters.cluster_of_trace(tmp_path / "trace.json", 4)
        assert cluster.compute_times.mean_times(2).tolist() == pytest.approx([1.0, 3.0])

    def test_every_method_can_be_made(self):
        assert set(clusters.DEFAULTS) == set(clusters.ALL_METHODS)
        for name in clusters.ALL_METHODS:
            for factor in (1.0, 3.0):
                for optimizer in clusters.OPTIMIZERS:
                    assert clusters.make(name, 4, 8, factor, optimizer).name == name

    def test_data_are_drawn_from_a_workers_own_examples(self):
        labels = np.arange(40) % 4
        make = tasks.partitioned(jnp.asarray(labels), labels, batch_size=50)
        batch_fn = make(2, 3, "classes:2", 0)
        parts = tasks.partition_of(labels, 2, "classes:2", 0)
        for worker, part in enumerate(parts):
            batch = batch_fn(jax.random.key(0), worker, 1)
            assert batch.shape == (3, 50)
            assert set(batch.ravel().tolist()) == set(labels[part].tolist())


def broken_task():
    loss = from_loss(lambda params, batch: jnp.log(params - batch).sum())
    return tasks.Task(
        loss, jnp.zeros(2), lambda p, s: {"loss": p.sum()}, lambda k, w, r: jnp.ones((2, 2))
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--methods nothing", "`methods` must be all or of orlomo, .*, got 'nothing'"),
        ("--compute-times nowhere", "`compute_times` must be of equal, .*'nowhere'"),
        ("--partition some", "`partition` must be iid, .*'some'"),
        ("--partition dirichlet:x", "`partition` must be iid, .*'dirichlet:x'"),
        ("--local-steps often", "`local_steps` must be an integer, .*'often'"),
        ("--task unknown", "`task` must be quadratic, .*'unknown'"),
        ("--task nowhere:task", "`task` 'nowhere:task' cannot be loaded"),
        ("--optimizer lion", "`optimizer` must be sgd or adamw, .*'lion'"),
        ("--eta-factors 1 1", "`eta_factors` must be distinct"),
        ("--eta-factors nan", "`eta_factors` must be distinct, finite and > 0, .*nan"),
        ("--learning-rates inf", "`learning_rates` must be distinct, finite and > 0, .*inf"),
        ("--methods al_sgd al_sgd", "`methods` must be distinct"),
        ("--compute-times equal equal", "`compute_times` must be distinct"),
        ("--local-steps 8 8", "`local_steps` must be distinct"),
        ("--partition iid iid", "`partition` must be distinct"),
        ("--time nan", "`time` must be finite and > 0, got time=nan"),
        ("--time 0", "`time` must be finite and > 0, got time=0"),
        ("--speeds 1 0", "`speeds` must be finite and > 0"),
        ("--speeds 1 nan", "`speeds` must be finite and > 0"),
        ("--num-gradients 4", "`num_gradients` must give each of 4 workers a report"),
        (f"--task {__name__}:broken_task", "is not finite at its first parameters"),
    ],
)
def test_bad_settings_end_in_one_sentence(options, message, tmp_path, monkeypatch, capsys):
    module = type("Module", (), {"broken_task": staticmethod(broken_task)})
    monkeypatch.setitem(sys.modules, __name__, module)
    with pytest.raises(SystemExit) as end:
        run(tmp_path, options)
    shown = f"{end.value} {capsys.readouterr().err}"  # tyro prints errors in a box
    assert re.search(message, " ".join(shown.replace("│", " ").split()))
    assert not (tmp_path / "rows.jsonl").exists()


class TestReport:
    @pytest.mark.slow
    def test_the_files_are_there_and_the_best_is_named(self, finished, capsys):
        out, rows = finished
        run(out)
        (cell,) = report.cells(rows, None)
        best = cell.entries[0]
        assert best.mean <= cell.entries[1].mean
        answer = f"{best.method} with S = 2 has the lowest loss"
        assert answer in capsys.readouterr().out
        assert answer in (out / "report.md").read_text()
        for name in ("ranking", "curves", "sensitivity"):
            assert (out / f"{name}.png").stat().st_size > 1000

    def test_methods_that_are_the_same_share_the_answer(self):
        rows = {"status": "finished", "curve": {"time": [1.0], "loss": [2.0]}}
        entries = [report.Entry(name, "8", None, "", [rows], [2.0]) for name in ("al_sgd", "twin")]
        entries.append(report.Entry("worse", "8", None, "", [rows], [3.0]))
        setting = runs.Setting(
            *("quadratic", "equal", 4, "8", "iid", "sgd", 16, 100, "", 0.0, 0.0, 0, "", "")
        )
        answer = report.Cell(setting, 1.0, entries).answer()
        assert "al_sgd (the same as twin here) with S = 8 has the lowest loss" in answer
        assert "the next is worse" in answer

    def test_a_divergent_point_is_never_the_best(self):
        def row(rate, loss):
            return {"setting": {"learning_rate": rate, "eta_factor": 1.0}, "loss": loss}

        rows = [row(0.1, 2.0), row(0.1, 4.0), row(0.5, 0.1), row(0.5, None)]
        assert runs.best_point(rows) == (0.1, 1.0)
        assert runs.best_point(rows[2:]) is None

    def test_the_loss_at_a_time_lies_between_two_evaluations(self):
        row = {"status": "finished", "curve": {"time": [1.0, 2.0], "loss": [5.0, 4.0]}}
        assert [runs.loss_at(row, t) for t in (0.5, 1.0, 1.5, 7.0)] == [None, 5.0, 4.5, 4.0]
        assert runs.loss_at(row | {"status": "diverged"}, 7.0) is None

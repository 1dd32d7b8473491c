import json
from dataclasses import replace

import numpy as np
import pytest

from experiments import records
from experiments.language import study, study_report
from experiments.language.study import ARMS, CLUSTERS, SEEDS, Job, missing


def simulated_rows(arms, stop=None, loss=lambda job: 1.0):
    """Return rows as if runs had this loss, and the jobs in order."""
    rows, jobs = {}, []
    for job in missing(arms, rows):
        if job == stop:
            break
        rows[job.key] = {"loss": loss(job)}
        jobs.append(job)
    return rows, jobs


def test_every_method_gets_equally_many_trials():
    assert {len(study.tuning(arm)) for arm in ARMS} == {6}
    assert all(job.seed not in SEEDS for arm in ARMS for job in study.tuning(arm))


def test_runs_follow_the_tuning_and_none_is_missing_or_repeated():
    _, jobs = simulated_rows(ARMS)
    assert len({job.key for job in jobs}) == len(jobs)
    for arm in ARMS:
        own = [job for job in jobs if job.arm is arm]
        assert [job.purpose for job in own[:6]] == ["tuning"] * 6
        final = [job for job in own if job.purpose == "study"]
        clusters = set(CLUSTERS) - (set(arm.same_on) if arm.reference else set())
        assert len(final) == len(SEEDS) * len(clusters)
    assert [job.cluster for job in jobs[30:55]] == ["equal"] * 25  # the five main methods first


def test_the_lowest_loss_is_chosen_and_divergence_never_is():
    best = Job(ARMS[1], "tuning", "equal", study.TUNING_SEED, 0.01, 2.0)
    rows, jobs = simulated_rows(ARMS[1:2], loss=lambda job: None if job.rate < 0.01 else 2.0)
    rows[best.key]["loss"] = 1.5
    assert study.chosen(ARMS[1], rows) == (0.01, 2.0)
    del rows[best.key]
    assert study.chosen(ARMS[1], rows) is None
    assert all(job.rate == 0.01 for job in jobs if job.purpose == "study")


def test_a_stopped_study_resumes():
    _, jobs = simulated_rows(ARMS[:2])
    rows, done = simulated_rows(ARMS[:2], stop=jobs[20])
    rest = []
    for job in missing(ARMS[:2], rows):
        rows[job.key] = {"loss": 1.0}
        rest.append(job)
    assert done + rest == jobs


def test_each_job_is_a_valid_run():
    for job in simulated_rows(ARMS)[1]:
        run = job.run()
        assert run.num_reports == (300 if job.purpose == "tuning" else 600) // (
            4 if job.arm.name == "data_parallel" else 1
        )
        assert (run.buffer_size is None) == (not job.arm.buffer)
        run.make_method(run.cluster())


def test_gaps_are_paired_by_seed():
    losses, reference = {0: 1.51, 1: 1.62, 2: 9.0}, {0: 1.5, 1: 1.6, 3: 0.0}
    middle, low, high = study_report.gap(losses, reference)
    half = study_report.QUANTILES[0] * np.std([0.01, 0.02], ddof=1) / np.sqrt(2)
    np.testing.assert_allclose(middle, 100 * np.expm1(0.015))
    np.testing.assert_allclose([low, high], 100 * np.expm1([0.015 - half, 0.015 + half]))
    assert study_report.gap({0: 1.0}, {0: 1.0}) is None


@pytest.mark.slow
def test_rows_become_tables_and_figures(tmp_path, monkeypatch):
    tiny = {"size": "tiny", "text": tuple(records.RESULTS.parent.glob("*.py"))}
    arms = [arm._replace(settings=arm.settings | tiny) for arm in (*ARMS[:2], ARMS[5])]
    path = tmp_path / "rows.jsonl"
    for arm in arms:
        for seed, cluster in ((0, "equal"), (1, "equal"), (0, "forgather_4to1")):
            job = Job(arm, "study", cluster, seed, 0.01, 1.0)
            if not arm.reference or cluster == "equal":
                run = replace(job.run(), num_reports=8 if arm.name != "data_parallel" else 2)
                monkeypatch.setattr(Job, "run", lambda self, run=run: run)
                records.append(path, study.carry_out(job))
                monkeypatch.undo()
    study.main(["--report", "--output", str(path)])
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert (tmp_path / "curves.png").exists()
    equal, unequal = report.split("## forgather_4to1")
    assert equal.count("| 2 |") == 3
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    sync = next(row for row in rows if row["arm"] == "diloco" and row["seed"] == 0)
    slower = study_report.curve(sync, "forgather_4to1")["virtual_time"]
    own = study_report.curve(sync, "equal")["virtual_time"]
    assert slower.shape == own.shape
    assert not np.allclose(slower, own)
    np.testing.assert_array_equal(own, sync["curve"]["virtual_time"])
    assert "delay_lookahead" in unequal

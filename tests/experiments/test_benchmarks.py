"""The benchmarks run, and their rows become a table and a plot."""

import sys
import time
from pathlib import Path

import pytest

from experiments import records, report
from experiments.benchmarks import chart, first_step, measure, simulator
from experiments.benchmarks.__main__ import GROUPS, main

ENVIRONMENT = {"device": "cpu", "cpus": 2, "jax": "1", "jaxlib": "1", "python": "3"}


def row(ratio=1.5, bar=1.2, **changes):
    fields = measure.Row("a step", 3.0, 2.0, "GB/s", "np.add", ratio, bar)._asdict()
    return {"group": "server_step", **fields, "environment": ENVIRONMENT} | changes


def test_pairs_are_timed_in_turn(monkeypatch):
    """The ratio is the median over pairs: a disturbance of whole pairs leaves it alone."""
    now = iter([0, 0, 0, 2, 0, 1, 0, 20, 0, 10, 0, 2, 0, 1])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(now))
    calls = []
    next(now), next(now)
    (timing,) = measure.in_turn(3, lambda: calls.append(1), lambda: calls.append(2))
    assert calls == [1, 2] * 4
    assert timing == measure.Timing(2, 1, 0.5)


@pytest.mark.slow
def test_rows_are_appended_with_device_and_versions(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    main(["--only", "startup", "--repeats", "1", "--output", str(path)])
    written, without_garbage = records.read(path)
    assert written["group"] == without_garbage["group"] == "startup"
    assert written["benchmark"] == "import orlomo_jax"
    assert written["ratio"] == pytest.approx(50 / written["figure"])
    assert {"device", "cpus", "jax", "jaxlib", "python"} <= written["environment"].keys()
    assert "import orlomo_jax" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("group", ["simulator", "optimizers", "uneven", "axes", "sweep", "threads"])
def test_a_group_runs_to_its_end(group):
    rows = list(GROUPS[group](1))
    assert rows
    assert all(row.ratio > 0 for row in rows)


@pytest.mark.parametrize(
    ("args", "message"),
    [(["--only", "nothing"], "--only must be of"), (["--repeats", "0"], "--repeats must be ≥ 1")],
)
def test_bad_arguments(args, message):
    with pytest.raises(SystemExit, match=message):
        main(args)


@pytest.mark.slow
def test_appfl_is_timed_by_a_python_of_its_own(tmp_path, monkeypatch):
    stand_in = tmp_path / "job.py"
    stand_in.write_text("import sys; print(int(sys.argv[1]) / (2 if sys.argv[2] == 'True' else 4))")
    monkeypatch.setattr(simulator, "APPFL_JOB", stand_in)
    monkeypatch.setattr(simulator, "seconds", lambda run: 10.0)
    rows = list(simulator.against_appfl(1, Path(sys.executable)))
    assert [(row.figure, row.limit, row.ratio) for row in rows] == [(100, 2, 50), (100, 4, 25)]


@pytest.mark.parametrize("python", ["/nowhere/python", sys.executable])
def test_a_python_without_appfl_is_refused(python):
    with pytest.raises(SystemExit, match="--appfl must be a Python with APPFL"):
        main(["--only", "startup", "--appfl", python])


def test_the_first_start_has_an_empty_folder_and_the_second_its_programs(monkeypatch):
    seconds, folders = iter([8.0, 2.0, 9.0, 3.0] * 2), []

    def start(code, folder):
        folders.append((folder, list(Path(folder).iterdir())))
        (Path(folder) / "program").touch()
        return next(seconds)

    monkeypatch.setattr(first_step, "seconds_to_first_step", start)
    quickstart, resnet = first_step.first_step(2)
    assert (quickstart.figure, quickstart.limit, quickstart.ratio) == (2.5, 8.5, 3.5)
    assert "ResNet20" in resnet.benchmark
    assert [len(kept) for _, kept in folders] == [0, 1] * 4
    assert len({folder for folder, _ in folders}) == 4


@pytest.mark.slow
def test_a_command_is_timed_until_its_first_step(tmp_path):
    _, settings, evaluate_every = first_step.RUNS[0]
    code = first_step.COMMAND.format(run=settings, evaluate_every=evaluate_every)
    start = time.time()
    seconds = first_step.seconds_to_first_step(code, str(tmp_path))
    assert 0 < seconds <= time.time() - start
    kept = sorted((tmp_path / "orlomo_jax" / "compiled").iterdir())
    assert any(path.name.startswith("jit_run-") for path in kept)
    first_step.seconds_to_first_step(code, str(tmp_path))
    assert sorted((tmp_path / "orlomo_jax" / "compiled").iterdir()) == kept


def test_every_group_is_documented():
    assert all(group.__doc__ for group in GROUPS.values())


def test_report_draws_the_newest_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    for entry in (row(ratio=0.1), row(), row(benchmark="another", ratio=0.5, bar=None)):
        records.append(path, entry)
    report.main(["--benchmarks", str(path)])
    text = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    assert "| a step | 3 | 2 (np.add) | GB/s | 1.50 | ≥ 1.20 |" in text
    assert "| another | 3 | 2 (np.add) | GB/s | 0.50 |  |" in text
    assert "0.10" not in text
    assert "cpu, 2 processors, jax 1" in text
    for suffix in ("png", "svg"):
        assert (tmp_path / f"benchmarks.{suffix}").stat().st_size > 1000


def test_report_without_rows(tmp_path):
    with pytest.raises(SystemExit, match="no rows in"):
        report.main(["--benchmarks", str(tmp_path / "rows.jsonl")])


def test_newest_keeps_devices_apart():
    other = row(environment=ENVIRONMENT | {"device": "gpu"})
    assert len(chart.newest([row(), row(ratio=2.0), other])) == 2

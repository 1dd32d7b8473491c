"""The benchmarks of a GPU, rehearsed on a CPU at a tiny size."""

import gzip
import json
import os
import subprocess
import sys

import pytest

from experiments import records
from experiments.benchmarks import chart, gpu, gpu_profile, stages
from experiments.benchmarks.__main__ import GPU_GROUPS, main
from experiments.benchmarks.gpu_training import TINY, Sizes
from experiments.benchmarks.measure import Row
from experiments.benchmarks.stages import Stage

ROW = Row("a step", 3.0, 2.0, "GB/s", "a copy", 1.5)


@pytest.fixture
def planned(monkeypatch):
    """Run stages of the test's own."""
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    return lambda *made: monkeypatch.setattr(gpu, "stages", lambda sizes: list(made))


def stage(name, seconds=0.0, rows=lambda: [ROW], after=""):
    return Stage("limits", name, seconds, rows, after)


@pytest.mark.slow
def test_a_tiny_run_measures_everything(tmp_path):
    """In a process of its own: it chooses how hard XLA optimises."""
    path = tmp_path / "rows.jsonl"
    run = [sys.executable, "-m", "experiments.benchmarks", "--gpu", "--tiny", "--budget", "1000"]
    subprocess.run([*run, "--output", str(path)], check=True, stdout=subprocess.DEVNULL)
    rows = records.read(path)
    names = [(row["group"], row["benchmark"].partition(": ")[2]) for row in rows]
    of_a_group = lambda group: [name for other, name in names if other == group]  # noqa: E731
    assert [row["benchmark"].partition(",")[0] for row in rows[:7]] == [
        "copy on the device",
        *["product of 64² matrices"] * 3,
        *["server step"] * 3,
    ]
    assert of_a_group("resnet") == [
        f"{axis}, {form}, {dtype}{images}"
        for axis, dtypes in (
            ("loop", ("float32", "bfloat16")),
            ("vmap", ("float32",)),
            ("vmap", ("bfloat16",)),
        )
        for dtype in dtypes
        for form in ("xla", "matmul")
        for images in ("", ", images")
    ]
    assert of_a_group("gradients") == [
        f"loop, {form}, float32, time in gradients" for form in ("xla", "matmul")
    ]
    assert all(row["figure"] > 0 and row["ratio"] > 0 for row in rows)
    assert len(chart.newest(rows)) == len(rows)
    assert len(chart.table(rows)) == len(rows) + 5


def test_full_size_has_the_stages_of_the_tiny_one_and_more():
    full, tiny = gpu.stages(Sizes()), gpu.stages(TINY)
    assert {made.group for made in full} == {made.group for made in tiny} == set(GPU_GROUPS)
    assert len(full) == len(tiny) + 3  # a second number of parameters
    names = [made.name for made in full]
    assert len(set(names)) == len(names)
    assert all(not made.after or made.after in names[: names.index(made.name)] for made in full)


def test_what_does_not_fit_is_left_out(capsys, planned):
    """And what needs it; the rest runs."""
    planned(
        stage("first", 9),
        stage("compile", 11),
        stage("compiled", 1, after="compile"),
        stage("last", 9),
    )
    main(["--gpu", "--tiny", "--budget", "10"])
    said = capsys.readouterr().out
    assert said.count("a step: ratio 1.50") == 2
    assert [line.split(":")[1] for line in said.splitlines() if line.startswith("left out")] == [
        " compile",
        " compiled",
    ]


def test_the_budget_counts_what_has_passed(monkeypatch):
    now = iter([0, 0, 6, 20])
    monkeypatch.setattr(stages.time, "perf_counter", lambda: next(now))
    missed = stages.Missed([], [])
    made = [stage("first", 5), stage("second", 5), stage("third", 5)]
    assert len(list(stages.run(made, 10, missed))) == 1
    assert missed.left_out == ["second: 4 s were left", "third: -10 s were left"]


def test_rows_of_a_killed_run_stay(tmp_path, planned):
    def killed():
        yield ROW
        raise KeyboardInterrupt

    path = tmp_path / "rows.jsonl"
    planned(stage("first"), stage("second", rows=killed))
    with pytest.raises(KeyboardInterrupt):
        main(["--gpu", "--tiny", "--output", str(path)])
    assert [row["benchmark"] for row in records.read(path)] == ["a step", "a step"]


def test_a_failing_stage_leaves_the_others_alone(tmp_path, planned):
    def failing():
        raise RuntimeError("out of memory")

    path = tmp_path / "rows.jsonl"
    planned(stage("bad", rows=failing), stage("on it", after="bad"), stage("good"))
    with pytest.raises(SystemExit, match="bad: RuntimeError: out of memory"):
        main(["--gpu", "--tiny", "--output", str(path)])
    assert len(records.read(path)) == 1


def test_only_some_groups(planned, capsys):
    planned(stage("first"), stage("second")._replace(group="resnet"))
    main(["--gpu", "--tiny", "--only", "resnet"])
    assert capsys.readouterr().out.count("a step: ratio") == 1
    with pytest.raises(SystemExit, match="--only must be of limits"):
        main(["--gpu", "--tiny", "--only", "startup"])


def test_a_cpu_does_the_tiny_size_alone():
    with pytest.raises(SystemExit, match="--gpu needs a GPU"):
        main(["--gpu"])


def test_kernels_of_a_profile(tmp_path, monkeypatch, capsys):
    def named(kind, pid, name, **fields):
        return {"ph": "M", "name": kind, "pid": pid, "args": {"name": name}, **fields}

    def event(pid, tid, dur, **args):
        return {"ph": "X", "pid": pid, "tid": tid, "name": "fusion", "dur": dur, "args": args}

    events = [
        named("process_name", 1, "/device:GPU:0 (NVIDIA H100)"),
        named("thread_name", 1, "Stream #7(Compute)", tid=7),
        named("thread_name", 1, "XLA Ops", tid=8),
        named("process_name", 2, "/host:CPU"),
        named("thread_name", 2, "Stream", tid=7),
        event(1, 7, 3e6, name="jit(run)/transpose(jvp())/dot_general"),
        event(1, 7, 1e6, name="jit(run)/add"),
        event(1, 8, 9e6),
        event(2, 7, 9e6),
        {"ph": "C", "pid": 1},
    ]

    def trace(folder):
        (folder / "deep").mkdir()
        with gzip.open(folder / "deep" / "host.trace.json.gz", "wt") as file:
            json.dump({"traceEvents": events}, file)

    trace(tmp_path)
    kernels = gpu_profile.kernels(tmp_path)
    assert [kernel.seconds for kernel in kernels] == [3, 1]
    monkeypatch.setattr(gpu_profile, "kernels", lambda folder: kernels)
    busy, gradients = gpu_profile.rows("a run", lambda: None, 5.0)
    assert (busy.figure, busy.limit, busy.ratio) == (4, 5, 0.8)
    assert (gradients.figure, gradients.limit, gradients.ratio) == (3, 4, 0.75)
    monkeypatch.setattr(gpu_profile, "kernels", lambda folder: [])
    assert not list(gpu_profile.rows("a run", lambda: None, 5.0))
    assert "no kernel of a GPU" in capsys.readouterr().out


def test_neither_plots_nor_data_sets_are_imported():
    """A machine lent for a few minutes has little more than JAX."""
    extras = "{'matplotlib', 'sklearn', 'psutil', 'ray', 'tensorflow_datasets', 'PIL', 'torch'}"
    code = (
        "import sys, experiments.benchmarks.__main__, experiments.gpu_programs.__main__; "
        f"print(sorted({extras} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"

"""One training run from the command line: its row, its checkpoints, its errors."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

import orlomo_jax
from experiments import models, parts, records, runner, train
from experiments.config import ComputeOptions, Run
from experiments.data import datasets
from orlomo_jax import ArrivalTrace, Compiled
from orlomo_jax.recording import Arrival, Journal
from orlomo_jax.runtimes import WorkersLostError
from orlomo_jax.server import AuditError

FLAGS = (
    "--dataset digits --model mlp --epochs 12 --batch-size 16 --weight-decay 0 --workers 4 "
    "--local-iterations 4 --evaluate-every 30"
).split()


def metrics(row):
    return {key: value for key, value in row.items() if key not in ("wall_time", "environment")}


@pytest.mark.parametrize("method", ["orlomo", pytest.param("prsgdm", marks=pytest.mark.slow)])
def test_a_run_appends_its_row(tmp_path, capsys, method):
    path = tmp_path / "runs.jsonl"
    train.main([*FLAGS, "--method", method, "--output", str(path)])
    (row,) = records.read(path)
    assert row["status"] == "finished"
    assert row["run"]["method"] == method
    assert row["test_accuracy"] > 50
    assert row["curve"]["step"] == [*range(30, row["num_steps"], 30), row["num_steps"]]
    assert f"{row['test_accuracy']:.2f} %" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_bit(tmp_path):
    """``kill -9`` at some moment after a checkpoint: the row ends as that of an unbroken run."""
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    train.main([*FLAGS, "--output", str(whole)])
    folder = tmp_path / "checkpoints"
    flags = [*FLAGS, "--output", str(broken), "--checkpoint-dir", str(folder)]
    flags += ["--checkpoint-every", "20"]
    environment = os.environ | {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}
    process = subprocess.Popen([sys.executable, "-m", "experiments.train", *flags], env=environment)
    while process.poll() is None and not (folder / "60").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert records.read(broken) == []
    with pytest.raises(SystemExit, match="holds checkpoints: add --resume"):
        train.main(flags)
    with pytest.raises(SystemExit, match=r"run\.json is of a run with another convolution"):
        train.main([*flags, "--resume", "--compute.convolution", "xla"])
    with pytest.raises(SystemExit, match=r"run\.json is of a run with another learning_rate"):
        train.main([*flags, "--resume", "--learning-rate", "0.2"])
    train.main([*flags, "--resume"])
    assert metrics(records.read(broken)[0]) == metrics(records.read(whole)[0])


@pytest.mark.slow
def test_a_real_run_is_repeated_at_a_desk(tmp_path, capsys):
    output, trace = tmp_path / "runs.jsonl", tmp_path / "real.json"
    scenario = ["--scenario", "one_slow", "--slowdown", "3"]
    real = ["--runtime", "threads", "--trace", str(trace), "--audit"]
    train.main([*FLAGS, *scenario, *real, "--output", str(output)])
    assert "share/idle" in capsys.readouterr().out
    train.main([*FLAGS, *scenario, "--replay", str(trace), "--output", str(output)])
    first, again = records.read(output)
    assert first["parameters"] == again["parameters"]
    assert first["real_time"] > 0
    assert first["virtual_time"] > 0
    assert first["health"]["rejected"] == {}


@pytest.mark.parametrize("error", [WorkersLostError, AuditError])
def test_a_real_run_that_breaks_off_says_where_its_arrivals_are(tmp_path, monkeypatch, error):
    def breaks_off(*_, **__):
        raise error("at step 7 something is wrong")

    monkeypatch.setattr(runner, "train", breaks_off)
    flags = ["--runtime", "threads", "--output", str(tmp_path / "runs.jsonl")]
    with pytest.raises(SystemExit, match=r"at step 7 .* are in .*arrivals\.jsonl"):
        train.main([*FLAGS, *flags])
    assert not (tmp_path / "runs.jsonl").exists()


@pytest.mark.slow
def test_what_a_run_that_died_has_left_is_kept(tmp_path, monkeypatch):
    """A new run in its place sets its arrivals aside; a run that goes on is not disturbed."""
    output, trace = tmp_path / "new" / "runs.jsonl", tmp_path / "real.json"
    arrivals = tmp_path / "real.arrivals.jsonl"
    died = Journal({"num_workers": 4, "synchronous": False}, arrivals)
    died.arrived(Arrival(0, 0, 0, time=1.0, loss=2.0))
    flags = [*FLAGS, "--runtime", "threads", "--trace", str(trace), "--output", str(output)]
    with pytest.raises(SystemExit, match="another process is writing"):
        train.main(flags)
    died.close()
    train.main(flags)
    assert len(Journal.load(f"{arrivals}.old").arrivals) == 1
    row = records.read(output)[0]
    assert len(Journal.load(arrivals).arrivals) == row["num_steps"]
    train.main([*FLAGS, "--replay", str(arrivals), "--trace", str(trace), "--output", str(output)])
    assert arrivals.exists()


def test_arrivals_that_cannot_be_repeated(tmp_path):
    empty, synchronous = tmp_path / "empty.jsonl", tmp_path / "synchronous.json"
    Journal({"num_workers": 4, "synchronous": False}, empty).happened("lost", 0, time=0.0)
    ArrivalTrace.from_workers([0, 1, 2, 3], 4, synchronous=True).save(synchronous)
    nonsense = tmp_path / "nonsense.json"
    nonsense.write_text('{"format": "orlomo_jax.Journal"}\n{"worker": 1}\n')
    for path, message in (
        (empty, "no report to repeat"),
        (synchronous, "synchronous=True"),
        (nonsense, r"nonsense\.json has no arrivals to repeat"),
    ):
        with pytest.raises(SystemExit, match=message):
            train.main([*FLAGS, "--replay", str(path), "--output", str(tmp_path / "runs.jsonl")])


def test_a_row_that_cannot_be_written_is_shown(tmp_path, monkeypatch, capsys):
    def full(path, row):
        raise OSError("No space left on device")

    monkeypatch.setattr(records, "append", full)
    with pytest.raises(SystemExit, match="No space left on device; the run's row is printed above"):
        train.main([*FLAGS, "--output", str(tmp_path / "runs.jsonl")])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert json.loads(rows[0])["status"] == "finished"


def test_checkpoints_of_nobody_are_refused(tmp_path):
    flags = ["--checkpoint-dir", str(tmp_path / "c"), "--output", str(tmp_path / "runs.jsonl")]
    train.main([*FLAGS, *flags, "--checkpoint-every", "50"])
    (tmp_path / "c" / "run.json").unlink()
    with pytest.raises(SystemExit, match=r"run\.json is missing, so these checkpoints"):
        train.main([*FLAGS, *flags, "--resume"])


def test_a_folder_of_an_older_version_lacks_the_newer_settings(tmp_path):
    flags = ["--checkpoint-dir", str(tmp_path / "c"), "--output", str(tmp_path / "runs.jsonl")]
    train.main([*FLAGS, *flags, "--checkpoint-every", "50"])
    claimed = tmp_path / "c" / "run.json"
    settings = json.loads(claimed.read_text())
    older = {name: settings[name] for name in settings if name != "staleness_bound"}
    claimed.write_text(json.dumps(older))
    with pytest.raises(SystemExit, match=r"another staleness_bound$"):
        train.main([*FLAGS, *flags, "--resume", "--staleness-bound", "3"])
    train.main([*FLAGS, *flags, "--resume"])


@pytest.mark.parametrize("content", ["", "[1]", '{"method": "prsg'])
def test_a_damaged_claim_to_a_folder_is_said(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(SystemExit, match=r"run\.json is damaged; remove it"):
        train.main([*FLAGS, "--checkpoint-dir", str(tmp_path), "--output", str(tmp_path / "r")])


@pytest.mark.slow
def test_a_diverged_real_run_leaves_its_row(tmp_path):
    """The norm of its momentum overflows before the momentum does."""
    output = tmp_path / "runs.jsonl"
    flags = "--runtime threads --local-iterations 1 --learning-rate 1e22 --output".split()
    train.main([*FLAGS, *flags, str(output)])
    row = records.read(output)[0]
    assert (row["status"], row["health"]["momentum_norm"]) == ("diverged", None)


def test_without_ray_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match=r"pip install 'orlomo-jax\[ray\]'"):
        train.main([*FLAGS, "--runtime", "ray", "--output", str(tmp_path / "runs.jsonl")])


def test_tensorboard_logs(tmp_path):
    flags = ["--output", str(tmp_path / "runs.jsonl"), "--tensorboard", str(tmp_path / "logs")]
    train.main([*FLAGS, *flags])
    assert list((tmp_path / "logs").glob("events*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resume"], "--resume needs --checkpoint-dir"),
        (["--epochs", "0.1"], "`epochs` must give each of 4 workers a report"),
        (["--dataset", "cifar10", "--data-dir", "/nowhere"], "cifar10"),
        (["--scenario", "one_delayed", "--method", "prsgdm"], "must not be one_delayed for prsgdm"),
        (["--scenario", "one_delayed", "--runtime", "threads"], "must be one of speeds"),
        (["--scenario", "one_delayed", "--staleness-bound", "9"], "must be 0 for one_delayed"),
        (["--audit"], "--audit needs --runtime threads or ray"),
        (["--compute.worker-axis", "map", "--runtime", "threads"], "compute each round alone"),
        (["--replay", "/nowhere/trace.json"], "No such file"),
        (["--evaluate-every", "0"], "--evaluate-every must be ≥ 1, got 0"),
        (["--checkpoint-dir", "new", "--checkpoint-every", "0"], "`every` must be ≥ 1"),
        (["--model", "resnet8"], "resnet8 needs images"),
        (["--batch-size", "64", "--local-iterations", "30000"], "must be below 2³¹ / 1437"),
        (["--trace", "/dev/null/trace.json"], "File exists"),
        (["--trace", "runs.jsonl"], "--trace must be another file than --output"),
        (["--trace", "."], "cannot be written"),
    ],
)
def test_bad_flags(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        train.main([*FLAGS, *flags, "--output", str(tmp_path / "runs.jsonl")])
    assert not (tmp_path / "runs.jsonl").exists()


def test_a_mistyped_flag_is_refused_with_a_suggestion(capsys):
    with pytest.raises(SystemExit):
        train.main(["--methd", "orlomo"])
    assert "--method" in capsys.readouterr().err


def test_convolutions_are_computed_as_one_says(monkeypatch):
    seen = []

    def make(*args, convolution, **options):
        seen.append(convolution)
        return models.make(*args, **options)

    monkeypatch.setattr(parts, "models", SimpleNamespace(make=make))
    run = Run(model="mlp", dataset="digits", width=0.3)
    for convolution in ("auto", "xla", "matmul", "xla"):
        parts.assemble(run, convolution=convolution)
    assert seen == ["auto", "xla", "matmul"]  # each once


def test_training_images_are_those_that_one_asks_for(monkeypatch):
    seen, batches = [], datasets.shuffled_batches

    def load(*args, **options):
        seen.append((options["augmented"], options["train_size"]))
        return datasets.load(*args, **options)

    monkeypatch.setattr(parts, "datasets", SimpleNamespace(load=load, shuffled_batches=batches))
    run = Run(model="mlp", dataset="digits", width=0.4)
    for changes in ({}, {"augmented": False}, {"train_size": 100}, {}):
        made = parts.assemble(replace(run, **changes))
        assert len(made.train.labels) == changes.get("train_size", 1437)
    assert seen == [(True, 0), (False, 0), (True, 100)]  # each once


@pytest.mark.slow
def test_rounds_that_are_computed_together_give_the_same_run(monkeypatch):
    engines = []

    def simulate(*job, **options):
        engines.append(options["engine"])
        return orlomo_jax.simulate(*job, **options)

    monkeypatch.setattr(runner, "simulate", simulate)
    run = Run(model="mlp", dataset="digits", workers=4, local_iterations=4, epochs=2)
    alone, together = (
        runner.execute(run, compute=compute)[0]
        for compute in (ComputeOptions(), ComputeOptions("vmap", compute_batch=4))
    )
    assert engines == ["auto", Compiled("vmap", max_batch=4)]
    assert together["form"] == {"worker_axis": "vmap", "compute_batch": 4, "convolution": "auto"}
    assert together["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-4)

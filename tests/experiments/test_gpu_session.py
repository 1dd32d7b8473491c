"""A session on a GPU: its commands in order, and the whole of it at a tiny size."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import gpu_session
from experiments.data import packed
from experiments.data.tfds_cache import Arrays, DataError
from experiments.gpu_session import Session


@pytest.fixture
def session(tmp_path):
    images = Arrays(np.zeros((4, 32, 32, 3), np.uint8), np.arange(4, dtype=np.int32))
    packed.write("cifar10", images, images, tmp_path / "data")
    packed.pack("cifar10", tmp_path / "packed", 2, tmp_path / "data")
    return Session(tmp_path / "output", (tmp_path / "packed",), tmp_path / "restored")


def test_data_then_benchmarks_then_cells(session):
    commands = list(gpu_session.steps(session, time.time() + 300))
    assert [command[0] for command in commands] == ["prepare", "benchmarks", "reproduce"]
    options = dict(zip(commands[2][1::2], commands[2][2::2], strict=True))
    assert options["--scale"] == "paper"
    assert 290 <= float(options["--budget"]) <= 300


def test_a_second_call_goes_on_with_the_cells(session):
    packed.unpack(session.packed[0], session.data_dir)
    session.output.mkdir()
    (session.output / "benchmarks.jsonl").write_text("")
    commands = list(gpu_session.steps(session, time.time()))
    assert [command[0] for command in commands] == ["reproduce"]


def test_a_missing_part_is_named_before_anything_runs(session):
    part = next(session.packed[0].glob("*001-of-002"))
    part.unlink()
    with pytest.raises(DataError, match=part.name):
        next(gpu_session.steps(session, time.time()))


@pytest.mark.parametrize(("failing", "ran"), [("prepare", 1), ("benchmarks", 3)])
def test_failures_are_told_and_cells_run_without_benchmarks(session, monkeypatch, failing, ran):
    calls = []

    def run(command):
        calls.append(command)
        return subprocess.CompletedProcess(command, int(command[2] == f"experiments.{failing}"))

    monkeypatch.setattr(gpu_session.subprocess, "run", run)
    assert gpu_session.run(session) == [failing]
    assert len(calls) == ran


@pytest.mark.slow
def test_rehearsal(tmp_path):
    command = [sys.executable, "-m", "experiments.gpu_session", "--rehearse"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 cells complete" in done.stdout

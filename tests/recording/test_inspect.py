"""The command that shows checkpoints, journals and traces, and the format versions of all three."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from orlomo_jax import ArrivalTrace, Checkpointer, from_loss, make_method, simulate
from orlomo_jax.inspect import describe
from orlomo_jax.recording import Arrival, Journal

IDENTITY = {"num_workers": 2, "synchronous": False, "method": "orlomo", "method.rule.beta": "0.9"}


def a_journal(path):
    journal = Journal(IDENTITY, path)
    journal.arrived(Arrival(1, 0, 0, time=0.5, loss=2.0))
    journal.happened("lost", 0, time=0.7, why="killed")
    journal.happened("redispatched", 0, time=0.9)
    journal.refused(0, "stale", "too late", time=1.0)
    journal.arrived(Arrival(0, 1, 1, time=1.5, loss=1.25))
    journal.close()
    return path


def rewritten(path, change):
    """Change the first line of a JSON file."""
    first, *others = path.read_text("utf-8").splitlines(keepends=True)
    path.write_text(json.dumps(change(json.loads(first))) + "\n" + "".join(others), "utf-8")
    return path


def test_a_journal_is_described(tmp_path):
    text = describe(a_journal(tmp_path / "arrivals.jsonl"))
    assert "arrivals.jsonl: format version 1" in text
    assert "2 reports of 2 workers, asynchronous, until second 1.5" in text
    assert "events: 1 lost, 1 redispatched" in text
    assert "       0        1     50.0       2         0.0          0" in text
    assert "rejected reports: 1 stale" in text
    assert "newest loss is 1.25" in text
    assert "method = orlomo" in text
    assert "method.rule.beta" not in text
    assert "method.rule.beta = 0.9" in describe(tmp_path / "arrivals.jsonl", everything=True)
    assert describe(tmp_path).splitlines()[0] == text.splitlines()[0]  # a folder with a journal


def test_checkpoints_are_described_by_the_command(tmp_path):
    method = make_method("orlomo", num_workers=2, num_local_steps=3)
    loss_fn = from_loss(lambda params, batch: jnp.mean((params - batch) ** 2))
    trace = ArrivalTrace.from_workers([0, 1, 0, 0], 2)
    simulate(
        method, loss_fn, lambda key, worker, round: jnp.ones((3, 2)), jnp.zeros(2), trace=trace,
        key=jax.random.key(0), local_learning_rate=0.25, checkpoint=Checkpointer(tmp_path, every=2),
    )  # fmt: skip
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    command = [sys.executable, "-m", "orlomo_jax.inspect"]
    run = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=True)
    for step in (2, 4):
        assert f"{tmp_path / str(step)}: step {step}, format version 1" in run.stdout
    assert f"jax version {jax.__version__}" in run.stdout
    assert "worker 1 holds round 1 of version 2" in run.stdout
    assert 'local_learning_rate = ["0.25"]' in run.stdout
    assert "method.num_local_steps = 3" in run.stdout
    assert before == sorted(str(path) for path in tmp_path.rglob("*"))
    run = subprocess.run([*command, str(tmp_path / "x")], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("error: [Errno 2] No such file")


def test_checkpoints_of_an_own_loop_are_described(tmp_path):
    Checkpointer(tmp_path, every=1).save(7, {"w": jnp.ones(2)}, {"epoch": 1})
    assert "step 7, format version 1\n  written by a loop of your own" in describe(tmp_path)


def test_the_fingerprint_is_that_of_all_settings(tmp_path):
    def fingerprint(**changes):
        path = tmp_path / f"{len(os.listdir(tmp_path))}.jsonl"
        journal = Journal(IDENTITY | changes, path)
        journal.arrived(Arrival(0, 0, 0, time=0.5, loss=2.0))
        journal.close()
        return describe(path).partition("fingerprint ")[2].split()[0]

    assert fingerprint() == fingerprint() == fingerprint(absent=[1])
    assert fingerprint() != fingerprint(**{"method.rule.beta": "0.8"})


def test_a_journal_of_another_format_version_is_refused(tmp_path):
    path = rewritten(a_journal(tmp_path / "a.jsonl"), lambda line: line | {"format_version": 7})
    for read in (describe, Journal.load, lambda path: Journal(IDENTITY, path)):
        with pytest.raises(ValueError, match=r"a.jsonl:1 .*version is 7, but .* reads 1"):
            read(path)


def test_a_journal_without_a_version_is_read_and_continued(tmp_path):
    def without(line):
        assert line.pop("format_version") == 1
        return line

    path = rewritten(a_journal(tmp_path / "a.jsonl"), without)
    assert "format version 1" in describe(path)
    journal = Journal(IDENTITY, path)
    journal.arrived(Arrival(1, 1, 1, time=2.5, loss=1.0))
    journal.close()
    assert len(Journal.load(path).arrivals) == 3


def test_a_trace_of_another_format_version_is_refused(tmp_path):
    path = tmp_path / "trace.json"
    ArrivalTrace.from_workers([0, 1], 2).save(path)
    assert f"trace {path}: format version 1\n  2 reports of 2 workers" in describe(path)
    new = {"version": 2, "unknown field": 1}
    rewritten(path, lambda data: data | new)
    with pytest.raises(ValueError, match=r"trace.json .*format version is 2, but .* reads 1"):
        describe(path)


@pytest.mark.parametrize("read", [describe, lambda folder: Checkpointer(folder, every=1).newest()])
def test_a_checkpoint_of_another_format_version_is_refused(tmp_path, read):
    Checkpointer(tmp_path, every=1).save(7, {"w": jnp.ones(2)}, {"epoch": 1})
    notes = tmp_path / "7" / "notes" / "metadata"
    notes.write_text(json.dumps([7, {"epoch": 1}, 3]))
    with pytest.raises(ValueError, match=r"checkpoint .*7 cannot .*version is 3, but .* reads 1"):
        read(tmp_path)
    notes.write_text(json.dumps([7, {"epoch": 1}]))  # of an early release
    assert "format version 1" in describe(tmp_path)
    assert Checkpointer(tmp_path, every=1).newest().metadata == {"epoch": 1}


@pytest.mark.parametrize(("name", "content"), [("a", b"\xff\0"), ("b.json", b'{"format": "x"}')])
def test_other_files_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="neither a folder of checkpoints, nor a journal, nor a"):
        describe(tmp_path / name)
    with pytest.raises(ValueError, match="contains neither checkpoints nor a journal"):
        describe(tmp_path)


def test_a_damaged_checkpoint_is_named(tmp_path):
    Checkpointer(tmp_path, every=1).save(7, {"w": jnp.ones(2)}, {"epoch": 1})
    (tmp_path / "7" / "notes" / "metadata").write_text("{")
    with pytest.raises(ValueError, match="7 is damaged"):
        describe(tmp_path)

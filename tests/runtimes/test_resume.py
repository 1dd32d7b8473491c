"""Real runs that were killed go on: checkpoints, journals, and what is refused."""

import json
import subprocess
import sys
import time

import jax
import pytest

from orlomo_jax import Checkpointer, Membership
from orlomo_jax.methods import METHOD_NAMES
from orlomo_jax.recording import Journal
from tests.support import helpers
from tests.support.real_runs import Killed, Unreliable, assert_replays, killed_at, run
from tests.support.toy import K


@pytest.mark.slow
@pytest.mark.parametrize("name", METHOD_NAMES)
def test_a_killed_run_loses_nothing_that_was_applied(name, tmp_path):
    applied = []

    def until(step):
        def on_step(record):
            applied.append((record.step, record.worker))
            if record.step == step:
                raise Killed

        return on_step

    for kill_at in (3, 9, 20):
        with pytest.raises(Killed):
            run(name, checkpoint=Checkpointer(tmp_path, every=5), callbacks=[until(kill_at)])
    result = run(name, checkpoint=Checkpointer(tmp_path, every=5))
    orders = dict(applied)
    assert orders == dict(enumerate(result.trace.workers[:20].tolist(), 1)), "the same order"
    assert len(applied) == 3 + (9 - 0) + (20 - 5), "what lies beyond the checkpoint is repeated"
    assert not result.trace.events, "each worker is given the task that it had"
    assert_replays(result, name)
    again = run(name, checkpoint=Checkpointer(tmp_path, every=5), callbacks=[until(1)])
    helpers.assert_trees_equal(again.params, result.params)


@pytest.mark.slow
def test_losses_around_a_checkpoint_are_repeated_too(tmp_path):
    failing = {(0, 1), (1, 2), (2, 2), (1, 3)}
    for step in (6, 12, 18):
        with pytest.raises(Killed):
            run(
                workers=Unreliable(failing),
                checkpoint=Checkpointer(tmp_path, every=4),
                callbacks=[killed_at(step)],
            )
    result = run(workers=Unreliable(failing), checkpoint=Checkpointer(tmp_path, every=4))
    assert len(result.trace.events) >= 8
    assert_replays(result)


def test_a_run_that_dies_while_it_repeats_goes_on(tmp_path):
    """A checkpoint of a repeated step has not seen the events that come later in the journal."""
    failing = {(worker, round) for worker in range(K) for round in (2, 4)}
    workers = Unreliable(failing)
    with pytest.raises(Killed):
        run(
            workers=workers, checkpoint=Checkpointer(tmp_path, every=100), callbacks=[killed_at(25)]
        )
    events = len(Journal.load(tmp_path / "arrivals.jsonl").events)
    with pytest.raises(Killed):
        run(checkpoint=Checkpointer(tmp_path, every=5), callbacks=[killed_at(8)])
    assert Checkpointer(tmp_path, every=5).steps() == [5]
    result = run(checkpoint=Checkpointer(tmp_path, every=5))
    assert len(result.trace.events) >= events >= 4  # a worker may not have had its rounds by then
    assert_replays(result)


def test_a_torn_line_of_the_journal_is_dropped(tmp_path):
    with pytest.raises(Killed):
        run(checkpoint=Checkpointer(tmp_path, every=100), callbacks=[killed_at(8)])
    journal = tmp_path / "arrivals.jsonl"
    journal.write_text(journal.read_text() + '{"worker": 1, "ti')
    torn = journal.stat().st_size
    assert len(Journal.load(journal).arrivals) == 8
    assert journal.stat().st_size == torn, "reading changes nothing"
    result = run(checkpoint=Checkpointer(tmp_path, every=100))
    assert_replays(result)


def test_the_checkpoints_of_another_run_are_refused(tmp_path):
    run(num_steps=6, checkpoint=Checkpointer(tmp_path, every=3))
    with pytest.raises(ValueError, match="got one of another keys"):
        run(num_steps=6, checkpoint=Checkpointer(tmp_path, every=3), key=jax.random.key(1))
    with pytest.raises(ValueError, match="got one of another method"):
        run("al_sgd", num_steps=6, checkpoint=Checkpointer(tmp_path, every=3))
    with pytest.raises(ValueError, match="got one of another local_learning_rate"):
        run(num_steps=6, checkpoint=Checkpointer(tmp_path, every=3), local_learning_rate=0.2)
    with pytest.raises(ValueError, match="`num_steps` must be ≥ 6"):
        run(num_steps=4, checkpoint=Checkpointer(tmp_path, every=3))
    (tmp_path / "arrivals.jsonl").unlink()
    with pytest.raises(ValueError, match="must have the run up to its checkpoint, 6 reports"):
        run(num_steps=6, checkpoint=Checkpointer(tmp_path, every=3))


def test_the_journal_of_another_run_is_refused(tmp_path):
    journal = tmp_path / "arrivals.jsonl"
    run(num_steps=6, journal=journal)
    for name, options, what in (
        ("al_sgd", {}, "another method"),
        ("orlomo", {"key": jax.random.key(1)}, "another keys"),
    ):
        with pytest.raises(ValueError, match=what):
            run(name, num_steps=9, journal=journal, **options)
    result = run(num_steps=9, journal=journal)
    assert_replays(result)
    lines = journal.read_text().splitlines()
    arrival = json.loads(lines[3])  # as if another task's report had been applied
    lines[3] = json.dumps(arrival | {"round": arrival["round"] + 1})
    journal.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="`rounds` must follow from the arrivals and events"):
        Journal.load(journal).trace()
    with pytest.raises(ValueError, match="jsonl must be of one run: `rounds` must follow"):
        run(num_steps=9, journal=journal)


def test_a_journal_of_other_arrivals_than_the_checkpoint_is_refused(tmp_path):
    with pytest.raises(Killed):
        run(checkpoint=Checkpointer(tmp_path, every=4), callbacks=[killed_at(6)])
    journal = tmp_path / "arrivals.jsonl"
    header, first, *_ = journal.read_text().splitlines()
    first = json.loads(first)
    other = (first["worker"] + 1) % K
    alone = [
        json.dumps(first | {"worker": other, "round": step, "dispatched_at": step})
        for step in range(6)
    ]
    journal.write_text("\n".join([header, *alone, ""]))
    with pytest.raises(ValueError, match="must go with its checkpoint: at step 4 it has Arrival"):
        run(checkpoint=Checkpointer(tmp_path, every=4))


def test_one_process_at_a_time_writes_a_journal(tmp_path):
    first = Journal({"num_workers": 1, "synchronous": False}, tmp_path / "a.jsonl")
    first.happened("lost", 0, time=0.0)
    code = (
        "import sys; from orlomo_jax.recording import Journal; "
        "Journal({'num_workers': 1, 'synchronous': False}, sys.argv[1])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.jsonl")]
    second = subprocess.run(command, capture_output=True, text=True)
    assert "another process is writing" in second.stderr
    with pytest.raises(BlockingIOError, match="another process is writing"):
        Journal.set_aside(tmp_path / "a.jsonl")
    first.close()
    assert subprocess.run(command).returncode == 0
    Journal.set_aside(tmp_path / "a.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl.old"]


NO_FCNTL = """
import sys, types
sys.modules["fcntl"] = None  # as on Windows
from orlomo_jax.recording import Arrival, Journal
if taken := sys.argv[2:]:
    def locking(descriptor, mode, count):
        if taken == ["taken"]:
            raise PermissionError(13, "Permission denied")
    sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
journal = Journal({"num_workers": 1, "synchronous": False}, sys.argv[1])
journal.arrived(Arrival(0, 0, 0, time=0.5, loss=2.0))
journal.arrived(Arrival(0, 1, 1, time=1.5, loss=1.0))
print(len(Journal.load(sys.argv[1]).arrivals))
"""


@pytest.mark.parametrize("locks", [pytest.param([], marks=pytest.mark.slow), ["free"], ["taken"]])
def test_a_journal_needs_no_fcntl(tmp_path, locks):
    command = [sys.executable, "-c", NO_FCNTL, str(tmp_path / "a.jsonl"), *locks]
    ran = subprocess.run(command, capture_output=True, text=True)
    if locks == ["taken"]:
        assert "BlockingIOError: another process is writing" in ran.stderr
    else:
        assert ran.stdout == "2\n", ran.stderr


@pytest.mark.parametrize("begun", [False, True])
def test_a_journal_that_was_written_since_it_was_read_is_left_alone(tmp_path, begun):
    identity, path = {"num_workers": 1, "synchronous": False}, tmp_path / "a.jsonl"
    if begun:
        Journal(identity, path).happened("lost", 0, time=0.0)
    first = Journal(identity, path)
    if begun:
        first.close()  # as if it had been read only, before the lock
        second = Journal(identity, path)
    else:
        second = Journal(identity, path)
    second.happened("redispatched", 0, time=1.0)
    second.close()
    with pytest.raises(BlockingIOError, match=r"has written .* since it was read"):
        first.happened("lost", 0, time=2.0)
    assert [event.kind for event in Journal.load(path).events][-1] == "redispatched"


def test_a_refused_run_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="`audit` needs OrLoMo"):
        run("al_sgd", audit=True, checkpoint=Checkpointer(tmp_path / "new", every=5))
    assert not (tmp_path / "new" / "arrivals.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("every", [3, 1000])  # the last checkpoint after and before the joining
@pytest.mark.parametrize(("first", "then"), [([2], []), ([], [2]), ([2], [2]), ([0], [2])])
def test_who_takes_part_in_a_resumed_run(tmp_path, first, then, every):
    membership = Membership(first)

    def on_step(record):
        time.sleep(0.02)
        if record.step == 8:
            for worker in first:
                membership.join(worker)
        if record.step == 40:
            raise Killed

    options = {"num_steps": 60, "journal": None}
    with pytest.raises(Killed):
        run(
            membership=membership,
            callbacks=[on_step],
            checkpoint=Checkpointer(tmp_path, every=every),
            **options,
        )
    result = run(
        membership=Membership(then), checkpoint=Checkpointer(tmp_path, every=every), **options
    )
    present = tuple(worker not in then for worker in range(K))
    assert result.health.present == present
    assert not set(result.trace.workers[40:].tolist()) & set(then)
    assert_replays(result)


def test_audit_goes_on_from_a_checkpoint(tmp_path):
    with pytest.raises(Killed):
        run(checkpoint=Checkpointer(tmp_path, every=5), audit=True, callbacks=[killed_at(13)])
    run(checkpoint=Checkpointer(tmp_path, every=5), audit=True)

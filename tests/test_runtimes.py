"""Real runs on threads: replays, losses, resumption, membership, audits."""

import json
import math
import subprocess
import sys
import threading
import time
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orlomo_jax import (
    METHOD_NAMES,
    AuditFailure,
    Checkpoints,
    Journal,
    LocalUpdate,
    Membership,
    Outcome,
    ParameterServer,
    Threads,
    WorkersGone,
    make_method,
    orlomo,
    simulate,
    train,
)
from orlomo_jax.runtimes.workers import Work
from tests import helpers

K, S, T = 3, 2, 30
PARAMS = {"a": jnp.ones((3, 2)), "b": jnp.ones(2), "none": None}
STATE = {"mean": jnp.zeros(3)}


class Killed(BaseException):
    pass


def loss_fn(params, model_state, batch, key):
    noisy = batch + 0.1 * jax.random.normal(key, batch.shape)
    error = jnp.tanh(noisy @ params["a"] + params["b"]) - 0.5
    state = {"mean": 0.9 * model_state["mean"] + 0.1 * noisy.mean(0)}
    return jnp.mean(error**2), (state, {})


def batch_fn(key, worker, round):
    key = jax.random.fold_in(jax.random.fold_in(key, worker), round)
    return jax.random.normal(key, (S, 4, 3))


@lru_cache
def setup(name):
    method = make_method(name, K)
    return method, method.local_round(loss_fn, S)


def schedule(step):
    return 0.1 / (1.0 + step)


def arguments(seed=0):
    return {
        "key": jax.random.key(seed),
        "model_state": STATE,
        "local_learning_rate": schedule,
        "evaluate": lambda params, model_state: {"a": params["a"].sum()},
        "evaluate_every": 7,
    }


def run(name="orlomo", workers=None, *, num_steps=T, **options):
    method, round_fn = setup(name)
    workers = Threads(K) if workers is None else workers
    options = arguments() | {"num_steps": num_steps} | options
    return train(method, round_fn, batch_fn, PARAMS, workers, **options)


def assert_replays(result, name="orlomo"):
    """The simulator repeats the run from its trace: to the bit, the programs being the same."""
    method, round_fn = setup(name)
    again = simulate(
        method, round_fn, batch_fn, PARAMS, result.trace, compiled=False, **arguments()
    )
    for part in ("params", "model_state", "state"):
        helpers.assert_trees_equal(getattr(result, part), getattr(again, part))
    np.testing.assert_array_equal(result.history.loss, again.history.loss)
    np.testing.assert_array_equal(result.history.delay, again.history.delay)
    ours, theirs = ([e.metrics for e in r.history.evaluations] for r in (result, again))
    assert ours == theirs


class Unreliable(Threads):
    """Threads of which some tasks come to nothing, as those of a dying or hanging worker."""

    def __init__(self, num_workers, failing=(), hanging=()):
        super().__init__(num_workers)
        self.failing, self.hanging, self.starts = failing, hanging, []

    def start(self, worker):
        self.starts.append(worker)
        super().start(worker)

    def wait(self, timeout):
        outcome = super().wait(timeout)
        if outcome is None or outcome[:2] in self.hanging:
            return None
        if outcome[:2] in self.failing:
            return Outcome(*outcome[:2], None, error="it died")
        return outcome


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_a_run_replays_in_the_simulator_to_the_bit(name):
    seen = []
    result = run(name, Threads(K, slowdowns=[1, 1, 3]), on_step=seen.append)
    assert (result.status, result.trace.num_steps, len(seen)) == ("finished", T, T)
    assert [record.step for record in seen] == list(range(1, T + 1))
    assert [record.worker for record in seen] == result.trace.workers.tolist()
    assert_replays(result, name)


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_a_lost_round_is_an_event_and_replays(name):
    workers = Unreliable(K, failing={(k, round) for k in range(K) for round in (0, 1, 3)})
    result = run(name, workers)
    kinds = [event.kind for event in result.trace.events]
    lost = kinds.count("lost")
    assert lost == result.health.lost > 0
    assert kinds.count("redispatched") == lost, "each is sent new parameters"
    assert len(workers.starts) == K + lost, "and started again"
    assert_replays(result, name)


def test_a_hanging_worker_is_given_up():
    workers = Unreliable(K, hanging={(2, 1)})
    result = run(workers=workers, round_timeout=0.7, on_step=lambda record: time.sleep(0.05))
    assert [event[1:] for event in result.trace.events] == [("lost", 2), ("redispatched", 2)]
    assert_replays(result)


def poison(report, kind):
    worse = {
        "nan": lambda: report._replace(
            update=jax.tree.map(lambda x: x * jnp.nan, report.update), finite=None
        ),
        "shape": lambda: report._replace(update=LocalUpdate({"a": jnp.ones(2)}, PARAMS)),
        "index": lambda: report._replace(dispatched_at=report.dispatched_at + 1),
        "round": lambda: report._replace(round=report.round + 5),
        "worker": lambda: report._replace(worker=K),
    }
    return worse[kind]()


@pytest.mark.parametrize(
    ("kind", "reason", "lost"),
    [
        ("nan", "not finite", 1),
        ("shape", "malformed", 1),
        ("index", "stale", 0),
        ("round", "stale", 0),
        ("worker", "malformed", 0),
    ],
)
def test_a_poisoned_report_changes_nothing(kind, reason, lost):
    def inject(report):
        first = (report.worker, report.round) == (0, 2)
        return [poison(report, kind), report] if first else [report]

    result = run(inject=inject)
    expected = {reason: 1}
    if lost:  # the round is given up, and the good report comes too late
        expected["stale"] = expected.get("stale", 0) + 1
    assert result.health.rejected == expected
    assert result.health.lost == lost
    assert_replays(result)


def test_duplicates_and_replays_are_applied_at_most_once():
    old = []

    def inject(report):
        old.append(report)
        return [report, report, old[0], old[len(old) // 2]]

    result = run(inject=inject)
    assert result.health.rejected["stale"] > 2 * T
    assert_replays(result)


def test_what_is_no_report_is_rejected():
    result = run(inject=lambda report: ["garbage", None, report])
    assert result.health.rejected == {"malformed": 2 * T}
    assert_replays(result)


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
            run(name, checkpoint=Checkpoints(tmp_path, every=5), on_step=until(kill_at))
    result = run(name, checkpoint=Checkpoints(tmp_path, every=5))
    orders = dict(applied)
    assert orders == dict(enumerate(result.trace.workers[:20].tolist(), 1)), "the same order"
    assert len(applied) == 3 + (9 - 0) + (20 - 5), "what lies beyond the checkpoint is repeated"
    assert not result.trace.events, "each worker is given the task that it had"
    assert_replays(result, name)
    again = run(name, checkpoint=Checkpoints(tmp_path, every=5), on_step=until(1))
    helpers.assert_trees_equal(again.params, result.params)


def test_losses_around_a_checkpoint_are_repeated_too(tmp_path):
    failing = {(0, 1), (1, 2), (2, 2), (1, 3)}
    kill_at = iter((6, 12, 18))
    for _ in range(3):
        step = next(kill_at)

        def on_step(record, step=step):
            if record.step == step:
                raise Killed

        with pytest.raises(Killed):
            run(
                workers=Unreliable(K, failing),
                checkpoint=Checkpoints(tmp_path, every=4),
                on_step=on_step,
            )
    result = run(workers=Unreliable(K, failing), checkpoint=Checkpoints(tmp_path, every=4))
    assert len(result.trace.events) >= 8
    assert_replays(result)


def test_a_torn_line_of_the_journal_is_dropped(tmp_path):
    def on_step(record):
        if record.step == 8:
            raise Killed

    with pytest.raises(Killed):
        run(checkpoint=Checkpoints(tmp_path, every=100), on_step=on_step)
    journal = tmp_path / "arrivals.jsonl"
    journal.write_text(journal.read_text() + '{"worker": 1, "ti')
    torn = journal.stat().st_size
    assert len(Journal.load(journal).arrivals) == 8
    assert journal.stat().st_size == torn, "reading changes nothing"
    result = run(checkpoint=Checkpoints(tmp_path, every=100))
    assert_replays(result)


def test_the_checkpoints_of_another_run_are_refused(tmp_path):
    run(num_steps=6, checkpoint=Checkpoints(tmp_path, every=3))
    with pytest.raises(ValueError, match="got one of another keys"):
        run(num_steps=6, checkpoint=Checkpoints(tmp_path, every=3), key=jax.random.key(1))
    with pytest.raises(ValueError, match="got one of another method"):
        run("al_sgd", num_steps=6, checkpoint=Checkpoints(tmp_path, every=3))
    with pytest.raises(ValueError, match="`num_steps` must be ≥ 6"):
        run(num_steps=4, checkpoint=Checkpoints(tmp_path, every=3))
    (tmp_path / "arrivals.jsonl").unlink()
    with pytest.raises(ValueError, match="must hold the run up to its checkpoint, 6 reports"):
        run(num_steps=6, checkpoint=Checkpoints(tmp_path, every=3))


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
    with pytest.raises(ValueError, match="`rounds` must be what the worker holds"):
        Journal.load(journal).trace()
    with pytest.raises(ValueError, match="must go with its checkpoint: at step 2 it has Arrival"):
        run(num_steps=9, journal=journal)


def test_one_process_at_a_time_writes_a_journal(tmp_path):
    first = Journal({"num_workers": 1, "synchronous": False}, tmp_path / "a.jsonl")
    first.happened("lost", 0, time=0.0)
    code = (
        "import sys; from orlomo_jax import Journal; "
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
        run("al_sgd", audit=True, checkpoint=Checkpoints(tmp_path / "new", every=5))
    assert not (tmp_path / "new" / "arrivals.jsonl").exists()


def test_an_interpreter_with_busy_threads_exits_cleanly():
    code = """
import jax, jax.numpy as jnp
from orlomo_jax import Threads, make_method, train
def loss_fn(params, model_state, batch, key):
    x = params
    for _ in range(20):
        x = jnp.tanh(x @ params)
    return x.sum(), (model_state, {})
method = make_method("orlomo", 3)
train(method, method.local_round(loss_fn, 4), lambda key, worker, round: jnp.ones((4, 1)),
      jnp.eye(300), Threads(3, slowdowns=[1, 1, 50]), num_steps=12, key=jax.random.key(0),
      local_learning_rate=1e-3)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_end_waits_for_the_round_of_a_worker_that_was_stopped():
    def slowly(key, worker, round):
        begun.set()
        return jax.pure_callback(lambda: time.sleep(0.5) or ones, ones)

    ones, begun = np.ones((S, 4, 3), np.float32), threading.Event()
    method, round_fn = setup("orlomo")
    server = ParameterServer(method, PARAMS, K, STATE, local_learning_rate=0.1)
    workers = Threads(K)
    workers.open(Work.of(round_fn, slowly, jax.random.key(0)))
    workers.start(0)
    workers.submit(server.dispatch(0))
    assert begun.wait(10)
    workers.stop(0)
    workers.close()
    assert not [thread for thread in threading.enumerate() if "orlomo" in thread.name]


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_a_run_whose_workers_are_gone_says_so_and_can_go_on(name, tmp_path):
    failing = {(worker, round) for worker in range(K) for round in range(4, 9)}
    with pytest.raises(WorkersGone, match=r"3 lost rounds in a row, the last: it died"):
        run(
            name,
            Unreliable(K, failing),
            checkpoint=Checkpoints(tmp_path, every=100),
            max_failures=2,
        )
    [step] = Checkpoints(tmp_path, every=100).steps()
    assert step > 0
    result = run(name, checkpoint=Checkpoints(tmp_path, every=100))
    assert result.status == "finished"
    assert_replays(result, name)


def test_one_lost_worker_is_no_end():
    failing = {(2, round) for round in range(2, 100)}
    result = run(workers=Unreliable(K, failing), max_failures=1)
    assert result.trace.events[-1].kind == "left"
    assert result.health.present == (True, True, False)
    assert "2: gone" in str(result.health)
    assert_replays(result)


def test_a_diverging_run_ends_as_diverged():
    result = run(inject=lambda r: [poison(r, "nan") if r.round >= 3 else r], max_failures=1)
    assert (result.status, result.diverged_at) == ("diverged", 3 * K)
    assert result.health.rejected == {"not finite": 2 * K}


def test_a_synchronous_run_diverges_too():
    result = run("prsgdm", inject=lambda r: [poison(r, "nan") if r.round >= 2 else r])
    assert result.status == "diverged"


def test_a_merge_that_overflows_has_diverged():
    def huge(report):
        return [report._replace(update=jax.tree.map(lambda x: x + 3e38, report.update))]

    result = run("al_sgd", inject=lambda r: huge(r) if r.round == 9 else [r], num_steps=T)
    assert result.status in ("diverged", "finished")
    result = run("al_sgd", inject=huge, num_steps=2 * K)
    assert result.status == "diverged"


def test_an_early_nan_is_no_divergence():
    """All recover, and much later all are asked to leave."""
    membership = Membership(K)

    def on_step(record):
        if record.step == 20:
            for worker in range(K):
                membership.leave(worker)

    with pytest.raises(WorkersGone, match="it was the last: it was asked to"):
        run(
            membership=membership,
            on_step=on_step,
            inject=lambda r: [poison(r, "nan") if r.round == 1 else r],
            num_steps=10_000,
        )


def test_workers_join_late_and_leave():
    membership = Membership(K, absent=[2])

    def on_step(record):
        if record.step == 5:
            membership.join(2)
            membership.join(1)  # is there already
        if record.step == 40:
            membership.leave(0)

    result = run(membership=membership, on_step=on_step, num_steps=2000)
    assert [event[1:] for event in result.trace.events] == [("joined", 2), ("left", 0)]
    first, last = (event.step for event in result.trace.events)
    assert 2 not in result.trace.workers[:first]
    assert 0 not in result.trace.workers[last:]
    assert_replays(result)


@pytest.mark.parametrize("every", [3, 1000])  # the last checkpoint after and before the joining
@pytest.mark.parametrize(("first", "then"), [([2], []), ([], [2]), ([2], [2]), ([0], [2])])
def test_who_takes_part_in_a_resumed_run(tmp_path, first, then, every):
    membership = Membership(K, first)

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
            on_step=on_step,
            checkpoint=Checkpoints(tmp_path, every=every),
            **options,
        )
    result = run(
        membership=Membership(K, then), checkpoint=Checkpoints(tmp_path, every=every), **options
    )
    present = tuple(worker not in then for worker in range(K))
    assert result.health.present == present
    assert not set(result.trace.workers[40:].tolist()) & set(then)
    assert_replays(result)


def test_one_leaves_as_another_joins():
    membership = Membership(K, absent=[1, 2])

    def on_step(record):
        if record.step == 5:
            membership.leave(0)
            membership.join(1)

    result = run(membership=membership, on_step=on_step, num_steps=2000)
    assert result.health.present == (False, True, False)
    assert_replays(result)


def test_a_slow_callback_is_nobodys_delay():
    result = run(round_timeout=0.6, on_step=lambda record: time.sleep(0.5), num_steps=8)
    assert result.health.lost == 0


def test_an_odd_report_stops_nothing():
    def inject(report):
        return [report._replace(worker=True), report._replace(worker=np.int64(report.worker))]

    result = run(inject=inject)
    assert_replays(result)


def test_audit_holds_and_finds_a_broken_rule():
    run(workers=Unreliable(K, failing={(1, 1), (0, 2)}), audit=True, num_steps=60)
    method, round_fn = setup("orlomo")
    broken = method._replace(rule=orlomo(K, momentum=0.89))
    with pytest.raises(AuditFailure, match=r"Lemma [12].* fails at step"):
        train(
            broken, round_fn, batch_fn, PARAMS, Threads(K), num_steps=T, audit=True, **arguments()
        )
    with pytest.raises(ValueError, match="`audit` needs OrLoMo"):
        run("al_sgd", audit=True)


def test_audit_goes_on_from_a_checkpoint(tmp_path):
    def on_step(record):
        if record.step == 13:
            raise Killed

    with pytest.raises(Killed):
        run(checkpoint=Checkpoints(tmp_path, every=5), audit=True, on_step=on_step)
    run(checkpoint=Checkpoints(tmp_path, every=5), audit=True)


def test_health_counts_what_happened():
    seen = []
    workers = Unreliable(K, failing={(1, 1)})
    result = run(workers=workers, on_health=seen.append, health_every=0.2, num_steps=3000)
    health = result.health
    assert seen
    assert seen[0].step <= health.step == 3000
    assert sum(health.delays) == 3000
    assert math.isclose(sum(health.shares), 1)
    assert all(0 <= idle <= 1 for idle in health.idle)
    assert health.momentum_norm > 0
    assert "share/idle" in str(health)
    assert "lost rounds   1" in str(health)


def test_reports_come_from_every_device():
    assert len(jax.devices()) == 2
    result = run(workers=Threads(K, devices=jax.devices()))
    assert_replays(result)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_steps": 0}, ValueError, "`num_steps` must be ≥ 1"),
        ({"key": jnp.zeros(2)}, TypeError, "`key` must be a jax.random.key"),
        ({"round_timeout": 0.0}, ValueError, "`round_timeout` must be > 0"),
        ({"health_every": "often"}, TypeError, "`health_every` must be a number"),
        ({"max_failures": -1}, ValueError, "`max_failures` must be ≥ 0"),
        ({"evaluate_every": -2}, ValueError, "`evaluate_every` must be ≥ 1"),
        ({"evaluate_every": 0}, ValueError, "`evaluate_every` must be ≥ 1"),
        ({"membership": Membership(K + 1)}, ValueError, "`membership` must be of the 3 workers"),
        ({"workers": Threads(K + 1)}, ValueError, "`num_workers` must be the method's, 3"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        run(**options)


def test_bad_workers():
    with pytest.raises(ValueError, match="`slowdowns` must hold a factor for each of 3"):
        Threads(3, slowdowns=[1, 2])
    with pytest.raises(ValueError, match=r"`slowdowns\[1\]` must be ≥ 1"):
        Threads(2, slowdowns=[1, 0.5])
    with pytest.raises(ValueError, match="`devices` must hold a device"):
        Threads(2, devices=[])
    with pytest.raises(ValueError, match=r"`membership.absent` must be empty"):
        run("prsgdm", membership=Membership(K, [1]))
    with pytest.raises(ValueError, match=r"`absent` must be in \[0, 2\], got absent=3"):
        Membership(3, [3])
    with pytest.raises(ValueError, match=r"`worker` must be in \[0, 2\], got worker=7"):
        Membership(3).join(7)
    with pytest.raises(ValueError, match="`absent` must leave a worker"):
        Membership(2, [0, 1])

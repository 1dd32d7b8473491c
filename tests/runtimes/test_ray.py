"""Real runs on Ray: replays, killed actors, poisoned reports, the narrow wire."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
import ray

from orlomo_jax import Membership, RayWorkers, cast_reports, make_method, simulate, train
from orlomo_jax.runtimes import ray as ray_workers
from orlomo_jax.runtimes import ray_actor
from orlomo_jax.worker import Workload
from tests.support import helpers
from tests.support.real_runs import (
    Killed,
    NoSuchBatchError,
    arguments,
    assert_replays,
    killed_at,
    poison,
    run,
    with_metrics,
)
from tests.support.toy import PARAMS, S, batch_fn, loss_fn, method_of

K = 3


pytestmark = pytest.mark.usefixtures("cluster")


def actors():
    """The processes of the actors that are alive."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # of one that has just ended
            if "OrlomoWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["orlomo", "prsgdm"])  # one of each kind
def test_a_run_replays_in_the_simulator_to_the_bit(name):
    result = run(name, RayWorkers(slowdowns=[1, 1, 2]))
    assert_replays(result, name)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(PARAMS))
    assert result.health.sent_bytes > 30 * size
    assert result.health.received_bytes > 2 * 30 * size
    deadline = time.monotonic() + 20
    while actors() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not actors(), "all are gone with the run"
    assert ray.is_initialized(), "a cluster that was there stays"


@pytest.mark.slow
def test_killed_actors_and_poisoned_reports_are_survived():
    killed = []

    def on_step(record):
        if record.step in (5, 25):
            victim = actors()[record.step % 2]
            killed.append(victim.pid)
            victim.send_signal(signal.SIGKILL)

    def inject(report):
        if report.id.round == 3:
            return [poison(report, "nan"), report]
        return [report, report] if report.id.round % 2 else [report]

    result = run(
        workers=RayWorkers(), callbacks=[on_step], fault_injector=inject, num_steps=45, audit=True
    )
    lost = [event for event in result.trace.events if event.kind == "lost"]
    assert result.health.lost == len(lost)
    assert len({pid for pid in killed}) <= len(lost), "and what was not finite besides"
    assert result.health.rejected["not finite"] >= 1
    assert result.health.rejected["stale"] >= 5
    assert result.trace.num_steps == 45
    assert_replays(result)


@pytest.mark.slow
def test_a_narrow_wire_halves_the_reports_resumes_and_replays(tmp_path):
    method = method_of("al_sgd")
    narrow_fn = cast_reports(method.local_round(loss_fn), jnp.bfloat16)
    options = arguments() | {"num_steps": 12, "round_fn": narrow_fn}
    job = (method, None, batch_fn, PARAMS)

    with pytest.raises(Killed):
        train(*job, RayWorkers(), journal=tmp_path / "a.jsonl", callbacks=[killed_at(7)], **options)
    narrow = train(*job, RayWorkers(), journal=tmp_path / "a.jsonl", **options)
    state, delta = 12, sum(leaf.nbytes for leaf in jax.tree.leaves(PARAMS))
    reports = 12 - 7  # of the second process
    assert narrow.health.received_bytes == reports * (delta // 2 + state)
    replay = arguments() | {"trace": narrow.trace}
    again = simulate(*job, engine="eager", round_fn=narrow_fn, **replay)
    helpers.assert_trees_equal(narrow.params, again.params)
    wide = simulate(method, loss_fn, batch_fn, PARAMS, **replay)
    assert not np.array_equal(narrow.params["a"], wide.params["a"])


@pytest.mark.slow
def test_workers_join_late_and_leave():
    membership = Membership(absent=[2])

    def on_step(record):
        if record.step == 3:
            membership.join(2)
        if record.step == 100:
            membership.leave(0)

    result = run(workers=RayWorkers(), membership=membership, callbacks=[on_step], num_steps=300)
    assert [event[1:] for event in result.trace.events] == [("joined", 2), ("left", 0)]
    assert_replays(result)


def raising_in_actors(error):
    """Return a batch function that raises in other processes alone."""
    driver = os.getpid()

    def the_slip(key, worker, round):
        if os.getpid() != driver:
            raise error()
        return batch_fn(key, worker, round)

    return the_slip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (lambda: KeyError("no such batch"), KeyError),
        (lambda: NoSuchBatchError(1, "no such batch"), RuntimeError),
    ],
)
def test_what_the_first_round_raises_ends_the_run_with_the_users_lines(error, seen):
    job = (method_of("orlomo"), loss_fn, raising_in_actors(error), PARAMS, RayWorkers())
    with pytest.raises(seen, match="no such batch") as caught:
        train(*job, num_steps=5, **arguments())
    notes = "".join(caught.value.__notes__)
    assert "the_slip" in notes
    assert f'File "{__file__}"' in notes
    assert "in its first round" in notes


@pytest.mark.slow
def test_actors_with_other_versions_are_refused(monkeypatch):
    found = ray_actor.versions()
    monkeypatch.setattr(ray_workers, "versions", lambda: found | {"jax": "0.0.1"})
    with pytest.raises(RuntimeError, match=rf"driver's jax 0\.0\.1, got jax {found['jax']}"):
        run(workers=RayWorkers())


@pytest.mark.slow
def test_metrics_reach_the_history_and_replay():
    options = arguments() | {"num_steps": 9}
    job = (method_of("orlomo"), with_metrics(), batch_fn, PARAMS)
    result = train(*job, RayWorkers(), **options)
    again = simulate(*job, trace=result.trace, engine="eager", **arguments())
    helpers.assert_trees_equal(result.history.metrics, again.history.metrics)


@pytest.mark.slow
def test_workers_of_a_run_are_in_no_other_and_can_be_used_again():
    workers, round_fn = RayWorkers(), method_of("orlomo").local_round(loss_fn)
    workers.open(Workload.of(round_fn, batch_fn, jax.random.key(0)), K)
    with pytest.raises(RuntimeError, match="in another run"):
        run(workers=workers)
    workers.close()
    assert run(workers=workers, num_steps=5).status == "finished"


@pytest.mark.slow
def test_too_few_processors():
    with pytest.raises(ValueError, match="4 actors of num_cpus=1 need 4 CPU, the cluster has 3"):
        train(
            make_method("orlomo", 4, S),
            loss_fn,
            batch_fn,
            PARAMS,
            RayWorkers(),
            num_steps=5,
            **arguments(),
        )


@pytest.mark.slow
@pytest.mark.parametrize("form", ["{}:{}", "ray://{}:{}"])
def test_an_address_that_does_not_answer_is_named_at_once(form):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = form.format(*server.getsockname())
    with pytest.raises(ConnectionError, match=f"no Ray cluster answers at {address}"):
        ray_workers._check_answers(address)


def test_an_address_that_answers_is_none_of_our_business():
    with socket.create_server(("127.0.0.1", 0)) as server:
        ray_workers._check_answers("{}:{}".format(*server.getsockname()))
    ray_workers._check_answers(None)
    ray_workers._check_answers("local")


def test_without_ray_the_error_names_the_extra():
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from orlomo_jax import RayWorkers\n"
        "try: RayWorkers()\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "Ray workers need Ray: pip install 'orlomo-jax[ray]'\n"

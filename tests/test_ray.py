"""Real runs on Ray: replays, killed actors, poisoned reports, the narrow wire."""

import contextlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
import ray

from orlomo_jax import (
    Membership,
    RayWorkers,
    WorkersGone,
    make_method,
    narrow_reports,
    simulate,
    train,
)
from tests import helpers
from tests.real_runs import (
    PARAMS,
    Killed,
    arguments,
    assert_replays,
    batch_fn,
    killed_at,
    poison,
    run,
    setup,
)

K = 3


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One local cluster for all tests of this module."""
    ray.init(num_cpus=K, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def actors():
    """The processes of the actors that are alive."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # of one that has just ended
            if "OrlomoWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.mark.parametrize("name", ["orlomo", "prsgdm"])  # one of each kind
def test_a_run_replays_in_the_simulator_to_the_bit(name):
    result = run(name, RayWorkers(K, slowdowns=[1, 1, 2]))
    assert_replays(result, name)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(PARAMS))
    assert result.health.sent_bytes > 30 * size
    assert result.health.received_bytes > 2 * 30 * size
    deadline = time.monotonic() + 20
    while actors() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not actors(), "all are gone with the run"
    assert ray.is_initialized(), "a cluster that was there stays"


def test_killed_actors_and_poisoned_reports_are_survived():
    killed = []

    def on_step(record):
        if record.step in (5, 25):
            victim = actors()[record.step % 2]
            killed.append(victim.pid)
            victim.send_signal(signal.SIGKILL)

    def inject(report):
        if report.round == 3:
            return [poison(report, "nan"), report]
        return [report, report] if report.round % 2 else [report]

    result = run(workers=RayWorkers(K), on_step=on_step, inject=inject, num_steps=45, audit=True)
    lost = [event for event in result.trace.events if event.kind == "lost"]
    assert result.health.lost == len(lost)
    assert len({pid for pid in killed}) <= len(lost), "and what was not finite besides"
    assert result.health.rejected["not finite"] >= 1
    assert result.health.rejected["stale"] >= 5
    assert result.trace.num_steps == 45
    assert_replays(result)


def test_a_narrow_wire_halves_the_reports_resumes_and_replays(tmp_path):
    method, round_fn = setup("al_sgd")
    options = arguments() | {"num_steps": 12}
    narrow_fn = narrow_reports(round_fn, jnp.bfloat16)
    job = (method, narrow_fn, batch_fn, PARAMS)

    with pytest.raises(Killed):
        train(*job, RayWorkers(K), journal=tmp_path / "a.jsonl", on_step=killed_at(7), **options)
    narrow = train(*job, RayWorkers(K), journal=tmp_path / "a.jsonl", **options)
    state, delta = 12, sum(leaf.nbytes for leaf in jax.tree.leaves(PARAMS))
    reports = 12 - 7  # of the second process
    assert narrow.health.received_bytes == reports * (delta // 2 + state)
    again = simulate(*job, narrow.trace, compiled=False, **arguments())
    helpers.assert_trees_equal(narrow.params, again.params)
    wide = simulate(method, round_fn, batch_fn, PARAMS, narrow.trace, **arguments())
    assert not np.array_equal(narrow.params["a"], wide.params["a"])


def test_workers_join_late_and_leave():
    membership = Membership(K, absent=[2])

    def on_step(record):
        if record.step == 3:
            membership.join(2)
        if record.step == 100:
            membership.leave(0)

    result = run(workers=RayWorkers(K), membership=membership, on_step=on_step, num_steps=300)
    assert [event[1:] for event in result.trace.events] == [("joined", 2), ("left", 0)]
    assert_replays(result)


def test_a_round_that_raises_is_lost():
    """Where the code is at fault, every worker says so, and the run ends."""

    def raising(key, worker, round):
        raise ValueError("no such batch")

    method, round_fn = setup("orlomo")
    with pytest.raises(WorkersGone, match="no such batch"):
        train(
            method,
            round_fn,
            raising,
            PARAMS,
            RayWorkers(K),
            num_steps=5,
            max_failures=0,
            **arguments(),
        )


def test_too_few_processors():
    with pytest.raises(ValueError, match="4 actors of num_cpus=1 need 4 CPU, the cluster has 3"):
        train(
            make_method("orlomo", 4),
            setup("orlomo")[1],
            batch_fn,
            PARAMS,
            RayWorkers(4),
            num_steps=5,
            **arguments(),
        )


def test_without_ray_the_error_names_the_extra():
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from orlomo_jax import RayWorkers\n"
        "try: RayWorkers(2)\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "Ray workers need Ray: pip install 'orlomo-jax[ray]'\n"

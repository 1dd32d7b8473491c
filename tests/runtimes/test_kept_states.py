"""Kept states when processes are killed: a worker's is lost, the others continue exactly."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from orlomo_jax import Checkpointer, Eager, RayWorkers, ThreadWorkers
from tests.support import helpers
from tests.support.every_method import method_of, real, simulated
from tests.support.real_runs import Killed

ROOT = Path(__file__).parent.parent.parent


class Watched(RayWorkers):
    """Notes which tasks start with a new state, and can kill the process of a worker."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def submit(self, task):
        self.sent.append((task.id.worker, task.fresh))
        return super().submit(task)

    def fresh(self, worker):
        return [fresh for other, fresh in self.sent if other == worker]

    def kill(self, worker):
        """Send SIGKILL, and wait until Ray knows."""
        call = self._actors[worker].__ray_call__.options(concurrency_group="state")
        os.kill(ray.get(call.remote(lambda self: os.getpid())), signal.SIGKILL)
        with contextlib.suppress(ray.exceptions.RayActorError):
            while True:
                ray.get(call.remote(lambda self: None), timeout=60)


def assert_repeats(method, result):
    again = simulated(method, result.trace, Eager())
    for part in ("params", "model_state", "rule_state"):
        helpers.assert_trees_equal(getattr(result, part), getattr(again, part))


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("name", ["ordered_outer_momentum", "diloco"])
def test_a_killed_actor_loses_its_state_alone(name, tmp_path, caplog):
    """A checkpoint is due at the step of the kill; the driver dies after the worker's restart."""
    method, checkpoint, workers = method_of(name), Checkpointer(tmp_path, every=5), Watched()
    killed = []

    def on_step(record):
        if record.step == 10:
            killed.append(record.worker)
            workers.kill(record.worker)
        if any(any(workers.fresh(worker)[1:]) for worker in killed):
            raise Killed

    with pytest.raises(Killed):
        real(method, workers, checkpoint=checkpoint, callbacks=[on_step])
    assert "no checkpoint at step 10" in caplog.text
    assert checkpoint.steps()[0] == 5
    assert 10 not in checkpoint.steps()
    for worker in range(method.num_workers):
        first, *later = workers.fresh(worker)
        assert first
        assert sum(later) == (worker in killed), "the state of a killed worker starts anew"
    result = real(method, RayWorkers(), checkpoint=checkpoint)
    assert [event[1:] for event in result.trace.events] == [
        ("lost", killed[0]),
        ("redispatched", killed[0]),
    ]
    assert_repeats(method, result)


DRIVER = """
import os, signal, sys
import orlomo_jax
from tests.support.every_method import method_of, real

pool, name, folder, step = sys.argv[1:]

def on_step(record):
    if record.step == int(step):
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint = orlomo_jax.Checkpointer(folder, every=5)
real(method_of(name), getattr(orlomo_jax, pool)(), checkpoint=checkpoint, callbacks=[on_step])
"""


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("pool", "name", "steps"),
    [
        (ThreadWorkers, "ordered_outer_momentum", (3, 13, 18)),
        (ThreadWorkers, "diloco", (13,)),
        (RayWorkers, "ordered_outer_momentum", (13,)),
    ],
)
def test_a_killed_driver_resumes_with_the_kept_states(pool, name, steps, tmp_path):
    for step in steps:
        command = [sys.executable, "-c", DRIVER, pool.__name__, name, tmp_path, str(step)]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
    method, steps_seen = method_of(name), []
    checkpoint = Checkpointer(tmp_path, every=5)
    assert checkpoint.newest().arrays["runs"][0]["local_states"], "the states are in it"
    result = real(
        method,
        pool(),
        checkpoint=checkpoint,
        callbacks=[lambda record: steps_seen.append(record.step)],
    )
    newest = steps[-1] // 5 * 5
    assert steps_seen[0] == newest + 1
    assert not result.trace.events, "each worker is given the task that it had"
    assert_repeats(method, result)

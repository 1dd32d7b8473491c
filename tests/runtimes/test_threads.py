"""Workers that are threads: how they end, which devices they take, what is compiled."""

import itertools
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from orlomo_jax import ParameterServer, ThreadWorkers, make_method, train
from orlomo_jax.server.step import server_step
from orlomo_jax.worker import Workload
from tests.support.real_runs import T, arguments, assert_replays, run
from tests.support.toy import PARAMS, STATE, K, S, batch_fn, loss_fn, method_of


@pytest.mark.slow
def test_an_interpreter_with_busy_threads_exits_cleanly():
    code = """
import jax, jax.numpy as jnp
from orlomo_jax import ThreadWorkers, make_method, train
def loss_fn(params, model_state, batch, key):
    x = params
    for _ in range(20):
        x = jnp.tanh(x @ params)
    return x.sum(), (model_state, {})
train(make_method("orlomo", 3, 4), loss_fn, lambda key, worker, round: jnp.ones((4, 1)),
      jnp.eye(300), ThreadWorkers(slowdowns=[1, 1, 50]), num_steps=12, key=jax.random.key(0),
      local_learning_rate=1e-3)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_end_waits_for_the_round_of_a_worker_that_was_stopped():
    def slowly(key, worker, round):
        begun.set()
        return jax.pure_callback(lambda: time.sleep(0.5) or ones, ones)

    ones, begun = np.ones((S, 4, 3), np.float32), threading.Event()
    method = method_of("orlomo")
    server = ParameterServer(method, PARAMS, STATE, local_learning_rate=0.1)
    workers = ThreadWorkers()
    workers.open(Workload.of(method.local_round(loss_fn), slowly, jax.random.key(0)), K)
    workers.start(0)
    workers.submit(server.dispatch(0))
    assert begun.wait(10)
    workers.stop(0)
    workers.close()
    assert not [thread for thread in threading.enumerate() if "orlomo worker" in thread.name]


def test_reports_come_from_every_device():
    assert len(jax.devices()) > 1
    result = run(workers=ThreadWorkers(devices=jax.devices()))
    assert_replays(result)


@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_device_compiles_the_round_once(num_devices, caplog):
    """Whichever threads need it at once, and whether parameters are w_0 or merged."""

    def batch_fn(key, worker, round):  # no other test's, so that its program is new
        return jax.random.uniform(jax.random.fold_in(key, num_devices), (S, 5, 3)) + worker + round

    workers = ThreadWorkers(devices=jax.devices()[:num_devices])
    job = (method_of("orlomo"), loss_fn, batch_fn, PARAMS, workers)
    jax.config.update("jax_log_compiles", True)  # of all threads: the context manager is of one
    try:
        train(*job, num_steps=T, **arguments())
    finally:
        jax.config.update("jax_log_compiles", False)
    done = [record.getMessage() for record in caplog.records]
    done = [line for line in done if line.startswith("Finished XLA compilation of jit(run_round)")]
    assert len(done) == num_devices, done


@pytest.mark.parametrize("name", ["orlomo", "al_sgd"])
def test_a_server_step_compiles_once(name):
    """Whether its parameters are w_0 or merged; evaluations leave it the rule's state to donate."""
    method = make_method(name, K, S, learning_rate=0.97)  # no other test's
    job = (method, loss_fn, batch_fn, PARAMS, ThreadWorkers())
    train(*job, num_steps=T, **arguments())
    forms = itertools.product([False, True], repeat=2)
    sizes = [server_step(method, *form)._cache_size() for form in forms]
    assert sizes == [0, 1, 0, 0]


def test_threads_of_a_run_are_in_no_other_and_can_be_used_again():
    workers = ThreadWorkers()

    def nested(record):
        with pytest.raises(RuntimeError, match="in another run"):
            run(workers=workers, num_steps=2)

    result = run(workers=workers, callbacks=[nested], num_steps=5)
    assert_replays(result)
    assert run(workers=workers, num_steps=5).status == "finished"


def test_bad_arguments():
    with pytest.raises(ValueError, match="`slowdowns` must have a factor for each of 3"):
        run(workers=ThreadWorkers(slowdowns=[1, 2]))
    with pytest.raises(ValueError, match=r"`slowdowns\[1\]` must be ≥ 1"):
        run(workers=ThreadWorkers(slowdowns=[1, 0.5, 1]))
    with pytest.raises(ValueError, match="`devices` must contain a device"):
        ThreadWorkers(devices=[])

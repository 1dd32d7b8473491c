"""Errors of user code on real workers: the user's own lines, at once or in the end."""

import logging
import traceback

import jax
import numpy as np
import pytest

from orlomo_jax import ThreadWorkers, train
from orlomo_jax.runtimes import TaskOutcome, WorkersLostError
from tests.support.real_runs import arguments, run
from tests.support.toy import PARAMS, K, S, batch_fn, loss_fn, method_of


class Raising(ThreadWorkers):
    """ThreadWorkers of which some rounds raise, by worker and round."""

    def __init__(self, raising):
        super().__init__()
        self.raising, self.starts = raising, []

    def start(self, worker):
        self.starts.append(worker)
        super().start(worker)

    def wait(self, timeout):
        outcome = super().wait(timeout)
        if outcome is None or outcome.id[:2] not in self.raising:
            return outcome
        try:
            the_users_function()
        except ValueError as error:
            return TaskOutcome(outcome.id, None, error=f"ValueError: {error}", exception=error)


def the_users_function():
    raise ValueError("no such batch\nand more of it")


def lines_of(error):
    return "".join(traceback.format_exception(error))


def test_a_slip_in_the_loss_shows_before_a_worker_starts():
    def slip(params, model_state, batch, key):
        assert batch.ndim == 3
        return loss_fn(params, model_state, batch, key)

    workers = Raising(())
    job = (method_of("orlomo"), slip, batch_fn, PARAMS, workers)
    with pytest.raises(AssertionError) as caught:
        train(*job, num_steps=4, **arguments())
    assert "assert batch.ndim == 3" in lines_of(caught.value)
    assert not workers.starts


def test_a_class_of_workers_is_refused():
    with pytest.raises(TypeError, match=r"must be a worker pool such as ThreadWorkers\(\), got"):
        run(workers=ThreadWorkers)


def test_what_the_first_round_of_a_worker_raises_ends_the_run():
    workers = Raising({(1, 0)})
    with pytest.raises(ValueError, match="no such batch") as caught:
        run(workers=workers, num_steps=10_000)  # enough for a report of worker 1, on a busy machine
    assert "the_users_function" in lines_of(caught.value)
    assert "worker 1 raised this in its first round" in lines_of(caught.value)
    assert workers.starts.count(1) == 1


def test_what_a_thread_raises_names_the_users_lines():
    def the_slip(worker):
        raise ValueError("no such batch")

    def slip(key, worker, round):
        return jax.pure_callback(the_slip, np.zeros((S, 4, 3), np.float32), worker)

    job = (method_of("orlomo"), loss_fn, slip, PARAMS, ThreadWorkers())
    with pytest.raises(Exception, match="no such batch") as caught:
        train(*job, num_steps=4, **arguments())
    assert "the_slip" in lines_of(caught.value)


def test_later_errors_are_survived_and_named_in_health(caplog):
    with caplog.at_level(logging.WARNING, "orlomo_jax"):
        result = run(workers=Raising({(1, 2)}), num_steps=60)
    assert result.status == "finished"
    assert result.health.failures == {1: "ValueError: no such batch"}
    assert "worker 1: ValueError: no such batch" in str(result.health)
    assert "the_users_function" in caplog.text


def test_the_end_of_all_workers_carries_the_last_traceback():
    raising = {(worker, round) for worker in range(K) for round in range(3, 20)}
    with pytest.raises(WorkersLostError, match="no such batch") as caught:
        run(workers=Raising(raising), max_failures=1, num_steps=1000)
    assert isinstance(caught.value.__cause__, ValueError)
    assert "the_users_function" in lines_of(caught.value)


def test_a_report_that_is_not_like_the_parameters_shows_before_the_first_step():
    def another(params, *rest, **options):
        result = round_fn(params, *rest, **options)
        delta = jax.tree.map(lambda x: x[None], result.update.delta)
        return result._replace(update=result.update._replace(delta=delta))

    method = method_of("orlomo")
    round_fn = method.local_round(loss_fn)
    workers = Raising(())
    job = (method, None, batch_fn, PARAMS, workers)
    with pytest.raises(ValueError, match=r"update\.delta.* must have shape"):
        train(*job, num_steps=4, round_fn=another, **arguments())
    assert not workers.starts

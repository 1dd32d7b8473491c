"""The order of a report's consequences: journal, next task, then history and callbacks."""

import threading

import jax.numpy as jnp
import pytest

from orlomo_jax import HostBatches, ThreadWorkers, make_method, train
from orlomo_jax.recording.journal import Journal
from tests.support import real_runs
from tests.support.toy import PARAMS, S, loss_fn

T = 6


class Watched(ThreadWorkers):
    """Threads that note what the journal contains when a task is sent."""

    def __init__(self, path, events):
        super().__init__()
        self.path, self.events = path, events

    def submit(self, task):
        known = len(Journal.load(self.path).arrivals) if self.path.exists() else 0
        self.events.append(("sent", task.id.round, known))
        return super().submit(task)


def test_the_journal_is_first_then_the_next_task_then_callbacks(tmp_path):
    events, path = [], tmp_path / "arrivals.jsonl"
    method = make_method("orlomo", 1, S)
    train(
        method,
        loss_fn,
        lambda key, worker, round: jnp.ones((S, 4, 3)),
        PARAMS,
        Watched(path, events),
        journal=path,
        num_steps=T,
        callbacks=[lambda record: events.append(("seen", record.step))],
        **real_runs.arguments(),
    )
    expected = [("sent", 0, 0)]
    for step in range(1, T):
        expected += [("sent", step, step), ("seen", step)]
    assert events == [*expected, ("seen", T)]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_worker_computes_while_a_callback_runs(prefetch):
    begun = [threading.Event() for _ in range(T + 4)]

    def make(worker, round):
        begun[min(round, T + 3)].set()
        return jnp.ones((S, 4, 3))

    def on_step(record):
        """Wait until the worker has the batches of its next round."""
        assert record.step == T or begun[record.step].wait(30)

    train(
        make_method("orlomo", 1, S),
        loss_fn,
        HostBatches.of(make, prefetch),
        PARAMS,
        ThreadWorkers(),
        num_steps=T,
        callbacks=[on_step],
        **real_runs.arguments(),
    )


def test_a_thread_that_is_busy_delays_a_task_only_briefly():
    """A cancelled round goes on; the next task of its worker waits in the inbox."""
    release, entered = threading.Event(), threading.Event()

    def make(worker, round):
        if round == 1:
            entered.set()
            assert release.wait(30)
        return jnp.ones((S, 4, 3))

    class Impatient(ThreadWorkers):
        def submit(self, task):
            sent = super().submit(task)
            if task.id.round == 1:
                assert entered.wait(30)
                super().submit(task._replace(id=task.id._replace(round=2)))  # the thread is busy
                release.set()
            return sent

    result = train(
        make_method("orlomo", 1, S),
        loss_fn,
        HostBatches.of(make, 0),
        PARAMS,
        Impatient(),
        num_steps=2,
        **real_runs.arguments(),
    )
    assert result.status == "finished"

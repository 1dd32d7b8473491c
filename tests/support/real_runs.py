"""A small job for real runs, workers that fail, and the replay that each run is held to."""

import jax
import jax.numpy as jnp
import numpy as np

from orlomo_jax import LocalUpdate, ThreadWorkers, simulate, train
from orlomo_jax.runtimes import TaskOutcome
from tests.support import helpers, toy
from tests.support.toy import PARAMS, STATE, K, batch_fn, loss_fn, method_of, schedule

T = 30


class Killed(BaseException):
    pass


class NoSuchBatchError(Exception):
    """An exception that can be written by pickle, but not read."""

    def __init__(self, worker, why):
        super().__init__(f"worker {worker} has {why}")


def killed_at(step):
    """A callback in which the run dies after this many reports."""

    def on_step(record):
        if record.step == step:
            raise Killed

    return on_step


def with_metrics():
    """Return a loss with metrics of several shapes; Ray pickles it by value."""
    plain = toy.loss_fn

    def with_metrics_fn(params, model_state, batch, key):
        loss, (model_state, _) = plain(params, model_state, batch, key)
        gain = jnp.log(params["b"] - params["b"][0])  # has an Inf
        metrics = {"norms": (batch**2).sum(0), "nested": [{"loss": loss}, gain], "hit": loss < 0.5}
        return loss, (model_state, metrics)

    return with_metrics_fn


def arguments(seed=0):
    return {
        "key": jax.random.key(seed),
        "model_state": STATE,
        "local_learning_rate": schedule,
        "evaluate": toy.evaluate,
        "evaluate_every": 7,
    }


def run(name="orlomo", workers=None, *, num_steps=T, **options):
    workers = ThreadWorkers() if workers is None else workers
    options = arguments() | {"num_steps": num_steps} | options
    batches = options.pop("batch_fn", batch_fn)
    return train(method_of(name), loss_fn, batches, PARAMS, workers, **options)


def assert_replays(result, name="orlomo", batch_fn=batch_fn):
    """The simulator repeats the run from its trace: to the bit, the programs being the same."""
    job = (method_of(name), loss_fn, batch_fn, PARAMS)
    again = simulate(*job, trace=result.trace, engine="eager", **arguments())
    for part in ("params", "model_state", "rule_state"):
        helpers.assert_trees_equal(getattr(result, part), getattr(again, part))
    assert result.history.loss.dtype == again.history.loss.dtype
    np.testing.assert_array_equal(result.history.loss, again.history.loss)
    np.testing.assert_array_equal(result.history.delay, again.history.delay)
    ours, theirs = ([e.metrics for e in r.history.evaluations] for r in (result, again))
    assert ours == theirs


class Unreliable(ThreadWorkers):
    """ThreadWorkers that lose some tasks, as if the worker had died or hung.

    With ``failing_first``, the other workers' reports come after all failures. So every failure is
    in the run, however the threads are scheduled.
    """

    def __init__(self, failing=(), hanging=(), failing_first=False):
        super().__init__()
        self.failing, self.hanging, self.starts = failing, hanging, []
        self.awaited, self.held_back = set(failing) if failing_first else set(), []

    def start(self, worker):
        self.starts.append(worker)
        super().start(worker)

    def wait(self, timeout):
        if self.held_back and not self.awaited:
            return self.held_back.pop(0)
        outcome = super().wait(timeout)
        if outcome is None or outcome.id[:2] in self.hanging:
            return None
        if self.awaited and outcome.id.worker not in {worker for worker, _ in self.awaited}:
            self.held_back.append(outcome)
            return None
        if outcome.id[:2] in self.failing:
            self.awaited.discard(outcome.id[:2])
            return TaskOutcome(outcome.id, None, error="it died")
        return outcome


def with_id(report, **changes):
    return report._replace(id=report.id._replace(**changes))


def poison(report, kind):
    worse = {
        "nan": lambda: report._replace(
            update=jax.tree.map(lambda x: x * jnp.nan, report.update), finite=None
        ),
        "shape": lambda: report._replace(update=LocalUpdate({"a": jnp.ones(2)}, PARAMS)),
        "index": lambda: with_id(report, dispatched_at=report.id.dispatched_at + 1),
        "round": lambda: with_id(report, round=report.id.round + 5),
        "worker": lambda: with_id(report, worker=K),
    }
    return worse[kind]()

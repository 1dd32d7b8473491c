"""The checks of a worker pool of one's own find pools with faults."""

import jax
import pytest

from orlomo_jax import RayWorkers, ThreadWorkers
from orlomo_jax.testing import check_worker_pool

TIMEOUT, SHORT = 60.0, 10.0


class Faulty(ThreadWorkers):
    """Threads of which some outcomes are changed."""

    def wait(self, timeout):
        outcome = super().wait(timeout)
        return outcome if outcome is None else self.changed(outcome)

    def changed(self, outcome):
        raise NotImplementedError


class WrongUpdate(Faulty):
    """Reports another Δw in the last bits, in the second round of each worker."""

    def changed(self, outcome):
        if outcome.report is None or outcome.id.round != 1:  # one of two workers gets there
            return outcome
        update = outcome.report.update
        delta = jax.tree.map(lambda x: x * (1 + 1e-6), update.delta)
        return outcome._replace(report=outcome.report._replace(update=update._replace(delta=delta)))


class WrongModelState(Faulty):
    """Sends back the model state that it was given."""

    def submit(self, task):
        self.given = getattr(self, "given", {}) | {task.id: task.start.model_state}
        return super().submit(task)

    def changed(self, outcome):
        if outcome.report is None:
            return outcome
        state = self.given[outcome.id]
        return outcome._replace(report=outcome.report._replace(model_state=state))


class WrongLoss(Faulty):
    """Tells the loss of one round wrongly; the update is right."""

    def changed(self, outcome):
        if outcome.metrics is None or outcome.id[:2] != (0, 1):
            return outcome
        return outcome._replace(metrics=outcome.metrics._replace(loss=outcome.metrics.loss + 1e-3))


class Swallowing(Faulty):
    """Says that the worker died when its round raised an exception."""

    def changed(self, outcome):
        return outcome._replace(exception=None)


class Silent(Faulty):
    """Says nothing at all of a round that raised an exception."""

    def changed(self, outcome):
        return outcome if outcome.exception is None else None


class OtherException(Faulty):
    """Raises a KeyError of its own in the place of the worker's."""

    def changed(self, outcome):
        return outcome if outcome.exception is None else outcome._replace(exception=KeyError("no"))


class Stubborn(Faulty):
    """Does not run the task of a worker that was started again."""

    def start(self, worker):
        self.started = getattr(self, "started", set())
        if worker in self.started:
            self.stop(worker)
        else:
            super().start(worker)
        self.started.add(worker)

    def submit(self, task):
        try:
            return super().submit(task)
        except KeyError:  # of a worker that is not there
            return 0

    def close(self):
        self.started = set()
        super().close()

    def changed(self, outcome):
        return outcome


class Shared(Faulty):
    """Lets a second run in while one is under way."""

    def open(self, *args):
        try:
            super().open(*args)
        except RuntimeError:
            self.close()
            super().open(*args)

    def changed(self, outcome):
        return outcome


@pytest.mark.parametrize(
    ("pool", "timeout", "message"),
    [
        pytest.param(
            WrongUpdate,
            TIMEOUT,
            "must repeat a run of orlomo bit for bit, not its params",
            marks=pytest.mark.slow,
        ),
        (WrongModelState, TIMEOUT, "must repeat a run of orlomo bit for bit, not its model_state"),
        (WrongLoss, TIMEOUT, "losses of orlomo must be equal"),
        pytest.param(
            Swallowing,
            TIMEOUT,
            "an exception in a worker's first round must reach the caller",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Silent,
            SHORT,
            "an exception in a worker's first round must reach the caller",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            OtherException,
            TIMEOUT,
            "the exception must be the worker's own",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Stubborn, SHORT, "a run of prsgdm must finish, got WorkersLost", marks=pytest.mark.slow
        ),
        pytest.param(
            Shared,
            TIMEOUT,
            "`open` of a pool that is open must raise RuntimeError",
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_fault_is_found(pool, timeout, message):
    with pytest.raises(AssertionError, match=message):
        check_worker_pool(pool(), timeout)


@pytest.mark.slow
def test_ray_passes():
    check_worker_pool(RayWorkers())

"""Real runs on threads: replays, losses, membership, audits."""

import dataclasses
import math
import time

import jax
import jax.numpy as jnp
import pytest

from orlomo_jax import Callback, Checkpointer, Membership, ThreadWorkers, orlomo, train
from orlomo_jax.methods import METHOD_NAMES
from orlomo_jax.runtimes import WorkersLostError
from orlomo_jax.server import AuditError
from tests.support.real_runs import (
    Killed,
    T,
    Unreliable,
    arguments,
    assert_replays,
    poison,
    run,
)
from tests.support.toy import PARAMS, K, batch_fn, loss_fn, method_of


@pytest.fixture(scope="module")
def compiled():
    """OrLoMo's programs on each device, so that no time limit meets a compiler."""
    rounds = [0] * K

    def on_step(record):
        rounds[record.worker] += 1
        if min(rounds) == 3:
            raise Killed

    with pytest.raises(Killed):
        run(num_steps=10**6, callbacks=[on_step])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=() if x in ("orlomo", "prsgdm") else pytest.mark.slow)
        for x in METHOD_NAMES
    ],
)
def test_a_run_replays_in_the_simulator_to_the_bit(name):
    seen = []
    result = run(name, ThreadWorkers(slowdowns=[1, 1, 3]), callbacks=[seen.append])
    assert (result.status, result.trace.num_steps, len(seen)) == ("finished", T, T)
    assert [record.step for record in seen] == list(range(1, T + 1))
    assert [record.worker for record in seen] == result.trace.workers.tolist()
    assert_replays(result, name)


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_a_lost_round_is_an_event_and_replays(name):
    workers = Unreliable(failing={(k, round) for k in range(K) for round in (0, 1, 3)})
    result = run(name, workers)
    kinds = [event.kind for event in result.trace.events]
    lost = kinds.count("lost")
    assert lost == result.health.lost > 0
    assert kinds.count("redispatched") == lost, "each is sent new parameters"
    assert len(workers.starts) == K + lost, "and started again"
    assert_replays(result, name)


@pytest.mark.usefixtures("compiled")
def test_a_hanging_worker_is_given_up():
    workers = Unreliable(hanging={(2, 1)})
    result = run(workers=workers, round_timeout=0.7, callbacks=[lambda record: time.sleep(0.05)])
    assert [event[1:] for event in result.trace.events] == [("lost", 2), ("redispatched", 2)]
    assert_replays(result)


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_a_run_whose_workers_are_gone_says_so_and_can_go_on(name, tmp_path):
    failing = {(worker, round) for worker in range(K) for round in range(4, 9)}
    with pytest.raises(WorkersLostError, match=r"3 lost rounds in a row, the last: it died"):
        run(
            name,
            Unreliable(failing),
            checkpoint=Checkpointer(tmp_path, every=100),
            max_failures=2,
        )
    [step] = Checkpointer(tmp_path, every=100).steps()
    assert step > 0
    result = run(name, checkpoint=Checkpointer(tmp_path, every=100))
    assert result.status == "finished"
    assert_replays(result, name)


@pytest.mark.usefixtures("compiled")
def test_one_lost_worker_is_no_end():
    failing = {(2, round) for round in range(2, 100)}
    result = run(workers=Unreliable(failing), max_failures=1)
    assert result.trace.events[-1].kind == "left"
    assert result.health.present == (True, True, False)
    assert "2: gone" in str(result.health)
    assert_replays(result)


def test_a_diverging_run_ends_as_diverged():
    result = run(
        fault_injector=lambda r: [poison(r, "nan") if r.id.round >= 3 else r], max_failures=1
    )
    assert (result.status, result.diverged_at) == ("diverged", 3 * K)
    assert result.health.rejected == {"not finite": 2 * K}


def test_a_synchronous_run_diverges_too():
    result = run("prsgdm", fault_injector=lambda r: [poison(r, "nan") if r.id.round >= 2 else r])
    assert result.status == "diverged"


def test_a_merge_that_overflows_has_diverged():
    def huge(report):
        return [report._replace(update=jax.tree.map(lambda x: x + 3e38, report.update))]

    result = run(
        "al_sgd", fault_injector=lambda r: huge(r) if r.id.round == 9 else [r], num_steps=T
    )
    assert result.status in ("diverged", "finished")
    result = run("al_sgd", fault_injector=huge, num_steps=2 * K)
    assert result.status == "diverged"


def test_an_early_nan_is_no_divergence():
    """All recover, and much later all are asked to leave."""
    membership = Membership()

    def on_step(record):
        if record.step == 20:
            for worker in range(K):
                membership.leave(worker)

    with pytest.raises(WorkersLostError, match="it was the last: it was asked to"):
        run(
            membership=membership,
            callbacks=[on_step],
            fault_injector=lambda r: [poison(r, "nan") if r.id.round == 1 else r],
            num_steps=10_000,
        )


def test_workers_join_late_and_leave():
    membership = Membership(absent=[2])

    def on_step(record):
        if record.step == 5:
            membership.join(2)
            membership.join(1)  # is there already
        if record.step == 40:
            membership.leave(0)

    result = run(membership=membership, callbacks=[on_step], num_steps=2000)
    assert [event[1:] for event in result.trace.events] == [("joined", 2), ("left", 0)]
    first, last = (event.step for event in result.trace.events)
    assert 2 not in result.trace.workers[:first]
    assert 0 not in result.trace.workers[last:]
    assert_replays(result)


@pytest.mark.slow
def test_one_leaves_as_another_joins():
    membership = Membership(absent=[1, 2])

    def on_step(record):
        if record.step == 5:
            membership.leave(0)
            membership.join(1)

    result = run(membership=membership, callbacks=[on_step], num_steps=2000)
    assert result.health.present == (False, True, False)
    assert_replays(result)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
def test_a_slow_callback_is_nobodys_delay():
    result = run(round_timeout=0.6, callbacks=[lambda record: time.sleep(0.5)], num_steps=8)
    assert result.health.lost == 0


def test_audit_holds_and_finds_a_broken_rule():
    run(workers=Unreliable(failing={(1, 1), (0, 2)}), audit=True, num_steps=60)
    broken = method_of("orlomo").with_rule(orlomo(K, momentum=0.89))
    job = (broken, loss_fn, batch_fn, PARAMS, ThreadWorkers())
    with pytest.raises(AuditError, match=r"Lemma [12].* fails at step"):
        train(*job, num_steps=T, audit=True, **arguments())
    with pytest.raises(ValueError, match="`audit` needs OrLoMo"):
        run("al_sgd", audit=True)


@dataclasses.dataclass  # which cannot be hashed
class Watch(Callback):
    health_every: float | None
    seen: list = dataclasses.field(default_factory=list)

    def on_health(self, health):
        self.seen.append(health)


@pytest.mark.slow
def test_health_counts_what_happened():
    often, never = Watch(0.2), Watch(None)
    workers = Unreliable(failing={(1, 1)})
    result = run(workers=workers, callbacks=[often, never], num_steps=3000)
    health, seen = result.health, often.seen
    assert not never.seen
    assert seen
    assert seen[0].step <= health.step == 3000
    assert sum(health.delays) == 3000
    assert math.isclose(sum(health.shares), 1)
    assert all(0 <= idle <= 1 for idle in health.idle)
    assert health.momentum_norm > 0
    assert "share/idle" in str(health)
    assert "lost rounds   1" in str(health)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_steps": 0}, ValueError, "`num_steps` must be ≥ 1"),
        ({"key": jnp.zeros(2)}, TypeError, "`key` must be a jax.random.key"),
        ({"round_timeout": 0.0}, ValueError, "`round_timeout` must be > 0"),
        ({"start_timeout": -1.0}, ValueError, "`start_timeout` must be ≥ 0"),
        ({"callbacks": [Watch("often")]}, TypeError, "`health_every` must be a number"),
        ({"callbacks": [Watch(0)]}, ValueError, "`health_every` must be > 0"),
        ({"max_failures": -1}, ValueError, "`max_failures` must be ≥ 0"),
        ({"evaluate_every": -2}, ValueError, "`evaluate_every` must be ≥ 1"),
        ({"evaluate_every": 0}, ValueError, "`evaluate_every` must be ≥ 1"),
        (
            {"membership": Membership([3])},
            ValueError,
            r"`absent` must be in \[0, 2\], got absent=3",
        ),
        ({"membership": Membership([0, 1, 2])}, ValueError, "`absent` must leave a worker"),
        (
            {"workers": ThreadWorkers(slowdowns=[1, 2])},
            ValueError,
            "`slowdowns` must have a factor for each of 3 workers",
        ),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        run(**options)


def test_bad_memberships():
    with pytest.raises(ValueError, match=r"`membership.absent` must be empty"):
        run("prsgdm", membership=Membership([1]))
    with pytest.raises(ValueError, match="`absent` must be ≥ 0, got absent=-1"):
        Membership([-1])
    early, late = Membership(), Membership()
    early.join(7)
    with pytest.raises(ValueError, match=r"`worker` must be in \[0, 2\], got worker=7"):
        run(membership=early)
    with pytest.raises(ValueError, match=r"`worker` must be in \[0, 2\], got worker=7"):
        run(membership=late, callbacks=[lambda record: late.join(7)])
    late.leave(7)  # after the run, until the next one is known

"""How long workers may take to start, and for a round."""

import time

import pytest

from orlomo_jax import Membership
from orlomo_jax.worker import Workload
from tests.support.real_runs import Unreliable, run
from tests.support.toy import K


@pytest.mark.slow
def test_the_clock_of_a_round_begins_after_start_and_compilation(monkeypatch):
    """Whoever starts takes longer than a round may: at first, when it joins or is started again."""

    def slow_to_compile(*args):
        time.sleep(2.5)

    monkeypatch.setattr(Workload, "compile", slow_to_compile)
    run(num_steps=K)  # compiles
    membership = Membership([2])
    workers = Unreliable(failing={(0, 2)})
    result = run(
        workers=workers,
        membership=membership,
        callbacks=[lambda record: membership.join(2)],
        round_timeout=2.0,
        num_steps=2000,
    )
    assert workers.starts.count(0) == 2
    assert result.health.lost == 1


@pytest.mark.slow
def test_a_worker_that_hangs_at_its_start_is_given_up():
    workers = Unreliable(hanging={(2, 0)})
    options = {"round_timeout": 0.4, "start_timeout": 0.3}
    slowly = lambda record: time.sleep(0.05)  # noqa: E731
    result = run(workers=workers, callbacks=[slowly], num_steps=60, **options)
    assert ("lost", 2) in [event[1:] for event in result.trace.events]
    assert result.health.present == (True,) * K

"""Schedules that go wrong later are refused before the first step."""

import time

import jax
import jax.numpy as jnp
import optax
import pytest

from orlomo_jax import ThreadWorkers, make_method, simulate, train
from orlomo_jax.server.schedules import CHUNK, check_schedules
from tests.support.small_runs import S, batches, loss_fn

NEGATIVE = optax.polynomial_schedule(0.3, -0.1, 1, 4)  # 0 at step 3
T = 6


def never(record):
    raise AssertionError("a step was made")


def run(runtime, rate=0.1, num_steps=T, **method):
    job = make_method("orlomo", 2, S, **method), loss_fn, batches(), jnp.zeros(1)
    options = {"key": jax.random.key(0), "local_learning_rate": rate, "callbacks": [never]}
    options["num_steps"] = num_steps
    if runtime == "train":
        return train(*job, ThreadWorkers(), **options)
    return simulate(*job, **options)


@pytest.mark.parametrize("runtime", ["simulate", "train"])
@pytest.mark.parametrize("name", ["local_learning_rate", "learning_rate"])
@pytest.mark.parametrize(
    ("rate", "at"),
    [
        (NEGATIVE, 4),
        (lambda step: 1.0 - 0.4 * step, 3),
        (jax.tree_util.Partial(lambda table, step: table[step], jnp.array([0, 1, -1.0])), 2),
    ],
)
def test_the_step_is_named(runtime, name, rate, at):
    options = {"rate" if name == "local_learning_rate" else name: rate}
    with pytest.raises(ValueError, match=rf"`{name}` must be .*≥ 0, got .* at step {at}"):
        run(runtime, **options)


@pytest.mark.parametrize("what", ["inf", "nan"])
def test_a_rate_that_is_not_finite_is_refused(what):
    with pytest.raises(ValueError, match=f"must be finite and ≥ 0, got {what} at step 5"):
        run("simulate", lambda step: jnp.where(step < 5, 0.1, float(what)))


def test_only_the_steps_of_the_run_count():
    with pytest.raises(AssertionError, match="a step was made"):
        run("simulate", NEGATIVE, num_steps=4)


def test_a_long_schedule_is_looked_at_to_its_end():
    method = make_method("orlomo", 2, S)
    last = 3 * CHUNK - 1
    schedule = lambda step: jnp.where(step < last, 0.1, -0.1)  # noqa: E731
    check_schedules(method, schedule, last)
    with pytest.raises(ValueError, match=rf"got -0.1.* at step {last}"):
        check_schedules(method, schedule, last + 1)
    start = time.perf_counter()
    check_schedules(method, optax.cosine_decay_schedule(0.1, 10**6), 10**6)
    assert time.perf_counter() - start < 5

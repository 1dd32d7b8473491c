"""Real runs with reports in int8: replays, resumed runs, kept errors and bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from orlomo_jax import (
    Checkpointer,
    RayWorkers,
    ThreadWorkers,
    make_method,
    simulate,
    train,
)
from orlomo_jax.recording.journal import Journal
from orlomo_jax.worker import quantize_reports
from tests.support import helpers
from tests.support.real_runs import Killed, killed_at, poison

K, S, T = 2, 2, 24
PARAMS = {"w": jnp.zeros((40, 25)), "b": jnp.zeros(25), "gain": jnp.ones(())}


def loss_fn(params, model_state, batch, key):
    noisy = batch + 0.1 * jax.random.normal(key, batch.shape)
    error = params["gain"] * (noisy @ params["w"] + params["b"]) - jnp.sin(noisy[:, :25])
    return jnp.mean(error**2), (model_state, {})


def batch_fn(key, worker, round):
    key = jax.random.fold_in(jax.random.fold_in(key, worker), round)
    return jax.random.normal(key, (S, 4, 40))


def method_of(name):
    if name == "adam":
        return make_method("al_sgd", K, S, local_optimizer=optax.scale_by_adam())
    return make_method(name, K, S)


def job(name):
    method = method_of(name)
    round_fn = quantize_reports(method.local_round(loss_fn), 64)
    options = {"key": jax.random.key(1), "local_learning_rate": 0.05, "round_fn": round_fn}
    return (method, None, batch_fn, PARAMS), options


def assert_replays(result, name):
    args, options = job(name)
    again = simulate(*args, trace=result.trace, engine="eager", **options)
    for part in ("params", "rule_state"):
        helpers.assert_trees_equal(getattr(result, part), getattr(again, part))
    np.testing.assert_array_equal(result.history.loss, again.history.loss)
    unrounded = simulate(*args, trace=result.trace, engine="eager",
                         **options | {"round_fn": options["round_fn"].round_fn})  # fmt: skip
    assert not np.array_equal(unrounded.params["w"], result.params["w"])
    forgetful = quantize_reports(options["round_fn"].round_fn, 64, error_feedback=False)
    other = simulate(*args, trace=result.trace, engine="eager", **options | {"round_fn": forgetful})
    assert not np.array_equal(other.params["w"], result.params["w"])


def poison_some(report):
    return [poison(report, "nan") if report.id.round == 4 else report]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["orlomo", "prsgdm", "adam"])
def test_threads_replay_also_after_lost_rounds(name):
    args, options = job(name)
    inject = None if name == "prsgdm" else poison_some
    result = train(*args, ThreadWorkers(), num_steps=T, fault_injector=inject, **options)
    assert (result.health.lost > 0) == (inject is not None)
    assert_replays(result, name)


@pytest.mark.slow
@pytest.mark.parametrize("saved", [True, False], ids=["checkpoint", "journal alone"])
def test_a_killed_run_resumes_with_the_kept_errors(tmp_path, saved):
    args, options = job("adam")
    folder = {"checkpoint": Checkpointer(tmp_path, every=5)} if saved else {
        "journal": tmp_path / "arrivals.jsonl"}  # fmt: skip
    with pytest.raises(Killed):
        train(*args, ThreadWorkers(), num_steps=T, callbacks=[killed_at(13)], **folder, **options)
    result = train(*args, ThreadWorkers(), num_steps=T, **folder, **options)
    assert_replays(result, "adam")


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("name", ["orlomo", "adam"])
def test_ray_sends_a_quarter_resumes_and_replays(tmp_path, name):
    args, options = job(name)
    checkpoint = Checkpointer(tmp_path, every=5)
    with pytest.raises(Killed):
        train(*args, RayWorkers(), num_steps=T, checkpoint=checkpoint,
              callbacks=[killed_at(13)], **options)  # fmt: skip
    records = []
    result = train(*args, RayWorkers(), num_steps=T, checkpoint=checkpoint,
                   callbacks=[records.append], **options)  # fmt: skip
    assert_replays(result, name)
    trees = 2 if name == "orlomo" else 1
    report = trees * (1000 + 4 * 16 + 25 + 4 + 4)  # codes and scales, and the gain as it is
    whole = trees * sum(x.nbytes for x in jax.tree.leaves(PARAMS))
    assert report <= 0.27 * whole
    assert {record.received_bytes for record in records} == {report}
    assert [record.step for record in records][-1] == T
    journal = Journal.load(tmp_path / "arrivals.jsonl")
    assert [arrival.received_bytes for arrival in journal.arrivals] == [report] * T
    reports, rest = divmod(result.health.received_bytes, report)
    assert T - 13 <= reports <= T
    assert rest == 0


@pytest.mark.slow
def test_threads_send_no_bytes():
    args, options = job("orlomo")
    records = []
    train(*args, ThreadWorkers(), num_steps=4, callbacks=[records.append], **options)
    assert {record.received_bytes for record in records} == {0}

"""Metrics of the loss reach records and history, on every engine of the simulator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orlomo_jax import ArrivalTrace, Checkpointer, make_method, simulate
from tests.support.helpers import ENGINES

K, S, T = 2, 3, 12
METHOD = make_method("orlomo", K, S)


def loss_fn(params, model_state, batch, key):
    loss = ((params - batch) ** 2).mean()
    error = jnp.abs(params - batch)
    return loss, (model_state, {"largest": error.max(), "hits": (error < 0.5, error)})


def batch_fn(key, worker, round):
    return jnp.ones((S, 4)) * (1 + worker)


def run(engine, **options):
    return simulate(
        METHOD,
        loss_fn,
        batch_fn,
        jnp.zeros(4),
        trace=ArrivalTrace.from_workers([0, 1] * (T // 2), K),
        key=jax.random.key(0),
        local_learning_rate=0.1,
        engine=ENGINES[engine],
        **options,
    )


@pytest.mark.parametrize(
    "engine",
    [pytest.param(x, marks=() if x in ("eager", "loop") else pytest.mark.slow) for x in ENGINES],
)
def test_means_over_the_local_steps(engine):
    records = []
    result = run(engine, callbacks=[records.append])
    metrics = result.history.metrics
    assert jax.tree.map(np.shape, metrics) == {"largest": (T,), "hits": ((T, 4), (T, 4))}
    # The first rounds of both workers start from 0, with errors of 1 and 2 at their first step.
    round_fn = METHOD.local_round(loss_fn)
    for step, worker in ((0, 0), (1, 1)):
        alone = round_fn(jnp.zeros(4), None, batch_fn(None, worker, 0), 0.1, jax.random.key(0))
        largest = alone.metrics["largest"].mean()
        np.testing.assert_allclose(metrics["largest"][step], largest, rtol=1e-6)
    np.testing.assert_allclose([r.metrics["largest"] for r in records], metrics["largest"])
    assert all(r.evaluation is None for r in records)


@pytest.mark.parametrize("engine", ["eager", "loop"])
def test_they_survive_a_resumption(engine, tmp_path):
    def interrupt(record):
        if record.step == 9:
            raise KeyboardInterrupt

    unbroken = run(engine)
    with pytest.raises(KeyboardInterrupt):
        run(engine, checkpoint=Checkpointer(tmp_path, 4), callbacks=[interrupt])
    resumed = run(engine, checkpoint=Checkpointer(tmp_path, 4))
    for mine, other in zip(
        *map(jax.tree.leaves, (resumed.history.metrics, unbroken.history.metrics)), strict=True
    ):
        np.testing.assert_array_equal(mine, other)


def test_equal_methods_and_rounds_share_programs():
    traces = []

    def counted(params, model_state, batch, key):
        traces.append(1)
        return loss_fn(params, model_state, batch, key)

    def once():
        method = make_method("orlomo", K, S, momentum=0.8)
        simulate(
            method,
            None,
            batch_fn,
            jnp.zeros(4),
            num_steps=6,
            key=jax.random.key(0),
            local_learning_rate=0.1,
            round_fn=method.local_round(counted, weight_decay=0.01),
        )

    once()
    first = len(traces)
    once()
    assert len(traces) == first

"""Metrics of ``loss_fn`` in real runs: as the simulator's, also after a resumption."""

import json

import jax
import numpy as np
import pytest

from orlomo_jax import Checkpointer, ThreadWorkers, make_method, simulate, train
from orlomo_jax.recording import Journal
from orlomo_jax.runtimes import metric_rows
from tests.support import helpers
from tests.support.real_runs import Killed, T, arguments, killed_at, with_metrics
from tests.support.toy import PARAMS, K, S, batch_fn

METHOD = make_method("orlomo", K, S)
JOB = (METHOD, with_metrics(), batch_fn, PARAMS)


def assert_like_the_simulators(result, records):
    seen = []
    again = simulate(
        *JOB, trace=result.trace, engine="eager", callbacks=[seen.append], **arguments()
    )
    helpers.assert_trees_equal(result.history.metrics, again.history.metrics)
    assert np.isinf(result.history.metrics["nested"][1]).any()
    for ours, theirs in zip(records, seen[-len(records) :], strict=True):
        helpers.assert_trees_equal(ours.metrics, jax.device_get(theirs.metrics))


@pytest.mark.slow
def test_they_are_the_simulators():
    records = []
    result = train(*JOB, ThreadWorkers(), num_steps=T, callbacks=[records.append], **arguments())
    assert len(records) == T
    assert_like_the_simulators(result, records)


@pytest.mark.slow
@pytest.mark.parametrize("every", [5, 100])
def test_they_survive_a_resumption(every, tmp_path):
    options = arguments() | {"num_steps": T, "checkpoint": Checkpointer(tmp_path, every=every)}
    with pytest.raises(Killed):
        train(*JOB, ThreadWorkers(), callbacks=[killed_at(13)], **options)
    records = []
    result = train(*JOB, ThreadWorkers(), callbacks=[records.append], **options)
    assert records[0].step == (11 if every == 5 else 1)
    assert_like_the_simulators(result, records)


def test_the_journal_holds_them(tmp_path):
    path = tmp_path / "arrivals.jsonl"
    result = train(*JOB, ThreadWorkers(), num_steps=4, journal=path, **arguments())
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert {len(row["metrics"]) for row in rows} == {4}
    loaded = Journal.load(path)
    like = jax.tree.map(lambda x: x[0], result.history.metrics)
    again = metric_rows.stacked([arrival.metrics for arrival in loaded.arrivals], like)
    helpers.assert_trees_equal(again, result.history.metrics)


def test_another_loss_is_noticed_before_the_first_step(tmp_path):
    options = arguments() | {"num_steps": T, "journal": tmp_path / "arrivals.jsonl"}
    with pytest.raises(Killed):
        train(*JOB, ThreadWorkers(), callbacks=[killed_at(5)], **options)
    other = (METHOD, lambda *args: (args[0]["b"].sum(), (args[1], {"a": 1.0})))
    steps = []
    with pytest.raises(ValueError, match=r"another round_fn\.loss_fn"):
        train(*other, batch_fn, PARAMS, ThreadWorkers(), callbacks=[steps.append], **options)
    assert not steps


def test_rows_without_metrics_are_nan():
    like = {"a": jax.ShapeDtypeStruct((2,), np.float32)}
    found = metric_rows.stacked([(), [[1.0, 2.0]]], like)
    np.testing.assert_array_equal(found["a"], [[np.nan, np.nan], [1, 2]])


@pytest.mark.parametrize(
    "dtype", [np.float16, np.float32, np.float64, np.complex64, jax.numpy.bfloat16]
)
def test_every_dtype_comes_back_to_the_bit(dtype):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 2)).astype(dtype)
    x[0, 0] = np.nan
    tree = {"x": x, "empty": np.zeros((0, 2), dtype), "scalar": x[1, 1]}
    rows = [json.loads(json.dumps(metric_rows.as_row(tree), allow_nan=False))]
    again = jax.tree.map(lambda leaf: leaf[0], metric_rows.stacked(rows, tree))
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(tree), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours.astype(complex), theirs.astype(complex))

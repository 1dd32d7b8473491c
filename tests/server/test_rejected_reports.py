"""What a server refuses, and that nothing has changed then."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orlomo_jax import LocalUpdate, ParameterServer, Report, make_method
from orlomo_jax.server import RejectedReportError
from tests.support import helpers
from tests.support.servers import (
    STATE,
    K,
    S,
    assert_unchanged,
    make_report,
    make_server,
    snapshot,
)


def poisoned(tree, value):
    leaves, structure = jax.tree.flatten(tree)
    leaves[1] = leaves[1].at[0].set(value)
    return jax.tree.unflatten(structure, leaves)


def poisoned_numpy():
    update = LocalUpdate(poisoned(helpers.tree(), jnp.inf), helpers.tree())
    return jax.tree.map(np.asarray, update)


def with_delta(delta):
    return lambda task: make_report(task, 1, STATE, update=LocalUpdate(delta, helpers.tree()))


def with_id(task, **changes):
    return make_report(task, 1, STATE, id=task.id._replace(**changes))


BAD_REPORTS = {
    "not a report": (lambda task: task, "`report` must be a Report, got Task"),
    "not an id": (lambda t: make_report(t, 1, STATE, id=None), "must be the TaskId of a task"),
    "half an id": (lambda t: make_report(t, 1, STATE, id=(0, 1)), r"got id=\(0, 1\)"),
    "unknown worker": (
        lambda t: with_id(t, worker=K),
        r"`worker` must be in \[0, 2\]",
    ),
    "negative worker": (lambda t: with_id(t, worker=-1), "got worker=-1"),
    "worker of a wrong type": (lambda t: with_id(t, worker="0"), "worker='0'"),
    "idle worker": (lambda t: with_id(t, worker=2), "worker 2 holds no task"),
    "future index": (
        lambda t: with_id(t, dispatched_at=9),
        "dispatched_at=9, a wrong",
    ),
    "stale index": (
        lambda t: with_id(t, dispatched_at=0),
        "worker 0 holds round=1, dispatched_at=1; got a report of round=1, dispatched_at=0",
    ),
    "duplicate": (
        lambda t: with_id(t, dispatched_at=0, round=0),
        "round=0, dispatched_at=0, a duplicate or stale one",
    ),
    "no update": (lambda t: make_report(t, 1, STATE, update=(1, 2)), "must be a LocalUpdate"),
    "no momentum": (
        lambda t: make_report(t, 1, STATE, update=LocalUpdate(helpers.tree())),
        "`update` must have a local momentum",
    ),
    "structure": (with_delta({"other": jnp.ones(2)}), "`update.delta` must have the structure"),
    "shape": (
        with_delta(jax.tree.map(lambda x: x[None], helpers.tree())),
        r"`update.delta\['layer'\]\[0\]` must have shape \(3, 2\), got shape \(1, 3, 2\)",
    ),
    "dtype": (
        with_delta(jax.tree.map(lambda x: x.astype(jnp.float16), helpers.tree())),
        r"`update.delta\['layer'\]\[0\]` must be float32, got float16",
    ),
    "nan": (
        with_delta(poisoned(helpers.tree(), jnp.nan)),
        r"`update.delta\['layer'\]\[1\]\[0\]` must be finite",
    ),
    "inf of numpy, called finite": (
        lambda t: make_report(
            t,
            1,
            STATE,
            update=jax.tree.map(
                np.asarray, LocalUpdate(poisoned(helpers.tree(), jnp.inf), helpers.tree())
            ),
            finite=True,
        ),
        "must be finite",
    ),
    "flag": (lambda t: make_report(t, 1, STATE, finite=jnp.array(False)), "finite=False"),
    "no model state": (lambda t: make_report(t, 1, None), "`model_state` must have the structure"),
    "nan in model state": (
        lambda t: make_report(t, 1, {**STATE, "mean": jnp.full(2, jnp.nan)}),
        r"`model_state\['mean'\]` must be finite",
    ),
}


@pytest.mark.parametrize(("bad", "message"), BAD_REPORTS.values(), ids=BAD_REPORTS.keys())
def test_a_bad_report_changes_nothing(bad, message):
    server = make_server(model_state=STATE)
    server.receive(make_report(server.dispatch(0), 0, STATE))
    task = server.dispatch(0)
    server.dispatch(1)
    before = snapshot(server)
    with pytest.raises(RejectedReportError, match=message):
        server.receive(bad(task))
    assert_unchanged(server, before)
    server.receive(make_report(task, 1, STATE))
    assert server.step == 2


def test_plain_sgd_methods_refuse_momentum():
    server = make_server("al_sgd")
    with pytest.raises(RejectedReportError, match="`update` must have no local momentum"):
        server.receive(make_report(server.dispatch(0)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.dispatch(0), "worker 0 is busy with the task dispatched at step 0"),
        (lambda s: s.dispatch(K), r"`worker` must be in \[0, 2\], got worker=3"),
        (lambda s: s.dispatch(-1), "worker=-1"),
        (lambda s: s.release(1), "worker 1 holds no task"),
        (lambda s: s.release(7), "worker=7"),
    ],
)
def test_bad_dispatch_changes_nothing(call, message):
    server = make_server()
    server.dispatch(0)
    before = snapshot(server)
    with pytest.raises(ValueError, match=message):
        call(server)
    assert_unchanged(server, before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"local_learning_rate": -1.0}, ValueError, "local_learning_rate=-1.0"),
        ({"local_learning_rate": float("nan")}, ValueError, "local_learning_rate=nan"),
        ({"params": {"a": jnp.arange(2)}}, TypeError, r"int32 at params\['a'\]"),
    ],
)
def test_bad_construction(options, error, message):
    arguments = {"params": helpers.tree(), "local_learning_rate": 0.1} | options
    with pytest.raises(error, match=message):
        ParameterServer(make_method("orlomo", K, S), **arguments)


def test_float64_of_numpy_is_another_dtype():
    server = ParameterServer(make_method("al_sgd", 1, S), jnp.zeros(2), local_learning_rate=0.1)
    task = server.dispatch(0)
    with pytest.raises(RejectedReportError, match="must be float32, got float64"):
        server.receive(Report(task.id, LocalUpdate(np.full(2, 1e300)), finite=True))


@pytest.mark.parametrize(
    "changes", [{"round": 0.7}, {"round": float("inf")}, {"worker": None}, {"dispatched_at": "0"}]
)
def test_counts_of_a_wrong_type_are_rejected(changes):
    server = make_server()
    task = server.dispatch(0)
    with pytest.raises(RejectedReportError):
        server.receive(make_report(task, 0, id=task.id._replace(**changes)))
    assert server.step == 0


def test_a_flag_of_a_wrong_type_is_rejected():
    server = make_server()
    with pytest.raises(
        RejectedReportError, match="`finite` must be a bool or None, got finite='False'"
    ):
        server.receive(make_report(server.dispatch(0), 0, finite="False"))
    assert server.step == 0


@pytest.mark.parametrize("rate", [lambda step: jnp.ones(2), lambda step: -1.0])
def test_schedules_are_looked_at(rate):
    with pytest.raises(ValueError, match="`local_learning_rate` must be"):
        make_server(rate=rate)


@pytest.mark.parametrize("nan", [float("nan"), np.float32("nan"), np.array(np.nan, np.float32)])
def test_a_number_of_the_host_is_looked_at_whatever_the_report_says(nan):
    method = make_method("al_sgd", 1, S)
    server = ParameterServer(method, jnp.zeros([]), local_learning_rate=0.1)
    task = server.dispatch(0)
    with pytest.raises(RejectedReportError):
        server.receive(Report(task.id, LocalUpdate(nan), finite=True))
    assert server.step == 0


def test_large_numbers_of_the_host_are_finite():
    """Whose squares are not, nor their sum."""
    server = ParameterServer(make_method("al_sgd", 1, S), jnp.zeros(3), local_learning_rate=0.1)
    delta = np.full(3, 3e38, np.float32)
    assert server.receive(Report(server.dispatch(0).id, LocalUpdate(delta), finite=True)) == (0,)


def test_a_snapshot_of_other_workers_changes_nothing():
    method = make_method("orlomo", 2, S, momentum=0.5)
    server, other = (
        make_server(),
        ParameterServer(method, helpers.tree(1), local_learning_rate=0.1),
    )
    before = server.params
    with pytest.raises(ValueError, match="must be of num_workers=3, got rounds="):
        server.restore(*other.snapshot())
    helpers.assert_trees_equal(server.params, before)
    assert server.dispatch(2).id.worker == 2


def test_what_an_engine_has_exported_is_refused_until_it_comes_back():
    server = make_server()
    task = server.dispatch(0)
    exported = server.export()
    for call in (server.view, server.snapshot, lambda: server.dispatch(1), lambda: server.params):
        with pytest.raises(RuntimeError, match="the server's state is exported: import it first"):
            call()
    server.import_(exported)
    assert server.held(0) is task
    assert server.receive(make_report(task)) == (0,)

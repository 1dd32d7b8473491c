"""The parameter server: its bookkeeping and its merging."""

import gc
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
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


@pytest.mark.parametrize("name", helpers.RULES)
def test_server_is_the_rule_with_the_right_indices(name):
    server = make_server(name)
    tasks = {worker: server.dispatch(worker) for worker in range(K)}
    order, indices, reports = [2, 0, 1, 1, 2, 0, 0, 1, 2], [], []
    for t, worker in enumerate(order):
        assert server.step == t
        task = tasks.pop(worker)
        report = make_report(task, t, name=name)
        indices.append(task.id.dispatched_at)
        reports.append(report.update)
        for waiting in server.receive(report):
            tasks[waiting] = server.dispatch(waiting)
    synchronous = name == "prsgdm"
    assert indices == ([0, 0, 0, 3, 3, 3, 6, 6, 6] if synchronous else [0, 0, 0, 3, 1, 2, 6, 4, 5])
    rule = make_method(name, K, S, momentum=0.5).rule
    params, state = helpers.run_rule(rule, helpers.tree(), reports, indices)
    helpers.assert_trees_close(server.params, params, rtol=1e-5, atol=1e-6)
    helpers.assert_trees_close(server.state.rule_state, state, rtol=1e-5, atol=1e-6)


def test_tasks_carry_version_round_and_local_learning_rate():
    server = make_server(rate=optax.piecewise_constant_schedule(1.0, {2: 0.1}))
    rates, task = [], server.dispatch(0)
    for t in range(4):
        assert (task.id.worker, task.id.round, task.id.dispatched_at) == (0, t, t)
        helpers.assert_trees_equal(task.start.params, server.params)
        assert task.start.momentum is None
        rates.append(float(task.start.local_learning_rate))
        assert server.receive(make_report(task, t)) == (0,)
        task = server.dispatch(0)
    np.testing.assert_allclose(rates, [1.0, 1.0, 0.1, 0.1])


def test_what_was_handed_out_stays_readable():
    """Donation spares the arrays that a task or a caller holds, and the caller's own."""
    mine = helpers.tree()
    method = make_method("orlomo", K, S, momentum=0.5)
    server = ParameterServer(method, mine, local_learning_rate=0.1)
    first, second = server.dispatch(0), server.dispatch(1)
    server.receive(make_report(first, 0))
    server.receive(make_report(second, 1))
    params, state = server.params, server.state
    copy = jax.tree.map(np.array, (params, state))
    task = server.dispatch(0)
    server.receive(make_report(task, 2))
    gc.collect()
    helpers.assert_trees_equal(jax.tree.map(np.asarray, (params, state)), copy)
    helpers.assert_trees_equal(mine, helpers.tree())
    helpers.assert_trees_equal(first.start.params, helpers.tree())


def test_unshared_arrays_are_donated():
    """Within a synchronous round nobody holds the newest arrays: they are reused."""
    server = make_server("prsgdm")
    tasks = [server.dispatch(worker) for worker in range(K)]
    server.receive(make_report(tasks[0]))
    inner = jax.tree.leaves(server.view().params)[0]
    server.receive(make_report(tasks[1]))
    assert inner.is_deleted()
    asynchronous = make_server()
    tasks = [asynchronous.dispatch(worker) for worker in range(K)]
    momentum = jax.tree.leaves(asynchronous.view().rule_state.momentum)[0]
    asynchronous.receive(make_report(tasks[0]))
    assert momentum.is_deleted()


def test_params_are_copied_from_numpy():
    mine = np.ones(4, np.float32)
    server = ParameterServer(make_method("al_sgd", 1, S), mine, local_learning_rate=0.1)
    mine[:] = 7
    np.testing.assert_array_equal(server.params, 1)


def test_synchronous_dispatch_is_withheld():
    server = make_server("prsgdm")
    tasks = [server.dispatch(worker) for worker in range(K)]
    assert server.receive(make_report(tasks[1], 1)) == ()
    with pytest.raises(ValueError, match=r"worker 1 has reported in this round: .* at step 3"):
        server.dispatch(1)
    assert server.receive(make_report(tasks[0], 2)) == ()
    helpers.assert_trees_equal(server.params, helpers.tree())
    assert server.receive(make_report(tasks[2], 3)) == (0, 1, 2)
    task = server.dispatch(1)
    assert task.id.dispatched_at == 3
    average = jax.tree.map(lambda *x: sum(x) / K, *(helpers.report(s).momentum for s in (1, 2, 3)))
    helpers.assert_trees_close(task.start.momentum, average, rtol=1e-5, atol=1e-6)


def test_released_worker_gets_the_newest_parameters_and_its_old_report_is_refused():
    server = make_server()
    tasks = [server.dispatch(worker) for worker in range(K)]
    server.receive(make_report(tasks[0], 0))
    assert server.release(2) == tasks[2]
    with pytest.raises(RejectedReportError, match="worker 2 holds no task"):
        server.receive(make_report(tasks[2], 1))
    task = server.dispatch(2)
    assert (task.id.round, task.id.dispatched_at) == (1, 1)
    with pytest.raises(RejectedReportError, match="holds round=1, dispatched_at=1"):
        server.receive(make_report(tasks[2], 1))
    assert server.receive(make_report(task, 1)) == (2,)


def test_released_worker_rejoins_a_synchronous_round():
    """It is sent what the round started from, model state included."""
    server = make_server("prsgdm", STATE)
    tasks = [server.dispatch(worker) for worker in range(K)]
    end = {"mean": jnp.ones(2), "variance": jnp.ones(2)}
    server.receive(make_report(tasks[0], 0, end))
    server.release(1)
    task = server.dispatch(1)
    assert (task.id.round, task.id.dispatched_at) == (1, 0)
    helpers.assert_trees_equal(task.start, tasks[1].start)


class TestModelState:
    def end(self, value):
        return {"mean": jnp.full(2, value), "variance": jnp.full(2, value)}

    def test_merges_by_the_global_learning_rate(self):
        server = make_server(model_state=STATE, learning_rate=0.6, delay_weight=lambda d: 1.0)
        server.receive(make_report(server.dispatch(0), 0, self.end(2.0)))
        np.testing.assert_allclose(server.model_state["mean"], 0.6 * 2, rtol=1e-6)
        np.testing.assert_allclose(server.model_state["variance"], 0.4 + 0.6 * 2, rtol=1e-6)

    def test_synchronous_average_comes_with_the_last_report(self):
        server = make_server("prsgdm", STATE)
        tasks = [server.dispatch(worker) for worker in range(K)]
        for task, value in zip(tasks, (1.0, 2.0, 6.0), strict=True):
            helpers.assert_trees_equal(server.model_state, STATE)
            server.receive(make_report(task, 0, self.end(value)))
        np.testing.assert_allclose(server.model_state["variance"], 3.0, rtol=1e-6)

    def test_a_hundredfold_drop_of_variance_stays_positive(self):
        """Every round ends at 0.01, whatever it started from; worker 2 is late."""
        server = make_server(model_state=self.end(1.0))
        tasks = {k: server.dispatch(k) for k in range(K)}
        by_difference, started = 1.0, dict.fromkeys(range(K), 1.0)  # s − η(s_start − s_end)
        lowest = by_difference
        for t in range(60):
            task = tasks[t % K if t > 20 else t % 2]
            eta = float(server.method.model_state_weight(t, t - task.id.dispatched_at))
            by_difference -= eta * (started[task.id.worker] - 0.01)
            lowest, started[task.id.worker] = min(lowest, by_difference), by_difference
            server.receive(make_report(task, t, self.end(0.01)))
            tasks[task.id.worker] = server.dispatch(task.id.worker)
            assert float(server.model_state["variance"].min()) > 0
        assert lowest < 0  # why differences are not what is merged
        np.testing.assert_allclose(server.model_state["variance"], 0.01, rtol=0.1)

    def test_weight_outside_the_unit_interval(self):
        server = make_server(model_state=STATE, learning_rate=6.0)
        task = server.dispatch(0)
        before = snapshot(server)
        with pytest.raises(
            RejectedReportError, match=r"must be in \[0, 1\].* 2.0 at step=0, delay=0"
        ):
            server.receive(make_report(task, 0, STATE))
        assert_unchanged(server, before)

    def test_leaves_that_are_no_numbers_are_refused_by_path(self):
        with pytest.raises(TypeError, match=r"key<fry> at model_state\['key'\]"):
            make_server(model_state={"mean": jnp.zeros(2), "key": jax.random.key(0)})

    @pytest.mark.parametrize(("name", "taken"), [("orlomo", 1), ("prsgdm", 2)])
    def test_integers_are_those_of_the_newest_report_or_of_the_last_worker(self, name, taken):
        state = {"count": jnp.int32(9), "ready": jnp.array(False)}
        method = make_method(name, 3, S)
        server = ParameterServer(method, jnp.zeros(2), state, local_learning_rate=0.1)
        tasks = {worker: server.dispatch(worker) for worker in range(3)}
        for worker in (0, 2, 1):
            end = {"count": jnp.int32(worker), "ready": jnp.array(worker == 2)}
            ones = LocalUpdate(jnp.ones(2), jnp.ones(2))
            server.receive(Report(tasks[worker].id, ones, end))
        assert int(server.model_state["count"]) == taken
        assert bool(server.model_state["ready"]) == (taken == 2)

    def test_needs_a_weight(self):
        method = make_method("orlomo", K, S)._replace(model_state_weight=None)
        with pytest.raises(ValueError, match="model_state_weight"):
            ParameterServer(method, helpers.tree(), STATE, local_learning_rate=0.1)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_other_dtypes(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        method = make_method("orlomo", K, S, momentum=0.5)
        server = ParameterServer(method, helpers.tree(0, dtype), local_learning_rate=0.1)
        task = server.dispatch(0)
        assert {x.dtype for x in jax.tree.leaves(task.start.params)} == {jnp.dtype(dtype)}
        wide = jnp.promote_types(dtype, jnp.float32)
        server.receive(Report(task.id, helpers.report(0, wide)))
        assert {x.dtype for x in jax.tree.leaves(server.params)} == {wide}


def test_threads_apply_a_report_once():
    server = ParameterServer(make_method("al_sgd", 1, S), jnp.zeros(9), local_learning_rate=0.1)
    for t in range(20):
        task = server.dispatch(0)
        report = Report(task.id, LocalUpdate(jnp.ones(9)))
        start, outcomes = threading.Barrier(4), []

        def send(report=report, start=start, outcomes=outcomes):
            start.wait()
            try:
                outcomes.append(server.receive(report))
            except RejectedReportError as error:
                outcomes.append(type(error))

        threads = [threading.Thread(target=send) for _ in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert outcomes.count((0,)) == 1
        assert outcomes.count(RejectedReportError) == 3
        assert server.step == t + 1
    np.testing.assert_array_equal(server.params, -20)


def test_reports_from_other_devices_are_brought_to_the_server():
    first, second = jax.devices()[:2]
    server = ParameterServer(make_method("orlomo", 2, S), jnp.zeros(4), local_learning_rate=0.1)
    for device in (second, first, second):
        task = server.dispatch(1)
        ones = jax.device_put(jnp.ones(4), device)
        server.receive(Report(task.id, LocalUpdate(ones, ones)))
        assert server.params.devices() == {first}


def test_a_rule_that_keeps_the_parameters_is_stepped():
    keeps = optax.GradientTransformation(lambda p: {"start": p}, lambda u, s, p=None: (u, s))
    method = make_method("al_sgd", 1, S)
    method = method.with_rule(optax.chain(method.rule, keeps))
    server = ParameterServer(method, jnp.zeros(2), local_learning_rate=0.1)
    for _ in range(2):
        task = server.dispatch(0)
        server.receive(Report(task.id, LocalUpdate(jnp.ones(2))))
    np.testing.assert_array_equal(server.params, -2)


def test_synchronous_momentum_is_found_wherever_it_is():
    """Neither a parameter nor a hyperparameter of that name is taken for it."""
    method = make_method("prsgdm", 1, S)
    decays = optax.inject_hyperparams(lambda momentum: optax.trace(momentum))(momentum=0.5)
    method = method.with_rule(optax.chain(method.rule, decays))
    params = {"momentum": jnp.zeros(2)}
    server = ParameterServer(method, params, local_learning_rate=0.1)
    task = server.dispatch(0)
    helpers.assert_trees_equal(task.start.momentum, params)


def test_low_precision_averages_add_up_in_float32():
    method = make_method("prsgdm", 512, S, accumulator_dtype=jnp.float32)
    params = jnp.zeros(2, jnp.bfloat16)
    server = ParameterServer(method, params, local_learning_rate=0.1)
    tasks = [server.dispatch(worker) for worker in range(512)]
    for task in tasks:
        ones = jnp.ones(2)
        server.receive(Report(task.id, LocalUpdate(ones, ones), finite=True))
    np.testing.assert_array_equal(server.params.astype(jnp.float32), -1)
    assert server.dispatch(0).start.momentum.dtype == jnp.float32


def test_schedules_that_differ_in_their_arrays_share_a_program():
    """A sweep over learning rates compiles once; the rates are those of each schedule."""
    traces = []

    def schedule(start, step):
        traces.append(step)
        return start / (1.0 + step)

    method = make_method("al_sgd", 1, S)
    for start in (0.5, 0.25, 0.125):
        rate = jax.tree_util.Partial(schedule, np.float32(start))
        server = ParameterServer(method, {"a": jnp.zeros(2)}, local_learning_rate=rate)
        task = server.dispatch(0)
        assert task.start.local_learning_rate == start
        server.receive(Report(task.id, LocalUpdate({"a": jnp.ones(2)})))
        assert server.dispatch(0).start.local_learning_rate == start / 2
    assert len([step for step in traces if isinstance(step, jax.core.Tracer)]) == 1

"""Every method in every kind of run, with kept states, uneven S and lost rounds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from orlomo_jax import (
    ArrivalTrace,
    Checkpointer,
    Compiled,
    Eager,
    ParameterServer,
    ThreadWorkers,
    make_method,
)
from orlomo_jax.simulation import RunStart, simulate_many
from orlomo_jax.traces.events import Events
from orlomo_jax.worker import Workload
from tests.support import helpers
from tests.support.every_method import (
    ALL,
    ROUNDING,
    K,
    batch_fn,
    method_of,
    real,
    simulated,
    trace_of,
)
from tests.support.real_runs import Killed, killed_at
from tests.support.toy import PARAMS, STATE, loss_fn

QUICK = {"ordered_outer_momentum"}
METHODS = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ALL]


def by_hand(method, trace):
    """The same run as a loop of a user, without an engine."""
    server = ParameterServer(method, PARAMS, STATE, local_learning_rate=0.02)
    work = Workload.of(
        method.local_round(loss_fn), batch_fn, jax.random.key(3), method.num_local_steps
    )
    events, states = Events(trace), {}
    for worker in set(range(K)) - trace.late_joiners:
        server.dispatch(worker)
    for step, worker in enumerate(trace.workers.tolist()):
        events.apply(step, server)
        task = server.tasks[worker]
        kept = None if task.fresh else states.get(worker)
        result, *_ = work.run(worker, task.id.round, task.start, kept)
        states[worker] = result.local_state
        for waiting in server.receive(task.report(result)):
            server.dispatch(waiting)
    return server


def assert_engines_agree(method, trace):
    eager = simulated(method, trace, Eager())
    assert eager.status == "finished"
    server = by_hand(method, trace)
    helpers.assert_trees_equal(eager.params, server.params)
    helpers.assert_trees_equal(eager.rule_state, server.state.rule_state)
    helpers.assert_trees_equal(eager.model_state, server.model_state)
    compiled = simulated(method, trace, Compiled("loop"))
    helpers.assert_trees_close(compiled.params, eager.params, **ROUNDING)
    helpers.assert_trees_close(compiled.model_state, eager.model_state, **ROUNDING)
    np.testing.assert_array_equal(compiled.history.accepted, eager.history.accepted)


@pytest.mark.parametrize("name", METHODS)
def test_every_engine_gives_the_same_run(name):
    method = method_of(name)
    assert_engines_agree(method, trace_of(method))


@pytest.mark.slow
@pytest.mark.parametrize("alone", ["kept", "uneven", "losses"])
@pytest.mark.parametrize("name", ["ordered_outer_momentum", "fedbuff", "diloco"])
def test_kept_states_uneven_s_or_lost_rounds_alone(name, alone):
    method = method_of(name, uneven=alone == "uneven", keep=alone == "kept")
    trace = trace_of(method, losses=alone == "losses")
    assert bool(trace.events) == (alone == "losses")
    assert_engines_agree(method, trace)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_real_run_repeats_in_the_simulator(name):
    method = method_of(name)
    result = real(method, ThreadWorkers(slowdowns=[1.0, 1.0, 3.0]))
    again = simulated(method, result.trace, Eager())
    helpers.assert_trees_equal(result.params, again.params)
    np.testing.assert_array_equal(result.history.accepted, again.history.accepted)


@pytest.mark.slow
@pytest.mark.parametrize("rounds", ["map", "vmap"])
@pytest.mark.parametrize("name", ["ordered_outer_momentum", "diloco"])
def test_rounds_of_equal_s_are_computed_together(name, rounds):
    method = method_of(name)
    trace = trace_of(method)
    together = simulated(method, trace, Compiled(rounds, 3))
    one_by_one = simulated(method, trace, Compiled("loop"))
    helpers.assert_trees_close(together.params, one_by_one.params, **ROUNDING)


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(Eager(), id="eager", marks=pytest.mark.slow),
        pytest.param(Compiled("loop"), id="compiled"),
    ],
)
def test_a_killed_simulation_resumes_with_its_kept_states(engine, tmp_path):
    method = method_of("ordered_outer_momentum")
    trace = trace_of(method)
    # Both save at the same steps, so that their segments are the same.
    whole = simulated(method, trace, engine, checkpoint=Checkpointer(tmp_path / "a", every=5))
    checkpoint = Checkpointer(tmp_path / "b", every=5)
    with pytest.raises(Killed):
        simulated(method, trace, engine, checkpoint=checkpoint, callbacks=[killed_at(17)])
    again = simulated(method, trace, engine, checkpoint=checkpoint)
    helpers.assert_trees_equal(again.params, whole.params)


@pytest.mark.slow
def test_a_killed_real_run_resumes_with_its_kept_states(tmp_path):
    method, checkpoint = method_of("ordered_outer_momentum"), Checkpointer(tmp_path, every=5)
    with pytest.raises(Killed):
        real(method, ThreadWorkers(), checkpoint=checkpoint, callbacks=[killed_at(13)])
    result = real(method, ThreadWorkers(), checkpoint=checkpoint)
    again = simulated(method, result.trace, Eager())
    helpers.assert_trees_equal(result.params, again.params)


def test_a_new_state_after_a_lost_round_matters():
    """Negative control: without the lost round, the state and so the run are different."""
    method = method_of("ordered_outer_momentum")
    order = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2]
    lost = [(6, "lost", 1), (6, "redispatched", 1)]
    plain, loses = (
        simulated(method, ArrivalTrace.from_workers(order, K, events=events), Eager())
        for events in ([], lost)
    )
    assert not jnp.array_equal(plain.params["b"], loses.params["b"])


@pytest.mark.parametrize("keep", [True, False])
def test_adams_step_count(keep):
    """It continues across the rounds of a worker only if the state is kept."""
    method = make_method(
        "al_sgd", 1, 2, local_optimizer=optax.scale_by_adam(), keep_local_state=keep
    )
    round_fn = method.local_round(loss_fn)
    batches = batch_fn(jax.random.key(0), 0, 0)
    args = PARAMS, STATE, batches, 0.1, jax.random.key(1)
    state = round_fn(*args).local_state
    if not keep:
        assert state is None
        return
    assert int(state.count) == 2
    assert int(round_fn(*args, local_state=state).local_state.count) == 4


@pytest.mark.slow
def test_runs_together_keep_their_states():
    """Each run has its own order of arrivals, and so its own states."""
    method = method_of("ordered_outer_momentum", uneven=False)
    round_fn = method.local_round(loss_fn)
    orders = [[0, 1, 2] * 4, [0, 0, 1, 2, 1, 2] * 2]
    starts = [
        RunStart(PARAMS, ArrivalTrace.from_workers(order, K), jax.random.key(seed), 0.02, STATE)
        for seed, order in enumerate(orders)
    ]
    options = {"round_fn": round_fn, "engine": Compiled("loop")}
    together = simulate_many(method, None, batch_fn, starts, over_runs="vmap", **options)
    for start, result in zip(starts, together, strict=True):
        (alone,) = simulate_many(method, None, batch_fn, [start], **options)
        helpers.assert_trees_close(result.params, alone.params, **ROUNDING)


def test_runs_together_refuse_an_uneven_s():
    method = method_of("al_sgd")
    start = RunStart(PARAMS, trace_of(method), jax.random.key(0), 0.02, STATE)
    with pytest.raises(ValueError, match="if S differs between workers"):
        simulate_many(method, loss_fn, batch_fn, [start, start], over_runs="vmap")

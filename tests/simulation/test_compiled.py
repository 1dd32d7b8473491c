"""All engines of the simulator: one task table, and parameters equal within rounding."""

import gc
from functools import lru_cache

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
    make_method,
    simulate,
)
from orlomo_jax.methods import METHOD_NAMES
from orlomo_jax.server import RejectedReportError
from orlomo_jax.simulation import engine_choice as engines
from orlomo_jax.simulation.compiled import LENGTH, CompiledEngine
from orlomo_jax.simulation.eager import EagerEngine
from orlomo_jax.simulation.planning import Segment
from orlomo_jax.worker import Workload
from tests.support import helpers, toy
from tests.support.toy import (
    PARAMS,
    ROUNDING,
    STATE,
    K,
    S,
    batch_fn,
    loss_fn,
    method_of,
    schedule,
)

EVENTS = [(2, "joined", 2), (9, "lost", 1), (11, "redispatched", 1)]
EVENTS += [(30, "restarted", 0), (30, "restarted", 2), (60, "left", 0)]


@lru_cache
def trace_for(name, num_steps=100):
    if name == "prsgdm":
        return toy.trace_of(name, num_steps)
    rng, busy, order = np.random.default_rng(0), {0, 1}, []
    for t in range(num_steps):
        for step, kind, worker in EVENTS:
            if step == t:
                (busy.discard if kind in ("lost", "left") else busy.add)(worker)
        order.append(int(rng.choice(sorted(busy))))
    return ArrivalTrace.from_workers(order, K, events=EVENTS)


def run(name, engine, **options):
    arguments = {
        "trace": trace_for(name),
        "key": jax.random.key(0),
        "model_state": STATE,
        "local_learning_rate": schedule,
        "evaluate": toy.evaluate,
        "evaluate_every": 30,
    }
    arguments |= {"batch_fn": batch_fn, "engine": ENGINES.get(engine, engine)} | options
    return simulate(method_of(name), loss_fn, params=PARAMS, **arguments)


ENGINES = {
    "eager": Eager(),
    "loop": Compiled(rounds="loop"),
    "map": Compiled(rounds="map", max_batch=3),
    "vmap": Compiled(rounds="vmap", max_batch=3),
}
ENGINE_ARGUMENTS = {"loop": ("loop", 1), "map": ("map", 2), "vmap": ("vmap", 2)}
QUICK = [("orlomo", "loop"), ("orlomo", "map"), ("orlomo", "vmap"), ("prsgdm", "loop")]
SLOW = [("al_sgd", "loop"), ("local_ormo_da", "loop"), ("prsgdm", "vmap")]
CASES = QUICK + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]


def workload_for(method, loss_fn=loss_fn, batch_fn=batch_fn):
    return Workload.of(method.local_round(loss_fn), batch_fn, jax.random.key(0))


def server_for(name):
    server = ParameterServer(method_of(name), PARAMS, STATE, local_learning_rate=schedule)
    for worker in range(K):
        if worker != 2 or name == "prsgdm":
            server.dispatch(worker)
    return server


def compiled_engine(server, name, engine):
    return CompiledEngine(
        server, workload_for(server.method), trace_for(name), *ENGINE_ARGUMENTS[engine]
    )


@lru_cache
def eager(name):
    records = []
    return run(name, "eager", callbacks=[records.append]), records


@pytest.mark.parametrize(("name", "engine"), CASES)
def test_results_are_those_of_the_eager_run(name, engine):
    """With events, model state, a schedule and evaluations."""
    expected, records = eager(name)
    got = []
    result = run(name, engine, callbacks=[got.append])
    for part in ("params", "model_state", "rule_state"):
        helpers.assert_trees_close(getattr(result, part), getattr(expected, part), **ROUNDING)
    for field in ("step", "time", "worker", "delay"):
        np.testing.assert_array_equal(
            getattr(result.history, field), getattr(expected.history, field)
        )
    np.testing.assert_allclose(result.history.loss, expected.history.loss, **ROUNDING)
    assert result.history.loss.dtype == expected.history.loss.dtype
    assert [e[:2] for e in result.history.evaluations] == [
        e[:2] for e in expected.history.evaluations
    ]
    assert [r[:4] for r in got] == [r[:4] for r in records]
    assert [r.evaluation is None for r in got] == [r.evaluation is None for r in records]
    np.testing.assert_allclose([r.loss for r in got], expected.history.loss, **ROUNDING)
    assert (result.status, result.diverged_at) == ("finished", None)


@pytest.mark.parametrize(("name", "engine"), CASES)
def test_the_servers_tables_are_those_of_the_eager_run(name, engine):
    """Wherever a segment ends, within synchronous rounds and between events too."""
    servers = [server_for(name) for _ in range(2)]
    one = EagerEngine(servers[0], workload_for(servers[0].method), trace_for(name))
    two = compiled_engine(servers[1], name, engine)
    for stop in (1, 9, 10, 11, 30, 58, 100):
        both = two.advance(stop).by_round(), one.advance(stop)
        losses = [[metrics.loss for metrics in rounds] for rounds in both]
        np.testing.assert_allclose(*losses, **ROUNDING)
        two.sync_to_server()
        (arrays, table), (expected, expected_table) = (s.snapshot() for s in servers[::-1])
        assert sorted(table.pop("held")) == sorted(expected_table.pop("held"))
        assert table == expected_table
        helpers.assert_trees_close(arrays, expected, **ROUNDING)
        ids = [[s.held(k) and s.held(k).id for k in range(K)] for s in servers]
        assert ids[0] == ids[1]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "engine"), [("orlomo", "vmap"), ("prsgdm", "loop")])
def test_divergence_is_found_where_it_began(name, engine):
    trace = trace_for(name)
    poisoned = toy.poisoned(1, 2)
    results = [run(name, e, batch_fn=poisoned, evaluate=None) for e in ("eager", engine)]
    bad = np.flatnonzero((trace.workers == 1) & (trace.rounds == 2))[0]
    for result in results:
        assert (result.status, result.diverged_at) == ("diverged", bad)
        assert np.isnan(result.history.loss[-1])
    np.testing.assert_allclose(*(result.history.loss[:-1] for result in results), **ROUNDING)


@pytest.mark.parametrize(("name", "engine"), [("orlomo", "vmap"), ("prsgdm", "loop")])
def test_a_killed_run_resumes_to_the_bit(name, engine, tmp_path):
    def killing(record):
        if record.step == 57:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(name, engine, checkpoint=Checkpointer(tmp_path, every=11), callbacks=[killing])
    assert Checkpointer(tmp_path, every=11).steps()[-1] == 55
    resumed = run(name, engine, checkpoint=Checkpointer(tmp_path, every=11))
    unbroken = run(name, engine)
    for part in ("params", "model_state", "rule_state"):
        helpers.assert_trees_equal(getattr(resumed, part), getattr(unbroken, part))
    np.testing.assert_array_equal(resumed.history.loss, unbroken.history.loss)


def test_a_checkpoint_of_another_program_is_refused(tmp_path):
    run("al_sgd", "loop", checkpoint=Checkpointer(tmp_path, every=50))
    message = "another engine: it was written with Compiled, this run has Eager"
    with pytest.raises(ValueError, match=message):
        run("al_sgd", "eager", checkpoint=Checkpointer(tmp_path, every=50))


def test_what_was_handed_out_stays_as_it_is():
    """The caller's params, what evaluate saw, and the result of a run: no segment donates them."""
    seen = []

    def evaluate(params, model_state):
        seen.append((params, model_state, jax.tree.map(np.array, (params, model_state))))
        return {}

    mine = jax.tree.map(jnp.copy, PARAMS)
    run("orlomo", "loop", evaluate=evaluate, evaluate_every=10)
    gc.collect()
    for params, model_state, copy in seen:
        helpers.assert_trees_equal(jax.tree.map(np.asarray, (params, model_state)), copy)
    helpers.assert_trees_equal(PARAMS, mine)
    assert len(seen) == 1 + 10  # the first before the first step


def test_a_weight_outside_the_unit_interval_is_refused():
    """Before its segment is compiled."""
    method = make_method("orlomo", K, S, learning_rate=lambda t: jnp.where(t < 70, 1.0, 9.0))
    with pytest.raises(RejectedReportError, match=r"must be in \[0, 1\].* at step=70, delay="):
        simulate(
            method,
            loss_fn,
            batch_fn,
            PARAMS,
            trace=trace_for("orlomo"),
            key=jax.random.key(0),
            model_state=STATE,
            local_learning_rate=schedule,
        )


def test_a_weight_counts_only_at_the_delays_of_the_trace():
    """The last segment is shorter: its padding has no report."""
    options = {
        "delay_weight": lambda delay: jnp.where(delay == 0, 2.0, 0.5),
        "learning_rate": lambda step: jnp.where(step == 0, 0.4, 1.0),
    }
    result = simulate(
        make_method("al_sgd", 2, 1, **options),
        lambda params, model_state, batch, key: (jnp.sum(params**2), (model_state, {})),
        lambda key, worker, round: jnp.ones((1, 1)),
        jnp.zeros(1),
        trace=ArrivalTrace.from_workers([0, 1] * ((LENGTH + 10) // 2), 2),
        key=jax.random.key(0),
        model_state=jnp.zeros(1),
        local_learning_rate=0.1,
        engine="compiled",
    )
    assert result.status == "finished"


def compile_segment(name, num_workers, rounds, batch, size=20_000):
    """The segment's program for a linear loss, and the bytes of its params and of its carry."""
    method = make_method(name, num_workers, S)

    def linear(params, model_state, batch, key):
        return params @ params * batch.mean(), (model_state, {})

    order = np.tile(np.arange(num_workers), 3)
    trace = ArrivalTrace.from_workers(order, num_workers, synchronous=method.synchronous)
    server = ParameterServer(method, jnp.ones(size), local_learning_rate=0.1)
    for worker in range(num_workers):
        server.dispatch(worker)
    workload = workload_for(method, linear, lambda key, worker, round: jnp.ones((S, 1)))
    engine = CompiledEngine(server, workload, trace, rounds, batch)
    batch_fn, keys = workload.batch_fn, workload.keys
    carry = engine.load()
    plan = np.zeros((len(Segment._fields), LENGTH), np.int32)
    args = (batch_fn, engine.settings, carry, plan, np.int32(0), np.int32(1), *keys)
    compiled = engine.program.lower(*args).compile()
    return compiled.memory_analysis(), 4 * size, sum(x.nbytes for x in jax.tree.leaves(carry))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=() if x in ("orlomo", "prsgdm") else pytest.mark.slow)
        for x in METHOD_NAMES
    ],
)
def test_slots_are_updated_in_place(name):
    """The program's own memory does not grow with the versions: nothing copies the slots."""
    temporary = set()
    for num_workers in (4, 64):
        memory, size, carry = compile_segment(name, num_workers, "loop", 1)
        assert memory.alias_size_in_bytes >= carry
        slots = 2 if name == "prsgdm" else num_workers
        states = {"orlomo": 1, "local_ormo_da": 1, "al_sgd": 0, "prsgdm": 3}[name]
        momentums = slots if name == "prsgdm" else 0
        assert carry < (1 + states + slots + momentums + 0.1) * size
        temporary.add(round(memory.temp_size_in_bytes / size))
    assert max(temporary) <= 6
    assert len(temporary) == 1


@pytest.mark.parametrize("rounds", [pytest.param("map", marks=pytest.mark.slow), "vmap"])
def test_the_batch_bounds_the_memory(rounds):
    """Each round of a group adds its task's parameters and its report, not the slots."""
    temporary = [
        compile_segment("orlomo", 64, rounds, batch)[0].temp_size_in_bytes for batch in (2, 6)
    ]
    assert temporary[1] - temporary[0] <= 4 * 5 * 80_000 * 1.05
    assert temporary[0] < 20 * 80_000


def test_one_program_for_every_length():
    engine = compiled_engine(server_for("orlomo"), "orlomo", "loop")
    engine.advance(1)
    before = engine.program._cache_size()
    for stop in (2, 7, 50, 100):
        engine.advance(stop)
    assert engine.program._cache_size() == before


def convolving(params, model_state, batch, key):
    return jnp.convolve(params["b"], batch[:, 0]).sum(), (model_state, {})


@pytest.mark.parametrize(
    ("loss", "engine", "many", "expected"),
    [
        (loss_fn, "auto", None, Compiled("loop", 1)),
        (convolving, "auto", None, Eager()),
        (convolving, "compiled", None, Compiled("loop", 1)),
        (convolving, Compiled("vmap", max_batch=2), None, Compiled("vmap", 2)),
        (loss_fn, Compiled("map"), None, Compiled("map", 3)),
        (loss_fn, "eager", None, Eager()),
        (loss_fn, "auto", 1, Eager()),
        (loss_fn, "compiled", 1, Compiled("loop", 1)),
        (loss_fn, Compiled("vmap"), 1, Compiled("vmap", 3)),
        (loss_fn, Compiled("vmap", max_batch=7), None, Compiled("vmap", 3)),
        (loss_fn, Compiled("loop", max_batch=2), None, Compiled("loop", 1)),
    ],
)
def test_the_engine_is_chosen_by_model_and_platform(loss, engine, many, expected, monkeypatch):
    monkeypatch.setattr(engines, "MANY", many or engines.MANY)
    method = make_method("orlomo", 3, S)
    trace = ArrivalTrace.from_workers([0, 1, 2] * 4, 3)
    server = ParameterServer(method, PARAMS, STATE, local_learning_rate=0.1)
    assert engines.choose(engine, server, workload_for(method, loss), trace) == expected


@pytest.mark.parametrize("engine", ["driven", True, None, Eager, Compiled])
def test_what_is_no_engine_is_refused(engine):
    choices = r'"auto", "eager", "compiled", Eager\(\) or Compiled\(…\)'
    with pytest.raises(ValueError, match=f"`engine` must be {choices}, got engine="):
        run("orlomo", engine)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rounds": "pmap"}, ValueError, "`rounds` must be .* got rounds='pmap'"),
        ({"max_batch": 0}, ValueError, "`max_batch` must be ≥ 1, got max_batch=0"),
        ({"max_batch": 1.5}, TypeError, "max_batch=1.5"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        Compiled(**options)


@pytest.mark.slow
def test_a_rule_may_keep_a_random_key():
    method = make_method("al_sgd", K, S)
    noisy = method.with_rule(optax.chain(method.rule, optax.add_noise(0.01, 0.5, key=0)))
    options = {"local_learning_rate": schedule, "model_state": STATE, "key": jax.random.key(0)}
    options["trace"] = trace_for("al_sgd")
    eager, compiled = (
        simulate(noisy, loss_fn, batch_fn, PARAMS, engine=engine, **options)
        for engine in ("eager", "compiled")
    )
    helpers.assert_trees_close(eager.params, compiled.params, **ROUNDING)

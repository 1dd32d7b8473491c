"""Both forms of a run: the same books, and parameters equal within rounding."""

import gc
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from orlomo_jax import (
    METHOD_NAMES,
    ArrivalTrace,
    Checkpoints,
    ReportRejected,
    form,
    heterogeneous,
    make_method,
    simulate,
    simulate_arrivals,
)
from orlomo_jax.compiled import LENGTH, Compiled
from orlomo_jax.driven import Driven, Job
from orlomo_jax.server import ParameterServer
from tests import helpers

K, S = 4, 2
PARAMS = {"a": jnp.ones((3, 4)) * jnp.arange(4) / 4, "b": jnp.ones(4), "none": None}
STATE = {"mean": jnp.zeros(3)}
EVENTS = [(2, "joined", 2), (9, "lost", 1), (11, "redispatched", 1), (60, "left", 0)]
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
"""float32 over 100 iterations: their programs add in another order."""


def loss_fn(params, model_state, batch, key):
    x = batch + 0.1 * jax.random.normal(key, batch.shape)
    error = jnp.tanh(x @ params["a"]) @ params["b"] - jnp.sin(batch).sum(-1)
    return jnp.mean(error**2), ({"mean": 0.9 * model_state["mean"] + 0.1 * x.mean(0)}, {})


def batches(poison, key, worker, round):
    """Batches of which those of one (worker, round) are not finite."""
    key = jax.random.fold_in(jax.random.fold_in(key, worker), round)
    bad = (worker == poison[0]) & (round == poison[1])
    return jnp.where(bad, jnp.nan, jax.random.normal(key, (S, 8, 3)))


batch_fn = jax.tree_util.Partial(batches, jnp.array([-1, -1]))


def schedule(step):
    return 0.1 / (1.0 + 0.01 * step)


@lru_cache
def setup(name):
    method = make_method(name, K)
    return method, method.local_round(loss_fn, S)


@lru_cache
def trace_for(name, num_steps=100):
    if name == "prsgdm":
        return simulate_arrivals(heterogeneous(), K, num_steps, S, 0, synchronous=True)
    rng, busy, order = np.random.default_rng(0), {0, 1, 3}, []
    for t in range(num_steps):
        for step, kind, worker in EVENTS:
            if step == t:
                (busy.add if kind in ("joined", "redispatched") else busy.discard)(worker)
        order.append(int(rng.choice(sorted(busy))))
    return ArrivalTrace.from_workers(order, K, events=EVENTS)


def run(name, form, **options):
    method, round_fn = setup(name)
    arguments = {
        "trace": trace_for(name),
        "key": jax.random.key(0),
        "model_state": STATE,
        "local_learning_rate": schedule,
        "evaluate": lambda params, model_state: {"a": params["a"].sum()},
        "evaluate_every": 30,
    }
    arguments |= {"batch_fn": batch_fn} | FORMS[form] | options
    return simulate(method, round_fn, params=PARAMS, **arguments)


FORMS = {
    "driven": {"compiled": False},
    "loop": {"compiled": True, "worker_axis": "loop"},
    "map": {"worker_axis": "map", "compute_batch": 3},
    "vmap": {"worker_axis": "vmap", "compute_batch": 3},
}
FORM_ARGUMENTS = {"loop": ("loop", 1), "map": ("map", 2), "vmap": ("vmap", 2)}
CASES = [(name, "loop") for name in METHOD_NAMES]
CASES += [("orlomo", "map"), ("orlomo", "vmap"), ("prsgdm", "vmap")]


def job_for(name):
    keys = jax.random.split(jax.random.key(0))
    return Job(setup(name)[1], batch_fn, trace_for(name), *keys)


def server_for(name):
    server = ParameterServer(setup(name)[0], PARAMS, K, STATE, local_learning_rate=schedule)
    for worker in range(K):
        if worker != 2 or name == "prsgdm":
            server.dispatch(worker)
    return server


@lru_cache
def driven(name):
    records = []
    return run(name, "driven", on_step=records.append), records


@pytest.mark.parametrize(("name", "form"), CASES)
def test_results_are_those_of_the_driven_run(name, form):
    """With events, model state, a schedule and evaluations."""
    expected, records = driven(name)
    got = []
    result = run(name, form, on_step=got.append)
    for part in ("params", "model_state", "state"):
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


@pytest.mark.parametrize(("name", "form"), CASES)
def test_the_servers_books_are_those_of_the_driven_run(name, form):
    """Wherever a stretch ends, within synchronous rounds and between events too."""
    servers = [server_for(name) for _ in range(2)]
    one = Driven(servers[0], job_for(name))
    two = Compiled(servers[1], job_for(name), *FORM_ARGUMENTS[form])
    for stop in (1, 9, 10, 11, 30, 58, 100):
        losses = [[m.loss for m in engine.advance(stop)] for engine in (two, one)]
        np.testing.assert_allclose(*losses, **ROUNDING)
        two.settle()
        (arrays, books), (expected, expected_books) = (s.snapshot() for s in servers[::-1])
        assert sorted(books.pop("held")) == sorted(expected_books.pop("held"))
        assert books == expected_books
        helpers.assert_trees_close(arrays, expected, **ROUNDING)
        tickets = [[s.held(k) and s.held(k)[:3] for k in range(K)] for s in servers]
        assert tickets[0] == tickets[1]


@pytest.mark.parametrize(("name", "form"), [("orlomo", "vmap"), ("prsgdm", "loop")])
def test_divergence_is_found_where_it_began(name, form):
    trace = trace_for(name)
    poisoned = jax.tree_util.Partial(batches, jnp.array([1, 2]))
    results = [run(name, f, batch_fn=poisoned, evaluate=None) for f in ("driven", form)]
    bad = np.flatnonzero((trace.workers == 1) & (trace.rounds == 2))[0]
    for result in results:
        assert (result.status, result.diverged_at) == ("diverged", bad)
        assert np.isnan(result.history.loss[-1])
    np.testing.assert_allclose(*(result.history.loss[:-1] for result in results), **ROUNDING)


@pytest.mark.parametrize(("name", "form"), [("orlomo", "vmap"), ("prsgdm", "loop")])
def test_a_killed_run_resumes_to_the_bit(name, form, tmp_path):
    def killing(record):
        if record.step == 57:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(name, form, checkpoint=Checkpoints(tmp_path, every=11), on_step=killing)
    assert Checkpoints(tmp_path, every=11).steps()[-1] == 55
    resumed = run(name, form, checkpoint=Checkpoints(tmp_path, every=11))
    unbroken = run(name, form)
    for part in ("params", "model_state", "state"):
        helpers.assert_trees_equal(getattr(resumed, part), getattr(unbroken, part))
    np.testing.assert_array_equal(resumed.history.loss, unbroken.history.loss)


def test_a_checkpoint_of_another_program_is_refused(tmp_path):
    run("al_sgd", "loop", checkpoint=Checkpoints(tmp_path, every=50))
    message = "another compiled: it was written with True, this run has False"
    with pytest.raises(ValueError, match=message):
        run("al_sgd", "driven", checkpoint=Checkpoints(tmp_path, every=50))


def test_what_was_handed_out_stays_as_it_is():
    """The caller's params, what evaluate saw, and the result of a run: no stretch donates them."""
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
    """Before its stretch is compiled."""
    method = make_method("orlomo", K, learning_rate=lambda step: jnp.where(step < 70, 1.0, 9.0))
    with pytest.raises(ReportRejected, match=r"must be in \[0, 1\].* at step=70, delay="):
        simulate(
            method,
            setup("orlomo")[1],
            batch_fn,
            PARAMS,
            trace_for("orlomo"),
            key=jax.random.key(0),
            model_state=STATE,
            local_learning_rate=schedule,
        )


def compile_stretch(name, num_workers, axis, batch, size=20_000):
    """The stretch's program for a linear loss, and the bytes of its params and of its carry."""
    method = make_method(name, num_workers)

    def linear(params, model_state, batch, key):
        return params @ params * batch.mean(), (model_state, {})

    order = np.tile(np.arange(num_workers), 3)
    trace = ArrivalTrace.from_workers(order, num_workers, synchronous=method.synchronous)
    server = ParameterServer(method, jnp.ones(size), num_workers, local_learning_rate=0.1)
    for worker in range(num_workers):
        server.dispatch(worker)
    ones = jax.tree_util.Partial(lambda key, worker, round: jnp.ones((2, 1)))
    keys = jax.random.split(jax.random.key(0))
    job = Job(method.local_round(linear, 2), ones, trace, *keys)
    engine = Compiled(server, job, axis, batch)
    carry = engine.load()
    plan = np.zeros((7, LENGTH), np.int32)
    args = (ones, None, carry, plan, np.int32(0), np.int32(1), *keys)
    compiled = engine.program.lower(*args).compile()
    return compiled.memory_analysis(), 4 * size, sum(x.nbytes for x in jax.tree.leaves(carry))


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_slots_are_updated_in_place(name):
    """The program's own memory does not grow with the versions: nothing copies the slots."""
    temporary = set()
    for num_workers in (4, 64):
        memory, size, carry = compile_stretch(name, num_workers, "loop", 1)
        assert memory.alias_size_in_bytes >= carry
        slots = 2 if name == "prsgdm" else num_workers
        states = {"orlomo": 1, "local_ormo_da": 1, "al_sgd": 0, "prsgdm": 3}[name]
        momentums = slots if name == "prsgdm" else 0
        assert carry < (1 + states + slots + momentums + 0.1) * size
        temporary.add(round(memory.temp_size_in_bytes / size))
    assert max(temporary) <= 6
    assert len(temporary) == 1


@pytest.mark.parametrize("axis", ["map", "vmap"])
def test_the_batch_bounds_the_memory(axis):
    """Each round of a group adds its task's parameters and its report, not the slots."""
    temporary = [
        compile_stretch("orlomo", 64, axis, batch)[0].temp_size_in_bytes for batch in (2, 6)
    ]
    assert temporary[1] - temporary[0] <= 4 * 5 * 80_000 * 1.05
    assert temporary[0] < 20 * 80_000


def test_one_program_for_every_length():
    engine = Compiled(server_for("orlomo"), job_for("orlomo"), "loop", 1)
    engine.advance(1)
    before = engine.program._cache_size()
    for stop in (2, 7, 50, 100):
        engine.advance(stop)
    assert engine.program._cache_size() == before


def convolving(params, model_state, batch, key):
    return jnp.convolve(params["b"], batch[:, 0]).sum(), (model_state, {})


@pytest.mark.parametrize(
    ("loss", "options", "expected"),
    [
        (loss_fn, {}, (True, "loop", 1)),
        (convolving, {}, (False, "loop", 1)),
        (convolving, {"compiled": True}, (True, "loop", 1)),
        (convolving, {"worker_axis": "vmap", "compute_batch": 2}, (True, "vmap", 2)),
        (loss_fn, {"worker_axis": "map"}, (True, "map", 3)),
        (loss_fn, {"compiled": False}, (False, "loop", 1)),
        (loss_fn, {"many": 1}, (False, "loop", 1)),
        (loss_fn, {"many": 1, "worker_axis": "vmap"}, (True, "vmap", 3)),
        (loss_fn, {"worker_axis": "loop", "compute_batch": 2}, (True, "loop", 1)),
    ],
)
def test_the_form_is_chosen_by_model_and_platform(loss, options, expected, monkeypatch):
    options = dict(options)
    monkeypatch.setattr(form, "MANY", options.pop("many", form.MANY))
    method = make_method("orlomo", 3)
    trace = ArrivalTrace.from_workers([0, 1, 2] * 4, 3)
    server = ParameterServer(method, PARAMS, 3, STATE, local_learning_rate=0.1)
    keys = jax.random.split(jax.random.key(0))
    job = Job(method.local_round(loss, S), batch_fn, trace, *keys)
    arguments = {"compiled": "auto", "worker_axis": "auto", "compute_batch": None} | options
    assert form.choose(**arguments, server=server, job=job) == expected


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"compiled": "yes"}, ValueError, "`compiled` must be .* got compiled='yes'"),
        ({"worker_axis": "pmap"}, ValueError, "`worker_axis` must be .* got worker_axis='pmap'"),
        ({"compute_batch": 0}, ValueError, "`compute_batch` must be ≥ 1, got compute_batch=0"),
        ({"compute_batch": 1.5}, TypeError, "compute_batch=1.5"),
        (
            {"compiled": False, "worker_axis": "vmap"},
            ValueError,
            "`worker_axis` must be \"loop\" where compiled=False, got worker_axis='vmap'",
        ),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        run("orlomo", "loop", **{"worker_axis": "auto", "compiled": "auto"} | options)


def test_a_rule_may_keep_a_random_key():
    method = make_method("al_sgd", K)
    noisy = method._replace(rule=optax.chain(method.rule, optax.add_noise(0.01, 0.5, key=0)))
    options = {"local_learning_rate": schedule, "model_state": STATE, "key": jax.random.key(0)}
    job = (noisy, setup("al_sgd")[1], batch_fn, PARAMS, trace_for("al_sgd"))
    driven, compiled = (simulate(*job, **options, compiled=form) for form in (False, True))
    helpers.assert_trees_close(driven.params, compiled.params, **ROUNDING)

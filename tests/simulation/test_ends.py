"""How a run ends: with the result that it announced, or with an error before its first step."""

import signal
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from orlomo_jax import (
    ArrivalTrace,
    Callback,
    Checkpointer,
    ThreadWorkers,
    make_method,
    simulate,
    train,
)
from orlomo_jax.methods import METHOD_NAMES
from orlomo_jax.recording.interrupts import put_off_interrupts
from orlomo_jax.server.state import start_momentum
from tests.support import helpers

K, S, T = 2, 2, 10


def loss_fn(params, model_state, batch, key):
    return jnp.mean((params - batch) ** 2), (model_state, {})


def batch_fn(key, worker, round):
    return jnp.ones((S, 3))


def on_threads(method=None, batch_fn=batch_fn, **options):
    method = make_method("orlomo", K, S) if method is None else method
    common = {"key": jax.random.key(0), "local_learning_rate": 0.1, "num_steps": T}
    return train(method, loss_fn, batch_fn, jnp.zeros(3), ThreadWorkers(), **common | options)


def simulated(engine):
    def run(method=None, batch_fn=batch_fn, **options):
        method = make_method("orlomo", K, S) if method is None else method
        trace = ArrivalTrace.from_workers([0, 1] * (T // 2), K, synchronous=method.synchronous)
        common = {"key": jax.random.key(0), "local_learning_rate": 0.1, "trace": trace}
        common["engine"] = engine
        return simulate(method, loss_fn, batch_fn, jnp.zeros(3), **common | options)

    return run


RUNS = {"threads": on_threads, "compiled": simulated("compiled"), "eager": simulated("eager")}
runs = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)


class Slow(NamedTuple):
    momentum: Any


def with_momentum():
    """A transformation whose state has a field of the name that a rule's has, and does nothing."""
    return optax.GradientTransformationExtraArgs(
        lambda params: Slow(jnp.zeros(1)), lambda updates, state, params, **_: (updates, state)
    )


def chained(name, *others):
    method = make_method(name, K, S)
    return method.with_rule(optax.chain(*others, method.rule))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=() if x in ("orlomo", "prsgdm") else pytest.mark.slow)
        for x in METHOD_NAMES
    ],
)
def test_a_state_with_several_momentums_loses_no_run(name):
    steps = []
    method = chained(name, optax.zero_nans(), with_momentum())
    result = on_threads(method, callbacks=[lambda record: steps.append(record.step)])
    assert (result.status, steps[-1]) == ("finished", T)
    if name != "al_sgd":
        norm = jnp.linalg.norm(result.rule_state[-1].momentum)
        assert result.health.momentum_norm == pytest.approx(float(norm), rel=1e-6)


def test_the_momentum_of_a_chain_is_the_rules():
    rule = make_method("prsgdm", K, S).rule
    state = optax.chain(optax.zero_nans(), with_momentum(), rule).init(jnp.zeros(3))
    helpers.assert_trees_equal(start_momentum(state), jnp.zeros(3))
    assert start_momentum(optax.zero_nans().init(jnp.zeros(3))) is None
    assert start_momentum(with_momentum().init(None)).shape == (1,)
    report = optax.zero_nans().update(helpers.report(), None)[1]
    assert start_momentum(report) is None


@runs
@pytest.mark.parametrize("value", [{"loss": "low"}, {"loss": jnp.ones(2)}, 3.0])
def test_what_evaluate_returns_is_checked_before_the_first_step(run, value):
    steps = []
    with pytest.raises(TypeError, match=r"`evaluate` must return \{name: scalar\}"):
        run(evaluate=lambda params, model_state: value, callbacks=[steps.append])
    assert not steps


@runs
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jitted"])
def test_a_slip_in_evaluate_shows_before_the_first_step(run, wrap):
    steps = []
    with pytest.raises(KeyError, match="kernel"):
        run(
            evaluate=wrap(lambda params, model_state: {"a": model_state["kernel"]}),
            model_state={"b": jnp.ones(1)},
            callbacks=[steps.append],
        )
    assert not steps


@runs
@pytest.mark.parametrize(
    "value",
    [{"loss": jnp.ones(2)}, {"loss": {"train": 1.0}}, {"loss": 1j}, 3.0, {"a": 0, "b": None}],
)
def test_what_a_jitted_evaluate_returns_is_checked_before_the_first_step(run, value):
    steps = []
    with pytest.raises(TypeError, match=r"`evaluate` must return \{name: scalar\}"):
        run(evaluate=jax.jit(lambda params, model_state: value), callbacks=[steps.append])
    assert not steps


@runs
@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: jax.tree_util.Partial(f, scale=2.0)])
def test_the_test_compiles_a_jitted_evaluate_that_later_calls_run(run, wrap):
    """It is traced once before the first step, and only called when it is due."""
    events = []

    @jax.jit
    def evaluate(params, model_state, scale=1.0):
        events.append("traced")
        jax.debug.callback(lambda: events.append("called"))
        return {"sum": scale * params.sum(), "count": 3, "good": True}

    result = run(
        evaluate=wrap(evaluate), evaluate_every=5, callbacks=[lambda _: events.append("step")]
    )
    jax.effects_barrier()
    assert events[:2] == ["traced", "step"]
    assert (events.count("traced"), events.count("called")) == (1, 2)
    assert [set(e.metrics) for e in result.history.evaluations] == [{"sum", "count", "good"}] * 2


def test_without_jit_a_jitted_evaluate_is_called():
    calls = []
    with jax.disable_jit():
        simulated("eager")(
            evaluate=jax.jit(lambda params, _: calls.append(float(params.sum())) or {"a": 1.0})
        )
    assert calls[0] == 0


@runs
def test_the_trial_is_no_evaluation(run):
    calls = []

    def evaluate(params, model_state):
        calls.append(float(params.sum()))
        return {"sum": params.sum()}

    result = run(evaluate=evaluate, evaluate_every=5)
    assert calls[0] == 0
    assert [e.metrics["sum"] for e in result.history.evaluations] == calls[1:]
    assert [e.step for e in result.history.evaluations] == [5, 10]


@pytest.mark.parametrize("run", [on_threads, simulated("eager")], ids=["threads", "eager"])
def test_on_step_ends_the_run_and_it_can_go_on(run, tmp_path):
    steps, checkpoint = [], Checkpointer(tmp_path, every=100)

    def until(last):
        def on_step(record):
            steps.append(record.step)
            return record.step == last

        return on_step

    result = run(callbacks=[until(4)], checkpoint=checkpoint)
    assert (result.status, result.diverged_at) == ("stopped", None)
    assert result.history.step.tolist() == steps == [1, 2, 3, 4]
    assert checkpoint.steps() == [4]
    result = run(callbacks=[until(None)], checkpoint=checkpoint)
    assert result.status == "finished"
    assert result.history.step.tolist() == steps == list(range(1, T + 1))


def test_a_compiled_run_ends_after_the_segment():
    steps = []

    def on_step(record):
        steps.append(record.step)
        return record.step == 3

    result = RUNS["compiled"](callbacks=[on_step], evaluate=lambda p, m: {}, evaluate_every=5)
    assert result.status == "stopped"
    assert result.history.step.tolist() == steps == [1, 2, 3, 4, 5]
    unbroken = RUNS["compiled"]()
    np.testing.assert_array_equal(result.history.loss, unbroken.history.loss[:5])


@runs
def test_every_callback_is_told_of_start_steps_and_end(run):
    told = []

    class Teller(Callback):
        def on_start(self, step, num_steps):
            told.append((step, num_steps))

        def on_step(self, record):
            told.append(record.step)

        def on_end(self, result):
            told.append(result.status)

    seen = []
    result = run(callbacks=[Teller(), seen.append])
    assert told == [(0, T), *range(1, T + 1), "finished"]
    assert [record.step for record in seen] == result.history.step.tolist()


@runs
def test_a_callback_may_raise_stop_iteration(run):
    def on_step(record):
        raise StopIteration

    result = run(callbacks=[on_step], evaluate=lambda p, m: {}, evaluate_every=3)
    assert result.status == "stopped"
    assert result.history.step[-1] <= 3


@runs
def test_a_run_that_is_stopped_by_its_last_step_has_finished(run):
    assert run(callbacks=[lambda record: record.step == T]).status == "finished"
    assert run(callbacks=[lambda record: record.step]).status == "finished", (
        "True, not anything true"
    )


@runs
def test_ctrl_c_saves_a_checkpoint(run, tmp_path):
    checkpoint = Checkpointer(tmp_path, every=100)

    def on_step(record):
        if record.step == 4:
            signal.raise_signal(signal.SIGINT)

    options = {"evaluate": lambda params, model_state: {}, "evaluate_every": 5}
    with pytest.raises(KeyboardInterrupt):
        run(callbacks=[on_step], checkpoint=checkpoint, **options)
    [step] = checkpoint.steps()
    assert 4 <= step <= 5
    result = run(checkpoint=checkpoint, **options)
    assert result.history.step.tolist() == list(range(1, T + 1))


@runs
def test_a_second_ctrl_c_comes_at_once(run, tmp_path):
    checkpoint = Checkpointer(tmp_path, every=100)

    def on_step(record):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(callbacks=[on_step], checkpoint=checkpoint)
    assert checkpoint.steps() == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_only_the_main_threads_own_ctrl_c_is_put_off():
    mine = lambda signum, frame: None  # noqa: E731
    before = signal.signal(signal.SIGINT, mine)
    try:
        with put_off_interrupts(True) as pressed:
            assert signal.getsignal(signal.SIGINT) is mine
        assert not pressed()
    finally:
        signal.signal(signal.SIGINT, before)
    with put_off_interrupts(False), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)

"""Which checkpoints are refused, and by which words: of other settings, trees, versions, traces."""

import collections

import jax
import jax.numpy as jnp
import optax
import pytest

from orlomo_jax import ArrivalTrace, Checkpointer, Compiled, make_method, simulate
from orlomo_jax.recording import identity
from tests.support import helpers
from tests.support.real_runs import Killed, killed_at
from tests.support.small_runs import METHOD, S, batches, loss_fn, other_loss_fn, run

ORDER = [0, 1, 1, 0, 2, 1, 0, 1, 2, 2, 0, 1, 1, 0, 2, 0, 1, 2, 1, 0, 0, 2, 1, 1]
EVENTS = [(3, "joined", 2), (4, "lost", 0), (5, "redispatched", 0)]
EVENTS += [(12, "lost", 2), (12, "redispatched", 2)]  # after the last step of a shorter run


CHANGES = {
    "beta": ({"method": {"momentum": 0.5}}, "momentum: it was written with 0.9, this run has 0.5"),
    "eta": ({"method": {"learning_rate": 0.5}}, "learning_rate: it was written with 1.0, this run"),
    "weight": ({"method": {"delay_weight": lambda delay: 0.1}}, "delay_weight: .* with 0.1"),
    "frozen": ({"method": {"frozen": {"a": True, "b": False}}}, "method.frozen"),
    "masters": ({"method": {"master_params": False}}, "master_params: it was written with True"),
    "accumulators": ({"method": {"accumulator_dtype": jnp.float32}}, "accumulator_dtype"),
    "chain": ({"chain": optax.clip_by_global_norm(1.0)}, "rule.init: .* with .*orlomo.*chain"),
    "S": (
        {"method": {"num_local_steps": 3}},
        "num_local_steps: it was written with 2, this run has 3",
    ),
    "decay": ({"weight_decay": 0.1}, "weight_decay: it was written with 0.0, this run has 0.1"),
    "transform": ({"gradient_transform": optax.clip(1.0)}, "gradient_transform"),
    "loss": ({"loss_fn": other_loss_fn}, "round_fn.loss_fn: .*other_loss_fn"),
    "data": ({"value": 2.0}, r"batch_fn.args\[0\]: .* with float32"),
    "gamma": ({"rate": 0.01001}, "local_learning_rate: .* with 0.01, this run has 0.01001"),
    "schedule": ({"rate": lambda step: 0.01}, "local_learning_rate"),
    "name": ({"params": {"a": jnp.zeros(1), "z": jnp.ones(1)}}, r"params: .*\['b'\] .*\['z'\]"),
    "dtype": ({"params": {"a": jnp.zeros(1), "b": jnp.ones(1, jnp.bfloat16)}}, "sent as bfloat16"),
    "shape": ({"params": {"a": jnp.zeros(1), "b": jnp.ones(2)}}, r"\['b'\] float32\[2\]"),
}


@pytest.fixture(scope="module", params=["simulate", "train"])
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return folder, request.param, run(folder, request.param)


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_with_another_setting_is_refused(saved, change):
    folder, runtime, first = saved
    options, message = CHANGES[change]
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(ValueError, match=f"must be of this run, got one of another .*{message}"):
        run(folder, runtime, **options)
    assert sorted(path.name for path in folder.iterdir()) == before
    helpers.assert_trees_equal(run(folder, runtime).params, first.params)


def test_another_value_in_a_chain_is_refused(tmp_path):
    run(tmp_path, chain=optax.clip_by_global_norm(1.0))
    with pytest.raises(ValueError, match=r"max_norm: it was written with 1.0, this run has 2.0"):
        run(tmp_path, chain=optax.clip_by_global_norm(2.0))


def test_another_order_of_leaves_is_refused(tmp_path):
    one = collections.OrderedDict(a=jnp.zeros(1), b=jnp.ones(1))
    run(tmp_path, params=one)
    with pytest.raises(ValueError, match=r"params: .* with \['a'\] .*, this run has \['b'\]"):
        run(tmp_path, params=collections.OrderedDict(reversed(one.items())))


@pytest.mark.parametrize("runtime", ["simulate", "train"])
def test_other_versions_and_settings_of_jax_are_refused(tmp_path, runtime, monkeypatch):
    first = run(tmp_path, runtime)
    with (
        jax.default_matmul_precision("float32"),
        pytest.raises(ValueError, match=r"jax_default_matmul_precision: .* None, .* float32"),
    ):
        run(tmp_path, runtime)
    theirs = identity.metadata.version
    for name in ("orlomo-jax", "jax", "jaxlib"):
        with monkeypatch.context() as patch:
            other = {name: "9.9"}
            patch.setattr(identity, "_version", lambda x, other=other: other.get(x) or theirs(x))
            with pytest.raises(ValueError, match=f"another {name} version: .*9.9.*any_version"):
                run(tmp_path, runtime)
            again = run(tmp_path, runtime, any_version=True)
            helpers.assert_trees_equal(again.params, first.params)


def test_optax_counts_where_it_is_in_use():
    plain = make_method(**METHOD)
    chained = plain._replace(rule=optax.chain(optax.scale(1.0), plain.rule))
    used = [set(identity.versions(dict(method.fingerprint))) for method in (plain, chained)]
    assert used[1] - used[0] == {"optax version"}


@pytest.mark.parametrize(("first", "then"), [("simulate", "train"), ("train", "simulate")])
def test_what_the_folder_holds_is_said(tmp_path, first, then):
    run(tmp_path, first)
    with pytest.raises(ValueError, match=f"run by: it was written with {first}, .* has {then}"):
        run(tmp_path, then)


def test_the_journal_of_a_real_run_is_seen(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, "train", callbacks=[killed_at(2)])
    with pytest.raises(ValueError, match="has a run by train"):
        run(tmp_path)


def longer(folder, num_steps, events=EVENTS, order=ORDER, **options):
    events = [event for event in events if event[0] < num_steps]
    return simulate(
        make_method("orlomo", 3, S),
        loss_fn,
        batches(),
        {"a": jnp.zeros(1)},
        trace=ArrivalTrace.from_workers(order[:num_steps], 3, events=events),
        key=jax.random.key(0),
        local_learning_rate=0.01,
        checkpoint=None if folder is None else Checkpointer(folder, every=5),
        **options,
    )


@pytest.mark.parametrize(
    "engine", ["eager", "compiled", pytest.param(Compiled(rounds="vmap"), marks=pytest.mark.slow)]
)
def test_a_longer_trace_goes_on(tmp_path, engine):
    steps = []
    for num_steps in (9, 12, 24):
        callbacks = [lambda record: steps.append(record.step)] if num_steps > 9 else []
        result = longer(tmp_path, num_steps, engine=engine, callbacks=callbacks)
    assert steps == list(range(10, 25))
    unbroken = longer(None, 24, engine=engine)
    assert result.trace == unbroken.trace
    helpers.assert_trees_equal(result.params, unbroken.params)


@pytest.mark.slow
def test_as_many_rounds_stay_together_in_a_longer_trace(tmp_path):
    order = [0, 1, 2] * 4 + [0] * 12
    engine = Compiled(rounds="vmap")
    longer(tmp_path, 12, [], order, engine=engine)
    result = longer(tmp_path, 24, [], order, engine=engine)
    unbroken = longer(None, 24, [], order, engine=engine)
    helpers.assert_trees_close(result.params, unbroken.params, 1e-6)
    with pytest.raises(ValueError, match="max_batch: it was written with 3, this run has 2"):
        longer(tmp_path, 24, [], order, engine=Compiled(rounds="vmap", max_batch=2))


def test_who_is_absent_at_the_start_is_of_the_past(tmp_path):
    order = [0, 1] * 12
    longer(tmp_path, 12, [], order)
    with pytest.raises(ValueError, match="another trace"):
        longer(tmp_path, 24, [(13, "joined", 2)], order)


def test_another_past_is_refused(tmp_path):
    longer(tmp_path, 14)
    with pytest.raises(ValueError, match=r"`trace` must have the 14 steps .* got 9"):
        longer(tmp_path, 9)
    others = (
        [(4, "joined", 2), *EVENTS[1:]],
        EVENTS[:1] + EVENTS[3:],
        EVENTS[:3],
        [*EVENTS[:3], (13, "lost", 2), (13, "redispatched", 2)],
        EVENTS[1:],
    )
    for events in others:
        with pytest.raises(ValueError, match="another trace"):
            longer(tmp_path, 20, events)

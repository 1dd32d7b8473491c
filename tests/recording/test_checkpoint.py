"""Broken and resumed runs end as unbroken ones, to the bit."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orlomo_jax import (
    ArrivalTrace,
    Checkpointer,
    simulate,
)
from orlomo_jax.methods import METHOD_NAMES
from tests.support import helpers, toy
from tests.support.toy import PARAMS, STATE, K, batch_fn, loss_fn, method_of, schedule

EVENTS = [(2, "joined", 2), (9, "lost", 1), (11, "redispatched", 1), (20, "left", 0)]


class Killed(BaseException):
    pass


def trace_for(name, seed=0):
    if name == "orlomo":
        order = [0, 1, 0, 2, 0, 1, 2, 2, 0, 2, 0, 2, 0, 1, 1, 2, 0, 1, 0, 2, 1, 1, 2, 1, 2, 1, 1, 2]
        return ArrivalTrace.from_workers(order, K, events=EVENTS)
    return toy.trace_of(name, 28, seed)


def run(name, checkpoint=None, kill_at=None, seed=0, params=PARAMS, **options):
    def on_step(record):
        if record.step == kill_at:
            raise Killed

    arguments = {
        "trace": trace_for(name),
        "key": jax.random.key(seed),
        "model_state": STATE,
        "local_learning_rate": schedule,
        "evaluate": toy.evaluate,
        "evaluate_every": 5,
        "callbacks": [on_step],
        "checkpoint": checkpoint,
    }
    return simulate(method_of(name), loss_fn, batch_fn, params, **arguments | options)


def assert_same(resumed, unbroken):
    for part in ("params", "model_state", "rule_state"):
        helpers.assert_trees_equal(getattr(resumed, part), getattr(unbroken, part))
    for left, right in zip(resumed.history, unbroken.history, strict=True):
        np.testing.assert_array_equal(np.asarray(left, object), np.asarray(right, object))
    assert (resumed.status, resumed.trace) == (unbroken.status, unbroken.trace)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHOD_NAMES)
def test_a_killed_run_resumes_to_the_bit(name, tmp_path):
    unbroken = run(name)
    steps = []
    for attempt, kill_at in enumerate((3, 11, 12, 27, None)):
        checkpoint = Checkpointer(tmp_path, every=4)
        before = checkpoint.steps()
        assert (not before) == (attempt < 2), "each attempt but the first two finds one"
        steps.append(max(before, default=0))
        if kill_at is None:
            assert_same(run(name, checkpoint), unbroken)
        else:
            with pytest.raises(Killed):
                run(name, checkpoint, kill_at)
    assert steps == [0, 0, 8, 8, 24]


def placements():
    """Of one leaf, which the others go along with: a device of the user's choice, and two."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    halves = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    return [jax.devices()[-1], halves]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["compiled", "eager"])
@pytest.mark.parametrize("place", placements(), ids=["device", "mesh"])
def test_a_resumed_run_goes_on_where_its_parameters_were(place, engine, tmp_path):
    params = PARAMS | {"a": jax.device_put(PARAMS["a"], place)}

    checkpoint = Checkpointer(tmp_path, every=4)
    with pytest.raises(Killed):
        run("orlomo", checkpoint, kill_at=11, params=params, engine=engine)
    resumed = run("orlomo", checkpoint, params=params, engine=engine)
    unbroken = run("orlomo", params=params, engine=engine)
    assert_same(resumed, unbroken)
    for name in ("a", "b"):
        assert resumed.params[name].sharding == unbroken.params[name].sharding
        assert resumed.params[name].devices() == params["a"].devices()


@pytest.mark.slow
def test_leaves_without_entries_and_of_16_bits_are_saved_too(tmp_path):
    params = PARAMS | {"b": jnp.ones(2, jnp.bfloat16), "empty": jnp.zeros((0, 3))}
    unbroken = run("orlomo", params=params)
    with pytest.raises(Killed):
        run("orlomo", Checkpointer(tmp_path, every=4), kill_at=11, params=params)
    assert_same(run("orlomo", Checkpointer(tmp_path, every=4), params=params), unbroken)


def test_a_finished_run_is_not_run_again(tmp_path):
    first = run("orlomo", Checkpointer(tmp_path, every=10))
    again = run("orlomo", Checkpointer(tmp_path, every=10), kill_at=28)
    assert_same(again, first)


def test_the_newest_readable_one_wins(tmp_path):
    with pytest.raises(Killed):
        run("al_sgd", Checkpointer(tmp_path, every=4, keep=3), kill_at=17)
    assert Checkpointer(tmp_path, every=4).steps() == [8, 12, 16]
    shutil.rmtree(tmp_path / "16" / "arrays")
    (tmp_path / "12" / "notes" / "metadata").write_text("{")
    with pytest.warns(UserWarning, match="16 is damaged and skipped"):
        resumed = run("al_sgd", Checkpointer(tmp_path, every=4))
    assert_same(resumed, run("al_sgd"))


def test_notes_of_another_step_are_damage(tmp_path):
    with pytest.raises(Killed):
        run("al_sgd", Checkpointer(tmp_path, every=4, keep=3), kill_at=17)
    shutil.rmtree(tmp_path / "16" / "notes")
    shutil.copytree(tmp_path / "8" / "notes", tmp_path / "16" / "notes")
    with pytest.warns(UserWarning, match="16 is damaged and skipped: its notes are of step 8"):
        resumed = run("al_sgd", Checkpointer(tmp_path, every=4))
    assert_same(resumed, run("al_sgd"))


def test_an_unfinished_checkpoint_is_none(tmp_path):
    (tmp_path / "8.orbax-checkpoint-tmp").mkdir(parents=True)
    assert Checkpointer(tmp_path, every=4).newest() is None


@pytest.mark.parametrize(
    ("name", "options", "part"),
    [
        ("orlomo", {}, "method"),
        ("al_sgd", {"seed": 1}, "key"),
        ("al_sgd", {"trace": trace_for("al_sgd", seed=1)}, "trace"),
        ("al_sgd", {"local_learning_rate": 0.1}, "local_learning_rate"),
        ("al_sgd", {"local_learning_rate": lambda t: schedule(t) / 2}, "local_learning_rate"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, name, options, part):
    run("al_sgd", Checkpointer(tmp_path, every=10))
    with pytest.raises(ValueError, match=f"got one of another {part}"):
        run(name, Checkpointer(tmp_path, every=10), **options)


def test_a_checkpoint_of_other_trees_is_refused(tmp_path):
    run("al_sgd", Checkpointer(tmp_path, every=10))
    with pytest.raises(ValueError, match=r"another params: .* nothing, .* \['more'\] float32\[1\]"):
        run("al_sgd", Checkpointer(tmp_path, every=10), params=PARAMS | {"more": jnp.ones(1)})


def test_no_pickle_is_written(tmp_path):
    run("al_sgd", Checkpointer(tmp_path, every=10))
    contents = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert contents
    assert not any(b"cpickle" in data.lower() or data.startswith(b"\x80\x04") for data in contents)


@pytest.mark.parametrize("options", [{"every": 0}, {"every": 1, "keep": 0}])
def test_bad_arguments(tmp_path, options):
    with pytest.raises(ValueError, match="must be ≥ 1"):
        Checkpointer(tmp_path, **options)

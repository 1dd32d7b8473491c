"""Which checkpoints are refused, and by which words: other runs, other users, damage, bad paths."""

import collections
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest

from orlomo_jax import (
    METHOD_NAMES,
    ArrivalTrace,
    Checkpoints,
    Threads,
    identity,
    make_method,
    simulate,
    train,
)
from tests import helpers
from tests.real_runs import Killed, killed_at

K, S, T = 2, 2, 12
ORDER = [0, 1, 1, 0, 2, 1, 0, 1, 2, 2, 0, 1, 1, 0, 2, 0, 1, 2, 1, 0, 0, 2, 1, 1]
EVENTS = [(3, "joined", 2), (4, "lost", 0), (5, "redispatched", 0)]
EVENTS += [(12, "lost", 2), (12, "redispatched", 2)]  # after the last step of a shorter run
METHOD = {"name": "orlomo", "num_workers": K}


def loss_fn(params, model_state, batch, key):
    return sum(jnp.sum((x - batch) ** 2) for x in jax.tree.leaves(params)), (model_state, {})


def other_loss_fn(params, model_state, batch, key):
    return loss_fn(params, model_state, batch, key)


def ones(steps, key, worker, round):
    return steps


def batches(num_steps=S, value=1.0):
    return jax.tree_util.Partial(ones, jnp.full((num_steps, 1), value))


def run(
    folder,
    runtime="simulate",
    *,
    method=(),
    chain=None,
    loss_fn=loss_fn,
    num_local_steps=S,
    value=1.0,
    rate=0.01,
    num_steps=T,
    params=None,
    any_version=False,
    **options,
):
    method = make_method(**METHOD | dict(method))
    if chain is not None:
        method = method._replace(rule=optax.chain(chain, method.rule))
    names = ("weight_decay", "gradient_transform")
    local = {name: options.pop(name) for name in names if name in options}
    round_fn = method.local_round(loss_fn, num_local_steps, **local)
    job = method, round_fn, batches(num_local_steps, value)
    params = {"a": jnp.zeros(1), "b": jnp.ones(1)} if params is None else params
    every = {"checkpoint": Checkpoints(folder, every=5, any_version=any_version)}
    options = {"key": jax.random.key(0), "local_learning_rate": rate} | every | options
    if runtime == "train":
        return train(*job, params, Threads(K), num_steps=num_steps, **options)
    trace = [0, 1] * (num_steps // 2)
    trace = ArrivalTrace.from_workers(trace, K, synchronous=method.synchronous)
    return simulate(*job, params, trace, **options)


CHANGES = {
    "beta": ({"method": {"momentum": 0.5}}, "momentum: it was written with 0.9, this run has 0.5"),
    "eta": ({"method": {"learning_rate": 0.5}}, "learning_rate: it was written with 1.0, this run"),
    "weight": ({"method": {"delay_weight": lambda delay: 0.1}}, "delay_weight: .* with 0.1"),
    "frozen": ({"method": {"frozen": {"a": True, "b": False}}}, "method.frozen"),
    "masters": ({"method": {"master_params": False}}, "master_params: it was written with True"),
    "accumulators": ({"method": {"accumulator_dtype": jnp.float32}}, "accumulator_dtype"),
    "chain": ({"chain": optax.clip_by_global_norm(1.0)}, "rule.init: .* with .*orlomo.*chain"),
    "S": ({"num_local_steps": 3}, "num_local_steps: it was written with 2, this run has 3"),
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
        run(tmp_path, "train", on_step=killed_at(2))
    with pytest.raises(ValueError, match="holds a run by train"):
        run(tmp_path)


def longer(folder, num_steps, events=EVENTS, order=ORDER, **options):
    events = [event for event in events if event[0] < num_steps]
    method = make_method("orlomo", 3)
    return simulate(
        method,
        method.local_round(loss_fn, S),
        batches(),
        {"a": jnp.zeros(1)},
        ArrivalTrace.from_workers(order[:num_steps], 3, events=events),
        key=jax.random.key(0),
        local_learning_rate=0.01,
        checkpoint=None if folder is None else Checkpoints(folder, every=5),
        **options,
    )


@pytest.mark.parametrize(
    "options", [{"compiled": False}, {"compiled": True}, {"worker_axis": "vmap"}]
)
def test_a_longer_trace_goes_on(tmp_path, options):
    steps = []
    for num_steps in (9, 12, 24):
        watch = {"on_step": lambda record: steps.append(record.step)} if num_steps > 9 else {}
        result = longer(tmp_path, num_steps, **options, **watch)
    assert steps == list(range(10, 25))
    unbroken = longer(None, 24, **options)
    assert result.trace == unbroken.trace
    helpers.assert_trees_equal(result.params, unbroken.params)


def test_as_many_rounds_stay_together_in_a_longer_trace(tmp_path):
    order = [0, 1, 2] * 4 + [0] * 12
    longer(tmp_path, 12, [], order, worker_axis="vmap")
    result = longer(tmp_path, 24, [], order, worker_axis="vmap")
    unbroken = longer(None, 24, [], order, worker_axis="vmap")
    helpers.assert_trees_close(result.params, unbroken.params, 1e-6)
    with pytest.raises(ValueError, match="compute_batch: it was written with 3, this run has 2"):
        longer(tmp_path, 24, [], order, worker_axis="vmap", compute_batch=2)


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


@pytest.mark.parametrize("runtime", ["simulate", "train"])
@pytest.mark.parametrize("name", METHOD_NAMES)
def test_a_leaf_without_entries_resumes(tmp_path, runtime, name):
    options = {"method": {"name": name}, "params": {"a": jnp.zeros(1), "b": jnp.zeros((0, 3))}}
    options["num_steps"] = 14
    with pytest.raises(Killed):
        run(tmp_path, runtime, on_step=killed_at(12), **options)  # a whole round after 10
    resumed = run(tmp_path, runtime, **options)
    assert resumed.params["b"].shape == (0, 3)
    assert resumed.history.step[-1] == 14


WRITE = """
import sys, time
from orlomo_jax import Checkpoints
with Checkpoints(sys.argv[1], every=1).alone():
    print("in", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("runtime", ["simulate", "train"])
def test_one_run_at_a_time_has_the_folder(tmp_path, runtime):
    held = "another run writes its checkpoints into .*: wait for its end, or choose another folder"
    with Checkpoints(tmp_path, every=1).alone(), pytest.raises(BlockingIOError, match=held):
        run(tmp_path, runtime)
    command = [sys.executable, "-c", WRITE, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(BlockingIOError, match=held):
            run(tmp_path, runtime)
        other.kill()
    with pytest.raises(Killed):
        run(tmp_path, runtime, on_step=killed_at(3))
    run(tmp_path, runtime)


def edit(folder, runtime, change):
    """Change the notes of the newest checkpoint as an editor would."""
    path = folder / str(T) / "notes" / "metadata"
    step, notes = json.loads(path.read_text())
    change(notes, notes if runtime == "train" else notes["runs"][0])
    path.write_text(json.dumps([step, notes]))


def without_server(notes, run):
    del run["server"]


def a_text(notes, run):
    run["server"]["rounds"] = ["1", "2"]


def another_step(notes, run):
    run["server"]["step"] = T + 1


def unknown_version(notes, run):
    run["server"]["held"][0][2] = 1


def wrong_evaluations(notes, run):
    run["evaluations"] = [[1]]


def no_identity(notes, run):
    notes["identity"] = None


def no_notes(notes, run):
    notes.clear()


EDITS = (without_server, a_text, another_step, unknown_version, wrong_evaluations)


@pytest.mark.parametrize("runtime", ["simulate", "train"])
@pytest.mark.parametrize("change", [*EDITS, no_identity, no_notes])
def test_edited_notes_are_damage(tmp_path, runtime, change):
    run(tmp_path, runtime)
    edit(tmp_path, runtime, change)
    with pytest.raises(ValueError, match=f"{tmp_path / str(T)} is damaged"):
        run(tmp_path, runtime)


def test_a_removed_setting_is_named(tmp_path):
    run(tmp_path)
    edit(tmp_path, "simulate", lambda notes, run: notes["identity"].pop("keys"))
    with pytest.raises(ValueError, match="another keys: it was written with nothing"):
        run(tmp_path)


@pytest.mark.parametrize("url", ["gs://bucket/run", "s3://bucket/run", "file:///tmp/run"])
def test_urls_are_refused_before_anything_is_made(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"must be a folder on this machine, got '[a-z0-9]+://"):
        Checkpoints(url, every=1)
    assert not list(tmp_path.iterdir())


def test_the_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Checkpoints("~/run", every=1).directory == tmp_path / "run"


@pytest.mark.parametrize("runtime", ["simulate", "train"])
def test_a_folder_that_cannot_be_written_is_noticed_before_the_first_step(tmp_path, runtime):
    (tmp_path / ".lock").mkdir()  # root may write into read-only folders
    with pytest.raises(OSError, match=f"checkpoints cannot be written there.*{tmp_path}"):
        run(tmp_path, runtime, on_step=killed_at(1))


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Checkpoints(tmp_path / "file" / "run", every=1)


@pytest.mark.parametrize(
    ("missing", "message"), [("orbax.checkpoint", "need Orbax"), ("msgpack", "msgpack")]
)
def test_why_orbax_cannot_be_imported(tmp_path, monkeypatch, missing, message):
    with monkeypatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "orbax"]:
            patch.delitem(sys.modules, name)
        patch.setitem(sys.modules, missing, None)
        with pytest.raises(ImportError, match=message) as caught:
            Checkpoints(tmp_path, every=1)
    assert ("pip install" in str(caught.value)) == (missing == "orbax.checkpoint")

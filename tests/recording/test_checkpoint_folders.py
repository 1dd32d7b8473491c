"""Folders of checkpoints: who may write there, damage, odd leaves, bad paths, a missing Orbax."""

import json
import subprocess
import sys

import jax.numpy as jnp
import pytest

from orlomo_jax import Checkpointer
from orlomo_jax.methods import METHOD_NAMES
from tests.support.real_runs import Killed, killed_at
from tests.support.small_runs import T, run


@pytest.mark.parametrize("runtime", ["simulate", "train"])
@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=() if x == "orlomo" else pytest.mark.slow) for x in METHOD_NAMES],
)
def test_a_leaf_without_entries_resumes(tmp_path, runtime, name):
    options = {"method": {"name": name}, "params": {"a": jnp.zeros(1), "b": jnp.zeros((0, 3))}}
    options["num_steps"] = 14
    with pytest.raises(Killed):
        run(tmp_path, runtime, callbacks=[killed_at(12)], **options)  # a whole round after 10
    resumed = run(tmp_path, runtime, **options)
    assert resumed.params["b"].shape == (0, 3)
    assert resumed.history.step[-1] == 14


WRITE = """
import sys, time
from orlomo_jax import Checkpointer
with Checkpointer(sys.argv[1], every=1).alone():
    print("in", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("runtime", ["simulate", pytest.param("train", marks=pytest.mark.slow)])
def test_one_run_at_a_time_has_the_folder(tmp_path, runtime):
    held = "another run writes its checkpoints into .*: wait for its end, or choose another folder"
    with Checkpointer(tmp_path, every=1).alone(), pytest.raises(BlockingIOError, match=held):
        run(tmp_path, runtime)
    command = [sys.executable, "-c", WRITE, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(BlockingIOError, match=held):
            run(tmp_path, runtime)
        other.kill()
    with pytest.raises(Killed):
        run(tmp_path, runtime, callbacks=[killed_at(3)])
    run(tmp_path, runtime)


def edit(folder, change):
    """Change the notes of the newest checkpoint as an editor would."""
    path = folder / str(T) / "notes" / "metadata"
    step, notes, *version = json.loads(path.read_text())
    change(notes, notes["runs"][0])
    path.write_text(json.dumps([step, notes, *version]))


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


def divergence_in_words(notes, run):
    run["first_nonfinite"] = "never"


def no_identity(notes, run):
    notes["identity"] = None


def no_notes(notes, run):
    notes.clear()


EDITS = (without_server, a_text, another_step, unknown_version, wrong_evaluations)
EDITS += (divergence_in_words,)


@pytest.mark.parametrize("runtime", ["simulate", pytest.param("train", marks=pytest.mark.slow)])
@pytest.mark.parametrize("change", [*EDITS, no_identity, no_notes])
def test_edited_notes_are_damage(tmp_path, runtime, change):
    run(tmp_path, runtime)
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=f"{tmp_path / str(T)} is damaged"):
        run(tmp_path, runtime)


def test_a_removed_setting_is_named(tmp_path):
    run(tmp_path)
    edit(tmp_path, lambda notes, run: notes["identity"].pop("keys"))
    with pytest.raises(ValueError, match="another keys: it was written with nothing"):
        run(tmp_path)


@pytest.mark.parametrize("url", ["gs://bucket/run", "s3://bucket/run", "file:///tmp/run"])
def test_urls_are_refused_before_anything_is_made(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"must be a folder on this machine, got '[a-z0-9]+://"):
        Checkpointer(url, every=1)
    assert not list(tmp_path.iterdir())


def test_the_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Checkpointer("~/run", every=1).directory == tmp_path / "run"


@pytest.mark.parametrize("runtime", ["simulate", "train"])
def test_a_folder_that_cannot_be_written_is_noticed_before_the_first_step(tmp_path, runtime):
    (tmp_path / ".lock").mkdir()  # root may write into read-only folders
    with pytest.raises(OSError, match=f"checkpoints cannot be written there.*{tmp_path}"):
        run(tmp_path, runtime, callbacks=[killed_at(1)])


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Checkpointer(tmp_path / "file" / "run", every=1)


@pytest.mark.parametrize(
    ("missing", "message"), [("orbax.checkpoint", "need Orbax"), ("msgpack", "msgpack")]
)
def test_why_orbax_cannot_be_imported(tmp_path, monkeypatch, missing, message):
    with monkeypatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "orbax"]:
            patch.delitem(sys.modules, name)
        patch.setitem(sys.modules, missing, None)
        with pytest.raises(ImportError, match=message) as caught:
            Checkpointer(tmp_path, every=1)
    assert ("pip install" in str(caught.value)) == (missing == "orbax.checkpoint")

"""The commands keep compiled programs on disk, and the results stay the same bit for bit."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import compare, quickstart, records, reproduce, train

ROOT = Path(__file__).parents[2]
COMPILER = (shlex.split(os.environ.get("CXX", "")) or ["g++"])[0]
SETTINGS = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
TRAIN = (
    "experiments.train --dataset digits --model mlp --epochs 1 --batch-size 16 --workers 2 "
    "--local-iterations 4"
).split()
SETUP = "from experiments.compilation_cache import keep_compiled_programs as keep; "
NATIVE = """
import hashlib, jax, jax.numpy as jnp
from experiments.compilation_cache import keep_compiled_programs
from experiments.models import native
keep_compiled_programs()
def loss(kernel):
    return jnp.sum(native.convolve(jnp.ones((2, 8, 8, 4)), kernel, 1) ** 2)
gradient = jax.jit(jax.grad(loss))(jnp.linspace(-1, 1, 3 * 3 * 4 * 4).reshape(3, 3, 4, 4))
print(hashlib.sha256(gradient.tobytes()).hexdigest())
"""


def environment(caches: Path, **changes: str) -> dict[str, str]:
    """Return the environment of a user with that cache folder, and without settings of JAX."""
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return kept | {"XDG_CACHE_HOME": str(caches)} | changes


def python(*args: str, **options) -> str:
    """Run Python at the root of the project and return its output."""
    run = subprocess.run(
        [sys.executable, *args], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, **options
    )
    return run.stdout


def programs(caches: Path) -> dict[str, bytes]:
    """Return the kept programs by name."""
    folder = caches / "orlomo_jax" / "compiled"
    return {path.name: path.read_bytes() for path in folder.glob("*-cache")}


def test_the_second_process_compiles_nothing(tmp_path):
    code = SETUP + "import jax; keep(); print(jax.jit(lambda x: x + 1)(1))"
    assert python("-c", code, env=environment(tmp_path)) == "2\n"
    kept = programs(tmp_path)
    assert any(name.startswith("jit__lambda") for name in kept)
    assert python("-c", code, env=environment(tmp_path)) == "2\n"
    assert programs(tmp_path) == kept


@pytest.mark.slow
def test_results_are_the_same_without_with_and_from_the_cache(tmp_path):
    """The second process finds every program; a damaged one is compiled anew."""
    output = tmp_path / "runs.jsonl"
    command = ["-m", *TRAIN, "--output", str(output)]
    python(*command, env=environment(tmp_path, JAX_ENABLE_COMPILATION_CACHE="0"))
    assert programs(tmp_path) == {}
    python(*command, env=environment(tmp_path))
    kept = programs(tmp_path)
    assert any(name.startswith("jit_run-") for name in kept)
    python(*command, env=environment(tmp_path))
    assert programs(tmp_path) == kept
    for name in kept:
        path = tmp_path / "orlomo_jax" / "compiled" / name
        path.write_bytes(kept[name][: len(kept[name]) // 2])
    python(*command, env=environment(tmp_path))
    rows = records.read(output)
    assert len(rows) == 4
    assert len({row["parameters"] for row in rows}) == 1
    assert all(row["curve"] == rows[0]["curve"] for row in rows)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason="needs a C++ compiler")
def test_programs_that_call_native_code_are_kept(tmp_path):
    """Tracing registers the function that the kept program calls."""
    first = python("-c", NATIVE, env=environment(tmp_path))
    kept = programs(tmp_path)
    assert any(name.startswith("jit_loss-") for name in kept)
    assert python("-c", NATIVE, env=environment(tmp_path)) == first
    assert programs(tmp_path) == kept


@pytest.mark.parametrize("command", [train, compare, quickstart, reproduce])
def test_every_command_keeps_its_programs(command, tmp_path, monkeypatch):
    """Each command calls the function once its arguments are valid."""

    def keep():
        raise SystemExit("kept")

    monkeypatch.setattr(command, "keep_compiled_programs", keep)
    output = ["--output", str(tmp_path / "rows.jsonl")]
    with pytest.raises(SystemExit, match="kept"):
        command.main(["--table", "2", *output] if command is reproduce else [])


def test_the_users_choice_stays(tmp_path):
    show = SETUP + "import jax, os; keep(); print(jax.config.jax_compilation_cache_dir, "
    show += "jax.config.jax_persistent_cache_min_compile_time_secs)"
    own = environment(tmp_path, JAX_COMPILATION_CACHE_DIR="own")
    assert python("-c", show, env=own) == "own 1.0\n"
    in_code = show.replace(
        "keep()", "jax.config.update('jax_compilation_cache_dir', 'own'); keep()"
    )
    assert python("-c", in_code, env=environment(tmp_path)) == "own 1.0\n"
    small = environment(tmp_path, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="3")
    folder = tmp_path / "orlomo_jax" / "compiled"
    assert python("-c", show, env=small) == f"{folder} 3.0\n"


def test_child_processes_use_the_folder(tmp_path):
    """They read it from the environment, as do Ray's workers of a local cluster."""
    child = "import jax; print(jax.config.jax_compilation_cache_dir)"
    code = SETUP + "import subprocess, sys; keep(); "
    code += f"subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    folder = tmp_path / "orlomo_jax" / "compiled"
    assert python("-c", code, env=environment(tmp_path)) == f"{folder}\n"


def test_a_folder_that_cannot_be_written_is_not_used(tmp_path):
    file = tmp_path / "file"
    file.touch()
    code = SETUP + "import jax, os; keep(); print(jax.config.jax_compilation_cache_dir, "
    code += f"{SETTINGS[0]!r} in os.environ, jax.jit(lambda x: x + 1)(1))"
    assert python("-c", code, env=environment(file)) == "None False 2\n"

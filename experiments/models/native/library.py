"""Compiles the library of C++ sources in this folder, and calls its functions from JAX."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.compilation_cache import cache_folder

FOLDER = Path(__file__).parent
"""The folder of the sources."""


def call(name: str, shapes: Any, *arguments: jax.Array, **attributes: Any) -> Sequence[jax.Array]:
    """Call a function of the library; return its results, float32 of these shapes."""
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.ffi.ffi_call(_target(name), results, vmap_method="sequential")(
        *arguments, **attributes
    )


def need_float32(**arguments: jax.Array) -> None:
    """Raise TypeError if an argument is not float32."""
    for name, x in arguments.items():
        if x.dtype != jnp.float32:
            raise TypeError(f"`{name}` must be float32, got {x.dtype}")


@cache
def _target(name: str) -> str:
    """Register a function of the library, and return the name of its target in XLA."""
    target = f"orlomo_native_{name}"
    function = getattr(load(), name)
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(function), platform="cpu")
    return target


_loading = threading.Lock()


def load() -> ctypes.CDLL:
    """Return the library; the first call compiles it if no earlier process has.

    Raises:
        OSError: If the compiler is missing or fails.
    """
    with _loading:
        return _load()


@cache
def _load() -> ctypes.CDLL:
    folder = cache_folder("native")
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            return ctypes.CDLL(str(build(Path(temporary))))
    return ctypes.CDLL(str(build(folder)))


def _sources() -> list[Path]:
    return sorted(FOLDER.glob("*.cc"))


def build(folder: Path) -> Path:
    """Compile the sources for this processor with ``$CXX`` (g++), and return the library's path.

    Args:
        folder: The folder of compiled libraries. A library of the same sources, JAX, compiler and
            machine is used again.

    Raises:
        OSError: If the compiler is missing or fails.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    identity = jax.__version__, compiler, _run([*compiler, "--version"]), _machine()
    digest = hashlib.sha256(repr(identity).encode())
    for source in sorted(FOLDER.glob("*.h")) + _sources():
        digest.update(source.read_bytes())
    path = folder.absolute() / f"layers-{digest.hexdigest()[:16]}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        made = Path(temporary) / path.name
        command = [*compiler, "-std=c++17", "-O3", "-march=native", "-w", "-shared", "-fPIC"]
        _run([*command, f"-I{jax.ffi.include_dir()}", *map(str, _sources()), "-o", str(made)])
        made.replace(path)  # so that other processes never see a partial file
    return path


def _run(command: list[str]) -> str:
    """Run a compiler, and return what it prints."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        text = getattr(error, "stderr", None) or str(error)
        reasons = [line for line in text.splitlines() if "error:" in line]
        raise OSError(
            f"{shlex.join(command[:1])} could not compile {FOLDER}: install GCC or Clang, set "
            "$CXX, or choose another convolution than 'native'\n"
            + "\n".join(reasons or [text])[:2000]
        ) from error


def _machine() -> str:
    """Return the system, and the instructions of its processor as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.platform()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join([platform.platform(), *sorted({x for x in lines if x.startswith(wanted)})])

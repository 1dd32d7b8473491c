"""Compiles the library of C++ sources in this folder, and calls its functions from JAX."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

FOLDER = Path(__file__).parent
"""The folder of the sources."""


def call(name: str, shapes: Any, *arguments: jax.Array, **attributes: Any) -> Sequence[jax.Array]:
    """Call a function of the library; return its results, float32 of these shapes."""
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.ffi.ffi_call(_target(name), results, vmap_method="sequential")(
        *arguments, **attributes
    )


@cache
def _target(name: str) -> str:
    """Register a function of the library, and return the name of its target in XLA."""
    target = f"orlomo_native_{name}"
    function = getattr(_library(), name)
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(function), platform="cpu")
    return target


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(build()))


def _sources() -> list[Path]:
    return sorted(FOLDER.glob("*.cc"))


def build(folder: Path = Path(".cache/native")) -> Path:
    """Compile the sources for this processor with ``$CXX`` (g++), and return the library's path.

    Args:
        folder: The folder of compiled libraries. A library of the same sources, JAX, compiler and
            processor is used again.

    Raises:
        RuntimeError: If the compiler is missing or fails.
    """
    compiler = os.environ.get("CXX", "g++")
    digest = hashlib.sha256(f"{jax.__version__} {compiler} {_processor()}".encode())
    for source in sorted(FOLDER.glob("*.h")) + _sources():
        digest.update(source.read_bytes())
    path = folder.absolute() / f"layers-{digest.hexdigest()[:16]}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        made = Path(temporary) / path.name
        command = [compiler, "-std=c++17", "-O3", "-march=native", "-w", "-shared", "-fPIC"]
        command += [f"-I{jax.ffi.include_dir()}", *map(str, _sources()), "-o", str(made)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            text = getattr(error, "stderr", None) or str(error)
            raise RuntimeError(f"{compiler} could not compile {FOLDER}: {text[-2000:]}") from error
        made.replace(path)  # whole or not at all, if two processes compile
    return path


def _processor() -> str:
    """Return the instructions that the processor has, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))

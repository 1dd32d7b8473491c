"""Compiles the library of C++ sources in this folder, and calls its functions from JAX."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
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
    target = f"orlomo_onednn_{name}"
    function = getattr(_library(), name)
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(function), platform="cpu")
    return target


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(build()))


def _sources() -> list[Path]:
    return sorted(FOLDER.glob("*.cc"))


def build(folder: Path = Path(".cache/onednn")) -> Path:
    """Compile the sources with ``$CXX`` (g++), and return the library's path.

    Args:
        folder: The folder of compiled libraries; one of the same sources and JAX is used again.

    Raises:
        RuntimeError: If oneDNN or the compiler is missing, or the compiler fails.
    """
    prefix, compiler = Path(sys.prefix), os.environ.get("CXX", "g++")
    if not (prefix / "lib" / "libdnnl.so").exists():
        raise RuntimeError(
            f"oneDNN is missing in {prefix}: pip install -e '.[onednn]', or change convolution"
        )
    digest = hashlib.sha256(f"{jax.__version__} {prefix} {compiler}".encode())
    for source in sorted(FOLDER.glob("*.h")) + _sources():
        digest.update(source.read_bytes())
    path = folder.absolute() / f"layers-{digest.hexdigest()[:16]}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        made = Path(temporary) / path.name
        command = [compiler, "-std=c++17", "-O3", "-w", "-shared", "-fPIC", "-fopenmp"]
        command += [f"-I{jax.ffi.include_dir()}", f"-I{prefix / 'include'}"]
        command += [*map(str, _sources()), "-o", str(made), f"-L{prefix / 'lib'}", "-ldnnl"]
        command += [f"-Wl,-rpath,{prefix / 'lib'}"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            text = getattr(error, "stderr", None) or str(error)
            raise RuntimeError(f"{compiler} could not compile {FOLDER}: {text[-2000:]}") from error
        made.replace(path)  # whole or not at all, if two processes compile
    return path

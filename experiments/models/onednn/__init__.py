"""Computes convolutions on a CPU with oneDNN, through JAX's foreign function interface.

It needs a C++ compiler and ``pip install -e '.[onednn]'``. The source is compiled at the first use
and kept in a folder of compiled libraries. The results are those of ``jax.lax`` up to rounding.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SOURCE = Path(__file__).with_name("convolution.cc")
FORWARD, INPUT_GRADIENT, KERNEL_GRADIENT = np.arange(3)
"""The values of ``Kind`` in the source."""


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(images: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """Return the convolution of a batch of images.

    Args:
        images: float32[batch, height, width, channels].
        kernel: float32[height, width, channels, output channels].
        stride: The step between two outputs, ≥ 1.
        padding: The zeros around each image, ≥ 0.

    Returns:
        float32[batch, …, output channels]. It has a gradient of first order.

    Raises:
        TypeError: If an argument is not float32.
        RuntimeError: If the library cannot be compiled.
    """
    batch, *size, _ = images.shape
    *window, _, channels = kernel.shape
    outputs = [(n + 2 * padding - k) // stride + 1 for n, k in zip(size, window, strict=True)]
    return _call(FORWARD, images, kernel, (batch, *outputs, channels), stride, padding)


def _forward(images, kernel, stride, padding):
    return convolve(images, kernel, stride, padding), (images, kernel)


def _backward(stride, padding, saved, gradient):
    images, kernel = saved
    return (
        _call(INPUT_GRADIENT, gradient, kernel, images.shape, stride, padding),
        _call(KERNEL_GRADIENT, images, gradient, kernel.shape, stride, padding),
    )


convolve.defvjp(_forward, _backward)


def _call(kind: Any, left: jax.Array, right: jax.Array, shape: Any, *settings: int) -> jax.Array:
    for name, x in (("images", left), ("kernel", right)):
        if x.dtype != jnp.float32:
            raise TypeError(f"`{name}` must be float32 for oneDNN, got {x.dtype}")
    call = jax.ffi.ffi_call(
        _target(), jax.ShapeDtypeStruct(shape, jnp.float32), vmap_method="sequential"
    )
    stride, padding = map(np.int64, settings)
    return call(left, right, kind=np.int64(kind), stride=stride, padding=padding)


@cache
def _target() -> str:
    """Compile the source if necessary, load it, and return the name of its target in XLA."""
    library = ctypes.CDLL(str(build()))
    target = "orlomo_onednn_convolution"
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(library.Convolution2D), platform="cpu")
    return target


def build(folder: Path = Path(".cache/onednn")) -> Path:
    """Compile the source with ``$CXX`` (g++), and return the library's path.

    Args:
        folder: The folder of compiled libraries; one of the same source and JAX is used again.

    Raises:
        RuntimeError: If oneDNN or the compiler is missing, or the compiler fails.
    """
    prefix, compiler = Path(sys.prefix), os.environ.get("CXX", "g++")
    if not (prefix / "lib" / "libdnnl.so").exists():
        raise RuntimeError(
            f"oneDNN is missing in {prefix}: pip install -e '.[onednn]', or change convolution"
        )
    digest = hashlib.sha256(f"{jax.__version__} {prefix} {compiler}".encode())
    digest.update(SOURCE.read_bytes())
    path = folder.absolute() / f"convolution-{digest.hexdigest()[:16]}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        made = Path(temporary) / path.name
        command = [compiler, "-std=c++17", "-O3", "-w", "-shared", "-fPIC", "-fopenmp"]
        command += [f"-I{jax.ffi.include_dir()}", f"-I{prefix / 'include'}", str(SOURCE)]
        command += [
            "-o",
            str(made),
            f"-L{prefix / 'lib'}",
            "-ldnnl",
            f"-Wl,-rpath,{prefix / 'lib'}",
        ]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            text = getattr(error, "stderr", None) or str(error)
            raise RuntimeError(f"{compiler} could not compile {SOURCE}: {text[-2000:]}") from error
        made.replace(path)  # whole or not at all, if two processes compile
    return path

"""Computes convolutions with oneDNN."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.models.onednn import library

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


def _call(kind: Any, left: jax.Array, right: jax.Array, shape: Any, *numbers: int) -> jax.Array:
    for name, x in (("images", left), ("kernel", right)):
        if x.dtype != jnp.float32:
            raise TypeError(f"`{name}` must be float32 for oneDNN, got {x.dtype}")
    stride, padding = map(np.int64, numbers)
    settings = {"kind": np.int64(kind), "stride": stride, "padding": padding}
    return library.call("Convolution2D", (shape,), left, right, **settings)[0]

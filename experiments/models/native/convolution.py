"""Computes convolutions."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np

from experiments.models.native import library

FORWARD, INPUT_GRADIENT, KERNEL_GRADIENT = 0, 1, 2
"""The values of ``Kind`` in the source."""


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(images: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Return the convolution of a batch of images, with size // 2 zeros around each image.

    Args:
        images: float32[batch, height, width, channels].
        kernel: float32[size, size, channels, output channels]; the size must be odd.
        stride: The step between two outputs, ≥ 1.

    Returns:
        float32[batch, …, output channels]. It has a gradient of first order.

    Raises:
        TypeError: If an argument is not float32.
        ValueError: If an argument does not have four axes, the kernel is not square, its size is
            even, it does not have the images' channels, or the stride is not a positive integer.
        OSError: If the library cannot be compiled.
    """
    library.need_float32(images=images, kernel=kernel)
    for name, x in (("images", images), ("kernel", kernel)):
        if len(x.shape) != 4:
            raise ValueError(f"`{name}` must have 4 axes, got shape {x.shape}")
    batch, height, width, inputs = images.shape
    rows, columns, own_inputs, channels = kernel.shape
    if rows != columns or rows % 2 == 0:
        raise ValueError(f"`kernel` must be square with an odd size, got {rows}×{columns}")
    if own_inputs != inputs:
        raise ValueError(f"`kernel` must have {inputs} input channels, got {own_inputs}")
    if stride < 1 or stride != int(stride):
        raise ValueError(f"`stride` must be an integer ≥ 1, got {stride}")
    shape = batch, -(-height // stride), -(-width // stride), channels
    return _call(FORWARD, images, kernel, shape, stride)


def _forward(images, kernel, stride):
    return convolve(images, kernel, stride), (images, kernel)


def _backward(stride, saved, gradient):
    images, kernel = saved
    return (
        _call(INPUT_GRADIENT, gradient, kernel, images.shape, stride),
        _call(KERNEL_GRADIENT, images, gradient, kernel.shape, stride),
    )


convolve.defvjp(_forward, _backward)


def _call(kind: int, left: jax.Array, right: jax.Array, shape: Any, stride: int) -> jax.Array:
    settings = {"kind": np.int64(kind), "stride": np.int64(stride)}
    return library.call("Convolution2D", (shape,), left, right, **settings)[0]

"""Computes batch normalisation followed by ReLU in few passes over memory."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.models.native import library


class Normalized(NamedTuple):
    """The results of :func:`batch_norm_relu`.

    Attributes:
        features: float32[batch, height, width, channels].
        mean: The means over the batch and the pixels, float32[channels]; without a gradient.
        variance: The variances, float32[channels]; without a gradient.
    """

    features: jax.Array
    mean: jax.Array
    variance: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def batch_norm_relu(
    images: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    shortcut: jax.Array | None,
    epsilon: float,
) -> Normalized:
    """Return max(0, (x − mean) · scale / √(variance + ε) + bias + shortcut) for features x.

    Args:
        images: x, float32[batch, height, width, channels].
        scale: float32[channels].
        bias: float32[channels].
        shortcut: Features like ``images`` that are added before the ReLU, or None.
        epsilon: ε > 0.

    Returns:
        The features and the statistics. It has a gradient of first order.

    Raises:
        TypeError: If an argument is not float32.
        ValueError: If an argument has another shape, or ε is not positive.
        OSError: If the library cannot be compiled.
    """
    other = jnp.zeros(0, jnp.float32) if shortcut is None else shortcut
    library.need_float32(images=images, scale=scale, bias=bias, shortcut=other)
    if len(images.shape) != 4:
        raise ValueError(f"`images` must have 4 axes, got shape {images.shape}")
    channels = images.shape[-1:]
    wanted = images.shape if shortcut is not None else (0,)
    for name, x, shape in (
        ("scale", scale, channels),
        ("bias", bias, channels),
        ("shortcut", other, wanted),
    ):
        if x.shape != shape:
            raise ValueError(f"`{name}` must have shape {shape}, got {x.shape}")
    if not epsilon > 0:
        raise ValueError(f"`epsilon` must be > 0, got {epsilon}")
    shapes = images.shape, channels, channels
    results = library.call(
        "BatchNormForward", shapes, images, scale, bias, other, epsilon=np.float32(epsilon)
    )
    return Normalized(*results)


def _forward(images, scale, bias, shortcut, epsilon):
    result = batch_norm_relu(images, scale, bias, shortcut, epsilon)
    return result, (images, scale, shortcut is None, result)


def _backward(epsilon, saved, gradient):
    images, scale, alone, (features, mean, variance) = saved
    shapes = images.shape, scale.shape, scale.shape, (0,) if alone else images.shape
    arguments = gradient.features, images, features, scale, mean, variance
    *gradients, of_shortcut = library.call(
        "BatchNormBackward", shapes, *arguments, epsilon=np.float32(epsilon)
    )
    return *gradients, None if alone else of_shortcut


batch_norm_relu.defvjp(_forward, _backward)

"""Layers of the image networks, in three forms with the same parameters.

``xla`` uses XLA's convolution on float[batch, height, width, channels].

``matmul`` computes a convolution as one matrix product, kernel × patches, on float[channels,
height, width, batch]. In this layout the patches are copied in long contiguous runs. XLA's CPU
backend runs the gradient of its own convolution much slower inside a loop than outside. Matrix
products are as fast in a loop, and stay matrix products under ``vmap``.

``native`` computes convolutions and batch normalisation on a CPU with C++ loops, in the layout of
``xla``; see :mod:`experiments.models.native`. It is as fast in a loop as outside.

Height and width are axes 1 and 2 in all forms, so that a network is written once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.native import batch_norm_relu, convolve

ConvImpl = Literal["xla", "matmul", "native"]
HE_NORMAL = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")


@dataclass(frozen=True)
class Layers:
    """Makes layers with one implementation of convolutions.

    Attributes:
        convolution: How convolutions are computed; it also sets the layout of features.
        dtype: Dtype of features; parameters are float32.
    """

    convolution: ConvImpl = "xla"
    dtype: Any = jnp.float32

    @property
    def channel_axis(self) -> int:
        """The axis of the channels."""
        return 0 if self.convolution == "matmul" else -1

    def arrange(self, images: jax.Array) -> jax.Array:
        """Put float[batch, height, width, channels] into the layout of features."""
        return images.transpose(3, 1, 2, 0) if self.convolution == "matmul" else images

    def conv(
        self,
        channels_in: int,
        channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        bias: bool,
        rngs: nnx.Rngs,
    ) -> nnx.Conv:
        """Return a convolution with an odd kernel, He-initialised."""
        pad = kernel_size // 2
        forms = {"xla": nnx.Conv, "matmul": MatmulConv, "native": NativeConv}
        return forms[self.convolution](
            channels_in,
            channels,
            (kernel_size, kernel_size),
            strides=(stride, stride),
            padding=((pad, pad), (pad, pad)),  # as in PyTorch; "SAME" pads (0, 1) at stride 2
            use_bias=bias,
            kernel_init=HE_NORMAL,
            dtype=self.dtype,
            rngs=rngs,
        )

    def norm_relu(self, channels: int, rngs: nnx.Rngs) -> NormReLU:
        """Return batch normalisation followed by ReLU."""
        form = FusedNormReLU if self.convolution == "native" else NormReLU
        return form(
            channels,
            axis=self.channel_axis,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            rngs=rngs,
        )

    def average(self, features: jax.Array) -> jax.Array:
        """Return the means over height and width, float32[batch, channels]."""
        means = features.mean((1, 2), dtype=jnp.float32)
        return means.T if self.convolution == "matmul" else means


class NormReLU(nnx.BatchNorm):
    """An ``nnx.BatchNorm`` followed by ReLU."""

    def __call__(self, x: jax.Array, shortcut: jax.Array | None = None) -> jax.Array:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the ReLU of the normalised features, or of their sum with the shortcut."""
        x = super().__call__(x)
        return nnx.relu(x if shortcut is None else x + shortcut)


class FusedNormReLU(NormReLU):
    """The same in few passes over memory, on float32[batch, height, width, channels]."""

    def __call__(self, x: jax.Array, shortcut: jax.Array | None = None) -> jax.Array:
        """Return the same as :class:`NormReLU`, up to rounding."""
        if self.use_running_average:
            return super().__call__(x, shortcut)
        scale, bias, mean, var = self.scale, self.bias, self.mean, self.var
        assert scale is not None
        assert bias is not None
        result: Any = batch_norm_relu(x, scale[...], bias[...], shortcut, self.epsilon)
        rest = 1 - self.momentum
        mean[...] = self.momentum * mean[...] + rest * result.mean
        var[...] = self.momentum * var[...] + rest * result.variance
        return result.features


class NativeConv(nnx.Conv):
    """An ``nnx.Conv`` on float32[batch, height, width, channels], computed by C++ loops."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Map float32[batch, height, width, channels_in] to float32[batch, …, channels]."""
        del out_sharding  # only the result on one device is computed
        strides: Any = self.strides
        outputs: Any = convolve(inputs, self.kernel[...], strides[0])
        return outputs if self.bias is None else outputs + self.bias[...]


class MatmulConv(nnx.Conv):
    """An ``nnx.Conv`` on float[channels, height, width, batch], as a matrix product."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Map float[channels_in, height, width, batch] to float[channels, …, batch]."""
        bias = None if self.bias is None else self.bias[...]
        inputs, kernel, bias = self.promote_dtype(
            (inputs, self.kernel[...], bias), dtype=self.dtype
        )
        cut = patches(inputs, self.kernel_size, self.strides, self.padding)
        pixels = cut.shape[1:]
        columns = cut.reshape(len(cut), math.prod(pixels))
        outputs = kernel.reshape(-1, self.out_features).T @ columns
        outputs = outputs if bias is None else outputs + bias[:, None]
        return jnp.reshape(outputs, (self.out_features, *pixels), out_sharding=out_sharding)


def patches(x: jax.Array, kernel_size, strides, padding) -> jax.Array:
    """Return each output pixel's inputs, float[kernel pixels · channels, height, width, batch].

    Example:
        >>> row = jnp.arange(3.0).reshape(1, 1, 3, 1)
        >>> patches(row, (1, 3), (1, 1), ((0, 0), (1, 1)))[:, 0, :, 0]
        Array([[0., 0., 1.],
               [0., 1., 2.],
               [1., 2., 0.]], dtype=float32)
    """
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    rows, columns = (
        [slice(start, size - kernel + start + 1, stride) for start in range(kernel)]
        for size, kernel, stride in zip(x.shape[1:3], kernel_size, strides, strict=True)
    )
    return jnp.concatenate([x[:, row, column] for row in rows for column in columns])


def max_pool(x: jax.Array) -> jax.Array:
    """Return the maxima of 2×2 windows; both layouts work."""
    return nnx.max_pool(x, (2, 2), (2, 2))

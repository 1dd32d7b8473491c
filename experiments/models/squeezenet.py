"""SqueezeNet for small images, in Flax NNX.

Iandola et al. 2016 with simple bypass, a 3×3 stem at stride 1, 2×2 max-pooling after the stem,
fire 4 and fire 8, and BatchNorm after every convolution except the last.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.layers import Layers, max_pool

# (output channels, squeeze channels, whether max-pooling follows) of fire 2, …, fire 9
FIRES = (
    (128, 16, False),
    (128, 16, False),
    (256, 32, True),
    (256, 32, False),
    (384, 48, False),
    (384, 48, False),
    (512, 64, True),
    (512, 64, False),
)
BYPASSED = (1, 3, 5)  # fire 3, 5 and 7


class Unit(nnx.Module):
    """A convolution, BatchNorm and ReLU."""

    def __init__(
        self, channels_in: int, channels: int, kernel_size: int, layers: Layers, rngs: nnx.Rngs
    ) -> None:
        """Make the layers; the image keeps its size."""
        self.conv = layers.conv(channels_in, channels, kernel_size, bias=True, rngs=rngs)
        self.norm = layers.norm_relu(channels, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map features with ``channels_in`` channels to features with ``channels``."""
        return self.norm(self.conv(x))


class Fire(nnx.Module):
    """A 1×1 squeeze, then parallel 1×1 and 3×3 expansions."""

    def __init__(
        self, channels_in: int, channels: int, squeeze: int, layers: Layers, rngs: nnx.Rngs
    ) -> None:
        """Make the three units; each expansion has half of the channels."""
        self.channel_axis = layers.channel_axis
        self.squeeze = Unit(channels_in, squeeze, 1, layers, rngs)
        self.expand1 = Unit(squeeze, channels // 2, 1, layers, rngs)
        self.expand3 = Unit(squeeze, channels // 2, 3, layers, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map features with ``channels_in`` channels to features with ``channels``."""
        x = self.squeeze(x)
        return jnp.concatenate([self.expand1(x), self.expand3(x)], axis=self.channel_axis)


class SqueezeNet(nnx.Module):
    """SqueezeNet: 734 986 parameters for 10 classes, 781 156 for 100.

    As in PyTorch, convolutions have biases even before a BatchNorm.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        width: float = 1.0,
        channels: int = 3,
        layers: Layers,
        rngs: nnx.Rngs,
    ) -> None:
        """Initialise the float32 parameters.

        Args:
            num_classes: The number of logits.
            width: Factor on all channel counts.
            channels: The channels of an image.
            layers: How layers are computed; the logits are float32.
            rngs: The source of the initial parameters.
        """

        def scaled(count: int) -> int:
            return max(2, 2 * round(count * width / 2))

        self.layers = layers
        self.stem = Unit(channels, scaled(96), 3, layers, rngs)
        widths = [scaled(96), *(scaled(out) for out, _, _ in FIRES)]
        self.fires = nnx.List(
            Fire(before, after, scaled(squeeze), layers, rngs)
            for before, after, (_, squeeze, _) in zip(widths, widths[1:], FIRES, strict=False)
        )
        in_float32 = replace(layers, dtype=jnp.float32)
        self.classifier = in_float32.conv(widths[-1], num_classes, 1, bias=True, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return logits float32[batch, classes] of images float[batch, height, width, channels]."""
        x = max_pool(self.stem(self.layers.arrange(images)))
        for index, (fire, (_, _, pooled)) in enumerate(zip(self.fires, FIRES, strict=True)):
            x = fire(x) + x if index in BYPASSED else fire(x)
            x = max_pool(x) if pooled else x
        return self.layers.average(self.classifier(x))

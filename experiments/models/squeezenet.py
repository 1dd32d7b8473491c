"""SqueezeNet for small images: simple bypass, BatchNorm after every convolution but the last.

Iandola et al. 2016, with a 3×3 stem at stride 1 and 2×2 max-pooling after the stem, fire 4 and
fire 8.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.resnet import HE_NORMAL, batch_norm

conv = partial(nnx.Conv, kernel_init=HE_NORMAL)  # with biases: PyTorch's default
# (channels out, channels of the squeeze, max-pooling after it); fire 2 … fire 9
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

    def __init__(self, channels_in: int, channels: int, kernel: int, dtype, rngs: nnx.Rngs) -> None:
        """Make the layers; the image keeps its size."""
        pad = kernel // 2
        self.conv = conv(
            channels_in,
            channels,
            (kernel, kernel),
            padding=((pad, pad), (pad, pad)),
            dtype=dtype,
            rngs=rngs,
        )
        self.norm = batch_norm(channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map float[batch, height, width, channels_in] to the unit's features."""
        return nnx.relu(self.norm(self.conv(x)))


class Fire(nnx.Module):
    """A 1×1 squeeze, then 1×1 and 3×3 expansions side by side."""

    def __init__(self, channels_in: int, channels: int, squeeze: int, dtype, rngs: nnx.Rngs):
        """Make the three units; each expansion has half of the channels."""
        self.squeeze = Unit(channels_in, squeeze, 1, dtype, rngs)
        self.expand1 = Unit(squeeze, channels // 2, 1, dtype, rngs)
        self.expand3 = Unit(squeeze, channels // 2, 3, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map float[batch, height, width, channels_in] to float[…, channels]."""
        x = self.squeeze(x)
        return jnp.concatenate([self.expand1(x), self.expand3(x)], axis=-1)


class SqueezeNet(nnx.Module):
    """SqueezeNet: 734 986 parameters for 10 classes, 781 156 for 100."""

    def __init__(
        self,
        num_classes: int,
        *,
        width: float = 1.0,
        channels: int = 3,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Initialise the parameters, float32 whatever ``dtype`` the features are computed in.

        Args:
            num_classes: The number of logits.
            width: Scales all channel counts.
            channels: Those of an image.
            dtype: In which features are computed; the logits are float32.
            rngs: The source of the initial parameters.
        """

        def scaled(count: int) -> int:
            return max(2, 2 * round(count * width / 2))

        self.stem = Unit(channels, scaled(96), 3, dtype, rngs)
        widths = [scaled(96), *(scaled(out) for out, _, _ in FIRES)]
        self.fires = nnx.List(
            Fire(before, after, scaled(squeeze), dtype, rngs)
            for before, after, (_, squeeze, _) in zip(widths, widths[1:], FIRES, strict=False)
        )
        self.classifier = conv(widths[-1], num_classes, (1, 1), rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return logits float32[batch, classes] of images float[batch, height, width, channels]."""
        x = max_pool(self.stem(images))
        for index, (fire, (_, _, pooled)) in enumerate(zip(self.fires, FIRES, strict=True)):
            x = fire(x) + x if index in BYPASSED else fire(x)
            x = max_pool(x) if pooled else x
        return self.classifier(x.astype(jnp.float32)).mean((1, 2))


def max_pool(x: jax.Array) -> jax.Array:
    """Return the maxima of 2×2 windows."""
    return nnx.max_pool(x, (2, 2), (2, 2))

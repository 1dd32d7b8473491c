"""ResNets for small images (He et al. 2016, section 4.2), in Flax NNX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.layers import HE_NORMAL, Layers


class Block(nnx.Module):
    """Two 3×3 convolutions and a shortcut without parameters (option A)."""

    def __init__(self, channels_in: int, channels: int, layers: Layers, rngs: nnx.Rngs) -> None:
        """Make a block; one that widens also halves the image."""
        self.widen = channels - channels_in
        self.channel_axis = layers.channel_axis
        stride = 2 if self.widen else 1
        self.conv1 = layers.conv(channels_in, channels, 3, stride=stride, bias=False, rngs=rngs)
        self.norm1 = layers.norm_relu(channels, rngs)
        self.conv2 = layers.conv(channels, channels, 3, bias=False, rngs=rngs)
        self.norm2 = layers.norm_relu(channels, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map features with ``channels_in`` channels to features with ``channels``."""
        shortcut = x
        if self.widen:
            before = self.widen // 2
            pad = [(0, 0)] * 4
            pad[self.channel_axis] = (before, self.widen - before)
            shortcut = jnp.pad(x[:, ::2, ::2], pad)
        x = self.norm1(self.conv1(x))
        return self.norm2(self.conv2(x), shortcut)


class ResNet(nnx.Module):
    """A ResNet of 6n + 2 layers: a stem, three stages of n blocks, a linear classifier.

    The stages have w, 2w and 4w channels; w = 16 is the paper's. ResNet20 has 269 722 parameters
    for 10 classes and 275 572 for 100.
    """

    def __init__(
        self,
        blocks: int,
        num_classes: int,
        *,
        width: int = 16,
        channels: int = 3,
        layers: Layers,
        rngs: nnx.Rngs,
    ) -> None:
        """Initialise the float32 parameters.

        Args:
            blocks: n ≥ 1, the number of blocks in a stage.
            num_classes: The number of logits.
            width: w ≥ 1.
            channels: The channels of an image.
            layers: How layers are computed; the logits are float32.
            rngs: The source of the initial parameters.
        """
        self.layers = layers
        self.stem = layers.conv(channels, width, 3, bias=False, rngs=rngs)
        self.norm = layers.norm_relu(width, rngs)
        widths = [width * 2**stage for stage in range(3) for _ in range(blocks)]
        self.blocks = nnx.List(
            Block(before, after, layers, rngs)
            for before, after in zip([width, *widths], widths, strict=False)
        )
        self.classifier = nnx.Linear(4 * width, num_classes, kernel_init=HE_NORMAL, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return logits float32[batch, classes] of images float[batch, height, width, channels]."""
        x = self.norm(self.stem(self.layers.arrange(images)))
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.layers.average(x))

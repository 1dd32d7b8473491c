"""ResNets for small images (He et al. 2016, section 4.2), in Flax NNX."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

HE_NORMAL = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")
conv3x3 = partial(
    nnx.Conv,
    kernel_size=(3, 3),
    padding=((1, 1), (1, 1)),  # PyTorch's also at stride 2, where "SAME" pads ((0, 1), (0, 1)).
    use_bias=False,
    kernel_init=HE_NORMAL,
)
batch_norm = partial(nnx.BatchNorm, momentum=0.9, epsilon=1e-5)


class Block(nnx.Module):
    """Two 3×3 convolutions and a shortcut without parameters (option A)."""

    def __init__(self, channels_in: int, channels: int, dtype, rngs: nnx.Rngs) -> None:
        """Make a block; one that widens also halves the image."""
        self.widen = channels - channels_in
        stride = 2 if self.widen else 1
        self.conv1 = conv3x3(channels_in, channels, strides=stride, dtype=dtype, rngs=rngs)
        self.norm1 = batch_norm(channels, dtype=dtype, rngs=rngs)
        self.conv2 = conv3x3(channels, channels, dtype=dtype, rngs=rngs)
        self.norm2 = batch_norm(channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map float[batch, height, width, channels_in] to a block's features."""
        shortcut = x
        if self.widen:
            before = self.widen // 2
            pad = ((0, 0), (0, 0), (0, 0), (before, self.widen - before))
            shortcut = jnp.pad(x[:, ::2, ::2], pad)
        x = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(self.norm2(self.conv2(x)) + shortcut)


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
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Initialise the parameters, float32 whatever ``dtype`` the features are computed in.

        Args:
            blocks: n ≥ 1, the blocks of a stage.
            num_classes: The number of logits.
            width: w ≥ 1.
            channels: Those of an image.
            dtype: In which features are computed; the logits are float32.
            rngs: The source of the initial parameters.
        """
        self.stem = conv3x3(channels, width, dtype=dtype, rngs=rngs)
        self.norm = batch_norm(width, dtype=dtype, rngs=rngs)
        widths = [width * 2**stage for stage in range(3) for _ in range(blocks)]
        self.blocks = nnx.List(
            Block(before, after, dtype, rngs)
            for before, after in zip([width, *widths], widths, strict=False)
        )
        self.classifier = nnx.Linear(4 * width, num_classes, kernel_init=HE_NORMAL, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return logits float32[batch, classes] of images float[batch, height, width, channels]."""
        x = nnx.relu(self.norm(self.stem(images)))
        for block in self.blocks:
            x = block(x)
        return self.classifier(x.mean((1, 2), dtype=jnp.float32))

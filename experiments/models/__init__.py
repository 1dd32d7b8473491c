"""The models of the experiments, by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments.models import mlp, native
from experiments.models.layers import ConvImpl, Layers
from experiments.models.resnet import ResNet
from experiments.models.squeezenet import SqueezeNet
from orlomo_jax import from_nnx

BLOCKS = {"resnet8": 1, "resnet20": 3, "resnet32": 5}
# Initialisation runs only once, and compiles much faster without optimisation.
QUICK_TO_COMPILE = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
NAMES = ("mlp", *BLOCKS, "squeezenet")


class Network(NamedTuple):
    """An architecture as pure functions, the same for every seed.

    Attributes:
        init: ``init(key) -> (params, model_state)``; params are float32.
        loss_fn: ``loss_fn(params, model_state, (images, labels), key)``, the mean cross-entropy in
            training mode, with the library's signature.
        predict: ``predict(params, model_state, images)``, the logits float32[batch, classes] in
            evaluation mode.
    """

    init: Callable
    loss_fn: Callable
    predict: Callable


def make(
    name: str,
    num_classes: int,
    image_shape: tuple[int, ...],
    *,
    width: float = 1.0,
    dtype=jnp.float32,
    convolution: Literal["auto", ConvImpl] = "auto",
) -> Network:
    """Return a network by name.

    Args:
        name: One of ``NAMES``.
        num_classes: The number of logits.
        image_shape: (height, width, channels); any shape for an MLP, which flattens it.
        width: Factor on the channels of a convolutional network, or on the MLP's 64 hidden units;
            the paper uses 1.
        dtype: Dtype of features, float32 or bfloat16.
        convolution: How convolutions are computed, see :mod:`experiments.models.layers`. Parameters
            are the same, results differ by rounding. ``auto`` is ``matmul`` on a CPU and ``xla``
            elsewhere; ``native`` is for a CPU, in float32.

    Raises:
        ValueError: If the name or the convolution is unknown, or the network cannot use this
            ``image_shape``, or ``native`` this platform or dtype.
        OSError: If ``native`` finds no C++ compiler that works.

    Example:
        >>> network = make("resnet20", 10, (32, 32, 3))
        >>> params, model_state = network.init(jax.random.key(0))
        >>> sum(leaf.size for leaf in jax.tree.leaves(params))
        269722
    """
    if name == "mlp":
        widths = (math.prod(image_shape), max(1, round(64 * width)), num_classes)
        return Network(
            init=lambda key: (mlp.init(key, widths), {}),
            loss_fn=partial(mlp.loss_fn, dtype=dtype),
            predict=lambda params, model_state, images: mlp.logits(params, images, dtype),
        )
    if name in NAMES and len(image_shape) != 3:
        raise ValueError(f"{name} needs images, got features of shape {image_shape}: try an mlp")
    if convolution == "auto":
        convolution = "matmul" if jax.default_backend() == "cpu" else "xla"
    if convolution == "native" and (jax.default_backend() != "cpu" or dtype != jnp.float32):
        raise ValueError(
            f"`convolution` 'native' must run on a CPU in float32, got {jax.default_backend()} and "
            f"{jnp.dtype(dtype).name}"
        )
    if convolution not in get_args(ConvImpl):
        raise ValueError(f"`convolution` must be one of {get_args(ConvImpl)}, got {convolution!r}")
    if convolution == "native":
        native.load()
    if name == "squeezenet" and min(image_shape[:2]) < 8:
        raise ValueError(
            f"squeezenet halves images three times, got {image_shape[:2]}: use a smaller `pool`"
        )
    shape = {"channels": image_shape[-1], "layers": Layers(convolution, dtype)}
    if name == "squeezenet":
        build = partial(SqueezeNet, num_classes, width=width, **shape)
    elif name in BLOCKS:
        slim = max(1, round(16 * width))
        build = partial(ResNet, BLOCKS[name], num_classes, width=slim, **shape)
    else:
        raise ValueError(f"`name` must be one of {', '.join(NAMES)}, got {name!r}")

    def adapt(key):
        return from_nnx(build(rngs=nnx.Rngs(key)), _cross_entropy)

    @partial(jax.jit, compiler_options=QUICK_TO_COMPILE)
    def init(key):
        model = adapt(key)
        return model.params, model.model_state

    abstract = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))
    model = from_nnx(abstract, _cross_entropy)
    return Network(init, model.loss_fn, model.predict)


def _cross_entropy(module: Callable, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    images, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(module(images), labels).mean()

"""A multilayer perceptron in plain JAX, for experiments that take seconds on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax


def init(key: jax.Array, widths: Sequence[int]) -> list[dict[str, jax.Array]]:
    """Return the layers' parameters, He-initialised; ``widths`` runs from input to classes.

    Example:
        >>> [layer["kernel"].shape for layer in init(jax.random.key(0), (64, 32, 10))]
        [(64, 32), (32, 10)]
    """
    keys = jax.random.split(key, len(widths) - 1)
    he_normal = jax.nn.initializers.he_normal()
    return [
        {"kernel": he_normal(k, (fan_in, fan_out)), "bias": jnp.zeros(fan_out)}
        for k, fan_in, fan_out in zip(keys, widths, widths[1:], strict=False)
    ]


def logits(params: list[dict[str, jax.Array]], images: jax.Array, dtype=jnp.float32) -> jax.Array:
    """Return float32[batch, classes] for images float[batch, …], hidden layers in ``dtype``."""
    *hidden, last = params
    images = images.reshape(len(images), -1).astype(dtype)
    for layer in jax.tree.map(lambda param: param.astype(dtype), hidden):
        images = jax.nn.relu(images @ layer["kernel"] + layer["bias"])
    return images.astype(jnp.float32) @ last["kernel"] + last["bias"]


def loss_fn(params, model_state, batch, key, *, dtype=jnp.float32):
    """Return the mean cross-entropy of a batch (images, labels), as the library expects it."""
    del key
    images, labels = batch
    losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, images, dtype), labels)
    return losses.mean(), (model_state, {})

"""Data sets as device arrays, and the order in which a worker reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Split(NamedTuple):
    """Images float32[n, …] and labels int32[n]."""

    images: jax.Array
    labels: jax.Array


def digits(test_size: int = 360) -> tuple[Split, Split]:
    """Return training and test split of scikit-learn's bundled digits (8×8, 10 classes, 1 797).

    The split is fixed. Pixels are scaled to [0, 1] and flattened to 64 features.

    Example:
        >>> train, test = digits()
        >>> train.images.shape, test.labels.shape
        ((1437, 64), (360,))
    """
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(classes))
    images = jnp.asarray(pixels[order] / 16.0, jnp.float32)
    labels = jnp.asarray(classes[order], jnp.int32)
    held_out = Split(images[:test_size], labels[:test_size])
    return Split(images[test_size:], labels[test_size:]), held_out


def shuffled_batches(split: Split, batch_size: int, num_local_steps: int) -> Callable:
    """Return ``batch_fn(key, worker, round)``: each worker reads the whole split, epoch by epoch.

    A worker's epoch e is in the order ``permutation(fold_in(fold_in(key, worker), e))``; its rounds
    follow each other through it and into the next epoch, so that a batch depends on worker and
    round alone and no example is left out.

    Args:
        split: n examples.
        batch_size: B ≥ 1.
        num_local_steps: S ≥ 1.

    Returns:
        A jit-able function to a :class:`Split` whose leaves have leading axes [S, B].

    Example:
        >>> split = Split(jnp.arange(6.0), jnp.arange(6))
        >>> batch_fn = shuffled_batches(split, batch_size=2, num_local_steps=3)
        >>> sorted(batch_fn(jax.random.key(0), 1, 0).labels.ravel().tolist())
        [0, 1, 2, 3, 4, 5]
    """
    size, per_round = len(split.labels), batch_size * num_local_steps
    num_epochs = (per_round - 1) // size + 2  # that one round can touch

    def batch_fn(key, worker, round):
        # With round = aN + b its first example is number (a·n)N + bn: no product overflows int32.
        cycles, rest = jnp.divmod(round, size)
        first_epoch, offset = jnp.divmod(rest * per_round, size)
        first_epoch = first_epoch + cycles * per_round
        worker_key = jax.random.fold_in(key, worker)

        def order(epoch):
            return jax.random.permutation(jax.random.fold_in(worker_key, epoch), size)

        orders = jnp.concatenate([order(first_epoch + e) for e in range(num_epochs)])
        chosen = jax.lax.dynamic_slice_in_dim(orders, offset, per_round)
        chosen = chosen.reshape(num_local_steps, batch_size)
        return Split(split.images[chosen], split.labels[chosen])

    return batch_fn

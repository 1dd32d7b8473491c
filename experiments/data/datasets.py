"""Loads data sets as device arrays, preprocesses and augments images, and shuffles batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data import tfds_cache
from experiments.data.shuffle import examples_at

NAMES = ("digits", *tfds_cache.SOURCES)


class Split(NamedTuple):
    """Images uint8 or float32[n, …] and labels int32[n]."""

    images: jax.Array
    labels: jax.Array


class Dataset(NamedTuple):
    """A data set on the device, as it is stored; the input of a model is ``preprocess(images)``.

    Attributes:
        name: One of ``NAMES``.
        train: The training split.
        test: The test split. For Tiny-ImageNet it is the validation split, which has public labels.
        num_classes: The number of classes; labels start at 0.
        mean: Mean of the training images in each channel, on the scale of [0, 1]; None for digits,
            which need no preprocessing.
        std: Standard deviation, likewise.
        padding: The largest random shift of a training image, in pixels; 0 is no augmentation.
    """

    name: str
    train: Split
    test: Split
    num_classes: int
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    padding: int = 0

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The shape of one image."""
        return self.train.images.shape[1:]

    def preprocess(self, images: jax.Array) -> jax.Array:
        """Return the images with mean 0 and standard deviation 1, as float32."""
        if self.mean is None or self.std is None:
            return images
        return (images / jnp.float32(255) - jnp.array(self.mean)) / jnp.array(self.std)

    def training_loss(self, loss_fn: Callable) -> Callable:
        """Return a ``loss_fn`` that augments and preprocesses stored images.

        The ``key`` of each step is split: one key for the augmentation, one for the loss.
        """

        def augmented_loss_fn(params, model_state, batch, key):
            images, labels = batch
            if self.padding:
                key, augment_key = jax.random.split(key)
                images = augment(augment_key, images, self.padding)
            return loss_fn(params, model_state, (self.preprocess(images), labels), key)

        return augmented_loss_fn


def load(
    name: str,
    data_dir: Path | None = None,
    cache_dir: Path | None = None,
    *,
    pool: int = 1,
    augmented: bool = True,
    train_size: int = 0,
) -> Dataset:
    """Return a data set by name.

    Args:
        name: One of ``NAMES``.
        data_dir: The TFDS data_dir; None is TFDS_DATA_DIR, or else ``~/tensorflow_datasets``.
        cache_dir: The cache of decoded images; None is ``orlomo_jax`` under XDG_CACHE_HOME, or else
            under ``~/.cache``.
        pool: Side of the windows over which images are averaged.
        augmented: Whether training images are cropped at random, with padding 4 (divided by
            ``pool``), and flipped.
        train_size: Keep this many training examples, the first; 0 keeps all.

    Raises:
        DataError: If the data is missing or damaged, or a package that reads it is not installed.
        ValueError: If ``name`` is unknown, ``pool`` does not divide the image size, or
            ``train_size`` is larger than the training set.

    Example:
        >>> load("digits").image_shape
        (64,)
    """
    if name == "digits":
        train, test = digits()
        return Dataset(name, _first(train, train_size), test, num_classes=10)
    if name not in NAMES:
        raise ValueError(f"`name` must be one of {', '.join(NAMES)}, got {name!r}")
    source = tfds_cache.SOURCES[name]
    if pool < 1 or source.image_shape[0] % pool:
        raise ValueError(f"`pool` must divide the image size {source.image_shape[0]}, got {pool}")
    splits = tfds_cache.arrays(name, data_dir, cache_dir)
    shrink = jnp.asarray if pool == 1 else partial(average_pool, size=pool)
    train, test = (Split(shrink(images), jnp.asarray(labels)) for images, labels in splits)
    padding = max(1, 4 // pool) if augmented else 0
    train = _first(train, train_size)
    return Dataset(name, train, test, source.num_classes, source.mean, source.std, padding)


def _first(split: Split, count: int) -> Split:
    """Return the first examples of a split, all for 0."""
    there = len(split.labels)
    if count > there:
        raise ValueError(f"`train_size` must be at most {there}, the training set, got {count}")
    return split if count == 0 else Split(split.images[:count], split.labels[:count])


def digits(test_size: int = 360) -> tuple[Split, Split]:
    """Return training and test split of scikit-learn's 1 797 digits (8×8 pixels, 10 classes).

    The split is fixed. Pixels are scaled to [0, 1] and flattened to 64 features.

    Raises:
        DataError: If scikit-learn is not installed.

    Example:
        >>> train, test = digits()
        >>> train.images.shape, test.labels.shape
        ((1437, 64), (360,))
    """
    with tfds_cache.needed("the data set digits needs scikit-learn"):
        from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(classes))
    images = jnp.asarray(pixels[order] / 16.0, jnp.float32)
    labels = jnp.asarray(classes[order], jnp.int32)
    held_out = Split(images[:test_size], labels[:test_size])
    return Split(images[test_size:], labels[test_size:]), held_out


@partial(jax.jit, static_argnames="size")
def average_pool(images: jax.Array, size: int) -> jax.Array:
    """Return the rounded means of size × size windows, uint8.

    Example:
        >>> average_pool(jnp.array([[0, 1], [2, 4]], jnp.uint8).reshape(1, 2, 2, 1), 2).ravel()
        Array([2], dtype=uint8)
    """
    count, height, width, channels = images.shape
    windows = images.reshape(count, height // size, size, width // size, size, channels)
    total = windows.astype(jnp.uint16).sum((2, 4))
    return ((total + size**2 // 2) // size**2).astype(jnp.uint8)


def augment(key: jax.Array, images: jax.Array, padding: int) -> jax.Array:
    """Pad each image with zeros, crop it at random to its old size, and flip it half the time.

    Args:
        key: A ``jax.random.key``.
        images: [batch, height, width, channels].
        padding: Number of pixels on each side.

    Example:
        >>> images = jnp.ones((5, 8, 8, 3), jnp.uint8)
        >>> augment(jax.random.key(0), images, padding=2).shape
        (5, 8, 8, 3)
    """
    crop_key, flip_key = jax.random.split(key)
    corners = jax.random.randint(crop_key, (len(images), 2), 0, 2 * padding + 1)
    flips = jax.random.bernoulli(flip_key, shape=(len(images),))
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))

    def one(image, corner, flip):
        image = jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:])
        return jnp.where(flip, image[:, ::-1], image)

    return jax.vmap(one)(padded, corners, flips)


def shuffled_batches(split: Split, batch_size: int, num_local_steps: int) -> Callable:
    """Return ``batch_fn(key, worker, round)``: each worker reads the whole split, epoch by epoch.

    The key ``fold_in(fold_in(key, worker), e)`` gives a worker's random order in epoch e. Its
    rounds read this order in sequence and continue into the next epoch. So a batch depends only on
    key, worker and round, and no example is left out.

    Args:
        split: n examples.
        batch_size: B ≥ 1.
        num_local_steps: S ≥ 1.

    Returns:
        A jit-able function that returns a :class:`Split` with leading axes [S, B]. It is a pytree
        with the split's arrays as leaves, so a jitted function that takes it as an argument does
        not compile the arrays in as constants.

    Example:
        >>> split = Split(jnp.arange(6.0), jnp.arange(6))
        >>> batch_fn = shuffled_batches(split, batch_size=2, num_local_steps=3)
        >>> sorted(batch_fn(jax.random.key(0), 1, 0).labels.ravel().tolist())
        [0, 1, 2, 3, 4, 5]
    """
    size, per_round = len(split.labels), batch_size * num_local_steps
    if size * per_round >= 2**31:
        raise ValueError(
            f"`batch_size` · `num_local_steps` must be below 2³¹ / {size} examples, "
            f"got {batch_size} · {num_local_steps}"
        )
    num_epochs = (per_round - 1) // size + 2  # the most epochs that one round can overlap

    def batch_fn(split, key, worker, round):
        # N = size, n = per_round. If round = aN + b, its first example has number (an)N + bn. This
        # form avoids the product round · n, which could overflow int32.
        cycles, rest = jnp.divmod(round, size)
        first_epoch, offset = jnp.divmod(rest * per_round, size)
        first_epoch = first_epoch + cycles * per_round
        worker_key = jax.random.fold_in(key, worker)

        epoch_keys = jax.vmap(lambda epoch: jax.random.fold_in(worker_key, epoch))(
            first_epoch + jnp.arange(num_epochs)
        )
        epochs, places = jnp.divmod(offset + jnp.arange(per_round), size)
        chosen = examples_at(epoch_keys, epochs, places, size)
        chosen = chosen.reshape(num_local_steps, batch_size)
        return Split(split.images[chosen], split.labels[chosen])

    return jax.tree_util.Partial(batch_fn, split)

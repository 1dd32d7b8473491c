"""Partitions a labelled data set among workers with unequal shares of the classes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from orlomo_jax.checks import check_count, check_number

_TRIES = 1000


def dirichlet_partition(
    labels: Any, num_workers: int, alpha: float, seed: int, min_size: int = 10
) -> list[np.ndarray]:
    """Return each worker's examples if every class is shared out by a Dirichlet distribution.

    For each class, the workers' shares are drawn from Dir(α, …, α). A small α gives each class to
    few workers; a large α gives all workers the same mixture. All shares are drawn again until
    every worker has ``min_size`` examples. NIID-Bench also takes workers that have n/K examples out
    of the draw; here they stay in it, so sizes differ more.

    Args:
        labels: The class of each example, integers[n].
        num_workers: K ≥ 1.
        alpha: α > 0.
        seed: Integer ≥ 0.
        min_size: The least number of examples of a worker, ≥ 0.

    Returns:
        K arrays of indices, int64, in random order; each example belongs to one worker.

    Raises:
        TypeError, ValueError: If an argument is out of range, or 1000 draws leave a worker with
            fewer than ``min_size`` examples.

    Example:
        >>> parts = dirichlet_partition([0, 1] * 50, num_workers=2, alpha=0.5, seed=0)
        >>> sorted(np.concatenate(parts)) == list(range(100))
        True

    References:
        Hsu, Qi and Brown, 2019 (arXiv 1909.06335). Li et al., 2022 (arXiv 2102.02079, NIID-Bench).
    """
    labels = _labels(labels)
    num_workers = check_count("num_workers", num_workers, 1)
    alpha = check_number("alpha", alpha, lambda x: 0 < x < math.inf, "finite and > 0")
    generator = np.random.default_rng(check_count("seed", seed))
    if check_count("min_size", min_size) * num_workers > len(labels):
        raise ValueError(
            f"`min_size` must be ≤ {len(labels) // num_workers} for {len(labels)} examples and "
            f"num_workers={num_workers}, got min_size={min_size}"
        )
    classes = [np.flatnonzero(labels == value) for value in np.unique(labels)]
    for _ in range(_TRIES):
        shares = generator.dirichlet(np.full(num_workers, alpha), len(classes))
        cuts = [
            (np.cumsum(share)[:-1] * len(own)).astype(int)
            for share, own in zip(shares, classes, strict=True)
        ]
        ends = zip(cuts, classes, strict=True)
        sizes = sum(np.diff(cut, prepend=0, append=len(own)) for cut, own in ends)
        if np.min(sizes) >= min_size:
            break
    else:
        raise ValueError(
            f"`alpha` must be larger, or `min_size` smaller: {_TRIES} draws with alpha={alpha:g} "
            f"left a worker with fewer than min_size={min_size} of {len(labels)} examples"
        )
    parts = [
        np.split(generator.permutation(own), cut) for own, cut in zip(classes, cuts, strict=True)
    ]
    return _shuffled(parts, num_workers, generator)


def by_class_partition(
    labels: Any, num_workers: int, classes_per_worker: int, seed: int
) -> list[np.ndarray]:
    """Return each worker's examples if it has those of a few classes only.

    The classes are dealt out in random order, as evenly as possible. The examples of a class are
    divided evenly among its workers.

    Args:
        labels: The class of each example, integers[n].
        num_workers: K ≥ 1.
        classes_per_worker: The number of classes of each worker, ≥ 1.
        seed: Integer ≥ 0.

    Returns:
        K arrays of indices, int64, in random order; each example belongs to one worker.

    Raises:
        TypeError, ValueError: If an argument is out of range, the workers have room for fewer
            classes than there are, or a class has fewer examples than workers.

    Example:
        >>> parts = by_class_partition([0, 1, 2, 3] * 5, 2, classes_per_worker=2, seed=0)
        >>> [len(part) for part in parts]
        [10, 10]

    References:
        McMahan et al., 2017 (arXiv 1602.05629).
    """
    labels = _labels(labels)
    num_workers = check_count("num_workers", num_workers, 1)
    generator = np.random.default_rng(check_count("seed", seed))
    classes = [np.flatnonzero(labels == value) for value in np.unique(labels)]
    count = len(classes)
    check_count("classes_per_worker", classes_per_worker, -(-count // num_workers), count)
    # Each worker takes the next classes of a cycle through all, so its classes are different.
    order = generator.permutation(count)
    taken = order[np.arange(num_workers * classes_per_worker) % count]
    workers = np.arange(len(taken)) // classes_per_worker
    parts = []
    for index, own in enumerate(classes):
        owners = workers[taken == index]
        if len(own) < len(owners):
            raise ValueError(
                f"`classes_per_worker` must be smaller: class {labels[own[0]]} has fewer examples "
                f"({len(own)}) than workers ({len(owners)}), got {classes_per_worker=}"
            )
        part: list[np.ndarray] = [own[:0]] * num_workers
        for owner, piece in zip(
            owners, np.array_split(generator.permutation(own), len(owners)), strict=True
        ):
            part[owner] = piece
        parts.append(part)
    return _shuffled(parts, num_workers, generator)


def _labels(labels: Any) -> np.ndarray:
    array = np.asarray(labels)
    if array.ndim != 1 or array.dtype.kind not in "iu" or not array.size:
        raise TypeError(
            "`labels` must be integers in one dimension, at least one, got "
            f"{array.dtype}{list(array.shape)}"
        )
    return array


def _shuffled(parts, num_workers: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Return each worker's parts of all classes, in random order."""
    joined = [np.concatenate([part[worker] for part in parts]) for worker in range(num_workers)]
    return [generator.permutation(own.astype(np.int64)) for own in joined]

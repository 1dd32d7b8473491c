"""Benchmarks of the layers of a ResNet20, computed in C++, against the peaks of the machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.measure import Row, in_turn
from experiments.models import native

BATCH, SIDE, LONG, CALLS = 64, 2048, 10_000_000, 10


def layers(repeats: int) -> Iterator[Row]:
    """Compare convolutions with a matrix product, batch norm and ReLU with ``np.add``.

    The features of a layer are 1 to 4 MB and stay in a cache, the vectors of ``np.add`` do not.
    """
    matrix = jax.random.normal(jax.random.key(0), (SIDE, SIDE))
    product = partial(jax.jit(jnp.matmul), matrix, matrix)
    a, b, out = np.ones((3, LONG), np.float32)
    add = partial(np.add, a, b, out=out)
    for size, channels in ((32, 16), (16, 32), (8, 64)):
        shape = (BATCH, size, size, channels)
        x, gradient = jax.random.normal(jax.random.key(1), (2, *shape))
        where = f"{channels} channels, {size}×{size}"
        work = 2 * 9 * channels * x.size / 1e9
        for name, function in _convolutions(channels).items():
            ours = partial(jax.jit(function), x, gradient)
            limit = "a matrix product", product, 2 * SIDE**3 / 1e9
            yield _row(repeats, f"{name}, {where}", ours, work, "GFLOP/s", *limit)
        for name, (function, arrays) in _batch_norms(channels).items():
            moved = 4 * arrays * x.size / 1e9
            ours = partial(jax.jit(function), x, gradient)
            limit = "np.add", add, 12 * LONG / 1e9
            yield _row(repeats, f"{name}, {where}", ours, moved, "GB/s", *limit)


def _convolutions(channels: int) -> dict[str, Callable]:
    kernel = jax.random.normal(jax.random.key(2), (3, 3, channels, channels))
    of = partial(native.convolve, stride=1)
    return {
        "convolution": lambda x, gradient: of(x, kernel),
        "its input gradient": lambda x, gradient: jax.vjp(lambda x: of(x, kernel), x)[1](gradient),
        "its kernel gradient": lambda x, gradient: jax.vjp(lambda k: of(x, k), kernel)[1](gradient),
    }


def _batch_norms(channels: int) -> dict[str, tuple[Callable, int]]:
    """Return functions, and how many arrays like x they read or write."""
    scale, bias = jnp.ones(channels), jnp.zeros(channels)

    def forward(x):
        result: Any = native.batch_norm_relu(x, scale, bias, None, 1e-5)
        return result.features

    return {
        "batch norm and ReLU": (lambda x, gradient: forward(x), 3),
        "the same and its gradient": (lambda x, gradient: jax.vjp(forward, x)[1](gradient), 10),
    }


def _row(
    repeats: int, name: str, ours: Any, work: float, unit: str, against: str, peak: Any, most: float
) -> Row:
    """Compare the work per second of ``ours`` with that of ``peak``, whose work is ``most``."""
    (timing,) = in_turn(repeats, partial(_repeated, ours), partial(_repeated, peak))
    figure, limit = CALLS * work / timing.seconds, CALLS * most / timing.limit
    return Row(name, figure, limit, unit, against, timing.ratio * work / most)


def _repeated(function: Callable[[], Any]) -> None:
    for _ in range(CALLS):
        jax.block_until_ready(function())

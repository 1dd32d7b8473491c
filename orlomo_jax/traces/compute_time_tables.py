"""Compute times of published experiments, by name."""

from __future__ import annotations

import math
from collections.abc import Callable

from orlomo_jax.checks import check_choice, check_count
from orlomo_jax.traces.compute_times import ComputeTimes, per_worker_times

_DEEPMIND_TOY = 0.58, 0.75, 1.51, 3.33
_HALOS_16 = (
    *(0.232, 0.907, 0.828, 0.347),
    *(0.574, 0.531, 0.722, 0.194),
    *(0.852, 0.132, 0.896, 0.107),
    *(0.827, 0.515, 0.527, 0.788),
)
_FORGATHER_4TO1 = 0.156, 0.312, 0.469, 0.625


def deepmind_toy(variation: float = 0.0) -> ComputeTimes:
    """Return the 4 workers of the notebook of Liu et al., 2024 (arXiv 2401.09135).

    Args:
        variation: As in :class:`ComputeTimes`.

    Example:
        >>> deepmind_toy().mean_times(4)
        array([0.58, 0.75, 1.51, 3.33])
    """
    return per_worker_times(_DEEPMIND_TOY, variation)


def halos_16(variation: float = 0.0) -> ComputeTimes:
    """Return the 16 workers of HALoS (Kim et al., 2025), in 4 groups of 4.

    The source gives relative speeds; a gradient takes 1/speed seconds.

    Args:
        variation: As in :class:`ComputeTimes`.

    Example:
        >>> (1 / halos_16().mean_times(16)[:4]).round(3).tolist()
        [0.232, 0.907, 0.828, 0.347]
    """
    return per_worker_times([1 / speed for speed in _HALOS_16], variation)


def forgather_4to1(variation: float = 0.0) -> ComputeTimes:
    """Return the 4 workers of the project forgather, the slowest 4 times slower than the fastest.

    Args:
        variation: As in :class:`ComputeTimes`.

    Example:
        >>> forgather_4to1().mean_times(4)
        array([0.156, 0.312, 0.469, 0.625])
    """
    return per_worker_times(_FORGATHER_4TO1, variation)


def sqrt_k(num_workers: int, variation: float = 0.05) -> ComputeTimes:
    """Return K workers that take √k · (1 + variation · |Z|) seconds, Z ~ N(0, 1) and k = 1, …, K.

    These are the workers of Ringmaster LMO (Sadiev et al., 2026, arXiv 2605.18174).

    Args:
        num_workers: K ≥ 1.
        variation: The factor of |Z|, ≥ 0.

    Example:
        >>> sqrt_k(4, variation=0.0).mean_times(4).round(3)
        array([1.   , 1.414, 1.732, 2.   ])
    """
    count = check_count("num_workers", num_workers, 1)
    model = ComputeTimes(variation=variation, noise="half-normal")
    scale = model.half_normal_mean  # the factors of a model have the mean 1
    times = tuple(math.sqrt(k) * scale for k in range(1, count + 1))
    return ComputeTimes(times, variation, noise="half-normal")


_TABLES: dict[str, tuple[int | None, Callable[..., ComputeTimes]]] = {
    "deepmind_toy": (len(_DEEPMIND_TOY), deepmind_toy),
    "halos_16": (len(_HALOS_16), halos_16),
    "forgather_4to1": (len(_FORGATHER_4TO1), forgather_4to1),
    "sqrt_k": (None, sqrt_k),
}
COMPUTE_TIME_NAMES = tuple(_TABLES)
"""The names that :func:`named_compute_times` knows."""


def named_compute_times(name: str, num_workers: int | None = None) -> ComputeTimes:
    """Return a model by its name, for command lines.

    Args:
        name: One of ``COMPUTE_TIME_NAMES``.
        num_workers: K; needed for "sqrt_k". For the others it may be None, or their K.

    Raises:
        ValueError: If the name is unknown, or K does not fit.

    Example:
        >>> named_compute_times("deepmind_toy") == deepmind_toy()
        True
        >>> named_compute_times("halos_16", num_workers=8)
        Traceback (most recent call last):
        ...
        ValueError: `num_workers` must be 16 for 'halos_16', got num_workers=8
    """
    check_choice("name", name, _TABLES)
    count, table = _TABLES[name]
    if count is None:
        if num_workers is None:
            raise ValueError(f"`num_workers` must be given for {name!r}, got num_workers=None")
        return table(num_workers)
    if num_workers not in (None, count):
        raise ValueError(f"`num_workers` must be {count} for {name!r}, got {num_workers=}")
    return table()

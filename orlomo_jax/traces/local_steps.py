"""Numbers of local steps that differ between workers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from orlomo_jax.checks import check_count, check_number


def dynamic_local_steps(
    speeds: Sequence[float], num_local_steps: int, *, minimum: int = 1
) -> tuple[int, ...]:
    """Return each worker's number of local steps: max(minimum, ⌊S · v_k / max_j v_j⌋).

    These are the dynamic local updates (DyLU) of the asynchronous DiLoCo papers. All workers then
    need about the same time for a round, which makes delays smaller. Before it is rounded down, the
    quotient is raised by a factor of 1 + 10⁻¹², so that rounding errors do not cost a step.

    Args:
        speeds: v_k, each worker's gradients per second in any unit, > 0.
        num_local_steps: S, the steps of the fastest worker, ≥ 1.
        minimum: The least number of steps, in [1, S].

    Raises:
        TypeError, ValueError: If an argument is out of range.

    Example:
        >>> dynamic_local_steps([1.0, 0.5, 0.3], 8)
        (8, 4, 2)
        >>> times = 0.58, 0.75, 1.51, 3.33
        >>> dynamic_local_steps([1 / seconds for seconds in times], 20, minimum=5)
        (20, 15, 7, 5)

    References:
        Liu et al., 2024 (arXiv 2401.09135).
    """
    top_steps = check_count("num_local_steps", num_local_steps, 1)
    minimum = check_count("minimum", minimum, 1, top_steps)
    checked = [
        check_number(f"speeds[{worker}]", speed, lambda v: 0 < v < math.inf, "finite and > 0")
        for worker, speed in enumerate(speeds)
    ]
    if not checked:
        raise ValueError("`speeds` must have a number for each worker, got speeds=[]")
    top = max(checked)
    return tuple(
        max(minimum, math.floor(top_steps * (speed / top) * (1 + 1e-12))) for speed in checked
    )


def check_local_steps(num_local_steps: Any, num_workers: int) -> int | tuple[int, ...]:
    """Return an integer ≥ 1, or a tuple of one for each worker; else raise.

    Example:
        >>> check_local_steps([4, 2], num_workers=3)
        Traceback (most recent call last):
        ...
        ValueError: `num_local_steps` must have a number for each of num_workers=3 workers, got 2
    """
    if isinstance(num_local_steps, str) or not isinstance(num_local_steps, Iterable):
        return check_count("num_local_steps", num_local_steps, 1)
    steps = tuple(num_local_steps)
    if len(steps) != num_workers:
        raise ValueError(
            f"`num_local_steps` must have a number for each of num_workers={num_workers} workers, "
            f"got {len(steps)}"
        )
    return tuple(check_count(f"num_local_steps[{k}]", value, 1) for k, value in enumerate(steps))

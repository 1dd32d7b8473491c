"""Numbers of local steps that differ between workers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from orlomo_jax.checks import check_count, check_number, check_one_each


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
    check_one_each("speeds", speeds)
    checked = [
        check_number(f"speeds[{worker}]", speed, lambda v: 0 < v < math.inf, "finite and > 0")
        for worker, speed in enumerate(speeds)
    ]
    top = max(checked)
    return tuple(
        max(minimum, math.floor(top_steps * (speed / top) * (1 + 1e-12))) for speed in checked
    )

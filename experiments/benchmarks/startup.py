"""What ``import orlomo_jax`` costs beyond ``import jax, optax``, in fresh processes."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from experiments.benchmarks.measure import Row, fresh_process


def startup(repeats: int) -> Iterator[Row]:
    """Import the dependencies, then the library, in one process, which times both."""
    times = [
        fresh_process(
            "import time, jax, optax; start = time.perf_counter(); import orlomo_jax; "
            "print(time.perf_counter() - start)"
        )
        for _ in range(repeats + 1)
    ]
    figure = 1e3 * statistics.median(map(float, times[1:]))  # the first one may write bytecode
    yield Row("import orlomo_jax", figure, 50.0, "ms", "50 ms", 50 / figure, 1.0)

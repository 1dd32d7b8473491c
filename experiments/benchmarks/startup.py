"""Measures the time of ``import orlomo_jax`` after ``import jax, optax``, in fresh processes."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from experiments.benchmarks.measure import Row, fresh_process


def startup(repeats: int) -> Iterator[Row]:
    """Import the dependencies, then time the import of the library, in one process.

    Python tends to collect the garbage of the dependencies during our import. One row includes
    that; for the other row, the garbage is collected before.
    """
    for name, before in (("", ""), (", garbage of jax collected before", "gc.collect(); ")):
        times = [
            fresh_process(
                f"import gc, time, jax, optax; {before}start = time.perf_counter(); "
                "import orlomo_jax; print(time.perf_counter() - start)"
            )
            for _ in range(repeats + 1)
        ]
        figure = 1e3 * statistics.median(map(float, times[1:]))  # the first may write bytecode
        yield Row(f"import orlomo_jax{name}", figure, 50.0, "ms", "50 ms", 50 / figure, 1.0)

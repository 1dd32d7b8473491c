"""Carries out independent tasks in threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any


def in_threads(tasks: Sequence[Callable[[], Any]], stop: threading.Event) -> Iterator[Any]:
    """Yield the results of tasks as they end; as many run at the same time as there are cores.

    After an error or Ctrl-C, ``stop`` is set and no further task starts. The running tasks must
    end when ``stop`` is set.

    Args:
        tasks: At least one. A single one is called in this thread.
        stop: Tells running tasks to end.

    Example:
        >>> sorted(in_threads([lambda: 1, lambda: 2], threading.Event()))
        [1, 2]
    """
    if len(tasks) == 1:
        yield tasks[0]()
        return
    with ThreadPoolExecutor(_num_cores()) as pool:
        try:
            for future in as_completed([pool.submit(task) for task in tasks]):
                yield future.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _num_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

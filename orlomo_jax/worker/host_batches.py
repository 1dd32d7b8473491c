"""Runs Python code that makes batches on the host, such as data loaders."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from orlomo_jax.checks import check_count


class HostBatches:
    """Batches that Python code makes on the host, ahead of time.

    Pass it as ``batch_fn``. It works with the eager engine, threads and Ray, but not with the
    compiled engine. A lost round uses up its batch, so a run, its replay and a resumed run train on
    the same batches.

    Args:
        make: ``make(worker, first_round)`` returns an iterator over that worker's batches, starting
            with that round: trees of NumPy arrays with a leading axis S and the same shapes in
            every round. It is called again when a run resumes or steps back.
        prefetch: How many rounds ahead to compute in a background thread, ≥ 0.

    Raises:
        TypeError, ValueError: If an argument has a wrong type or is out of range.

    Example:
        >>> import numpy as np
        >>> def make(worker, first_round):
        ...     for round in range(first_round, 100):
        ...         yield np.full((2, 1), 10.0 * worker + round)
        >>> batches = HostBatches(make)
        >>> batches(1, 3).tolist(), batches(1, 4).tolist()
        ([[13.0], [13.0]], [[14.0], [14.0]])
        >>> by_number = HostBatches.of(lambda worker, round: np.full((2, 1), 10.0 * worker + round))
        >>> by_number(1, 3).tolist()
        [[13.0], [13.0]]
    """

    def __init__(self, make: Callable[[int, int], Iterator[Any]], prefetch: int = 2) -> None:
        """Keep the arguments; threads start at the first batch."""
        if not callable(make):
            raise TypeError(f"`make` must be a function of (worker, first_round), got {make!r}")
        self.make, self.prefetch = make, check_count("prefetch", prefetch)
        self._lock = threading.Lock()
        self._loaders: dict[int, _Loader] = {}

    @classmethod
    def of(cls, function: Callable[[int, int], Any], prefetch: int = 2) -> HostBatches:
        """Return the batches of ``function(worker, round)``."""
        return cls(_Counted(function), prefetch)

    def __reduce__(self) -> tuple:
        """Pickle without iterators and threads."""
        return HostBatches, (self.make, self.prefetch)

    def __call__(self, worker: int, round: int) -> Any:
        """Return the batches of a worker's round; raise ValueError if its iterator has ended."""
        with self._lock:
            if worker not in self._loaders:
                self._loaders[worker] = _Loader(partial(self.make, worker), worker, self.prefetch)
            loader = self._loaders[worker]
        return loader.get(round)

    def argument(self, worker: int, round: int) -> jax.tree_util.Partial:
        """Return a batch function that returns this round's batches."""
        return jax.tree_util.Partial(_given, self(int(worker), int(round)))


@dataclass(frozen=True)
class _Counted:
    """Iterators over the values of a function of (worker, round)."""

    function: Callable[[int, int], Any]

    def __call__(self, worker: int, first_round: int) -> Iterator[Any]:
        round = first_round
        while True:
            yield self.function(worker, round)
            round += 1


def _given(batches: Any, key: Any, worker: Any, round: Any) -> Any:
    return batches


class _Stream:
    """An iterator over a worker's batches, starting with one round."""

    def __init__(self, make: Callable[[int], Iterator[Any]], worker: int, first_round: int) -> None:
        self._make, self._worker, self._first = make, worker, first_round
        self._iterator: Iterator[Any] | None = None

    def read(self, round: int) -> Any:
        if self._iterator is None:
            self._iterator = iter(self._make(self._first))
        try:
            return next(self._iterator)
        except StopIteration:
            raise ValueError(
                "`make` must yield a batch for every round, got an iterator that ends before "
                f"worker {self._worker}'s round {round}"
            ) from None


class _Loader:
    """Reads the batches of one worker ahead, in one thread."""

    def __init__(self, make: Callable[[int], Iterator[Any]], worker: int, prefetch: int) -> None:
        self._open = partial(_Stream, make, worker)
        self._prefetch = prefetch
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"orlomo batches {worker}")
        self._lock = threading.Lock()
        self._stream = self._open(0)
        self._futures: dict[int, Future[Any]] = {}  # by round, from the last one returned
        self._next = 0  # the first round that has not been requested

    def get(self, round: int) -> Any:
        with self._lock:
            if round not in self._futures and round != self._next:  # the run resumed or went back
                self._stream, self._futures, self._next = self._open(round), {}, round
            for ahead in range(self._next, round + self._prefetch + 1):
                self._futures[ahead] = self._pool.submit(self._stream.read, ahead)
                self._next = ahead + 1
            for old in [other for other in self._futures if other < round]:
                del self._futures[old]
            future = self._futures[round]
        return future.result()

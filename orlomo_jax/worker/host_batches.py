"""Runs Python code that makes batches on the host, such as data loaders."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from orlomo_jax.checks import check_count


class HostBatches:
    """Batches that Python code makes on the host, ahead of time.

    Pass it as ``batch_fn``. It works with the eager engine, threads and Ray, but not with the
    compiled engine. A lost round uses up its batch, so a run, its replay and a resumed run train on
    the same batches.

    Args:
        make: ``make(worker, first_round)`` returns an iterator over that worker's batches, starting
            with that round: trees of NumPy arrays with a leading axis S (the worker's own) and the
            same shapes in every round. It is called again when a run resumes or steps back.
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
        weakref.finalize(self, _close, self._loaders)

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

    def close(self) -> None:
        """End the threads that read ahead; a later call starts them anew."""
        with self._lock:
            _close(self._loaders)

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


def _close(loaders: dict[int, _Loader]) -> None:
    while loaders:
        loaders.popitem()[1].close()


def _given(batches: Any, *args: Any) -> Any:
    return batches


class _Loader:
    """Reads the batches of one worker ahead."""

    def __init__(self, make: Callable[[int], Iterator[Any]], worker: int, prefetch: int) -> None:
        self._make, self._worker, self._prefetch = make, worker, prefetch
        self._lock, self._reader = threading.Lock(), None
        self._newest: tuple[int, Any] = (-1, None)

    def get(self, round: int) -> Any:
        with self._lock:
            if round == self._newest[0]:
                return self._newest[1]
            if self._reader is None or self._reader.next_round != round:  # resumed, or a lost round
                self._stop()
                self._reader = _Reader(self._make, self._worker, round, self._prefetch)
            try:
                self._newest = round, self._reader.read()
            except BaseException:  # the next call starts anew from its own round
                self._stop()
                raise
            return self._newest[1]

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _stop(self) -> None:
        if self._reader is not None:
            self._reader.stopped.set()
        self._reader = None


class _Reader:
    """An iterator that a daemon thread reads: a process never waits for it at its end."""

    def __init__(
        self, make: Callable[[int], Iterator[Any]], worker: int, first_round: int, prefetch: int
    ) -> None:
        self.next_round, self.stopped = first_round, threading.Event()
        self._batches = self._read(make, worker, first_round)
        self._queue: queue.Queue[tuple[Any, Exception | None]] = queue.Queue(max(prefetch, 1))
        self._ahead = prefetch > 0
        if self._ahead:
            name = f"orlomo batches {worker}"
            threading.Thread(target=self._fill, name=name, daemon=True).start()

    def read(self) -> Any:
        batch, error = self._queue.get() if self._ahead else (next(self._batches), None)
        if error is not None:
            raise error
        self.next_round += 1
        return batch

    @staticmethod
    def _read(make: Callable[[int], Iterator[Any]], worker: int, first: int) -> Iterator[Any]:
        iterator = make(first)
        if not isinstance(iterator, Iterable):
            raise TypeError(f"`make` must return an iterator, got {iterator!r}")
        iterator = iter(iterator)
        for round in itertools.count(first):
            try:
                batch = next(iterator)
            except StopIteration:
                raise ValueError(
                    "`make` must yield a batch for every round, got an iterator that ends before "
                    f"worker {worker}'s round {round}"
                ) from None
            # A copy: a loader may use its memory again, and a memory map is read here.
            copy = lambda x: np.array(x) if isinstance(x, np.ndarray) else x  # noqa: E731
            yield jax.tree.map(copy, batch)

    def _fill(self) -> None:
        item: tuple[Any, Exception | None] = (None, None)
        while item[1] is None and not self.stopped.is_set():
            try:
                item = next(self._batches), None
            except Exception as error:  # raised where the batch is asked for
                item = None, error
            while not self.stopped.is_set():
                with contextlib.suppress(queue.Full):
                    self._queue.put(item, timeout=0.1)
                    break

"""Stores the metrics of a run's rounds by column."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from orlomo_jax.worker.workload import RoundMetrics


class Stacked(NamedTuple):
    """The metrics of consecutive rounds, on the host.

    Attributes:
        metrics: NumPy arrays with a leading axis of rounds.
        num_rounds: The number of rounds; further entries are padding.

    Example:
        >>> rounds = Stacked(RoundMetrics(np.array([2.0, 1.0, 0.0]), {}, np.ones(3, bool)), 2)
        >>> [float(metrics.loss) for metrics in rounds.by_round()]
        [2.0, 1.0]
    """

    metrics: RoundMetrics
    num_rounds: int

    def by_round(self) -> Iterator[RoundMetrics]:
        """Yield the metrics of each round."""
        leaves, structure = jax.tree.flatten(self.metrics)
        for row in zip(*(leaf[: self.num_rounds] for leaf in leaves), strict=True):
            yield jax.tree.unflatten(structure, row)


class MetricColumns:
    """The metrics of all rounds so far; each leaf is a column.

    Args:
        like: The shapes of a round's metrics.
    """

    def __init__(self, like: RoundMetrics) -> None:
        """Start without rounds."""
        self._like = jax.tree.leaves(like)
        self._blocks: list[list[np.ndarray]] = []
        self._pending: list[RoundMetrics] = []  # still on the device

    def add(self, metrics: RoundMetrics) -> None:
        """Add one round; its arrays may still be computed."""
        self._pending.append(metrics)

    def add_all(self, rounds: Stacked) -> None:
        """Add consecutive rounds."""
        self.fetch()
        self._blocks.append([leaf[: rounds.num_rounds] for leaf in jax.tree.leaves(rounds.metrics)])

    def fetch(self) -> None:
        """Wait for the newest rounds and move them to the host."""
        rows = list(map(jax.tree.leaves, jax.device_get(self._pending)))
        self._pending = []
        if rows:
            columns = zip(self._like, zip(*rows, strict=True), strict=True)
            self._blocks.append([np.asarray(x, like.dtype) for like, x in columns])

    def leaves(self) -> list[np.ndarray]:
        """Return the leaves of all rounds' metrics, each with a leading axis."""
        self.fetch()
        start = [np.zeros((0, *like.shape), like.dtype) for like in self._like]
        columns = zip(self._like, zip(start, *self._blocks, strict=True), strict=True)
        self._blocks = [[np.concatenate(blocks, dtype=like.dtype) for like, blocks in columns]]
        return list(self._blocks[0])

    def restore(self, leaves: Sequence[Any]) -> int:
        """Take the result of :meth:`leaves`; return the number of rounds."""
        self._pending, self._blocks = [], [list(leaves)]
        return len(leaves[0])

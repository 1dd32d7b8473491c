"""Defines protocols for the functions that users write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from orlomo_jax.trees import Array, Params, PyTree


class LossFn(Protocol):
    """The loss of one batch."""

    def __call__(
        self, params: Params, model_state: PyTree, batch: PyTree, key: Array, /
    ) -> tuple[Array, tuple[PyTree, PyTree]]:
        """Return (loss float[], (model_state, metrics)); ``key`` differs in every local step."""
        ...


class BatchFn(Protocol):
    """The batches of a round, traced by JAX."""

    def __call__(self, key: Array, worker: Any, round: Any, /) -> PyTree:
        """Return a tree with a leading axis S; it may depend only on the arguments.

        If S differs between workers, S is a fourth argument, a Python integer.
        """
        ...


class RoundFn(Protocol):
    """A local round: S steps from the parameters sent to the worker."""

    def __call__(
        self,
        params: Params,
        model_state: PyTree,
        batches: PyTree,
        local_learning_rate: Any,
        key: Array,
        /,
        *,
        momentum: Params | None = None,
    ) -> Any:
        """Return a :class:`~orlomo_jax.worker.RoundResult`."""
        ...


class Evaluate(Protocol):
    """An evaluation of the server's parameters."""

    def __call__(self, params: Params, model_state: PyTree, /) -> Mapping[str, Any]:
        """Return named scalars."""
        ...

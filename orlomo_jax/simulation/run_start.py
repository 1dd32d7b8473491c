"""Defines what a run of a sweep has for itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import optax

from orlomo_jax import trees
from orlomo_jax.recording.callbacks import AnyCallback
from orlomo_jax.traces.trace import ArrivalTrace
from orlomo_jax.trees import Array, PyTree


class RunStart(NamedTuple):
    """What one run of :func:`~orlomo_jax.simulate_many` has for itself.

    Attributes:
        params: w_0.
        trace: The order of arrivals; :func:`~orlomo_jax.sample_trace` draws one.
        key: A ``jax.random.key``, for batches and noise.
        local_learning_rate: γ, a float or a schedule of the server's step.
        model_state: The initial model state.
        hyperparameters: Hyperparameters of the server's rule that replace the method's, as in
            :func:`~orlomo_jax.make_method`; for example ``{"learning_rate": 0.5}`` is η.
        callbacks: Called for this run; a callback can end it.
    """

    params: trees.Params
    trace: ArrivalTrace
    key: Array
    local_learning_rate: float | optax.Schedule
    model_state: PyTree = None
    hyperparameters: Mapping[str, float] = MappingProxyType({})
    callbacks: Sequence[AnyCallback] = ()

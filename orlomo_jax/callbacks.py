"""Callbacks: objects that simulate and train tell of a run's steps, health and end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeAlias

from orlomo_jax.checks import check_number
from orlomo_jax.health import Health
from orlomo_jax.history import StepRecord, TrainingResult

_log = logging.getLogger("orlomo_jax")


class Callback:
    """Is told of a run; override what you need.

    A plain function may be passed instead of an object: it is called as :meth:`on_step`.

    Attributes:
        health_every: Seconds > 0 between two calls of :meth:`on_health`; None for never.

    Example:
        >>> class StopBelow(Callback):
        ...     def __init__(self, loss):
        ...         self.loss = loss
        ...
        ...     def on_step(self, record):
        ...         return float(record.loss) < self.loss
    """

    health_every: float | None = None

    def on_start(self, step: int, num_steps: int) -> None:
        """Before the first step of this process: the run is at ``step`` of ``num_steps``."""

    def on_step(self, record: StepRecord) -> bool | None:
        """After each step, in order; of a compiled run after the segment of the step.

        To end the run, return True or raise StopIteration: its status is then ``"stopped"``, and a
        checkpoint is saved first. A compiled run ends after the segment. If the run diverges, a
        few later steps may have been told already.
        """

    def on_health(self, health: Health) -> None:
        """Every ``health_every`` seconds of a real run."""

    def on_end(self, result: TrainingResult) -> None:
        """After the last step."""


AnyCallback: TypeAlias = Callback | Callable[[StepRecord], bool | None]


class _StepFunction(Callback):
    def __init__(self, function: Callable[[StepRecord], bool | None]) -> None:
        self.on_step = function  # pyright: ignore[reportIncompatibleMethodOverride]


def as_callback(callback: Any) -> Callback:
    """Return a callback object.

    Raises:
        TypeError: If it is neither a Callback nor a function, or its period is no number.
        ValueError: If its period is not positive.
    """
    if isinstance(callback, Callback):
        if (every := callback.health_every) is not None:
            check_number("health_every", every, lambda x: x > 0, "> 0")
        return callback
    if not callable(callback) or isinstance(callback, type):
        raise TypeError(f"`callbacks` must hold Callback objects or functions, got {callback!r}")
    return _StepFunction(callback)

"""Runs methods under their object's lock."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any


def transaction(method: Callable[..., Any]) -> Any:
    """Return a method that runs under the lock ``_lock`` of its object."""

    @wraps(method)
    def alone(self, *args, **kwargs):
        with self._lock:
            return method(self, *args, **kwargs)

    return alone

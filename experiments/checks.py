"""Checks a setting; the error names the setting and its value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def check(name: str, value: Any, valid: Callable[[Any], bool], wanted: str) -> None:
    """Raise ValueError unless ``value`` is a number, not a boolean, and ``valid``.

    Example:
        >>> check("momentum", 1.2, lambda x: 0 <= x < 1, "in [0, 1)")
        Traceback (most recent call last):
        ...
        ValueError: `momentum` must be in [0, 1), got momentum=1.2
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not valid(value):
        raise ValueError(f"`{name}` must be {wanted}, got {name}={value!r}")

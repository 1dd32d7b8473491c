"""Checks of settings: each error names the setting and its value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def check_count(name: str, value: Any, low: int = 0, high: int | None = None) -> int:
    """Return ``value``; raise ValueError unless it is an integer in [low, high].

    Example:
        >>> check_count("workers", 0, low=1)
        Traceback (most recent call last):
        ...
        ValueError: `workers` must be ≥ 1, got workers=0
    """
    wanted = f"≥ {low}" if high is None else f"in [{low}, {high}]"
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        raise ValueError(f"`{name}` must be {wanted}, got {name}={value!r}")
    return value


def check_number(name: str, value: Any, valid: Callable[[float], bool], wanted: str) -> None:
    """Raise ValueError unless ``value`` is a number that is ``valid``.

    Example:
        >>> check_number("momentum", 1.2, lambda x: 0 <= x < 1, "in [0, 1)")
        Traceback (most recent call last):
        ...
        ValueError: `momentum` must be in [0, 1), got momentum=1.2
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not valid(value):
        raise ValueError(f"`{name}` must be {wanted}, got {name}={value!r}")

"""Checks arguments; the errors contain the argument's name and value."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


def check_count(name: str, value: Any, low: int = 0, high: int | None = None) -> int:
    """Return ``value`` as an int; raise unless it is an integer in [low, high], not a boolean.

    Example:
        >>> check_count("num_workers", 0, low=1)
        Traceback (most recent call last):
        ...
        ValueError: `num_workers` must be ≥ 1, got num_workers=0
    """
    try:
        count = operator.index(value)
    except TypeError:
        count = None
    if count is None or isinstance(value, bool | np.bool_):
        raise TypeError(f"`{name}` must be an integer, got {name}={value!r}")
    if count < low or (high is not None and count > high):
        wanted = f"≥ {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"`{name}` must be {wanted}, got {name}={count}")
    return count


def check_local_steps(value: Any, num_workers: int | None = None) -> int | tuple[int, ...]:
    """Return S as an int, or as a tuple with one for each worker if they are given so.

    Args:
        value: An integer ≥ 1, or a sequence of them.
        num_workers: The wanted length of a sequence; None for any.

    Example:
        >>> check_local_steps([4, 2], 2), check_local_steps(3, 2)
        ((4, 2), 3)
    """
    if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
        return check_count("num_local_steps", value, 1)
    if num_workers is not None and len(value) != num_workers:
        raise ValueError(
            f"`num_local_steps` must have a number for each of {num_workers} workers, "
            f"got {len(value)}: num_local_steps={value!r}"
        )
    if not len(value):
        raise ValueError("`num_local_steps` must have a number for each worker, got none")
    return tuple(check_count(f"num_local_steps[{k}]", steps, 1) for k, steps in enumerate(value))


def check_number(name: str, value: Any, valid: Callable[[float], bool], wanted: str) -> float:
    """Return ``value`` as a float; raise unless it is a ``valid`` number, not a boolean.

    Example:
        >>> check_number("momentum", 1.2, lambda x: 0 <= x < 1, "in [0, 1)")
        Traceback (most recent call last):
        ...
        ValueError: `momentum` must be in [0, 1), got momentum=1.2
    """
    try:
        number = float(operator.truediv(value, 1))  # unlike float(value), rejects strings
    except (TypeError, ValueError):
        number = None
    if number is None or isinstance(value, bool | np.bool_):
        raise TypeError(f"`{name}` must be a number {wanted}, got {name}={value!r}")
    if not valid(number):
        raise ValueError(f"`{name}` must be {wanted}, got {name}={value}")
    return number


def check_nonnegative(name: str, value: Any) -> float:
    """Return ``value`` as a float; raise unless it is finite and ≥ 0."""
    return check_number(name, value, lambda x: 0 <= x < math.inf, "finite and ≥ 0")


def check_type(name: str, value: Any, wanted: type, how: str) -> None:
    """Raise TypeError unless ``value`` is None or of a type; ``how`` says how to get one.

    Example:
        >>> check_type("method", "orlomo", dict, "one of make_method")
        Traceback (most recent call last):
        ...
        TypeError: `method` must be one of make_method, got method='orlomo'
    """
    if value is not None and not isinstance(value, wanted):
        raise TypeError(f"`{name}` must be {how}, got {name}={value!r}")


def check_functions(**functions: Any) -> None:
    """Raise TypeError unless each value is None or can be called."""
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"`{name}` must be a function, got {name}={function!r}")


def check_same(what: Any, theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raise ValueError unless the identities of two runs are equal; name the first difference.

    Example:
        >>> check_same("arrivals.jsonl", {"rate": ["0.1"]}, {"rate": ["0.2"]})
        Traceback (most recent call last):
        ...
        ValueError: arrivals.jsonl must be of this run, got one of another rate: it was written with
        0.1, this run has 0.2
    """
    for name in {**mine, **theirs}:
        other, own = theirs.get(name, "nothing"), mine.get(name, "nothing")
        if other == own:
            continue
        if isinstance(other, list) and isinstance(own, list):
            alone = [x for x in other if x not in own], [x for x in own if x not in other]
            other, own = map(_few, alone if any(alone) else (other, own))  # else the order differs
        raise ValueError(
            f"{what} must be of this run, got one of another {name}: it was written with {other}, "
            f"this run has {own}"
        )


def _few(entries: list[Any]) -> str:
    return ", ".join(map(str, entries[:3])) + (", …" if len(entries) > 3 else "") or "nothing"

"""Checks arguments; the errors contain the argument's name and value."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
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


def check_format_version(found: Any, known: int) -> None:
    """Raise ValueError unless a file has the format version that this library reads.

    Example:
        >>> check_format_version(2, known=1)
        Traceback (most recent call last):
        ...
        ValueError: its format version is 2, but this orlomo_jax reads 1: use the one that wrote it
    """
    if found != known or isinstance(found, bool):
        raise ValueError(
            f"its format version is {found!r}, but this orlomo_jax reads {known}: use the one that "
            "wrote it"
        )


def check_local_steps(value: Any, num_workers: int | None = None) -> int | tuple[int, ...]:
    """Return S as an int, or as a tuple with one for each worker if they are given so.

    Args:
        value: An integer ≥ 1, or a sequence of them.
        num_workers: The wanted length of a sequence; None for any.

    Example:
        >>> check_local_steps([4, 2], 2), check_local_steps(3, 2)
        ((4, 2), 3)
    """
    if not is_sequence(value):
        return check_count("num_local_steps", value, 1)
    check_one_each("num_local_steps", value, num_workers)
    return tuple(check_count(f"num_local_steps[{k}]", steps, 1) for k, steps in enumerate(value))


def is_sequence(value: Any) -> bool:
    """Return whether a value has items in an order: a sequence or an array, but not a text.

    Example:
        >>> [is_sequence(x) for x in ([4, 2], np.ones(2), np.array(2), "42", {4, 2})]
        [True, True, False, False, False]
    """
    if isinstance(value, str | bytes):
        return False
    return isinstance(value, Sequence) or (hasattr(value, "__getitem__") and np.ndim(value) > 0)


def check_one_each(name: str, value: Any, count: int | None = None, what: str = "worker") -> None:
    """Raise unless ``value`` is a sequence with one item for each worker (or other things).

    Args:
        name: The argument's name.
        value: Any object.
        count: The wanted length; None for any length ≥ 1.
        what: What each item belongs to.

    Example:
        >>> check_one_each("speeds", 2.0)
        Traceback (most recent call last):
        ...
        TypeError: `speeds` must be a sequence with a number for each worker, got speeds=2.0
    """
    if not is_sequence(value):
        raise TypeError(
            f"`{name}` must be a sequence with a number for each {what}, got {name}={value!r}"
        )
    if not len(value) or len(value) != (len(value) if count is None else count):
        wanted = f"each {what}" if count is None else f"each of {count} {what}s"
        raise ValueError(
            f"`{name}` must have a number for {wanted}, got {len(value)}: {name}={value!r}"
        )


def check_flag(name: str, value: Any) -> bool:
    """Return ``value`` as a bool; raise TypeError unless it is True or False.

    Example:
        >>> check_flag("keep_state", "no")
        Traceback (most recent call last):
        ...
        TypeError: `keep_state` must be True or False, got keep_state='no'
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"`{name}` must be True or False, got {name}={value!r}")
    return bool(value)


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise ValueError unless ``value`` is one of these texts.

    Example:
        >>> check_choice("action", "stop", ("wait", "drop"))
        Traceback (most recent call last):
        ...
        ValueError: `action` must be one of wait, drop, got action='stop'
    """
    choices = tuple(choices)
    if not (isinstance(value, str) and value in choices):
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {name}={value!r}")


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
        raise TypeError(f"`{name}` must be {how}, got {name}={shortened(value)}")


def shortened(value: Any) -> str:
    """Return the first 200 characters of a value's repr.

    Example:
        >>> shortened("short"), len(shortened("long" * 100))
        ("'short'", 201)
    """
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def check_functions(**functions: Any) -> None:
    """Raise TypeError unless each value is None or can be called."""
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"`{name}` must be a function, got {name}={shortened(function)}")


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

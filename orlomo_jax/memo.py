"""Returns the same object for equal arguments, so that programs are shared."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def shared(function: Function) -> Function:
    """Let a function return the same object for equal arguments if they are hashable.

    A list of ints becomes a tuple, so that it is.

    Example:
        >>> @shared
        ... def pair(left, right=2.0):
        ...     return [left, right]
        >>> pair(1) is pair(left=1, right=2.0), pair([3, 4]) is pair((3, 4)), pair([]) is pair([])
        (True, True, False)
    """
    signature = inspect.signature(function)
    remembered = lru_cache(maxsize=64, typed=True)(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            for name, value in bound.arguments.items():
                if isinstance(value, list) and value and all(type(x) is int for x in value):
                    bound.arguments[name] = tuple(value)
            hash((bound.args, tuple(bound.kwargs.items())))
        except TypeError:  # an array, a tree of bools, or a wrong argument
            return function(*args, **kwargs)
        return remembered(*bound.args, **bound.kwargs)

    return call  # pyright: ignore[reportReturnType]

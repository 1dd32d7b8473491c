"""Computes fingerprints of settings: every value that an object carries, as text."""

from __future__ import annotations

import copyreg
import dataclasses
import dis
import enum
import functools
import hashlib
import re
import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

LIMIT = 512
"""For an object with more values than this, the fingerprint contains one digest of them all."""

_UNKNOWN = "of unknown content"
_PLAIN = (bool, int, float, str, np.ndarray, np.generic, jax.Array)
"""The types of global variables that count in the fingerprint of a function that reads them."""

Pairs = list[tuple[str, str]]


def with_fingerprint(function: Any, text: str) -> Any:
    """Return the function or optax transformation with ``text`` as its fingerprint.

    By default, the fingerprint of a function contains its name, closures, default arguments, the
    arrays of a ``Partial``, the numbers in its code, and the numbers, strings and arrays among the
    global variables that it reads. It does not contain the functions that it calls by a global
    name. Use this for a function with values that should not count or cannot be read.

    Args:
        function: A function, or an ``optax.GradientTransformation``.
        text: Change it whenever the function computes something else.

    Example:
        >>> import optax
        >>> fingerprint(with_fingerprint(lambda delay: 0.5 / delay, "half"))
        {'': 'half'}
    """
    if isinstance(function, optax.GradientTransformation):
        return type(function)(*(with_fingerprint(part, text) for part in function))

    @functools.wraps(function)
    def named(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    named.__fingerprint__ = text  # pyright: ignore[reportAttributeAccessIssue]
    return named


def fingerprint(value: Any, name: str = "") -> dict[str, str]:
    """Return every value that an object carries, as texts by path; equal in every process.

    For functions see :func:`with_fingerprint`. Arrays count with dtype, shape and digest. Objects
    that cannot be read count with the name of their type, and a warning.

    Args:
        value: Any object.
        name: Prefix of the paths.

    Example:
        >>> import optax
        >>> rule = optax.chain(optax.clip_by_global_norm(2.0), optax.scale(0.5))
        >>> found = fingerprint(rule.update)
        >>> found[".update_fns[0].tx.update.max_norm"]
        '2.0'
    """
    pairs: dict[str, str] = {}
    try:
        found = _Walk().pairs(value)
    except RecursionError:
        found = [("", _unknown(type(value)))]
    for path, text in found:
        pairs[name + path] = f"{pairs[name + path]}, {text}" if name + path in pairs else text
    for path, text in pairs.items():
        if text.endswith(_UNKNOWN):
            warnings.warn(
                f"checkpoints cannot read what `{path}` carries ({text}), so they do not notice a "
                "change of it: give it a text with with_fingerprint",
                stacklevel=2,
            )
    return pairs


class _Walk:
    """One walk through an object; visits shared parts once."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Any, Pairs]] = {}  # keeps the objects, so that ids stay unique

    def pairs(self, value: Any) -> Pairs:
        """Return paths below ``value`` and their texts."""
        head, parts = "", []
        try:
            if (text := _text(value)) is not None:
                return [("", text)]
            if id(value) not in self._seen:
                head, parts = _look_into(value)
        except RecursionError:
            raise
        except Exception:  # Reading an attribute may raise anything.
            return [("", _unknown(type(value)))]
        if id(value) not in self._seen:
            self._seen[id(value)] = value, [("", "itself")]
            pairs = [("", head)] if head else []
            for path, part in parts:
                pairs += [(path + rest, text) for rest, text in self.pairs(part)]
            if len(pairs) > LIMIT:
                unknown = [pair for pair in pairs if pair[1].endswith(_UNKNOWN)]
                content = f"{len(pairs)} values, {_digest(repr(pairs).encode())}"
                pairs = [("", f"{head} {content}".strip()), *unknown[:1]]
            self._seen[id(value)] = value, pairs
        return self._seen[id(value)][1]


def _text(value: Any) -> str | None:
    """Return the text of a value without parts, or None."""
    if isinstance(value, enum.Enum):
        return f"{_name(type(value))}.{value.name}"
    if value is None or isinstance(value, int | float | complex | str | bytes):
        text = repr(value)
        return text if len(text) < 200 else f"{text[:40]}… {_digest(text.encode())}"
    if isinstance(value, np.dtype):
        return value.name
    if isinstance(value, type):
        return str(np.dtype(value)) if _is_dtype(value) else _name(value)
    if isinstance(value, types.ModuleType):
        return value.__name__
    if isinstance(value, jax.tree_util.PyTreeDef):
        return _text(re.sub(r" at 0x\w+", "", str(value)))
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _array_text(value)
    text = getattr(value, "__fingerprint__", None)
    return text if isinstance(text, str) else None


def _is_dtype(value: type) -> bool:
    return issubclass(value, np.generic) or isinstance(getattr(value, "dtype", None), np.dtype)


def _array_text(value: Any) -> str | None:
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return f"{value.dtype}: {_array_text(jax.random.key_data(value))}"
    form = f"{value.dtype}{list(value.shape)}"
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return f"{form}, on other hosts, {_UNKNOWN}"
    array = np.asarray(value)
    if array.dtype.kind == "O":
        return None
    if array.shape == ():
        return f"{form} {array.item()!r}"
    return f"{form} {_digest(np.ascontiguousarray(array).reshape(-1).view(np.uint8))}"


def _look_into(value: Any) -> tuple[str, list[tuple[str, Any]]]:
    """Return the name of an object with parts, and the parts by path."""
    if isinstance(value, types.FunctionType):
        return _function(value)
    if isinstance(value, types.MethodType):
        return "", [("", value.__func__), (".self", value.__self__)]
    if isinstance(value, functools.partial):
        if not (value.args or value.keywords):
            return "", [("", value.func)]
        parts = {"func": value.func, "args": value.args} | value.keywords
        return "", [(f".{name}", part) for name, part in parts.items()]
    if isinstance(value, Mapping):
        return "", [(_key(key), part) for key, part in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return "", [(f".{name}", getattr(value, name)) for name in value._fields]  # pyright: ignore
    if isinstance(value, tuple | list):
        return "" if value else "()", [(f"[{i}]", part) for i, part in enumerate(value)]
    if isinstance(value, set | frozenset):
        return "", [("", part) for part in sorted(value, key=lambda x: repr(_Walk().pairs(x)))]
    if isinstance(value, np.ndarray):  # of objects
        return "", [("", value.tolist())]
    if dataclasses.is_dataclass(value):
        names = [f.name for f in dataclasses.fields(value) if hasattr(value, f.name)]
        parts = [(f".{name}", getattr(value, name)) for name in names]
        return _name(type(value)), parts + _call(value)
    if hasattr(value, "__wrapped__"):  # jax.jit
        return "", [("", value.__wrapped__)]
    if callable(value) and isinstance(getattr(value, "__name__", None), str):  # written in C
        return _name(value), []
    return _object(value)


def _function(function: types.FunctionType) -> tuple[str, list[tuple[str, Any]]]:
    code = function.__code__
    parts = []
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            parts.append((f".{name}", cell.cell_contents))
        except ValueError:  # the cell is still empty
            continue
    count = code.co_argcount
    defaults = function.__defaults__ or ()
    names = code.co_varnames[count - len(defaults) : count]
    given = dict(zip(names, defaults, strict=True)) | (function.__kwdefaults__ or {})
    for name in sorted(set(_globals(code))):
        value = function.__globals__.get(name)
        if isinstance(value, _PLAIN) and not name.startswith("__"):
            given[name] = value
    parts += [(f".{name}", part) for name, part in given.items()]
    constants = ", ".join(map(repr, _numbers(code)))
    return f"{_name(function)} with {constants}" if constants else _name(function), parts


def _globals(code: types.CodeType) -> Iterator[str]:
    """Yield the global names that a function reads."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _globals(constant)


def _numbers(value: Any) -> Iterator[complex | float]:
    """Yield the numbers and flags that a function's code loads, also in instructions."""
    if isinstance(value, types.CodeType):
        for instruction in dis.get_instructions(value):
            if instruction.opcode in dis.hasconst or instruction.opname == "LOAD_SMALL_INT":
                yield from _numbers(instruction.argval)
    elif isinstance(value, tuple | frozenset):
        for part in value if isinstance(value, tuple) else sorted(value, key=repr):
            yield from _numbers(part)
    elif isinstance(value, slice):
        yield from _numbers((value.start, value.stop, value.step))
    elif isinstance(value, int | float | complex):
        yield value


def _object(value: Any) -> tuple[str, list[tuple[str, Any]]]:
    """Return the parts of an object that pickle would store."""
    name = _name(type(value))
    try:
        registered = copyreg.dispatch_table.get(type(value))
        reduced: Any = registered(value) if registered else value.__reduce_ex__(4)
    except Exception:  # Pickling may raise anything.
        return name if name.startswith("jax") else _unknown(type(value)), []
    if isinstance(reduced, str):
        return f"{name} {reduced}", []
    _, args, state, listed, mapped = (*reduced, None, None, None)[:5]
    parts = [*(args or ()), state, listed and list(listed), mapped and list(mapped)]
    parts = [part for part in parts if part is not None and part is not type(value)]
    return name, [("", part) for part in parts] + _call(value)


def _call(value: Any) -> list[tuple[str, Any]]:
    """Return the ``__call__`` of a callable object as a part."""
    call = type(value).__call__ if callable(value) else None
    return [(".__call__", call)] if isinstance(call, types.FunctionType) else []


def _key(key: Any) -> str:
    return f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{key!r}]"


def _name(value: Any) -> str:
    """Return the qualified name of a function or class."""
    name = getattr(value, "__qualname__", value.__name__)
    module = getattr(value, "__module__", None) or ""
    return f"{_main() if module == '__main__' else module}.{name}".strip(".")


def _main() -> str:
    """Return the name by which another program would import the main module."""
    main = sys.modules["__main__"]
    if spec := getattr(main, "__spec__", None):  # python -m
        return spec.name
    path = getattr(main, "__file__", None)
    return "__main__" if path is None else Path(path).stem


def _unknown(kind: type) -> str:
    return f"{_name(kind)}, {_UNKNOWN}"


def _digest(data: Any) -> str:
    return f"sha256 {hashlib.sha256(data).hexdigest()[:16]}"

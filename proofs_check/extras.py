"""Packages beyond NumPy, JAX and Optax, imported where they are needed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from typing import Any


class MissingPackage(ModuleNotFoundError):
    """A check cannot run because an optional package is not installed."""


def require(packages: Iterable[str]) -> None:
    """Raise where one of these packages is not installed.

    Raises:
        MissingPackage: If a package is missing; the message names all that are, and the extra.
    """
    missing = sorted(name for name in set(packages) if importlib.util.find_spec(name) is None)
    if missing:
        raise MissingPackage(
            f"missing {', '.join(missing)}; install the extra: pip install 'orlomo-jax[proofs]'",
            name=missing[0],
        )


def need(module: str) -> Any:
    """Return an optional module, or say what to install.

    Raises:
        MissingPackage: If it is not installed; the message names the extra.
    """
    require([module.partition(".")[0]])
    return importlib.import_module(module)


def sympy() -> Any:
    """Return SymPy."""
    return need("sympy")

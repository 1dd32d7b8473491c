"""Imports the optional packages (beyond NumPy, JAX and Optax) when a check needs them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from typing import Any


class MissingPackage(ModuleNotFoundError):
    """A check cannot run because an optional package is not installed."""


def require(packages: Iterable[str]) -> None:
    """Raise MissingPackage unless all these packages are installed.

    Raises:
        MissingPackage: If a package is missing; the message names every missing one and the extra.
    """
    missing = sorted(name for name in set(packages) if importlib.util.find_spec(name) is None)
    if missing:
        raise MissingPackage(
            f"missing {', '.join(missing)}; install the extra: pip install 'orlomo-jax[proofs]'",
            name=missing[0],
        )


def need(module: str) -> Any:
    """Import and return an optional module.

    Raises:
        MissingPackage: If it is not installed; the message names the extra to install.
    """
    require([module.partition(".")[0]])
    return importlib.import_module(module)


def sympy() -> Any:
    """Import and return SymPy."""
    return need("sympy")

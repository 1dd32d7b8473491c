"""Packages beyond NumPy, JAX and Optax, imported where they are needed."""

from __future__ import annotations

import importlib
from typing import Any


def need(module: str) -> Any:
    """Return an optional module, or say what to install.

    Raises:
        ModuleNotFoundError: If it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise ModuleNotFoundError(
            f"this check needs {package}: pip install 'orlomo-jax[proofs]'", name=package
        ) from error


def sympy() -> Any:
    """Return SymPy."""
    return need("sympy")

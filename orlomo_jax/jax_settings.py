"""Copies the JAX settings of the caller of ``train`` to worker threads and processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

NAMES = (
    "allow_f16_reductions",
    "check_tracer_leaks",
    "debug_infs",
    "debug_key_reuse",
    "debug_nans",
    "default_device",
    "default_matmul_precision",
    "default_prng_impl",
    "disable_jit",
    "enable_checks",
    "enable_custom_prng",
    "enable_x64",
    "legacy_prng_key",
    "numpy_dtype_promotion",
    "numpy_rank_promotion",
    "softmax_custom_jvp",
    "threefry_partitionable",
    "transfer_guard_device_to_device",
    "transfer_guard_device_to_host",
    "transfer_guard_host_to_device",
)
"""Settings that change results or raise errors; ``jax.NAME`` is the context of each."""


def capture() -> dict[str, Any]:
    """Return the caller's settings, including those of contexts."""
    return {name: _value(name) for name in NAMES}


def portable(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that are valid in another process: all except the device."""
    return {name: value for name, value in settings.items() if name != "default_device"}


def adopt(settings: dict[str, Any]) -> None:
    """Apply the settings to this process; call it before any array is created."""
    for name, value in settings.items():
        if _value(name) != value:
            jax.config.update(f"jax_{name}", value)


@contextlib.contextmanager
def using(settings: dict[str, Any]) -> Iterator[None]:
    """Apply the settings to this thread within the context.

    Example:
        >>> with jax.enable_x64(True):
        ...     settings = capture()
        >>> with using(settings):
        ...     print(jax.numpy.ones(1).dtype)
        float64
    """
    with contextlib.ExitStack() as stack:
        for name, value in settings.items():
            if _value(name) != value:
                stack.enter_context(getattr(jax, name)(value))
        yield


def _value(name: str) -> Any:
    return getattr(jax.config, f"jax_{name}")

"""Keeps compiled programs on disk, so that a command compiles only what no earlier one has."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import jax

from experiments.data.tfds_cache import default_cache_dir


def cache_folder(name: str) -> Path | None:
    """Return a writable folder ``orlomo_jax/NAME`` in the user's cache, None if there is none."""
    try:
        folder = (default_cache_dir() / name).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError):  # such as a read-only home folder, or none
        return None
    return folder


def keep_compiled_programs() -> None:
    """Let JAX keep compiled programs in the user's cache folder; call this before JAX compiles.

    The folder is ``orlomo_jax/compiled`` under XDG_CACHE_HOME or ``~/.cache``. JAX identifies a
    program by its operations, compiler flags, version and device, and its results do not change.

    A folder that is already chosen (JAX_COMPILATION_CACHE_DIR) stays, and so does
    JAX_ENABLE_COMPILATION_CACHE=0. Without a writable folder, every command compiles anew.
    """
    config: Any = jax.config
    chosen = "JAX_COMPILATION_CACHE_DIR" in os.environ or config.jax_compilation_cache_dir
    if chosen or not config.jax_enable_compilation_cache:
        return
    folder = cache_folder("compiled")
    if folder is None:
        return
    # Small programs too: a ResNet starts with about a hundred, and JAX would compile each anew.
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    for name, value in settings.items():
        if name.upper() not in os.environ:  # the user's choice counts
            config.update(name, value)  # this process has read its environment
            os.environ[name.upper()] = str(value)  # for child processes and local Ray actors

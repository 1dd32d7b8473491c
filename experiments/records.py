"""Records of runs: one JSON row a run, appended whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax


def environment() -> dict[str, Any]:
    """Return what a number depends on beside the code: versions, device, processor count.

    Example:
        >>> sorted(environment())
        ['cpus', 'device', 'jax', 'jaxlib', 'numpy', 'optax', 'python']
    """
    packages = {name: version(name) for name in ("jax", "jaxlib", "numpy", "optax")}
    return {
        **packages,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "cpus": os.cpu_count(),
    }


def append(path: Path, row: dict[str, Any]) -> None:
    """Append one row, flushed to disk; several processes may append to one file.

    Raises:
        ValueError: If the row is not JSON (NaN and Inf are not).
        OSError: If the disk is full; the file is then as it was before.
    """
    line = (json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:  # no buffer whose rest would be written later
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":  # half a line of a dead process: keep apart from it
                line = b"\n" + line
        try:
            while line:
                line = line[file.write(line) :]
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), end)
            raise


def read(path: Path) -> list[dict[str, Any]]:
    """Return all rows, in order; an absent file has none.

    Raises:
        ValueError: If a line is not a JSON object; the message names file and line.
    """
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not a JSON row: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number} must be a JSON object, got {line[:80]!r}")
        rows.append(row)
    return rows

"""Records of runs: one JSON row per run, appended completely or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).parent / "results"
"""Folder of the committed records and of the reports made from them."""


def environment() -> dict[str, Any]:
    """Return what a result depends on besides the code: versions, device, processor count.

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


def check_writable(path: Path) -> None:
    """Create a file's folder; raise OSError if the file cannot be written later."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"{path} cannot be written")


def append(path: Path, *rows: dict[str, Any]) -> None:
    """Append all rows or none, and flush them to disk; processes may share a file.

    Raises:
        ValueError: If a row is not JSON (NaN and Inf are not).
        OSError: If the disk is full; the file is unchanged then.
    """
    lines = [json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n" for row in rows]
    line = "".join(lines).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:  # a buffer could write its rest after an error
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        there = file.read()
        end, last = len(there), there.rpartition(b"\n")[2]
        if _is_row(last):  # an editor removed the final newline
            line = b"\n" + line
        elif last:  # a process died while it wrote this line
            end -= len(last)
            os.ftruncate(file.fileno(), end)
        try:
            while line:
                line = line[file.write(line) :]
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):  # report the error of the write, not this one
                os.ftruncate(file.fileno(), end)
            raise


def read(path: Path) -> list[dict[str, Any]]:
    """Return all rows in order, [] if there is no file.

    An incomplete last line, left by a process that died, is ignored.

    Raises:
        ValueError: If any other line is not a JSON object; the message names file and line.
    """
    rows = []
    *lines, last = path.read_bytes().split(b"\n") if path.exists() else [b""]
    if _is_row(last):
        lines.append(last)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number} is not a JSON row: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number} must be a JSON object, got {line[:80].decode()!r}")
        rows.append(row)
    return rows


def write(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False

"""Writes folders completely or not at all, with a manifest that reveals damage."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

MANIFEST = "manifest.json"


class File(NamedTuple):
    """Size in bytes and hexadecimal SHA-256 of a file."""

    size: int
    sha256: str


class Manifest(NamedTuple):
    """The contents of a folder.

    Attributes:
        name: The name of the data set.
        splits: The number of examples of each split.
        files: All files except the manifest, by name and in order.
    """

    name: str
    splits: dict[str, int]
    files: dict[str, File]


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Yield a new folder; rename it to ``target`` at the end, or remove it after an error.

    Raises:
        OSError: If ``target`` exists and is not empty.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=target.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)  # mkdtemp creates a private folder
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_manifest(place: Path, name: str, splits: dict[str, int]) -> Manifest:
    """Write the manifest of a folder; all its files must be complete."""
    files = {path.name: _describe(path) for path in sorted(place.iterdir())}
    manifest = Manifest(name, splits, files)
    content = {**_as_json(manifest), "sha256": _digest(manifest)}
    (place / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return manifest


def read_manifest(place: Path) -> Manifest:
    """Check all files of a folder and return its manifest.

    Raises:
        ValueError: If the manifest or a file is missing or damaged; the message names it.
    """
    path = place / MANIFEST
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        content = json.loads(path.read_bytes())
        files = {name: File(**file) for name, file in content["files"].items()}
        manifest = Manifest(content["name"], content["splits"], files)
        if content["sha256"] != _digest(manifest):
            raise ValueError("its checksum does not match")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!r})") from None
    for name, expected in manifest.files.items():
        file = place / name
        if not file.is_file():
            raise ValueError(f"{file} is missing")
        if (size := file.stat().st_size) != expected.size:
            raise ValueError(f"{file} is damaged: {size} bytes, not {expected.size}")
        if _describe(file) != expected:
            raise ValueError(f"{file} is damaged or of another data set: its SHA-256 differs")
    return manifest


def _describe(path: Path) -> File:
    with path.open("rb") as file:
        return File(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _as_json(manifest: Manifest) -> dict[str, Any]:
    files = {name: file._asdict() for name, file in manifest.files.items()}
    return manifest._asdict() | {"files": files}


def _digest(manifest: Manifest) -> str:
    """Return the checksum of the manifest itself; white space does not matter."""
    return hashlib.sha256(json.dumps(_as_json(manifest)).encode()).hexdigest()

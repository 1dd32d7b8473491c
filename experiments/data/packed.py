"""Packs data sets into a few files for a machine that has only NumPy.

``pack`` writes one compressed NumPy archive, cut into parts of limited size. ``unpack`` restores
the arrays where the experiments look for them.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np

from experiments.data import folders, tfds_cache
from experiments.data.folders import Manifest
from experiments.data.tfds_cache import SOURCES, Arrays, DataError

MAX_PART = 60_000_000
"""The largest size of a part, in bytes."""


def pack(name: str, out: Path, parts: int | None = None, data_dir: Path | None = None) -> Manifest:
    """Write a data set as parts of at most ``MAX_PART`` bytes, and a manifest.

    Args:
        name: A key of ``SOURCES``.
        out: The folder to write; an existing one must be empty.
        parts: The number of parts, at most 999; None is as few as possible.
        data_dir: The data_dir of the data set, as for :func:`experiments.data.tfds_cache.arrays`.

    Raises:
        DataError: If the data set is missing or damaged, ``out`` is not empty, or ``parts`` is too
            small or large. Nothing is written then.
    """
    out = out.expanduser()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"{out} is already there: remove it to pack {name} again")
    splits = dict(zip(SOURCES[name].splits, tfds_cache.arrays(name, data_dir), strict=True))
    with folders.written_whole(out) as unfinished:
        archive = unfinished / "archive"
        with archive.open("wb") as file:
            np.savez_compressed(file, **tfds_cache.by_key(splits))
        size = archive.stat().st_size
        fewest = -(-size // MAX_PART)
        parts = fewest if parts is None else parts
        if not fewest <= parts <= 999:  # three digits, so that the names sort in order
            raise DataError(
                f"--parts must be in [{fewest}, 999], got {parts}: packed {name} has {size} bytes, "
                f"and a part may have {MAX_PART}"
            )
        with archive.open("rb") as file:
            for part in range(parts):
                content = file.read(size * (part + 1) // parts - size * part // parts)
                (unfinished / f"{name}.npz.{part + 1:03d}-of-{parts:03d}").write_bytes(content)
        archive.unlink()
        return folders.write_manifest(unfinished, name, _counts(splits))


def unpack(packed: Path, data_dir: Path | None = None) -> Manifest:
    """Restore a packed data set where :func:`experiments.data.tfds_cache.arrays` finds it.

    Args:
        packed: The folder that :func:`pack` has written.
        data_dir: The data_dir to restore to; None is the default.

    Raises:
        DataError: If the manifest or a part is missing, damaged or of another data set, or the
            arrays are already there. Nothing is written then.
    """
    packed = packed.expanduser()
    data_dir = (data_dir or tfds_cache.default_data_dir()).expanduser()
    try:
        manifest = folders.read_manifest(packed)
    except (OSError, ValueError) as error:
        raise DataError(f"{error}: copy the packed data again") from None
    data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=data_dir) as archive:
        for part in manifest.files:
            with (packed / part).open("rb") as file:
                shutil.copyfileobj(file, archive)
        archive.seek(0)
        try:
            loaded = np.load(archive, allow_pickle=False)
            train, test = (
                Arrays(*(loaded[f"{split}-{field}"] for field in Arrays._fields))
                for split in SOURCES[manifest.name].splits
            )
        except Exception as error:  # zipfile, zlib and NumPy have errors of their own
            raise DataError(f"{packed} is not a packed data set ({error!r})") from None
    write(manifest.name, train, test, data_dir)
    return manifest


def write(name: str, train: Arrays, test: Arrays, data_dir: Path | None = None) -> Path:
    """Write arrays to where ``tfds_cache.arrays`` finds them; return their folder.

    That function reads a TFDS data set instead if ``data_dir`` has one of this name.

    Args:
        name: A key of ``SOURCES``; the arrays must have its image shape and labels.
        train: Any number of training examples.
        test: Any number of test examples.
        data_dir: The data_dir to write to; None is the default.

    Raises:
        DataError: If the arrays cannot be this data set, or arrays are already there. Nothing is
            written then.
    """
    data_dir = (data_dir or tfds_cache.default_data_dir()).expanduser()
    place = tfds_cache.arrays_folder(name, data_dir)
    if place.exists():
        raise DataError(f"{place} is already there: remove it to write {name} again")
    splits = dict(zip(SOURCES[name].splits, (train, test), strict=True))
    counts = _counts(splits)
    try:
        for split, arrays in splits.items():
            tfds_cache.check(arrays, name, split, counts)
    except ValueError as error:
        raise DataError(f"these arrays cannot be {name}: {error}") from None
    with folders.written_whole(place) as unfinished:
        tfds_cache.save(unfinished, splits)
        folders.write_manifest(unfinished, name, counts)
    return place


def _counts(splits: dict[str, Arrays]) -> dict[str, int]:
    return {split: len(arrays.labels) for split, arrays in splits.items()}

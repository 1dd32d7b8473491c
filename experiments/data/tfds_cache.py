"""Reads prepared data sets as NumPy arrays; decodes once and then uses a cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.data import folders


class Source(NamedTuple):
    """The source and format of a data set.

    Attributes:
        version: The version of its TFDS builder.
        splits: The names of training and test split.
        image_shape: (height, width, channels).
        num_classes: The number of classes; labels start at 0.
        archive: The URL of the official archive.
        mean: Mean of the training images in each channel, on the scale of [0, 1].
        std: Standard deviation, likewise.
    """

    version: str
    splits: tuple[str, str]
    image_shape: tuple[int, int, int]
    num_classes: int
    archive: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


SOURCES = {
    "cifar10": Source(
        version="3.0.2",
        splits=("train", "test"),
        image_shape=(32, 32, 3),
        num_classes=10,
        archive="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
    "cifar100": Source(
        version="3.0.2",
        splits=("train", "test"),
        image_shape=(32, 32, 3),
        num_classes=100,
        archive="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    ),
    "tiny-imagenet": Source(
        version="1.0.0",
        splits=("train", "validation"),
        image_shape=(64, 64, 3),
        num_classes=200,
        archive="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
    ),
}


class DataError(Exception):
    """Data is missing or damaged; the message is one line and says what to do."""


class Arrays(NamedTuple):
    """Images uint8[n, height, width, channels] and labels int32[n], in the order of their ids."""

    images: np.ndarray
    labels: np.ndarray


def folder(name: str, data_dir: Path) -> Path:
    """Return the folder of a data set in a TFDS data_dir."""
    return data_dir / name.replace("-", "_") / SOURCES[name].version


def arrays_folder(name: str, data_dir: Path) -> Path:
    """Return the folder of unpacked arrays in a data_dir, outside TFDS's own folders."""
    return data_dir / "orlomo_jax" / name


def default_data_dir() -> Path:
    """Return the default data_dir: TFDS_DATA_DIR if it is set, else TFDS's own."""
    return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def default_cache_dir() -> Path:
    """Return the default folder of decoded arrays, under XDG_CACHE_HOME or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "orlomo_jax"


def arrays(
    name: str, data_dir: Path | None = None, cache_dir: Path | None = None
) -> tuple[Arrays, Arrays]:
    """Return training and test split of a prepared data set.

    The first call decodes the images, later calls read a cache. Its folder is named after a hash of
    the data's place and description, so that other data never uses it. If there is no TFDS data
    set, unpacked arrays are read, which needs only NumPy.

    Args:
        name: A key of ``SOURCES``.
        data_dir: A TFDS data_dir with the data set as array_record, or with unpacked arrays in
            ``orlomo_jax/NAME``, where TFDS does not look.
        cache_dir: The cache of decoded arrays.

    Raises:
        DataError: If the data is missing or damaged.
    """
    data_dir = default_data_dir() if data_dir is None else data_dir.expanduser()
    cache_dir = default_cache_dir() if cache_dir is None else cache_dir.expanduser()
    is_tfds = (folder(name, data_dir) / "dataset_info.json").is_file()
    if not is_tfds and arrays_folder(name, data_dir).exists():
        return _unpacked(name, data_dir)
    shards, fingerprint = _describe(name, data_dir)
    counts = {split: sum(lengths) for split, lengths in shards.items()}
    cached = cache_dir / f"{name}-{fingerprint}"
    if cached.exists():
        try:
            train, test = (_load(cached, name, split, counts) for split in SOURCES[name].splits)
            return train, test
        except (OSError, ValueError, EOFError) as error:
            warnings.warn(f"{cached} is damaged ({error}): decoding again", stacklevel=2)
            shutil.rmtree(cached, ignore_errors=True)
    need_tfds()
    _check_shards(name, data_dir, shards)
    train, test = (_decode(name, split, data_dir, counts) for split in SOURCES[name].splits)
    try:
        with folders.written_whole(cached) as unfinished:
            save(unfinished, dict(zip(SOURCES[name].splits, (train, test), strict=True)))
    except OSError as error:
        if not cached.exists():  # another process may have written it first
            warnings.warn(f"{cached} could not be written ({error}): not cached", stacklevel=2)
    return train, test


@contextmanager
def needed(packages: str) -> Iterator[None]:
    """Raise a DataError that says what to install if an import in the block fails."""
    try:
        yield
    except ImportError as error:
        raise DataError(f"{packages} ({error}): pip install 'orlomo-jax[experiments]'") from None


def need_tfds() -> None:
    """Raise a DataError unless the packages for TFDS's data sets are installed."""
    with needed("a TFDS data set needs tensorflow-datasets, array_record and Pillow"):
        import array_record.python.array_record_module  # noqa: F401
        import PIL.Image  # noqa: F401
        import tensorflow_datasets  # noqa: F401


def _unpacked(name: str, data_dir: Path) -> tuple[Arrays, Arrays]:
    """Check all files that ``packed.write`` wrote and return the arrays."""
    place = arrays_folder(name, data_dir)
    try:
        manifest = folders.read_manifest(place)
        if manifest.name != name:
            raise ValueError(f"{place / folders.MANIFEST} is of {manifest.name}")
        train, test = (_load(place, name, s, manifest.splits) for s in SOURCES[name].splits)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{error}: remove {place}, then unpack {name} again") from None
    return train, test


def _describe(name: str, data_dir: Path) -> tuple[dict[str, list[int]], str]:
    """Return the number of examples of each split's shards, and a fingerprint of the data."""
    place = folder(name, data_dir)
    path = place / "dataset_info.json"
    if not path.is_file():
        raise DataError(f"there is no {name} in {data_dir}: {_how_to_get(name, data_dir)}")
    text = path.read_bytes()
    try:
        info = json.loads(text)
        found = {split["name"]: split for split in info["splits"]}
        shards = {s: [int(n) for n in found[s]["shardLengths"]] for s in SOURCES[name].splits}
        file_format = info.get("fileFormat", "tfrecord")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise _damaged(name, data_dir, f"{path.name}: {error!r}") from None
    if file_format != "array_record":
        raise DataError(
            f"{place} holds {file_format}, which only TensorFlow reads: move it away, then "
            f"{_how_to_get(name, data_dir)}"
        )
    for split, lengths in shards.items():
        for file in _files(place, name, split, len(lengths)):
            if not file.is_file():
                raise _damaged(name, data_dir, f"{file.name} is missing")
    digest = hashlib.sha256(os.fsencode(place.resolve()) + b"\0" + text).hexdigest()
    return shards, digest[:16]


def _files(place: Path, name: str, split: str, num_shards: int) -> list[Path]:
    stem = f"{name.replace('-', '_')}-{split}.array_record"
    return [place / f"{stem}-{shard:05d}-of-{num_shards:05d}" for shard in range(num_shards)]


def _check_shards(name: str, data_dir: Path, shards: dict[str, list[int]]) -> None:
    """Raise a DataError if a shard's number of examples is wrong; TFDS would not notice."""
    from array_record.python.array_record_module import ArrayRecordReader

    for split, lengths in shards.items():
        files = _files(folder(name, data_dir), name, split, len(lengths))
        for file, length in zip(files, lengths, strict=True):
            try:
                there = ArrayRecordReader(str(file)).num_records()
            except Exception as error:  # array_record has errors of its own
                raise _damaged(name, data_dir, f"{file.name}: {error}") from None
            if there != length:
                raise _damaged(name, data_dir, f"{file.name} has {there} examples, not {length}")


def _how_to_get(name: str, data_dir: Path) -> str:
    archive = SOURCES[name].archive
    return (
        f"get {archive} and run `python -m experiments.prepare {name} "
        f"--from {archive.rsplit('/', 1)[1]} --data-dir {data_dir}`"
    )


def _damaged(name: str, data_dir: Path, what: object) -> DataError:
    what = " ".join(str(what).split())
    place = folder(name, data_dir)
    return DataError(f"{place} is damaged ({what}): remove it, then {_how_to_get(name, data_dir)}")


def _decode(name: str, split: str, data_dir: Path, counts: dict[str, int]) -> Arrays:
    """Read one split by TFDS, without TensorFlow."""
    import tensorflow_datasets as tfds

    try:
        builder: Any = tfds.builder_from_directory(folder(name, data_dir))
        source = builder.as_data_source(split=split)
        if len(source) != counts[split]:
            raise _damaged(name, data_dir, f"{len(source)} examples in split {split}")
        images = np.empty((len(source), *SOURCES[name].image_shape), np.uint8)
        labels, ids = np.empty(len(source), np.int32), []
        for first in range(0, len(source), 1000):
            chunk = source.__getitems__(range(first, min(first + 1000, len(source))))
            for index, example in enumerate(chunk, first):
                if example["image"].shape != images.shape[1:]:
                    raise ValueError(f"{example['id']} has shape {example['image'].shape}")
                images[index], labels[index] = example["image"], example["label"]
                ids.append(example["id"])
        if len(set(ids)) < len(ids):
            raise ValueError("two examples have the same id")
    except DataError:
        raise
    except Exception as error:  # array_record, protobuf and Pillow have errors of their own
        raise _damaged(name, data_dir, error) from error
    order = sorted(range(len(ids)), key=ids.__getitem__)  # the stored order is shuffled
    result = Arrays(images[order], labels[order])
    try:
        check(result, name, split, counts)
    except ValueError as error:
        raise _damaged(name, data_dir, error) from None
    return result


def check(loaded: Arrays, name: str, split: str, counts: dict[str, int]) -> None:
    """Raise ValueError unless the arrays form a split with ``counts[split]`` examples."""
    images, labels = loaded
    shape = (counts[split], *SOURCES[name].image_shape)
    for array, dtype, expected in ((images, "uint8", shape), (labels, "int32", shape[:1])):
        if (array.dtype, array.shape) != (dtype, expected):
            got = f"{array.dtype}{array.shape}"
            raise ValueError(f"split {split} must have {dtype}{expected}, got {got}")
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= SOURCES[name].num_classes:
        raise ValueError(f"labels of split {split} must be in [0, {SOURCES[name].num_classes})")


def _load(cached: Path, name: str, split: str, counts: dict[str, int]) -> Arrays:
    loaded = Arrays(*(np.load(cached / f"{split}-{field}.npy") for field in Arrays._fields))
    check(loaded, name, split, counts)
    return loaded


def by_key(splits: dict[str, Arrays]) -> dict[str, Any]:
    """Return all arrays by the stems of their files: train-images, train-labels, …."""
    return {f"{s}-{f}": values for s, x in splits.items() for f, values in x._asdict().items()}


def save(place: Path, splits: dict[str, Arrays]) -> None:
    """Write all arrays to a folder, as NumPy files."""
    for key, values in by_key(splits).items():
        np.save(place / f"{key}.npy", values)

"""Make a TFDS data_dir from the official archive of a data set, without TensorFlow; pack data.

``python -m experiments.prepare cifar10 --from cifar-10-python.tar.gz --data-dir ~/data`` writes
``~/data/cifar10/3.0.2`` as array_record, completely or not at all.

``python -m experiments.prepare --pack cifar10 OUT`` writes that data set as a few files of at most
60 MB. ``python -m experiments.prepare --unpack OUT`` restores it on a machine without TFDS,
array_record and Pillow.
"""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro

from experiments.data import folders, packed, tfds_cache
from experiments.data.tfds_cache import SOURCES, DataError
from experiments.terminal import accept_any_terminal

Name = Literal["cifar10", "cifar100", "tiny-imagenet"]


@dataclass(frozen=True)
class Config:
    """The data set to prepare, pack or unpack."""

    target: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="NAME|OUT")] = None
    """With --from: the data set. With --pack or --unpack: the folder of the packed data."""
    source: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """The official archive (the "python version" for CIFAR), or the folder inside it."""
    pack: Name | None = None
    """The data set to pack."""
    parts: int | None = None
    """Number of files to pack into; by default as few as possible, of at most 60 MB each."""
    unpack: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Restore packed data."""
    data_dir: Path | None = None
    """The data_dir to write to, or to pack from; by default TFDS_DATA_DIR, or else
    ~/tensorflow_datasets."""


class Content(NamedTuple):
    """The contents of an archive, in TFDS's form.

    Attributes:
        class_names: For each label feature, the names of its classes.
        splits: The examples of each split.
    """

    class_names: dict[str, list[str]]
    splits: dict[str, Iterator[dict[str, Any]]]


def prepare(name: str, source: Path, data_dir: Path) -> dict[str, int]:
    """Write a data set in TFDS's form; return the number of examples of each split.

    Args:
        name: A key of ``SOURCES``.
        source: The official archive, or the folder inside it.
        data_dir: A TFDS data_dir.

    Raises:
        DataError: If the source is missing, damaged or not this data set, the data set is already
            there, or a package is not installed. Nothing is written then.
    """
    target = tfds_cache.folder(name, data_dir)
    if target.exists():
        raise DataError(f"{target} is already there: remove it to prepare {name} again")
    if not source.exists():
        raise DataError(f"there is no {source}: get {SOURCES[name].archive}")
    tfds_cache.need_tfds()
    try:
        content = CONTENTS[name](_open(source))
        with folders.written_whole(target) as unfinished:
            return _write(name, content, unfinished)
    except Exception as error:  # damaged archives, pickles and images, full disks
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"{source} could not be prepared as {name} ({what})") from error


def _write(name: str, content: Content, place: Path) -> dict[str, int]:
    """Write one shard for each split, then TFDS's metadata."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    from experiments.data import tiny_imagenet  # registers the builder

    del tiny_imagenet
    tfds_name = name.replace("-", "_")
    info = tfds.builder(tfds_name, data_dir=place).info
    features: Any = info.features
    for feature, names in content.class_names.items():
        features[feature].names = names
    counts, splits = {}, []
    for split, examples in content.splits.items():
        file = place / f"{tfds_name}-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(file), "group_size:1")
        count = size = 0
        for example in examples:
            record = features.serialize_example(example)
            writer.write(record)
            count, size = count + 1, size + len(record)
        writer.close()
        if count == 0:
            raise ValueError(f"there are no images of split {split}")
        counts[split] = count
        splits.append(tfds.core.SplitInfo(name=split, shard_lengths=[count], num_bytes=size))
    tfds.folder_dataset.write_metadata(
        data_dir=place,
        features=features,
        split_infos=splits,
        version=SOURCES[name].version,
        check_data=False,  # the check needs TensorFlow
        description=info.description,
        homepage=info.homepage,
        citation=info.citation,
        supervised_keys=info.supervised_keys,
    )
    return counts


# The official files


class Files(NamedTuple):
    """The files of a folder or an archive; names are relative to its only top folder."""

    names: list[str]
    read: Callable[[str], bytes]


def _open(source: Path) -> Files:
    def below(name: str) -> str:
        return name.removeprefix("./").partition("/")[2]

    if source.is_dir():
        inside = list(source.iterdir())
        root = inside[0] if len(inside) == 1 and inside[0].is_dir() else source
        paths = sorted(path for path in root.rglob("*") if path.is_file())
        return Files([path.relative_to(root).as_posix() for path in paths], _reader(root))
    if zipfile.is_zipfile(source):
        archive = zipfile.ZipFile(source)
        entries = {below(entry): entry for entry in archive.namelist() if not entry.endswith("/")}
        return Files(list(entries), lambda name: archive.read(entries[name]))
    contents = {}
    with tarfile.open(source) as archive:
        for entry in archive:
            if (file := archive.extractfile(entry) if entry.isfile() else None) is not None:
                contents[below(entry.name)] = file.read()
    return Files(list(contents), contents.__getitem__)


def _reader(root: Path) -> Callable[[str], bytes]:
    return lambda name: (root / name).read_bytes()


def _tiny_imagenet(files: Files) -> Content:
    from experiments.data import tiny_imagenet

    return Content(
        {"label": tiny_imagenet.class_names(files.read)},
        {
            split: tiny_imagenet.examples(split, files.names, files.read)
            for split in tiny_imagenet.SPLITS
        },
    )


def _cifar10(files: Files) -> Content:
    meta = _unpickle(files.read("batches.meta"))
    keys = {"label": b"labels"}
    train = [files.read(f"data_batch_{number}") for number in range(1, 6)]
    return Content(
        {"label": _names(meta[b"label_names"])},
        {
            "train": _cifar_examples("train", train, keys),
            "test": _cifar_examples("test", [files.read("test_batch")], keys),
        },
    )


def _cifar100(files: Files) -> Content:
    meta = _unpickle(files.read("meta"))
    keys = {"label": b"fine_labels", "coarse_label": b"coarse_labels"}
    return Content(
        {
            "label": _names(meta[b"fine_label_names"]),
            "coarse_label": _names(meta[b"coarse_label_names"]),
        },
        {split: _cifar_examples(split, [files.read(split)], keys) for split in ("train", "test")},
    )


def _cifar_examples(
    split: str, batches: list[bytes], keys: dict[str, bytes]
) -> Iterator[dict[str, Any]]:
    """Yield the examples with TFDS's ids."""
    from PIL import Image

    index = 0
    for batch in map(_unpickle, batches):
        rows = batch[b"data"]
        if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.shape[1:] != (3072,):
            raise ValueError("`data` must be uint8[n, 3072]")
        labels = {feature: batch[key] for feature, key in keys.items()}
        if any(len(values) != len(rows) for values in labels.values()):
            raise ValueError(f"there are {len(rows)} images, but not as many labels")
        for row, pixels in enumerate(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)):
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "png")
            png.seek(0)
            example = {feature: int(values[row]) for feature, values in labels.items()}
            yield {"id": f"{split}_{index:05d}", "image": png, **example}
            index += 1


def _names(values: list[bytes]) -> list[str]:
    return [value.decode() for value in values]


class _ArrayUnpickler(pickle.Unpickler):
    """Reads only containers, strings, numbers and NumPy arrays, which the official files contain.

    A pickle can call any function that its reader finds; this reader finds only three.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed")


def _unpickle(content: bytes) -> dict[bytes, Any]:
    loaded = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    if not isinstance(loaded, dict):
        raise ValueError(f"expected a pickled dict, got {type(loaded).__name__}")
    return loaded


CONTENTS = {"cifar10": _cifar10, "cifar100": _cifar100, "tiny-imagenet": _tiny_imagenet}


def _check_flags(config: Config) -> None:
    """Raise a DataError if flags contradict each other or one is missing."""
    flags = {"--from": config.source, "--pack": config.pack, "--unpack": config.unpack or None}
    given = [flag for flag, value in flags.items() if value is not None]
    if len(given) != 1:
        raise DataError(f"give one of {', '.join(flags)}, got {' and '.join(given) or 'none'}")
    if config.parts is not None and config.pack is None:
        raise DataError(f"--parts needs --pack, got {given[0]}")
    if config.source is None and config.target is None:
        raise DataError(f"{given[0]} needs OUT, the folder of the packed data")
    if config.source is not None and config.target not in SOURCES:
        raise DataError(f"--from needs one of {', '.join(SOURCES)}, got {config.target}")


def main(args: Sequence[str] | None = None) -> None:
    """Prepare, pack or unpack a data set from the command line."""
    accept_any_terminal()
    config = tyro.cli(Config, prog="python -m experiments.prepare", args=args, description=__doc__)
    data_dir = (config.data_dir or tfds_cache.default_data_dir()).expanduser()
    try:
        _check_flags(config)
        target = str(config.target)
        if config.source is not None:
            name, counts = target, prepare(target, config.source.expanduser(), data_dir)
            place = tfds_cache.folder(name, data_dir)
        elif config.pack is not None:
            place = Path(target).expanduser()
            name, counts, files = packed.pack(config.pack, place, config.parts, data_dir)
            for file, (size, _) in files.items():
                print(f"{place / file}: {size} bytes")
        else:
            name, counts, _ = packed.unpack(Path(target), data_dir)
            place = tfds_cache.arrays_folder(name, data_dir)
    except (DataError, OSError) as error:
        raise SystemExit(str(error)) from None
    for split, count in counts.items():
        print(f"{name}: {count} images of split {split}")
    print(place)


if __name__ == "__main__":
    main()

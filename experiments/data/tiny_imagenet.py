"""Tiny-ImageNet as a TFDS builder: 200 classes, 64×64, 100 000 training images.

``import experiments.data.tiny_imagenet`` registers it. ``experiments.prepare`` prepares the data,
or ``download_and_prepare`` if TensorFlow is installed. After that
``tfds.data_source("tiny_imagenet", data_dir=…)`` reads it, even without the registration.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from experiments.data.tfds_cache import SOURCES

SOURCE = SOURCES["tiny-imagenet"]
SPLITS = {"train": "train", "validation": "val"}  # TFDS's name → the archive's folder


class TinyImagenet(tfds.core.GeneratorBasedBuilder):
    """Tiny-ImageNet. Class c is the c-th WordNet id in alphabetical order."""

    VERSION = tfds.core.Version(SOURCE.version)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="200 ImageNet classes at 64×64: 500 training, 50 validation images each.",
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "image": tfds.features.Image(shape=SOURCE.image_shape, encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(num_classes=SOURCE.num_classes),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="http://cs231n.stanford.edu/",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        root = Path(dl_manager.download_and_extract(SOURCE.archive)) / "tiny-imagenet-200"
        names = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
        read = lambda name: (root / name).read_bytes()  # noqa: E731
        features: Any = self.info.features
        features["label"].names = class_names(read)
        return {split: self._generate_examples(split, names, read) for split in SPLITS}

    def _generate_examples(
        self, split: str, names: Iterable[str], read: Callable[[str], bytes]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for example in examples(split, names, read):
            yield example["id"], example


def class_names(read: Callable[[str], bytes]) -> list[str]:
    """Return the WordNet ids in the order of their labels."""
    return sorted(read("wnids.txt").decode().split())


def examples(
    split: str, names: Iterable[str], read: Callable[[str], bytes]
) -> Iterator[dict[str, Any]]:
    """Yield the examples of a split, with the original JPEGs.

    Args:
        split: A key of ``SPLITS``.
        names: The archive's files, below ``tiny-imagenet-200/``.
        read: ``read(name)`` returns a file's contents.
    """
    labels = {wnid: label for label, wnid in enumerate(class_names(read))}
    folder, wnids = f"{SPLITS[split]}/", {}
    if split == "validation":
        lines = read("val/val_annotations.txt").decode().splitlines()
        wnids = dict(line.split("\t")[:2] for line in lines)
    for name in names:
        if name.startswith(folder) and name.endswith(".JPEG"):
            file = name.rsplit("/", 1)[1]
            wnid = wnids[file] if split == "validation" else name.split("/")[1]
            yield {
                "id": file.removesuffix(".JPEG"),
                "image": io.BytesIO(read(name)),
                "label": labels[wnid],
            }

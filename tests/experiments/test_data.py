"""The experiments' data: prepared from archives, decoded once, normalised on the device."""

import io
import os
import pickle
import shutil
import struct
import tarfile
import time
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import prepare
from experiments.data import datasets, tfds_cache
from experiments.data.tfds_cache import DataError

KEY = jax.random.key(0)


class Python2Pickler(pickle._Pickler):
    """Pickles strings as Python 2 did, in whose form the official CIFAR files are."""

    def save_string(self, value):
        raw = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(value)

    dispatch = {**pickle._Pickler.dispatch, bytes: save_string, str: save_string}  # noqa: RUF012


def python2_pickle(value):
    file = io.BytesIO()
    Python2Pickler(file, 2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def batch(count, seed, **labels):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 3072), np.uint8)
    return {"data": pixels, "filenames": ["a.png"] * count, **labels}


def images_of(*batches):
    rows = np.concatenate([b["data"] for b in batches])
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


CIFAR10 = {
    "batches.meta": {"label_names": [f"class{c}" for c in range(10)]},
    **{f"data_batch_{i}": batch(3, i, labels=[i, 0, 9]) for i in range(1, 6)},
    "test_batch": batch(4, 6, labels=[3, 2, 1, 0]),
}
CIFAR100 = {
    "meta": {
        "fine_label_names": [f"fine{c}" for c in range(100)],
        "coarse_label_names": [f"coarse{c}" for c in range(20)],
    },
    "train": batch(3, 7, fine_labels=[99, 0, 5], coarse_labels=[19, 0, 1]),
    "test": batch(2, 8, fine_labels=[1, 2], coarse_labels=[0, 0]),
}


def write_folder(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else python2_pickle(content))
    return root


def tar_of(folder, path):
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, folder.name)
    return path


def jpeg(seed, mode):
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    image = Image.fromarray(noise).resize((64, 64)).convert(mode)
    file = io.BytesIO()
    image.save(file, "jpeg")
    return file.getvalue()


def tiny_imagenet_files():
    wnids = [f"n{c:08d}" for c in range(200)]
    files = {"wnids.txt": "\n".join(reversed(wnids)).encode(), "words.txt": b""}
    for label in (0, 7):
        for i in (0, 10, 2):
            name = f"train/{wnids[label]}/images/{wnids[label]}_{i}.JPEG"
            files[name] = jpeg(10 * label + i, "RGB" if i else "L")
    files["val/images/val_0.JPEG"] = jpeg(1, "RGB")
    files["val/images/val_1.JPEG"] = jpeg(2, "RGB")
    files["val/val_annotations.txt"] = (
        f"val_0.JPEG\t{wnids[199]}\t0\t0\t63\t63\nval_1.JPEG\t{wnids[7]}\t0\t0\t63\t63\n"
    ).encode()
    return files


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data_dir with small ones of all three."""
    root = tmp_path_factory.mktemp("data")
    cifar10 = write_folder(root / "cifar-10-batches-py", CIFAR10)
    cifar100 = write_folder(root / "cifar-100-python", CIFAR100)
    tiny = write_folder(root / "tiny-imagenet-200", tiny_imagenet_files())
    with zipfile.ZipFile(root / "tiny.zip", "w") as archive:
        for path in sorted(tiny.rglob("*")):
            archive.write(path, path.relative_to(root))
    data_dir = root / "prepared"
    assert prepare.prepare("cifar10", tar_of(cifar10, root / "cifar.tgz"), data_dir) == {
        "train": 15,
        "test": 4,
    }
    prepare.prepare("cifar100", cifar100, data_dir)
    prepare.prepare("tiny-imagenet", root / "tiny.zip", data_dir)
    return data_dir


class TestPrepare:
    def test_cifar10_comes_back_in_the_official_order(self, prepared, tmp_path):
        train, test = tfds_cache.arrays("cifar10", prepared, tmp_path)
        batches = [CIFAR10[f"data_batch_{i}"] for i in range(1, 6)]
        np.testing.assert_array_equal(train.images, images_of(*batches))
        np.testing.assert_array_equal(train.labels, [x for b in batches for x in b["labels"]])
        np.testing.assert_array_equal(test.images, images_of(CIFAR10["test_batch"]))

    def test_cifar100_has_fine_and_coarse_labels(self, prepared, tmp_path):
        train, _ = tfds_cache.arrays("cifar100", prepared, tmp_path)
        np.testing.assert_array_equal(train.images, images_of(CIFAR100["train"]))
        np.testing.assert_array_equal(train.labels, [99, 0, 5])

    def test_tiny_imagenet_has_labels_in_the_order_of_wordnet_ids(self, prepared, tmp_path):
        train, validation = tfds_cache.arrays("tiny-imagenet", prepared, tmp_path)
        np.testing.assert_array_equal(train.labels, [0, 0, 0, 7, 7, 7])
        np.testing.assert_array_equal(validation.labels, [199, 7])
        original = Image.open(io.BytesIO(jpeg(10, "RGB")))
        np.testing.assert_array_equal(train.images[1], np.asarray(original))
        assert (train.images[0] == train.images[0][..., :1]).all()  # grey

    @pytest.mark.parametrize("name", ["cifar10", "cifar100", "tiny_imagenet"])
    def test_tfds_reads_it_without_the_builder(self, prepared, name):
        import tensorflow_datasets as tfds

        source = tfds.data_source(name, data_dir=prepared, download=False, split="train")
        assert source[0]["id"]
        assert source.dataset_info.features["label"].names[0]
        if name == "cifar100":
            assert [example["coarse_label"] for example in source] == [19, 0, 1]

    def test_a_folder_may_hold_the_archives_folder(self, tmp_path):
        write_folder(tmp_path / "unpacked" / "cifar-10-batches-py", CIFAR10)
        counts = prepare.prepare("cifar10", tmp_path / "unpacked", tmp_path / "out")
        assert counts["train"] == 15

    def test_the_command_line(self, tmp_path, capsys):
        source = write_folder(tmp_path / "cifar-100-python", CIFAR100)
        flags = ["cifar100", "--from", str(source), "--data-dir", str(tmp_path / "out")]
        prepare.main(flags)
        assert "cifar100: 3 images of split train" in capsys.readouterr().out
        with pytest.raises(SystemExit, match="is already there: remove it"):
            prepare.main(flags)
        flags[2] = str(tmp_path / "nowhere.tar.gz")
        with pytest.raises(SystemExit, match="already there"):
            prepare.main(flags)

    @pytest.mark.parametrize(
        ("name", "change", "reason"),
        [
            ("data_batch_3", None, "data_batch_3"),
            ("data_batch_3", b"\x80\x02}", "EOFError|UnpicklingError"),
            ("data_batch_3", {"data": np.zeros((3, 3072)), "labels": [0] * 3}, "uint8"),
            ("data_batch_3", {"data": np.zeros((3, 9), np.uint8), "labels": [0] * 3}, "uint8"),
            ("data_batch_3", batch(3, 0, labels=[0, 1]), "not as many labels"),
            ("data_batch_3", batch(3, 0, labels=[0, 1, 10]), "10"),
            ("data_batch_3", ["a list"], "dict"),
        ],
    )
    def test_damage_is_told_and_leaves_nothing(self, tmp_path, name, change, reason):
        files = {**CIFAR10, name: change}
        source = write_folder(tmp_path / "c", {k: v for k, v in files.items() if v is not None})
        with pytest.raises(DataError, match=reason) as raised:
            prepare.prepare("cifar10", source, tmp_path / "out")
        assert "\n" not in str(raised.value)
        assert not list((tmp_path / "out").rglob("*.*"))

    def test_pickles_cannot_call_functions(self, tmp_path):
        class Harmful:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "made"),)

        files = {**CIFAR10, "test_batch": pickle.dumps(Harmful(), 2)}
        source = write_folder(tmp_path / "c", files)
        with pytest.raises(DataError, match=r"asks for \w+\.mkdir"):
            prepare.prepare("cifar10", source, tmp_path / "out")
        assert not (tmp_path / "made").exists()

    def test_a_truncated_archive_is_told(self, tmp_path):
        source = tar_of(write_folder(tmp_path / "c", CIFAR10), tmp_path / "c.tar.gz")
        source.write_bytes(source.read_bytes()[:2000])
        with pytest.raises(DataError, match=r"c\.tar\.gz could not be prepared as cifar10"):
            prepare.prepare("cifar10", source, tmp_path / "out")
        source.write_bytes(b"no archive")
        with pytest.raises(DataError, match="ReadError"):
            prepare.prepare("cifar10", source, tmp_path / "out")


class TestArrays:
    @pytest.fixture
    def place(self, prepared, tmp_path):
        return Path(shutil.copytree(prepared / "cifar10", tmp_path / "data" / "cifar10")) / "3.0.2"

    def test_missing_data_is_told_at_once_with_the_command(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "env"))
        for name in tfds_cache.SOURCES:
            start = time.perf_counter()
            with pytest.raises(DataError) as raised:
                tfds_cache.arrays(name)
            assert time.perf_counter() - start < 1
            line = str(raised.value)
            assert f"python -m experiments.prepare {name} --from " in line
            assert f"--data-dir {tmp_path / 'env'}" in line
            assert "\n" not in line

    @pytest.mark.parametrize(
        ("file", "content", "reason"),
        [
            ("dataset_info.json", b"{", "JSONDecodeError"),
            ("dataset_info.json", b"{}", "splits"),
            ("features.json", b"{", "damaged"),
            ("cifar10-train.array_record-00000-of-00001", None, "is missing"),
            ("cifar10-train.array_record-00000-of-00001", b"", "damaged"),
            ("cifar10-test.array_record-00000-of-00001", b"\0" * 70_000, "damaged"),
        ],
    )
    def test_damage_is_told_and_not_cached(self, place, tmp_path, file, content, reason):
        if content is None:
            (place / file).unlink()
        else:
            (place / file).write_bytes(content)
        with pytest.raises(DataError, match=reason) as raised:
            tfds_cache.arrays("cifar10", tmp_path / "data", tmp_path / "cache")
        assert f"{place} is damaged" in str(raised.value)
        assert "\n" not in str(raised.value)
        assert not (tmp_path / "cache").exists()

    @pytest.mark.parametrize("length", ["1", "-1", "16"])
    def test_shards_must_have_the_examples_that_are_told(self, place, tmp_path, length):
        path = place / "dataset_info.json"
        path.write_text(path.read_text().replace('"15"', f'"{length}"'))
        with pytest.raises(DataError, match=f"has 15 examples, not {length}"):
            tfds_cache.arrays("cifar10", tmp_path / "data", tmp_path / "cache")

    def test_tensorflows_own_format_is_told(self, place, tmp_path):
        path = place / "dataset_info.json"
        path.write_text(path.read_text().replace("array_record", "tfrecord"))
        with pytest.raises(DataError, match="holds tfrecord, which only TensorFlow reads"):
            tfds_cache.arrays("cifar10", tmp_path / "data", tmp_path / "cache")

    def test_the_second_start_reads_the_cache(self, prepared, tmp_path, monkeypatch):
        first = tfds_cache.arrays("cifar10", prepared, tmp_path)
        monkeypatch.setattr(tfds_cache, "_decode", None)
        for one, again in zip(first, tfds_cache.arrays("cifar10", prepared, tmp_path), strict=True):
            assert again.images.dtype == np.uint8
            np.testing.assert_array_equal(one.images, again.images)
            np.testing.assert_array_equal(one.labels, again.labels)

    @pytest.mark.parametrize("kept", [0, 50, 200, -1])
    def test_a_damaged_cache_is_made_anew(self, prepared, tmp_path, kept):
        first, _ = tfds_cache.arrays("cifar10", prepared, tmp_path)
        (path,) = tmp_path.glob("*/train-images.npy")
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.warns(UserWarning, match="is damaged"):
            again, _ = tfds_cache.arrays("cifar10", prepared, tmp_path)
        np.testing.assert_array_equal(first.images, again.images)
        tfds_cache.arrays("cifar10", prepared, tmp_path)  # without a warning

    def test_a_full_disk_costs_the_cache_alone(self, prepared, tmp_path, monkeypatch):
        def full(path, _):
            path.write_bytes(b"begun")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(tfds_cache.np, "save", full)
        with pytest.warns(UserWarning, match="No space left on device.*not cached"):
            train, _ = tfds_cache.arrays("cifar10", prepared, tmp_path / "cache")
        assert len(train.labels) == 15
        assert not list((tmp_path / "cache").iterdir())

    def test_other_data_has_a_cache_of_its_own(self, prepared, place, tmp_path):
        tfds_cache.arrays("cifar10", prepared, tmp_path / "cache")
        tfds_cache.arrays("cifar10", tmp_path / "data", tmp_path / "cache")
        assert len(list((tmp_path / "cache").iterdir())) == 2


class TestDataset:
    def test_training_sees_normalised_images(self, prepared, tmp_path):
        dataset = datasets.load("cifar10", prepared, tmp_path, augmented=False)
        assert dataset.train.images.dtype == jnp.uint8
        assert dataset.image_shape == (32, 32, 3)
        seen = dataset.training_loss(lambda params, state, batch, key: batch)(
            None, None, dataset.train, jax.random.key(0)
        )
        mean, std = np.array(dataset.mean), np.array(dataset.std)
        expected = (np.asarray(dataset.train.images) / 255 - mean) / std
        np.testing.assert_allclose(seen[0], expected, atol=1e-5)
        np.testing.assert_array_equal(seen[0], dataset.preprocess(dataset.train.images))

    def test_pooled_images_are_means(self, prepared, tmp_path):
        full = datasets.load("cifar10", prepared, tmp_path)
        half = datasets.load("cifar10", prepared, tmp_path, pool=2)
        assert half.image_shape == (16, 16, 3)
        assert (full.padding, half.padding) == (4, 2)
        mean = np.asarray(full.test.images[1, 2:4, 6:8, 0], float).mean()
        assert abs(float(half.test.images[1, 1, 3, 0]) - mean) <= 0.5
        with pytest.raises(ValueError, match="`pool` must divide the image size 32, got 3"):
            datasets.load("cifar10", prepared, tmp_path, pool=3)

    def test_fewer_training_examples_are_the_first(self, prepared, tmp_path):
        whole = datasets.load("cifar10", prepared, tmp_path)
        few = datasets.load("cifar10", prepared, tmp_path, train_size=4)
        np.testing.assert_array_equal(few.train.images, whole.train.images[:4])
        np.testing.assert_array_equal(few.train.labels, whole.train.labels[:4])
        assert len(few.test.labels) == len(whole.test.labels)
        assert len(datasets.load("digits", train_size=10).train.labels) == 10
        for name, most in (("cifar10", 15), ("digits", 1437)):
            with pytest.raises(ValueError, match=f"`train_size` must be at most {most}, .* 2000"):
                datasets.load(name, prepared, tmp_path, train_size=2000)

    def test_digits_and_unknown_names(self):
        digits = datasets.load("digits")
        same = digits.preprocess(digits.train.images)
        np.testing.assert_array_equal(same, digits.train.images)
        with pytest.raises(ValueError, match=r"one of digits, cifar10, .* got 'mnist'"):
            datasets.load("mnist")

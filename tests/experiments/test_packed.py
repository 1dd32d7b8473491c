"""Packed data: moved in parts to a machine with NumPy alone, and checked there."""

import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest

from experiments import prepare
from experiments.data import folders, packed, tfds_cache
from experiments.data.folders import MANIFEST
from experiments.data.tfds_cache import Arrays, DataError


def split(count, seed, num_classes=10):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
    return Arrays(images, rng.integers(0, num_classes, count, np.int32))


TRAIN, TEST = split(6, seed=1), split(3, seed=2)


def assert_same(splits, expected=(TRAIN, TEST)):
    for one, other in zip(splits, expected, strict=True):
        for ours, theirs in zip(one, other, strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A data_dir with arrays alone."""
    root = tmp_path_factory.mktemp("data")
    packed.write("cifar10", TRAIN, TEST, root)
    return root


@pytest.fixture
def out(data_dir, tmp_path):
    """Three parts."""
    packed.pack("cifar10", tmp_path / "out", 3, data_dir)
    return tmp_path / "out"


def as_tfds(folder, train, test):
    """Prepare arrays as a TFDS data set; its training split is in five files of equal size."""

    def batch(images, labels):
        return {b"data": images.transpose(0, 3, 1, 2).reshape(-1, 3072), b"labels": labels.tolist()}

    size = len(train.labels) // 5
    files = {"batches.meta": {b"label_names": [b"class%d" % c for c in range(10)]}}
    for i in range(5):
        files[f"data_batch_{i + 1}"] = batch(*(x[i * size : (i + 1) * size] for x in train))
    files["test_batch"] = batch(*test)
    source = folder / "cifar-10-batches-py"
    source.mkdir(parents=True)
    for name, content in files.items():
        (source / name).write_bytes(pickle.dumps(content, 3))
    prepare.prepare("cifar10", source, folder)


def damage(path, change):
    content = path.read_bytes()
    if change == "missing":
        path.unlink()
    elif change == "truncated":
        path.write_bytes(content[:-2])
    elif change == "empty":
        path.write_bytes(b"")
    else:  # one bit
        middle = len(content) // 2
        flipped = bytes([content[middle] ^ 1])
        path.write_bytes(content[:middle] + flipped + content[middle + 1 :])


class TestPack:
    def test_unpacked_data_equals_tfds_data(self, tmp_path):
        train, test = split(15, seed=3), split(4, seed=4)
        as_tfds(tmp_path / "tfds", train, test)
        assert_same(
            tfds_cache.arrays("cifar10", tmp_path / "tfds", tmp_path / "cache"), (train, test)
        )
        packed.pack("cifar10", tmp_path / "out", 2, tmp_path / "tfds")
        packed.unpack(tmp_path / "out", tmp_path / "new")
        assert_same(tfds_cache.arrays("cifar10", tmp_path / "new"), (train, test))

    def test_tfds_data_counts_where_both_are_there(self, tmp_path):
        train, test = split(5, seed=5), split(2, seed=6)
        packed.write("cifar10", TRAIN, TEST, tmp_path)
        as_tfds(tmp_path, train, test)
        assert_same(tfds_cache.arrays("cifar10", tmp_path, tmp_path / "cache"), (train, test))

    @pytest.mark.parametrize(("name", "classes"), [("cifar100", 100), ("tiny-imagenet", 200)])
    def test_every_data_set_can_be_packed(self, tmp_path, name, classes):
        size = tfds_cache.SOURCES[name].image_shape[0]
        images = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)
        splits = [Arrays(images, np.array([0, classes - 1], np.int32))] * 2
        packed.write(name, *splits, tmp_path)
        packed.pack(name, tmp_path / "out", 2, tmp_path)
        manifest = packed.unpack(tmp_path / "out", tmp_path / "new")
        assert manifest.splits == dict.fromkeys(tfds_cache.SOURCES[name].splits, 2)
        assert_same(tfds_cache.arrays(name, tmp_path / "new"), splits)

    def test_the_fewest_parts_are_written(self, data_dir, tmp_path, monkeypatch):
        monkeypatch.setattr(packed, "MAX_PART", 10_000)
        files = packed.pack("cifar10", tmp_path / "out", data_dir=data_dir).files
        sizes = [(tmp_path / "out" / name).stat().st_size for name in files]
        assert max(sizes) <= 10_000
        assert len(sizes) == -(-sum(sizes) // 10_000) > 1
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*files, MANIFEST]
        packed.unpack(tmp_path / "out", tmp_path / "new")
        assert_same(tfds_cache.arrays("cifar10", tmp_path / "new"))

    @pytest.mark.parametrize("parts", [-1, 0, 2, 1000])
    def test_a_wrong_number_of_parts_is_told(self, data_dir, tmp_path, monkeypatch, parts):
        monkeypatch.setattr(packed, "MAX_PART", 10_000)
        with pytest.raises(DataError, match=rf"must be in \[3, 999\], got {parts}: .* \d+ bytes"):
            packed.pack("cifar10", tmp_path / "out", parts, data_dir)
        assert not list(tmp_path.iterdir())

    def test_nothing_is_overwritten(self, data_dir, out, tmp_path):
        with pytest.raises(DataError, match="out is already there"):
            packed.pack("cifar10", out, None, data_dir)
        packed.unpack(out, tmp_path / "new")
        with pytest.raises(DataError, match="cifar10 is already there"):
            packed.unpack(out, tmp_path / "new")

    def test_an_empty_folder_may_be_filled_with_many_parts(self, data_dir, tmp_path):
        (tmp_path / "empty").mkdir()
        packed.pack("cifar10", tmp_path / "empty", 999, data_dir)
        packed.unpack(tmp_path / "empty", tmp_path / "new")
        assert_same(tfds_cache.arrays("cifar10", tmp_path / "new"))


class TestUnpack:
    @pytest.mark.parametrize("change", ["missing", "truncated", "empty", "one bit"])
    @pytest.mark.parametrize("name", ["cifar10.npz.001-of-003", "cifar10.npz.003-of-003", MANIFEST])
    def test_damage_is_told_and_leaves_nothing(self, out, tmp_path, name, change):
        damage(out / name, change)
        shorter = r"is damaged: \d+ bytes, not \d+" if name != MANIFEST else "is damaged"
        reasons = {"missing": "is missing", "truncated": shorter, "empty": shorter}
        with pytest.raises(
            DataError, match=f"{name} {reasons.get(change, 'is damaged')}"
        ) as raised:
            packed.unpack(out, tmp_path / "new")
        assert "\n" not in str(raised.value)
        assert not (tmp_path / "new").exists()

    def test_a_part_of_another_data_set_is_told(self, out, tmp_path):
        packed.write("cifar10", TEST, TRAIN, tmp_path)
        packed.pack("cifar10", tmp_path / "other", 3, tmp_path)
        name = "cifar10.npz.002-of-003"
        shutil.copy(tmp_path / "other" / name, out / name)
        with pytest.raises(DataError, match=f"{name} is damaged"):
            packed.unpack(out, tmp_path / "new")
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize(
        "content", [b"[]", b"3", b"{}", b'{"files": {}}', b'{"files": {"a": 1}}', b"[" * 10**5]
    )
    def test_other_json_is_no_manifest(self, out, tmp_path, content):
        (out / MANIFEST).write_bytes(content)
        with pytest.raises(DataError, match=f"{MANIFEST} is damaged"):
            packed.unpack(out, tmp_path / "new")

    def test_a_changed_number_in_the_manifest_is_told(self, out, tmp_path):
        text = (out / MANIFEST).read_text()
        (out / MANIFEST).write_text(text.replace('"test": 3', '"test": 4'))
        with pytest.raises(DataError, match=f"{MANIFEST} is damaged"):
            packed.unpack(out, tmp_path / "new")
        (out / MANIFEST).write_text(json.dumps(json.loads(text)))  # other white space
        packed.unpack(out, tmp_path / "new")

    @pytest.mark.parametrize(
        ("name", "reason"), [("cifar10", "Object arrays cannot be loaded"), ("mnist", "mnist")]
    )
    def test_a_manifest_of_something_else_is_told(self, tmp_path, name, reason):
        (tmp_path / "other").mkdir()
        with (tmp_path / "other" / "part").open("wb") as file:
            np.savez(file, **{"train-images": np.array([None])})  # an object, by pickle
        folders.write_manifest(tmp_path / "other", name, {})
        with pytest.raises(DataError, match=f"other is not a packed data set .*{reason}"):
            packed.unpack(tmp_path / "other", tmp_path / "new")
        assert not list((tmp_path / "new").iterdir())

    def test_a_full_disk_leaves_nothing(self, data_dir, out, tmp_path, monkeypatch):
        def full(path, *_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(tfds_cache.np, "save", full)
        monkeypatch.setattr(packed.np, "savez_compressed", full)
        flags = ["--data-dir", str(tmp_path / "new")]
        with pytest.raises(SystemExit, match="No space left"):
            prepare.main(["--unpack", str(out), *flags])
        assert not [path for path in (tmp_path / "new").rglob("*") if path.name != "orlomo_jax"]
        with pytest.raises(OSError, match="No space left"):
            packed.pack("cifar10", tmp_path / "packed", 1, data_dir)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "out"]


class TestWrite:
    @pytest.mark.parametrize(
        ("train", "reason"),
        [
            (Arrays(TRAIN.images[:, :16], TRAIN.labels), r"uint8\(6, 32, 32, 3\)"),
            (Arrays(TRAIN.images / 255, TRAIN.labels), "uint8"),
            (Arrays(TRAIN.images, TRAIN.labels[:5]), r"must have uint8\(5,"),
            (Arrays(TRAIN.images, TRAIN.labels.astype(float)), r"int32\(6,\), got float64"),
            (Arrays(TRAIN.images, TRAIN.labels + 10), r"in \[0, 10\)"),
            (Arrays(TRAIN.images[:0], TRAIN.labels[:0]), r"in \[0, 10\)"),
        ],
    )
    def test_other_arrays_are_refused(self, tmp_path, train, reason):
        with pytest.raises(DataError, match=f"cannot be cifar10: .*split train.*{reason}"):
            packed.write("cifar10", train, TEST, tmp_path)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("change", ["missing", "truncated", "one bit"])
    @pytest.mark.parametrize("name", ["train-images.npy", "test-labels.npy", MANIFEST])
    def test_damage_of_written_arrays_is_told(self, tmp_path, name, change):
        place = packed.write("cifar10", TRAIN, TEST, tmp_path)
        assert_same(tfds_cache.arrays("cifar10", tmp_path))
        damage(place / name, change)
        with pytest.raises(DataError, match=f"{name} is (missing|damaged).*unpack cifar10 again"):
            tfds_cache.arrays("cifar10", tmp_path)

    def test_the_folder_of_another_data_set_is_told(self, data_dir, tmp_path):
        theirs = tfds_cache.arrays_folder("cifar10", data_dir)
        shutil.copytree(theirs, tfds_cache.arrays_folder("cifar100", tmp_path))
        with pytest.raises(DataError, match=f"{MANIFEST} is of cifar10"):
            tfds_cache.arrays("cifar100", tmp_path)


class TestCommand:
    def test_pack_and_unpack(self, data_dir, tmp_path, capsys):
        out, new = str(tmp_path / "out"), str(tmp_path / "new")
        prepare.main(["--pack", "cifar10", "--parts", "2", out, "--data-dir", str(data_dir)])
        printed = capsys.readouterr().out
        size = (tmp_path / "out" / "cifar10.npz.001-of-002").stat().st_size
        assert f"{out}/cifar10.npz.001-of-002: {size} bytes" in printed
        assert "cifar10: 6 images of split train" in printed
        prepare.main(["--unpack", out, "--data-dir", new])
        assert f"cifar10: 3 images of split test\n{new}/orlomo_jax/cifar10" in (
            capsys.readouterr().out
        )
        assert_same(tfds_cache.arrays("cifar10", tmp_path / "new"))

    @pytest.mark.parametrize(
        ("flags", "reason"),
        [
            ("", "give one of --from, --pack, --unpack, got none"),
            ("cifar10", "got none"),
            ("--pack cifar10 --unpack out", "got --pack and --unpack"),
            ("--pack cifar10 --from a.tgz out", "got --from and --pack"),
            ("--unpack --from a.tgz out", "got --from and --unpack"),
            ("--unpack out --parts 3", "--parts needs --pack, got --unpack"),
            ("cifar10 --from a.tgz --parts 3", "--parts needs --pack, got --from"),
            ("--pack cifar10", "--pack needs OUT"),
            ("--unpack", "--unpack needs OUT"),
            ("--from a.tgz", "--from needs one of cifar10, .* got None"),
            ("mnist --from a.tgz", "--from needs one of cifar10, .* got mnist"),
            ("--unpack nowhere", "nowhere/manifest.json is missing"),
        ],
    )
    def test_wrong_flags_are_told(self, tmp_path, monkeypatch, flags, reason):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit, match=reason):
            prepare.main([*flags.split(), "--data-dir", "data"])
        assert not list(tmp_path.iterdir())


WITHOUT_TFDS = """
import sys
from pathlib import Path

for name in ("tensorflow_datasets", "array_record", "PIL", "jax"):
    sys.modules[name] = None  # its import raises

from experiments.data import packed, tfds_cache

out, data_dir = map(Path, sys.argv[1:])
packed.unpack(out, data_dir)
train, test = tfds_cache.arrays("cifar10", data_dir)
print(len(train.labels), int(train.images.sum()), len(test.labels), int(test.images.sum()))
"""


def test_numpy_alone_reads_packed_data(out, tmp_path):
    run = [sys.executable, "-c", WITHOUT_TFDS, str(out), str(tmp_path / "new")]
    printed = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert printed.split() == [
        str(int(x)) for loaded in (TRAIN, TEST) for x in (len(loaded.labels), loaded.images.sum())
    ]

"""Partitions of labelled data among workers."""

import ast
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orlomo_jax.worker import by_class_partition, dirichlet_partition, partition

UNHURRIED = settings(deadline=None)  # a busy machine is not a failure
LABELS = np.random.default_rng(0).integers(0, 10, 5000)


def assert_is_a_partition(parts, labels, num_workers):
    assert len(parts) == num_workers
    assert all(part.dtype == np.int64 and part.ndim == 1 for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))


def shares(parts):
    """The fraction of each class that each worker has, float64[K, C]."""
    counts = np.stack([np.bincount(LABELS[part], minlength=10) for part in parts])
    return counts / counts.sum(0)


class TestDirichlet:
    @UNHURRIED
    @given(
        st.lists(st.integers(-3, 3), min_size=1, max_size=60),
        st.integers(1, 5),
        st.floats(0.05, 100.0),
        st.integers(0, 9),
    )
    def test_every_example_belongs_to_one_worker(self, labels, num_workers, alpha, seed):
        parts = dirichlet_partition(labels, num_workers, alpha, seed, min_size=0)
        assert_is_a_partition(parts, labels, num_workers)

    @pytest.mark.parametrize("alpha", [0.1, 0.5, 5.0])
    def test_shares_have_the_moments_of_the_distribution(self, alpha):
        """Mean 1/K and variance (1/K)(1 − 1/K)/(Kα + 1), from 50 draws of 10 classes."""
        num_workers = 5
        got = np.stack(
            [shares(dirichlet_partition(LABELS, num_workers, alpha, s, 0)) for s in range(50)]
        )
        np.testing.assert_allclose(got.mean((0, 2)), 0.2, atol=0.06)
        wanted = 0.2 * 0.8 / (num_workers * alpha + 1)
        assert abs(got.var() / wanted - 1) < 0.15

    def test_every_worker_has_enough(self):
        for seed in range(10):
            parts = dirichlet_partition(LABELS, 10, 0.1, seed)
            assert_is_a_partition(parts, LABELS, 10)
            assert min(map(len, parts)) >= 10

    def test_the_seed_decides(self):
        one, same, other = (dirichlet_partition(LABELS, 4, 0.5, seed) for seed in (1, 1, 2))
        for a, b in zip(one, same, strict=True):
            np.testing.assert_array_equal(a, b)
        assert any(len(a) != len(b) for a, b in zip(one, other, strict=True))

    def test_the_order_is_random(self):
        (part,) = dirichlet_partition(LABELS, 1, 1.0, 0)
        assert np.abs(np.corrcoef(part, np.arange(len(part)))[0, 1]) < 0.1
        assert np.abs(np.corrcoef(LABELS[part], np.arange(len(part)))[0, 1]) < 0.1

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"alpha": 0.0}, ValueError, "alpha=0.0"),
            ({"alpha": np.inf}, ValueError, "alpha=inf"),
            ({"num_workers": 0}, ValueError, "num_workers=0"),
            ({"seed": -1}, ValueError, "seed=-1"),
            ({"min_size": -1}, ValueError, "min_size=-1"),
            ({"min_size": 1251}, ValueError, "`min_size` must be ≤ 1250 for 5000 examples and"),
            (
                {"alpha": 0.01, "min_size": 1250},
                ValueError,
                "`alpha` must be larger, .*: 1000 draws with alpha=0.01 .* min_size=1250 of 5000",
            ),
            ({"labels": [0.0, 1.0]}, TypeError, r"`labels` must be integers .* float64\[2\]"),
            ({"labels": [[0, 1]]}, TypeError, r"got int64\[1, 2\]"),
            ({"labels": []}, TypeError, r"at least one, got float64\[0\]"),
        ],
    )
    def test_out_of_range(self, change, error, message):
        arguments: Any = {"labels": LABELS, "num_workers": 4, "alpha": 0.5, "seed": 0} | change
        with pytest.raises(error, match=message):
            dirichlet_partition(**arguments)


class TestByClass:
    @UNHURRIED
    @given(st.integers(1, 8), st.integers(1, 10), st.data())
    def test_each_worker_has_its_number_of_classes(self, num_workers, num_classes, data):
        least = -(-num_classes // num_workers)
        count = data.draw(st.integers(least, num_classes))
        labels = LABELS[LABELS < num_classes]
        parts = by_class_partition(labels, num_workers, count, data.draw(st.integers(0, 9)))
        assert_is_a_partition(parts, labels, num_workers)
        owned = [set(labels[part].tolist()) for part in parts]
        assert all(len(classes) == count for classes in owned)
        owners = [sum(value in classes for classes in owned) for value in range(num_classes)]
        assert max(owners) - min(owners) <= 1
        for value in range(num_classes):
            sizes = [np.sum(labels[part] == value) for part in parts]
            sizes = [size for size in sizes if size]
            assert max(sizes) - min(sizes) <= 1

    def test_the_seed_decides(self):
        one, same, other = (by_class_partition(LABELS, 5, 2, seed) for seed in (1, 1, 2))
        for a, b in zip(one, same, strict=True):
            np.testing.assert_array_equal(a, b)
        assert any(set(LABELS[a]) != set(LABELS[b]) for a, b in zip(one, other, strict=True))

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"classes_per_worker": 1}, ValueError, r"in \[2, 10\], got classes_per_worker=1"),
            ({"classes_per_worker": 11}, ValueError, r"in \[2, 10\], got classes_per_worker=11"),
            ({"classes_per_worker": cast(Any, 2.0)}, TypeError, "classes_per_worker=2.0"),
            ({"num_workers": 0}, ValueError, "num_workers=0"),
            ({"seed": cast(Any, None)}, TypeError, "seed=None"),
            ({"labels": ["a"]}, TypeError, "`labels` must be integers"),
            (
                {"labels": [0] * 9 + [7], "classes_per_worker": 2},
                ValueError,
                r"class 7 has fewer examples \(1\) than workers \(5\), got classes_per_worker=2",
            ),
        ],
    )
    def test_out_of_range(self, change, error, message):
        good: Any = {"labels": LABELS, "num_workers": 5, "classes_per_worker": 2, "seed": 0}
        with pytest.raises(error, match=message):
            by_class_partition(**good | change)


def test_the_module_needs_numpy_alone():
    tree = ast.parse(Path(partition.__file__).read_text(encoding="utf-8"))
    found = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any(name.startswith(("jax", "orlomo_jax.worker")) for name in found)

"""What a training step reads: every example once an epoch, each augmented on its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data import datasets

KEY = jax.random.key(0)


class TestAugment:
    images = jnp.asarray(np.random.default_rng(0).integers(1, 256, (1024, 6, 6, 2), np.uint8))

    def test_each_image_is_a_crop_of_its_own_and_maybe_flipped(self):
        out = np.asarray(jax.jit(datasets.augment, static_argnums=2)(KEY, self.images, 2))
        padded = np.pad(self.images, ((0, 0), (2, 2), (2, 2), (0, 0)))
        seen = set()
        for image, source in zip(out, padded, strict=True):
            matches = {
                (y, x, flip)
                for y in range(5)
                for x in range(5)
                for flip in (1, -1)
                if (source[y : y + 6, x : x + 6][:, ::flip] == image).all()
            }
            assert len(matches) == 1
            seen |= matches
        assert len(seen) == 50  # every corner, flipped and not

    def test_it_follows_the_key(self):
        one, same, other = (
            datasets.augment(jax.random.key(seed), self.images, 2) for seed in (0, 0, 1)
        )
        np.testing.assert_array_equal(one, same)
        assert (one != other).any()

    def test_the_loss_has_a_key_of_its_own(self):
        split = datasets.Split(self.images[..., :1], jnp.zeros(1024, int))
        dataset = datasets.Dataset("x", split, split, 2, (0.0,), (1.0,), padding=2)
        loss_fn = dataset.training_loss(lambda params, state, batch, key: (batch, key))
        (images, _), key = loss_fn(None, None, split, KEY)
        assert key != KEY
        again = datasets.augment(key, split.images, 2) / 255
        assert (again != images).any()


class TestBatches:
    split = datasets.Split(jax.numpy.arange(10.0), jax.numpy.arange(10))

    @pytest.mark.parametrize(
        ("batch_size", "steps"),
        [
            (5, 4),
            (1, 1),
            pytest.param(2, 3, marks=pytest.mark.slow),
            pytest.param(10, 1, marks=pytest.mark.slow),
        ],
    )
    def test_each_epoch_holds_every_example_once(self, batch_size, steps):
        batch_fn = jax.jit(datasets.shuffled_batches(self.split, batch_size, steps))
        for worker in (0, 3):
            rounds = [batch_fn(jax.random.key(0), worker, round).labels for round in range(20)]
            read = np.concatenate([labels.ravel() for labels in rounds])
            for epoch in read[: len(read) // 10 * 10].reshape(-1, 10):
                assert sorted(epoch) == list(range(10))

    @pytest.mark.slow
    def test_workers_and_epochs_are_shuffled_apart(self):
        batch_fn = datasets.shuffled_batches(self.split, 10, 1)
        orders = {
            tuple(batch_fn(jax.random.key(0), worker, round).labels.ravel().tolist())
            for worker in (0, 1)
            for round in (0, 1)
        }
        assert len(orders) == 4

    @pytest.mark.slow
    def test_late_rounds_do_not_overflow(self):
        batch_fn = datasets.shuffled_batches(self.split, 10, 100)
        labels = batch_fn(jax.random.key(0), 0, np.int32(2**31 - 1)).labels
        assert np.bincount(labels.ravel()).tolist() == [100] * 10

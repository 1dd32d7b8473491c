"""Random orders, read at places: bijections, apart from each other, without preference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data.shuffle import examples_at

KEY = jax.random.key(0)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 10, 17, 1437, 50_000])
def test_every_order_is_a_permutation(size):
    keys = jax.random.split(KEY, 3)
    places = jnp.tile(jnp.arange(size), 3)
    which = jnp.repeat(jnp.arange(3), size)
    orders = np.asarray(examples_at(keys, which, places, size)).reshape(3, size)
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(size))
    if size > 3:
        assert (orders[0] != orders[1]).any()
        assert (orders[0] != np.arange(size)).any()


@pytest.mark.slow
def test_any_place_is_read_without_the_others():
    keys = jax.random.split(KEY, 1)
    whole = examples_at(keys, jnp.zeros(100, int), jnp.arange(100), 100)
    some = examples_at(keys, jnp.zeros(3, int), jnp.array([97, 3, 41]), 100)
    np.testing.assert_array_equal(some, whole[jnp.array([97, 3, 41])])


@pytest.mark.slow
def test_pairs_of_neighbours_are_uniform():
    """χ² over the 132 ordered pairs of 12 numbers: mean 131, standard deviation 16."""
    size, count = 12, 20_000
    keys = jax.random.split(KEY, count)
    which = jnp.repeat(jnp.arange(count), 2)
    places = jnp.tile(jnp.array([4, 5]), count)
    pairs = np.asarray(examples_at(keys, which, places, size)).reshape(count, 2)
    seen = np.zeros((size, size))
    np.add.at(seen, tuple(pairs.T), 1)
    assert not seen.diagonal().any()
    expected = count / (size * (size - 1))
    chi_squared = ((seen[~np.eye(size, dtype=bool)] - expected) ** 2 / expected).sum()
    assert 131 - 4 * 16 < chi_squared < 131 + 4 * 16

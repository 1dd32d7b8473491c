"""Arrays between callers, devices and wires."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orlomo_jax.server.placement import put_like, to_numpy


class TestOnHost:
    def test_any_tree(self):
        tree = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": [np.float64(2), 3.0, None], "c": ()}
        there = to_numpy(tree)
        wanted = jax.device_get(tree)
        assert jax.tree.structure(there) == jax.tree.structure(wanted)
        for leaf, like in zip(jax.tree.leaves(there), jax.tree.leaves(wanted), strict=True):
            assert isinstance(leaf, np.ndarray)
            assert leaf.dtype == np.asarray(like).dtype
            np.testing.assert_array_equal(leaf, like)

    def test_nothing_is_copied_on_a_cpu(self):
        x = jnp.ones(1000)
        assert to_numpy(x).ctypes.data == x.unsafe_buffer_pointer()


class TestBeside:
    @pytest.fixture
    def params(self):
        return {"w": jnp.ones(2)}

    def test_what_is_there_stays(self, params):
        tree = (params, {"w": np.ones(2, np.float32)})
        for moved, leaf in zip(
            jax.tree.leaves(put_like(tree, params)), jax.tree.leaves(tree), strict=True
        ):
            assert moved is leaf

    def test_sharded_params_take_their_shards(self, params):
        mesh = jax.make_mesh((1,), ("x",), (jax.sharding.AxisType.Auto,))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
        params = jax.device_put(params, sharding)
        (moved,) = jax.tree.leaves(put_like({"w": jnp.ones(2)}, params))
        assert isinstance(moved, jax.Array)
        assert moved.sharding == sharding

    def test_no_params(self):
        assert put_like({}, {}) == {}

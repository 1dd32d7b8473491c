"""Moves trees of arrays between callers, devices and the network."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from orlomo_jax.trees import PyTree


def as_jax_arrays(tree: PyTree) -> PyTree:
    """Return JAX arrays that are not weakly typed and share no memory with NumPy arrays."""

    def leaf(x):
        if isinstance(x, jax.Array) and not getattr(x, "weak_type", False):  # keys have none
            return x
        return jnp.array(x, dtype=jnp.result_type(x))

    return jax.tree.map(leaf, tree)


def commit_like(tree: PyTree, params: PyTree) -> PyTree:
    """Commit uncommitted leaves to the devices of ``params``, replicated.

    If ``params`` are uncommitted, return the tree unchanged.

    Example:
        >>> there = jax.device_put(jnp.ones(2), jax.devices()[0])
        >>> [commit_like(jnp.ones(3), params).committed for params in (jnp.ones(2), there)]
        [False, True]
    """
    where = next((leaf.sharding for leaf in jax.tree.leaves(params) if leaf.committed), None)
    if where is None:
        return tree
    if isinstance(where, jax.sharding.NamedSharding):
        where = jax.sharding.NamedSharding(where.mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(lambda leaf: leaf if leaf.committed else jax.device_put(leaf, where), tree)


def explicit_mesh(leaf: Any) -> jax.sharding.Mesh | None:
    """Return the mesh of an array if the mesh has explicit axes, else None."""
    mesh = getattr(getattr(leaf, "sharding", None), "mesh", None)
    explicit = mesh is not None and jax.sharding.AxisType.Explicit in mesh.axis_types
    return mesh if explicit else None


def mesh_context(tree: PyTree) -> AbstractContextManager[Any]:
    """Return a context that sets the tree's mesh if it has explicit axes.

    The sharding is part of the type of such arrays, so JAX needs the mesh to create new ones.
    """
    meshes = filter(None, map(explicit_mesh, jax.tree.leaves(tree)))
    mesh = next(meshes, None)
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def with_auto_axes(tree: PyTree) -> PyTree:
    """Return the arrays with automatic instead of explicit mesh axes; no data moves.

    JAX confuses programs traced for replicated arrays on an explicit mesh with programs for single
    devices. A run with threads as workers has both.
    """

    def leaf(x):
        if (mesh := explicit_mesh(x)) is None:
            return x
        auto = (jax.sharding.AxisType.Auto,) * len(mesh.axis_names)
        mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=auto)
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, x.sharding.spec))

    return jax.tree.map(leaf, tree)


def put_like(tree: PyTree, params: PyTree) -> PyTree:
    """Move a tree, whose subtrees are like ``params``, to the devices of ``params``.

    NumPy arrays stay: the compiled program moves them itself, much faster.
    """
    expected = [leaf.sharding for leaf in jax.tree.leaves(params)]
    leaves, structure = jax.tree.flatten(tree)
    wanted = expected * (len(leaves) // len(expected)) if expected else []
    moved = [
        leaf if getattr(leaf, "sharding", sharding) == sharding else jax.device_put(leaf, sharding)
        for leaf, sharding in zip(leaves, wanted, strict=True)
    ]
    return jax.tree.unflatten(structure, moved)


def to_numpy(tree: PyTree) -> PyTree:
    """Return the tree as NumPy arrays, on a CPU without a copy.

    Like ``jax.device_get`` it starts all copies from other devices before it waits for the first;
    unlike it, it is fast if there is nothing to copy.

    Example:
        >>> to_numpy({"loss": jnp.ones(2)})
        {'loss': array([1., 1.], dtype=float32)}
    """
    leaves, structure = jax.tree.flatten(tree)
    for leaf in leaves:
        if isinstance(leaf, jax.Array) and not _is_on_cpu(leaf):
            leaf.copy_to_host_async()
    return jax.tree.unflatten(structure, [np.asarray(leaf) for leaf in leaves])


def _is_on_cpu(leaf: jax.Array) -> bool:
    return all(device.platform == "cpu" for device in leaf.devices())

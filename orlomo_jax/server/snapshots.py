"""A server's content: exported to an engine, and as arrays and bookkeeping in a checkpoint."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from orlomo_jax import trees
from orlomo_jax.server.reports import Task
from orlomo_jax.server.state import ServerState
from orlomo_jax.server.task_table import TaskTable
from orlomo_jax.trees import Array, ArrayLike, PyTree
from orlomo_jax.worker.workload import RoundInput


class Export(NamedTuple):
    """A server's complete content."""

    table: TaskTable
    state: ServerState
    tasks: dict[int, Task]


def take_snapshot(content: Export) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arrays, as lists of leaves by name, and the task table, JSON-able.

    Tasks of the same version share one copy.
    """
    table, state, tasks = content
    versions = {str(task.id.dispatched_at): _leaves(task.start) for task in tasks.values()}
    return jax.device_get({"state": _leaves(state), "versions": versions}), table.snapshot()


def read_snapshot(
    like: ServerState, start: RoundInput, table: TaskTable, arrays: dict[str, Any], rows: Any
) -> Export:
    """Return the content of a :func:`take_snapshot`.

    Args:
        like: A state of the same trees.
        start: What a task would carry now.
        table: A new task table; it is filled.
        arrays: The snapshot's arrays.
        rows: The snapshot's task table.

    Raises:
        ValueError: If the snapshot is of another number of workers, or its trees are different.
    """
    table.restore(rows)
    versions = {
        int(index): RoundInput(*_unflatten(start, version))
        for index, version in (arrays["versions"] or {}).items()
    }
    tasks = {
        worker: Task(task_id, versions[task_id.dispatched_at], table.fresh_task(worker))
        for worker, task_id in table.held.items()
    }
    return Export(table, ServerState(*_unflatten(like, arrays["state"])), tasks)


def _leaves(fields: Any) -> dict[str, list[Array]]:
    return {name: nonempty_leaves(tree) for name, tree in fields._asdict().items()}


def _unflatten(like: Any, leaves: dict[str, Any]) -> list[Any]:
    return [unflatten_like(name, tree, leaves[name]) for name, tree in like._asdict().items()]


def nonempty_leaves(tree: PyTree) -> list[Array]:
    """Return the leaves that are not empty; a checkpoint stores only those."""
    return [leaf for leaf in jax.tree.leaves(tree) if leaf.size]


def unflatten_like(name: str, like: PyTree, leaves: list[ArrayLike] | None) -> PyTree:
    """Return a tree like ``like`` from :func:`nonempty_leaves`, on the same devices.

    Raises:
        ValueError: If the number of leaves, a shape or a dtype differs.

    Example:
        >>> like = {"a": jnp.ones(2), "none": jnp.ones(0)}
        >>> unflatten_like("params", like, [jnp.zeros(2)])["a"]
        Array([0., 0.], dtype=float32)
    """
    wanted, structure = jax.tree.flatten(like)
    there: Any = leaves or []
    if len(there) != len(nonempty_leaves(like)):
        raise ValueError(
            f"the snapshot's `{name}` must have {len(nonempty_leaves(like))} leaves, "
            f"got {len(there)}"
        )
    there = iter(there)
    tree = jax.tree.unflatten(
        # A new array for each empty leaf: the same array must not be donated twice.
        structure,
        [_placed(next(there) if x.size else np.zeros(x.shape, x.dtype), x) for x in wanted],
    )
    trees.check_like(name, tree, like, dtypes=True)
    return tree


def _placed(value: ArrayLike, like: Array) -> Array:
    return jax.device_put(value, like.sharding) if like.committed else jnp.asarray(value)

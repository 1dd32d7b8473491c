"""Computes the identity of a run, which must be equal when a run resumes from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Any

import jax
import numpy as np

from orlomo_jax.methods.fingerprint import fingerprint
from orlomo_jax.methods.method import Method
from orlomo_jax.server.parameter_server import ParameterServer
from orlomo_jax.server.step import weight_on_host
from orlomo_jax.trees import Array, PyTree
from orlomo_jax.worker.host_batches import HostBatches
from orlomo_jax.worker.workload import Workload

POINTS = np.array([0, *(10**n for n in range(7))], np.int32)
"""The steps and delays at which schedules and weights are compared."""

JAX_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_default_dtype_bits",
    "jax_numpy_dtype_promotion",
)
"""The settings that change results."""


def of_run(server: ParameterServer, workload: Workload) -> dict[str, Any]:
    """Return the identity of one run: method, rates, trees, keys, round and batches."""
    round_fn, batch_fn = workload.round_fn, workload.batch_fn
    state, sent = server.view(), iter(server.sent_dtypes)
    return {
        **of_method(server.method),
        "num_workers": server.num_workers,
        "synchronous": server.method.synchronous,
        **of_rate(server),
        "params": of_tree(state.params, sent),
        "model_state": of_tree(state.model_state, sent),
        "rule_state": of_tree(state.rule_state),
        **of_keys(*workload.keys),
        **of_work(round_fn, batch_fn),
    }


def of_method(method: Method) -> dict[str, Any]:
    """Return the identity of a method, JSON-able: its fingerprint, and η at `POINTS`."""
    identity: dict[str, Any] = {"method": method.name} | dict(method.fingerprint)
    if method.model_state_weight is not None:
        for name, at in (("step", (POINTS, 0)), ("delay", (0, POINTS))):
            weights = weight_on_host(method.model_state_weight, *at)
            identity[f"merge weight by {name}"] = [f"{float(weight):.4g}" for weight in weights]
    return identity


def of_rate(server: ParameterServer) -> dict[str, Any]:
    """Return the identity of γ: its value, or its schedule's values and fingerprint."""
    if server.schedule is None:
        constant = server.view().local_learning_rate
        return {"local_learning_rate": [str(np.asarray(constant))]}
    # Four digits, because platforms round a schedule differently.
    rates = [f"{float(server.schedule(step)):.4g}" for step in POINTS]
    schedule = fingerprint(server.schedule, "local_learning_rate.schedule")
    return {"local_learning_rate": rates} | schedule


def of_tree(tree: PyTree, sent: Iterable[Any] = ()) -> list[str]:
    """Return path, dtype and shape of each leaf, and the dtype in which it is sent if different.

    Args:
        tree: Any tree of arrays.
        sent: The dtypes in which workers get its leaves; it may be shorter than the leaves.

    Example:
        >>> import jax.numpy as jnp
        >>> of_tree({"w": jnp.ones((2, 3))})
        ["['w'] float32[2, 3]"]
    """
    rows, dtypes = [], iter(sent)
    for path, leaf in jax.tree.leaves_with_path(tree):
        row = f"{jax.tree_util.keystr(path)} {leaf.dtype}{list(leaf.shape)}".strip()
        dtype = next(dtypes, leaf.dtype)
        rows.append(row if dtype == leaf.dtype else f"{row} sent as {dtype}")
    return rows


def of_keys(*keys: Array) -> dict[str, Any]:
    """Return the identity of a run's random numbers."""
    return {"keys": [f"{jax.random.key_impl(k)} {jax.random.key_data(k).tolist()}" for k in keys]}


def of_work(round_fn: Callable, batch_fn: Callable) -> dict[str, Any]:
    """Return the identity of the workers' computation, and JAX's settings."""
    batches = batch_fn.make if isinstance(batch_fn, HostBatches) else batch_fn
    return {
        **fingerprint(round_fn, "round_fn"),
        **fingerprint(batches, "batch_fn"),
        **{name: str(getattr(jax.config, name, None)) for name in JAX_SETTINGS},
    }


def versions(identity: dict[str, Any]) -> dict[str, str]:
    """Return the versions that affect a run's numbers; optax's only if the run uses it."""
    uses_optax = any("optax." in text for text in identity.values() if isinstance(text, str))
    names = ("orlomo-jax", "jax", "jaxlib", *(("optax",) if uses_optax else ()))
    return {f"{name} version": _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # not installed, but imported from its folder
        return "unknown"

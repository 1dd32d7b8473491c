"""Chooses how the runs of a sweep are computed: in one program or one by one, in which groups."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, get_args

import jax

from orlomo_jax.recording.checkpoint import Saved
from orlomo_jax.simulation.engine_choice import Compiled, Eager
from orlomo_jax.simulation.groups import RunAxis

LARGE = 20_000
"""From this number of parameters, ``vmap`` over runs is slower on a CPU than single runs."""


def check_axis(axis: Any) -> RunAxis | None:
    """Return the axis, None for "auto"; raise ValueError if it is unknown."""
    if axis not in ("auto", *get_args(RunAxis)):
        raise ValueError(
            f'`over_runs` must be "auto", "vmap", "map" or "loop", got over_runs={axis!r}'
        )
    return None if axis == "auto" else axis


def choose_axis(
    wanted: RunAxis | None,
    settings: Eager | Compiled,
    engine: Any,
    runs: Sequence[Any],
    saved: Saved | None,
) -> tuple[RunAxis, int]:
    """Return how runs are computed, and in how many groups.

    A sweep that resumes keeps both, since they affect rounding.

    Args:
        wanted: The user's axis, or None.
        settings: The engine of each run if they are computed one by one.
        engine: The user's engine.
        runs: All runs.
        saved: The checkpoint to resume from, or None.
    """
    if len(runs) == 1:
        return "loop", 1
    uneven = runs[0].workload.local_steps
    given = isinstance(engine, Compiled) and engine.rounds in ("map", "vmap")
    if wanted in ("vmap", "map") and (isinstance(settings, Eager) or given):
        raise ValueError(
            f'`over_runs` must be "loop" for engine={engine!r}, got over_runs={wanted!r}'
        )
    if wanted == "vmap" and uneven is not None:  # it would compute the rounds of every S
        raise ValueError(
            f'`over_runs` must be "map" or "loop" if S differs between workers, got "vmap" with '
            f"num_local_steps={uneven}"
        )
    params = jax.tree.leaves(runs[0].server.view().params)
    axis, groups = wanted, _num_places(settings, params)
    if saved is not None and axis in (None, saved.identity.get("axis")):
        axis, groups = saved.identity.get("axis", axis), saved.identity.get("groups", groups)
    if axis is None:
        large = jax.default_backend() == "cpu" and sum(x.size for x in params) >= LARGE
        one_by_one = isinstance(settings, Eager) or given or uneven is not None or large
        axis = "loop" if one_by_one else "vmap"
    return axis, min(groups, len(runs))


def _num_places(settings: Eager | Compiled, params: Sequence[jax.Array]) -> int:
    """Return how many groups compute at the same time: one for each device or CPU core.

    XLA runs the operations of a small model on one core. The eager engine is for large models,
    which use all cores. Parameters on devices of the user's choice stay there.
    """
    if any(leaf.committed for leaf in params):
        return 1
    if jax.default_backend() != "cpu":
        return len(_devices())
    return 1 if isinstance(settings, Eager) else max(len(_devices()), _num_cores())


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # the cores that this process may use
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _devices() -> list[Any]:
    """Return the devices that share the runs: the default device, if one is set, or all."""
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return [default] if default is not None else jax.local_devices()


def devices_of_groups(count: int) -> list[Any]:
    """Return the default device of each group; None keeps JAX's."""
    own = _devices()
    if len(own) == 1:
        own = [jax.config.jax_default_device]  # pyright: ignore[reportAttributeAccessIssue]
    return [own[index % len(own)] for index in range(count)]

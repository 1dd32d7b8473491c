"""Advances the runs of a sweep: one by one, or several in one program by ``vmap`` or ``map``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache, partial
from operator import itemgetter
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from orlomo_jax.recording.columns import Stacked
from orlomo_jax.server.parameter_server import ParameterServer
from orlomo_jax.server.state import ServerState
from orlomo_jax.simulation.compiled import Carry, CompiledEngine
from orlomo_jax.simulation.engine_choice import Engine, Rounds
from orlomo_jax.simulation.stacking import stack
from orlomo_jax.worker.workload import RoundMetrics

RunAxis: TypeAlias = Literal["vmap", "map", "loop"]
RUN_AXES = (None, 0, 0, 0, None, None, 0, 0)
"""The axis of runs in each argument of a segment's program."""


class OneByOne:
    """Runs that advance one after another.

    Args:
        engines: The engine of each run.

    Attributes:
        lanes: The engines, from which recorders read.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        """Keep the engines."""
        self.lanes: Sequence[Engine] = engines
        self._ended: set[int] = set()

    def advance(self, stop: int) -> dict[int, Rounds]:
        """Apply reports until step ``stop``; return the metrics of each run that has not ended."""
        active = set(range(len(self.lanes))) - self._ended
        rounds = {index: self.lanes[index].advance(stop) for index in active}
        if len(self.lanes) == 1:  # an eager engine computes each step when it is recorded
            return rounds
        return {i: x if isinstance(x, Stacked) else list(x) for i, x in rounds.items()}

    def end(self, index: int) -> None:
        """Stop advancing a run."""
        self._ended.add(index)


class Together:
    """Runs of one method, shape and length that one program advances.

    Every array gets a leading axis of lanes, one for each run. A run that diverges does not affect
    the others. The lane of a run that has ended computes the steps of another run again.

    Args:
        engines: The engine of each run, not yet started, with ``rounds="loop"``.
        axis: How the program computes the lanes, "vmap" or "map".
        width: The number of lanes, at least that of the runs. Groups of the same width share one
            compiled program.
        device: The default device while the group computes; None keeps JAX's.

    Attributes:
        lanes: The lane of each run, from which recorders read.
    """

    def __init__(
        self, engines: Sequence[CompiledEngine], axis: RunAxis, width: int, device: Any = None
    ) -> None:
        """Keep the engines; :func:`make_alike` has checked that they can share a program."""
        self.engines, self._width, self._device = list(engines), width, device
        self.lanes = [Lane(self, index) for index in range(len(engines))]
        self.carry: Carry | None = None
        self._ended: set[int] = set()
        self._program, self._compiling = over_runs(engines[0].program, axis)
        self._settings = self._stack([engine.settings for engine in engines])
        self._keys = [
            self._stack(keys) for keys in zip(*(e.workload.keys for e in engines), strict=True)
        ]
        self._compiled = False

    def advance(self, stop: int) -> dict[int, Rounds]:
        """Apply reports until step ``stop``; return the metrics of each run that has not ended."""
        active = [index for index in range(len(self.engines)) if index not in self._ended]
        if not active:
            return {}
        if self.carry is None:
            loaded = {index: self.engines[index].load() for index in active}
            self.carry = self._stack_active(loaded)
        plans = {index: self.engines[index].plan(stop) for index in active}
        _, first, groups = plans[active[0]]
        tables = np.stack(self._filled({index: plan[0] for index, plan in plans.items()}))
        batch_fn = self.engines[0].workload.batch_fn
        args = (batch_fn, self._settings, self.carry, tables, first, groups, *self._keys)
        if not self._compiled:
            with self._compiling:
                self._program.lower(*args).compile()
            self._compiled = True
        self.carry = carry = self._program(*args)
        bad = np.asarray(carry.first_nonfinite)
        metrics = jax.tree.map(np.array, carry.metrics)
        for index in active:
            self.engines[index].first_nonfinite = int(bad[index])
        return {
            index: Stacked(jax.tree.map(itemgetter(index), metrics), stop - int(first))
            for index in active
        }

    def end(self, index: int) -> None:
        """Give a run's server its state, and stop advancing the run."""
        self.unload(index)
        self._ended.add(index)

    def unload(self, index: int) -> None:
        """Give a run's server its state."""
        if self.is_running(index):
            self.engines[index].unload(self.read(index, lambda carry: carry))

    def sync_to_server(self) -> None:
        """Give every server its state; the next segment loads it again."""
        for index in range(len(self.engines)):
            self.unload(index)
        self.carry = None

    def is_running(self, index: int) -> bool:
        """Return whether the newest state of a run is in the carry."""
        return self.carry is not None and index not in self._ended

    def read(self, index: int, part: Callable[[Carry], Any]) -> Any:
        """Return a copy of a part of a run's carry."""
        assert self.carry is not None
        with nullcontext() if self._device is None else jax.default_device(self._device):
            return _lane(part(self.carry), np.int32(index))

    def _filled(self, of_run: dict[int, Any]) -> list[Any]:
        """Return a value for each lane; those without a run get that of any run."""
        other = next(iter(of_run.values()))
        return [of_run.get(index, other) for index in range(self._width)]

    def _stack_active(self, of_run: dict[int, Any]) -> Any:
        return stack(self._filled(of_run))

    def _stack(self, values: Sequence[Any]) -> Any:
        return self._stack_active(dict(enumerate(values)))


class Lane:
    """One run of a :class:`Together`, to read from."""

    def __init__(self, group: Together, index: int) -> None:
        """Keep the index of the run."""
        self._group, self._index = group, index

    @property
    def server(self) -> ParameterServer:
        """The run's server."""
        return self._engine.server

    @property
    def first_nonfinite(self) -> Any:
        """The step of the run's first non-finite round, −1 for none."""
        return self._engine.first_nonfinite

    @first_nonfinite.setter
    def first_nonfinite(self, step: Any) -> None:
        self._engine.first_nonfinite = int(step)

    @property
    def local_states(self) -> dict[int, Any]:
        """The kept states of the run's workers, by worker."""
        return self._engine.local_states

    @local_states.setter
    def local_states(self, states: dict[int, Any]) -> None:
        self._engine.local_states = states

    @property
    def like(self) -> RoundMetrics:
        """The shapes of a round's metrics."""
        return self._engine.like

    @property
    def _engine(self) -> CompiledEngine:
        return self._group.engines[self._index]

    def view(self) -> ServerState:
        """Return the run's state."""
        if not self._group.is_running(self._index):
            return self._engine.view()
        return self._group.read(self._index, lambda carry: carry.state)

    def find_nonfinite(self) -> int:
        """Return the run's first non-finite step, −1 for none."""
        return self._engine.find_nonfinite()

    def model(self) -> tuple[Any, Any]:
        """Return the run's params and model state, which later steps do not change."""
        if not self._group.is_running(self._index):
            return self._engine.model()
        part = lambda carry: (carry.state.params, carry.state.model_state)  # noqa: E731
        return self._group.read(self._index, part)

    def advance(self, stop: int) -> Rounds:
        """Raise RuntimeError, because all runs advance together."""
        raise RuntimeError(f"all runs must advance together, got stop={stop} for one of them")

    def sync_to_server(self) -> None:
        """Give every server its state."""
        self._group.sync_to_server()


def make_alike(engines: Sequence[CompiledEngine]) -> None:
    """Give the engines of a sweep the same number of slots.

    Raises:
        ValueError: If they differ in program, batch function, or structure and shapes.
    """
    first, *others = engines
    for engine in others:
        mine, theirs = ((e.program, e.workload.batch_fn) for e in (engine, first))
        if mine != theirs:
            raise ValueError("runs together must share method, local round and batch function")
        if (mine := _form(engine)) != (theirs := _form(first)):
            raise ValueError(
                "runs together must have parameters, model states, learning rates and "
                f"hyperparameters of one structure and shape, got {mine} and {theirs}"
            )
    slots = max(engine.slots for engine in engines)
    for engine in engines:
        engine.slots = slots


@lru_cache(maxsize=32)
def over_runs(program: Callable, axis: RunAxis) -> tuple[jax.stages.Wrapped, threading.Lock]:
    """Return a segment's program for all lanes, which share batch function and step numbers.

    Groups of one shape share the program and the lock: the first compiles, the others wait.
    """
    if axis == "vmap":
        vmapped = jax.vmap(program, RUN_AXES)
        return partial(jax.jit, donate_argnums=2)(vmapped), threading.Lock()

    def mapped(batch_fn, settings, carry, tables, first, groups, *keys):
        def one(row):
            settings, carry, table, *keys = row
            return program(batch_fn, settings, carry, table, first, groups, *keys)

        return jax.lax.map(one, (settings, carry, tables, *keys))

    return partial(jax.jit, donate_argnums=2)(mapped), threading.Lock()


def _form(engine: CompiledEngine) -> Any:
    leaves, structure = jax.tree.flatten((engine.view(), engine.settings))
    return structure, [(jnp.shape(leaf), jnp.result_type(leaf).name) for leaf in leaves]


@jax.jit
def _lane(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)

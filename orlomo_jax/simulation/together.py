"""Simulates several runs of one shape in one compiled program, by ``vmap`` over the runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from orlomo_jax.server.parameter_server import ParameterServer
from orlomo_jax.server.state import ServerState
from orlomo_jax.simulation.compiled import Carry, CompiledEngine
from orlomo_jax.simulation.engine_choice import Engine
from orlomo_jax.simulation.stacking import by_round
from orlomo_jax.worker.workload import RoundMetrics

RUN_AXES = (None, 0, 0, 0, None, None, 0, 0)
"""The axis of runs in each argument of a segment's program."""


class Alone:
    """One run, to advance like a :class:`Together`."""

    def __init__(self, engine: Engine) -> None:
        """Keep the engine."""
        self.lanes: list[Engine] = [engine]

    def advance(self, stop: int) -> list[Any]:
        """Apply reports until step ``stop``; return the metrics of each run."""
        return [self.lanes[0].advance(stop)]


class Together:
    """N runs of one method, shape and length, which differ in values and arrivals.

    Every array gets a leading axis of runs, and each local step is computed for all runs at once. A
    run that diverges continues with NaNs and does not affect the others.

    Args:
        engines: One for each run, not yet started, with ``rounds="loop"``.

    Attributes:
        lanes: An :class:`~orlomo_jax.simulation.engine_choice.Engine` for each run, to read from.

    Raises:
        ValueError: If the runs differ in program, batch function, or structure and shapes.
    """

    def __init__(self, engines: Sequence[CompiledEngine]) -> None:
        """Check that the engines can share a program."""
        first, *others = engines
        if first.workload.local_steps is not None:  # vmap would compute the branch of every S
            raise ValueError(
                "runs together must have one S for all workers, got "
                f"num_local_steps={first.workload.local_steps}"
            )
        for engine in others:
            mine, theirs = ((e.program, e.workload.batch_fn) for e in (engine, first))
            if mine != theirs:
                raise ValueError("runs together must share method, local round and batch function")
            if (mine := _form(engine)) != (theirs := _form(first)):
                raise ValueError(
                    "runs together must have parameters, model states and learning rates of one "
                    f"structure and shape, got {mine} and {theirs}"
                )
        slots = max(engine.slots for engine in engines)
        for engine in engines:
            engine.slots = slots
        self.engines = list(engines)
        self.lanes = [Lane(self, index) for index in range(len(engines))]
        self.carry: Carry | None = None
        self._program = over_runs(first.program)
        self._schedules = _stack([engine.server.schedule for engine in engines])
        self._keys = [
            jnp.stack(list(keys)) for keys in zip(*(e.workload.keys for e in engines), strict=True)
        ]

    def advance(self, stop: int) -> list[list[RoundMetrics]]:
        """Apply reports until step ``stop`` of each run; return the metrics of each run."""
        if self.carry is None:
            self.carry = _stack([engine.load() for engine in self.engines])
        plans = [engine.plan(stop) for engine in self.engines]
        tables, (first, *_), (groups, *_) = zip(*plans, strict=True)
        batch_fn = self.engines[0].workload.batch_fn
        carry: Carry = self._program(
            batch_fn, self._schedules, self.carry, np.stack(tables), first, groups, *self._keys
        )
        self.carry = carry
        for engine, bad in zip(self.engines, np.asarray(carry.first_nonfinite), strict=True):
            engine.first_nonfinite = int(bad)
        metrics = jax.tree.map(np.array, carry.metrics)
        return [
            by_round(jax.tree.map(itemgetter(index), metrics), stop - int(first))
            for index in range(len(self.engines))
        ]

    def sync_to_server(self) -> None:
        """Give every server its state."""
        if (carry := self.carry) is not None:
            for index, engine in enumerate(self.engines):
                engine.unload(_lane(carry, np.int32(index)))
            self.carry = None


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
    def _engine(self) -> CompiledEngine:
        return self._group.engines[self._index]

    def view(self) -> ServerState:
        """Return the run's state."""
        carry = self._group.carry
        if carry is None:
            return self._engine.view()
        return _lane(carry.state, np.int32(self._index))

    def model(self) -> tuple[Any, Any]:
        """Return the run's params and model state, which later steps do not change."""
        carry = self._group.carry
        if carry is None:
            return self._engine.model()
        return _lane((carry.state.params, carry.state.model_state), np.int32(self._index))

    def advance(self, stop: int) -> list[RoundMetrics]:
        """Raise RuntimeError, because all runs advance together."""
        raise RuntimeError(f"all runs must advance together, got stop={stop} for one of them")

    def sync_to_server(self) -> None:
        """Give every server its state."""
        self._group.sync_to_server()


@lru_cache(maxsize=32)
def over_runs(program: Callable) -> Callable:
    """Return a segment's program for all runs, which share batch function and step numbers."""
    return partial(jax.jit, donate_argnums=2)(jax.vmap(program, RUN_AXES))


def _form(engine: CompiledEngine) -> Any:
    leaves, structure = jax.tree.flatten((engine.view(), engine.server.schedule))
    return structure, [(jnp.shape(leaf), jnp.result_type(leaf).name) for leaf in leaves]


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@jax.jit
def _lane(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)

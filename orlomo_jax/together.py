"""Several simulated runs of one shape as one compiled program, by ``vmap`` over the runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from orlomo_jax.compiled import Carry, Compiled
from orlomo_jax.driven import Driven

RUN_AXES = (None, 0, 0, 0, None, None, 0, 0)
"""Where the arguments of a stretch have their axis of runs."""


class Alone:
    """One run, with the interface of :class:`Together`."""

    def __init__(self, engine: Driven | Compiled) -> None:
        """Keep the engine."""
        self.lanes = [engine]

    def advance(self, stop: int) -> list[Any]:
        """Step on until ``stop`` reports are applied; return the losses of each run."""
        return [self.lanes[0].advance(stop)]

    def settle(self) -> None:
        """Leave everything with the server."""
        self.lanes[0].settle()


class Together:
    """N runs of one method, shape and length; they differ in values and in their arrivals.

    Every array of a run gets a leading axis of runs, and each local step is computed for all runs
    at once. A run that diverges goes on with NaNs and leaves the others alone.

    Args:
        engines: One for each run, none of them started, all with the worker axis "loop".

    Attributes:
        lanes: What each run shows of itself, in order.

    Raises:
        ValueError: If the runs do not share a program, batch function or tree of arrays.
    """

    def __init__(self, engines: Sequence[Any]) -> None:
        """Check that the engines can share a program."""
        first, *others = engines
        for engine in others:
            if (engine.program, engine.job.batch_fn) != (first.program, first.job.batch_fn):
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
            jnp.stack(list(keys))
            for keys in zip(*((e.job.data_key, e.job.noise_key) for e in engines), strict=True)
        ]

    def advance(self, stop: int) -> list[np.ndarray]:
        """Step on until ``stop`` reports of each run are applied; return the losses of each run.

        Raises:
            ReportRejected: As :meth:`Compiled.advance` does.
        """
        if self.carry is None:
            self.carry = _stack([engine.load() for engine in self.engines])
        plans = [engine.plan(stop) for engine in self.engines]
        tables, (first, *_), (groups, *_) = zip(*plans, strict=True)
        batch_fn = self.engines[0].job.batch_fn
        carry: Carry = self._program(
            batch_fn, self._schedules, self.carry, np.stack(tables), first, groups, *self._keys
        )
        self.carry = carry
        for lane, bad in zip(self.lanes, np.asarray(carry.first_bad), strict=True):
            lane.first_bad = int(bad)
        return list(np.array(carry.losses)[:, : stop - int(first)])

    def settle(self) -> None:
        """Leave everything with the servers."""
        if (carry := self.carry) is not None:
            for index, engine in enumerate(self.engines):
                engine.unload(_lane(carry, np.int32(index)))
            self.carry = None


class Lane:
    """One of several runs together, as a recorder of runs sees it."""

    def __init__(self, group: Together, index: int) -> None:
        """Keep the place of the run."""
        self._group, self._index = group, index

    @property
    def first_bad(self) -> int:
        """The step of the run's first non-finite round, −1 for none."""
        return self._group.engines[self._index].first_bad

    @first_bad.setter
    def first_bad(self, step: Any) -> None:
        self._group.engines[self._index].first_bad = int(step)

    def peek(self) -> tuple[Any, Any, Any]:
        """Return the run's params, model state and rule's state."""
        carry, engine = self._group.carry, self._group.engines[self._index]
        if carry is None:
            return engine.peek()
        return _lane((carry.params, carry.model_state, carry.state), np.int32(self._index))

    arrays = peek  # slices are copies


@lru_cache(maxsize=32)
def over_runs(program: Callable) -> Callable:
    """Return a stretch of all runs as one program; batch function and step numbers are shared."""
    return partial(jax.jit, donate_argnums=2)(jax.vmap(program, RUN_AXES))


def _form(engine: Compiled) -> Any:
    leaves, structure = jax.tree.flatten((engine.peek(), engine.server.schedule))
    return structure, [(jnp.shape(leaf), jnp.result_type(leaf).name) for leaf in leaves]


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@jax.jit
def _lane(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)

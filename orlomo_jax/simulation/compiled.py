"""Defines the compiled engine, which runs each segment of a simulated run as one program."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from orlomo_jax.methods.method import Method
from orlomo_jax.recording.recorder import SEGMENT
from orlomo_jax.server.parameter_server import ParameterServer
from orlomo_jax.server.placement import as_jax_arrays
from orlomo_jax.server.reports import Report, Task
from orlomo_jax.server.snapshots import Export
from orlomo_jax.server.state import ServerState
from orlomo_jax.server.step import apply_report, check_model_state_weight, weight_on_host
from orlomo_jax.server.task_table import TaskId
from orlomo_jax.simulation.planning import Segment, SlotPlanner, count_slots
from orlomo_jax.traces.trace import ArrivalTrace
from orlomo_jax.trees import Array
from orlomo_jax.worker.workload import RoundInput, RoundMetrics, Workload, round_program

Rounds: TypeAlias = Literal["loop", "map", "vmap"]

LENGTH = SEGMENT
"""Steps of the longest segment; shorter ones run the same program."""


class Carry(NamedTuple):
    """The arrays that one segment passes to the next; each segment donates them.

    Attributes:
        state: The server's state.
        slots: The inputs of outstanding tasks, one copy of each version; every leaf has a leading
            axis of slots.
        first_nonfinite: The step of the first non-finite round, −1 for none.
        metrics: The metrics of this segment's rounds; every leaf has a leading axis of LENGTH.
    """

    state: ServerState
    slots: RoundInput
    first_nonfinite: Array
    metrics: RoundMetrics


class CompiledEngine:
    """Simulates a run in compiled segments; see ``Engine`` in engine_choice.py.

    Args:
        server: A server that has dispatched its first tasks.
        workload: The workers' computation.
        trace: The order of arrivals.
        rounds: How the rounds of a group are computed: one by one, each with its server step
            ("loop"), or together before their server steps, by ``jax.lax.map`` or ``jax.vmap``.
        batch: The largest number of rounds in a group; 1 for "loop".

    Attributes:
        slots: The number of versions of w that can be stored.
    """

    def __init__(
        self,
        server: ParameterServer,
        workload: Workload,
        trace: ArrivalTrace,
        rounds: Rounds,
        batch: int,
    ) -> None:
        """Keep the arguments; the first segment takes the state from the server."""
        self.server, self.workload, self._trace, self._batch = server, workload, trace, batch
        run_round = round_program(workload.round_fn)
        self.program = segment_program(server.method, run_round, rounds, batch, server.sent_dtypes)
        self.slots = count_slots(trace)
        self._merges = bool(jax.tree.leaves(server.model_state))
        self._carry: Carry | None = None
        self._metrics = workload.shapes(server.to_send())[1]
        self.first_nonfinite: Any = -1

    def advance(self, stop: int) -> list[RoundMetrics]:
        """Apply reports until step ``stop``; return the metrics of each.

        Raises:
            RejectedReportError: If the weight of a report's model state is outside [0, 1]; this
                segment has not run then.
        """
        if self._carry is None:
            self._carry = self.load()
        first = self.server.step
        _, batch_fn, *keys = self.workload
        carry: Carry = self.program(
            batch_fn, self.server.schedule, self._carry, *self.plan(stop), *keys
        )
        self._carry, self.first_nonfinite = carry, int(carry.first_nonfinite)
        return by_round(carry.metrics, stop - first)

    def plan(self, stop: int) -> tuple[np.ndarray, np.int32, np.int32]:
        """Plan the steps until ``stop``; return their table, first step and number of groups."""
        first = self.server.step
        segment = self._planner.advance(stop, LENGTH)
        if self._merges:
            self._check_model_state_weights(first, segment.dispatched_at[: stop - first])
        return np.stack(segment), np.int32(first), np.int32(np.count_nonzero(segment.sizes))

    def view(self) -> ServerState:
        """Return the state, valid until the next segment."""
        return self.server.view() if self._carry is None else self._carry.state

    def model(self) -> tuple[Any, Any]:
        """Return params and model state, which later steps do not change."""
        state = self.view()
        return jax.tree.map(jnp.copy, (state.params, state.model_state))

    def sync_to_server(self) -> None:
        """Give the server the state, as if it had received each report."""
        if self._carry is not None:
            self.unload(self._carry)
            self._carry = None

    def load(self) -> Carry:
        """Take the state from the server."""
        table, state, tasks = self.server.export()
        self._planner = SlotPlanner(table, self._trace, self._batch, self.slots)
        versions = {task.id.dispatched_at: task.start for task in tasks.values()}
        tasks.clear()
        state = jax.tree.map(jnp.copy, as_jax_arrays(state))
        slots = _repeat(self._newest(state), self.slots)
        for version, slot in self._planner.versions.items():
            slots = _write(slots, as_jax_arrays(versions.pop(version)), np.int32(slot))
        metrics = jax.tree.map(lambda x: jnp.zeros((LENGTH, *x.shape), x.dtype), self._metrics)
        return Carry(state, slots, jnp.int32(self.first_nonfinite), metrics)

    def unload(self, carry: Carry) -> None:
        """Give the server the state in a carry."""
        table = self._planner.table
        versions: dict[int | None, RoundInput] = {None: self._newest(carry.state)}
        tasks = {}
        for worker, task_id in table.held.items():
            slot = self._planner.slot(worker)
            if slot is not None and slot not in versions:
                versions[slot] = _read(carry.slots, np.int32(slot))
            tasks[worker] = Task(task_id, versions[slot])
        self.server.import_(Export(table, carry.state, tasks))

    def _newest(self, state: ServerState) -> RoundInput:
        synchronous = self.server.method.synchronous
        return state.sent(self.server.sent_dtypes, with_momentum=synchronous)

    def _check_model_state_weights(self, first: int, dispatched_at: np.ndarray) -> None:
        count = len(dispatched_at)
        steps = first + np.minimum(np.arange(LENGTH), count - 1)  # one length: one program
        delays = steps - np.pad(dispatched_at, (0, LENGTH - count), "edge")
        weights = weight_on_host(self.server.method.model_state_weight, steps, delays)
        for index in np.flatnonzero(~((weights >= 0) & (weights <= 1)))[:1]:
            check_model_state_weight(float(weights[index]), int(steps[index]), int(delays[index]))


@lru_cache(maxsize=32)
def segment_program(
    method: Method, run_round: Callable, rounds: Rounds, batch: int, dtypes: tuple[Any, ...]
) -> Callable:
    """Return one compiled program for segments of any length.

    A step writes the newest parameters before it reads those of its task. In this order XLA updates
    the slots in place; in the other order it would copy all of them in every step.
    """
    over_rows = {"loop": None, "map": jax.lax.map, "vmap": lambda f, rows: jax.vmap(f)(rows)}
    together = over_rows[rounds]

    @partial(jax.jit, donate_argnames="carry")
    def run(batch_fn, schedule, carry, table, first, groups, data_key, noise_key):
        segment: Any = Segment(*jnp.asarray(table))  # NumPy arrays if JAX does not compile

        def compute(slots, row):
            start = jax.tree.map(lambda x: _at(x, segment.reads[row]), slots)
            counts = segment.workers[row], segment.rounds[row], first + row, jnp.int32(-1)
            return run_round(batch_fn, start, data_key, noise_key, *counts)

        def write(carry, row):
            newest = carry.state.sent(dtypes, with_momentum=method.synchronous)
            return carry._replace(slots=_put(carry.slots, newest, segment.writes[row]))

        def apply(carry, row, answer):
            result, metrics, bad = answer
            task_id = TaskId(segment.workers[row], segment.rounds[row], segment.dispatched_at[row])
            report = Report(task_id, result.update, result.model_state)
            state = apply_report(method, carry.state, report, first + row, schedule)
            bad = jnp.where(carry.first_nonfinite < 0, bad, carry.first_nonfinite)
            new = Carry(state, carry.slots, bad, _put(carry.metrics, metrics, row))
            return jax.tree.map(_as, new, carry)

        def group(index, carry):
            start = segment.starts[index]
            carry = write(carry, start)
            if together is None:
                return apply(carry, start, compute(carry.slots, start))
            answers = together(partial(compute, carry.slots), start + jnp.arange(batch))

            def step(row, carry):
                answer = jax.tree.map(lambda x: _at(x, row), answers)
                return apply(write(carry, start + row), start + row, answer)

            return jax.lax.fori_loop(0, segment.sizes[index], step, carry)

        return jax.lax.fori_loop(0, groups, group, carry)

    return run


def by_round(metrics: RoundMetrics, count: int) -> list[RoundMetrics]:
    """Return the metrics of the first ``count`` rounds, on the host."""
    losses, others = jax.tree.map(lambda x: np.array(x)[:count], metrics)
    leaves, structure = jax.tree.flatten(others)
    if not leaves:
        return [RoundMetrics(loss, others) for loss in losses]
    rows = (jax.tree.unflatten(structure, row) for row in zip(*leaves, strict=True))
    return [RoundMetrics(*pair) for pair in zip(losses, rows, strict=True)]


def _as(x: Array, old: Array) -> Array:
    return x if x.dtype == old.dtype else x.astype(old.dtype)


def _at(x: Array, index: Any) -> Array:
    return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)


def _put(many: Any, one: Any, index: Any) -> Any:
    """Return stacked trees with one tree written to an index."""
    return jax.tree.map(
        lambda many, one: jax.lax.dynamic_update_index_in_dim(many, one, index, 0), many, one
    )


_read = jax.jit(lambda slots, slot: jax.tree.map(lambda x: _at(x, slot), slots))
_write = jax.jit(_put, donate_argnums=0)


@partial(jax.jit, static_argnums=1)
def _repeat(start: RoundInput, count: int) -> RoundInput:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), start)

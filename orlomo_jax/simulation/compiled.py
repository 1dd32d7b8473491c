"""Defines the compiled engine, which runs each segment of a simulated run as one program."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from orlomo_jax.methods.method import Method
from orlomo_jax.recording.columns import Stacked
from orlomo_jax.recording.recorder import SEGMENT
from orlomo_jax.recording.state_source import metric_shapes
from orlomo_jax.server.parameter_server import ParameterServer
from orlomo_jax.server.placement import as_jax_arrays
from orlomo_jax.server.reports import Report, Task
from orlomo_jax.server.snapshots import Export
from orlomo_jax.server.state import ServerState
from orlomo_jax.server.step import apply_report, check_model_state_weight, weight_on_host
from orlomo_jax.server.task_table import TaskId
from orlomo_jax.simulation.planning import Segment, SlotPlanner, count_slots
from orlomo_jax.simulation.stacking import cast_like, copy, put, read, repeat, take, write_to
from orlomo_jax.traces.trace import ArrivalTrace
from orlomo_jax.trees import Array, PyTree, all_finite
from orlomo_jax.worker.step_loop import init_state
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
        local_states: The kept states of the workers' optimizers, or None; every leaf has a leading
            axis K.
    """

    state: ServerState
    slots: RoundInput
    first_nonfinite: Array
    metrics: RoundMetrics
    local_states: PyTree


class Settings(NamedTuple):
    """The numbers of a run that are arguments of its program."""

    schedule: Any  # γ as a function of the step, or None if γ is constant
    hyperparameters: dict[str, Any]  # of the server's rule, instead of the method's


class CompiledEngine:
    """Simulates a run in compiled segments; see ``Engine`` in engine_choice.py.

    Args:
        server: A server that has dispatched its first tasks.
        workload: The workers' computation.
        trace: The order of arrivals.
        rounds: How the rounds of a group are computed: one by one, each with its server step
            ("loop"), or together before their server steps, by ``jax.lax.map`` or ``jax.vmap``.
        batch: The largest number of rounds in a group; 1 for "loop".
        method: The method of the program; the server's has other hyperparameters.
        hyperparameters: Those hyperparameters; without any, the methods are the same.

    Attributes:
        settings: The numbers that are arguments of the program.
        slots: The number of versions of w that can be stored.
        like: The shapes of a round's metrics.
        local_states: By worker, the state of its optimizer that its next round starts from; while
            segments run, they are in the carry.
    """

    def __init__(
        self,
        server: ParameterServer,
        workload: Workload,
        trace: ArrivalTrace,
        rounds: Rounds,
        batch: int,
        method: Method | None = None,
        hyperparameters: dict[str, float] | None = None,
    ) -> None:
        """Keep the arguments; the first segment takes the state from the server."""
        self.server, self.workload, self._trace, self._batch = server, workload, trace, batch
        values = {name: jnp.asarray(x, float) for name, x in (hyperparameters or {}).items()}
        self.settings = Settings(server.schedule, values)
        self.program = segment_program(
            method or server.method,
            workload.round_fn,
            workload.local_steps,
            rounds,
            batch,
            server.sent_dtypes,
        )
        self.local_states: dict[int, PyTree] = {}
        self.slots = count_slots(trace)
        self._merges = bool(jax.tree.leaves(server.model_state))
        self._carry: Carry | None = None
        self.like, self.first_nonfinite = metric_shapes(server, workload), -1

    def advance(self, stop: int) -> Stacked:
        """Apply reports until step ``stop``; return the metrics of each.

        Raises:
            RejectedReportError: If the weight of a report's model state is outside [0, 1]; this
                segment has not run then.
        """
        if self._carry is None:
            self._carry = self.load()
        first = self.server.step
        batch_fn, keys = self.workload.batch_fn, self.workload.keys
        carry: Carry = self.program(batch_fn, self.settings, self._carry, *self.plan(stop), *keys)
        self._carry, self.first_nonfinite = carry, int(carry.first_nonfinite)
        return Stacked(jax.tree.map(np.array, carry.metrics), stop - first)

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

    def find_nonfinite(self) -> int:
        """Return the first non-finite step, −1 for none: the program looks at the state too."""
        return self.first_nonfinite

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
        steps = self.workload.local_steps
        self._planner = SlotPlanner(table, self._trace, self._batch, self.slots, steps)
        versions = {task.id.dispatched_at: task.start for task in tasks.values()}
        tasks.clear()
        state = copy(as_jax_arrays(state))
        slots = repeat(self._newest(state), self.slots)
        for version, slot in self._planner.versions.items():
            slots = write_to(slots, as_jax_arrays(versions.pop(version)), np.int32(slot))
        metrics = jax.tree.map(lambda x: jnp.zeros((LENGTH, *x.shape), x.dtype), self.like)
        bad = jnp.int32(self.first_nonfinite)
        return Carry(state, slots, bad, metrics, self._stacked_local_states(slots))

    def _stacked_local_states(self, slots: RoundInput) -> PyTree:
        """Return the workers' local states in one tree; those of new workers are not read."""
        if not self.workload.keeps_state:
            return None
        new = self.workload.init_state(read(slots, np.int32(0)))
        stacked = repeat(new, self.server.num_workers)
        for worker in list(self.local_states):  # the carry has them from now on
            stacked = write_to(stacked, self.local_states.pop(worker), np.int32(worker))
        return stacked

    def unload(self, carry: Carry) -> None:
        """Give the server the state in a carry."""
        table = self._planner.table
        versions: dict[int | None, RoundInput] = {None: self._newest(carry.state)}
        tasks = {}
        for worker, task_id in table.held.items():
            slot = self._planner.slot(worker)
            if slot is not None and slot not in versions:
                versions[slot] = read(carry.slots, np.int32(slot))
            tasks[worker] = Task(task_id, versions[slot], table.fresh_task(worker))
        self.server.import_(Export(table, carry.state, tasks))
        self.local_states = {
            worker: read(carry.local_states, np.int32(worker))
            for worker in range(table.num_workers)
            if carry.local_states is not None and not table.fresh[worker]
        }

    def _newest(self, state: ServerState) -> RoundInput:
        return state.sent(self.server.method, self.server.sent_dtypes)

    def _check_model_state_weights(self, first: int, dispatched_at: np.ndarray) -> None:
        count = len(dispatched_at)
        steps = first + np.minimum(np.arange(LENGTH), count - 1)  # one length: one program
        delays = steps - np.pad(dispatched_at, (0, LENGTH - count), "edge")
        weights = weight_on_host(self.server.method.model_state_weight, steps, delays)
        for index in np.flatnonzero(~((weights >= 0) & (weights <= 1)))[:1]:
            check_model_state_weight(float(weights[index]), int(steps[index]), int(delays[index]))


@lru_cache(maxsize=32)
def segment_program(
    method: Method,
    round_fn: Callable,
    local_steps: tuple[int, ...] | None,
    rounds: Rounds,
    batch: int,
    dtypes: tuple[Any, ...],
) -> Callable:
    """Return one compiled program for segments of any length.

    A step writes the newest parameters before it reads those of its task. In this order XLA updates
    the slots in place; in the other order it would copy all of them in every step.

    If S differs between workers, the program has one branch for each S, and a group of rounds runs
    one of them. So a round costs its own steps.
    """
    over_rows = {"loop": None, "map": jax.lax.map, "vmap": lambda f, rows: jax.vmap(f)(rows)}
    together = over_rows[rounds]
    lengths = sorted(set(local_steps or (None,)))  # pyright: ignore[reportArgumentType]
    branches = [round_program(round_fn, steps) for steps in lengths]
    branch_of_worker = [lengths.index(steps) for steps in local_steps or ()]

    @partial(jax.jit, donate_argnames="carry")
    def run(batch_fn, settings, carry, table, first, groups, data_key, noise_key):
        segment: Any = Segment(*jnp.asarray(table))  # NumPy arrays if JAX does not compile
        schedule, hyperparameters = settings
        own = method.with_hyperparameters(**hyperparameters) if hyperparameters else method

        def compute(run_round, carry, row):
            worker = segment.workers[row]
            start = take(carry.slots, segment.reads[row])
            kept = None
            if carry.local_states is not None:
                new, old = init_state(round_fn, start.params), take(carry.local_states, worker)
                kept = jax.tree.map(partial(jnp.where, segment.fresh[row]), new, old)
            counts = worker, segment.rounds[row], first + row, jnp.int32(-1)
            result, *others = run_round(batch_fn, start, kept, data_key, noise_key, *counts)
            return result._replace(loss=None, metrics=None), *others

        def compute_group(carry, start):
            """Compute the rounds of a group, in the branch of their S."""

            def of(run_round):
                one = partial(compute, run_round)
                if together is None:
                    return one
                return lambda carry, start: together(partial(one, carry), start + jnp.arange(batch))

            functions = list(map(of, branches))
            if len(functions) == 1:
                return functions[0](carry, start)
            branch = jnp.asarray(branch_of_worker)[segment.workers[start]]
            return jax.lax.switch(branch, functions, carry, start)

        def write(carry, row):
            newest = carry.state.sent(own, dtypes)
            return carry._replace(slots=put(carry.slots, newest, segment.writes[row]))

        def apply(carry, row, answer):
            result, metrics, bad = answer
            task_id = TaskId(segment.workers[row], segment.rounds[row], segment.dispatched_at[row])
            report = Report(task_id, result.update, result.model_state)
            start = take(carry.slots, segment.reads[row])
            state = apply_report(own, carry.state, report, start, first + row, schedule)
            metrics = metrics._replace(accepted=state.accepted)
            bad = jnp.where(carry.first_nonfinite < 0, bad, carry.first_nonfinite)
            kept = carry.local_states
            if kept is not None:
                kept = put(kept, result.local_state, task_id.worker)
            new = Carry(state, carry.slots, bad, put(carry.metrics, metrics, row), kept)
            return jax.tree.map(cast_like, new, carry)

        def group(index, carry):
            # Alone in its group, a step has the same number in all runs of a sweep.
            start = index if together is None else segment.starts[index]
            carry = write(carry, start)
            answers = compute_group(carry, start)
            if together is None:
                return apply(carry, start, answers)

            def step(row, carry):
                return apply(write(carry, start + row), start + row, take(answers, row))

            return jax.lax.fori_loop(0, segment.sizes[index], step, carry)

        carry = jax.lax.fori_loop(0, groups, group, carry)
        bad, last = carry.first_nonfinite, first + segment.sizes.sum(dtype=jnp.int32) - 1
        last = jnp.where(all_finite(carry.state), -1, last)
        return carry._replace(first_nonfinite=jnp.where(bad < 0, last, bad))

    return run

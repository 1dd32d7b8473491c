"""A simulated run in compiled stretches: no Python stands between its global iterations."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from orlomo_jax.arrays import own
from orlomo_jax.driven import Job
from orlomo_jax.methods import Method
from orlomo_jax.plan import Planner, Stretch, count_slots
from orlomo_jax.reports import Form, Report, ReportRejected, Task
from orlomo_jax.rounds import fused_round
from orlomo_jax.rules import contract
from orlomo_jax.server import Holdings, ParameterServer
from orlomo_jax.server_step import (
    check_merge_weight,
    merge_weight_on_host,
    server_step,
    start_momentum,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, PyTree, Scalar

WorkerAxis: TypeAlias = Literal["loop", "map", "vmap"]

LENGTH = 256
"""Steps of the longest stretch: shorter ones run the same program, with a smaller bound."""


class Version(NamedTuple):
    """What a task carries; in ``Carry.slots`` every leaf has a leading axis of slots."""

    params: contract.Params
    model_state: PyTree[Array]
    momentum: contract.Params | None
    local_learning_rate: Scalar


class Carry(NamedTuple):
    """What a stretch hands to the next; it owns its arrays, and each stretch donates them.

    Attributes:
        params: w_t.
        state: The rule's state.
        merging: The merged model state.
        model_state: The server's model state, behind ``merging`` within a synchronous round.
        local_learning_rate: γ of a task dispatched now.
        slots: The versions that tasks hold, one copy of each.
        first_bad: The step of the first non-finite round, −1 for none.
        losses: The mean losses of this stretch's rounds.
    """

    params: contract.Params
    state: Any
    merging: PyTree[Array]
    model_state: PyTree[Array]
    local_learning_rate: Scalar
    slots: Version
    first_bad: Int[Array, ""]
    losses: Float[Array, " LENGTH"]


class Compiled:
    """Runs a server's job in stretches; the server gets everything back by :meth:`settle`.

    Args:
        server: A server that has dispatched its tasks.
        job: What to run.
        axis: How the rounds of a group are computed: one by one, each with its server step
            ("loop"), or together before their server steps, by ``jax.lax.map`` or ``jax.vmap``.
        batch: The most rounds of a group; 1 for "loop".

    Attributes:
        slots: How many versions of w there is room for.

    Raises:
        ReportRejected: If the job's reports are not like the server's trees.
    """

    def __init__(self, server: ParameterServer, job: Job, axis: WorkerAxis, batch: int) -> None:
        """Check the job; the server keeps everything until the first stretch."""
        self.server, self.job, self._batch = server, job, batch
        self.program = stretch_program(
            server.method,
            server.num_workers,
            fused_round(job.round_fn),
            axis,
            batch,
        )
        self.slots, self._merges = count_slots(job.trace), bool(jax.tree.leaves(server.model_state))
        self._carry: Carry | None = None
        self._losses_dtype = self._check_job()
        self.first_bad = -1

    def advance(self, stop: int) -> np.ndarray:
        """Step on until ``stop`` reports are applied; return the mean loss of each.

        Raises:
            ReportRejected: If the weight of a report's model state will be out of [0, 1]; nothing
                of this stretch has run then.
        """
        if self._carry is None:
            self._carry = self.load()
        first = self.server.step
        carry: Carry = self.program(
            self.job.batch_fn,
            self.server.schedule,
            self._carry,
            *self.plan(stop),
            self.job.data_key,
            self.job.noise_key,
        )
        self._carry, self.first_bad = carry, int(carry.first_bad)
        return np.array(carry.losses)[: stop - first]

    def plan(self, stop: int) -> tuple[np.ndarray, np.int32, np.int32]:
        """Plan the steps until ``stop``: their table, the first of them, and how many groups.

        Raises:
            ReportRejected: As :meth:`advance` does.
        """
        first = self.server.step
        stretch = self._planner.advance(stop, LENGTH)
        if self._merges:
            self._check_merge_weights(first, stretch.dispatched_at[: stop - first])
        return np.stack(stretch), np.int32(first), np.int32(np.count_nonzero(stretch.sizes))

    def peek(self) -> tuple[Any, Any, Any]:
        """Return params, model state and the rule's state, of use until the next stretch."""
        source = self.server if self._carry is None else self._carry
        return source.params, source.model_state, source.state

    def arrays(self) -> tuple[Any, Any, Any]:
        """Return params, model state and the rule's state; they stay as they are."""
        return jax.tree.map(jnp.copy, self.peek())

    def settle(self) -> None:
        """Leave everything with the server, just as if it had received each report."""
        if self._carry is not None:
            self.unload(self._carry)
            self._carry = None

    def unload(self, carry: Carry) -> None:
        """Give the server all that a carry holds."""
        books = self._planner.books
        params, state, _, model_state, rate, *_ = carry
        newest = _newest(params, state, model_state, rate, books.synchronous)
        versions: dict[int | None, Version] = {None: newest}
        tasks = {}
        for worker, ticket in books.held.items():
            slot = self._planner.slot(worker)
            if slot is not None and slot not in versions:
                versions[slot] = _read(carry.slots, np.int32(slot))
            tasks[worker] = Task(*ticket, *versions[slot])
        self.server.settle(Holdings(books, *carry[:5], tasks))

    def load(self) -> Carry:
        """Take everything from the server."""
        books, *arrays, tasks = self.server.lend()
        self._planner = Planner(books, self.job.trace, self._batch, self.slots)
        versions = {task.dispatched_at: Version(*task[3:]) for task in tasks.values()}
        tasks.clear()
        params, state, merging, model_state, rate = jax.tree.map(jnp.copy, own(arrays))
        first_bad, losses = jnp.int32(self.first_bad), jnp.zeros(LENGTH, self._losses_dtype)
        newest = _newest(params, state, model_state, rate, books.synchronous)
        slots = _repeat(newest, self.slots)
        for version, slot in self._planner.versions.items():
            slots = _write(slots, own(versions.pop(version)), np.int32(slot))
        return Carry(params, state, merging, model_state, rate, slots, first_bad, losses)

    def _check_job(self) -> Any:
        """Check a report's form without computing one; return the dtype of its mean loss."""
        server, job = self.server, self.job
        params, model_state, state = self.peek()
        rate = jnp.zeros([])
        version = _newest(params, state, model_state, rate, server.method.synchronous)
        result, loss, _ = jax.eval_shape(
            fused_round(job.round_fn),
            job.batch_fn,
            *version,
            job.data_key,
            job.noise_key,
            *(np.int32(0),) * 4,
        )
        report = Report(0, 0, 0, result.update, result.model_state)
        momentum = server.method.worker_momentum is not None
        try:
            Form(params, model_state, momentum=momentum).check(report)
        except (TypeError, ValueError) as error:
            raise ReportRejected(str(error)) from error
        return loss.dtype

    def _check_merge_weights(self, first: int, dispatched_at: np.ndarray) -> None:
        steps = np.full(LENGTH, first)
        steps[: len(dispatched_at)] += np.arange(len(dispatched_at))
        delays = np.zeros(LENGTH, int)
        delays[: len(dispatched_at)] = steps[: len(dispatched_at)] - dispatched_at
        weights = merge_weight_on_host(self.server.method.merge_weight, steps, delays)
        for index in np.flatnonzero(~((weights >= 0) & (weights <= 1)))[:1]:
            try:
                check_merge_weight(float(weights[index]), int(steps[index]), int(delays[index]))
            except ValueError as error:
                raise ReportRejected(str(error)) from error


@lru_cache(maxsize=32)
def stretch_program(
    method: Method,
    num_workers: int,
    run_round: Callable,
    axis: WorkerAxis,
    batch: int,
) -> Callable:
    """Return a stretch as one compiled program, whatever its length.

    A step writes the newest parameters before it reads its task's: in that order XLA keeps the
    slots in place, in the other it copies all of them in every step.
    """
    receive = server_step(method.rule, method.merge_weight, False, False)
    over_rows = {"loop": None, "map": jax.lax.map, "vmap": lambda f, rows: jax.vmap(f)(rows)}[axis]

    @partial(jax.jit, donate_argnames="carry")
    def run(batch_fn, schedule, carry, stretch, first, groups, data_key, noise_key):
        stretch = Stretch(*stretch)

        def compute(slots, row):
            task = jax.tree.map(lambda x: _at(x, stretch.reads[row]), slots)
            worker, round = stretch.workers[row], stretch.rounds[row]
            keys = (data_key, noise_key)
            return run_round(batch_fn, *task, *keys, worker, round, first + row, jnp.int32(-1))

        def write(carry, row):
            params, state, _, model_state, rate, *_ = carry
            newest = _newest(params, state, model_state, rate, method.synchronous)
            return carry._replace(slots=_put(carry.slots, newest, stretch.writes[row]))

        def apply(carry, row, answer):
            (result, loss, bad), step = answer, first + row
            params, state, merging, rate = receive(
                [],
                carry.params,
                carry.state,
                carry.merging,
                result.update,
                result.model_state,
                step,
                stretch.dispatched_at[row],
                schedule,
            )
            model_state, rate = merging, carry.local_learning_rate if rate is None else rate
            if method.synchronous:  # what is dispatched stays through a round
                ends = (step + 1) % num_workers == 0
                model_state, rate = jax.tree.map(
                    lambda new, old: jnp.where(ends, new, old),
                    (model_state, rate),
                    (carry.model_state, carry.local_learning_rate),
                )
            first_bad = jnp.where(carry.first_bad < 0, bad, carry.first_bad)
            losses = jax.lax.dynamic_update_index_in_dim(carry.losses, loss, row, 0)
            new = Carry(params, state, merging, model_state, rate, carry.slots, first_bad, losses)
            return jax.tree.map(_as, new, carry)

        def group(index, carry):
            start = stretch.starts[index]
            carry = write(carry, start)
            if over_rows is None:
                return apply(carry, start, compute(carry.slots, start))
            answers = over_rows(partial(compute, carry.slots), start + jnp.arange(batch))

            def step(row, carry):
                answer = jax.tree.map(lambda x: _at(x, row), answers)
                return apply(write(carry, start + row), start + row, answer)

            return jax.lax.fori_loop(0, stretch.sizes[index], step, carry)

        return jax.lax.fori_loop(0, groups, group, carry)

    return run


def _newest(params: Any, state: Any, model_state: Any, rate: Any, synchronous: bool) -> Version:
    """Return what a task dispatched now carries."""
    momentum = start_momentum(state) if synchronous else None
    return Version(params, model_state, momentum, rate)


def _as(x: Array, old: Array) -> Array:
    return x if x.dtype == old.dtype else x.astype(old.dtype)


def _at(x: Array, index: Any) -> Array:
    return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)


def _put(slots: Version, version: Version, slot: Any) -> Version:
    return jax.tree.map(
        lambda many, one: jax.lax.dynamic_update_index_in_dim(many, one, slot, 0), slots, version
    )


_read = jax.jit(lambda slots, slot: jax.tree.map(lambda x: _at(x, slot), slots))
_write = jax.jit(_put, donate_argnums=0)


@partial(jax.jit, static_argnums=1)
def _repeat(version: Version, count: int) -> Version:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), version)

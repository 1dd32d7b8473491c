"""Runs K delayed workers with the library's round and rule, as one compiled loop.

Tables give the worker that reports at each step t and its slot (see :mod:`proofs_check.sequences`).
Each round and server step is the library's own code. The run records w_t, u_t, every report, and
the iterates w̃_s of every local round.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from proofs_check.checks.every_order import momentum_of
from proofs_check.registry import Subject
from proofs_check.sequences import Frame


class Recorded(NamedTuple):
    """A recorded run with d parameters and D slots.

    Attributes:
        w: w_{t+1} for t < T, [T, d].
        u: u_{t+1} for t < T, [T, d].
        du: Δu by slot, [D, d]; Δw if the workers do not report momentum.
        dw: Δw by slot, [D, d].
        local: w̃_s by slot, [D, S, d].
    """

    w: np.ndarray
    u: np.ndarray
    du: np.ndarray
    dw: np.ndarray
    local: np.ndarray


LossFn = Callable[[Any, Any], jax.Array]


def recording(loss: LossFn) -> Callable[..., Any]:
    """Return the library's loss_fn for ``loss(params, batch)``, with w̃_s as its metrics."""

    def loss_fn(params, model_state, batch, key):
        return loss(params, batch), (model_state, params)

    return loss_fn


def training_run(
    subject: Subject, loss: LossFn, num_workers: int, local_steps: int, max_steps: int
) -> Callable[..., Any]:
    """Return a jitted function that runs up to ``max_steps`` steps.

    Args:
        subject: Gives the rule and the round.
        loss: ``loss(params, batch)``, a scalar.
        num_workers: K.
        local_steps: S.
        max_steps: The length of the tables; T may be less.

    Returns:
        ``run(params, num_steps, workers, dispatched_at, used, batches, gamma, beta, by_step,
        by_delay, adaptive)``. ``batches`` are by slot, with leaves [D, S, …]. η_t is
        by_step[t] · by_delay[τ_t]; if ``adaptive``, the library's Eq. (6) replaces by_delay. It
        returns (w, u, du, dw, local); the leading axis is max_steps, or K+max_steps for slots.
    """
    max_slots = num_workers + max_steps

    def run(
        params, num_steps, workers, dispatched_at, used, batches, gamma, beta, by_step, by_delay,
        adaptive,
    ):  # fmt: skip
        weigh = subject.delay_adaptive(num_workers)
        server = subject.rule(
            num_workers,
            momentum=beta,
            learning_rate=lambda step: by_step[step],
            delay_weight=lambda delay: jnp.where(adaptive, weigh(delay), by_delay[delay]),
        )
        round_fn = subject.local_momentum_sgd(
            recording(loss), local_steps, momentum=beta if subject.worker_momentum else None
        )
        key = jax.random.key(0)
        flat = ravel_pytree(params)[0]

        def local_round(params, slot):
            batch = jax.tree.map(lambda x: x[slot], batches)
            result = round_fn(params, None, batch, gamma, key)
            dw = ravel_pytree(result.update.delta)[0]
            du = ravel_pytree(result.update.momentum)[0] if subject.worker_momentum else dw
            return result.update, du, dw, jax.vmap(lambda p: ravel_pytree(p)[0])(result.metrics)

        def step(t, carry):
            params, state, held, record = carry
            start = jax.tree.map(lambda x: x[workers[t]], held)
            report, du, dw, local = local_round(start, used[t])
            updates, state = server.update(
                report, state, params, dispatched_at=dispatched_at[t], worker=workers[t]
            )
            params = optax.apply_updates(params, updates)
            held = jax.tree.map(lambda h, p: h.at[workers[t]].set(p), held, params)
            record = (
                record[0].at[t].set(ravel_pytree(params)[0]),
                record[1].at[t].set(ravel_pytree(momentum_of(state))[0]),
                record[2].at[used[t]].set(du),
                record[3].at[used[t]].set(dw),
                record[4].at[used[t]].set(local),
            )
            return params, state, held, record

        size = flat.shape[0]
        shapes = [(max_steps, size)] * 2 + [(max_slots, size)] * 2
        shapes += [(max_slots, local_steps, size)]
        record = tuple(jnp.zeros(shape, flat.dtype) for shape in shapes)
        held = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_workers, *x.shape)), params)
        carry = (params, server.init(params), held, record)
        _, _, held, record = jax.lax.fori_loop(0, num_steps, step, carry)

        def finish(worker, record):  # run the rounds that are in flight at the end
            last = jnp.max(jnp.where((workers == worker) & within, jnp.arange(max_steps) + 1, 0))
            slot = jnp.where(last == 0, worker, num_workers - 1 + last)
            slot = jnp.where(last < num_steps, slot, max_slots - 1)  # w_T's round is not needed
            _, du, dw, local = local_round(jax.tree.map(lambda x: x[worker], held), slot)
            return (
                *record[:2],
                record[2].at[slot].set(du),
                record[3].at[slot].set(dw),
                record[4].at[slot].set(local),
            )

        within = jnp.arange(max_steps) < num_steps
        return jax.lax.fori_loop(0, num_workers, finish, record)

    return jax.jit(run)


def recorded(output: Any, of: Frame) -> Recorded:
    """Return a run's output, cut to its T steps and D slots."""
    num_steps, num_slots = of.num_steps, of.index.shape[0]
    w, u, du, dw, local = (np.asarray(x) for x in output)
    return Recorded(w[:num_steps], u[:num_steps], du[:num_slots], dw[:num_slots], local[:num_slots])


@cache
def gradients(loss: LossFn, unravel: Callable[[jax.Array], Any]) -> Callable[..., jax.Array]:
    """Return a jitted function from iterates [D, S, d] and batches to ∇f(w̃_s; ξ), [D, S, d]."""

    def gradient(flat, batch):
        return ravel_pytree(jax.grad(loss)(unravel(flat), batch))[0]

    return jax.jit(jax.vmap(jax.vmap(gradient)))

"""Compares the simulator's engines with :mod:`proofs_check.reference` over thousands of steps.

It compares each round's loss, and the final w, u and model state. These depend on every version
that was sent, on the batches and noise of every round, on weight decay, and on each server step.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from orlomo_jax import ArrivalTrace, Compiled
from proofs_check import reference
from proofs_check.checks.every_order import momentum_of
from proofs_check.checks.long_server_runs import (
    ALLOWED,
    WORKERS,
    Comparison,
    Difference,
    gamma,
    long_method,
)
from proofs_check.reference import BETA, Timeline
from proofs_check.registry import Outcome, Size, Subject, holds

LOCAL_STEPS = 3
ENGINES: dict[str, Any] = {
    "eager": "eager",
    "compiled": Compiled("loop"),
    "compiled, rounds together": Compiled("map", max_batch=3),
}


def loss_fn(params, model_state, batch, key):
    """Return the loss of :func:`proofs_check.reference.local_round`."""
    linear = batch + jax.random.normal(key, (2,))
    loss = jnp.sum(reference.CURVATURE * params**2 / 2 + linear * params)
    return loss, (0.75 * model_state + 0.25 * params.sum(), {})


def batch_fn(data_key, worker, round):
    """Return batches [S, 2] that differ by data key, worker and round."""
    key = jax.random.fold_in(jax.random.fold_in(data_key, worker), round)
    return jax.random.normal(key, (LOCAL_STEPS, 2))


@jax.jit
@partial(jax.vmap, in_axes=(None, None, 0, 0))
def drawn(data_key, noise_key, worker, round):
    """Return the batch plus noise of each round, by the documented key scheme; float[T, S, 2]."""
    own = jax.random.fold_in(jax.random.fold_in(noise_key, worker), round)
    steps = [jax.random.fold_in(own, step) for step in range(LOCAL_STEPS)]
    noise = jnp.stack([jax.random.normal(step, (2,)) for step in steps])
    return batch_fn(data_key, worker, round) + noise


def trace_of(timeline: Timeline, synchronous: bool) -> ArrivalTrace:
    """Return the timeline as an ArrivalTrace."""
    events = [(t, *event) for t, events in enumerate(timeline.events) for event in events]
    return ArrivalTrace.from_workers(
        timeline.workers, timeline.num_workers, synchronous=synchronous, events=events
    )


def expected(
    subject: Subject,
    name: str,
    timeline: Timeline,
    trace: ArrivalTrace,
    key: jax.Array,
    comparison: Comparison,
) -> tuple[reference.Server, np.ndarray, np.ndarray]:
    """Run the reference; return it, and the loss and delay of each step."""  # fmt: skip
    server = reference.Server(name, timeline.num_workers, subject.claims)
    beta = BETA if name in ("orlomo", "prsgdm") else None
    linear = np.asarray(drawn(*jax.random.split(key), trace.workers, trace.rounds))
    losses, delays = [], []
    for worker in set(range(timeline.num_workers)) - timeline.absent:
        server.dispatch(worker)
    for step, worker in enumerate(timeline.workers):
        comparison.at(step)
        for kind, who in timeline.events[step]:
            if kind in ("redispatched", "joined"):
                server.dispatch(who)
            elif who in server.held:
                server.release(who)
        task = server.held[worker]
        stated = int(trace.rounds[step]), int(trace.dispatched_at[step])
        comparison.same("the trace's (round, dispatched_at)", stated, tuple(task[1:3]))
        result = reference.local_round(task, linear[step], beta)
        losses.append(result.loss)
        delays.append(step - task.dispatched_at)
        du = result.dw if beta is None else result.du
        for waiting in server.receive(worker, du, result.dw, result.model_state):
            server.dispatch(waiting)
    return server, np.array(losses), np.array(delays)


def _compare(subject: Subject, case: dict[str, Any], comparison: Comparison) -> None:
    name, seed, synchronous = case["method"], case["seed"], case["method"] == "prsgdm"
    num_workers, num_steps = WORKERS[name], case["num_steps"]
    timeline = reference.timeline(
        num_workers, num_steps, seed, synchronous=synchronous, density=case["density"]
    )
    trace, key = trace_of(timeline, synchronous), jax.random.key(seed)
    want, losses, delays = expected(subject, name, timeline, trace, key, comparison)
    method = long_method(subject.make_method, name, num_workers)
    result = subject.simulate(
        method,
        None,
        batch_fn,
        jnp.asarray(reference.START),
        round_fn=method.local_round(loss_fn, weight_decay=reference.WEIGHT_DECAY),
        trace=trace,
        key=key,
        model_state=jnp.asarray(reference.START_STATE),
        local_learning_rate=gamma,
        engine=ENGINES[case["engine"]],
    )
    history = result.history
    comparison.at(0)
    comparison.same("the status", result.status, "finished")
    comparison.same("the number of steps", len(history.loss), num_steps)
    for step in range(num_steps):
        comparison.at(step)
        told = int(history.step[step]), int(history.worker[step]), int(history.delay[step])
        wanted = step + 1, timeline.workers[step], int(delays[step])
        comparison.same("the history's (step, worker, delay)", told, wanted)
        comparison.close("the loss", history.loss[step], losses[step])
    comparison.close("w at the end", result.params, want.params)
    comparison.close("the model state at the end", result.model_state, want.model_state)
    if name != "al_sgd":
        comparison.close("u at the end", momentum_of(result.rule_state), want.momentum)


def examine(subject: Subject, case: dict[str, Any]) -> tuple[Comparison, str | None]:
    """Run a case; return the comparison, and the first difference or None."""
    comparison = Comparison()
    with jax.enable_x64(True):
        try:
            _compare(subject, case, comparison)
        except Difference as difference:
            return comparison, str(difference)
    return comparison, None


@holds("bookkeeping", "noise-keys", "weight-decay", strength="property")
def long_simulations(subject: Subject, size: Size) -> Iterator[Outcome]:
    """Simulate thousands of steps with each engine, eager and compiled."""
    runs = [(name, engine, 1.0) for name in WORKERS for engine in list(ENGINES)[:2]]
    runs.append(("orlomo", list(ENGINES)[2], 0.1))
    worst, count, note, found = 0.0, 0, "", None
    for number, (name, engine, density) in enumerate(runs):
        case = {"method": name, "engine": engine, "num_steps": size.long_steps,
                "density": density, "seed": size.seed + number}  # fmt: skip
        compared, difference = examine(subject, case)
        worst, count = max(worst, compared.worst), count + compared.count
        if difference is not None:
            worst, note, found = float("inf"), f"{name}, {engine}, {difference}"[:200], case
            break
    note = note or f"runs of {size.long_steps} steps; {len(ENGINES)} engines"
    for statement in ("bookkeeping", "noise-keys", "weight-decay"):
        yield Outcome(statement, count, worst, ALLOWED, found is None, note, found)


def replay(subject: Subject, statement: str, case: dict[str, Any]) -> tuple[float, float]:
    """Run a counterexample of :func:`long_simulations` again; return residual and allowance."""
    compared, difference = examine(subject, case)
    return compared.worst if difference is None else float("inf"), ALLOWED

"""Applies one report to the server's state, as a pure function."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from orlomo_jax.methods.method import Method, Unmoved
from orlomo_jax.rules import contract
from orlomo_jax.server.reports import RejectedReportError, Report
from orlomo_jax.server.state import ServerState
from orlomo_jax.worker.workload import RoundInput


def apply_report(
    method: Method,
    state: ServerState,
    report: Report,
    start: RoundInput,
    step: Any,
    schedule: Callable | None = None,
) -> ServerState:
    """Return the server's state after a report: update, apply, merge, barrier and next γ.

    If the rule does not accept the report, parameters, model state and the states of chained
    transformations stay.

    The eager and the compiled engine trace this function. :class:`~orlomo_jax.ParameterServer`
    checks the report and says how the model state is merged.

    Args:
        method: The method of the run.
        state: The state at ``step``.
        report: A worker's report.
        start: What the worker was sent; ``params`` may be None if the rule does not read them.
        step: t, int32[].
        schedule: γ as a function of the step, or None if γ is constant.

    Example:
        >>> from orlomo_jax import LocalUpdate, ParameterServer, Report, make_method
        >>> method = make_method("al_sgd", num_workers=2, num_local_steps=4)
        >>> server = ParameterServer(method, jnp.ones(2), local_learning_rate=0.1)
        >>> task = server.dispatch(0)
        >>> report = Report(task.id, LocalUpdate(jnp.ones(2)))
        >>> apply_report(method, server.state, report, task.start, 0).params  # η = 1/K
        Array([0.5, 0.5], dtype=float32)
    """
    worker, _, dispatched_at = report.id
    update: Any = report.update
    steps = method.num_local_steps
    updates, rule_state = method.rule.update(
        update,
        state.rule_state,
        state.params,
        dispatched_at=dispatched_at,
        dispatched_version=start.version,
        worker=worker,
        num_local_steps=jnp.asarray(steps)[worker] if isinstance(steps, tuple) else steps,
        local_learning_rate=start.local_learning_rate,
        dispatched_params=start.params,
    )
    accepted = contract.accepted_of(rule_state)
    rule_state = contract.keep_unaccepted(accepted, rule_state, state.rule_state)
    params = _if_accepted(accepted, optax.apply_updates(state.params, updates), state.params)
    frozen = Unmoved(method)(state.params)
    params = jax.tree.map(lambda keep, x, y: x if keep else y, frozen, state.params, params)
    before = merged = state.pending_model_state if method.synchronous else state.model_state
    if jax.tree.leaves(merged):
        assert method.model_state_weight is not None
        weight = jnp.asarray(method.model_state_weight(step, step - dispatched_at), float)
        is_last = worker == method.num_workers - 1 if method.synchronous else True
        merge = partial(_merge, weight, is_last)
        merged = _if_accepted(accepted, jax.tree.map(merge, merged, report.model_state), before)
    reports = (step + 1) // method.num_workers if method.synchronous else step + 1
    version = jnp.asarray(contract.version_of(rule_state, reports), jnp.int32)
    accepted = jnp.asarray(accepted)
    rate = state.local_learning_rate
    if schedule is not None:
        rate = jnp.asarray(schedule(step + 1), float)
        contract.check_scalar("local_learning_rate", rate)
    if not method.synchronous:
        return ServerState(params, rule_state, merged, None, rate, version, accepted)
    ends = (step + 1) % method.num_workers == 0  # until then tasks get the round's values
    model_state, rate = jax.tree.map(
        lambda new, old: jnp.where(ends, new, old),
        (merged, rate),
        (state.model_state, state.local_learning_rate),
    )
    return ServerState(params, rule_state, model_state, merged, rate, version, accepted)


def _if_accepted(accepted: Any, new: Any, old: Any) -> Any:
    if accepted is True:
        return new
    return jax.tree.map(lambda new, old: jnp.where(accepted, new, old), new, old)


def _merge(weight: Any, is_last: Any, s: Any, end: Any) -> Any:
    if jnp.issubdtype(s.dtype, jnp.inexact):
        return (s + weight * (end - s)).astype(s.dtype)
    return end if is_last is True else jnp.where(is_last, end, s)


@lru_cache(maxsize=64)
def server_step(method: Method, donate_params: bool, donate_rule_state: bool) -> Callable:
    """Return :func:`apply_report` as one compiled program.

    In ``step_fn(scratch, params, rule_state, rest, report, start, step, schedule)``, ``scratch`` is
    a list of arrays shaped like leaves of params, whose memory is reused; ``rest`` is the state
    without params and rule state.
    """

    def step_fn(scratch, params, rule_state, rest, report, start, step, schedule):
        del scratch
        state = rest._replace(params=params, rule_state=rule_state)
        return apply_report(method, state, report, start, step, schedule)

    may = {"params": donate_params, "rule_state": donate_rule_state}
    donated = ["scratch", *(name for name, is_free in may.items() if is_free)]
    return jax.jit(step_fn, donate_argnames=donated, keep_unused=True)


@lru_cache(maxsize=64)
def _compiled(function: Callable) -> Callable:
    """Return a function of scalars, vectorized and compiled."""
    return jax.jit(jnp.vectorize(function))


def on_cpu() -> Any:
    """Return a context that computes on the CPU, without waiting for an accelerator's queue."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        device = None
    return jax.default_device(device)


def weight_on_host(model_state_weight: Any, step: Any, delay: Any) -> np.ndarray:
    """Return the weights of reports, float[] or float[n], for step and delay int[] or int[n]."""
    with on_cpu():
        return np.asarray(_compiled(model_state_weight)(np.int32(step), np.int32(delay)))


def check_model_state_weight(weight: float, step: int, delay: int) -> None:
    """Raise RejectedReportError unless a report's weight in the model state is in [0, 1]."""
    if not 0 <= weight <= 1:
        raise RejectedReportError(
            "the weight of a report's model state must be in [0, 1], got "
            f"learning_rate · delay_weight = {weight} at step={step}, delay={delay}"
        )

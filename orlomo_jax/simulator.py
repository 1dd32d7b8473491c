"""K delayed workers on one device, exactly: a virtual clock drives the parameter server."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from orlomo_jax.checkpoint import Checkpoints
from orlomo_jax.checks import check_count
from orlomo_jax.history import Evaluation, Progress, StepRecord, TrainingResult
from orlomo_jax.methods import Method
from orlomo_jax.rounds import fused_round
from orlomo_jax.rules import contract
from orlomo_jax.server import ParameterServer
from orlomo_jax.trace import ArrivalTrace, Event

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Int, PyTree, Scalar

    BatchFn = Callable[[Array, Int[Array, ""], Int[Array, ""]], PyTree[Array]]
    Evaluate = Callable[[contract.Params, PyTree[Array]], dict[str, Scalar]]

_LOOK_EVERY = 256
"""Steps between two looks at the device's first non-finite step: a rare, cheap wait."""


def simulate(
    method: Method,
    round_fn: Callable,
    batch_fn: BatchFn,
    params: contract.Params,
    trace: ArrivalTrace,
    *,
    key: Array,
    model_state: PyTree[ArrayLike] = None,
    local_learning_rate: float | optax.Schedule,
    evaluate: Evaluate | None = None,
    evaluate_every: int | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
    checkpoint: Checkpoints | None = None,
) -> TrainingResult:
    """Train with K delayed workers whose reports arrive in the order of ``trace``.

    The mathematics is exact whatever the delays: each report is computed from the very parameters
    that its worker was sent. The same seed and trace give the same parameters to the bit (same
    program, jaxlib, flags and device).

    Randomness: ``data_key, noise_key = jax.random.split(key)``. ``batch_fn`` gets ``data_key``; a
    round's own key is ``fold_in(fold_in(noise_key, worker), round)``. Both depend on worker and
    round alone, never on the arrival order.

    Args:
        method: A :class:`~orlomo_jax.Method`.
        round_fn: ``method.local_round(loss_fn, num_local_steps)``.
        batch_fn: ``batch_fn(data_key, worker, round) -> batches`` with a leading axis S; jit-able
            and hashable. Arrays of a ``jax.tree_util.Partial`` are handed over as arguments; those
            that a function closes over become constants of the compiled program.
        params: w_0.
        trace: Who reports when; T steps. A synchronous method needs a synchronous trace.
        key: A ``jax.random.key``.
        model_state: See :class:`~orlomo_jax.ParameterServer`.
        local_learning_rate: γ, a float or a schedule of the server's step.
        evaluate: ``evaluate(params, model_state) -> {name: scalar}``; jit it yourself.
        evaluate_every: Steps between evaluations, ≥ 1; None is after the last step alone.
        on_step: Called with a :class:`StepRecord` after each step; of a diverging run also for
            some steps after the one that ``diverged_at`` will name.
        checkpoint: Where to save as the run goes. A run whose folder holds a checkpoint of the same
            method, trace and key goes on from the newest, and ends as the unbroken run does, to
            the bit; ``on_step`` then sees the steps after it alone.

    Returns:
        A :class:`TrainingResult`.

    Raises:
        ValueError: If method and trace do not fit together, a hyperparameter is out of range, or
            ``checkpoint`` is of another run.
        TypeError: If ``key`` is no key, or a leaf of params or model state is not floating.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from orlomo_jax import ArrivalTrace, make_method, simulate
        >>> def loss_fn(params, model_state, batch, key):
        ...     return jnp.mean((params - batch) ** 2), (model_state, {})
        >>> def batch_fn(key, worker, round):
        ...     return jnp.ones((4, 1))
        >>> method = make_method("orlomo", num_workers=2)
        >>> result = simulate(
        ...     method,
        ...     method.local_round(loss_fn, num_local_steps=4),
        ...     batch_fn,
        ...     jnp.zeros(1),
        ...     ArrivalTrace.from_workers([0, 1, 1] * 10, num_workers=2),
        ...     key=jax.random.key(0),
        ...     local_learning_rate=0.01,
        ... )
        >>> result.status, bool(abs(result.params[0] - 1) < 0.1)
        ('finished', True)
    """
    _check_fit(method, trace, key, evaluate_every)
    data_key, noise_key = jax.random.split(key)
    server = ParameterServer(
        method, params, trace.num_workers, model_state, local_learning_rate=local_learning_rate
    )
    run_round = partial(fused_round(round_fn), jax.tree_util.Partial(batch_fn))
    evaluate_every = trace.num_steps if evaluate_every is None else evaluate_every
    events: defaultdict[int, list[Event]] = defaultdict(list)
    for event in trace.events:
        events[event.step].append(event)
    identity = _identity(method, trace, key)
    progress = _resume(checkpoint, identity, server)
    if progress is None:
        progress = Progress()
        for worker in set(range(trace.num_workers)) - _late_joiners(trace):
            server.dispatch(worker)

    for t in range(server.step, trace.num_steps):
        _apply_events(events[t], server)
        worker, time = int(trace.workers[t]), float(trace.times[t])
        task = server.held(worker)
        assert task is not None  # the trace's own ledger says so
        result, loss, progress.first_bad = run_round(
            task.params,
            task.model_state,
            task.momentum,
            task.local_learning_rate,
            data_key,
            noise_key,
            np.int32(worker),
            np.int32(task.round),
            np.int32(t),
            progress.first_bad,
        )
        # The device remembers the first non-finite round: to look here would stall each step.
        for waiting in server.receive(task.report(result)._replace(finite=True)):
            server.dispatch(waiting)
        progress.waiting_losses.append(loss)
        step, metrics = t + 1, None
        last = step == trace.num_steps
        evaluates = evaluate is not None and (step % evaluate_every == 0 or last)
        saves = checkpoint is not None and (step % checkpoint.every == 0 or last)
        looks = evaluates or saves or last or step % _LOOK_EVERY == 0
        if looks and progress.look(server) >= 0:
            break
        if evaluates:
            assert evaluate is not None
            values = evaluate(server.params, server.model_state)
            metrics = {name: float(value) for name, value in values.items()}
            progress.evaluations.append(Evaluation(step, time, metrics))
        if on_step is not None:
            on_step(StepRecord(step, time, worker, t - task.dispatched_at, loss, metrics))
        if saves:
            assert checkpoint is not None
            checkpoint.save(step, *progress.snapshot(server, identity))

    bad = progress.look(server)
    return TrainingResult(
        params=server.params,
        model_state=server.model_state,
        state=server.state,
        history=progress.history(trace, server.step if bad < 0 else bad + 1),
        trace=trace,
        status="finished" if bad < 0 else "diverged",
        diverged_at=None if bad < 0 else bad,
    )


def _resume(
    checkpoint: Checkpoints | None, identity: dict[str, Any], server: ParameterServer
) -> Progress | None:
    """Put the server where the newest checkpoint left it; None where there is none."""
    if checkpoint is None or (saved := checkpoint.newest()) is None:
        return None
    for name, value in identity.items():
        if saved.notes["identity"].get(name) != value:
            raise ValueError(
                f"`checkpoint` must be of this run, got one of another {name} in "
                f"{checkpoint.directory}"
            )
    server.restore(saved.arrays["server"], saved.notes["server"])
    return Progress(saved.arrays["losses"], saved.notes["evaluations"])


def _identity(method: Method, trace: ArrivalTrace, key: Array) -> dict[str, Any]:
    """Return what a checkpoint must have in common with the run that resumes from it."""
    return {
        "method": method.name,
        "trace": trace.digest(),
        "key": jax.random.key_data(key).tolist(),
    }


def _late_joiners(trace: ArrivalTrace) -> set[int]:
    first_kinds: dict[int, str] = {}
    for event in trace.events:
        first_kinds.setdefault(event.worker, event.kind)
    return {worker for worker, kind in first_kinds.items() if kind == "joined"}


def _apply_events(events: list[Event], server: ParameterServer) -> None:
    for event in events:
        if event.kind in ("redispatched", "joined"):
            server.dispatch(event.worker)
        elif server.held(event.worker) is not None:
            server.release(event.worker)


def _check_fit(method: Method, trace: ArrivalTrace, key: Any, evaluate_every: Any) -> None:
    if method.synchronous != trace.synchronous:
        raise ValueError(
            f"`trace` must have synchronous={method.synchronous} for {method.name}, "
            f"got synchronous={trace.synchronous}"
        )
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise TypeError(f"`key` must be a jax.random.key, got key={key!r}")
    if evaluate_every is not None:
        check_count("evaluate_every", evaluate_every, 1)

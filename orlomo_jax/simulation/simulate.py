"""Simulates K delayed workers on one device, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import optax

from orlomo_jax import trees
from orlomo_jax.methods.method import Method, round_of
from orlomo_jax.recording.callbacks import AnyCallback
from orlomo_jax.recording.checkpoint import Checkpointer
from orlomo_jax.recording.history import TrainingResult
from orlomo_jax.recording.interrupts import put_off_interrupts
from orlomo_jax.simulation.engine_choice import Compiled, Eager
from orlomo_jax.simulation.runs import RunStart, simulate_together
from orlomo_jax.traces.compute_times import ComputeTimes, heterogeneous
from orlomo_jax.traces.sample_trace import sample_trace
from orlomo_jax.traces.trace import ArrivalTrace
from orlomo_jax.trees import Array, PyTree
from orlomo_jax.worker.host_batches import HostBatches
from orlomo_jax.worker.protocols import BatchFn, Evaluate, LossFn, RoundFn


def simulate(
    method: Method,
    loss_fn: LossFn | None,
    batch_fn: BatchFn | HostBatches,
    params: trees.Params,
    *,
    num_steps: int | None = None,
    compute_times: ComputeTimes | None = None,
    trace: ArrivalTrace | None = None,
    trace_seed: int = 0,
    key: Array,
    model_state: PyTree = None,
    local_learning_rate: float | optax.Schedule,
    evaluate: Evaluate | None = None,
    evaluate_every: int | None = None,
    callbacks: Sequence[AnyCallback] = (),
    checkpoint: Checkpointer | None = None,
    engine: Literal["auto", "eager", "compiled"] | Eager | Compiled = "auto",
    round_fn: RoundFn | None = None,
) -> TrainingResult:
    """Train with K delayed workers on one device, exactly.

    Each report is computed from the very parameters that its worker was sent, whatever the delays.
    The same arguments give the same parameters bit for bit (same program, jaxlib, flags, device).

    Randomness: ``data_key, noise_key = jax.random.split(key)``. ``batch_fn`` gets ``data_key``; a
    round's own key is ``fold_in(fold_in(noise_key, worker), round)``. Both depend only on worker
    and round, not on the order of arrivals.

    Args:
        method: A :class:`~orlomo_jax.Method`: the server rule, K and S.
        loss_fn: ``loss_fn(params, model_state, batch, key) -> (loss, (model_state, metrics))``;
            see :func:`~orlomo_jax.from_loss` for a plain one. None if ``round_fn`` is given.
        batch_fn: ``batch_fn(data_key, worker, round) -> batches`` with a leading axis S; jit-able
            and hashable. Arrays of a ``jax.tree_util.Partial`` are arguments of the compiled
            program; arrays in a closure become its constants. Or :class:`~orlomo_jax.HostBatches`.
        params: w_0.
        num_steps: T, the number of reports to apply; not with ``trace``.
        compute_times: How fast the workers are; None is :func:`~orlomo_jax.heterogeneous`.
        trace: Who reports when, instead of ``num_steps`` and ``compute_times``: that of a real run,
            for example. A synchronous method needs a synchronous trace.
        trace_seed: Seed of the compute times, an integer ≥ 0.
        key: A ``jax.random.key``.
        model_state: See :class:`~orlomo_jax.ParameterServer`.
        local_learning_rate: γ, a float or a schedule of the server's step.
        evaluate: ``evaluate(params, model_state) -> {name: scalar}``; jit it yourself. It is tried
            once before the first step.
        evaluate_every: Steps between evaluations, ≥ 1; None evaluates only after the last step.
        callbacks: :class:`~orlomo_jax.Callback` objects, or functions of a
            :class:`~orlomo_jax.StepRecord`. One can end the run.
        checkpoint: Where to save. If the folder contains a checkpoint of the same run, the run
            resumes from the newest, and ends as the unbroken run does, bit for bit; callbacks see
            only the steps after it. The trace may have become longer. Another setting of method,
            round, batches, learning rate, key or engine is refused, and so are other trees; see
            :class:`~orlomo_jax.Checkpointer`. Not noticed: another w_0, and code of the loss that
            changes neither names nor numbers.
        engine: ``"eager"`` drives every step from Python; ``"compiled"``, or
            :class:`~orlomo_jax.Compiled` with settings, runs up to 256 steps as one program.
            ``"auto"`` compiles, except on a CPU for a million parameters or more, or for a loss
            with convolutions. Parameters of the two differ by rounding.
        round_fn: The local round, if it is not ``method.local_round(loss_fn)``.

    Returns:
        A :class:`TrainingResult`. Divergence is not an error: see its ``status``.

    Raises:
        ValueError: If method and trace do not fit together, an argument is out of range (a schedule
            at any step of the run), or ``checkpoint`` is of another run.
        BlockingIOError: If another run writes to the folder of ``checkpoint``.
        TypeError: If ``key`` is not a key, a leaf of params or model state is not floating, or
            ``batch_fn`` returns another batch each time it is called.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from orlomo_jax import from_loss, make_method, simulate
        >>> result = simulate(
        ...     make_method("orlomo", num_workers=2, num_local_steps=4),
        ...     from_loss(lambda params, batch: jnp.mean((params - batch) ** 2)),
        ...     lambda key, worker, round: jnp.ones((4, 1)),
        ...     jnp.zeros(1),
        ...     num_steps=30,
        ...     key=jax.random.key(0),
        ...     local_learning_rate=0.01,
        ... )
        >>> result.status, bool(abs(result.params[0] - 1) < 0.1)
        ('finished', True)
    """
    round_fn = round_of(method, loss_fn, round_fn)
    if trace is None:
        trace = _sampled(method, num_steps, compute_times, trace_seed)
    elif num_steps is not None or compute_times is not None:
        raise ValueError("`trace` says who reports when: pass no num_steps and no compute_times")
    start = RunStart(params, trace, key, local_learning_rate, model_state)
    with put_off_interrupts(checkpoint is not None) as interrupted:
        results = simulate_together(
            method,
            round_fn,
            batch_fn,
            [start],
            evaluate=evaluate,
            evaluate_every=evaluate_every,
            callbacks=callbacks,
            checkpoint=checkpoint,
            stop=interrupted,
            engine=engine,
        )
    assert results is not None  # or it was interrupted
    return results[0]


def _sampled(
    method: Method, num_steps: int | None, compute_times: ComputeTimes | None, seed: int
) -> ArrivalTrace:
    if num_steps is None:
        raise ValueError("`num_steps` must be given, or a trace")
    model = heterogeneous() if compute_times is None else compute_times
    K, S = method.num_workers, method.num_local_steps
    return sample_trace(model, K, num_steps, S, seed, synchronous=method.synchronous)

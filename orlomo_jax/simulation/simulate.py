"""Simulates K delayed workers on one device, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import optax

from orlomo_jax import trees
from orlomo_jax.checks import check_functions, check_type
from orlomo_jax.methods.method import Method, round_of
from orlomo_jax.recording.callbacks import AnyCallback
from orlomo_jax.recording.checkpoint import Checkpointer
from orlomo_jax.recording.history import TrainingResult
from orlomo_jax.simulation.engine_choice import Compiled, Eager
from orlomo_jax.simulation.run_start import RunStart
from orlomo_jax.simulation.simulate_many import simulate_many
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

    Each report is computed from exactly the parameters that its worker was sent. The same arguments
    give the same parameters bit for bit (same program, jaxlib, flags, device).

    Randomness: ``data_key, noise_key = jax.random.split(key)``. ``batch_fn`` gets ``data_key``; the
    key of a round is ``fold_in(fold_in(noise_key, worker), round)``. So batches and noise depend on
    worker and round, not on the order of arrivals.

    Args:
        method: A :class:`~orlomo_jax.Method`: the server rule, K and S.
        loss_fn: ``loss_fn(params, model_state, batch, key) -> (loss, (model_state, metrics))``;
            for a plain loss see :func:`~orlomo_jax.from_loss`. None if ``round_fn`` is given.
        batch_fn: ``batch_fn(data_key, worker, round) -> batches`` with a leading axis S; jit-able
            and hashable. Arrays of a ``jax.tree_util.Partial`` are arguments of the compiled
            program; arrays in a closure become its constants. Or :class:`~orlomo_jax.HostBatches`.
        params: w_0.
        num_steps: T, the number of reports to apply; not with ``trace``.
        compute_times: The workers' speeds; None is :func:`~orlomo_jax.heterogeneous`.
        trace: The order of arrivals, instead of ``num_steps`` and ``compute_times``; for example
            that of a real run. A synchronous method needs a synchronous trace.
        trace_seed: Seed of the compute times, an integer ≥ 0.
        key: A ``jax.random.key``.
        model_state: See :class:`~orlomo_jax.ParameterServer`.
        local_learning_rate: γ, a float or a schedule of the server's step.
        evaluate: ``evaluate(params, model_state) -> {name: scalar}``; jit it yourself. Before
            the first step it is tested: compiled if it is jitted, otherwise called.
        evaluate_every: Steps between evaluations, ≥ 1; None evaluates only after the last step.
        callbacks: :class:`~orlomo_jax.Callback` objects, or functions of a
            :class:`~orlomo_jax.StepRecord`. A callback can end the run.
        checkpoint: Where to save. If the folder contains checkpoints of the same run, the run
            resumes from the newest and gives the results of an uninterrupted run bit for bit;
            callbacks get only the steps after it. The trace may be longer now. If method, round,
            batches, learning rate, key, engine or trees differ, an error is raised; see
            :class:`~orlomo_jax.Checkpointer`. It does not notice another w_0, or changes in the
            code of the loss that change neither names nor numbers.
        engine: ``"eager"`` runs every step from Python; ``"compiled"``, or
            :class:`~orlomo_jax.Compiled` with settings, runs up to 256 steps as one program.
            ``"auto"`` is "compiled", except on a CPU with a million parameters or more, or with a
            loss with convolutions. The results of the engines differ by rounding.
        round_fn: The local round, if it is not ``method.local_round(loss_fn)``.

    Returns:
        A :class:`TrainingResult`. Divergence is not an error; see its ``status``.

    Raises:
        ValueError: If method and trace do not match, an argument is out of range (for schedules, at
            any step of the run), or ``checkpoint`` is of another run.
        BlockingIOError: If another run writes to the folder of ``checkpoint``.
        TypeError: If ``key`` is not a key, a leaf of params is not floating or one of model state
            not numeric, or ``batch_fn`` returns a different batch each time it is called.

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
    check_type("method", method, Method, "a Method, as from make_method")
    check_type("compute_times", compute_times, ComputeTimes, "a model such as heterogeneous()")
    check_type("trace", trace, ArrivalTrace, "an ArrivalTrace")
    check_type("checkpoint", checkpoint, Checkpointer, "a Checkpointer")
    check_functions(loss_fn=loss_fn, batch_fn=batch_fn, evaluate=evaluate, round_fn=round_fn)
    round_fn = round_of(method, loss_fn, round_fn)
    if trace is None:
        trace = _sampled(method, num_steps, compute_times, trace_seed)
    elif num_steps is not None or compute_times is not None:
        raise ValueError("`trace` says who reports when: pass no num_steps and no compute_times")
    start = RunStart(
        params, trace, key, local_learning_rate, model_state, callbacks=tuple(callbacks)
    )
    results = simulate_many(
        method,
        None,
        batch_fn,
        [start],
        evaluate=evaluate,
        evaluate_every=evaluate_every,
        checkpoint=checkpoint,
        engine=engine,
        round_fn=round_fn,
    )
    assert results is not None  # an interrupted run has raised
    return results[0]


def _sampled(
    method: Method, num_steps: int | None, compute_times: ComputeTimes | None, seed: int
) -> ArrivalTrace:
    if num_steps is None:
        raise ValueError("`num_steps` must be given, or a trace")
    model = heterogeneous() if compute_times is None else compute_times
    K, S = method.num_workers, method.num_local_steps
    policy = method.policy
    return sample_trace(model, K, num_steps, S, seed, synchronous=method.synchronous, policy=policy)

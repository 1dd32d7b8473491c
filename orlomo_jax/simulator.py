"""K delayed workers on one device, exactly: a virtual clock drives the parameter server."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import jax
import optax

from orlomo_jax.checkpoint import Checkpoints
from orlomo_jax.checks import check_count
from orlomo_jax.compiled import LENGTH
from orlomo_jax.driven import Job
from orlomo_jax.form import choose
from orlomo_jax.history import Evaluation, Progress, StepRecord, TrainingResult
from orlomo_jax.methods import Method
from orlomo_jax.rounds import check_key
from orlomo_jax.rules import contract
from orlomo_jax.server import ParameterServer
from orlomo_jax.server_step import as_partial
from orlomo_jax.trace import ArrivalTrace

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Int, PyTree, Scalar

    from orlomo_jax.compiled import WorkerAxis

    BatchFn = Callable[[Array, Int[Array, ""], Int[Array, ""]], PyTree[Array]]
    Evaluate = Callable[[contract.Params, PyTree[Array]], dict[str, Scalar]]


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
    compiled: Literal["auto"] | bool = "auto",
    worker_axis: Literal["auto"] | WorkerAxis = "auto",
    compute_batch: int | None = None,
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
        on_step: Called with a :class:`StepRecord` for each step, in order: after it, or after the
            compiled stretch that it belongs to. Of a diverging run also for some steps after the
            one that ``diverged_at`` will name.
        checkpoint: Where to save as the run goes. A run whose folder holds a checkpoint of the same
            method, trace, key, learning rate and program (the three arguments below) goes on from
            the newest, and ends as the unbroken run does, to the bit; ``on_step`` then sees the
            steps after it alone. Another loss or start is not noticed.
        compiled: Whether stretches of at most 256 steps, up to the next evaluation or checkpoint,
            run as one compiled program each, or every step is driven from Python. "auto" is True
            but on a CPU for a million parameters or more, whose copies cost more than Python, and
            for a loss that convolves, whose gradient XLA runs 6 to 39 times slower inside a loop.
            Both keep the same books; their parameters differ by rounding.
        worker_axis: How compiled rounds that do not depend on one another's reports are computed:
            one by one ("loop"), or together, up to K of them whatever the delays, by
            ``jax.lax.map`` ("map") or ``jax.vmap`` ("vmap"). "auto" is "loop" on a CPU, where
            vmap gains nothing, and where the loss convolves, which vmap turns into slow grouped
            convolutions; else "vmap".
        compute_batch: The most rounds computed together, ≥ 1, which bounds the memory: that many
            reports wait to be applied. None is as many as can be on average over the trace.

    Returns:
        A :class:`TrainingResult`.

    Raises:
        ValueError: If method and trace do not fit together, an argument is out of range, or
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
    job = Job(round_fn, as_partial(batch_fn), trace, data_key, noise_key)
    identity = {} if checkpoint is None else _identity(server, trace, key)
    saved = None if checkpoint is None else checkpoint.newest_of(identity)
    if saved is not None:
        server.restore(saved.arrays["server"], saved.notes["server"])
    form = choose(compiled, worker_axis, compute_batch, server, job)
    identity["program"] = str(form)
    if saved is None:
        progress = Progress()
        for worker in set(range(trace.num_workers)) - trace.late_joiners:
            server.dispatch(worker)
    else:
        saved.check(identity)
        progress = Progress(saved.arrays["losses"], saved.notes["evaluations"])
    engine = form.engine(server, job)
    evaluate_every = trace.num_steps if evaluate_every is None else evaluate_every
    every = [evaluate_every, LENGTH] + ([] if checkpoint is None else [checkpoint.every])
    delays = trace.delays

    def record(step: int, loss: Scalar, metrics: dict[str, float] | None = None) -> StepRecord:
        worker, delay = int(trace.workers[step - 1]), int(delays[step - 1])
        return StepRecord(step, float(trace.times[step - 1]), worker, delay, loss, metrics)

    def announced(losses: Iterable[Scalar], start: int, stop: int) -> Iterator[Scalar]:
        for step, loss in enumerate(losses, start + 1):
            if on_step and step < stop:
                on_step(record(step, loss))
            yield loss

    step = server.step
    while step < trace.num_steps:
        stop = min([trace.num_steps, *(step - step % n + n for n in every)])
        losses = engine.advance(stop)
        progress.waiting_losses.extend(announced(losses, step, stop) if on_step else losses)
        step, metrics, loss = stop, None, progress.waiting_losses[-1]
        if progress.look(engine, step) >= 0:
            break
        last = step == trace.num_steps
        if evaluate is not None and (step % evaluate_every == 0 or last):
            params, model_state, _ = engine.arrays()
            values = evaluate(params, model_state)
            metrics = {name: float(value) for name, value in values.items()}
            progress.evaluations.append(Evaluation(step, float(trace.times[step - 1]), metrics))
        if on_step is not None:
            on_step(record(step, loss, metrics))
        if checkpoint is not None and (step % checkpoint.every == 0 or last):
            engine.settle()
            checkpoint.save(step, *progress.snapshot(server, identity))

    bad = progress.look(engine, step)
    params, model_state, state = engine.peek()
    return TrainingResult(
        params=params,
        model_state=model_state,
        state=state,
        history=progress.history(trace, step if bad < 0 else bad + 1),
        trace=trace,
        status="finished" if bad < 0 else "diverged",
        diverged_at=None if bad < 0 else bad,
    )


def _identity(server: ParameterServer, trace: ArrivalTrace, key: Array) -> dict[str, Any]:
    """Return what a checkpoint must have in common with the run that resumes from it."""
    return server.identity() | {
        "trace": trace.digest(),
        "key": jax.random.key_data(key).tolist(),
    }


def _check_fit(method: Method, trace: ArrivalTrace, key: Any, evaluate_every: Any) -> None:
    if method.synchronous != trace.synchronous:
        raise ValueError(
            f"`trace` must have synchronous={method.synchronous} for {method.name}, "
            f"got synchronous={trace.synchronous}"
        )
    check_key(key)
    if evaluate_every is not None:
        check_count("evaluate_every", evaluate_every, 1)

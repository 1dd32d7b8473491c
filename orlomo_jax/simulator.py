"""K delayed workers on one device, exactly: a virtual clock drives the parameter server."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import optax

from orlomo_jax.arrays import mesh_context
from orlomo_jax.checkpoint import Checkpoints
from orlomo_jax.checks import check_count
from orlomo_jax.compiled import LENGTH, Compiled
from orlomo_jax.driven import Driven, Job, check_job
from orlomo_jax.form import Form, choose
from orlomo_jax.history import Evaluation, Progress, StepRecord, TrainingResult, ends_run, evaluated
from orlomo_jax.interrupts import put_off_interrupts
from orlomo_jax.methods import Method
from orlomo_jax.pure import check_pure
from orlomo_jax.resume import begin_or_resume, of_arrivals
from orlomo_jax.rounds import RoundMetrics, check_key
from orlomo_jax.rules import contract
from orlomo_jax.schedules import check_schedules
from orlomo_jax.server import ParameterServer
from orlomo_jax.server_step import as_partial
from orlomo_jax.together import Alone, Lane, Together
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
    on_step: Callable[[StepRecord], bool | None] | None = None,
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
        evaluate: ``evaluate(params, model_state) -> {name: scalar}``; jit it yourself. It is tried
            once before the first step.
        evaluate_every: Steps between evaluations, ≥ 1; None is after the last step alone.
        on_step: Called with a :class:`StepRecord` for each step, in order: after it, or after the
            compiled stretch that it belongs to. Of a diverging run also for some steps after the
            one that ``diverged_at`` will name. If it returns True or raises StopIteration, the run
            ends there (a compiled one after the stretch), with the status "stopped"; a checkpoint
            is saved first.
        checkpoint: Where to save as the run goes. A run whose folder holds a checkpoint of the same
            run goes on from the newest, and ends as the unbroken run does, to the bit; ``on_step``
            then sees the steps after it alone. The trace may have become longer. Another setting of
            method, round, batches, learning rate, key or program (the three arguments below) is
            refused, and so are other trees; see :class:`~orlomo_jax.Checkpoints`. What is not
            noticed is another w_0, and code of the loss that changes neither names nor numbers.
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
        ValueError: If method and trace do not fit together, an argument is out of range (a schedule
            at any step of the run), or ``checkpoint`` is of another run.
        BlockingIOError: If another run has the folder of ``checkpoint``.
        TypeError: If ``key`` is no key, a leaf of params or model state is not floating, or
            ``batch_fn`` gives another batch each time it is called.

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
    with put_off_interrupts(checkpoint is not None) as interrupted:
        results = simulate_together(
            method,
            round_fn,
            batch_fn,
            [RunStart(params, trace, key, local_learning_rate, model_state)],
            evaluate=evaluate,
            evaluate_every=evaluate_every,
            on_step=on_step,
            checkpoint=checkpoint,
            stop=interrupted,
            compiled=compiled,
            worker_axis=worker_axis,
            compute_batch=compute_batch,
        )
    assert results is not None  # or it was interrupted
    return results[0]


class RunStart(NamedTuple):
    """What one of several runs of a shape has for itself; see :func:`simulate`."""

    params: contract.Params
    trace: ArrivalTrace
    key: Array
    local_learning_rate: float | optax.Schedule
    model_state: PyTree[ArrayLike] = None


def _in_their_mesh(function: Any) -> Any:
    """Run a function of ``starts`` in the mesh of their parameters, where it has explicit axes."""

    @wraps(function)
    def call(method, round_fn, batch_fn, starts, **options):
        with mesh_context([start.params for start in starts]):
            return function(method, round_fn, batch_fn, starts, **options)

    return call


@_in_their_mesh
def simulate_together(
    method: Method,
    round_fn: Callable,
    batch_fn: BatchFn,
    starts: Sequence[RunStart],
    *,
    evaluate: Evaluate | None = None,
    evaluate_every: int | None = None,
    on_step: Callable[[StepRecord], bool | None] | None = None,
    checkpoint: Checkpoints | None = None,
    stop: Callable[[], bool] | None = None,
    compiled: Literal["auto"] | bool = "auto",
    worker_axis: Literal["auto"] | WorkerAxis = "auto",
    compute_batch: int | None = None,
) -> list[TrainingResult] | None:
    """Simulate runs of one method, shape and length; several go through one compiled program.

    Several runs are computed by ``vmap`` over the runs, each report by itself. Their results are
    those of single runs up to rounding. If a run diverges, the others go on.

    Args:
        method: As in :func:`simulate`, and so are all arguments that are not named here.
        round_fn: The local round of all runs.
        batch_fn: The batch function of all runs.
        starts: At least one run; constant learning rates and schedules cannot be mixed.
        evaluate: Called for each run on its own.
        evaluate_every: Steps between evaluations.
        on_step: Called for the first run alone.
        checkpoint: All runs share one folder, and resume together.
        stop: Asked after each stretch of at most 256 steps. If it returns True, the runs are saved
            to ``checkpoint``, where there is one, and the call ends.
        compiled: Of several runs always compiled.
        worker_axis: Of several runs always "loop".
        compute_batch: Of several runs always 1.

    Returns:
        The result of each run, or None if ``stop`` ended the call.

    Raises:
        ValueError: If there is no run, or the runs cannot share a program.
    """
    if not starts:
        raise ValueError("`starts` must hold at least one run")
    for start in starts:
        _check_fit(method, start.trace, start.key, evaluate_every)
    num_steps = starts[0].trace.num_steps
    if any(start.trace.num_steps != num_steps for start in starts):
        raise ValueError("the traces of runs together must have the same number of steps")
    several = len(starts) > 1
    if several:
        compiled, worker_axis, compute_batch = True, "loop", None
    batch_fn = as_partial(batch_fn)
    check_pure(batch_fn, starts[0].key)
    runs = [_Run(method, round_fn, batch_fn, start) for start in starts]
    for run in runs:
        check_schedules(method, run.server.schedule, num_steps)
    form = choose(compiled, worker_axis, compute_batch, runs[0].server, runs[0].job)
    if checkpoint is None:
        for run in runs:
            run.begin()
        return _carry_out(runs, form, evaluate, evaluate_every, on_step, stop)
    with checkpoint.alone():
        form, identity = begin_or_resume(runs, form, checkpoint, fixed=compute_batch is not None)
        return _carry_out(runs, form, evaluate, evaluate_every, on_step, stop, checkpoint, identity)


def _carry_out(
    runs: Sequence[_Run],
    form: Form,
    evaluate: Evaluate | None,
    evaluate_every: int | None,
    on_step: Callable[[StepRecord], bool | None] | None,
    stop: Callable[[], bool] | None,
    checkpoint: Checkpoints | None = None,
    identity: dict[str, Any] | None = None,
) -> list[TrainingResult] | None:
    """Carry out runs from where their servers are; see :func:`simulate_together`."""
    several, num_steps = len(runs) > 1, runs[0].trace.num_steps
    engines = [form.engine(run.server, run.job) for run in runs]
    group = Together(engines) if several else Alone(engines[0])
    for run, lane in zip(runs, group.lanes, strict=True):
        run.engine = lane
        if run.bad >= 0:
            lane.first_bad = run.bad
    evaluate_every = num_steps if evaluate_every is None else evaluate_every
    every = [evaluate_every, LENGTH] + ([] if checkpoint is None else [checkpoint.every])

    def save(step: int) -> None:
        assert checkpoint is not None
        assert identity is not None
        group.settle()
        arrays, notes = zip(*(run.snapshot() for run in runs), strict=True)
        kept = {"runs": list(arrays)}, {"runs": list(notes)}
        checkpoint.save_run(step, *kept, identity | of_arrivals(runs, step))

    first, step = runs[0], runs[0].server.step
    if step < num_steps:
        first.rehearse(evaluate, step)
    while step < num_steps:
        end = min([num_steps, *(step - step % n + n for n in every)])
        for run, rounds in zip(runs, group.advance(end), strict=True):
            told = on_step if run is first else None
            run.take(rounds if told is None else first.announced(rounds, step, end, told))
        step = first.server.step  # before `end` where on_step has stopped the run there
        last = step == num_steps
        for run in runs:
            run.look(step)
        if all(run.bad >= 0 for run in runs):
            break
        if evaluate is not None and (step % evaluate_every == 0 or last):
            for run in runs:
                run.evaluate(evaluate, step)
        if on_step is not None and step == end:
            first.stopped |= ends_run(on_step, first.record(step))
        if checkpoint is not None and (step % checkpoint.every == 0 or last or first.stopped):
            save(step)
        if first.stopped:
            break
        if stop is not None and not last and stop():
            if checkpoint is not None and step % checkpoint.every:
                save(step)
            return None
    for run in runs:
        run.look(step)
    return [run.result(step) for run in runs]


class _Run:
    """One run: its server, and what it has gathered.

    Attributes:
        engine: What carries it out.
        bad: The step at which its numbers ceased to be finite, −1 for none.
        stopped: Whether ``on_step`` has ended it.
    """

    engine: Driven | Compiled | Lane

    def __init__(
        self, method: Method, round_fn: Callable, batch_fn: jax.tree_util.Partial, start: RunStart
    ) -> None:
        """Make the server."""
        params, self.trace, key, local_learning_rate, model_state = start
        self.server = ParameterServer(
            method,
            params,
            self.trace.num_workers,
            model_state,
            local_learning_rate=local_learning_rate,
        )
        self.job = Job(round_fn, batch_fn, self.trace, *jax.random.split(key))
        self.progress, self.bad = Progress(check_job(self.server, self.job)), -1
        self.stopped = False
        self._newest: RoundMetrics | None = None
        self._evaluation: dict[str, float] | None = None

    def begin(self) -> None:
        """Dispatch the first tasks."""
        for worker in set(range(self.trace.num_workers)) - self.trace.late_joiners:
            self.server.dispatch(worker)

    def resume(self, arrays: dict[str, Any], notes: dict[str, Any], step: int) -> None:
        """Go on from a :meth:`snapshot` at this step."""
        self.bad = check_count("first_bad", notes["first_bad"], -1)
        self.progress.resume(arrays["metrics"], notes["evaluations"], step)
        self.server.restore(arrays["server"], notes["server"])
        check_count("step", self.server.step, step, step)

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return a checkpoint's arrays and notes."""
        arrays, notes = self.progress.snapshot(self.server)
        return arrays, notes | {"first_bad": self.bad}

    def take(self, rounds: Iterable[RoundMetrics]) -> None:
        """Keep the metrics of a stretch's rounds."""
        self.progress.waiting.extend(rounds)
        self._newest, self._evaluation = self.progress.waiting[-1], None

    def look(self, step: int) -> None:
        """Fetch the metrics, and find whether the run has diverged."""
        bad = self.progress.look(self.engine, step)
        self.bad = bad if self.bad < 0 else self.bad

    def evaluate(self, evaluate: Evaluate, step: int) -> None:
        """Evaluate the run, unless it has diverged."""
        if self.bad >= 0:
            return
        params, model_state, _ = self.engine.arrays()
        self._evaluation = evaluated(evaluate, params, model_state)
        time = float(self.trace.times[step - 1])
        self.progress.evaluations.append(Evaluation(step, time, self._evaluation))

    def record(self, step: int, metrics: RoundMetrics | None = None) -> StepRecord:
        """Return what ``on_step`` sees; without ``metrics``, of the newest step."""
        at, evaluation = step - 1, None
        if metrics is None:
            metrics, evaluation = self._newest, self._evaluation
        assert metrics is not None
        worker, delay = int(self.trace.workers[at]), int(self.trace.delays[at])
        time = float(self.trace.times[at])
        return StepRecord(step, time, worker, delay, *metrics, evaluation)

    def announced(
        self, rounds: Iterable[RoundMetrics], start: int, end: int, on_step: Callable
    ) -> Iterator[RoundMetrics]:
        """Yield the metrics of rounds, and tell ``on_step`` of each but the last; it may stop."""
        for step, metrics in enumerate(rounds, start + 1):
            if step < end:
                self.stopped |= ends_run(on_step, self.record(step, metrics))
            yield metrics
            if self.stopped and step == self.server.step:  # else they are computed already
                return

    def rehearse(self, evaluate: Evaluate | None, step: int) -> None:
        """Evaluate and make a result as at the end: errors show before the first step."""
        self.result(step)
        if evaluate is not None:
            evaluated(evaluate, *self.engine.arrays()[:2])

    def result(self, step: int) -> TrainingResult:
        """Return what came of the run after ``step`` steps."""
        bad, whole = self.bad, step == self.trace.num_steps
        params, model_state, state = self.engine.peek()
        return TrainingResult(
            params=params,
            model_state=model_state,
            state=state,
            history=self.progress.history(self.trace, step if bad < 0 else bad + 1),
            trace=self.trace,
            status="diverged" if bad >= 0 else "finished" if whole else "stopped",
            diverged_at=None if bad < 0 else bad,
        )


def _check_fit(method: Method, trace: ArrivalTrace, key: Any, evaluate_every: Any) -> None:
    if method.synchronous != trace.synchronous:
        raise ValueError(
            f"`trace` must have synchronous={method.synchronous} for {method.name}, "
            f"got synchronous={trace.synchronous}"
        )
    check_key(key)
    if evaluate_every is not None:
        check_count("evaluate_every", evaluate_every, 1)

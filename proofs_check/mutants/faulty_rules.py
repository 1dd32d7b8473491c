"""Defines faulty server rules, rounds and servers: the mutants that the checks must catch.

:mod:`proofs_check.mutants.catalogue` lists which check must catch which mutant. The faulty rules
are one small OrLoMo with faults. Without a fault it passes every check (:func:`intact`), so a
failing check has found the fault and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from orlomo_jax import ParameterServer, delay_adaptive, local_momentum_sgd, orlomo
from proofs_check.registry import Subject


class FaultyState(NamedTuple):
    """State of a faulty rule."""

    step: jax.Array
    momentum: Any


@dataclass(frozen=True)
class Faults:
    """The parts of the rule that can be made wrong; the defaults are correct.

    Attributes:
        group: Maps (index, K) to the group.
        group_size: Maps K to the size of a group.
        late: Added to n.
        opens: Maps (t, K) to whether the step multiplies by β.
        decay_momentum, decay_params: Whether that step applies β to u, and to w.
        past: Maps (β, n) to the weight of η_t Δu in w.
        weight: Maps (β, n) to the weight of η_t Δu in u.
        rate_step: Maps (t, i) to the step that the learning rate is taken from.
        delay: Maps (t, i) to the delay given to ``delay_weight``.
        swap: Whether Δw replaces Δu.
        dtype: dtype of the coefficients; None is the widest one.
        rate_on_past: Whether η_t multiplies the past descent.
    """

    group: Callable = lambda index, num_workers: -(-index // num_workers)
    group_size: Callable = lambda num_workers: num_workers
    late: int = 0
    opens: Callable = lambda step, size: (step - 1) % size == 0
    decay_momentum: bool = True
    decay_params: bool = True
    past: Callable = lambda beta, late: past_descent(beta, late)
    weight: Callable = lambda beta, late: beta ** late.astype(beta.dtype)
    rate_step: Callable = lambda step, index: step
    delay: Callable = lambda step, index: step - index
    swap: bool = False
    dtype: Any = None
    rate_on_past: bool = True


def past_descent(beta, late):
    """Return Σ_{j=1..n} β^j: term by term up to n = 64 (exact for dyadic β), then by expm1."""
    terms = jnp.arange(1, 65)
    summed = jnp.sum(jnp.where(terms <= late, beta ** terms.astype(beta.dtype), 0))
    closed = -beta * jnp.expm1(late * jnp.log1p(beta - 1)) / (1 - beta)
    return jnp.where(late <= 64, summed, closed)


def faulty(faults: Faults) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """Return the factory of a rule with these faults, with the signature of ``orlomo``."""

    def factory(num_workers, momentum=0.9, learning_rate=1.0, delay_weight=None):
        weigh = delay_adaptive(num_workers) if delay_weight is None else delay_weight
        schedule = learning_rate if callable(learning_rate) else lambda step: learning_rate
        size = faults.group_size(num_workers)
        without_momentum = isinstance(momentum, float) and momentum == 0  # Remark 1, bit for bit

        def init(params):
            return FaultyState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params))

        def update(updates, state, params=None, *, dispatched_at, **extra_args):
            del params, extra_args
            report = updates
            t, i, u = state.step, dispatched_at, state.momentum
            dtype = jnp.asarray(0.0).dtype if faults.dtype is None else faults.dtype
            beta = jnp.asarray(momentum, dtype)
            rate = jnp.asarray(schedule(faults.rate_step(t, i)) * weigh(faults.delay(t, i)), dtype)
            late = jnp.maximum(faults.group(t, size) - faults.group(i, size) + faults.late, 0)
            opens = faults.opens(t, size)
            power, past = faults.weight(beta, late), faults.past(beta, late)
            past = past * rate if faults.rate_on_past else past
            du = report.delta if faults.swap or report.momentum is None else report.momentum
            fade = jnp.where(opens & faults.decay_momentum, beta, 1)
            descend = jnp.where(opens & faults.decay_params, beta, 0)
            new_u = jax.tree.map(lambda u, d: (fade * u + power * rate * d).astype(u.dtype), u, du)
            if without_momentum:
                updates = jax.tree.map(lambda c: (-rate * c).astype(c.dtype), report.delta)
                return updates, FaultyState(t + 1, new_u)
            new_updates = jax.tree.map(
                lambda u, d, c: (-descend * u - past * d - rate * c).astype(u.dtype),
                u, du, report.delta,
            )  # fmt: skip
            return new_updates, FaultyState(t + 1, new_u)

        return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]

    return factory


def intact() -> Subject:
    """Return the rule of this module without a fault; it must pass every check."""
    return Subject("no fault", rule=faulty(Faults()))


def _floor(index, num_workers):
    return index // num_workers


def _closed(beta, late):
    """Return (1−β^n)/(1−β), which lacks the leading β."""
    return 1 + past_descent(beta, late - 1) - jnp.where(late == 0, 1, 0)


RULES: dict[str, tuple[Faults, tuple[str, ...]]] = {
    "floor for ceiling in the group index": (Faults(group=_floor), ("lemma-1", "lemma-2")),
    "n+1 for n": (Faults(late=1), ("lemma-1", "lemma-2")),
    "n−1 for n": (Faults(late=-1), ("lemma-1", "lemma-2")),
    "momentum never multiplied by β": (Faults(decay_momentum=False), ("lemma-1",)),
    "momentum multiplied one step late": (
        Faults(opens=lambda t, size: (t - 2) % size == 0), ("lemma-1", "lemma-2")),
    "β applied to u but not to w": (Faults(decay_params=False), ("lemma-2",)),
    "(1−β^n)/(1−β) without its leading β": (Faults(past=_closed), ("lemma-2",)),
    "η from the dispatch step": (Faults(rate_step=lambda t, i: i), ("lemma-1", "lemma-2")),
    "arrival order with weight 1": (
        Faults(weight=lambda beta, n: jnp.ones_like(beta), past=lambda beta, n: 0 * beta),
        ("lemma-1", "lemma-2")),
    "Δu for Δw": (Faults(swap=True), ("lemma-1", "lemma-2")),
    "group size K−1": (Faults(group_size=lambda k: max(k - 1, 1)), ("lemma-1", "lemma-2")),
    "group size K+1": (Faults(group_size=lambda k: k + 1), ("lemma-1", "lemma-2")),
    "the past descent without η": (Faults(rate_on_past=False), ("lemma-2",)),
    "no past descent": (Faults(past=lambda beta, n: 0 * beta), ("lemma-2",)),
    "past descent to n+1": (Faults(past=lambda beta, n: past_descent(beta, n + 1)), ("lemma-2",)),
    "β at every step": (Faults(opens=lambda t, size: t >= 0), ("lemma-1", "lemma-2")),
    "delay off by one": (Faults(delay=lambda t, i: t - i + 1), ("lemma-1", "lemma-2")),
    "η one step ahead": (Faults(rate_step=lambda t, i: t + 1), ("lemma-1", "lemma-2")),
}  # fmt: skip


def changed(rule: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    """Return the rule with ``change`` applied to its updates; its state stays the same."""

    def factory(*args, **options):
        inner = rule(*args, **options)

        def update(updates, state, params=None, **extra_args):
            updates, state = inner.update(updates, state, params, **extra_args)
            return jax.tree.map(change, updates), state

        return optax.GradientTransformationExtraArgs(inner.init, update)

    return factory


def eq_6_from(factor: float, strict: bool) -> Callable[[int], Any]:
    """Return Eq. (6) with another threshold."""

    def weigh(num_workers):
        def weight(delay):
            over = delay > factor * num_workers if strict else delay >= factor * num_workers
            return 1.0 / jnp.where(over, jnp.maximum(delay, 1), num_workers).astype(float)

        return weight

    return weigh


def with_defaults(rule: Callable[..., Any], **defaults: Any) -> Callable[..., Any]:
    """Return the rule with other defaults."""
    return lambda num_workers, **options: rule(num_workers, **(defaults | options))


def rate_without_workers(num_workers, momentum=0.9, learning_rate=1.0, delay_weight=None):
    """Return OrLoMo with η = ½ for every K, unless ``delay_weight`` is given."""
    weigh = (lambda delay: 0.5) if delay_weight is None else delay_weight
    return orlomo(num_workers, momentum, learning_rate, weigh)


def round_with_squared_momentum(loss_fn, num_local_steps, momentum=0.9, **options):
    """Return a round that multiplies ũ by β² instead of β."""
    other = None if momentum is None else momentum**2
    return local_momentum_sgd(loss_fn, num_local_steps, other, **options)


class ServerOneLate(ParameterServer):
    """A server that records a wrong index: one step before the true dispatch step."""

    def dispatch(self, worker):
        """Return a task; its index is wrong from step 2 on."""
        task = super().dispatch(worker)
        if self.step > 1 and task.id.dispatched_at == self.step:
            task = task._replace(id=task.id._replace(dispatched_at=self.step - 1))
            self.tasks[worker], self.table.held[worker] = task, task.id
        return task


class ServerThatTakesAnything(ParameterServer):
    """A server that applies reports it should reject."""

    def check_report(self, report):
        """Accept the report; dispatch to its worker first if it is idle."""
        worker = report.id.worker
        if worker < self.num_workers and self.held(worker) is None:
            self.dispatch(worker)


def without_past_descent(num_workers: int, **options: Any) -> optax.GradientTransformationExtraArgs:
    """Return an OrLoMo that omits a late report's past descent; use it to try ``--rule``."""
    return faulty(RULES["no past descent"][0])(num_workers, **options)

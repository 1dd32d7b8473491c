"""Rules broken on purpose, and wrong statements: each check must catch its own.

The broken rules are one small OrLoMo with faults. Without a fault it passes every check
(:func:`intact`), so that what a check catches is the fault and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from orlomo_jax import (
    ParameterServer,
    al_sgd,
    delay_adaptive,
    local_momentum_sgd,
    orlomo,
    prsgdm,
)
from proofs_check.claims import PAPER
from proofs_check.registry import Subject


class FaultyState(NamedTuple):
    """State of a faulty rule."""

    step: jax.Array
    momentum: Any


@dataclass(frozen=True)
class Faults:
    """What may be wrong with the rule; the defaults are right.

    Attributes:
        group: (index, K) to the group.
        group_size: K to the size of a group.
        late: Added to n.
        opens: (t, K) to whether the step multiplies by β.
        decay_momentum, decay_params: Whether β then acts on u; on w.
        past: (β, n) to the weight of η_t Δu in w.
        weight: (β, n) to the weight of η_t Δu in u.
        rate_step: (t, i) to the step whose learning rate is used.
        delay: (t, i) to the delay given to ``delay_weight``.
        swap: Whether Δw stands where Δu should.
        dtype: dtype of the coefficients; None is the widest.
        rate_on_past: Whether η_t multiplies the past descent.
    """

    group: Callable = lambda index, num_workers: -(-index // num_workers)
    group_size: Callable = lambda num_workers: num_workers
    late: int = 0
    opens: Callable = lambda step, size: (step - 1) % size == 0
    decay_momentum: bool = True
    decay_params: bool = True
    past: Callable = lambda beta, late: _past(beta, late)
    weight: Callable = lambda beta, late: beta ** late.astype(beta.dtype)
    rate_step: Callable = lambda step, index: step
    delay: Callable = lambda step, index: step - index
    swap: bool = False
    dtype: Any = None
    rate_on_past: bool = True


def _past(beta, late):
    """Return Σ_{j=1..n} β^j: term by term, exact for dyadic β; for large n by expm1."""
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
        without_momentum = isinstance(momentum, float) and momentum == 0  # Remark 1, to the bit

        def init(params):
            return FaultyState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params))

        def update(report, state, params=None, *, dispatched_at, **extra_args):
            del params, extra_args
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
            updates = jax.tree.map(
                lambda u, d, c: (-descend * u - past * d - rate * c).astype(u.dtype),
                u, du, report.delta,
            )  # fmt: skip
            return updates, FaultyState(t + 1, new_u)

        return optax.GradientTransformationExtraArgs(init, update)

    return factory


def intact() -> Subject:
    """Return the rule of this module without a fault: every check must pass it."""
    return Subject("no fault", rule=faulty(Faults()))


class Control(NamedTuple):
    """A negative control.

    Attributes:
        subject: What is broken; its name says how.
        caught_by: The check that must catch it.
        statements: The statements which that check must find violated, at least.
    """

    subject: Subject
    caught_by: str
    statements: tuple[str, ...]


def _floor(index, num_workers):
    return index // num_workers


def _closed(beta, late):
    """Return (1−β^n)/(1−β): the leading β is missing."""
    return 1 + _past(beta, late - 1) - jnp.where(late == 0, 1, 0)


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
    "past descent to n+1": (Faults(past=lambda beta, n: _past(beta, n + 1)), ("lemma-2",)),
    "β at every step": (Faults(opens=lambda t, size: t >= 0), ("lemma-1", "lemma-2")),
    "delay off by one": (Faults(delay=lambda t, i: t - i + 1), ("lemma-1", "lemma-2")),
    "η one step ahead": (Faults(rate_step=lambda t, i: t + 1), ("lemma-1", "lemma-2")),
}  # fmt: skip


def _caught(caught_by: str, *statements: str, name: str, **broken: Any) -> tuple[str, Control]:
    return f"{name} [{caught_by}]", Control(Subject(name, **broken), caught_by, statements)


def _changed(rule: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    """Return the rule whose updates are passed through ``change``; its state is untouched."""

    def factory(*args, **options):
        inner = rule(*args, **options)

        def update(report, state, params=None, **extra_args):
            updates, state = inner.update(report, state, params, **extra_args)
            return jax.tree.map(change, updates), state

        return optax.GradientTransformationExtraArgs(inner.init, update)

    return factory


def _eq_6_from(factor: float, strict: bool) -> Callable[[int], Any]:
    """Return Eq. (6) with another threshold."""

    def weigh(num_workers):
        def weight(delay):
            over = delay > factor * num_workers if strict else delay >= factor * num_workers
            return 1.0 / jnp.where(over, jnp.maximum(delay, 1), num_workers).astype(float)

        return weight

    return weigh


def _with(rule: Callable[..., Any], **defaults: Any) -> Callable[..., Any]:
    """Return the rule with other defaults."""
    return lambda num_workers, **options: rule(num_workers, **(defaults | options))


def _always_full_rate(num_workers, momentum=0.9, learning_rate=1.0, delay_weight=None):
    weigh = (lambda delay: 0.5) if delay_weight is None else delay_weight
    return orlomo(num_workers, momentum, learning_rate, weigh)


def _forgets_momentum(loss_fn, num_local_steps, momentum=0.9, **options):
    """A round whose ũ is multiplied by β² for β."""
    other = None if momentum is None else momentum**2
    return local_momentum_sgd(loss_fn, num_local_steps, other, **options)


class _OneLate(ParameterServer):
    """A server that writes down the step after the one it dispatches at."""

    def dispatch(self, worker):
        """Return a task with a wrong index once the first report has come."""
        task = super().dispatch(worker)
        if self.step > 1 and task.dispatched_at == self.step:
            task = task._replace(dispatched_at=task.dispatched_at - 1)
            self._held[worker] = task
        return task


class _TakesAnything(ParameterServer):
    """A server that applies what it should reject."""

    def _check_report(self, report):
        if report.worker < self.num_workers:
            self._held.setdefault(report.worker, None)


def _less(name: str, factor: float) -> Any:
    """Return the claims with a bound's constants multiplied by a factor."""
    bound = getattr(PAPER, name)
    return PAPER._replace(**{name: lambda *args: tuple(factor * x for x in bound(*args))})


def _remark_5_without_workers(beta, local_steps, num_workers, *rest):
    condition, noise, drift = PAPER.remark_5(beta, local_steps, num_workers, *rest)
    return condition, noise if noise is None else noise / num_workers, drift


WRONG_STATEMENTS: dict[str, Any] = {
    "Lemma 2 without the η̂ on Δu": PAPER._replace(
        lemma_2=lambda power, past, rate: (-rate, -past)),
    "Lemma 2 with (1−β^n)/(1−β)": PAPER._replace(
        lemma_2=lambda power, past, rate: (-rate, -rate * (past + 1 - power))),
    "Lemma 2 with the other sign": PAPER._replace(
        lemma_2=lambda power, past, rate: (rate, rate * past)),
    "Lemma 1 with weight 1": PAPER._replace(lemma_1=lambda power, past, rate: rate),
    "Lemma 1 without the η̂": PAPER._replace(lemma_1=lambda power, past, rate: power + 0 * rate),
    "Lemma 3 with the other sign": PAPER._replace(lemma_3=lambda beta: beta),
    "Lemma 9 with one group more": PAPER._replace(
        lemma_9=lambda step, num_workers: (step + num_workers - 1) // num_workers),
    "Identity without 1−β": PAPER._replace(identity=lambda beta: (beta, 1)),
    "Groups by floor": PAPER._replace(group=lambda index, num_workers: index // num_workers),
}  # fmt: skip
BROKEN_BY_ORDER = {
    "Groups by floor": ("lemma-1", "lemma-2"),
    "Identity without 1−β": ("lemma-3",),
}


def controls() -> dict[str, Control]:
    """Return every negative control by name."""
    found: list[tuple[str, Control]] = []
    for name, (faults, statements) in RULES.items():
        found.append(_caught("every-order", *statements, name=name, rule=faulty(faults)))
    for name, claims in WRONG_STATEMENTS.items():
        lemma = "-".join(name.lower().split()[:2])
        lemmas = BROKEN_BY_ORDER.get(name, (lemma,))
        found.append(_caught("every-order", *lemmas, name=name, claims=claims))
        of_proof = {"Identity without 1−β": ("identity", "lemma-3")}.get(name, lemmas)
        found.append(_caught("induction", *of_proof, name=name, claims=claims))
    for lemma in ("lemma_4", "lemma_10", "lemma_11", "theorem_1"):
        name = f"{lemma.replace('_', ' ').capitalize()} with half the constant"
        statement = lemma.replace("_", "-")
        found.append(_caught("constants", statement, name=name, claims=_less(lemma, 0.5)))
    narrow = faulty(Faults(dtype=jnp.float32))
    add = found.append
    add(
        _caught(
            "constants",
            "remark-5",
            name="Remark 5's γ without K",
            claims=PAPER._replace(remark_5=_remark_5_without_workers),
        )
    )
    add(_caught("server-step", "algorithm-2", name="float32 coefficients", rule=narrow))
    add(_caught("server-step", "algorithm-2", name="n+1 for n", rule=faulty(RULES["n+1 for n"][0])))
    add(
        _caught(
            "server-step",
            "algorithm-1",
            name="AL-SGD with twice the step",
            al_sgd=_changed(al_sgd, lambda x: 2 * x),
        )
    )
    add(
        _caught(
            "server-step",
            "algorithm-3",
            name="local OrMo-DA with OrLoMo's past",
            local_ormo_da=faulty(Faults(swap=True, past=lambda b, n: _past(b, n - 1))),
        )
    )
    add(
        _caught(
            "defaults-and-dtypes",
            "algorithm-2",
            name="another default of β",
            rule=_with(orlomo, momentum=0.99),
        )
    )
    add(
        _caught(
            "defaults-and-dtypes",
            "eq-6",
            name="Eq. (6) from K on",
            delay_adaptive=_eq_6_from(1, strict=True),
        )
    )
    add(
        _caught(
            "defaults-and-dtypes",
            "eq-6",
            name="Eq. (6) with ≥",
            delay_adaptive=_eq_6_from(2, strict=False),
        )
    )
    add(
        _caught(
            "synchronous-rounds",
            "prsgdm",
            name="PRSGDm that adds up",
            prsgdm=lambda k: _changed(prsgdm, lambda x: k * x)(k),
        )
    )
    add(
        _caught(
            "worked-example",
            "figure-1",
            name="floor for ceiling in the group index",
            rule=faulty(RULES["floor for ceiling in the group index"][0]),
        )
    )
    add(_caught("random-runs", "lemma-2", name="float32 coefficients", rule=narrow))
    add(
        _caught(
            "random-runs",
            "lemma-1",
            "lemma-2",
            "lemma-9",
            name="group size K−1",
            rule=faulty(RULES["group size K−1"][0]),
        )
    )
    add(
        _caught(
            "random-runs",
            "lemma-3",
            name="β applied to u but not to w",
            rule=faulty(RULES["β applied to u but not to w"][0]),
        )
    )
    add(
        _caught(
            "random-runs",
            "worker",
            "identity",
            name="a round with β² for β",
            local_momentum_sgd=_forgets_momentum,
        )
    )
    add(
        _caught(
            "server-events",
            "ledger",
            name="no past descent",
            rule=faulty(RULES["no past descent"][0]),
        )
    )
    add(
        _caught("server-events", "ledger", name="a server one step late", parameter_server=_OneLate)
    )
    add(
        _caught(
            "server-events",
            "ledger",
            name="a server that takes anything",
            parameter_server=_TakesAnything,
        )
    )
    add(
        _caught(
            "quadratic-moments",
            "lemma-4",
            name="Lemma 4 with a third of the constant",
            claims=_less("lemma_4", 1 / 3),
        )
    )
    add(
        _caught(
            "quadratic-moments",
            "lemma-10",
            name="Lemma 10 with a sixth of the constant",
            claims=_less("lemma_10", 1 / 6),
        )
    )
    add(
        _caught(
            "quadratic-moments",
            "lemma-11",
            name="Lemma 11 with a twentieth",
            claims=_less("lemma_11", 1 / 20),
        )
    )
    add(
        _caught(
            "quadratic-moments",
            "theorem-1",
            name="Theorem 1 with a tenth",
            claims=_less("theorem_1", 1 / 10),
        )
    )
    add(
        _caught(
            "nonconvex-monte-carlo",
            "lemma-4",
            name="Lemma 4 with a third of the constant",
            claims=_less("lemma_4", 1 / 3),
        )
    )
    add(
        _caught(
            "silent-worker",
            "lemma-11",
            name="η̂ = 1/K in flight",
            claims=PAPER._replace(in_flight_rate=lambda k, virtual, i, t: 1 / k),
        )
    )
    add(
        _caught(
            "delay-facts",
            "delays",
            name="delays that add up to K·T",
            claims=PAPER._replace(delay_sum=lambda k, t: k * t),
        )
    )
    add(
        _caught(
            "delay-facts",
            "delays",
            name="η̂ = 1/K in flight",
            claims=PAPER._replace(in_flight_rate=lambda k, virtual, i, t: 1 / k),
        )
    )
    add(
        _caught(
            "without-momentum-is-al-sgd",
            "remark-1",
            name="one bit off at β = 0",
            rule=_changed(orlomo, lambda x: x * (1 + 2.0**-23)),
        )
    )
    add(
        _caught(
            "one-local-step",
            "remark-2",
            "eq-2",
            name="local OrMo-DA without the newest step",
            local_ormo_da=faulty(Faults(swap=True, past=lambda b, n: _past(b, n) - 1)),
        )
    )
    add(
        _caught(
            "convergence-rate",
            "remark-5",
            name="Remark 5's γ without K",
            claims=PAPER._replace(remark_5=_remark_5_without_workers),
        )
    )
    add(_caught("stationary-error", "remark-4", name="η = ½ for every K", rule=_always_full_rate))
    return dict(found)


def without_past_descent(num_workers: int, **options: Any) -> optax.GradientTransformationExtraArgs:
    """Return an OrLoMo that never makes up for a late report's past descent, to try ``--rule``."""
    return faulty(RULES["no past descent"][0])(num_workers, **options)

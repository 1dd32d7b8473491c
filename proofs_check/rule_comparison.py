"""Compares rules of the field with their exact transcriptions, over random orders of events.

:data:`MOMENTUM` and :data:`BUFFERS` list the rules with hyperparameters. The orders have lost tasks
and workers that join and leave.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from orlomo_jax import LocalUpdate
from orlomo_jax.rules import (
    Correction,
    constant,
    contract,
    hinge,
    look_ahead,
    look_ahead_over_delay,
)
from proofs_check import exact_rules_buffers as buffers
from proofs_check import exact_rules_momentum as exact

K, REPORTS, STEPS = 4, 60, 160
LEAVES = {"a": 3, "b": 2}
START = {name: [0.5 * i - 1.0 for i in range(size)] for name, size in LEAVES.items()}


def rate(step: Any) -> Any:
    """Return a learning rate that is exact in binary and differs between consecutive steps."""
    return 0.25 + 0.125 * (step % 3)


def exact_rate(step: int) -> Fraction:
    """Return :func:`rate` as a fraction."""
    return Fraction(rate(step))


def eta(step: Any) -> Any:
    """Return the learning rate of :func:`proofs_check.exact_rules_buffers.eta` as a float."""
    return (1 + step % 4) / 4


class Strong(exact.HeLoCo):
    """HeLoCo with constants for which both caps bind."""

    ALIGNED, SHRINK, MOST = Fraction(1, 2), Fraction(4), Fraction(1, 4)
    TURN, KAPPA, EPSILON = Fraction(3), Fraction(1, 2), Fraction(1e-4)


class Compared(NamedTuple):
    """A rule with hyperparameters, and its transcription.

    Attributes:
        rule: The rule's name in ``orlomo_jax.rules``.
        args: The arguments of its factory.
        exact: Maps w_0 (rules of mixing and momentum) or nothing (the others) to the transcription.
        options: The keyword arguments of its factory, as pairs.
        dispatch: What workers are sent, as in :class:`orlomo_jax.Method`.
        num_workers: K.
    """

    rule: str
    args: tuple
    exact: Callable[..., Any]
    options: tuple[tuple[str, Any], ...] = ()
    dispatch: Callable[[Any, Any], Any] | None = None
    num_workers: int = K

    def made(self, factory: Callable[..., Any]) -> optax.GradientTransformationExtraArgs:
        """Return the rule from its factory."""
        return factory(*self.args, **dict(self.options))


_MU, _ZERO, _RHO, _HALF = Fraction(0.9), Fraction(), Fraction(0.5), lambda step: Fraction(1, 2)
_AHEAD, _one = look_ahead(0.9, rate), exact.hinge(1, REPORTS)
_STRONG = Correction(0.5, 4.0, 0.25, 3.0, 0.5, 1e-4)
MOMENTUM = {
    "fedasync": Compared(
        "fedasync", (rate,), lambda w: exact.FedAsync(w, exact_rate, exact.inverse_root)),
    "fedasync, hinge": Compared(
        "fedasync", (0.5, hinge(3, 2)), lambda w: exact.FedAsync(w, _HALF, exact.hinge(3, 2))),
    "fedasync, constant": Compared(
        "fedasync", (rate, constant()), lambda w: exact.FedAsync(w, exact_rate, _one)),
    "fedbuff": Compared(
        "fedbuff", (3, rate), lambda w: exact.FedBuff(w, 3, exact_rate, exact.inverse_root)),
    "fedbuff, hinge": Compared(
        "fedbuff", (2, 0.5, hinge(3, 1)), lambda w: exact.FedBuff(w, 2, _HALF, exact.hinge(3, 1))),
    "nesterov": Compared(
        "nesterov", (K, 0.9, rate), lambda w: exact.Nesterov(w, _MU, exact_rate, Fraction(1, K))),
    "delayed_nesterov": Compared(
        "delayed_nesterov", (K, None, 0.9, rate),
        lambda w: exact.DelayedNesterov(w, K, _MU, exact_rate, _ZERO)),
    "delayed_nesterov, c": Compared(
        "delayed_nesterov", (K, 3, 0.9, rate, 0.25),
        lambda w: exact.DelayedNesterov(w, 3, _MU, exact_rate, Fraction(1, 4))),
    "momentum_lookahead": Compared(
        "momentum_lookahead", (K, 0.9, rate),
        lambda w: exact.MomentumLookAhead(w, _MU, exact_rate, _RHO)),
    "delay_lookahead": Compared(
        "delay_lookahead", (K, 0.5**K, rate),
        lambda w: exact.DelayLookAhead(w, K, Fraction(1, 2), exact_rate, Fraction(3, 2)),
        (), look_ahead_over_delay(K, 1.5)),
    "heloco": Compared(
        "heloco", (K, 0.9, rate), lambda w: exact.HeLoCo(w, _MU, exact_rate, _RHO), (), _AHEAD),
    "heloco, strong": Compared(
        "heloco", (K, 0.9, rate), lambda w: Strong(w, _MU, exact_rate, _RHO),
        (("correction", _STRONG),), _AHEAD),
    "heloco, μ = 0": Compared(
        "heloco", (K, 0.0, rate), lambda w: exact.HeLoCo(w, _ZERO, exact_rate, _RHO),
        (), look_ahead(0.0, rate)),
}  # fmt: skip


class Server:
    """A server with a rule of the library, used like those of :mod:`exact_rules_momentum`."""

    def __init__(self, rule: Any, dispatch: Any, step: Callable) -> None:
        """Start at w_0; ``dispatch`` and ``step`` are those of :func:`compiled`."""
        self.params: Any = {name: jnp.array(leaf, float) for name, leaf in START.items()}
        self.state, self._dispatch, self._step = rule.init(self.params), dispatch, step

    def dispatch(self) -> tuple[int, int, Any]:
        """Return the step, the version, and what a worker is sent."""
        step = self.state.step
        sent = self._dispatch(self.state, self.params) if self._dispatch else self.params
        return int(step), int(contract.version_of(self.state, step)), sent

    def receive(self, delta: dict[str, Any], sent: tuple[int, int, Any]) -> None:
        """Apply Δ of a worker that was sent ``sent``."""
        report = LocalUpdate({name: jnp.array(leaf, float) for name, leaf in delta.items()})
        self.params, self.state = self._step(self.params, self.state, report, sent)


@lru_cache(maxsize=256)
def compiled(rule: Any, dispatch: Any) -> tuple[Callable, Any]:
    """Return a compiled step of the rule, and its compiled dispatch."""

    def step(params, state, report, sent):
        at, version, start = sent
        updates, state = rule.update(
            report, state, params,
            dispatched_at=at, dispatched_version=version, worker=0, dispatched_params=start,
            num_local_steps=5, local_learning_rate=0.25,
        )  # fmt: skip
        return optax.apply_updates(params, updates), state

    return jax.jit(step), dispatch and jax.jit(dispatch)


def life(seed: int) -> list[tuple[str, int, Any]]:
    """Draw sends and reports of K workers; tasks are lost, and workers join, leave and return."""
    draws = random.Random(seed)
    busy = set(range(K - 1))
    events: list[tuple[str, int, Any]] = [("sent", worker, None) for worker in range(K - 1)]
    reports = 0
    while reports < REPORTS:
        worker = draws.randrange(K)
        if worker not in busy:
            busy.add(worker)
        elif len(busy) > 1 and draws.random() < 0.1:
            busy.remove(worker)
            continue
        elif draws.random() < 0.75:  # else the task is lost
            empty = draws.choice([None, None, None, *LEAVES])
            delta = {
                name: [0.0 if name == empty else draws.randint(-64, 64) / 16 for _ in range(size)]
                for name, size in LEAVES.items()
            }
            events.append(("report", worker, delta))
            reports += 1
        events.append(("sent", worker, None))
    return events


def disagreement(
    rule: Any, make_exact: Callable[..., Any], seed: int, dispatch: Any = None
) -> tuple[float, dict[str, Any]]:
    """Return the largest error of w and of what is sent, and the exact server of each leaf.

    The error is relative to the largest |w|; it is infinite if a step or version differs.
    """
    with jax.enable_x64(True):
        step, dispatch = compiled(rule, dispatch)
        ours = Server(rule, dispatch, step)
        theirs = {name: make_exact([Fraction(x) for x in leaf]) for name, leaf in START.items()}
        held, error, largest = {}, 0.0, 1.0
        for kind, worker, delta in life(seed):
            if kind == "sent":
                sents = {name: server.dispatch() for name, server in theirs.items()}
                held[worker] = ours.dispatch(), sents
                if {(s.step, s.version) for s in sents.values()} != {held[worker][0][:2]}:
                    return float("inf"), theirs
                pairs = [(held[worker][0][2][name], sents[name].params) for name in LEAVES]
            else:
                sent, sents = held.pop(worker)
                ours.receive(delta, sent)
                for name, server in theirs.items():
                    server.receive([Fraction(x) for x in delta[name]], sents[name])
                pairs = [(ours.params[name], theirs[name].w) for name in LEAVES]
            for got, wanted in pairs:
                wanted = np.array(wanted, float)
                error = np.maximum(error, np.max(np.abs(np.asarray(got) - wanted)))  # keeps NaN
                largest = max(largest, np.max(np.abs(wanted)))
        return float(error / largest), theirs


MU, B1, B2, EPS = 0.75, 0.5, 0.875, 2.0**-10


def _ca2fl(num_workers: int, size: int) -> Compared:
    make = partial(buffers.CA2FL, size, num_workers)
    return Compared("ca2fl", (num_workers, size, eta), make, num_workers=num_workers)


def _fadas(num_workers: int, size: int, threshold: int | None) -> Compared:
    make = partial(buffers.FADAS, size, *map(Fraction, (B1, B2, EPS)), threshold)
    options = (("delay_threshold", threshold),)
    return Compared("fadas", (size, eta, B1, B2, EPS), make, options, num_workers=num_workers)


def _rounds(name: str, make: Any, num_workers: int) -> Compared:
    make = partial(make, num_workers, Fraction(MU))
    return Compared(name, (num_workers, MU, eta), make, num_workers=num_workers)


def _sized(name: str, make: Any, size: int | None, num_workers: int) -> Compared:
    return Compared(name, (size, eta), partial(make, size), num_workers=num_workers)


BUFFERS = {
    "ringmaster R=3": _sized("ringmaster", buffers.Ringmaster, 3, 6),
    "ringmaster R=1": _sized("ringmaster", buffers.Ringmaster, 1, 3),
    "ringmaster": _sized("ringmaster", buffers.Ringmaster, None, 4),
    "rennala B=3": _sized("rennala", buffers.Rennala, 3, 5),
    "rennala B=7": _sized("rennala", buffers.Rennala, 7, 3),
    "rescaled": _sized("rescaled_asgd", buffers.RescaledASGD, 5, 5),
    "ca2fl B=3": _ca2fl(5, 3),
    "ca2fl B=6": _ca2fl(3, 6),
    "fadas B=2": _fadas(6, 2, 2),
    "fadas B=5": _fadas(4, 5, None),
    "local_sgd K=3": _sized("local_sgd", buffers.LocalSGD, 3, 3),
    "fedavgm K=2": _rounds("fedavgm", buffers.FedAvgM, 2),
    "slowmo K=3": _rounds("slowmo", buffers.SlowMo, 3),
    "diloco K=5": _rounds("diloco", buffers.DiLoCo, 5),
}


def facts_of(reports: list[buffers.Report]) -> dict[str, np.ndarray]:
    """Return what the server passes to the rule with some reports, as arrays."""
    return {
        "dispatched_at": np.array([report.dispatched_at for report in reports]),
        "dispatched_version": np.array([report.dispatched_version for report in reports]),
        "worker": np.array([report.worker for report in reports]),
        "local_learning_rate": np.array([float(report.gamma) for report in reports]),
    }


def scanned(rule: Any, size: int = buffers.SIZE) -> Callable[..., Any]:
    """Return a compiled run over (deltas, facts); it returns w and the state after each report."""

    @jax.jit
    def run(deltas, facts):
        def step(carry, inputs):
            params, state, versions, count = carry
            delta, given = inputs
            sent = versions[given["dispatched_at"]]
            updates, state = rule.update(
                LocalUpdate(delta), state, params, dispatched_params=sent, **given
            )
            params, count = params + updates, count + 1
            return (params, state, versions.at[count].set(params), count), (params, state)

        start, versions = jnp.zeros(size), jnp.zeros((len(deltas) + 1, size))
        carry = (start, rule.init(start), versions, 0)
        return jax.lax.scan(step, carry, (deltas, facts))[1]

    return run


def buffer_error(
    run: Callable[..., Any], make: Callable[[], buffers.Rule], reports: list[buffers.Report]
) -> tuple[float, str]:
    """Return a rule's largest relative error and where it is, over a run of :func:`scanned`.

    The error is infinite if a count or an acceptance differs.
    """
    seen = buffers.replay(make(), reports)
    with jax.enable_x64(True):
        deltas = np.stack([report.delta for report in reports]).astype(float)
        params, state = run(deltas, facts_of(reports))
    worst = (0.0, "")
    for field in seen[0]:
        got = params if field == "params" else getattr(state, field, None)
        wanted = np.array([held[field] for held in seen]).astype(float)
        if field in buffers.COUNTS:
            error = 0.0 if got is None or np.array_equal(got, wanted) else float("inf")
        else:
            error = float(np.abs(np.asarray(got) - wanted).max() / np.abs(wanted).max())
        if not error <= worst[0]:
            worst = error, field
    return worst

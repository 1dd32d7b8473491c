"""Checks identities between rules of the field, and with sequential optimizers, in float64."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from orlomo_jax import al_sgd
from proofs_check import exact_rules_buffers as buffers
from proofs_check.registry import Outcome, Size, Subject, field_rule, holds
from proofs_check.rule_comparison import eta, facts_of, scanned

K, REPORTS, GAMMA, ALLOWED = 4, 60, 0.125, 1e-12
DELAY = lambda delay: 1.0 / (2.0 + delay)  # noqa: E731
PAIRS: dict[str, tuple[str, tuple, Callable[..., Any], bool]] = {
    # the statement: (the rule, its arguments, the other rule's, whether the order is synchronous)
    "fedbuff-of-one": ("fedbuff", (1, eta, DELAY), lambda of: al_sgd(K, eta, DELAY), False),
    "ringmaster-without-limit": (
        "ringmaster", (None, eta), lambda of: al_sgd(K, eta, lambda delay: 1.0), False),
    "look-ahead-without-momentum": (
        "momentum_lookahead", (K, 0.0, eta, 0.3), lambda of: al_sgd(K, eta, lambda delay: 0.3),
        False),
    "diloco-without-momentum": (
        "diloco", (K, 0.0, 1.0), lambda of: of("local_sgd")(K), True),
}  # fmt: skip
_SGD = optax.sgd(0.25)
_HEAVY = optax.sgd(0.25, momentum=0.5)
_NESTEROV = optax.sgd(0.25, momentum=0.5, nesterov=True)


def _averaged(momentum: float, rate: float) -> optax.GradientTransformation:
    """Return MLA of one worker: its momentum is an exponential moving average."""
    ema = optax.ema(momentum, debias=False)

    def update(updates, state, params=None):
        mean, state = ema.update(updates, state)
        return jax.tree.map(lambda g, m: -rate * (g + momentum * m), updates, mean), state

    return optax.GradientTransformation(ema.init, update)


SEQUENTIAL: dict[str, tuple[tuple, Any]] = {
    # the rule: (its arguments for K = B = 1, the sequential optimizer of the gradients γg)
    "fedasync": ((0.25,), _SGD),
    "fedbuff": ((1, 0.25), _SGD),
    "nesterov": ((1, 0.5, 0.25), _NESTEROV),
    "delayed_nesterov": ((1, None, 0.5, 0.25), _NESTEROV),
    "momentum_lookahead": ((1, 0.5, 0.25), _averaged(0.5, 0.25)),
    "delay_lookahead": ((1, 0.5, 0.25), _HEAVY),
    "ringmaster": ((1, 0.25), _SGD),
    "rennala": ((1, 0.25), _SGD),
    "rescaled_asgd": ((1, 0.25), _SGD),
    "ca2fl": ((1, 1, 0.25), _SGD),
    "fadas": (
        (1, 0.25),
        optax.amsgrad(0.25, 0.9, 0.99, bias_correction_mu=False, bias_correction_nu=False),
    ),
    "local_sgd": ((1, 0.25), _SGD),
    "fedavgm": ((1, 0.5, 0.25), _HEAVY),
    "slowmo": ((1, 0.5, 0.25), _HEAVY),
    "diloco": ((1, 0.5, 0.25), _NESTEROV),
}


def sequential_rule(name: str, factory: Callable[..., Any]) -> Any:
    """Return a rule of :data:`SEQUENTIAL` from its factory."""
    args, _ = SEQUENTIAL[name]
    return factory(*args, delay_threshold=0) if name == "fadas" else factory(*args)


def optax_run(optimizer: Any, gradients: Any) -> np.ndarray:
    """Return the parameters after each step of an optimizer from 0."""
    params, out = jnp.zeros(gradients.shape[1]), []
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
        out.append(params)
    return np.stack(out)


@lru_cache(maxsize=64)
def drawn(seed: int, synchronous: bool) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return Δ and the facts of a random order of K workers with losses, leaves and joins."""
    make = partial(buffers.LocalSGD, K) if synchronous else partial(buffers.Ringmaster, None)
    reports = buffers.walk(make, K, REPORTS, seed)
    return np.stack([report.delta for report in reports]).astype(float), facts_of(reports)


def one_worker(seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return Δ = γg of a worker with S = 1, and the facts."""
    gradients, steps = np.random.default_rng(seed).normal(size=(REPORTS, 4)), np.arange(REPORTS)
    facts = {"dispatched_at": steps, "dispatched_version": steps, "worker": 0 * steps}
    return GAMMA * gradients, facts | {"local_learning_rate": np.full(REPORTS, GAMMA)}


def _relative(left: Any, right: Any) -> float:
    return float(np.abs(np.asarray(left) - right).max() / np.abs(right).max())


def pair_error(subject: Subject, statement: str, seed: int) -> float:
    """Return the difference of a rule and the rule that it is a special case of."""
    name, args, other, synchronous = PAIRS[statement]
    case = drawn(seed, synchronous)
    ours, theirs = subject.field_rule(name)(*args), other(field_rule)
    return _relative(scanned(ours)(*case)[0], np.asarray(scanned(theirs)(*case)[0]))


def mean_error(subject: Subject, seed: int) -> float:
    """Return the difference of N reports of delayed Nesterov from a Nesterov step on their mean."""
    deltas, facts = drawn(seed, False)
    worst = 0.0
    for size in (K, 5):  # both divide the number of reports
        rule = subject.field_rule("delayed_nesterov")(K, size, 0.9, 0.7)
        got = np.asarray(scanned(rule)(deltas, facts)[0])[size - 1 :: size]
        w = m = np.zeros(buffers.SIZE)
        wanted = []
        for g in deltas.reshape(REPORTS // size, size, -1).mean(1):
            m = 0.9 * m + g
            w = w - 0.7 * (g + 0.9 * m)
            wanted.append(w)
        worst = max(worst, _relative(got, np.stack(wanted)))
    return worst


def equals_error(subject: Subject, seed: int) -> float:
    """Return how far CA2FL's steps are from ηΔ, after all workers have sent the same Δ."""
    size, delta = 4, np.array([2.0, -1.0, 0.5, 3.0])
    checked, facts = np.zeros(REPORTS // size, bool), {}
    while not checked.any():  # an order in which all workers report
        _, facts = drawn(seed, False)
        reported = [len(set(facts["worker"][: n + 1])) for n in range(REPORTS)]
        complete = np.array(reported)[size - 1 :: size] == K
        checked[1:] = complete[:-1]  # h̄ is that of the flush before
        seed += 1000
    rule = subject.field_rule("ca2fl")(K, size, 0.5)
    w = np.asarray(scanned(rule)(np.tile(delta, (REPORTS, 1)), facts)[0])
    changes = np.diff(np.vstack([0 * delta, w]), axis=0)[size - 1 :: size]
    return _relative(changes[checked], np.broadcast_to(-0.5 * delta, changes[checked].shape))


def sequential_error(subject: Subject, seed: int) -> tuple[float, str]:
    """Return the largest difference of a rule from its optimizer, and the rule."""
    worst = (0.0, "")
    deltas, facts = one_worker(seed)
    for name, (_, optimizer) in SEQUENTIAL.items():
        rule = sequential_rule(name, subject.field_rule(name))
        error = _relative(scanned(rule)(deltas, facts)[0], optax_run(optimizer, deltas))
        worst = worst if error <= worst[0] else (error, name)
    return worst


def cycle_delays(times: tuple[int, ...]) -> tuple[int, list[list[int]]]:
    """Return the length of a whole cycle at fixed times t_k, and each worker's delays in it."""
    cycle = int(np.lcm.reduce(times))
    queue = [(time, worker) for worker, time in enumerate(times)]
    heapq.heapify(queue)
    sent, step = [0] * len(times), 0
    delays: list[list[int]] = [[] for _ in times]
    while queue[0][0] <= 3 * cycle:
        now, worker = heapq.heappop(queue)
        if cycle < now <= 2 * cycle:
            delays[worker].append(step - sent[worker])
        step += 1
        sent[worker] = step
        heapq.heappush(queue, (now + times[worker], worker))
    return cycle, delays


TIMES = ((2, 3, 4), (1, 1), (1, 5, 7, 2), (9, 1, 6), (3, 3, 3, 8, 5))


def rescaled_error(subject: Subject) -> float:
    """Return how far the mean weights are from t_k Σ_j 1/t_j / K²; infinite if the delays are."""
    worst = 0.0
    for times in TIMES:
        _, delays = cycle_delays(times)
        rates = sum(Fraction(1, time) for time in times)
        means = [Fraction(sum(d) + len(d), len(d)) for d in delays]
        if means != [time * rates for time in times]:
            return float("inf")
        weight = subject.field_rule("rescaled")(len(times))
        got = np.array([np.mean(weight(np.array(d))) for d in delays])
        worst = max(worst, _relative(got, np.array([float(m) for m in means]) / len(times) ** 2))
    return worst


@holds(
    "delayed-nesterov-mean", "fedbuff-of-one", "ringmaster-without-limit", "ca2fl-of-equals",
    "diloco-without-momentum", "look-ahead-without-momentum", "one-worker", "rescaled-weights",
    strength="property",
)  # fmt: skip
def field_identities(subject: Subject, size: Size) -> Iterator[Outcome]:
    """Check the special cases of the rules, over random orders with losses, leaves and joins."""
    seeds = range(size.seed, size.seed + (3 if size.settings >= 5 else 1))
    found: dict[str, tuple[float, int, str]] = {}
    with jax.enable_x64(True):
        for seed in seeds:
            errors = {name: (pair_error(subject, name, seed), REPORTS) for name in PAIRS}
            errors["delayed-nesterov-mean"] = mean_error(subject, seed), 2 * REPORTS
            errors["ca2fl-of-equals"] = equals_error(subject, seed), REPORTS
            error, where = sequential_error(subject, seed)
            errors["one-worker"] = error, len(SEQUENTIAL) * REPORTS
            errors["rescaled-weights"] = rescaled_error(subject), sum(map(len, TIMES))
            for name, (error, count) in errors.items():
                worst, cases, note = found.get(name, (0.0, 0, ""))
                worst = max(worst, error if error == error else float("inf"))
                found[name] = worst, cases + count, where if name == "one-worker" else note
    for name, (worst, cases, note) in found.items():
        note = f"at worst {note}" if note else "to rounding"
        yield Outcome(name, cases, worst, ALLOWED, worst <= ALLOWED, note)

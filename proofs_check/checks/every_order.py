"""Strength 2 (exhaustive): runs the library's rule on every arrival order of small runs, exactly.

The reports are basis vectors: the Δu of slot s is e_s, its Δw is e_{D+s}, and w_0 is e_{2D}. So u
and w contain the coefficient of each report. A lemma that holds for these coefficients holds for
any reports. β and every η_t are dyadic, so float64 arithmetic is exact and every residual must be
zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from orlomo_jax import LocalUpdate
from proofs_check import sequences
from proofs_check.registry import Outcome, Size, Subject, holds
from proofs_check.sequences import Frame

DYADIC_BETAS = (0.0, 0.5, 0.25, 0.75)
LEMMAS: tuple[str, ...] = ("lemma-1", "lemma-2", "lemma-3", "lemma-9")
CONSTANT_BETA = (3, 4)  # this (K, T) is run again with β as a Python constant
CHUNK = 4096


class Rates(NamedTuple):
    """Holds the rates η_t = by_step[t] · by_delay[τ_t mod P], all dyadic."""

    name: str
    by_step: tuple[float, ...]
    by_delay: tuple[float, ...]

    def steps(self, num_steps: int) -> np.ndarray:
        """Return the learning rate of steps 0 … T+1; a faulty rule may read ahead."""
        return np.resize(self.by_step, num_steps + 2)

    def values(self, of: Frame) -> np.ndarray:
        """Return η_t, [..., T]."""
        by_delay = np.array(self.by_delay)[of.delays % len(self.by_delay)]
        return self.steps(of.num_steps)[: of.num_steps] * by_delay


RATES = (
    Rates("constant", (1.0,), (1.0,) * 4),
    Rates("varying", (1.0, 0.5, 2.0, 0.25, 1.5, 0.75, 3.0), (1.0, 0.25, 0.5, 1.25)),
)


def orders(num_workers: int, num_steps: int) -> Iterator[np.ndarray]:
    """Yield all K^T arrival orders in lexicographic order, in chunks int[≤ CHUNK, T]."""
    product = itertools.product(range(num_workers), repeat=num_steps)
    while chunk := list(itertools.islice(product, CHUNK)):
        yield np.array(chunk)


def momentum_of(state: Any) -> Any:
    """Return u_t from the state of a rule, also if the rule is part of an ``optax.chain``.

    Raises:
        TypeError: If the state does not have a field ``momentum``.
    """
    if hasattr(state, "momentum"):
        return state.momentum
    found = optax.tree.get(state, "momentum")
    if found is None:
        raise TypeError(
            "the rule's state must have a field `momentum` (u_t), like OrLoMoState; "
            f"got {type(state).__name__}"
        )
    return found


@lru_cache(maxsize=64)
def production_run(
    rule: Callable[..., Any], num_workers: int, worker_momentum: bool, momentum: Any = None
) -> Callable[..., Any]:
    """Return a jitted function that runs a batch of orders through a server rule.

    Args:
        rule: The rule factory.
        num_workers: K.
        worker_momentum: Whether the reports carry Δu.
        momentum: β as a Python constant; None makes it a traced argument.

    Returns:
        ``run(indices[B, T], slots[B, T], basis[d, d], beta, by_step, by_delay) -> (u, w)``: u and
        w after each step, each [B, T, d].
    """

    def run_one(dispatched_at, slots, basis, beta, by_step, by_delay):
        num_slots = (basis.shape[0] - 1) // 2
        server = rule(
            num_workers,
            momentum=beta if momentum is None else momentum,
            learning_rate=lambda step: by_step[step],
            delay_weight=lambda delay: by_delay[delay % by_delay.shape[0]],
        )

        def step(carry, arrival):
            params, state, owners = carry
            index, slot, number = arrival
            worker = owners[slot]
            du = basis[slot] if worker_momentum else None
            report = LocalUpdate(delta=basis[num_slots + slot], momentum=du)
            updates, state = server.update(
                report, state, params, dispatched_at=index, worker=worker
            )
            params = optax.apply_updates(params, updates)
            owners = owners.at[num_workers + number].set(worker, mode="drop")
            return (params, state, owners), (momentum_of(state), params)

        start, numbers = basis[-1], jnp.arange(len(slots))
        # Slots 0 … K−1 are the workers' first rounds; step t dispatches slot K + t.
        carry = start, server.init(start), jnp.arange(num_slots) % num_workers
        _, history = jax.lax.scan(step, carry, (dispatched_at, slots, numbers))
        return history

    return jax.jit(jax.vmap(run_one, in_axes=(0, 0, None, None, None, None)))


class Basis(NamedTuple):
    """The reports of D slots as coefficient vectors in d = 2D+1 dimensions."""

    eye: np.ndarray
    du: np.ndarray
    dw: np.ndarray
    dh: np.ndarray
    start: np.ndarray


def basis(num_slots: int, beta: Any, subject: Subject) -> Basis:
    """Return the basis, with Δh from the identity Δh = βΔu + (1−β)Δw."""
    eye = np.eye(2 * num_slots + 1)
    dw = eye[num_slots : 2 * num_slots]
    du = eye[:num_slots] if subject.worker_momentum else dw
    of_u, of_w = subject.claims.identity(beta)
    return Basis(eye, du, dw, of_u * du + of_w * dw, eye[-1])


def in_flight_rates(num_slots: int) -> np.ndarray:
    """Return dyadic values for the η̂ of reports that never arrive; any values will do."""
    return np.resize([3.0, -0.5, 1.25, 0.0, -2.0], num_slots)


def residuals(
    subject: Subject, of: Frame, beta: float, rates: Rates, u: np.ndarray, w: np.ndarray
) -> dict[str, np.ndarray]:
    """Return |left − right| of each lemma for every order and step, [T, B].

    Lemmas 3 and 9 contain only auxiliary sequences. Each is checked as printed, and again with û
    and ŵ computed from the server's u and w by Lemmas 1 and 2.

    Args:
        subject: Gives the claims to check.
        of: The frame of B orders.
        beta: β.
        rates: η.
        u: u_{t+1} of the production rule, [B, T, d].
        w: w_{t+1} of the production rule, [B, T, d].
    """
    num_slots = of.index.shape[0]
    it = basis(num_slots, beta, subject)
    hat = sequences.hat_rates(of, rates.values(of), in_flight_rates(num_slots))
    table = sequences.powers(beta, of.num_steps + 2)
    hats = sequences.auxiliary(of, beta, hat, it.du, it.dw, it.dh, it.start)
    sum_u, sum_w = sequences.in_flight_sums(of, table, hat, it.du, it.dw, subject.claims)
    grouped = sequences.lemma_9_sums(of, table, hat, it.du, subject.claims)
    u, w = np.moveaxis(u, -2, 0), np.moveaxis(w, -2, 0)
    factor = subject.claims.lemma_3(beta)

    def worst(*differences):
        return np.max([np.abs(x).max(-1) for x in differences], 0)

    return {
        "lemma-1": worst(hats.u - u - sum_u),
        "lemma-2": worst(hats.w - w - sum_w),
        "lemma-3": worst(
            hats.scaled_y - (1 - beta) * hats.w - factor * hats.u,
            hats.scaled_y - (1 - beta) * (w + sum_w) - factor * (u + sum_u),
        ),
        "lemma-9": worst(hats.u - grouped, u + sum_u - grouped),
    }


def run_orders(
    subject: Subject, workers: np.ndarray, num_workers: int, beta: float, rates: Rates, run=None
) -> dict[str, np.ndarray]:
    """Run the subject's rule on a batch of orders int[B, T] and return the residuals."""
    of = sequences.frame(workers, num_workers)
    num_slots = of.index.shape[0]
    padding = [(0, -len(workers) % CHUNK if len(workers) > CHUNK // 2 else 0), (0, 0)]
    with jax.enable_x64(True):
        if run is None:
            run = production_run(subject.rule, num_workers, subject.worker_momentum)
        u, w = run(
            jnp.asarray(np.pad(of.dispatched_at, padding)),
            jnp.asarray(np.pad(of.used, padding)),
            jnp.asarray(np.eye(2 * num_slots + 1)),
            jnp.asarray(beta),
            jnp.asarray(rates.steps(of.num_steps)),
            jnp.asarray(rates.by_delay),
        )
        u, w = np.asarray(u)[: len(workers)], np.asarray(w)[: len(workers)]
    return residuals(subject, of, beta, rates, u, w)


@holds(*LEMMAS, strength="exhaustive", rule_only=True)
def every_order(subject: Subject, size: Size) -> Iterator[Outcome]:
    """Run all K^T orders for each (K, T), each dyadic β and both η; residuals must be zero."""
    worst: dict[str, float] = dict.fromkeys(LEMMAS, 0.0)
    found: dict[str, dict[str, Any] | None] = dict.fromkeys(LEMMAS)
    cases = 0
    for num_workers, num_steps in size.exhaustive:
        with jax.enable_x64(True):
            traced = production_run(subject.rule, num_workers, subject.worker_momentum)
            constant = {
                beta: production_run(subject.rule, num_workers, subject.worker_momentum, beta)
                for beta in DYADIC_BETAS
                if (num_workers, num_steps) == CONSTANT_BETA  # the same rule, β compiled in
            }
        for workers in orders(num_workers, num_steps):
            cases += len(workers)
            for beta, rates in itertools.product(DYADIC_BETAS, RATES):
                for run in filter(None, (traced, constant.get(beta))):
                    by_lemma = run_orders(subject, workers, num_workers, beta, rates, run)
                    for lemma, residual in by_lemma.items():
                        residual = np.where(np.isfinite(residual), residual, np.inf)
                        worst[lemma] = max(worst[lemma], float(residual.max()))
                        if residual.max() > 0 and found[lemma] is None:
                            found[lemma] = _first(workers, num_workers, beta, rates, residual)
    if size.minimize:
        found |= _minimal(subject, {lemma for lemma in LEMMAS if found[lemma]})
    note = f"K^T orders of {' '.join(f'{k}^{t}' for k, t in size.exhaustive)}, 4 β × 2 η each"
    for lemma in LEMMAS:
        passed = worst[lemma] == 0
        yield Outcome(lemma, cases, worst[lemma], 0.0, passed, note, found[lemma])


def replay(subject: Subject, statement: str, case: dict[str, Any]) -> tuple[float, float]:
    """Run a counterexample of :func:`every_order` again; return its residual and allowance (0)."""
    rates = Rates("replayed", tuple(case["by_step"]), tuple(case["by_delay"]))
    workers = np.array(case["trace"]["workers"])[None]
    constant = case["beta"] if case["constant"] else None
    with jax.enable_x64(True):
        run = production_run(
            subject.rule, case["trace"]["num_workers"], subject.worker_momentum, constant
        )
    by_lemma = run_orders(subject, workers, case["trace"]["num_workers"], case["beta"], rates, run)
    return float(by_lemma[statement].max()), 0.0


def case(workers, num_workers: int, beta: float, rates: Rates, constant: bool) -> dict[str, Any]:
    """Return a case for :func:`replay`, ready for JSON."""
    return {
        "trace": {
            "format": "orlomo_jax.ArrivalTrace",
            "num_workers": int(num_workers),
            "workers": np.asarray(workers).tolist(),
        },
        "beta": beta,
        "by_step": list(rates.by_step),
        "by_delay": list(rates.by_delay),
        "constant": constant,
    }


def _first(workers, num_workers, beta, rates, residual) -> dict[str, Any]:
    """Return the order of a batch that fails first, cut off at its failing step."""
    step = int(np.argmax(residual.max(1) > 0))
    order = int(np.argmax(residual[step] > 0))
    return case(workers[order, : step + 1], num_workers, beta, rates, False)


def _minimal(subject: Subject, lemmas: set[str]) -> dict[str, dict[str, Any]]:
    """Return each lemma's smallest failing case: fewest steps, then constant η, then smallest K."""
    found: dict[str, dict[str, Any]] = {}
    with jax.enable_x64(True):
        runs = {k: production_run(subject.rule, k, subject.worker_momentum) for k in (1, 2, 3)}
    for num_steps, rates, num_workers, beta in itertools.product(
        (1, 2, 3, 4), RATES, runs, DYADIC_BETAS
    ):
        if lemmas <= found.keys():
            break
        batch = np.concatenate(list(orders(num_workers, num_steps)))
        try:
            by_lemma = run_orders(subject, batch, num_workers, beta, rates, runs[num_workers])
        except Exception:  # a user's rule may reject some K; keep the cases of the others
            continue
        for lemma in lemmas - found.keys():
            if (by_lemma[lemma] > 0).any():
                found[lemma] = _first(batch, num_workers, beta, rates, by_lemma[lemma])
    return found

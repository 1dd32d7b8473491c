"""Strength 4 (statistical): measures the bounds on problems with known L, σ² and F*.

**Exact second moments.** On F(w) = Σ_j ½λ_j w_j² with additive noise, all values that the workers
and the server compute are affine in the noise. So each w_j is replaced by a vector of coefficients:
column 0 is the mean, and column c is the coefficient of the c-th unit noise. The library runs on
ordinary parameters of shape [J, 1+N], and E‖x‖² is the sum of squares. There is no sampling, so
there is no statistical error.

**Monte Carlo.** On F(w) = Σ_j w_j²/(1+w_j²) (L = 2, F* = 0) with Gaussian noise, left/right is
estimated with a 99.9 % confidence limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from proofs_check import sequences
from proofs_check.cases import arrival_order
from proofs_check.claims import Claims
from proofs_check.registry import Outcome, Size, Subject, holds
from proofs_check.sequences import Frame
from proofs_check.training_run import Recorded, recorded, training_run

BOUNDS = ("lemma-4", "lemma-10", "lemma-11", "theorem-1")
SETTINGS = ((1, 2, 24), (2, 1, 30), (3, 4, 30), (4, 2, 60), (8, 3, 60))  # (K, S, T)
KINDS = ("homogeneous", "heterogeneous", "one slow", "silent", "bursts")
BETAS = (0.0, 0.5, 0.9)
NORMAL_999 = 3.2905  # two-sided 99.9 %


class Sides(NamedTuple):
    """Both sides of a bound: arrays over replicates, or single values if they are exact."""

    left: np.ndarray
    right: np.ndarray

    def ratio(self) -> tuple[float, float]:
        """Return left/right and its upper confidence limit (delta method); 0 if left is 0."""
        left, right = np.mean(self.left), np.mean(self.right)
        if left == 0:
            return 0.0, 0.0
        ratio, count = left / right, np.size(self.left)
        spread = np.std(self.left - ratio * self.right, ddof=1) if count > 1 else 0.0
        return float(ratio), float(ratio + NORMAL_999 * spread / np.sqrt(count) / right)


class Worst(NamedTuple):
    """The tightest case of a bound: both sides, their ratio, its confidence limit, the setting."""

    left: float
    right: float
    ratio: float
    upper: float
    where: str


def quadratic(params: Any, batch: Any) -> jax.Array:
    """Return Σ_j ½λ_j‖w_j‖² + a_j w_{j,c}; its gradient is λ_j w_j plus a_j times unit noise c."""
    curvature, amplitude, column = batch
    return jnp.sum(curvature * jnp.sum(params**2, -1)) / 2 + jnp.sum(amplitude * params[:, column])


def bounded(params: Any, noise: Any) -> jax.Array:
    """Return Σ_j w_j²/(1+w_j²) + noise·w; F'' is in [−½, 2], so L = 2; F* = 0."""
    return jnp.sum(params**2 / (1 + params**2) + noise * params)


def bounded_gradient(w: np.ndarray) -> np.ndarray:
    """Return ∇F of :func:`bounded`."""
    return 2 * w / (1 + w**2) ** 2


@lru_cache(maxsize=64)
def _run(subject: Subject, loss, num_workers: int, local_steps: int, num_steps: int, many: bool):
    run = training_run(subject, loss, num_workers, local_steps, num_steps)
    return jax.jit(jax.vmap(run, in_axes=(*[None] * 5, 0, *[None] * 5))) if many else run


def _tables(of: Frame, num_steps: int) -> tuple[Any, ...]:
    return (
        num_steps,
        *(jnp.asarray(x, jnp.int32) for x in (of.workers, of.dispatched_at, of.used)),
    )


def _eq_6(num_steps: int) -> tuple[Any, ...]:
    ones = jnp.ones(num_steps + 2)
    return ones, ones, True


def exact_run(
    subject: Subject, of: Frame, local_steps: int, beta, gamma, curvature, amplitude, start
) -> Recorded:
    """Run the quadratic under Eq. (6) on coefficient vectors; the last axis has size J·(1+N).

    Args:
        subject: Gives rule and round.
        of: The arrival order.
        local_steps: S.
        beta: β.
        gamma: γ.
        curvature: λ, [J].
        amplitude: Standard deviation of each coordinate's noise, [J].
        start: w_0, [J].
    """
    num_steps, num_slots = of.num_steps, of.index.shape[0]
    slots = of.num_workers + num_steps
    noises = num_slots * local_steps if np.any(amplitude) else 0
    columns = np.minimum(1 + np.arange(slots * local_steps), noises).reshape(slots, local_steps)
    params = np.zeros((len(start), 1 + noises))
    params[:, 0] = start
    with jax.enable_x64(True):
        batches = tuple(
            jnp.broadcast_to(jnp.asarray(x), (slots, local_steps, len(start)))
            for x in (curvature, amplitude)
        )
        output = _run(subject, quadratic, of.num_workers, local_steps, num_steps, False)(
            jnp.asarray(params), *_tables(of, num_steps), (*batches, jnp.asarray(columns)),
            jnp.asarray(gamma), jnp.asarray(beta), *_eq_6(num_steps),
        )  # fmt: skip
        return recorded(output, of)


def sides(
    claims: Claims, of: Frame, run: Recorded, beta, gamma, sigma, smoothness, gap, square, gradient
) -> dict[str, Sides]:
    """Return both sides of every bound for one setting.

    Args:
        claims: The bounds.
        of: The frame.
        run: The recorded run; leading axes are replicates.
        beta: β.
        gamma: γ.
        sigma: σ.
        smoothness: L.
        gap: F(w_0) − F*.
        square: Maps [..., d] to the contribution to E‖·‖², [...].
        gradient: ∇F, from [..., d] to [..., d].
    """
    num_workers, num_steps = of.num_workers, of.num_steps
    local_steps = run.local.shape[-2]
    start = run.local[..., 0, 0, :]
    rates = np.array([a / b for a, b in (claims.delay_adaptive(num_workers, d) for d in of.delays)])
    virtual = [claims.in_flight_rate(num_workers, num_steps - i, i, num_steps) for i in of.index]
    hat = sequences.hat_rates(of, rates, np.array(virtual))
    of_u, of_w = claims.identity(beta)
    dh = of_u * run.du + of_w * run.dw
    hats = sequences.auxiliary(of, beta, hat, run.du, run.dw, dh, start)
    steps = np.arange(1, num_steps)  # t = 1 … T−1; x_t is at [t−1]
    later = hat[num_workers - 1 + steps]  # η̂_{t,k_{t−1}}
    server = np.moveaxis(run.w, -2, 0)

    def over_time(x):
        return np.tensordot(later, square(x)[: num_steps - 1], 1)

    drift = square(run.local - run.local[..., :1, :]).sum(-1)  # [..., D]
    slopes = square(gradient(run.local)).sum(-1)  # Σ_s ‖∇F(w̃_s)‖², [..., D]
    noise_4, slope_4 = claims.lemma_4(gamma, beta, local_steps)
    noise_10, slope_10 = claims.lemma_10(gamma, beta, local_steps, num_workers)
    noise_11, slope_11 = claims.lemma_11(gamma, beta, local_steps, num_workers)
    of_gap, of_noise = claims.theorem_1(
        gamma, beta, local_steps, num_workers, num_steps, smoothness
    )
    weighed = hat * slopes
    short = num_workers + max(num_steps - 2, 0)  # H' and G' stop at T−2
    right_4 = noise_4 * sigma**2 + slope_4 * slopes
    worst = int(np.argmax(_mean(drift) / np.maximum(_mean(right_4), 1e-300)))
    average = hat[:num_workers].sum() * square(gradient(start)) + over_time(gradient(server))
    ones = np.ones_like(slopes[..., 0])
    return {
        "lemma-4": Sides(drift[..., worst], right_4[..., worst]),
        "lemma-10": Sides(
            over_time((hats.scaled_y / (1 - beta)) - hats.w),
            noise_10 * sigma**2 * hat.sum() * ones + slope_10 * weighed.sum(-1),
        ),
        "lemma-11": Sides(
            over_time(hats.w - server),
            noise_11 * sigma**2 * hat[:short].sum() * ones
            + slope_11 * weighed[..., :short].sum(-1),
        ),
        "theorem-1": Sides(average / hat.sum(), (of_gap * gap + of_noise * sigma**2) * ones),
    }


def _mean(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1]).mean(0)


def learning_rate(beta: float, smoothness: float, local_steps: int, share: float) -> float:
    """Return ``share`` times the largest γ that satisfies Theorem 1's 16LSγ ≤ (1−β)²."""
    return share * (1 - beta) ** 2 / (16 * smoothness * local_steps)


@holds(*BOUNDS, strength="statistical")
def quadratic_moments(subject: Subject, size: Size) -> Iterator[Outcome]:
    """Compare both sides by exact second moments, for several K, S, T, β, γ and delays."""
    worst: dict[str, Worst] = {}
    cases = 0
    curvature, start = np.array([1.0, 0.1]), np.array([1.0, -2.0])
    gap = float((curvature * start**2).sum() / 2)
    for index, (num_workers, local_steps, num_steps) in enumerate(SETTINGS[: size.settings]):
        for number, beta in enumerate(BETAS):
            kind = KINDS[(index + number) % len(KINDS)]
            of = sequences.frame(
                arrival_order(kind, num_workers, num_steps, size.seed + number), num_workers
            )
            largest = learning_rate(beta, 1.0, local_steps, 1.0)
            for gamma, sigma in ((largest, 1.0), (largest, 0.0), (8 * largest, 3.0)):
                amplitude = sigma * np.sqrt([0.75, 0.25])
                run = exact_run(subject, of, local_steps, beta, gamma, curvature, amplitude, start)
                columns = run.w.shape[-1] // 2

                both = sides(
                    subject.claims, of, run, beta, gamma, sigma, 1.0, gap,
                    lambda x: np.square(x).sum(-1),
                    lambda x, n=columns: x * np.repeat(curvature, n),
                )  # fmt: skip
                cases += 1
                for statement in BOUNDS:
                    if statement == "theorem-1" and gamma > largest:
                        continue
                    where = f"K={num_workers} S={local_steps} T={num_steps} β={beta} {kind}"
                    _keep(worst, statement, both[statement], where)
    yield from _verdicts(worst, cases, "exact")


@holds(*BOUNDS, strength="statistical")
def nonconvex_monte_carlo(subject: Subject, size: Size) -> Iterator[Outcome]:
    """Compare both sides by Monte Carlo on a non-convex problem, with confidence limits."""
    worst: dict[str, Worst] = {}
    cases, dimension, sigma, smoothness = 0, 3, 1.0, 2.0
    for index, (num_workers, local_steps, num_steps) in enumerate(SETTINGS[: size.settings]):
        kind, beta = KINDS[index % len(KINDS)], (0.0, 0.5, 0.9, 0.0, 0.7)[index]
        of = sequences.frame(arrival_order(kind, num_workers, num_steps, size.seed), num_workers)
        gamma = learning_rate(beta, smoothness, local_steps, 1.0)
        draws = np.random.default_rng([size.seed, index])
        slots = num_workers + num_steps
        noise = draws.normal(size=(size.replicates, slots, local_steps, dimension))
        noise *= sigma / np.sqrt(dimension)
        start = np.array([1.5, -0.7, 3.0])
        with jax.enable_x64(True):
            output = _run(subject, bounded, num_workers, local_steps, num_steps, True)(
                jnp.asarray(start), *_tables(of, num_steps), jnp.asarray(noise),
                jnp.asarray(gamma), jnp.asarray(beta), *_eq_6(num_steps),
            )  # fmt: skip
        num_slots = of.index.shape[0]
        w, u, du, dw, local = (np.asarray(x) for x in output)
        run = Recorded(w, u, *(x[:, :num_slots] for x in (du, dw, local)))
        gap = float((start**2 / (1 + start**2)).sum())
        both = sides(
            subject.claims, of, run, beta, gamma, sigma, smoothness, gap,
            lambda x: np.square(x).sum(-1), bounded_gradient,
        )  # fmt: skip
        cases += size.replicates
        for statement in BOUNDS:
            where = f"K={num_workers} S={local_steps} T={num_steps} β={beta} {kind}"
            _keep(worst, statement, both[statement], where)
    yield from _verdicts(worst, cases, "with 99.9 % confidence")


@holds("lemma-11", strength="statistical")
def silent_worker(subject: Subject, size: Size) -> Iterator[Outcome]:
    """Check Lemma 11 when a worker is silent for 8000 steps; a wrong in-flight η̂ violates it."""
    num_workers, local_steps, num_steps, beta = 4, 2, 8000, 0.9
    order = 1 + np.arange(num_steps) % (num_workers - 1)
    of = sequences.frame(order, num_workers)
    gamma = learning_rate(beta, 1.0, local_steps, 16.0)  # Lemma 11 has no condition on γ
    one, zero = np.ones(1), np.zeros(1)
    run = exact_run(subject, of, local_steps, beta, gamma, one, zero, one)
    both = sides(
        subject.claims, of, run, beta, gamma, 0.0, 1.0, 0.5,
        lambda x: np.square(x).sum(-1), lambda x: x,
    )["lemma-11"]  # fmt: skip
    worst: dict[str, Worst] = {}
    _keep(worst, "lemma-11", both, "worker 0 silent for T = 8000")
    yield from _verdicts(worst, 1, "exact")


def _keep(worst: dict[str, Worst], statement: str, both: Sides, where: str) -> None:
    """Keep the setting with the largest confidence limit of the ratio."""
    ratio, upper = both.ratio()
    if statement not in worst or not upper <= worst[statement].upper:
        left, right = float(np.mean(both.left)), float(np.mean(both.right))
        worst[statement] = Worst(left, right, ratio, upper, where)


def _verdicts(worst: dict[str, Worst], cases: int, how: str) -> Iterator[Outcome]:
    """Yield the outcome of each bound at its tightest setting."""
    for statement, it in worst.items():
        limit = f", at most {it.upper:.3f}" if it.upper > it.ratio else ""
        note = f"left/right = {it.ratio:.3f}{limit} ({how}), tightest at {it.where}"
        yield Outcome(statement, cases, it.left, it.right, it.upper <= 1, note)

"""Checks details of the rules: defaults, dtypes, Eq. (6), PRSGDm, and the paper's Figure 1."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from orlomo_jax import LocalUpdate, local_ormo_da, orlomo
from proofs_check.checks.every_order import momentum_of
from proofs_check.checks.server_step import (
    ROUNDINGS,
    Step,
    compare,
    places,
    read_step,
    stated,
    without_momentum,
)
from proofs_check.registry import Outcome, Size, Subject, holds


@holds("algorithm-1", "algorithm-2", "algorithm-3", "eq-6", strength="exhaustive")
def defaults_and_dtypes(subject: Subject, size: Size) -> Iterator[Outcome]:
    """Check the defaults (β = 0.9, Eq. (6)), and that float32 and bfloat16 leaves keep their dtype.

    Eq. (6) itself is checked for many K and delays.
    """
    claims, num_workers = subject.claims, 4
    at = places(num_workers, 12, 60, size.seed)
    fractions = [claims.delay_adaptive(num_workers, d) for d in (at.step - at.index).tolist()]
    rates = np.array([numerator / denominator for numerator, denominator in fractions])
    for statement, rule, claim in (
        ("algorithm-1", without_momentum(subject.al_sgd), claims.algorithm_1),
        ("algorithm-2", subject.rule, claims.algorithm_2),
        ("algorithm-3", subject.local_ormo_da, claims.algorithm_3),
    ):
        with jax.enable_x64(True):
            expected = stated(claim, subject, num_workers, at, 0.9, rates)
            default = read_step(rule, num_workers, "unset", delay_weight=None)
            _, relative = compare(default, at, 0.9, expected)
        worst, allowed = float(relative.max()), ROUNDINGS * 2.0**-53
        kinds = [(jnp.float32, {}), (jnp.bfloat16, {})]
        if rule is orlomo or rule is local_ormo_da:
            kinds.append((jnp.bfloat16, {"accumulator_dtype": jnp.float32}))
        for dtype, options in kinds:
            error = _in_dtype(rule, num_workers, dtype, options, at, expected)
            worst = worst if error <= 1 else max(worst, error)
        yield Outcome(
            statement, 3 * len(at.step), worst, allowed, worst <= allowed, "defaults; leaf dtypes"
        )
    yield _eq_6(subject)


def _in_dtype(rule, num_workers, dtype, options, at: Step, expected) -> float:
    """Return the largest error of a step on leaves of a dtype, divided by the allowed error.

    The arithmetic between roundings to the leaf's dtype is in float32 or wider. A coefficient of
    u_{t+1} is rounded to that dtype once, one of w_{t+1} at most a few times. A wrong dtype returns
    infinity.
    """
    server = rule(num_workers, **options)
    kept = options.get("accumulator_dtype", dtype)
    values = 1 + np.random.default_rng(0).integers(0, 128, (len(at.step), 4)) / 128  # exact in both

    @jax.jit
    @jax.vmap
    def step(step, index, values):
        u, du, dw, w = jnp.diag(values).astype(dtype)
        state = server.init(w)._replace(step=step)
        if "momentum" in state._fields:
            state = state._replace(momentum=u.astype(kept))
        updates, after = server.update(LocalUpdate(dw, du), state, w, dispatched_at=index)
        new_u = momentum_of(after) if "momentum" in state._fields else jnp.zeros(4, kept)
        return new_u, updates

    places = (jnp.asarray(at.step, jnp.int32), jnp.asarray(at.index, jnp.int32))
    new_u, new_w = step(*places, jnp.asarray(values, jnp.float32))
    if new_u.dtype != kept or new_w.dtype != dtype:
        return float("inf")
    worst = 0.0
    for got, want, leaf, roundings in (
        (new_u, expected[0], kept, 0.5),
        (new_w, expected[1], dtype, 4.0),
    ):
        want = want.astype(float)
        got = np.asarray(got, float)[:, :3] / values[:, :3]
        share = roundings * float(jnp.finfo(leaf).eps)
        error = np.abs(got - want) / np.maximum(np.abs(want), 2.0**-20)
        worst = max(worst, float(error.max()) / (share + ROUNDINGS * 2.0**-24))
    return worst


def _eq_6(subject: Subject) -> Outcome:
    worst, cases, where = 0.0, 0, ""
    with jax.enable_x64(True):
        for num_workers in (1, 2, 3, 5, 8, 16, 100):
            delays = np.unique(np.append(np.arange(5 * num_workers), [10**4, 10**6, 2**31 - 1]))
            got = np.asarray(subject.delay_adaptive(num_workers)(jnp.asarray(delays)))
            pairs = [subject.claims.delay_adaptive(num_workers, d) for d in delays.tolist()]
            want = np.array([numerator / denominator for numerator, denominator in pairs])
            difference = np.abs(got - want)
            cases += len(delays)
            if difference.max() > worst:
                worst = float(difference.max())
                where = f"K={num_workers} τ={delays[np.argmax(difference > 0)]}"
    return Outcome("eq-6", cases, worst, 0.0, worst == 0, where or "every τ < 5K, to the bit")


@holds("prsgdm", strength="exhaustive")
def synchronous_rounds(subject: Subject, size: Size) -> Iterator[Outcome]:
    """Check that PRSGDm changes nothing until a round's K-th report, then averages w and u.

    The result must be exact.
    """
    worst, cases = 0.0, 0
    with jax.enable_x64(True):
        for num_workers in (1, 2, 4, 8):
            server = subject.prsgdm(num_workers)
            rounds = 3
            eye = np.eye(2 * rounds * num_workers + 1)
            params, state = jnp.asarray(eye[-1]), server.init(jnp.asarray(eye[-1]))
            update = jax.jit(server.update)
            want_u, want_w = 0 * eye[-1], eye[-1]
            for t in range(rounds * num_workers):
                report = LocalUpdate(jnp.asarray(eye[2 * t]), jnp.asarray(eye[2 * t + 1]))
                at = num_workers * (t // num_workers)
                updates, state = update(report, state, params, dispatched_at=at)
                params = optax.apply_updates(params, updates)
                if (t + 1) % num_workers == 0:
                    want_w = want_w - eye[2 * at : 2 * t + 1 : 2].sum(0) / num_workers
                    want_u = eye[2 * at + 1 : 2 * t + 2 : 2].sum(0) / num_workers
                cases += 1
                difference = max(
                    np.abs(np.asarray(params) - want_w).max(),
                    np.abs(np.asarray(momentum_of(state)) - want_u).max(),
                    abs(int(state.step) - t - 1),
                )
                worst = max(worst, float(difference))
    yield Outcome("prsgdm", cases, worst, 0.0, worst == 0, "K = 1, 2, 4, 8: exact")


@holds("figure-1", strength="exhaustive")
def worked_example(subject: Subject, size: Size) -> Iterator[Outcome]:
    """Replay Figure 1 (K = 3, t = 8) and read the printed weights in u_9 and w_9."""
    order, indices = [0, 2, 1, 2, 1, 1, 2, 2, 0], [0, 0, 0, 2, 3, 5, 4, 7, 1]
    beta, groups = 0.5, np.array([0, 0, 0, 1, 1, 2, 2, 3, 1])
    with jax.enable_x64(True):
        server = subject.rule(3, momentum=beta, delay_weight=lambda delay: 0.25)
        eye = jnp.eye(2 * len(order) + 1)
        params, state = eye[-1], server.init(eye[-1])
        for t, index in enumerate(indices):
            report = LocalUpdate(eye[len(order) + t], eye[t])
            updates, state = server.update(report, state, params, dispatched_at=index)
            params = optax.apply_updates(params, updates)
        u, w = np.asarray(momentum_of(state)), np.asarray(params)
    past = np.array([0, beta, beta + beta**2, beta + beta**2 + beta**3])
    want_u = np.concatenate([0.25 * beta ** (3.0 - groups), np.zeros(len(order) + 1)])
    want_w = np.concatenate([-0.25 * past[3 - groups], np.full(len(order), -0.25), [1.0]])
    worst = float(max(np.abs(u - want_u).max(), np.abs(w - want_w).max()))
    yield Outcome("figure-1", 1, worst, 0.0, worst == 0, "u_9 and w_9 as printed")

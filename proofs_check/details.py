"""Details of the library's rules: defaults, dtypes, Eq. (6), PRSGDm, and the paper's Figure 1."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from orlomo_jax import LocalUpdate
from proofs_check.exhaustive import momentum_of
from proofs_check.one_step import (
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
    """The defaults are β = 0.9 and Eq. (6); float32 and bfloat16 leaves keep their dtype."""
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
        for dtype in (jnp.float32, jnp.bfloat16):
            kept, error = _in_dtype(rule, num_workers, dtype, at, expected)
            allowed_here = ROUNDINGS * 2.0**-24 + 4 * float(jnp.finfo(dtype).eps)
            if not kept or error > allowed_here:
                worst = max(worst, 1.0 if not kept else error)
        yield Outcome(
            statement, 3 * len(at.step), worst, allowed, worst <= allowed, "defaults; leaf dtypes"
        )
    yield _eq_6(subject)


def _in_dtype(rule, num_workers, dtype, at: Step, expected) -> tuple[bool, float]:
    """Return whether a leaf keeps its dtype, and the largest relative error."""
    server = rule(num_workers)
    u, du, dw, w = jnp.eye(4, dtype=dtype)

    @jax.jit
    @jax.vmap
    def step(step, index):
        state = server.init(w)._replace(step=step)
        if "momentum" in state._fields:
            state = state._replace(momentum=u)
        updates, after = server.update(LocalUpdate(dw, du), state, w, dispatched_at=index)
        new_u = momentum_of(after) if "momentum" in state._fields else jnp.zeros(4, dtype)
        return new_u, optax.apply_updates(w, updates)

    step_at, index_at = jnp.asarray(at.step, jnp.int32), jnp.asarray(at.index, jnp.int32)
    new_u, new_w = step(step_at, index_at)
    kept = new_u.dtype == dtype and new_w.dtype == dtype
    got = np.concatenate([np.asarray(new_u, float)[:, :3], np.asarray(new_w, float)[:, :3]], 1)
    want = np.concatenate(expected, 1).astype(float)
    return kept, float((np.abs(got - want) / np.maximum(np.abs(want), 2.0**-20)).max())


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
    """PRSGDm changes nothing before a round's K-th report, then averages w and u; exactly."""
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

"""Strength 3 (property): checks the lemmas on training runs with random and adversarial delays."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from proofs_check import rounding, sequences
from proofs_check.cases import MAX_STEPS, Case, cases
from proofs_check.optional import need
from proofs_check.registry import Outcome, Size, Subject, holds
from proofs_check.training_run import Recorded, gradients, recorded, training_run

STATEMENTS = ("worker", "identity", "lemma-1", "lemma-2", "lemma-3", "lemma-9")
TREES: dict[str, tuple[Any, int]] = {  # params as shapes, and S
    "scalar": ((), 1),
    "vector": ((5,), 3),
    "nested": ({"kernels": [(2, 3), (3,)], "bias": ()}, 2),
    "mixed": ([{"scale": (1, 1, 2)}, [(), (4,)]], 4),
}


def loss(params: Any, batch: Any) -> jax.Array:
    """Return Σ x²/(1+x²) + batch·x + (Σ x)²/20 of any tree; the last term couples all leaves."""
    x, noise = ravel_pytree(params)[0], ravel_pytree(batch)[0]
    return jnp.sum(x**2 / (1 + x**2) + noise * x) + jnp.sum(x) ** 2 / 20


@lru_cache(maxsize=256)
def _run(subject: Subject, problem: str, num_workers: int) -> Callable[..., Any]:
    return training_run(subject, loss, num_workers, TREES[problem][1], MAX_STEPS)


@lru_cache(maxsize=16)
def _tree(problem: str) -> tuple[int, Callable[[Any], Any]]:
    """Return d, and the function from an array [..., d] to a tree of leaves [..., *shape]."""
    shapes, _ = TREES[problem]
    leaves, structure = jax.tree.flatten(shapes, is_leaf=_is_shape)
    sizes = [math.prod(shape) for shape in leaves]

    def unravel(flat):
        parts = jnp.split(flat, np.cumsum(sizes)[:-1], axis=-1)
        pairs = zip(parts, leaves, strict=True)
        return structure.unflatten([x.reshape(*x.shape[:-1], *s) for x, s in pairs])

    return sum(sizes), unravel


def _is_shape(x):
    return isinstance(x, tuple) and all(isinstance(n, int) for n in x)


def examine(subject: Subject, case: Case) -> dict[str, tuple[float, float]]:
    """Run a case; return each statement's residual and allowance at their largest ratio."""
    dtype = np.float64 if case.precision == 64 else np.float32
    draws = np.random.default_rng(case.seed)
    of = sequences.frame(np.array(case.workers), case.num_workers)
    (size, unravel), local_steps = _tree(case.problem), TREES[case.problem][1]
    max_slots, num_slots = case.num_workers + MAX_STEPS, of.index.shape[0]
    start = draws.uniform(-2, 2, size).astype(dtype)
    noise = np.zeros((max_slots, local_steps, size), dtype)
    noise[:num_slots] = draws.normal(size=(num_slots, local_steps, size))
    by_step = np.ones(MAX_STEPS + 2) if case.rates == "constant" else draws.uniform(0, 2, 502)
    by_delay = np.ones(MAX_STEPS + 2) if case.rates == "constant" else draws.uniform(0, 2, 502)
    by_step, by_delay = by_step.astype(dtype), by_delay.astype(dtype)
    beta, gamma = dtype(case.beta), dtype(case.gamma)
    pad = (0, MAX_STEPS - of.num_steps)
    with jax.enable_x64(case.precision == 64):
        output = _run(subject, case.problem, case.num_workers)(
            unravel(jnp.asarray(start)), of.num_steps, *(
                jnp.asarray(np.pad(x, pad), jnp.int32)
                for x in (of.workers, of.dispatched_at, of.used)
            ), unravel(jnp.asarray(noise)), gamma, beta, by_step, by_delay,
            case.rates == "adaptive",
        )  # fmt: skip
        run = recorded(output, of)
        local = np.zeros((max_slots, *run.local.shape[1:]), dtype)
        local[:num_slots] = run.local
        gradient = np.asarray(gradients(loss, unravel)(local, unravel(jnp.asarray(noise))))
    weights = by_delay[of.delays]
    if case.rates == "adaptive":
        pairs = [subject.claims.delay_adaptive(case.num_workers, d) for d in of.delays.tolist()]
        weights = np.array([dtype(a) / dtype(b) for a, b in pairs])
    rates = (by_step[: of.num_steps] * weights).astype(dtype)
    hat = sequences.hat_rates(of, rates, draws.uniform(-1, 1, num_slots) * case.in_flight)
    return _compare(subject, of, run, gradient[:num_slots], noise[:num_slots], start, hat, rates,
                    beta, gamma)  # fmt: skip


def _compare(
    subject: Subject, of, run: Recorded, gradient, noise, start, hat, rates, beta, gamma
) -> dict[str, tuple[float, float]]:
    unit = float(np.finfo(start.dtype).eps) / 2
    sizes = 2 * np.abs(run.local) + np.abs(noise)
    sizes = sizes + 0.1 * np.abs(run.local).sum(-1, keepdims=True)
    wide = np.longdouble
    du, dw, start, hat, rates = (x.astype(wide) for x in (run.du, run.dw, start, hat, rates))
    u, w, beta, gamma = run.u.astype(wide), run.w.astype(wide), wide(beta), wide(gamma)
    gradient = gradient.astype(wide)
    results: dict[str, tuple[float, float]] = {}

    def compare(statement, *pairs):
        for residual, allowance in pairs:
            residual = np.abs(residual).astype(float)
            residual = np.where(np.isfinite(residual), residual, np.inf)
            allowance = np.maximum(np.asarray(allowance, float), 2.0**-900)
            at = np.unravel_index(np.argmax(residual / allowance), residual.shape)
            found = float(residual[at]), float(allowance[at])
            if statement not in results or _ratio(found) > _ratio(results[statement]):
                results[statement] = found

    # The worker's round, compared with its own gradients: ũ_S, Δw and the identity.
    local_steps = gradient.shape[1]
    local_table = sequences.powers(beta, local_steps, wide)
    back = np.arange(local_steps - 1, -1, -1)
    error_u, error_w = rounding.worker_bounds(beta, gamma, gradient, sizes, run.local, unit)
    dh = gamma * gradient.sum(1)
    expected_w = gamma * ((1 + local_table.past[back])[:, None] * gradient).sum(1)
    pairs = [(dw - expected_w, error_w)]
    if subject.worker_momentum:
        pairs.append((du - gamma * (local_table.power[back][:, None] * gradient).sum(1), error_u))
    else:  # plain SGD: Δw = γ Σ_s g_s, which replaces Δu and Δh too
        dw_error = rounding.worker_bounds(0.0, gamma, gradient, sizes, run.local, unit)[1]
        pairs = [(dw - dh, dw_error)]
        error_u = error_w = dw_error
    compare("worker", *pairs)
    of_u, of_w = subject.claims.identity(beta)
    error_h = beta * error_u + (1 - beta) * error_w
    compare("identity", (dh - of_u * du - of_w * dw, error_h))

    # The server, and the sequences.
    table = sequences.powers(beta, of.num_steps + 2, wide)
    hats = sequences.auxiliary(of, beta, hat, du, dw, dh, start)
    sum_u, sum_w = sequences.in_flight_sums(of, table, hat, du, dw, subject.claims)
    server_u, server_w = rounding.server_bounds(
        of.num_workers, of.dispatched_at, table, beta, rates, u, w, du[of.used], dw[of.used],
        start, unit,
    )  # fmt: skip
    own_u, own_w, own_y = rounding.reference_bounds(of, table, beta, hat, du, dw, dh, start)
    compare("lemma-1", (hats.u - u - sum_u, server_u + own_u))
    compare("lemma-2", (hats.w - w - sum_w, server_w + own_w))
    # Lemma 3 carries every report's identity error: Σ |η̂| e^h.
    from_worker = sequences.auxiliary(
        of, 0.0, np.abs(hat), -error_h, -error_h, -error_h, start * 0
    ).scaled_y
    factor = subject.claims.lemma_3(beta)
    own = own_y + own_w + own_u
    compare(
        "lemma-3",
        (hats.scaled_y - (1 - beta) * hats.w - factor * hats.u, own + from_worker),
        (hats.scaled_y - (1 - beta) * (w + sum_w) - factor * (u + sum_u),
         own + from_worker + server_u + server_w),
    )  # fmt: skip
    grouped = sequences.lemma_9_sums(of, table, hat, du, subject.claims)
    compare("lemma-9", (hats.u - grouped, 4 * own_u), (u + sum_u - grouped, 4 * own_u + server_u))
    return results


def _ratio(pair: tuple[float, float]) -> float:
    return pair[0] / pair[1]


@holds(*STATEMENTS, strength="property", rule_only=True, needs=("hypothesis",))
def random_runs(subject: Subject, size: Size) -> Iterator[Outcome]:
    """Train with random delays, β, η and η̂, and compare each step's error with its bound."""
    worst: dict[str, tuple[float, float]] = dict.fromkeys(STATEMENTS, (0.0, 1.0))
    failing: dict[str, Case] = {}
    tried = 0

    def property_(case: Case):
        nonlocal tried
        tried += 1
        results = examine(subject, case)
        for statement, pair in results.items():
            if _ratio(pair) > _ratio(worst[statement]):
                worst[statement] = pair
        violated = [s for s in STATEMENTS if _ratio(results[s]) > 1]
        for statement in violated:
            failing[statement] = case  # Hypothesis runs the smallest one last
        assert not violated

    run_property(property_, cases(), size)
    for statement in STATEMENTS:
        residual, allowance = worst[statement]
        found = failing[statement].as_json() if statement in failing else None
        note = f"worst is {residual / allowance:.2g} of its rounding bound"
        yield Outcome(statement, tried, residual, allowance, residual <= allowance, note, found)


def run_property(property_: Callable[[Any], None], strategy: Any, size: Size) -> None:
    """Run a Hypothesis property that records its failures itself.

    Args:
        property_: Takes a case; raises AssertionError if the case violates the property.
        strategy: Draws the cases.
        size: Gives the number of examples, the seed, and whether to shrink.
    """
    hypothesis = need("hypothesis")
    phases = [hypothesis.Phase.generate]
    if size.minimize:
        phases.append(hypothesis.Phase.shrink)
    settings = hypothesis.settings(
        max_examples=size.examples,
        database=None,
        deadline=None,
        phases=phases,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        print_blob=False,
    )
    try:
        hypothesis.seed(size.seed)(settings(hypothesis.given(strategy)(property_)))()
    except AssertionError:
        pass  # recorded by the property


def replay(subject: Subject, statement: str, case: dict[str, Any]) -> tuple[float, float]:
    """Run a counterexample of :func:`random_runs` again; return its residual and allowance."""
    return examine(subject, Case.from_json(case))[statement]

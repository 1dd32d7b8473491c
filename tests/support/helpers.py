"""What several test modules share: trees, reports, losses, and the exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

from orlomo_jax import Compiled, LocalUpdate, al_sgd, local_ormo_da, orlomo, prsgdm

RULES = {
    "orlomo": lambda num_workers, **options: orlomo(num_workers, 0.5, **options),
    "local_ormo_da": lambda num_workers, **options: local_ormo_da(num_workers, 0.5, **options),
    "al_sgd": lambda num_workers, **options: al_sgd(num_workers, **options),
    "prsgdm": lambda num_workers, **options: prsgdm(num_workers, **options),
}

ENGINES = {
    "eager": "eager",
    "loop": "compiled",
    "map": Compiled(rounds="map"),
    "vmap": Compiled(rounds="vmap"),
}
"""Every engine of the simulator; on a CPU, "compiled" is of ``rounds="loop"``."""


def tree(seed: int = 0, dtype=jnp.float32) -> dict:
    """A small tree with every kind of container and a scalar leaf."""
    rng = np.random.default_rng(seed)
    leaf = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    return {"layer": [leaf(3, 2), (leaf(2),)], "scale": leaf(), "none": None, "empty": {}}


def report(seed: int = 0, dtype=jnp.float32) -> LocalUpdate:
    return LocalUpdate(tree(2 * seed + 1, dtype), tree(2 * seed + 2, dtype))


def assert_trees_equal(left, right) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, x), y in zip(jax.tree.leaves_with_path(left), jax.tree.leaves(right), strict=True):
        name = jax.tree_util.keystr(path)
        assert jnp.result_type(x) == jnp.result_type(y), name
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=name)


def assert_trees_close(left, right, rtol: float, atol: float = 0.0) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol, atol),
        left,
        right,
    )


def given(sent, index=0) -> dict:
    """What a server passes to a rule beside a report, as if it had sent these parameters first."""
    return {
        "dispatched_at": index,
        "dispatched_version": 0,
        "worker": 0,
        "num_local_steps": 5,
        "local_learning_rate": 0.25,
        "dispatched_params": sent,
    }


def run_rule(rule, params, reports, indices):
    """Apply reports one by one; returns the final params and state."""
    sent, state = params, rule.init(params)
    for update, index in zip(reports, indices, strict=True):
        updates, state = rule.update(update, state, params, **given(sent, index))
        params = jax.tree.map(jnp.add, params, updates)
    return params, state


def random_order(rng: np.random.Generator, num_workers: int, num_steps: int) -> np.ndarray:
    """Indices ite(t, k_t) of a random arrival order in which some workers are rare."""
    weights = rng.pareto(1.0, num_workers) + 0.05
    workers = rng.choice(num_workers, size=num_steps, p=weights / weights.sum())
    held, indices = np.zeros(num_workers, int), np.zeros(num_steps, int)
    for t, k in enumerate(workers):
        indices[t], held[k] = held[k], t + 1
    return indices


def exact_ordered_sums(
    indices: np.ndarray,
    deltas: np.ndarray,
    momentums: np.ndarray,
    num_workers: int,
    decay: float,
    rates: list[Fraction],
) -> tuple[np.ndarray, np.ndarray]:
    """Return (u_T, w_T − w_0) by rational arithmetic from the closed form of the group weights.

    After T steps the report of index i carries β^e in u and Σ_{j=1..e} β^j beside its Δw in w,
    with e = ⌈(T−1)/K⌉ − ⌈i/K⌉ (the caption of Figure 1): no recursion of the algorithm is used.
    Reports must be integers, so that one common denominator serves.
    """
    num_steps = len(indices)
    groups = -(-indices // num_workers)
    exponents = -(-(num_steps - 1) // num_workers) - groups
    denominator = math.lcm(*(rate.denominator for rate in rates))
    eta = [int(rate * denominator) for rate in rates]
    numerator, bits = Fraction(decay).numerator, Fraction(decay).denominator.bit_length() - 1
    highest = int(exponents.max())
    width = deltas.shape[1]
    by_exponent = np.zeros((highest + 1, width), object)
    descent = np.zeros(width, object)
    for t in range(num_steps):
        by_exponent[exponents[t]] += eta[t] * momentums[t].astype(object)
        descent += eta[t] * deltas[t].astype(object)
    # Horner from the highest exponent down, in integers over 2^(bits · highest).
    u, missed, tail = (np.zeros(width, object) for _ in range(3))
    for e in range(highest, 0, -1):
        shift = bits * (highest - e)
        u = u * numerator + (by_exponent[e] << shift)
        tail = tail + by_exponent[e]  # all that carry β^e in w
        missed = missed * numerator + (tail << shift)
    u, missed = u * numerator, missed * numerator
    u = u + (by_exponent[0] << (bits * highest))
    scale = denominator << (bits * highest)
    change = -missed - (descent << (bits * highest))
    return (
        np.array([Fraction(int(x), scale) for x in u], object).astype(float),
        np.array([Fraction(int(x), scale) for x in change], object).astype(float),
    )

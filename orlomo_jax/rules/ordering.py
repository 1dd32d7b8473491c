"""Computes the scalars of an ordered server step."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from orlomo_jax.trees import Array, ArrayLike


class Coefficients(NamedTuple):
    """The scalars of one ordered server step; each float[] in the coefficient dtype.

    With n = ⌈t/K⌉ − ⌈i/K⌉, η = η_t, and o = 1 if group ⌈t/K⌉ opens at step t, else 0:

    Attributes:
        opens: o.
        decay: β if the group opens, else 1; the factor of u.
        weight: β^n η, the weight of the report in u.
        rate: η, the weight of the report in w.
        correction: η Σ_{j=1..n−o} β^j, the past descent that a late Δu missed; see
            :func:`ordered_coefficients`.
    """

    opens: Array
    decay: Array
    weight: Array
    rate: Array
    correction: Array


def group(index: ArrayLike, num_workers: int) -> Array:
    """Return ⌈i/K⌉, the group of the local momentum with global iteration index i."""
    return -(-jnp.asarray(index) // num_workers)


def opens_group(step: ArrayLike, num_workers: int) -> Array:
    """Return whether ⌈t/K⌉ > ⌈(t−1)/K⌉, so that step t opens a group (Alg. 2 and 3, line 6)."""
    return (jnp.asarray(step) - 1) % num_workers == 0


def increment(step: Array) -> Array:
    """Return t + 1, int32[], at most the largest int32."""
    return jnp.asarray(optax.safe_increment(step))


def geometric_sum(decay: ArrayLike, count: ArrayLike) -> Array:
    """Return S(n) = Σ_{j=1..n} β^j = β(1−β^n)/(1−β), without division or cancellation.

    The sum is built by doubling, from the leading bits m of n: S(2m) = S(m)(1 + β^m) and
    S(m+1) = S(m) + β^{m+1}. All terms are positive, so the relative error is a few roundings for
    every float β < 1, and dyadic β give exact sums.

    Args:
        decay: β in [0, 1), float[].
        count: n ≥ −1, int[]; S(−1) = −β^0 = −1 by the same recurrence.

    Returns:
        float[] in the dtype of ``decay``.

    Example:
        >>> float(geometric_sum(0.5, 3))
        0.875
    """
    decay, count = jnp.asarray(decay, float), jnp.asarray(count, jnp.int32)
    leading = jnp.maximum(count, 0) >> jnp.arange(31, -1, -1, dtype=jnp.int32)
    powers = jnp.power(decay, leading.astype(decay.dtype))
    odd = jnp.where(leading & 1, powers, 0)

    def doubled(total, terms):
        power, next_odd = terms
        return total * (1 + power) + next_odd, None

    terms = (powers[:-1], odd[1:])  # unrolled: on a GPU every iteration of a loop is a launch
    total, _ = jax.lax.scan(doubled, jnp.zeros_like(decay), terms, unroll=True)
    return jnp.where(count < 0, -1, total)


def ordered_coefficients(
    step: ArrayLike, dispatched_at: ArrayLike, num_workers: int, momentum: ArrayLike, rate: Array
) -> Coefficients:
    """Return the scalars of Algorithms 2 and 3 at step t for a report of index i.

    The paper computes w_{t+1} from u_t. This library computes it from u_{t+1}:
    w_{t+1} = w_t − o·u_{t+1} − ηΔw − η Σ_{j=1..n−o} β^j Δu. Both are equal, because
    o·β·u_t = o·(u_{t+1} − β^n ηΔu). This way XLA can write u in place, in one pass.

    On a CPU, XLA would fuse the scalars into the loop over the parameters and compute them again
    for every element, even behind an optimization barrier; that is much slower. A branch prevents
    it; both of its sides give the same values. A GPU does not need the branch, and the host would
    have to wait for the device there.
    """
    momentum = jnp.asarray(momentum, float)
    opens = opens_group(step, num_workers)
    late = group(step, num_workers) - group(dispatched_at, num_workers)  # n
    missed = late - opens.astype(jnp.int32)
    return jax.lax.platform_dependent(
        momentum, rate, opens, late, missed, cpu=by_branch, default=behind_a_barrier
    )


def by_branch(momentum, rate, opens, late, missed) -> Coefficients:
    """Return the coefficients out of a branch, for a CPU."""
    return jax.lax.cond(missed > 0, _of_late, _of_others, momentum, rate, opens, late, missed)


def behind_a_barrier(momentum, rate, opens, late, missed) -> Coefficients:
    """Return the coefficients behind a barrier, for a GPU."""
    return jax.lax.optimization_barrier(_of_late(momentum, rate, opens, late, missed))


def _of_late(momentum, rate, opens, late, missed) -> Coefficients:
    return _coefficients(momentum, rate, opens, late, geometric_sum(momentum, missed))


def _of_others(momentum, rate, opens, late, missed) -> Coefficients:
    """Return the scalars if missed is 0 or −1; the sum equals it."""
    return _coefficients(momentum, rate, opens, late, missed.astype(momentum.dtype))


def _coefficients(momentum, rate, opens, late, missed) -> Coefficients:
    return Coefficients(
        opens=opens.astype(momentum.dtype),
        decay=jnp.where(opens, momentum, 1),
        weight=jnp.power(momentum, late.astype(momentum.dtype)) * rate,
        rate=jnp.asarray(rate, momentum.dtype),
        correction=missed * rate,
    )

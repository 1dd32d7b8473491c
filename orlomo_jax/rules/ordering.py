"""The order of groups: the scalars of an ordered server step."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from orlomo_jax.trees import Array, ArrayLike


class Coefficients(NamedTuple):
    """The scalars of one ordered server step; each float[] in the coefficient dtype.

    With n = ⌈t/K⌉ − ⌈i/K⌉, η = η_t, and o = 1 when group ⌈t/K⌉ opens at step t, else 0:

    Attributes:
        opens: o.
        decay: β where the group opens, else 1; what u is multiplied by.
        weight: β^n η, the weight of the report in u.
        rate: η, the weight of the report in w.
        correction: η Σ_{j=1..n−o} β^j, what the report has missed of its momentum's past descent,
            reckoned beside the *new* u (see :func:`ordered_coefficients`).
    """

    opens: Array
    decay: Array
    weight: Array
    rate: Array
    correction: Array


def group(index: ArrayLike, num_workers: int) -> Array:
    """Return ⌈index/K⌉, the group of the local momentum with that global iteration index."""
    return -(-jnp.asarray(index) // num_workers)


def opens_group(step: ArrayLike, num_workers: int) -> Array:
    """Return whether ⌈t/K⌉ > ⌈(t−1)/K⌉: whether step t opens a group (Alg. 2 and 3, l. 6)."""
    return (jnp.asarray(step) - 1) % num_workers == 0


def increment(step: Array) -> Array:
    """Return t + 1, int32[]; stays at the largest int32."""
    return jnp.asarray(optax.safe_increment(step))


def geometric_sum(decay: ArrayLike, count: ArrayLike) -> Array:
    """Return Σ_{j=1..n} β^j = β(1−β^n)/(1−β), without division or cancellation.

    By binary doubling: with m running through the leading bits of n,
    S(2m) = S(m)(1 + β^m) and S(m+1) = S(m) + β^{m+1}. Every term is positive, so the relative
    error stays at rounding for β up to the last float below 1, and dyadic β give exact sums.

    Args:
        decay: β in [0, 1), float[].
        count: n, int[]; −1 continues the recurrence one term down, to S(−1) = −β^0 = −1.

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

    terms = (powers[:-1], odd[1:])  # unrolled: a loop on a GPU is a launch or two for each of them
    total, _ = jax.lax.scan(doubled, jnp.zeros_like(decay), terms, unroll=True)
    return jnp.where(count < 0, -1, total)


def ordered_coefficients(
    step: ArrayLike, dispatched_at: ArrayLike, num_workers: int, momentum: ArrayLike, rate: Array
) -> Coefficients:
    """Return the scalars of Algorithms 2 and 3 at step t for a report of index i.

    The paper states w_{t+1} through the old u_t. Here it is stated through the new one,
    w_{t+1} = w_t − o·u_{t+1} − ηΔw − η Σ_{j=1..n−o} β^j Δu: the same by
    o·β·u_t = o·(u_{t+1} − β^n ηΔu), and a compiler can then write u in place, in one pass.

    On a CPU they come out of a branch, both of whose sides give the same: XLA fuses anything else
    that makes a scalar there into the loop over the parameters, whatever the barriers, makes it
    anew for every element, and took 25 times as long over a leaf of odd size. On a GPU XLA keeps
    scalars apart by itself, while at a branch the host waits for all that the device has to do.
    """
    momentum = jnp.asarray(momentum, float)
    opens = opens_group(step, num_workers)
    late = group(step, num_workers) - group(dispatched_at, num_workers)  # n
    missed = late - opens.astype(jnp.int32)
    return jax.lax.platform_dependent(
        momentum, rate, opens, late, missed, cpu=_by_branch, default=_behind_a_barrier
    )


def _by_branch(momentum, rate, opens, late, missed) -> Coefficients:
    return jax.lax.cond(missed > 0, _of_late, _of_others, momentum, rate, opens, late, missed)


def _behind_a_barrier(momentum, rate, opens, late, missed) -> Coefficients:
    return jax.lax.optimization_barrier(_of_late(momentum, rate, opens, late, missed))


def _of_late(momentum, rate, opens, late, missed) -> Coefficients:
    return _coefficients(momentum, rate, opens, late, geometric_sum(momentum, missed))


def _of_others(momentum, rate, opens, late, missed) -> Coefficients:
    """Σ over no j is 0, and over one j less it is −1."""
    return _coefficients(momentum, rate, opens, late, missed.astype(momentum.dtype))


def _coefficients(momentum, rate, opens, late, missed) -> Coefficients:
    return Coefficients(
        opens=opens.astype(momentum.dtype),
        decay=jnp.where(opens, momentum, 1),
        weight=jnp.power(momentum, late.astype(momentum.dtype)) * rate,
        rate=jnp.asarray(rate, momentum.dtype),
        correction=missed * rate,
    )

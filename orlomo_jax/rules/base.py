"""What the server rules compute alike: the order of groups and the global learning rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from orlomo_jax.rules import contract

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Float, Int, Scalar

    from orlomo_jax.rules.contract import Params

    DelayWeight: TypeAlias = Callable[[Int[Array, ""]], Float[ArrayLike, ""]]


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

    opens: Scalar
    decay: Scalar
    weight: Scalar
    rate: Scalar
    correction: Scalar


def delay_adaptive(num_workers: int) -> DelayWeight:
    """Return the delay-adaptive weight of Eq. (6): 1/K up to a delay of 2K, then 1/delay.

    Args:
        num_workers: K ≥ 1.

    Returns:
        A function of the delay τ (an int[], or an array of them) to float weights.

    Raises:
        ValueError: If ``num_workers`` is below 1.
        TypeError: If it is not an integer.

    Example:
        >>> weight = delay_adaptive(4)
        >>> [round(float(weight(delay)), 4) for delay in (0, 8, 9, 100)]
        [0.25, 0.25, 0.1111, 0.01]
    """
    num_workers = contract.check_num_workers(num_workers)

    def weight(delay):
        delay = jnp.asarray(delay)
        return 1.0 / jnp.where(delay > 2 * num_workers, delay, num_workers).astype(float)

    return weight


def global_learning_rate(
    num_workers: int,
    learning_rate: float | optax.Schedule = 1.0,
    delay_weight: DelayWeight | None = None,
) -> Callable[[ArrayLike, ArrayLike], Scalar]:
    """Return η(t, τ) = learning_rate(t) · delay_weight(τ), as every asynchronous rule uses it.

    Args:
        num_workers: K ≥ 1.
        learning_rate: A finite float ≥ 0, or a schedule of the server's step t.
        delay_weight: A function of the delay τ; None is ``delay_adaptive(num_workers)``.

    Returns:
        A function of (step, delay) to float[], in float32 or wider.

    Raises:
        ValueError: If ``num_workers`` or a concrete rate is out of range, or, when the function is
            called, a schedule or weight returns no scalar.
        TypeError: If an argument is of a wrong type.

    Example:
        >>> rate = global_learning_rate(2, learning_rate=3.0, delay_weight=lambda delay: 0.5)
        >>> float(rate(0, 1))
        1.5
    """
    num_workers = contract.check_num_workers(num_workers)
    if not callable(learning_rate):
        contract.check_learning_rate("learning_rate", learning_rate)
    if delay_weight is None:
        delay_weight = delay_adaptive(num_workers)
    elif not callable(delay_weight):
        raise TypeError(
            "`delay_weight` must be a function of the delay or None, "
            f"got delay_weight={delay_weight!r}"
        )

    def rate(step, delay):
        at_step = learning_rate(step) if callable(learning_rate) else learning_rate
        weight = delay_weight(delay)
        contract.check_scalar("learning_rate", at_step)
        contract.check_scalar("delay_weight", weight)
        return jnp.asarray(at_step, float) * jnp.asarray(weight, float)

    return rate


def group(index: ArrayLike, num_workers: int) -> Array:
    """Return ⌈index/K⌉, the group of the local momentum with that global iteration index."""
    return -(-jnp.asarray(index) // num_workers)


def opens_group(step: ArrayLike, num_workers: int) -> Array:
    """Return whether ⌈t/K⌉ > ⌈(t−1)/K⌉: whether step t opens a group (Alg. 2 and 3, l. 6)."""
    return (jnp.asarray(step) - 1) % num_workers == 0


def increment(step: Array) -> Array:
    """Return t + 1, int32[]; stays at the largest int32."""
    return jnp.asarray(optax.safe_increment(step))


def geometric_sum(decay: ArrayLike, count: ArrayLike) -> Scalar:
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
    step: ArrayLike, dispatched_at: ArrayLike, num_workers: int, momentum: ArrayLike, rate: Scalar
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


def combine(terms: Sequence[tuple[Scalar | float, Params]], like: Params) -> Params:
    """Return Σ coefficient · tree, leaf by leaf, in the dtypes of ``like``.

    A leaf's arithmetic is in float32 or wider and rounds once to the leaf's own dtype, so that a
    bfloat16 tree loses nothing between the terms.
    """
    coefficients = [coefficient for coefficient, _ in terms]

    def leaf(reference, *leaves):
        dtype = wide_dtype(*leaves)
        scalar_dtype = jnp.finfo(dtype).dtype  # a complex leaf's scalars are real
        total = sum(
            jnp.asarray(c, scalar_dtype) * jnp.asarray(x, dtype)
            for c, x in zip(coefficients, leaves, strict=True)
        )
        return jnp.asarray(total, jnp.result_type(reference))

    return jax.tree.map(leaf, like, *(tree for _, tree in terms))


def wide_dtype(*leaves: ArrayLike) -> Any:
    """Return the widest dtype of leaves, at least float32; weakly typed ones count in full."""
    return widest(jnp.float32, *(jnp.asarray(x).dtype for x in leaves))


def widest(*dtypes: Any) -> Any:
    """Return the dtype that holds all of these, whatever JAX's promotion mode.

    Example:
        >>> widest(jnp.bfloat16, jnp.float32)
        dtype('float32')
    """
    with jax.numpy_dtype_promotion("standard"):  # "strict" refuses to compare dtypes
        return reduce(jnp.promote_types, map(jnp.dtype, dtypes))


def widened(tree: Params) -> Params:
    """Return a tree with its floating leaves in float32 where they are narrower."""

    def leaf(x):
        x = jnp.asarray(x)
        return x.astype(wide_dtype(x)) if jnp.issubdtype(x.dtype, jnp.inexact) else x

    return jax.tree.map(leaf, tree)


def zeros(params: Params, accumulator_dtype: Any = None) -> Params:
    """Return zeros like ``params``, in ``accumulator_dtype`` where that is wider.

    Raises:
        TypeError: If a leaf of ``params`` is not floating or complex; the message names its path.
    """
    contract.check_floating("params", params)

    def leaf(x):
        dtype = jnp.result_type(x)
        if accumulator_dtype is not None:
            dtype = widest(dtype, accumulator_dtype)
        return jnp.zeros_like(x, dtype=dtype)

    return jax.tree.map(leaf, params)

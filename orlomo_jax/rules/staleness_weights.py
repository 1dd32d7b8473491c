"""Defines weights of a report by its delay (staleness), as values that compare and hash."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from orlomo_jax.checks import check_nonnegative
from orlomo_jax.trees import Array, ArrayLike


@dataclass(frozen=True)
class StalenessWeight:
    """A function of the delay τ, an int array of any shape, to float weights in (0, 1].

    Made by :func:`polynomial`, :func:`constant` or :func:`hinge`. It equals every weight with the
    same fields.

    Attributes:
        kind: The name of the function that made it.
        a: Its parameter a.
        b: Its parameter b.
    """

    kind: str
    a: float = 0.0
    b: float = 0.0

    def __call__(self, delay: ArrayLike) -> Array:
        """Return the weights of the delays."""
        delay = jnp.asarray(delay).astype(float)
        if self.kind == "polynomial":
            return jnp.power(1 + delay, -self.a)
        if self.kind == "hinge":
            return 1 / (self.a * jnp.maximum(delay - self.b, 0) + 1)
        return jnp.ones_like(delay)


def polynomial(a: float = 0.5) -> StalenessWeight:
    """Return the weight (1 + τ)^−a.

    Args:
        a: How fast the weight falls, ≥ 0.

    Example:
        >>> float(polynomial(0.5)(3))
        0.5
        >>> polynomial(0.5) == polynomial()
        True
    """
    return StalenessWeight("polynomial", check_nonnegative("a", a))


def constant() -> StalenessWeight:
    """Return the weight 1 of every delay.

    Example:
        >>> float(constant()(3))
        1.0
    """
    return StalenessWeight("constant")


def hinge(a: float = 10.0, b: float = 4.0) -> StalenessWeight:
    """Return the weight that is 1 up to a delay of b, then 1/(a(τ − b) + 1).

    Args:
        a: How fast the weight falls, ≥ 0.
        b: The largest delay that counts fully, ≥ 0.

    Example:
        >>> [round(float(hinge(10, 4)(delay)), 4) for delay in (0, 4, 5, 6)]
        [1.0, 1.0, 0.0909, 0.0476]
    """
    return StalenessWeight("hinge", check_nonnegative("a", a), check_nonnegative("b", b))

"""Random orders; the number at any position can be computed alone."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

FEISTEL_ROUNDS = 8


def examples_at(keys: jax.Array, which: jax.Array, places: jax.Array, size: int) -> jax.Array:
    """Return the numbers at given positions of random orders of 0, …, size − 1.

    An order is a Feistel network on pairs of digits in base ⌈√size⌉. Its round functions are tables
    of random digits; it is a bijection for any tables (Luby and Rackoff 1988). A result that is not
    below ``size`` goes through the network again, which keeps it a bijection (Black and Rogaway
    2002). ``jax.random.permutation`` sorts all the numbers instead, which can take as long as a
    round of a small network.

    Args:
        keys: key[orders], one for each order.
        which: int32[n], the index of the order to read.
        places: int32[n] in [0, size), the positions to read.
        size: The length of the orders, 1 to 46 340².

    Returns:
        int32[n] in [0, size).

    Example:
        >>> keys = jax.random.split(jax.random.key(0), 2)
        >>> order = examples_at(keys, jnp.ones(5, int), jnp.arange(5), 5)
        >>> sorted(order.tolist())
        [0, 1, 2, 3, 4]
    """
    base = math.isqrt(size - 1) + 1

    def digits(key):
        # As one row: XLA for CPU unrolls short rows, which takes a third of the compilation.
        drawn = jax.random.randint(key, (FEISTEL_ROUNDS * base,), 0, base, jnp.int32)
        return drawn.reshape(FEISTEL_ROUNDS, base)

    tables = jax.vmap(digits)(keys)

    def once(numbers):
        left, right = jnp.divmod(numbers, base)

        def step(index, halves):
            left, right = halves
            return right, (left + tables[which, index, right]) % base

        left, right = jax.lax.fori_loop(0, FEISTEL_ROUNDS, step, (left, right))
        return left * base + right

    def again(numbers):
        return jnp.where(numbers < size, numbers, once(numbers))

    return jax.lax.while_loop(lambda numbers: (numbers >= size).any(), again, once(places))

"""Reuses the memory of large arrays that nobody refers to any more.

On a CPU, the operating system clears every page of a large new buffer, which takes longer than a
server step. So the server reuses the memory of old versions of the parameters.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import deque
from typing import Any

import jax
import numpy as np

from orlomo_jax.trees import Array, PyTree

LARGE = 8 * 1024 * 1024
"""Smallest leaf, in bytes, that is pooled; the allocator already recycles smaller ones."""


class _Loan:
    """Lives as long as anything refers to one of the arrays lent with it."""


class BufferPool:
    """Lends trees of arrays, and finds out when the last reference to a tree is gone.

    It lends a view of the owner's memory, imported into JAX as a new buffer. Everything made from
    the view (an alias on the device, a shard, a NumPy array, a DLPack capsule) keeps that buffer
    alive, and the buffer keeps the loan alive. So after the loan's end nothing refers to the memory
    and the owner's array may be donated. Until then the view holds XLA's own buffer, which XLA
    therefore refuses to donate.

    Arrays that are small, not on a CPU, or on several devices are lent themselves and not reused.

    Args:
        like: A tree like those that will be lent.

    Example:
        >>> import jax.numpy as jnp
        >>> mine = jnp.ones(LARGE)
        >>> buffers = BufferPool(mine)
        >>> lent = buffers.share(mine)
        >>> buffers.retire(mine)
        >>> alias = lent.addressable_data(0)
        >>> del lent
        >>> buffers.acquire()
        []
        >>> del alias
        >>> _ = jnp.zeros(1)  # JAX lets go of host memory at its next call
        >>> [leaf is mine for leaf in buffers.acquire()]
        [True]
    """

    def __init__(self, like: PyTree) -> None:
        """Start with nothing lent."""
        self._worth_it = any(_is_large(leaf) for leaf in jax.tree.leaves(like))
        self._loan: weakref.ref[_Loan] | None = None  # of the newest tree
        self._lent: dict[int, tuple[weakref.ref[_Loan], list[Array]]] = {}
        self._free: deque[list[Array]] = deque(maxlen=2)  # enough for one step after another

    def share(self, tree: PyTree) -> PyTree:
        """Return a tree of equal arrays to lend to others."""
        if not self._worth_it:
            return tree
        loan = _Loan()
        lent = jax.tree.map(lambda leaf: _view(leaf, loan) if _is_large(leaf) else leaf, tree)
        self._loan = weakref.ref(loan, self._returned)
        return lent

    def retire(self, tree: PyTree) -> None:
        """Give up the tree that was lent last; it is free when its loan ends."""
        loan, self._loan = self._loan, None
        if loan is None:
            return
        leaves = [leaf for leaf in jax.tree.leaves(tree) if _is_large(leaf)]
        self._lent[id(loan)] = loan, leaves
        if loan() is None:  # the loan may have ended before it was in `_lent`
            self._returned(loan)

    def acquire(self) -> list[Array]:
        """Return the large leaves of a free tree, to be donated; [] if there is none."""
        return self._free.popleft() if self._free else []

    def _returned(self, loan: weakref.ref[_Loan]) -> None:
        # Threads may drop references at any time; only one of them pops the leaves.
        if entry := self._lent.pop(id(loan), None):
            self._free.append(entry[1])


def _is_large(leaf: Array) -> bool:
    return (
        leaf.nbytes >= LARGE
        and isinstance(leaf.sharding, jax.sharding.SingleDeviceSharding)
        and all(device.platform == "cpu" for device in leaf.sharding.device_set)
    )


def _view(leaf: Array, loan: _Loan) -> Array:
    """Return an array on the same memory that keeps the loan alive."""
    owner = np.asarray(leaf)
    memory: Any = (ctypes.c_char * owner.nbytes).from_address(owner.ctypes.data)
    memory.keeps = owner, loan  # every NumPy view has this buffer as its base
    host = np.frombuffer(memory, np.uint8).view(owner.dtype).reshape(owner.shape)
    host.flags.writeable = False
    where = leaf.sharding if leaf.committed else None
    return jax.device_put(host, where, may_alias=True)

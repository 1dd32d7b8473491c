"""Large arrays that are lent out, and written over once nobody can see them any more.

On a CPU the operating system clears every page of a fresh buffer of many megabytes: that costs
two to three times what a server step costs. A version of the parameters which no worker and no
caller holds any more is memory that has been paid for.
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
"""Bytes from which on a leaf is worth it: the allocator keeps smaller ones at hand by itself, and a
view costs some tens of microseconds."""


class _Loan:
    """Alive as long as anything at all refers to one of the arrays that were lent with it."""


class BufferPool:
    """Lends trees of arrays and knows when the last reference to one is gone.

    What is lent is not an array of the owner but a view of its memory, imported into JAX anew.
    Whatever is made from the view (an alias on the device, a shard, a NumPy array, a DLPack
    capsule) keeps the imported buffer alive, which keeps the loan alive: where the loan is dead,
    there is nothing left through which the memory could be seen, and the owner's array may be
    donated. The view also holds XLA's own buffer, which XLA refuses to donate until then.

    Off the CPU, for small leaves and for arrays on several devices the array itself is lent, and
    never comes back.

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
        """Return the tree for others to hold; every array in it is equal to the owner's."""
        if not self._worth_it:
            return tree
        loan = _Loan()
        lent = jax.tree.map(lambda leaf: _view(leaf, loan) if _is_large(leaf) else leaf, tree)
        self._loan = weakref.ref(loan, self._returned)
        return lent

    def retire(self, tree: PyTree) -> None:
        """Give up the tree that was lent last: it is free once its loan is dead."""
        loan, self._loan = self._loan, None
        if loan is None:
            return
        leaves = [leaf for leaf in jax.tree.leaves(tree) if _is_large(leaf)]
        self._lent[id(loan)] = loan, leaves
        if loan() is None:  # before or since it was written down
            self._returned(loan)

    def acquire(self) -> list[Array]:
        """Return the large leaves of a tree that nobody holds, to be donated; [] where none is."""
        return self._free.popleft() if self._free else []

    def _returned(self, loan: weakref.ref[_Loan]) -> None:
        # ThreadWorkers may drop their references at any time: only one of them pops the leaves.
        if entry := self._lent.pop(id(loan), None):
            self._free.append(entry[1])


def _is_large(leaf: Array) -> bool:
    return (
        leaf.nbytes >= LARGE
        and isinstance(leaf.sharding, jax.sharding.SingleDeviceSharding)
        and all(device.platform == "cpu" for device in leaf.sharding.device_set)
    )


def _view(leaf: Array, loan: _Loan) -> Array:
    """Return an array of the same memory that keeps the loan alive."""
    owner = np.asarray(leaf)
    memory: Any = (ctypes.c_char * owner.nbytes).from_address(owner.ctypes.data)
    memory.keeps = owner, loan  # NumPy never looks through a foreign buffer: all views end here
    host = np.frombuffer(memory, np.uint8).view(owner.dtype).reshape(owner.shape)
    host.flags.writeable = False
    where = leaf.sharding if leaf.committed else None
    return jax.device_put(host, where, may_alias=True)

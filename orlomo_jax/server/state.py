"""The server's state as one pytree: what tasks are made of, and what a checkpoint stores."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import optax

from orlomo_jax import trees
from orlomo_jax.rules import LocalOrMoDAState, OrLoMoState, PRSGDmState, contract
from orlomo_jax.trees import Array, PyTree
from orlomo_jax.worker.workload import RoundInput

_WITH_MOMENTUM = (OrLoMoState, LocalOrMoDAState, PRSGDmState)


class ServerState(NamedTuple):
    """All arrays of a parameter server between two reports.

    Attributes:
        params: w_t; float32 masters if the method keeps them.
        rule_state: The rule's state (u_t).
        model_state: The model state that tasks carry.
        pending_model_state: The model state merged so far in a synchronous round; None if the
            method is asynchronous.
        local_learning_rate: γ of the next task, float[].
    """

    params: trees.Params
    rule_state: Any
    model_state: PyTree
    pending_model_state: PyTree
    local_learning_rate: Array

    def sent(self, dtypes: tuple[Any, ...], *, with_momentum: bool) -> RoundInput:
        """Return what a task dispatched now carries.

        Args:
            dtypes: Those in which workers get params and model state; see :func:`leaf_dtypes`.
            with_momentum: Whether workers start from the rule's momentum.
        """
        momentum = start_momentum(self.rule_state) if with_momentum else None
        params, model_state = rounded((self.params, self.model_state), dtypes)
        return RoundInput(params, model_state, momentum, self.local_learning_rate)


def leaf_dtypes(tree: Any) -> tuple[Any, ...]:
    """Return the dtypes of a tree's leaves."""
    return tuple(leaf.dtype for leaf in jax.tree.leaves(tree))


def rounded(tree: Any, dtypes: tuple[Any, ...]) -> Any:
    """Return a tree in these dtypes, one for each leaf; the same arrays if they have them."""
    leaves, structure = jax.tree.flatten(tree)
    if leaf_dtypes(leaves) == dtypes:
        return tree
    return jax.tree.unflatten(structure, _cast(leaves, dtypes))


@partial(jax.jit, static_argnums=1)
def _cast(leaves: list[Any], dtypes: tuple[Any, ...]) -> list[Any]:
    return [x.astype(dtype) for x, dtype in zip(leaves, dtypes, strict=True)]


def start_momentum(rule_state: Any) -> trees.Params:
    """Return the momentum of a rule's state, wherever a chain keeps it; None if there is none.

    If the chain has several rules of this package, that of the first; else the first field named
    ``momentum`` in the state of any transformation. Reports that a state stores do not count.
    """
    is_rule = lambda x: isinstance(x, _WITH_MOMENTUM)  # noqa: E731
    rules = [x for x in jax.tree.leaves(rule_state, is_leaf=is_rule) if is_rule(x)]
    if rules:
        return rules[0].momentum

    def of_a_state(path, value):  # not of a params tree, of hyperparameters or of a report
        key = path[-1]
        is_field = isinstance(key, optax.tree_utils.NamedTupleKey)
        return is_field and key.tuple_name != contract.LocalUpdate.__name__

    found = optax.tree.get_all_with_path(rule_state, "momentum", filtering=of_a_state)
    return found[0][1] if found else None

"""Defines the server's state as one pytree."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from orlomo_jax import trees
from orlomo_jax.methods.method import Method
from orlomo_jax.rules import LocalOrMoDAState, OrLoMoState, PRSGDmState, contract
from orlomo_jax.trees import Array, ArrayLike, PyTree
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
        version: How many updates the rule has made, int32[]: the field ``version`` of its state, or
            t (for a synchronous method, the number of complete rounds).
        accepted: Whether the rule accepted the newest report, bool[].
    """

    params: trees.Params
    rule_state: Any
    model_state: PyTree
    pending_model_state: PyTree
    local_learning_rate: Array
    version: ArrayLike = np.int32(0)
    accepted: ArrayLike = np.True_

    def sent(self, method: Method, dtypes: tuple[Any, ...]) -> RoundInput:
        """Return the inputs of a task that is dispatched now.

        Args:
            method: Its workers start from the rule's momentum if it is synchronous; its
                ``dispatch`` says what is sent if it is not w.
            dtypes: The workers' dtypes of params and model state; see :func:`leaf_dtypes`.
        """
        momentum = None
        if method.synchronous and method.worker_momentum is not None:
            momentum = start_momentum(self.rule_state)
        params = self.params
        if method.dispatch is not None:
            params = _look_ahead(method.dispatch, self.rule_state, params)
        params, model_state = rounded((params, self.model_state), dtypes)
        return RoundInput(params, model_state, momentum, self.local_learning_rate, self.version)


@partial(jax.jit, static_argnums=0)
def _look_ahead(dispatch: Any, rule_state: Any, params: Any) -> Any:
    return dispatch(rule_state, params)


def leaf_dtypes(tree: Any) -> tuple[Any, ...]:
    """Return the dtypes of a tree's leaves."""
    return tuple(leaf.dtype for leaf in jax.tree.leaves(tree))


def rounded(tree: Any, dtypes: tuple[Any, ...]) -> Any:
    """Return a tree with its leaves cast to these dtypes; the same tree if nothing changes."""
    leaves, structure = jax.tree.flatten(tree)
    if leaf_dtypes(leaves) == dtypes:
        return tree
    return jax.tree.unflatten(structure, _cast(leaves, dtypes))


@partial(jax.jit, static_argnums=1)
def _cast(leaves: list[Any], dtypes: tuple[Any, ...]) -> list[Any]:
    return [x.astype(dtype) for x, dtype in zip(leaves, dtypes, strict=True)]


def start_momentum(rule_state: Any) -> trees.Params:
    """Return the momentum in a rule's state, also in a chain; None if there is none.

    It is the momentum of the first rule of this package. Without one, it is the first field named
    ``momentum`` in the state of any transformation, except in a stored report.
    """
    is_rule = lambda x: isinstance(x, _WITH_MOMENTUM)  # noqa: E731
    rules = [x for x in jax.tree.leaves(rule_state, is_leaf=is_rule) if is_rule(x)]
    if rules:
        return rules[0].momentum

    def of_a_state(path, value):  # not of params, hyperparameters or a report
        key = path[-1]
        is_field = isinstance(key, optax.tree_utils.NamedTupleKey)
        return is_field and key.tuple_name != contract.LocalUpdate.__name__

    found = optax.tree.get_all_with_path(rule_state, "momentum", filtering=of_a_state)
    return found[0][1] if found else None

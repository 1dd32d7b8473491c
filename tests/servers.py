"""Servers of a small tree, and reports to them."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from orlomo_jax import ParameterServer, Report, make_method
from tests import helpers

K = 3
STATE = {"mean": jnp.zeros(2), "variance": jnp.ones(2)}


cached_method = lru_cache(make_method)  # one compiled server step for each


def make_server(name="orlomo", model_state=None, rate=0.1, **options) -> ParameterServer:
    method = cached_method(name, K, 0.5, **options)
    return ParameterServer(method, helpers.tree(), K, model_state, local_learning_rate=rate)


def make_report(task, seed=0, model_state=None, name="orlomo", **changes) -> Report:
    update = helpers.report(seed)
    if name in ("al_sgd", "local_ormo_da"):
        update = update._replace(momentum=None)
    return Report(*task[:3], update, model_state)._replace(**changes)


def snapshot(server):
    trees = (server.params, server.state, server.model_state)
    return server.step, jax.tree.map(np.array, trees), [server.held(k) for k in range(K)]


def assert_unchanged(server, before):
    step, trees, held = snapshot(server)
    assert step == before[0]
    helpers.assert_trees_equal(trees, before[1])
    assert [task and task[:3] for task in held] == [task and task[:3] for task in before[2]]

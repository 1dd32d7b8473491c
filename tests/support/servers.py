"""Servers of a small tree, and reports to them."""

import jax
import jax.numpy as jnp
import numpy as np

from orlomo_jax import ParameterServer, Report, make_method
from tests.support import helpers

K, S = 3, 2
STATE = {"mean": jnp.zeros(2), "variance": jnp.ones(2)}


def make_server(name="orlomo", model_state=None, rate=0.1, **options) -> ParameterServer:
    method = make_method(name, K, S, momentum=0.5, **options)
    return ParameterServer(method, helpers.tree(), model_state, local_learning_rate=rate)


def make_report(task, seed=0, model_state=None, name="orlomo", **changes) -> Report:
    update = helpers.report(seed)
    if name in ("al_sgd", "local_ormo_da"):
        update = update._replace(momentum=None)
    return Report(task.id, update, model_state)._replace(**changes)


def snapshot(server):
    trees = jax.tree.map(np.array, server.state)
    return server.step, trees, [server.held(k) for k in range(K)]


def assert_unchanged(server, before):
    step, trees, held = snapshot(server)
    assert step == before[0]
    helpers.assert_trees_equal(trees, before[1])
    assert [task and task.id for task in held] == [task and task.id for task in before[2]]

"""Every method on Ray, with states that are kept in the actors and uneven S."""

import numpy as np
import pytest

from orlomo_jax import Checkpointer, Eager, RayWorkers
from tests.support import helpers
from tests.support.every_method import ALL, MERGES_LOCAL_MOMENTUM, T, method_of, real, simulated
from tests.support.real_runs import Killed, killed_at
from tests.support.toy import loss_fn

RESUMED = {"ordered_outer_momentum", "ringmaster", "diloco"}
"""The runs of these are also killed, one for each kind of policy and barrier."""

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_a_run_on_ray_repeats_in_the_simulator(name, tmp_path):
    method, options = method_of(name), {}
    assert method.local_round(loss_fn).keep_state == (name not in MERGES_LOCAL_MOMENTUM)
    if name in RESUMED:
        options = {"checkpoint": Checkpointer(tmp_path, every=5)}
        with pytest.raises(Killed):
            real(method, RayWorkers(), callbacks=[killed_at(13)], **options)
    result = real(method, RayWorkers(), **options)
    assert result.trace.num_steps == T
    again = simulated(method, result.trace, Eager())
    for part in ("params", "model_state", "rule_state"):
        helpers.assert_trees_equal(getattr(result, part), getattr(again, part))
    np.testing.assert_array_equal(result.history.loss, again.history.loss)
    np.testing.assert_array_equal(result.history.accepted, again.history.accepted)

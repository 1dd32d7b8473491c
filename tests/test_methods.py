"""The table of methods."""

import jax.numpy as jnp
import numpy as np
import pytest

from orlomo_jax import METHOD_NAMES, make_method


def test_the_four_rows():
    rows = {
        name: (m.worker_momentum, m.synchronous, m.num_workers)
        for name in METHOD_NAMES
        for m in [make_method(name, 4, momentum=0.8)]
    }
    assert rows == {
        "orlomo": (0.8, False, 4),
        "prsgdm": (0.8, True, 4),
        "al_sgd": (None, False, 4),
        "local_ormo_da": (None, False, 4),
    }


def test_merge_weights():
    eta = make_method("orlomo", 4, learning_rate=2.0).merge_weight
    assert float(eta(0, 0)) == 0.5
    assert float(eta(100, 20)) == pytest.approx(0.1)
    running = make_method("prsgdm", 4).merge_weight
    np.testing.assert_allclose(
        [running(jnp.int32(t), 0) for t in range(5)], [1, 1 / 2, 1 / 3, 1 / 4, 1]
    )


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (("adam", 4), {}, "`name` must be one of orlomo, prsgdm, al_sgd, local_ormo_da"),
        (("orlomo", 0), {}, "num_workers=0"),
        (("al_sgd", 4), {"momentum": 1.0}, "momentum=1.0"),
        (("prsgdm", 4), {"learning_rate": 0.5}, "learning_rate=0.5"),
        (("prsgdm", 4), {"delay_weight": lambda delay: 1.0}, "delay_weight"),
    ],
)
def test_bad_arguments(args, options, message):
    with pytest.raises(ValueError, match=message):
        make_method(*args, **options)

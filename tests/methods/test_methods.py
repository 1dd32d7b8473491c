"""The table of methods."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from orlomo_jax import Method, al_sgd, make_method, register_method
from orlomo_jax.methods import METHOD_NAMES


def test_the_four_rows():
    rows = {
        name: (m.worker_momentum, m.synchronous, m.num_workers, m.num_local_steps)
        for name in METHOD_NAMES
        for m in [make_method(name, 4, 8, momentum=0.8)]
    }
    assert rows == {
        "orlomo": (0.8, False, 4, 8),
        "prsgdm": (0.8, True, 4, 8),
        "al_sgd": (None, False, 4, 8),
        "local_ormo_da": (None, False, 4, 8),
    }


def test_a_list_of_local_steps_gives_the_same_method():
    """Else every run would compile anew."""
    first, again = (make_method("al_sgd", 2, [4, 3]) for _ in range(2))
    assert first is again is make_method("al_sgd", 2, (4, 3))


def test_merge_weights():
    eta = make_method("orlomo", 4, 8, learning_rate=2.0).model_state_weight
    assert float(eta(0, 0)) == 0.5
    assert float(eta(100, 20)) == pytest.approx(0.1)
    running = make_method("prsgdm", 4, 8).model_state_weight
    np.testing.assert_allclose(
        [running(jnp.int32(t), 0) for t in range(5)], [1, 1 / 2, 1 / 3, 1 / 4, 1]
    )


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (("adam", 4, 8), {}, "`name` must be one of orlomo, prsgdm, al_sgd, local_ormo_da"),
        ((["orlomo"], 4, 8), {}, r"`name` must be one of .*, got name=\['orlomo'\]"),
        (("orlomo", 0, 8), {}, "num_workers=0"),
        (("orlomo", 4, 0), {}, "`num_local_steps` must be ≥ 1, got num_local_steps=0"),
        (("al_sgd", 4, 8), {"momentum": 1.0}, "momentum=1.0"),
        (("prsgdm", 4, 8), {"learning_rate": 0.5}, "learning_rate=0.5"),
        (("prsgdm", 4, 8), {"delay_weight": lambda delay: 1.0}, "delay_weight"),
    ],
)
def test_bad_arguments(args, options, message):
    with pytest.raises(ValueError, match=message):
        make_method(*args, **options)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (("orlomo", 4, 8), {"beta": 0.9}, "takes the hyperparameters momentum, .*; got beta"),
        (("orlomo", 4, 8, 0.9), {}, "positional"),
        (("orlomo", 4), {}, "num_local_steps"),
        (("orlomo", 4, 2.5), {}, "num_local_steps=2.5"),
        (("orlomo", 4, np.array(2.5)), {}, "num_local_steps=array"),
        (("al_sgd", 4, 8), {"master_params": "no"}, "`master_params` must be True or .*='no'"),
        (("al_sgd", 4, 8), {"keep_local_state": 0}, "`keep_local_state` must be True .*=0"),
        (("ringmaster", 4, 8), {"max_delay": 4, "stops": "no"}, "`stops` must be True or .*='no'"),
        (("rennala", 4, 8), {"buffer_size": 4, "restart": 1}, "`restart` must be True or .*=1"),
    ],
)
def test_arguments_of_a_wrong_kind(args, options, message):
    with pytest.raises(TypeError, match=message):
        make_method(*args, **options)


def test_another_rule_leaves_the_rest():
    method = make_method("orlomo", 4, 8, momentum=0.8)
    rule = optax.chain(optax.scale(0.5), method.rule)
    assert method.with_rule(rule) == method._replace(rule=rule, factory=None) != method


def plain(num_workers, num_local_steps, rate=1.0):
    return Method("plain", al_sgd(num_workers, rate), num_workers, num_local_steps)


def test_a_registered_method_is_made_by_name():
    register_method("plain", plain)
    register_method("plain", plain)  # the same once more, as when a notebook cell runs again
    method = make_method("plain", 3, 2, rate=0.5, frozen={"a": True}, master_params=False)
    assert method[:4] == ("plain", method.rule, 3, 2)
    assert (method.frozen.leaves({"a": 1.0}), method.master_params) == ([True], False)
    assert make_method("plain", 3, 2) == make_method("plain", 3, 2) != method
    with pytest.raises(TypeError, match="`plain` takes the hyperparameters rate; got momentum"):
        make_method("plain", 3, 2, momentum=0.9)
    with pytest.raises(ValueError, match="num_workers=0"):
        make_method("plain", 0, 2)


@pytest.mark.parametrize("name", ["orlomo", "taken"])
def test_a_name_is_registered_once(name):
    if name == "taken":
        register_method(name, lambda *args: plain(*args)._replace(name="taken"))
    before = make_method(name, 2, 2)
    with pytest.raises(ValueError, match=f"`name` must be new, got name='{name}'"):
        register_method(name, plain)
    assert make_method(name, 2, 2) == before

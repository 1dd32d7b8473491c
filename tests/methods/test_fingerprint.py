"""What tells one run's settings from another's."""

import dataclasses
import functools
import os
import re
import subprocess
import sys
import threading
import warnings

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from orlomo_jax import (
    cast_reports,
    from_nnx,
    local_momentum_sgd,
    make_method,
    orlomo,
    with_fingerprint,
)
from orlomo_jax.checks import check_same
from orlomo_jax.methods.fingerprint import LIMIT, fingerprint

SCALE = 0.5


def loss_fn(params, model_state, batch, key):
    return SCALE * jnp.sum(params), (model_state, {})


def scaled(scale):
    return lambda x, power=2: scale * x**power


@dataclasses.dataclass(frozen=True)
class Loss:
    weight: float


class Plain:
    def __init__(self, weight):
        self.weight = weight


class Halving:
    def __call__(self, x):
        return 0.5 * x


class Thirding(Halving):
    __qualname__ = "Halving"

    def __call__(self, x):
        return 0.3 * x


Thirding.__call__.__qualname__ = "Halving.__call__"


class Hostile:
    def __getattr__(self, name):
        raise RuntimeError(name)


def nested(depth):
    inner = []
    for _ in range(depth):
        inner = [inner]
    return inner


class Slotted:
    __slots__ = ("weight",)

    def __init__(self, weight):
        self.weight = weight

    def loss(self, x):
        return self.weight * x


def recursive(weight):
    def function(x):
        return function(x - weight) if x > 0 else weight

    return function


def chain(norm):
    return optax.chain(optax.clip_by_global_norm(norm), orlomo(2))


def injected(momentum):
    static = ("num_workers", "delay_weight", "accumulator_dtype")
    make = optax.inject_hyperparams(orlomo, static_args=static, hyperparam_dtype=jnp.float32)
    return make(2, momentum=momentum)


def module(features):
    return from_nnx(nnx.Linear(2, features, rngs=nnx.Rngs(0)), lambda module, batch: 0.0)


round_of = functools.partial(local_momentum_sgd, loss_fn)
KINDS = {
    "closure": (scaled, 0.5, 0.3),
    "array in a closure": (lambda x: scaled(jnp.full(3, x)), 0.5, 0.3),
    "tuple in a closure": (lambda x: scaled((1, [x])), "a", "b"),
    "constant": (lambda which: [lambda d: 0.1, lambda d: 0.3][which], 0, 1),
    "integer": (lambda which: [lambda d: 1 / (1 + d), lambda d: 2 / (1 + d)][which], 0, 1),
    "large integer": (lambda which: [lambda d: d + 1000, lambda d: d + 2000][which], 0, 1),
    "comparison": (lambda which: [lambda x: x.ndim > 1, lambda x: x.ndim > 0][which], 0, 1),
    "flag": (lambda which: [lambda x: True, lambda x: False][which], 0, 1),
    "slice": (lambda which: [lambda x: x[1:2], lambda x: x[1:3]][which], 0, 1),
    "set in code": (lambda which: [lambda x: x in {1, 2}, lambda x: x in {1, 3}][which], 0, 1),
    "default argument": (lambda x: lambda d, scale=x: scale, 1, 2),
    "keyword default": (lambda x: lambda d, *, scale=x: scale, 1, 2),
    "Partial": (lambda x: jax.tree_util.Partial(loss_fn, np.full(9, x)), 1, 2),
    "partial": (lambda x: functools.partial(loss_fn, key=x), 1, 2),
    "jit": (lambda x: jax.jit(scaled(x)), 0.5, 0.3),
    "dataclass": (Loss, 0.5, 0.3),
    "object": (Plain, 0.5, 0.3),
    "method of an object with slots": (lambda x: Slotted(x).loss, 0.5, 0.3),
    "code of an object": (lambda which: [Halving, Thirding][which](), 0, 1),
    "pattern": (re.compile, "a", "b"),
    "recursion": (recursive, 1, 2),
    "array": (jnp.asarray, [1.0, 2.0], [1.0, 3.0]),
    "dtype": (jnp.zeros, 1, (1, 1)),
    "set": (frozenset, "ab", "ac"),
    "dict": (lambda x: {1: x}, 1, 2),
    "key": (jax.random.key, 1, 2),
    "chain": (chain, 1.0, 2.0),
    "optax schedule": (lambda x: optax.cosine_decay_schedule(x, 9), 0.1, 0.2),
    "injected hyperparameter": (injected, 0.5, 0.9),
    "NNX module": (lambda x: module(x).loss_fn, 3, 4),
    "S": (round_of, 1, 2),
    "weight decay": (lambda x: round_of(1, weight_decay=x), 0.1, 0.2),
    "gradient transform": (lambda x: round_of(1, gradient_transform=optax.clip(x)), 1.0, 2.0),
    "frozen": (lambda x: round_of(1, frozen={"a": x}), True, False),
    "wire": (lambda x: cast_reports(round_of(1), x), jnp.bfloat16, jnp.float16),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_counts(kind):
    make, one, other = KINDS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fingerprint(make(one)) == fingerprint(make(one))
        assert fingerprint(make(one)) != fingerprint(make(other))


METHOD = {
    "momentum": 0.5,
    "learning_rate": 0.5,
    "delay_weight": lambda delay: 0.1,
    "accumulator_dtype": jnp.float32,
    "frozen": {"a": True},
    "master_params": False,
    "num_workers": 3,
    "num_local_steps": 4,
}


@pytest.mark.parametrize("name", METHOD)
def test_every_argument_of_a_method_counts(name):
    options = {"name": "orlomo", "num_workers": 2, "num_local_steps": 1}
    base = make_method(**options).fingerprint
    other = make_method(**options | {name: METHOD[name]}).fingerprint
    assert base == make_method(**options).fingerprint != other
    assert isinstance(hash(base), int)
    changed = {path for path, text in set(base) ^ set(other)}
    assert any(name.split("_")[0] in path for path in changed), changed


def test_a_number_of_the_module_counts(monkeypatch):
    before = fingerprint(loss_fn)
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 0.25)
    assert before[".SCALE"] == "0.5"
    assert fingerprint(loss_fn)[".SCALE"] == "0.25"
    seen = set()
    for value in (jnp.ones(2), jnp.zeros(2), np.zeros(2)):
        monkeypatch.setattr(sys.modules[__name__], "SCALE", value)
        seen.add(fingerprint(loss_fn)[".SCALE"])
    assert len(seen) == 3, "arrays, by content and dtype"


JOB = """
def loss_fn(params):
    return params

if __name__ == "__main__":
    from orlomo_jax.methods.fingerprint import fingerprint
    print(fingerprint(loss_fn))
"""


def test_a_script_has_the_name_under_which_others_import_it(tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    imported = "import job; from orlomo_jax.methods.fingerprint import fingerprint as f"
    ways = (["job.py"], ["-m", "job"], ["-c", f"{imported}; print(f(job.loss_fn))"])
    for way in ways:
        run = subprocess.run(
            [sys.executable, *way], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert run.stdout.strip() == "{'': 'job.loss_fn'}"


def test_what_cannot_be_read_is_named_in_a_warning():
    lock, path = threading.Lock(), r"`loss_fn\.scale` carries \(_thread\.lock"
    with pytest.warns(UserWarning, match=path):
        found = fingerprint(scaled(lock), "loss_fn")
    assert found["loss_fn.scale"].startswith("_thread.lock")
    many = scaled([lock] + [0] * LIMIT)
    with pytest.warns(UserWarning, match=r"loss_fn\.scale\[0\]` carries"):
        fingerprint(many, "loss_fn")


@pytest.mark.parametrize("make", [Hostile, lambda: nested(5000), lambda: (i for i in "ab")])
def test_what_raises_counts_by_its_type(make):
    with pytest.warns(UserWarning, match="with_fingerprint"):
        assert any("unknown" in text for text in fingerprint(make()).values())


def test_a_text_of_ones_own():
    lock = threading.Lock()
    assert fingerprint(with_fingerprint(scaled(lock), "v1")) == {"": "v1"}
    rule = with_fingerprint(optax.scale(0.5), "v2")
    assert fingerprint(rule) == {".init": "v2", ".update": "v2"}
    assert rule.update(1.0, rule.init(1.0))[0] == 0.5
    method = make_method("orlomo", 2, 1)
    mine = [method.with_rule(with_fingerprint(chain(1.0), text)) for text in ("v1", "v2")]
    assert mine[0].fingerprint != mine[1].fingerprint


def test_the_settings_of_a_long_chain_have_names():
    """So that a checkpoint's refusal can say what differs."""

    def method(decay):
        matrix = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(decay))
        parts = optax.partition({2: matrix, 1: optax.scale_by_adam()}, jnp.ndim)
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), parts, optax.trace(0.9))
        return make_method("heloco", 4, 8, local_optimizer=optimizer)

    one, other = (dict(method(decay).fingerprint) for decay in (0.1, 0.2))
    assert one["method.num_workers"] == "4"
    assert one.keys() == other.keys()
    assert {(one[x], other[x]) for x in one if one[x] != other[x]} == {("0.1", "0.2")}


def test_large_objects_are_known_by_a_digest():
    one, other = (fingerprint(list(range(n, n + 2 * LIMIT))) for n in (0, 1))
    assert len(one) == 1
    assert one != other


CODE = """
import json, sys
from tests.methods import test_fingerprint as tests
kinds = tests.KINDS.items()
print(json.dumps({name: tests.fingerprint(make(one)) for name, (make, one, _) in kinds}))
"""


@pytest.mark.slow
def test_it_is_the_same_in_every_process():
    texts = [
        subprocess.run(
            [sys.executable, "-c", CODE],
            env=os.environ | {"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert texts[0] == texts[1]
    assert "0x" not in texts[0]


def test_what_differs_is_named_in_both_directions():
    with pytest.raises(ValueError, match=r"another b: it was written with 1, this run has nothing"):
        check_same("x", {"a": 1, "b": 1}, {"a": 1})
    with pytest.raises(ValueError, match=r"another a: it was written with p, this run has q"):
        check_same("x", {"a": ["r", "p"]}, {"a": ["q", "r"]})
    with pytest.raises(ValueError, match=r"another a: it was written with p, r, this run has r, p"):
        check_same("x", {"a": ["p", "r"]}, {"a": ["r", "p"]})

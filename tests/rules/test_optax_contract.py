"""The optax contracts, as one table: every rule × every contract."""

import inspect
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from orlomo_jax import LocalUpdate, rules
from tests.support import helpers
from tests.support.helpers import given

K, STEPS = 3, 7
RULES = {
    **helpers.RULES,
    "fedasync": lambda _, **options: rules.fedasync(0.5, **options),
    "fedbuff": rules.fedbuff,  # K is the buffer's size
    "nesterov": lambda num_workers, **options: rules.nesterov(num_workers, 0.5, **options),
    "delayed_nesterov": lambda num_workers, **options: rules.delayed_nesterov(
        num_workers, momentum=0.5, c=0.25, **options
    ),
    "momentum_lookahead": lambda num_workers, **options: rules.momentum_lookahead(
        num_workers, 0.5, **options
    ),
    "heloco": lambda num_workers, **options: rules.heloco(num_workers, 0.5, **options),
}
NEEDS_PARAMS = {"fedasync"}
INDICES = {"prsgdm": [0, 0, 0, 3, 3, 3, 6]}
CONTRACTS: dict[str, Callable] = {}


def contract(function: Callable) -> Callable:
    CONTRACTS[function.__name__] = function
    return function


def indices(name: str) -> list[int]:
    return INDICES.get(name, [0, 0, 1, 0, 3, 5, 4])


def reports(dtype=jnp.float32) -> list[LocalUpdate]:
    return [helpers.report(seed, dtype) for seed in range(STEPS)]


def has(name: str, argument: str) -> bool:
    """Whether a rule's function takes this argument."""
    return argument in inspect.signature(getattr(rules, name)).parameters


def run(name, rule, params=None, updates=None):
    params = helpers.tree() if params is None else params
    return helpers.run_rule(rule, params, reports() if updates is None else updates, indices(name))


@pytest.mark.parametrize("holds", CONTRACTS.values(), ids=CONTRACTS.keys())
@pytest.mark.parametrize("name", RULES)
def test_contract(name, holds):
    holds(name, RULES[name])


@contract
def is_a_transformation_with_a_named_tuple_state(name, make):
    rule = make(K)
    assert isinstance(rule, optax.GradientTransformationExtraArgs)
    state = rule.init(helpers.tree())
    assert isinstance(state, tuple)
    assert optax.tree.get(state, "step").dtype == jnp.int32
    momentum = getattr(state, "momentum", None)
    if momentum is not None:
        assert jax.tree.structure(momentum) == jax.tree.structure(helpers.tree())
    _, state = run(name, rule)
    assert int(state.step) == STEPS


@contract
def works_under_jit_without_retracing(name, make):
    rule, traces = make(K), []

    @jax.jit
    def step(update, state, params, index):
        traces.append(index)
        updates, state = rule.update(update, state, params, **given(helpers.tree(), index))
        return optax.apply_updates(params, updates), state

    params, state = helpers.tree(), make(K).init(helpers.tree())
    for update, index in zip(reports(), indices(name), strict=True):
        params, state = step(update, state, params, index)
    assert len(traces) == 1
    eager, _ = run(name, rule)
    helpers.assert_trees_close(params, eager, rtol=1e-5, atol=1e-6)


@contract
def takes_any_integer_as_index(name, make):
    rule, state, params = make(K), make(K).init(helpers.tree()), helpers.tree()
    expected, _ = rule.update(helpers.report(), state, params, **given(params))
    for index in (0, np.int64(0), np.uint8(0), jnp.int32(0), np.zeros((), int)):
        index = {"dispatched_at": index, "dispatched_version": index}
        updates, _ = rule.update(helpers.report(), state, params, **given(params) | index)
        helpers.assert_trees_equal(updates, expected)


@contract
def works_under_scan(name, make):
    rule = make(K)

    def step(carry, inputs):
        params, state = carry
        more = given(helpers.tree(), inputs[1])
        updates, state = rule.update(inputs[0], state, params, **more)
        return (optax.apply_updates(params, updates), state), None

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *reports())
    start = (helpers.tree(), rule.init(helpers.tree()))
    (params, _), _ = jax.lax.scan(step, start, (stacked, jnp.array(indices(name))))
    helpers.assert_trees_close(params, run(name, rule)[0], rtol=1e-5, atol=1e-6)


@contract
def works_under_vmap(name, make):
    """Many servers at once, each with its own index."""
    rule, params = make(K), helpers.tree()
    state = rule.init(params)._replace(step=jnp.int32(5))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *reports()[:4])
    which = jnp.array([0, 5, 2, 4])
    update = lambda u, i: rule.update(u, state, params, **given(params, i))  # noqa: E731
    updates, _ = jax.vmap(update)(stacked, which)
    for lane in range(4):
        single, _ = update(reports()[lane], which[lane])
        one = jax.tree.map(lambda x, lane=lane: x[lane], updates)
        helpers.assert_trees_close(one, single, rtol=1e-5, atol=1e-6)


@contract
def keeps_sharding(name, make):
    mesh = jax.make_mesh((2,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    put = partial(jax.device_put, device=sharding)
    rule, params = make(K), put(jnp.arange(8.0))
    state = rule.init(params)
    update = LocalUpdate(put(jnp.ones(8)), put(jnp.ones(8)))
    updates, new_state = jax.jit(rule.update)(update, state, params, **given(params))
    assert updates.sharding.is_equivalent_to(sharding, 1)
    for leaf in jax.tree.leaves((state, new_state)):
        assert leaf.ndim == 0 or leaf.sharding.is_equivalent_to(sharding, 1)


@contract
def takes_any_tree(name, make):
    trees = [jnp.ones(3), jnp.float32(2.0), {}, (), [None, jnp.zeros((0, 2))], {"a": np.ones(2)}]
    for params in trees:
        rule = make(K)
        update = LocalUpdate(params, params)
        updates, _ = rule.update(update, rule.init(params), params, **given(params))
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


@contract
def keeps_each_leafs_dtype(name, make):
    with jax.enable_x64(True):
        dtypes = {"a": jnp.bfloat16, "b": jnp.float16, "c": jnp.float32, "d": jnp.float64}
        dtypes["e"] = jnp.complex64
        params = {leaf: jnp.full(2, 0.5, dtype) for leaf, dtype in dtypes.items()}
        update, rule = LocalUpdate(params, params), make(K)
        updates, state = rule.update(update, rule.init(params), params, **given(params))
        _, state = rule.update(update, state, params, **given(params))
    assert {leaf: x.dtype for leaf, x in updates.items()} == dtypes
    if hasattr(state, "momentum"):
        assert {leaf: x.dtype for leaf, x in state.momentum.items()} == dtypes


@contract
def rounds_low_precision_once(name, make):
    """A bfloat16 step is the float32 step of the same numbers, rounded once."""
    low = [jax.tree.map(lambda x: x.astype(jnp.bfloat16), r) for r in reports()]
    wide = [jax.tree.map(lambda x: x.astype(jnp.float32), r) for r in low]
    options = {"accumulator_dtype": jnp.float32} if has(name, "accumulator_dtype") else {}
    rule, reference = make(K, **options), make(K)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), helpers.tree())
    wide_params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    state, wide_state = rule.init(params), reference.init(wide_params)
    for update, wide_update, index in zip(low, wide, indices(name), strict=True):
        updates, state = rule.update(update, state, params, **given(update.momentum, index))
        expected, wide_state = reference.update(
            wide_update, wide_state, wide_params, **given(wide_update.momentum, index)
        )
        rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), expected)
        helpers.assert_trees_equal(updates, rounded)


@contract
def ignores_params_and_unknown_extra_args(name, make):
    rule, state, more = make(K), make(K).init(helpers.tree()), given(helpers.tree())
    with_params, _ = rule.update(helpers.report(), state, helpers.tree(), value=1.0, **more)
    if name in NEEDS_PARAMS:
        with pytest.raises(ValueError, match=f"`{name}` needs the server's parameters"):
            rule.update(helpers.report(), state, None, **more)
    else:
        without, _ = rule.update(helpers.report(), state, None, **more)
        helpers.assert_trees_equal(with_params, without)


@contract
def takes_scaling_before_it(name, make):
    rule = optax.chain(optax.clip_by_global_norm(0.5), optax.scale(2.0), make(K))
    clipped = []
    for update in reports():
        scale = 2.0 * min(1.0, 0.5 / float(optax.tree.norm(update)))
        clipped.append(jax.tree.map(lambda x, scale=scale: x * scale, update))
    expected, _ = run(name, make(K), updates=clipped)
    helpers.assert_trees_close(run(name, rule)[0], expected, rtol=1e-5, atol=1e-6)


@contract
def takes_freezing_after_it(name, make):
    frozen = {"layer": False, "scale": True, "none": None, "empty": {}}
    rule = optax.chain(make(K), optax.masked(optax.set_to_zero(), frozen))
    params, _ = run(name, rule)
    free, _ = run(name, make(K))
    helpers.assert_trees_equal(params["scale"], helpers.tree()["scale"])
    helpers.assert_trees_equal(params["layer"], free["layer"])


@contract
def works_with_inject_hyperparams(name, make):
    factory = getattr(rules, name)
    static = [x for x in ("num_workers", "buffer_size", "delay_weight") if has(name, x)]
    injected = optax.inject_hyperparams(factory, static_args=static, hyperparam_dtype=jnp.float32)
    hyper = {"momentum": 0.5, "c": 0.25} if has(name, "c") else {"momentum": 0.5}
    hyper = {argument: x for argument, x in hyper.items() if has(name, argument)}
    scheduled = next((x for x in ("learning_rate", "mixing_rate") if has(name, x)), None)
    if scheduled is None:  # PRSGDm has no hyperparameter but K
        assert run(name, injected(K))[1].hyperparams == {}
        return
    first = () if name in NEEDS_PARAMS else (K,)
    schedule = optax.linear_schedule(1.0, 0.5, STEPS)
    params, state = run(name, injected(*first, **hyper, **{scheduled: schedule}))
    expected, _ = run(name, factory(*first, **hyper, **{scheduled: schedule}))
    helpers.assert_trees_close(params, expected, rtol=1e-5, atol=1e-6)
    assert float(state.hyperparams[scheduled]) == pytest.approx(float(schedule(STEPS - 1)))


@contract
def donates_its_state(name, make):
    """The new momentum is written into the old one's buffer."""
    rule, params = make(K), jnp.ones(1000)
    state = rule.init(params)
    step = jax.jit(partial(rule.update), donate_argnames="state")
    update = LocalUpdate(jnp.ones(1000), jnp.ones(1000))
    _, new_state = step(update, state, params, **given(params))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert int(new_state.step) == 1


@contract
def updates_in_place_in_one_pass(name, make):
    """With params and state donated, XLA needs no buffer of the params' size beside them."""
    rule, size = make(K), 100_000
    params = {"a": jnp.ones(size), "b": jnp.ones((size, 2))}

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, update, more):
        updates, state = rule.update(update, state, params, **more)
        return optax.apply_updates(params, updates), state

    args = (params, rule.init(params), LocalUpdate(params, params), given(params))
    memory = step.lower(*args).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * size
    donated = sum(x.nbytes for x in jax.tree.leaves(args[:2]))
    assert memory.alias_size_in_bytes >= donated


@contract
def makes_its_scalars_once(name, make):
    """Not in the loop over the parameters, for every one of them anew."""
    rule, size = make(K), 100_003
    params = jnp.ones(size)
    step = jax.jit(lambda state, *args: rule.update(args[0], state, args[1], **args[2]))
    args = (rule.init(params), LocalUpdate(params, params), params, given(params))
    text = step.lower(*args).compile().as_text()
    loops = [part for part in text.split("\n\n") if f"f32[{size}]" in part.partition("{")[0]]
    loops = [loop for loop in loops if "ENTRY" not in loop]
    assert loops
    for costly in ("power(", "divide(", "slice("):
        assert not any(costly in loop for loop in loops)


@contract
def unsupported_wrappers_fail_loudly(name, make):
    params, update = helpers.tree(), helpers.report()
    mask = jax.tree.map(lambda _: True, params)
    labels = jax.tree.map(lambda _: "all", params)
    wrappers = {
        "masked": optax.masked(make(K), mask),
        "masked by function": optax.masked(make(K), lambda p: jax.tree.map(lambda _: True, p)),
        "partition": optax.partition({"all": make(K)}, labels),
        "apply_if_finite": optax.apply_if_finite(make(K), 1),
        "MultiSteps": optax.MultiSteps(make(K), 2),
        "flatten": optax.flatten(make(K)),
    }
    for wrapper in wrappers.values():
        state = wrapper.init(params)
        with pytest.raises((ValueError, TypeError, KeyError)):
            wrapper.update(update, state, params, **given(params))

"""The optax contracts, as one table: every rule × every contract."""

import inspect
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from orlomo_jax import LocalUpdate
from tests.support import helpers
from tests.support.rule_cases import CASES, STEPS, K, reports, run, sent, stack

QUICK = {"orlomo", "local_ormo_da", "al_sgd", "prsgdm", "fedasync", "ringmaster"}
"""The rules that run with the quick tests; the others run with the slow ones."""
CONTRACTS: dict[str, Callable] = {}


def contract(function: Callable) -> Callable:
    CONTRACTS[function.__name__] = function
    return function


@pytest.mark.parametrize("holds", CONTRACTS.values(), ids=CONTRACTS.keys())
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, case in CASES.items()
    ],
)
def test_contract(case, holds):
    holds(case)


@contract
def is_a_transformation_with_a_named_tuple_state(case):
    rule = case.make(K)
    assert isinstance(rule, optax.GradientTransformationExtraArgs)
    state = rule.init(helpers.tree())
    assert isinstance(state, tuple)
    assert optax.tree.get(state, "step").dtype == jnp.int32
    if (momentum := optax.tree.get(state, "momentum")) is not None:
        assert jax.tree.structure(momentum) == jax.tree.structure(helpers.tree())
    _, state = run(case, rule)
    assert int(state.step) == STEPS


@contract
def works_under_jit_without_retracing(case):
    rule, traces = case.make(K), []

    @jax.jit
    def step(update, state, params, facts):
        traces.append(facts)
        updates, state = rule.update(update, state, params, **facts)
        return optax.apply_updates(params, updates), state

    params, state = helpers.tree(), case.make(K).init(helpers.tree())
    for t, update in enumerate(reports()):
        params, state = step(update, state, params, sent(case, t))
    assert len(traces) == 1
    eager, _ = run(case, rule)
    helpers.assert_trees_close(params, eager, rtol=1e-5, atol=1e-6)


@contract
def takes_any_integer_as_index(case):
    params = helpers.tree()
    rule, state = case.make(K), case.make(K).init(helpers.tree())
    for index in (0, np.int64(0), np.uint8(0), jnp.int32(0), np.zeros((), int)):
        ours = dict.fromkeys(("dispatched_at", "dispatched_version", "worker"), index)
        updates, _ = rule.update(helpers.report(), state, params, **{**sent(case), **ours})
        expected, _ = rule.update(helpers.report(), state, params, **sent(case))
        helpers.assert_trees_equal(updates, expected)


@contract
def works_under_scan(case):
    rule = case.make(K)

    def step(carry, inputs):
        params, state = carry
        updates, state = rule.update(inputs[0], state, params, **inputs[1])
        return (optax.apply_updates(params, updates), state), None

    stacked = stack(reports()), stack([sent(case, t) for t in range(STEPS)])
    (params, _), _ = jax.lax.scan(step, (helpers.tree(), rule.init(helpers.tree())), stacked)
    helpers.assert_trees_close(params, run(case, rule)[0], rtol=1e-5, atol=1e-6)


@contract
def works_under_vmap(case):
    """Many servers at once, each with its own index."""
    rule, params = case.make(K), helpers.tree()
    state = rule.init(helpers.tree())._replace(step=jnp.int32(5))
    if "version" in state._fields:
        state = state._replace(version=jnp.int32(2))
    facts = [{**sent(case, t), "dispatched_at": i} for t, i in enumerate((0, 5, 2, 4))]
    lanes = stack(reports()[:4]), stack(facts)
    updates, _ = jax.vmap(lambda u, facts: rule.update(u, state, params, **facts))(*lanes)
    for lane in range(4):
        single, _ = rule.update(reports()[lane], state, params, **facts[lane])
        one = jax.tree.map(lambda x, lane=lane: x[lane], updates)
        helpers.assert_trees_close(one, single, rtol=1e-5, atol=1e-6)


@contract
def keeps_sharding(case):
    mesh = jax.make_mesh((2,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    put = partial(jax.device_put, device=sharding)
    rule, params = case.make(K), put(jnp.arange(8.0))
    state = rule.init(params)
    update = LocalUpdate(put(jnp.ones(8)), put(jnp.ones(8)))
    updates, new_state = jax.jit(rule.update)(update, state, params, **sent(case, 0, params))
    assert updates.sharding.is_equivalent_to(sharding, 1)
    for leaf in jax.tree.leaves((state, new_state)):  # an axis of workers is not sharded
        spec = jax.sharding.PartitionSpec(*[None] * (leaf.ndim - 1), "x")
        wanted = jax.sharding.NamedSharding(mesh, spec)
        assert leaf.ndim == 0 or leaf.sharding.is_equivalent_to(wanted, leaf.ndim)


@contract
def takes_any_tree(case):
    trees = [jnp.ones(3), jnp.float32(2.0), {}, (), [None, jnp.zeros((0, 2))], {"a": np.ones(2)}]
    for params in trees:
        rule = case.make(K)
        update, state = LocalUpdate(params, params), rule.init(params)
        updates, _ = rule.update(update, state, params, **sent(case, 0, params))
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


@contract
def keeps_each_leafs_dtype(case):
    with jax.enable_x64(True):
        dtypes = {"a": jnp.bfloat16, "b": jnp.float16, "c": jnp.float32, "d": jnp.float64}
        dtypes["e"] = jnp.complex64
        params = {leaf: jnp.full(2, 0.5, dtype) for leaf, dtype in dtypes.items()}
        update, rule = LocalUpdate(params, params), case.make(K)
        updates, state = rule.update(update, rule.init(params), params, **sent(case, 0, params))
        _, state = rule.update(update, state, params, **sent(case, 0, params))
    assert {leaf: x.dtype for leaf, x in updates.items()} == dtypes
    if (momentum := optax.tree.get(state, "momentum")) is not None:
        assert {leaf: x.dtype for leaf, x in momentum.items()} == dtypes


@contract
def works_with_strict_dtype_promotion(case):
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2)}
    update, rule = LocalUpdate(params, params), case.make(K)
    expected, _ = run(case, rule, params, [update] * STEPS)
    with jax.numpy_dtype_promotion("strict"):
        strict, _ = run(case, rule, params, [update] * STEPS)
    helpers.assert_trees_equal(strict, expected)


@contract
def rounds_low_precision_once(case):
    """A bfloat16 step is the float32 step of the same numbers, rounded once."""
    low = [jax.tree.map(lambda x: x.astype(jnp.bfloat16), r) for r in reports()]
    wide = [jax.tree.map(lambda x: x.astype(jnp.float32), r) for r in low]
    rule, reference = case.make(K, **case.takes("accumulator_dtype", jnp.float32)), case.make(K)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), helpers.tree())
    wide_params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    state, wide_state = rule.init(params), reference.init(wide_params)
    for t, (update, wide_update) in enumerate(zip(low, wide, strict=True)):
        updates, state = rule.update(update, state, params, **sent(case, t, update.momentum))
        more = sent(case, t, wide_update.momentum)
        expected, wide_state = reference.update(wide_update, wide_state, wide_params, **more)
        rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), expected)
        helpers.assert_trees_equal(updates, rounded)


@contract
def ignores_params_and_unknown_extra_args(case):
    rule, state = case.make(K), case.make(K).init(helpers.tree())
    with_params, _ = rule.update(
        helpers.report(), state, helpers.tree(), **sent(case), value=1.0, unknown=3
    )
    if case.needs_params:
        with pytest.raises(ValueError, match="needs the server's parameters"):
            rule.update(helpers.report(), state, None, **sent(case))
        return
    without, _ = rule.update(helpers.report(), state, None, **sent(case))
    helpers.assert_trees_equal(with_params, without)


@contract
def takes_scaling_before_it(case):
    rule = optax.chain(optax.clip_by_global_norm(0.5), optax.scale(2.0), case.make(K))
    clipped = []
    for update in reports():
        scale = 2.0 * min(1.0, 0.5 / float(optax.tree.norm(update)))
        clipped.append(jax.tree.map(lambda x, scale=scale: x * scale, update))
    expected, _ = run(case, case.make(K), updates=clipped)
    helpers.assert_trees_close(run(case, rule)[0], expected, rtol=1e-5, atol=1e-6)


@contract
def takes_freezing_after_it(case):
    frozen = {"layer": False, "scale": True, "none": None, "empty": {}}
    rule = optax.chain(case.make(K), optax.masked(optax.set_to_zero(), frozen))
    params, _ = run(case, rule)
    free, _ = run(case, case.make(K))
    helpers.assert_trees_equal(params["scale"], helpers.tree()["scale"])
    helpers.assert_trees_equal(params["layer"], free["layer"])


@contract
def works_with_inject_hyperparams(case):
    names = inspect.signature(case.factory).parameters
    hyper = {name: x for name, x in case.arguments.items() if isinstance(x, float)}
    schedule = optax.linear_schedule(1.0, 0.5, STEPS)
    rates = {name: schedule for name in names if name.endswith("learning_rate")}
    injected = optax.inject_hyperparams(
        case.factory,
        static_args=[name for name in names if name not in {**hyper, **rates}],
        hyperparam_dtype=jnp.float32,
    )
    rule = injected(**case.takes("num_workers"), **{**case.arguments, **rates})
    params, state = run(case, rule)
    expected, _ = run(case, case.make(K, **rates))
    helpers.assert_trees_close(params, expected, rtol=1e-5, atol=1e-6)
    assert set(state.hyperparams) == {*hyper, *rates}
    for name in rates:
        assert float(state.hyperparams[name]) == pytest.approx(float(schedule(STEPS - 1)))


@contract
def donates_its_state(case):
    """The new momentum is written into the old one's buffer."""
    rule, params = case.make(K), jnp.ones(1000)
    state = rule.init(params)
    step = jax.jit(partial(rule.update), donate_argnames="state")
    update = LocalUpdate(jnp.ones(1000), jnp.ones(1000))
    _, new_state = step(update, state, params, **sent(case, 0, params))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert int(new_state.step) == 1


@contract
def updates_in_place_in_one_pass(case):
    """With params and state donated, XLA needs no buffer of the params' size beside them."""
    rule, size = case.make(K), 100_000
    params = {"a": jnp.ones(size), "b": jnp.ones((size, 2))}

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, update, facts):
        updates, state = rule.update(update, state, params, **facts)
        return optax.apply_updates(params, updates), state

    args = (params, rule.init(params), LocalUpdate(params, params), sent(case, 0, params))
    memory = step.lower(*args).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * size
    donated = sum(x.nbytes for x in jax.tree.leaves(args[:2]) if x.ndim)
    assert memory.alias_size_in_bytes >= donated


@contract
def makes_its_scalars_once(case):
    """Not in the loop over the parameters, for every one of them anew."""
    rule, size = case.make(K), 100_003
    params = jnp.ones(size)
    step = jax.jit(lambda update, state, facts: rule.update(update, state, params, **facts))
    args = LocalUpdate(params, params), rule.init(params), sent(case, 0, params)
    text = step.lower(*args).compile().as_text()
    loops = [part for part in text.split("\n\n") if f"f32[{size}]" in part.partition("{")[0]]
    loops = [loop for loop in loops if "ENTRY" not in loop]
    assert loops
    for costly in {"power(", "divide(", "slice("} - set(case.costly):
        assert not any(costly in loop for loop in loops)


@contract
def unsupported_wrappers_fail_loudly(case):
    params, update = helpers.tree(), helpers.report()
    mask = jax.tree.map(lambda _: True, params)
    labels = jax.tree.map(lambda _: "all", params)
    wrappers = {
        "masked": optax.masked(case.make(K), mask),
        "masked by function": optax.masked(case.make(K), lambda p: jax.tree.map(lambda _: True, p)),
        "partition": optax.partition({"all": case.make(K)}, labels),
        "apply_if_finite": optax.apply_if_finite(case.make(K), 1),
        "MultiSteps": optax.MultiSteps(case.make(K), 2),
        "flatten": optax.flatten(case.make(K)),
    }
    for wrapper in wrappers.values():
        state = wrapper.init(params)
        with pytest.raises((ValueError, TypeError, KeyError)):
            wrapper.update(update, state, params, **sent(case))

"""The NNX adapter: pure functions that agree with the module they came from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from orlomo_jax import ArrivalTrace, from_nnx, local_momentum_sgd, make_method, simulate


class Net(nnx.Module):
    def __init__(self, rngs, rate=0.5):
        self.layers = nnx.List([nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)])
        self.norm = nnx.BatchNorm(8, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.dropout_too = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.layers[0](x))
        self.features = nnx.Intermediate(x)
        return self.layers[1](self.dropout_too(self.dropout(x)))


def criterion(module, batch):
    inputs, targets = batch
    outputs = module(inputs)
    return ((outputs - targets) ** 2).mean(), {"largest": abs(outputs).max()}


def net(rate=0.5):
    return Net(nnx.Rngs(jax.random.key(1)), rate)


def example_batch(*leading):
    inputs = jax.random.normal(jax.random.key(2), (*leading, 16, 3))
    return inputs, inputs[..., :2] * 3 + 1


KEY = jax.random.key(3)


def test_a_class_instead_of_a_module():
    with pytest.raises(TypeError, match=r"must be an nnx\.Module, got the class Linear"):
        from_nnx(nnx.Linear, criterion)


@pytest.mark.parametrize(
    ("result", "form"),
    [
        ([1.0, {}], "a list"),
        ((1.0, {}, 2.0), "a tuple"),
        ({"loss": 1.0}, "a dict"),
        (None, "a NoneType"),
        (([1.0], {}), r"\(list, …\)"),
    ],
)
def test_a_criterion_that_does_not_return_a_loss(result, form):
    model = from_nnx(net(), lambda module, batch: result)
    with pytest.raises(TypeError, match=rf"`criterion` must return the loss or .*, got {form}"):
        model.loss_fn(*model[:2], example_batch(), KEY)


def test_params_and_state_are_plain_and_hold_no_random_state():
    model = from_nnx(net(), criterion)
    assert set(model.params) == {"layers", "norm"}
    assert set(model.params["layers"]) == {0, 1}
    assert jax.tree.map(jnp.shape, model.model_state) == {"norm": {"mean": (8,), "var": (8,)}}
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(model[:2]))


def test_loss_gradient_and_statistics_are_the_modules_own():
    module, batch = net(rate=0.0), example_batch()
    model = from_nnx(module, criterion)
    value_and_grad = jax.value_and_grad(model.loss_fn, has_aux=True)
    (loss, (state, metrics)), gradient = value_and_grad(*model[:2], batch, KEY)
    assert module.norm.mean[...].tolist() == [0.0] * 8  # only read

    module.train()
    (own, _), own_gradient = nnx.value_and_grad(criterion, has_aux=True)(module, batch)
    np.testing.assert_allclose(loss, own, rtol=1e-6)
    np.testing.assert_allclose(state["norm"]["mean"], module.norm.mean[...], rtol=1e-6)
    np.testing.assert_allclose(state["norm"]["var"], module.norm.var[...], rtol=1e-6)
    for leaf, same in zip(
        jax.tree.leaves(gradient),
        jax.tree.leaves(nnx.to_pure_dict(nnx.state(own_gradient))),
        strict=True,
    ):
        np.testing.assert_allclose(leaf, same, rtol=1e-5, atol=1e-6)
    assert set(metrics) == {"largest"}


def test_predict_uses_the_given_statistics_and_no_dropout():
    module, (inputs, _) = net(), example_batch()
    model = from_nnx(module, criterion)
    state = {"norm": {"mean": jnp.full(8, 0.5), "var": jnp.full(8, 4.0)}}
    module.norm.mean[...], module.norm.var[...] = state["norm"]["mean"], state["norm"]["var"]
    module.eval()
    np.testing.assert_allclose(
        model.predict(model.params, state, inputs), module(inputs), rtol=1e-6
    )
    elsewhere = model.predict(model.params, model.model_state, inputs)
    assert not np.allclose(elsewhere, module(inputs))


def test_dropout_follows_the_key_and_layers_have_masks_of_their_own():
    class Ones(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second = (nnx.Dropout(0.5, rngs=rngs) for _ in range(2))

        def __call__(self, x):
            return self.first(x), self.second(x)

    model = from_nnx(Ones(nnx.Rngs(0)), lambda module, x: (0.0, module(x)))
    masks = lambda seed: model.loss_fn({}, {}, jnp.ones(64), jax.random.key(seed))[1][1]  # noqa: E731
    (first, second), (again, _), (other, _) = masks(0), masks(0), masks(1)
    np.testing.assert_array_equal(first, again)
    assert (first != second).any()
    assert (first != other).any()
    for output in model.predict({}, {}, jnp.ones(64)):
        np.testing.assert_array_equal(output, np.ones(64))


def test_streams_of_a_vmapped_module_are_split():
    @nnx.split_rngs(splits=4)
    @nnx.vmap
    def make(rngs):
        return nnx.Dropout(0.5, rngs=rngs)

    apply = nnx.vmap(lambda module, x: module(x), in_axes=(0, None))
    model = from_nnx(make(nnx.Rngs(0)), lambda module, x: (0.0, apply(module, x)))
    masks = model.loss_fn({}, {}, jnp.ones(32), KEY)[1][1]
    assert len({tuple(mask.tolist()) for mask in masks}) == 4


@pytest.mark.slow
def test_jit_scan_and_vmap():
    model = from_nnx(net(), criterion)
    round_fn = local_momentum_sgd(model.loss_fn, num_local_steps=4)
    batches = example_batch(4)
    result = round_fn(*model[:2], batches, 0.01, KEY)
    assert result.finite
    assert result.metrics["largest"].shape == (4,)
    assert jax.tree.structure(result.model_state) == jax.tree.structure(model.model_state)

    keys = jax.random.split(KEY, 3)
    many = jax.vmap(lambda key: round_fn(*model[:2], batches, 0.01, key).loss)(keys)
    one = round_fn(*model[:2], batches, 0.01, keys[1]).loss
    np.testing.assert_allclose(many[1], one, rtol=1e-5)


@pytest.mark.slow
def test_it_trains_in_the_simulator():
    model = from_nnx(net(rate=0.1), criterion)
    method = make_method("orlomo", num_workers=2, num_local_steps=4)

    def batch_fn(key, worker, round):
        key = jax.random.fold_in(jax.random.fold_in(key, worker), round)
        inputs = jax.random.normal(key, (4, 16, 3))
        return inputs, inputs[..., :2] * 3 + 1

    result = simulate(
        method,
        model.loss_fn,
        batch_fn,
        model.params,
        trace=ArrivalTrace.from_workers([0, 1, 1, 0] * 15, num_workers=2),
        key=KEY,
        model_state=model.model_state,
        local_learning_rate=0.02,
    )
    assert result.history.loss[-8:].mean() < 0.4 * result.history.loss[:4].mean()
    assert (result.model_state["norm"]["var"] > 0).all()


def test_an_abstract_module_gives_the_functions():
    model = from_nnx(net(), criterion)
    abstract = from_nnx(nnx.eval_shape(net), criterion)
    batch = example_batch()
    same = abstract.loss_fn(*model[:2], batch, KEY)[0]
    assert same == model.loss_fn(*model[:2], batch, KEY)[0]


def test_counters_are_model_state():
    class Counter(nnx.Module):
        def __init__(self):
            self.calls = nnx.BatchStat(jnp.int32(0))
            self.scale = nnx.Param(jnp.ones(()))

    def count(module, batch):
        module.calls[...] += 1
        return module.scale[...] ** 2

    model = from_nnx(Counter(), count)
    round_fn = local_momentum_sgd(model.loss_fn, 3)
    result = round_fn(model.params, model.model_state, jnp.zeros((3, 1)), 0.1, KEY)
    assert int(result.model_state["calls"]) == 3


def test_a_missing_model_state_is_named():
    model = from_nnx(net(), criterion)
    with pytest.raises(ValueError, match="`model_state` must be like that of from_nnx"):
        model.loss_fn(model.params, None, example_batch(), KEY)


def test_only_what_is_asked_for_is_trained():
    module = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.LoRA(4, 2, 2, rngs=nnx.Rngs(1)))
    model = from_nnx(module, criterion, wrt=nnx.LoRAParam)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(model.params)]
    assert len(paths) == 2
    assert all("lora" in path for path in paths)
    batch = example_batch()
    gradient = jax.grad(lambda p: model.loss_fn(p, model.model_state, batch, KEY)[0])(model.params)
    assert any(leaf.any() for leaf in jax.tree.leaves(gradient))
    whole = from_nnx(module, criterion)
    assert model.loss_fn(*model[:2], batch, KEY)[0] == whole.loss_fn(*whole[:2], batch, KEY)[0]


@pytest.mark.parametrize("train_mode", [True, False])
def test_a_batch_norm_keeps_its_statistics_where_it_is_asked_to(train_mode):
    module = nnx.BatchNorm(3, use_running_average=True, rngs=nnx.Rngs(0))
    model = from_nnx(module, lambda module, x: (module(x) ** 2).mean(), train_mode=train_mode)
    _, (state, _) = model.loss_fn(*model[:2], jnp.ones((4, 3)), KEY)
    assert bool(state["mean"].any()) == train_mode

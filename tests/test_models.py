"""The experiments' models: the paper's sizes, PyTorch's padding, and the form they share."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import models
from experiments.models import resnet, squeezenet

KEY = jax.random.key(0)
quickly = partial(jax.jit, compiler_options=models.QUICK_TO_COMPILE)


@pytest.mark.parametrize(
    ("name", "num_classes", "size", "count"),
    [
        ("resnet20", 10, 32, 269_722),
        ("resnet20", 100, 32, 275_572),
        ("resnet32", 200, 64, 476_504),
        ("squeezenet", 10, 32, 734_986),
        ("squeezenet", 100, 32, 781_156),
        ("resnet8", 10, 32, 75_290),
        ("mlp", 10, 8, 13_002),
    ],
)
def test_parameter_counts(name, num_classes, size, count):
    network = models.make(name, num_classes, (size, size, 3))
    params, model_state = jax.eval_shape(network.init, KEY)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
    images = jax.ShapeDtypeStruct((5, size, size, 3), jnp.float32)
    logits = jax.eval_shape(network.predict, params, model_state, images)
    assert logits.shape == (5, num_classes)
    # As many statistics as BatchNorm has scales and biases.
    norms = [leaf for path, leaf in jax.tree.leaves_with_path(params) if "norm" in str(path)]
    statistics = sum(leaf.size for leaf in jax.tree.leaves(model_state))
    assert statistics == sum(leaf.size for leaf in norms)


@pytest.mark.parametrize("name", models.NAMES)
def test_bfloat16_computes_on_float32_parameters(name):
    network = models.make(name, 10, (16, 16, 3), width=0.25, dtype=jnp.bfloat16)
    variables = jax.eval_shape(network.init, KEY)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    predict = jax.make_jaxpr(network.predict)(*variables, images)
    assert predict.out_avals[0].dtype == jnp.float32
    heavy = {"conv_general_dilated", "dot_general"}
    dtypes = [
        str(equation.outvars[0].aval.dtype)
        for equation in predict.eqns
        if equation.primitive.name in heavy
    ]
    assert dtypes.count("float32") == 1  # the classifier
    assert dtypes.count("bfloat16") == len(dtypes) - 1 > 0


@pytest.mark.parametrize("name", ["resnet8", "squeezenet"])
def test_slim_networks_train(name):
    network = models.make(name, 10, (8, 8, 3), width=0.125)
    params, model_state = network.init(KEY)
    batch = jax.random.normal(KEY, (10, 8, 8, 3)), jnp.arange(10)

    @quickly
    def descend(params, model_state):
        value_and_grad = jax.value_and_grad(network.loss_fn, has_aux=True)
        (loss, (model_state, _)), gradient = value_and_grad(params, model_state, batch, KEY)
        params = jax.tree.map(lambda w, g: w - 0.1 * g, params, gradient)
        return params, model_state, loss

    losses = []
    for _ in range(12):
        params, model_state, loss = descend(params, model_state)
        losses.append(float(loss))
    assert 1.5 < losses[0] < 5  # He initialisation: logits of order one
    assert min(losses) < 0.7 * losses[0]


def test_seeds_differ_and_repeat():
    network = models.make("mlp", 10, (8, 8))
    one, same, other = (network.init(jax.random.key(seed))[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one[0]["kernel"], same[0]["kernel"])
    assert (one[0]["kernel"] != other[0]["kernel"]).any()


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"one of mlp, resnet8, .*squeezenet, got 'resnet18'"):
        models.make("resnet18", 10, (32, 32, 3))


def test_stride_two_pads_as_pytorch_does():
    """The first output of a row sees pixels −1, 0, 1; with "SAME" it would see 0, 1, 2."""
    conv = resnet.conv3x3(1, 1, strides=2, rngs=nnx.Rngs(0))
    conv.kernel[...] = jnp.ones((3, 3, 1, 1))
    row = conv(jnp.arange(64.0).reshape(1, 8, 8, 1))[0, 0, :, 0]
    image = np.pad(np.arange(64.0).reshape(8, 8), 1)
    np.testing.assert_array_equal(row, [image[:3, 2 * x : 2 * x + 3].sum() for x in range(4)])


def test_the_shortcut_subsamples_and_pads_channels_with_zeros():
    block = resnet.Block(2, 4, jnp.float32, nnx.Rngs(0))
    block.norm2.scale[...] = jnp.zeros(4)  # leaves the shortcut alone
    x = jax.random.uniform(KEY, (1, 4, 4, 2))
    expected = np.zeros((1, 2, 2, 4))
    expected[..., 1:3] = x[:, ::2, ::2]
    np.testing.assert_array_equal(block(x), expected)


def test_squeezenet_bypasses_fires_three_five_and_seven():
    """Where each bypassed fire gives zeros, the network is as if they were not there."""
    net = squeezenet.SqueezeNet(10, width=0.0625, rngs=nnx.Rngs(0))
    for index in (1, 3, 5):
        for unit in (net.fires[index].expand1, net.fires[index].expand3):
            unit.norm.scale[...] = jnp.zeros_like(unit.norm.scale[...])

    def without(net, images):
        x = squeezenet.max_pool(net.stem(images))
        x = squeezenet.max_pool(net.fires[2](net.fires[0](x)))
        x = squeezenet.max_pool(net.fires[6](net.fires[4](x)))
        return net.classifier(net.fires[7](x)).mean((1, 2))

    graphdef, state = nnx.split(net)
    images = jax.random.normal(KEY, (2, 16, 16, 3))
    run = lambda call: quickly(lambda state: call(nnx.merge(graphdef, state), images))(state)  # noqa: E731
    np.testing.assert_allclose(run(lambda net, x: net(x)), run(without), rtol=1e-5, atol=1e-6)


def test_he_initialisation():
    kernel = resnet.HE_NORMAL(KEY, (3, 3, 64, 64), jnp.float32)
    assert float(kernel.std()) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)

"""The experiments' models: the paper's sizes, PyTorch's padding, and the form they share."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import models
from experiments.models import layers, resnet, squeezenet
from experiments.models.layers import Layers

KEY = jax.random.key(0)
FORMS = ("xla", "matmul")
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


@pytest.mark.slow
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


def swapped(images, form):
    """Channels last to the form's layout of features, and back."""
    return jnp.transpose(images, (3, 1, 2, 0)) if form == "matmul" else images


@pytest.mark.parametrize("form", FORMS)
def test_stride_two_pads_as_pytorch_does(form):
    """The first output of a row sees pixels −1, 0, 1; with "SAME" it would see 0, 1, 2."""
    conv = Layers(form).conv(1, 1, 3, stride=2, bias=False, rngs=nnx.Rngs(0))
    conv.kernel[...] = jnp.ones((3, 3, 1, 1))
    image = jnp.arange(64.0).reshape(1, 8, 8, 1)
    row = swapped(conv(swapped(image, form)), form)[0, 0, :, 0]
    padded = np.pad(np.arange(64.0).reshape(8, 8), 1)
    np.testing.assert_array_equal(row, [padded[:3, 2 * x : 2 * x + 3].sum() for x in range(4)])


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_the_shortcut_subsamples_and_pads_channels_with_zeros(form):
    block = resnet.Block(2, 4, Layers(form), nnx.Rngs(0))
    block.norm2.scale[...] = jnp.zeros(4)  # leaves the shortcut alone
    x = jax.random.uniform(KEY, (1, 4, 4, 2))
    expected = np.zeros((1, 2, 2, 4))
    expected[..., 1:3] = x[:, ::2, ::2]
    np.testing.assert_array_equal(swapped(block(swapped(x, form)), form), expected)


def evaluate_everything(name, form, variables, batch):
    """Return loss, statistics, gradients and logits of a slim network in one form."""
    network = models.make(name, 10, batch[0].shape[1:], width=0.25, convolution=form)

    @quickly
    def run(params, model_state):
        value_and_grad = jax.value_and_grad(network.loss_fn, has_aux=True)
        (loss, (statistics, _)), gradients = value_and_grad(params, model_state, batch, KEY)
        return loss, statistics, gradients, network.predict(params, statistics, batch[0])

    return run(*variables)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet8", "squeezenet"])
def test_both_forms_of_convolution_are_the_same_network(name):
    """Parameters to the bit; loss, statistics, gradients and logits to rounding."""
    batch = jax.random.normal(KEY, (6, 16, 16, 3)), jnp.arange(6)
    made = {
        form: models.make(name, 10, (16, 16, 3), width=0.25, convolution=form).init(KEY)
        for form in FORMS
    }
    jax.tree.map(np.testing.assert_array_equal, made["xla"], made["matmul"])
    # Biases and scales off their initial 0 and 1.
    params, model_state = jax.tree.map(lambda x: x + 0.1, made["xla"])
    xla, matmul = (evaluate_everything(name, form, (params, model_state), batch) for form in FORMS)

    def close(mine, theirs):
        scale = float(jnp.abs(theirs).max())
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-4 * max(scale, 0.1))

    jax.tree.map(close, matmul, xla)


def test_a_cpu_takes_matrix_products_of_its_own_accord():
    network = models.make("resnet8", 10, (8, 8, 3), width=0.125)
    variables = jax.eval_shape(network.init, KEY)
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    convolves = "conv_general_dilated" in str(jax.make_jaxpr(network.predict)(*variables, images))
    assert convolves == (jax.default_backend() != "cpu")


@pytest.mark.slow
def test_squeezenet_bypasses_fires_three_five_and_seven():
    """Where each bypassed fire gives zeros, the network is as if they were not there."""
    build = lambda: squeezenet.SqueezeNet(10, width=0.0625, layers=Layers(), rngs=nnx.Rngs(0))  # noqa: E731
    graphdef, shapes = nnx.split(nnx.eval_shape(build))
    rng = np.random.default_rng(0)  # any parameters will do; to draw them costs no compiling
    net = nnx.merge(
        graphdef, jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.1, 1, x.shape), x.dtype), shapes)
    )
    for index in (1, 3, 5):
        for unit in (net.fires[index].expand1, net.fires[index].expand3):
            unit.norm.scale[...] = jnp.zeros_like(unit.norm.scale[...])

    def without(net, images):
        x = layers.max_pool(net.stem(images))
        x = layers.max_pool(net.fires[2](net.fires[0](x)))
        x = layers.max_pool(net.fires[6](net.fires[4](x)))
        return net.classifier(net.fires[7](x)).mean((1, 2))

    graphdef, state = nnx.split(net)
    images = jax.random.normal(KEY, (2, 16, 16, 3))
    run = lambda call: quickly(lambda state: call(nnx.merge(graphdef, state), images))(state)  # noqa: E731
    np.testing.assert_allclose(run(lambda net, x: net(x)), run(without), rtol=1e-5, atol=1e-6)


def test_he_initialisation():
    kernel = layers.HE_NORMAL(KEY, (3, 3, 64, 64), jnp.float32)
    assert float(kernel.std()) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)

"""Layers in C++ compute what XLA and Flax compute, also in loops and under vmap."""

import os
import shlex
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import models
from experiments.models import native
from experiments.models.native import library

COMPILER = (shlex.split(os.environ.get("CXX", "")) or ["g++"])[0]
pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason="needs a C++ compiler")
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def by_xla(images, kernel, stride):
    padding = len(kernel) // 2
    return jax.lax.conv_general_dilated(
        images,
        kernel,
        (stride, stride),
        ((padding, padding),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )


def drawn(*shapes):
    keys = jax.random.split(jax.random.key(len(shapes)), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize(
    ("shape", "outputs", "window", "stride"),
    [
        ((5, 9, 7, 3), 16, 3, 1),
        ((3, 8, 8, 16), 47, 3, 2),  # vectors of all lengths
        pytest.param((1, 7, 10, 5), 7, 3, 2, marks=pytest.mark.slow),
        pytest.param((2, 4, 4, 8), 4, 1, 1, marks=pytest.mark.slow),
        pytest.param((3, 5, 6, 8), 4, 1, 2, marks=pytest.mark.slow),  # pixels without a product
        pytest.param((2, 8, 3, 4), 4, 5, 3, marks=pytest.mark.slow),
        pytest.param((17, 32, 32, 16), 16, 3, 1, marks=pytest.mark.slow),  # pieces, bands of rows
        pytest.param((70, 2, 2, 32), 32, 3, 1, marks=pytest.mark.slow),  # bands of images
    ],
)
def test_values_and_gradients(shape, outputs, window, stride):
    images, kernel = drawn(shape, (window, window, shape[-1], outputs))
    want, pull = jax.vjp(lambda *args: by_xla(*args, stride), images, kernel)
    (cotangent,) = drawn(want.shape)
    got, own_pull = jax.vjp(lambda *args: native.convolve(*args, stride), images, kernel)
    np.testing.assert_allclose(got, want, **CLOSE)
    for mine, theirs in zip(own_pull(cotangent), pull(cotangent), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5 * abs(theirs).max())


def normalized(x, scale, bias, shortcut, epsilon=1e-5):
    """The formula in jax.numpy."""
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    y = (x - mean) / jnp.sqrt(var + epsilon) * scale + bias
    return (jax.nn.relu(y if shortcut is None else y + shortcut), mean, var)


@pytest.mark.parametrize("with_shortcut", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        (4, 8, 8, 16),  # the inner loops have a constant length
        (3, 5, 5, 12),  # they have not, and their last piece is shorter
        (2, 3, 3, 100),
        (24, 16, 16, 16),  # on several threads
    ],
)
def test_batch_norm_values_and_gradients(shape, with_shortcut):
    x, shortcut, cotangent = drawn(shape, shape, shape)
    scale, bias = drawn(shape[-1:], shape[-1:])
    args = 2 * x + 1, scale, bias, shortcut if with_shortcut else None
    want, pull = jax.vjp(lambda *args: normalized(*args)[0], *args)
    got, own_pull = jax.vjp(lambda *args: native.batch_norm_relu(*args, 1e-5).features, *args)
    np.testing.assert_allclose(got, want, **CLOSE)
    for mine, theirs in zip(own_pull(cotangent), pull(cotangent), strict=True):
        if theirs is not None:
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5 * abs(theirs).max())
    for mine, theirs in zip(native.batch_norm_relu(*args, 1e-5), normalized(*args), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["images", "scale", "bias", "shortcut"])
def test_batch_norm_keeps_nan(name):
    images, shortcut, cotangent = drawn(*[(2, 3, 3, 4)] * 3)
    arguments = {"images": images, "scale": jnp.ones(4), "bias": jnp.ones(4), "shortcut": shortcut}
    bad = arguments[name]
    arguments[name] = bad.at[(0,) * bad.ndim].set(jnp.nan)
    want, pull = jax.vjp(lambda *args: normalized(*args), *arguments.values())
    got, own_pull = jax.vjp(lambda *args: native.batch_norm_relu(*args, 1e-5), *arguments.values())
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.isnan(mine), np.isnan(theirs))
    zeros = jnp.zeros(4), jnp.zeros(4)
    for mine, theirs in zip(
        own_pull(native.Normalized(cotangent, *zeros)), pull((cotangent, *zeros)), strict=True
    ):
        np.testing.assert_array_equal(np.isnan(mine), np.isnan(theirs))


@pytest.mark.slow
def test_in_64_bit_mode():
    images, scale = jnp.ones((2, 3, 3, 4), jnp.float32), jnp.ones(4, jnp.float32)
    with jax.enable_x64(True):
        result = native.batch_norm_relu(images, scale, scale, None, 1e-5)
        np.testing.assert_allclose(result.features, 1.0)
        kernel = jnp.ones((3, 3, 4, 5), jnp.float32)
        assert native.convolve(images, kernel, 1)[0, 1, 1, 0] == 36


def test_an_empty_batch():
    images, kernel = jnp.ones((0, 8, 8, 4)), jnp.ones((3, 3, 4, 8))
    loss = lambda k: native.convolve(images, k, 1).sum()  # noqa: E731
    assert loss(kernel) == 0
    np.testing.assert_array_equal(jax.grad(loss)(kernel), jnp.zeros_like(kernel))


@pytest.mark.slow
def test_in_a_loop_and_under_vmap():
    images, kernels = drawn((2, 6, 6, 4), (3, 3, 3, 4, 4))
    want = jnp.stack([by_xla(images, kernel, 1) for kernel in kernels])
    one = lambda kernel: native.convolve(images, kernel, 1)  # noqa: E731
    np.testing.assert_allclose(jax.vmap(one)(kernels), want, **CLOSE)
    np.testing.assert_allclose(jax.lax.map(one, kernels), want, **CLOSE)


@pytest.mark.slow
def test_equal_calls_give_equal_bits():
    images, kernel = drawn((16, 8, 8, 8), (3, 3, 8, 8))
    gradient = jax.jit(jax.grad(lambda k: jnp.sum(native.convolve(images, k, 1) ** 2)))
    first = gradient(kernel)
    for _ in range(20):
        np.testing.assert_array_equal(gradient(kernel), first)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet8", "squeezenet"])
def test_a_network_computes_the_same(name):
    networks = [models.make(name, 10, (16, 16, 3), convolution=c) for c in ("xla", "native")]
    params, state = networks[0].init(jax.random.key(0))
    batch = jax.random.normal(jax.random.key(1), (4, 16, 16, 3)), jnp.arange(4)

    def gradient(network):
        loss = lambda p: network.loss_fn(p, state, batch, jax.random.key(0))  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4),
        *map(gradient, networks),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": (3, 2, 2, 2)}, "`kernel` must be square with an odd size, got 3×2"),
        ({"kernel": (3, 3, 3, 2)}, "`kernel` must have 2 input channels, got 3"),
        ({"images": (4, 4, 2)}, r"`images` must have 4 axes, got shape \(4, 4, 2\)"),
        ({"kernel": (3, 3, 2)}, r"`kernel` must have 4 axes, got shape \(3, 3, 2\)"),
        ({"stride": 0}, "`stride` must be an integer ≥ 1, got 0"),
        ({"stride": 1.5}, "`stride` must be an integer ≥ 1, got 1.5"),
    ],
)
def test_bad_arguments_of_a_convolution(changes, message):
    arguments = {"images": (1, 4, 4, 2), "kernel": (3, 3, 2, 2), "stride": 1} | changes
    with pytest.raises(ValueError, match=message):
        native.convolve(*made(arguments).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": (4, 4, 2)}, r"`images` must have 4 axes, got shape \(4, 4, 2\)"),
        ({"scale": (1,)}, r"`scale` must have shape \(2,\), got \(1,\)"),
        ({"bias": ()}, r"`bias` must have shape \(2,\), got \(\)"),
        ({"shortcut": (1, 1, 1, 2)}, r"`shortcut` must have shape \(1, 4, 4, 2\), got \(1, 1,"),
        ({"epsilon": 0.0}, "`epsilon` must be > 0, got 0.0"),
    ],
)
def test_bad_arguments_of_batch_norm(changes, message):
    images = (1, 4, 4, 2)
    arguments = {"images": images, "scale": (2,), "bias": (2,), "shortcut": images, "epsilon": 1e-5}
    with pytest.raises(ValueError, match=message):
        native.batch_norm_relu(*made(arguments | changes).values())


def made(arguments):
    """Replace shapes by arrays."""
    return {k: jnp.ones(x) if isinstance(x, tuple) else x for k, x in arguments.items()}


def test_bad_dtypes_and_names():
    images, kernel = jnp.ones((1, 4, 4, 2), jnp.bfloat16), jnp.ones((3, 3, 2, 2))
    with pytest.raises(TypeError, match="`images` must be float32, got bfloat16"):
        native.convolve(images, kernel, 1)
    with pytest.raises(TypeError, match="`scale` must be float32, got bfloat16"):
        native.batch_norm_relu(
            jnp.ones((1, 4, 4, 2)), jnp.ones(2, jnp.bfloat16), jnp.ones(2), None, 1e-5
        )
    with pytest.raises(ValueError, match="in float32, got cpu and bfloat16"):
        models.make("resnet8", 10, (8, 8, 3), convolution="native", dtype=jnp.bfloat16)
    with pytest.raises(
        ValueError, match=r"`convolution` must be one of .*'native'.*, got 'onednn'"
    ):
        models.make("resnet8", 10, (8, 8, 3), convolution="onednn")


def test_a_failed_compilation_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    (tmp_path / "bad.cc").write_text("not C++", encoding="utf-8")
    with pytest.raises(OSError, match=r"could not compile .*set \$CXX.*\n.*bad\.cc.*error:"):
        library.build(tmp_path / "libraries")
    assert list((tmp_path / "libraries").iterdir()) == []
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(OSError, match=r"no-such-compiler could not compile .*\n.*No such file"):
        library.build(tmp_path / "libraries")


@pytest.mark.slow
def test_without_a_cache_folder_it_is_compiled_anew(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert library._load.__wrapped__().BatchNormForward
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

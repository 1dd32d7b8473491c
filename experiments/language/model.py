"""Defines a small GPT over bytes, in Flax NNX, and its sizes by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments.checks import check
from orlomo_jax import from_nnx

VOCABULARY = 256
"""The number of different bytes."""
MASKED = -1e30
"""The attention score of a later byte; −∞ would give NaN gradients in some dtypes."""


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT.

    Example:
        >>> GPTConfig(layers=2, heads=3, width=64, context=64)
        Traceback (most recent call last):
        ...
        ValueError: `width` must be a multiple of heads=3, got width=64
    """

    layers: int = 2
    """Number of blocks of attention and MLP."""
    heads: int = 2
    """Attention heads of each block."""
    width: int = 64
    """Size of the vector of each byte; the MLP has 4 times as many units."""
    context: int = 64
    """Number of bytes that the model sees."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the computation; "auto" is bfloat16 on a GPU, else float32."""

    def __post_init__(self) -> None:
        """Raise ValueError for a shape that does not fit together."""
        for name in ("layers", "heads", "width", "context"):
            check(name, getattr(self, name), _is_count, "an integer ≥ 1")
        if self.width % self.heads:
            raise ValueError(
                f"`width` must be a multiple of heads={self.heads}, got width={self.width}"
            )
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"`dtype` must be auto, float32 or bfloat16, got dtype={self.dtype!r}")

    @property
    def compute_dtype(self) -> Any:
        """The dtype of the computation on JAX's default device."""
        if self.dtype == "auto":
            return jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
        return jnp.dtype(self.dtype)

    @property
    def num_parameters(self) -> int:
        """The number of trained numbers.

        Example:
            >>> {name: config.num_parameters for name, config in SIZES.items()}
            {'tiny': 7344, '0.1m': 119104, '1m': 1033600, '10m': 10818432, '35m': 35008000}
        """
        d = self.width
        embeddings = (VOCABULARY + self.context) * d
        return embeddings + self.layers * (12 * d * d + 2 * d) + d


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 1


SIZES = {
    "tiny": GPTConfig(layers=1, heads=2, width=16, context=8),
    "0.1m": GPTConfig(layers=2, heads=2, width=64, context=64),
    "1m": GPTConfig(layers=5, heads=4, width=128, context=128),
    "10m": GPTConfig(layers=6, heads=6, width=384, context=256),
    "35m": GPTConfig(layers=11, heads=8, width=512, context=512),
}
"""Named sizes, by their number of parameters."""


def size_named(name: str) -> GPTConfig:
    """Return a size of ``SIZES``; raise ValueError if the name is unknown."""
    if name not in SIZES:
        raise ValueError(f"`size` must be one of {', '.join(SIZES)}, got size={name!r}")
    return SIZES[name]


def _normal(shape: tuple[int, ...], scale: float, rngs: nnx.Rngs) -> nnx.Param:
    return nnx.Param(scale * jax.random.normal(rngs.params(), shape))


def _scaled_to_rms_one(x: jax.Array, scale: nnx.Param) -> jax.Array:
    """Return x divided by its root mean square, times ``scale``; computed in float32."""
    wide = x.astype(jnp.float32)
    rms = jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + 1e-6)
    return (wide * rms * scale[...]).astype(x.dtype)


class Block(nnx.Module):
    """Causal self-attention and a GELU MLP, each added to its input; normalised before."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs) -> None:
        """Draw the weights; those that write to the sum are smaller in a deep network."""
        d, self.heads = config.width, config.heads
        to_sum = 1 / math.sqrt(2 * config.layers)
        self.attention_norm = nnx.Param(jnp.ones(d))
        self.mlp_norm = nnx.Param(jnp.ones(d))
        self.qkv = _normal((d, 3 * d), d**-0.5, rngs)
        self.out = _normal((d, d), to_sum * d**-0.5, rngs)
        self.up = _normal((d, 4 * d), d**-0.5, rngs)
        self.down = _normal((4 * d, d), to_sum * (4 * d) ** -0.5, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [batch, length, width] to the same shape."""
        dtype = x.dtype
        qkv = _scaled_to_rms_one(x, self.attention_norm) @ self.qkv[...].astype(dtype)
        x = x + _attention(qkv, self.heads) @ self.out[...].astype(dtype)
        hidden = _scaled_to_rms_one(x, self.mlp_norm) @ self.up[...].astype(dtype)
        return x + jax.nn.gelu(hidden, approximate=True) @ self.down[...].astype(dtype)


def _attention(qkv: jax.Array, heads: int) -> jax.Array:
    """Return each position's mean of the values up to it; [batch, length, 3d] → [.., d]."""
    batch, length, _ = qkv.shape
    query, key, value = (
        part.reshape(batch, length, heads, -1) for part in jnp.split(qkv, 3, axis=-1)
    )
    scale = query.shape[-1] ** -0.5
    scores = jnp.einsum("bthd,bshd->bhts", query, key).astype(jnp.float32) * scale
    seen = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(seen, scores, MASKED)).astype(qkv.dtype)
    return jnp.einsum("bhts,bshd->bthd", weights, value).reshape(batch, length, -1)


class GPT(nnx.Module):
    """A pre-norm GPT with learned positions and tied embeddings; float32 parameters.

    Example:
        >>> model = GPT(SIZES["tiny"], rngs=nnx.Rngs(0))
        >>> jax.eval_shape(model, jnp.zeros((2, 8), jnp.uint8)).shape
        (2, 8, 256)
    """

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs) -> None:
        """Draw the weights."""
        self.dtype = config.compute_dtype
        self.embedding = _normal((VOCABULARY, config.width), 0.02, rngs)
        self.position = _normal((config.context, config.width), 0.02, rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.layers)])
        self.norm = nnx.Param(jnp.ones(config.width))

    def __call__(self, text: jax.Array) -> jax.Array:
        """Return the logits of each next byte.

        Args:
            text: Bytes, uint8 or int32 [batch, length] with length ≤ context.

        Returns:
            float32[batch, length, 256].

        Raises:
            ValueError: If the text is longer than the context.
        """
        length, context = text.shape[-1], self.position.shape[0]
        if length > context:
            raise ValueError(
                f"`text` must have at most context={context} bytes in a row, got {length}"
            )
        embedding = self.embedding[...].astype(self.dtype)
        x = embedding[text] + self.position[...][:length].astype(self.dtype)
        for block in self.blocks:
            x = block(x)
        return (_scaled_to_rms_one(x, self.norm) @ embedding.T).astype(jnp.float32)


def cross_entropy(module: Callable, windows: jax.Array) -> jax.Array:
    """Return the mean nats per byte of windows, uint8[batch, length + 1]."""
    text = windows.astype(jnp.int32)
    logits = module(text[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()


class Network(NamedTuple):
    """A GPT as pure functions, the same objects for equal configurations.

    Attributes:
        init: ``init(key) -> params``, float32, nested dicts.
        loss_fn: ``loss_fn(params, model_state, windows, key)``, with the library's signature;
            ``model_state`` is ``{}``.
        logits: ``logits(params, text) -> float32[batch, length, 256]``, jitted.
    """

    init: Callable
    loss_fn: Callable
    logits: Callable


@lru_cache(maxsize=16)
def network(config: GPTConfig) -> Network:
    """Return the GPT of a configuration.

    Example:
        >>> params = network(SIZES["0.1m"]).init(jax.random.key(0))
        >>> sum(leaf.size for leaf in jax.tree.leaves(params))
        119104
    """
    build = partial(GPT, config)
    model = from_nnx(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))), cross_entropy)

    @jax.jit
    def init(key):
        return from_nnx(build(rngs=nnx.Rngs(key)), cross_entropy).params

    @jax.jit
    def logits(params, text):
        return model.predict(params, model.model_state, text)

    return Network(init, model.loss_fn, logits)

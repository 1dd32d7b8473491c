"""Defines the workers' optimizers and the schedule of their learning rate."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

Optimizer = Literal["adamw", "muon", "momentum"]
LEARNING_RATES = {"adamw": 0.64, "muon": 0.64, "momentum": 6.4}
"""The largest γ of each optimizer times the model's width, by default."""
LAST_SHARE = 0.1
"""γ at the end of a run, as a share of its largest value."""
MOMENTUM = 0.9
"""β of local momentum SGD, for methods that do not merge the workers' momentum."""


@lru_cache
def optimizer(name: Optimizer, weight_decay: float, clip: float) -> Any:
    """Return an optax transformation without γ; the same object for equal arguments.

    Args:
        name: "adamw"; "muon", which is Muon for the matrices of the blocks and Adam for the rest;
            or "momentum", which is SGD with momentum 0.9.
        weight_decay: Coefficient of the matrices; vectors do not decay.
        clip: The largest norm of a gradient; 0 does not clip.
    """
    decay = optax.add_decayed_weights(weight_decay, mask=_matrices)
    clipping = [optax.clip_by_global_norm(clip)] if clip else []
    if name == "momentum":
        return optax.chain(*clipping, decay, optax.trace(MOMENTUM))
    adam = optax.scale_by_adam(b1=0.9, b2=0.95)
    if name == "muon":
        dimensions = lambda params: jax.tree.map(  # noqa: E731
            lambda _: optax.contrib.MuonDimensionNumbers(), params
        )
        # The scale makes Muon's updates as large as Adam's, so that both take the same γ.
        muon = optax.chain(
            optax.contrib.scale_by_muon(weight_dimension_numbers=dimensions), _as_large_as_adam()
        )
        adam = optax.partition({"muon": muon, "adam": adam}, _labels)
    return optax.chain(*clipping, adam, decay)


@lru_cache
def clipped(clip: float) -> optax.GradientTransformation | None:
    """Return the clipping of the methods that run the library's own momentum SGD."""
    return optax.clip_by_global_norm(clip) if clip else None


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim > 1, params)


def _labels(params: Any) -> Any:
    def label(path: tuple, leaf: Any) -> str:
        in_block = any(getattr(key, "key", None) == "blocks" for key in path)
        return "muon" if in_block and leaf.ndim == 2 else "adam"

    return jax.tree_util.tree_map_with_path(label, params)


def _as_large_as_adam() -> optax.GradientTransformation:
    """Scale orthogonal matrices to a root mean square of 0.2 (Liu et al., 2025, 2502.16982)."""
    scaled = lambda x: 0.2 * jnp.sqrt(1.0 * max(x.shape)) * x  # noqa: E731
    return optax.stateless(lambda updates, _: jax.tree.map(scaled, updates))


def schedule(learning_rate: float, warmup: float, num_steps: int) -> optax.Schedule:
    """Return γ as a function of the server's step: linear warmup, then a cosine to a tenth.

    All schedules share one compiled program.

    Args:
        learning_rate: The largest γ.
        warmup: The share of the run that warms up, in [0, 1].
        num_steps: T, the number of reports.

    Example:
        >>> rate = schedule(1.0, warmup=0.2, num_steps=10)
        >>> [round(float(rate(step)), 3) for step in (0, 1, 2, 6, 10)]
        [0.5, 1.0, 1.0, 0.55, 0.1]
    """
    warm = max(1, round(warmup * num_steps))
    numbers = np.float32(learning_rate), np.float32(warm), np.float32(max(1, num_steps - warm))
    return jax.tree_util.Partial(_warmup_and_cosine, *numbers)


def _warmup_and_cosine(top: Any, warm: Any, rest: Any, step: Any) -> jax.Array:
    progress = jnp.clip((step - warm) / rest, 0, 1)
    cosine = LAST_SHARE + (1 - LAST_SHARE) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return top * jnp.minimum((step + 1) / warm, 1) * cosine

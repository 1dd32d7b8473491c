"""Rounds arrays to int8 with one scale for each block of entries."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from orlomo_jax.trees import Array

_SMALLEST = 2.0**-120
"""A block with a smaller scale becomes 0: on some devices its products would be subnormal."""


class Int8Blocks(NamedTuple):
    """An array as int8 codes with one scale per block; entry i is code i · scale ⌊i / block⌋.

    Attributes:
        codes: int8, in the shape of the array, in [−127, 127].
        scales: float32[⌈size / block⌉].
    """

    codes: Any
    scales: Any


def is_smaller(size: int, dtype: Any, block: int) -> bool:
    """Return whether an array is real and floating, and takes fewer bytes in int8 with scales.

    Example:
        >>> is_smaller(1, jnp.dtype("float32"), 256), is_smaller(2, jnp.dtype("float32"), 256)
        (False, True)
    """
    scales = -(-size // block)
    fits = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize >= 4
    return bool(fits and size + 4 * scales < size * dtype.itemsize)


def encode(x: Array, block: int) -> Int8Blocks:
    """Return the nearest codes, ties to even, with the scale max |x| / 127 of each block.

    The scale is rounded to 17 significant bits. So every product of a code and its scale is exact
    in float32, and the products have the same codes and scales again: encoding loses nothing more
    the second time. If a block has a NaN or an Inf, all its products are NaN.

    Example:
        >>> x = jnp.array([127.0, 1.4, -63.6, 0.0])
        >>> encode(x, block=2)
        Int8Blocks(codes=Array([ 127,    1, -127,    0], dtype=int8),
        scales=Array([1.       , 0.5007...], dtype=float32))
    """
    flat = x.reshape(-1)
    blocks = jnp.pad(flat, (0, -flat.size % block)).reshape(-1, block)
    exact = jnp.max(jnp.abs(blocks), axis=1) / 127
    scales = jax.lax.reduce_precision(exact, exponent_bits=8, mantissa_bits=16)
    scales = jnp.where(scales < _SMALLEST, 0, scales)
    is_good = (scales > 0) & (scales < jnp.inf)
    quotients = blocks / jnp.where(is_good, scales, 1)[:, None]
    codes = jnp.where(is_good[:, None], jnp.round(quotients), 0).astype(jnp.int8)
    codes = codes.reshape(-1)[: flat.size].reshape(x.shape)
    scales = jnp.where(jnp.isfinite(scales), scales, jnp.nan)  # 0 · NaN is NaN
    return Int8Blocks(codes, scales.astype(jnp.float32))


def decode(encoded: Int8Blocks, block: int, dtype: Any) -> Array:
    """Return the array of codes and scales; compiled code calls it."""
    codes, scales = encoded
    flat = codes.reshape(-1)
    blocks = jnp.pad(flat, (0, -flat.size % block)).reshape(-1, block)
    products = blocks.astype(dtype) * scales.astype(dtype)[:, None]
    return products.reshape(-1)[: flat.size].reshape(codes.shape)


def decode_on_host(encoded: Int8Blocks, block: int, dtype: Any) -> np.ndarray:
    """Return the array of codes and scales that are NumPy arrays, equal to :func:`decode`.

    Raises:
        ValueError: If the number of scales is wrong.

    Example:
        >>> blocks = Int8Blocks(np.array([127, 1, -127], np.int8), np.array([1, 0.5], np.float32))
        >>> decode_on_host(blocks, 2, np.float32)
        array([127. ,   1. , -63.5], dtype=float32)
    """
    codes, scales = encoded
    if scales.shape != (-(-codes.size // block),):
        raise ValueError(
            f"`scales` must be one for each {block} of {codes.size} codes, got {scales.shape}"
        )
    flat, whole = codes.reshape(-1), codes.size // block
    out, scales = np.empty(codes.size, dtype), scales.astype(dtype)
    end = whole * block
    parts = ((slice(0, end), slice(0, whole)), (slice(end, None), slice(whole, None)))
    with np.errstate(invalid="ignore"):
        for entries, blocks in parts:
            if scales[blocks].size:
                rows = flat[entries].reshape(scales[blocks].size, -1)
                np.multiply(
                    rows, scales[blocks, None], out=out[entries].reshape(rows.shape), dtype=dtype
                )
    return out.reshape(codes.shape)

"""What one token is while it travels to its experts: its numbers, and beside them ids and weights.

The numbers are the model's, or float8_e4m3fn with one factor for each 128 of them (half the bytes).
An array of rows of zeros is an array of no tokens, so unused places need no mark.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from model.quantization import FP8, FP8_MAX, saturating_cast

BLOCK = 128
"""Numbers of a token that share a factor."""
SMALLEST = FP8_MAX * float(jnp.finfo(jnp.float32).tiny)
"""Below, a block's factor would be a subnormal number, which devices take for 0."""
_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


class Dispatched(NamedTuple):
    """Tokens on their way to the experts.

    Attributes:
        data: [T, D], the model's dtype, or float8 as u8 (every collective carries bytes).
        side: f32 [T, 2K], expert ids + 1 and weights; behind them the factors of float8 data,
            f32 [T, ceil(D / 128)]. Ids are exact in f32.
    """

    data: jax.Array
    side: jax.Array


def encode(x: jax.Array, expert_ids: jax.Array, weights: jax.Array, *, fp8: bool) -> Dispatched:
    """[T, D], i32 [T, K] (-1: no expert) and f32 [T, K] as they travel."""
    side = [(expert_ids + 1).astype(jnp.float32), weights.astype(jnp.float32)]
    if fp8:
        quantized, scale = quantize(x)
        x = lax.bitcast_convert_type(quantized, jnp.uint8)
        side.append(scale)
    return Dispatched(x, jnp.concatenate(side, axis=-1))


def decode(rows: Dispatched, k: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What `encode` was given, x in `dtype`."""
    ids, weights = rows.side[:, :k].astype(jnp.int32) - 1, rows.side[:, k : 2 * k]
    x = rows.data
    if x.dtype == jnp.uint8:
        x = dequantize(lax.bitcast_convert_type(x, FP8), rows.side[:, 2 * k :], dtype)
    return x, ids, weights


def joined(rows: Dispatched) -> jax.Array:
    """Both parts as words of one array, for collectives that take one: u8, u16 or u32 [T, n]."""
    word = _WORDS[rows.data.dtype.itemsize]
    parts = [lax.bitcast_convert_type(part, word) for part in rows]
    return jnp.concatenate([part.reshape(part.shape[0], -1) for part in parts], axis=-1)


def parted(words: jax.Array, width: int, dtype: jnp.dtype) -> Dispatched:
    """The rows that `joined` made words of; `width` and `dtype` are those of their data."""
    data = lax.bitcast_convert_type(words[:, :width], dtype)
    side, per_number = words[:, width:], 4 // words.dtype.itemsize
    if per_number > 1:
        side = side.reshape(side.shape[0], -1, per_number)
    return Dispatched(data, lax.bitcast_convert_type(side, jnp.float32))


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[T, D] as float8_e4m3fn [T, D] and f32 factors [T, ceil(D / 128)].

    A block's largest magnitude m becomes 448. What comes back differs by at most
    max(|x| / 16, m / 448 * 2^-10): half a step of three mantissa bits, or half the smallest
    number there is. A block whose factor would be too small for float32 (m < 6e-36) becomes 0.
    """
    tokens, width = x.shape
    blocks = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -width % BLOCK)))
    blocks = blocks.reshape(tokens, -1, BLOCK)
    largest = jnp.max(jnp.abs(blocks), axis=-1)
    scale = jnp.where(largest > SMALLEST, largest / FP8_MAX, 1.0)
    data = saturating_cast(blocks / scale[..., None], FP8)
    return data.reshape(tokens, -1)[:, :width], scale


def dequantize(data: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[T, D] of what `quantize` made, multiplied in float32."""
    factors = jnp.repeat(scale, BLOCK, axis=-1)[:, : data.shape[1]]
    return (data.astype(jnp.float32) * factors).astype(dtype)

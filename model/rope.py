"""Rotary position embedding: the angles of every position, and rotating by them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from model.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Angle per position of each pair, float64 [R / 2]."""
    exponents = np.arange(0, config.rotary_dim, 2, dtype=np.float64) / config.rotary_dim
    plain = config.rope_theta**-exponents
    if config.rope_scaling is None:
        return plain
    return config.rope_scaling.frequencies(plain, config.rope_theta)


def rope_tables(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every pair's angle, f32 [T, R / 2] each, for positions i32 [T].

    Both carry the factor of the scaling rule (YaRN's m(mscale) / m(mscale_all_dim)).
    """
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(
        inverse_frequencies(config), jnp.float32
    )
    factor = 1.0 if config.rope_scaling is None else config.rope_scaling.attention_factor
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def query_scale(config: ModelConfig, positions: jax.Array) -> jax.Array:
    """Llama 4's factor on the queries at positions i32 [T], f32 [T]."""
    periods = positions // config.query_scale_period
    return 1 + config.query_scale_beta * jnp.log1p(periods.astype(jnp.float32))


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool) -> jax.Array:
    """Rotate the pairs of x [T, ..., R]; cos and sin are f32 [T, R / 2].

    `interleaved` pairs neighbours (0, 1), (2, 3), ... (DeepSeek), else halves (i, i + R / 2). The
    result holds the first elements of all pairs, then the second ones: queries and keys are
    permuted alike, so scores do not change, and no shuffle back is needed.
    """
    shape = (x.shape[0], *(1,) * (x.ndim - 2), -1)
    cos, sin = cos.reshape(shape), sin.reshape(shape)
    x32 = x.astype(jnp.float32)
    if interleaved:
        first, second = x32[..., 0::2], x32[..., 1::2]
    else:
        first, second = jnp.split(x32, 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, first * sin + second * cos], axis=-1
    ).astype(x.dtype)

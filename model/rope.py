"""Rotary position embedding, with YaRN, for the rope part of MLA queries and keys."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from model.config import ModelConfig, YarnConfig, yarn_mscale


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Angle per position of each pair, float64 [R / 2].

    With YaRN (arXiv:2309.00071, section 3.2, as published with DeepSeek-V2): pairs that turn less
    than `beta_slow` times over the original context are interpolated by `factor`, those that turn
    more than `beta_fast` times are kept, and those between are blended linearly.
    """
    dim = config.qk_rope_head_dim
    kept = config.rope_theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    if config.yarn is None:
        return kept
    low, high = _blend_range(config.yarn, dim, config.rope_theta)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    return kept / config.yarn.factor * ramp + kept * (1 - ramp)


def _blend_range(yarn: YarnConfig, dim: int, theta: float) -> tuple[float, float]:
    """First and last pair of the blend, as indices."""

    def pair_turning(turns: float) -> float:
        context = yarn.original_max_position_embeddings
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_turning(yarn.beta_slow)), dim - 1)
    return low, high if high != low else high + 0.001


def rope_tables(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every pair's angle, f32 [T, R / 2] each, for positions i32 [T].

    With YaRN both carry the factor m(mscale) / m(mscale_all_dim).
    """
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(
        inverse_frequencies(config), jnp.float32
    )
    factor = 1.0
    if config.yarn is not None:
        factor = yarn_mscale(config.yarn.factor, config.yarn.mscale) / yarn_mscale(
            config.yarn.factor, config.yarn.mscale_all_dim
        )
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


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

"""What the kernels over the paged latent cache share: reading a block of tokens, and the softmax.

Scores are in base 2 (`exp2` is what the hardware has): scales carry a factor of log2(e).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from model.ops.kernels import MIN_BLOCK, is_power_of_two
from model.quantization import FP8

LOG2_E = 1.4426950408889634
MASKED = -1e30


def unsupported(latent: int, rope: int) -> str | None:
    """Why the kernels cannot read latents of C + R numbers; None if they can."""
    for name, size in (("kv_lora_rank", latent), ("qk_rope_head_dim", rope)):
        if not is_power_of_two(size) or size < MIN_BLOCK:
            return f"{name} {size} must be a power of two from {MIN_BLOCK} on"
    return None


def whole_blocks(*queries: jax.Array, heads: int) -> tuple[jax.Array, ...]:
    """Queries [B, H, n] with zeros for more heads, so that there is a multiple of `heads`."""
    more = -queries[0].shape[1] % heads
    if not more:  # XLA copies what is padded by nothing
        return queries
    return tuple(jnp.pad(q, ((0, 0), (0, more), (0, 0))) for q in queries)


class Softmax(NamedTuple):
    """An online softmax (arXiv:1805.02867): f32 sum [rows, V], maximum [rows], total [rows]."""

    out: jax.Array
    maximum: jax.Array
    total: jax.Array

    @classmethod
    def empty(cls, rows: int, width: int) -> Softmax:
        return cls(
            jnp.zeros((rows, width), jnp.float32),
            jnp.full((rows,), MASKED, jnp.float32),
            jnp.zeros((rows,), jnp.float32),
        )

    def add(
        self,
        scores: jax.Array,
        factor: float,
        values: jax.Array,
        seen: jax.Array | None = None,
    ) -> Softmax:
        """Merge scores f32 [rows, block] times `factor` (above 0) and values [block, V].

        All scores are seen, or those where `seen`. A row that has seen some and sees nothing of
        the block keeps its numbers bit by bit.
        """
        if seen is not None:
            scores = jnp.where(seen, scores, MASKED)
        # The maximum before the factor: product and difference below are then one operation.
        maximum = jnp.maximum(self.maximum, jnp.max(scores, axis=1) * factor)
        decay = jnp.exp2(self.maximum - maximum)
        p = jnp.exp2(scores * factor - maximum[:, None])
        if seen is not None:
            p = jnp.where(seen, p, 0.0)
        return Softmax(
            self.out * decay[:, None] + dot(p.astype(values.dtype), values),
            maximum,
            self.total * decay + jnp.sum(p, axis=1),
        )

    def normalised(self) -> jax.Array:
        """[rows, V]; 0 where nothing was seen."""
        return self.out / jnp.where(self.total > 0, self.total, 1.0)[:, None]

    def log_sum(self) -> jax.Array:
        """Log-sum-exps [rows] in base 2; MASKED where nothing was seen."""
        seen = self.total > 0
        return jnp.where(seen, self.maximum + jnp.log2(jnp.where(seen, self.total, 1.0)), MASKED)


def dot(a: jax.Array, b: jax.Array, *, transposed: bool = False) -> jax.Array:
    """a @ b, or a @ b.T, in float32."""
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def read_tokens(
    kv_ref,
    table_ref,
    layer: jax.Array,
    tokens: jax.Array,
    live: jax.Array,
    *,
    latent: int,
    dtype: jax.typing.DTypeLike,
):
    """Latents [block, C] and rope keys [block, R] of a sequence's tokens i32 [block].

    Tokens that are not live read as zeros, whatever their pages hold. `table_ref` is the
    sequence's page table, i32 [P].
    """
    page_size, rope = kv_ref.shape[2], kv_ref.shape[3] - latent
    pages = plgpu.load(table_ref.at[tokens // page_size], mask=live, other=0)
    at = tokens % page_size
    parts = []
    for first, size in ((0, latent), (latent, rope)):
        numbers = first + lax.broadcasted_iota(jnp.int32, (1, size), 1)
        part = kv_ref.at[layer, pages[:, None], at[:, None], numbers]
        if kv_ref.dtype == FP8:  # has no zero that a masked load could give
            part = plgpu.load(part, mask=live[:, None]).astype(dtype)
            parts.append(jnp.where(live[:, None], part, 0))
        else:  # a selection behind the load would keep it from running ahead: 1.6 times slower
            parts.append(plgpu.load(part, mask=live[:, None], other=0).astype(dtype))
    return tuple(parts)

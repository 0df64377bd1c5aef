"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

Only a latent (C numbers) and one rope key (R numbers), shared by all heads, are cached per token.
Decode rows use the absorbed form, prompt rows the naive form; both are equal in exact arithmetic.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from model.batch import ForwardBatch, Rows
from model.comm import Comm
from model.config import ModelConfig
from model.layers import ParamFactory, rms_norm
from model.ops.dense import StackedWeight, matmul, matmul_parts
from model.ops.kernels import XLA, Kernels
from model.ops.mla_attention import decode_heads, extend_attention
from model.ops.mla_attention.inputs import finish_inputs
from model.quantization import saturating_cast
from model.rope import apply_rope, query_scale

LATENT_NORM_EPS = 1e-6
"""DeepSeek's q_a and kv_a norms use this whatever rms_norm_eps says."""


class MLAttention(nnx.Module):
    """Attention of one layer (or, stacked, of a segment). Heads are cut over devices."""

    def __init__(self, make: ParamFactory, config: ModelConfig, num_heads: int) -> None:
        c, width = config, config.hidden_size
        if c.q_lora_rank is None:
            self.q_proj = make.normal((width, num_heads, c.qk_head_dim), (None, "heads", None))
        else:
            self.q_a = make.normal((width, c.q_lora_rank), (None, None))
            self.q_a_norm = make.ones(c.q_lora_rank)
            self.q_b = make.normal((c.q_lora_rank, num_heads, c.qk_head_dim), (None, "heads", None))
        self.kv_a = make.normal((width, c.latent_dim), (None, None))
        self.kv_a_norm = make.ones(c.kv_lora_rank)
        self.w_uk = make.normal(
            (num_heads, c.qk_nope_head_dim, c.kv_lora_rank), ("heads", None, None)
        )
        self.w_uv = make.normal((num_heads, c.kv_lora_rank, c.v_head_dim), ("heads", None, None))
        self.out = make.normal((num_heads, c.v_head_dim, width), ("heads", None, None))
        self.config = config

    def queries(
        self,
        x: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        positions: jax.Array,
        kernels: Kernels = XLA,
    ) -> tuple[jax.Array, jax.Array]:
        """[T, D] -> q_nope [T, H, nope] and rotated q_rope [T, H, R] of the local heads.

        positions i32 [T] count where queries are scaled by position.
        """
        q = matmul(*self._query_product(x, kernels), 1, kernels)
        if self.config.query_scale_beta:
            q = q * query_scale(self.config, positions)[:, None, None].astype(q.dtype)
        nope, rope = jnp.split(q, [self.config.qk_nope_head_dim], axis=-1)
        return nope, apply_rope(rope, cos, sin, interleaved=self.config.rope_interleaved)

    def _query_product(self, x: jax.Array, kernels: Kernels) -> tuple[jax.Array, Any]:
        """Rows and the weight whose product are the queries [T, H, nope + R]."""
        if self.config.q_lora_rank is None:
            return x, self.q_proj.get_value()
        latent = matmul(x, self.q_a.get_value(), 1, kernels)
        return rms_norm(latent, self.q_a_norm[...], LATENT_NORM_EPS), self.q_b.get_value()

    def latents(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, kernels: Kernels = XLA
    ) -> jax.Array:
        """[T, D] -> [T, C + R]: the normalised latent and the rotated rope key, as cached."""
        entry = matmul(x, self.kv_a.get_value(), 1, kernels)
        latent, rope = jnp.split(entry, [self.config.kv_lora_rank], axis=-1)
        latent = rms_norm(latent, self.kv_a_norm[...], LATENT_NORM_EPS)
        rope = apply_rope(rope, cos, sin, interleaved=self.config.rope_interleaved)
        return jnp.concatenate([latent, rope], axis=-1)

    def _inputs(
        self,
        x: jax.Array,
        kv: jax.Array,
        layer: jax.Array,
        rows: Rows,
        cos: jax.Array,
        sin: jax.Array,
        kernels: Kernels,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """`queries` (the first ones perhaps wider than nope), the entries as cached [T, C + R] in
        x's dtype, and the pool in which they are written."""
        c = self.config
        if kernels.mla_inputs == "xla":
            entries = saturating_cast(self.latents(x, cos, sin, kernels), kv.dtype)
            kv = kv.at[layer, rows.pages, rows.offsets].set(entries)
            queries = self.queries(x, cos, sin, rows.positions, kernels)
            return *queries, entries.astype(x.dtype), kv
        norm = self.kv_a_norm.get_value()
        if not isinstance(norm, StackedWeight):
            norm = StackedWeight(stack=norm[None], layer=jnp.int32(0))
        rows_of_q, weight = self._query_product(x, kernels)
        if rows_of_q is x:  # both products in one kernel
            q, entry = matmul_parts(x, (weight, self.kv_a.get_value()), 1, kernels)
        else:
            (q,) = matmul_parts(rows_of_q, (weight,), 1, kernels)
            (entry,) = matmul_parts(x, (self.kv_a.get_value(),), 1, kernels)
        q, q_rope, entries, kv = finish_inputs(
            *(q, entry),
            *(norm.stack, norm.layer, cos, sin),
            *(kv, layer, rows.pages, rows.offsets, x.dtype),
            nope=c.qk_nope_head_dim,
            interleaved=c.rope_interleaved,
            eps=LATENT_NORM_EPS,
            interpret=kernels.interpret,
        )
        if c.query_scale_beta:
            factor = query_scale(c, rows.positions)[:, None, None].astype(q.dtype)
            q, q_rope = q * factor, q_rope * factor
        return q, q_rope, entries, kv

    def __call__(
        self,
        x: jax.Array,
        kv: jax.Array,
        layer: jax.Array,
        batch: ForwardBatch,
        rows: Rows,
        cos: jax.Array,
        sin: jax.Array,
        comm: Comm,
        kernels: Kernels,
    ) -> tuple[jax.Array, jax.Array]:
        """Write the rows' latents into the pool, then attend.

        Args:
            x: [T, D], normalised.
            kv: [L, N, S, C + R], this slice's pool; layer: i32, this layer's index in it.

        Returns:
            [T, D], complete, and the updated pool.
        """
        q_nope, q_rope, entries, kv = self._inputs(x, kv, layer, rows, cos, sin, kernels)
        scale, b = self.config.attention_scale, batch.num_decode_rows
        if batch.num_prefill_rows:
            attended = extend_attention(
                q_nope,
                q_rope,
                self.w_uk[...],
                self.w_uv[...],
                entries,
                kv,
                layer,
                batch.chunk_tables,
                batch.chunk_first_row,
                batch.chunk_rows,
                batch.chunk_start,
                rows.prefixes,
                num_rows=batch.num_prefill_rows,
                scale=scale,
                kernels=kernels,
            )  # [T, H, V]
        if b:
            decoded = decode_heads(
                q_nope[:b],
                q_rope[:b],
                self.w_uk.get_value(),
                self.w_uv.get_value(),
                kv,
                layer,
                batch.decode_tables,
                batch.decode_positions + 1,
                scale=scale,
                kernels=kernels,
            )
            attended = attended.at[:b].set(decoded) if batch.num_prefill_rows else decoded
        return comm.sum_heads(matmul(attended, self.out.get_value(), 2, kernels)), kv

    def naive(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        """The definition, on whole sequences: [batch, T, D] -> [batch, T, D], causal.

        cos and sin are f32 [T, R / 2]. Differentiable; used for training and as a reference.
        """
        c = self.config
        positions = jnp.arange(x.shape[1])
        q_nope, q_rope = jax.vmap(self.queries, (0, None, None, None))(x, cos, sin, positions)
        latents = jax.vmap(self.latents, (0, None, None))(x, cos, sin)
        latent, k_rope = jnp.split(latents, [c.kv_lora_rank], axis=-1)
        k_nope = jnp.einsum("btc,hnc->bthn", latent, self.w_uk[...])
        value = jnp.einsum("btc,hcv->bthv", latent, self.w_uv[...])
        scores = jnp.einsum(
            "bqhn,bkhn->bhqk", q_nope, k_nope, preferred_element_type=jnp.float32
        ) + jnp.einsum("bqhr,bkr->bhqk", q_rope, k_rope, preferred_element_type=jnp.float32)
        seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(seen, scores * c.attention_scale, -jnp.inf)
        p = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        return jnp.einsum("bhqk,bkhv,hvd->bqd", p, value, self.out[...], optimize="optimal")

"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

Only a latent (C numbers) and one rope key (R numbers), shared by all heads, are cached per token.
Decode rows use the absorbed form, prompt rows the naive form; both are equal in exact arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from model.batch import ForwardBatch, MicroBatch, Rows
from model.comm import Comm
from model.config import ModelConfig
from model.layers import ParamFactory, rms_norm
from model.ops.dense import as_stacked, matmul, matmul_parts, sum_parts
from model.ops.kernels import XLA, Kernels
from model.ops.mla_attention import decode_heads, extend_attention, plan_decode
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
            self.q_proj = make.normal(
                (width, num_heads, c.qk_head_dim), (None, "heads", None), contracted=(1, 2)
            )
        else:
            self.q_a = make.normal((width, c.q_lora_rank), (None, None))
            self.q_a_norm = make.ones(c.q_lora_rank)
            self.q_b = make.normal(
                (c.q_lora_rank, num_heads, c.qk_head_dim), (None, "heads", None), contracted=(1, 2)
            )
        self.kv_a = make.normal((width, c.latent_dim), (None, None))
        self.kv_a_norm = make.ones(c.kv_lora_rank)
        self.w_uk = make.normal(
            (num_heads, c.qk_nope_head_dim, c.kv_lora_rank), ("heads", None, None)
        )
        self.w_uv = make.normal((num_heads, c.kv_lora_rank, c.v_head_dim), ("heads", None, None))
        self.out = make.normal(
            (num_heads, c.v_head_dim, width), ("heads", None, None), contracted=(2, 1)
        )
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

    def project(
        self,
        xs: Sequence[jax.Array],
        parts: Sequence[MicroBatch],
        kv: jax.Array,
        layer: jax.Array,
        rows: Rows,
        cos: jax.Array,
        sin: jax.Array,
        comm: Comm,
        kernels: Kernels,
    ) -> tuple[list[tuple[jax.Array, jax.Array]], jax.Array, jax.Array]:
        """Queries of normalised rows, and their entries, which are written into the pool.

        Args:
            xs: [n, D] of each of the step's micro-batches, `parts`; rows, cos, sin: of all T rows.
            kv: [L, N, S, C + R], this slice's pool; layer: i32, this layer's index in it.

        Returns:
            `queries` of each micro-batch, the first ones perhaps wider than nope; the entries as
            cached [T, C + R], in x's dtype; the updated pool.
        """
        of_rows = [tuple(a[part.rows] for a in (cos, sin, rows.positions)) for part in parts]
        if kernels.mla_inputs == "xla":
            queries = [self.queries(x, *of, kernels) for x, of in zip(xs, of_rows, strict=True)]
            entries = [self.latents(x, *of[:2], kernels) for x, of in zip(xs, of_rows, strict=True)]
            cached = saturating_cast(jnp.concatenate(entries), kv.dtype)
            kv = kv.at[layer, rows.pages, rows.offsets].set(cached)
            return queries, cached.astype(xs[0].dtype), kv
        norm = as_stacked(self.kv_a_norm.get_value())
        products = [self._products(x, kernels) for x in xs]
        queries, entries = [], []
        for part, (q, entry), of in zip(parts, products, of_rows, strict=True):
            q, q_rope, written, kv = finish_inputs(
                *(q, entry, norm.stack, norm.layer, *of[:2], kv, layer),
                *(rows.pages[part.rows], rows.offsets[part.rows], xs[0].dtype),
                after=[other for _, other in products if other is not entry],
                nope=self.config.qk_nope_head_dim,
                interleaved=self.config.rope_interleaved,
                eps=LATENT_NORM_EPS,
                interpret=kernels.interpret,
            )
            if self.config.query_scale_beta:
                factor = query_scale(self.config, of[2])[:, None, None].astype(q.dtype)
                q, q_rope = q * factor, q_rope * factor
            queries.append((q, q_rope))
            entries.append(written)
        return queries, jnp.concatenate(entries), kv

    def _products(self, x: jax.Array, kernels: Kernels) -> tuple[jax.Array, jax.Array]:
        """Queries and entries before norm and rotation, in parts (see `matmul_parts`)."""
        rows, weight = self._query_product(x, kernels)
        if rows is x:  # both products in one kernel
            q, entry = matmul_parts(x, (weight, self.kv_a.get_value()), 1, kernels)
        else:
            (q,) = matmul_parts(rows, (weight,), 1, kernels)
            (entry,) = matmul_parts(x, (self.kv_a.get_value(),), 1, kernels)
        return q, entry

    def plan(
        self, batch: ForwardBatch, rows: Rows, part: MicroBatch, page_size: int, kernels: Kernels
    ) -> Any:
        """What `attend` of any layer of a segment needs besides, found out once."""
        tables, lengths = batch.decode_tables[part.decode], rows.decode_lengths[part.decode]
        heads = self.w_uk.get_value().shape[-3]
        return plan_decode(tables, lengths, heads, page_size, kernels)

    def attend(
        self,
        queries: tuple[jax.Array, jax.Array],
        entries: jax.Array,
        kv: jax.Array,
        layer: jax.Array,
        batch: ForwardBatch,
        rows: Rows,
        part: MicroBatch,
        plan: Any,
        comm: Comm,
        kernels: Kernels,
    ) -> jax.Array:
        """The n rows of a micro-batch against what their sequences have in the pool.

        Args:
            queries: of the micro-batch's rows, from `project`; plan: theirs, from `plan`.
            entries: [T, C + R], of all rows of the step, from `project`.
            kv: [L, N, S, C + R], this slice's pool, which has them all; layer: i32.
            rows: all rows of the step.

        Returns:
            [P, n, D], complete, in parts as `matmul_parts` gives them.
        """
        q_nope, q_rope = queries
        scale, b = self.config.attention_scale, part.decode.stop - part.decode.start
        if prefills := len(q_nope) > b:
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
                rows=part.prefill,
                num_rows=batch.num_prefill_rows,
                scale=scale,
                kernels=kernels,
            )  # [n, H, V]
        if b:
            decoded = decode_heads(
                q_nope[:b],
                q_rope[:b],
                self.w_uk.get_value(),
                self.w_uv.get_value(),
                kv,
                layer,
                batch.decode_tables[part.decode],
                rows.decode_lengths[part.decode],
                scale=scale,
                plan=plan,
                kernels=kernels,
            )
            attended = attended.at[:b].set(decoded) if prefills else decoded
        (parts,) = matmul_parts(attended, (self.out.get_value(),), 2, kernels)
        if comm.heads_are_whole:
            return parts
        return comm.sum_heads(sum_parts(parts, attended.dtype))[None]

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

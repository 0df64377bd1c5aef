"""Grouped-query attention: ordinary attention, with one key/value head or many.

Rotated keys and values are cached. Query heads stand beside the key/value head they use
(`model.heads`), so a device attends with what it holds and only the output is summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from model.batch import ForwardBatch, MicroBatch, Rows
from model.comm import Comm, SingleDevice
from model.config import ModelConfig
from model.heads import HeadSlots
from model.layers import ParamFactory, rms_norm
from model.ops.gqa_attention import decode_attention, extend_attention
from model.ops.kernels import Kernels
from model.quantization import saturating_cast
from model.rope import apply_rope


class GQAttention(nnx.Module):
    """Attention of one layer (or, stacked, of a segment). Slots of heads are cut over devices."""

    def __init__(self, make: ParamFactory, config: ModelConfig, slots: HeadSlots) -> None:
        width, d = config.hidden_size, config.head_dim
        heads, kv_heads = len(slots.query), len(slots.kv)
        self.q_proj = make.normal((width, heads, d), (None, "heads", None))
        self.kv_proj = make.normal((width, 2, kv_heads, d), (None, None, "kv_heads", None))
        if config.qkv_bias:
            self.q_bias = make.normal((heads, d), ("heads", None))
            self.kv_bias = make.normal((2, kv_heads, d), (None, "kv_heads", None))
        if config.qk_norm == "head":
            self.q_norm, self.k_norm = make.ones(d), make.ones(d)
        elif config.qk_norm == "projection":
            self.q_norm = make.ones(heads, d, axes=("heads", None))
            self.k_norm = make.ones(kv_heads, d, axes=("kv_heads", None))
        self.out = make.normal((heads, d, width), ("heads", None, None))
        self.config, self.slots = config, slots

    def queries_and_entries(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, comm: Comm
    ) -> tuple[jax.Array, jax.Array]:
        """[T, D] -> rotated queries [T, N, G, d] and entries [T, 2, N, d] of the N local slots."""
        q = jnp.einsum("td,dhk->thk", x, self.q_proj[...])
        kv = jnp.einsum("td,dnhk->tnhk", x, self.kv_proj[...])
        if self.config.qkv_bias:
            q, kv = q + self.q_bias[...], kv + self.kv_bias[...]
        q, key = self._normed(q, kv[:, 0], comm)
        q, key = self._rotated(q, cos, sin), self._rotated(key, cos, sin)
        q = q.reshape(q.shape[0], -1, self.slots.group, q.shape[-1])
        return q, jnp.stack([key, kv[:, 1]], axis=1)

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
    ) -> tuple[list[jax.Array], jax.Array, jax.Array]:
        """Queries of normalised rows, and their entries, which are written into the pool.

        Args:
            xs: [n, D] of each of the step's micro-batches, `parts`; rows, cos, sin: of all T rows.
            kv: [L, pages, S, 2, N, d], this device's pool; layer: i32, this layer's index in it.
            kernels: has nothing for GQA.

        Returns:
            [n, N, G, d] of each micro-batch; the entries [T, 2, N, d]; the updated pool.
        """
        projected = [
            self.queries_and_entries(x, cos[part.rows], sin[part.rows], comm)
            for x, part in zip(xs, parts, strict=True)
        ]
        entries = saturating_cast(jnp.concatenate([e for _, e in projected]), kv.dtype)
        kv = kv.at[layer, rows.pages, rows.offsets].set(entries)
        return [q for q, _ in projected], entries, kv

    def _rotated(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        """Rotate the first `rotary_dim` of x [T, heads, d]."""
        rotary = self.config.rotary_dim
        turned = apply_rope(x[..., :rotary], cos, sin, interleaved=self.config.rope_interleaved)
        return jnp.concatenate([turned, x[..., rotary:]], axis=-1)

    def _normed(self, q: jax.Array, key: jax.Array, comm: Comm) -> tuple[jax.Array, jax.Array]:
        """QK norm of q [T, H, d] and key [T, N, d], where the model has one."""
        c = self.config
        if c.qk_norm is None:
            return q, key
        if c.qk_norm == "head":
            return (
                rms_norm(q, self.q_norm[...], c.rms_norm_eps),
                rms_norm(key, self.k_norm[...], c.rms_norm_eps),
            )
        # Over the whole projection, which is spread over devices; copies of a head count once.
        local = key.shape[1]
        copies = jnp.asarray(self.slots.copies, jnp.float32)[
            comm.first_row(local) + jnp.arange(local)
        ]
        q32, k32 = q.astype(jnp.float32), key.astype(jnp.float32)
        squares = jnp.stack(
            [jnp.sum(q32 * q32, (1, 2)), jnp.sum(k32 * k32 / copies[:, None], (1, 2))]
        )  # [2, T]
        sizes = jnp.array([[c.num_heads * c.head_dim], [c.num_kv_heads * c.head_dim]])
        rms = jax.lax.rsqrt(comm.sum_heads(squares) / sizes + c.rms_norm_eps)[..., None, None]
        return (
            (q32 * rms[0]).astype(q.dtype) * self.q_norm[...],
            (k32 * rms[1]).astype(key.dtype) * self.k_norm[...],
        )

    def plan(self, *_: Any) -> None:
        """Nothing, see `MLAttention.plan`."""

    def attend(
        self,
        queries: jax.Array,
        entries: jax.Array,
        kv: jax.Array,
        layer: jax.Array,
        batch: ForwardBatch,
        rows: Rows,
        part: MicroBatch,
        plan: None,
        comm: Comm,
        kernels: Kernels,
    ) -> jax.Array:
        """The n rows of a micro-batch against what their sequences have in the pool.

        Args:
            queries: [n, N, G, d], of the micro-batch's rows.
            entries: [T, 2, N, d], of all rows of the step; read from the pool, which has them.
            kv: [L, pages, S, 2, N, d], this device's pool; layer: i32, this layer's index in it.
            rows: all rows of the step; kernels: has nothing for GQA.

        Returns:
            [1, n, D], complete, as `MLAttention.attend` gives it.
        """
        q = queries
        scale, b = self.config.attention_scale, part.decode.stop - part.decode.start
        parts = []
        if b:
            parts.append(
                decode_attention(
                    q[:b],
                    kv,
                    layer,
                    batch.decode_tables[part.decode],
                    rows.decode_lengths[part.decode],
                    scale=scale,
                )
            )
        if len(q) > b:
            parts.append(
                extend_attention(
                    q[b:],
                    kv,
                    layer,
                    batch.chunk_tables,
                    batch.chunk_first_row,
                    batch.chunk_rows,
                    batch.chunk_start,
                    first_row=part.prefill.start,
                    scale=scale,
                )
            )
        attended = jnp.concatenate(parts).reshape(len(q), -1, self.config.head_dim)  # [n, H, d]
        return comm.sum_heads(jnp.einsum("thk,hkd->td", attended, self.out[...]))[None]

    def naive(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        """The definition, on whole sequences: [batch, T, D] -> [batch, T, D], causal.

        cos and sin are f32 [T, R / 2]. Differentiable; used for training and as a reference.
        """
        q, entries = jax.vmap(lambda row: self.queries_and_entries(row, cos, sin, SingleDevice()))(
            x
        )
        scores = jnp.einsum(
            "bqngk,btnk->bngqt", q, entries[:, :, 0], preferred_element_type=jnp.float32
        )
        seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(seen, scores * self.config.attention_scale, -jnp.inf)
        p = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        attended = jnp.einsum("bngqt,btnk->bqngk", p, entries[:, :, 1])
        attended = attended.reshape(*x.shape[:2], -1, self.config.head_dim)  # [batch, T, H, d]
        return jnp.einsum("bthk,hkd->btd", attended, self.out[...])

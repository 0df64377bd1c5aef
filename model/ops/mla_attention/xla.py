"""Attention over the paged latent cache, in XLA: the definition, and the CPU implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from model.ops.paged_attention import paged_decode, paged_extend


def decode_attention(
    q_latent: jax.Array,
    q_rope: jax.Array,
    kv: jax.Array,
    layer: jax.Array,
    tables: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """One query per sequence against its cached latents.

    Args:
        q_latent: [B, H, C], queries multiplied by W_UK ("absorbed").
        q_rope: [B, H, R], rotated.
        kv: [L, N, S, C + R], the pool of this slice.
        layer: i32 scalar.
        tables: i32 [B, P].
        lengths: i32 [B], KV tokens of each sequence, the new one included; 0 for padding.
        scale: softmax scale.

    Returns:
        [B, H, C]: sums of latents, to be multiplied by W_UV; 0 for padding.
    """
    latent = q_latent.shape[-1]
    q = jnp.concatenate([q_latent, q_rope], axis=-1)[:, None]  # [B, 1, H, C + R]

    def read(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        c = kv[layer, ids].astype(q.dtype).reshape(q.shape[0], -1, 1, q.shape[-1])
        return c, c[..., :latent]

    return paged_decode(
        q, read, tables, lengths, page_size=kv.shape[2], value_dim=latent, scale=scale
    )[:, 0]


def extend_attention(
    q_nope: jax.Array,
    q_rope: jax.Array,
    w_uk: jax.Array,
    w_uv: jax.Array,
    kv: jax.Array,
    layer: jax.Array,
    tables: jax.Array,
    chunk_first_row: jax.Array,
    chunk_rows: jax.Array,
    chunk_start: jax.Array,
    *,
    first_row: int = 0,
    scale: float,
) -> jax.Array:
    """Prefill rows against their own sequences: the cached prefix and the chunk up to the row.

    Each block of a sequence's latents is expanded once, see `paged_extend`.

    Args:
        q_nope: [m, H, nope]; q_rope: [m, H, R], rotated.
        w_uk: [H, nope, C]; w_uv: [H, C, V], the two halves of kv_b_proj.
        kv: [L, N, S, C + R]; layer: i32 scalar; tables: i32 [chunks, P].
        chunk_first_row, chunk_rows, chunk_start: i32 [chunks], see `ForwardBatch`.
        first_row: which prefill row the first query is.
        scale: softmax scale.

    Returns:
        [m, H, V]; 0 for padding rows.
    """
    heads, latent, value_dim = w_uv.shape
    q = jnp.concatenate([q_nope, q_rope], axis=-1)[:, :, None]  # [M, H, 1, nope + R]

    def read(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        c = kv[layer, ids].astype(q.dtype).reshape(-1, kv.shape[-1])  # [block, C + R]
        key = jnp.concatenate(
            [
                jnp.einsum("tc,hnc->thn", c[:, :latent], w_uk),
                jnp.broadcast_to(c[:, None, latent:], (len(c), heads, q_rope.shape[-1])),
            ],
            axis=-1,
        )  # [block, H, nope + R]
        return key, jnp.einsum("tc,hcv->thv", c[:, :latent], w_uv)

    return paged_extend(
        q,
        read,
        tables,
        chunk_first_row,
        chunk_rows,
        chunk_start,
        first_row=first_row,
        page_size=kv.shape[2],
        value_dim=value_dim,
        scale=scale,
    )[:, :, 0]

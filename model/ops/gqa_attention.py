"""Grouped-query attention over paged keys and values (GQA, arXiv:2305.13245), in XLA.

A cache entry is [2, N, head_dim]: the rotated keys and the values of this device's N heads. Each
key/value head serves G query heads.
"""

from __future__ import annotations

import jax

from model.ops.paged_attention import Reader, paged_decode, paged_extend


def _reader(kv: jax.Array, layer: jax.Array, dtype: jax.typing.DTypeLike) -> Reader:
    """Keys and values of pages [..., pages] of a layer, as [..., block, N, head_dim]."""

    def read(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        entries = kv[layer, ids].astype(dtype)  # [..., pages, S, 2, N, head_dim]
        entries = entries.reshape(*ids.shape[:-1], -1, *entries.shape[-3:])
        return entries[..., 0, :, :], entries[..., 1, :, :]

    return read


def decode_attention(
    q: jax.Array,
    kv: jax.Array,
    layer: jax.Array,
    tables: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """One query per sequence against its cached keys and values.

    Args:
        q: [B, N, G, head_dim], rotated.
        kv: [L, N pages, S, 2, N, head_dim], the pool of this slice.
        layer: i32 scalar.
        tables: i32 [B, P]; lengths: i32 [B], the new token included; 0 for padding.
        scale: softmax scale.

    Returns:
        [B, N, G, head_dim]; 0 for padding.
    """
    return paged_decode(
        q,
        _reader(kv, layer, q.dtype),
        tables,
        lengths,
        page_size=kv.shape[2],
        value_dim=q.shape[-1],
        scale=scale,
    )


def extend_attention(
    q: jax.Array,
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
    """Prefill rows against their own sequences, see `paged_extend`.

    Args:
        q: [m, N, G, head_dim], rotated.
        kv: [L, N pages, S, 2, N, head_dim]; layer: i32 scalar; tables: i32 [chunks, P].
        chunk_first_row, chunk_rows, chunk_start: i32 [chunks], see `ForwardBatch`.

    Returns:
        [m, N, G, head_dim]; 0 for padding rows.
    """
    return paged_extend(
        q,
        _reader(kv, layer, q.dtype),
        tables,
        chunk_first_row,
        chunk_rows,
        chunk_start,
        first_row=first_row,
        page_size=kv.shape[2],
        value_dim=q.shape[-1],
        scale=scale,
    )

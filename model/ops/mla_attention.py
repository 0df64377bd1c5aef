"""Attention over the paged latent cache, in XLA: the definition, and the CPU implementation.

`decode_attention` is the absorbed form (one query per sequence against the latents, MQA),
`extend_attention` the naive form (keys and values expanded from the latents, MHA) for the new
tokens of prompt chunks. Both read only the pages a sequence has, in blocks, and merge the blocks by
running maximum and sum, so memory does not grow with the context.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

BLOCK_TOKENS = 128
"""KV tokens read at a time (rounded up to whole pages)."""
BLOCK_ROWS = 128
"""Prefill rows handled at a time."""
MASKED = -1e30


def _blocked_tables(tables: jax.Array, page_size: int) -> tuple[jax.Array, int]:
    """Pad page tables to whole blocks (with the sink page); also the pages of a block."""
    pages = min(max(1, BLOCK_TOKENS // page_size), tables.shape[1])
    return jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % pages))), pages


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
    page_size, latent = kv.shape[2], q_latent.shape[-1]
    tables, pages = _blocked_tables(tables, page_size)
    block = pages * page_size
    q = jnp.concatenate([q_latent, q_rope], axis=-1)  # [B, H, C + R]

    def body(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        ids = lax.dynamic_slice_in_dim(tables, i * pages, pages, axis=1)  # [B, pages]
        c = kv[layer, ids].reshape(q.shape[0], block, -1)  # [B, block, C + R]
        scores = jnp.einsum("bhc,btc->bht", q, c, preferred_element_type=jnp.float32) * scale
        seen = (i * block + jnp.arange(block))[None] < lengths[:, None]  # [B, block]
        return _merge(
            carry,
            scores,
            seen[:, None],
            lambda p: jnp.einsum(
                "bht,btc->bhc",
                p.astype(c.dtype),
                c[..., :latent],
                preferred_element_type=jnp.float32,
            ),
        )

    rows = q.shape[:2]
    carry = (
        jnp.zeros((*rows, latent), jnp.float32),
        jnp.full(rows, MASKED, jnp.float32),
        jnp.zeros(rows, jnp.float32),
    )
    blocks = -(-jnp.max(lengths, initial=0) // block)
    return _normalise(*lax.fori_loop(0, blocks, body, carry)).astype(q.dtype)


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
    scale: float,
) -> jax.Array:
    """Every prefill row against its own sequence: the cached prefix and the chunk up to itself.

    The chunk's own latents must be in the cache already. Each block of a sequence's latents is
    expanded once and met by all of the chunk's rows.

    Args:
        q_nope: [M, H, nope]; q_rope: [M, H, R], rotated.
        w_uk: [H, nope, C]; w_uv: [H, C, V], the two halves of kv_b_proj.
        kv: [L, N, S, C + R]; layer: i32 scalar; tables: i32 [chunks, P].
        chunk_first_row, chunk_rows, chunk_start: i32 [chunks], see `ForwardBatch`.
        scale: softmax scale.

    Returns:
        [M, H, V]; 0 for padding rows.
    """
    m, heads, latent = q_nope.shape[0], q_nope.shape[1], w_uv.shape[1]
    page_size = kv.shape[2]
    tables, pages = _blocked_tables(tables, page_size)
    block = pages * page_size
    rows = min(BLOCK_ROWS, m)
    q = jnp.concatenate([q_nope, q_rope], axis=-1)
    q = jnp.pad(q, ((0, -m % rows), (0, 0), (0, 0)))  # [whole row blocks, H, nope + R]

    def one_chunk(s: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        first, start = chunk_first_row[s], chunk_start[s]
        end = first + chunk_rows[s]

        def one_block(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            ids = lax.dynamic_slice_in_dim(tables[s], i * pages, pages)
            c = kv[layer, ids].reshape(block, -1)  # [block, C + R]
            key = jnp.concatenate(
                [
                    jnp.einsum("tc,hnc->thn", c[:, :latent], w_uk),
                    jnp.broadcast_to(c[:, None, latent:], (block, heads, c.shape[1] - latent)),
                ],
                axis=-1,
            )  # [block, H, nope + R]
            value = jnp.einsum("tc,hcv->thv", c[:, :latent], w_uv)
            key_position = i * block + jnp.arange(block)

            def one_row_block(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                at = j * rows
                part = [lax.dynamic_slice_in_dim(x, at, rows) for x in carry]
                scores = (
                    jnp.einsum(
                        "mhd,thd->mht",
                        lax.dynamic_slice_in_dim(q, at, rows),
                        key,
                        preferred_element_type=jnp.float32,
                    )
                    * scale
                )
                row = at + jnp.arange(rows)
                seen = ((row >= first) & (row < end))[:, None] & (
                    key_position[None] <= (start + row - first)[:, None]
                )  # [rows, block]
                merged = _merge(
                    tuple(part),
                    scores,
                    seen[:, None],
                    lambda p: jnp.einsum(
                        "mht,thv->mhv",
                        p.astype(value.dtype),
                        value,
                        preferred_element_type=jnp.float32,
                    ),
                )
                return tuple(
                    lax.dynamic_update_slice_in_dim(x, y, at, 0)
                    for x, y in zip(carry, merged, strict=True)
                )

            # Rows before this block's first key see nothing of it.
            first_seeing = first + jnp.maximum(i * block - start, 0)
            return lax.fori_loop(first_seeing // rows, -(-end // rows), one_row_block, carry)

        return lax.fori_loop(0, -(-(start + chunk_rows[s]) // block), one_block, carry)

    carry = (
        jnp.zeros((*q.shape[:2], w_uv.shape[-1]), jnp.float32),
        jnp.full(q.shape[:2], MASKED, jnp.float32),
        jnp.zeros(q.shape[:2], jnp.float32),
    )
    used = jnp.sum(chunk_rows > 0)
    return _normalise(*lax.fori_loop(0, used, one_chunk, carry))[:m].astype(q.dtype)


def _merge(carry, scores, seen, weigh):  # noqa: ANN001, ANN202
    """Add a block to (sum, maximum, total) of an online softmax (arXiv:1805.02867).

    scores f32 [..., block] and seen, broadcast alike; weigh(p) sums the block's values.
    """
    out, maximum, total = carry
    scores = jnp.where(seen, scores, MASKED)
    new_maximum = jnp.maximum(maximum, scores.max(axis=-1))
    p = jnp.where(seen, jnp.exp(scores - new_maximum[..., None]), 0.0)
    decay = jnp.exp(maximum - new_maximum)
    return (
        out * decay[..., None] + weigh(p),
        new_maximum,
        total * decay + p.sum(axis=-1),
    )


def _normalise(out: jax.Array, maximum: jax.Array, total: jax.Array) -> jax.Array:
    """Divide by the total; rows that saw nothing give 0."""
    return out / jnp.where(total > 0, total, 1.0)[..., None]

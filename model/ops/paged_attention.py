"""Attention over a paged cache, in XLA: the definition, and the CPU implementation.

What a token's cache entry is (a latent, or keys and values) is up to a reader, which turns pages
into keys and values. Only the pages a sequence has are read, in blocks, and the blocks are merged
by running maximum and sum, so memory does not grow with the context.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

BLOCK_TOKENS = 128
"""KV tokens read at a time (rounded up to whole pages)."""
BLOCK_ROWS = 128
"""Prefill rows handled at a time."""
MASKED = -1e30

Reader = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
"""Page ids i32 [..., pages] -> keys [..., block, N, K] and values [..., block, N, V] of N heads."""


def _blocked_tables(tables: jax.Array, page_size: int) -> tuple[jax.Array, int]:
    """Pad page tables to whole blocks (with the sink page); also the pages of a block."""
    pages = min(max(1, BLOCK_TOKENS // page_size), tables.shape[1])
    return jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % pages))), pages


def paged_decode(
    q: jax.Array,
    read: Reader,
    tables: jax.Array,
    lengths: jax.Array,
    *,
    page_size: int,
    value_dim: int,
    scale: float,
) -> jax.Array:
    """One query per sequence against its cached tokens.

    Args:
        q: [B, N, G, K], G query heads for each of N key/value heads.
        read: keys and values of pages i32 [B, pages].
        tables: i32 [B, P].
        lengths: i32 [B], KV tokens of each sequence, the new one included; 0 for padding.
        scale: softmax scale.

    Returns:
        [B, N, G, V]; 0 for padding.
    """
    tables, pages = _blocked_tables(tables, page_size)
    block = pages * page_size

    def body(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        ids = lax.dynamic_slice_in_dim(tables, i * pages, pages, axis=1)  # [B, pages]
        key, value = read(ids)  # [B, block, N, K], [B, block, N, V]
        scores = _one_head_or_many("bngk,btnk->bngt", q, key) * scale
        seen = (i * block + jnp.arange(block))[None] < lengths[:, None]  # [B, block]
        return _merge(
            carry,
            scores,
            seen[:, None, None],
            lambda p: _one_head_or_many("bngt,btnv->bngv", p.astype(value.dtype), value),
        )

    rows = q.shape[:3]
    blocks = -(-jnp.max(lengths, initial=0) // block)
    carry = lax.fori_loop(0, blocks, body, _nothing_seen(rows, value_dim))
    return _normalise(*carry).astype(q.dtype)


def paged_extend(
    q: jax.Array,
    read: Reader,
    tables: jax.Array,
    chunk_first_row: jax.Array,
    chunk_rows: jax.Array,
    chunk_start: jax.Array,
    *,
    first_row: int = 0,
    page_size: int,
    value_dim: int,
    scale: float,
) -> jax.Array:
    """Prefill rows against their own sequences: the cached prefix and the chunk up to the row.

    The chunks' own entries must be in the cache already. Each block of a sequence is read once
    and met by all of the chunk's rows.

    Args:
        q: [m, N, G, K], G query heads for each of N key/value heads.
        read: keys and values of one sequence's pages i32 [pages].
        tables: i32 [chunks, P].
        chunk_first_row, chunk_rows, chunk_start: i32 [chunks], see `ForwardBatch`.
        first_row: which prefill row the first query is; chunks may begin before it or end behind
            the last query.
        scale: softmax scale.

    Returns:
        [m, N, G, V]; 0 for padding rows.
    """
    m = q.shape[0]
    chunk_first_row = chunk_first_row - first_row  # counted in queries: may be negative, or beyond
    tables, pages = _blocked_tables(tables, page_size)
    block = pages * page_size
    rows = min(BLOCK_ROWS, m)
    q = jnp.pad(q, ((0, -m % rows), (0, 0), (0, 0), (0, 0)))  # whole row blocks

    def one_chunk(s: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        first, start = chunk_first_row[s], chunk_start[s]
        end = first + chunk_rows[s]
        last = jnp.minimum(end, m)

        def one_block(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            ids = lax.dynamic_slice_in_dim(tables[s], i * pages, pages)
            key, value = read(ids)  # [block, N, K], [block, N, V]
            key_position = i * block + jnp.arange(block)

            def one_row_block(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                at = j * rows
                part = tuple(lax.dynamic_slice_in_dim(x, at, rows) for x in carry)
                queries = lax.dynamic_slice_in_dim(q, at, rows)
                scores = jnp.einsum(
                    "mngk,tnk->mngt", queries, key, preferred_element_type=jnp.float32
                )
                row = at + jnp.arange(rows)
                seen = ((row >= first) & (row < end))[:, None] & (
                    key_position[None] <= (start + row - first)[:, None]
                )  # [rows, block]
                merged = _merge(
                    part,
                    scores * scale,
                    seen[:, None, None],
                    lambda p: jnp.einsum(
                        "mngt,tnv->mngv",
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
            first_seeing = jnp.maximum(first + jnp.maximum(i * block - start, 0), 0)
            return lax.fori_loop(first_seeing // rows, -(-last // rows), one_row_block, carry)

        context = start + last - first  # what the chunk's last query sees
        blocks = jnp.where(last > jnp.maximum(first, 0), -(-context // block), 0)
        return lax.fori_loop(0, blocks, one_block, carry)

    used = jnp.sum(chunk_rows > 0)
    carry = lax.fori_loop(0, used, one_chunk, _nothing_seen(q.shape[:3], value_dim))
    return _normalise(*carry)[:m].astype(q.dtype)


def _one_head_or_many(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A f32 einsum, without its axis of one key/value head (MLA), which costs time on CPU."""
    if a.shape[1] > 1:
        return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)
    subscripts = subscripts.replace("n", "")
    return jnp.einsum(subscripts, a[:, 0], b[:, :, 0], preferred_element_type=jnp.float32)[:, None]


def _nothing_seen(rows: tuple[int, ...], value_dim: int) -> tuple[jax.Array, ...]:
    """(sum, maximum, total) of an online softmax before its first block."""
    return (
        jnp.zeros((*rows, value_dim), jnp.float32),
        jnp.full(rows, MASKED, jnp.float32),
        jnp.zeros(rows, jnp.float32),
    )


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

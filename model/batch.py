"""The contract between serving and model: the rows that one dp slice computes in one step.

Rows are [decode | prefill]. A decode row is one token of a running request, a prefill row one token
of a prompt chunk; chunks are packed back to back. Everything has a fixed size (a bucket); what is
unused is padding, which is written to page 0 (a sink) and routed to no expert.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class ForwardBatch(NamedTuple):
    """One slice's rows. B decode rows, M prefill rows of at most C chunks, P pages a table.

    Attributes:
        decode_tokens: i32 [B].
        decode_positions: i32 [B], the position of each token; -1 in padding rows.
        decode_tables: i32 [B, P], page ids; 0 beyond a sequence's pages.
        prefill_tokens: i32 [M].
        chunk_first_row: i32 [C], first prefill row of each chunk, ascending; M for unused chunks.
        chunk_rows: i32 [C], number of rows of each chunk; 0 for unused chunks.
        chunk_start: i32 [C], position of each chunk's first token.
        chunk_tables: i32 [C, P].
    """

    decode_tokens: jax.Array
    decode_positions: jax.Array
    decode_tables: jax.Array
    prefill_tokens: jax.Array
    chunk_first_row: jax.Array
    chunk_rows: jax.Array
    chunk_start: jax.Array
    chunk_tables: jax.Array

    @property
    def num_decode_rows(self) -> int:
        return self.decode_tokens.shape[0]

    @property
    def num_prefill_rows(self) -> int:
        return self.prefill_tokens.shape[0]


class Prefixes(NamedTuple):
    """The distinct cached prefixes of C chunks, laid end to end.

    Attributes:
        lengths: i32 [C], tokens of each chunk's prefix; first: i32 [C], where it begins.
        ends: i32 [C], ascending, where the prefix of a chunk ends that is the first one with it;
            others add nothing. The last is the number of tokens of all.
    """

    lengths: jax.Array
    first: jax.Array
    ends: jax.Array


class Rows(NamedTuple):
    """What every layer needs to know of the T = B + M rows; derived once per step.

    Attributes:
        tokens: i32 [T].
        positions: i32 [T]; 0 in padding rows.
        valid: bool [T].
        pages, offsets: i32 [T], where each row's KV entry goes; page 0 for padding.
        decode_lengths: i32 [B], KV tokens of each decode row, its own included; 0 for padding.
        prefixes: what the chunks find cached.
    """

    tokens: jax.Array
    positions: jax.Array
    valid: jax.Array
    pages: jax.Array
    offsets: jax.Array
    decode_lengths: jax.Array
    prefixes: Prefixes


class MicroBatch(NamedTuple):
    """A range of a step's rows that a layer computes by itself: all of them, or one of two.

    Attributes:
        rows: of all T rows; decode: of the B decode rows; prefill: of the M prefill rows. Static.
    """

    rows: slice
    decode: slice
    prefill: slice


def micro_batches(batch: ForwardBatch, cut: int = 0) -> tuple[MicroBatch, ...]:
    """The T rows whole, or with a `cut` inside them the rows before it and those from it on."""
    b, m = batch.num_decode_rows, batch.num_prefill_rows
    edges = (0, cut, b + m) if 0 < cut < b + m else (0, b + m)
    return tuple(
        MicroBatch(
            rows=slice(first, end),
            decode=slice(min(first, b), min(end, b)),
            prefill=slice(max(first - b, 0), max(end - b, 0)),
        )
        for first, end in itertools.pairwise(edges)
    )


def derive_rows(batch: ForwardBatch, page_size: int) -> Rows:
    """Positions, validity and cache slots of all rows."""
    row = jnp.arange(batch.num_prefill_rows)
    chunk = jnp.searchsorted(batch.chunk_first_row, row, side="right") - 1  # [M]
    chunk = jnp.maximum(chunk, 0)
    inside = row - batch.chunk_first_row[chunk]
    prefill_valid = (inside >= 0) & (inside < batch.chunk_rows[chunk])
    positions = jnp.concatenate(
        [
            batch.decode_positions,
            jnp.where(prefill_valid, batch.chunk_start[chunk] + inside, -1),
        ]
    )
    valid = positions >= 0
    positions = jnp.maximum(positions, 0)
    index = positions // page_size  # [T]
    b = batch.num_decode_rows
    pages = jnp.concatenate(
        [
            jnp.take_along_axis(batch.decode_tables, index[:b, None], axis=1)[:, 0],
            batch.chunk_tables[chunk, index[b:]],
        ]
    )
    return Rows(
        tokens=jnp.concatenate([batch.decode_tokens, batch.prefill_tokens]),
        positions=positions,
        valid=valid,
        pages=jnp.where(valid, pages, 0),
        offsets=positions % page_size,
        decode_lengths=batch.decode_positions + 1,
        prefixes=find_prefixes(batch.chunk_rows, batch.chunk_start, batch.chunk_tables, page_size),
    )


def find_prefixes(
    chunk_rows: jax.Array, chunk_start: jax.Array, chunk_tables: jax.Array, page_size: int
) -> Prefixes:
    """Lay out the chunks' prefixes; those that end alike on the same page are one.

    Whoever has a page of a shared prefix has the same tokens before it. Arguments: `ForwardBatch`.
    """
    lengths = jnp.where(chunk_rows > 0, chunk_start, 0)  # [C]
    chunks = jnp.arange(len(lengths), dtype=jnp.int32)
    last_pages = chunk_tables[chunks, jnp.maximum(lengths - 1, 0) // page_size]
    same = (lengths[:, None] == lengths) & (last_pages[:, None] == last_pages)  # [C, C]
    leader = jnp.min(jnp.where(same, chunks, len(chunks)), axis=1, initial=len(chunks))
    own = jnp.where(leader == chunks, lengths, 0)
    ends = jnp.cumsum(own)
    return Prefixes(lengths=lengths, first=(ends - own)[leader], ends=ends)


def sampled_rows(batch: ForwardBatch) -> jax.Array:
    """Rows whose logits are wanted: every decode row, then the last row of each chunk, i32 [B+C].

    Unused chunks give row 0, whose result nobody reads.
    """
    last = batch.num_decode_rows + batch.chunk_first_row + batch.chunk_rows - 1
    last = jnp.where(batch.chunk_rows > 0, last, 0)
    return jnp.concatenate([jnp.arange(batch.num_decode_rows), last]).astype(jnp.int32)

"""Extend attention around a kernel: MHA of packed chunks over keys expanded from the latents.

New tokens attend to each other with keys and values expanded once for all rows. Cached prefixes are
met first: each distinct one is read from the pages and expanded once for all its chunks, a piece of
bounded size at a time. A single piece and the new tokens are met by one call of the kernel; of
several, sums and log-sum-exps go from piece to piece. Where no chunk has a prefix, nothing of that
runs. The kernels are `triton`'s, for all GPUs, and `hopper`'s.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from model.batch import Prefixes
from model.ops.kernels import PrefixesFound

MIN_PIECE, MAX_PIECE = 1024, 4096
"""Tokens of cached prefixes that are expanded at a time, as many as there are rows within these."""


class Expanded(NamedTuple):
    """Keys and values of S tokens: [S, H, nope] and [S, H, V], and the entries [S, C + R] that they
    come from, whose rope keys all heads share."""

    k_nope: jax.Array
    entries: jax.Array
    values: jax.Array


class Chunks(NamedTuple):
    """Where each chunk's rows and keys stand, i32 [C]; key 0 is what row 0 sees at least.

    Rows are counted from the first query on: chunks may begin before it, or behind the last.
    """

    first_row: jax.Array
    num_rows: jax.Array
    first_key: jax.Array
    num_keys: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Source:
    """What rows meet: if `causal`, their chunks' own keys up to themselves, else every key."""

    expanded: Expanded
    chunks: Chunks
    causal: bool = field(metadata={"static": True})


State = tuple[jax.Array, jax.Array]
"""What rows have seen so far: normalised sums f32 [M, H, V], log-sum-exps f32 [M, H] in base 2."""


class Attend(Protocol):
    """A kernel."""

    def __call__(
        self,
        q_nope: jax.Array,
        q_rope: jax.Array,
        sources: Sequence[Source],
        start: State | None,
        *,
        m: int,
        scale: float,
        interpret: bool,
    ) -> State | jax.Array:
        """The last m rows of [n, H, nope or more] and [n, H, R] against one or two sources.

        `start` is what they have seen before; None: nothing. If the last source is causal the
        result is [n, H, V], in which other rows are undefined; else the state, with a few rows
        more than m to make whole blocks.
        """


def chunks_of_blocks(first_row: jax.Array, blocks: int, rows: int) -> jax.Array:
    """First and last chunk with rows in each block of rows, i32 [blocks, 2]."""
    ends = jnp.arange(blocks, dtype=jnp.int32)[:, None] * rows + jnp.array([0, rows - 1])
    before = first_row[None, None] <= ends[..., None]
    return jnp.maximum(before.sum(axis=-1, dtype=jnp.int32) - 1, 0)


def _prefix_piece(
    kv: jax.Array,
    layer: jax.Array,
    tables: jax.Array,
    prefixes: Prefixes,
    first: jax.Array,
    size: int,
) -> jax.Array:
    """Cached entries [size, C + R] of the prefixes laid end to end, from token `first` on.

    Zeros stand behind the last one.
    """
    page_size = kv.shape[2]
    token = first + jnp.arange(size, dtype=jnp.int32)
    chunk = (prefixes.ends[None] <= token[:, None]).sum(axis=1, dtype=jnp.int32)
    chunk = jnp.minimum(chunk, len(prefixes.ends) - 1)
    position = jnp.clip(token - prefixes.first[chunk], 0, tables.shape[1] * page_size - 1)
    cached = kv[layer, tables[chunk, position // page_size], position % page_size]
    return jnp.where((token < prefixes.ends[-1])[:, None], cached, 0)


def extend_attention(
    q_nope: jax.Array,
    q_rope: jax.Array,
    w_uk: jax.Array,
    w_uv: jax.Array,
    entries: jax.Array,
    kv: jax.Array,
    layer: jax.Array,
    tables: jax.Array,
    chunk_first_row: jax.Array,
    chunk_rows: jax.Array,
    prefixes: Prefixes,
    found: PrefixesFound,
    *,
    rows: slice,
    num_rows: int,
    scale: float,
    kernel: Attend,
    interpret: bool = False,
) -> jax.Array:
    """See `model.ops.mla_attention.extend_attention`; `found` says what is known of the prefixes.

    How many pieces they have must else be asked, which the host does, layer by layer.
    """
    m, rope = rows.stop - rows.start, q_rope.shape[-1]
    met = functools.partial(kernel, q_nope, q_rope, m=m, scale=scale, interpret=interpret)
    # Whole entries times weights that ignore the rope key: cutting entries would copy them.
    w_uk = jnp.pad(w_uk, ((0, 0), (0, 0), (0, rope)))
    w_uv = jnp.pad(w_uv, ((0, 0), (0, rope), (0, 0)))

    def expand(entries: jax.Array) -> Expanded:
        k_nope = jnp.einsum("mc,hnc->mhn", entries, w_uk)
        return Expanded(k_nope, entries, jnp.einsum("mc,hcv->mhv", entries, w_uv))

    # Outside of the branches, and of all rows: two parts' expansions are one to XLA.
    own, first_row = expand(entries), chunk_first_row - rows.start
    first_key = chunk_first_row + (len(entries) - num_rows)
    new = Source(own, Chunks(first_row, chunk_rows, first_key, chunk_rows), causal=True)
    if found == "none":
        return met([new], None)
    size = min(MAX_PIECE, max(MIN_PIECE, m))

    def piece(i: jax.Array | int) -> Source:
        cached = _prefix_piece(kv, layer, tables, prefixes, i * size, size)
        first = jnp.clip(prefixes.first - i * size, 0, size)
        end = jnp.clip(prefixes.first + prefixes.lengths - i * size, 0, size)
        chunks = Chunks(first_row, chunk_rows, first, end - first)
        return Source(expand(cached.astype(q_nope.dtype)), chunks, causal=False)

    def several() -> jax.Array:
        state = met([piece(0)], None)
        state = lax.fori_loop(1, pieces, lambda i, state: met([piece(i)], state), state)
        return met([new], state)

    pieces = (prefixes.ends[-1] + size - 1) // size
    branches = [lambda: met([new], None), lambda: met([piece(0), new], None), several]
    fewest = 0 if found == "perhaps" else 1  # an empty piece is right, too
    # With more pieces than branches the last one is taken, with none the first.
    return lax.switch(pieces - fewest, branches[fewest:])

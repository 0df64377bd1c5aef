"""Extend attention in Pallas (Triton): causal MHA over packed chunks, and their cached prefixes.

New tokens attend to each other with keys and values expanded once for all rows. A cached prefix is
met first, in the absorbed form straight from the pages; its sums and log-sum-exps are what the
causal kernel starts from. Where no chunk has a prefix, nothing of that runs.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from model.ops.kernels import is_power_of_two
from model.ops.mla_attention.pages import (
    LOG2_E,
    MASKED,
    MIN_BLOCK,
    Softmax,
    dot,
    read_tokens,
)
from model.ops.mla_attention.pages import unsupported as latents_unsupported

ROWS, KEYS = 128, 64
"""Rows and keys of one block of the causal kernel."""
PREFIX_ROWS, PREFIX_KEYS = 64, 32
"""(Query, head) rows and tokens of one block of the prefix kernel."""


def unsupported(latent: int, rope: int, nope: int, value: int) -> str | None:
    """Why the kernels cannot take heads of these sizes; None if they can."""
    for name, size in (("qk_nope_head_dim", nope), ("v_head_dim", value)):
        if not is_power_of_two(size) or size < MIN_BLOCK:
            return f"{name} {size} must be a power of two from {MIN_BLOCK} on"
    return latents_unsupported(latent, rope)


def _causal_kernel(
    q_nope_ref,
    q_rope_ref,
    k_nope_ref,
    k_rope_ref,
    value_ref,
    chunks_ref,
    first_row_ref,
    num_rows_ref,
    *refs,
    first_query: int,
    keys: int,
    scale: float,
):
    """A block of rows of one head against the rows of their own chunks.

    Keys are met in blocks that begin with a chunk's first row, wherever the chunk stands; rows are
    counted from the first query on, which is key `first_query`. `refs` are the prefixes' sums and
    log-sum-exps, if any, then the output.
    """
    out_ref = refs[-1]
    q_nope, q_rope = q_nope_ref[...], q_rope_ref[...]
    rows = q_nope.shape[0]
    block, head = pl.num_programs(0) - 1 - pl.program_id(0), pl.program_id(1)
    row = block * rows + lax.broadcasted_iota(jnp.int32, (rows,), 0)

    def one_chunk(c, so_far):
        first = first_row_ref[c]
        end = first + num_rows_ref[c]
        stop = jnp.minimum(end, (block + 1) * rows)  # keys from here on are seen by nobody

        def one_block(j, so_far):
            key = first + j * keys + lax.broadcasted_iota(jnp.int32, (keys,), 0)
            live = (key < stop)[:, None]
            at = pl.ds(first_query + first + j * keys, keys)

            def read(ref):
                return plgpu.load(ref, mask=live, other=0)

            scores = dot(q_nope, read(k_nope_ref.at[at, head]), transposed=True)
            scores += dot(q_rope, read(k_rope_ref.at[at]), transposed=True)
            seen = (key[None] <= row[:, None]) & (row < end)[:, None]
            return Softmax(*so_far).add(
                scores * (scale * LOG2_E), seen, read(value_ref.at[at, head])
            )

        def one_full_block(j, so_far):
            at = pl.ds(first_query + first + j * keys, keys)
            scores = dot(q_nope, k_nope_ref[at, head], transposed=True)
            scores += dot(q_rope, k_rope_ref[at], transposed=True)
            return Softmax(*so_far).add_all(scores * (scale * LOG2_E), value_ref[at, head])

        # Where all rows are of this chunk, all of them see the keys before the first row.
        first_of_block = block * rows
        mine = (first <= first_of_block) & (first_of_block + rows <= end)
        full = jnp.where(mine, (first_of_block - first) // keys, 0)
        so_far = lax.fori_loop(0, full, one_full_block, so_far)
        return lax.fori_loop(full, (stop - first + keys - 1) // keys, one_block, so_far)

    start = Softmax.empty(rows, out_ref.shape[-1])
    if len(refs) > 1:
        prefix, log_sum = refs[0][...].astype(jnp.float32), refs[1][...]
        start = Softmax(prefix, log_sum, jnp.where(log_sum > MASKED, 1.0, 0.0))
    result = lax.fori_loop(chunks_ref[block, 0], chunks_ref[block, 1] + 1, one_chunk, start)
    out_ref[...] = Softmax(*result).normalised().astype(out_ref.dtype)


def _prefix_kernel(
    q_latent_ref,
    q_rope_ref,
    kv_ref,
    layer_ref,
    tables_ref,
    chunks_ref,
    first_row_ref,
    num_rows_ref,
    start_ref,
    out_ref,
    log_sum_ref,
    *,
    heads: int,
    keys: int,
    scale: float,
):
    """A block of (query, head) rows against the cached prefixes of the queries' chunks."""
    q_latent, q_rope, layer = q_latent_ref[...], q_rope_ref[...], layer_ref[0]
    rows, latent = q_latent.shape
    block = pl.program_id(0)
    row = (block * rows + lax.broadcasted_iota(jnp.int32, (rows,), 0)) // heads

    def one_chunk(c, so_far):
        first, length = first_row_ref[c], start_ref[c]
        mine = ((row >= first) & (row < first + num_rows_ref[c]))[:, None]

        def one_block(j, so_far):
            tokens = j * keys + lax.broadcasted_iota(jnp.int32, (keys,), 0)
            live = tokens < length
            read, rope = read_tokens(
                *(kv_ref, tables_ref, layer, tokens, live),
                latent=latent,
                dtype=q_latent.dtype,
                row=(c,),
            )
            scores = dot(q_latent, read, transposed=True) + dot(q_rope, rope, transposed=True)
            return Softmax(*so_far).add(scores * (scale * LOG2_E), mine & live[None], read)

        return lax.fori_loop(0, (length + keys - 1) // keys, one_block, so_far)

    empty = Softmax.empty(rows, latent)
    result = Softmax(
        *lax.fori_loop(chunks_ref[block, 0], chunks_ref[block, 1] + 1, one_chunk, empty)
    )
    out_ref[...] = result.normalised().astype(out_ref.dtype)
    seen = result.total > 0
    log_sum_ref[...] = jnp.where(
        seen, result.maximum + jnp.log2(jnp.where(seen, result.total, 1.0)), MASKED
    )


def _whole(array: jax.Array) -> pl.BlockSpec:
    return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)


def _chunks_of_blocks(
    chunk_first_row: jax.Array, blocks: int, rows: int, heads: int = 1
) -> jax.Array:
    """First and last chunk with rows in each block of `rows` (row, head) pairs, i32 [blocks, 2]."""
    ends = jnp.arange(blocks, dtype=jnp.int32)[:, None] * rows + jnp.array([0, rows - 1])
    before = chunk_first_row[None, None] <= (ends // heads)[..., None]
    return jnp.maximum(before.sum(axis=-1, dtype=jnp.int32) - 1, 0)


def _prefix(
    q_nope: jax.Array,
    q_rope: jax.Array,
    w_uk: jax.Array,
    w_uv: jax.Array,
    kv: jax.Array,
    layer: jax.Array,
    tables: jax.Array,
    chunks: tuple[jax.Array, jax.Array, jax.Array],
    *,
    scale: float,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Attention to cached prefixes alone: [M, H, V] and log-sum-exps f32 [M, H] in base 2."""
    m, heads, rope = q_rope.shape
    latent = w_uk.shape[-1]
    q_latent = jnp.einsum("mhn,hnc->mhc", q_nope, w_uk).reshape(m * heads, latent)
    q_rope = q_rope.reshape(m * heads, rope)
    rows = PREFIX_ROWS
    padding = ((0, -(m * heads) % rows), (0, 0))
    q_latent, q_rope = jnp.pad(q_latent, padding), jnp.pad(q_rope, padding)
    blocks = q_latent.shape[0] // rows
    blocked = _chunks_of_blocks(chunks[0], blocks, rows, heads)
    layer = jnp.reshape(layer, (1,)).astype(jnp.int32)
    out, log_sum = pl.pallas_call(
        functools.partial(_prefix_kernel, heads=heads, keys=PREFIX_KEYS, scale=scale),
        grid=(blocks,),
        in_specs=[
            pl.BlockSpec((rows, latent), lambda i: (i, 0)),
            pl.BlockSpec((rows, rope), lambda i: (i, 0)),
            *(_whole(a) for a in (kv, layer, tables, blocked, *chunks)),
        ],
        out_specs=[
            pl.BlockSpec((rows, latent), lambda i: (i, 0)),
            pl.BlockSpec((rows,), lambda i: (i,)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(q_latent.shape, q_latent.dtype),
            jax.ShapeDtypeStruct(q_latent.shape[:1], jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=2),
        interpret=interpret,
        name="mla_prefix",
    )(q_latent, q_rope, kv, layer, tables, blocked, *chunks)
    out = out[: m * heads].reshape(m, heads, latent)
    out = jnp.einsum("mhc,hcv->mhv", out, w_uv)
    return out, log_sum[: m * heads].reshape(m, heads)


def extend_attention(
    q_nope: jax.Array,
    q_rope: jax.Array,
    w_uk: jax.Array,
    w_uv: jax.Array,
    latents: jax.Array,
    kv: jax.Array,
    layer: jax.Array,
    tables: jax.Array,
    chunk_first_row: jax.Array,
    chunk_rows: jax.Array,
    chunk_start: jax.Array,
    *,
    first_row: int = 0,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """See `model.ops.mla_attention.extend_attention`."""
    m, heads, nope = q_nope.shape
    latent, value = w_uv.shape[1:]
    rope = q_rope.shape[-1]
    rows = MIN_BLOCK
    while rows < min(m, ROWS):
        rows *= 2
    padding = -m % rows
    if padding:
        q_nope, q_rope = (jnp.pad(a, ((0, padding), (0, 0), (0, 0))) for a in (q_nope, q_rope))
    # All rows, also where the queries are a part: the parts' expansions are one to XLA.
    latents = jnp.pad(latents, ((0, -len(latents) % rows), (0, 0)))
    c, k_rope = latents[:, :latent], latents[:, latent:]
    k_nope = jnp.einsum("mc,hnc->mhn", c, w_uk)
    values = jnp.einsum("mc,hcv->mhv", c, w_uv)
    blocks = q_nope.shape[0] // rows
    chunk_first_row = chunk_first_row - first_row  # counted in queries: may be negative
    blocked = _chunks_of_blocks(chunk_first_row, blocks, rows)

    def causal(*start: jax.Array) -> jax.Array:
        def of_rows(width: int) -> pl.BlockSpec:
            return pl.BlockSpec((rows, None, width), lambda i, h: (blocks - 1 - i, h, 0))

        operands = (k_nope, k_rope, values, blocked, chunk_first_row, chunk_rows)
        start_specs = [
            of_rows(value),
            pl.BlockSpec((rows, None), lambda i, h: (blocks - 1 - i, h)),
        ]
        return pl.pallas_call(
            functools.partial(
                _causal_kernel, first_query=first_row, keys=min(KEYS, rows), scale=scale
            ),
            grid=(blocks, heads),
            in_specs=[
                of_rows(nope),
                of_rows(rope),
                *(_whole(a) for a in operands),
                *start_specs[: len(start)],
            ],
            out_specs=of_rows(value),
            out_shape=jax.ShapeDtypeStruct((*q_nope.shape[:2], value), q_nope.dtype),
            compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=3),
            interpret=interpret,
            name="mla_causal",
        )(q_nope, q_rope, *operands, *start)

    def after_prefixes() -> jax.Array:
        chunks = (chunk_first_row, chunk_rows, chunk_start)
        return causal(
            *_prefix(
                *(q_nope, q_rope, w_uk, w_uv, kv, layer, tables, chunks),
                scale=scale,
                interpret=interpret,
            )
        )

    any_prefix = jnp.any((chunk_rows > 0) & (chunk_start > 0))
    return lax.cond(any_prefix, after_prefixes, causal)[:m]

"""Extend attention in Pallas: MHA of packed chunks over keys expanded from the latents.

New tokens attend to each other with keys and values expanded once for all rows. Cached prefixes are
met first: each distinct one is read from the pages and expanded once for all its chunks, a piece of
bounded size at a time. A single piece and the new tokens are met by one call of the kernel; of
several, sums and log-sum-exps go from piece to piece. Where no chunk has a prefix, nothing of that
runs. The kernel here is in Triton, `hopper` has another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from model.batch import Prefixes
from model.ops.kernels import (
    MIN_BLOCK,
    PrefixesFound,
    covering_block,
    is_power_of_two,
    lowered_once,
    whole,
)
from model.ops.mla_attention.pages import LOG2_E, MASKED, Softmax, dot
from model.ops.mla_attention.pages import unsupported as latents_unsupported

ROWS, KEYS, WARPS, STAGES = 128, 64, 8, 3
"""Rows and keys of one block; how a program computes them."""
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
Attend = Callable[..., "State | jax.Array"]
"""A kernel, see `attend`."""


def unsupported(latent: int, rope: int, nope: int, value: int) -> str | None:
    """Why the kernels cannot take heads of these sizes; None if they can."""
    for name, size in (("qk_nope_head_dim", nope), ("v_head_dim", value)):
        if not is_power_of_two(size) or size < MIN_BLOCK:
            return f"{name} {size} must be a power of two from {MIN_BLOCK} on"
    return latents_unsupported(latent, rope)


def _kernel(
    q_nope_ref,
    q_rope_ref,
    k_nope_ref,
    entries_ref,
    value_ref,
    blocks_ref,
    first_row_ref,
    num_rows_ref,
    first_key_ref,
    num_keys_ref,
    *refs,
    before: int,
    rows: int,
    keys: int,
    nope: int,
    scale: float,
    causal: bool,
    starts: bool,
):
    """A block of rows of one head against the keys of their own chunks.

    Queries have `before` rows before the first that counts. Keys are met in blocks that begin with
    a chunk's first key, wherever that stands. `refs`: the state to start from, if it `starts` from
    one; the output, and the log-sum-exps if not causal.
    """
    factor = scale * LOG2_E
    # All heads of the last rows first: they see the most keys; what begins late should be short.
    block, head = pl.num_programs(1) - 1 - pl.program_id(1), pl.program_id(0)
    first_of_block = block * rows
    row = first_of_block + lax.broadcasted_iota(jnp.int32, (rows,), 0)

    def read_queries(ref, size: int) -> jax.Array:
        across = lax.broadcasted_iota(jnp.int32, (1, size), 1)
        at = before + row[:, None]
        return plgpu.load(ref.at[at, head, across], mask=at < ref.shape[0], other=0)

    rope = q_rope_ref.shape[-1]
    q_nope, q_rope = read_queries(q_nope_ref, nope), read_queries(q_rope_ref, rope)
    rope_key = pl.ds(entries_ref.shape[1] - rope, rope)

    def one_chunk(c, so_far):
        first_row, first_key, num_keys = first_row_ref[c], first_key_ref[c], num_keys_ref[c]
        end = first_row + num_rows_ref[c]
        mine = (row >= first_row) & (row < end)
        # Keys from `stop` on are seen by nobody; those before `full` by all, if all are of this
        # chunk.
        stop, full = num_keys, num_keys
        if causal:
            stop = jnp.minimum(num_keys, first_of_block + rows - first_row)
            full = first_of_block - first_row
        all_mine = (first_row <= first_of_block) & (first_of_block + rows <= end)
        full = jnp.where(all_mine, full // keys, 0)

        def one_block(j, so_far):
            key = j * keys + lax.broadcasted_iota(jnp.int32, (keys,), 0)
            live = (key < stop)[:, None]
            at = pl.ds(first_key + j * keys, keys)

            def read(ref):
                return plgpu.load(ref, mask=live, other=0)

            scores = dot(q_nope, read(k_nope_ref.at[at, head]), transposed=True)
            scores += dot(q_rope, read(entries_ref.at[at, rope_key]), transposed=True)
            seen = mine[:, None] & (key < stop)[None]
            if causal:
                seen &= key[None] <= (row - first_row)[:, None]
            return Softmax(*so_far).add(scores, factor, read(value_ref.at[at, head]), seen)

        def one_full_block(j, so_far):
            at = pl.ds(first_key + j * keys, keys)
            scores = dot(q_nope, k_nope_ref[at, head], transposed=True)
            scores += dot(q_rope, entries_ref[at, rope_key], transposed=True)
            return Softmax(*so_far).add(scores, factor, value_ref[at, head])

        so_far = lax.fori_loop(0, full, one_full_block, so_far)
        return lax.fori_loop(full, (stop + keys - 1) // keys, one_block, so_far)

    start = Softmax.empty(rows, value_ref.shape[-1])
    if starts:
        seen_so_far, log_sum = refs[0][...], refs[1][...]
        start = Softmax(seen_so_far, log_sum, jnp.where(log_sum > MASKED, 1.0, 0.0))
    result = Softmax(
        *lax.fori_loop(blocks_ref[block, 0], blocks_ref[block, 1] + 1, one_chunk, start)
    )
    if not causal:
        refs[-2][...] = result.normalised()
        refs[-1][...] = result.log_sum()
        return
    out_ref = refs[-1]
    at = before + row[:, None], head, lax.broadcasted_iota(jnp.int32, (1, out_ref.shape[-1]), 1)
    out = result.normalised().astype(out_ref.dtype)
    plgpu.store(out_ref.at[at], out, mask=at[0] < out_ref.shape[0])


def attend(
    q_nope: jax.Array,
    q_rope: jax.Array,
    sources: Sequence[Source],
    start: State | None,
    *,
    m: int,
    scale: float,
    interpret: bool,
) -> State | jax.Array:
    """The last m rows of [n, H, nope or more] and [n, H, R] against keys of one or two sources.

    `start` is what they have seen before; None: nothing. If the last source is causal the result
    is [n, H, V], in which other rows are undefined; else the state, with a few rows more than m to
    make whole blocks.
    """
    result = start
    for source in sources:
        result = _attend(q_nope, q_rope, source, result, m=m, scale=scale, interpret=interpret)
    return result


@lowered_once("m", "scale", "interpret")
def _attend(
    q_nope: jax.Array,
    q_rope: jax.Array,
    source: Source,
    start: State | None,
    *,
    m: int,
    scale: float,
    interpret: bool,
) -> State | jax.Array:
    """`attend` with one source."""
    expanded, chunks, causal = source.expanded, source.chunks, source.causal
    heads, value = q_nope.shape[1], expanded.values.shape[-1]
    rows = covering_block(m, ROWS)
    blocks = -(-m // rows)

    def of_rows(*width: int) -> pl.BlockSpec:
        zeros = (0,) * len(width)
        return pl.BlockSpec((rows, None, *width), lambda h, i: (blocks - 1 - i, h, *zeros))

    operands = (*expanded, chunks_of_blocks(chunks.first_row, blocks, rows), *chunks)
    state_specs = [of_rows(value), of_rows()]
    if causal:
        out_shape = [((*q_nope.shape[:2], value), q_nope.dtype)]
        out_specs = [whole(out_shape[0][0])]
    else:
        out_specs = state_specs
        out_shape = [((blocks * rows, heads, *width), jnp.float32) for width in ((value,), ())]
    operands = (q_nope, q_rope, *operands)
    state = start or ()
    out = pl.pallas_call(
        functools.partial(
            _kernel,
            before=len(q_nope) - m,
            rows=rows,
            keys=min(KEYS, rows),
            nope=expanded.k_nope.shape[-1],
            scale=scale,
            causal=causal,
            starts=bool(state),
        ),
        grid=(heads, blocks),
        in_specs=[*(whole(a.shape) for a in operands), *state_specs[: len(state)]],
        out_specs=out_specs,
        out_shape=[jax.ShapeDtypeStruct(*shape) for shape in out_shape],
        input_output_aliases={len(operands) + i: i for i in range(0 if causal else len(state))},
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
        name="mla_causal" if causal else "mla_prefix",
    )(*operands, *state)
    return out[0] if causal else tuple(out)


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
    kernel: Attend = attend,
    interpret: bool = False,
) -> jax.Array:
    """See `model.ops.mla_attention.extend_attention`; `found` says what is known of the prefixes.

    How many pieces they have must else be asked, which the host does, layer by layer. `kernel` is
    `attend` of this module or another.
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
    branches = [lambda: met([piece(0), new], None), several]
    if found == "perhaps":
        branches.insert(0, lambda: met([new], None))
    return lax.switch(pieces - 3 + len(branches), branches)  # which bounds the number

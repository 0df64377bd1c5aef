"""The kernel of extend attention for all GPUs, in Pallas (Triton)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from model.ops.kernels import MIN_BLOCK, covering_block, is_power_of_two, lowered_once, whole
from model.ops.mla_attention.extend import Source, State, chunks_of_blocks
from model.ops.mla_attention.pages import LOG2_E, MASKED, Softmax, dot
from model.ops.mla_attention.pages import unsupported as latents_unsupported

ROWS, KEYS, WARPS, STAGES = 128, 64, 8, 3
"""Rows and keys of one block; how a program computes them."""


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
    """See `extend.Attend`."""
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

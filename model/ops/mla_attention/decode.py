"""Decode attention in Pallas (Triton): absorbed MQA over the paged latents, split over the context.

A program takes one sequence, a block of its heads and a part of its tokens; parts are cut by each
sequence's own length, so ragged batches keep all programs busy. Latents are read once for scores
and sums. A second, small step merges the parts.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from model.ops.kernels import MIN_BLOCK, covering_block, largest_block, lowered_once
from model.ops.mla_attention.pages import LOG2_E, Softmax, dot, read_tokens, whole_blocks

PROGRAMS = 132
"""The multiprocessors of an H100: more parts of a context cost more in merging than they gain."""
BLOCK = 64
"""Tokens read at a time."""
MAX_SPLITS = 32
MAX_HEADS, MAX_HEADS_WIDE = 32, 64
"""Heads of one program; the second number where queries and latents are bfloat16. Its float32 sums
[heads, C] stay in registers, most of them: the latents are read once for all its heads."""


def num_splits(programs: int) -> int:
    """Into how many parts a context is cut if that many programs would work on one part each."""
    splits = 1
    while splits < MAX_SPLITS and 2 * splits * programs <= PROGRAMS:
        splits *= 2
    return splits


def _stages(heads: int, programs: int, kv_itemsize: int) -> int:
    """How far the reading of a program of so many heads runs ahead of its computing.

    Page ids are read before latents: up to four stages, one block of these is read and used in
    turn, which costs a third of the bandwidth; with five, the next one is on its way meanwhile.
    """
    if heads > MAX_HEADS:  # products of 64 rows take the block from memory and need two of them
        return 3
    if programs > PROGRAMS:  # several on a multiprocessor read beside each other
        return 2
    return 5 if kv_itemsize > 1 else 3  # float8 lies in memory converted, too: no room for more


def _kernel(
    q_latent_ref,
    q_rope_ref,
    kv_ref,
    table_ref,
    length_ref,
    layer_ref,
    out_ref,
    *part_refs,
    block: int,
    splits: int,
    scale: float,
):
    """One part of one sequence: normalised if it is the only one, else with maximum and total."""
    q_latent, q_rope, layer = q_latent_ref[...], q_rope_ref[...], layer_ref[0]
    heads, latent = q_latent.shape
    length = length_ref[0]
    blocks = (length + block - 1) // block
    share = (blocks + splits - 1) // splits
    first = pl.program_id(2) * share
    last = jnp.minimum(blocks, first + share)

    def body(i, so_far):
        tokens = i * block + lax.broadcasted_iota(jnp.int32, (block,), 0)
        live = tokens < length
        c, rope = read_tokens(
            kv_ref, table_ref, layer, tokens, live, latent=latent, dtype=q_latent.dtype
        )
        scores = dot(q_latent, c, transposed=True) + dot(q_rope, rope, transposed=True)
        return Softmax(*so_far).add(scores, scale * LOG2_E, c, live[None])

    result = Softmax(*lax.fori_loop(first, last, body, Softmax.empty(heads, latent)))
    if splits == 1:
        out_ref[...] = result.normalised().astype(out_ref.dtype)
        return
    maximum_ref, total_ref = part_refs
    out_ref[...] = result.out
    maximum_ref[...] = result.maximum
    total_ref[...] = result.total


def _merge_kernel(parts_ref, maximum_ref, total_ref, out_ref):
    """Some numbers of a head: their parts [P, n], each part's maximum and total [P]."""
    maximum, total = maximum_ref[...], total_ref[...]
    decay = jnp.exp2(maximum - jnp.max(maximum))
    total = jnp.sum(decay * total)
    weight = decay / jnp.where(total > 0, total, 1.0)
    out_ref[...] = jnp.sum(parts_ref[...] * weight[:, None], axis=0).astype(out_ref.dtype)


def _merged(
    parts: jax.Array,
    maximum: jax.Array,
    total: jax.Array,
    dtype: jax.typing.DTypeLike,
    *,
    interpret: bool,
) -> jax.Array:
    """[B, H, C] of f32 parts [P, B, H, C], not normalised, their maxima (base 2) and totals."""
    p, b, heads, latent = parts.shape
    rows = b * heads
    columns = latent if rows >= PROGRAMS else largest_block(latent, 128)
    of_head = pl.BlockSpec((p, None), lambda i, j: (0, i))
    out = pl.pallas_call(
        _merge_kernel,
        grid=(rows, latent // columns),
        in_specs=[pl.BlockSpec((p, None, columns), lambda i, j: (0, i, j)), of_head, of_head],
        out_specs=pl.BlockSpec((None, columns), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((rows, latent), dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="mla_merge",
    )(parts.reshape(p, rows, latent), maximum.reshape(p, rows), total.reshape(p, rows))
    return out.reshape(b, heads, latent)


@lowered_once("scale", "interpret", "splits")
def decode_attention(
    q_latent: jax.Array,
    q_rope: jax.Array,
    kv: jax.Array,
    layer: jax.Array,
    tables: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    interpret: bool = False,
    splits: int | None = None,
) -> jax.Array:
    """See `model.ops.mla_attention.decode_attention`; `splits` parts of a context, for tests."""
    b, given_heads, latent = q_latent.shape
    wide = q_latent.dtype.itemsize == 2 and kv.dtype.itemsize == 2
    heads = covering_block(given_heads, MAX_HEADS_WIDE if wide else MAX_HEADS)
    q_latent, q_rope = whole_blocks(q_latent, q_rope, heads=heads)
    head_blocks = q_latent.shape[1] // heads
    splits = splits or num_splits(b * head_blocks)
    stages = _stages(heads, b * head_blocks * splits, kv.dtype.itemsize)
    block = BLOCK if q_latent.dtype.itemsize == 2 else MIN_BLOCK

    def of_sequence(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, heads, width), lambda i, h, s: (i, h, 0))

    if splits == 1:
        out_specs: list[pl.BlockSpec] = [of_sequence(latent)]
        out_shape = [jax.ShapeDtypeStruct(q_latent.shape, q_latent.dtype)]
    else:
        rows = pl.BlockSpec((None, None, heads), lambda i, h, s: (s, i, h))
        out_specs = [
            pl.BlockSpec((None, None, heads, latent), lambda i, h, s: (s, i, h, 0)),
            rows,
            rows,
        ]
        part = (splits, *q_latent.shape[:2])
        out_shape = [
            jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((*part, latent), part, part)
        ]
    out = pl.pallas_call(
        functools.partial(_kernel, block=block, splits=splits, scale=scale),
        grid=(b, head_blocks, splits),
        in_specs=[
            of_sequence(latent),
            of_sequence(q_rope.shape[-1]),
            pl.BlockSpec(kv.shape, lambda i, h, s: (0, 0, 0, 0)),
            pl.BlockSpec((None, tables.shape[1]), lambda i, h, s: (i, 0)),
            pl.BlockSpec((1,), lambda i, h, s: (i,)),
            pl.BlockSpec((1,), lambda i, h, s: (0,)),
        ],
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=stages),
        interpret=interpret,
        name="mla_decode",
    )(q_latent, q_rope, kv, tables, lengths, jnp.reshape(layer, (1,)).astype(jnp.int32))
    merged = out[0] if splits == 1 else _merged(*out, q_latent.dtype, interpret=interpret)
    return merged[:, :given_heads]

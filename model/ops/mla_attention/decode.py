"""Decode attention in Pallas (Triton): absorbed MQA over the paged latents, split over the context.

A program takes one sequence, a block of its heads and a part of its tokens; parts are cut by each
sequence's own length, so ragged batches keep all programs busy. Latents are read once for scores
and sums. A second, small step merges the parts.
"""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from model.ops.mla_attention.heads import part_weights
from model.ops.mla_attention.pages import LOG2_E, MIN_BLOCK, Softmax, dot, read_tokens

PROGRAMS = 132
"""The multiprocessors of an H100: more parts of a context cost more in merging than they gain."""
BLOCK = 64
"""Tokens read at a time."""
MAX_SPLITS = 32
MAX_HEADS = 32
"""Heads of one program: its float32 sums [heads, C] stay in registers."""


def num_splits(programs: int) -> int:
    """Into how many parts a context is cut if that many programs would work on one part each."""
    splits = 1
    while splits < MAX_SPLITS and 2 * splits * programs <= PROGRAMS:
        splits *= 2
    return splits


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
    out, parts = decode_parts(
        *(q_latent, q_rope, kv, layer, tables, lengths),
        scale=scale,
        interpret=interpret,
        splits=splits,
    )
    return out if parts is None else merged(out, parts).astype(q_latent.dtype)


def merged(out: jax.Array, parts: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The result of `decode_parts` in one, f32 [B, H, C]."""
    weights = part_weights(list(zip(*parts, strict=True)))
    return functools.reduce(
        operator.add, (part * w[..., None] for part, w in zip(out, weights, strict=True))
    )


def decode_parts(
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
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """The attention in parts of the context, yet to be merged.

    Returns:
        f32 [P, B, H, C], not normalised, and the parts' maxima (base 2) and totals, f32 [P, B, H]
        each; or the result itself and None, if the context is not cut.
    """
    b, given_heads, latent = q_latent.shape
    heads = MIN_BLOCK
    while heads < given_heads and heads < MAX_HEADS:
        heads *= 2
    padding = ((0, 0), (0, -given_heads % heads), (0, 0))
    q_latent, q_rope = jnp.pad(q_latent, padding), jnp.pad(q_rope, padding)
    head_blocks = q_latent.shape[1] // heads
    splits = splits or num_splits(b * head_blocks)
    block = BLOCK if q_latent.dtype.itemsize == 2 else MIN_BLOCK
    # Where there are programs enough, two on a multiprocessor beat one that reads further ahead.
    stages = 3 if b * head_blocks * splits <= PROGRAMS else 2

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
    parts = pl.pallas_call(
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
    if splits == 1:
        return parts[0][:, :given_heads], None
    out, maximum, total = (part[:, :, :given_heads] for part in parts)
    return out, (maximum, total)

"""Attention over the paged latent cache: `xla` defines it, the other modules are for GPUs.

`decode_attention` is the absorbed form (one query per sequence against the latents, MQA),
`extend_attention` the naive form (keys and values expanded from the latents, MHA) for the new
tokens of prompt chunks.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from model.batch import Prefixes
from model.ops.dense import StackedWeight
from model.ops.kernels import XLA, Kernels
from model.ops.mla_attention import decode, extend, heads, hopper, hopper_decode, triton, xla
from model.quantization import BlockFP8


def plan_decode(
    tables: jax.Array,
    lengths: jax.Array,
    heads: int,
    page_size: int,
    kernels: Kernels,
) -> hopper_decode.Work | None:
    """What decode attention finds out once for all layers, if its kernel needs anything.

    Args: heads: of this device; the others: see `decode_attention`.
    """
    many = len(lengths) * heads >= hopper_decode.LEAST_ROWS
    if not many or kernels.decode_attention != "hopper":
        return None
    return hopper_decode.shared_out(tables, lengths, page_size, hopper_decode.num_workers(heads))


def decode_attention(
    q_latent: jax.Array,
    q_rope: jax.Array,
    kv: jax.Array,
    layer: jax.Array,
    tables: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    plan: hopper_decode.Work | None = None,
    kernels: Kernels = XLA,
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
        plan: from `plan_decode`; made here if a kernel needs it and it is not given.
        kernels: which implementation.

    Returns:
        [B, H, C]: sums of latents, to be multiplied by W_UV; 0 for padding.
    """
    if kernels.decode_attention == "xla":
        return xla.decode_attention(q_latent, q_rope, kv, layer, tables, lengths, scale=scale)
    if plan is None:
        plan = plan_decode(tables, lengths, q_latent.shape[1], kv.shape[2], kernels)
    if plan is not None:
        return hopper_decode.decode_attention(
            q_latent, q_rope, kv, layer, plan, scale=scale, interpret=kernels.interpret
        )
    return decode.decode_attention(
        q_latent, q_rope, kv, layer, tables, lengths, scale=scale, interpret=kernels.interpret
    )


def decode_heads(
    q_nope: jax.Array,
    q_rope: jax.Array,
    w_uk: Any,
    w_uv: Any,
    kv: jax.Array,
    layer: jax.Array,
    tables: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    plan: hopper_decode.Work | None = None,
    kernels: Kernels = XLA,
) -> jax.Array:
    """Decode attention between the heads' own matrices: [B, H, nope] -> [B, H, V].

    Args:
        q_nope: [B, H, nope or more], the first nope numbers count; q_rope: [B, H, R], rotated.
        w_uk: [H, nope, C]; w_uv: [H, C, V], as arrays or what stands for them.
        kv, layer, tables, lengths, scale, plan, kernels: see `decode_attention`.
    """
    attend = functools.partial(decode_attention, scale=scale, plan=plan, kernels=kernels)
    if (
        kernels.decode_attention != "xla"
        and isinstance(w_uk, StackedWeight)
        and isinstance(w_uv, StackedWeight)
        and not isinstance(w_uk.stack, BlockFP8)
        and not isinstance(w_uv.stack, BlockFP8)
    ):
        product = functools.partial(heads.per_head, interpret=kernels.interpret)
        q_latent = product(q_nope, w_uk.stack, w_uk.layer)
        out = attend(q_latent, q_rope, kv, layer, tables, lengths)
        return product(out, w_uv.stack, w_uv.layer)
    w_uk = w_uk[...]
    q_latent = jnp.einsum("bhn,hnc->bhc", q_nope[..., : w_uk.shape[1]], w_uk)
    out = attend(q_latent, q_rope, kv, layer, tables, lengths)
    return jnp.einsum("bhc,hcv->bhv", out, w_uv[...])


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
    chunk_start: jax.Array,
    prefixes: Prefixes,
    *,
    rows: slice,
    num_rows: int,
    scale: float,
    kernels: Kernels = XLA,
) -> jax.Array:
    """Prefill rows against their own sequences: the cached prefix and the chunk up to the row.

    Args:
        q_nope: [n, H, nope or more], the first nope numbers count; q_rope: [n, H, R], rotated.
        w_uk: [H, nope, C]; w_uv: [H, C, V], the two halves of kv_b_proj.
        entries: [T, C + R], all rows' own entries, which are in the pool too; finite. The prefill
            rows' are the last M = `num_rows`.
        kv: [L, N, S, C + R]; layer: i32 scalar; tables: i32 [chunks, P].
        chunk_first_row, chunk_rows, chunk_start: i32 [chunks], see `ForwardBatch`.
        prefixes: see `model.batch.find_prefixes`.
        rows: which of the M prefill rows the last of the n queries are. Static.
        scale: softmax scale.
        kernels: which implementation.

    Returns:
        [n, H, V]; 0 for padding rows, undefined for rows that are not prefill rows.
    """
    chunks = (tables, chunk_first_row, chunk_rows)
    if kernels.extend_attention == "xla":
        before = len(q_nope) - (rows.stop - rows.start)
        q_nope, q_rope = q_nope[before:, :, : w_uk.shape[1]], q_rope[before:]
        out = xla.extend_attention(
            *(q_nope, q_rope, w_uk, w_uv, kv, layer, *chunks, chunk_start),
            first_row=rows.start,
            scale=scale,
        )
        return jnp.pad(out, ((before, 0), (0, 0), (0, 0)))
    on_hopper = kernels.extend_attention == "hopper"
    on_hopper &= rows.stop - rows.start >= hopper.LEAST_ROWS
    return extend.extend_attention(
        *(q_nope, q_rope, w_uk, w_uv, entries, kv, layer, *chunks),
        prefixes,
        kernels.prefixes,
        rows=rows,
        num_rows=num_rows,
        scale=scale,
        kernel=hopper.attend if on_hopper else triton.attend,
        interpret=kernels.interpret,
    )

"""What MLA does between its projections and attention, in one Pallas (Triton) kernel.

Queries are put together and their rope half is rotated; a token's entry is put together, its latent
is normalised, its rope key rotated, and the entry is written into the pool where it lies. The
definition is `model.mla.MLAttention.queries` and `latents`, which a pool written by XLA gets.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from model.ops.kernels import lowered_once, whole
from model.quantization import saturating_cast

HEADS = 16
"""Heads of a program at most."""


def _sum(ref, at: tuple[jax.Array, ...], mask: jax.Array | None, dtype) -> jax.Array:
    """The parts of a product [P, ...] at a place, added in order, rounded to dtype, in float32."""
    total = None
    for p in range(ref.shape[0]):
        part = plgpu.load(ref.at[(jnp.int32(p), *at)], mask=mask, other=None if mask is None else 0)
        total = part if total is None else total + part
    return total.astype(dtype).astype(jnp.float32)


def _kernel(
    q_ref,
    entry_ref,
    norm_ref,
    norm_layer_ref,
    cos_ref,
    sin_ref,
    layer_ref,
    pages_ref,
    offsets_ref,
    _kv_ref,
    *refs,
    unread: int,
    heads: int,
    nope: int,
    interleaved: bool,
    eps: float,
):
    """A row's entry (program 0 of the row), or the queries of some of its heads."""
    kv_ref, entries_ref, q_rope_ref, *q_nope_refs = refs[unread:]
    dtype, half = entries_ref.dtype, cos_ref.shape[1]
    row, block = pl.program_id(0), pl.program_id(1) - 1
    pair = lax.broadcasted_iota(jnp.int32, (half,), 0)
    cos, sin = cos_ref[row, :], sin_ref[row, :]

    def places(first: int) -> tuple[jax.Array, jax.Array]:
        """The two numbers of every pair."""
        if interleaved:
            return first + 2 * pair, first + 2 * pair + 1
        return first + pair, first + half + pair

    def rotated(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (a * cos - b * sin).astype(dtype), (a * sin + b * cos).astype(dtype)

    @pl.when(block < 0)
    def _() -> None:
        rank = norm_ref.shape[1]
        across = lax.broadcasted_iota(jnp.int32, (rank,), 0)
        latent = _sum(entry_ref, (row, across), None, dtype)
        latent *= lax.rsqrt(jnp.sum(latent * latent) / rank + eps)
        weight = norm_ref[norm_layer_ref[0], :]
        latent = latent.astype(dtype).astype(jnp.float32) * weight.astype(jnp.float32)
        rope = rotated(*(_sum(entry_ref, (row, at), None, dtype) for at in places(rank)))
        layer, page, offset = layer_ref[0], pages_ref[row], offsets_ref[row]
        parts = (
            (across, latent.astype(dtype)),
            (rank + pair, rope[0]),
            (rank + half + pair, rope[1]),
        )
        for at, part in parts:
            part = saturating_cast(part, kv_ref.dtype)
            plgpu.store(kv_ref.at[layer, page, offset, at], part)
            plgpu.store(entries_ref.at[row, at], part.astype(dtype))

    @pl.when(block >= 0)
    def _() -> None:
        head = block * heads + lax.broadcasted_iota(jnp.int32, (heads, 1), 0)
        live = head < q_rope_ref.shape[1]
        if q_nope_refs:
            across = lax.broadcasted_iota(jnp.int32, (1, nope), 1)
            total = _sum(q_ref, (row, head, across), live, dtype)
            plgpu.store(q_nope_refs[0].at[row, head, across], total.astype(dtype), mask=live)
        first, second = rotated(
            *(_sum(q_ref, (row, head, at[None]), live, dtype) for at in places(nope))
        )
        plgpu.store(q_rope_ref.at[row, head, pair[None]], first, mask=live)
        plgpu.store(q_rope_ref.at[row, head, half + pair[None]], second, mask=live)


@lowered_once("dtype", "nope", "interleaved", "eps", "interpret")
def finish_inputs(
    q: jax.Array,
    entry: jax.Array,
    norm: jax.Array,
    norm_layer: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    kv: jax.Array,
    layer: jax.Array,
    pages: jax.Array,
    offsets: jax.Array,
    dtype: jax.typing.DTypeLike,
    *,
    after: Sequence[jax.Array] = (),
    nope: int,
    interleaved: bool,
    eps: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Queries and the pool from the parts of two products (see `model.ops.dense.matmul_parts`).

    Args:
        q: [P, T, H, nope + R]; entry: [P', T, C + R], before norm and rotation.
        norm: [L', C], weights of which `norm_layer` i32 counts; eps of the norm.
        cos, sin: f32 [T, R / 2].
        kv: [L, N, S, C + R], the pool; layer: i32; pages, offsets: i32 [T], the rows' places.
        dtype: of activations.
        after: arrays that must be there before the pool is written.

    Returns:
        the queries [T, H, nope or more], whose first `nope` numbers count; rotated [T, H, R]; the
        entries as cached [T, C + R], in dtype; the pool.
    """
    parts, t, num_heads, _ = q.shape
    rope = 2 * cos.shape[1]
    heads = 1
    while heads < min(num_heads, HEADS):
        heads *= 2

    def scalar(number: jax.Array) -> jax.Array:
        return jnp.reshape(number, (1,)).astype(jnp.int32)

    operands = (
        *(q, entry, norm, scalar(norm_layer), cos, sin),
        *(scalar(layer), pages, offsets, kv, *after),
    )
    out_shape = [
        jax.ShapeDtypeStruct(kv.shape, kv.dtype),
        jax.ShapeDtypeStruct(entry.shape[1:], dtype),
        jax.ShapeDtypeStruct((t, num_heads, rope), dtype),
    ]
    if parts > 1:
        out_shape.append(jax.ShapeDtypeStruct((t, num_heads, nope), dtype))

    kv, entries, q_rope, *q_nope = pl.pallas_call(
        functools.partial(
            _kernel,
            unread=len(after),
            heads=heads,
            nope=nope,
            interleaved=interleaved,
            eps=eps,
        ),
        grid=(t, 1 + -(-num_heads // heads)),
        in_specs=[whole(a.shape) for a in operands],
        out_specs=[whole(a.shape) for a in out_shape],
        out_shape=out_shape,
        input_output_aliases={len(operands) - len(after) - 1: 0},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="mla_inputs",
    )(*operands)
    return q_nope[0] if q_nope else q[0], q_rope, entries, kv

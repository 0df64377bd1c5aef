"""Products of every head with its own matrix, in Pallas (Triton): absorbing W_UK, applying W_UV.

Both take a layer out of the weights' stack themselves. The second also merges the parts into which
decode attention cuts a context.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from model.ops.kernels import largest_block, whole
from model.ops.mla_attention.pages import MIN_BLOCK

COLUMNS, DEPTH, WARPS = 64, 64, 4
"""Of a block at most."""
MAX_PARTS = 4
"""More parts of an attention do not fit the multiprocessor's memory at once."""


def _kernel(x_ref, w_ref, layer_ref, *refs, rows: int, columns: int, depth: int):
    """A block of rows and columns of one head.

    `refs`: the maxima and totals of the parts, if there are parts; the output.
    """
    out_ref = refs[-1]
    layer, head, first = layer_ref[0], pl.program_id(1), pl.program_id(0) * columns
    row = pl.program_id(2) * rows + lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    live = row < out_ref.shape[0]
    parts = range(x_ref.shape[0]) if len(refs) > 1 else ()
    weights = part_weights(
        [
            tuple(
                plgpu.load(ref.at[jnp.int32(p), row, head], mask=live, other=0) for ref in refs[:-1]
            )
            for p in parts
        ]
    )

    def body(i, total):
        at = i * depth + lax.broadcasted_iota(jnp.int32, (1, depth), 1)
        if len(refs) == 1:
            x = plgpu.load(x_ref.at[row, head, at], mask=live, other=0)
        else:
            x = jnp.zeros((rows, depth), jnp.float32)
            for p in parts:
                part = plgpu.load(x_ref.at[jnp.int32(p), row, head, at], mask=live, other=0)
                x += part * weights[p]
        w = w_ref[layer, head, pl.ds(i * depth, depth), pl.ds(first, columns)]
        return total + jnp.dot(x.astype(w.dtype), w, preferred_element_type=jnp.float32)

    zero = jnp.zeros((rows, columns), jnp.float32)
    total = lax.fori_loop(0, w_ref.shape[2] // depth, body, zero)
    at = first + lax.broadcasted_iota(jnp.int32, (1, columns), 1)
    plgpu.store(out_ref.at[row, head, at], total.astype(out_ref.dtype), mask=live)


def part_weights(parts: Sequence[tuple[jax.Array, jax.Array]]) -> list[jax.Array]:
    """What the parts of a softmax count, from each part's maximum (base 2) and total."""
    if not parts:
        return []
    maximum = functools.reduce(jnp.maximum, (maximum for maximum, _ in parts))
    decays = [jnp.exp2(part - maximum) for part, _ in parts]
    total = functools.reduce(operator.add, (d * t for d, (_, t) in zip(decays, parts, strict=True)))
    total = jnp.where(total > 0, total, 1.0)
    return [decay / total for decay in decays]


def per_head(
    x: jax.Array,
    stack: jax.Array,
    layer: jax.Array,
    parts: tuple[jax.Array, jax.Array] | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """x [B, H, K or more] times stack[layer] of [L, H, K, N]: [B, H, N] in the stack's dtype.

    Only the first K numbers of x count. With `parts`, the maxima and totals f32 [P, B, H] of the
    parts of a softmax, x is f32 [P, B, H, K] and the product is that of the merged parts.
    """
    b, heads = x.shape[-3:-1]
    k, n = stack.shape[-2:]
    rows = MIN_BLOCK
    while rows < min(b, 64):
        rows *= 2
    if parts is not None:  # all parts of a block are summed in registers
        rows = min(rows, 32)
    columns, depth = largest_block(n, COLUMNS), largest_block(k, DEPTH)
    operands = [x, stack, jnp.reshape(layer, (1,)).astype(jnp.int32)]
    operands += parts or ()

    return pl.pallas_call(
        functools.partial(_kernel, rows=rows, columns=columns, depth=depth),
        grid=(n // columns, heads, -(-b // rows)),
        in_specs=[whole(a.shape) for a in operands],
        out_specs=whole((b, heads, n)),
        out_shape=jax.ShapeDtypeStruct((b, heads, n), stack.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=3),
        interpret=interpret,
        name="per_head",
    )(*operands)

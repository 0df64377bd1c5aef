"""Products of every head with its own matrix, in Pallas (Triton): absorbing W_UK, applying W_UV.

Both take a layer out of the weights' stack themselves.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from model.ops.kernels import covering_block, largest_block, lowered_once, whole

BLOCK = 64 * 64
"""Weights of a block at most: narrow and deep ones where there is more to add than to give."""


def _kernel(x_ref, w_ref, layer_ref, out_ref, *, rows: int, columns: int, depth: int):
    """A block of rows and columns of one head."""
    layer, head, first = layer_ref[0], pl.program_id(1), pl.program_id(0) * columns
    row = pl.program_id(2) * rows + lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    live = row < out_ref.shape[0]

    def body(i, total):
        at = i * depth + lax.broadcasted_iota(jnp.int32, (1, depth), 1)
        x = plgpu.load(x_ref.at[row, head, at], mask=live, other=0)
        w = w_ref[layer, head, pl.ds(i * depth, depth), pl.ds(first, columns)]
        return total + jnp.dot(x.astype(w.dtype), w, preferred_element_type=jnp.float32)

    zero = jnp.zeros((rows, columns), jnp.float32)
    total = lax.fori_loop(0, w_ref.shape[2] // depth, body, zero)
    at = first + lax.broadcasted_iota(jnp.int32, (1, columns), 1)
    plgpu.store(out_ref.at[row, head, at], total.astype(out_ref.dtype), mask=live)


@lowered_once("interpret")
def per_head(
    x: jax.Array, stack: jax.Array, layer: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """x [B, H, K or more] times stack[layer] of [L, H, K, N]: [B, H, N] in the stack's dtype.

    Only the first K numbers of x count.
    """
    b, heads = x.shape[:2]
    k, n = stack.shape[-2:]
    rows = covering_block(b, 64)
    depth = largest_block(k, 128 if k > n else 64)
    columns = largest_block(n, BLOCK // depth)
    operands = (x, stack, jnp.reshape(layer, (1,)).astype(jnp.int32))

    return pl.pallas_call(
        functools.partial(_kernel, rows=rows, columns=columns, depth=depth),
        grid=(n // columns, heads, -(-b // rows)),
        in_specs=[whole(a.shape) for a in operands],
        out_specs=whole((b, heads, n)),
        out_shape=jax.ShapeDtypeStruct((b, heads, n), stack.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="per_head",
    )(*operands)

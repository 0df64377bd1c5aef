"""Products of every head with its own matrix, in Pallas (Triton): absorbing W_UK, applying W_UV.

Both take a layer out of the weights' stack themselves. The second also merges the parts into which
decode attention cuts a context.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from model.ops.kernels import largest_block
from model.ops.mla_attention.pages import MIN_BLOCK


def _kernel(x_ref, w_ref, layer_ref, *refs, depth: int):
    """A block of rows and columns of one head. `refs`: the parts' weights, if any; the output."""
    out_ref = refs[-1]
    layer, head, columns = layer_ref[0], pl.program_id(1), out_ref.shape[1]
    column = pl.ds(pl.program_id(0) * columns, columns)

    def body(i, total):
        at = pl.ds(i * depth, depth)
        if len(refs) == 1:
            x = x_ref[:, at]
        else:
            x = jnp.zeros((out_ref.shape[0], depth), jnp.float32)
            for part in range(x_ref.shape[0]):
                x += x_ref[part, :, at] * refs[0][part][:, None]
        w = w_ref[layer, head, at, column]
        return total + jnp.dot(x.astype(w.dtype), w, preferred_element_type=jnp.float32)

    zero = jnp.zeros(out_ref.shape, jnp.float32)
    out_ref[...] = lax.fori_loop(0, x_ref.shape[-1] // depth, body, zero).astype(out_ref.dtype)


def per_head(
    x: jax.Array,
    stack: jax.Array,
    layer: jax.Array,
    part_weights: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """x [B, H, K] times stack[layer] of [L, H, K, N]: [B, H, N] in the stack's dtype.

    With `part_weights`, f32 [P, B, H], x is f32 [P, B, H, K] and the product is that of the parts'
    weighted sum.
    """
    b, heads, k = x.shape[-3:]
    n = stack.shape[-1]
    rows = MIN_BLOCK
    while rows < min(b, 64):
        rows *= 2
    if part_weights is not None:  # all parts of a block are summed in registers
        rows = min(rows, 32)
    padding = -b % rows
    if padding:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(0, padding), (0, 0), (0, 0)])
    columns, depth = largest_block(n, 64), largest_block(k, 64)
    lead = x.shape[:-3]
    in_specs = [
        pl.BlockSpec((*lead, rows, None, k), lambda j, h, i: (*(0,) * len(lead), i, h, 0)),
        pl.BlockSpec(stack.shape, lambda j, h, i: (0, 0, 0, 0)),
        pl.BlockSpec((1,), lambda j, h, i: (0,)),
    ]
    operands = [x, stack, jnp.reshape(layer, (1,)).astype(jnp.int32)]
    if part_weights is not None:
        operands.append(jnp.pad(part_weights, ((0, 0), (0, padding), (0, 0))))
        in_specs.append(pl.BlockSpec((*lead, rows, None), lambda j, h, i: (0, i, h)))
    return pl.pallas_call(
        functools.partial(_kernel, depth=depth),
        grid=(n // columns, heads, x.shape[-3] // rows),
        in_specs=in_specs,
        out_specs=pl.BlockSpec((rows, None, columns), lambda j, h, i: (i, h, j)),
        out_shape=jax.ShapeDtypeStruct((x.shape[-3], heads, n), stack.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="per_head",
    )(*operands)[:b]

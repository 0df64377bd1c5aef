"""RMSNorm by a layer's weights in their stack, in one Pallas (Triton) kernel.

The definition is `model.layers.rms_norm`, before which XLA copies the weights out of the stack.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from model.ops.kernels import whole

MANY_ROWS, ROWS = 1024, 4
"""From so many rows on, a program takes several."""


def _kernel(x_ref, w_ref, layer_ref, out_ref, *, rows: int, columns: int, eps: float):
    """Some rows, whole."""
    width = x_ref.shape[1]
    row = pl.program_id(0) * rows + lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    at = lax.broadcasted_iota(jnp.int32, (1, columns), 1)
    live, here = row < x_ref.shape[0], at < width
    x = plgpu.load(x_ref.at[row, at], mask=live & here, other=0).astype(jnp.float32)
    normed = x * lax.rsqrt(jnp.sum(x * x, axis=1) / width + eps)[:, None]
    weight = plgpu.load(w_ref.at[layer_ref[0], at], mask=here, other=0).astype(jnp.float32)
    out = normed.astype(out_ref.dtype).astype(jnp.float32) * weight
    plgpu.store(out_ref.at[row, at], out.astype(out_ref.dtype), mask=live & here)


def rms_norm(
    x: jax.Array, stack: jax.Array, layer: jax.Array, eps: float, *, interpret: bool = False
) -> jax.Array:
    """See `model.layers.rms_norm`: x [T, D], the weights stack[layer] of [L, D]."""
    t, width = x.shape
    rows = ROWS if t >= MANY_ROWS else 1
    operands = (x, stack, jnp.reshape(layer, (1,)).astype(jnp.int32))

    return pl.pallas_call(
        functools.partial(_kernel, rows=rows, columns=1 << (width - 1).bit_length(), eps=eps),
        grid=(-(-t // rows),),
        in_specs=[whole(a.shape) for a in operands],
        out_specs=whole(x.shape),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="rms_norm",
    )(*operands)

"""RMSNorm by a layer's weights in their stack, and the residual before it, in one Pallas (Triton)
kernel.

The definitions are `model.layers.rms_norm` and `add_and_norm`, before which XLA copies the weights
out of the stack.
"""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from model.ops.kernels import lowered_once, whole

MANY_ROWS, ROWS = 1024, 4
"""From so many rows on, a program takes several."""


def _kernel(x_ref, w_ref, layer_ref, *refs, rows: int, columns: int, eps: float, scale: float):
    """Some rows, whole. `refs`: the parts that are added first and where the sum goes, if there is
    something to add; where the norm goes."""
    *others, out_ref = refs
    (t, width), dtype = x_ref.shape, out_ref.dtype
    row = pl.program_id(0) * rows + lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    at = lax.broadcasted_iota(jnp.int32, (1, columns), 1)
    live, here = row < t, at < width

    def read(ref, *place) -> jax.Array:
        return plgpu.load(ref.at[(*place, row, at)], mask=live & here, other=0)

    # All that is read is asked for before any of it is needed: a program waits once.
    weight = plgpu.load(w_ref.at[layer_ref[0], at], mask=here, other=0).astype(jnp.float32)
    x = read(x_ref)
    if others:
        parts_ref, sum_ref = others
        parts = [read(parts_ref, jnp.int32(part)) for part in range(parts_ref.shape[0])]
        y = functools.reduce(operator.add, (part.astype(jnp.float32) for part in parts))
        y = y.astype(dtype).astype(jnp.float32)
        if scale != 1:
            y = (y * jnp.asarray(scale, dtype).astype(jnp.float32)).astype(dtype)
        x = (x.astype(jnp.float32) + y.astype(jnp.float32)).astype(dtype)
        plgpu.store(sum_ref.at[row, at], x, mask=live & here)
    x = x.astype(jnp.float32)
    normed = x * lax.rsqrt(jnp.sum(x * x, axis=1) / width + eps)[:, None]
    out = normed.astype(dtype).astype(jnp.float32) * weight
    plgpu.store(out_ref.at[row, at], out.astype(dtype), mask=live & here)


def rms_norm(
    x: jax.Array, stack: jax.Array, layer: jax.Array, eps: float, *, interpret: bool = False
) -> jax.Array:
    """See `model.layers.rms_norm`: x [T, D], the weights stack[layer] of [L, D]."""
    (out,) = _call(x, stack, layer, (), rows=_rows(len(x)), eps=eps, scale=1.0, interpret=interpret)
    return out


def add_and_norm(
    x: jax.Array,
    parts: jax.Array,
    stack: jax.Array,
    layer: jax.Array,
    eps: float,
    *,
    scale: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `model.layers.add_and_norm`: x [T, D], parts [P, T, D], the weights stack[layer]."""
    return _call(
        x, stack, layer, (parts,), rows=_rows(len(x)), eps=eps, scale=scale, interpret=interpret
    )


def _rows(tokens: int) -> int:
    """That a program takes."""
    return ROWS if tokens >= MANY_ROWS else 1


@lowered_once("rows", "eps", "scale", "interpret")
def _call(
    x: jax.Array,
    stack: jax.Array,
    layer: jax.Array,
    parts: tuple[jax.Array, ...],
    *,
    rows: int,
    eps: float,
    scale: float,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    t, width = x.shape
    operands = (x, stack, jnp.reshape(layer, (1,)).astype(jnp.int32), *parts)
    outputs = 1 + len(parts)
    columns = 1 << (width - 1).bit_length()
    return pl.pallas_call(
        functools.partial(_kernel, rows=rows, columns=columns, eps=eps, scale=scale),
        grid=(-(-t // rows),),
        in_specs=[whole(a.shape) for a in operands],
        out_specs=[whole(x.shape)] * outputs,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype)] * outputs,
        # A row and its parts are spread over many warps: each thread has few loads to wait for.
        compiler_params=plgpu.CompilerParams(
            num_warps=16 if parts and rows == 1 else 4, num_stages=1
        ),
        interpret=interpret,
        name="add_and_norm" if parts else "rms_norm",
    )(*operands)

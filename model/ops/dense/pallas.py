"""A few rows times one layer of a weight stack, in Pallas (Triton): no layer is copied out.

The contracted dimension is cut over programs, so that even a narrow matrix keeps all
multiprocessors reading; their float32 parts are added in a fixed order by what consumes them.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from model.ops.kernels import largest_block

MIN_BLOCK = 16
"""Triton multiplies no smaller matrices."""
PROGRAMS = 264
"""Twice the multiprocessors of an H100."""
MAX_PARTS = 8


def unsupported(shape: tuple[int, ...], num_in: int) -> str | None:
    """Why the kernel cannot take a weight of this shape; None if it can."""
    depth, columns = math.prod(shape[:num_in]), math.prod(shape[num_in:])
    if depth % MIN_BLOCK or columns % MIN_BLOCK:
        return f"{depth} and {columns} must be multiples of {MIN_BLOCK}"
    return None


def _kernel(x_ref, w_ref, layer_ref, out_ref, *, depth: int):
    """A block of rows and columns, over this program's part of the contracted dimension."""
    layer, steps = layer_ref[0], x_ref.shape[1] // depth
    first = pl.program_id(1) * x_ref.shape[1]
    columns = out_ref.shape[1]
    column = pl.ds(pl.program_id(0) * columns, columns)

    def body(i, total):
        w = w_ref[layer, pl.ds(first + i * depth, depth), column]
        x = x_ref[:, pl.ds(i * depth, depth)]
        return total + jnp.dot(x, w, preferred_element_type=jnp.float32)

    zero = jnp.zeros(out_ref.shape, jnp.float32)
    out_ref[...] = lax.fori_loop(0, steps, body, zero).astype(out_ref.dtype)


def matmul(
    x: jax.Array, stack: jax.Array, layer: jax.Array, num_in: int, *, interpret: bool = False
) -> jax.Array:
    """See `model.ops.dense.matmul`; stack is [L, in..., out...]."""
    t, out_shape = x.shape[0], stack.shape[1 + num_in :]
    k, n = math.prod(stack.shape[1 : 1 + num_in]), math.prod(out_shape)
    x, stack = x.reshape(t, k), stack.reshape(stack.shape[0], k, n)
    rows = MIN_BLOCK
    while rows < min(t, 64):
        rows *= 2
    x = jnp.pad(x, ((0, -t % rows), (0, 0)))
    row_blocks = x.shape[0] // rows
    narrow = 2 if x.dtype.itemsize > 2 else 1
    columns, depth = largest_block(n, 64 // narrow), largest_block(k, 128 // narrow)
    parts = 1
    while (
        2 * parts * (n // columns) <= PROGRAMS
        and parts < MAX_PARTS // row_blocks
        and k % (2 * parts * depth) == 0
    ):
        parts *= 2
    share = k // parts
    out = pl.pallas_call(
        functools.partial(_kernel, depth=depth),
        grid=(n // columns, parts, row_blocks),
        in_specs=[
            pl.BlockSpec((rows, share), lambda j, p, i: (i, p)),
            pl.BlockSpec(stack.shape, lambda j, p, i: (0, 0, 0)),
            pl.BlockSpec((1,), lambda j, p, i: (0,)),
        ],
        out_specs=pl.BlockSpec((None, rows, columns), lambda j, p, i: (p, i, j)),
        out_shape=jax.ShapeDtypeStruct(
            (parts, x.shape[0], n), x.dtype if parts == 1 else jnp.float32
        ),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=4),
        interpret=interpret,
        name="dense",
    )(x, stack, jnp.reshape(layer, (1,)).astype(jnp.int32))
    out = out[0] if parts == 1 else out.sum(axis=0).astype(x.dtype)
    return out[:t].reshape(t, *out_shape)

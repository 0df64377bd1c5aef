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
MAX_ROWS = 128
COLUMNS, DEPTH, STAGES = 64, 64, 4
"""Of a block: small enough for three programs on a multiprocessor."""


def unsupported(shape: tuple[int, ...], num_in: int) -> str | None:
    """Why the kernel cannot take a weight of this shape; None if it can."""
    depth, columns = math.prod(shape[:num_in]), math.prod(shape[num_in:])
    if depth % MIN_BLOCK or columns % MIN_BLOCK:
        return f"{depth} and {columns} must be multiples of {MIN_BLOCK}"
    return None


def _kernel(x_ref, w_ref, layer_ref, out_ref, *, rows: int, columns: int, depth: int, share: int):
    """A block of rows and columns, over this program's part of the contracted dimension."""
    layer, part = layer_ref[0], pl.program_id(1)
    first_column, first = pl.program_id(0) * columns, part * share
    row = pl.program_id(2) * rows + lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    live = row < x_ref.shape[0]

    def body(i, total):
        start = first + i * depth
        at = start + lax.broadcasted_iota(jnp.int32, (1, depth), 1)
        x = plgpu.load(x_ref.at[row, at], mask=live, other=0)
        w = w_ref[layer, pl.ds(start, depth), pl.ds(first_column, columns)]
        return total + jnp.dot(x, w, preferred_element_type=jnp.float32)

    total = lax.fori_loop(0, share // depth, body, jnp.zeros((rows, columns), jnp.float32))
    at = first_column + lax.broadcasted_iota(jnp.int32, (1, columns), 1)
    plgpu.store(out_ref.at[part, row, at], total.astype(out_ref.dtype), mask=live)


def matmul_parts(
    x: jax.Array, stack: jax.Array, layer: jax.Array, num_in: int, *, interpret: bool = False
) -> jax.Array:
    """See `model.ops.dense.matmul_parts`; stack is [L, in..., out...]."""
    t, out_shape = x.shape[0], stack.shape[1 + num_in :]
    k, n = math.prod(stack.shape[1 : 1 + num_in]), math.prod(out_shape)
    x, stack = x.reshape(t, k), stack.reshape(stack.shape[0], k, n)
    rows = MIN_BLOCK
    while rows < min(t, MAX_ROWS):
        rows *= 2
    row_blocks = -(-t // rows)
    narrow = 2 if x.dtype.itemsize > 2 else 1
    columns, depth = largest_block(n, COLUMNS // narrow), largest_block(k, DEPTH // narrow)
    parts = 1
    while (
        2 * parts * (n // columns) <= PROGRAMS
        and parts < MAX_PARTS // row_blocks
        and k % (2 * parts * depth) == 0
    ):
        parts *= 2
    share = k // parts
    operands = (x, stack, jnp.reshape(layer, (1,)).astype(jnp.int32))
    out = pl.pallas_call(
        functools.partial(_kernel, rows=rows, columns=columns, depth=depth, share=share),
        grid=(n // columns, parts, row_blocks),
        in_specs=[_whole(a.shape) for a in operands],
        out_specs=_whole((parts, t, n)),
        out_shape=jax.ShapeDtypeStruct((parts, t, n), x.dtype if parts == 1 else jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=8 if rows > 64 else 4, num_stages=STAGES),
        interpret=interpret,
        name="dense",
    )(*operands)
    return out.reshape(parts, t, *out_shape)


def _whole(shape: tuple[int, ...]) -> pl.BlockSpec:
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))

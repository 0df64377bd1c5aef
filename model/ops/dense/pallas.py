"""A few rows times one layer of a weight stack, in Pallas (Triton): no layer is copied out.

The contracted dimension is cut over programs, so that even a narrow matrix keeps all
multiprocessors reading; their float32 parts are added in a fixed order by what consumes them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from model.ops.kernels import largest_block, whole

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


def _kernel(x_ref, layer_ref, *refs, rows: int, columns: tuple[int, ...], depth: int, share: int):
    """A block of rows and columns, over this program's part of the contracted dimension.

    `refs`: the weights [L, K, N], then as many outputs [P, T, N]; `columns` of a block of each.
    """
    layer, part = layer_ref[0], pl.program_id(1)
    first = part * share
    row = pl.program_id(2) * rows + lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    live = row < x_ref.shape[0]

    def product(block, w_ref, out_ref, columns: int) -> None:
        def body(i, total):
            start = first + i * depth
            at = start + lax.broadcasted_iota(jnp.int32, (1, depth), 1)
            x = plgpu.load(x_ref.at[row, at], mask=live, other=0)
            w = w_ref[layer, pl.ds(start, depth), pl.ds(block * columns, columns)]
            return total + jnp.dot(x, w, preferred_element_type=jnp.float32)

        total = lax.fori_loop(0, share // depth, body, jnp.zeros((rows, columns), jnp.float32))
        at = block * columns + lax.broadcasted_iota(jnp.int32, (1, columns), 1)
        plgpu.store(out_ref.at[part, row, at], total.astype(out_ref.dtype), mask=live)

    block = pl.program_id(0)
    for w_ref, out_ref, size in zip(
        refs[: len(columns)], refs[len(columns) :], columns, strict=True
    ):
        blocks = w_ref.shape[2] // size
        if len(columns) == 1:
            product(block, w_ref, out_ref, size)
        else:
            here = functools.partial(product, block, w_ref, out_ref, size)
            pl.when((block >= 0) & (block < blocks))(here)
        block = block - blocks


def matmul_parts(
    x: jax.Array,
    stacks: Sequence[jax.Array],
    layer: jax.Array,
    num_in: int,
    *,
    interpret: bool = False,
) -> list[jax.Array]:
    """See `model.ops.dense.matmul_parts`; the stacks are [L, in..., out...]."""
    t = x.shape[0]
    out_shapes = [stack.shape[1 + num_in :] for stack in stacks]
    k = math.prod(stacks[0].shape[1 : 1 + num_in])
    x, stacks = x.reshape(t, k), [stack.reshape(stack.shape[0], k, -1) for stack in stacks]
    rows = MIN_BLOCK
    while rows < min(t, MAX_ROWS):
        rows *= 2
    row_blocks = -(-t // rows)
    narrow = 2 if x.dtype.itemsize > 2 else 1
    columns = tuple(largest_block(stack.shape[2], COLUMNS // narrow) for stack in stacks)
    blocks = sum(stack.shape[2] // size for stack, size in zip(stacks, columns, strict=True))
    depth = largest_block(k, DEPTH // narrow)
    parts = 1
    while (
        2 * parts * blocks <= PROGRAMS
        and parts < MAX_PARTS // row_blocks
        and k % (2 * parts * depth) == 0
    ):
        parts *= 2
    # A program that has a multiprocessor for itself must read further ahead.
    stages = STAGES if blocks * parts * row_blocks > PROGRAMS // 2 else STAGES + 2
    operands = (x, jnp.reshape(layer, (1,)).astype(jnp.int32), *stacks)
    shapes = [(parts, t, stack.shape[2]) for stack in stacks]
    out = pl.pallas_call(
        functools.partial(_kernel, rows=rows, columns=columns, depth=depth, share=k // parts),
        grid=(blocks, parts, row_blocks),
        in_specs=[whole(a.shape) for a in operands],
        out_specs=[whole(shape) for shape in shapes],
        out_shape=[
            jax.ShapeDtypeStruct(shape, x.dtype if parts == 1 else jnp.float32) for shape in shapes
        ],
        compiler_params=plgpu.CompilerParams(num_warps=8 if rows > 64 else 4, num_stages=stages),
        interpret=interpret,
        name="dense",
    )(*operands)
    return [a.reshape(parts, t, *shape) for a, shape in zip(out, out_shapes, strict=True)]
